"""PPO's loss of a minibatch straight from hidden states and the head's weights, with its gradients in the same pass."""

import torch
from torch.autograd.function import once_differentiable

from . import _native, _ppo_tokens, check, reference
from ._linear_checks import arithmetic, check_head, check_note, check_numbers, check_operator, check_values
from ._linear_gradients import RESULTS, STATES, Gradients, fold
from ._linear_head import Head, chunk_sizes
from .check_labels import note, note_labels

_OP = "ppo_loss_from_hidden"
_forward, _forward_name = _native.define(
    "_ppo_loss_from_hidden(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? temperatures,"
    f" {_ppo_tokens.TENSORS}, float temperature, float logit_scale, float softcap, {_ppo_tokens.NUMBERS},"
    " bool needs_hidden, bool needs_weight, bool needs_bias, Tensor(a!)? label_note)"
    f" -> ({_ppo_tokens.RESULTS}, Tensor grad_vpreds, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


@_native.register_fake(_forward_name)
def _(hidden, weight, labels, bias, temperatures, old_logprobs, *rest):
    mask, needs = rest[4], rest[-4:-1]
    found = _ppo_tokens.fake_results(mask, old_logprobs.dtype)
    of_head = zip((hidden, weight, weight if bias is None else bias), needs)
    return *found, *(x.new_empty(x.shape if need else 0) for x, need in of_head)


# ---- the operator ---------------------------------------------------------------------------------------------------


def _run(
    hidden, weight, labels, bias, temperatures, old_logprobs, advantages, vpreds, values, returns, mask,
    temperature, logit_scale, softcap, cliprange, cliprange_value, vf_coef, ratio_threshold, entropy_coef,
    needs_hidden, needs_weight, needs_bias, noted,
):  # fmt: skip
    tensors, numbers = (hidden, weight, labels, bias, mask, temperatures), (temperature, logit_scale, softcap)
    tokens = (old_logprobs, advantages, vpreds, values, returns)
    coefficients = (cliprange, cliprange_value, vf_coef, ratio_threshold, entropy_coef)
    check_operator(_OP, tensors, {})
    check_note(_OP, noted)
    check_numbers(_OP, *numbers)
    _ppo_tokens.check_tokens(_OP, labels, tokens, mask, coefficients)
    if hidden.device.type == "cpu":
        check_values(_OP, weight.shape[0], labels, mask, temperatures)
    elif noted is not None:
        note_labels(noted, labels, mask, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        head = Head(tensors, numbers, chunk_sizes)
        needs = (needs_hidden, needs_weight, needs_bias and bias is not None)
        chunks = _Chunks(head, tokens, mask, coefficients, needs)
        chunks.run()
        logprobs, entropy = (chunks.rows.back(x).view(labels.shape) for x in chunks.results[:, :2].unbind(1))
        found, _ = _ppo_tokens.whole_loss(logprobs, entropy, tokens, mask, coefficients)
        gradients = chunks.gradients.results(hidden, weight, bias)
    _ppo_tokens.zero_if_skipped(found.stats, gradients, coefficients)
    return *found, *gradients


_native.implement(_forward_name, _run)


class _Chunks:
    """The rows of a call, a chunk at a time: its logits, what they give, and at once their gradients."""

    def __init__(self, head, tokens, mask, coefficients, needs):
        self.head, self.rows = head, head.rows
        self.tokens = [head.of_tokens(x) for x in tokens]
        hidden_mask = head.rows.hidden_mask
        self.mask = torch.ones_like(head.targets, dtype=torch.bool) if hidden_mask is None else hidden_mask
        self.share = _ppo_tokens.share_of(mask)
        self.coefficients = coefficients
        self.inside = (head.targets >= 0) & (head.targets < head.vocabulary) & self.mask
        self.results = head.hidden.new_zeros(head.count, RESULTS, dtype=head.dtype)
        self.states = head.hidden.new_empty(head.count, STATES, dtype=torch.float64)
        self.any_needed = any(needs)
        kept = head.numbers[1:] == (1.0, 0.0) or not self.any_needed or head.hidden.is_cuda
        self.mapped = None if kept else head.new_tile()
        self.gradients = Gradients(head, needs, whole_weight=head.count > head.tile_rows)

    def run(self):
        head = self.head
        memory = head.new_tile(head.vocabulary if self.any_needed else None)
        for block in head.blocks():
            for columns, part in head.parts():
                self._fold(head.fill(self._place(memory, columns), block, columns, part), block, columns)
            if not self.any_needed:
                continue
            rows = self._row_gradients(block)
            for columns, part in head.parts():
                tile = self._place(memory, columns)[: block.stop - block.start, : columns.stop - columns.start]
                self.gradients.add(tile, rows, block, columns, part)
                if block.stop == head.count:
                    self.gradients.write_weight(columns)

    def _fold(self, tile, block, columns):
        head = self.head
        if self.mapped is not None:  # on a CPU, folding writes the scaled and capped logits over the products
            tile = self.mapped[: tile.shape[0], : tile.shape[1]].copy_(tile)
        state = (self.states[block], self.results[block])
        fold(tile, *head.at(block), *state, *head.where(columns), True, False)

    def _place(self, memory, columns):
        """Where the tile of these columns lies: beside those before it if they are needed again."""
        return memory[:, columns.start :] if self.any_needed else memory

    def _row_gradients(self, block):
        """What the gradients of the chunk's logits need, one number a row."""
        names = ("logprobs", "entropy", "row_max", "log_sum")  # the first of LinearResult in csrc/linear_logprobs.h
        rows = dict(zip(names, self.results[block, : len(names)].t().contiguous()))
        tokens = [x[block] for x in self.tokens]
        mask, share = self.mask[block], self.share
        grads = _ppo_tokens.row_gradients(rows.pop("logprobs"), tokens, mask, self.coefficients, share)
        if self.head.hidden.is_cuda:  # a label outside the vocabulary is no error there, and its row has no gradient
            grads = (None if grad is None else torch.where(self.inside[block], grad, 0) for grad in grads)
        return rows | dict(zip(("grad_logprobs", "grad_entropy"), grads))


# ---- autograd -------------------------------------------------------------------------------------------------------


class _PPOLossFromHidden(torch.autograd.Function):
    """The loss. Its gradients are known with it; the backward pass multiplies them by that of the loss."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, vpreds, outputs):
        loss, *grads = outputs
        ctx.save_for_backward(*grads)
        return loss.view_as(loss) if torch.compiler.is_compiling() else loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        needs = ctx.needs_input_grad[:4]
        grads = [grad if need else None for grad, need in zip(ctx.saved_tensors, needs)]
        return *_ppo_tokens.times(grads, grad_loss), None


def _apply(hidden, weight, labels, bias, temperatures, tokens, mask, numbers, noted):
    leaves = (hidden, weight, bias, tokens[2])
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    plain = (None if x is None else x.detach() for x in (hidden, weight, labels, bias, temperatures, *tokens, mask))
    *found, grad_hidden, grad_weight, grad_bias = _forward(*plain, *numbers, *needs[:3], noted)
    found = _ppo_tokens.TokenLoss(*found)
    if any(needs):
        outputs = (found.loss, grad_hidden, grad_weight, grad_bias, found.grad_vpreds)
        found = found._replace(loss=_PPOLossFromHidden.apply(*leaves, outputs))
    return found.loss, _ppo_tokens.named_stats(found)


def _reference(tensors, tokens, mask, numbers):
    hidden, weight, labels, bias, temperatures = tensors
    temperature, logit_scale, softcap, *coefficients = numbers
    return reference.ppo_loss_from_hidden(
        hidden,
        weight,
        labels,
        *tokens,
        mask,
        bias=bias,
        temperature=temperature if temperatures is None else temperatures,
        logit_scale=logit_scale,
        softcap=softcap or None,
        **dict(zip(_ppo_tokens.COEFFICIENTS, coefficients)),
    )


def ppo_loss_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor,
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cliprange: float = 0.2,
    cliprange_value: float = 0.2,
    vf_coef: float = 0.1,
    ratio_threshold: float = float("inf"),
    entropy_coef: float = 0.0,
    validate: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole PPO loss of a minibatch straight from what the head reads, with its gradients in the same pass.

        logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, labels, ...)
        loss = ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, ...)
               - entropy_coef * masked_mean(entropy, mask)

    Args:
        hidden, weight, labels, bias, temperature, logit_scale, softcap, validate: as in `linear_logprobs`.
        old_logprobs, advantages, vpreds, values, returns: of the labels' shape, as in `ppo_loss`.
        mask: of the labels' shape, bool, int or float, nonzero where a token counts. The other rows are left out of the
            products, and never read.
        cliprange, cliprange_value, vf_coef, ratio_threshold: as in `ppo_loss`.
        entropy_coef: weight of the entropy bonus, finite in float32. Where the ratio guard skips the minibatch, the
            bonus is 0 too.

    Returns:
        (loss, stats) as `ppo_loss` returns them, differentiable once with respect to hidden, weight, bias and vpreds,
        and in stats also policy/entropy, the mean entropy of the tokens that count. loss/total includes the bonus.

    Raises:
        The errors of `linear_logprobs` and `ppo_loss`.

    Notes:
        The gradient of a token's log-probability is known as soon as its row is, so that logits are neither kept nor
        computed again: three matrix products for both passes, where `linear_logprobs` takes four, two if the weight is
        frozen, one where nothing needs a gradient. The forward pass computes the gradients; the backward pass only
        multiplies them by that of the loss.
        Memory beyond inputs and gradients: the logits of one chunk of rows, at most 256 on a CPU and 2048 on CUDA. The
        gradient of a weight in half precision is added up in float32, in memory of its own if there are several chunks.
        The chunks follow from the number of the rows alone, so the bits are the same on every run with the same number
        of threads. If no token counts, loss, gradients and statistics are 0.
    """
    head, given = (hidden, weight, labels, bias), (old_logprobs, advantages, vpreds, values, returns)
    tensors, tokens, mask, numbers = _prepare(head, given, mask, temperature, logit_scale, softcap)
    numbers += _ppo_tokens.numbers(_OP, cliprange, cliprange_value, vf_coef, ratio_threshold, entropy_coef)
    validate = check.flag(_OP, "validate", validate)
    native = _native.available(hidden.device.type)
    if validate or not native:
        check_values(_OP, weight.shape[0], tensors[2], mask, tensors[4])
    if not native:
        return _reference(tensors, tokens, mask, numbers)
    arguments = (*tensors, tokens, mask, numbers, note(hidden.device))
    return check.naming(_OP, _apply, *arguments)


def _prepare(head, tokens, mask, temperature, logit_scale, softcap):
    """The arguments of the operator but for the last numbers and the flags, checked and in the forms that it takes."""
    hidden, weight, labels, bias = head
    check_head(_OP, hidden, weight, bias)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            check.no_tangent(_OP, name, x)
    labels = check.labels(_OP, labels, hidden.shape[:-1], "hidden without its last dimension")
    check.device(_OP, "labels", labels, hidden.device, "hidden")
    dtype = arithmetic(hidden, weight)
    tokens, mask = _ppo_tokens.prepare(_OP, labels, tokens, mask, dtype)
    temperature, temperatures = check.temperature(_OP, temperature, labels.shape, hidden.device, "labels", dtype)
    logit_scale = check.positive(_OP, "logit_scale", logit_scale)
    softcap = 0.0 if softcap is None else check.positive(_OP, "softcap", softcap, "be None or a positive finite number")
    return (hidden, weight, labels, bias, temperatures), tokens, mask, (temperature, logit_scale, softcap)
