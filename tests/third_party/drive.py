"""LLaMA-Factory's runs, inside the environment: `python drive.py JOBS.json`.

jobs: a list of {settings, fields, autocast, nudge, float32_value_head, record, log}. Importing LLaMA-Factory takes longer
than a run does, so it is imported once, and each run is a fork of that process. Beside running it, this keeps each step's
loss unrounded, while LLaMA-Factory logs four digits.
"""

import contextlib
import gc
import json
import os
import sys
import traceback

import torch


def record_ppo_steps(steps, job):
    from llamafactory.train.ppo import workflow

    trainer_class = workflow.CustomPPOTrainer
    construct, step, advantages_of = trainer_class.__init__, trainer_class.step, trainer_class.compute_advantages

    def constructed(self, *arguments, **options):
        construct(self, *arguments, **options)
        if not job["autocast"]:
            self.amp_context = contextlib.nullcontext()

    def recorded(self, queries, responses, scores, **options):
        for name, value in job["fields"].items():
            setattr(self.config, name, value)
        stats = step(self, queries, responses, scores, **options)
        scalars = {name: float(value) for name, value in stats.items() if getattr(value, "size", 1) == 1}
        tokens = [[*query.tolist(), *response.tolist()] for query, response in zip(queries, responses)]
        steps.append({"loss": scalars["ppo/loss/total"], "stats": scalars, "tokens": tokens})
        return stats

    def nudged(self, *arguments, **options):
        values, advantages, returns = advantages_of(self, *arguments, **options)
        return values, advantages * (1 + job["nudge"]), returns

    trainer_class.__init__, trainer_class.step = constructed, recorded
    if job["nudge"]:
        trainer_class.compute_advantages = nudged


def keep_value_head_in_float32():
    from trl.models.modeling_value_head import ValueHead

    forward = ValueHead.forward

    def without_autocast(self, hidden_states):
        with torch.autocast(hidden_states.device.type, enabled=False):
            return forward(self, hidden_states)

    ValueHead.forward = without_autocast


def record_reward_losses(steps):
    from llamafactory.train.rm import trainer

    compute_loss = trainer.PairwiseTrainer.compute_loss

    def recorded(self, *arguments, **options):
        result = compute_loss(self, *arguments, **options)
        steps.append({"loss": float(result[0] if isinstance(result, tuple) else result)})
        return result

    trainer.PairwiseTrainer.compute_loss = recorded


def run(job):
    """One run; its steps, and its error if it ends in one, go to job["record"]."""
    from llamafactory.train.tuner import run_exp

    steps, error = [], None
    try:
        if job["float32_value_head"]:
            keep_value_head_in_float32()
        if job["settings"]["stage"] == "ppo":
            record_ppo_steps(steps, job)
        else:
            record_reward_losses(steps)
        run_exp(job["settings"])
    except BaseException as raised:
        traceback.print_exc()
        text = " ".join(str(raised).split())
        error = f"{type(raised).__name__}: {text if len(text) < 300 else '... ' + text[-300:]}"
    with open(job["record"], "w", encoding="utf-8") as file:
        json.dump({"steps": steps, "error": error}, file)


def in_a_fork(job):
    process = os.fork()
    if process == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            run(job)
        finally:
            os._exit(0)
    os.waitpid(process, 0)


def main(jobs_path):
    with open(jobs_path, encoding="utf-8") as file:
        jobs = json.load(file)
    import llamafactory.train.tuner  # noqa: F401

    gc.freeze()  # LLaMA-Factory collects garbage in every forward pass; what the imports have made is none
    for job in jobs:
        in_a_fork(job)


if __name__ == "__main__":
    main(sys.argv[1])
