"""The cost of a call before any arithmetic: gae of one short row through each layer that a call can go through.

The public function checks its arguments and calls the torch operator. The operator goes through torch's dispatcher. A
pybind11 function on raw pointers goes through neither; it works only on the device that it was written for, and not
under torch.compile. It is compiled here when it is needed.
"""

import importlib.util
import os
import pathlib
import subprocess
import sysconfig
import tempfile

import torch

import ppo_ext
from ppo_ext.ops import reference

from .suite import OURS, Case, Implementation, backend, in_float64

_SOURCE = pathlib.Path(__file__).with_name("binding_overhead.cpp")
_SHAPE, _GAMMA, _LAM = (1, 8), 1.0, 0.95


def _compile(folder):
    """The pybind11 module, compiled into `folder`."""
    import pybind11

    library = pathlib.Path(folder) / "binding_overhead.so"
    includes = (pybind11.get_include(), sysconfig.get_path("include"), _SOURCE.parent.parent / "csrc")
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            "-O2",
            "-std=c++17",
            "-shared",
            "-fPIC",
            "-fvisibility=hidden",
            *(f"-I{path}" for path in includes),
            str(_SOURCE),
            "-o",
            str(library),
        ],
        check=True,
        capture_output=True,
        text=True,
    )
    spec = importlib.util.spec_from_file_location("binding_overhead", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _through_pybind11():
    """The implementations through pybind11, or the reason why they cannot be built."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            module = _compile(folder)
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        reason = f"not built: {(getattr(error, 'stderr', None) or str(error)).strip().splitlines()[-1][:160]}"
        return dict.fromkeys(("pybind11", "pybind11, outputs reused"), reason)
    outputs = torch.empty(_SHAPE), torch.empty(_SHAPE)

    def into(inputs, advantages, returns):
        module.gae(
            inputs["values"].data_ptr(),
            inputs["rewards"].data_ptr(),
            advantages.data_ptr(),
            returns.data_ptr(),
            *_SHAPE,
            _GAMMA,
            _LAM,
        )
        return advantages, returns

    def fresh(inputs):
        return into(inputs, torch.empty_like(inputs["values"]), torch.empty_like(inputs["values"]))

    return {
        "pybind11": Implementation(fresh),
        "pybind11, outputs reused": Implementation(lambda inputs: into(inputs, *outputs)),
    }


def _operator(inputs):
    return torch.ops.ppo_ext._gae.default(
        inputs["values"], inputs["rewards"], None, None, None, None, _GAMMA, _LAM, _LAM, False
    )


def suite(device, full):
    if not full or device.type != "cpu":
        return
    no_operator = "the compiled operator is not loaded; see `python -m ppo_ext info`"
    yield Case(
        "binding_overhead",
        "gae",
        _SHAPE,
        torch.float32,
        make=lambda device: {"values": torch.randn(_SHAPE), "rewards": torch.randn(_SHAPE)},
        reference=lambda inputs: reference.gae(**in_float64(inputs), gamma=_GAMMA, lam=_LAM),
        implementations={
            OURS: Implementation(lambda inputs: ppo_ext.gae(**inputs, gamma=_GAMMA, lam=_LAM)),
            "torch operator": Implementation(_operator) if backend(device) == "native" else no_operator,
            **_through_pybind11(),
        },
        traffic=None,
    )
