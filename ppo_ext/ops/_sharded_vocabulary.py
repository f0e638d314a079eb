"""The ops over a vocabulary whose columns are spread over the processes of a group, as in tensor parallelism.

Every process has the same rows and some consecutive columns of each. The compiled operators make a few numbers a row of
these; one all_gather brings the numbers of all shards to all processes, which merge them in rank order in float64:

    log mass[r] = (m_r - m) / T + log s_r - log s,   m = max_r m_r,   s = sum_r exp((m_r - m) / T) s_r
    logprob     = log mass[r] + logprob within shard r,   of the shard r that has the label
    entropy     = sum_r mass[r] (entropy of shard r - log mass[r])
    log sum p^2 = log sum_r mass[r]^2 (sum p^2 within shard r)
    KL          = sum_r mass[r] (KL of shard r + log mass[r] - log reference mass[r])

so all have the same bits. The backward pass for logits is that of one process, given m and s of all columns: it needs no
collective. A shard with no probability (padding of -inf) has mass 0.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from . import _native, check
from ._groups import check_group, gather

Temperature = float | torch.Tensor  # float64, of the tokens' shape


class Shard(NamedTuple):
    """Where the columns of this process stand in the vocabulary."""

    group: Any
    start: int  # the id of the first column


def check_shard(op: str, group: Any, vocab_start: Any, device_type: str) -> Shard | None:
    """The arguments `group` and `vocab_start` of an op; None without a group."""
    check_group(op, group)
    if vocab_start is not None and (isinstance(vocab_start, bool) or not isinstance(vocab_start, int)):
        check.fail(op, "vocab_start", "be None or an int", type(vocab_start).__name__, TypeError)
    if (group is None) != (vocab_start is None):
        check.fail(op, "vocab_start", "be given with a group, and only then", vocab_start)
    if vocab_start is None:
        return None
    if not 0 <= vocab_start < 1 << 24:  # so that float32 holds it
        check.fail(op, "vocab_start", "lie in [0, 2**24)", vocab_start)
    require_native(op, device_type)
    return Shard(group, vocab_start)


def require_native(op: str, device_type: str) -> None:
    if not _native.available(device_type):
        check.fail(op, "group", f"be None where the compiled ops do not run, as on {device_type}", "a group")


def localize(labels: torch.Tensor, shard: Shard, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels as columns of this shard, 0 where it has another one; which it has)."""
    local = labels - shard.start
    owned = (local >= 0) & (local < columns)
    return torch.where(owned, local, 0), owned


class Rows(NamedTuple):
    """What is known of every row after the merge, in the tokens' shape and the dtype of the arithmetic."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    row_max: torch.Tensor
    log_sum: torch.Tensor
    others: tuple[torch.Tensor, ...] = ()  # log sum p^2, mean logit and top-1 hit of `linear_statistics`


def merge(
    op: str,
    own: Rows,
    labels: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: Temperature,
    shard: Shard,
    columns: int,
    validate: bool,
) -> Rows:
    """The rows over all shards, from those of this one, by one collective. labels: ids of the whole vocabulary."""
    numbers = torch.stack([x.flatten() for x in (*own[:4], *own.others)], dim=-1)
    place = numbers.new_tensor([[shard.start, shard.start + columns, *[0] * (numbers.shape[1] - 2)]])
    parts = gather(torch.cat([numbers, place]), shard.group).double()
    first, end = parts[:, -1, :2].unbind(-1)
    logprobs, entropy, row_max, log_sum, *others = parts[:, :-1].unbind(-1)
    flat = labels.flatten()
    owned = (flat >= first[:, None]) & (flat < end[:, None])
    if validate or (labels.device.type == "cpu" and not torch.compiler.is_compiling()):
        _check_ids(op, labels, owned, mask, first, end)
    flat_temperature = temperature.flatten() if isinstance(temperature, torch.Tensor) else temperature
    log_mass, whole_max, whole_sum = masses(row_max, log_sum, flat_temperature)
    of_label = torch.where(log_mass == -torch.inf, -torch.inf, logprobs + log_mass)
    found = torch.where(owned, of_label, 0.0).sum(0)
    found = torch.where(owned.sum(0) == 1, found, torch.nan)
    mass = log_mass.exp()
    whole_entropy = torch.where(mass == 0, 0.0, mass * (entropy - log_mass)).sum(0)
    statistics = _statistics(others, log_mass, row_max, owned, (first, end), found) if others else ()

    def counted(x: torch.Tensor) -> torch.Tensor:
        return x if mask is None else torch.where(mask.flatten(), x, 0.0)

    def shaped(x: torch.Tensor) -> torch.Tensor:
        return x.to(own.logprobs.dtype).reshape(labels.shape)

    return Rows(
        shaped(counted(found)),
        shaped(counted(whole_entropy)),
        shaped(whole_max),
        shaped(whole_sum),
        tuple(shaped(counted(x)) for x in statistics),
    )


def _statistics(
    others: list[torch.Tensor],
    log_mass: torch.Tensor,
    row_max: torch.Tensor,
    owned: torch.Tensor,
    place: tuple[torch.Tensor, torch.Tensor],
    logprobs: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """log sum p^2, mean logit and top-1 hit of each row of all columns, from those of the shards, [shards, N]."""
    log_squares, means, hits = others
    first, end = (x[:, None] for x in place)
    squares = torch.where(log_mass == -torch.inf, -torch.inf, 2 * log_mass + log_squares).logsumexp(0)
    mean = (means * (end - first)).sum(0) / (end - first).sum()
    of_label = torch.where(owned, first, 0.0).sum(0)  # where the shard of the label begins
    smaller = torch.where(first < of_label, row_max < row_max.max(dim=0).values, True).all(0)
    hit = (owned & (hits > 0) & (row_max == row_max.max(dim=0).values)).any(0) & smaller & ~logprobs.isnan()
    return squares, mean, hit


def masses(
    row_max: torch.Tensor, log_sum: torch.Tensor, temperature: Temperature
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log mass [shards, N], max [N], log sum [N] relative to it) from the max and log sum of each shard, [shards, N]."""
    whole_max = row_max.max(dim=0).values
    relative = (row_max - whole_max) / temperature + log_sum
    # a shard without probability; a row without any stays NaN
    relative = torch.where((row_max == -torch.inf) & (whole_max > -torch.inf), -torch.inf, relative)
    whole_sum = relative.exp().sum(0).log()
    return relative - whole_sum, whole_max, whole_sum


