"""Ops over a group of processes: what one process makes of all tokens, with the same bits on every process."""

import process_group
import pytest
import torch
from conftest import assert_same_bits

import ppo_ext

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SHAPES = {0: (3, 5), 1: (2, 7), 2: (4, 1)}  # of each rank
MOMENTS = [
    ("masked_whiten", {}),
    ("masked_whiten", {"shift_mean": False}),
    ("masked_mean", {}),
    ("masked_mean", {"axis": 0}),
    ("masked_mean", {"axis": (1, 0)}),
]
MASKS = ("all", "some", "one rank none", "one token", "none", "weights")


def numbers(rank, dtype, axis=None):
    """Values, a factor for the loss, of one rank; for axis 0 of as many columns everywhere."""
    generator = torch.Generator().manual_seed(rank)
    shape = (2 + rank, 3) if axis == 0 else SHAPES[rank]
    values = torch.randn(shape, generator=generator) * 3 + 100
    return values.to(dtype), torch.randn(shape, generator=generator)


def mask_of(kind, rank, shape):
    generator = torch.Generator().manual_seed(50 + rank)
    some = torch.rand(shape, generator=generator) > 0.4
    one = torch.zeros(shape, dtype=torch.bool)
    one[0, 0] = rank == 1
    weights = torch.rand(shape, generator=generator) * some
    return {
        "all": torch.ones(shape),
        "some": some,
        "one rank none": some & (rank != 0),
        "one token": one,
        "none": torch.zeros(shape),
        "weights": weights,
    }[kind]


def moments_case(rank, name, options, dtype, kind, group):
    values, factor = numbers(rank, dtype, options.get("axis"))
    mask = mask_of(kind, rank, values.shape)
    values = values.masked_fill(mask == 0, float("nan")).requires_grad_()
    result = getattr(ppo_ext, name)(values, mask, **options, group=group)
    share = result * factor if result.shape == factor.shape else result * (1.0 + rank)
    share.sum().backward()
    return result.detach(), values.grad


def moments_of_all(processes, name, options, dtype, kind):
    """What `moments_case` gives on each rank, by one call of the op on the tokens of all."""
    parts = [numbers(rank, dtype, options.get("axis")) for rank in range(processes)]
    masks = [mask_of(kind, rank, values.shape) for rank, (values, _) in enumerate(parts)]
    values = [
        x.masked_fill(mask == 0, float("nan")).requires_grad_() for (x, _), mask in zip(parts, masks, strict=True)
    ]
    if options.get("axis") == 0:
        result = ppo_ext.masked_mean(torch.cat(values), torch.cat(masks), axis=0)
        results = [result] * processes
    else:
        flat, flat_mask = torch.cat([x.flatten() for x in values]), torch.cat([m.flatten() for m in masks])
        options = {key: value for key, value in options.items() if key != "axis"}
        result = getattr(ppo_ext, name)(flat, flat_mask, **options)
        whitens = result.dim() > 0
        sizes = [x.numel() for x in values]
        results = [r.reshape(x.shape) for r, x in zip(result.split(sizes), values, strict=True)] if whitens else None
        results = results or [result] * processes
    shares = [
        (r * factor if r.shape == factor.shape else r * (1.0 + rank)).sum()
        for rank, (r, (_, factor)) in enumerate(zip(results, parts, strict=True))
    ]
    grads = torch.autograd.grad(sum(shares), values)
    return [(r.detach(), grad) for r, grad in zip(results, grads, strict=True)]


MOMENT_CASES = [(*case, dtype, kind) for case in MOMENTS for dtype in DTYPES for kind in MASKS]


# ---- a vocabulary in shards ------------------------------------------------------------------------------------------

SIZES = {2: (5, 12), 3: (3, 10, 4)}  # columns of each rank, for a vocabulary of 17
V, HIDDEN, TOKENS = 17, 6, (3, 4)
KINDS = ("plain", "padded", "extreme", "temperatures", "mask", "bars", "empty", "ties")
SHARDED = [
    *((name, dtype, kind) for name in ("logprobs", "logprobs_and_entropy") for dtype in DTYPES for kind in KINDS),
    *(("full_kl", dtype, kind) for dtype in DTYPES for kind in KINDS),
    *((name, torch.float32, kind) for name in ("linear_logprobs", "linear_logprobs_and_entropy") for kind in KINDS),
    ("linear_logprobs", torch.float64, "plain"),
    # padding counts in a mean over the vocabulary
    *(("linear_statistics", torch.float32, kind) for kind in KINDS if kind != "padded"),
    ("logprobs, in place", torch.float32, "plain"),
    ("full_kl, in place", torch.float32, "plain"),
]


