"""`python -m tests.third_party [--save] [--folder DIR] [NAME ...]`: every run on TRL 0.9.6 and on ppo_ext, compared."""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

from tests.third_party import environment, report  # noqa: E402
from tests.third_party.runs import RUNS, nudged, settings  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.third_party", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="runs; all by default")
    parser.add_argument("--save", action="store_true", help="write bench/evidence/third_party.json and .md")
    parser.add_argument("--folder", type=pathlib.Path, default=environment.ROOT / ".third_party")
    options = parser.parse_args()
    folder = options.folder.resolve()
    python = environment.make(folder)
    work = folder / "work"
    (work / "inputs").mkdir(parents=True, exist_ok=True)
    subprocess.run([python, HERE / "inputs.py", work / "inputs"], check=True)
    runs = [run for run in RUNS if not options.names or run.name in options.names]
    plain, changed = [(run, 0.0) for run in runs], [pair for run in runs for pair in nudged(run)]
    theirs = side(plain + changed, environment.TRL, python, folder, work)
    ours = side(plain, environment.OURS, python, folder, work)
    moved = iter(theirs[len(runs) :])
    rows = [
        report.compare(run, *pair, [next(moved) for _ in run.nudges])
        for run, *pair in zip(runs, theirs[: len(runs)], ours, strict=True)
    ]
    for row in rows:
        print(report.line(row), flush=True)
    if options.save:
        report.save(rows, python)
    failed = [row["name"] for row in rows if not row["passed"]]
    print(f"{len(rows) - len(failed)} passed, {len(failed)} failed", flush=True)
    return 1 if failed else 0


def side(runs, library, python, folder, work):
    """Makes the runs, each with a nudge, on one library; returns of each its steps, its error and the files that it did
    not leave."""
    print(f"{len(runs)} runs on {library}", flush=True)
    place = work / library
    place.mkdir(parents=True, exist_ok=True)
    jobs = []
    for run, nudge in runs:
        output, record = place / run.name, place / f"{run.name}.json"
        shutil.rmtree(output, ignore_errors=True)
        record.unlink(missing_ok=True)
        jobs.append(
            {
                # both sides score with the reward models that TRL's side has trained: they start from equal weights
                "settings": settings(run, work / "inputs", work / environment.TRL, output),
                "fields": run.ours if library == environment.OURS else {},
                "autocast": run.autocast,
                "nudge": nudge,
                "float32_value_head": run.autocast and library == environment.TRL,
                "record": str(record),
                "log": str(place / f"{run.name}.log"),
            }
        )
    (place / "jobs.json").write_text(json.dumps(jobs, indent=1), encoding="utf-8")
    path = os.pathsep.join(map(str, environment.search_path(folder, library)))
    variables = {"PYTHONPATH": path, "DISABLE_VERSION_CHECK": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(place / "imports.log", "w", encoding="utf-8") as log:
        command = [python, "-W", "ignore", HERE / "drive.py", place / "jobs.json"]
        subprocess.run(command, env={**os.environ, **variables}, stdout=log, stderr=log, cwd=place)
    return [outcome(run, pathlib.Path(job["record"]), place) for (run, _), job in zip(runs, jobs, strict=True)]


def outcome(run, record, place):
    if record.exists():
        content = json.loads(record.read_text(encoding="utf-8"))
    else:
        lines = (place / "imports.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        content = {"steps": [], "error": lines[-1] if lines else "no message"}
    missing = [pattern for pattern in run.files if not any((place / run.name).glob(pattern))]
    return {**content, "missing": missing, "log": str(place / f"{run.name}.log")}


if __name__ == "__main__":
    sys.exit(main())
