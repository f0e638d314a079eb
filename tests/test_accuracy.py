"""The accuracy table: none of our errors has grown, none is larger than torch's, and the page shows the kept
figures."""

import copy

import pytest
import torch
from ops import OPS

from bench import accuracy, accuracy_pages, machine
from ppo_ext.info import report
from ppo_ext.ops import _native

VOCABULARIES = (7, 1000, 50257)  # some of those in the table
ON_HIDDEN = tuple(name for name, op in OPS.items() if op.on_hidden)

pytestmark = pytest.mark.skipif(_native.status()["cpu"] != "loaded", reason="the compiled part is not built here")


@pytest.fixture(scope="module")
def kept():
    return accuracy_pages.load()["rows"]


def rows_of(names, **options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return accuracy.measure(accuracy.all_inputs(VOCABULARIES, names), progress=False, **options)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def measured():
    """Products of matrices are torch's, which adds their terms in another order on another processor; there the ops on
    hidden states are compared with torch's own error alone."""
    here, stamps = machine.stamp(torch.device("cpu"))["device"], accuracy_pages.load()["stamps"]
    return rows_of([name for name in OPS if name not in ON_HIDDEN or stamps[name]["device"] == here])


def test_no_error_has_grown(measured, kept):
    assert report.cpu_level() in kept[0]["errors"], (
        f"nothing is kept for {report.cpu_level()}: python -m bench.accuracy --save"
    )
    assert len(measured) > 300
    assert list(accuracy_pages.growth(measured, kept, report.cpu_level())) == []


@pytest.mark.parametrize("which", [0, 1], ids=["largest", "mean"])
def test_an_error_that_grows_is_seen(measured, kept, which):
    level, grown = report.cpu_level(), copy.deepcopy(measured)
    kept_here = {row["op"] for row in kept if level in row["errors"]}
    row = max(
        (row for row in grown if row["op"] in kept_here),
        key=lambda row: row["errors"][level][which] / (row["unit"] or 1.0),
    )
    row["errors"][level][which] *= 1.2
    [sentence] = accuracy_pages.growth(grown, kept, level)
    assert sentence.startswith(f"{row['op']}, {row['result']}") and ("largest", "mean")[which] in sentence


def test_a_result_that_is_no_number_is_seen(measured, kept):
    level, broken = report.cpu_level(), copy.deepcopy(measured)
    broken[0]["errors"][level] = [float("inf"), float("nan")]
    assert len(list(accuracy_pages.growth(broken, kept, level))) == 2


def test_every_op_dtype_and_size_is_kept(kept):
    found = {tuple(row[name] for name in accuracy.all_inputs()[0].key) for row in kept}
    assert found == {tuple(input.key.values()) for input in accuracy.all_inputs()}


def check_within_torchs(all_rows):
    """Over all inputs of a result and dtype, our largest and mean error are torch's at most, within one unit in the
    last place. The error of a single number is chance; its unit is that of the terms it is the sum of, which are of
    order one."""
    groups = accuracy_pages.grouped(
        [
            row | {"sides": (row["scale"], row["ref_scale"]) if accuracy_pages.differs(row) else None}
            for row in all_rows
        ],
        *("op", "result", "dtype", "offset", "ref_offset", "sides"),
    )
    for key, rows in groups.items():
        everyone, unit = accuracy_pages.aggregate(rows), max(row["unit"] for row in rows)
        unit = max(unit, 1.2e-7) if key[1] in ("loss", "mean", "var") else unit
        ours, torchs = everyone["ours"], everyone[accuracy_pages.TORCH]
        assert ours[0] <= torchs[0] + unit, key
        assert ours[1] <= 1.1 * torchs[1] + 0.1 * unit, key


def test_no_error_is_beyond_torchs(kept):
    check_within_torchs(kept)


def test_no_error_on_hidden_states_is_beyond_torchs_on_this_processor():
    check_within_torchs(rows_of(ON_HIDDEN, others=True))


def test_a_divergence_is_within_torchs_error_at_every_scale(kept):
    """Of policy and reference, for rows of a few columns and for others."""
    rows = [row | {"few": row["V"] <= 8} for row in kept if row["op"] == "full_kl"]
    fields = ("result", "dtype", "scale", "ref_scale", "offset", "ref_offset", "few")
    for key, group in accuracy_pages.grouped(rows, *fields).items():
        everyone = accuracy_pages.aggregate(group)
        for ours, torchs in zip(everyone["ours"], everyone[accuracy_pages.TORCH], strict=True):
            assert ours <= torchs, key


def test_the_page_is_of_the_figures():
    figures = accuracy_pages.load()
    assert (accuracy_pages.EVIDENCE / "accuracy.md").read_text() == accuracy_pages.markdown(figures)
    assert (accuracy_pages.EVIDENCE / "accuracy.png").stat().st_size > 10_000
