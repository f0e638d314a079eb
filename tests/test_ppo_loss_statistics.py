"""The dict of statistics, which is filled when one of its methods is first called: it must be what an ordinary dict is."""

import collections
import copy
import io
import json
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from cases import token_inputs
from conftest import assert_same_bits

import ppo_ext
from ppo_ext.ops import _statistics

NAMES = ("loss/policy", None, "loss/value")
KEYS = ["loss/policy", "loss/value", "policy/advantages", "policy/ratio"]


def arguments():
    return NAMES, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[[6.0, 7.0]], [[4.0, 5.0]]])


def unread():
    return _statistics.unread(*arguments())


def plain():
    return _statistics.read(*arguments())


def changed(change):
    def use(stats):
        found = change(stats)
        return found, dict(stats)

    return use


def keywords(**stats):
    return stats


# Each is the first use of a dict of statistics.
USES = {
    "[]": lambda x: x["loss/value"],
    "in": lambda x: ("loss/value" in x, "loss/kl" in x),
    "not there": lambda x: pytest.raises(KeyError, x.__getitem__, "loss/kl").type,
    "len": len,
    "bool": bool,
    "iter": list,
    "reversed": lambda x: list(reversed(x)),
    "keys": lambda x: list(x.keys()),
    "values": lambda x: list(x.values()),
    "items": lambda x: list(x.items()),
    "get": lambda x: (x.get("loss/value"), x.get("loss/kl", 7)),
    "pop": changed(lambda x: x.pop("loss/value")),
    "popitem": changed(lambda x: x.popitem()),
    "setdefault": changed(lambda x: (x.setdefault("loss/value", 7), x.setdefault("loss/kl", 7))),
    "update": changed(lambda x: x.update({"loss/value": 7, "loss/kl": 8}, other=9)),
    "update of another": lambda x: {"loss/kl": 1}.update(x) or changed(lambda y: y.update(x))({"loss/kl": 1}),
    "copy": lambda x: (type(x.copy()), x.copy()),
    "copy.copy": lambda x: (type(copy.copy(x)), copy.copy(x)),
    "copy.deepcopy": lambda x: (type(copy.deepcopy(x)), copy.deepcopy(x)),
    "==": lambda x: (x == {"loss/policy": 1}, {} == x, x != {}, {} != x, x == 3),
    "|": lambda x: x | {"loss/value": 7},
    "| of another": lambda x: {"loss/value": 7, "loss/kl": 8} | x,
    "|=": changed(lambda x: x.__ior__({"loss/value": 7}) and None),
    "repr": lambda x: (repr(x), str(x), f"{x}"),
    "set": changed(lambda x: x.__setitem__("loss/policy", 7)),
    "del": changed(lambda x: x.__delitem__("loss/value")),
    "clear": changed(lambda x: x.clear()),
    "fromkeys": lambda x: x.fromkeys(["loss/kl"]),
    "dict": dict,
    "{**}": lambda x: {**x},
    "f(**)": lambda x: keywords(**x),
    "[*]": lambda x: [*x],
    "json": lambda x: json.dumps(x, default=torch.Tensor.tolist),
    "json, sorted": lambda x: json.dumps(x, default=torch.Tensor.tolist, sort_keys=True, indent=1),
    "OrderedDict": collections.OrderedDict,
    "tree_map": lambda x: (type(pytree.tree_map(torch.neg, x)), pytree.tree_map(torch.neg, x)),
    "tree_map_with_path": lambda x: pytree.tree_map_with_path(lambda path, y: (pytree.keystr(path), y), x),
    "accelerate": lambda x: pytest.importorskip("accelerate.utils").recursively_apply(torch.neg, x),
}


def as_text(x):
    """With the orders of dicts, and the types of all but the dict of statistics itself."""
    if isinstance(x, torch.Tensor):
        return repr(x)
    if isinstance(x, dict):
        return as_text(list(x.items()))
    return [as_text(y) for y in x] if isinstance(x, (list, tuple)) else repr(x)


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_first_use_is_that_of_a_dict(use):
    assert as_text(use(unread())) == as_text(use(plain()))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_later_use_is_that_of_a_dict(use):
    stats = unread()
    assert len(stats) == len(KEYS)
    assert as_text(use(stats)) == as_text(use(plain()))


