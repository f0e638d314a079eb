"""The benchmark suite: it does not time wrong results, and times all passes, caches and devices with one clock."""

import contextlib
import pathlib
import re
import subprocess
import sys
import types

import pytest
import torch

from bench import bench_gae, command, machine, passes, rows, suite, timing

CPU = torch.device("cpu")
CUDA = torch.device("cuda")  # only its type is used, no device


def _double(inputs):
    return [2 * inputs["x"]]


def _negated(inputs):
    return [-2 * inputs["x"]]


def _off_in_one_element(inputs):
    doubled = 2 * inputs["x"]
    doubled[3, 5] += 5.0
    return [doubled]


def _nan_in_one_element(inputs):
    doubled = 2 * inputs["x"]
    doubled[3, 5] = float("nan")
    return [doubled]


def _one_result_too_many(inputs):
    return [2 * inputs["x"], inputs["x"]]


def _raises(inputs):
    raise RuntimeError("no such kernel\nsecond line")


def _stops(inputs):
    raise KeyboardInterrupt


def _case(implementations, **more):
    runs = {name: suite.Implementation(run) if callable(run) else run for name, run in implementations.items()}
    return suite.Case(
        **{
            "op": "double",
            "pass_name": "forward",
            "shape": (256, 64),
            "dtype": torch.float32,
            "make": lambda device: {"x": torch.randn(256, 64)},
            "reference": lambda inputs: _double(suite.in_float64(inputs)),
            "implementations": runs,
            "traffic": timing.Traffic(copy=256 * 64 * 4),
            **more,
        }
    )


def _rows(**implementations):
    return {row["implementation"]: row for row in _case(implementations).rows(CPU, seconds=0.01) if row["shown"]}


# ---- what is wrong, and what cannot run -----------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [_negated, _off_in_one_element, _nan_in_one_element, _one_result_too_many])
def test_a_wrong_result_is_shown_and_not_timed(wrong):
    rows = _rows(right=_double, wrong=wrong)
    assert rows["wrong"]["note"].startswith("WRONG") and "p50_ms" not in rows["wrong"]
    assert rows["right"]["note"] == "" and rows["right"]["p50_ms"] > 0
    assert rows[suite.FLOOR]["share_of_floor"] == 1.0


def test_an_error_behind_the_first_entries_is_seen(monkeypatch):
    monkeypatch.setattr(suite, "_ENTRIES_AT_ONCE", 7)
    right = torch.arange(1.0, 31.0, dtype=torch.float64)
    wrong = right.float()
    wrong[20] = float("nan")
    assert suite.compare([right.float()], [right]) == (0.0, 0.0)
    assert suite.compare([wrong], [right]) == (float("inf"), float("inf"))
    wrong[20] = 21.5
    assert suite.compare([wrong], [right])[1] == 0.5


def test_a_case_in_which_ours_is_wrong_fails_the_run(monkeypatch):
    for ours, status in ((_negated, 1), (_double, 0)):
        monkeypatch.setattr(bench_gae, "suite", lambda device, full, ours=ours: [_case({suite.OURS: ours})])
        measured = command.main(["--only", "gae", "--device", "cpu", "--seconds", "0"])
        assert int(any(rows.is_ours(row) and rows.wrong(row) for row in measured)) == status


def test_what_cannot_run_is_a_row_that_says_why():
    rows = _rows(right=_double, broken=_raises, missing="not installed")
    assert rows["broken"]["note"] == "RuntimeError: no such kernel"
    assert rows["missing"]["note"] == "not installed"


