"""The page of the kept report: which torches, compilers and processors were tried, and what failed there."""

SECTIONS = {
    "compilers": (
        "The CPU library against torch's headers",
        "Every source is compiled, for every instruction set, with every warning an error.",
        ("torch", "compiler", "files", "seconds"),
    ),
    "torches": (
        "One wheel on several versions of torch",
        "The wheel was built once. Each torch is the one that `pip install torch==VERSION` brings, in an environment of its "
        "own; there the op tests ran on the CPU. What is skipped needs TRL or a GPU.",
        ("torch", "python", "cpu", "cuda", "passed", "skipped", "seconds"),
    ),
    "aarch64": (
        "aarch64 Linux",
        "Cross-compiled with every warning an error, linked to libtorch's library for aarch64 and to no newer glibc than "
        "2.28, and run by an aarch64 Python under qemu's user-mode emulation, with one thread. The CUDA library is compiled "
        "for capabilities 9.0 and 10.0 (GH200, GB200) and linked, but not run.",
        ("step", "passed", "skipped", "seconds"),
    ),
}


def markdown(report):
    lines = ["# Where it builds and runs", "", "Written by `make torch-versions`."]
    for name, (title, text, columns) in SECTIONS.items():
        if name in report:
            stamp = report[name]["stamp"]
            lines += ["", f"## {title}", "", f"{text} Run on {stamp['date'][:10]} at commit {stamp['commit']}.", ""]
            lines += table(report[name]["rows"], (*columns, "failures"))
    return "\n".join(lines) + "\n"


def table(rows, columns):
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *cells]]


def cell(value):
    text = "; ".join(value) or "none" if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "/")
