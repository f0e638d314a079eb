"""The report on the compiled CUDA kernels: no spills, 16-byte accesses, hot loops that have not grown; and its
parser."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest

from bench import sass, static_report

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "_build"))

import find_tools  # noqa: E402


def missing(reason):
    """Skips the test where the library cannot be built or read; fails it in a native build with nvcc, which must have
    both."""
    required = os.environ.get("PPO_EXT_REQUIRE_NATIVE") == "1" and os.environ.get("PPO_EXT_CUDA") != "0"
    if required and find_tools.find_cuda()[0]:
        pytest.fail(f"nvcc is here, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def report():
    if not static_report.LIBRARY.exists():
        missing(f"{static_report.LIBRARY.name} is not built")
    try:
        return static_report.measure()
    except sass.ToolMissing as error:
        return missing(str(error))


@pytest.fixture(scope="module")
def kept():
    return static_report.load()


# ---- the built library ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_architecture_of_the_build_is_read(report):
    built = json.loads((ROOT / "ppo_ext/_build_info.json").read_text())["sass"]
    built = [arch.rstrip("af") for arch in built]
    kernels = {arch: {row.key[1:] for row in report["kernels"] if row.arch == arch} for arch in built}
    assert len(report["kernels"]) == sum(map(len, kernels.values()))
    assert all(kernels[arch] == kernels[built[0]] for arch in built)
    sources = {path.name.removesuffix("_cuda.cu") for path in ROOT.glob("csrc/*_cuda.cu")}
    assert {op for op, _ in kernels[built[0]]} == sources


@pytest.mark.slow
def test_no_kernel_spills_or_has_a_stack_frame(report):
    assert not [row.title for row in report["kernels"] if row.spills or row.stack_bytes or row.local_bytes]


@pytest.mark.slow
def test_hot_kernels_read_and_write_16_bytes_at_once(report):
    hot = {row.name for row in report["kernels"] if row.hot}
    assert {"logprobs forward", "logprobs backward and entropy", "full_kl backward", "gae"} <= hot
    assert not [text for text in static_report.problems(report, report) if "16-byte" in text]


@pytest.mark.slow
def test_hot_loops_have_not_grown(report, kept):
    if not static_report.comparable(report, kept):
        pytest.skip(f"the kept figures are of nvcc {kept['nvcc']}, this library was built by {report['nvcc']}")
    assert not static_report.changes(report, kept)


def test_the_page_says_what_is_kept(kept):
    assert (static_report.EVIDENCE / "static.md").read_text() == static_report.markdown(kept)
    assert not static_report.problems(kept, kept)


# ---- the parser -----------------------------------------------------------------------------------------------------

# Shortened from a forward and a backward kernel: a loop over rows; in it a loop over whole batches and the rest of the
# row; in that a rescale to a new maximum.
SAMPLE = """
//--------------------- .text._Zloop --------------------------
	.section	.text._Zloop,"ax",@progbits
_Zloop:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.64 R10, desc[UR6][R8.64] ;
        /*0020*/               @P1 BRA `(.L_x_5) ;
.L_x_1:
        /*0030*/                   IADD3 R8, R26, 0x300, RZ ;
        /*0040*/                   ISETP.GE.AND P0, PT, R8, UR4, PT ;
        /*0050*/              @!P0 BRA `(.L_x_2) ;
        /*0060*/              @!P1 LDG.E.NA.LTC256B.128 R12, desc[UR6][R36.64] ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0078*/                   IMAD.WIDE R34, R8, 0x10, R2 ;
        /*0080*/                   LDG.E.NA.LTC256B.128 R12, desc[UR6][R34.64] ;
        /*0090*/                   LDG.E.NA.LTC256B.128 R16, desc[UR6][R34.64+0x1000] ;
.L_x_3:
        /*00a0*/                   FSETP.GT.AND P0, PT, R50, R30, PT ;
        /*00b0*/              @!P0 BRA P3, `(.L_x_4) ;
        /*00c0*/                   MUFU.EX2 R30, R51 ;
        /*00d0*/                   FMUL R52, R23, R30 ;
.L_x_4:
        /*00e0*/                   MUFU.EX2 R8, R33 ;
        /*00f0*/                   STG.E.128 desc[UR6][R42.64], R12 ;
        /*0100*/                   STG.E desc[UR6][R26.64+0x4], R60 ;
        /*0110*/              @!P2 BRA `(.L_x_1) ;