def test_some_of_the_results_are_enough_where_it_says_so():
    reference = [torch.ones(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    for partial, note in ((True, ""), (False, "WRONG: relative error inf against float64, not timed")):
        implementation = suite.Implementation(lambda inputs: [torch.ones(3)], partial=partial)
        assert _case({}).attempt(implementation, {}, reference).note == note


def test_a_destroyed_input_is_private():
    seen = []

    def destroys(inputs):
        seen.append(inputs["logits"].data_ptr())
        return [inputs["logits"] * 2]

    logits = torch.ones(4, 4)
    case = _case(
        {"x": suite.Implementation(destroys, destroys_logits=True)},
        traffic=timing.Traffic(read=64),
        make=lambda device: {"logits": logits},
        reference=lambda inputs: [2 * inputs["logits"].double()],
    )
    case.rows(CPU, seconds=0.0)
    assert seen and logits.data_ptr() not in seen


# ---- passes ---------------------------------------------------------------------------------------------------------


def _square_and_cube(inputs, function):
    return function(inputs["x"])


OP = passes.Op(_square_and_cube, ("x",), ("grad_square", "grad_cube"))


def _inputs():
    return {"x": torch.tensor([2.0, 3.0]), "grad_square": torch.ones(2), "grad_cube": torch.tensor([1.0, 0.0])}


@pytest.mark.parametrize(
    "pass_name, expected",
    [
        ("forward", [[4.0, 9.0], [8.0, 27.0]]),
        ("backward", [[4.0 + 12.0, 6.0]]),
        ("forward+backward", [[4.0 + 12.0, 6.0], [4.0, 9.0], [8.0, 27.0]]),
    ],
)
def test_what_a_pass_computes(pass_name, expected):
    implementation = OP.implementation(pass_name, lambda x: (x**2, x**3))
    prepared = implementation.prepare(_inputs())
    for _ in range(2):  # it can be called any number of times
        assert [x.tolist() for x in implementation.run(prepared)] == expected
    assert [x.tolist() for x in OP.results(pass_name, _inputs(), lambda x: (x**2, x**3))] == expected


def test_the_backward_pass_alone_computes_nothing_forward():
    calls = []
    implementation = OP.implementation("backward", lambda x: calls.append(1) or (x**2, x**3))
    prepared = implementation.prepare(_inputs())
    implementation.run(prepared)
    assert calls == [1]


def test_without_incoming_gradients_the_first_output_is_the_loss():
    op = passes.Op(_square_and_cube, ("x",))
    gradient, loss, statistic = op.results("forward+backward", _inputs(), lambda x: ((x**2).sum(), x.mean()))
    assert (gradient.tolist(), loss.item(), statistic.item()) == ([4.0, 6.0], 13.0, 2.5)


# ---- the clock ------------------------------------------------------------------------------------------------------


def test_competitors_take_turns():
    order = []
    timing.measure({name: lambda name=name: order.append(name) for name in "abc"}, CPU, seconds=0.0, min_rounds=6)
    changes = [pair for pair in zip(order, order[1:]) if pair[0] != pair[1]]
    assert len(changes) >= 2 * 6  # if each ran in one block, there would be two changes
    assert len(set(changes)) > 3  # a fixed order would have three pairs of neighbours


def test_a_cold_call_follows_a_flush_and_a_warm_one_another_call(monkeypatch):
    monkeypatch.setattr(timing, "_DISTURBED", float("inf"))
    for cache, expected in (("cold", ["flush", "call"] * 5), ("warm", ["call"] * 5)):
        order = []
        monkeypatch.setattr(timing, "flusher", lambda device, order=order: lambda: order.append("flush"))
        monkeypatch.setattr(timing, "_SHORTEST_SAMPLE_MS", 0.0)
        timing.measure({"a": lambda order=order: order.append("call")}, CPU, setting=timing.Setting(cache), seconds=0.0)
        assert order[2:] == expected  # the first two calls are the warm-up


@pytest.mark.parametrize(
    "first, second, short, expected, windows",
    [
        ([1, 1, 1, 1, 1], [5, 5, 5, 5, 5], True, 1, 1),  # quiet: timed once
        ([1, 4, 9, 9, 9], [2, 2, 2, 2, 2], True, 2, 2),  # disturbed: the second counts, which is quieter
        ([1, 1, 3, 3, 3], [1, 1, 7, 9, 9], True, 3, 2),  # disturbed, but the second is worse: the first counts
        ([1, 4, 9, 9, 9], [2, 2, 2, 2, 2], False, 9, 1),  # disturbed, but too long to be repeated
    ],
)
def test_what_is_short_and_disturbed_is_timed_once_more(monkeypatch, first, second, short, expected, windows):
    samples = iter(first + second)
    monkeypatch.setattr(timing, "_sampler", lambda *_: lambda name: next(samples))
    monkeypatch.setattr(timing, "_SHORT_SECONDS", 3.0 if short else 0.0)
    assert timing.measure({"a": None}, CPU, seconds=0.0)["a"].p50_ms == expected
    assert len(list(samples)) == 5 * (2 - windows)


def test_a_flush_writes_more_than_the_last_cache_holds(monkeypatch):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    assert timing.flusher(CPU)().nbytes == 2000


@pytest.mark.parametrize(
    "kind, target, nbytes, capturable, expected",
    [
        ("speed", CPU, 999, True, [("warm", "eager"), ("cold", "eager")]),
        ("speed", CPU, 1001, True, [("warm", "eager")]),
        ("sweep V", CPU, 1, True, [("warm", "eager")]),
        ("overhead", CPU, 1, False, [("warm", "host")]),
        ("speed", CUDA, 1, True, [("cold", "eager"), ("cold", "graph")]),
        ("speed", CUDA, 1, False, [("cold", "eager")]),
        ("overhead", CUDA, 1, False, [("warm", "host")]),
    ],
)
def test_in_which_settings_a_case_is_timed(monkeypatch, kind, target, nbytes, capturable, expected):
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 1000)
    case = _case({}, kind=kind, traffic=timing.Traffic(read=nbytes), capturable=capturable)
    assert [(setting.cache, setting.mode) for setting in case.settings(target)] == expected


class Event:
    """A stand-in for a CUDA event: the n-th one that is recorded has the time of n milliseconds."""

    log = []

    def __init__(self, enable_timing):
        self.place = None

    def record(self):
        self.log.append("record")
        self.place = self.log.count("record")

    def elapsed_time(self, end):
        return float(end.place - self.place)

    def synchronize(self):
        pass


class Graph:
    replay = staticmethod(lambda: Event.log.append("replay"))


@pytest.fixture
def no_cuda(monkeypatch):
    """Stand-ins for torch.cuda's events, streams and graphs, so that a device "cuda" works with CPU tensors; the list
    of their calls, in order."""
    monkeypatch.setattr(Event, "log", [])
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "graph_pool_handle": lambda: "pool",
        "synchronize": lambda device: Event.log.append("synchronize"),
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, pool: contextlib.nullcontext(Event.log.append(f"capture in {pool}")),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "flusher", lambda device: lambda: Event.log.append("flush"))
    floor_call = timing.floor_call
    monkeypatch.setattr(timing, "floor_call", lambda traffic, device: floor_call(traffic, CPU))
    monkeypatch.setattr(machine, "stamp", lambda device: {"device": "a GPU", "device_type": "cuda"})
    return Event.log


