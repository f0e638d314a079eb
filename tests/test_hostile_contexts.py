"""The ops in unusual surroundings: overlapping memory, modes of torch, other kinds of derivatives, compilation."""

import contextlib
import warnings

import pytest
import torch
from cases import valid_arguments
from conftest import assert_same_bits
from ops import JOINED, OPS, of_stem
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad


def each(ops):
    return pytest.mark.parametrize("op", ops, ids=lambda op: op.name)


each_op = each(OPS.values())
on_logits = each([op for op in OPS.values() if op.on_logits])
with_gradients = each([op for op in OPS.values() if op.differentiable])
without_gradients = each([op for op in OPS.values() if not op.differentiable])
# The masked ops are autograd functions even where no gradient is asked for, so torch refuses forward mode itself.
CHECKED_FOR_TANGENTS = [op for op in OPS.values() if op.differentiable and op not in of_stem("masked")]
# torch has no vmap for autograd functions, nor for operators that write to an argument, as _logprobs to its label note.
WITHOUT_VMAP = [op for stem in ("masked", "logprobs", "linear_logprobs", *JOINED) for op in of_stem(stem)]


def call(op, arguments):
    """The results without gradients."""
    return list(op.outputs(arguments).values())


def tensors_of(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def floats_with_gradients(op):
    """Valid arguments among which every floating tensor requires a gradient."""
    return {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in valid_arguments(op).items()
    }


def assert_same_results(op, a, b):
    for x, y in zip(a, b, strict=True):
        assert_same_bits(op.name, x, y)


# ---- memory ----

OVERLAPPING = {
    "one row for all": lambda x: x[:1, :1].expand(2, 3, 7),
    "one number for all": lambda x: x[:1, :1, :1].expand(2, 3, 7),
    "windows that overlap": lambda x: x.flatten().as_strided((2, 3, 7), (3, 2, 1)),
    "lazily negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
@on_logits
def test_logits_that_cannot_be_overwritten_have_the_right_gradient(op, layout):
    arguments = valid_arguments(op)
    view = arguments | {"logits": OVERLAPPING[layout](arguments["logits"])}
    before = view["logits"].clone()
    results = op.run(view | {"inplace_backward": True})
    assert_same_bits("the logits", view["logits"], before)
    for name, expected in op.run(view | {"logits": before}).items():
        assert_same_bits(name, results[name], expected)


@pytest.mark.parametrize("shared", ("the same", "one token later", "none"))
def test_ref_logits_that_share_memory_with_the_logits(shared):
    memory = torch.randn(4, 4, 7)
    logits = memory[:2, :3]
    ref_logits = {"the same": logits, "one token later": memory[:2, 1:], "none": memory[2:, :3]}[shared]
    expected = OPS["full_kl"].run({"logits": logits.clone(), "ref_logits": ref_logits.clone()})
    results = OPS["full_kl"].run({"logits": logits, "ref_logits": ref_logits, "inplace_backward": True})
    for name in expected:
        assert_same_bits(name, results[name], expected[name])
    written = torch.equal(logits, expected["grad_logits"])
    assert written == (shared != "one token later")


# ---- modes ----


@pytest.mark.parametrize(
    "mode",
    (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)),
    ids=("no_grad", "inference_mode", "autocast"),
)
@each_op
def test_modes_change_nothing(op, mode):
    arguments = valid_arguments(op)
    expected = call(op, arguments)
    with mode():
        results = call(op, arguments)
    assert_same_results(op, [x.clone() for x in results], expected)


@each_op
def test_tensors_of_inference_mode(op):
    arguments = valid_arguments(op)
    with torch.inference_mode():
        frozen = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    assert_same_results(op, call(op, frozen), call(op, arguments))


@on_logits
def test_tensors_of_inference_mode_cannot_be_kept_for_backward(op):
    arguments = valid_arguments(op)
    with torch.inference_mode():
        other = "ref_logits" if "ref_logits" in op.arguments else "mask"
        arguments[other] = arguments[other].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        op.run(arguments)


def shapes(results):
    return [(x.shape, x.dtype) for x in results]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@each_op
def test_meta_and_fake_tensors_have_the_shapes_of_results(op, dtype):
    arguments = valid_arguments(op, dtype=dtype)
    expected = shapes(call(op, arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert shapes(call(op, on_meta)) == expected
        if op.differentiable:
            assert all(x.is_meta for name, x in op.run(on_meta).items() if name.startswith("grad_"))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert shapes(call(op, fake)) == expected


# ---- derivatives ----


@with_gradients
def test_only_the_named_inputs_receive_gradients(op):
    arguments = floats_with_gradients(op)
    call(op, arguments)[0].sum().backward()
    assert {name for name, x in tensors_of(arguments).items() if x.grad is not None} == set(op.differentiable)


@without_gradients
def test_results_without_gradients(op):
    assert not any(x.requires_grad for x in call(op, floats_with_gradients(op)))


@with_gradients
def test_no_second_derivative(op):
    arguments = valid_arguments(op)
    leaf = arguments[op.differentiable[0]].requires_grad_()
    weight = torch.ones((), requires_grad=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad|differentiable once"):
        (grad,) = torch.autograd.grad((weight * call(op, arguments)[0]).sum(), leaf, create_graph=True)
        grad.sum().backward()


def forward_mode(op, arguments, name):
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        return [forward_ad.unpack_dual(x).tangent for x in call(op, arguments | {name: dual})]


def functional_jvp(op, arguments, name):
    x = arguments[name]
    return torch.func.jvp(lambda x: call(op, arguments | {name: x}), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("differentiate", (forward_mode, functional_jvp))
@pytest.mark.parametrize("context", (contextlib.nullcontext, torch.no_grad))
@pytest.mark.parametrize(
    "op, name",
    [pytest.param(op, name, id=f"{op.name}-{name}") for op in CHECKED_FOR_TANGENTS for name in op.differentiable],
)
def test_forward_mode_is_an_error_and_not_0(op, name, context, differentiate):
    with context(), pytest.raises(NotImplementedError) as error:
        differentiate(op, valid_arguments(op), name)
    assert str(error.value) == f"{op.name}: {name} must be differentiated in reverse mode, got a forward-mode tangent"


@each(of_stem("masked"))
def test_forward_mode_of_moments_is_an_error_of_torch(op):
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        forward_mode(op, valid_arguments(op), "values")


@without_gradients
def test_detached_results_have_no_tangent(op):
    arguments = valid_arguments(op)
    assert forward_mode(op, arguments, next(iter(arguments))) == [None] * len(call(op, arguments))


@with_gradients
def test_functional_gradients_are_an_error_of_torch(op):
    arguments, name = valid_arguments(op), op.differentiable[0]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: call(op, arguments | {name: x})[0].sum())(arguments[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@each_op
def test_vmap_is_a_loop_or_an_error_of_torch(op):
    batches = [valid_arguments(op) for _ in range(2)]
    names = list(tensors_of(batches[0]))
    stacked = [torch.stack([batch[name] for batch in batches]) for name in names]
    function = torch.func.vmap(lambda *xs: call(op, batches[0] | dict(zip(names, xs))))
    if op in WITHOUT_VMAP:
        with pytest.raises(RuntimeError, match="functorch transforms|Batching rule not implemented"):
            function(*stacked)
        return
    expected = [torch.stack(results) for results in zip(*(call(op, batch) for batch in batches))]
    assert_same_results(op, function(*stacked), expected)


@pytest.mark.parametrize("op, name", (("logprobs", "temperature"), ("gae", "gamma"), ("ppo_loss", "cliprange")))
def test_a_number_that_changes_between_calls_of_a_compiled_function(op, name):
    op = OPS[op]
    arguments = valid_arguments(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(op, arguments | {name: x}), fullgraph=True, backend="aot_eager")
    for x in (0.5, 0.75, 0.875, 1):
        assert_same_results(op, compiled(x), call(op, arguments | {name: x}))
