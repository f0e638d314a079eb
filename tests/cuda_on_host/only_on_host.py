"""What only the host layer can check of the kernels: bounds of memory, the width of accesses, grids of few blocks.

test_cuda_on_host.py runs this file in a process whose ppo_ext runs the CUDA sources, under AddressSanitizer.
"""

import subprocess
import sys

import pytest
import torch
from cases import logits_inputs, valid_arguments
from conftest import assert_same_bits
from cuda_on_host import build
from ops import OPS

import ppo_ext
from ppo_ext.ops import _native


@pytest.fixture(scope="module")
def ops():
    """The layer that runs the ops."""
    return build.load_layer(_native._FOLDER / "_C_cpu.so")


@pytest.fixture(scope="module")
def small():
    """The layer that runs its own test kernels."""
    return build.load_layer(build.test_kernels())


def test_this_is_the_library_that_is_meant(ops):
    assert ops.address_sanitizer_is_active()
    ops.take_counters()
    ppo_ext.logprobs(torch.randn(3, 7), torch.zeros(3, dtype=torch.int64))
    assert ops.take_counters()["blocks"] == 1


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", (*range(1, 34), 1000))
def test_memory_ends_where_a_tensor_ends(small, size):
    data = torch.zeros(size, dtype=torch.int32)
    small.launch("loads", 1, 1, data.data_ptr(), size - 1)
    small.launch("stores", 1, 1, data.data_ptr(), 0)
    for kernel, kind in (("loads", "a load"), ("stores", "a store")):
        text = (
            rf"{kind} of 4 bytes must touch allocated memory only \(AddressSanitizer\), got 0 bytes beyond the end of "
            rf"a heap block of {4 * size} bytes \(kernels/wrong.cu:\d+\)"
        )
        with pytest.raises(small.KernelError, match=text):
            small.launch(kernel, 1, 1, data.data_ptr(), size)
        with pytest.raises(small.KernelError, match="got 4 bytes before a heap block"):
            small.launch(kernel, 1, 1, data.data_ptr(), -1)


def test_a_vector_access_must_fit_as_a_whole(small):
    data = torch.zeros(11, dtype=torch.int32)
    with pytest.raises(small.KernelError, match="a load of 16 bytes .* 0 bytes beyond the end of a heap block of 44"):
        small.launch("copy_packs", 1, 3, data.data_ptr(), 0)


def test_freed_memory_and_null_are_out_of_bounds(small):
    data = torch.zeros(64, dtype=torch.int32)
    address = data.data_ptr()
    del data
    with pytest.raises(small.KernelError, match="got byte 4 of a heap block of 256 bytes that has been freed"):
        small.launch("loads", 1, 1, address, 1)
    with pytest.raises(small.KernelError, match="a store of 4 bytes must touch allocated memory only .* got address 4"):
        small.launch("stores", 1, 1, 0, 1)


def test_new_memory_is_garbage():
    assert torch.empty(1000).isnan().all() and (torch.empty(1000, dtype=torch.int64) == -1).all()


def test_a_stack_that_overflows_ends_the_process(small):
    code = (
        "import torch\nfrom cuda_on_host import build\nlayer = build.load_layer(build.test_kernels())\n"
        "data = torch.zeros(64, dtype=torch.int32)\n"
        "layer.launch('recurses', 1, 64, data.data_ptr(), 100); print('deep')\n"
        "layer.launch('recurses', 1, 64, data.data_ptr(), 130)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=build.HERE.parent, capture_output=True, text=True)
    assert result.stdout == "deep\n" and result.returncode != 0
    assert "AddressSanitizer: stack-overflow" in result.stderr, result.stderr[-2000:]


# ---- the ops --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
def test_rows_are_read_and_written_16_bytes_at_a_time(ops, dtype):
    rows, V = 5, 8192
    inputs = logits_inputs((rows, V), dtype)
    packs = rows * V * dtype.itemsize // 16
    logits = inputs["logits"].requires_grad_()
    ops.take_counters()
    logprobs = ppo_ext.logprobs(logits, inputs["labels"])
    forward = ops.take_counters()
    logprobs.backward(inputs["grad_logprobs"].to(logprobs.dtype))
    backward = ops.take_counters()
    assert forward["vector_accesses"] == packs and backward["vector_accesses"] == 2 * packs
    ppo_ext.logprobs(logits.detach().flatten()[1 : -V + 1].view(-1, V), inputs["labels"][1:])
    assert packs <= ops.take_counters()["vector_accesses"] <= 2 * packs


def test_bad_labels_of_many_rows_are_counted(monkeypatch):
    note = torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr(sys.modules["ppo_ext.ops.logprobs"], "note", lambda device: note)
    ppo_ext.logprobs(torch.randn(40, 7), torch.full((40,), 9))
    count, row, label, V = note.tolist()
    assert (count, label, V) == (40, 9, 7) and 0 <= row < 40


SUMS_BY_ROW = ("ppo_loss", "rollout_weights")  # whose sums are split into as many parts as there are rows


def results_of_all_ops():
    """The results of every op at sizes where a grid of 40 blocks has to loop. No sum is split into more than 40
    parts."""
    for op in OPS.values():
        # a block for each row of 1100 logits or tokens, a warp for each row of 20
        long, short = (36, 36) if op.name in SUMS_BY_ROW else (70, 400)
        sizes = (((100, 1), 1100), ((400, 1), 20)) if op.has_vocabulary else (((long, 1100), 1), ((short, 20), 1))
        for shape, vocabulary in sizes:
            arguments = valid_arguments(op, shape, vocabulary)
            for options in ({}, *op.variants.values()):
                inputs = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
                yield from op.run(inputs | options).values()


def test_kernels_loop_where_a_grid_has_too_few_blocks(ops):
    def run(blocks):
        torch.manual_seed(0)
        ops.set_max_blocks(blocks)
        ops.take_counters()
        return list(results_of_all_ops()), ops.take_counters()["blocks"]

    try:
        (few, few_blocks), (many, many_blocks) = run(40), run(2**31 - 1)
    finally:
        ops.set_max_blocks(2**31 - 1)
    assert few_blocks < many_blocks / 2
    for i, (a, b) in enumerate(zip(few, many, strict=True)):
        assert_same_bits(f"result {i}", a, b)
