"""The long checks of where the package builds and runs.

headers   compiles the CPU library against the oldest torch's headers; a minute, in every CI run
torches   compiles it against the oldest and the newest, and runs the op tests of one wheel on four versions of torch
aarch64   cross-compiles both libraries and runs the op tests under emulation
"""

import argparse
import json
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))

from bench import machine  # noqa: E402

from . import compilers, packages, pages, torches  # noqa: E402
from .aarch64 import check_aarch64  # noqa: E402

EVIDENCE = packages.ROOT / "bench" / "evidence"


def headers(options):
    """Every source against the headers of each torch, by each compiler."""
    oldest_only = "torches" not in options.checks
    for version in [packages.OLDEST] if oldest_only else [packages.OLDEST, packages.newest_version()]:
        for cxx in options.compiler:
            yield compilers.check_compiler(packages.fetch_torch(version), cxx, syntax_only=oldest_only)


def run_checks(options):
    """{name of a table: its rows}, printed as they come."""
    report = {}
    checks = {
        "headers": lambda: headers(options),
        "torches": lambda: (torches.check_torch(v, options.wheel, options.keep) for v in torches.versions()),
        "aarch64": check_aarch64,
    }
    for name, check in checks.items():
        if name in options.checks or (name == "headers" and "torches" in options.checks):
            report[name] = []
            for row in check():
                print(json.dumps(row), flush=True)
                report[name].append(row)
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m tests.platforms", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checks", nargs="+", choices=("headers", "torches", "aarch64"))
    parser.add_argument("--wheel", type=pathlib.Path, help="the wheel whose op tests run on every torch")
    parser.add_argument("--compiler", action="append", help="for the headers, instead of g++; may be repeated")
    parser.add_argument("--keep", action="store_true", help="keep each torch's environment, 5 to 7 GB")
    parser.add_argument("--save", action="store_true", help="keep the tables in bench/evidence/platforms.*")
    options = parser.parse_args(argv)
    options.compiler = options.compiler or ["g++"]
    if "torches" in options.checks and options.wheel is None:
        parser.error("torches needs --wheel; make torch-versions builds one")
    report = run_checks(options)
    failures = [failure for rows in report.values() for row in rows for failure in row["failures"]]
    if options.save:
        path = EVIDENCE / "platforms.json"
        kept = json.loads(path.read_text()) if path.exists() else {}
        kept.update(report, stamp=machine.stamp(torch.device("cpu")))
        path.write_text(json.dumps(kept, indent=1) + "\n")
        (EVIDENCE / "platforms.md").write_text(pages.markdown(kept))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
