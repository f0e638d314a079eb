"""From raw rows to pages: kept, grouped, fitted, and rendered the same every time, losses and absences included."""

import pytest

from bench import featured, fit, render, rows, suite, table
from bench.bench_overhead import OPERATOR


def _row(implementation, ms, **more):
    return {
        "kind": "speed",
        "op": "gae",
        "pass": "forward",
        "shape": [2, 3],
        "dtype": "float32",
        "shown": True,
        "implementation": implementation,
        "version": "",
        "backend": "native",
        "cache": "warm",
        "mode": "eager",
        "device": "Some CPU",
        "device_type": "cpu",
        "torch": "2.13",
        "threads": 2,
        "commit": "abc",
        "date": "2026",
        "selected": True,
        "bytes": 100,
        "error": 1e-7,
        "note": "",
        "p20_ms": ms,
        "p50_ms": ms,
        "p80_ms": ms,
        "rounds": 5,
        "gb_per_s": 1.0,
        "share_of_floor": 1.0 / ms,
        **more,
    }


def _reason(implementation, note, **more):
    row = _row(implementation, 1.0, note=note, error=None, **more)
    return {name: value for name, value in row.items() if name not in ("p20_ms", "p50_ms", "p80_ms", "share_of_floor")}


def _some_rows():
    return [
        _row(suite.OURS, 4.0),
        _row("TRL 0.11.4", 2.0, version="0.11.4"),
        _row("fast", 1.6),
        _row(suite.FLOOR, 1.0),
        _reason("QuACK", "runs on a GPU only"),
        _reason("bad", "WRONG: relative error 2 against float64, not timed"),
        _row(suite.OURS, 8.0, cache="cold", shown=False),
    ]


def _sweep(letter, implementation, points):
    position = 0 if letter == "N" else 1
    return [
        _row(
            implementation, ms, kind=f"sweep {letter}", selected=False, shape=[size, 7] if position == 0 else [7, size]
        )
        for size, ms in points
    ]


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_saving_replaces_only_the_measured_cases(tmp_path):
    rows.save(_some_rows(), tmp_path)
    rows.save([_row(suite.OURS, 9.0, shape=[4, 5])], tmp_path)
    rows.save([_row(suite.OURS, 7.0)], tmp_path)
    [saved] = rows.load(tmp_path).values()
    assert {rows.case_key(row)[3]: row["p50_ms"] for row in saved} == {(4, 5): 9.0, (2, 3): 7.0} and len(saved) == 2


def test_a_sweep_does_not_replace_the_same_shape_of_a_case(tmp_path):
    of_kinds = [_row(suite.OURS, ms, kind=kind) for ms, kind in ((1.0, "speed"), (2.0, "sweep T"), (3.0, "overhead"))]
    rows.save(of_kinds, tmp_path)
    assert {path.stem for path in tmp_path.rglob("*.jsonl")} == {"gae", "sweep", "overhead"}
    [saved] = rows.load(tmp_path).values()
    assert [row["p50_ms"] for row in saved] == [1.0, 3.0, 2.0]


def test_one_folder_for_each_device_and_number_of_threads():
    assert rows.folder_of(_row(suite.OURS, 1.0)) == "some-cpu-2-threads"
    assert rows.folder_of(_row(suite.OURS, 1.0, device="NVIDIA H100 80GB", device_type="cuda")) == "nvidia-h100-80gb"


# ---- how costs grow -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power):
    sizes = [1, 10, 100, 1000, 10000]
    assert fit.exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power)


def test_the_constant_cost_of_a_call_is_left_out_of_the_exponent():
    sizes = [1, 2, 4, 1000, 2000, 4000]
    assert fit.exponent(sizes, [5.0 + 0.1 * size for size in sizes]) == pytest.approx(1.0, abs=0.03)
    assert fit.exponent(sizes, [5.0 + 0.1 * size for size in sizes], upper=1.0) < 0.7


