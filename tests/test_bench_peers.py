"""The peers that ours is compared with: each is right on every op it offers, or a row says why it cannot run."""

import dataclasses
import importlib
import sys
import zipfile

import pytest
import torch

import bench.peers
from bench import cases, command, passes, suite, trl_baseline
from bench.peers import Offer, Peer, Unavailable, excerpt, implementations, trl_classic, wheels

CPU = torch.device("cpu")


@pytest.fixture
def tiny_shapes(monkeypatch):
    for shapes in (cases.LOGITS, cases.LOGITS_WITH_GRADIENT):
        monkeypatch.setitem(shapes, "cpu", ([(16, 37)], [(16, 37)]))
    monkeypatch.setitem(cases.HEAD, "cpu", (4, 16, 37))
    monkeypatch.setitem(cases.LINEAR, "cpu", ([(16, 8, 37)], [(16, 8, 37)]))
    monkeypatch.setitem(cases.SWEEPS, "cpu", {"V": (8, (37,)), "N": (37, (1, 8)), "T": (4, (16,))})
    monkeypatch.setattr(cases, "STEPS", (cases.Step("small", 4, 16, 67, 32, 2, 4),))
    for module in MODULES:
        if hasattr(module, "SHAPES"):
            monkeypatch.setattr(module, "SHAPES", ([(4, 16)], [(4, 16)]))


# binding_overhead compares only layers of our own, and compiles a module for it
MODULES = [importlib.import_module(f"bench.bench_{name}") for name in command.MODULES if name != "binding_overhead"]
of_every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split("_", 1)[1])


@of_every_module
def test_every_eager_implementation_is_right(module, tiny_shapes):
    torch.manual_seed(0)
    checked = []
    for case in module.suite(CPU, full=True):
        inputs = case.make(CPU)
        expected = case.select(inputs, case.reference(inputs))
        for name, implementation in case.implementations.items():
            if isinstance(implementation, str) or implementation.compiled:
                continue
            if case.dtype == torch.bfloat16 and name == trl_baseline.NAME:
                continue  # TRL computes in bfloat16 here; where that is too inaccurate its row says WRONG
            attempt = case.attempt(implementation, inputs, expected)
            assert attempt.note == "", f"{case.title}: {name}: {attempt.note}"
            checked.append(name)
    assert suite.OURS in checked


@of_every_module
def test_a_flipped_sign_of_ours_is_refused(module, tiny_shapes):
    torch.manual_seed(0)
    refused = 0
    for case in module.suite(CPU, full=True):
        inputs, ours = case.make(CPU), case.implementations[suite.OURS]
        expected = case.select(inputs, case.reference(inputs))
        for i in (i for i, right in enumerate(expected) if right.any()):

            def flipped(inputs, i=i, run=ours.run):
                return [-x if k == i else x for k, x in enumerate(run(inputs))]

            attempt = case.attempt(dataclasses.replace(ours, run=flipped), inputs, expected)
            assert attempt.call is None and attempt.note.startswith("WRONG"), f"{case.title}: result {i}"
            refused += 1
    assert refused


# ---- the registry ---------------------------------------------------------------------------------------------------


def _peer(load, name="somebody"):
    return Peer(name, ("double",), "pip install somebody", load, lambda: "1.2")


def _missing(device):
    import no_such_module  # noqa: F401


def _unavailable(device):
    raise Unavailable("it needs a Tuesday")


def _broken(device):
    raise OSError("undefined symbol")


def _double(x):
    return 2 * x


OP = passes.Op(lambda inputs, function: function(inputs["x"]), ("x",), ("incoming",))


def _found(monkeypatch, load, pass_name="forward", **more):
    monkeypatch.setattr(bench.peers, "everyone", lambda: [_peer(load)])
    return implementations("double", OP, pass_name, CPU, **more)


@pytest.mark.parametrize(
    "load, reason",
    [
        (_missing, "needs no_such_module, which is not installed; pip install somebody brings it"),
        (_unavailable, "it needs a Tuesday"),
        (_broken, "cannot be imported, OSError: undefined symbol"),
        (lambda device: {}, "runs on a GPU only, as far as double goes"),
    ],
)
def test_a_peer_that_cannot_run_is_a_row_that_says_why(monkeypatch, load, reason):
    assert _found(monkeypatch, load) == {"somebody": reason}


def test_an_offer_becomes_an_implementation(monkeypatch):
    implementation = _found(monkeypatch, lambda device: {"double": {"somebody, twice": Offer(_double)}})[
        "somebody, twice"
    ]
    assert implementation.version == "1.2" and implementation.run({"x": torch.ones(2)})[0].tolist() == [2.0, 2.0]


def test_a_pass_that_cannot_be_timed_says_why(monkeypatch):
    load = lambda device: {"double": {"x": Offer(_double, instead={"backward": "done before"})}}  # noqa: E731
    assert _found(monkeypatch, load, "backward") == {"x": "done before"}
    assert _found(monkeypatch, load, "forward")["x"].run({"x": torch.ones(1)})[0].item() == 2.0


