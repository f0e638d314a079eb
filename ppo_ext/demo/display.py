"""What the demo prints: progress bars with the time left, and one line per stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from .folder import RunFolder


class Display:
    """A rich console; on a terminal the bars move, in a log only their end state is printed."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)

    def heading(self, text: str) -> None:
        self.console.print(f"\n[bold]{text}[/bold]")

    def note(self, text: str) -> None:
        self.console.print(f"  {text}", markup=False)

    def error(self, text: str) -> None:
        self.console.print(text, style="red", markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[..., None]]:
        """Yields advance(text="", by=1), to be called as the work gets done."""
        columns = (
            TextColumn("  {task.description:<22}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total, text="")
            yield lambda text="", by=1: progress.update(task, advance=by, text=text)


class ProgressCallback(TrainerCallback):
    """Advances a bar of `Display` by one for each update of a transformers.Trainer, and logs the update to the folder.

    Args:
        stage: under which name metrics.jsonl has the records.
        advance: from `Display.bar`.
    """

    def __init__(self, stage: str, folder: RunFolder, advance: Callable[..., None]):
        self.stage, self.folder, self.advance = stage, folder, advance

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:  # an update's record; there are others for evaluation and for the end
            record = {"step": state.global_step, "steps": state.max_steps}
            self.folder.log(self.stage, record | {name: logs[name] for name in ("loss", "learning_rate")})
            self.advance(f"loss {logs['loss']:.3f}")
