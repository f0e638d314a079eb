"""Putting a trainer together: model, reference, data, optimizer, devices."""

import functools
import inspect
import warnings
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, set_seed
from torch.utils.weak import WeakIdKeyDictionary
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from ..models.auto import create_reference_model
from . import optimizers
from .config import PPOConfig
from .kl_controller import AdaptiveKLController, FixedKLController
from .stats import RunningMoments


class ConstructionMixin:
    """`PPOTrainer.__init__` and what it needs."""

    def __init__(
        self,
        config=None,
        model=None,
        ref_model=None,
        tokenizer=None,
        dataset=None,
        optimizer=None,
        data_collator=None,
        num_shared_layers=None,
        lr_scheduler=None,
        training_data_collator=None,
    ):
        """
        Args:
            config: `PPOConfig`; its seed is set here, for random, numpy and torch.
            model: the policy, a transformers model with a value head.
            ref_model: the reference of the KL penalty, of the same kind. None: a frozen copy of model, or, for a peft
                model, the model itself with its adapters off.
            tokenizer: pads inputs, on its padding_side.
            dataset: torch or datasets Dataset, served by `self.dataloader` in shuffled batches of config.batch_size.
            optimizer: None: Adam with config.learning_rate, fused where torch has that kernel.
            data_collator: collates the dataset's samples. training_data_collator: collates token ids inside `step`.
            num_shared_layers: first layers that are frozen and shared with the reference made here.
            lr_scheduler: stepped once per `step`.

        Raises: TypeError for an argument of the wrong type.

        Source: TRL 0.11.4, `PPOTrainer.__init__`.
        """
        _check_types(config, model, ref_model, tokenizer, dataset, lr_scheduler)
        self.config = config
        set_seed(config.seed)
        self._init_accelerator()
        self._init_models(model, ref_model, num_shared_layers)
        self._init_data(tokenizer, dataset, data_collator, training_data_collator)
        self._init_optimizer(optimizer, lr_scheduler)
        self._init_state()
        if config.gradient_checkpointing:
            self._enable_gradient_checkpointing()
        self._prepare()

    def _init_accelerator(self):
        config = self.config
        # without sync_with_dataloader=False, accelerate stops accumulating in the last batch of every dataloader pass
        accumulation = GradientAccumulationPlugin(
            num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
        )
        self.accelerator = Accelerator(
            log_with=config.log_with,
            gradient_accumulation_plugin=accumulation,
            project_config=ProjectConfiguration(**config.project_kwargs),
            **config.accelerator_kwargs,
        )
        config.world_size = self.accelerator.num_processes
        config.global_backward_batch_size = config.backward_batch_size * config.world_size
        config.global_batch_size = config.batch_size * config.world_size
        self.is_distributed = self.accelerator.num_processes > 1

    def _init_models(self, model, ref_model, num_shared_layers):
        self.model = model
        self.is_encoder_decoder = bool(getattr(model, "is_encoder_decoder", False))
        self.is_peft_model = getattr(model, "is_peft_model", False)
        self.config.is_encoder_decoder = self.is_encoder_decoder
        self.config.is_peft_model = self.is_peft_model
        if ref_model is not None and num_shared_layers is not None:
            warnings.warn("PPOTrainer: num_shared_layers is ignored, since a ref_model was passed", stacklevel=4)
        if ref_model is not None and self.is_peft_model:
            warnings.warn(
                "PPOTrainer: ref_model is ignored, since the reference of a peft model is the model itself with "
                "its adapters off",
                stacklevel=4,
            )
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model, num_shared_layers=num_shared_layers)
        self.ref_model = ref_model
        self.optional_peft_ctx = model.pretrained_model.disable_adapter if self.is_peft_model else nullcontext
        self.model_params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._vocab_size = _vocab_size(model.pretrained_model)
        self._context = _context(model.pretrained_model)

    def _init_data(self, tokenizer, dataset, data_collator, training_data_collator):
        self.tokenizer = tokenizer
        self.dataset = dataset
        self._signature_columns = None
        self.dataloader = None
        if dataset is not None:
            self.dataloader = self.prepare_dataloader(dataset, data_collator)
        elif self.is_distributed:
            warnings.warn(
                "PPOTrainer: without a dataset every process sees the same samples unless you shard them, for "
                "example with trainer.accelerator.prepare(dataloader)",
                stacklevel=4,
            )
        self.data_collator = training_data_collator or DataCollatorForLanguageModeling(tokenizer, mlm=False)

    def _init_optimizer(self, optimizer, lr_scheduler):
        self.optimizer = optimizer or optimizers.make(
            torch.optim.Adam, self.model_params, self.accelerator.device, lr=self.config.learning_rate
        )
        self.lr_scheduler = lr_scheduler

    def _init_state(self):
        config = self.config
        self.kl_ctl = (
            AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
            if config.adap_kl_ctrl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = RunningMoments(self.accelerator)
        self.current_step = 0  # steps logged to tensorboard
        self.skipped_minibatches = 0  # by the ratio guard, over the trainer's life
        self.compare_step = 0
        self.highest_reward = torch.tensor(-float("inf"))
        if config.push_to_hub_if_best_kwargs and "repo_id" not in config.push_to_hub_if_best_kwargs:
            raise ValueError(
                "PPOConfig: push_to_hub_if_best_kwargs must have a repo_id, got "
                f"{sorted(config.push_to_hub_if_best_kwargs)}"
            )
        # what batched_forward_pass knows about the log-probabilities it made, for as long as someone holds them
        self._entropies, self._full_kls = WeakIdKeyDictionary(), WeakIdKeyDictionary()
        self._guarded = []  # [skipped, mean ratio] of the mini batches since the last optimizer update
        self._may_overwrite_logits = False

    def _enable_gradient_checkpointing(self):
        self.model.gradient_checkpointing_enable()
        self.model.pretrained_model.enable_input_require_grads()  # else frozen embeddings cut the graph

    def _prepare(self):
        """Hand everything to accelerate: devices, mixed precision, DDP, FSDP, DeepSpeed, trackers."""
        prepared = self.accelerator.prepare(
            self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler
        )
        self.model, self.optimizer, self.data_collator, self.dataloader, self.lr_scheduler = prepared
        if self.accelerator.distributed_type == "DEEPSPEED":
            if not self.is_peft_model:
                self.ref_model = self._prepare_deepspeed(self.ref_model)
        elif self.ref_model is not None:
            sharded = self.accelerator.distributed_type == "FSDP"  # DDP refuses a model that has nothing to train
            self.ref_model = self.accelerator.prepare_model(self.ref_model, evaluation_mode=not sharded)
        for prepared_model in (self.model, self.ref_model):
            self._keep_logits_dtype(prepared_model)
        pipelined = getattr(self.accelerator.unwrap_model(self.model), "is_sequential_parallel", False)
        self.current_device = torch.device("cuda:0") if pipelined else self.accelerator.device
        settings = self.config.to_dict()
        self.accelerator.init_trackers(
            self.config.tracker_project_name,
            init_kwargs=self.config.tracker_kwargs,
            config=settings if self.config.log_with == "tensorboard" else {"trl_ppo_trainer_config": settings},
        )

    def _keep_logits_dtype(self, model):
        """Autocast without accelerate's float32 copy of every output: the ops take half-precision logits as such."""
        model = model and self.accelerator.unwrap_model(model)
        forward = vars(model).get("_original_forward") if model else None  # set by accelerate where it wraps one
        if forward is None or self.accelerator.mixed_precision not in ("fp16", "bf16"):
            return

        @functools.wraps(forward)  # by which accelerate finds the way back to the plain forward
        def autocast_forward(*args, **kwargs):
            with self.accelerator.autocast():
                return forward(*args, **kwargs)

        model.forward = autocast_forward

    def _prepare_deepspeed(self, model):
        """The reference as a DeepSpeed engine: sharded under ZeRO-3, else whole on every rank."""
        import copy

        import deepspeed

        settings = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if settings["zero_optimization"]["stage"] != 3:
            settings["zero_optimization"]["stage"] = 0
        engine, *_ = deepspeed.initialize(model=model, config=settings)
        return engine.eval()

    def prepare_dataloader(self, dataset, data_collator=None):
        """A shuffled dataloader of whole batches of config.batch_size.

        Columns of a datasets.Dataset that the model's forward does not take are dropped, except label, query and
        response; config.remove_unused_columns=False keeps all.
        """
        if hasattr(dataset, "remove_columns"):
            dataset = self._remove_unused_columns(dataset)
        return torch.utils.data.DataLoader(
            dataset, batch_size=self.config.batch_size, collate_fn=data_collator, shuffle=True, drop_last=True
        )

    def _set_signature_columns_if_needed(self):
        if self._signature_columns is None:
            taken = inspect.signature(self.model.forward).parameters
            self._signature_columns = [*taken, "label", "query", "response"]

    def _remove_unused_columns(self, dataset):
        if not self.config.remove_unused_columns:
            return dataset
        self._set_signature_columns_if_needed()
        return dataset.remove_columns([name for name in dataset.column_names if name not in self._signature_columns])


def _check_types(config, model, ref_model, tokenizer, dataset, lr_scheduler):
    def require(holds, argument, kind, got):
        if not holds:
            raise TypeError(f"PPOTrainer: {argument} must be {kind}, got {type(got).__name__}")

    with_value_head = "a model with a value head, such as AutoModelForCausalLMWithValueHead"
    require(isinstance(config, PPOConfig), "config", "a PPOConfig", config)
    require(_has_value_head(model), "model", with_value_head, model)
    require(ref_model is None or _has_value_head(ref_model), "ref_model", f"None or {with_value_head}", ref_model)
    require(isinstance(tokenizer, PreTrainedTokenizerBase), "tokenizer", "a transformers tokenizer", tokenizer)
    # a datasets.Dataset is no torch Dataset, but is indexed like one
    indexed = isinstance(dataset, torch.utils.data.Dataset) or hasattr(dataset, "column_names")
    require(dataset is None or indexed, "dataset", "a torch or datasets Dataset", dataset)
    scheduler = torch.optim.lr_scheduler.LRScheduler
    require(
        lr_scheduler is None or isinstance(lr_scheduler, scheduler), "lr_scheduler", "a torch LRScheduler", lr_scheduler
    )


def _has_value_head(model):
    return isinstance(model, torch.nn.Module) and hasattr(model, "pretrained_model") and hasattr(model, "v_head")


def _vocab_size(pretrained_model):
    """Rows of the embedding; None if the model does not say."""
    embedding = pretrained_model.get_input_embeddings()
    return getattr(embedding, "num_embeddings", None) or getattr(pretrained_model.config, "vocab_size", None)


def _context(pretrained_model):
    """Longest sequence the config allows, in tokens; None if it sets no limit, as for relative positions."""
    config = pretrained_model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None)
