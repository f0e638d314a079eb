"""Properties that hold for every input of an op, each tried on many: 200 in CI, PPO_EXT_FUZZ_EXAMPLES under `make
fuzz`."""

import collections
import dataclasses
import functools
import os

import pytest
import torch
from conftest import assert_same_bits, assert_same_bits_for_any_threads, assert_within_torch_error
from hypothesis import given, settings
from ops import AXIS, BATCH, OF_HEAD, OPS, SEQUENCE, STATS, TOKEN
from property_inputs import KINDS, arguments, cases, quarters

from ppo_ext.ops import reference

ON_HOST = "CUDA_ON_HOST_SEED" in os.environ  # the CUDA kernels on the host layer, which is slow
settings.register_profile("ci", max_examples=15 if ON_HOST else 200, derandomize=True, deadline=None)
settings.register_profile(
    "fuzz", max_examples=int(os.environ.get("PPO_EXT_FUZZ_EXAMPLES", 20_000)), deadline=None, print_blob=True
)
settings.load_profile("fuzz" if "PPO_EXT_FUZZ_EXAMPLES" in os.environ else "ci")

EXAMPLES = collections.Counter()  # by property, op and device, for property_counts.py
ON_LOGITS = [name for name, op in OPS.items() if op.on_logits]
PER_TOKEN = [name for name, op in OPS.items() if op.scope is TOKEN]
OF_SEQUENCES = [name for name, op in OPS.items() if op.scope is SEQUENCE]
MEANS = [name for name, op in OPS.items() if op.scope is BATCH]
WITH_DENOMINATOR = [name for name, op in OPS.items() if "denominator" in op.arguments]
# No sequence influences another; where the op has an axis, the tests choose the one of the tokens.
BY_SEQUENCE = [name for name, op in OPS.items() if op.scope is not BATCH or AXIS in op.arguments.values()]
CALM = ("normal", "subnormal", "zero")  # sums of these do not cancel to less than their rounding errors
# Added to torch's error, in units in the last place: the error of a few numbers is chance, and a mean of several parts
# is rounded once more for each part.
UNITS = 8


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small. On a busy machine a second thread would make torch many times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def property_of(*ops, kinds=KINDS):
    """Makes a test of `check(op, case, device)` for each op; `ops` are names."""

    def decorate(check):
        @pytest.mark.parametrize("op", ops)
        @given(case=cases(kinds))
        @functools.wraps(check)
        def test(op, case, device):
            EXAMPLES[check.__name__, op, device] += 1
            check(OPS[op], case, device)

        return test

    return decorate


