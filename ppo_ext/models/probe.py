"""What a model makes of a few tokens: measured where no list of configurations could be complete."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch.nn.functional import pad

from .modes import evaluating

_TOKENS = 8
_NUDGES = 4.0  # a gap of so many times what a change of the embeddings' last bits makes is more than rounding


def logits(
    model: Any, left: int = 0, right: int = 0, pad_id: int = 0, first_position: int | None = None, nudged: bool = False
) -> torch.Tensor | None:
    """The logits [1, 8, V] of eight fixed ids, in eval mode, with autograd's graph unless gradients are off.

    Args:
        left, right: columns of padding before and after the ids that are read first, hidden by the attention mask.
        first_position: what position_ids begin with; None if the model makes them itself.
        nudged: change the last bits of the embeddings, for `alike`.

    None where nothing can be measured: weights on meta or sharded (FSDP, DeepSpeed ZeRO-3), or a model whose forward
    pass needs more than ids.
    """
    model = getattr(model, "_orig_mod", model)  # compiling for eight ids would take longer than all the rest
    if not _is_whole(model):
        return None
    inputs = token_inputs(model, left, right, pad_id)
    if first_position is not None:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0) + first_position
    try:
        with evaluating(model), _nudging(model, nudged):
            return model(**inputs).logits[:, left : left + _TOKENS]
    except Exception:  # the step of such a model is the user's own, and so is its error
        return None


@torch.no_grad()
def generated(model: Any, left: int = 0, pad_id: int = 0, nudged: bool = False) -> torch.Tensor | None:
    """The logits [1, 3, V] from which `generate` would choose three tokens after the first five of the eight ids.

    It is made to choose the last three, as rounding alone may change what is likeliest. None where it cannot be measured.
    """
    model = getattr(model, "_orig_mod", model)
    if not _is_whole(model):
        return None
    inputs = token_inputs(model, left, pad_id=pad_id)
    chosen = inputs["input_ids"][:, -3:]
    inputs = {name: x[:, :-3] for name, x in inputs.items()}
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1, "pad_token_id": pad_id}
    forced = transformers.LogitsProcessorList([_Forced(chosen, inputs["input_ids"].shape[1])])
    try:
        with evaluating(model), _nudging(model, nudged):
            outputs = model.generate(
                **inputs, **options, logits_processor=forced, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(outputs.logits, dim=1)
    except Exception:
        return None


class _Forced(transformers.LogitsProcessor):
    """Leaves one token to choose from at each step."""

    def __init__(self, ids: torch.Tensor, width: int) -> None:
        self.ids, self.width = ids, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        return torch.full_like(scores, -torch.inf).scatter(1, self.ids[:, step : step + 1], 0.0)


@contextmanager
def _nudging(model: Any, nudged: bool) -> Iterator[None]:
    """Within the block each number of an embedding is moved by its last bit, up or down, the same on every call."""
    if not nudged:
        yield
        return

    def nudge(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = 2 * torch.randint(2, output.shape, generator=torch.Generator().manual_seed(0), device="cpu") - 1
        return output * (1 + signs.to(output) * torch.finfo(output.dtype).eps)

    with model.get_input_embeddings().register_forward_hook(nudge):
        yield


def _is_whole(model: Any) -> bool:
    return not any(parameter.device.type == "meta" or parameter.numel() == 0 for parameter in model.parameters())


def reads_ahead(model: Any) -> bool:
    """Whether the logits of seven tokens depend on the eighth; False where it cannot be measured.

    What they depend on has a gradient, which for the embedding of a later token is exactly 0 in a causal model.
    """
    embedded = []

    def keep(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1].clone()

    model = getattr(model, "_orig_mod", model)
    try:
        reader = model.get_decoder() if model.config.is_encoder_decoder else model
        with torch.enable_grad(), reader.get_input_embeddings().register_forward_hook(keep):
            found = logits(model)
            if found is None or not embedded:
                return False
            (grad,) = torch.autograd.grad(found[:, :-1].sum(), embedded[-1])
    except Exception:  # a model that names no embedding, or has no gradients in eval mode
        return False
    return bool(grad.flatten(end_dim=-2)[-1].abs().max() > 0)


def token_inputs(model: Any, left: int = 0, right: int = 0, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """What a transformers or peft model is given to read: eight fixed ids between columns of padding."""
    embedding = model.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or model.config.get_text_config().vocab_size
    # From the whole vocabulary: at its beginning are special tokens, over a row of which some models lose all precision.
    ids = (torch.arange(1, _TOKENS + 1, dtype=torch.int64, device="cpu") * size // (_TOKENS + 1)).unsqueeze(0)
    ids = ids.to(next(embedding.parameters()).device)
    columns = (left, right)
    inputs = {"input_ids": pad(ids, columns, value=pad_id), "attention_mask": pad(torch.ones_like(ids), columns)}
    if model.config.is_encoder_decoder:
        inputs |= {f"decoder_{name}": tensor for name, tensor in inputs.items()}
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


def alike(a: torch.Tensor, b: torch.Tensor, nudged: torch.Tensor | None) -> bool:
    """Whether two logits agree on most of the tokens but for the rounding of a whole model.

    How much that is depends on the model as well as on its dtype: it is taken from `nudged`, which are the logits a of
    embeddings with other last bits (None if they could not be had). On most: rounding may send a token to another expert,
    and a mask that hides too little changes all of them.
    """
    rounding = max(1e-3, 16 * torch.finfo(a.dtype).eps) * a.float().std(dim=-1)
    if nudged is not None:
        rounding = torch.maximum(rounding, _NUDGES * _gaps(a, nudged))
    return not bool((_gaps(a, b) / rounding).median() > 1)


def _gaps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.float() - b.float()).abs().amax(dim=-1)


def divergence(a: torch.Tensor, b: torch.Tensor) -> float:
    """The mean over the tokens of KL(a || b), in nats."""
    a, b = (x.detach().double().log_softmax(dim=-1) for x in (a, b))
    return torch.nn.functional.kl_div(b, a, log_target=True, reduction="sum").item() / _TOKENS
