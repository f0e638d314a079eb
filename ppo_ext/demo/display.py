"""What the demo prints: progress bars with the time left, and one line per stage."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


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
    def bar(self, title: str, total: int):
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