def tensors(function, inputs):
    """The arguments, with `function` applied to each tensor."""
    return {name: function(x) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def doubles(inputs):
    return tensors(lambda x: x.double() if x.is_floating_point() else x, inputs)


def of_tokens(function, named):
    """The tensors, results or gradients, with `function` applied to those that have the tokens' dimensions."""
    return {
        name: function(x) if isinstance(x, torch.Tensor) and name.removeprefix("grad_") not in OF_HEAD else x
        for name, x in named.items()
    }


def per_logit(temperature):
    """The temperature as what logits are divided by."""
    return temperature[..., None] if isinstance(temperature, torch.Tensor) else temperature


def gradients(results):
    return {name: x for name, x in results.items() if name.startswith("grad_")}


def assert_same_results(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(name, a[name], b[name])


def assert_near(name, ours, torchs, exact, scale=0.0):
    """NaN and infinities must be those of float64. All else must be within torch's error plus UNITS of the largest
    entry or scale."""
    rounded = exact.to(ours.dtype)
    finite = rounded.isfinite()
    assert_same_bits(f"{name} where not finite", ours.masked_fill(finite, 0), rounded.masked_fill(finite, 0))
    ours, torchs, exact = (x.masked_fill(~finite, 0) for x in (ours, torchs.to(ours.dtype), exact))
    assert_within_torch_error(name, ours, torchs, exact, UNITS, scale)


def without_undefined_gradients(op, inputs, results):
    """The results with 0 for gradients that nothing defines: of rows whose result is not finite, and of tokens with an
    input that is not."""
    if STATS in op.results.values() and op.has_vocabulary:
        return results | defined_gradients_of_whole_loss(op, inputs, results)
    if op.on_logits:
        values = [x.isfinite() for name, x in results.items() if not name.startswith("grad_")]
        defined = torch.stack(values).all(0)[..., None]
    elif op.on_hidden:
        defined = torch.stack([x.isfinite().all() for name, x in results.items() if not name.startswith("grad_")]).all()
    elif op.name == "ppo_loss":
        ratio = results["policy/ratio"].float()
        tokens = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.shape == ratio.shape]
        defined = torch.stack([x.isfinite() for x in (ratio, *tokens)]).all(0)
        if "ref_logprobs" in inputs:  # 0 times the infinite slope of k3 is NaN in torch
            defined = defined & inverse_ratios(op, inputs).isfinite() & (results["policy/skipped"] == 0)
        if inputs.get("ratio_level") == "sequence":  # its gradient is a sum over the row
            defined = defined.all(-1, keepdim=True)
    elif op.scope is BATCH:
        defined = inputs[op.first][inputs["mask"] != 0].isfinite().all()
    else:
        return results
    return results | {name: x.masked_fill(~defined, 0) for name, x in gradients(results).items()}


def defined_gradients_of_whole_loss(op, inputs, results):
    """The same for the gradients of a loss from logits or hidden states: one row that is not finite spoils a head."""
    counts = inputs["mask"] != 0
    ratio = results["policy/ratio"].float()  # what is infinite in float32 is so for float64's results too
    tokens = [x for x in (ratio, *inputs.values()) if is_of_tokens(x, counts)]
    defined = torch.stack([x.isfinite() for x in tokens]).all(0) & results["policy/entropy"].isfinite()
    found = {}
    if "ref_logprobs" in inputs:
        finite = inverse_ratios(op, inputs).isfinite()
        defined = defined & finite & (results["policy/skipped"] == 0)
        if not finite[counts].all():  # the weighted k3 is 0 times infinity
            found = {name: torch.zeros(()) for name in ("loss", "loss/total", "loss/kl", "policy/ref_kl")}
    if inputs.get("ratio_level") == "sequence":  # its gradient is a sum over the row
        defined = (defined | ~counts).all(-1, keepdim=True).expand_as(counts)
    for name, x in gradients(results).items():
        kept = defined if name == "grad_vpreds" else defined[..., None] if op.on_logits else defined[counts].all()
        found[name] = x.masked_fill(~kept, 0)
    return found


def inverse_ratios(op, inputs):
    """exp(ref_logprobs - logprobs), in which k3 is linear, in float32."""
    logprobs = inputs["logprobs"].double() if op.name == "ppo_loss" else exact_logprobs(op, inputs)
    return (inputs["ref_logprobs"].double() - logprobs).float().exp()


def exact_logprobs(op, inputs):
    names = ("logits", "hidden", "weight", "labels", "bias", "temperature", "logit_scale", "softcap", "mask")
    given = doubles({name: inputs[name] for name in names if name in inputs})
    return reference.logprobs(**given) if op.on_logits else reference.linear_logprobs(**given)


def is_of_tokens(x, like):
    return isinstance(x, torch.Tensor) and x.shape == like.shape


def scale_of_whole_loss(op, inputs, exact):
    """The rounding error of a log-probability is that of the largest logit, and grows with the ratio."""
    logit = (
        largest_logit(inputs)
        if op.on_hidden
        else max(1.0, largest(inputs["logits"] / per_logit(inputs["temperature"])))
    )
    head = max(1.0, largest(inputs["weight"]), largest(inputs["hidden"])) if op.on_hidden else 1.0
    ratio = max(1.0, largest(exact["policy/ratio"])) * max(1.0, largest(inputs["advantages"]))
    factor = max(1.0, largest(inputs["weights"])) if "weights" in inputs else 1.0
    if "ref_logprobs" in inputs:
        factor *= max(1.0, largest(inverse_ratios(op, inputs)[inputs["mask"] != 0]), largest(inputs["ref_logprobs"]))
    critic = (inputs[name] for name in ("vpreds", "values", "returns"))
    values = max(1.0, 0.0, *(largest(x) for x in critic if x is not None))
    return factor * head * logit * max(logit, ratio) + values**2


def scale_of(op, name, inputs, grads, exact):
    """The size of the terms whose sum or difference a result is, where it may be much smaller itself."""
    if STATS in op.results.values() and op.has_vocabulary:
        return scale_of_whole_loss(op, inputs, exact)
    if name.startswith("grad_"):
        return scale_of_gradients(op, inputs, grads, exact)
    if op.on_hidden:
        return largest_logit(inputs)
    terms = max(largest(x) for x in inputs.values() if isinstance(x, torch.Tensor) and x.is_floating_point())
    if op.scope is SEQUENCE:
        return terms
    if op.scope is BATCH and inputs[op.first].dtype == torch.float64:  # float32 results have sums in float64
        return terms**2
    # They hold the logarithm of a sum of 1 or more, so one unit in the last place of 1 is rounding.
    of_logarithm = 1.0 / UNITS if op.on_logits else 0.0
    if name == "kl":
        return max(of_logarithm, largest(exact[name]) ** 0.5, largest_gap(inputs))
    return of_logarithm


def largest(x):
    """The largest finite magnitude."""
    return x.double().nan_to_num(0, 0, 0).abs().max().item() if x.numel() else 0.0


def largest_logit(inputs):
    """The size of the terms that a logit is the sum of, over the temperature, and at least 1."""
    counted = torch.where((inputs["mask"] != 0)[..., None], inputs["hidden"].double(), 0).abs()
    terms = counted @ inputs["weight"].double().abs().T + inputs["bias"].double().nan_to_num(0, 0, 0).abs()
    return max(1.0, largest(inputs["logit_scale"] * terms / per_logit(inputs["temperature"])))


def largest_gap(inputs):
    """The largest difference between policy and reference logits at an entry with probability under the policy. full_kl
    subtracts the two first, so its rounding error is of that size."""
    logits, ref_logits = (inputs[name].double() / per_logit(inputs["temperature"]) for name in ("logits", "ref_logits"))
    has_probability = torch.softmax(logits, -1) > torch.finfo(torch.float32).tiny
    return largest((logits - ref_logits)[has_probability])


def scale_of_gradients(op, inputs, grads, exact):
    """The size of the terms whose sum or difference a gradient is, where it may be much smaller itself."""
    if op.on_logits:
        gap = largest_gap(inputs) if "ref_logits" in inputs else 0.0
        sizes = [grads[name].abs() * (1 if name == "logprobs" else 1 + exact[name] + gap) for name in op.per_token]
        terms = sum(sizes) / inputs["temperature"]
    elif op.on_hidden:
        sizes = [grads[name].abs() * (1 if name == "logprobs" else 1 + exact[name]) for name in op.with_gradient]
        of_logits = largest(sum(sizes) * inputs["logit_scale"] / inputs["temperature"]) * largest_logit(inputs)
        return of_logits * max(1.0, largest(inputs["weight"]), largest(inputs["hidden"]) * grads["logprobs"].numel())
    elif op.name == "masked_whiten":
        variance = reference.masked_var(inputs["values"].double(), inputs["mask"], inputs["unbiased"])
        terms = grads["whitened"] * torch.rsqrt(variance + inputs["eps"])
    elif op.name == "masked_var":
        weights = inputs["mask"].double()
        terms = torch.where(weights != 0, inputs["values"].double(), 0.0) * weights / weights.sum()
    else:
        return 0.0
    return largest(terms)


@property_of(*OPS)
def test_masked_values_never_matter(op, case, device):
    inputs, grads = arguments(op, case, device)
    masked, generator = inputs["mask"] == 0, case.generator()
    garbage_values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e4])

    def spoil(x):
        garbage = garbage_values[torch.randint(4, x.shape, generator=generator)].to(device)
        hidden = masked.all(1) if x.dim() == 1 else masked.view(masked.shape + (1,) * (x.dim() - 2))
        return torch.where(hidden, garbage.to(x.dtype) if x.is_floating_point() else -100, x)

    spoilt = of_tokens(spoil, {name: x for name, x in inputs.items() if name != "mask"}) | {"mask": inputs["mask"]}
    results = op.run(spoilt, tensors(spoil, grads))
    assert_same_results(results, op.run(inputs, grads))
    for name, result in results.items():
        if name.removeprefix("grad_") not in OF_HEAD and result.shape[:2] == masked.shape:
            assert (result[masked] == 0).all(), name


