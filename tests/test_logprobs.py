"""logprobs and logprobs_and_entropy against float64, torch and TRL, and on everything a caller may pass."""

import math
import sys

import pytest
import torch
from cases import FLOATS, GPT2, VOCABULARIES, logits_inputs
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import check_labels, reference

INF = math.inf


def run(inputs, logits=None, op=ppo_ext.logprobs_and_entropy, **options):
    """Both results and the gradient of a random linear combination of them."""
    logits = (inputs["logits"] if logits is None else logits).detach().requires_grad_()
    logprobs, entropy = op(logits, inputs["labels"], mask=inputs["mask"], **options)
    loss = (logprobs * inputs["grad_logprobs"]).sum() + (entropy * inputs["grad_entropy"]).sum()
    return logprobs.detach(), entropy.detach(), torch.autograd.grad(loss, logits)[0]


def exact(inputs, **options):
    return run(inputs, inputs["logits"].double(), reference.logprobs_and_entropy, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_matches_float64(device, V, dtype):
    inputs = logits_inputs((3, 5, V), dtype, device)
    options = {"temperature": 0.7}
    ours = run(inputs, **options)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    torchs = run(inputs, inputs["logits"].to(single), reference.logprobs_and_entropy, **options)
    truth = exact(inputs, **options)
    assert ours[0].dtype == ours[1].dtype == single and ours[2].dtype == dtype
    for name, a, b, c in zip(("logprobs", "entropy"), ours, torchs, truth):
        assert_within_torch_error(name, a, b, c)
    assert_within_torch_error("grad_logits", ours[2], torchs[2].to(dtype), truth[2])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_logits_give_fp32_accurate_logprobs(device, dtype):
    inputs = logits_inputs((4, 8, GPT2), dtype, device)
    error = (
        (
            ppo_ext.logprobs(inputs["logits"], inputs["labels"])
            - reference.logprobs(inputs["logits"].double(), inputs["labels"])
        )
        .abs()
        .max()
        .item()
    )
    assert error <= 1e-5


def test_logprobs_alone_has_the_same_bits(device):
    inputs = logits_inputs((2, 3, 1000), torch.float32, device)
    both = ppo_ext.logprobs_and_entropy(inputs["logits"], inputs["labels"])[0]
    assert_same_bits("logprobs", ppo_ext.logprobs(inputs["logits"], inputs["labels"]), both)


def test_gradients_of_logprobs_alone(device):
    inputs = logits_inputs((2, 3, 100), torch.float64, device)
    grads = []
    for op in (ppo_ext.logprobs, reference.logprobs):
        logits = inputs["logits"].clone().requires_grad_()
        (op(logits, inputs["labels"], mask=inputs["mask"]) * inputs["grad_logprobs"]).sum().backward()
        grads.append(logits.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("output", (0, 1))
def test_gradcheck_float64(device, output):
    inputs = logits_inputs((2, 3, 9), torch.float64, device)
    logits = inputs["logits"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_ext.logprobs_and_entropy(x, inputs["labels"], mask=inputs["mask"], temperature=1.3)[output],
        logits,
    )


def test_opcheck(device):
    inputs = logits_inputs((2, 3, 17), torch.float32, device)
    logits, labels, mask = inputs["logits"], inputs["labels"], inputs["mask"]
    ops = torch.ops.ppo_ext
    note = torch.zeros(4, dtype=torch.int64, device=device)
    for label_note in (None, note):
        torch.library.opcheck(ops._logprobs.default, (logits, labels, mask, None, 0.8, True, label_note))
    _, entropy, row_max, log_sum = ops._logprobs(logits, labels, mask, None, 0.8, True, None)
    saved = (inputs["grad_logprobs"], inputs["grad_entropy"], labels, mask, entropy, row_max, log_sum, None, 0.8)
    torch.library.opcheck(ops._logprobs_backward.default, (logits, *saved))
    torch.library.opcheck(ops._logprobs_backward_.default, (logits.clone(), *saved))


def test_compiles_into_one_graph(device):
    inputs = logits_inputs((2, 3, 100), torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits):
        logprobs, entropy = ppo_ext.logprobs_and_entropy(logits, inputs["labels"], mask=inputs["mask"])
        return (logprobs - 0.1 * entropy).sum()

    grads = []
    for f in (compiled, compiled.__wrapped__):
        logits = inputs["logits"].clone().requires_grad_()
        f(logits).backward()
        grads.append(logits.grad)
    assert_same_bits("grad_logits", *grads)


def strided_views(logits):
    """The same numbers in every memory layout that a model or a caller may pass."""
    *rows, V = logits.shape
    padded = logits.new_full((rows[0], rows[1] + 2, V), math.nan)
    padded[:, 1:-1] = logits
    yield "slice of a longer sequence", padded[:, 1:-1]
    yield "vocabulary first", logits.movedim(-1, 0).contiguous().movedim(0, -1)
    yield "sequence first", logits.transpose(0, 1).contiguous().transpose(0, 1)
    wide = logits.new_full((*rows, 2 * V + 1), math.nan)
    wide[..., 1::2] = logits
    yield "every second column, misaligned", wide[..., 1::2]
    flat = torch.cat([logits.new_zeros(1), logits.flatten()])
    yield "storage offset of one element", flat[1:].view(logits.shape)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "V", (1037, 1040)
)  # with the second, rows of the gradient are aligned to 16 bytes for any logits
def test_views_give_the_same_bits(device, dtype, V):
    inputs = logits_inputs((3, 4, V), dtype, device)
    expected = run(inputs)
    for name, view in strided_views(inputs["logits"]):
        assert torch.equal(view, inputs["logits"])
        for part, a, b in zip(("logprobs", "entropy", "grad"), run(inputs, view), expected):
            assert_same_bits(f"{name}: {part}", a, b)


def test_expanded_logits(device):
    inputs = logits_inputs((3, 4, 33), torch.float32, device)
    row = inputs["logits"][:1, :1]
    for a, b in zip(run(inputs, row.expand(3, 4, 33)), run(inputs, row.repeat(3, 4, 1))):
        assert_same_bits("expanded", a, b)


@pytest.mark.parametrize("rows", ((), (0,), (2, 0), (1,), (2, 3, 2, 2)), ids=str)
def test_any_leading_shape(device, rows):
    inputs = logits_inputs((*rows, 11), torch.float32, device)
    for name, a, b in zip(("logprobs", "entropy", "grad"), run(inputs), exact(inputs)):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5, msg=name)


