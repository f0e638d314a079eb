"""The sizes of a run: the full one, and the quick one of the tests."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Settings:
    """For two CPU cores and the packaged model; bench/demo/seeds.md has what it reached."""

    seed: int = 0

    held_out_openings: int = 96
    response_tokens: int = 24

    lora_rank: int = 16  # on every linear layer but the output head
    lora_alpha: int = 32

    steps: int = 16
    batch: int = 32  # responses per step
    minibatch: int = 16  # responses per optimizer update
    epochs: int = 2  # passes over each batch
    learning_rate: float = 1e-3  # of the adapter
    value_learning_rate: float = 2e-5  # of the value head
    kl_coef: float = 0.05  # start value; adapted towards `kl_target`
    kl_target: float = 6.0  # nats per response
    kl_horizon: float = 200.0  # responses
    vf_coef: float = 0.1

    control_steps: int = 16  # the run without a KL penalty
    save_every: int = 2  # steps between two saved states, from which --resume goes on


def full(seed: int) -> Settings:
    return Settings(seed=seed)


def quick(seed: int) -> Settings:
    """Every stage in about a second on a tiny model; shows that the parts fit together, not that anything is learned."""
    return replace(
        full(seed),
        held_out_openings=8, response_tokens=6, lora_rank=2, lora_alpha=4, steps=3, batch=8, minibatch=4,
        control_steps=2, save_every=1,
    )  # fmt: skip
