"""PPOConfig: the settings of a PPO run, under TRL's names and with TRL's defaults."""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, TypeAlias, get_args

import numpy as np

from ..ops._ppo_options import Aggregation
from .callers import warn
from .kl_controller import MAX_KL_ERROR
from .stats import flatten_dict

Plain: TypeAlias = bool | int | float | str | None

KL_PENALTIES = ("kl", "abs", "mse", "full", "k3", "low_var_kl")
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
_CHOICES: dict[str, tuple[str | None, ...]] = {
    "kl_penalty": KL_PENALTIES,
    "loss_aggregation": AGGREGATIONS,
    "rollout_kind": (None, "tis", "icepop"),
    "rollout_level": ("token", "sequence", "geometric"),
}

_COUNTS = ("steps", "batch_size", "mini_batch_size", "gradient_accumulation_steps", "ppo_epochs", "compare_steps")
_POSITIVE = ("horizon", "target_kl", "ratio_threshold")
_WHOLE_NUMBERS = ("critic_warmup_steps",)
_NOT_NEGATIVE = ("learning_rate", "init_kl_coef", "cliprange", "cliprange_value", "vf_coef", "entropy_coef")
_UNIT_INTERVAL = ("gamma", "lam")
_POSITIVE_OR_NONE = ("max_grad_norm", "score_clip")
_SWITCHES = (
    "gradient_checkpointing",
    "inplace_logits_grad",
    "adap_kl_ctrl",
    "whiten_rewards",
    "gae_through_padding",
    "bootstrap_truncated",
    "early_stopping",
    "exact_update",
    "ragged_batches",
    "use_score_scaling",
    "use_score_norm",
    "remove_unused_columns",
    "optimize_device_cache",
)
_JSON_DICTS = ("tracker_kwargs", "accelerator_kwargs", "project_kwargs", "push_to_hub_if_best_kwargs")


