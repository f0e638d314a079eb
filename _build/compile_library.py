"""Compile and link one shared library; with ninja only what changed."""

import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from build_options import BuildError
from find_tools import find_ninja


@dataclass(frozen=True)
class Source:
    """A file, what compiling it takes beside the library's own flags, and the name of its object."""

    path: Path
    flags: tuple[str, ...] = ()
    variant: str = ""  # tells the objects of one file apart

    @property
    def object(self) -> str:
        return f"{self.path.name}{self.variant and '.' + self.variant}.o"


@dataclass(frozen=True)
class Library:
    """One shared library: its sources, the command that compiles one, the command that links, and what it links to: the
    system's libraries, and before them those of torch."""

    name: str
    sources: list[Source]
    compile: list[str]
    link: list[str]
    libraries: list[str]
    torch: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    output: Path
    inputs: list[Path]
    command: list[str]
    depfile: Path | None = None


def plan(library: Library, folder: Path) -> list[Step]:
    """One step per source, then the link step."""
    steps = []
    for source in library.sources:
        output = folder / source.object
        depfile = output.with_suffix(".d")
        command = [
            *library.compile,
            *source.flags,
            "-MD",
            "-MF",
            str(depfile),
            "-c",
            str(source.path),
            "-o",
            str(output),
        ]
        steps.append(Step(output, [source.path], command, depfile))
    objects = [step.output for step in steps]
    output = folder / library.name
    command = [*library.link, *map(str, objects), "-o", str(output), *library.torch, *library.libraries]
    return [*steps, Step(output, objects, command)]


def compile_library(library: Library, folder: Path, max_jobs: int | None = None) -> Path:
    """Build `library` in `folder` and return its path; raises BuildError if a step fails."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = plan(library, folder)
    ninja = find_ninja()
    if ninja:
        file = folder / f"{library.name}.ninja"
        file.write_text(ninja_text(steps, folder), encoding="utf-8")
        run_step([ninja, "-f", str(file), *(["-j", str(max_jobs)] if max_jobs else [])], library.name)
    else:
        print("ppo_ext build: no ninja, so every file is compiled again; pip install ninja", flush=True)
        with ThreadPoolExecutor(max_jobs or os.cpu_count()) as pool:
            list(pool.map(lambda step: run_step(step.command, library.name), steps[:-1]))
        run_step(steps[-1].command, library.name)
    return steps[-1].output


def run_step(command: list[str], name: str) -> None:
    if subprocess.run(command).returncode != 0:
        raise BuildError(f"compiling {name} failed; the compiler's messages stand above (pip shows them with -v)")


def ninja_text(steps: list[Step], folder: Path) -> str:
    """A ninja file for `steps`: a changed source, header or command redoes what depends on it and nothing else."""
    lines = [f"builddir = {_escape(folder)}"]
    for number, step in enumerate(steps):
        lines += [f"rule step{number}", f"  command = {shlex.join(step.command).replace('$', '$$')}"]
        lines += [f"  description = {step.output.name}"]
        if step.depfile:
            lines += [f"  depfile = {_escape(step.depfile)}", "  deps = gcc"]
        lines += [f"build {_escape(step.output)}: step{number} {' '.join(map(_escape, step.inputs))}"]
    return "\n".join(lines) + "\n"


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
