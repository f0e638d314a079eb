"""Checks of a policy when the trainer is made: it is causal, something is trained, and the reference is and stays the
loaded model."""

from typing import Any

import torch

from ..models import lora, probe
from .callers import warn


def check_causal(backbone: Any) -> None:
    """Raises ValueError for a model whose log-probability of a token knows that token."""
    if probe.reads_ahead(backbone):
        base = backbone.get_base_model() if lora.is_peft_model(backbone) else backbone
        _fail(
            "model must give a token the same logits whatever follows it",
            f"a {type(base).__name__} whose tokens see later ones; load it with is_decoder=True or "
            'attn_implementation="eager" if one of them makes it causal, or choose another model',
        )


def check(model: Any, ref_model: Any, optimizer: Any) -> None:
    """Raises ValueError, or warns, where a run would go on without a word but train nothing or against a moving reference.

    Args:
        model: a model with a value head. optimizer: the one of the trainer.
        ref_model: the reference, or None for a peft model that is its own reference, with its adapters off.
    """
    backbone = model.pretrained_model
    held = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad and (id(p) in held or not held)}
    if not trained:
        warn(
            "PPOTrainer: only the value head is trained, since no weight of the language model requires a gradient and is "
            "in the optimizer; an adapter is loaded for training with from_pretrained(..., is_trainable=True)",
        )
    if not lora.is_peft_model(backbone):
        return
    lora.check_policy_adapter(backbone)
    with torch.enable_grad():
        on = probe.logits(backbone)
        with lora.adapters_off(backbone, keep_gradients=True):
            off = probe.logits(backbone)
    if on is None or off is None:
        return
    if trained and not probe.reached(on, trained.values()):
        _fail(
            "the adapter must have an effect on the logits",
            f"{len(trained)} trained weights without one; merged adapters need unmerge_adapter(), others set_adapter()",
        )
    if ref_model is None:
        _check_reference(model, trained, on, off)


def _check_reference(model: Any, trained: dict[str, torch.nn.Parameter], on: torch.Tensor, off: torch.Tensor) -> None:
    """`on`, `off`: the probe's logits with and without the adapters; without them the policy is its own reference."""
    moving = probe.reached(off, trained.values())
    if moving:
        name = next(name for name, parameter in trained.items() if id(parameter) in moving)
        _fail(
            "the model without its adapters, which is the reference, must stay as it is",
            f"{len(moving)} trained weights that it uses, such as {name}; train adapter weights only (LoraConfig("
            'bias="none"), frozen base weights), or pass a ref_model',
        )
    if probe.same(on, off):
        return
    kind = lora.initialisation(model.pretrained_model)
    if getattr(model, "adapters_changed_the_base", False) or kind not in lora.KEEP_THE_BASE:
        _fail(
            "the model without its adapters, which is the reference, must be the model that was loaded",
            f"an initialisation ({kind}) that changes the base weights; use init_lora_weights=True, or pass a ref_model",
        )
    warn(
        f"PPOTrainer: at the start the policy differs from its reference, the model without adapters, by "
        f"{probe.divergence(on, off):.3g} nats per token on a probe. That is right for an adapter that was trained from "
        "this reference before; to keep to the policy as it is now, pass ref_model=create_reference_model(model)",
    )


def _fail(condition: str, got: str) -> None:
    raise ValueError(f"PPOTrainer: {condition}, got {got}")
