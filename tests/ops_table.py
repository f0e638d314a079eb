"""The table of ops in README.md, made of ops.py and of the ops' docstrings: `python -m tests.ops_table` writes it.

It stands between two markers, in README.md or in a page of docs/.
"""

import inspect
import pathlib

import ppo_ext
from bench.render import replace_block

from .ops import OPS

ROOT = pathlib.Path(__file__).parent.parent
BEGIN = "<!-- ops:begin -->"


def row(op):
    """One line: how the op is called, the first sentence of its docstring, and what receives a gradient."""
    function = getattr(ppo_ext, op.name)
    parameters = inspect.signature(function).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    sentence = inspect.getdoc(function).partition("\n")[0].rstrip(".")
    return f"| `{op.name}({', '.join(needed)})` | {sentence} | {', '.join(op.differentiable) or '–'} |"


def table():
    return "\n".join(["| op | result | gradient to |", "| --- | --- | --- |", *map(row, OPS.values())])


def page():
    """The file that holds the markers."""
    pages = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if BEGIN in path.read_text()]
    if len(pages) != 1:
        raise ValueError(f"ops_table: one page must hold the marker {BEGIN}, got {len(pages)}")
    return pages[0]


def with_table(text):
    """`text` with the table between the markers."""
    return replace_block(text, table(), "ops")


if __name__ == "__main__":
    path = page()
    path.write_text(with_table(path.read_text()))