def whole_inputs(name, dtype, kind):
    """The arguments of one process, by name; what each dimension of V columns belongs to is cut by `shard_of`."""
    generator = torch.Generator().manual_seed(KINDS.index(kind))

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    tokens = (0, 4) if kind == "empty" else TOKENS
    logits = randn(*tokens, V) * (300 if kind == "extreme" else 3)
    ref_logits = logits + 0.1 * randn(*tokens, V)
    bias = randn(V)
    if kind == "bars":  # a whole shard without probability in some rows, and ids without any
        logits[0, :, 3:] = ref_logits[0, :, 3:] = -torch.inf
        logits[1, :, 2], bias[4] = -torch.inf, -torch.inf
    if kind == "ties":
        logits, bias = logits * 0, bias * 0
    given = {"labels": torch.randint(0, 3 if kind == "bars" else V, tokens, generator=generator)}
    if kind == "temperatures":
        given["temperature"] = torch.rand(tokens, generator=generator) + 0.5
    if kind == "mask":
        given["mask"] = torch.rand(tokens, generator=generator) > 0.4
        given["labels"] = given["labels"].masked_fill(~given["mask"], -100)
        logits = logits.masked_fill(~given["mask"][..., None], torch.nan)
    if name.startswith("linear"):
        factor = {"extreme": 20, "ties": 0}.get(kind, 1)
        given |= {"hidden": factor * randn(*tokens, HIDDEN), "weight": randn(V, HIDDEN), "bias": bias, "softcap": 30.0}
    else:
        given["logits"] = logits
    if name.startswith("full_kl"):
        given["ref_logits"] = ref_logits
        del given["labels"]
    floats = ("logits", "ref_logits", "hidden", "weight", "bias")
    return {key: x.to(dtype) if key in floats else x for key, x in given.items()}


def shard_of(inputs, rank, processes, padded):
    """The arguments of one process of several: its columns, with some of -inf behind them if the vocabulary is padded."""
    sizes = SIZES[processes]
    start = sum(sizes[:rank])
    result = dict(inputs)
    for key, dim in {"logits": -1, "ref_logits": -1, "weight": 0, "bias": 0}.items():
        if key not in inputs:
            continue
        result[key] = inputs[key].narrow(dim, start, sizes[rank]).clone()
        if padded and rank == processes - 1:
            shape = list(result[key].shape)
            shape[dim] = 2
            filler = result[key].new_full(shape, 0.0 if key == "weight" else -torch.inf)
            result[key] = torch.cat([result[key], filler], dim)
    return result, start


def factors(shape):
    return torch.linspace(-1, 2, max(shape.numel(), 1))[: shape.numel()].reshape(shape)


def results_and_grads(name, inputs):
    """The results of an op, and the gradients of what it takes."""
    name, _, place = name.partition(", ")
    inputs = dict(inputs)
    leaves = [key for key in ("logits", "hidden", "weight", "bias") if key in inputs]
    originals = {key: inputs[key].requires_grad_() for key in leaves}
    if place:
        inputs["logits"] = inputs["logits"] * 1.0  # no leaf may be written over
        inputs["inplace_backward"] = True
    results = getattr(ppo_ext, name)(**inputs)
    results = results if isinstance(results, tuple) else (results,)
    loss = sum((x.masked_fill(x.isinf(), 0) * (factors(x.shape) + i)).sum() for i, x in enumerate(results))
    grads = torch.autograd.grad(loss, list(originals.values()))
    return [x.detach() for x in results], dict(zip(leaves, grads, strict=True))


def sharded_case(rank, name, dtype, kind, group):
    processes = torch.distributed.get_world_size()
    inputs, start = shard_of(whole_inputs(name, dtype, kind), rank, processes, kind == "padded")
    place = {} if name.startswith("full_kl") else {"vocab_start": start}
    counted = CountedCollectives()
    with counted:
        results, grads = results_and_grads(name, inputs | place | {"group": group})
    return results, grads, counted.names


class CountedCollectives:
    """The collectives within a block, by name."""

    NAMES = ("all_gather_into_tensor", "all_reduce", "all_gather", "reduce_scatter_tensor", "broadcast")

    def __enter__(self):
        self.names, self.kept = [], {name: getattr(torch.distributed, name) for name in self.NAMES}
        for name, function in self.kept.items():
            setattr(torch.distributed, name, self.counting(name, function))

    def counting(self, name, function):
        def call(*args, **kwargs):
            self.names.append(name)
            return function(*args, **kwargs)

        return call

    def __exit__(self, *_):
        for name, function in self.kept.items():
            setattr(torch.distributed, name, function)


