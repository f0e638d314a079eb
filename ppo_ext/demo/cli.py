"""`python -m ppo_ext demo`: PPO on a pretrained language model, offline, in minutes; `demo rlhf`: the whole procedure."""

import argparse
import os
import sys
from pathlib import Path

from . import requirements

SENTIMENT = """\
PPO teaches SmolLM2-135M-Instruct, with a LoRA adapter, to continue neutral openings of reviews in a friendly way. The
reward is VADER's sentiment score. What the result is judged by, PPO never sees: a model of how people rated sentences."""
RLHF = """\
SFT of a small model from scratch on real text, preference pairs, a reward model, PPO against it. The labeller takes
the place of people: it votes by Flesch reading ease with noise, so the result can be judged by the same formula. PPO only
sees the reward model."""
AGAIN = """\
A second run into the same folder is refused unless --overwrite (start over) or --resume (go on) is given."""


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of `demo` or, if the first argument says so, of `demo rlhf`."""
    if argv[:1] == ["rlhf"]:
        parser = _parser("python -m ppo_ext demo rlhf", RLHF)
        parser.add_argument("--corpus", type=Path, metavar="FILE", help="UTF-8 text instead of Python's reference")
        parser.add_argument(
            "--scorer", metavar="MODULE:FUNCTION",
            help="the gold metric instead of Flesch reading ease: text -> number, or list of texts -> list of numbers",
        )  # fmt: skip
        _add_control(parser, default=True)
        return parser.parse_args(argv[1:], argparse.Namespace(kind="rlhf", model=None))
    parser = _parser("python -m ppo_ext demo", SENTIMENT, " `demo rlhf` is another demo; see `demo rlhf --help`.")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a causal language model instead of SmolLM2")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="UTF-8 text with one opening per line as prompts")
    parser.add_argument(
        "--scorer", metavar="MODULE:FUNCTION",
        help="the reward instead of VADER: text -> number, or list of texts -> list of numbers",
    )  # fmt: skip
    _add_control(parser, default=False)
    return parser.parse_args(argv, argparse.Namespace(kind="sentiment"))


def main(argv: list[str] | None = None) -> int:
    """Runs a demo. Returns 0, or 1 if the pass gate fails, 2 after an error that was said, 130 after Ctrl-C."""
    options = parse(sys.argv[1:] if argv is None else argv)
    missing = requirements.missing(options)
    if missing:
        print(f"demo: {missing}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # imported after the settings above, as they import torch
    if options.kind == "rlhf":
        from .rlhf.run import run
    else:
        from .sentiment.run import run
    return run(options)


def _parser(program: str, description: str, more: str = "") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program, description=description, epilog=AGAIN + more)
    parser.add_argument("--out", type=Path, default=Path("ppo_ext_demo"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="every stage in seconds, on a tiny model; no pass gate")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--overwrite", action="store_true", help="replace what an earlier run left in --out")
    again.add_argument("--resume", action="store_true", help="go on with an earlier run in --out where it stopped")
    return parser


def _add_control(parser: argparse.ArgumentParser, default: bool) -> None:
    parser.add_argument(
        "--control", action=argparse.BooleanOptionalAction, default=default,
        help=f"also run PPO without a KL penalty, for comparison (default: {'yes' if default else 'no'})",
    )  # fmt: skip


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to 2147483647, got {text!r}")
    return int(text)