.L_x_5:
        /*0120*/                   BRA.DIV UR5, `(.L_x_7) ;
.L_x_6:
        /*0130*/              @!P3 BRA `(.L_x_0) ;
        /*0140*/                   EXIT ;
.L_x_7:
        /*0150*/                   BRA `(.L_x_6) ;
.L_x_8:
        /*0160*/                   BRA `(.L_x_8);
//--------------------- .text._Zspills --------------------------
_Zspills:
        /*0000*/                   STL.64 [R1], R4 ;
        /*0010*/                   LDL R5, [R1+0x4] ;
        /*0020*/                   LDG.E.NA.LTC256B.128 R12, desc[UR6][R34.64] ;
        /*0030*/                   EXIT ;
"""


def test_one_iteration_is_counted_by_the_rule():
    """Counted by hand: 3 instructions to the branch, an address, 2 loads, 2 that skip the rescale, 4 to the end. The
    store of 4 bytes is not counted among those of 16."""
    loop = sass.hot_loop_of(*sass.parse(SAMPLE)["_Zloop"])
    assert loop == sass.HotLoop(loads=2, stores=1, instructions=12, exponentials=1)


def test_a_load_under_opposite_predicates_is_one_load():
    twice = SAMPLE.replace("R16, desc[UR6][R34.64+0x1000]", "R12, desc[UR6][R36.64]")
    assert sass.hot_loop_of(*sass.parse(twice)["_Zloop"]).loads == 1


def test_a_kernel_without_16_byte_loads_has_no_hot_loop():
    narrow = SAMPLE.replace("LDG.E.NA.LTC256B.128", "LDG.E.NA.LTC256B.64")
    assert sass.hot_loop_of(*sass.parse(narrow)["_Zloop"]) is None
    assert sass.hot_loop_of(*sass.parse(SAMPLE)["_Zspills"]) is None  # it has a 16-byte load, but no loop


def test_spills_are_counted():
    functions = sass.parse(SAMPLE)
    assert [sass.spills_of(functions[name][0]) for name in ("_Zloop", "_Zspills")] == [0, 2]


@pytest.mark.parametrize(
    "guard, opcode, operands, may",
    [
        ("", "BRA", "`(.L_x_1) ", False),
        ("@P0", "BRA", "`(.L_x_1) ", True),
        ("", "BRA", "P3, `(.L_x_1) ", True),
        ("", "BRA.U", "!UP0, `(.L_x_1) ", True),
        ("", "EXIT", "", False),
        ("@!P0", "EXIT", "", True),
        ("", "CALL.REL.NOINC", "`($__internal_0_$__cuda_sm20_div_s64) ", True),
        ("", "RET.REL.NODEC", "R4 `(_Zloop) ", False),
    ],
)
def test_which_instruction_may_be_followed_by_the_next(guard, opcode, operands, may):
    assert sass.Instruction(guard, opcode, operands).falls_through == may


def test_resources_are_read_for_each_architecture():
    text = """
arch = sm_90
Resource usage:
 Function _Zloop:
  REG:63 STACK:8 SHARED:1120 LOCAL:0 CONSTANT[0]:936 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_120
 Function _Zloop:
  REG:56 STACK:0 SHARED:96 LOCAL:4 CONSTANT[0]:936
