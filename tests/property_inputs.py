"""Random inputs for test_properties.py. Hypothesis draws their structure and a seed; torch's generators draw the
numbers."""

import dataclasses

import torch
from cases import FLOATS
from hypothesis import strategies as st
from ops import (
    BIAS,
    BOOTSTRAP,
    HEAD,
    HIDDEN,
    HIDDEN_SIZE,
    LABELS,
    LAM,
    LOGITS,
    MASK,
    REF_LOGITS,
    ROW_COUNTS,
    SCORES,
    TEMPERATURE,
    TOKENS,
    WEIGHTS,
    Mode,
)

KINDS = ("normal", "1e4", "-inf", "subnormal", "zero")  # of entries; zeros have both signs
LAYOUTS = ("contiguous", "tokens first", "last first", "every second", "part of longer sequences", "behind an offset")
MASKS = (torch.bool, torch.int64, torch.float32)


@dataclasses.dataclass(frozen=True)
class Case:
    sequences: int
    tokens: int
    vocabulary: int
    dtype: torch.dtype
    layout: str
    mask: torch.dtype
    density: float  # of tokens that count
    kinds: tuple
    seed: int

    def generator(self):
        return torch.Generator().manual_seed(self.seed)


def cases(kinds=KINDS, dtypes=FLOATS):
    """Batches of 0 to 5 sequences, or of 17, one more than the 16 that the CPU kernel of gae computes side by side. One
    case in three has few tokens and a vocabulary near one or several of the kernels' blocks of 2048."""

    def of(sequences, tokens, vocabulary):
        return st.builds(
            Case,
            sequences=st.sampled_from(sequences),
            tokens=tokens,
            vocabulary=vocabulary,
            dtype=st.sampled_from(dtypes),
            layout=st.sampled_from(LAYOUTS),
            mask=st.sampled_from(MASKS),
            density=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
            seed=st.integers(0, 2**32 - 1),
            kinds=st.lists(st.sampled_from(kinds), min_size=1, max_size=3, unique=True).map(tuple),
        )

    return st.one_of(
        *(of((0, 1, 2, 3, 4, 5, 17), st.integers(0, 33), st.integers(1, 600)) for _ in range(2)),
        of((1, 2, 3), st.integers(1, 2), st.sampled_from((2047, 2048, 2049, 4500, 6200))),
    )


def numbers(shape, case, generator, step=None):
    """Entries of the kinds of the case. Normal ones are multiples of `step`, if it is given."""
    wide = torch.promote_types(case.dtype, torch.float32)
    x = torch.randn(shape, generator=generator, dtype=wide).mul_(2.0)
    if step:
        x = x.div_(step).round_().mul_(step)
    high = {"1e4": 1e4, "-inf": -torch.inf, "subnormal": torch.finfo(case.dtype).tiny / 8, "zero": 0.0}
    low = {"1e4": -1e4, "-inf": -torch.inf, "subnormal": -torch.finfo(case.dtype).tiny / 8, "zero": -0.0}
    kind = torch.randint(2 * len(case.kinds), shape, generator=generator, dtype=torch.uint8)  # and its sign
    for i, name in enumerate(case.kinds):
        if name != "normal":
            x.masked_fill_(kind == 2 * i, low[name]).masked_fill_(kind == 2 * i + 1, high[name])
    return x.to(case.dtype)


def quarters(shape, case, generator):
    """Multiples of 1/4 in [-8, 8). Sums of a few of them are exact in every dtype, and sums of any number in
    float64."""
    return torch.randint(-32, 32, shape, generator=generator, dtype=torch.float32).div_(4).to(case.dtype)


