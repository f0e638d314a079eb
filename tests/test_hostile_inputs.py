"""Every argument of every op is given invalid values: the error is one sentence that names the op and the argument.

The cases are made from the roles of the arguments in ops.py, so no argument is left out. Unusual forms of valid
arguments are here too: the result must have the same bits as with the usual form.
"""

import copy
import inspect
import math
from fractions import Fraction

import numpy as np
import ops
import pytest
import torch
from cases import valid_arguments
from conftest import assert_same_bits
from ops import OPS

import ppo_ext

INF, NAN = math.inf, math.nan
FLOATS = "be float32, bfloat16, float16 or float64, got "
COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
OTHER_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    *COMPLEX,
)


def Plain(x):
    """The outcome of a case in which the argument must act as x itself does."""
    return x


def quantized(x):
    return torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)


def jagged(x):
    return torch.nested.nested_tensor([x.flatten(), x.flatten()[1:]], layout=torch.jagged)


# The rows of all tables: what the argument is; a function that makes it of a valid one; the type of the error and what
# it says after `<op>: <argument> must `, or Plain and None.
NO_TENSORS = (
    ("a float", lambda x: 1.0, TypeError, "be a torch.Tensor, got float"),
    ("a list", lambda x: x.tolist(), TypeError, "be a torch.Tensor, got list"),
    ("a numpy array", lambda x: x.float().numpy(), TypeError, "be a torch.Tensor, got ndarray"),
    ("sparse COO", lambda x: x.to_sparse(), TypeError, "be a dense tensor, got torch.sparse_coo"),
    (
        "sparse CSR",
        lambda x: (x if x.dim() > 1 else x[None]).to_sparse_csr(),
        TypeError,
        "be a dense tensor, got torch.sparse_csr",
    ),
    ("mkldnn", lambda x: x.float().to_mkldnn(), TypeError, "be a dense tensor, got torch._mkldnn"),
    ("nested", lambda x: torch.nested.nested_tensor([x, x]), TypeError, "be a dense tensor, got a nested one"),
    ("jagged", jagged, TypeError, "be a dense tensor, got a nested one"),
)
NONE = (("None", lambda x: None, TypeError, "be a torch.Tensor, got NoneType"),)


def dtypes(condition, rejected):
    return tuple((str(d), lambda x, d=d: x.to(d), TypeError, f"{condition}{d}") for d in rejected) + (
        ("torch.qint8", quantized, TypeError, f"{condition}torch.qint8"),
    )


# The same numbers in another form.
SAME_NUMBERS = (
    ("a Parameter", lambda x: torch.nn.Parameter(x, requires_grad=x.dtype.is_floating_point), Plain, None),
    ("a subclass", lambda x: x.as_subclass(type("Subclass", (torch.Tensor,), {})), Plain, None),
    ("transposed in memory", lambda x: x.transpose(0, -1).contiguous().transpose(0, -1), Plain, None),
    ("every second entry", lambda x: x.repeat_interleave(2, -1)[..., ::2], Plain, None),
    ("behind an offset", lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape), Plain, None),
    ("lazily negated", lambda x: x if x.dtype == torch.bool else torch._neg_view(-x), Plain, None),
)


def expanded(x):
    return x.flatten()[:1].expand(x.shape)


