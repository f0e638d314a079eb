"""What nvcc made of every CUDA kernel, read without a GPU: `python -m bench.static_report`.

Reports registers, spills, 16-byte accesses and instructions per element of the hot loops for each architecture in the
built library; `sass.py` explains how they are counted. Compares with the kept figures and ends with status 1 if a
kernel got worse. `--save` keeps the new figures.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

from . import sass

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "ppo_ext/_C_cuda.so"
EVIDENCE = Path(__file__).parent / "evidence"
GROWTH = 1.10  # the allowed ratio of instructions of a hot loop to the kept figure

# The meanings of the bool arguments of the kernels' templates, by (op, kernel). An integer argument is the number of
# threads that work on one row, and the first type is the dtype.
_FLAGS = {
    ("logprobs", "forward_kernel"): ("aligned", "entropy"),
    ("logprobs", "backward_kernel"): ("aligned", "entropy"),
    ("full_kl", "forward_kernel"): ("aligned",),
    ("full_kl", "backward_kernel"): ("aligned",),
}
# The hot kernels: how many arrays they read and how many they write by 16-byte accesses.
_HOT = {
    ("logprobs", "forward_kernel"): (1, 0),
    ("logprobs", "backward_kernel"): (1, 1),
    ("full_kl", "forward_kernel"): (2, 0),
    ("full_kl", "backward_kernel"): (2, 1),
    ("gae", "gae_kernel"): (2, 2),
}
_DTYPES = {"BFloat16": ("bfloat16", 2), "Half": ("float16", 2), "float": ("float32", 4), "double": ("float64", 8)}
# Instructions per element of prototype loops in bfloat16 on 9.0. They subtract the maximum and scale in one
# instruction, while the kernels subtract exactly first. They do not bound the terms of the entropy, which -inf makes NaN.
_PROTOTYPE = {
    "logprobs forward": 5.03,
    "logprobs forward and entropy": 6.03,
    "logprobs backward": 5.31,
    "logprobs backward and entropy": 6.31,
}
_THREADS_OF_SM = {"8.0": 2048, "8.6": 1536, "8.9": 1536, "9.0": 2048, "10.0": 2048, "12.0": 1536}


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel on one architecture. The fields of the hot loop are None if there is none."""

    op: str
    kernel: str  # as in the source, with the template arguments
    arch: str
    name: str  # as it is shown
    dtype: str
    hot: bool
    registers: int
    occupancy: float | None  # threads for which an SM has registers, divided by those it can run
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    spills: int
    loads: int | None = None
    stores: int | None = None
    instructions_per_element: float | None = None
    exponentials_per_element: float | None = None

    @property
    def key(self):
        return self.arch, self.op, self.kernel

    @property
    def title(self):
        return f"{self.op} {self.kernel} on {self.arch}"


# ---- rows -----------------------------------------------------------------------------------------------------------


def demangle(names):
    text = "\n".join(names)
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.split("\n")


def identify(mangled, demangled):
    """(op, kernel, its template's arguments, {meaning: argument}) of a kernel."""
    op = re.search(r"_GLOBAL__N__\w+?_\d+_(\w+)_cuda_cu_", mangled)[1]
    short = re.sub(r"ppo_ext::|\(anonymous namespace\)::|c10::", "", demangled)
    kernel, text = re.search(r"(\w+)<([^()]*)>\(", short).groups()
    arguments = text.split(", ")
    meanings = dict(zip(_FLAGS.get((op, kernel), ()), (a for a in arguments if a in ("true", "false"))))
    meanings["threads"] = next((a for a in arguments if a.isdigit()), None)
    meanings["dtype"] = next(a for a in arguments if a in _DTYPES)
    return op, kernel, text, meanings


def name_of(op, kernel, arguments):
    """The name that is shown, such as "logprobs forward and entropy" or "gae, a warp each"."""
    name = " ".join(dict.fromkeys([op, kernel.removesuffix("_kernel")]))
    name += " and entropy" * (arguments.get("entropy") == "true")
    return name + ", a warp each" * (arguments.get("threads") == "32")