def without_rows_that_float32_decides(op, inputs, results):
    """The results with 0 where a rounding error decides: is_top1 of two logits that are nearly equal, and those rows of
    full_kl where the policy has a probability near the smallest float32 and the
    reference has none. Whether their divergence is infinite depends on whether that probability is rounded to 0."""
    if "is_top1" in results:
        counts = inputs["mask"] != 0
        head = (inputs["weight"].double(), counts, inputs["bias"].double(), inputs["logit_scale"], inputs["softcap"])
        logits = reference.linear_logits(inputs["hidden"].double(), *head)
        label = torch.where(counts, inputs["labels"], 0)[..., None]
        others = logits.scatter(-1, label, -torch.inf).amax(-1)
        apart = (logits.gather(-1, label).squeeze(-1) - others).abs() > 1e-5 * largest_logit(inputs)
        return results | {"is_top1": torch.where(apart, results["is_top1"], 0)}
    if "ref_logits" not in op.arguments:
        return results
    p = torch.softmax(inputs["logits"].double() / per_logit(inputs["temperature"]), -1)
    decided = ~((inputs["ref_logits"] == -torch.inf) & (p > 0) & (p < 1e-36)).any(-1)
    return {
        name: torch.where(decided if x.dim() == decided.dim() else decided[..., None], x, 0)
        for name, x in results.items()
    }


