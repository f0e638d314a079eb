"""What the demos share around their stages: the output folder, the times, and what happens when something fails."""

import argparse
import os
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from safetensors import SafetensorError

from .display import Display
from .folder import RunFolder


class Runner:
    """Runs the stages of a demo one after another, each once, and turns a failure into one sentence."""

    def __init__(self) -> None:
        self.display = Display()
        self._folder: RunFolder | None = None

    @property
    def folder(self) -> RunFolder:
        """The output folder, once `open_folder` has taken it into use."""
        assert self._folder is not None
        return self._folder

    def run(self, work: Callable[[], int]) -> int:
        """Returns the exit status of `work`, or 2 for an error that was said, or 130 after Ctrl-C."""
        try:
            return work()
        except KeyboardInterrupt:
            self.display.error("demo: stopped by Ctrl-C")
            self._say_what_is_left()
            return 130
        except (ValueError, FloatingPointError) as error:
            self.display.error(str(error))
        except (OSError, SafetensorError) as error:  # a full disk is an OSError for Python, not for safetensors
            self.display.error(f"demo: --out must stay readable and writable, got {error}")
        self._say_what_is_left()
        return 2

    def open_folder(self, options: argparse.Namespace, written: tuple[str, ...], arguments: dict) -> RunFolder:
        """Takes the output folder into use; see `RunFolder`."""
        self._folder = RunFolder(options.out, arguments, options.overwrite, options.resume, written)
        return self._folder

    def stage(self, number: str, name: str, title: str, work: Callable[[], dict], goes_on: bool = False) -> None:
        """Runs one stage and records its results and times, unless an earlier run finished it.

        goes_on: the stage itself continues an interrupted attempt; else what that attempt logged is removed first.
        """
        self.display.heading(f"{number}  {title}")
        if name in self.folder.stages:
            self.display.note("kept from the earlier run (--resume)")
            return
        if not goes_on:
            self.folder.drop_log(name)
        wall, cpu = time.perf_counter(), time.process_time()
        results = work()
        # On a busy machine the two differ; the processor time is the one that compares between runs.
        seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        self.folder.finish(name, results | seconds)

    def _say_what_is_left(self) -> None:
        if self._folder is None:
            self.display.note("nothing was written")
            return
        finished = ", ".join(self.folder.stages) or "none"
        self.display.note(f"{self.folder.path} keeps all that was written; finished stages: {finished}")
        self.display.note("go on with the same command and --resume, or start over with --overwrite")


def prepare_torch(cpu_threads: int | None = None) -> None:
    """Quiet transformers; CPU unless there is CUDA.

    cpu_threads: None leaves torch's number. A tiny model is faster on one thread than with waiting for a second.
    """
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between peft and transformers, none of ours
    transformers.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        if cpu_threads is not None:
            torch.set_num_threads(cpu_threads)
        os.environ["ACCELERATE_USE_CPU"] = "true"  # the ops run on CPU and CUDA; keep accelerate off other devices
