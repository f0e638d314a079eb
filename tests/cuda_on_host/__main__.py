"""Tests on the CUDA kernels without a GPU: `python -m tests.cuda_on_host tests/test_gae.py`, and arguments for pytest."""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile

from . import build


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_on_host", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws the order of the threads (default: %(default)s)")
    options, arguments = parser.parse_known_args()
    if build.missing() is not None:
        sys.exit(f"cuda_on_host: {build.missing()}")
    arguments = [os.path.abspath(x) if os.path.exists(x.partition("::")[0]) else x for x in arguments]
    with tempfile.TemporaryDirectory() as folder:
        package = build.package(pathlib.Path(folder))
        # no configuration file: pytest's would put this checkout's own package first
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", "-c", os.devnull]
        command += ["--rootdir", str(build.HERE.parent), *arguments]
        return subprocess.run(command, cwd=package, env=build.environment(package, options.seed)).returncode


if __name__ == "__main__":
    sys.exit(main())
