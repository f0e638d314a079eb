"""The operators torch.ops.ppo_ext.* below the public functions, with invalid arguments that their schemas allow.

They read and write memory, so every wrong dtype, shape, stride and device must be refused with a sentence. The cases
are made from the schemas, and the numbers from the roles that public arguments of the same names have in ops.py. A
fuzzer with several wrong arguments at a time runs in a process of its own.
"""

import math
import os
import subprocess
import sys

import ops
import pytest
import torch
from cases import logits_inputs, token_inputs
from conftest import assert_same_bits
from ops import JOINED, OPS, STEMS

from ppo_ext.ops._ppo_options import STAT_NAMES

OPERATORS = {
    name.removeprefix("ppo_ext::"): getattr(torch.ops.ppo_ext, name.removeprefix("ppo_ext::")).default
    for name in sorted(torch._C._dispatch_get_all_op_names())
    if name.startswith("ppo_ext::")
}
ROLES = {name: role for op in OPS.values() for name, role in op.arguments.items()}
# By role: a valid number; the condition in the error (None if any number is valid); numbers that are invalid.
NUMBERS = {
    ops.TEMPERATURE: (
        0.7,
        "be between 1e-30 and 1e30",
        (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-31, 1e31),
    ),
    ops.POSITIVE: (1.5, "be between 1e-30 and 1e30", (0.0, -1.0, math.nan, math.inf, -math.inf, 1e-31, 1e31)),
    ops.SOFTCAP: (2.0, "be between 1e-30 and 1e30", (-1.0, math.nan, math.inf, -math.inf, 1e-31, 1e31)),
    **dict.fromkeys(
        (ops.FINITE, ops.LAM, ops.LAM_RETURNS), (0.9, "be a finite number", (math.nan, math.inf, -math.inf))
    ),
    ops.NOT_NEGATIVE: (0.2, "not be negative", (-1.0, math.nan, -math.inf)),
    ops.PENALTY: (0, r"be in \[0, 5\)", (-1, 5, 2**62, -(2**62))),
    ops.MODE: (0, r"be in \[0, 3\)", (-1, 3, 2**62, -(2**62))),
    ops.THRESHOLD: (10.0, None, ()),
}
NUMBERS |= dict.fromkeys((ops.CLIPRANGE, ops.NOT_NEGATIVE_OR_NONE), NUMBERS[ops.NOT_NEGATIVE])
# What a forward pass saves, and other arguments that are not public, where they are no tensors of the tokens' shape.
INTERNAL = {
    "weights": torch.ones(2, 3),
    "grad_loss": torch.ones(()),
    "moments": torch.ones(3),
    "stats": torch.ones(len(STAT_NAMES) + 1),
    "grads": torch.ones(3, 2, 3),
    # of sequences, packed one after the other
    "bootstrap": torch.ones(2),
    "gamma_lams": torch.full((2,), 0.9),
    "cu_seqlens": torch.tensor([0, 2, 6]),
    "denominator": torch.ones(()),
    "row_counts": torch.full((2,), 4.0),
    "label_note": torch.zeros(4, dtype=torch.int64),
    "hidden": torch.linspace(-1, 1, 30).view(2, 3, 5),
    "weight": torch.linspace(-1, 1, 35).view(7, 5),
    "bias": torch.linspace(-1, 1, 7),
    # of a tile, whose rows are the tokens
    "tile": torch.linspace(-1, 1, 48).view(6, 8),
    "targets": torch.arange(6),
    "states": torch.zeros(6, 8, dtype=torch.float64),
    "results": torch.zeros(6, 7),
}
# Numbers that are not public, as in NUMBERS.
INTERNAL_NUMBERS = {
    "first": (0, r"lie in \[0, vocabulary - columns\]", (-1, 1, 2**62, -(2**62))),
    "vocabulary": (8, None, ()),
    "kind": (1, r"be in \[0, 2\)", (-1, 2, 2**62, -(2**62))),
    "level": (1, r"be in \[0, 3\)", (-1, 3, 2**62, -(2**62))),
    "low": (0.5, r"lie in \[0, high\]", (-1.0, 1e30, math.nan, math.inf)),
    "high": (2.0, "be a finite number", (math.nan, math.inf)),
    # the options of ppo_loss: 13 numbers, and the places of 6 names
    "numbers": (
        [*[0.2] * 13, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        "(have 19 entries|be numbers|end with the numbers of names)",
        ([], [0.2] * 13, [0.0] * 20, [math.nan] * 19, *([*[0.2] * 13, *[x] * 6] for x in (-1.0, 9.0, 0.5, math.nan))),
    ),
}


def parameters(operator):
    return operator._schema.arguments


def takes_tensor(parameter):
    return str(parameter.type) in ("Tensor", "Optional[Tensor]")


def number(parameter):
    """(a valid value, the condition in the error, invalid values) of a parameter that is not a tensor."""
    if parameter.name in INTERNAL_NUMBERS:
        return INTERNAL_NUMBERS[parameter.name]
    return (True, None, ()) if str(parameter.type) == "bool" else NUMBERS[ROLES[parameter.name]]


def valid_arguments(name):
    """Arguments that the operator accepts, by name, in the order of its schema: [2, 3] tokens, 7 logits each.

    Tensors that a forward pass would have saved have the right shape but not the right values.
    """
    inputs = token_inputs((2, 3)) | logits_inputs((2, 3, 7), torch.float32)
    inputs |= {name: x.clone() for name, x in INTERNAL.items()}
    inputs |= {"scores": inputs["scores"].contiguous(), "labels": inputs["labels"].clamp(max=5)}
    found = {}
    for parameter in parameters(OPERATORS[name]):
        other = torch.rand(2, 3) if takes_tensor(parameter) else number(parameter)[0]
        found[parameter.name] = inputs.get(parameter.name, other)
    if "tile" in found or "cu_seqlens" in found:
        found |= {name: x.flatten() for name, x in found.items() if getattr(x, "shape", ()) == (2, 3)}
    return found


# The rows: what is done to a valid tensor, and the condition in the error.
SHAPE, DTYPE = "have the shape|have [0-9]+ entr|be contiguous", "be int64|be bool|be float"
CHANGES = {
    "complex": (lambda x: x.to(torch.complex64), DTYPE),
    "int32": (lambda x: x.int(), DTYPE),
    "a dtype of another kind": (lambda x: x.long() if x.is_floating_point() else x.float(), DTYPE),
    "float16": (lambda x: x.half(), DTYPE),
    "float64": (lambda x: x.double(), DTYPE),
    "float8": (lambda x: x.to(torch.float8_e5m2), DTYPE),
    "one more dimension": (lambda x: x[None], SHAPE),
    "a number": (lambda x: x.flatten()[0], SHAPE),
    "flat and longer": (lambda x: torch.cat([x.flatten(), x.flatten()]), SHAPE),
    "one short": (lambda x: x.view(x.shape or 1)[..., 1:].contiguous(), SHAPE),
    "one long": (lambda x: torch.cat([x.view(x.shape or 1), x.view(x.shape or 1)[..., :1]], -1), SHAPE),
    "empty": (lambda x: x.view(x.shape or 1)[..., :0], SHAPE),
    "every second entry": (lambda x: x.repeat_interleave(2, -1)[..., ::2], "be contiguous"),
    "stride 0": (lambda x: x.flatten()[:1].expand(x.shape), "be contiguous|have one address for each entry"),
    "on meta": (lambda x: x.to("meta"), "be on one device"),
}
STRIDES = {"every second entry", "stride 0"}
# Changes that are no faults: logits may have any strides, any dtype and V unless another argument must match them, and
# a number or vector may have additional dimensions of size 1.
NO_FAULTS = {
    ("_logprobs", "logits"): STRIDES | {"float16", "one short", "one long"},
    ("_logprobs", "label_note"): {"one more dimension"},
    ("_logprobs_backward", "logits"): STRIDES | {"float16", "one short", "one long"},
    ("_logprobs_backward_", "logits"): {"every second entry", "float16", "one short", "one long"},
    **{(name, logits): STRIDES for name in ("_full_kl", "_full_kl_backward") for logits in ("logits", "ref_logits")},
    ("_full_kl_backward_", "logits"): {"every second entry"},
    ("_full_kl_backward_", "ref_logits"): STRIDES,
    **{
        (name, argument): STRIDES | {"float16", *(("float64",) if argument == "bias" else ())}
        for name in (
            *("_linear_logprobs", "_linear_logprobs_backward", "_linear_logprobs_shard_backward"),
            "_ppo_loss_from_hidden",
        )
        for argument in ("hidden", "weight", "bias")
    },
    ("_linear_logprobs", "label_note"): {"one more dimension"},
    ("_ppo_loss_from_hidden", "label_note"): {"one more dimension"},
    ("_ppo_loss_from_hidden", "denominator"): {"one more dimension", "a number"},
    ("_ppo_loss_from_hidden", "row_counts"): {"one more dimension"},
    ("_linear_logprobs_fold", "states"): {"one more dimension", "float64"},
    ("_linear_logprobs_fold", "results"): {"one more dimension"},
    **{("_gae", argument): {"one more dimension"} for argument in ("bootstrap", "gamma_lams", "cu_seqlens")},
    ("_masked_whiten_backward", "moments"): {"one more dimension"},
    ("_ppo_loss_backward", "grad_loss"): {"one more dimension", "a number"},
    ("_ppo_loss_backward", "stats"): {"one more dimension"},
    ("_ppo_loss_options", "denominator"): {"one more dimension", "a number"},
    ("_ppo_loss_options", "row_counts"): {"one more dimension"},
    ("_ppo_loss_options_backward", "grad_loss"): {"one more dimension", "a number"},
    ("_ppo_loss_options_backward", "stats"): {"one more dimension", "one long", "flat and longer"},
    ("_ppo_loss_options_backward", "grads"): {"one short", "one long", "empty"},
}


def tensor_cases():
    return [
        pytest.param(name, parameter.name, change, id=f"{name}-{parameter.name}-{change}")
        for name, operator in OPERATORS.items()
        for parameter in parameters(operator)
        if takes_tensor(parameter)
        for change in CHANGES
        if parameter.name not in ("grad_loss", "denominator") or change not in STRIDES
    ]  # which have one entry only


def call(name, arguments):
    """The results of the operator or, if it returns nothing, the tensor that it has overwritten."""
    results = OPERATORS[name](*arguments.values())
    results = next(arguments[name] for name in ("logits", "tile") if name in arguments) if results is None else results
    return results if isinstance(results, tuple) else (results,)


def is_no_fault(arguments, name, argument, change):
    """Whether the operator accepts this change. float64 is no fault of its only floating tensor."""
    floats = [x for x, value in arguments.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return change in NO_FAULTS.get((name, argument), ()) or (change == "float64" and floats == [argument])


@pytest.mark.parametrize("name, argument, change", tensor_cases())
def test_tensor(name, argument, change):
    make, text = CHANGES[change]
    arguments = valid_arguments(name)
    no_fault = is_no_fault(arguments, name, argument, change)
    arguments[argument] = make(arguments[argument])
    if no_fault:
        dense = arguments | {argument: arguments[argument].clone(memory_format=torch.contiguous_format)}
        for a, b in zip(call(name, arguments), call(name, dense)):
            assert_same_bits(name, a, b)
        return
    with pytest.raises((TypeError, ValueError, RuntimeError), match=rf"^[a-z_]+: \S.* must ({text}).*, got .+"):
        call(name, arguments)


@pytest.mark.parametrize(
    "name, argument, condition, value",
    [
        (name, parameter.name, number(parameter)[1], value)
        for name, operator in OPERATORS.items()
        for parameter in parameters(operator)
        if not takes_tensor(parameter)
        for value in number(parameter)[2]
    ],
)
def test_number(name, argument, condition, value):
    with pytest.raises((ValueError, RuntimeError), match=f"^[a-z_]+: {argument} must {condition}, got "):
        call(name, valid_arguments(name) | {argument: value})


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, operator in OPERATORS.items()
        if any(parameter.name == "labels" for parameter in parameters(operator))
        and name != "_linear_logprobs_shard_backward"  # there they are ids of other shards
    ],
)
@pytest.mark.parametrize("label", (-100, 7, 2**40, -(2**63)))
def test_ids_outside_the_vocabulary(name, label):
    arguments = valid_arguments(name)
    arguments["labels"][1, 2], arguments["mask"][1, 2] = label, True
    with pytest.raises(
        (ValueError, RuntimeError), match=rf"labels\[1, 2\] must be an id in \[0, 7\), got {label}(; .*mask)?$"
    ):
        call(name, arguments)


