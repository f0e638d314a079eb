"""The page of the kept report: which torches, compilers and processors were tried, and what they said."""


def markdown(report):
    stamp = report["stamp"]
    lines = [
        "# Where it builds and runs",
        "",
        f"Written by `make torch-versions` on {stamp['date']} at commit {stamp['commit']}. What is not said to fail works.",
    ]
    if "headers" in report:
        lines += [
            "",
            "## The CPU library against torch's headers",
            "",
            "Every source, for every instruction set, with every warning an error.",
            "",
            *table(report["headers"], ("torch", "compiler", "files", "seconds")),
        ]
    if "torches" in report:
        lines += [
            "",
            "## One wheel on several versions of torch",
            "",
            "The wheel was built once. Each torch is the one that `pip install torch==VERSION` brings, in an environment of "
            "its own; there the op tests ran on the CPU. The versions with CUDA loaded `_C_cuda.so` too; the machine has no "
            "GPU. Skipped are the tests that need TRL or a GPU.",
            "",
            *table(report["torches"], ("torch", "python", "cpu", "cuda", "passed", "skipped", "seconds")),
        ]
    if "aarch64" in report:
        lines += [
            "",
            "## aarch64 Linux",
            "",
            "Cross-compiled with every warning an error, linked to libtorch's library for aarch64 and to no newer glibc "
            "than 2.28, and run by an aarch64 Python under qemu's user-mode emulation, with one thread. The CUDA library is "
            "compiled for capabilities 9.0 and 10.0 (GH200, GB200) and linked; it was not run.",
            "",
            *table(report["aarch64"], ("step", "passed", "skipped", "seconds")),
        ]
    return "\n".join(lines) + "\n"


def table(rows, columns):
    """The rows with one more column, which says what failed."""
    columns = (*columns, "failures")
    cells = [[cell(row.get(column, "")) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(value):
    text = "; ".join(value) or "none" if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "/")
