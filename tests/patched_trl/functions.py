"""What `patch_trl` replaces, in the release of TRL that is imported: same results and gradients, and undone completely."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from trl.trainer import grpo_trainer, utils

import ppo_ext
from ppo_ext.integrations import trl as integration

NAMES = ("selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy", "_ChunkedLogProbFunction")
PRESENT = [name for name in NAMES if hasattr(utils, name)]
ORIGINALS = {name: getattr(utils, name) for name in PRESENT}
MASKS = hasattr(utils, "selective_log_softmax_and_entropy")  # since TRL 1.14, temperature and row_mask as well


@pytest.fixture
def patched():
    assert ppo_ext.patch_trl()
    yield
    ppo_ext.unpatch_trl()


def _holders():
    """Where TRL's loaded modules hold one of the originals."""
    return {
        f"{module.__name__}.{attribute}"
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("trl.")
        for attribute, value in vars(module).items()
        if any(value is original for original in ORIGINALS.values() if original is not None)
    }


def test_every_copy_is_replaced_and_given_back():
    holders = _holders()
    assert "trl.trainer.utils.selective_log_softmax" in holders
    names = ppo_ext.patch_trl()
    assert set(names) >= holders and not _holders()
    assert ppo_ext.patch_trl() == []  # nothing is left to replace
    assert set(ppo_ext.unpatch_trl()) == set(names)
    assert _holders() == holders
    assert all(getattr(utils, name) is ORIGINALS[name] for name in PRESENT)
    assert ppo_ext.unpatch_trl() == []


def test_copies_made_while_patched_are_given_back_too(patched):
    grpo_trainer._a_copy = utils.selective_log_softmax
    ppo_ext.unpatch_trl()
    assert grpo_trainer._a_copy is ORIGINALS["selective_log_softmax"]
    del grpo_trainer._a_copy


def test_modules_imported_after_the_patch_use_it():
    code = (
        "import ppo_ext; ppo_ext.patch_trl(); from trl.experimental.cpo import cpo_trainer;"
        "from trl.trainer import utils; print(cpo_trainer.selective_log_softmax is utils.selective_log_softmax,"
        "utils.selective_log_softmax.__closure__ is not None)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split()[-2:] == ["True", "True"], run.stdout + run.stderr


def test_an_unknown_argument_patches_nothing(monkeypatch):
    def selective_log_softmax(logits, index, chunk=3):
        return None

    monkeypatch.setattr(utils, "selective_log_softmax", selective_log_softmax)
    holders = _holders()
    sentence = "patch_trl: TRL must be a release from 1.12 on whose functions ppo_ext knows, got .*'chunk'.*nothing was"
    with pytest.raises(RuntimeError, match=sentence):
        ppo_ext.patch_trl()
    assert _holders() == holders and utils.selective_log_softmax is selective_log_softmax
    assert ppo_ext.unpatch_trl() == []


def test_a_function_that_is_gone_patches_nothing(monkeypatch):
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    holders = _holders()
    with pytest.raises(RuntimeError, match="lacks selective_log_softmax or _ChunkedLogProbFunction"):
        ppo_ext.patch_trl()
    assert _holders() == holders


@pytest.mark.parametrize("version", ["0.11.4", "1.11.0"])
def test_an_old_release_is_refused(monkeypatch, version):
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"got {version} .*ppo_ext.trl"):
        ppo_ext.patch_trl()


def test_the_code_of_the_page_runs(capsys):
    page = pathlib.Path(__file__).parent.parent.parent / "docs/integrations.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    try:
        for block in blocks:
            exec(compile(block, str(page), "exec"), {})
    finally:
        ppo_ext.unpatch_trl()
    assert blocks and "trl.trainer.utils.selective_log_softmax" in capsys.readouterr().out


# ---- results --------------------------------------------------------------------------------------------------------


def _both(name, *arguments, **keywords):
    """Results of TRL's function and of ours, with their gradients for the first argument."""
    theirs, ours = arguments[0].clone().requires_grad_(), arguments[0].clone().requires_grad_()
    expected = ORIGINALS[name](theirs, *arguments[1:], **keywords)
    result = getattr(utils, name)(ours, *arguments[1:], **keywords)
    return ours, result, theirs, expected


def _assert_same(ours, results, theirs, expected):
    if isinstance(results, torch.Tensor):
        results, expected = (results,), (expected,)
    for result, value in zip(results, expected):
        torch.testing.assert_close(result, value, rtol=1e-5, atol=1e-5)
    sum((result * torch.linspace(0.5, 2, result.numel()).view_as(result)).sum() for result in results).backward()
    sum((value * torch.linspace(0.5, 2, value.numel()).view_as(value)).sum() for value in expected).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert theirs.grad.abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(3, 5, 11), (4, 7), (2, 1, 300)])
def test_selective_log_softmax(patched, shape):
    index = torch.randint(shape[-1], shape[:-1])
    _assert_same(*_both("selective_log_softmax", 3 * torch.randn(shape), index))


@pytest.mark.parametrize("k", [1, 4])
def test_several_ids_per_row(patched, k):
    index = torch.randint(11, (3, 5, k))
    _assert_same(*_both("selective_log_softmax", torch.randn(3, 5, 11), index))


@pytest.mark.skipif(not MASKS, reason="TRL before 1.14 takes no temperature and mask")
@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_temperature_and_mask(patched, name):
    index, mask = torch.randint(11, (3, 5)), torch.randint(2, (3, 5))
    mask[0] = 1
    _assert_same(*_both(name, torch.randn(3, 5, 11), index, temperature=0.7, row_mask=mask))


