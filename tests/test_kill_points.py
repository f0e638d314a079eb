"""Kills at some points of each operation, and the committed counts of many; see kill_points.py."""

import json

import kill_points
import pytest
import transformers

PAGE = kill_points.EVIDENCE / "kill_points.md"


def test_no_kill_leaves_wrong_bits_or_an_unreadable_file():
    transformers.utils.logging.disable_progress_bar()
    rows = [operation.kills(4) for operation in kill_points.operations()]
    rows += [next(kill_points.operations()).kills(2, by_bytes=True)]
    transformers.utils.logging.enable_progress_bar()
    assert len(rows) == 5
    for row in rows:
        assert row["killed"] and row["old"] + row["new"] == row["points"] and not row["left over"], row


def test_a_wrong_save_would_be_counted(tmp_path):
    """An operation that writes its two files in place, so that a kill between them leaves one of each."""

    def write(value):
        def run(folder):
            for name in ("a", "b"):
                with open(folder / name, "w") as file:
                    file.write(value * 2000)

        return run

    def content(folder):
        return {name: (folder / name).read_text() for name in ("a", "b")}

    operation = kill_points.Operation("in place", write("new"), content, ("test_kill_points",), [write("old")])
    assert operation.kills(6, by_bytes=True)["wrong"] >= 3 and operation.kills(8)["wrong"] >= 1


@pytest.mark.skipif(not PAGE.exists(), reason="no counts are committed")
def test_the_page_is_rendered_from_the_counts_and_they_show_no_fault():
    counts = json.loads((kill_points.EVIDENCE / "kill_points.json").read_text())
    assert PAGE.read_text() == kill_points.render(counts)
    assert sum(row["points"] for row in counts["rows"]) >= 200 and counts["flipped bits"]["flips"] >= 300
    assert counts["flipped bits"]["refused"] == counts["flipped bits"]["flips"]
    for row in counts["rows"]:
        assert row["old"] + row["new"] == row["points"] and not row["left over"], row
