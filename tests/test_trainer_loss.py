"""The KL penalty, the loss and the forward pass behind it, called by hand and inside a step."""

import math
import weakref

import pytest
import tiny_models
import torch
from tiny_models import steps

from ppo_ext.trainer import chunks


@pytest.mark.parametrize(
    "kl_penalty, expected",
    [
        ("kl", [0.5, 0.0, -2.0]),
        ("abs", [0.5, 0.0, 2.0]),
        ("mse", [0.125, 0.0, 2.0]),
        ("k3", [math.exp(-0.5) - 0.5, 0.0, math.exp(2.0) - 3.0]),
        ("low_var_kl", [math.exp(-0.5) - 0.5, 0.0, math.exp(2.0) - 3.0]),
    ],
)
def test_penalty_of_one_row(kl_penalty, expected):
    trainer = tiny_models.trainer(kl_penalty=kl_penalty)
    got = trainer._kl_penalty(torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.0, -1.0]))
    torch.testing.assert_close(got, torch.tensor(expected))


def test_rewards_of_a_k3_penalty():
    trainer = tiny_models.trainer(kl_penalty="k3", init_kl_coef=0.5)
    d, mask = torch.tensor([[0.5, 0.0, -2.0]]), torch.tensor([[1, 1, 1]])
    rewards, non_score, kls = trainer.compute_rewards(torch.tensor([3.0]), d, torch.zeros(1, 3), mask)
    expected = torch.exp(-d) - 1 + d
    torch.testing.assert_close(kls, expected)
    torch.testing.assert_close(non_score, -0.5 * expected)
    torch.testing.assert_close(rewards, -0.5 * expected + torch.tensor([[0.0, 0.0, 3.0]]))


def test_returns_have_a_lambda_of_their_own():
    """gamma 1 and a lambda of 1: the return is the sum of the rewards to come, whatever the values are."""
    values, rewards = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.5, 0.0, 3.0]])
    mask = torch.tensor([[1, 1, 1]])
    plain, decoupled = (
        tiny_models.trainer(lam=0.0, **given).compute_advantages(values, rewards, mask)
        for given in ({}, {"lam_returns": 1.0})
    )
    torch.testing.assert_close(plain[2], torch.tensor([[2.5, 4.0, 3.0]]))
    torch.testing.assert_close(decoupled[2], torch.tensor([[3.5, 3.0, 3.0]]))
    assert torch.equal(plain[1], decoupled[1])


def test_full_penalty_takes_whole_distributions_too():
    trainer = tiny_models.trainer(kl_penalty="full")
    logits, ref_logits = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    kls = trainer.compute_rewards(torch.zeros(2), logprobs, ref_logprobs, torch.ones(2, 3))[2]
    expected = (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
    torch.testing.assert_close(kls, expected)
    torch.testing.assert_close(trainer._kl_penalty(logprobs[0], ref_logprobs[0]), expected[0])


def test_full_penalty_holds_the_logits_of_one_mini_batch(monkeypatch):
    seen, op = [], chunks.full_kl
    monkeypatch.setattr(
        chunks, "full_kl", lambda logits, *args, **kw: seen.append(len(logits)) or op(logits, *args, **kw)
    )
    steps(tiny_models.trainer(kl_penalty="full"))
    assert seen == [2, 2]


def test_the_loss_gets_a_view_of_the_logits_and_no_copy():
    trainer = tiny_models.trainer()
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, inputs, return_logits=True
    )
    width = inputs["input_ids"].shape[1]
    assert logits._base is not None and logits.shape == (2, width - 1, tiny_models.VOCAB)
    assert logprobs.shape == values.shape == mask.shape == (2, width - 1) and mask.dtype == torch.int64
    assert logits.untyped_storage().nbytes() == 2 * width * tiny_models.VOCAB * 4


