"""The constructor of `PPOTrainer`: model, reference, optimizer, devices, and the state that steps change."""

import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ..models import lora
from ..models.auto import create_reference_model
from ..models.limits import first_position, limits_of
from ..models.wrapper import PreTrainedModelWrapper
from . import acceleration, constructor_inputs, critic, datasets, optimizers, policy_checks, sharding
from .base import TrainerBase
from .callers import warn
from .config import PPOConfig, as_dict
from .head_route import HeadRoute
from .kl_controller import AdaptiveKLController, FixedKLController
from .padding import PaddingWatch, left_padding_is_harmless, measure_padding, padding_is_inert
from .processes import ProcessesMixin
from .stats import RunningMoments
from .update_guard import UpdateGuard


class ConstructionMixin(ProcessesMixin, TrainerBase):
    """`PPOTrainer.__init__` and `prepare_dataloader`."""

    def __init__(
        self,
        config: PPOConfig | None = None,
        model: PreTrainedModelWrapper | None = None,
        ref_model: PreTrainedModelWrapper | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        num_shared_layers: int | None = None,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
        training_data_collator: Callable[[list[Any]], Any] | None = None,
        pattern: str | None = None,
        critic_model: Any = None,
    ) -> None:
        """
        Args:
            config: `PPOConfig`; its seed is set here, for random, numpy and torch. Of several processes each gets the
                seed plus its number for random and torch, so that they sample differently.
            model: the policy, a transformers model with a value head; with a critic_model also one without.
            ref_model: the reference of the KL penalty, of the same kind. None: a frozen copy of model, or, for a peft
                model, the model itself with its adapters off. (TRL takes the latter for a peft model in any case.)
            tokenizer: pads inputs, on its padding_side.
            dataset: torch or datasets Dataset, served by `self.dataloader` in shuffled batches of config.batch_size; a
                streaming one (IterableDataset) in its own order.
            optimizer: None: Adam with config.learning_rate, fused where torch has that kernel.
            data_collator: collates the dataset's samples. training_data_collator: collates token ids inside `step`.
            num_shared_layers: first layers that are frozen and shared with the reference made here. pattern: their name,
                see `create_reference_model`.
            lr_scheduler: stepped once per `step` (without config.exact_update by every process, as in TRL).
            critic_model: None, or a model of its own that gives the values: one with a value head, or one of
                transformers for classification with num_labels=1, such as a reward model. It is trained in place, and
                the policy's value head is not used. An optimizer that is passed has to hold its weights too.

        Raises: TypeError for an argument of the wrong type. ValueError for a policy that would not be trained or could
        not be saved, for a peft model that without its adapters is not the one that was loaded (pass a ref_model), and
        for an optimizer or a schedule that cannot work.

        Source: TRL 0.11.4, `PPOTrainer.__init__`.
        """
        constructor_inputs.check_types(config, model, ref_model, tokenizer, dataset, lr_scheduler, critic_model)
        assert config is not None and model is not None and tokenizer is not None  # check_types has refused None
        self.config = config
        set_seed(int(config.seed))  # random takes no numpy integer
        self.accelerator = acceleration.make_accelerator(config)
        self.is_distributed = self.accelerator.num_processes > 1
        critic.check_settings(config, critic_model, optimizer)
        self._saves_value_head = not critic.is_language_model(model)
        model, ref_model = critic.with_value_head(model), critic.with_value_head(ref_model)
        assert model is not None
        self._init_models(model, ref_model, num_shared_layers, pattern, critic_model)
        self.tokenizer = tokenizer
        policy_checks.check_causal(model.pretrained_model)
        self._left_padding_is_harmless = measure_padding(
            model.pretrained_model,
            self._left_padding_is_harmless,
            tokenizer,
            self._limits,
            config.batch_size * self.accelerator.num_processes,
        )
        self._padding_watch = PaddingWatch(tokenizer, model.pretrained_model)
        self._init_data(dataset, data_collator)
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)
        device = self.accelerator.device
        if optimizer is None:
            optimizer = optimizers.make(torch.optim.Adam, self._groups(), device, lr=config.learning_rate)
        optimizers.check(optimizer, lr_scheduler, self.model_params, device, self.critic_params)
        policy_checks.check(model, self.ref_model, optimizer)
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._init_state()
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            model.pretrained_model.enable_input_require_grads()  # frozen embeddings would otherwise cut the graph
            if self.critic is not None:
                self.critic.recompute_layers()
        self._prepare()
        self._draw_differently()

    def _init_models(
        self,
        model: PreTrainedModelWrapper,
        ref_model: PreTrainedModelWrapper | None,
        num_shared_layers: int | None,
        pattern: str | None,
        critic_model: Any,
    ) -> None:
        sharding.check_model(model)
        model.rehearse_saving()
        self.model = model
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        self.is_peft_model = getattr(model, "is_peft_model", False)
        self.config.is_encoder_decoder = self.is_encoder_decoder
        self.config.is_peft_model = self.is_peft_model
        if ref_model is not None and num_shared_layers is not None:
            warn("PPOTrainer: num_shared_layers is ignored, since a ref_model was passed")
        own_reference = ref_model is None and self.is_peft_model
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers=num_shared_layers, pattern=pattern)
        self.ref_model = ref_model
        self.optional_peft_ctx = partial(lora.adapters_off, model.pretrained_model) if own_reference else nullcontext
        if critic_model is not None:
            model.v_head.requires_grad_(False)  # it is not used
        self.model_params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.model_params:
            raise ValueError("PPOTrainer: model must have weights that require a gradient, got none")
        self._limits = limits_of(model.pretrained_model)
        if ref_model is not None:
            limits = limits_of(ref_model.pretrained_model)
            self._limits = self._limits.with_another(limits, "the reference model's vocabulary")
        self._left_padding_is_harmless = left_padding_is_harmless(model.pretrained_model)
        self._padding_is_inert = padding_is_inert(model.pretrained_model)
        self._first_position = first_position(model.pretrained_model)
        self._init_critic(critic_model)

    def _init_critic(self, critic_model: Any) -> None:
        self.critic, self.critic_params = None, []
        if critic_model is None:
            return
        sharding.check_critic(self.accelerator, critic_model)
        self.critic = critic.make(critic_model, self.model, self.ref_model)
        self.critic_params = [parameter for parameter in self.critic.parameters() if parameter.requires_grad]
        (backbone,) = self.critic.backbone
        self._limits = self._limits.with_another(limits_of(backbone), "the vocabulary of critic_model")
        self._left_padding_is_harmless &= left_padding_is_harmless(backbone)
        self._padding_is_inert &= padding_is_inert(backbone)

    def _groups(self) -> list[Any]:
        """What the optimizer is made of, where none is passed: the trained weights of the policy and of the critic."""
        if self.critic is None:
            return self.model_params
        rate, own_rate = self.config.learning_rate, self.config.critic_learning_rate
        of_critic = {"params": self.critic_params, "lr": rate if own_rate is None else own_rate}
        return [{"params": self.model_params}, of_critic]

    def _init_data(self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None) -> None:
        self.dataset = dataset
        self._signature_columns = None
        self.dataloader = None
        if dataset is not None:
            self.dataloader = self.prepare_dataloader(dataset, data_collator)
        elif self.is_distributed:
            warn(
                "PPOTrainer: without a dataset every process sees the same samples unless you shard them, for "
                "example with trainer.accelerator.prepare(dataloader)",
            )

    def _init_state(self) -> None:
        config = self.config
        self.kl_ctl = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = RunningMoments(self.accelerator)
        self._hidden_in_generation = None
        self._update_guard, self._head_route = UpdateGuard(), HeadRoute()
        self._samples, self._minibatch_weight, self._token_weight = [config.batch_size], None, None
        self.skipped_minibatches = self.current_step = self.compare_step = self.critic_steps = 0
        best_kwargs = as_dict("push_to_hub_if_best_kwargs", config.push_to_hub_if_best_kwargs)
        if best_kwargs and "repo_id" not in best_kwargs:
            raise ValueError(f"PPOConfig: push_to_hub_if_best_kwargs must have a repo_id, got {sorted(best_kwargs)}")
        if best_kwargs:  # TRL's `step` takes the presence of these two as the sign that the best model is pushed
            self.push_to_hub_kwargs = best_kwargs
            self.highest_reward = torch.tensor(-float("inf"), dtype=torch.float32, device="cpu")

    def _prepare(self) -> None:
        """Hands everything to accelerate: devices, mixed precision, DDP, FSDP, DeepSpeed, trackers."""
        acceleration.clip_in_deepspeed(self.accelerator, self.config.max_grad_norm)
        self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler = self.accelerator.prepare(
            self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler
        )
        if self.accelerator.distributed_type == "DEEPSPEED":
            if self.ref_model is not None:
                self.ref_model = self._prepare_deepspeed(self.ref_model)
        elif self.accelerator.distributed_type == "FSDP":
            self.model_params = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            if self.ref_model is not None:
                self.ref_model = sharding.prepare_reference(self.accelerator, self.ref_model)
        elif self.ref_model is not None:  # DDP refuses a model without trainable parameters
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=True)
        if self.critic is not None:
            self.critic = self.accelerator.prepare_model(self.critic)
        for prepared_model in (self.model, self.ref_model):
            acceleration.keep_logits_dtype(self.accelerator, prepared_model)
        pipelined = getattr(self.accelerator.unwrap_model(self.model), "is_sequential_parallel", False)
        self.current_device = torch.device("cuda:0") if pipelined else self.accelerator.device
        acceleration.start_trackers(self.accelerator, self.config)

    def _prepare_deepspeed(self, model: torch.nn.Module) -> Any:
        """A model that is only run forward, as a DeepSpeed engine: sharded under ZeRO-3, else whole on every rank."""
        return acceleration.deepspeed_engine(self.accelerator, model)

    def prepare_dataloader(
        self, dataset: Any, data_collator: Callable[[list[Any]], Any] | None = None
    ) -> torch.utils.data.DataLoader[Any]:
        """A shuffled dataloader of whole batches of config.batch_size; a streaming dataset keeps its own order. With
        config.ragged_batches the samples that are left at the end are a smaller batch.

        Columns of a datasets.Dataset that the model's forward does not take are dropped, except label, query and
        response; config.remove_unused_columns=False keeps all.

        Raises: TypeError for several splits, ValueError for fewer samples than one batch for every process.
        """
        datasets.check_dataset(dataset)
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset)
        processes, ragged = self.accelerator.num_processes, self.config.ragged_batches
        return datasets.batches(dataset, self.config.batch_size, processes, data_collator, ragged)

    def _filter_kwargs(self, kwargs: Mapping[str, Any], target_func: Callable[..., Any]) -> dict[str, Any]:
        """The keyword arguments that target_func names as parameters. Nothing here calls it; subclasses of TRL's do."""
        return {name: value for name, value in kwargs.items() if name in inspect.signature(target_func).parameters}

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            taken = inspect.signature(self.model.forward).parameters
            self._signature_columns = [*taken, "label", "query", "response"]

    def _remove_unused_columns(self, dataset: Any) -> Any:
        if not self.config.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        kept = self._signature_columns or []
        columns = dataset.column_names or []  # None: a stream that does not know them before it is read
        return dataset.remove_columns([name for name in columns if name not in kept])