EXPANDED = (("one number for all, stride 0", expanded, lambda x: expanded(x).clone(), None),)
MASK_DTYPES = tuple((f"{d}", lambda x, d=d: x.to(d), Plain, None) for d in OTHER_DTYPES if not d.is_complex)
LABEL_DTYPES = (("torch.int32", lambda x: x.int(), Plain, None),)
BY_ROLE = {
    ops.LOGITS: NO_TENSORS
    + dtypes(FLOATS, OTHER_DTYPES)
    + SAME_NUMBERS
    + EXPANDED
    + (
        ("a number", lambda x: x[0, 0, 0], ValueError, "have the shape [..., V] with V >= 1, got []"),
        ("V = 0", lambda x: x[..., :0], ValueError, "have the shape [..., V] with V >= 1, got [2, 3, 0]"),
    ),
    ops.REF_LOGITS: NO_TENSORS
    + dtypes(FLOATS, OTHER_DTYPES)
    + SAME_NUMBERS
    + EXPANDED
    + tuple(
        (f"{d}", lambda x, d=d: x.to(d), TypeError, f"have the dtype torch.float32 of logits, got {d}")
        for d in (torch.bfloat16, torch.float16, torch.float64)
    ),
    ops.LABELS: NO_TENSORS
    + SAME_NUMBERS
    + EXPANDED
    + LABEL_DTYPES
    + dtypes(
        "be int64 or int32, got ",
        (torch.float32, torch.float16, *(d for d in OTHER_DTYPES if d not in (torch.int32, torch.int64))),
    ),
    ops.MASK: NO_TENSORS + SAME_NUMBERS + EXPANDED + MASK_DTYPES + dtypes("be bool, int or float, got ", COMPLEX),
    ops.TOKENS: NO_TENSORS + dtypes(FLOATS, OTHER_DTYPES) + SAME_NUMBERS + EXPANDED,
}
BY_ROLE[ops.HIDDEN] = BY_ROLE[ops.HEAD] = BY_ROLE[ops.BIAS] = (
    NO_TENSORS
    + tuple(
        (what, make, kind, text + ("" if "complex" in what or "float8" in what else "; dequantize it first"))
        for what, make, kind, text in dtypes(FLOATS, OTHER_DTYPES)
    )
    + SAME_NUMBERS
    + EXPANDED
)
BY_ROLE[ops.HIDDEN] += (
    ("a number", lambda x: x[0, 0, 0], ValueError, "have the shape [..., H] with H >= 1, got []"),
    ("H = 0", lambda x: x[..., :0], ValueError, "have the shape [..., H] with H >= 1, got [2, 3, 0]"),
)
BY_ROLE[ops.WEIGHTS] = BY_ROLE[ops.MASK]
BY_ROLE[ops.SCORES] = BY_ROLE[ops.BOOTSTRAP] = BY_ROLE[ops.TOKENS]
BY_ROLE[ops.ROW_COUNTS] = NO_TENSORS + MASK_DTYPES[4:6] + dtypes("be int or float, got ", COMPLEX) + SAME_NUMBERS


def mask_of(op):
    """What the error says that the mask is compared with."""
    if ops.LABELS in op.arguments.values():
        return "labels"
    return f"{op.first} without its last dimension" if op.on_logits else op.first


def tokens_of(op):
    """What the error says that tensors of one number a token are compared with."""
    return "labels" if op.has_vocabulary else op.first


def shape_condition(op, argument, x):
    """What the error says that the shape of this argument must be."""
    role, whole = op.arguments[argument], str(list(x.shape))
    if role is ops.WEIGHTS:
        return f"broadcast to the shape {whole} of {op.first}, got "
    if role is ops.HEAD:
        return f"have the shape [V, {x.shape[1]}] with V >= 1 and the last dimension of hidden, got "
    of = {
        ops.LABELS: f"{op.first} without its last dimension",
        ops.BIAS: "weight's first dimension",
        ops.MASK: mask_of(op),
        ops.SCORES: f"the first dimension of {op.first}",
        ops.BOOTSTRAP: f"the first dimension of {op.first}",
        ops.TOKENS: tokens_of(op),
        ops.ROW_COUNTS: f"the rows of {tokens_of(op)}",
    }
    return f"have the shape {whole} of {of.get(role, op.first)}, got "


def wrong_shapes(op, argument, x):
    """Each argument in shapes near its own. If the argument with which others are compared has another shape, the error
    is about one of the others, see test_an_argument_of_another_shape_than_the_rest."""
    if argument == op.first or argument in op.only_with:
        return
    condition = shape_condition(op, argument, x)
    for what, change in (
        ("one more dimension", lambda x: x[None]),
        ("flat", lambda x: torch.cat([x.flatten()] * 2)),
        ("one entry short", lambda x: x[..., :-1]),
        ("empty", lambda x: x[..., :0]),
        ("longer by one", lambda x: torch.cat([x, x[..., :1]], -1)),
    ):
        yield what, change, ValueError, condition + str(list(change(x).shape))
    for what, change in (("a number", lambda x: x.flatten()[0]), ("one row for all", lambda x: x[:1])):
        # weights broadcast, and one row is a head of one token
        if op.arguments[argument] not in (ops.WEIGHTS, *(ops.HEAD,) * (what == "one row for all")):
            yield what, change, ValueError, condition + str(list(change(x).shape))


