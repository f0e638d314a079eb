"""What the commands say when they are asked for nothing: `python -m ppo_ext`, `--version`, `make`; and the bug form."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import ppo_ext
from ppo_ext.__main__ import main

ROOT = pathlib.Path(__file__).parent.parent


def test_no_command_prints_the_help(capsys):
    assert main([]) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("usage: python -m ppo_ext") and "info" in printed and "demo" in printed


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"ppo_ext {ppo_ext.__version__}\n"


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["inform"])
    assert exit.value.code == 2 and "invalid choice: 'inform'" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `python -m ppo_ext info | head -1`: the pipe is closed before the report is written."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ppo_ext", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_lists_its_targets_and_does_nothing_else():
    makefile = (ROOT / "Makefile").read_text()
    listed = {}
    for arguments in ([], ["help"]):
        result = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0 and not result.stderr
        listed = dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", result.stdout, re.MULTILINE))
        phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
        assert sorted(listed) == sorted(phony)


def test_the_bug_form_asks_for_the_report():
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text())
    assert {"name", "description", "body"} <= set(form)
    [field] = [field for field in form["body"] if "python -m ppo_ext info --json" in field["attributes"]["label"]]
    assert field["type"] == "textarea" and field["validations"]["required"]


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["authors"] == [{"name": "The ppo_ext authors"}]
