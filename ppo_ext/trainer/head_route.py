"""Whether the passes of a step can do without logits: what would see them, and what the head does to its output."""

import logging
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ..models import probe
from ..models.token_scores import HeadInput
from ..models.wrapper import PreTrainedModelWrapper
from ..ops import _native
from ..ops.check import FLOATS
from .acceleration import only_casts
from .overrides import is_overridden

logger = logging.getLogger(__name__)

_SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_LARGEST = 100.0  # of the logits with which a model is measured; a usual softcap of 30 shows from about 1 on


class Scaling(NamedTuple):
    """What a model does to its head's output: softcap * tanh(logit_scale * x / softcap), as in `linear_logprobs`."""

    logit_scale: float
    softcap: float | None


class Scalings(NamedTuple):
    """Of policy and reference."""

    policy: Scaling
    reference: Scaling


class HeadRoute:
    """Decides for policy and reference together: the two ways round differently in half precision, and the divergence of
    a policy from a reference that it equals has to be 0. Each model is measured once, on a few tokens."""

    def __init__(self) -> None:
        self.why_logits: str | None = None  # the reason why logits are made; None where none are
        self._measured: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Scaling | str]] = weakref.WeakKeyDictionary()

    def choose(self, trainer: Any) -> Scalings | None:
        """How the heads scale, or None where logits have to be made; the reason is logged when it changes."""
        found = self._scalings(trainer)
        reason = found if isinstance(found, str) else None
        if reason is not None and reason != self.why_logits:
            logger.info("PPOTrainer: logits are made, since %s", reason)
        self.why_logits = reason
        return None if isinstance(found, str) else found

    def _scalings(self, trainer: Any) -> Scalings | str:
        if is_overridden(trainer, "batched_forward_pass", "_forward_pass", "train_minibatch", "loss"):
            return "a method that is given logits is replaced"
        if trainer.config.kl_penalty == "full":
            return "kl_penalty is 'full'"
        found: list[Scaling] = []
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
            scaling = found[0] if model is None else self._scaling(model, trainer.accelerator)
            if isinstance(scaling, str):
                return f"{scaling} (of the {name})"
            found.append(scaling)
        return Scalings(*found)

    def _scaling(self, model: nn.Module, accelerator: Any) -> Scaling | str:
        if str(getattr(accelerator.distributed_type, "value", "")) not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            return f"the weights may be sharded, by {accelerator.distributed_type.value}"
        wrapper = accelerator.unwrap_model(model)
        if not isinstance(wrapper, PreTrainedModelWrapper):
            return f"the model is a {type(wrapper).__name__}"
        head = wrapper.pretrained_model.get_output_embeddings()
        reason = "the head is not found" if head is None else _obstacle(model, wrapper, head)
        if reason is None and (head.weight.dtype == torch.float16 or accelerator.mixed_precision == "fp16"):
            reason = "float16 would be multiplied as float32"
        if reason is not None:
            return reason
        key = (head, head.weight.dtype, head.weight.shape, tuple(_candidates(wrapper.pretrained_model.config)))
        known = self._measured.get(wrapper)
        if known is None or known[0] != key:
            known = self._measured[wrapper] = (key, _measure(wrapper.pretrained_model, head))
        return known[1]


# ---- what stands in the way ----------------------------------------------------------------------------------------


def _obstacle(model: nn.Module, wrapper: nn.Module, head: nn.Module) -> str | None:
    """Why this head has to make logits, as far as that can be seen without running it."""
    if hooks_see_logits(model, head):
        return "a forward hook sees them"
    for module in _around(model, head):
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return "the model is compiled"
        replaced = vars(module).get("forward")
        if replaced is not None and not only_casts(replaced):
            return f"the forward of its {type(module).__name__} is replaced"
        if module._backward_hooks or module._backward_pre_hooks:
            return f"its {type(module).__name__} has backward hooks"
    if type(wrapper).forward is not PreTrainedModelWrapper.forward:
        return f"{type(wrapper).__name__} has a forward of its own"
    if type(head).forward is not nn.Linear.forward:
        return f"the head is no plain linear layer but a {type(head).__name__}"
    return _obstacle_of_weight(head.weight)


