"""A whole demo run: the stages in order, the printed report, and what happens when a stage fails."""

import argparse
import os
import time
from collections.abc import Callable

import torch
import transformers

from . import ppo, report, settings, stages
from .corpus import build_corpus, python_reference, read_paragraphs
from .display import Display
from .folder import RunFolder
from .gold import GoldMetric, flesch_metric, load_scorer
from .plot import plot_curves


def run(options: argparse.Namespace) -> int:
    """Runs all stages; returns the exit status (see `cli.main`)."""
    display = Display()
    folder = None
    try:
        _prepare_torch()
        gold = load_scorer(options.scorer) if options.scorer else flesch_metric()
        paragraphs = read_paragraphs(options.corpus) if options.corpus else python_reference()
        folder = RunFolder(options.out, _arguments(options), options.overwrite, options.resume)
        return _run(options, gold, paragraphs, folder, display)
    except KeyboardInterrupt:
        display.error("demo: stopped by Ctrl-C")
        _print_what_is_kept(folder, display)
        return 130
    except (ValueError, FloatingPointError) as error:
        display.error(str(error))
        _print_what_is_kept(folder, display)
        return 2
    except OSError as error:
        display.error(f"demo: --out must stay readable and writable, got {error}")
        _print_what_is_kept(folder, display)
        return 2


def _run(
    options: argparse.Namespace, gold: GoldMetric, paragraphs: list[str], folder: RunFolder, display: Display
) -> int:
    sizes = settings.quick(options.seed) if options.quick else settings.full(options.seed)
    source = str(options.corpus) if options.corpus else "Python's language reference"
    corpus = build_corpus(paragraphs, sizes.vocab_size, sizes.held_out_fraction, sizes.seed)
    display.heading(f"ppo_ext demo, seed {options.seed}, into {folder.path}")
    display.note(f"text: {source}, {corpus.paragraphs} paragraphs, {len(corpus.train) + len(corpus.held_out)} tokens")
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
        _run_stage(f"{i}/{len(steps)}", name, title, stage, folder, display)
    return _finish(options, gold, folder, display)


def _run_stage(
    number: str, name: str, title: str, stage: Callable[[], dict], folder: RunFolder, display: Display
) -> None:
    display.heading(f"{number}  {title}")
    if name in folder.stages:
        display.note("kept from the earlier run (--resume)")
        return
    folder.drop_log(name)
    wall, cpu = time.perf_counter(), time.process_time()
    results = stage()
    # On a busy machine the two differ; only the processor time can be compared between runs.
    seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    folder.finish(name, results | seconds)


def _finish(options: argparse.Namespace, gold: GoldMetric, folder: RunFolder, display: Display) -> int:
    """Plot, samples, tables, summary and the gate."""
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


def _print_what_is_kept(folder: RunFolder | None, display: Display) -> None:
    if folder is None:
        display.note("nothing was written")
        return
    finished = ", ".join(folder.stages) or "none"
    display.note(f"{folder.path} keeps all that was written; finished stages: {finished}")
    display.note("go on with the same command and --resume, or start over with --overwrite")


def _arguments(options: argparse.Namespace) -> dict:
    """The arguments that must be the same when a run is resumed."""
    return {
        "seed": options.seed,
        "quick": options.quick,
        "corpus": str(options.corpus.resolve()) if options.corpus else None,
        "scorer": options.scorer,
    }


def _prepare_torch() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # at this size a second thread costs more in synchronisation than it saves
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the ops run on CPU and CUDA only; accelerate may choose others
