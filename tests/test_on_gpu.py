"""bench/on_gpu.sh without a GPU: its order, time limits and reports, with steps of a second, and a rehearsal on the
CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import test_gpu
import torch

from bench import gpu_steps, hot_kernels, on_gpu
from bench.gpu_steps import STEPS, Result, Step, first_failure

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def known_facts(request, monkeypatch):
    """Importing torch to ask for the facts takes seconds, so only the test of them does."""
    if request.function is not test_a_summary_names_device_versions_commit_and_date:
        monkeypatch.setattr(on_gpu, "facts", lambda environment, commit: {"device": "a device", "commit": "abc"})


def python(name, code, seconds=30, **more):
    return Step(name, seconds, ("python", "-c", code), **more)


def run(out, steps, *arguments):
    """Runs the steps on the CPU; returns (exit status, summary.json)."""
    status = on_gpu.main(["--out", str(out), "--device", "cpu", *arguments], tuple(steps))
    return status, json.loads((out / "summary.json").read_text())


def results(summary):
    return {step["step"]: step["result"] for step in summary["steps"]}


def test_every_result_is_told_apart(tmp_path):
    steps = [
        python("good", "print('all is well')"),
        python("bad", "raise ValueError('first'); print('last')"),
        python("endless", "import time; print('begun', flush=True); time.sleep(60)", seconds=3),
        Step("tool", 9, ("no-such-tool",)),
        python("module", "", needs=("no_such_module",)),
        python("device", "", gpu_only=True),
    ]
    start = time.monotonic()
    status, summary = run(tmp_path, steps)
    assert status == 1 and time.monotonic() - start < 40
    assert results(summary) == {
        "good": "passed",
        "bad": "failed",
        "endless": "timeout",
        "tool": "missing",
        "module": "missing",
        "device": "skipped",
    }
    notes = {step["step"]: step["note"] for step in summary["steps"]}
    assert notes == {
        "good": "all is well",
        "bad": "ValueError: first",
        "endless": "begun",
        "tool": "no-such-tool",
        "module": "module no_such_module",
        "device": "needs a GPU",
    }
    page = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} | {result} |" in page for name, result in results(summary).items())


def test_a_summary_names_device_versions_commit_and_date(tmp_path):
    status, summary = run(tmp_path, [python("good", "")], "--commit", "abc123")
    assert status == 0 and summary["commit"] == "abc123" and summary["torch"] == torch.__version__
    assert {"device", "driver", "torch_cuda", "python", "date", "missing_modules"} <= set(summary)


def test_what_comes_back_fits(tmp_path):
    """The folder has few files: the summaries, the rows of the benchmarks, and an archive of the logs and rows."""
    code = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1], 'some-device'); folder.mkdir(parents=True);"
        "pathlib.Path(folder, 'gae.jsonl').write_text('{\"op\": \"gae\"}\\n')"
    )
    run(tmp_path, [Step("bench", 30, ("python", "-c", code, "{results}"))])
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "summary.json", "results.jsonl", "run.tar.gz"}
    assert (tmp_path / "results.jsonl").read_text() == '{"op": "gae"}\n'
    with tarfile.open(tmp_path / "run.tar.gz") as archive:
        assert {"logs/bench.log", "results/some-device/gae.jsonl"} <= set(archive.getnames())


def test_the_summary_is_there_after_every_step(tmp_path):
    look = f"import json; print(len(json.load(open({str(tmp_path / 'summary.json')!r}))['steps']))"
    _, summary = run(tmp_path, [python("first", ""), python("second", look), python("third", look)])
    assert [step["note"] for step in summary["steps"]] == ["", "1", "2"]


def test_the_time_limit_holds(tmp_path):
    start = time.monotonic()
    steps = [
        python("long", "import time; time.sleep(60)"),
        python("late", "print('ran')"),
        python("later", "print('ran')"),
    ]
    _, summary = run(tmp_path, steps, "--minutes", "0.15")
    assert time.monotonic() - start < 30
    assert results(summary) == {"long": "timeout", "late": "skipped", "later": "skipped"}
    assert summary["steps"][1]["note"] == "no time is left"


def test_a_process_that_a_step_leaves_behind_is_ended(tmp_path):
    pid = tmp_path / "pid"
    run(tmp_path / "out", [Step("parent", 4, ("sh", "-c", f"sleep 99 & echo $! > {pid}; sleep 99"))])
    status = Path(f"/proc/{pid.read_text().strip()}/stat")
    deadline = time.monotonic() + 20  # a killed process of a busy machine takes a moment to end
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_a_library_nothing_else_is_tested(tmp_path):
    steps = [
        python("build", "raise SystemExit('no nvcc')", required=True),
        python("ops", "print('tested something else')"),
    ]
    status, summary = run(tmp_path, steps)
    assert status == 1 and results(summary) == {"build": "failed", "ops": "skipped"}
    assert summary["steps"][1]["note"] == "build: failed"


def test_a_stopped_run_leaves_its_summary(tmp_path):
    code = (
        "import sys; from bench import on_gpu; from bench.gpu_steps import Step;"
        "steps = [Step('first', 9, ('python', '-c', '')),"
        "         Step('second', 99, ('python', '-c', 'import time; print(1, flush=True); time.sleep(99)'))];"
        "sys.exit(on_gpu.main(sys.argv[1:], steps))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--out", str(tmp_path), "--device", "cpu"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("second: at most"):
            break
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert results(json.loads((tmp_path / "summary.json").read_text())) == {"first": "passed"}
    with tarfile.open(tmp_path / "run.tar.gz") as archive:
        assert archive.extractfile("logs/second.log").read() == b"1\n"


def test_a_wheel_takes_the_place_of_the_build(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as archive:
        for name in ("ppo_ext/_C_cuda.so", "ppo_ext/_build_info.json", "ppo_ext/ops/gae.py", "ppo_ext/../_C_x.so"):
            archive.writestr(name, name)
    (tmp_path / "package").mkdir()
    result = on_gpu.take_wheel(tmp_path / "x.whl", tmp_path / "package")
    assert result == Result("build", "passed", note="ppo_ext/_C_cuda.so, ppo_ext/_build_info.json from x.whl")
    assert {path.name for path in (tmp_path / "package").iterdir()} == {"_C_cuda.so", "_build_info.json"}


def test_a_wheel_without_libraries_fails(tmp_path):
    zipfile.ZipFile(tmp_path / "x.whl", "w").close()
    assert on_gpu.take_wheel(tmp_path / "x.whl", tmp_path) == Result("build", "failed", note="no library from x.whl")


def test_carried_packages_can_be_imported(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site/carried_module.py").touch()
    code = "import carried_module, os; print(os.environ['PYTHONPATH'].split(':')[0])"
    step = python("import", code, needs=("carried_module",))
    _, summary = run(tmp_path / "out", [step], "--packages", str(tmp_path / "site"))
    assert summary["steps"][0]["note"] == str(ROOT)  # the checkout stands first on the path
    with zipfile.ZipFile(tmp_path / "site/carried-1-py3-none-any.whl", "w") as archive:
        archive.writestr("carried_module.py", "")
        archive.writestr("carried-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1\n")
        archive.writestr("carried-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("carried-1.dist-info/RECORD", "")
    (tmp_path / "site/carried_module.py").unlink()
    _, summary = run(tmp_path / "out", [step], "--packages", str(tmp_path / "site"))
    assert results(summary) == {"import": "passed"}


@pytest.mark.parametrize(
    "log, line",
    [
        (
            "...F.\nFAILED tests/test_gae.py::test_x - assert 1\n1 failed, 4 passed in 2s\n",
            "FAILED tests/test_gae.py::test_x - assert 1",
        ),
        (
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n=========     at kernel\n"
            "========= ERROR SUMMARY: 1 error\n",
            "========= Invalid __global__ read of size 4 bytes",
        ),
        (
            "Traceback (most recent call last):\n  File\ntorch.OutOfMemoryError: CUDA out of memory\n",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("compiling\nSegmentation fault\n", "Segmentation fault"),
        ("", "no output"),
    ],
)
def test_what_failed_first(log, line):
    assert first_failure(log) == line


def test_unknown_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--out", str(tmp_path), "--steps", "ops,nonsense"])
    assert "--steps must be some of build,load,info,ops," in capsys.readouterr().err


def test_the_steps_name_what_exists():
    """Without this test, a renamed test file, module or option would only be noticed on a GPU."""
    for step in STEPS:
        for word in step.command:
            path = ROOT / word.removeprefix("--ignore=")
            assert not word.removeprefix("--ignore=").startswith("tests") or path.exists(), word
        if "-m" in step.command:
            module = step.command[step.command.index("-m") + 1]
            assert module in ("pytest", "ppo_ext", "bench") or (ROOT / f"{module.replace('.', '/')}.py").exists()
    assert [step.name for step in STEPS if step.required] == ["build", "load"]
    assert {"memcheck", "racecheck", "initcheck", "synccheck"} <= {step.name for step in STEPS if step.gpu_only}


@pytest.mark.parametrize("step", [step for step in STEPS if "-k" in step.command], ids=lambda step: step.name)
def test_the_selections_of_tests_name_some(step):
    words = set(re.findall(r"\w+", step.command[step.command.index("-k") + 1])) - {"not", "and", "or"}
    names = [name for name in vars(test_gpu) if name.startswith("test_")]
    assert words and all(any(word in name for name in names) for word in words)


def test_the_profiled_kernels_run():
    torch.manual_seed(0)
    assert hot_kernels.run(hot_kernels.logits_inputs((4, 1032), torch.bfloat16, "cpu")) == 3


def test_a_missing_library_is_not_taken_for_a_loaded_one():
    step = next(step for step in STEPS if step.name == "load")
    code = step.command[2].replace(
        "import sys, ppo_ext",
        "import sys, types; native = types.SimpleNamespace(status=lambda: {'cuda': '_C_cuda.so was not built'}); "
        "ppo_ext = types.SimpleNamespace(ops=types.SimpleNamespace(_native=native))",
    )
    done = subprocess.run([sys.executable, "-c", code, "cuda"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == "the library of cuda: _C_cuda.so was not built\n"


@pytest.mark.slow
def test_a_rehearsal_on_the_cpu(tmp_path):
    """The script itself on the CPU: real steps, without those that need a GPU, and the same files as on a GPU."""
    command = [
        "bash",
        "bench/on_gpu.sh",
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--minutes",
        "2",
        "--steps",
        "load,repeat,racecheck,ncu",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert results(summary)["racecheck"] == results(summary)["ncu"] == "skipped"
    native = gpu_steps.ROOT / "ppo_ext/_C_cpu.so"
    assert results(summary)["repeat"] == ("passed" if native.exists() else "skipped"), done.stdout
    assert done.returncode == (0 if native.exists() else 1)
