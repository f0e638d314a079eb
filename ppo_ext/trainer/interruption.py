"""What a step that was interrupted, by an error or by Ctrl-C, leaves behind, and how the next one starts without it."""

import contextlib
from typing import Any

import torch

from ..models import value_head
from ..ops.check_labels import check_labels
from .agreement import part
from .base import TrainerBase
from .fingerprint import inner
from .update_guard import UpdateGuard


class _Interruptible:
    """No generator: one that is interrupted itself would end some time later, when it is collected."""

    def __init__(self, trainer: "InterruptionMixin") -> None:
        self.trainer = trainer

    def __enter__(self) -> None:
        model = self.trainer.model
        self.trainer._flags_before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        if kind is not None:
            self.trainer._discard_unfinished_step()
        self.trainer._flags_before = None
        if error is not None and self.trainer.is_distributed:
            part(error)


class InterruptionMixin(TrainerBase):
    """`_interruptible`, `_update_optimizer` and `_discard_unfinished_step`.

    An interrupted step may have changed weights, optimizer, moments and random states; these stay as they are. What only
    the rest of that step would have used is discarded, so the next step is that of a new trainer in the same state, bit
    for bit: gradients, the update guard's list, hooks, adapters that are off.

    That happens at once and, should Ctrl-C come a second time meanwhile, at the start of the next step.
    """

    # parameters that a step may have frozen, by turning adapters off, with their flags; None if no step is unfinished
    _flags_before: list[tuple[torch.nn.Parameter, bool]] | None = None
    _state_before: set[Any] | None = None  # parameters of which the optimizer had a state before an unfinished update

    def _interruptible(self) -> "_Interruptible":
        """A context: an error or Ctrl-C within it leaves nothing that the next step would see."""
        return _Interruptible(self)

    def _update_optimizer(self) -> None:
        """The optimizer's step. If it is interrupted, states that it was about to create are discarded, not half there."""
        self._state_before = set(self.optimizer.state)
        self.optimizer.step()
        self._state_before = None

    def _discard_unfinished_step(self, always: bool = False) -> None:
        """Discards what an interrupted step has left; does nothing if there was none, unless `always` is set."""
        if self._flags_before is None and not always:
            return
        for model in (self.model, self.ref_model, self.critic):
            if model is not None:
                value_head.remove_hooks(model)
                model.eval()
                if hasattr(model, "require_forward_param_sync"):  # DDP: whether the next forward pass begins with a
                    model.require_forward_param_sync = True  # collective, on all or on none
        self._turn_adapters_on()
        groups = self.optimizer.param_groups
        held = [parameter for group in groups for parameter in group["params"]]
        for parameter in [*self.model.parameters(), *self.critic_params, *held]:
            parameter.grad = None
        self._discard_half_created_state()
        self._update_guard, self._minibatch_weight, self._token_weight = UpdateGuard(), None, None
        self.accelerator.gradient_state._set_sync_gradients(True)
        self._reset_scaler()
        torch.clear_autocast_cache()
        with contextlib.suppress(ValueError):  # a label of the interrupted step
            check_labels(self.current_device)
        self._flags_before = None

    def _turn_adapters_on(self) -> None:
        for module in self.model.modules():
            if getattr(module, "_disable_adapters", False):  # of a peft layer
                module.enable_adapters(True)
            if getattr(module, "_adapters_disabled", False):  # of a PeftModel
                module._adapters_disabled = False
        for parameter, requires_grad in self._flags_before or ():
            parameter.requires_grad_(requires_grad)

    def _discard_half_created_state(self) -> None:
        if self._state_before is None:
            return
        for parameter in set(self.optimizer.state) - self._state_before:
            del self.optimizer.state[parameter]
        self._state_before = None

    def _reset_scaler(self) -> None:
        """Ends an update in float16 between its unscaling and its end; the next one would refuse to begin."""
        optimizer, scaler = self.optimizer, self.accelerator.scaler
        if scaler is not None:
            scaler._per_optimizer_states.clear()
            optimizer._accelerate_step_called = False
            inner(optimizer, "optimizer").step = optimizer._optimizer_original_step_method
