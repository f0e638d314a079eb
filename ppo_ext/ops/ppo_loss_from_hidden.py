"""PPO's loss of a minibatch straight from hidden states and the head's weights, with its gradients in the same pass."""

import torch
from torch.autograd.function import once_differentiable

from . import _native, _ppo_tokens, check, reference
from ._linear_checks import arithmetic, check_head, check_note, check_numbers, check_operator, check_values
from ._linear_gradients import RESULTS, STATES, Gradients, fold
from ._linear_head import Head, chunk_sizes
from ._linear_tiles import gradients_of_head, rows_of_head
from ._ppo_options import Aggregation, KLEstimator, KLGradient, PolicyLoss, RatioLevel, ValueLoss
from .check_labels import note, note_labels

_OP = "ppo_loss_from_hidden"
_forward, _forward_name = _native.define(
    "_ppo_loss_from_hidden(Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? temperatures,"
    f" {_ppo_tokens.ARGUMENTS}, float temperature, float logit_scale, float softcap,"
    " bool needs_hidden, bool needs_weight, bool needs_bias, Tensor(a!)? label_note)"
    f" -> ({_ppo_tokens.RESULTS}, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


@_native.register_fake(_forward_name)
def _(hidden, weight, labels, bias, temperatures, *rest):
    *tokens, _, _, _, needs_hidden, needs_weight, needs_bias, _ = rest
    found = _ppo_tokens.fake_results(_ppo_tokens.Tokens(*tokens))
    of_head = ((hidden, needs_hidden), (weight, needs_weight), (weight if bias is None else bias, needs_bias))
    return *found, *(x.new_empty(x.shape if need else 0) for x, need in of_head)


# ---- the operator ---------------------------------------------------------------------------------------------------


def _run(hidden, weight, labels, bias, temperatures, *rest):
    *given, temperature, logit_scale, softcap, needs_hidden, needs_weight, needs_bias, noted = rest
    tokens = _ppo_tokens.Tokens(*given)
    tensors, numbers = (hidden, weight, labels, bias, tokens.mask, temperatures), (temperature, logit_scale, softcap)
    check_operator(_OP, tensors, {})
    check_note(_OP, noted)
    check_numbers(_OP, *numbers)
    share = _ppo_tokens.shares(tokens)
    if hidden.device.type == "cpu":
        check_values(_OP, weight.shape[0], labels, tokens.mask, temperatures)
    elif noted is not None:
        note_labels(noted, labels, tokens.mask, weight.shape[0])
    needs = (needs_hidden, needs_weight, needs_bias and bias is not None)
    twice = _ppo_tokens.by_sequence(tokens) and any(needs)
    with torch.autocast(hidden.device.type, enabled=False):
        found, gradients = (_in_two_passes if twice else _in_one_pass)(tensors, numbers, tokens, share, needs)
    gradients = gradients.results(hidden, weight, bias)
    _ppo_tokens.zero_if_skipped(found.stats, gradients, tokens)
    return *found, *gradients


def _in_one_pass(tensors, numbers, tokens, share, needs):
    chunks = _Chunks(Head(tensors, numbers, chunk_sizes), tokens, share, needs)
    chunks.run()
    shape = tokens.mask.shape
    logprobs, entropy = (chunks.head.rows.back(x).view(shape) for x in chunks.results[:, :2].unbind(1))
    return _ppo_tokens.whole_loss(logprobs, entropy, tokens)[0], chunks.gradients


def _in_two_passes(tensors, numbers, tokens, _, needs):
    """For gradients that are known after the last token of a sequence: the logits are computed once more for them."""
    labels = tensors[2]
    logprobs, entropy, row_max, log_sum = (x.view(labels.shape) for x in rows_of_head(tensors, numbers, True))
    found, grads = _ppo_tokens.whole_loss(logprobs, entropy, tokens)
    if labels.is_cuda:
        grads = _only_inside(grads, (labels >= 0) & (labels < tensors[1].shape[0]))
    saved = dict(zip(("grad_logprobs", "grad_entropy"), grads)) | {"row_max": row_max, "log_sum": log_sum}
    return found, gradients_of_head(tensors, numbers, saved, entropy, needs)


def _only_inside(grads, inside):
    """On CUDA a label outside the vocabulary is no error, and its row has no gradient."""
    return [None if grad is None else torch.where(inside, grad, 0) for grad in grads]


_native.implement(_forward_name, _run)


class _Chunks:
    """The rows of a call, a chunk at a time: its logits, what they give, and at once their gradients."""

    def __init__(self, head, tokens, share, needs):
        self.head, self.share = head, head.of_tokens(share)
        self.tokens = tokens.of_rows(head.of_tokens)
        self.inside = (head.targets >= 0) & (head.targets < head.vocabulary)
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
        tokens = self.tokens.of_rows(lambda x: x[block])
        grads = _ppo_tokens.row_gradients(rows.pop("logprobs"), tokens, self.share[block])
        if self.head.hidden.is_cuda:
            grads = _only_inside(grads, self.inside[block])
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


def _apply(hidden, weight, labels, bias, temperatures, tokens, names, numbers, noted):
    leaves = (hidden, weight, bias, tokens.vpreds)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in leaves]
    plain = [None if x is None else x.detach() for x in (hidden, weight, labels, bias, temperatures)]
    tokens = tokens.of_rows(torch.Tensor.detach)
    *found, grad_hidden, grad_weight, grad_bias = _forward(*plain, *tokens, *numbers, *needs[:3], noted)
    found = _ppo_tokens.TokenLoss(*found)
    if any(needs):
        outputs = (found.loss, grad_hidden, grad_weight, grad_bias, found.grad_vpreds)
        found = found._replace(loss=_PPOLossFromHidden.apply(*leaves, outputs))
    return found.loss, _ppo_tokens.named_stats(found, names)


