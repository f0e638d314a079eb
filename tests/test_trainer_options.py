"""A short run with the options of today's PPO together: k3, two clip bounds, a dual clip, two lambdas, an entropy bonus."""

import tiny_models
import torch

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


def test_a_policy_learns_with_all_options():
    torch.manual_seed(0)
    trainer = tiny_models.trainer(
        batch_size=16, mini_batch_size=16, ppo_epochs=4, learning_rate=5e-3, init_kl_coef=0.01, **OPTIONS
    )
    queries = [torch.tensor([3 + i, 4]) for i in range(16)]
    settings = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": 6,
        "pad_token_id": tiny_models.PAD,
        "bad_words_ids": [[tiny_models.PAD]],
    }
    means, before = [], tiny_models.weights(trainer)
    for _ in range(40):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **settings)
        scores = [(response == WANTED).float().mean() for response in responses]
        stats = trainer.step(queries, responses, scores)
        assert all(torch.isfinite(torch.tensor(x)) for x in tiny_models.scalars(stats).values())
        means.append(torch.stack(scores).mean().item())
    assert sum(means[-5:]) / 5 > sum(means[:5]) / 5 + 0.2, means
    assert any(not torch.equal(now, before[name]) for name, now in tiny_models.weights(trainer).items())
    assert {"ppo/policy/clipfrac_dual", "ppo/policy/clipfrac_high", "ppo/loss/entropy"} <= stats.keys()
    assert stats["objective/kl"] >= 0  # k3 is never negative
