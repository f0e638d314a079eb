"""What `SFTTrainer` and `RewardTrainer` share on top of `transformers.Trainer`."""

import copy
from dataclasses import fields
from typing import Any, TypeVar

import torch
from transformers import Trainer, TrainingArguments

from ..models import lora
from ..models.limits import limits_of
from ..trainer.agreement import agreed
from .together import check_together, parting

Arguments = TypeVar("Arguments", bound=TrainingArguments)


class SupervisedTrainer(Trainer):
    """A `transformers.Trainer` whose loss is a mean over the items of a whole update, and which stops at NaN.

    An item is what the loss of a batch is a mean over: a predicted token in `SFTTrainer`, a pair in `RewardTrainer`.
    Items are counted over all accumulated batches and all processes, so that the gradient of an update is that of one
    large batch, however it is split. The loss of an evaluation is the mean over all its items too.

    A loss that is not finite raises FloatingPointError before the optimizer steps; the weights are then those of the
    last finite update.

    Checkpoints for resuming are those of transformers: model weights in safetensors, and beside them the optimizer's,
    scheduler's and random states, written by `torch.save` and read with `weights_only=True`, and `training_args.bin`,
    which resuming does not read.
    """

    def __init__(self, model: Any, args: TrainingArguments, peft_config: Any = None, **trainer_arguments: Any):
        if peft_config is not None:
            model = _with_adapter(type(self).__name__, model, args, peft_config)
        self._evaluated: list[torch.Tensor] = []
        super().__init__(model=model, args=args, **trainer_arguments)
        for kind in ("cp", "sp"):
            size = getattr(self, f"get_{kind}_size", lambda: 1)()  # transformers has these methods from 5 on
            if size > 1:
                raise ValueError(
                    f"{type(self).__name__}: {kind}_size must be 1, got {size}; a sequence must stay on one device"
                )
        self.limits = limits_of(self.model)
        # compute_loss divides by num_items_in_batch; with this transformers does not divide by the accumulation steps
        self.model_accepts_loss_kwargs = True

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' training. What would let one of several processes stop alone at its start is raised by all."""
        check_together(self, resume_from_checkpoint)
        with parting():
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def count_items(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The number of items in a batch, a 0-d tensor."""
        raise NotImplementedError

    def predictions(self, inputs: dict[str, Any], outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What `compute_metrics` gets of a batch: (predictions, labels). outputs: as returned by `compute_loss`."""
        raise NotImplementedError

    def mean_loss(
        self, total: torch.Tensor, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """The batch's share in the mean loss of the update, from the sum of its items' losses.

        num_items_in_batch: items of the whole update, from `get_batch_samples`; None: the mean over this batch alone.
        """
        if num_items_in_batch is None:
            return total / self.count_items(inputs).clamp(min=1)
        # Gradients are averaged over the processes, while the items are counted over all of them.
        return total * self.accelerator.num_processes / num_items_in_batch

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The batches of one update, and the number of items in them on all processes."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        count = torch.zeros((), dtype=torch.long, device=self.args.device)
        for batch in batches:
            count += self.count_items(batch).to(count.device)
        return batches, self.accelerator.gather(count).sum().clamp(min=1)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of one batch; raises FloatingPointError on all processes if one loss is not finite."""
        loss = super().training_step(*args, **kwargs)
        losses = self.accelerator.gather(loss).reshape(-1)
        finite = torch.isfinite(losses)
        if not finite.all():
            raise agreed(
                FloatingPointError(
                    f"{type(self).__name__}: loss must be finite, got {losses[~finite][0].item()} at step "
                    f"{self.state.global_step + 1}; lower learning_rate"
                )
            )
        return loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Loss, predictions and labels of one evaluation batch; the last two are None with prediction_loss_only."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        count = self.count_items(inputs).to(loss)
        self._evaluated.append(torch.stack([loss * count, count]))
        if prediction_loss_only:
            return loss, None, None
        return loss, *self.predictions(inputs, outputs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop, but its loss is the mean over items; there it is a mean of the batches' means."""
        self._evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        name = f"{kwargs.get('metric_key_prefix', 'eval')}_loss"
        if output.metrics and name in output.metrics:
            sums = self.accelerator.gather(torch.stack(self._evaluated)).cpu().double()
            total, count = sums.sum(dim=0).tolist()
            output.metrics[name] = total / max(count, 1)
        return output


def copy_arguments(kind: type[Arguments], args: TrainingArguments | None, **overrides: Any) -> Arguments:
    """A copy of `args` as `kind`, with the overrides that are not None.

    args: a `kind`, or plain TrainingArguments; None: defaults, with output_dir "tmp_trainer" as in TRL.
    """
    if args is None:
        args = kind(output_dir="tmp_trainer")
    elif not isinstance(args, kind):
        args = kind(**{field.name: getattr(args, field.name) for field in fields(args) if field.init})
    args = copy.copy(args)
    for name, value in overrides.items():
        if value is not None:
            setattr(args, name, value)
    return args


def refuse(name: str, args: TrainingArguments, allowed: dict[str, tuple[Any, str]]) -> None:
    """ValueError for the first field that is set to something else than the one value which is supported.

    allowed: field -> (value, what to do instead).
    """
    for field, (value, remedy) in allowed.items():
        if getattr(args, field, value) != value:
            raise ValueError(f"{name}: {field} must be {value!r}, got {getattr(args, field)!r}; {remedy}")


def choose_tokenizer(name: str, tokenizer: Any, processing_class: Any) -> Any:
    """The tokenizer under TRL 0.11's name or under that of later versions; ValueError if both are given."""
    if tokenizer is not None and processing_class is not None:
        raise ValueError(f"{name}: tokenizer must be None where processing_class is given, got both; they are the same")
    return processing_class if tokenizer is None else tokenizer


def _with_adapter(name: str, model: Any, args: TrainingArguments, peft_config: Any) -> Any:
    """The model with a new adapter; a PeftModel comes back as it is."""
    peft = lora.import_peft("peft_config")
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(f"{name}: peft_config must be a peft.PeftConfig, got {type(peft_config).__name__}")
    # transformers 5 calls it activation_checkpointing and keeps the old name until 6
    checkpointing = getattr(args, "gradient_checkpointing", None) or getattr(args, "activation_checkpointing", False)
    if checkpointing:
        # The base model is frozen: no input of its first layer needs a gradient, and a reentrant checkpoint, the default
        # before transformers 5, then passes none to the adapter.
        model.enable_input_require_grads()
    adapted, _ = lora.wrap(model, peft_config, {"use_gradient_checkpointing": checkpointing})
    return adapted