def test_one_size_has_no_exponent():
    with pytest.raises(ValueError, match="sizes must be two or more different numbers"):
        fit.exponent([8, 8, 8], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("letter", "VNT")
def test_a_sweep_says_how_the_cost_grows(letter):
    sweep = _sweep(letter, suite.OURS, [(8, 1.0), (80, 10.0), (800, 100.0)])
    sweep += _sweep(letter, "TRL 0.11.4", [(800, 6400.0), (8, 0.64), (80, 64.0)])
    assert rows.curves(sweep, letter)["TRL 0.11.4"] == [(8, 0.64), (80, 64.0), (800, 6400.0)]
    assert (
        table.exponent_line(sweep, letter)
        == f"Cost grows with {letter} to the power of: ppo_ext 1.00; TRL 0.11.4 2.00."
    )
    assert table.exponent_line(_some_rows(), letter) == ""


def test_a_sweep_on_cuda_shows_what_the_device_takes():
    eager = _sweep("V", suite.OURS, [(8, 5.0), (80, 5.0)])
    graph = [{**row, "mode": "graph", "shown": False, "p50_ms": 1.0} for row in eager]
    assert rows.curves(eager + graph, "V") == rows.curves(graph + eager, "V") == {suite.OURS: [(8, 1.0), (80, 1.0)]}


# ---- tables ---------------------------------------------------------------------------------------------------------


def test_the_printed_table_has_every_kind_of_row():
    text = table.text(_some_rows())
    ours, trl, wrong = (
        next(line for line in text.splitlines() if line.strip().startswith(name))
        for name in ("ppo_ext", "TRL 0.11.4", "bad")
    )
    assert ours.split()[1:] == ["4", "ms", "4", "ms", "-", "4", "ms", "25", "%", "cold", "8", "ms", "1.0e-07"]
    assert "0.5x" in trl and "50 %" in trl and "WRONG" in wrong
    assert "not timed: QuACK (gae): runs on a GPU only" in text and "versions: TRL 0.11.4 0.11.4" in text


def test_what_a_call_costs_stands_beside_its_goal():
    of = {"kind": "overhead", "op": "ppo_loss", "shape": [8, 128]}
    lines = list(
        table.overhead_lines(
            [
                _row(suite.OURS, 0.0261, **of),
                _row(OPERATOR, 0.011, **of),
                _row("TRL 0.11.4", 0.3, **of),
                _row(suite.OURS, 0.02, **{**of, "op": "gae"}),
            ]
        )
    )
    assert lines == [
        ("ppo_loss", "forward", "8x128", "26.1", "11", "300", "25, missed"),
        ("gae", "forward", "8x128", "20", "", "", ""),
    ]


@pytest.mark.parametrize("ms, text", [(1234.5, "1234 ms"), (1.2345, "1.23 ms"), (0.0421, "42.1 us"), (None, "")])
def test_times_read_well(ms, text):
    assert table.time(ms) == text


# ---- pages and plots ------------------------------------------------------------------------------------------------


def _pages_after(results):
    """What README and docs/performance.md hold after rendering these results."""
    pages = results.with_suffix(".readme.md"), results.with_suffix(".performance.md")
    for page in pages:
        page.write_text("before\n<!-- bench:begin -->\nbygone\n<!-- bench:end -->\nafter\n")
    render.main(results, *pages)
    texts = [page.read_text() for page in pages]
    assert all(text.startswith("before\n") and text.endswith("after\n") and "bygone" not in text for text in texts)
    return texts


def test_rendering_is_deterministic_and_shows_losses(tmp_path):
    pytest.importorskip("matplotlib")
    everything = _some_rows() + _sweep("T", suite.OURS, [(8, 1.0), (80, 10.0), (800, 100.0)])
    everything[0]["peak_buffers"] = 1.0
    everything.append(_row(suite.PRODUCTS, 1.0, peak_buffers=0.0))  # a floor, as the memory floor is: in no plot
    pages = []
    for folder in ("first", "second"):
        results = tmp_path / folder / "results"
        rows.save(everything, results)
        readme, performance = _pages_after(results)
        assert _pages_after(results) == [readme, performance]
        pages.append({path.name: path.read_bytes() for path in (tmp_path / folder).rglob("*.*")})
    assert pages[0] == pages[1]
    plots = {"featured.png", "speedup.png", "memory.png", "growth-T.png"}
    assert {name for name in pages[0] if name.endswith(".png")} == plots
    assert "| 4 ms | 25 % | 2 ms | 0.5x | 0.4x (fast) |" in performance
    assert "](../bench/results/some-cpu-2-threads/speedup.png)" in performance and "featured" not in performance
    assert "The time of ppo_ext grows as T^1.00" in performance and "### GPU\n\nNo GPU has been measured" in performance
    page = (tmp_path / "first/results/some-cpu-2-threads/README.md").read_text()
    assert "](growth-T.png)" in page and "| QuACK | gae | runs on a GPU only |" in page and "WRONG" in page


def test_readme_shows_five_cases_by_absolute_links(tmp_path):
    pytest.importorskip("matplotlib")
    case = {"op": "step", "pass": "PPOTrainer.step, GPT-2 small", "shape": [4, 64, 7]}
    others = {"op": "masked_whiten"}  # in performance.md, but none of the five
    rows.save([*_some_rows(), _row(suite.OURS, 2.0, **case), _row(suite.OURS, 3.0, **others)], tmp_path / "results")
    readme, performance = _pages_after(tmp_path / "results")
    assert "| gae, forward | 2x3 | 4 ms | 2 ms (0.5x) | 1.6 ms (0.4x), fast |" in readme
    assert "| PPOTrainer.step, GPT-2 small | 4x64x7 | 2 ms |  |  |" in readme
    assert f"]({render.REPOSITORY}/raw/main/bench/results/some-cpu-2-threads/featured.png)" in readme
    assert "masked_whiten" not in readme and "masked_whiten" in performance
    assert "Some CPU, 2 threads, torch 2.13, commit abc" in readme and "No GPU has been measured" in readme


def test_readme_shows_one_machine_the_last_gpu_if_there_is_one(tmp_path):
    def measured(date, **of):
        return [_row(suite.OURS, 4.0, date=date, **of)]

    gpu = {"device_type": "cuda", "cache": "cold"}
    machines = {
        "old": measured("2024", device="Old GPU", **gpu),
        "new": measured("2025", device="New GPU", **gpu),
        "cpu": measured("2026"),
    }
    assert featured.machine(machines) == "new" and featured.machine({"cpu": machines["cpu"], "empty": []}) == "cpu"
    readme = render.short_summary(machines, {name: [] for name in machines})
    assert readme.startswith("Measured on New GPU") and "Old GPU" not in readme and "has been measured" not in readme


def test_the_share_of_the_floor_has_a_plot_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    rows.save([{**row, "op": "logprobs"} for row in _some_rows()], tmp_path / "results")
    _, performance = _pages_after(tmp_path / "results")
    assert (tmp_path / "results/some-cpu-2-threads/floor.png").stat().st_size > 0 and "floor.png" in performance


def test_a_gpu_stands_apart_with_its_device_time(tmp_path):
    pytest.importorskip("matplotlib")
    of = {"device": "NVIDIA H100", "device_type": "cuda", "cache": "cold"}
    graph = {**of, "mode": "graph", "shown": False}
    rows.save(
        [
            _row(suite.OURS, 0.5, **of),
            _row(suite.FLOOR, 0.1, **of),
            _row(suite.OURS, 0.2, **graph),
            _row(suite.FLOOR, 0.1, **graph),
        ],
        tmp_path / "results",
    )
    _, performance = _pages_after(tmp_path / "results")
    cpu, _, gpu = performance.partition("### GPU")
    assert "| ours | device | memory floor / ours |" in gpu and "| 0.5 ms | 0.2 ms | 500 % |" in gpu
    assert "### CPU\n\nNo CPU has been measured yet" in cpu


def test_without_rows_nothing_is_estimated():
    assert render.summary({}, {}).count("has been measured yet") == 2
    assert render.short_summary({}, {}).count("has been measured yet") == 2


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="must hold the markers"):
        render.replace_block("no markers here", "block")
