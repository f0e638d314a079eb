"""The tests, rows and files that README.md names exist."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parent
README = TESTS.parent / "README.md"


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", README.read_text()))
    defined = {
        name for path in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert len(named) > 30 and named <= defined, sorted(named - defined)


def test_every_row_that_should_name_a_test_does():
    tables = README.read_text().split("| kept by |")[1:]
    rows = [line for table in tables for line in table.split("\n\n")[0].splitlines()[2:]]
    assert len(rows) > 30 and not [row for row in rows if "`test_" not in row.split("|")[-2]]


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert links and not [link for link in links if not (README.parent / link).exists()]
