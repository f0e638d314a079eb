"""full_kl against float64, torch and TRL, and on everything a caller may pass."""

import math
import os

import pytest
import torch
from cases import FLOATS, GPT2, VOCABULARIES, logits_inputs
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error, require_trl

import ppo_ext
from ppo_ext.ops import _native, reference

INF = math.inf


def run(inputs, logits=None, ref_logits=None, op=ppo_ext.full_kl, **options):
    """The divergences and the gradient of a random combination of them."""
    logits = (inputs["logits"] if logits is None else logits).detach().requires_grad_()
    ref_logits = inputs["ref_logits"] if ref_logits is None else ref_logits
    kl = op(logits, ref_logits, mask=inputs["mask"], **options)
    return kl.detach(), torch.autograd.grad((kl * inputs["grad_logprobs"]).sum(), logits)[0]


def exact(inputs, **options):
    return run(inputs, inputs["logits"].double(), inputs["ref_logits"].double(), reference.full_kl, **options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_matches_float64(device, V, dtype):
    inputs = logits_inputs((3, 5 if V == GPT2 else 40, V), dtype, device)
    single = torch.float64 if dtype == torch.float64 else torch.float32
    options = {"temperature": 0.7}
    ours, truth = run(inputs, **options), exact(inputs, **options)
    torchs = run(inputs, inputs["logits"].to(single), inputs["ref_logits"].to(single), reference.full_kl, **options)
    assert ours[0].dtype == single and ours[1].dtype == dtype
    # A divergence is the difference of logarithms of two sums, which are 1 where a row is peaked.
    assert_within_torch_error("full_kl", ours[0], torchs[0], truth[0], units=3, scale=1.0)
    assert_within_torch_error("grad_logits", ours[1], torchs[1].to(dtype), truth[1])


@pytest.mark.parametrize("V", (7, 1000, 4097))
@pytest.mark.parametrize(
    "scale, ref_scale, offset, ref_offset, temperature",
    [
        (1e3, 1.0, 0.0, 0.0, 1.0),
        (1e5, 1.0, 0.0, 0.0, 1.0),
        (1e20, 1e3, 0.0, 0.0, 1.0),
        (1.0, 1e3, 0.0, 0.0, 1.0),
        (1e-3, 1e5, 0.0, 0.0, 1.0),
        (1e30, 1e-30, 0.0, 0.0, 1.0),
        (1e3, 1.0, 0.0, 0.0, 1e-3),
        (1e5, 1e3, 0.0, 0.0, 1e4),
        (1.0, 1.0, -3e7, 0.0, 1.0),
        (1.0, 1.0, 0.0, 1e6, 1.0),
        (1.0, 1.0, 3e7, -3e7, 1.3),
    ],
)
def test_each_side_keeps_its_precision(device, V, scale, ref_scale, offset, ref_offset, temperature):
    inputs = logits_inputs((3, 4, V), torch.float32, device)
    noise = torch.randn_like(inputs["logits"])
    inputs["logits"] = scale * (noise - noise[..., :1].clamp(min=0)) + offset
    inputs["ref_logits"] = ref_scale * (noise + 0.3 * torch.randn_like(noise)) + ref_offset
    ours, truth = run(inputs, temperature=temperature), exact(inputs, temperature=temperature)
    torchs = run(inputs, op=reference.full_kl, temperature=temperature)
    assert_within_torch_error("full_kl", ours[0], torchs[0], truth[0], units=3, scale=1.0)
    resolution = 2.0**-29 * max(
        1.0, truth[0].max().item()
    )  # of float64's own gradient, which cancels terms of that size
    assert_within_torch_error("grad_logits", ours[1], torchs[1], truth[1], scale=resolution)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("V", (2, 3, 8))
@pytest.mark.parametrize("scale, ref_scale", ((1.0, 1.0), (30.0, 30.0), (1.0, 1e3), (1e3, 1.0)))
def test_few_columns_lose_nothing_but_the_last_rounding(device, V, dtype, scale, ref_scale):
    """A divergence of 1e-3 is the difference of terms of order one, of which fp32 would leave four digits."""
    noise = torch.randn(400, V, device=device)
    logits = (scale * noise).to(dtype)
    ref_logits = (ref_scale * (noise + 0.1 * torch.randn_like(noise))).to(dtype)
    truth = reference.full_kl(logits.double(), ref_logits.double())
    error = (ppo_ext.full_kl(logits, ref_logits).double() - truth).abs()
    assert (error <= 2.0**-24 * truth + 1e-12).all(), (error / truth).max()


@pytest.mark.skipif(
    "CUDA_ON_HOST_SEED" in os.environ or _native.status()["cpu"] != "loaded",
    reason="the CUDA kernel and the reference add every column in float32",
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("V", (257, 5000))
@pytest.mark.parametrize("where", ("first", "anywhere", "last"))
def test_columns_that_hold_a_row_leave_no_error_but_the_last_rounding(V, dtype, where):
    """On a CPU a column with a large share of the policy or the reference is added in float64. Here four are of the policy,
    with a ninth of the row or more each, a fifth is of the reference alone, and the others hold nothing."""
    torch.manual_seed(0)
    columns = {"first": torch.arange(5), "anywhere": torch.randperm(V)[:5], "last": torch.arange(V - 5, V)}[where]
    logits, ref_logits = torch.randn(2, 100, V) - 30
    logits[:, columns] = torch.rand(100, 5) - torch.tensor([0.0, 0.0, 0.0, 0.0, 4.0])
    ref_logits[:, columns] = logits[:, columns] + 2 * torch.rand(100, 5) - torch.tensor([1.0, 1.0, 1.0, 1.0, -5.0])
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    right = reference.full_kl(logits.double(), ref_logits.double())
    error = (ppo_ext.full_kl(logits, ref_logits).double() - right).abs()
    last_rounding = 0.5 * torch.finfo(torch.float32).eps * right.abs()
    assert (error - last_rounding).max() <= 1e-9


@pytest.mark.parametrize("V", (40, 2500))
@pytest.mark.parametrize("position", (0, -1))
def test_a_saturated_row_has_no_gradient(device, V, position):
    """Whatever the reference's logits are, and wherever the one with all probability is."""
    inputs = logits_inputs((6, V), torch.float32, device)
    inputs["mask"][:] = True
    inputs["logits"][..., position] += 1e4
    for ref_scale in (1e-3, 1.0, 1e3, 1e7):
        inputs["ref_logits"] = ref_scale * torch.randn_like(inputs["logits"])
        (kl, grad), truth = run(inputs), exact(inputs)
        assert (grad == 0).all()
        torch.testing.assert_close(kl, truth[0].float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("V", (40, 2500))
def test_no_gap_overflows_that_the_temperature_makes_finite(device, dtype, V):
    inputs = logits_inputs((2, V), torch.float64, device)
    inputs["mask"][:] = True
    large, part = torch.finfo(dtype).max, 2.0**-20
    inputs["ref_logits"] = (0.99 * large * torch.rand_like(inputs["logits"]).mul(2).sub(1)).to(dtype)
    inputs["ref_logits"][:, :2] = torch.tensor([0.99, -0.99], dtype=torch.float64, device=device) * large
    inputs["logits"] = (1e3 * inputs["logits"]).to(dtype)
    kl, grad = run(inputs, temperature=1e3)
    smaller = dict(inputs, logits=inputs["logits"].double(), ref_logits=inputs["ref_logits"].double() * part)
    assert kl.isfinite().all() and grad.isfinite().all()
    scaled = dict(smaller, logits=smaller["logits"] * part)
    truth = run(scaled, op=reference.full_kl, temperature=1e3 * part)
    # in fp64 the oracle is no better: ten times as much between two of its own exps (of x86-64 and aarch64)
    precision = torch.finfo(kl.dtype).eps * (200 if dtype == torch.float64 else 20)
    torch.testing.assert_close(kl.double(), truth[0], rtol=precision, atol=0)
    largest = truth[1].abs().max() * part
    assert ((grad.double() - truth[1] * part).abs() <= max(precision, torch.finfo(dtype).eps) * largest).all()


def test_gradcheck_float64(device):
    inputs = logits_inputs((2, 3, 9), torch.float64, device)
    logits = inputs["logits"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ppo_ext.full_kl(x, inputs["ref_logits"], mask=inputs["mask"], temperature=1.3), logits
    )


def test_opcheck(device):
    inputs = logits_inputs((2, 3, 17), torch.float32, device)
    logits, ref_logits, mask = inputs["logits"], inputs["ref_logits"], inputs["mask"]
    ops = torch.ops.ppo_ext
    torch.library.opcheck(ops._full_kl.default, (logits, ref_logits, mask, None, 0.8))
    stats = ops._full_kl(logits, ref_logits, mask, None, 0.8)[1:]
    saved = (ref_logits, inputs["grad_logprobs"], mask, *stats, None, 0.8)
    torch.library.opcheck(ops._full_kl_backward.default, (logits, *saved))
    torch.library.opcheck(ops._full_kl_backward_.default, (logits.clone(), *saved))


def test_compiles_into_one_graph(device):
    inputs = logits_inputs((2, 3, 100), torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(logits):
        return ppo_ext.full_kl(logits, inputs["ref_logits"], mask=inputs["mask"]).sum()

    grads = []
    for f in (compiled, compiled.__wrapped__):
        logits = inputs["logits"].clone().requires_grad_()
        f(logits).backward()
        grads.append(logits.grad)
    assert_same_bits("grad_logits", *grads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "V", (1037, 1040)
)  # with the second, rows of the gradient are aligned to 16 bytes for any logits
def test_views_give_the_same_bits(device, dtype, V):
    inputs = logits_inputs((3, 4, V), dtype, device)
    logits, ref_logits = inputs["logits"], inputs["ref_logits"]
    expected = run(inputs)
    wide = logits.new_full((3, 4, 2 * V + 1), math.nan)
    wide[..., 1::2] = logits

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    for views in (
        (wide[..., 1::2], ref_logits.transpose(0, 1).contiguous().transpose(0, 1)),
        (shifted(logits), ref_logits),
        (logits, shifted(ref_logits)),
    ):
        for part, a, b in zip(("full_kl", "grad"), run(inputs, *views), expected):
            assert_same_bits(part, a, b)


@pytest.mark.parametrize("rows", ((), (0,), (2, 0), (2, 3, 2, 2)), ids=str)
def test_any_leading_shape(device, rows):
    inputs = logits_inputs((*rows, 11), torch.float32, device)
    for a, b in zip(run(inputs), exact(inputs)):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_masked_rows_are_never_read(device):
    inputs = logits_inputs((3, 4, 65), torch.float32, device)
    expected = run(inputs)
    for value in (math.nan, INF, -INF):
        spoilt = dict(inputs, logits=inputs["logits"].clone(), ref_logits=inputs["ref_logits"].clone())
        spoilt["logits"][~inputs["mask"]] = value
        spoilt["ref_logits"][~inputs["mask"]] = value
        for a, b in zip(run(spoilt), expected):
            assert_same_bits("spoilt", a, b)
    assert all((result[~inputs["mask"]] == 0).all() for result in expected)


@pytest.mark.parametrize("V", (3, 40, 2500))
def test_minus_infinity_in_the_policy_adds_nothing(device, V):
    inputs = logits_inputs((2, 3, V), torch.float32, device)
    inputs["mask"][:] = True
    barred = torch.rand(inputs["logits"].shape, device=device) < 0.5
    barred[..., : V // 2] = True
    barred[..., -1] = False
    inputs["logits"][barred] = -INF
    inputs["ref_logits"][barred & (torch.rand(barred.shape, device=device) < 0.5)] = -INF
    (kl, grad), truth = run(inputs), exact(inputs)
    torch.testing.assert_close(kl.double(), truth[0], rtol=1e-5, atol=1e-5)
    assert torch.isfinite(grad).all() and (grad[barred] == 0).all()
    torch.testing.assert_close(grad.double(), truth[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", (0, 1600))
def test_probability_where_the_reference_has_none_is_infinite(device, position):
    inputs = logits_inputs((4, 2000), torch.float32, device)
    inputs["mask"][:] = True
    clean = run(inputs)[0]
    inputs["ref_logits"][1, position] = -INF
    inputs["ref_logits"][2, :1024] = -INF
    kl = run(inputs)[0]
    assert kl[1] == INF and kl[2] == INF
    assert_same_bits("other rows", kl[[0, 3]], clean[[0, 3]])


def test_hopeless_rows_are_nan_and_alone(device):
    inputs = logits_inputs((7, 1500), torch.float32, device)
    inputs["mask"][:] = True
    clean = run(inputs)
    inputs["logits"][0] = -INF
    inputs["logits"][1, 1400] = math.nan
    inputs["logits"][2, 3] = INF
    inputs["ref_logits"][3, 7] = math.nan
    inputs["ref_logits"][4] = -INF
    kl, grad = run(inputs)
    assert kl[:5].isnan().all()
    assert_same_bits("other rows", kl[5:], clean[0][5:])
    assert_same_bits("other rows", grad[5:], clean[1][5:])


def test_identical_distributions_have_no_divergence(device):
    logits = logits_inputs((4, GPT2), torch.float32, device)["logits"]
    assert ppo_ext.full_kl(logits, logits).abs().max().item() <= 2e-6
    assert ppo_ext.full_kl(logits, logits + 100.0).abs().max().item() <= 1e-4  # logits + 100 are rounded


@pytest.mark.parametrize("op", [ppo_ext.full_kl, reference.full_kl], ids=["compiled", "reference"])
def test_the_reference_logits_get_no_gradient(device, op):
    logits, ref_logits = torch.randn(2, 3, 17, device=device, requires_grad=True), torch.randn(3, 17, device=device)
    ref_logits = ref_logits.expand(2, 3, 17).clone().requires_grad_()
    op(logits, ref_logits).sum().backward()
    assert logits.grad.abs().sum() > 0 and ref_logits.grad is None


def test_same_bits_for_any_threads(device):
    inputs = logits_inputs((64, 5003), torch.float32, device)
    assert_same_bits_for_any_threads(lambda: run(inputs))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_inplace_backward_writes_the_gradient_over_the_logits(device, dtype):
    inputs = logits_inputs((3, 4, 1037), dtype, device)
    leaf = inputs["logits"].clone().requires_grad_()
    logits = leaf.view_as(leaf)
    kl = ppo_ext.full_kl(logits, inputs["ref_logits"], mask=inputs["mask"], inplace_backward=True)
    (kl * inputs["grad_logprobs"]).sum().backward()
    assert_same_bits("grad", leaf.grad, run(inputs)[1])
    assert_same_bits("logits", logits.detach(), leaf.grad)


def test_rejects_bad_arguments(device):
    inputs = logits_inputs((2, 3, 7), torch.float32, device)
    logits, ref_logits = inputs["logits"], inputs["ref_logits"]
    cases = [
        (
            TypeError,
            r"full_kl: logits must be float32, bfloat16, float16 or float64, got torch.int64",
            (logits.long(), ref_logits),
        ),
        (
            TypeError,
            r"full_kl: ref_logits must have the dtype torch.float32 of logits, got torch.bfloat16",
            (logits, ref_logits.bfloat16()),
        ),
        (
            ValueError,
            r"full_kl: ref_logits must have the shape \[2, 3, 7\] of logits, got \[2, 3, 6\]",
            (logits, ref_logits[..., :6]),
        ),
        (
            ValueError,
            r"full_kl: logits must have the shape \[..., V\] with V >= 1, got \[2, 3, 0\]",
            (logits[..., :0], ref_logits),
        ),
        (
            ValueError,
            r"full_kl: ref_logits must be on the device .* of logits, got meta",
            (logits, ref_logits.to("meta")),
        ),
    ]
    for kind, text, arguments in cases:
        with pytest.raises(kind, match=text):
            ppo_ext.full_kl(*arguments)
    with pytest.raises(ValueError, match="full_kl: temperature must be a positive finite number, got -1.0"):
        ppo_ext.full_kl(logits, ref_logits, temperature=-1.0)


def test_equals_trl():
    trl = require_trl()
    inputs = logits_inputs((3, 7, 501), torch.float64)
    logprobs = torch.log_softmax(inputs["logits"], -1)
    ref_logprobs = torch.log_softmax(inputs["ref_logits"], -1)
    stub = type("Trainer", (), {"config": type("Config", (), {"kl_penalty": "full"})})()
    theirs = trl.PPOTrainer._kl_penalty(stub, logprobs, ref_logprobs)
    for op in (ppo_ext.full_kl, reference.full_kl):
        torch.testing.assert_close(op(inputs["logits"], inputs["ref_logits"]), theirs, rtol=1e-12, atol=1e-14)