@pytest.mark.parametrize("label", (-100, 7, 2**40, -(2**63)))
def test_ids_of_other_shards_are_no_column_of_this_one(label):
    arguments = valid_arguments("_linear_logprobs_shard_backward")
    arguments["labels"][1, 2], arguments["mask"][1, 2] = -1, True
    expected = call("_linear_logprobs_shard_backward", arguments)
    arguments["labels"][1, 2] = label
    for got, one in zip(call("_linear_logprobs_shard_backward", arguments), expected, strict=True):
        assert torch.equal(got, one)


@pytest.mark.parametrize(
    "name, argument",
    [(name, parameter.name) for name, operator in OPERATORS.items() for parameter in parameters(operator)],
)
def test_torch_refuses_what_the_schema_does_not_allow(name, argument):
    with pytest.raises((RuntimeError, TypeError), match="[Ee]xpected a value of type|incompatible"):
        call(name, valid_arguments(name) | {argument: object()})


@pytest.mark.parametrize(
    "name, argument",
    [
        (name, parameter.name)
        for name, operator in OPERATORS.items()
        for parameter in parameters(operator)
        if takes_tensor(parameter)
    ],
)
def test_torch_finds_no_kernel_for_sparse_tensors(name, argument):
    arguments = valid_arguments(name)
    with pytest.raises(NotImplementedError, match="Could not run"):
        call(name, arguments | {argument: arguments[argument].to_sparse()})


