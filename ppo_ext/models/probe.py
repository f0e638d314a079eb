"""What a model makes of a few tokens: measured where no list of configurations could be complete."""

from collections.abc import Iterable
from typing import Any

import torch

from .modes import evaluating

_TOKENS = 8


def logits(model: Any) -> torch.Tensor | None:
    """The logits [1, 8, V] of eight fixed ids, in eval mode, with autograd's graph unless gradients are off.

    None where nothing can be measured: weights on meta or sharded (FSDP, DeepSpeed ZeRO-3), or a model whose forward
    pass needs more than ids.
    """
    model = getattr(model, "_orig_mod", model)  # compiling for eight ids would take longer than all the rest
    if any(parameter.device.type == "meta" or parameter.numel() == 0 for parameter in model.parameters()):
        return None
    inputs = token_inputs(model)
    try:
        with evaluating(model):
            return model(**inputs).logits
    except Exception:  # the step of such a model is the user's own, and so is its error
        return None


def token_inputs(model: Any) -> dict[str, torch.Tensor]:
    """What a transformers or peft model is given to read: eight fixed ids, [1, 8]."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size
    ids = (torch.arange(1, _TOKENS + 1, dtype=torch.int64, device="cpu") % size).unsqueeze(0)
    ids = ids.to(next(embedding.parameters()).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def reached(result: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> set[int]:
    """The ids of those of the parameters that a result depends on, by autograd's graph; no gradient is computed."""
    wanted, found = {id(parameter) for parameter in parameters}, set()
    nodes, seen = [result.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        nodes += [before for before, _ in node.next_functions]
    return wanted & found


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two logits are equal up to the rounding of their dtype."""
    return bool((a - b).abs().max() <= 8 * torch.finfo(a.dtype).eps * a.abs().max())


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean over the tokens of KL(a || b), in nats."""
    a, b = (x.detach().double().log_softmax(dim=-1) for x in (a, b))
    return torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum").item() / _TOKENS