@property_of(*OPS)
def test_reference(op, case, device):
    inputs, grads = arguments(op, case, device)
    single = tensors(lambda x: x.float() if x.dtype in (torch.bfloat16, torch.float16) else x, inputs)
    exact = op.run(doubles(inputs), grads, reference)
    ours, torchs, exact = (
        without_rows_that_float32_decides(op, inputs, without_undefined_gradients(op, inputs, results))
        for results in (op.run(inputs, grads), op.run(single, grads, reference), exact)
    )
    assert list(ours) == list(torchs)
    for name, result in ours.items():
        assert_near(name, result, torchs[name], exact[name], scale_of(op, name, inputs, grads, exact))


@property_of(*OPS)
def test_strides_never_matter(op, case, device):
    inputs, grads = arguments(op, case, device)
    dense = tensors(lambda x: x.clone(memory_format=torch.contiguous_format), inputs)
    assert_same_results(op.run(inputs, grads), op.run(dense, grads))


@property_of(*OPS)
def test_same_bits_on_every_run_and_for_any_threads(op, case, device):
    """For any threads but where torch multiplies matrices, which it may divide in other ways."""
    inputs, grads = arguments(op, case, device)
    if not op.on_hidden:
        assert_same_bits_for_any_threads(lambda: op.run(inputs, grads))
    assert_same_results(op.run(inputs, grads), op.run(inputs, grads))


@property_of(*ON_LOGITS)
def test_inplace_backward_changes_no_bit(op, case, device):
    inputs, grads = arguments(op, case, device)
    expected = op.run(inputs, grads)
    assert_same_results(op.run(inputs | {"inplace_backward": True}, grads), expected)


def by_sequence(op, case, device):
    """Arguments and incoming gradients of an op that computes each result from one sequence."""
    inputs, grads = arguments(op, case, device)
    if AXIS in op.arguments.values():
        different = torch.arange(1.0, case.sequences + 1, device=device)
        return inputs | {"axis": 1}, dict.fromkeys(op.results, different)
    return inputs, grads


def of_all_tokens(op, case, device):
    """Arguments and incoming gradients of an op that takes means over all tokens."""
    inputs, grads = arguments(op, case, device, by_row=False)
    return inputs | ({"axis": None} if AXIS in op.arguments.values() else {}), grads


@property_of(*BY_SEQUENCE)
def test_sequences_in_any_order(op, case, device):
    inputs, grads = by_sequence(op, case, device)
    order = torch.randperm(case.sequences, generator=case.generator()).to(device)
    permuted = op.run(tensors(lambda x: x[order], inputs), tensors(lambda x: x[order], grads))
    assert_same_results(permuted, tensors(lambda x: x[order], op.run(inputs, grads)))


@property_of(*MEANS, kinds=CALM)
def test_tokens_in_any_order(op, case, device):
    """A sum in another order has other rounding errors; nothing else changes."""
    inputs, grads = of_all_tokens(op, case, device)
    count = case.sequences * case.tokens
    order = torch.randperm(count, generator=case.generator()).to(device)

    def shuffle(x):
        if x.shape[:2] != (case.sequences, case.tokens):
            return x
        return x.reshape(count, *x.shape[2:])[order].view(x.shape)

    results, expected = op.run(of_tokens(shuffle, inputs), tensors(shuffle, grads)), op.run(inputs, grads)
    expected = of_tokens(shuffle, expected)
    exact = op.run(doubles(inputs), grads)
    # sums are in float64, whose rounding shows where large terms cancel
    terms = max(largest(x) for x in inputs.values() if isinstance(x, torch.Tensor))
    in_double = count * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps * terms
    scales = {name: scale_of(op, name, inputs, grads, exact) if op.on_hidden else in_double for name in exact}
    exact = of_tokens(shuffle, exact)
    for name in expected:
        assert_near(name, results[name], expected[name], exact[name], scales[name])


