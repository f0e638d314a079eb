"""All checks and measurements that need a GPU, in one command: builds or takes a wheel, runs the tests on the device,
compute-sanitizer and the benchmarks, the most important first, each step with a time limit of its own.

It needs an environment with torch and this checkout, and no network. A step whose tool is not installed is reported as
missing. The summary is written after every step, so that a run that is stopped keeps its results:

    summary.md, summary.json   step, result, seconds, the first failure; device, driver, torch, commit and date
    results.jsonl              the rows of the benchmarks
    run.tar.gz                 a log for each step, and results/ in the layout of bench/results
"""

import argparse
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from .gpu_steps import ROOT, STEPS, Result, run

_RESERVE_SECONDS = 3  # kept for writing the last summary
_SHORTEST_SECONDS = 5  # no step can do anything in less time
_FACTS = """
import importlib.util, json, platform, torch
cuda = torch.cuda.is_available()
wanted = ("pytest", "hypothesis", "trl", "transformers", "accelerate", "peft", "matplotlib", "pybind11")
print(json.dumps({"device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
                  "capability": ".".join(map(str, torch.cuda.get_device_capability())) if cuda else "",
                  "torch": torch.__version__, "torch_cuda": torch.version.cuda, "python": platform.python_version(),
                  "missing_modules": [name for name in wanted if importlib.util.find_spec(name) is None]}))
"""


# ---- before the steps -----------------------------------------------------------------------------------------------


def facts(environment, commit):
    """The device, driver, versions, commit and date of a run."""
    asked = subprocess.run([sys.executable, "-c", _FACTS], env=environment, capture_output=True, text=True)
    found = json.loads(asked.stdout) if asked.returncode == 0 else {"device": "unknown", "torch": "cannot be imported"}
    driver = _output("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader")
    commit = commit or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    return {
        **found,
        "driver": driver or "none",
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
    }


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def take_wheel(wheel, package=ROOT / "ppo_ext"):
    """Puts the libraries of a wheel where an in-place build would put them."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"ppo_ext/(_C_\w+\.so|_build_info\.json)", name)]
        for name in names:
            (package / Path(name).name).write_bytes(archive.read(name))
    return Result(
        "build", "passed" if names else "failed", note=f"{', '.join(names) or 'no library'} from {wheel.name}"
    )


def carried_packages(folder, scratch):
    """The folder from which to import packages that were brought along: `folder` itself or, if it holds wheels, an
    installation of them."""
    wheels = sorted(map(str, folder.glob("*.whl")))
    if not wheels:
        return folder.resolve()
    target = scratch / "packages"
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--target", str(target)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *wheels], check=True)
    return target


def environment_of(options, scratch):
    """The environment variables of the steps. On PYTHONPATH the checkout is first, then the packages that were brought
    along."""
    path = [str(ROOT), *([str(carried_packages(options.packages, scratch))] if options.packages else [])]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PPO_EXT_TEST_DEVICE": options.device,
        "PYTHONUNBUFFERED": "1",
    }
    if options.device == "cuda":
        environment |= {"PPO_EXT_REQUIRE_NATIVE": "1", "PPO_EXT_CUDA": "1"}
    return environment


# ---- after each step ------------------------------------------------------------------------------------------------


def write_summary(out, scratch, stamp, results):
    """Writes summary.json, summary.md, results.jsonl and run.tar.gz. Each file is replaced as a whole, never half
    written."""
    head = "".join(f"- {name}: {value}\n" for name, value in stamp.items())
    lines = "".join(f"| {r.step} | {r.result} | {r.seconds:.0f} | {r.note.replace('|', '/')} |\n" for r in results)
    table = "| step | result | seconds | what failed first, or the last line |\n| --- | --- | --- | --- |\n" + lines
    _replace(out / "summary.md", f"# A run on {stamp['device']}\n\n{head}\n{table}")
    _replace(
        out / "summary.json", json.dumps({**stamp, "steps": [dataclasses.asdict(r) for r in results]}, indent=1) + "\n"
    )
    rows = "".join(path.read_text() for path in sorted(scratch.glob("results/*/*.jsonl")))
    if rows:
        _replace(out / "results.jsonl", rows)
    with tarfile.open(out / "run.tar.gz.new", "w:gz") as archive:
        for name in ("logs", "results"):
            if (scratch / name).exists():
                archive.add(scratch / name, name)
    os.replace(out / "run.tar.gz.new", out / "run.tar.gz")


def _replace(path, text):
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


# ---- the run --------------------------------------------------------------------------------------------------------


def results_of(steps, options, scratch, deadline, environment):
    """Runs the steps in order while there is time; yields their Results."""
    places = {"{device}": options.device, "{results}": str(scratch / "results")}
    unmet = ""
    for step in steps:
        seconds = min(step.seconds, deadline - time.monotonic() - _RESERVE_SECONDS)
        if unmet or (step.gpu_only and options.device != "cuda"):
            result = Result(step.name, "skipped", note=unmet or "needs a GPU")
        elif seconds < min(_SHORTEST_SECONDS, step.seconds):
            result = Result(step.name, "skipped", note="no time is left")
        elif step.name == "build" and options.wheel:
            result = take_wheel(options.wheel)
        else:
            print(f"{step.name}: at most {seconds:.0f} s", flush=True)
            result = run(step, places, seconds, scratch / f"logs/{step.name}.log", environment)
        if step.required and result.result != "passed":
            unmet = unmet or f"{step.name}: {result.result}"
        yield result


def _options(argv, names):
    parser = argparse.ArgumentParser(
        prog="bench/on_gpu.sh", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of the whole run; default 9")
    parser.add_argument("--wheel", type=Path, help="take the libraries of this wheel instead of building")
    parser.add_argument(
        "--packages", type=Path, help="folder of wheels, or of packages, that torch's environment lacks"
    )
    parser.add_argument("--steps", type=lambda text: text.split(","), default=names, help=f"some of {','.join(names)}")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a rehearsal, without the steps that need a GPU"
    )
    parser.add_argument("--commit", help="what to record where the checkout comes without its history")
    options = parser.parse_args(argv)
    if set(options.steps) - set(names):
        parser.error(f"--steps must be some of {','.join(names)}, got {','.join(options.steps)}")
    return options


def main(argv=None, steps=STEPS):
    """Runs the chosen steps; returns exit status 1 if one failed or exceeded its time."""
    start = time.monotonic()
    options = _options(argv, [step.name for step in steps])
    options.out.mkdir(parents=True, exist_ok=True)
    # so that `finally` ends the running step and writes the summary
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch, stamp, results = Path(tempfile.mkdtemp(prefix="on_gpu-")), {"device": "unknown"}, []
    try:
        (scratch / "logs").mkdir()
        environment = environment_of(options, scratch)
        stamp = facts(environment, options.commit)
        environment |= {"PPO_EXT_COMMIT": stamp["commit"]}
        if stamp.get("capability"):
            environment |= {"TORCH_CUDA_ARCH_LIST": stamp["capability"]}  # builds for this device only, to save time
        chosen = [step for step in steps if step.name in options.steps]
        for result in results_of(chosen, options, scratch, start + 60 * options.minutes, environment):
            results.append(result)
            print(f"{result.step}: {result.result} after {result.seconds:.0f} s; {result.note}", flush=True)
            write_summary(options.out, scratch, stamp, results)
    finally:
        write_summary(options.out, scratch, stamp, results)
        shutil.rmtree(scratch, ignore_errors=True)
        signal.signal(signal.SIGTERM, previous)
    return int(any(result.result in ("failed", "timeout") for result in results))


if __name__ == "__main__":
    sys.exit(main())