def ppo_loss_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    vpreds: torch.Tensor | None,
    values: torch.Tensor | None,
    returns: torch.Tensor | None,
    mask: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    cliprange: float | tuple[float, float] = 0.2,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    ratio_threshold: float = float("inf"),
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = None,
    ratio_level: RatioLevel = "token",
    policy_loss: PolicyLoss = "clip",
    weights: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KLEstimator = "k1",
    kl_gradient: KLGradient = "exact",
    entropy_coef: float = 0.0,
    value_loss: ValueLoss = "mse",
    huber_delta: float = 10.0,
    aggregation: Aggregation = "token_mean",
    norm_length: float | None = None,
    denominator: float | torch.Tensor | None = None,
    scale: float = 1.0,
    row_counts: torch.Tensor | None = None,
    validate: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The whole PPO loss of a minibatch straight from what the head reads, with its gradients in the same pass.

        logprobs, entropy = linear_logprobs_and_entropy(hidden, weight, labels, ...)
        loss = ppo_loss(logprobs, old_logprobs, advantages, vpreds, values, returns, mask, entropy=entropy, ...)

    Args:
        hidden, weight, labels, bias, temperature, logit_scale, softcap, validate: as in `linear_logprobs`.
        old_logprobs, advantages, vpreds, values, returns: as in `ppo_loss`, of the labels' shape.
        mask: of the labels' shape, bool, int or float, nonzero where a token counts. The other rows are left out of the
            products, and never read.
        all others: as in `ppo_loss`, of the labels' shape where they have a number for each token.

    Returns:
        (loss, stats) as `ppo_loss` with options and an entropy returns them, differentiable once with respect to hidden,
        weight, bias and vpreds.

    Raises:
        The errors of `linear_logprobs` and `ppo_loss`.

    Notes:
        The gradient of a token's log-probability is known as soon as its row is, so that logits are neither kept nor
        computed again: three matrix products for both passes, where `linear_logprobs` takes four, two if the weight is
        frozen, one where nothing needs a gradient. The forward pass computes the gradients; the backward pass only
        multiplies them by that of the loss. With ratios of sequences, whose gradients are known after the last token, the
        logits are computed again: one product more, as in `linear_logprobs`.
        Memory beyond inputs and gradients: the logits of one chunk of rows, at most 256 on a CPU and 2048 on CUDA. The
        gradient of a weight in half precision is added up in float32, in memory of its own if there are several chunks.
        The chunks follow from the number of the rows alone, so the bits are the same on every run with the same number
        of threads. If no token counts, loss, gradients and statistics are 0.
    """
    given = {
        "hidden": hidden,
        "weight": weight,
        "labels": labels,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "vpreds": vpreds,
        "values": values,
        "returns": returns,
        "mask": mask,
        "bias": bias,
        "temperature": temperature,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "cliprange": cliprange,
        "cliprange_value": cliprange_value,
        "vf_coef": vf_coef,
        "ratio_threshold": ratio_threshold,
        "dual_clip": dual_clip,
        "log_ratio_clamp": log_ratio_clamp,
        "ratio_level": ratio_level,
        "policy_loss": policy_loss,
        "weights": weights,
        "ref_logprobs": ref_logprobs,
        "kl_coef": kl_coef,
        "kl_estimator": kl_estimator,
        "kl_gradient": kl_gradient,
        "entropy_coef": entropy_coef,
        "value_loss": value_loss,
        "huber_delta": huber_delta,
        "aggregation": aggregation,
        "norm_length": norm_length,
        "denominator": denominator,
        "scale": scale,
        "row_counts": row_counts,
        "validate": validate,
    }
    tensors, numbers = _prepare(hidden, weight, labels, bias, temperature, logit_scale, softcap)
    tokens, names = _ppo_tokens.prepare(_OP, given, tensors[2], arithmetic(hidden, weight))
    validate = check.flag(_OP, "validate", given.pop("validate"))
    native = _native.available(hidden.device.type)
    if validate or not native:
        check_values(_OP, weight.shape[0], tensors[2], tokens.mask, tensors[4])
    if not native:
        return reference.ppo_loss_from_hidden(**given)
    return check.naming(_OP, _apply, *tensors, tokens, names, numbers, note(hidden.device))


def _prepare(hidden, weight, labels, bias, temperature, logit_scale, softcap):
    """The arguments of the head and its numbers, checked and in the forms that the operator takes."""
    check_head(_OP, hidden, weight, bias)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None:
            check.no_tangent(_OP, name, x)
    labels = check.labels(_OP, labels, hidden.shape[:-1], "hidden without its last dimension")
    check.device(_OP, "labels", labels, hidden.device, "hidden")
    dtype = arithmetic(hidden, weight)
    temperature, temperatures = check.temperature(_OP, temperature, labels.shape, hidden.device, "labels", dtype)
    logit_scale = check.positive(_OP, "logit_scale", logit_scale)
    softcap = 0.0 if softcap is None else check.positive(_OP, "softcap", softcap, "be None or a positive finite number")
    return (hidden, weight, labels, bias, temperatures), (temperature, logit_scale, softcap)