def with_arguments(op, argument):
    """Valid arguments among which `argument` is given."""
    if argument in op.optional:
        return valid_arguments(op, mode=op.mode_with(argument))
    arguments = valid_arguments(op)
    if argument in op.only_with:
        option, value = op.only_with[argument]
        arguments |= {option: value, argument: arguments[op.first].clone()}
    return arguments


def tensor_cases():
    cases = []
    for op in OPS.values():
        for argument in op.tensors:
            x = with_arguments(op, argument)[argument]
            may_be_none = inspect.signature(getattr(ppo_ext, op.name)).parameters[argument].default is None
            rows = (*BY_ROLE[op.arguments[argument]], *wrong_shapes(op, argument, x), *(() if may_be_none else NONE))
            cases += [pytest.param(op.name, argument, *row, id=f"{op.name}-{argument}-{what}") for what, *row in rows]
    return cases


@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning"
)  # of torch, about nested and quantized tensors
@pytest.mark.parametrize("op, argument, make, kind, text", tensor_cases())
def test_tensor(op, argument, make, kind, text):
    arguments = with_arguments(OPS[op], argument)
    x = arguments[argument]
    if text is None:
        expected = OPS[op].run(arguments | {argument: kind(x)})
        for name, result in OPS[op].run(arguments | {argument: make(x)}).items():
            assert_same_bits(name, result, expected[name])
        return
    with pytest.raises(kind) as error:
        getattr(ppo_ext, op)(**arguments | {argument: make(x)})
    assert str(error.value) == f"{op}: {argument} must {text}"


NOT_NUMBERS = tuple(
    ("be a number", TypeError, value, type(value).__name__)
    for value in (None, "0.5", b"1", [1.0], {}, 1j, torch.ones(2), torch.ones((), device="meta"))
)
NOT_FLAGS = tuple(("be True or False", TypeError, value, name) for _, _, value, name in NOT_NUMBERS) + tuple(
    ("be True or False", ValueError, value, float(value)) for value in (2, -1, 0.5, NAN, INF)
)
NOT_FINITE = tuple(
    ("be a finite number", ValueError, value, got)
    for value, got in ((NAN, NAN), (INF, INF), (-INF, -INF), (10**400, INF), (-(10**400), -INF))
)
TOO_LARGE = tuple(("lie in the range of float32", ValueError, value, value) for value in (3.5e38, -1e300))
NAMES_TEXT = "be names out of logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1"


def is_pair(value):
    return isinstance(value, torch.Tensor) and value.numel() == 2


def not_positive(condition):
    return tuple(
        (condition, ValueError, x, y)
        for x, y in ((0, 0.0), (-0.0, -0.0), (-1, -1.0), (NAN, NAN), (INF, INF), (-INF, -INF), (10**400, INF))
    ) + tuple(("be between 1e-30 and 1e30", ValueError, x, x) for x in (5e-324, 9e-31, 2e30, 1e300))


