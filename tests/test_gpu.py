"""Properties of the ops that only a GPU can show: no host/device sync, CUDA graphs, streams, devices, huge inputs, the
same bits in a thousand runs.

The checks are in every_op.py. Those that make sense on a CPU run there too, on smaller inputs.
"""

import contextlib

import pytest
import torch
from cases import QWEN
from every_op import (
    CALLS,
    Call,
    check_current_stream,
    check_device_guard,
    check_graph_replay,
    check_no_host_sync,
    check_rows_beyond,
    check_same_bits_on_every_run,
    without_row_count,
)
from ops import OPS

GPU = torch.device("cuda", 0)
LARGE_BYTES = 15 * 2**30


def on_gpu(test):
    """Skips `test` where there is no GPU."""
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, none is here")
    return pytest.mark.gpu(skip(test))


@pytest.fixture(params=CALLS)
def call(request):
    return CALLS[request.param]


@on_gpu
def test_no_host_sync(call):
    check_no_host_sync(call, GPU)


@on_gpu
def test_graph_replay_has_the_bits_of_an_eager_run(call):
    check_graph_replay(call, GPU)


@on_gpu
def test_current_stream(call):
    check_current_stream(call, GPU)


@on_gpu
def test_second_device(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices, one is here")
    check_device_guard(call, GPU, torch.device("cuda", 1))


@on_gpu
def test_the_sync_debug_mode_sees_a_sync():
    torch.ones(1, device=GPU)
    with pytest.raises(RuntimeError):
        check_no_host_sync(Call(lambda device: torch.ones(1, device=device), torch.Tensor.item), GPU)


def test_repeated_runs_have_the_same_bits(call, device):
    check_same_bits_on_every_run(call, torch.device(device), 1000 if device == "cuda" else 3)


def test_rows_are_what_they_are_alone(device):
    check_rows_beyond(64, 1003, 30_000, torch.device(device))


@on_gpu
def test_large_input_of_more_than_2_to_the_31_elements():
    if torch.cuda.mem_get_info(GPU)[0] < LARGE_BYTES:
        pytest.skip(
            f"needs {LARGE_BYTES >> 30} GiB of GPU memory, {torch.cuda.mem_get_info(GPU)[0] >> 30} GiB are free"
        )
    rows = 16384
    assert rows * QWEN > 2**31
    check_rows_beyond(rows, QWEN, 2**31, GPU)


# ---- the checks themselves, with stand-ins for what of torch.cuda they call -----------------------------------------


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, stream):
        pass

    synchronize = replay = lambda self: None


@pytest.fixture
def no_cuda(monkeypatch):
    """Stand-ins for torch.cuda's streams and graphs that do nothing; the list of sync debug modes that were set."""
    modes = []
    for name in ("Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


CPU = torch.device("cpu")


def test_the_checks_pass_where_all_is_well(call, no_cuda):
    check_current_stream(call, CPU)
    check_device_guard(call, CPU, CPU)
    check_no_host_sync(call, CPU)
    assert no_cuda == ([] if without_row_count(call.make(CPU)) is None else ["error", "default"])


def test_the_sync_debug_mode_is_left_after_an_error(no_cuda):
    with pytest.raises(ZeroDivisionError):
        check_no_host_sync(Call(lambda device: [1, 0], lambda inputs: 1 / inputs.pop(0)), CPU)
    assert no_cuda == ["error", "default"]


def test_a_replay_that_does_nothing_is_seen(no_cuda):
    with pytest.raises(AssertionError, match="replay, result 0"):
        check_graph_replay(CALLS["gae, 9x257"], CPU)


def test_a_read_before_the_stream_has_written_is_seen(no_cuda):
    reads = []

    def run(inputs):
        reads.append(inputs["x"])
        return [torch.zeros(3) if len(reads) > 1 else inputs["x"] * 1]

    with pytest.raises(AssertionError, match="on the stream, result 0"):
        check_current_stream(Call(lambda device: {"x": torch.ones(3)}, run), CPU)


def test_other_bits_in_a_later_run_are_seen():
    count = iter(range(9))
    call = Call(lambda device: None, lambda inputs: [torch.ones(3) + (next(count) == 4)])
    check_same_bits_on_every_run(call, CPU, 4)
    with pytest.raises(AssertionError, match="run 2, result 0: 3 of 3 entries differ"):
        check_same_bits_on_every_run(call, CPU, 4)


def test_a_row_that_depends_on_its_place_is_seen(monkeypatch):
    class Wrong:
        results = ("logprobs",)

        def run(self, inputs, grads, *_):
            return {"logprobs": grads["logprobs"] + torch.arange(inputs["labels"].shape[1])}

    monkeypatch.setitem(OPS, "logprobs_and_entropy", Wrong())
    with pytest.raises(AssertionError, match="rows, result 0"):
        check_rows_beyond(64, 13, 500, CPU)


def test_the_sanitizer_driver_runs_every_layout(capsys, monkeypatch):
    import sanitizer_driver

    monkeypatch.setattr(sanitizer_driver, "VOCABULARIES", (7, 1032))
    sanitizer_driver.main(["--device", "cpu"])
    variants = sum(1 + len(op.variants) for op in OPS.values() if op.on_logits)
    assert f"{4 * 2 * 4 * variants + len(CALLS)} runs on cpu" in capsys.readouterr().out


def test_the_sanitizer_driver_compares():
    import sanitizer_driver

    with pytest.raises(AssertionError):
        sanitizer_driver.close([torch.ones(2)], [torch.tensor([1.0, 1.1])], torch.bfloat16)
