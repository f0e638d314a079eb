"""The libraries with which ours is compared: what each offers for an op, as it is published, or why it cannot run here.

A peer is one module of this package with a `PEER`. Its library is not imported before one of its ops is needed, and the
rest runs without it.
"""

import collections.abc
import dataclasses
import functools
import importlib
import importlib.metadata

from ..suite import first_line

_MODULES = (
    "torch_ops",
    "trl_classic",
    "trl_1_12",
    "trl_newest",
    "verl",
    "openrlhf",
    "areal",
    "skyrl",
    "nemo_rl",
    "slime",
    "torchrl_gae",
    "liger",
    "cut_cross_entropy",
    "quack",
    "flash_linear_attention",
    "rl_kernel",
    "rl_triton",
)
GPU_EXTRA = "pip install '.[bench-gpu]'"
NEEDS_GPU = "runs on a GPU only"


class Unavailable(Exception):
    """A peer cannot run here. The message is one sentence that says why, and how that can be changed."""


@dataclasses.dataclass(frozen=True)
class Offer:
    """One implementation of an op. `function` has the arguments and results of our op. `compiled`: torch.compile
    compiles it on the first call. `partial`: it returns only the first of our results. `low_precision`: it is only
    compared below float32. `instead`: {pass: why it cannot be timed}."""

    function: collections.abc.Callable
    compiled: bool = False
    destroys_logits: bool = False
    partial: bool = False
    low_precision: bool = False
    instead: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Peer:
    """`load(device)` returns {op: {name: Offer}}. `ops`: all ops that it offers on any device; where it cannot run,
    each of them has a row that says why. `how`: the command that installs it."""

    name: str
    ops: tuple
    how: str
    load: collections.abc.Callable
    version: collections.abc.Callable


def installed(distribution):
    """A function that returns the version of an installed distribution, "" without one."""

    def version():
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    return version


def need_gpu(device, peer_how):
    if device.type != "cuda":
        raise Unavailable(f"{NEEDS_GPU}; there, {peer_how} brings it")


def everyone():
    return [importlib.import_module(f"{__name__}.{name}").PEER for name in _MODULES]


@functools.cache
def offers(peer, device):
    """(what the peer offers on this device, why it offers nothing); one of the two is empty."""
    try:
        return peer.load(device), ""
    except Unavailable as error:
        return {}, str(error)
    except ModuleNotFoundError as error:
        return {}, f"needs {error.name}, which is not installed; {peer.how} brings it"
    except Exception as error:  # a package may fail to import in any way; the row says in which
        return {}, f"cannot be imported, {first_line(error)}"


def implementations(op, spec, pass_name, device, dtype=None, with_compiled=True):
    """{name: Implementation, or why there is none} of every peer that has `op`, in the pass `pass_name` of `spec`."""
    found = {}
    for peer in everyone():
        if op not in peer.ops:
            continue
        offered, reason = offers(peer, device)
        if op not in offered:
            found[peer.name] = reason or f"{NEEDS_GPU}, as far as {op} goes"
        for name, offer in offered.get(op, {}).items():
            if offer.low_precision and (dtype is None or dtype.itemsize >= 4) or offer.compiled and not with_compiled:
                continue
            found[name] = offer.instead.get(pass_name) or spec.implementation(
                pass_name,
                offer.function,
                compiled=offer.compiled,
                destroys_logits=offer.destroys_logits,
                partial=offer.partial,
                version=peer.version(),
            )
    return found
