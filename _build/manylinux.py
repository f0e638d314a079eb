"""Link a library so that it runs on every Linux with glibc 2.28, whatever glibc this machine has (PPO_EXT_MANYLINUX=1).

A linker takes the newest version of each symbol that it finds: `exp@GLIBC_2.29`, `dlsym@GLIBC_2.34`. glibc keeps the older
versions beside them for programs that were linked long ago. So a library is linked twice. The first time shows which of
its symbols are too new; the second time stand-ins for the libraries that hold these come before the system's own. They
offer the old versions of what is used and nothing else. The loader never sees them: it reads names and versions only.
What has no older version is defined in newer_symbols.cpp.
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


def relink(library: Library, built: Path, cxx: list[str]) -> Path:
    """Link `built` again, from the objects beside it, to the old versions of what it takes from glibc."""
    homes: dict[str, dict[Version, list[str]]] = {}  # library: {version: symbols}
    too_new = set()
    for symbol, version in taken(built):
        soname, old = older(symbol, version, tuple(cxx))
        homes.setdefault(soname, {}).setdefault(old, []).append(symbol)
        if version > GLIBC:
            too_new.add(soname)
    stubs = [make_stub(soname, homes[soname], built.parent, cxx) for soname in sorted(too_new)]
    between = ["-Wl,--push-state,--no-as-needed", *map(str, stubs), "-Wl,--pop-state"]
    objects = [str(built.parent / source.object) for source in library.sources]
    output = built.with_suffix(f".{TAG}.so")
    run_step([*library.link, *objects, "-o", str(output), *between, *library.libraries], library.name)
    still = [f"{symbol}@{node(version)}" for symbol, version in taken(output) if version > GLIBC]
    still += [f"{symbol}@GLIBCXX_{version}" for symbol, version in newer_than_libstdcxx(output)]
    if still:
        raise BuildError(
            f"{library.name} must not need a glibc newer than 2.28 or a libstdc++ newer than GCC 8's, got "
            f"{' '.join(still)}; define it in {SOURCE.name} or do without it"
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
