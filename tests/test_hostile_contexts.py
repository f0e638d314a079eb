"""The ops where torch does something unusual around them: other memory, other modes, other kinds of derivatives."""

import contextlib
import warnings

import op_calls
import pytest
import torch
from conftest import assert_same_bits
from op_calls import DIFFERENTIABLE, OPS, ROLES, run, valid_arguments
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import ppo_ext

ON_LOGITS = [op for op in OPS if op_calls.LOGITS in ROLES[op].values()]
WITH_TANGENT_CHECK = (*ON_LOGITS, "ppo_loss")
WITH_GRADIENTS = [op for op in OPS if DIFFERENTIABLE[op]]
NOT_DIFFERENTIABLE = [op for op in OPS if not DIFFERENTIABLE[op]]
MASKED = ("masked_mean", "masked_var", "masked_whiten")


def tensors_of(arguments):
    return {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor)}


def call(op, arguments):
    """The results without gradients, as a tuple of tensors."""
    results = getattr(ppo_ext, op)(**arguments)
    results = results if isinstance(results, tuple) else (results,)
    return (*results[:-1], *results[-1].values()) if op == "ppo_loss" else results


def assert_same_results(op, a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert_same_bits(op, x, y)


# ---- memory ----

OVERLAPPING = {
    "one row for all": lambda x: x[:1, :1].expand(2, 3, 7),
    "one number for all": lambda x: x[:1, :1, :1].expand(2, 3, 7),
    "windows that overlap": lambda x: x.flatten().as_strided((2, 3, 7), (3, 2, 1)),
    "lazily negated": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("layout", OVERLAPPING)
@pytest.mark.parametrize("op", ON_LOGITS)
def test_logits_that_cannot_be_overwritten_have_the_right_gradient(op, layout):
    arguments = valid_arguments(op)
    view = arguments | {"logits": OVERLAPPING[layout](arguments["logits"])}
    before = view["logits"].clone()
    results = run(op, view | {"inplace_backward": True})
    assert_same_bits("the logits", view["logits"], before)
    for name, expected in run(op, view | {"logits": before}).items():
        assert_same_bits(name, results[name], expected)


@pytest.mark.parametrize("shared", ("the same", "one token later", "none"))
def test_ref_logits_that_share_memory_with_the_logits(shared):
    memory = torch.randn(4, 4, 7)
    logits = memory[:2, :3]
    ref_logits = {"the same": logits, "one token later": memory[:2, 1:], "none": memory[2:, :3]}[shared]
    expected = run("full_kl", {"logits": logits.clone(), "ref_logits": ref_logits.clone()})
    results = run("full_kl", {"logits": logits, "ref_logits": ref_logits, "inplace_backward": True})
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
@pytest.mark.parametrize("op", OPS)
def test_modes_change_nothing(op, mode):
    arguments = valid_arguments(op)
    expected = call(op, arguments)
    with mode():
        results = call(op, arguments)
    assert_same_results(op, [x.clone() for x in results], expected)


@pytest.mark.parametrize("op", OPS)
def test_tensors_of_inference_mode(op):
    arguments = valid_arguments(op)
    with torch.inference_mode():
        frozen = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    assert_same_results(op, call(op, frozen), call(op, arguments))


@pytest.mark.parametrize("op", ON_LOGITS)
def test_tensors_of_inference_mode_cannot_be_kept_for_backward(op):
    arguments = valid_arguments(op)
    with torch.inference_mode():
        other = "ref_logits" if op == "full_kl" else "mask"
        arguments[other] = arguments[other].clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        run(op, arguments)


def shapes(results):
    return [(x.shape, x.dtype) for x in results]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_meta_and_fake_tensors_have_the_shapes_of_results(op, dtype):
    arguments = valid_arguments(op, dtype=dtype)
    expected = shapes(call(op, arguments))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        on_meta = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert shapes(call(op, on_meta)) == expected
        if DIFFERENTIABLE[op]:
            assert all(x.is_meta for name, x in run(op, on_meta).items() if name.startswith("grad_"))
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert shapes(call(op, fake)) == expected


# ---- derivatives ----


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_only_the_named_inputs_receive_gradients(op):
    arguments = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in valid_arguments(op).items()
    }
    call(op, arguments)[0].sum().backward()
    assert {name for name, x in tensors_of(arguments).items() if x.grad is not None} == set(DIFFERENTIABLE[op])


@pytest.mark.parametrize("op", NOT_DIFFERENTIABLE)
def test_results_without_gradients(op):
    arguments = {
        name: x.requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in valid_arguments(op).items()
    }
    assert not any(x.requires_grad for x in call(op, arguments))


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_no_second_derivative(op):
    arguments = valid_arguments(op)
    leaf = arguments[DIFFERENTIABLE[op][0]].requires_grad_()
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
@pytest.mark.parametrize("op, name", [(op, name) for op in WITH_TANGENT_CHECK for name in DIFFERENTIABLE[op]])
def test_forward_mode_is_an_error_and_not_0(op, name, context, differentiate):
    with context(), pytest.raises(NotImplementedError) as error:
        differentiate(op, valid_arguments(op), name)
    assert str(error.value) == f"{op}: {name} must be differentiated in reverse mode, got a forward-mode tangent"


@pytest.mark.parametrize("op", MASKED)
def test_forward_mode_of_moments_is_an_error_of_torch(op):
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        forward_mode(op, valid_arguments(op), "values")


@pytest.mark.parametrize("op", NOT_DIFFERENTIABLE)
def test_detached_results_have_no_tangent(op):
    arguments = valid_arguments(op)
    assert forward_mode(op, arguments, next(iter(arguments))) == [None] * len(call(op, arguments))


@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_functional_gradients_are_an_error_of_torch(op):
    arguments, name = valid_arguments(op), DIFFERENTIABLE[op][0]
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: call(op, arguments | {name: x})[0].sum())(arguments[name])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_vmap_is_a_loop_or_an_error_of_torch(op):
    batches = [valid_arguments(op) for _ in range(2)]
    names = list(tensors_of(batches[0]))
    stacked = [torch.stack([batch[name] for batch in batches]) for name in names]
    function = torch.func.vmap(lambda *xs: call(op, batches[0] | dict(zip(names, xs))))
    if op in (*MASKED, "logprobs", "logprobs_and_entropy"):
        with pytest.raises(RuntimeError, match="functorch transforms|Batching rule not implemented"):
            function(*stacked)
        return
    expected = [torch.stack(results) for results in zip(*(call(op, batch) for batch in batches))]
    assert_same_results(op, function(*stacked), expected)


@pytest.mark.parametrize("op, name", (("logprobs", "temperature"), ("gae", "gamma"), ("ppo_loss", "cliprange")))
def test_a_number_that_changes_between_calls_of_a_compiled_function(op, name):
    arguments = valid_arguments(op)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(op, arguments | {name: x}), fullgraph=True, backend="aot_eager")
    for x in (0.5, 0.75, 0.875, 1):
        assert_same_results(op, compiled(x), call(op, arguments | {name: x}))
