"""Short runs with the options of today's PPO together: k3, two clip bounds, a dual clip, two lambdas, an entropy bonus, a
critic of its own; and runs with them that are resumed."""

import numpy as np
import pytest
import tiny_models
import torch

import ppo_ext
from ppo_ext.trainer import training
from ppo_ext.trainer.config import AGGREGATIONS

OPTIONS = {
    "kl_penalty": "k3",
    "cliprange_high": 0.28,
    "dual_clip": 3.0,
    "lam": 0.9,
    "lam_returns": 1.0,
    "bootstrap_truncated": True,
    "entropy_coef": 1e-3,
}
WANTED = 9  # the score is the share of this token in a response


def test_an_aggregation_is_refused_where_loss_is_replaced():
    trainer = tiny_models.trainer(loss_aggregation="token_sum")
    before, loss = tiny_models.weights(trainer), trainer.loss
    trainer.loss = lambda *args, **kwargs: loss(*args, **kwargs)
    with pytest.raises(
        ValueError, match="PPOConfig.loss_aggregation must be 'token_mean' where loss is replaced, got tok"
    ):
        tiny_models.steps(trainer)
    tiny_models.assert_unmoved(before, trainer)
    with pytest.raises(ValueError, match="loss_aggregation must be one of token_mean, seq_mean_token_mean.*got 'mean'"):
        ppo_ext.PPOConfig(loss_aggregation="mean")


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_loss_is_aggregated_as_the_op_does(name, monkeypatch):
    trainer = tiny_models.trainer(loss_aggregation=name, mini_batch_size=4, ppo_epochs=2, learning_rate=1e-4)
    seen, op = [], training.policy_and_value_loss
    monkeypatch.setattr(
        training, "policy_and_value_loss", lambda *args, **kw: seen.append((args, op(*args, **kw))) or seen[-1][1]
    )
    tiny_models.steps(trainer)
    ((logprobs, old, advantages, vpreds, values, returns, mask), (pg_loss, vf_loss, stats)) = seen[1]
    assert stats["policy/clipfrac"] == stats["val/clipfrac"] == 0
    surrogate = -advantages * (logprobs - old).exp()
    squares = 0.05 * (vpreds - returns) ** 2
    rows = mask.sum(1)
    divisor = {"token_mean": mask.sum(), "seq_mean_token_mean": len(mask) * rows[:, None], "token_sum": 1}
    divisor |= {"seq_mean_token_sum": len(mask), "seq_mean_token_sum_norm": len(mask) * mask.shape[1]}
    for found, term in ((pg_loss, surrogate), (vf_loss, squares)):
        assert found.item() == pytest.approx((term * mask / divisor[name]).sum().item(), rel=1e-3)


def critic_model():
    torch.manual_seed(5)
    return ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2", 5))


RESUMED = {
    "aggregation": {"loss_aggregation": "seq_mean_token_sum", "gradient_accumulation_steps": 2},
    "weights": {"rollout_kind": "icepop", "rollout_level": "geometric", "rollout_low": 0.5},
    "ragged": {"ragged_batches": True, "gradient_accumulation_steps": 2},
    "all": {**OPTIONS, "critic_warmup_steps": 2, "critic_learning_rate": 3e-3, "ragged_batches": True},
}


def steps_of(trainer, numbers):
    """The last statistics of some steps, of batches of 3 if they may be ragged."""
    for i in numbers:
        batch = tiny_models.batch(3 if trainer.config.ragged_batches else 4, 30 + i)
        rows = [-(ids % 7) / 3.0 for ids in batch[1]] if trainer.config.rollout_kind else None
        stats = trainer.step(*batch, rollout_logprobs=rows)
    return {key: value for key, value in stats.items() if not key.startswith("time/")}


@pytest.mark.filterwarnings("ignore:PPOTrainer.step. rollout_logprobs differ")
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_has_the_same_bits(name, tmp_path):
    def make():
        critic = critic_model() if name == "all" else None
        return tiny_models.trainer(critic_model=critic, **RESUMED[name])

    whole = make()
    expected = steps_of(whole, range(4))
    stopped = make()
    steps_of(stopped, range(1))
    stopped.save_run(tmp_path)
    resumed = make()
    steps_of(resumed, range(7, 10))  # load_run must overwrite whatever these change
    resumed.load_run(tmp_path)
    found = steps_of(resumed, range(1, 4))
    assert all(np.array_equal(found[key], value) for key, value in expected.items())
    for a, b in zip(resumed._trained_params(), whole._trained_params(), strict=True):
        assert torch.equal(a, b)
    other = tiny_models.trainer(critic_model=critic_model() if name == "all" else None)
    with pytest.raises(ValueError, match="load_run: PPOConfig"):
        other.load_run(tmp_path)


@pytest.mark.parametrize("with_critic", [False, True])
def test_a_policy_learns_with_all_options(with_critic):
    torch.manual_seed(0)
    own = (
        {"critic_model": critic_model(), "critic_warmup_steps": 3, "critic_learning_rate": 1e-3} if with_critic else {}
    )
    trainer = tiny_models.trainer(
        batch_size=16, mini_batch_size=16, ppo_epochs=4, learning_rate=5e-3, init_kl_coef=0.01, **OPTIONS, **own
    )
    queries = [torch.tensor([3 + i, 4]) for i in range(16)]
    settings = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 6,
        "pad_token_id": tiny_models.PAD,
        "bad_words_ids": [[tiny_models.PAD]],
    }
    means, errors, before = [], [], tiny_models.weights(trainer)
    for _ in range(40):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **settings)
        scores = [(response == WANTED).float().mean() for response in responses]
        stats = trainer.step(queries, responses, scores)
        assert all(torch.isfinite(torch.tensor(x)) for x in tiny_models.scalars(stats).values())
        means.append(torch.stack(scores).mean().item())
        errors.append(stats["ppo/val/error"])
        if with_critic and len(means) == 3:
            tiny_models.assert_unmoved(before, trainer)
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.2, means
    assert not with_critic or errors[2] < 0.5 * errors[0], errors  # of its warm-up
    assert any(not torch.equal(now, before[name]) for name, now in tiny_models.weights(trainer).items())
    assert {"ppo/policy/clipfrac_dual", "ppo/policy/clipfrac_high", "ppo/loss/entropy"} <= stats.keys()
    assert stats["objective/kl"] >= 0  # k3 is never negative