def test_some_offers_are_for_low_precision_or_worth_their_compilation_only(monkeypatch):
    def load(device):
        return {"double": {"low": Offer(_double, low_precision=True), "compiled": Offer(_double, compiled=True)}}

    assert set(_found(monkeypatch, load, dtype=torch.float32)) == {"compiled"}
    assert set(_found(monkeypatch, load, dtype=torch.bfloat16)) == {"low", "compiled"}
    assert set(_found(monkeypatch, load, dtype=torch.bfloat16, with_compiled=False)) == {"low"}


def test_every_peer_has_a_row_for_each_of_its_ops():
    """Also where none of them is installed: every table says who is missing."""
    for peer in bench.peers.everyone():
        for op in peer.ops:
            offered, reason = bench.peers.offers(peer, CPU)
            assert offered.get(op) or reason or peer.name in implementations(op, OP, "forward", CPU), (peer.name, op)
        assert set(offered) <= set(peer.ops) and peer.how


def test_without_trl_the_rows_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    trl_baseline.functions.cache_clear()
    monkeypatch.setattr(bench.peers, "everyone", lambda: [trl_classic.PEER])
    bench.peers.offers.cache_clear()
    try:
        found = implementations("masked_whiten", OP, "forward", CPU)
    finally:
        trl_baseline.functions.cache_clear()
        bench.peers.offers.cache_clear()
    assert found == {trl_baseline.NAME: "trl is not installed; pip install trl==0.11.4 rich"}


# ---- releases beside each other -------------------------------------------------------------------------------------


@pytest.fixture
def wheel_folder(tmp_path, monkeypatch):
    """A folder with two releases of a package as wheels. Changes of sys.path and sys.modules are undone afterwards."""
    monkeypatch.setattr(wheels, "FOLDER", tmp_path)
    monkeypatch.setattr(
        wheels, "WHEELS", {"old": "dummy-package==1.0", "new": "dummy-package==2.0", "absent": "nobody==3"}
    )
    for release in ("1.0", "2.0"):
        with zipfile.ZipFile(tmp_path / f"dummy_package-{release}-py3-none-any.whl", "w") as archive:
            archive.writestr("dummy/__init__.py", "raise ImportError('needs everything')")
            archive.writestr("dummy/part.py", f"from .other import x\nfrom . import __version__\nvalue = x + {release}")
            archive.writestr("dummy/other.py", "x = 100")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("dummy"):
            del sys.modules[name]


def test_two_releases_are_imported_beside_each_other(wheel_folder):
    old, new = (wheels.under_own_name(name, "dummy", "part") for name in ("old", "new"))
    assert (old.value, new.value, old.__version__, new.__version__) == (101.0, 102.0, "1.0", "2.0")
    assert "dummy" not in sys.modules


def test_a_wheel_can_be_imported_by_its_own_name(wheel_folder):
    wheels.on_path("new")
    with pytest.raises(ImportError, match="needs everything"):
        import dummy  # noqa: F401


def test_a_wheel_that_is_not_here_names_the_command(wheel_folder):
    with pytest.raises(Unavailable, match=r"nobody==3 is not here; python -m bench.peers --download brings it"):
        wheels.under_own_name("absent", "nobody", "part")


def test_a_download_that_fails_is_no_error(wheel_folder, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        wheels.subprocess,
        "run",
        lambda command: asked.append(command[-1]) or wheels.types.SimpleNamespace(returncode=1),
    )
    assert wheels.download() == asked == ["nobody==3"]  # a wheel that is there is not fetched again


# ---- statements of a long method ------------------------------------------------------------------------------------


class Trainer:
    def train(self, batches):
        total = 0
        for batch in batches:
            if batch:
                double = 2 * batch
                triple = 3 * batch  # between the two
                total += _plus_one(double + triple)
        return total


def _plus_one(x):
    return x + 1


def test_an_excerpt_runs_the_statements_between_two():
    cut = excerpt.excerpt(
        Trainer.train, "double = 2", "total += ", inputs=("batch", "total"), outputs=("total", "triple")
    )
    assert cut(10, 100) == (151, 30)


def test_statements_that_are_no_longer_there_are_an_error():
    with pytest.raises(LookupError, match="Trainer.train has no statements from 'double = 2' to 'no such'"):
        excerpt.excerpt(Trainer.train, "double = 2", "no such", inputs=(), outputs=())


SOURCE = """
import a_cluster

@a_cluster.registered("sum")
def total(x: a_cluster.Numbers) -> float:
    return helper(x) + 1

def other():
    raise ValueError
"""


def test_definitions_are_made_without_the_imports_of_their_module():
    found = excerpt.definitions(SOURCE, ("total",), helper=sum)
    assert found.total([1, 2]) == 4 and not hasattr(found, "other")


def test_a_definition_that_is_no_longer_there_is_an_error():
    with pytest.raises(LookupError, match="the module has no missing$"):
        excerpt.definitions(SOURCE, ("total", "missing"))


def test_the_text_of_a_file_in_a_wheel(wheel_folder):
    assert wheels.text("old", "dummy/other.py") == "x = 100"
    with pytest.raises(LookupError, match="dummy-package==2.0 has no dummy/none.py"):
        wheels.text("new", "dummy/none.py")
