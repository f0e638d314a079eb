"""The list of ops: what each takes and returns.

All code that runs over every op, or over the tests of every op, reads this list: the tests themselves, the choice of
tests for the CUDA host layer, the sanitizers, the CPU levels and the GPU script, the benchmarks, the accuracy table,
and README's table of ops. A new op is one more `Op` in `_LIST`. CONTRIBUTING.md lists the other files that it needs,
and test_ops_complete.py names those that are missing.

The tests import this module as `ops`, the benchmarks as `tests.ops`, so it must not import other modules of the tests.
"""

import collections.abc
import dataclasses
import pathlib

import torch

import ppo_ext

# ---- what an argument is --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Role:
    """What an argument means, which decides which values are valid. `make(shape, vocabulary, dtype)` returns a valid
    tensor for tokens of `shape`; it is None if the argument is not a tensor."""

    name: str
    make: collections.abc.Callable | None = None


def _floats(shape, vocabulary, dtype):
    return torch.randn(shape).to(dtype)


def _logits(shape, vocabulary, dtype):
    return torch.randn(*shape, vocabulary).to(dtype)


def _hidden(shape, vocabulary, dtype):
    return torch.randn(*shape, HIDDEN_SIZE).to(dtype)


def _head(shape, vocabulary, dtype):
    return torch.randn(vocabulary, HIDDEN_SIZE).to(dtype)


def _bias(shape, vocabulary, dtype):
    return torch.randn(vocabulary).to(dtype)


def _labels(shape, vocabulary, dtype):
    return torch.randint(vocabulary, shape)


def _mask(shape, vocabulary, dtype):
    return torch.rand(shape) > 0.3


def _scores(shape, vocabulary, dtype):
    return torch.randn(shape[:1]).to(dtype)


def _row_counts(shape, vocabulary, dtype):
    return torch.full(shape[:-1], shape[-1] + 1)


HIDDEN_SIZE = 5
LOGITS = Role("logits", _logits)
HIDDEN = Role("hidden states", _hidden)
HEAD = Role("weight of the head", _head)
BIAS = Role("bias of the head", _bias)
REF_LOGITS = Role("reference logits", _logits)  # in the dtype of the logits
LABELS = Role("labels", _labels)
MASK = Role("mask", _mask)  # nonzero where a token counts
WEIGHTS = Role("weights", _mask)  # a mask that is broadcast and whose values are weights
TOKENS = Role("one number a token", _floats)
SCORES = Role("one number a sequence", _scores)
BOOTSTRAP = Role("value after a sequence", _scores)
LAM = Role("lambda")  # a number, or one for each sequence
LAM_RETURNS = Role("lambda or None")
CU_SEQLENS = Role("bounds of packed sequences, or None")
MODE = Role("mode of whitening, or None")
TEMPERATURE = Role("temperature")  # a number, or one for each token
POSITIVE = Role("positive number")
SOFTCAP = Role("positive number or None")
OUTPUTS = Role("names of results")
FINITE = Role("finite number")
NOT_NEGATIVE = Role("finite number, not negative")
THRESHOLD = Role("number or infinity")
FLAG = Role("flag")
AXIS = Role("axis")
GROUP = Role("group of processes or None")
VOCAB_START = Role("first id of a shard or None")
PENALTY = Role("KL penalty")
CLIPRANGE = Role("finite number, not negative, or a pair of them")
NOT_NEGATIVE_OR_NONE = Role("finite number, not negative, or None")
ABOVE_ONE = Role("number larger than 1 or None")
POSITIVE_OR_NONE = Role("positive number or None")
DENOMINATOR = Role("number, tensor of one number, or None")
ROW_COUNTS = Role("one number a row", _row_counts)
ROLLOUT_KIND, ROLLOUT_LEVEL, BOUNDS = Role("kind of weights"), Role("level of ratios"), Role("pair of bounds")
RATIO_LEVEL, POLICY_LOSS, KL_ESTIMATOR, KL_GRADIENT, VALUE_LOSS, AGGREGATION = (
    Role(name) for name in ("ratio level", "policy loss", "KL estimator", "KL gradient", "value loss", "aggregation")
)