def occupancy(registers, threads, arch):
    """The share of an SM's threads that can run at once, as far as the number of registers limits it."""
    if arch not in _THREADS_OF_SM:
        return None
    registers_of_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256
    warps = 65536 // registers_of_warp // 4 * 4  # warps are divided among four schedulers
    return min(warps * 32 // threads, _THREADS_OF_SM[arch] // threads) * threads / _THREADS_OF_SM[arch]


def threads_of(op):
    """The block size, from the kernel's source."""
    return int(re.search(r"constexpr int kBlock = (\d+);", (ROOT / f"csrc/{op}_cuda.cu").read_text())[1])


def row_of(kernel, demangled):
    """The Row of one sass.Kernel."""
    op, name, text, arguments = identify(kernel.name, demangled)
    dtype, size = _DTYPES[arguments["dtype"]]
    hot = (op, name) in _HOT and arguments.get("aligned", "true") == "true" and dtype != "float64"
    usage = kernel.usage
    row = Row(
        op,
        f"{name}<{text}>",
        kernel.arch,
        name_of(op, name, arguments),
        dtype,
        hot,
        usage.registers,
        occupancy(usage.registers, threads_of(op), kernel.arch),
        usage.stack_bytes,
        usage.local_bytes,
        usage.shared_bytes,
        kernel.spills,
    )
    if not hot or kernel.loop is None:
        return row
    elements = kernel.loop.loads * 16 // size / _HOT[op, name][0]
    return dataclasses.replace(
        row,
        loads=kernel.loop.loads,
        stores=kernel.loop.stores,
        instructions_per_element=round(kernel.loop.instructions / elements, 3),
        exponentials_per_element=round(kernel.loop.exponentials / elements, 3),
    )


def measure(library=LIBRARY):
    """The report of a built library: how it was built, and its rows in a fixed order."""
    kernels = sass.kernels_of(library)
    rows = [row_of(kernel, name) for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]))]
    info = json.loads((Path(library).parent / "_build_info.json").read_text())
    rows.sort(key=lambda row: (float(row.arch), not row.hot, row.op, row.kernel))
    return {"nvcc": info["nvcc"], "nvcc_flags": info["nvcc_flags"], "commit": info["git"], "kernels": rows}


# ---- limits ---------------------------------------------------------------------------------------------------------


def problems(report, kept):
    """A sentence for each kernel that spills, has a stack frame, lost its 16-byte accesses, or grew."""
    found = []
    for row in report["kernels"]:
        for what in ("spills", "stack_bytes", "local_bytes"):
            if getattr(row, what):
                found.append(f"{row.title}: {what} must be 0, got {getattr(row, what)}")
        if row.hot:
            inputs, outputs = _HOT[row.op, row.kernel.partition("<")[0]]
            if not row.loads:
                found.append(f"{row.title}: the hot loop must have 16-byte loads, got none")
            elif row.stores != row.loads * outputs // inputs:
                found.append(f"{row.title}: 16-byte stores must be {row.loads * outputs // inputs}, got {row.stores}")
    return found + changes(report, kept)


def comparable(report, kept):
    """Whether both reports are of the same major version of nvcc. Another version may generate other code from the same
    source."""
    return report["nvcc"].partition(".")[0] == kept["nvcc"].partition(".")[0]


def changes(report, kept):
    """A sentence for each hot kernel that has grown, or that is missing from the kept figures of its architecture."""
    if not comparable(report, kept):
        return []
    before = {row.key: row.instructions_per_element for row in kept["kernels"] if row.hot}
    archs, found = {arch for arch, _, _ in before}, []
    for row in report["kernels"]:
        if not row.hot or row.arch not in archs or row.instructions_per_element is None:
            continue
        if row.key not in before:
            found.append(f"{row.title}: must be among the kept figures, got none; python -m bench.static_report --save")
        elif row.instructions_per_element > GROWTH * before[row.key]:
            found.append(
                f"{row.title}: instructions per element must stay within {GROWTH:.2f} times "
                f"{before[row.key]:.2f}, got {row.instructions_per_element:.2f}"
            )
    return found


