"""The operators of the compiled libraries: modules may be imported again, as importlib.reload and autoreload do."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from ppo_ext.ops import _native

ROOT = pathlib.Path(__file__).parent.parent

RELOAD = """
import importlib, sys
import torch, ppo_ext
from ppo_ext import PPOTrainer, SFTTrainer

def results(package):
    x = torch.linspace(-1, 1, 12).reshape(3, 4).requires_grad_()
    kl = package.full_kl(x, x.detach().flip(1))
    kl.sum().backward()
    mask = torch.ones(3, 4)
    return [kl.detach(), x.grad, *package.gae(x, x, mask), package.masked_whiten(x, mask).detach()]

def check(package):
    assert all(torch.equal(a, b) for a, b in zip(results(package), expected, strict=True))

expected = results(ppo_ext)
names = [name for name in sys.modules if name.startswith("ppo_ext")]
for name in names:
    importlib.reload(sys.modules[name])
check(ppo_ext)
before = ppo_ext
for name in names:
    del sys.modules[name]
import ppo_ext
assert ppo_ext.gae is not before.gae
check(ppo_ext)
check(before)
x = torch.empty(3, 4, device="meta")
assert ppo_ext.gae(x, x)[0].shape == (3, 4)
print(len(names))
"""


def test_modules_can_be_imported_again():
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    result = subprocess.run([sys.executable, "-c", RELOAD], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout) > 20


def test_an_operator_is_defined_once():
    schema = "_masked_moments(Tensor values, Tensor weights)"
    operator, name = _native.define(f"{schema} -> Tensor")
    assert operator is torch.ops.ppo_ext._masked_moments.default and name == "ppo_ext::_masked_moments"
    with pytest.raises(
        RuntimeError, match=r"^ppo_ext: _masked_moments must keep its schema .*, got another; restart Python$"
    ):
        _native.define(f"{schema} -> (Tensor, Tensor)")


def test_the_oldest_torch_is_that_of_the_build(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "_build")
    find_tools = importlib.import_module("find_tools")
    assert _native._OLDEST_TORCH == find_tools.OLDEST_TORCH


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13.0"])
def test_an_older_torch_gets_no_library(monkeypatch, version):
    monkeypatch.delenv("PPO_EXT_DISABLE_NATIVE", raising=False)
    monkeypatch.setattr(torch, "__version__", version)
    reason = _native._load("_C_cpu.so", True)
    assert reason == f"torch must be 2.10 or newer, got {version} (pip install --upgrade torch)"