@pytest.mark.skipif(not MASKS, reason="TRL before 1.14 has no such function")
def test_entropy_without_gradient(patched):
    logits = torch.randn(3, 5, 11, requires_grad=True)
    _, entropy = utils.selective_log_softmax_and_entropy(
        logits, torch.zeros(3, 5, dtype=torch.int64), entropy_requires_grad=False
    )
    assert not entropy.requires_grad


def test_entropy(patched):
    _assert_same(*_both("entropy_from_logits", 2 * torch.randn(3, 5, 11)))
    _assert_same(*_both("entropy_from_logits", torch.randn(7, 11), chunk_size=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32(patched, dtype):
    logits, index = (4 * torch.randn(3, 5, 11)).to(dtype), torch.randint(11, (3, 5))
    exact = logits.double().log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    result = utils.selective_log_softmax(logits, index)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def test_signatures_stay(patched):
    for name in PRESENT:
        if name != "_ChunkedLogProbFunction":
            assert inspect.signature(getattr(utils, name)) == inspect.signature(ORIGINALS[name])


# ---- the chunked function -------------------------------------------------------------------------------------------

OPTIONAL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _chunked(function, hidden, weight, bias, labels, temperature, softcap, scale, outputs):
    """Calls any release's function; the parameters that it does not have are at their defaults then."""
    values = {
        "hidden": hidden,
        "last_hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": labels,
        "temperature": temperature,
        "chunk_size": 16,
        "final_logit_softcapping": softcap,
        "logit_scale": scale,
        "outputs": outputs,
    }
    original = ORIGINALS["_ChunkedLogProbFunction"]
    if original is None:  # TRL 1.15 without Triton
        names = [name for name in values if name != "last_hidden"]
    else:
        names = list(inspect.signature(original.forward).parameters)[1:]
    assert bias is None or "bias" in names
    return names, function.apply(*(values[name] for name in names))


def _specified(hidden, weight, bias, labels, temperature, softcap, scale):
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    log_p = logits.log_softmax(-1)
    selected = log_p.gather(-1, labels[:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return selected, entropy, (2 * log_p).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == labels


@pytest.mark.parametrize(
    "temperature, softcap, scale, with_bias", [(1.0, None, 1.0, False), (0.7, 2.0, 1.5, False), (0.7, None, 0.5, True)]
)
def test_chunked_log_probs(patched, temperature, softcap, scale, with_bias):
    original = ORIGINALS["_ChunkedLogProbFunction"]
    if with_bias and original is not None and "bias" not in inspect.signature(original.forward).parameters:
        pytest.skip("TRL before 1.14 takes no bias")
    hidden, weight, labels = torch.randn(14, 24), torch.randn(97, 24) / 3, torch.randint(97, (14,))
    leaves = [hidden, weight] + [torch.randn(97)] * with_bias
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    exact = [leaf.double().requires_grad_() for leaf in leaves]
    bias = lambda tensors: tensors[2] if with_bias else None  # noqa: E731
    options = (labels, temperature, softcap, scale)
    names, result = _chunked(utils._ChunkedLogProbFunction, *ours[:2], bias(ours), *options, OPTIONAL)
    expected = _specified(*exact[:2], bias(exact), *options)
    assert len(result) == (5 if "outputs" in names else 2)
    for value, target in zip(result, expected):
        torch.testing.assert_close(value.double(), target.double(), rtol=1e-5, atol=1e-5)
        assert value.requires_grad == (value is result[0] or value is result[1])
    assert len(result) == 2 or result[4].dtype == torch.bool
    (result[0].sum() + 0.3 * result[1].square().sum()).backward()
    (expected[0].sum() + 0.3 * expected[1].square().sum()).backward()
    for leaf, target in zip(ours, exact):
        torch.testing.assert_close(leaf.grad.double(), target.grad, rtol=1e-4, atol=1e-5)


def test_outputs_that_are_not_asked_for_are_none(patched):
    hidden, weight, labels = torch.randn(5, 8), torch.randn(13, 8), torch.randint(13, (5,))
    names, result = _chunked(utils._ChunkedLogProbFunction, hidden, weight, None, labels, 1.0, None, 1.0, ("is_top1",))
    if "outputs" not in names:
        assert len(result) == 2 and result[1] is not None  # entropy is always asked for
    else:
        assert [value is None for value in result] == [False, True, True, True, False]


def test_no_rows(patched):
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    _, result = _chunked(
        utils._ChunkedLogProbFunction, hidden, weight, None, torch.zeros(0, dtype=torch.int64), 1.0, None, 1.0, OPTIONAL
    )
    result[0].sum().backward()
    assert result[0].shape == (0,) and weight.grad.eq(0).all()


def test_under_autocast(patched):
    hidden, weight, labels = torch.randn(6, 8), torch.randn(13, 8, requires_grad=True), torch.randint(13, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        _, result = _chunked(utils._ChunkedLogProbFunction, hidden, weight, None, labels, 1.0, None, 1.0, OPTIONAL)
    rounded = (hidden.bfloat16().double(), weight.detach().bfloat16().double())
    expected = _specified(*rounded, None, labels, 1.0, None, 1.0)
    torch.testing.assert_close(result[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    result[0].sum().backward()
    assert weight.grad.dtype == torch.float32
