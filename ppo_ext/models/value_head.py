"""The value head, and how it gets the hidden states that the language model head reads."""

from typing import Any

import torch
from torch import nn

from .token_scores import HeadInput


class ValueHead(nn.Module):
    """Dropout, then Linear(hidden_size, 1): [B, T, H] any float -> [B, T, 1] in the dtype of its own weight.

    Args:
        config: a transformers config, for the hidden size. Its summary_dropout_prob, if any, wins over the argument.
        v_head_init_strategy: None keeps nn.Linear's own initialisation; "normal" draws the weight from
            N(0, v_head_initializer_range^2) and sets the bias to 0.

    Raises: ValueError for another strategy, and for a config without a hidden size.

    Source: TRL 0.11.4, `ValueHead`, with the same draws from torch's generator.
    """

    def __init__(
        self,
        config: Any,
        summary_dropout_prob: float = 0.1,
        v_head_initializer_range: float = 0.2,
        v_head_init_strategy: str | None = None,
    ) -> None:
        super().__init__()
        if v_head_init_strategy not in (None, "normal"):
            raise ValueError(f"ValueHead: v_head_init_strategy must be None or 'normal', got {v_head_init_strategy!r}")
        dropout = getattr(config, "summary_dropout_prob", summary_dropout_prob)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # a default of half precision would round the values, which GAE and the value loss amplify
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.summary = nn.Linear(_hidden_size(config), 1, dtype=dtype)
        if v_head_init_strategy == "normal":
            nn.init.normal_(self.summary.weight, std=v_head_initializer_range)
            nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.dropout(hidden_states)
        # autocast would compute the value in half precision, whose rounding errors GAE and the value loss amplify
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self.summary(hidden_states.to(self.summary.weight.dtype))


def _hidden_size(config: Any) -> int:
    """The width of the last hidden states; OPT-350m projects them to its narrower embedding width.

    A vision-language config may have a hidden_size of its own, which is not that of its language model.
    """
    candidates: list[tuple[Any, str]] = [(config, "word_embed_proj_dim")]
    if getattr(config, "is_encoder_decoder", False):
        candidates.append((getattr(config, "decoder", None), "hidden_size"))
    candidates += [(getattr(config, "text_config", None), "hidden_size"), (config, "hidden_size")]
    for owner, name in candidates:
        if hasattr(owner, name):
            return getattr(owner, name)
    raise ValueError(f"ValueHead: config must have hidden_size, got {type(config).__name__} without it")


def run(model: Any, **kwargs: Any) -> tuple[Any, torch.Tensor]:
    """Returns a language model's output and the hidden states [B, T, H] that its head reads.

    These are `hidden_states[-1]` (`decoder_hidden_states[-1]`) of `output_hidden_states=True`, taken by a forward hook
    on the backbone. The option itself would keep the hidden states of every layer until the end: in a pass without
    gradients, as much memory as the logits of an 8B model. It is the fallback for a model whose backbone is not found,
    and for a compiled model, which may not call hooks that are registered after compilation.
    """
    kwargs["return_dict"] = True
    capture, handles = _Capture(), []
    try:
        for module in _backbones(model):
            handles.append(module.register_forward_hook(capture))
        output = model(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if not capture.hidden_states:
        output = model(**{**kwargs, "output_hidden_states": True})
        name = "decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"
        capture.hidden_states.append(output[name][-1])
    return output, capture.hidden_states[-1]


class _Capture:
    """A forward hook that keeps the last hidden states."""

    def __init__(self) -> None:
        self.hidden_states: list[torch.Tensor] = []

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        # a decoder that has a language model head of its own outputs logits and no last_hidden_state
        if hasattr(output, "last_hidden_state"):
            self.hidden_states.append(output.last_hidden_state)


def remove_hooks(model: nn.Module) -> None:
    """Removes the hooks of a forward pass that Ctrl-C has interrupted between setting and noting them."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(hook, (_Capture, HeadInput))]:
                del hooks[key]


def _backbones(model: Any) -> list[nn.Module]:
    """The modules whose output may be what the language model head reads.

    Usually that is `base_model`. OPT's language model calls the decoder inside its base model directly, and T5 has a
    decoder but no base model. Some of these modules contain others; the outer one ends its forward later, so the last
    output that `run` captures is the one that the head reads.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder = getattr(model.base_model, "decoder", None)
    candidates = dict.fromkeys((model.base_model, decoder, getattr(decoder, "base_model", None)))
    return [module for module in candidates if module is not None and module is not model]
