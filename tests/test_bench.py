"""The benchmark suite itself: it refuses to time what is wrong, says why a row is empty, and renders the same."""

import pathlib
import sys

import pytest
import torch

from bench import (
    bench_full_kl,
    bench_gae,
    bench_logprobs,
    bench_loss_head,
    bench_ppo_loss,
    bench_rewards,
    bench_step,
    bench_whiten,
    cases,
    command,
    render,
    suite,
    table,
    timing,
    trl_baseline,
)

CPU = torch.device("cpu")


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


def _raises(inputs):
    raise RuntimeError("no such kernel\nsecond line")


def _stops(inputs):
    raise KeyboardInterrupt


def _case(**implementations):
    runs = {name: run if isinstance(run, str) else suite.Implementation(run) for name, run in implementations.items()}
    return suite.Case("double", "forward", (256, 64), torch.float32,
                      make=lambda device: {"x": torch.randn(256, 64, device=device)},
                      reference=lambda inputs: _double(suite.in_float64(inputs)), implementations=runs,
                      traffic=timing.Traffic(copy=256 * 64 * 4))


def _rows(**implementations):
    return {row["implementation"]: row for row in _case(**implementations).rows(CPU, seconds=0.01)}


@pytest.mark.parametrize("wrong", [_negated, _off_in_one_element, _nan_in_one_element])
def test_a_wrong_result_is_shown_and_not_timed(wrong):
    rows = _rows(right=_double, wrong=wrong)
    assert rows["wrong"]["note"].startswith("WRONG") and "p50_ms" not in rows["wrong"]
    assert rows["right"]["note"] == "" and rows["right"]["p50_ms"] > 0
    assert rows[suite.FLOOR]["share_of_floor"] == 1.0


def test_what_cannot_run_is_a_row_that_says_why():
    rows = _rows(right=_double, broken=_raises, missing="not installed")
    assert rows["broken"]["note"] == "RuntimeError: no such kernel"
    assert rows["missing"]["note"] == "not installed"


def test_without_trl_the_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    trl_baseline.functions.cache_clear()
    try:
        rows = trl_baseline.baselines(bench_whiten.run, lambda trl: trl.masked_whiten)
    finally:
        trl_baseline.functions.cache_clear()
    assert set(rows.values()) == {"trl is not installed; pip install trl==0.11.4 rich"}


def test_a_stopped_run_leaves_what_it_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gae, "suite", lambda device, full: [_case(**{suite.OURS: _double}), _case(late=_stops)])
    with pytest.raises(KeyboardInterrupt):
        command.main(["--only", "gae", "--device", "cpu", "--seconds", "0", "--save", str(tmp_path)])
    [rows] = render.load(tmp_path).values()
    assert {row["implementation"] for row in rows} == {suite.OURS, suite.FLOOR}


def test_a_copy_without_history_is_told_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_ROOT", tmp_path)
    monkeypatch.setenv("PPO_EXT_COMMIT", "abc123")
    assert timing.stamp(CPU)["commit"] == "abc123"


def test_competitors_take_turns():
    order = []
    timing.measure({name: lambda name=name: order.append(name) for name in "abc"}, CPU, seconds=0.0, min_rounds=6)
    changes = [pair for pair in zip(order, order[1:]) if pair[0] != pair[1]]
    assert len(changes) >= 2 * 6  # one block each would change twice
    assert len(set(changes)) > 3  # a fixed order would give three pairs of neighbours


