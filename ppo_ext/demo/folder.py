"""The output folder of a run: its files, which stages are finished, and the log of metrics."""

import json
import math
import os
import shutil
from pathlib import Path

RECORD = "run.json"


class RunFolder:
    """Everything a run writes, under one path.

    run.json holds the arguments and the results of each finished stage; a stage is added after its files are written.

    Args:
        arguments: what decides the results; `resume` refuses a folder that was made with other arguments.
        written: names of all that a run writes and that an overwriting run deletes first.
        overwrite: delete an earlier run's files first. Files that the demo does not write are never touched.
        resume: keep the finished stages of an earlier run.
    Raises:
        ValueError: the folder holds a run and neither flag is given, cannot be written, or does not match on resume.
    """

    def __init__(
        self,
        path: Path,
        arguments: dict,
        overwrite: bool = False,
        resume: bool = False,
        written: tuple[str, ...] = (),
    ):
        self.path = path
        self.stages: dict[str, dict] = {}
        self.arguments = arguments
        if path.is_file():
            raise ValueError(f"demo: --out must be a folder, got the file {path}")
        try:
            path.mkdir(parents=True, exist_ok=True)
            found = [name for name in (RECORD, *written) if (path / name).exists()]
            if found and resume:
                self._resume()
            elif found and not overwrite:
                raise ValueError(
                    f"demo: --out must be a folder without an earlier run, got {path} with {', '.join(found)}; "
                    "pass --overwrite to replace them, --resume to go on from them, or another --out"
                )
            else:
                for name in found:
                    _delete(path / name)
            self._write_record()
        except OSError as error:
            raise ValueError(f"demo: --out must be a writable folder, got {path} ({error.strerror})") from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def finish(self, stage: str, results: dict) -> dict:
        """Records a finished stage, so that an interrupted run can go on after it."""
        self.stages[stage] = results
        self._write_record()
        return results

    def log(self, stage: str, record: dict) -> None:
        """Appends one line to metrics.jsonl; it is on disk when this returns."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage} | record) + "\n")

    def drop_log(self, stage: str, after: int = 0) -> None:
        """Removes what an interrupted attempt at this stage logged after a step; the default removes all of it."""
        kept = [r for r in self.read_log() if r["stage"] != stage or r.get("step", math.inf) <= after]
        self._replace("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))

    def read_log(self, stage: str | None = None) -> list[dict]:
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]  # a killed process can leave half a line at the end
        records = [json.loads(line) for line in lines]
        return [record for record in records if stage is None or record["stage"] == stage]

    def write_samples(self, stage: str, prompts: list[str], texts: list[str], **scores: list[float]) -> None:
        """All held-out samples of one policy with their scores, as samples/<stage>.jsonl."""
        (self.path / "samples").mkdir(exist_ok=True)
        rows = [
            {"prompt": prompt, "response": text} | {name: values[i] for name, values in scores.items()}
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        ]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (self.path / "samples" / f"{stage}.jsonl").write_text("".join(lines), encoding="utf-8")

    def read_samples(self, stage: str) -> list[dict]:
        lines = (self.path / "samples" / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def write_json(self, name: str, content: dict) -> None:
        self._replace(name, json.dumps(content, indent=2) + "\n")

    def _resume(self) -> None:
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            earlier, stages = record["arguments"], record["stages"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"demo: --resume must find a readable {RECORD}, got {self.path} ({error})") from error
        differences = [
            f"{name} {earlier.get(name)!r} before and {value!r} now"
            for name, value in self.arguments.items()
            if earlier.get(name) != value
        ]
        if differences:
            raise ValueError(f"demo: --resume must get the arguments of the earlier run, got {'; '.join(differences)}")
        self.stages = stages

    def _write_record(self) -> None:
        self.write_json(RECORD, {"arguments": self.arguments, "stages": self.stages})

    def _replace(self, name: str, text: str) -> None:
        # Written to another file that is then renamed: an interruption leaves the old file or the new one, not a part.
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
