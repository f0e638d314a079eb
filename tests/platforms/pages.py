"""The page of the kept report: which torches, compilers and processors were tried, and what failed there.

Its tables also stand in docs/building.md.
"""

import json

import torch

from bench import machine
from bench.render import replace_block

from .packages import ROOT

NOT_RUN = "not run"  # in the place of a number of tests
EVIDENCE = ROOT / "bench" / "evidence"
DOCS = ROOT / "docs" / "building.md"

SECTIONS = {
    "compilers": (
        "The CPU library against torch's headers",
        "Every source is compiled, for every instruction set, with every warning an error.",
        ("torch", "compiler", "files", "seconds"),
    ),
    "wheel": (
        "The wheel, by auditwheel",
        "`auditwheel show` names the oldest Linux that has all that the wheel of `make wheel` needs, and the libraries that "
        "it takes versioned symbols from. What it takes from libtorch it looks up in the torch that is installed.",
        ("wheel", "platform tag", "libraries"),
    ),
    "torches": (
        "One wheel on several versions of torch",
        "The wheel was built once. Each torch is the one that `pip install torch==VERSION` brings, in an environment of its "
        "own; there all op tests ran on the CPU, in so many seconds. What is skipped needs TRL or a GPU. Then `pip install "
        ".` compiled a copy of the sources there without the CUDA kernels, by the compilers named, and `info` ended well.",
        ("torch", "python", "cpu", "cuda", "passed", "skipped", "seconds", "pip install ."),
    ),
    "aarch64": (
        "aarch64 Linux",
        "Cross-compiled with every warning an error, linked to libtorch's library for aarch64 and to no newer glibc than "
        "2.28, and run by an aarch64 Python under qemu's user-mode emulation, with one thread. There, of the cases of each "
        "function in the op tests the first, the middle one and the last ran, all in one process. The CUDA library is "
        "compiled for capabilities 9.0 and 10.0 (GH200, GB200) and linked, but not run.",
        ("step", "passed", "skipped", "seconds"),
    ),
}


def save(name, rows):
    """Puts the rows of one check into the kept report, and writes the page and the tables in docs/ anew."""
    path = EVIDENCE / "platforms.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept[name] = {"stamp": machine.stamp(torch.device("cpu")), "rows": rows}
    path.write_text(json.dumps(kept, indent=1) + "\n")
    (EVIDENCE / "platforms.md").write_text(markdown(kept))
    DOCS.write_text(in_docs(kept, DOCS.read_text()))


def markdown(report):
    return f"# Where it builds and runs\n\nWritten by `make torch-versions`.\n\n{sections(report, '##')}\n"


def in_docs(report, text):
    """The page of docs/ with the tables of the report between its markers."""
    return replace_block(text, sections(report, "###"), "platforms")


def sections(report, level):
    parts = []
    for name, (title, text, columns) in SECTIONS.items():
        if name in report:
            stamp = report[name]["stamp"]
            parts += [f"{level} {title}", f"{text} Run on {stamp['date'][:10]} at commit {stamp['commit']}."]
            parts.append("\n".join(table(report[name]["rows"], (*columns, "failures"))))
            if any(row.get("passed") == NOT_RUN for row in report[name]["rows"]):
                parts.append(f'What is "{NOT_RUN}" has not been run to its end there yet.')
    return "\n\n".join(parts)


def table(rows, columns):
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells]]


def cell(value):
    text = "; ".join(value) or "none" if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "/")
