"""The command line: `python -m ppo_ext info` and `python -m ppo_ext demo`."""

import argparse
import importlib
import os
import sys

from . import __version__


def main(argv=None):
    """Runs one command of the package and returns its exit status; without a command prints the help and returns 2."""
    parser = argparse.ArgumentParser(prog="python -m ppo_ext", description="PPO for language models.")
    parser.add_argument("--version", action="version", version=f"ppo_ext {__version__}")
    parser.add_argument(
        "command",
        choices=("info", "demo"),
        help="info: what is installed and whether it works; demo: PPO on a language model",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="passed on; `<command> --help` lists them")
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help()
        return 2
    options = parser.parse_args(argv)
    return importlib.import_module(f"ppo_ext.{options.command}").main(options.arguments)


if __name__ == "__main__":
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as in `python -m ppo_ext info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would complain as it ends
        status = 1
    sys.exit(status)