def _obstacle_of_weight(weight: Any) -> str | None:
    if hasattr(weight, "full_tensor") or weight.layout != torch.strided or weight.dtype not in FLOATS:
        return f"the head's weight is a {type(weight).__name__} of {weight.dtype}"
    if weight.device.type == "meta" or not _native.available(weight.device.type):
        return f"the compiled operators are missing for {weight.device.type}"
    return None


def _around(model: nn.Module, head: nn.Module) -> Iterator[nn.Module]:
    """The modules that contain the head, from the outermost one to the head itself."""
    name = next((name for name, module in model.named_modules() if module is head), "")
    yield model
    for part in name.split(".") if name else ():
        model = model.get_submodule(part)
        yield model


def hooks_see_logits(model: nn.Module, lm_head: nn.Module | None) -> bool:
    """Whether a forward hook gets the model's logits, and may keep them: one on the LM head, around it or on all modules.

    The hooks of FSDP2 are passed over: they gather and free weights and keep no outputs.
    """
    if torch_module._global_forward_hooks:
        return True
    for module in model.modules():
        hooks = [h for h in module._forward_hooks.values() if not str(h.__module__).startswith("torch.distributed.")]
        if hooks and (lm_head is None or any(inner is lm_head for inner in module.modules())):
            return True
    return False


# ---- what the model does to the head's output ----------------------------------------------------------------------


def _candidates(config: Any) -> Iterator[Scaling]:
    """What the numbers in a config may mean."""
    configs = (config, config.get_text_config(decoder=True))

    def numbers(names: tuple[str, ...]) -> list[float]:
        found = (getattr(owner, name, None) for owner in configs for name in names)
        return [float(x) for x in found if isinstance(x, (int, float)) and x > 0]

    scales = numbers(_SCALES)
    for softcap in dict.fromkeys([None, *numbers(_SOFTCAPS)]):
        for scale in dict.fromkeys([1.0, *scales, *(1 / scale for scale in scales)]):
            yield Scaling(scale, softcap)


def _measure(model: Any, head: nn.Module) -> Scaling | str:
    """Which of the candidates the model's logits follow, when its head's output is replaced by numbers up to 100.

    The model's random numbers are not drawn from torch's generators, which stay as they are.
    """
    given: list[torch.Tensor] = []

    def ramp(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        steps = torch.linspace(-_LARGEST, _LARGEST, output.numel(), dtype=torch.float64, device=output.device)
        given.append(steps.view(output.shape).to(output.dtype))
        return given[-1]

    with torch.no_grad(), torch.random.fork_rng([head.weight.device] if head.weight.is_cuda else []):
        handle = head.register_forward_hook(ramp)
        try:
            logits = probe.logits(model)
        finally:
            handle.remove()
        with HeadInput(head) as read:
            empty = probe.logits(model)
    if logits is None or empty is None or read.hidden is None:
        return "the model cannot be measured on a few token ids"
    if len(given) != 1 or logits.shape != given[0].shape or read.hidden.shape[:-1] != logits.shape[:-1]:
        return "the head is not read once for each token"
    return _fitting(model.config, given[0].double(), logits)


def _fitting(config: Any, x: torch.Tensor, logits: torch.Tensor) -> Scaling | str:
    best, least = Scaling(1.0, None), float("inf")
    for scaling in _candidates(config):
        scaled = x * scaling.logit_scale
        expected = scaled if scaling.softcap is None else scaling.softcap * torch.tanh(scaled / scaling.softcap)
        error = ((expected - logits).abs().max() / expected.abs().max()).item()
        if error < least:
            best, least = scaling, error
    if least <= 8 * torch.finfo(logits.dtype).eps:
        return best
    return "the model's logits are not its head's output, scaled and capped as its config says"