def test_masked_rows_are_never_read(device):
    inputs = logits_inputs((3, 4, 65), torch.float32, device)
    expected = run(inputs)
    spoilt = dict(inputs, logits=inputs["logits"].clone(), labels=inputs["labels"].clone())
    for value, label in ((math.nan, -100), (INF, 65), (-INF, 2**62)):
        spoilt["logits"][~inputs["mask"]] = value
        spoilt["labels"][~inputs["mask"]] = label
        for a, b in zip(run(spoilt), expected):
            assert_same_bits("spoilt", a, b)
    for result in expected:
        assert (result[~inputs["mask"]] == 0).all() and result[inputs["mask"]].any()


@pytest.mark.parametrize("mask_dtype", (torch.bool, torch.int64, torch.float32, torch.uint8), ids=str)
def test_mask_dtypes(device, mask_dtype):
    inputs = logits_inputs((3, 4, 9), torch.float32, device)
    a = ppo_ext.logprobs(inputs["logits"], inputs["labels"], mask=inputs["mask"].to(mask_dtype))
    assert_same_bits("mask", a, ppo_ext.logprobs(inputs["logits"], inputs["labels"], mask=inputs["mask"]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("V", (3, 40, 2500))
def test_minus_infinity_is_probability_zero(device, dtype, V):
    inputs = logits_inputs((2, 3, V), dtype, device)
    inputs["mask"][:] = True
    barred = torch.rand(inputs["logits"].shape, device=device) < 0.5
    barred[..., : V // 2] = True  # whole leading blocks
    barred.scatter_(-1, inputs["labels"][..., None], False)
    inputs["logits"][barred] = -INF
    logprobs, entropy, grad = run(inputs)
    truth = exact(inputs)
    torch.testing.assert_close(logprobs.double(), truth[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), truth[1], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(grad).all() and (grad[barred] == 0).all()
    torch.testing.assert_close(grad.double(), truth[2], rtol=1e-2, atol=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_hopeless_rows_are_nan_and_alone(device):
    inputs = logits_inputs((6, 1500), torch.float32, device)
    inputs["mask"][:] = True
    clean = run(inputs)
    inputs["logits"][0] = -INF
    inputs["logits"][1, 1400] = math.nan
    inputs["logits"][2, 3] = INF
    inputs["logits"][3, :1024] = math.nan
    logprobs, entropy, grad = run(inputs)
    assert logprobs[:4].isnan().all() and entropy[:4].isnan().all()
    for a, b in zip((logprobs, entropy, grad), clean):
        assert_same_bits("other rows", a[4:], b[4:])


def test_label_of_probability_zero(device):
    logits = torch.tensor([[0.0, -INF, 1.0]], device=device)
    assert ppo_ext.logprobs(logits, torch.tensor([1], device=device)).item() == -INF


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("bits", (0x7FFFFFFF, -1, 0x7F800001), ids=hex)
def test_any_nan_makes_a_gradient_nan(device, dtype, bits):
    """Including the NaN with all bits set: when it is rounded to half precision, no carry may change the sign bit."""
    inputs = logits_inputs((2, 1037), dtype, device)
    logits = inputs["logits"].requires_grad_()
    incoming = torch.tensor([bits, 0], dtype=torch.int32, device=device).view(torch.float32)
    [grad] = torch.autograd.grad(ppo_ext.logprobs(logits, inputs["labels"]), logits, incoming)
    assert grad[0].isnan().all() and not grad[1].any()


@pytest.mark.parametrize("offset", (1e4, -1e4))
def test_common_offset_costs_no_accuracy(device, offset):
    inputs = logits_inputs((4, 500), torch.float32, device)
    inputs["logits"] = (inputs["logits"] * 64).round() / 64 + offset  # exact in float32, so that any error is of the op
    ours, truth = run(inputs), exact(inputs)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=0, atol=2e-6)


def test_same_bits_for_any_threads_and_batch(device):
    inputs = logits_inputs((64, 5003), torch.float32, device)
    assert_same_bits_for_any_threads(lambda: run(inputs))
    halves = [run({k: v[i : i + 32] for k, v in inputs.items()}) for i in (0, 32)]
    for part, whole in enumerate(run(inputs)):
        assert_same_bits("batch", torch.cat([h[part] for h in halves]), whole)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inplace_backward_writes_the_gradient_over_the_logits(device, dtype):
    inputs = logits_inputs((3, 4, 1037), dtype, device)
    expected = run(inputs)[2]
    for name, view in strided_views(inputs["logits"]):
        leaf = view.detach().requires_grad_()
        logits = leaf.view_as(leaf)
        logprobs, entropy = ppo_ext.logprobs_and_entropy(
            logits, inputs["labels"], mask=inputs["mask"], inplace_backward=True
        )
        before, version = logits.detach().clone(), logits._version
        assert_same_bits("forward leaves the logits", before, inputs["logits"])
        ((logprobs * inputs["grad_logprobs"]).sum() + (entropy * inputs["grad_entropy"]).sum()).backward()
        assert_same_bits(name, leaf.grad, expected)
        assert_same_bits(name, logits.detach(), expected)
        assert logits._version > version


def test_use_after_inplace_backward_is_an_error(device):
    inputs = logits_inputs((2, 5), torch.float32, device)
    base = inputs["logits"].requires_grad_()
    logits = base * 1.0
    other = logits.square().sum()
    ppo_ext.logprobs(logits, inputs["labels"], inplace_backward=True).sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_no_second_derivative(device):
    inputs = logits_inputs((2, 5), torch.float32, device)
    logits = inputs["logits"].requires_grad_()
    (grad,) = torch.autograd.grad(ppo_ext.logprobs(logits, inputs["labels"]).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        grad.sum().backward()


def test_rejects_bad_arguments(device):
    inputs = logits_inputs((2, 3, 7), torch.float32, device)
    logits, labels = inputs["logits"], inputs["labels"]
    cases = [
        (
            TypeError,
            r"logprobs: logits must be float32, bfloat16, float16 or float64, got torch.int64",
            (labels, labels),
            {},
        ),
        (TypeError, r"logprobs: logits must be a torch.Tensor, got list", ([1.0], labels), {}),
        (TypeError, r"logprobs: labels must be int64 or int32, got torch.float32", (logits, labels.float()), {}),
        (
            ValueError,
            r"logprobs: labels must have the shape \[2, 3\] of logits without its last dimension, got \[2, 2\]",
            (logits, labels[:, :2]),
            {},
        ),
        (
            ValueError,
            r"logprobs: logits must have the shape \[..., V\] with V >= 1, got \[2, 3, 0\]",
            (logits[..., :0], labels),
            {},
        ),
        (
            ValueError,
            r"logprobs: temperature must be a positive finite number, got 0",
            (logits, labels),
            {"temperature": 0},
        ),
        (
            ValueError,
            r"logprobs: temperature must be a positive finite number, got nan",
            (logits, labels),
            {"temperature": math.nan},
        ),
        (
            ValueError,
            r"logprobs: mask must have the shape \[2, 3\] of labels, got \[3\]",
            (logits, labels),
            {"mask": torch.ones(3, device=device)},
        ),
        (ValueError, r"logprobs: labels must be on the device .* of logits, got meta", (logits, labels.to("meta")), {}),
    ]
    for kind, text, arguments, options in cases:
        with pytest.raises(kind, match=text):
            ppo_ext.logprobs(*arguments, **options)


def test_validate_looks_at_the_ids_before_anything_else(device, monkeypatch):
    inputs = logits_inputs((2, 3, 7), torch.float32, device)
    inputs["labels"][1, 2] = 7
    monkeypatch.setattr(sys.modules["ppo_ext.ops.logprobs"], "_apply", None)  # what runs the kernel
    for op in (ppo_ext.logprobs, ppo_ext.logprobs_and_entropy):
        with pytest.raises(ValueError, match=rf"^{op.__name__}: labels\[1, 2\] must be an id in \[0, 7\), got 7$"):
            op(inputs["logits"], inputs["labels"], validate=True)


def test_check_labels_raises_once(device, monkeypatch):
    noted = torch.tensor([2, 11, -100, 7], device=device)
    monkeypatch.setattr(check_labels, "_NOTES", {noted.device: noted})
    ppo_ext.check_labels("meta")
    with pytest.raises(ValueError, match=r"^logprobs: labels must be ids in \[0, 7\), got -100 in row 11 .*; 2 in all"):
        ppo_ext.check_labels()
    ppo_ext.check_labels()


@pytest.mark.parametrize("label", (-100, -1, 7, 14, 2**40))
def test_rejects_ids_outside_the_vocabulary(label):
    inputs = logits_inputs((2, 3, 7), torch.float32)
    inputs["labels"][1, 2] = label
    hint = "; leave rows without a label out by the mask" if label == -100 else ""
    with pytest.raises(ValueError, match=rf"labels\[1, 2\] must be an id in \[0, 7\), got {label}{hint}$"):
        ppo_ext.logprobs(inputs["logits"], inputs["labels"])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_equals_trl(dtype):
    core = require_trl().core
    inputs = logits_inputs((3, 7, 501), dtype)
    logprobs, entropy = ppo_ext.logprobs_and_entropy(inputs["logits"], inputs["labels"])
    torch.testing.assert_close(
        logprobs, core.logprobs_from_logits(inputs["logits"], inputs["labels"]), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(entropy, core.entropy_from_logits(inputs["logits"]), rtol=1e-5, atol=1e-5)


def test_reference_equals_trl():
    core = require_trl().core
    inputs = logits_inputs((3, 7, 501), torch.float64)
    logprobs, entropy = reference.logprobs_and_entropy(inputs["logits"], inputs["labels"])
    torch.testing.assert_close(
        logprobs, core.logprobs_from_logits(inputs["logits"], inputs["labels"]), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(entropy, core.entropy_from_logits(inputs["logits"]), rtol=1e-10, atol=1e-10)


def test_log_probability_of_a_sentence():
    """From the logits of a GPT-2 to the log-probability of a sentence, here of its tokens after the first."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=16, n_layer=1, n_head=2)).eval()
    ids = torch.randint(97, (1, 12))
    with torch.no_grad():
        logits = model(ids).logits
        ours = ppo_ext.logprobs(logits[:, :-1], ids[:, 1:]).sum()
        log_probs = torch.log_softmax(logits, dim=-1)
    by_hand = sum(log_probs[0, i, token].item() for i, token in enumerate(ids[0, 1:].tolist()))
    assert ours.item() == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("temperature", (1e-30, 1e-20, 1e-10, 1e20, 1e30))
def test_the_entropy_has_a_gradient_at_any_temperature(device, dtype, temperature):
    """Logits of the temperature's size, so that no row is saturated."""
    inputs = logits_inputs((3, 4, 50), torch.float64, device)
    inputs["logits"], labels = (temperature * torch.randn(3, 4, 50, device=device)).to(dtype), inputs["labels"]
    results = []
    for op, wide in ((ppo_ext, False), (reference, False), (reference, True)):
        logits = inputs["logits"].to(torch.float64 if wide else dtype).requires_grad_()
        logprobs, entropy = op.logprobs_and_entropy(logits, labels, temperature=temperature)
        (grad,) = torch.autograd.grad((logprobs + 0.5 * entropy).sum(), logits)
        results.append((logprobs.detach(), entropy.detach(), grad.detach()))
    for name, ours, torchs, exact in zip(("logprobs", "entropy", "grad_logits"), *results):
        assert_within_torch_error(name, ours, torchs, exact, units=3)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("temperature", (2.0, 1e3, 1e30))
def test_no_distance_overflows_that_the_temperature_makes_finite(device, dtype, temperature):
    largest = torch.finfo(dtype).max
    logits = torch.tensor([[largest, -largest, 0.0]], dtype=torch.float64, device=device).to(dtype)
    for op in (ppo_ext, reference):
        logprobs, entropy = op.logprobs_and_entropy(logits, torch.tensor([1], device=device), temperature=temperature)
        torch.testing.assert_close(logprobs.double(), logits[:, 1].double() * (2 / temperature), rtol=1e-6, atol=0)
        assert entropy.item() == 0