def stem_of(operator):
    return max((stem for stem in STEMS if operator.startswith(f"_{stem}")), key=len, default=None)


def test_every_operator_is_of_a_stem():
    found = {stem_of(name) for name in OPERATORS}
    assert found <= set(STEMS) and set(STEMS) - found <= JOINED


def fuzz(calls):
    """Applies the faults above, up to three at a time. Prints how often an operator ran and how often it refused."""
    generator = torch.Generator().manual_seed(0)

    def pick(things):
        return things[int(torch.randint(len(things), (), generator=generator))]

    ran = refused = 0
    for _ in range(calls):
        name = pick(list(OPERATORS))
        arguments = valid_arguments(name)
        for _ in range(pick((1, 1, 2, 3))):
            argument = pick(list(arguments))
            if isinstance(arguments[argument], torch.Tensor):
                try:
                    arguments[argument] = CHANGES[pick(list(CHANGES))][0](arguments[argument])
                except (RuntimeError, IndexError):
                    continue  # this change cannot be applied after the previous one
            else:
                parameter = next(p for p in parameters(OPERATORS[name]) if p.name == argument)
                arguments[argument] = pick(number(parameter)[2] or (arguments[argument],))
        try:
            call(name, arguments)
            ran += 1
        except (TypeError, ValueError, RuntimeError) as error:
            if " must " not in str(error):
                raise
            refused += 1
    print(f"{ran} ran, {refused} refused")


def test_several_faults_at_a_time_crash_nothing():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_PERTURB_": "165"}
    result = subprocess.run([sys.executable, __file__, "3000"], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    ran, refused = (int(word) for word in result.stdout.split() if word.isdigit())
    assert ran > 100 and refused > 2000


if __name__ == "__main__":
    fuzz(int(sys.argv[1]))
