"""What a full run on the packaged model and openings has to reach."""

from typing import NamedTuple

MAX_KL, MIN_DISTINCT_2, MAX_NLL_RISE = 10.0, 0.8, 0.5


class Check(NamedTuple):
    """One line of the gate."""

    text: str
    passed: bool


def gate(before: dict[str, float], after: dict[str, float]) -> list[Check]:
    """before, after: held-out figures."""
    gap = (after["rating"] - after["rating_ci"]) - (before["rating"] + before["rating_ci"])
    variety = after["distinct_2"] / before["distinct_2"] if before["distinct_2"] else 0.0
    rise = after["ref_nll"] - before["ref_nll"]
    kl = after["kl"]
    return [
        Check(f"the rating, which PPO never sees, is higher; 95 % intervals are apart by {gap:+.2f}", gap > 0),
        Check(f"KL to the model before PPO is at most {MAX_KL:.0f} nats per response: {kl:.1f}", kl <= MAX_KL),
        Check(f"distinct-2 is at least {MIN_DISTINCT_2} of the start's: {variety:.2f}", variety >= MIN_DISTINCT_2),
        Check(
            f"NLL under the model before rises by at most {MAX_NLL_RISE} per token: {rise:+.2f}", rise <= MAX_NLL_RISE
        ),
    ]
