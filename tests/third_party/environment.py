"""The environment of the third-party runs: LLaMA-Factory with what it pins, TRL 0.9.6 beside it, and two edited copies.

LLaMA-Factory 0.9.5 pins trl 0.18 to 0.24 for its other stages, while its PPO stage is written for trl 0.8.6 to 0.9.6.
So the baseline's trl lies in a folder of its own, in front of the installed one on the path of the baseline's runs.
"""

import pathlib
import re
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# one set of versions that LLaMA-Factory, TRL 0.9.6 and ppo_ext all accept
PACKAGES = ["torch==2.13.0", "llamafactory==0.9.5", "transformers==4.57.6", "tensorboard", "rich"]
BASELINE = "trl==0.9.6"
# their wheels need CUDA's libraries even to be imported; the runs here read text only
UNUSED = ["torchvision", "torchaudio"]
OURS, TRL = "ppo_ext", "trl"
_IMPORT = re.compile(r"^(\s*)(from|import) trl\b", re.MULTILINE)
_VERSION_CHECK = '"trl>=0.8.6,<=0.9.6"'
# the stages that are not PPO or reward modelling need a newer trl than the baseline's
_OTHER_STAGES = re.compile(r"^from \.(dpo|kto) import .*\n", re.MULTILINE)


def make(folder):
    """Creates the environment once; returns its python."""
    python, done = folder / "venv" / "bin" / "python", folder / ".installed"
    if not done.exists() or done.read_text() != _recipe():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        print(f"installing LLaMA-Factory and what it needs into {folder}, once", flush=True)
        subprocess.run([*pip, *PACKAGES], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNUSED], check=True)
        subprocess.run([*pip, "--no-deps", "--target", folder / "baseline", BASELINE], check=True)
        done.write_text(_recipe())
    for library in (OURS, TRL):
        _copy(python, folder / f"on_{library}", library)
    return python


def search_path(folder, library):
    """PYTHONPATH of a run: the edited LLaMA-Factory, then ppo_ext from this clone or the baseline's trl."""
    return [folder / f"on_{library}", ROOT if library == OURS else folder / "baseline"]


def _recipe():
    return " ".join([*PACKAGES, BASELINE])


def _copy(python, target, library):
    """A copy of the installed LLaMA-Factory whose PPO and reward stages import `library`, without its version checks."""
    where = [
        python,
        "-c",
        "import importlib.util as u; print(u.find_spec('llamafactory').submodule_search_locations[0])",
    ]
    source = pathlib.Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target / "llamafactory", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (target / "llamafactory").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        changed = edited(text, path.relative_to(target / "llamafactory").as_posix(), library)
        if changed != text:
            path.write_text(changed, encoding="utf-8")


def edited(text, name, library):
    if name == "train/ppo/trainer.py":
        assert text.count(_VERSION_CHECK) == 1, f"{name}: LLaMA-Factory's version check is not where it was"
        text = text.replace(_VERSION_CHECK, '"transformers"')
    if name == "data/mm_plugin.py":
        text = text.replace("import torchaudio\n", "")
    if library == TRL:
        return _OTHER_STAGES.sub("", text) if name == "train/tuner.py" else text
    if name.startswith(("train/dpo/", "train/kto/", "train/sft/")):
        return text  # what is not PPO stays on the installed trl
    return _IMPORT.sub(r"\1\2 ppo_ext.trl", text)