@dataclass
class PPOConfig:
    """Settings of `PPOTrainer`. Names and defaults are those of TRL 0.11.4, `PPOConfig`.

    Fields may be set after construction; `check()` runs at construction and again at the start of each
    `PPOTrainer.step`, so a bad value is named before a weight changes.

    (*) inplace_logits_grad saves one buffer of the logits' size. The trainer turns it off by itself where `loss`,
    `train_minibatch` or `batched_forward_pass` is overridden and where a forward hook sees the logits. Set it to False
    if the model itself keeps its logits, for example in an attribute.

    (**) Each minibatch counts by its tokens, over accumulation and processes; advantages and rewards are whitened over the
    tokens of all processes; ratio guard, early stopping and statistics are of all of them. False: TRL's numbers, which are
    means of the means of the parts, and whitening on each process alone.

    Raises: ValueError for a value out of range, TypeError for a value of the wrong type, ImportError if
    `log_with="wandb"` and wandb is not installed.
    """

    # --- the run
    exp_name: str = os.path.basename(sys.argv[0])[: -len(".py")]  # name of the run, for the user; nothing reads it
    seed: int = 0  # seeds random, numpy and torch when the trainer is built
    steps: int = 20000  # samples in the whole run; only total_ppo_epochs is computed from it

    # --- batches, in samples of one process
    batch_size: int = 128  # samples per step()
    mini_batch_size: int = 128  # samples per forward pass
    gradient_accumulation_steps: int = 1  # minibatches per optimizer update
    ppo_epochs: int = 4  # passes over the batch per step()
    ragged_batches: bool = (
        False  # step() and the dataloader may have fewer samples than batch_size, as at a dataset's end
    )
    exact_update: bool = True  # accumulated and distributed parts make the update of one large minibatch (**)

    # --- optimizer
    learning_rate: float = 1.41e-5  # of the Adam optimizer that is made when none is passed
    max_grad_norm: float | None = None  # limit of the gradient's L2 norm at every update; None: no clipping
    critic_learning_rate: float | None = None  # of critic_model, in that Adam optimizer; None: learning_rate
    critic_warmup_steps: int = 0  # first step() calls, which train critic_model and leave the policy as it is
    gradient_checkpointing: bool = False  # recompute activations in backward: less memory, one more forward
    inplace_logits_grad: bool = True  # write the logits' gradient over the logits, where no user code sees them (*)

    # --- KL penalty, in nats
    adap_kl_ctrl: bool = True  # adapt the KL coefficient to `target`; False: keep init_kl_coef
    init_kl_coef: float = 0.2  # reward subtracted per nat of KL
    # per token: "kl" d = logprob - ref_logprob, "abs" |d|, "mse" d^2/2, "k3" (or "low_var_kl") exp(-d) - 1 + d, "full"
    # KL(policy||ref) over the whole vocabulary
    kl_penalty: str = "kl"
    target: float = 6.0  # KL per sequence that the adaptive controller aims at, in nats
    horizon: float = 10000.0  # time scale of the adaptive controller, in samples

    # --- advantages
    gamma: float = 1.0  # discount per token, in [0, 1]
    lam: float = 0.95  # GAE lambda per token, in [0, 1]
    lam_returns: float | None = None  # GAE lambda of the returns, in [0, 1]; None: lam
    whiten_rewards: bool = False  # divide the rewards by their standard deviation before GAE (the mean stays)
    gae_through_padding: bool = False  # TRL 0.11.4's numbers: GAE runs through padding and holes of response_masks
    bootstrap_truncated: bool = False  # a response without an end id at its end goes on with the value after it

    # --- loss
    cliprange: float = 0.2  # ratio is clipped to [1 - cliprange, 1 + cliprange]
    cliprange_high: float | None = None  # the ratio's upper bound is 1 + this; None: cliprange
    dual_clip: float | None = (
        None  # for a negative advantage A the loss is at most -A dual_clip; above 1, None: no bound
    )
    cliprange_value: float = 0.2  # value predictions are clipped to the old value +- this
    vf_coef: float = 0.1  # weight of the value loss in the total
    entropy_coef: float = 0.0  # weight of the entropy per token, in nats, that is subtracted from the loss
    # "token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm" or "token_sum", see `ppo_loss`
    loss_aggregation: str = "token_mean"
    # importance weights for step(rollout_logprobs=...), see `rollout_weights`: None (no weights), "tis" or "icepop"
    rollout_kind: str | None = None
    rollout_level: str = "token"  # of the ratios: "token", "sequence" or "geometric"
    rollout_low: float = 0.0  # bounds of the weights
    rollout_high: float = 2.0
    ratio_threshold: float = 10.0  # a minibatch whose mean ratio exceeds this is skipped

    # --- early stopping
    early_stopping: bool = False  # end the PPO epochs once the policy has moved too far
    target_kl: float = 1.0  # nats per token; the epochs end above 1.5 times this

    # --- scores
    use_score_scaling: bool = False  # divide scores by their running standard deviation
    use_score_norm: bool = False  # and subtract their running mean first; needs use_score_scaling
    score_clip: float | None = None  # clamp scores to +- this, after scaling

    # --- data and bookkeeping
    remove_unused_columns: bool = True  # drop dataset columns that the model's forward does not take
    dataset_num_proc: int | None = None  # accepted as in TRL; nothing reads it
    compare_steps: int = 1  # a new best mean score is looked for every so many steps
    push_to_hub_if_best_kwargs: dict | str | None = field(default_factory=dict)  # with a repo_id: push the best model
    optimize_device_cache: bool = False  # empty the device cache after each part of a step: slower, less memory

    # --- trackers and devices, handed to accelerate
    log_with: str | None = None  # "wandb", "tensorboard" or any other tracker accelerate knows
    tracker_project_name: str = "trl"  # the tracker's project
    tracker_kwargs: dict | str | None = field(default_factory=dict)  # init_kwargs of Accelerator.init_trackers
    accelerator_kwargs: dict | str | None = field(default_factory=dict)  # keyword arguments of Accelerator
    project_kwargs: dict | str | None = field(default_factory=dict)  # keyword arguments of ProjectConfiguration

    # --- labels: sent to the tracker, otherwise unused
    task_name: str | None = None  # label
    model_name: str = "gpt2"  # label
    query_dataset: str = "stanfordnlp/imdb"  # label
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"  # label

    # --- older spellings
    forward_batch_size: int | None = None  # deprecated: overwrites mini_batch_size
    optimize_cuda_cache: bool | None = None  # deprecated: overwrites optimize_device_cache

    # --- computed; values passed here are overwritten
    backward_batch_size: int | None = None  # samples per optimizer update: mini_batch_size * accumulation
    total_ppo_epochs: int | None = None  # step() calls in the run: ceil(steps / batch_size)
    world_size: int | None = None  # processes, set by the trainer
    global_backward_batch_size: int | None = None  # backward_batch_size * world_size
    global_batch_size: int | None = None  # batch_size * world_size
    is_encoder_decoder: bool | None = None  # set by the trainer from the model
    is_peft_model: bool | None = None  # set by the trainer from the model

    def __post_init__(self) -> None:
        if self.forward_batch_size is not None:
            warn(
                "PPOConfig: forward_batch_size is deprecated and overwrites mini_batch_size; use mini_batch_size",
                FutureWarning,
            )
            self.mini_batch_size = self.forward_batch_size
        if self.optimize_cuda_cache is not None:
            self.optimize_device_cache = self.optimize_cuda_cache
        self.world_size = None
        if self.log_with == "wandb":
            _require_wandb()
        self.check()

    def check(self) -> None:
        """Raise if a field is out of range; recompute the derived fields."""
        for name in _JSON_DICTS:
            setattr(self, name, as_dict(name, getattr(self, name)))
        for name in _SWITCHES:
            self._require_switch(name)
        for name in _COUNTS:
            self._require_int(name)
        self._require(_COUNTS, lambda x: x >= 1, "be at least 1")
        for name in ("seed", *_WHOLE_NUMBERS):
            self._require_int(name)
        self._require(_WHOLE_NUMBERS, lambda x: x >= 0, "not be negative")
        self._require(("seed",), lambda x: 0 <= x < 2**32, "lie in [0, 2**32), numpy's range")
        self._require(_POSITIVE, lambda x: x > 0, "be positive")
        self._require(_NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "be finite and not negative")
        self._require(_UNIT_INTERVAL, lambda x: 0 <= x <= 1, "lie in [0, 1]")
        given = [name for name in _POSITIVE_OR_NONE if getattr(self, name) is not None]
        self._require(given, lambda x: x > 0, "be positive or None")
        if self.critic_learning_rate is not None:
            self._require(("critic_learning_rate",), lambda x: 0 <= x < math.inf, "be None or finite and not negative")
        if self.lam_returns is not None:
            self._require(("lam_returns",), lambda x: 0 <= x <= 1, "be None or lie in [0, 1]")
        if self.bootstrap_truncated and self.gae_through_padding:
            raise ValueError("PPOConfig: bootstrap_truncated must be False with gae_through_padding=True, got True")
        if self.cliprange_high is not None:
            self._require(("cliprange_high",), lambda x: 0 <= x < math.inf, "be None or finite and not negative")
        if self.dual_clip is not None:
            self._require(("dual_clip",), lambda x: 1 < x <= 1e30, "be None or larger than 1 and at most 1e30")
        if self.adap_kl_ctrl:
            self._require(("target",), lambda x: x > 0, "be positive when adap_kl_ctrl is on")
            self._require_horizon()
        self._require_choices()
        if self.ragged_batches and not self.exact_update:
            raise ValueError("PPOConfig: ragged_batches must be False with exact_update=False, got True")
        self.backward_batch_size = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % self.backward_batch_size:
            raise ValueError(
                "PPOConfig: batch_size must be a multiple of mini_batch_size * gradient_accumulation_steps, got "
                f"{self.batch_size} and {self.mini_batch_size} * {self.gradient_accumulation_steps} = "
                f"{self.backward_batch_size}"
            )
        self.total_ppo_epochs = math.ceil(self.steps / self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        """All fields in one flat dict, nested keys joined by "/"."""
        return flatten_dict(dict(vars(self)))

    def to_plain_dict(self) -> dict[str, Plain]:
        """`to_dict` for trackers that take nothing but plain values: numpy's become Python's, anything else its text."""
        return {name: _plain(value) for name, value in self.to_dict().items()}

    def _require_horizon(self) -> None:
        samples = self.batch_size * (self.world_size or 1)
        if not self.horizon > MAX_KL_ERROR * samples:
            raise ValueError(
                f"PPOConfig: horizon must exceed {MAX_KL_ERROR} * batch_size * processes = {MAX_KL_ERROR * samples:g} "
                f"when adap_kl_ctrl is on (one step could make kl_coef 0 or negative), got {self.horizon}"
            )

    def _require_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str | None) or value not in choices:
                raise ValueError(f"PPOConfig: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
        self._require(("rollout_low", "rollout_high"), lambda x: 0 <= x < math.inf, "be finite and not negative")
        if self.rollout_low > self.rollout_high:
            got = f"{self.rollout_low} and {self.rollout_high}"
            raise ValueError(f"PPOConfig: rollout_low must be at most rollout_high, got {got}")

    def _require_switch(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"PPOConfig: {name} must be True or False, got {value!r} ({type(value).__name__})")

    def _require_int(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise TypeError(f"PPOConfig: {name} must be an int, got {value!r} ({type(value).__name__})")

    def _require(self, names: Iterable[str], holds: Callable[[Any], bool], condition: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"PPOConfig: {name} must be a number, got {value!r} ({type(value).__name__})")
            if not holds(value):  # false for NaN as well
                raise ValueError(f"PPOConfig: {name} must {condition}, got {value}")


def _plain(value: Any) -> Plain:
    value = value.item() if isinstance(value, np.generic) else value
    return value if value is None or type(value) in (bool, int, float, str) else str(value)


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """A field of keyword arguments as a dict: command lines hand over JSON text, and None means none."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"PPOConfig: {name} must be a dict or its JSON text, got {value!r:.80}: {error}") from None
    if value is None or value == "":
        return {}
    if not isinstance(value, dict):
        raise TypeError(
            f"PPOConfig: {name} must be a dict or its JSON text, got {value!r:.80} ({type(value).__name__})"
        )
    return value


def _require_wandb() -> None:
    from importlib.util import find_spec

    if find_spec("wandb") is None:
        raise ImportError("PPOConfig: log_with='wandb' needs wandb, which is not installed; run pip install wandb")