# ---- what a result is -----------------------------------------------------------------------------------------------

PER_TOKEN, NUMBER, STATS = "a tensor of the tokens' shape", "a tensor of shape []", "a dict of tensors"
CONSTANT = "a tensor of the tokens' shape that never requires a gradient"
# What one entry of a result depends on: its own token, the tokens of its sequence, or all tokens of the batch.
TOKEN, SEQUENCE, BATCH = "token", "sequence", "batch"


@dataclasses.dataclass(frozen=True)
class Mode:
    """Options of an op, the optional tensors that go with them, and whether results depend on which tokens make a row.
    `differentiable` are those of the tensors that receive a gradient."""

    options: dict
    tensors: tuple = ()
    by_row: bool = False
    differentiable: tuple = ()


@dataclasses.dataclass(frozen=True)
class Op:
    """A public function of ppo_ext.

    stem: the name of its files: csrc/<stem>.h, ppo_ext/ops/<stem>.py, tests/test_<stem>.py, bench/bench_<stem>.py, ...
    arguments: {name: Role}, in the order of the signature.
    results: {name: PER_TOKEN, CONSTANT, NUMBER or STATS}, in the order in which they are returned.
    scope: TOKEN, SEQUENCE or BATCH; BATCH too where the rounding errors of an entry do, as in a matrix product.
    differentiable: the arguments that receive a gradient.
    rank: how many dimensions per-token tensors must have; None for any number.
    required: values for the keyword arguments without a default.
    choices: {option: values that the property tests draw from}.
    variants: {name: options} that take other ways through the kernels than the defaults do.
    only_with: {argument: (option, value)}: the argument is given if the option has this value, and only then.
    modes: {title: Mode}, calls with options that take other ways through the kernels. The property tests draw from them.
    coarse: the arguments that the property tests draw in multiples of 1/8, so that no ratio of probabilities is so near
        to a clip bound that rounding decides on which side it lies.
    """

    name: str
    stem: str
    arguments: dict
    results: dict
    scope: str
    differentiable: tuple = ()
    rank: int | None = None
    required: dict = dataclasses.field(default_factory=dict)
    choices: dict = dataclasses.field(default_factory=dict)
    variants: dict = dataclasses.field(default_factory=dict)
    only_with: dict = dataclasses.field(default_factory=dict)
    modes: dict = dataclasses.field(default_factory=dict)
    coarse: tuple = ()

    def __str__(self):
        """For the name of a test: the same in every process."""
        return self.name

    @property
    def tensors(self):
        """The names of the arguments that are tensors."""
        return [name for name, role in self.arguments.items() if role.make]

    @property
    def optional(self):
        """The names of the tensors that only some modes give."""
        return {name for mode in self.modes.values() for name in mode.tensors}

    def mode_with(self, argument):
        """A mode that gives this optional tensor."""
        return next(mode for mode in self.modes.values() if argument in mode.tensors)

    @property
    def first(self):
        """The argument whose shape and device the other arguments must have."""
        return next(name for name, role in self.arguments.items() if role in (LOGITS, HIDDEN, TOKENS))

    @property
    def on_logits(self):
        return LOGITS in self.arguments.values()

    @property
    def on_hidden(self):
        return HIDDEN in self.arguments.values()

    @property
    def has_vocabulary(self):
        return self.on_logits or self.on_hidden

    @property
    def per_token(self):
        """The names of the results of the tokens' shape."""
        return [name for name, shape in self.results.items() if shape in (PER_TOKEN, CONSTANT)]

    @property
    def with_gradient(self):
        """The names of the results that a gradient can come from, if the op is differentiable."""
        return [name for name, shape in self.results.items() if shape in (PER_TOKEN, NUMBER)]

    def pick(self, inputs, shape=(2, 3), vocabulary=7, dtype=torch.float32, device="cpu", mode=None):
        """Valid arguments by name: tensors of these names out of `inputs`, and random ones for the names it lacks."""
        mode = mode or Mode({})
        found = {
            name: inputs[name] if name in inputs else self.arguments[name].make(shape, vocabulary, dtype).to(device)
            for name in self.tensors
            if name not in self.only_with and (name not in self.optional or name in mode.tensors)
        }
        return found | self.required | mode.options

    def outputs(self, arguments, module=ppo_ext):
        """The results by name, the statistics among them. `module` has the function: ppo_ext, or the reference."""
        found = getattr(module, self.name)(**arguments)
        found = dict(zip(self.results, found if isinstance(found, tuple) else (found,), strict=True))
        stats = [name for name, shape in self.results.items() if shape is STATS]
        for name in stats:
            found |= found.pop(name)
        return found

    def run(self, arguments, grads=None, module=ppo_ext):
        """The results by name, and the gradient of each differentiable argument as grad_<name>.

        `grads` holds incoming gradients by the names of the results. A result without one gets numbers that are all
        different; statistics have no gradient.
        """
        arguments = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        given = {name for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        in_modes = (name for mode in self.modes.values() for name in mode.differentiable)
        differentiable = [name for name in dict.fromkeys((*self.differentiable, *in_modes)) if name in given]
        leaves = {name: arguments[name].requires_grad_() for name in differentiable}
        # The op gets a view: with inplace_backward the gradient is written over its input, which must be no leaf.
        outputs = self.outputs(arguments | {name: leaf.view_as(leaf) for name, leaf in leaves.items()}, module)
        results = {name: x.detach() for name, x in outputs.items()}
        if leaves:
            incoming = [_incoming(outputs[name], (grads or {}).get(name)) for name in self.with_gradient]
            outputs = [outputs[name] for name in self.with_gradient]
            found = torch.autograd.grad(outputs, list(leaves.values()), incoming)
            results |= {f"grad_{name}": grad for name, grad in zip(leaves, found)}
        return results


def _incoming(output, grad):
    if grad is None:
        grad = torch.linspace(0.5, 2.0, output.numel(), device=output.device).view(output.shape)
    return grad.to(output.dtype)


# ---- the list -------------------------------------------------------------------------------------------------------

LARGEST = torch.finfo(torch.float32).max
_ON_LOGITS = {"temperature": TEMPERATURE, "mask": MASK, "inplace_backward": FLAG}
_SHARD = {"group": GROUP, "vocab_start": VOCAB_START}
_LOGITS_AND_LABELS = {"logits": LOGITS, "labels": LABELS, **_ON_LOGITS, "validate": FLAG, **_SHARD}
_FROM_LOGITS = {
    "scope": TOKEN,
    "differentiable": ("logits",),
    "choices": {"temperature": (0.25, 1.0, 1.7, 1e-20, 1e30)},
    "variants": {"in place": {"inplace_backward": True, "temperature": 0.7}},
}
_FROM_HIDDEN = {
    "scope": BATCH,
    "differentiable": ("hidden", "weight", "bias"),
    "choices": {"temperature": (0.25, 1.0, 1.7), "logit_scale": (1.0, 0.25), "softcap": (None, 3.0)},
    "variants": {"capped": {"temperature": 0.7, "logit_scale": 1.5, "softcap": 2.0}},
}


def _on_hidden(**more):
    return {
        "hidden": HIDDEN,
        "weight": HEAD,
        "labels": LABELS,
        "bias": BIAS,
        "temperature": TEMPERATURE,
        "logit_scale": POSITIVE,
        "softcap": SOFTCAP,
        "mask": MASK,
        **more,
        "validate": FLAG,
    }


# Each option is in one of them at least. A mode whose name begins with "row" is by row.
_PPO_MODES = {
    "bounds": Mode({"cliprange": (0.25, 0.5), "dual_clip": 2.5, "log_ratio_clamp": 1.5}, ("weights",)),
    "a term each": Mode(
        {"kl_coef": 0.5, "kl_estimator": "k3", "kl_gradient": "weighted", "entropy_coef": 0.25},
        ("ref_logprobs", "entropy"),
        differentiable=("entropy",),
    ),
    "sums": Mode({"policy_loss": "reinforce", "aggregation": "token_sum", "scale": 0.5}, ("weights",)),
    "cispo": Mode(
        {"policy_loss": "cispo", "cliprange": (1.0, 2.0), "kl_coef": 0.5, "kl_estimator": "abs"}, ("ref_logprobs",)
    ),
    "values": Mode(
        {"value_loss": "huber", "huber_delta": 0.5, "cliprange_value": None, "denominator": 7.0, "scale": 2.0}
    ),
    "no critic": Mode(
        {
            **dict.fromkeys(("vpreds", "values", "returns")),
            "kl_coef": -0.5,
            "kl_estimator": "k2",
            "kl_gradient": "straight_through",
        },
        ("ref_logprobs",),
    ),
    "row ratios": Mode(
        {"ratio_level": "sequence", "aggregation": "seq_mean_token_mean", "log_ratio_clamp": 0.7, "dual_clip": 1.2},
        ("weights",),
        by_row=True,
    ),
    "row ratios of tokens": Mode(
        {"ratio_level": "sequence_token", "aggregation": "seq_mean_token_sum", "value_loss": "huber"}, by_row=True
    ),
    "row sums": Mode(
        {"aggregation": "seq_mean_token_sum_norm", "norm_length": 7.0, "policy_loss": "cispo", "entropy_coef": 0.5},
        ("entropy",),
        by_row=True,
        differentiable=("entropy",),
    ),
    "row parts": Mode({"aggregation": "seq_mean_token_mean", "denominator": 3.0}, ("row_counts",), by_row=True),
}
_VALUES = {"values": TOKENS, "mask": WEIGHTS}
_OF_ROLLOUT = dict.fromkeys(("old_logprobs", "advantages", "vpreds", "values", "returns"), TOKENS)
_LOSS_OPTIONS = {
    "cliprange": CLIPRANGE,
    "cliprange_value": NOT_NEGATIVE_OR_NONE,
    "vf_coef": FINITE,
    "ratio_threshold": THRESHOLD,
    "dual_clip": ABOVE_ONE,
    "log_ratio_clamp": POSITIVE_OR_NONE,
    "ratio_level": RATIO_LEVEL,
    "policy_loss": POLICY_LOSS,
    "weights": TOKENS,
    "ref_logprobs": TOKENS,
    "kl_coef": FINITE,
    "kl_estimator": KL_ESTIMATOR,
    "kl_gradient": KL_GRADIENT,
    "entropy": TOKENS,
    "entropy_coef": FINITE,
    "value_loss": VALUE_LOSS,
    "huber_delta": POSITIVE,
    "aggregation": AGGREGATION,
    "norm_length": POSITIVE_OR_NONE,
    "denominator": DENOMINATOR,
    "scale": FINITE,
    "row_counts": ROW_COUNTS,
}
_OPTIONS_OF_WHOLE = {name: role for name, role in _LOSS_OPTIONS.items() if name != "entropy"}


def _without_entropy(mode):
    return dataclasses.replace(mode, tensors=tuple(set(mode.tensors) - {"entropy"}), differentiable=())


# from the logits: few choices that multiply a rounding error of theirs
_WHOLE_LOSS = {
    "results": {"loss": NUMBER, "stats": STATS},
    "scope": BATCH,
    "variants": {"with a bonus": {"entropy_coef": 0.1, "temperature": 0.7, "ratio_threshold": 1e30}},
    "modes": {title: _without_entropy(mode) for title, mode in _PPO_MODES.items()},
}
_WHOLE_LOSS_CHOICES = {
    "temperature": (0.25, 1.0, 1.7),
    "cliprange": (0.2, 0.5),
    "cliprange_value": (0.0, 0.2, LARGEST),
    "vf_coef": (0.1, -1.0, 0.0),
    "ratio_threshold": (-1.0, LARGEST, float("inf")),
    "entropy_coef": (0.0, 0.1, -1.0),
}

_LIST = (
    Op("logprobs", "logprobs", _LOGITS_AND_LABELS, {"logprobs": PER_TOKEN}, **_FROM_LOGITS),
    Op(
        "logprobs_and_entropy",
        "logprobs",
        _LOGITS_AND_LABELS,
        {"logprobs": PER_TOKEN, "entropy": PER_TOKEN},
        **_FROM_LOGITS,
    ),
    Op(
        "full_kl",
        "full_kl",
        {"logits": LOGITS, "ref_logits": REF_LOGITS, **_ON_LOGITS, "group": GROUP},
        {"kl": PER_TOKEN},
        **_FROM_LOGITS,
    ),
    Op("linear_logprobs", "linear_logprobs", _on_hidden() | _SHARD, {"logprobs": PER_TOKEN}, **_FROM_HIDDEN),
    Op(
        "linear_logprobs_and_entropy",
        "linear_logprobs",
        _on_hidden() | _SHARD,
        {"logprobs": PER_TOKEN, "entropy": PER_TOKEN},
        **_FROM_HIDDEN,
    ),
    Op(
        "linear_statistics",
        "linear_logprobs",
        _on_hidden(outputs=OUTPUTS) | _SHARD,
        {
            "logprobs": PER_TOKEN,
            "entropy": PER_TOKEN,
            "log_sum_sq_probs": CONSTANT,
            "mean_logits": CONSTANT,
            "is_top1": CONSTANT,
        },
        **_FROM_HIDDEN,
    ),
    Op(
        "kl_rewards",
        "kl_rewards",
        {
            "scores": SCORES,
            "logprobs": TOKENS,
            "ref_logprobs": TOKENS,
            "mask": MASK,
            "kl_coef": FINITE,
            "kl_penalty": PENALTY,
            "kls": TOKENS,
        },
        {"rewards": PER_TOKEN, "non_score_rewards": PER_TOKEN, "kls": PER_TOKEN},
        scope=SEQUENCE,
        rank=2,
        required={"kl_coef": 0.2},
        choices={
            "kl_coef": (0.2, -1.0, 0.0, 1e-38, LARGEST, -LARGEST),
            "kl_penalty": ("kl", "abs", "mse", "k3", "full"),
        },
        only_with={"kls": ("kl_penalty", "full")},
    ),
    Op(
        "gae",
        "gae",
        {
            "values": TOKENS,
            "rewards": TOKENS,
            "mask": MASK,
            "gamma": FINITE,
            "lam": LAM,
            "lam_returns": LAM_RETURNS,
            "bootstrap": BOOTSTRAP,
            "cu_seqlens": CU_SEQLENS,
        },
        {"advantages": PER_TOKEN, "returns": PER_TOKEN},
        scope=SEQUENCE,
        rank=2,
        choices={
            "gamma": (0.0, 0.97, 1.0, -1.0, 4.0),  # a tiny one times itself is 0, and 0 * inf NaN
            "lam": (0.0, 0.9, 1.0, -1.0, 4.0),
            "lam_returns": (None, 0.0, 0.9, 1.0),
        },
        variants={"two lambdas": {"lam_returns": 1.0, "lam": 0.9}},
    ),
    Op(
        "masked_mean",
        "masked",
        {**_VALUES, "axis": AXIS, "group": GROUP},
        {"mean": NUMBER},
        scope=BATCH,
        differentiable=("values",),
        choices={"axis": (None, 0, 1, (1, 0))},
        variants={"by row": {"axis": 1}},
    ),
    Op(
        "masked_var",
        "masked",
        {**_VALUES, "unbiased": FLAG},
        {"var": NUMBER},
        scope=BATCH,
        differentiable=("values",),
        choices={"unbiased": (True, False)},
    ),
    Op(
        "masked_whiten",
        "masked",
        {**_VALUES, "shift_mean": FLAG, "mode": MODE, "unbiased": FLAG, "eps": POSITIVE, "group": GROUP},
        {"whitened": PER_TOKEN},
        scope=BATCH,
        differentiable=("values",),
        choices={"mode": (None, "center", "keep_mean", "scale"), "unbiased": (True, False), "eps": (1e-8, 0.5)},
        variants={"scale": {"mode": "scale", "unbiased": False}},
    ),
    Op(
        "ppo_loss",
        "ppo_loss",
        {
            "logprobs": TOKENS,
            **_OF_ROLLOUT,
            "mask": MASK,
            **_LOSS_OPTIONS,
        },
        {"loss": NUMBER, "stats": STATS},
        scope=BATCH,
        differentiable=("logprobs", "vpreds"),
        choices={
            "cliprange": (0.1, 0.2, 0.5, 0.0, 1e-38, LARGEST),
            "cliprange_value": (0.0, 0.2, 1e-38, LARGEST),
            "vf_coef": (0.1, -1.0, 0.0, 1e-38, 1e30),
            "ratio_threshold": (10.0, 0.0, -1.0, 1e-38, LARGEST, float("inf")),
        },
        modes=_PPO_MODES,
        coarse=("logprobs", "old_logprobs", "ref_logprobs"),
    ),
    Op(
        "rollout_weights",
        "rollout_weights",
        {
            "old_logprobs": TOKENS,
            "rollout_logprobs": TOKENS,
            "mask": MASK,
            "kind": ROLLOUT_KIND,
            "level": ROLLOUT_LEVEL,
            "bounds": BOUNDS,
        },
        {"weights": CONSTANT, "stats": STATS},
        scope=BATCH,
        choices={"kind": ("tis", "icepop"), "bounds": ((0.0, 2.0), (0.5, 1.5), (0.0, 0.0), (1.0, LARGEST))},
        modes={
            "products": Mode({"level": "sequence"}, by_row=True),
            "geometric means": Mode({"level": "geometric", "kind": "icepop", "bounds": (0.5, 2.0)}, by_row=True),
        },
        coarse=("old_logprobs", "rollout_logprobs"),
    ),
    Op(
        "ppo_loss_from_logits",
        "ppo_loss_from_logits",
        {
            "logits": LOGITS,
            "labels": LABELS,
            **_OF_ROLLOUT,
            "mask": MASK,
            "temperature": TEMPERATURE,
            **_OPTIONS_OF_WHOLE,
            "inplace_forward": FLAG,
            "inplace_backward": FLAG,
            "validate": FLAG,
        },
        differentiable=("logits", "vpreds"),
        choices=_WHOLE_LOSS_CHOICES,
        **_WHOLE_LOSS,
    ),
    Op(
        "ppo_loss_from_hidden",
        "ppo_loss_from_hidden",
        {
            "hidden": HIDDEN,
            "weight": HEAD,
            "labels": LABELS,
            **_OF_ROLLOUT,
            "mask": MASK,
            "bias": BIAS,
            "temperature": TEMPERATURE,
            "logit_scale": POSITIVE,
            "softcap": SOFTCAP,
            **_OPTIONS_OF_WHOLE,
            "validate": FLAG,
        },
        differentiable=("hidden", "weight", "bias", "vpreds"),
        choices=_WHOLE_LOSS_CHOICES | {"logit_scale": (1.0, 0.25), "softcap": (None, 3.0)},
        **_WHOLE_LOSS,
    ),
)

OPS = {op.name: op for op in _LIST}
# The names of the tensors that do not have the tokens' dimensions.
OF_HEAD = {name for op in _LIST for name, role in op.arguments.items() if role in (HEAD, BIAS)}
STEMS = tuple(dict.fromkeys(op.stem for op in _LIST))
# Stems without kernels of their own: Python joins the operators of other stems.
JOINED = {"ppo_loss_from_logits", "ppo_loss_from_hidden"}
# The tests of one stem may be in several files, test_<stem>.py and test_<stem>_<theme>.py.
OP_TESTS = tuple(
    dict.fromkeys(
        path.name
        for stem in STEMS
        for pattern in (f"test_{stem}.py", f"test_{stem}_*.py")
        for path in sorted(pathlib.Path(__file__).parent.glob(pattern))
    )
)


def of_stem(stem):
    """The ops of one stem."""
    return [op for op in _LIST if op.stem == stem]
