"""Every op has all its parts, and every part belongs to an op of ops.py. A sentence names each part that is missing."""

import dataclasses
import importlib
import inspect
import json
import pathlib
import re

import pytest
from mutants.table import MUTANTS
from ops import JOINED, OPS, STEMS, of_stem

import ppo_ext
from ppo_ext.ops import reference
from tests import ops_table

ROOT = pathlib.Path(__file__).parent.parent
FILES = (
    "csrc/{}.h",
    "csrc/{}_cpu.cpp",
    "csrc/{}_cuda.cu",
    "ppo_ext/ops/{}.py",
    "tests/test_{}.py",
    "bench/bench_{}.py",
)
NO_OPS = {"check_labels", "length_adaptive_lam"}  # public functions of ppo_ext.ops without a kernel


@dataclasses.dataclass(frozen=True)
class Parts:
    """What exists: paths, stems of ops.py, files that a mutant changes, and the names of ops in each place that must
    list them."""

    files: frozenset
    stems: frozenset
    mutated: frozenset
    listed: frozenset
    public: frozenset
    specified: frozenset
    benchmarked: frozenset
    measured: frozenset
    documented: frozenset


def parts():
    """The Parts of this checkout."""
    paths = [path for folder in ("csrc", "ppo_ext/ops", "tests", "bench") for path in (ROOT / folder).glob("*.*")]
    modules = [
        importlib.import_module(f"bench.bench_{stem}") for stem in STEMS if (ROOT / f"bench/bench_{stem}.py").exists()
    ]
    public = {name for name in ppo_ext.__all__ if name not in ppo_ext._LAZY}
    return Parts(
        files=frozenset(str(path.relative_to(ROOT)) for path in paths),
        stems=frozenset(STEMS),
        mutated=frozenset(mutant.file for mutant in MUTANTS),
        listed=frozenset(OPS),
        public=frozenset(x for x in public if getattr(ppo_ext, x).__module__.startswith("ppo_ext.ops.")) - NO_OPS,
        specified=frozenset(name for name in OPS if hasattr(reference, name)),
        benchmarked=frozenset(name for module in modules for name in getattr(module, "OPS", ())),
        measured=frozenset(
            row["op"] for row in json.loads((ROOT / "bench/evidence/accuracy.json").read_text())["rows"]
        ),
        documented=frozenset(re.findall(r"^\| `(\w+)\(", ops_table.page().read_text(), re.MULTILINE)),
    )


def missing(has):
    """A sentence for each part that an op or a stem lacks."""
    stems = has.stems | {
        re.sub("(_options|_options_sums)?(_(cpu|cuda|simd|entry))?$", "", pathlib.Path(x).stem)
        for x in has.files
        if x.startswith("csrc/")
    }
    for stem in sorted(stems):
        yield from (f"{stem}: {path} is missing" for path in map_stem(stem) if path not in has.files)
        if stem not in has.stems:
            yield f"{stem}: tests/ops.py has no op of this stem"
        if not any(re.fullmatch(rf"csrc/{stem}(_\w+)?\.\w+|ppo_ext/ops/{stem}\.py", path) for path in has.mutated):
            yield f"{stem}: tests/mutants/table.py has no mutant of one of its files"
    for name in sorted(has.public - has.listed):
        yield f"{name}: tests/ops.py does not list this public function"
    for name in sorted(has.listed):
        where = {
            "ppo_ext.__all__ does not name it": has.public,
            "ppo_ext/ops/reference.py does not specify it": has.specified,
            f"bench/bench_{stem_of(name)}.py does not have it in OPS": has.benchmarked,
            "bench/evidence/accuracy.json has no row of it; "
            f"run `python -m bench.accuracy --save {name}`": has.measured,
            "the table of ops in README.md has no row of it; run `python -m tests.ops_table`": has.documented,
        }
        yield from (f"{name}: {sentence}" for sentence, names in where.items() if name not in names)


def map_stem(stem):
    """The files that a stem must have."""
    return [path.format(stem) for path in FILES if stem not in JOINED or not path.startswith("csrc/")]


def stem_of(name):
    return OPS[name].stem if name in OPS else name


def test_nothing_is_missing():
    found = list(missing(parts()))
    assert not found, "\n" + "\n".join(found)


# ---- what is missing is seen ----------------------------------------------------------------------------------------


def newly_missing(**changes):
    """What is missing with these changes and not without."""
    has = parts()
    before = set(missing(has))
    return [sentence for sentence in missing(dataclasses.replace(has, **changes)) if sentence not in before]


@pytest.mark.parametrize("path", map_stem("gae"))
def test_a_missing_file_is_named(path):
    assert newly_missing(files=parts().files - {path}) == [f"gae: {path} is missing"]


@pytest.mark.parametrize(
    "part, removed, sentence",
    [
        ("stems", "gae", "gae: tests/ops.py has no op of this stem"),
        ("listed", "gae", "gae: tests/ops.py does not list this public function"),
        ("public", "gae", "gae: ppo_ext.__all__ does not name it"),
        ("specified", "gae", "gae: ppo_ext/ops/reference.py does not specify it"),
        ("benchmarked", "masked_var", "masked_var: bench/bench_masked.py does not have it in OPS"),
        (
            "measured",
            "gae",
            "gae: bench/evidence/accuracy.json has no row of it; run `python -m bench.accuracy --save gae`",
        ),
        (
            "documented",
            "gae",
            "gae: the table of ops in README.md has no row of it; run `python -m tests.ops_table`",
        ),
    ],
)
def test_a_missing_entry_is_named(part, removed, sentence):
    assert newly_missing(**{part: getattr(parts(), part) - {removed}}) == [sentence]


def test_a_stem_without_a_mutant_is_named():
    others = frozenset(path for path in parts().mutated if "gae" not in path)
    assert newly_missing(mutated=others) == ["gae: tests/mutants/table.py has no mutant of one of its files"]


def test_a_new_kernel_needs_everything():
    found = newly_missing(files=parts().files | {"csrc/new_cuda.cu"})
    assert len(found) == len(FILES) - 1 + 2 and all(sentence.startswith("new: ") for sentence in found)


# ---- what stands in two places is the same --------------------------------------------------------------------------


def test_the_table_of_ops_is_of_the_docstrings():
    text = ops_table.page().read_text()
    assert text == ops_table.with_table(text), "run `python -m tests.ops_table`"


def specified_parameters(name):
    """Those of the reference, where `**options` are the keywords of ppo_loss but for what the op computes itself."""
    found = dict(inspect.signature(getattr(reference, name)).parameters)
    if found.pop("options", None):
        of_loss = inspect.signature(reference.ppo_loss).parameters.values()
        found |= {p.name: p for p in of_loss if p.kind is p.KEYWORD_ONLY and p.name != "entropy"}
    return found


@pytest.mark.parametrize("name", OPS)
def test_signatures_agree(name):
    """ops.py has the arguments in their order. The reference has the same defaults, without the arguments of
    execution."""
    parameters = inspect.signature(getattr(ppo_ext, name)).parameters
    assert list(parameters) == list(OPS[name].arguments)
    specified = specified_parameters(name)
    of_execution = {"inplace_forward", "inplace_backward", "validate", "group", "vocab_start"}
    assert [p for p in parameters if p not in of_execution] == list(specified)
    assert all(parameters[p].default == specified[p].default for p in specified)


def test_an_op_is_defined_in_the_module_of_its_stem():
    for stem in STEMS:
        assert {getattr(ppo_ext, op.name).__module__ for op in of_stem(stem)} == {f"ppo_ext.ops.{stem}"}