def test_on_cuda_the_host_waits_for_the_flush_but_a_graph_does_not(no_cuda):
    call = lambda: no_cuda.append("call")  # noqa: E731
    for mode, sample in (
        ("eager", ["flush", "synchronize", "record", "call", "record"]),
        ("graph", ["flush", "record", "call", "record"]),
    ):
        no_cuda.clear()
        timings = timing.measure({"a": call}, CUDA, setting=timing.Setting("cold", mode), seconds=0.0)
        assert no_cuda[-len(sample) :] == sample and timings["a"].p50_ms == 1.0


def test_on_cuda_host_time_ends_when_the_call_returns(no_cuda):
    call, setting = lambda: no_cuda.append("call"), timing.Setting("warm", "host")
    timings = timing.measure({"a": call}, CUDA, setting=setting, seconds=0.0)
    assert "record" not in no_cuda and no_cuda[-1] == "synchronize" and timings["a"].p50_ms > 0


def test_on_cuda_a_case_has_eager_rows_and_rows_of_graphs(no_cuda):
    def synchronizes(inputs):
        if "capture in pool" in no_cuda:
            raise RuntimeError("operation not permitted when stream is capturing")
        return _double(inputs)

    measured = _case({"right": _double, "synchronizes": synchronizes, "absent": "not installed"}, capturable=True).rows(
        CUDA, seconds=0.0
    )
    table = {(row["implementation"], row["mode"]): row for row in measured}
    assert {key for key, row in table.items() if row.get("p50_ms")} == {
        ("right", "eager"),
        ("synchronizes", "eager"),
        (suite.FLOOR, "eager"),
        ("right", "graph"),
        (suite.FLOOR, "graph"),
    }
    assert table["synchronizes", "graph"]["note"].startswith(
        "no CUDA graph holds it: RuntimeError: operation not permitted"
    )
    assert [row["shown"] for row in measured] == [row["mode"] == "eager" for row in measured]
    assert ("absent", "graph") not in table and "replay" in no_cuda


