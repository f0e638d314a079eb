"""`python -m ppo_ext demo`: SFT, preference pairs, reward model and PPO on real text, offline, in minutes."""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

EPILOG = """\
The labeller takes the place of people: it votes by Flesch reading ease with noise, so the result can be judged by the
same formula. PPO only sees the reward model. A second run into the same folder is refused unless --overwrite (start
over) or --resume (keep the finished stages) is given."""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ppo_ext demo", description=__doc__, epilog=EPILOG)
    parser.add_argument("--out", type=Path, default=Path("ppo_ext_demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="UTF-8 text instead of Python's reference")
    parser.add_argument(
        "--scorer", metavar="MODULE:FUNCTION",
        help="the gold metric instead of Flesch reading ease: text -> number, or list of texts -> list of numbers",
    )  # fmt: skip
    parser.add_argument(
        "--control", action=argparse.BooleanOptionalAction, default=True,
        help="also run PPO without a KL penalty, for comparison (default: yes)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="every stage in seconds; without the gate")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    again.add_argument("--resume", action="store_true", help="keep the finished stages of an earlier run in --out")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo. Exit status: 0; 1 if the gate fails; 2 after an error, which is printed; 130 after Ctrl-C."""
    options = parse(argv)
    missing = [name for name in ("rich", "matplotlib") if not _installed(name)]
    if missing:
        print(f"demo: {' and '.join(missing)} must be installed; run: pip install 'ppo_ext[demo]'", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .run import run  # after the settings above, as it imports torch

    return run(options)


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**31:
        raise argparse.ArgumentTypeError(f"must be in [0, 2^31), got {seed}")
    return seed


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