# ---- pages ----------------------------------------------------------------------------------------------------------

_HEADER = (
    "kernel",
    "dtype",
    "registers",
    "occupancy",
    "shared, bytes",
    "stack, bytes",
    "spills",
    "16-byte loads / stores",
    "instructions / element",
    "prototype",
    "limit",
    "exp2 / element",
)


def _cells(row):
    figure = row.instructions_per_element
    prototype = _PROTOTYPE.get(row.name) if (row.arch, row.dtype) == ("9.0", "bfloat16") else None
    return (
        row.name,
        row.dtype,
        str(row.registers),
        "" if row.occupancy is None else f"{row.occupancy:.0%}",
        str(row.shared_bytes),
        str(row.stack_bytes),
        str(row.spills),
        f"{row.loads} / {row.stores}",
        f"{figure:.2f}",
        f"{prototype:.2f} ({figure / prototype - 1:+.0%})" if prototype else "",
        f"{GROWTH * figure:.2f}",
        f"{row.exponentials_per_element:.2f}",
    )


def markdown(report):
    """The hot kernels' tables, one for each architecture."""
    rows = report["kernels"]
    worst = {what: max(getattr(row, what) for row in rows) for what in ("spills", "stack_bytes", "local_bytes")}
    parts = [
        f"Written by `python -m bench.static_report --save` from a build by nvcc {report['nvcc']} at commit "
        f"{report['commit']}; how it is counted stands in `bench/sass.py`. {len(rows)} kernels on "
        f"{len({row.arch for row in rows})} architectures; the most spills of any is {worst['spills']}, the largest "
        f"stack frame {worst['stack_bytes']} bytes. Below are the hot ones: rows aligned to 16 bytes, the loop over "
        "whole batches. An element is a column of the vocabulary, for gae a token. More than the limit fails the "
        "tests. The prototypes subtract the maximum and scale in one instruction and let -inf make the entropy NaN."
    ]
    for arch in sorted({row.arch for row in rows}, key=float):
        lines = [_cells(row) for row in rows if row.hot and row.arch == arch and row.loads]
        table = "\n".join("| " + " | ".join(line) + " |" for line in (_HEADER, ["---"] * len(_HEADER), *lines))
        parts.append(f"## {arch}\n\n{table}")
    return "# What nvcc made of the kernels\n\n" + "\n\n".join(parts) + "\n"


def save(report, folder=EVIDENCE):
    """Writes static.json, one kernel a line, and static.md."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(dataclasses.asdict(row)) for row in report["kernels"])
    head = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(value)}" for name, value in report.items() if name != "kernels"
    )
    (folder / "static.json").write_text(f'{{\n{head},\n "kernels": [\n{lines}\n ]\n}}\n')
    (folder / "static.md").write_text(markdown(report))


def load(folder=EVIDENCE):
    """What save() wrote."""
    report = json.loads((folder / "static.json").read_text())
    return {**report, "kernels": [Row(**row) for row in report["kernels"]]}


def main(argv=None):
    """Prints the tables and what is wrong; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.static_report", description=__doc__)
    parser.add_argument("--library", type=Path, default=LIBRARY, help="default: the built ppo_ext/_C_cuda.so")
    parser.add_argument(
        "--save", action="store_true", help="keep the figures in bench/evidence/static.json and static.md"
    )
    options = parser.parse_args(argv)
    try:
        report = measure(options.library)
    except sass.ToolMissing as error:
        print(f"static_report: {error}", file=sys.stderr)
        return 2
    print(markdown(report))
    kept = report if options.save else load()
    if options.save:
        save(report)
    found = problems(report, kept)
    print("\n".join(found) or "nothing is wrong")
    if not comparable(report, kept):
        print(f"instructions are not compared: the kept figures are of nvcc {kept['nvcc']}, this is {report['nvcc']}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
