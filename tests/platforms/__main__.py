"""The long checks of where the package builds and runs.

headers    checks the CPU library's sources against the oldest torch's headers; a minute, in every CI run
compilers  compiles them against the oldest and the newest
wheel      asks auditwheel on which Linux the wheel runs
torches    runs the op tests of one wheel on four versions of torch, and installs the sources there
aarch64    cross-compiles both libraries and runs some cases of each op test under emulation
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from . import compilers, packages, pages, torches  # noqa: E402
from .aarch64 import check_aarch64  # noqa: E402
from .wheels import check_wheel  # noqa: E402


def compile_sources(options, versions, syntax_only):
    """Every source against the headers of each torch, by each compiler."""
    for version in versions:
        for cxx in options.compiler:
            yield compilers.check_compiler(packages.fetch_torch(version), cxx, syntax_only)


def run_torches(options):
    for version in torches.versions():
        compilers = options.compiler if version == packages.OLDEST else options.compiler[:1]
        yield torches.check_torch(version, options.wheel, compilers, options.keep)


CHECKS = {
    "headers": lambda options: compile_sources(options, [packages.OLDEST], syntax_only=True),
    "compilers": lambda options: compile_sources(options, [packages.OLDEST, packages.newest_version()], False),
    "wheel": lambda options: [check_wheel(options.wheel)],
    "torches": run_torches,
    "aarch64": lambda options: check_aarch64(),
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.platforms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="+", choices=tuple(CHECKS))
    parser.add_argument(
        "--wheel",
        type=lambda name: pathlib.Path(name).resolve(),
        help="the wheel that is looked at, and whose op tests run on every torch",
    )
    parser.add_argument("--compiler", action="append", help="for the headers, instead of g++; may be repeated")
    parser.add_argument("--keep", action="store_true", help="keep each torch's environment, 5 to 7 GB")
    parser.add_argument("--save", action="store_true", help="keep the tables in bench/evidence/platforms.*")
    options = parser.parse_args(argv)
    options.compiler = options.compiler or ["g++"]
    for name in {"wheel", "torches"}.intersection(options.checks):
        if options.wheel is None:
            parser.error(f"{name} needs --wheel; make torch-versions builds one")
    failed = False
    for name in options.checks:
        rows = []
        for row in CHECKS[name](options):
            print(json.dumps(row), flush=True)
            rows.append(row)
            failed |= bool(row["failures"])
            if options.save:  # each time, as a check may take hours
                pages.save(name, rows)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