def bad_shards(rank, group):
    """The errors of ids that are in no shard or in two, and of what is no place in a vocabulary."""
    logits, labels = torch.randn(2, 5), torch.tensor([1, 5 * torch.distributed.get_world_size()])
    found = []
    for given in (
        {"vocab_start": 5 * rank},
        {"vocab_start": 0},
        {"vocab_start": -1},
        {"vocab_start": None},
        {"vocab_start": True},
    ):
        try:
            ppo_ext.logprobs(logits, labels, group=group, **given)
            found.append(None)
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def compiled_case(rank, name, group):
    """Whether torch.compile makes one graph of an op, which gives the same bits as without it."""
    if name.startswith("masked"):
        values, mask = numbers(rank, torch.float32)[0], mask_of("some", rank, SHAPES[rank])
        given, key = {"values": values, "mask": mask, "group": group}, "values"
    else:
        given, start = shard_of(whole_inputs(name, torch.float32, "mask"), rank, 2, False)
        given |= {"group": group} if name == "full_kl" else {"group": group, "vocab_start": start}
        key = "hidden" if "hidden" in given else "logits"
    given[key].requires_grad_()

    def call():
        result = getattr(ppo_ext, name)(**given)
        return result if isinstance(result, torch.Tensor) else torch.stack(tuple(result))

    pairs = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        result = function()
        pairs.append((result, *torch.autograd.grad(result.sum(), given[key])))
    return all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


COMPILED = ("masked_mean", "masked_whiten", "logprobs_and_entropy", "full_kl", "linear_statistics")


def work(rank, folder):
    group = torch.distributed.group.WORLD
    return {
        "moments": [moments_case(rank, *case, group) for case in MOMENT_CASES],
        "sharded": [sharded_case(rank, *case, group) for case in SHARDED],
        "bad": bad_shards(rank, group),
    }


def compiled(rank, folder):
    return {name: compiled_case(rank, name, torch.distributed.group.WORLD) for name in COMPILED}


def work_of_three(rank, folder):
    return work(rank, folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    functions = {"work": 2, "work_of_three": 3, "compiled": 2}
    found = process_group.run(__file__, functions, tmp_path_factory.mktemp("groups"))
    return {2: found["work"], 3: found["work_of_three"], "compiled": found["compiled"]}


def assert_close(got, expected, dtype):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    if dtype == torch.bfloat16 and got.dtype == torch.bfloat16:  # gradients, rounded once from float32 or float64
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-6)
    else:
        # gradients of whitening are differences of numbers around 1
        tolerance = 1e-12 if dtype == torch.float64 else 1e-6
        torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", MOMENT_CASES, ids=str)
def test_moments_are_those_of_all_tokens(results, processes, case):
    index, name, dtype = MOMENT_CASES.index(case), case[0], case[2]
    for rank, expected in enumerate(moments_of_all(processes, *case)):
        result, grad = results[processes][rank]["moments"][index]
        assert_close(result, expected[0], dtype)
        assert_close(grad, expected[1], dtype)
        if name == "masked_mean":
            assert_same_bits(str(case), result, results[processes][0]["moments"][index][0])


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_a_vocabulary_in_shards_is_the_whole(results, processes, case):
    index, (name, dtype, kind) = SHARDED.index(case), case
    inputs = whole_inputs(name, dtype, kind)
    expected, whole_grads = results_and_grads(name, inputs)
    first = results[processes][0]["sharded"][index]
    for rank in range(processes):
        found, grads, collectives = results[processes][rank]["sharded"][index]
        assert collectives == ["all_gather_into_tensor"] + ["all_reduce"] * name.startswith("linear")
        for a, b, same in zip(found, expected, first[0], strict=True):
            assert_same_bits(str(case), a, same)
            assert_near(a, b, dtype, kind)
        for key, grad in grads.items():
            cut, _ = shard_of(dict.fromkeys([key], whole_grads[key]), rank, processes, False)
            columns = {"logits": -1, "weight": 0, "bias": 0}.get(key)
            if columns is not None:
                grad, padding = grad.split(
                    [cut[key].shape[columns], grad.shape[columns] - cut[key].shape[columns]], columns
                )
                assert not padding.any()
            assert_near(grad, cut[key], dtype, kind)
            if key == "hidden":
                assert_same_bits(str(case), grad, first[1]["hidden"])


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_makes_one_graph_of_the_same_bits(results, name):
    assert [report[name] for report in results["compiled"]] == [True, True]


def assert_near(got, expected, dtype, kind):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 2**-8}.get(got.dtype, 1e-6)
    scale = max(1.0, expected[expected.isfinite()].abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(got, expected, rtol=4 * tolerance, atol=2 * tolerance * scale, equal_nan=True)


@pytest.mark.parametrize("processes", [2, 3])
def test_an_id_of_no_shard_and_shards_that_overlap_are_refused_by_all(results, processes):
    end = 5 * processes
    for report in results[processes]:
        assert report["bad"] == [
            f"logprobs: labels[1] must be an id of one of the shards, got {end}",
            f"logprobs: vocab_start must give every process other ids, got the ranges {[[0, 5]] * processes}",
            "logprobs: vocab_start must lie in [0, 2**24), got -1",
            "logprobs: vocab_start must be given with a group, and only then, got None",
            "logprobs: vocab_start must be None or an int, got bool",
        ]


def test_a_place_in_the_vocabulary_needs_a_group():
    with pytest.raises(ValueError, match="vocab_start must be given with a group, and only then, got 3"):
        ppo_ext.logprobs(torch.randn(2, 5), torch.tensor([1, 2]), vocab_start=3)