def _check_ids(
    op: str,
    labels: torch.Tensor,
    owned: torch.Tensor,
    mask: torch.Tensor | None,
    first: torch.Tensor,
    end: torch.Tensor,
) -> None:
    """ValueError, the same on all processes, for shards that overlap and for an id that is in none. The host waits."""
    order = first.argsort()
    if (end[order][:-1] > first[order][1:]).any():
        ranges = [[int(a), int(b)] for a, b in zip(first.tolist(), end.tolist(), strict=True)]
        check.fail(op, "vocab_start", "give every process other ids", f"the ranges {ranges}")
    found = check.first(owned.sum(0) != 1, mask, labels.shape)
    if found is not None:
        check.fail(op, f"labels{found}", "be an id of one of the shards", labels[tuple(found)].item())


class ShardedLogprobs(torch.autograd.Function):
    """`logprobs` and `logprobs_and_entropy`; ops: their operators (forward, backward, backward in place)."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None,
        temperatures: torch.Tensor | None,
        temperature: float,
        with_entropy: bool,
        inplace_backward: bool,
        op: str,
        ops: tuple,
        shard: Shard,
        validate: bool,
    ) -> Any:
        columns = logits.shape[-1]
        local, owned = localize(labels, shard, columns)
        logprobs, entropy, row_max, log_sum = ops[0](logits, local, mask, temperatures, temperature, with_entropy, None)
        own = Rows(logprobs, entropy if with_entropy else torch.zeros_like(logprobs), row_max, log_sum)
        divisor = temperature if temperatures is None else temperatures.double()
        rows = merge(op, own, labels, mask, divisor, shard, columns, validate)
        ctx.save_for_backward(logits, local, owned, mask, temperatures, *rows[1:4])
        ctx.temperature, ctx.inplace_backward, ctx.ops = temperature, inplace_backward, ops
        ctx.set_materialize_grads(False)
        return (rows.logprobs, rows.entropy) if with_entropy else rows.logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any = None) -> tuple:
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 11
        logits, local, owned, mask, temperatures, entropy, row_max, log_sum = ctx.saved_tensors
        grads = tuple(None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy))
        divisor = ctx.temperature if temperatures is None else temperatures
        # the operator takes the first column for that of the label where another shard has it; its own gradient:
        first = _first_column(logits[..., 0], grads, (entropy, row_max, log_sum), divisor)
        arguments = (*grads, local, mask, entropy, row_max, log_sum, temperatures, ctx.temperature)
        _, backward, inplace = ctx.ops
        if ctx.inplace_backward and check.overwritable(logits):
            inplace(logits, *arguments)
            torch.autograd.graph.increment_version(logits)
            grad = logits.detach()
        else:
            grad = backward(logits, *arguments)
        elsewhere = ~owned if mask is None else ~owned & mask
        grad[..., 0] = torch.where(elsewhere, first.to(grad.dtype), grad[..., 0])
        return grad, *(None,) * 10


def _first_column(x: torch.Tensor, grads: tuple, saved: tuple, temperature: Temperature) -> torch.Tensor:
    """-1/T * p (g + h (log p + entropy)) of the logits x of one column: its gradient where it is not the label's."""
    (grad_logprobs, grad_entropy), (entropy, row_max, log_sum) = grads, saved
    log_p = (x.double() - row_max) / temperature - log_sum
    inner = torch.zeros_like(log_p) if grad_logprobs is None else grad_logprobs.double()
    if grad_entropy is not None:
        inner = inner + grad_entropy * (log_p + entropy)
    p = log_p.exp()
    return torch.where(p == 0, 0.0, -p * inner / temperature)