@property_of(*BY_SEQUENCE)
def test_parts_of_a_batch_give_the_whole(op, case, device):
    inputs, grads = by_sequence(op, case, device)
    cut = case.seed % (case.sequences + 1)
    parts = [
        op.run(tensors(lambda x, rows=rows: x[rows], inputs), tensors(lambda x, rows=rows: x[rows], grads))
        for rows in (slice(cut), slice(cut, None))
    ]
    together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert_same_results(together, op.run(inputs, grads))


@property_of("masked_mean", "ppo_loss", kinds=CALM)
def test_parts_of_a_batch_weighted_by_their_tokens_give_the_whole(op, case, device):
    inputs, _ = of_all_tokens(dataclasses.replace(op, modes={}), case, device)
    inputs |= {"ratio_threshold": float("inf")} if op.name == "ppo_loss" else {}
    weights = inputs["mask"].double() if op.name == "masked_mean" else (inputs["mask"] != 0).double()
    cut = case.seed % (case.sequences + 1)
    halves = (slice(cut), slice(cut, None))
    parts = [op.run(tensors(lambda x, rows=rows: x[rows], inputs)) for rows in halves]
    shares = [weights[rows].sum() / weights.sum().clamp(min=0.25) for rows in halves]
    whole, exact = op.run(inputs), op.run(doubles(inputs))
    for name in ("mean",) if op.name == "masked_mean" else ("loss", "policy/approxkl", "val/vpred", "returns/mean"):
        terms = [share * part[name].double() for share, part in zip(shares, parts)]
        assert_near(name, sum(terms).to(whole[name].dtype), whole[name], exact[name], max(abs(x).item() for x in terms))
    for name, grad in gradients(whole).items():
        together = torch.cat([share.to(grad.dtype) * part[name] for share, part in zip(shares, parts)])
        assert_near(name, together, grad, exact[name])


def parts_of(op, case, inputs, device):
    """The tokens that count, dealt out at random to three parts, by whole rows where ratios are of rows: the arguments
    of each part, with the denominator of the whole, and its rows."""
    counts, generator = inputs["mask"] != 0, case.generator()
    by_row, mode = inputs.get("ratio_level", "token") != "token", inputs.get("aggregation", "token_mean")
    part_of = torch.randint(3, (case.sequences, 1 if by_row else case.tokens), generator=generator).to(device)
    common = {}
    if mode != "token_sum" and "denominator" not in inputs:
        total = (counts if mode == "token_mean" else counts.any(1)).sum()
        common["denominator"] = total if case.seed % 2 else float(total)
    if mode == "seq_mean_token_mean" and "row_counts" not in inputs and not by_row:
        common["row_counts"] = counts.sum(1)
    for part in range(3):
        own = counts & (part_of == part)
        rows = own.any(1).nonzero().squeeze(1)
        given = of_tokens(lambda x, rows=rows: x[rows] if x.dim() else x, inputs | {"mask": own} | common)
        yield given, rows


def gathered(op, whole, parts):
    """The sums over the parts of their losses and gradients, those of tokens in their places."""
    total = {name: torch.zeros_like(whole[name]) for name in ("loss", *gradients(whole))}
    for results, rows in parts:
        for name, x in total.items():
            if name == "loss" or name.removeprefix("grad_") in OF_HEAD:
                x += results[name]
            else:
                x[rows] += results[name]
    return total


@property_of(*WITH_DENOMINATOR, kinds=CALM)
def test_any_parts_of_a_batch_with_its_denominator_give_the_whole(op, case, device):
    """The gradients of tokens have the same bits. The loss of each part is rounded once. Where torch multiplies
    matrices, which it may divide in other ways, all is in float64, to 1e-9 of the largest entry."""
    inputs, _ = arguments(op, case, device)
    inputs |= {"ratio_threshold": float("inf")}
    inputs = doubles(inputs) if op.on_hidden else inputs
    whole = op.run(inputs, {"loss": torch.ones(())})
    parts = [(op.run(given, {"loss": torch.ones(())}), rows) for given, rows in parts_of(op, case, inputs, device)]
    total = gathered(op, whole, parts)
    if whole["loss"].isfinite():
        sizes = sum(results["loss"].abs() for results, _ in parts) + whole["loss"].abs()
        eps = 1e-9 if op.on_hidden else 2 * torch.finfo(torch.float32).eps
        assert (total["loss"] - whole["loss"]).abs() <= eps * sizes + 1e-9
    for name, grad in gradients(whole).items():
        if op.on_hidden:
            torch.testing.assert_close(total[name], grad, rtol=0, atol=1e-9 * max(1.0, largest(grad)), equal_nan=True)
        else:
            assert_same_bits(name, total[name], grad)


