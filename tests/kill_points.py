"""Kills processes while they step, save and resume, flips bits, and counts what is left: `python -m tests.kill_points`.

`--save` keeps the counts in bench/evidence/kill_points.json and renders kill_points.md from them; `--points` is the number
of kills of each operation. A process is killed by SIGKILL before a line of Python, or by SIGXFSZ while it writes a file,
at points that are spread over the operation.

What must hold: a folder has all that the last save before the kill wrote or all that the killed one wrote, bit for bit;
it loads, its tokenizer too; and the next save leaves nothing of the killed one there.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile

TESTS = pathlib.Path(__file__).parent
EVIDENCE = TESTS.parent / "bench/evidence"
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

import tiny_models  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from interruptions import STEP, Lines  # noqa: E402

import ppo_ext  # noqa: E402
from ppo_ext.models import checkpoint  # noqa: E402
from ppo_ext.trainer.resume import STATE_FILE  # noqa: E402

SAVE = ("ppo_ext/models", "ppo_ext/trainer", "transformers/modeling_utils", "transformers/tokenization")
WRITERS = (*SAVE, "transformers/configuration", "safetensors", "json/", "shutil", "contextlib")


def make(seed, extra_tokens=()):
    """A trainer whose weights follow from the seed. No process trains before it is forked: autograd would not allow it."""
    trainer = tiny_models.trainer(mini_batch_size=4, ppo_epochs=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainer.model.parameters():
        parameter.data.normal_(generator=generator)
    trainer.tokenizer.add_tokens(list(extra_tokens))
    return trainer


def forked(action):
    """Runs the action in a process of its own; returns its exit status, which is negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            random.seed(0)  # a fork seeds it anew
            action()
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_lines(action, packages):
    """Lines of Python that the action runs."""
    reader, writer = os.pipe()

    def counting():
        with Lines(packages=packages) as lines:
            action()
        os.write(writer, str(lines.count).encode())

    assert forked(counting) == 0
    os.close(writer)
    with open(reader) as file:
        return int(file.read())


def killed_at_line(action, line, packages):
    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def dying():
        with Lines(kill, line, packages):
            action()

    return forked(dying) == -signal.SIGKILL


def killed_at_byte(action, size):
    """The process dies when a file that it writes exceeds `size` bytes: the file is torn at that byte."""

    def dying():
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        action()

    return forked(dying) == -signal.SIGXFSZ


# ---- what a folder holds ---------------------------------------------------------------------------------------------


def run_content(folder):
    """The tensors of a saved run, checked by its digest."""
    checkpoint.check_digest(folder / STATE_FILE)
    return {name: x.numpy().tobytes() for name, x in checkpoint.read_tensors(folder / STATE_FILE).items()}


def model_content(folder):
    """The weights and the size of the tokenizer, loaded as users do; the README that a user wrote."""
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    weights = {name: x.numpy().tobytes() for name, x in model.state_dict().items()}
    return {**weights, "tokenizer": len(tokenizer), "readme": (folder / "README.md").read_text()}


# ---- operations ------------------------------------------------------------------------------------------------------