def test_a_destroyed_input_is_private():
    seen = []

    def destroys(inputs):
        seen.append(inputs["logits"].data_ptr())
        return [inputs["logits"] * 2]

    logits = torch.ones(4, 4)
    case = suite.Case("x", "forward", (4, 4), torch.float32, make=lambda device: {"logits": logits},
                      reference=lambda inputs: [2 * inputs["logits"].double()],
                      implementations={"x": suite.Implementation(destroys, destroys_logits=True)},
                      traffic=timing.Traffic(read=64))
    case.rows(CPU, seconds=0.0)
    assert logits.data_ptr() not in seen


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("size", [8 << 20, 64 << 20])  # below and above what malloc keeps after a free
def test_peak_memory_sees_a_temporary(size):
    torch.ones(size // 4).sum()
    peak = timing.peak_extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert 0.9 * size < peak < 1.2 * size


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(cases.LOGITS, "cpu", ([(12, 37)], [(12, 37)]))
    monkeypatch.setitem(cases.HEAD, "cpu", (4, 16, 37))
    monkeypatch.setattr(cases, "STEPS", (cases.Step("small", 4, 16, 67, 32, 2, 4),))
    for op in cases.TOKENS:
        monkeypatch.setitem(cases.TOKENS, op, ([(4, 16)], [(4, 16)]))


@pytest.mark.parametrize("module", [bench_logprobs, bench_full_kl, bench_gae, bench_rewards, bench_whiten,
                                    bench_ppo_loss, bench_loss_head, bench_step],
                         ids=lambda module: module.__name__.split("_", 1)[1])
def test_every_eager_implementation_is_right(module, tiny_shapes):
    torch.manual_seed(0)
    for case in module.suite(CPU, full=True):
        inputs = case.make(CPU)
        expected = case.select(inputs, case.reference(inputs))
        for name, implementation in case.implementations.items():
            if isinstance(implementation, str) or "compile" in name:
                continue
            if case.dtype == torch.bfloat16 and name == trl_baseline.NAME:
                continue  # TRL's own bfloat16 arithmetic can be too far off, and is then shown as WRONG
            private = {**inputs, "logits": inputs["logits"].clone()} if implementation.destroys_logits else inputs
            relative, _ = suite.compare(case.select(inputs, implementation.run(private)), expected)
            assert relative <= suite.TOLERANCE[case.dtype], f"{case.title}: {name} is off by {relative:.2g}"


def _saved_row(implementation, ms, **more):
    return {"op": "gae", "pass": "forward", "shape": [2, 3], "dtype": "float32", "implementation": implementation,
            "backend": "native", "device": "Some CPU", "torch": "2.13", "threads": 2, "commit": "abc", "date": "2026",
            "selected": True, "bytes": 100, "error": 1e-7, "note": "", "p20_ms": ms, "p50_ms": ms, "p80_ms": ms,
            "rounds": 5, "gb_per_s": 1.0, "share_of_floor": 1.0 / ms, **more}


def _saved_rows():
    return [_saved_row(suite.OURS, 4.0), _saved_row("TRL", 2.0), _saved_row(suite.FLOOR, 1.0)]


def test_rendering_is_deterministic_and_shows_losses(tmp_path):
    pytest.importorskip("matplotlib")
    pages = []
    for name in ("first", "second"):
        results, readme = tmp_path / name, tmp_path / f"{name}.md"
        command.save(_saved_rows(), results)
        readme.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
        render.main(results, readme)
        render.main(results, readme)
        pages.append([readme.read_bytes(), *(path.read_bytes() for path in sorted(results.rglob("*.*")))])
    assert pages[0] == pages[1]
    text = pages[0][0].decode()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 0.5x | 0.5x (TRL) |" in text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="must hold the markers"):
        render.replace_block("no markers here", "block")


def test_saving_replaces_only_the_measured_cases(tmp_path):
    command.save(_saved_rows(), tmp_path)
    command.save([_saved_row(suite.OURS, 9.0, shape=[4, 5])], tmp_path)
    command.save([_saved_row(suite.OURS, 7.0)], tmp_path)
    [rows] = render.load(tmp_path).values()
    times = {table.case_key(row)[2]: row["p50_ms"] for row in rows}
    assert times == {(4, 5): 9.0, (2, 3): 7.0} and len(rows) == 2