AXIS_TEXT = "name dimensions of values, from [-2, 2) and each once"
# The rows: the condition in the error, its type, the value, and what the error shows of the value.
SCALARS = {
    ops.TEMPERATURE: tuple(
        ("be a number or a tensor of numbers", *rest) for _, *rest in NOT_NUMBERS if not is_pair(rest[1])
    )
    + not_positive("be a positive finite number"),
    ops.POSITIVE: NOT_NUMBERS + not_positive("be a positive finite number"),
    ops.SOFTCAP: tuple(row for row in NOT_NUMBERS if row[2] is not None)
    + not_positive("be None or a positive finite number"),
    ops.OUTPUTS: tuple(
        ("be a tuple of names", TypeError, value, type(value).__name__) for value in (None, "logprobs", 1, True, {})
    )
    + tuple((NAMES_TEXT, ValueError, value, repr(value[-1])) for value in (("",), ("entropy", "Entropy"), [1.0])),
    ops.FINITE: NOT_NUMBERS + NOT_FINITE + TOO_LARGE,
    ops.NOT_NEGATIVE: NOT_NUMBERS
    + tuple(
        ("be finite and not negative", ValueError, x, y)
        for x, y in ((-1, -1.0), (-5e-324, -5e-324), (NAN, NAN), (INF, INF), (-INF, -INF), (10**400, INF))
    )
    + TOO_LARGE[:1],
    ops.CLIPRANGE: tuple(row for row in NOT_NUMBERS if not isinstance(row[2], list))
    + tuple(
        ("be a number or a pair (low, high)", ValueError, x, y) for x, y in (([1.0], "1 numbers"), ((), "0 numbers"))
    )
    + tuple(("be finite and not negative", ValueError, (0.1, x), float(x)) for x in (-1, NAN, INF))
    + (("be a number", TypeError, ("0.1", 0.1), "str"),),
    ops.BOUNDS: tuple(
        ("be a pair (low, high)", TypeError, value, got)
        for value, got in ((None, "NoneType"), (1.0, "float"), ("ab", "str"), ((), "0 numbers"), ([1], "1 numbers"))
    )
    + tuple(("be finite and not negative", ValueError, (0.1, x), float(x)) for x in (-1, NAN, INF))
    + (("have low <= high", ValueError, (2.0, 1.0), "(2.0, 1.0)"), ("be a number", TypeError, ("0", 1), "str")),
    ops.NOT_NEGATIVE_OR_NONE: tuple(row for row in NOT_NUMBERS if row[2] is not None),
    ops.ABOVE_ONE: tuple(row for row in NOT_NUMBERS if row[2] is not None)
    + tuple(
        ("be None or a finite number larger than 1", ValueError, x, float(x)) for x in (1, 0.5, 0, -3, NAN, INF, -INF)
    )
    + (("be between 1e-30 and 1e30", ValueError, 2e30, 2e30),),
    ops.DENOMINATOR: tuple(row for row in NOT_NUMBERS if row[2] is not None and not isinstance(row[2], torch.Tensor))
    + (
        ("be positive where the mask has tokens that count", ValueError, 0, 0.0),
        ("be a number or a tensor of one number", ValueError, torch.ones(2), "[2]"),
        ("be on the device cpu of {tokens}", ValueError, torch.ones((), device="meta"), "meta"),
    ),
    ops.THRESHOLD: NOT_NUMBERS + (("be a number", ValueError, NAN, NAN),),
    ops.FLAG: NOT_FLAGS,
    ops.LAM: tuple(row for row in NOT_NUMBERS if not is_pair(row[2])) + NOT_FINITE + TOO_LARGE,
    ops.LAM_RETURNS: tuple(row for row in NOT_NUMBERS if row[2] is not None) + NOT_FINITE + TOO_LARGE,
    ops.CU_SEQLENS: tuple(
        ("be a torch.Tensor", TypeError, value, type(value).__name__) for value in (0, [0, 6], "0", True)
    )
    + (
        ("be int64 or int32", TypeError, torch.zeros(3), "torch.float32"),
        ("have the shape [B + 1]", ValueError, torch.zeros((), dtype=torch.int64), "[]"),
        ("have the shape [B + 1]", ValueError, torch.zeros(0, dtype=torch.int64), "[0]"),
        ("be on the device cpu of values", ValueError, torch.zeros(3, dtype=torch.int64, device="meta"), "meta"),
    ),
    ops.MODE: tuple(("be None or a str", TypeError, value, type(value).__name__) for value in (1, True, ["center"]))
    + tuple(
        ("be one of 'center', 'keep_mean', 'scale'", ValueError, value, repr(value)) for value in ("", "Center", "mean")
    ),
    ops.PENALTY: tuple(("be a str", TypeError, value, type(value).__name__) for value in (None, 1, True, ["kl"]))
    + tuple(
        ("be one of 'kl', 'abs', 'mse', 'full', 'k3', 'low_var_kl'", ValueError, value, repr(value))
        for value in ("", "KL", "kl ")
    ),
    ops.GROUP: tuple(
        ("be None or a torch.distributed.ProcessGroup with this process", TypeError, value, type(value).__name__)
        for value in (0, -100, True, "gloo", [0, 1])
    ),
    ops.VOCAB_START: tuple(
        ("be None or an int", TypeError, value, type(value).__name__) for value in (True, 0.0, "0", [0], torch.ones(1))
    )
    + tuple(("be given with a group, and only then", ValueError, value, value) for value in (0, 3, -1)),
    ops.AXIS: tuple(
        ("be None, an int or several", TypeError, value, type(value).__name__)
        for value in ("0", 0.0, NAN, 1j, [0.0], (None,), {0}, torch.zeros(2))
    )
    + tuple((AXIS_TEXT, ValueError, value, value) for value in (2, -3, 10**400, (), [], (0, 2), (0, 0), (0, -2))),
}
NOT_NEGATIVES = tuple(row for row in SCALARS[ops.NOT_NEGATIVE] if row[0] != "be a number")
for role in (ops.CLIPRANGE, ops.NOT_NEGATIVE_OR_NONE, ops.DENOMINATOR):
    SCALARS[role] += NOT_NEGATIVES