def test_the_entropy_statistic_comes_from_whatever_is_given():
    trainer = tiny_models.trainer()
    queries, responses, _ = tiny_models.batch(2, 1)
    inputs = trainer.prepare_model_inputs(queries, responses)
    logprobs, logits, values, mask = trainer.batched_forward_pass(
        trainer.model, queries, responses, inputs, return_logits=True
    )
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy()

    def statistic(logits, logprobs, **known):
        rest = (torch.zeros_like(values), torch.zeros_like(values))
        pg_loss, vf_loss, stats = trainer.loss(
            logprobs.detach(), values.detach(), logits, values, logprobs, mask, *rest, **known
        )
        assert torch.isfinite(pg_loss + vf_loss)
        return stats["policy/entropy"]

    expected = entropy[mask != 0].mean()
    torch.testing.assert_close(statistic(logits, logprobs), expected)
    torch.testing.assert_close(statistic(logits, logprobs.clone()), expected)
    torch.testing.assert_close(statistic(None, logprobs.clone(), entropy=entropy), expected)
    assert statistic(None, logprobs).isnan() and statistic(None, logprobs.clone()).isnan()


def test_the_two_losses_have_gradients_of_their_own():
    trainer = tiny_models.trainer()
    old, new, values, vpreds, advantages, returns = torch.randn(6, 2, 5).unbind()
    new, vpreds = (old + 0.1 * new).requires_grad_(), vpreds.clone().requires_grad_()
    logits, mask = torch.randn(2, 5, 7), torch.ones(2, 5, dtype=torch.int64)
    pg_loss, vf_loss, stats = trainer.loss(old, values, logits, vpreds, new, mask, advantages, returns)
    torch.testing.assert_close((pg_loss + vf_loss).detach(), stats["loss/total"])
    grads = torch.autograd.grad(3 * pg_loss, (new, vpreds), retain_graph=True, allow_unused=True)
    whole = torch.autograd.grad(pg_loss + vf_loss, (new, vpreds))
    assert grads[1] is None
    torch.testing.assert_close(grads[0], 3 * whole[0])


@pytest.mark.parametrize("inplace", [True, False])
def test_the_backward_pass_lets_go_of_the_logits_before_it_reaches_the_layers(inplace, monkeypatch):
    trainer = tiny_models.trainer(inplace_logits_grad=inplace, kl_penalty="full")  # which makes logits
    op, logits, held = chunks.logprobs_and_entropy, [], []

    def spy(x, *arguments, **options):
        logits.append(weakref.ref(x))
        return op(x, *arguments, **options)

    monkeypatch.setattr(chunks, "logprobs_and_entropy", spy)
    layer = trainer.model.pretrained_model.transformer.h[1]
    layer.register_full_backward_hook(lambda *_: held.append(logits[-1]() is not None))
    steps(trainer)
    assert held == [False] * 4


def test_the_policy_loss_takes_the_bounds_of_the_config():
    """One token each: above the upper bound with a positive advantage, and far above it with a negative one."""
    logprobs = torch.tensor([[0.5, 2.0]])
    tensors = {name: torch.zeros(1, 2) for name in ("old_logprobs", "values", "vpreds", "returns")}
    tensors |= {"logprobs": logprobs, "advantages": torch.tensor([[1.0, -1.0]]), "mask": torch.ones(1, 2)}
    far = logprobs[0, 1].exp().item()
    for settings, expected in (
        ({}, (-1.2 + far) / 2),
        ({"cliprange_high": 0.4}, (-1.4 + far) / 2),
        ({"dual_clip": 3.0}, (-1.2 + 3.0) / 2),
        ({"cliprange_high": 0.4, "dual_clip": 3.0}, (-1.4 + 3.0) / 2),
    ):
        trainer = tiny_models.trainer(**settings)
        pg_loss, vf_loss, stats = trainer.loss(logits=None, entropy=torch.zeros(1, 2), **tensors)
        assert pg_loss.item() == pytest.approx(expected) and vf_loss == 0
        assert ("policy/clipfrac_high" in stats) == bool(settings)


def test_a_step_with_both_bounds():
    (stats,) = steps(tiny_models.trainer(cliprange_high=0.28, dual_clip=3.0), 1)
    assert stats["ppo/policy/clipfrac_dual"] == 0 and stats["ppo/policy/ratio_max"] >= 1