@property_of(*ON_LOGITS)
def test_a_number_added_to_all_logits_changes_nothing(op, case, device):
    """Multiples of 1/4 below 64 are exact in every dtype, so no sum is rounded and the results have the same bits."""
    inputs, grads = arguments(op, case, device, quarters)
    moved = dict(inputs)
    for name, turn in (("logits", 0), ("ref_logits", 16)):
        if name in inputs:
            moved[name] = inputs[name] + ((case.seed >> turn) % 256 - 128) / 4
    assert_same_results(op.run(moved, grads), op.run(inputs, grads))


def packed_tokens(inputs, grads):
    """The tokens that count, one after the other."""
    counts = inputs["mask"] != 0
    return of_tokens(lambda x: x[counts], inputs), tensors(lambda x: x[counts], grads)


@property_of(*PER_TOKEN)
def test_packed_rows_are_padded_rows(op, case, device):
    inputs, grads = arguments(op, case, device)
    padded, counts = op.run(inputs, grads), inputs["mask"] != 0
    assert_same_results(op.run(*packed_tokens(inputs, grads)), tensors(lambda x: x[counts], padded))


@property_of(*MEANS, kinds=CALM)
def test_packed_tokens_are_padded_tokens(op, case, device):
    inputs, grads = of_all_tokens(op, case, device)
    padded, counts, exact = op.run(inputs, grads), inputs["mask"] != 0, op.run(doubles(inputs), grads)
    for name, result in op.run(*packed_tokens(inputs, grads)).items():
        scale = scale_of(op, name, inputs, grads, exact) if op.on_hidden else 0.0
        padded_result, exact_result = (
            of_tokens(lambda x: x[counts] if x.shape[:2] == counts.shape else x, {name: of[name]})[name]
            for of in (padded, exact)
        )
        assert_near(name, result, padded_result, exact_result, scale)


def one_by_one(op, inputs, keep):
    """The results of each sequence alone, without the tokens that `keep` leaves out."""
    for b in range(len(keep)):
        alone = tensors(lambda x, b=b: x[b : b + 1] if x.dim() == 1 else x[b : b + 1, keep[b]], inputs)
        yield b, keep[b], op.run(alone)


@property_of(*OF_SEQUENCES)
def test_padded_sequences_are_sequences_alone(op, case, device):
    """Padding to the left and right of one block of tokens that count. Sums of quarters with gamma = lam = 1 are exact,
    so the bits are the same."""
    inputs, _ = arguments(op, case, device, quarters)
    inputs = inputs | {"gamma": 1.0, "lam": 1.0, "lam_returns": None} if op.name == "gae" else inputs
    start = torch.randint(case.tokens + 1, (case.sequences, 1), generator=case.generator()).to(device)
    position = torch.arange(case.tokens, device=device)
    inputs["mask"] = ((position >= start) & (position < start + case.tokens // 2)).to(case.mask)
    padded = op.run(inputs)
    for b, keep, alone in one_by_one(op, inputs, inputs["mask"] != 0):
        assert_same_results(alone, tensors(lambda x, b=b, keep=keep: x[b : b + 1, keep], padded))


@property_of("gae")
def test_holes_are_tokens_deleted(op, case, device):
    """Sums of quarters with gamma = lam = 1 are exact, so the bits are the same; for other gamma and lam the results
    agree within float32's error."""
    inputs, _ = arguments(op, case, device, quarters)
    for gamma, lam in ((1.0, 1.0), (0.97, 0.9)):
        inputs |= {"gamma": gamma, "lam": lam}
        whole, exact = op.run(inputs), op.run(doubles(inputs), module=reference)
        for b, keep, alone in one_by_one(op, inputs, inputs["mask"] != 0):
            for name, result in alone.items():
                holes, exact_part = whole[name][b : b + 1, keep], exact[name][b : b + 1, keep]
                if gamma == 1.0:
                    assert_same_bits(name, holes, result)
                assert_near(name, holes, result, exact_part)
