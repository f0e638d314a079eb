"""Reads compiled CUDA kernels: the resources of each (cuobjdump) and the instructions of its hot loop (nvdisasm).

How the instructions per element are counted. A loop is a branch back to a block that dominates it. The hot loop of a
kernel is the innermost loop with 16-byte loads. Of the paths through its body, the one with the most registers filled
by 16-byte loads and the most 16-byte stores is taken, and of several such the shortest: the iteration over a whole
batch of loads without a new maximum, which processes nearly all of a long row. Its instructions, including predicated
ones, are divided by the number of elements that its loads bring. The end of a row and a rescale to a new maximum are
rare by construction and are not on that path.
"""

import dataclasses
import functools
import glob
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SECTION = re.compile(r"^//-+ \.text\.(\S+) -+$")
_LABEL = re.compile(r"^(\.L\w*|\$\w+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"`\((\.L\w*)\)")
_RESOURCES = re.compile(r" Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_WIDE = re.compile(r"(LDG|STG)\.E\b.*\.128\b")


class ToolMissing(Exception):
    """A disassembler is not installed. The text says what to install."""


# ---- tools ----------------------------------------------------------------------------------------------------------


def tool_folders(env=os.environ):
    """Where cuobjdump and nvdisasm may be: in pip's packages of this interpreter, in CUDA_HOME, on $PATH."""
    spec = importlib.util.find_spec("nvidia")
    packages = list(spec.submodule_search_locations) if spec else []
    yield from (folder for package in packages for folder in sorted(glob.glob(f"{package}/*/bin"), reverse=True))
    yield from (str(Path(env[name], "bin")) for name in ("CUDA_HOME", "CUDA_PATH") if env.get(name))
    yield from env.get("PATH", os.defpath).split(os.pathsep)
    yield "/usr/local/cuda/bin"


def find_tool(name, folders=None):
    """The path of an executable, or ToolMissing."""
    found = shutil.which(name, path=os.pathsep.join(tool_folders() if folders is None else folders))
    if found is None:
        raise ToolMissing(
            f"{name} must be installed, got none in pip's packages, CUDA_HOME or PATH; pip install nvidia-cuda-{name}"
        )
    return found


def _run(*command, **kwargs):
    return subprocess.run(command, capture_output=True, text=True, check=True, **kwargs).stdout


# ---- what a kernel uses ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


def usage_of(text):
    """{(architecture, mangled name): Usage} of cuobjdump's resource report."""
    found = {}
    for part in re.split(r"^arch = sm_", text, flags=re.MULTILINE)[1:]:
        digits = re.match(r"\d+", part)[0]
        for name, registers, stack, shared, local in _RESOURCES.findall(part):
            usage = Usage(int(registers), int(stack), int(shared), int(local))
            found[f"{digits[:-1]}.{digits[-1]}", name] = usage
    return found


# ---- instructions ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    guard: str  # "@P0", "@!P0" or ""
    opcode: str
    operands: str

    @property
    def target(self):
        """The label to which this instruction branches; None if it is no branch."""
        match = _TARGET.search(self.operands) if self.opcode.startswith("BRA") else None
        return match and match[1]

    @property
    def falls_through(self):
        """Whether the following instruction may be executed next."""
        if self.guard or not self.opcode.startswith(("BRA", "EXIT", "RET", "BRX", "JMP", "JMX")):
            return True
        return (
            self.target is not None and self.operands.strip() != f"`({self.target})"
        )  # a conditional branch has its condition among the operands

    @property
    def wide_access(self):
        """What identifies a 16-byte access of global memory: the registers that it loads, or the address that it stores
        to."""
        return self.opcode[:3] + self.operands.split(",")[0] if _WIDE.match(self.opcode) else None


@dataclasses.dataclass
class Block:
    """Instructions that are executed one after the other, and the blocks that may follow."""

    instructions: list
    successors: list


def parse(text):
    """{mangled name: (instructions, {label: index})} of nvdisasm's output."""
    functions = {}
    for line in text.splitlines():
        if section := _SECTION.match(line):
            instructions, labels = functions.setdefault(section[1], ([], {}))
        elif not functions:
            continue
        elif label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(Instruction(instruction[1] or "", instruction[2], instruction[3]))
    return functions