class Operation:
    """An operation on a folder that holds an old save: `run(folder)`; `content(folder)` reads what is there."""

    def __init__(self, name, run, content, packages, prepare):
        self.name, self.run, self.content, self.packages = name, run, content, packages
        self.prepared = [pathlib.Path(tempfile.mkdtemp()) for _ in prepare]
        for folder, write in zip(self.prepared, prepare, strict=True):
            assert forked(lambda folder=folder, write=write: write(folder)) == 0
        self.old = [content(folder) for folder in self.prepared]
        done = self._fresh(0)
        assert forked(lambda: run(done)) == 0
        self.new = content(done)
        self.largest = max(path.stat().st_size for path in done.rglob("*") if path.is_file())

    def _fresh(self, point):
        folder = pathlib.Path(tempfile.mkdtemp())
        return pathlib.Path(shutil.copytree(self.prepared[point // 2 % len(self.prepared)], folder, dirs_exist_ok=True))

    def kills(self, points, by_bytes=False):
        """Counts of what `points` kills have left."""
        counts = dict.fromkeys(("killed", "old", "new", "wrong", "unreadable", "left over"), 0)
        end = self.largest if by_bytes else count_lines(lambda: self.run(self._fresh(0)), self.packages)
        for point in range(points):
            folder = self._fresh(point)
            # every second one in the last tenth, where the files come to their places
            at = end * point // points if point % 2 == 0 else end * (9 * points + point) // (10 * points)
            kill = killed_at_byte if by_bytes else killed_at_line
            counts["killed"] += kill(
                lambda folder=folder: self.run(folder), at, *(() if by_bytes else (self.packages,))
            )
            counts[self._judge(folder, self.old[point // 2 % len(self.old)])] += 1
            checkpoint.write_json(folder / "next.json", {})
            counts["left over"] += any(name.startswith((".tmp-", ".new-")) for name in os.listdir(folder))
            shutil.rmtree(folder)
        return {
            "operation": f"{self.name}, killed while writing" if by_bytes else self.name,
            "points": points,
            **counts,
        }

    def _judge(self, folder, old):
        try:
            found = self.content(folder)
        except Exception as error:
            print(f"{self.name}: {type(error).__name__}: {error}", file=sys.stderr)
            return "unreadable"
        return "new" if found == self.new else "old" if found == old else "wrong"


def operations():
    """step with its save, resume, and save of one and of several files."""
    old, new = make(1), make(2, ["w_new"])
    batch = tiny_models.batch(4, 3)

    def step(folder):
        new.step(*batch)
        new.save_run(folder)

    def resume(folder):
        new.load_run(folder)
        step(folder)

    def save(trainer, **options):
        def run(folder):
            inner = trainer.accelerator.unwrap_model(trainer.model)
            whole = type(inner).save_pretrained
            inner.save_pretrained = lambda directory: whole(inner, directory, **options)
            trainer.save_pretrained(folder)

        return run

    def first(run):
        def prepare(folder):
            run(folder)
            (folder / "README.md").write_text("mine")

        return prepare

    sharded = {"max_shard_size": "20KB"}
    layouts = [first(save(old)), first(save(old, **sharded))]
    yield Operation("step and save_run", step, run_content, (*STEP, *WRITERS), [old.save_run])
    yield Operation("load_run, step and save_run", resume, run_content, (*STEP, *WRITERS), [old.save_run])
    yield Operation("save_pretrained", save(new), model_content, WRITERS, layouts)
    yield Operation("save_pretrained in shards", save(new, **sharded), model_content, WRITERS, layouts)


def flipped_bits(flips):
    """Counts of single bits of a saved run that were flipped, and of those that `load_run` has refused."""
    trainer, folder, draw = make(1), pathlib.Path(tempfile.mkdtemp()), random.Random(0)
    trainer.save_run(folder)
    whole, before, refused = (folder / STATE_FILE).read_bytes(), tiny_models.weights(trainer), 0
    for _ in range(flips):
        flipped = bytearray(whole)
        flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        (folder / STATE_FILE).write_bytes(flipped)
        try:
            trainer.load_run(folder)
        except ValueError as error:
            refused += STATE_FILE in str(error)
    tiny_models.assert_unmoved(before, trainer)
    return {"flips": flips, "refused": refused}


# ---- the page --------------------------------------------------------------------------------------------------------


def render(counts):
    stamp, rows, flips = counts["stamp"], counts["rows"], counts["flipped bits"]
    columns = ("points", "killed", "old", "new", "wrong", "unreadable", "left over")
    total = {column: sum(row[column] for row in rows) for column in columns}
    lines = [
        f"{total['points']} points at which a process was to be killed: {total['wrong']} folders with wrong bits, "
        f"{total['unreadable']} unreadable, {total['left over']} with something left after the next save. Of "
        f"{flips['flips']} single bits flipped in a saved run, `load_run` refused {flips['refused']}. {stamp['date']}, "
        f"commit {stamp['commit']}, torch {stamp['torch']}, {stamp['device']}. Written by "
        "`python -m tests.kill_points --save`.",
        "",
        "| operation | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
        *(f"| {row['operation']} | " + " | ".join(str(row[column]) for column in columns) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.kill_points", description=__doc__)
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--save", nargs="?", type=pathlib.Path, const=EVIDENCE, metavar="FOLDER")
    options = parser.parse_args()
    from bench import machine

    transformers.utils.logging.disable_progress_bar()
    rows = []
    for operation in operations():
        for by_bytes in (False, True):
            rows.append(operation.kills(options.points // (2 if by_bytes else 1), by_bytes))
            print(rows[-1], flush=True)
    counts = {
        "stamp": machine.stamp(torch.device("cpu")),
        "rows": rows,
        "flipped bits": flipped_bits(options.flips),
    }
    print(render(counts))
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "kill_points.json").write_text(json.dumps(counts, indent=1) + "\n")
        (options.save / "kill_points.md").write_text(render(counts))
    faults = sum(row["wrong"] + row["unreadable"] + row["left over"] for row in rows)
    return int(faults > 0 or counts["flipped bits"]["refused"] < options.flips)


if __name__ == "__main__":
    sys.exit(main())
