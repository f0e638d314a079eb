"""The PPO part of `trl.models.utils`."""

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from .._names import module_getattr
from .modeling_value_head import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead

SUPPORTED_ARCHITECTURES = (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead)

__all__ = ["SUPPORTED_ARCHITECTURES", "unwrap_model_for_generation"]


@contextmanager
def unwrap_model_for_generation(model, accelerator, is_peft_model=False):
    """Yields the model without accelerate's wrappers; under DeepSpeed ZeRO-3 with its weights gathered once.

    is_peft_model: switches the adapter off for the block, so that the reference generates. (TRL 0.11.4 means to, but
    does not enter the context that it makes, so the adapter stays on there.)
    """
    unwrapped = accelerator.unwrap_model(model)
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    else:
        gathered = nullcontext()
    with gathered, unwrapped.pretrained_model.disable_adapter() if is_peft_model else nullcontext():
        yield unwrapped


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