SCALARS[ops.POSITIVE_OR_NONE] = SCALARS[ops.SOFTCAP]
for role, allowed in (
    (ops.ROLLOUT_KIND, "'tis', 'icepop'"),
    (ops.ROLLOUT_LEVEL, "'token', 'sequence', 'geometric'"),
    (ops.RATIO_LEVEL, "'token', 'sequence', 'sequence_token'"),
    (ops.POLICY_LOSS, "'clip', 'cispo', 'reinforce'"),
    (ops.KL_ESTIMATOR, "'k1', 'k2', 'k3', 'abs'"),
    (ops.KL_GRADIENT, "'exact', 'straight_through', 'weighted'"),
    (ops.VALUE_LOSS, "'mse', 'huber'"),
    (
        ops.AGGREGATION,
        "'token_mean', 'seq_mean_token_mean', 'seq_mean_token_sum', 'seq_mean_token_sum_norm', 'token_sum'",
    ),
):
    SCALARS[role] = SCALARS[ops.PENALTY][:4] + tuple(
        (f"be one of {allowed}", ValueError, value, repr(value)) for value in ("", "Token", "kl ")
    )
ALL_NAMES = tuple(NAMES_TEXT.removeprefix("be names out of ").split(", "))


def reversed_tuple(names):
    return tuple(reversed(names))


