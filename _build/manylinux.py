"""Link a library so that it runs on every Linux with glibc 2.28, whatever glibc this machine has (PPO_EXT_MANYLINUX=1).

It needs no library but those that manylinux_2_28 promises: what it takes from libtorch, it looks up when it is loaded, as
torch_symbols.cpp tells.

A linker takes the newest version of each symbol that it finds: `exp@GLIBC_2.29`, `dlsym@GLIBC_2.34`. glibc keeps the older
versions beside them for programs that were linked long ago. So a library is linked again. The link before shows which of
its symbols are too new; then stand-ins for the libraries that hold these come before the system's own. They offer the old
versions of what is used and nothing else. The loader never sees them: it reads names and versions only. What has no older
version is defined in newer_symbols.cpp.
"""

import re
from functools import cache
from pathlib import Path

from build_options import BuildError
from compile_library import Library, run_step
from find_tools import run_text

Version = tuple[int, ...]

GLIBC = (2, 28)
LIBSTDCXX = (3, 4, 25)
TAG = "manylinux_2_28"
MERGED = (2, 34)  # the release that moved these libraries' symbols into libc.so.6
MOVED = {r"dl\w+": "libdl.so.2", r"shm_\w+": "librt.so.1", r"(pthread|sem)_\w+": "libpthread.so.0"}
SOURCE = Path(__file__).with_name("newer_symbols.cpp")
TORCH_SOURCE = Path(__file__).with_name("torch_symbols.cpp")


def relink(library: Library, built: Path, cxx: list[str]) -> Path:
    """Link `built` again, from the objects beside it: without libtorch, and to the old versions of what is glibc's."""
    objects = [str(built.parent / source.object) for source in library.sources]
    functions = sorted(unversioned(built))
    if functions:
        objects.append(str(compile_torch_symbols(library, functions, built.parent, cxx)))
    output = built.with_suffix(f".{TAG}.so")
    link = [*library.link, *objects, "-o", str(output)]
    run_step([*link, *library.libraries], library.name)

    homes: dict[str, dict[Version, list[str]]] = {}  # library: {version: symbols}
    too_new = set()
    for symbol, version in taken(output):
        soname, old = older(symbol, version, tuple(cxx))
        homes.setdefault(soname, {}).setdefault(old, []).append(symbol)
        if version > GLIBC:
            too_new.add(soname)
    stubs = [make_stub(soname, homes[soname], built.parent, cxx) for soname in sorted(too_new)]
    between = ["-Wl,--push-state,--no-as-needed", *map(str, stubs), "-Wl,--pop-state"]
    run_step([*link, *between, *library.libraries], library.name)
    still = [f"{symbol}@{node(version)}" for symbol, version in taken(output) if version > GLIBC]
    still += [f"{symbol}@GLIBCXX_{version}" for symbol, version in newer_than_libstdcxx(output)]
    if still:
        raise BuildError(
            f"{library.name} must not need a glibc newer than 2.28 or a libstdc++ newer than GCC 8's, got "
            f"{' '.join(still)}; define it in {SOURCE.name} or do without it"
        )
    return output


def compile_torch_symbols(library: Library, functions: list[str], folder: Path, cxx: list[str]) -> Path:
    """The object that defines these functions of libtorch."""
    include = folder / f"{library.name}.symbols"
    include.mkdir(exist_ok=True)
    lines = (f"SYMBOL({index}, {name})\n" for index, name in enumerate(functions))
    (include / "ppo_torch_symbols.inc").write_text("".join(lines))
    output = include / f"{TORCH_SOURCE.name}.o"
    run_step(
        [*cxx, "-std=c++17", "-O2", "-fPIC", f"-I{include}", "-c", str(TORCH_SOURCE), "-o", str(output)], library.name
    )
    return output


def older(symbol: str, version: Version, cxx: tuple[str, ...]) -> tuple[str, Version]:
    """The library that had `symbol` in glibc 2.28, and the newest version of it there."""
    for soname in ("libc.so.6", "libm.so.6"):
        versions = [offered for offered in offers(soname, cxx).get(symbol, []) if offered <= GLIBC]
        if versions:
            moved = (old for name, old in MOVED.items() if version == MERGED and re.fullmatch(name, symbol))
            return next(moved, soname), max(versions)
    if version > GLIBC:
        raise BuildError(f"glibc 2.28 has no {symbol}; define it in {SOURCE.name} or do without it")
    return "another", version


def taken(library: Path) -> list[tuple[str, Version]]:
    """The symbols that `library` takes from glibc, each with the version that it asks for."""
    return [(symbol, version) for section, symbol, version in glibc_symbols(library) if section == "UND"]


def unversioned(library: Path) -> list[str]:
    """The functions that `library` takes from one that gives its symbols no versions: libtorch alone does not."""
    table = run_text(["readelf", "--dyn-syms", "--wide", str(library)])
    return re.findall(r"\sGLOBAL\s+DEFAULT\s+UND\s+(\w+)$", table, re.MULTILINE)


def newer_than_libstdcxx(library: Path) -> list[tuple[str, str]]:
    """The symbols that `library` takes from a libstdc++ that manylinux_2_28 does not have."""
    table = run_text(["readelf", "--dyn-syms", "--wide", str(library)])
    rows = re.findall(r"UND\s(\w+)@+GLIBCXX_([\d.]+)", table)
    return [(symbol, version) for symbol, version in rows if tuple(map(int, version.split("."))) > LIBSTDCXX]


@cache
def offers(soname: str, cxx: tuple[str, ...]) -> dict[str, list[Version]]:
    """The versions of each symbol in a library of the system that the compiler links for."""
    found: dict[str, list[Version]] = {}
    for section, symbol, version in glibc_symbols(Path(run_text([*cxx, f"-print-file-name={soname}"]).strip())):
        if section != "UND":
            found.setdefault(symbol, []).append(version)
    return found


def glibc_symbols(library: Path) -> list[tuple[str, str, Version]]:
    """(section, name, version) of each dynamic symbol that has a version of glibc."""
    table = run_text(["readelf", "--dyn-syms", "--wide", str(library)])
    rows = re.findall(r"\s(\S+)\s+(\w+)@+GLIBC_([\d.]+)", table)
    return [(section, name, tuple(map(int, version.split(".")))) for section, name, version in rows]


def make_stub(soname: str, symbols: dict[Version, list[str]], folder: Path, cxx: list[str]) -> Path:
    """A shared library that is called `soname` and has only these symbols, in these versions."""
    stub, source, script = (folder / f"old-{soname}{suffix}" for suffix in ("", ".s", ".map"))
    names = [name for group in symbols.values() for name in group]
    source.write_text("".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in names))
    script.write_text("".join(f"{node(version)} {{ {'; '.join(group)}; }};\n" for version, group in symbols.items()))
    command = [*cxx, "-shared", "-nostdlib", f"-Wl,-soname={soname},--version-script={script}", str(source)]
    run_step([*command, "-o", str(stub)], stub.name)
    return stub


def node(version: Version) -> str:
    return "GLIBC_" + ".".join(map(str, version))