"""
    assert sass.usage_of(text) == {
        ("9.0", "_Zloop"): sass.Usage(63, 8, 1120, 0),
        ("12.0", "_Zloop"): sass.Usage(56, 0, 96, 4),
    }


def test_tools_of_pip_come_first(tmp_path, monkeypatch):
    for folder in ("site/nvidia/cu13/bin", "cuda/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "cuobjdump").touch(0o755)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    folders = list(sass.tool_folders({"CUDA_HOME": str(tmp_path / "cuda"), "PATH": "/usr/bin"}))
    assert folders[:3] == [str(tmp_path / "site/nvidia/cu13/bin"), str(tmp_path / "cuda/bin"), "/usr/bin"]
    assert sass.find_tool("cuobjdump", folders) == str(tmp_path / "site/nvidia/cu13/bin/cuobjdump")


def test_a_missing_tool_is_named_with_its_package(tmp_path):
    with pytest.raises(
        sass.ToolMissing, match="nvdisasm must be installed, got none.*; pip install nvidia-cuda-nvdisasm"
    ):
        sass.find_tool("nvdisasm", [str(tmp_path)])


# ---- names and limits -----------------------------------------------------------------------------------------------

MANGLED = (
    "_ZN7ppo_ext54_GLOBAL__N__11052cbb_16_logprobs_cuda_cu_87f8fd29_244814forward_kernelILi256ELb1ELb1E"
    "N3c108BFloat16EfEEvNS0_7ForwardIT2_T3_EE"
)
DEMANGLED = (
    "void ppo_ext::(anonymous namespace)::forward_kernel<256, true, true, c10::BFloat16, float>"
    "(ppo_ext::(anonymous namespace)::Forward<c10::BFloat16, float>)"
)


def sample(**changes):
    """A report of one hot kernel, 64 instructions for 4 loads of 8 elements."""
    usage = sass.Usage(registers=63, stack_bytes=0, shared_bytes=1120, local_bytes=0)
    row = static_report.row_of(sass.Kernel(MANGLED, "9.0", usage, 0, sass.HotLoop(4, 0, 64, 32)), DEMANGLED)
    return {"nvcc": "13.0", "commit": "abc", "kernels": [dataclasses.replace(row, **changes)]}


def test_a_row_has_the_names_of_the_source():
    (row,) = sample()["kernels"]
    assert (row.op, row.kernel) == ("logprobs", "forward_kernel<256, true, true, BFloat16, float>")
    assert (row.name, row.dtype, row.hot) == ("logprobs forward and entropy", "bfloat16", True)
    assert (row.instructions_per_element, row.exponentials_per_element) == (2.0, 1.0)


@pytest.mark.parametrize(
    "registers, threads, arch, share",
    [
        (32, 256, "9.0", 1.0),
        (33, 256, "9.0", 0.75),
        (64, 256, "9.0", 0.5),
        (72, 256, "8.0", 0.375),
        (128, 512, "9.0", 0.25),
        (40, 256, "12.0", 1.0),
        (40, 256, "7.5", None),
    ],
)
def test_occupancy(registers, threads, arch, share):
    assert static_report.occupancy(registers, threads, arch) == share


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"spills": 3}, "spills must be 0, got 3"),
        ({"stack_bytes": 8}, "stack_bytes must be 0, got 8"),
        ({"local_bytes": 4}, "local_bytes must be 0, got 4"),
        ({"loads": None}, "the hot loop must have 16-byte loads, got none"),
        ({"stores": 1}, "16-byte stores must be 0, got 1"),
        ({"kernel": "backward_kernel<true, true, BFloat16, float>", "stores": 3}, "16-byte stores must be 4, got 3"),
        ({"instructions_per_element": 2.21}, "instructions per element must stay within 1.10 times 2.00, got 2.21"),
        ({"kernel": "forward_kernel<512, true, true, BFloat16, float>"}, "must be among the kept figures, got none"),
    ],
)
def test_what_got_worse_is_said(changes, text):
    found = static_report.problems(sample(**changes), sample())
    assert found and found[-1].startswith("logprobs ") and text in " ".join(found)


@pytest.mark.parametrize(
    "changes", [{}, {"instructions_per_element": 2.19}, {"instructions_per_element": 1.0}, {"arch": "10.0"}]
)
def test_what_did_not_get_worse_is_no_problem(changes):
    assert static_report.problems(sample(**changes), sample()) == []


def test_another_major_version_of_nvcc_is_not_compared():
    grown = sample(instructions_per_element=9.0)
    assert static_report.changes({**grown, "nvcc": "13.5"}, sample())
    assert not static_report.changes({**grown, "nvcc": "12.8"}, sample())


def test_what_is_saved_is_read_back(tmp_path):
    static_report.save(sample(), tmp_path)
    assert static_report.load(tmp_path) == sample()
    assert "| logprobs forward and entropy | bfloat16 | 63 | 50% |" in (tmp_path / "static.md").read_text()
