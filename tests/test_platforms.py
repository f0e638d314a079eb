"""`python -m tests.platforms`: it sees what a compiler says, and its kept page is that of the kept report."""

import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "_build")]

from build_options import Options  # noqa: E402
from find_tools import OLDEST_TORCH, Torch, find_cuda, find_cxx  # noqa: E402
from native_build import NativeBuild, Tools  # noqa: E402

from tests.platforms import compilers, packages, pages, torches, wheels  # noqa: E402

needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@needs_gxx
def test_a_file_that_does_not_compile_is_seen(tmp_path):
    """As the sources would be against the headers of a torch that lacks what they use."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "good_cpu.cpp").write_text("int one() { return 1; }\n")
    (csrc / "other_simd.cpp").write_text("int PPO_LEVEL(int unused) { return 1; }\n")
    torch = Torch(tmp_path, "2.10.0")
    row = compilers.check_compiler(torch, "g++", syntax_only=True, root=tmp_path)
    warned = [text for text in row["failures"] if "unused" in text]
    assert row["files"] == 1 + len(warned) and len(warned) == len(row["failures"]) >= 1
    (csrc / "good_cpu.cpp").write_text("int one() { return MISSING_MACRO; }\n")
    row = compilers.check_compiler(torch, "g++", syntax_only=True, root=tmp_path)
    assert [text for text in row["failures"] if "MISSING_MACRO" in text]


def test_a_compiler_that_is_not_here_fails_the_check():
    row = compilers.check_compiler(Torch(ROOT, "2.10.0"), "clang++-1")
    assert row["failures"] == ["not installed; apt-get install clang-1"]


def test_every_op_is_run_on_every_torch():
    compiled = {f"tests/test_{path.stem[:-4]}.py" for path in ROOT.glob("csrc/*_cpu.cpp")}
    assert compiled <= set(torches.op_tests())
    assert all((ROOT / test).exists() for test in torches.op_tests())
    oldest = ".".join(map(str, OLDEST_TORCH))
    assert packages.OLDEST.startswith(f"{oldest}.")


CASES = """
import pytest

@pytest.mark.parametrize("n", range(9))
def test_many(n):
    assert n != 4

def test_one():
    pytest.skip("no")
"""


def test_few_cases_of_each_function_are_run_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(torches, "ROOT", tmp_path)
    shutil.copytree(ROOT / "tests" / "platforms", tmp_path / "tests" / "platforms")
    (tmp_path / "bench").mkdir()
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / "tests" / name).write_text(CASES)
    files = ["tests/test_a.py", "tests/test_b.py"]
    whole = torches.run_op_tests([sys.executable], files)
    few = torches.run_op_tests([sys.executable], files, ["-p", "tests.platforms.few_cases"])
    assert list(whole) == list(few) == files
    assert torches.total(whole) == {
        "passed": 16,
        "skipped": 2,
        "failures": ["tests/test_a.py::test_many[4]", "tests/test_b.py::test_many[4]"],
    }
    assert [(row["passed"], row["skipped"], len(row["failures"])) for row in few.values()] == [(2, 1, 1), (2, 1, 1)]


def test_an_interpreter_that_cannot_run_tests_fails_the_check(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho no tests here >&2; exit 3\n")
    python.chmod(0o755)
    found = torches.run_op_tests([python], ["tests/test_gae.py"])
    assert "no tests here" in torches.total(found)["failures"][0]


def test_what_is_installed_is_the_sources_alone():
    assert {"csrc", "ppo_ext", "_build"}.isdisjoint(
        torches.without_outputs(ROOT, ["csrc", "ppo_ext", "_build", "build"])
    )
    assert torches.without_outputs(ROOT / "ppo_ext", ["_C_cpu.so", "_build_info.json", "build"]) == {
        "_C_cpu.so",
        "_build_info.json",
    }


@pytest.mark.parametrize(
    ("tag", "fits"),
    [
        ("manylinux_2_24_x86_64", True),
        ("manylinux_2_28_aarch64", True),
        ("manylinux_2_31_x86_64", False),
        ("linux_x86_64", False),
    ],
)
def test_a_wheel_must_run_on_a_linux_with_glibc_2_28(tag, fits):
    printed = (
        f'a.whl is consistent with the following platform tag: "{tag}". The wheel references external versioned symbols in '
        "these system-provided shared libraries: libm.so.6 with versions {'GLIBC_2.2.5'}, libc.so.6 with versions "
        "{'GLIBC_2.14'}"
    )
    row = wheels.row_of("a.whl", printed)
    assert (row["platform tag"], row["libraries"]) == (tag, "libc.so.6, libm.so.6")
    assert row["failures"] == ([] if fits else ["needs more than manylinux_2_28 has"])


def test_a_torch_brings_the_versions_that_it_depends_on():
    assert packages.pins(["install", "torch==2.12.1", "numpy"]).splitlines() == [
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("numpy==")
    ]


@needs_gxx
def test_cuda_for_another_machine_finds_all_headers_of_the_toolkit(tmp_path):
    """torch's headers for CUDA include thrust, which stands in a folder of its own since CUDA 13."""
    cuda, _ = find_cuda()
    if cuda is None:
        pytest.skip("no CUDA toolkit here")
    build = NativeBuild(ROOT, Options(arch_list="9.0"), Tools(Torch(tmp_path, "2.10.0"), find_cxx(), cuda))
    folders = [Path(flag) for flag in build.cuda_library().compile if flag.startswith(str(cuda.include))]
    for header in ("cuda_runtime.h", "thrust/complex.h", "nv/target"):
        assert [folder for folder in folders if (folder / header).exists()], header


def test_the_kept_page_is_of_the_kept_report():
    report = json.loads((pages.EVIDENCE / "platforms.json").read_text())
    assert pages.markdown(report) == (pages.EVIDENCE / "platforms.md").read_text()
    assert pages.in_docs(report, pages.DOCS.read_text()) == pages.DOCS.read_text()
    rows = [row for name in pages.SECTIONS for row in report[name]["rows"]]
    assert rows and not [row for row in rows if row["failures"]]
    assert {row["torch"].partition("+")[0] for row in report["torches"]["rows"]} >= {
        packages.OLDEST,
        "2.12.1",
        "2.13.0",
    }


def test_no_op_does_what_the_oldest_torch_cannot_trace():
    """torch.compile of torch 2.10 knows no `locals()`."""
    assert not [path.name for path in ROOT.glob("ppo_ext/ops/*.py") if "locals()" in path.read_text()]