def test_every_method_of_dict_is_there():
    """A method that a later Python adds must fill the dict too."""
    inherited = {"__new__", "__init__", "__getattribute__", "__class_getitem__", "__hash__", "__doc__", "fromkeys"}
    for name in vars(dict).keys() - inherited:
        assert getattr(_statistics._Unread, name) is not getattr(dict, name), name


def test_two_that_are_unread_compare_as_dicts():
    numbers = 6, 7
    first, second, other = (_statistics.unread(("a",), torch.tensor([x]), numbers) for x in (1.0, 1.0, 2.0))
    assert first == second
    assert first != other
    assert _statistics.unread(("a",), torch.tensor([2.0]), numbers) == other
    assert not other == _statistics.unread(("a",), torch.tensor([1.0]), numbers)


def test_a_copy_of_its_class_has_the_entries():
    """As libraries make it that keep the type of a dict."""
    stats = unread()
    made = type(stats)({name: -x for name, x in stats.items()})
    assert isinstance(made, dict) and as_text(made) == as_text({name: -x for name, x in plain().items()})
    assert as_text(type(made)(made)) == as_text(made)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("is_read", (False, True), ids=("unread", "read"))
def test_pickle(protocol, is_read):
    stats = unread()
    if is_read:
        stats.keys()
    found = pickle.loads(pickle.dumps(stats, protocol))
    assert type(found) is collections.OrderedDict and as_text(found) == as_text(plain())


@pytest.mark.parametrize("is_read", (False, True), ids=("unread", "read"))
def test_torch_load_takes_it_from_any_file(is_read):
    stats, file = unread(), io.BytesIO()
    if is_read:
        stats.keys()
    torch.save({"stats": stats}, file)
    file.seek(0)
    assert as_text(torch.load(file, weights_only=True)["stats"]) == as_text(plain())


def test_an_entry_is_changed_alone():
    stats = unread()
    stats["loss/policy"].add_(10)
    assert stats["loss/policy"] == 11 and stats["loss/value"] == 3


# ---- of the loss ----------------------------------------------------------------------------------------------------


def inputs():
    torch.manual_seed(0)
    found = token_inputs((2, 5))
    names = ("logprobs", "old_logprobs", "advantages", "vpreds", "values", "returns", "mask")
    return {name: found[name] for name in names}


def loss(**options):
    return ppo_ext.ppo_loss(**inputs(), **options)


def test_later_changes_of_inputs_do_not_reach_them():
    given = inputs()
    expected = {name: x.clone() for name, x in ppo_ext.ppo_loss(**given)[1].items()}
    stats = ppo_ext.ppo_loss(**given)[1]
    for x in given.values():
        x.zero_()
    for name, x in stats.items():
        assert_same_bits(name, x, expected[name])


@pytest.mark.parametrize("options", ({}, {"cliprange": (0.2, 0.3)}), ids=("plain", "options"))
def test_a_compiled_loss_gives_a_dict(options):
    torch.compiler.reset()
    stats = torch.compile(ppo_ext.ppo_loss, backend="eager", fullgraph=True)(**inputs(), **options)[1]
    assert type(stats) is dict
    assert as_text(stats) == as_text(loss(**options)[1])


@pytest.mark.parametrize("is_read", (False, True), ids=("unread", "read"))
def test_a_compiled_function_takes_them(is_read):
    stats = loss()[1]
    if is_read:
        stats.keys()
    torch.compiler.reset()
    double = torch.compile(lambda x: {name: 2 * y for name, y in x.items()}, backend="eager")
    assert as_text(double(stats)) == as_text({name: 2 * y for name, y in loss()[1].items()})


def test_vmap_gives_them():
    """It takes the results out of its wrappers before they are read."""
    stacked = [torch.stack((x, x)) for x in inputs().values()]
    stats = torch.func.vmap(ppo_ext.ppo_loss)(*stacked)[1]
    assert as_text({name: x[1] for name, x in stats.items()}) == as_text(loss()[1])


@pytest.mark.parametrize("first, then", ((True, False), (False, True)))
def test_inference_mode_may_end_or_begin_before_they_are_read(first, then):
    with torch.inference_mode(first):
        stats = loss()[1]
    with torch.inference_mode(then):
        assert as_text(dict(stats)) == as_text(loss()[1])
