"""The coefficient of the KL penalty: fixed, or adapted towards a target."""

MAX_KL_ERROR = 0.2  # the relative error that one update answers to, at most


class FixedKLController:
    """Keeps the KL coefficient as it is. Source: TRL 0.11.4, `FixedKLController`."""

    def __init__(self, kl_coef: float) -> None:
        self.value = float(kl_coef)

    def update(self, current: float, n_steps: int) -> None:
        """Does nothing; both controllers have the same methods."""


class AdaptiveKLController:
    """Raises the KL coefficient while the KL is above `target` and lowers it while it is below.

        error = min(max(current / target - 1, -0.2), 0.2)
        value = value * (1 + error * n_steps / horizon)

    n_steps must be less than horizon / 0.2, since the value could turn 0 or negative in one update otherwise; `PPOConfig`
    checks it.

    `value` is always a Python float; in TRL it turns into a numpy.float32 under NumPy 2.
    Source: arXiv 1909.08593, 2.2; TRL 0.11.4, `AdaptiveKLController`.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        self.value = float(init_kl_coef)
        self.target = target
        self.horizon = horizon

    def update(self, current: float, n_steps: int) -> None:
        """Changes `value`, given the KL per sequence of the last step (nats) and its number of samples."""
        if not self.horizon > MAX_KL_ERROR * n_steps:
            raise ValueError(
                f"AdaptiveKLController: horizon must exceed {MAX_KL_ERROR} * n_steps = {MAX_KL_ERROR * n_steps:g}, "
                f"got {self.horizon}"
            )
        error = min(max(float(current) / self.target - 1, -MAX_KL_ERROR), MAX_KL_ERROR)
        self.value *= 1 + error * n_steps / self.horizon
