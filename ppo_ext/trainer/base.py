"""The attributes that the parts of `PPOTrainer` share, declared once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from ..models.limits import Limits
from .config import PPOConfig
from .head_route import HeadRoute
from .kl_controller import AdaptiveKLController, FixedKLController
from .padding import PaddingWatch
from .stats import RunningMoments
from .update_guard import UpdateGuard


class TrainerBase:
    """Base of every part of `PPOTrainer`: annotations only, for readers and type checkers.

    `ConstructionMixin.__init__` sets the attributes. No values and no methods stand here: they would hide those of another
    base class in a program that inherits from both PPOTrainer and, for example, transformers.Trainer.
    """

    config: PPOConfig
    accelerator: Accelerator
    is_distributed: bool  # more than one process
    current_device: torch.device  # where the inputs of the model go

    model: Any  # a PreTrainedModelWrapper, or the DDP, FSDP or DeepSpeed module around it
    ref_model: Any  # likewise; None for a peft model, which is its own reference with its adapters off
    model_params: list[torch.nn.Parameter]  # those that are trained
    critic: Any  # a Critic, or the DDP module around it; None: the policy's value head gives the values
    critic_params: list[torch.nn.Parameter]  # those that are trained
    critic_steps: int  # steps with a critic; in the first config.critic_warmup_steps the policy stands still
    _saves_value_head: bool  # whether the policy came with one
    is_encoder_decoder: bool
    is_peft_model: bool
    optional_peft_ctx: Callable[[], AbstractContextManager[Any]]  # within it, a peft model is the reference
    _limits: Limits  # of what policy and reference can read
    _left_padding_is_harmless: bool  # it moves no position, given position_ids where the model takes them
    _hidden_in_generation: (
        bool | None
    )  # whether `generate` gives queries padded on the left their own responses; measured once
    _padding_is_inert: bool  # more or fewer columns of it change nothing but rounding
    _first_position: int  # what position_ids begin with
    _head_route: HeadRoute  # whether a step makes logits
    _padding_watch: PaddingWatch  # for padding in what callers hand over

    tokenizer: PreTrainedTokenizerBase
    data_collator: Callable[[list[dict[str, torch.Tensor]]], Any]  # pads the sequences of a step
    dataset: Any
    dataloader: Any  # None without a dataset
    _signature_columns: list[str] | None

    optimizer: Any  # accelerate's wrapper around a torch optimizer
    lr_scheduler: Any  # accelerate's wrapper around a torch schedule, or None
    kl_ctl: AdaptiveKLController | FixedKLController
    running: RunningMoments  # of the scores
    _update_guard: UpdateGuard
    _samples: list[int]  # of each process, those that count in this step; 0 where it sits out
    _minibatch_weight: torch.Tensor | None  # what its loss is multiplied by in an update of several parts
    _token_weight: torch.Tensor | None  # likewise its means over tokens, such as the mean ratio
    _has_rollout: bool  # whether this step was given rollout_logprobs
    skipped_minibatches: int  # by the ratio guard, since the trainer was made

    current_step: int  # steps sent to tensorboard
    # these two are set only if config.push_to_hub_if_best_kwargs is: TRL's `step` asks whether they are there
    highest_reward: torch.Tensor  # the best mean score so far
    push_to_hub_kwargs: dict[str, Any]
    compare_step: int  # steps since the trainer was made, of which every config.compare_steps-th may push
