"""The functions of `trl.core`, computed by ppo_ext's ops. Signatures and meanings are those of TRL 0.11.4."""

import gc
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed

from ..ops.logprobs import logprobs, logprobs_and_entropy
from ..ops.masked import masked_mean, masked_var
from ..ops.masked import masked_whiten as _masked_whiten
from ..trainer.stats import WANDB_PADDING, convert_to_scalar, flatten_dict, stack_dicts, stats_to_np
from ._names import module_getattr

__all__ = [
    "LengthSampler",
    "PPODecorators",
    "WANDB_PADDING",
    "add_suffix",
    "average_torch_dicts",
    "build_bert_batch_from_txt",
    "clip_by_value",
    "convert_to_scalar",
    "entropy_from_logits",
    "flatten_dict",
    "listify_batch",
    "logprobs_from_logits",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "pad_to_size",
    "randn_tensor",
    "respond_to_batch",
    "set_seed",
    "stack_dicts",
    "stats_to_np",
    "top_k_top_p_filtering",
    "whiten",
]


def logprobs_from_logits(logits, labels, gather=True):
    """Log-probability of each label: [..., V], [...] -> [...] float32; gather=False: all of them, [..., V]."""
    return logprobs(logits, labels) if gather else F.log_softmax(logits, dim=-1)


def entropy_from_logits(logits):
    """Entropy of each row: [..., V] -> [...] float32, finite also where a logit is -inf."""
    no_labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return logprobs_and_entropy(logits, no_labels)[1]


def masked_whiten(values, mask, shift_mean=True):
    """(values - mean) / sqrt(var + 1e-8), with mean and variance over the tokens whose mask is 1.

    As in TRL, masked entries are transformed as well; `ppo_ext.masked_whiten` sets them to 0.
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + 1e-8)
    return whitened if shift_mean else whitened + mean


def whiten(values, shift_mean=True):
    """Values shifted and scaled to variance 1 and mean 0; without shift_mean they keep their mean."""
    return _masked_whiten(values, torch.ones_like(values), shift_mean)


def clip_by_value(x, tensor_min, tensor_max):
    """max(min(x, tensor_max), tensor_min); the bounds are tensors or numbers."""
    low, high = (torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in (tensor_min, tensor_max))
    return torch.max(torch.min(x, high), low)


def pad_to_size(tensor, size, dim=1, padding=50256):
    """A 1-D tensor, or a 2-D one along dimension `dim`, filled up with `padding` to `size` entries."""
    dim = 0 if tensor.dim() == 1 else dim
    missing = list(tensor.shape)
    missing[dim] = size - missing[dim]
    return torch.cat([tensor, tensor.new_full(missing, padding)], dim=dim)


def add_suffix(input_dict, suffix):
    """The dict with `suffix` at the end of every key."""
    return {key + suffix: value for key, value in input_dict.items()}


def average_torch_dicts(list_of_dicts):
    """The mean over the dicts of each entry of the first; the tensors under a key have one shape."""
    return {key: torch.stack([each[key] for each in list_of_dicts]).mean(dim=0) for key in list_of_dicts[0]}


def listify_batch(tensor):
    """The list of a tensor's rows."""
    return list(tensor.unbind())


def build_bert_batch_from_txt(text_list, tokenizer, device):
    """Token ids and attention mask of texts: [B, T] int64 and [B, T] float32, both filled up with 0 on the right."""
    rows = [tokenizer.encode(text, return_tensors="pt").to(device) for text in text_list]
    longest = max(row.shape[1] for row in rows)
    masks = [torch.ones(row.shape, device=device) for row in rows]
    return tuple(torch.cat([pad_to_size(row, longest, padding=0) for row in batch]) for batch in (rows, masks))


def top_k_top_p_filtering(logits, top_k=0, top_p=1.0, filter_value=-float("inf"), min_tokens_to_keep=1):
    """Logits [B, V] with all but the likeliest entries set to filter_value.

    top_k > 0 keeps the k largest; 0 <= top_p < 1 then keeps the fewest whose probability reaches top_p.
    """
    if top_k > 0:
        k = min(max(top_k, min_tokens_to_keep), logits.shape[-1])
        logits = logits.masked_fill(logits < logits.topk(k).values[..., -1:], filter_value)
    if 0 <= top_p < 1:
        ascending, order = logits.sort(descending=False)
        drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        drop[..., -min_tokens_to_keep:] = False
        logits = logits.masked_fill(drop.scatter(-1, order, drop), filter_value)
    return logits


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """Sample txt_len tokens after queries [B, T]; returns [B, txt_len]."""
    input_ids = queries
    for _ in range(txt_len):
        logits = top_k_top_p_filtering(model(input_ids)[0][:, -1, :], top_k=top_k, top_p=top_p)
        next_token = torch.multinomial(logits.softmax(dim=-1), num_samples=1)
        input_ids = torch.cat([input_ids, next_token], dim=-1)
    return input_ids[:, -txt_len:]


class LengthSampler:
    """Each call draws a length in [min_value, max_value) with numpy's global random generator."""

    def __init__(self, min_value, max_value):
        self.values = list(range(min_value, max_value))

    def __call__(self):
        return np.random.choice(self.values)


class PPODecorators:
    """`with PPODecorators.empty_device_cache():` frees cached device memory, if optimize_device_cache is set.

    Both are usable as decorators too. TRL 0.7.0 to 0.7.2 say cuda for device.
    """

    optimize_cuda_cache = False
    optimize_device_cache = False

    @classmethod
    @contextmanager
    def empty_cuda_cache(cls):
        yield
        if cls.optimize_cuda_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()

    @classmethod
    @contextmanager
    def empty_device_cache(cls):
        yield
        if cls.optimize_device_cache and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()


def randn_tensor(shape, generator=None, device=None, dtype=None, layout=None):
    """Normal noise; a list of generators, one per row, makes each row reproducible by itself.

    Drawn on the generator's device and moved to `device`. Raises ValueError for a CUDA generator and another device.
    """
    device = torch.device(device or "cpu")
    layout = layout or torch.strided
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    for one in generators:
        if one is not None and one.device.type not in ("cpu", device.type):
            raise ValueError(f"randn_tensor: generator must be on the CPU or on {device}, got {one.device}")
    source = generators[0].device if generators[0] is not None else device
    rows = [tuple(shape)] if len(generators) == 1 else [(1, *shape[1:])] * shape[0]
    drawn = [
        torch.randn(row, generator=one, device=source, dtype=dtype, layout=layout)
        for row, one in zip(rows, generators, strict=True)
    ]
    return torch.cat(drawn).to(device)


if not TYPE_CHECKING:  # a type checker would accept any name because of it
    __getattr__ = module_getattr(__name__)
