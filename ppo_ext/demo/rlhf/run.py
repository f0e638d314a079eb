"""A whole demo run: the stages in order, the printed report, and what happens when a stage fails."""

import argparse
from collections.abc import Callable

import torch
import transformers

from ..runner import Runner, prepare_torch
from . import ppo, report, settings, stages
from .corpus import build_corpus, python_reference, read_paragraphs
from .gold import GoldMetric, flesch_metric, load_scorer
from .plot import plot_curves

WRITTEN = (
    "metrics.jsonl", "pairs.jsonl", "samples", "samples.md", "curves.png", "summary.json", "sft_model", "reward_model",
    "ppo_model", "control_model",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs all stages; returns the exit status (see `cli.main`)."""
    runner = Runner()
    return runner.run(lambda: _run(options, runner))


def _run(options: argparse.Namespace, runner: Runner) -> int:
    prepare_torch(cpu_threads=1)
    display = runner.display
    sizes = settings.quick(options.seed) if options.quick else settings.full(options.seed)
    source = str(options.corpus) if options.corpus else "Python's language reference"
    display.heading(f"ppo_ext demo rlhf, seed {options.seed}, into {options.out}")
    gold = load_scorer(options.scorer) if options.scorer else flesch_metric()
    paragraphs = read_paragraphs(options.corpus) if options.corpus else python_reference()
    display.note(f"text: {source}, {len(paragraphs)} paragraphs")
    folder = runner.open_folder(options, WRITTEN, _arguments(options))
    corpus = build_corpus(paragraphs, sizes.vocab_size, sizes.held_out_fraction, sizes.seed, display)
    display.note(f"{len(corpus.train) + len(corpus.held_out)} tokens")
    display.note(f"labeller: a program that votes by {gold.name}, with noise")
    arguments = (corpus, sizes, gold, folder, display)
    steps: list[tuple[str, str, Callable[[], dict]]] = [
        ("sft", "SFT: a language model from scratch", lambda: stages.train_sft(corpus, sizes, folder, display)),
        ("pairs", "Preference pairs: which of two samples is better", lambda: stages.label_pairs(*arguments)),
        ("reward", "Reward model: learn to predict the votes",
         lambda: stages.train_reward_model(corpus, sizes, folder, display)),
        ("before", "Held-out samples before PPO", lambda: ppo.evaluate_sft(*arguments)),
        ("ppo", "PPO against the reward model, with an adaptive KL penalty", lambda: ppo.train_ppo(*arguments)),
    ]  # fmt: skip
    if options.control:
        steps.append(("control", "Control: PPO without the KL penalty", lambda: ppo.train_control(*arguments)))
    for i, (name, title, stage) in enumerate(steps, 1):
        runner.stage(f"{i}/{len(steps)}", name, title, stage)
    return _finish(options, gold, runner)


def _finish(options: argparse.Namespace, gold: GoldMetric, runner: Runner) -> int:
    """Plot, samples, tables, summary and the gate."""
    folder, display = runner.folder, runner.display
    done = {name: results for name, results in folder.stages.items() if name != "control" or options.control}
    control = folder.read_log("control") if "control" in done else []
    plot_curves(folder / "curves.png", folder.read_log("ppo"), control, done, gold.name)
    samples = report.write_samples(folder, done, gold.name)
    has_gate = not options.quick and not options.scorer and not options.corpus
    checks = report.gate(done) if has_gate else []
    passed = all(check.passed for check in checks)
    folder.write_json("summary.json", _summary(options, gold.name, done, checks, passed if has_gate else None))
    display.console.print()
    display.console.print(report.table(done, gold.name))
    display.console.print(report.seconds_table(done))
    report.print_samples(samples, display)
    if has_gate:
        display.heading("Gate")
        report.print_gate(checks, display)
    display.heading("Written")
    for name in ("curves.png", "samples.md", "summary.json", "ppo_model"):
        display.note(str(folder / name))
    return 0 if passed else 1


def _summary(
    options: argparse.Namespace, gold_name: str, done: dict, checks: list[report.Check], passed: bool | None
) -> dict:
    return {
        "arguments": _arguments(options),
        "gold": gold_name,
        "stages": done,
        "gate": {check.text: check.passed for check in checks},
        "passed": passed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _arguments(options: argparse.Namespace) -> dict:
    """What a resumed run has to share with the one it goes on from."""
    return {
        "demo": "rlhf",
        "seed": options.seed,
        "quick": options.quick,
        "corpus": str(options.corpus.resolve()) if options.corpus else None,
        "scorer": options.scorer,
    }