def blocks_of(instructions, labels):
    """The control flow graph of one kernel. A call is like any other instruction, as it returns."""
    starts = {0} | {labels[i.target] for i in instructions if i.target}
    starts |= {n + 1 for n, i in enumerate(instructions) if i.target or not i.falls_through}
    starts = sorted(start for start in starts if start < len(instructions))
    number = {start: block for block, start in enumerate(starts)}
    blocks = []
    for start, end in zip(starts, [*starts[1:], len(instructions)]):
        last = instructions[end - 1]
        successors = [number[labels[last.target]]] if last.target else []
        if last.falls_through and end in number:
            successors.append(number[end])
        blocks.append(Block(instructions[start:end], successors))
    return blocks


def loops_of(blocks):
    """{header: blocks of its loop}, found from the branches back to an earlier block that dominates them."""
    before = [[] for _ in blocks]
    for block, content in enumerate(blocks):
        for successor in content.successors:
            before[successor].append(block)
    loops = {}
    for block, content in enumerate(blocks):
        for header in (s for s in content.successors if s <= block):
            body, waiting = {header}, [block]
            while waiting:
                current = waiting.pop()
                if current not in body:
                    body.add(current)
                    waiting += before[current]
            if header == 0 or 0 not in body:  # else there is another way into the loop, so it is none
                loops.setdefault(header, set()).update(body)
    return loops


def hot_loop(blocks):
    """(header, blocks) of the innermost loop with 16-byte loads; None if there is none."""
    wide = {
        b for b, block in enumerate(blocks) if any((i.wide_access or "").startswith("LDG") for i in block.instructions)
    }
    loops = [(header, body) for header, body in loops_of(blocks).items() if body & wide]
    innermost = [loop for loop in loops if not any(other < loop[1] for _, other in loops)]
    return max(innermost, key=lambda loop: len(loop[1] & wide), default=None)


def wide_accesses(instructions, opcode=""):
    """The set of 16-byte accesses. The same one under two opposite predicates counts once."""
    return {i.wide_access for i in instructions if i.wide_access and i.wide_access.startswith(opcode)}


def hot_path(blocks, header, body):
    """The instructions of one iteration: the path with the most 16-byte accesses, of those the shortest (see above)."""

    @functools.cache
    def best(block):
        here = blocks[block].instructions
        follow = [s for s in blocks[block].successors if s in body and (s > block or s == header)]
        ways = [[] if s == header else best(s) for s in follow]
        ways = [way for way in ways if way is not None]
        if not ways:
            return None  # this path leaves the loop
        return here + min(ways, key=lambda way: (-len(wide_accesses(way)), len(way)))

    return best(header)


@dataclasses.dataclass(frozen=True)
class HotLoop:
    """One iteration of a kernel's hot loop."""

    loads: int
    stores: int
    instructions: int
    exponentials: int


def hot_loop_of(instructions, labels):
    """The kernel's HotLoop; None if no loop of it has 16-byte loads."""
    blocks = blocks_of(instructions, labels)
    loop = hot_loop(blocks)
    path = hot_path(blocks, *loop) if loop else None
    if path is None:
        return None
    exponentials = sum(i.opcode == "MUFU.EX2" for i in path)
    return HotLoop(len(wide_accesses(path, "LDG")), len(wide_accesses(path, "STG")), len(path), exponentials)


def spills_of(instructions):
    """How many instructions move registers to and from the stack."""
    return sum(i.opcode.startswith(("LDL", "STL")) for i in instructions)


# ---- a library ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kernel:
    name: str  # mangled
    arch: str  # "9.0"
    usage: Usage
    spills: int
    loop: HotLoop | None


def kernels_of(library, jobs=2):
    """Every kernel in the SASS of a CUDA library."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    library = Path(library).resolve()
    usage = usage_of(_run(cuobjdump, "--dump-resource-usage", library))
    with tempfile.TemporaryDirectory() as folder:
        _run(cuobjdump, "--extract-elf", "all", library, cwd=folder)
        files = sorted(Path(folder).glob("*.cubin"))
        with ThreadPoolExecutor(jobs) as pool:
            texts = list(pool.map(lambda file: _run(nvdisasm, "--print-code", file), files))
    kernels = []
    for file, text in zip(files, texts):
        digits = re.search(r"\.sm_(\d+)", file.name)[1]
        arch = f"{digits[:-1]}.{digits[-1]}"
        for name, (instructions, labels) in parse(text).items():
            kernels.append(
                Kernel(name, arch, usage[arch, name], spills_of(instructions), hot_loop_of(instructions, labels))
            )
    return kernels
