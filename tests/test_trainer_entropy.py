"""PPOConfig.entropy_coef: the entropy bonus, with logits and without."""

import pytest
import tiny_models
import torch

COEF, RATE = 0.5, 0.1


def stepped(kind=None, **settings):
    """A trainer of plain gradient descent after one step, and its statistics."""
    trainer = tiny_models.trainer(
        **{"mini_batch_size": 4, "ppo_epochs": 1, "init_kl_coef": 0.0, "adap_kl_ctrl": False, **settings},
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=RATE),
        kind=kind,
    )
    return trainer, trainer.step(*tiny_models.batch(4, 5))


def mean_entropy_and_gradients():
    """Of the policy before the step, by torch alone."""
    trainer = tiny_models.trainer(mini_batch_size=4)
    queries, responses, _ = tiny_models.batch(4, 5)
    model = trainer.model.eval()
    entropies = []
    for query, response in zip(queries, responses):
        logits = model(input_ids=torch.cat([query, response])[None])[0][0, len(query) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    mean = torch.cat(entropies).mean()
    mean.backward()
    return mean.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def replaced():
    import ppo_ext

    class Trainer(ppo_ext.PPOTrainer):
        def train_minibatch(self, *args, **kw):
            return super().train_minibatch(*args, **kw)

    return Trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"mini_batch_size": 2, "gradient_accumulation_steps": 2},
        {"kl_penalty": "full"},
        {"kl_penalty": "full", "inplace_logits_grad": False},
        {"kind": replaced()},
    ],
    ids=["no logits", "accumulated", "in place", "logits", "replaced"],
)
def test_an_update_also_climbs_the_entropy(settings):
    """What the bonus adds to one step of gradient descent is RATE * COEF times the gradient of the mean entropy."""
    plain, _ = stepped(**settings)
    trainer, stats = stepped(entropy_coef=COEF, **settings)
    entropy, gradients = mean_entropy_and_gradients()
    assert (trainer.why_logits is None) == ("kl_penalty" not in settings and "kind" not in settings)
    before, after = tiny_models.weights(plain), tiny_models.weights(trainer)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.02
    for name, gradient in gradients.items():
        torch.testing.assert_close(after[name] - before[name], RATE * COEF * gradient, rtol=1e-3, atol=2e-6)
    assert stats["ppo/policy/entropy"] == pytest.approx(entropy, rel=1e-5)
    assert stats["ppo/loss/total"] == pytest.approx(
        stats["ppo/loss/policy"] + 0.1 * stats["ppo/loss/value"] - COEF * entropy, rel=1e-4, abs=1e-5
    )


def loss_of(trainer, **given):
    tensors = {name: torch.zeros(1, 3) for name in ("old_logprobs", "values", "vpreds", "returns", "advantages")}
    tensors |= {"logprobs": torch.zeros(1, 3, requires_grad=True), "mask": torch.tensor([[1, 0, 1]]), "logits": None}
    return trainer.loss(**{**tensors, **given})


def test_the_entropy_term_counts_the_tokens_of_the_mask():
    trainer = tiny_models.trainer(entropy_coef=0.5)
    entropy = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    pg_loss, _, stats = loss_of(trainer, entropy=entropy)
    assert pg_loss.item() == -1.0 and stats["policy/entropy"] == 2.0 and not stats["policy/entropy"].requires_grad
    assert torch.autograd.grad(pg_loss, entropy)[0].tolist() == [[-0.25, 0.0, -0.25]]


def test_a_skipped_minibatch_has_no_bonus():
    trainer = tiny_models.trainer(entropy_coef=0.5)
    entropy, logprobs = torch.ones(1, 3, requires_grad=True), torch.full((1, 3), 5.0, requires_grad=True)
    pg_loss, _, _ = loss_of(trainer, entropy=entropy, logprobs=logprobs)
    assert pg_loss == 0 and not torch.autograd.grad(pg_loss, entropy)[0].any()


def test_a_bonus_without_gradient_is_refused():
    trainer = tiny_models.trainer(entropy_coef=0.5)
    sentence = r"PPOTrainer.loss: entropy or logits must have a gradient with entropy_coef > 0, got "
    with pytest.raises(ValueError, match=sentence + "neither"):
        loss_of(trainer)
    with pytest.raises(ValueError, match=sentence + "constants"):
        loss_of(trainer, logits=torch.zeros(1, 3, 7))


def test_a_replaced_loss_is_refused():
    trainer = tiny_models.trainer(entropy_coef=0.5)
    shipped, before = trainer.loss, tiny_models.weights(trainer)
    trainer.loss = lambda *args, **kw: shipped(*args, **kw)
    with pytest.raises(ValueError) as error:
        trainer.step(*tiny_models.batch(4, 5))
    assert str(error.value) == "PPOTrainer.step: PPOConfig.entropy_coef must be 0 where loss is replaced, got 0.5"
    tiny_models.assert_unmoved(before, trainer)