# ---- what a row says beside the time --------------------------------------------------------------------------------


def test_a_copy_without_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    monkeypatch.setenv("PPO_EXT_COMMIT", "abc123")
    assert machine.stamp(CPU)["commit"] == "abc123"


def test_changes_are_told_but_for_saved_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_ROOT", tmp_path)
    saved = [tmp_path / "bench/results/rows.jsonl", tmp_path / "bench/evidence/mutants.json"]
    for path in (*saved, tmp_path / "code.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("old")
    who = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    for arguments in (("init", "-q"), ("add", "."), (*who, "commit", "-qm", "all")):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    clean = machine.stamp(CPU)["commit"]
    for path in saved:
        path.write_text("new")
    assert machine.stamp(CPU)["commit"] == clean and re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "code.py").write_text("new")
    assert machine.stamp(CPU)["commit"] == clean + "+changes"


# in a process of its own, as the bench is: after thousands of tests malloc may keep freed pages that it cannot give back
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("size", [8 << 20, 64 << 20])  # below and above the size that malloc keeps after a free
def test_peak_memory_sees_a_temporary(size):
    measure = f"""
import torch
from bench import machine
call = lambda: torch.ones({size // 4}).sum()
call()
print(machine.peak_extra_bytes(call, torch.device("cpu")))
"""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", measure], cwd=root, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(done.stdout) < 1.2 * size


def test_peak_memory_is_in_buffers_and_of_the_right_ones_alone(monkeypatch):
    monkeypatch.setattr(machine, "peak_extra_bytes", lambda call, device: 3000)
    measured = _case({"right": _double, "wrong": _negated}, buffer_bytes=1000).rows(CPU, seconds=0.0)
    assert {row["implementation"]: row["peak_buffers"] for row in measured if "peak_buffers" in row} == {"right": 3.0}


# ---- the run --------------------------------------------------------------------------------------------------------


def test_a_stopped_run_leaves_what_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(
        bench_gae, "suite", lambda device, full: [_case({suite.OURS: _double}), _case({"late": _stops})]
    )
    with pytest.raises(KeyboardInterrupt):
        command.main(["--only", "gae", "--device", "cpu", "--seconds", "0", "--save", str(tmp_path)])
    [saved] = rows.load(tmp_path).values()
    assert {row["implementation"] for row in saved} == {suite.OURS, suite.FLOOR}


@pytest.mark.parametrize("target, minutes", [(CPU, 5), (CUDA, 8)], ids=["cpu", "cuda"])
def test_the_selection_stays_within_its_minutes(target, minutes):
    cases = command.suite(command.MODULES, target, False)
    seconds = command.budget_seconds(cases, target, command._arguments([]).seconds)
    assert 60 < seconds < 60 * minutes
    assert command.budget_seconds(cases + cases, target, 0.3) > 60 * minutes  # the estimate grows with the cases