# The rows: a value of an unusual type, and the usual value that it stands for.
SAME_SCALARS = {
    ops.TEMPERATURE: (
        (1, 1.0),
        (True, 1.0),
        (np.float64(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(2), 2.0),
        (np.array(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (torch.tensor([2]), 2.0),
        (Fraction(1, 2), 0.5),
    ),
    ops.FLAG: ((np.True_, True), (0, False), (1, True), (torch.tensor(True), True)),
    ops.AXIS: (
        (True, 1),
        (-1, 1),
        (np.int64(1), 1),
        ([1], 1),
        (torch.tensor(1), 1),
        ((1, 0), (0, 1)),
        ((0, 1), None),
    ),
    ops.PENALTY: (("kl", "kl"),),
}
SAME_SCALARS[ops.POSITIVE] = SAME_SCALARS[ops.SOFTCAP] = SAME_SCALARS[ops.TEMPERATURE]
SAME_SCALARS[ops.OUTPUTS] = tuple((make(ALL_NAMES), ALL_NAMES) for make in (list, set, frozenset, reversed_tuple))
SAME_SCALARS[ops.FINITE] = SAME_SCALARS[ops.TEMPERATURE] + ((-1, -1.0), (5e-324, 0.0), (-0.0, 0.0))
SAME_SCALARS[ops.NOT_NEGATIVE] = SAME_SCALARS[ops.TEMPERATURE] + ((3e38, 2e38),)
SAME_SCALARS[ops.CLIPRANGE] = SAME_SCALARS[ops.NOT_NEGATIVE] + (([0.1, 0.2], (0.1, 0.2)),)
SAME_SCALARS[ops.NOT_NEGATIVE_OR_NONE] = SAME_SCALARS[ops.NOT_NEGATIVE]
SAME_SCALARS[ops.ABOVE_ONE] = ((2, 2.0), (np.float64(1.5), 1.5), (torch.tensor([2]), 2.0), (Fraction(3, 2), 1.5))
SAME_SCALARS[ops.DENOMINATOR] = SAME_SCALARS[ops.TEMPERATURE]
SAME_SCALARS[ops.THRESHOLD] = SAME_SCALARS[ops.TEMPERATURE] + ((-1, -1.0), (INF, 1e300), (10**400, INF))


def short(value):
    """For the name of a test: the same in every process."""
    shown = sorted(value) if isinstance(value, set | frozenset) else value
    return f"{type(value).__name__}-{shown!r:.20}"


def scalar_cases(table):
    return [
        pytest.param(op.name, argument, *row, id=f"{op.name}-{argument}-{short(row[-2])}")
        for op in OPS.values()
        for argument, role in op.arguments.items()
        if role in table
        for row in table[role]
    ]


@pytest.mark.parametrize("op, argument, condition, kind, value, got", scalar_cases(SCALARS))
def test_scalar(op, argument, condition, kind, value, got):
    with pytest.raises(kind) as error:
        getattr(ppo_ext, op)(**valid_arguments(OPS[op]) | {argument: value})
    condition = condition.replace("{tokens}", tokens_of(OPS[op]))
    assert str(error.value) == f"{op}: {argument} must {condition}, got {got}"


@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim")  # of numpy
@pytest.mark.parametrize("op, argument, value, plain", scalar_cases(SAME_SCALARS))
def test_scalar_of_another_type(op, argument, value, plain):
    mode = next((mode for mode in OPS[op].modes.values() if argument in mode.options), None)
    arguments = valid_arguments(OPS[op], mode=mode)
    expected = OPS[op].run(copy.deepcopy(arguments) | {argument: plain})
    for name, result in OPS[op].run(arguments | {argument: value}).items():
        assert_same_bits(name, result, expected[name])


def test_the_product_of_gamma_and_lam():
    with pytest.raises(ValueError) as error:
        ppo_ext.gae(**valid_arguments(OPS["gae"]), gamma=-(2.0**100), lam=2.0**100)
    assert str(error.value) == f"gae: gamma * lam must lie in the range of float32, got {-(2.0**200)}"


@pytest.mark.parametrize(
    "op, argument",
    [(name, argument) for name, op in OPS.items() for argument in op.tensors if argument != op.first],
)
def test_another_device(op, argument):
    arguments, of = with_arguments(OPS[op], argument), OPS[op].first
    if argument in OPS[op].only_with:  # it takes the place of the first, with which the scores are compared
        argument, of = "scores", argument
    arguments[argument] = arguments[argument].to("meta")
    with pytest.raises(ValueError) as error:
        getattr(ppo_ext, op)(**arguments)
    if OPS[op].arguments[argument] is ops.MASK:
        of = mask_of(OPS[op])
    if OPS[op].arguments[argument] in (ops.TOKENS, ops.ROW_COUNTS):
        of = tokens_of(OPS[op])
    assert str(error.value) == f"{op}: {argument} must be on the device cpu of {of}, got meta"


@pytest.mark.parametrize(
    "op, changed, text",
    (
        (
            "logprobs",
            {"logits": torch.zeros(4, 7)},
            "labels must have the shape [4] of logits without its last dimension, got",
        ),
        (
            "logprobs_and_entropy",
            {"logits": torch.zeros(7)},
            "labels must have the shape [] of logits without its last dimension, got",
        ),
        ("full_kl", {"logits": torch.zeros(2, 3, 8)}, "ref_logits must have the shape [2, 3, 8] of logits, got"),
        (
            "linear_logprobs",
            {"hidden": torch.zeros(4, 5)},
            "labels must have the shape [4] of hidden without its last dimension, got",
        ),
        (
            "linear_statistics",
            {"weight": torch.zeros(9, 5)},
            "bias must have the shape [9] of weight's first dimension, got",
        ),
        ("gae", {"values": torch.zeros(2, 4)}, "rewards must have the shape [2, 4] of values, got"),
        ("gae", {"values": torch.zeros(6)}, "values must have the shape [B, T], got [6]"),
        ("gae", {"values": torch.zeros(1, 2, 3)}, "values must have the shape [B, T], got [1, 2, 3]"),
        ("kl_rewards", {"logprobs": torch.zeros(2, 4)}, "ref_logprobs must have the shape [2, 4] of logprobs, got"),
        ("kl_rewards", {"logprobs": torch.zeros(())}, "logprobs must have the shape [B, T], got []"),
        (
            "kl_rewards",
            {"kl_penalty": "full", "kls": torch.zeros(3, 3)},
            "scores must have the shape [3] of the first dimension of kls, got",
        ),
        ("kl_rewards", {"kl_penalty": "full", "kls": torch.zeros(6)}, "kls must have the shape [B, T], got [6]"),
        ("masked_mean", {"values": torch.zeros(2)}, "mask must broadcast to the shape [2] of values, got"),
        ("masked_var", {"values": torch.zeros(())}, "mask must broadcast to the shape [] of values, got"),
        ("masked_whiten", {"values": torch.zeros(3, 2)}, "mask must broadcast to the shape [3, 2] of values, got"),
        ("ppo_loss", {"logprobs": torch.zeros(2)}, "old_logprobs must have the shape [2] of logprobs, got"),
        (
            "kl_rewards",
            {"kls": torch.zeros(2, 3)},
            "kls must be given for kl_penalty 'full' and for no other, got one with 'kl'",
        ),
        (
            "kl_rewards",
            {"kl_penalty": "full"},
            "kls must be given for kl_penalty 'full' and for no other, got none with 'full'",
        ),
    ),
)
def test_an_argument_of_another_shape_than_the_rest(op, changed, text):
    with pytest.raises(ValueError) as error:
        getattr(ppo_ext, op)(**valid_arguments(OPS[op]) | changed)
    assert str(error.value).startswith(f"{op}: {text}")


# ---- one temperature for each token ---------------------------------------------------------------------------------

with_temperature = pytest.mark.parametrize("op", [op for op in OPS.values() if "temperature" in op.arguments], ids=str)


@with_temperature
def test_a_temperature_for_each_token_is_that_of_the_token(op):
    arguments = valid_arguments(op)
    temperature = torch.rand(2, 3) + 0.5
    whole = op.run(arguments | {"temperature": temperature})
    for b, t in ((0, 0), (1, 2)):
        alone = op.run(arguments | {"temperature": temperature[b, t].item()})
        for name in op.per_token:
            torch.testing.assert_close(whole[name][b, t], alone[name][b, t], rtol=1e-6, atol=1e-6)


@with_temperature
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16, torch.float16), ids=str)
def test_temperatures_of_any_float_and_strides(op, dtype):
    arguments = valid_arguments(op)
    temperature = torch.tensor([[0.5, 1.5], [2.0, 0.75], [4.0, 1.0]], dtype=dtype).t()
    expected = op.run(arguments | {"temperature": temperature.float().contiguous()})
    for name, result in op.run(arguments | {"temperature": temperature}).items():
        assert_same_bits(name, result, expected[name])


@with_temperature
@pytest.mark.parametrize("value", (0.0, -1.0, NAN, INF, 9e-31, 2e30))
def test_a_temperature_of_one_token_out_of_range(op, value):
    temperature = torch.ones(2, 3)
    temperature[1, 2] = value
    arguments = valid_arguments(op) | {"temperature": temperature, "mask": torch.ones(2, 3)}
    with pytest.raises(ValueError) as error:
        op.run(arguments)
    found = str(error.value)
    assert found.startswith(f"{op.name}: temperature[1, 2] must be between 1e-30 and 1e30, got ")
    arguments["mask"][1, 2] = 0
    masked = op.run(arguments)
    temperature[1, 2] = 1.0
    for name, result in op.run(arguments).items():
        assert_same_bits(name, masked[name], result)


@with_temperature
@pytest.mark.parametrize(
    "temperature, kind, text",
    (
        (torch.ones(2), ValueError, "be a number or have the shape [2, 3] of {}, got [2]"),
        (torch.ones(3, 2), ValueError, "be a number or have the shape [2, 3] of {}, got [3, 2]"),
        (torch.ones(2, 3, 1), ValueError, "be a number or have the shape [2, 3] of {}, got [2, 3, 1]"),
        (torch.ones(0), ValueError, "be a number or have the shape [2, 3] of {}, got [0]"),
        (torch.ones(2, 3).long(), TypeError, "be float32, bfloat16, float16 or float64, got torch.int64"),
        (torch.ones(2, 3).bool(), TypeError, "be float32, bfloat16, float16 or float64, got torch.bool"),
        (torch.ones(2, 3, device="meta"), ValueError, "be on the device cpu of {}, got meta"),
    ),
    ids=lambda x: f"{x.dtype}{list(x.shape)}{x.device}" if isinstance(x, torch.Tensor) else "",
)
def test_temperatures_of_another_form(op, temperature, kind, text):
    with pytest.raises(kind) as error:
        getattr(ppo_ext, op.name)(**valid_arguments(op) | {"temperature": temperature})
    of = "labels" if "labels" in op.arguments else "logits without its last dimension"
    assert str(error.value) == f"{op.name}: temperature must {text.format(of)}"


def test_every_argument_of_every_op_is_here():
    covered = {tuple(case.values[:2]) for case in (*tensor_cases(), *scalar_cases(SCALARS))}
    parameters = {(op, argument) for op in OPS for argument in inspect.signature(getattr(ppo_ext, op)).parameters}
    assert covered == parameters