def laid_out(x, layout):
    """The same numbers in another memory layout, with NaN (or invalid integers) in the gaps."""
    if layout == "contiguous" or x.numel() == 0:
        return x
    tokens = min(1, x.dim() - 1)
    if layout in ("tokens first", "last first"):
        dim = tokens if layout == "tokens first" else -1
        return x.movedim(dim, 0).contiguous().movedim(0, dim)
    filler = float("nan") if x.is_floating_point() else (1 if x.dtype == torch.bool else -100)
    if layout == "behind an offset":
        view = x.new_full((x.numel() + 1,), filler)[1:].view(x.shape)
    elif layout == "every second":
        view = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), filler)[..., 1::2]
    else:
        n = x.shape[tokens]
        view = x.new_full((*x.shape[:tokens], 3 * n, *x.shape[tokens + 1 :]), filler).narrow(tokens, n, n)
    return view.copy_(x)


def _pick(generator, *choices):
    return choices[int(torch.randint(len(choices), (), generator=generator))]


def _mode(op, generator, by_row):
    """One of the op's modes, or in a third of the cases none. by_row: also those whose results depend on the rows."""
    modes = [mode for mode in op.modes.values() if by_row or not mode.by_row]
    return _pick(generator, *modes, *[Mode({})] * (len(modes) // 2)) if modes else Mode({})


def arguments(op, case, device="cpu", draw=numbers, by_row=True):
    """Arguments of `op`, an entry of ops.OPS, by name, and incoming gradients for its per-token results."""
    generator, shape = case.generator(), (case.sequences, case.tokens)
    made = {name: _pick(generator, *values) for name, values in op.choices.items()}
    mode = _mode(op, generator, by_row)
    for name, role in op.arguments.items():
        if name in op.only_with and made[op.only_with[name][0]] != op.only_with[name][1]:
            continue
        if role is ROW_COUNTS and name not in mode.tensors:
            continue
        if name in op.optional and name not in mode.tensors:
            continue
        if role in (LOGITS, REF_LOGITS):
            made[name] = draw((*shape, case.vocabulary), case, generator)
            if draw is numbers:  # the largest logits are anywhere, in the last block, or in the first
                slope = _pick(generator, 0.0, 40.0, -40.0)
                made[name] = (made[name] + torch.linspace(0, slope, case.vocabulary)).to(case.dtype)
        elif role in (HIDDEN, HEAD, BIAS):
            shapes = {HIDDEN: (*shape, HIDDEN_SIZE), HEAD: (case.vocabulary, HIDDEN_SIZE), BIAS: (case.vocabulary,)}
            # only a bias bars a token; an infinite number elsewhere makes its rows NaN, or all
            kinds = case.kinds if role is BIAS else tuple(kind for kind in case.kinds if kind != "-inf") or ("normal",)
            made[name] = draw(shapes[role], dataclasses.replace(case, kinds=kinds), generator)
        elif role is TEMPERATURE and _pick(generator, True, False):
            made[name] = 0.25 + 2 * torch.rand(shape, generator=generator)
        elif role is LABELS:
            made[name] = torch.randint(case.vocabulary, shape, generator=generator)
        elif role in (MASK, WEIGHTS):
            mask = torch.rand(shape, generator=generator) < case.density
            weights = 0.25 * torch.randint(1, 9, shape, generator=generator) if role is WEIGHTS else 1
            made[name] = mask.to(case.mask) * weights if case.mask == torch.float32 else mask.to(case.mask)
        elif role is LAM and _pick(generator, True, False):
            made[name] = torch.rand(shape[:1], generator=generator)
        elif role is ROW_COUNTS:
            made[name] = torch.randint(case.tokens, case.tokens + 5, shape[:1], generator=generator)
        elif role in (SCORES, BOOTSTRAP):
            made[name] = draw(shape[:1], case, generator)
        elif role is TOKENS:
            step = {"step": 0.125} if name in op.coarse and draw is numbers else {}
            made[name] = draw(shape, case, generator, **step)
    made |= mode.options
    grads = {name: torch.randn(shape, generator=generator).to(device) for name in op.per_token}
    return {
        name: laid_out(x.to(device), case.layout) if isinstance(x, torch.Tensor) else x for name, x in made.items()
    }, grads
