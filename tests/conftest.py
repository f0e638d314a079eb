"""Devices, seeds, TRL as the oracle, and the functions with which all tests compare numbers."""

import importlib
import os
import zlib

import pytest
import torch


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        chosen = os.environ.get("PPO_EXT_TEST_DEVICE")
        metafunc.parametrize("device", [chosen] if chosen else ["cpu"] + ["cuda"] * torch.cuda.is_available())


# What takes minutes begins first, so that no process is left with it at the end.
LONGEST = ("test_cuda_on_host.py", "test_sanitizers.py", "test_patch_trl.py", "test_agreement.py")


def pytest_collection_modifyitems(config, items):
    """The order of the files; and with PPO_EXT_TEST_HALF=0 or 1, for where tests run slowly, one half of the cases, drawn
    by their names."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    half = os.environ.get("PPO_EXT_TEST_HALF")
    if half is not None:
        halves = ([], [])
        for item in items:
            halves[zlib.crc32(item.nodeid.encode()) % 2].append(item)
        config.hook.pytest_deselected(items=halves[1 - int(half)])
        items[:] = halves[int(half)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def require_trl():
    """TRL 0.11.4, whose numbers are the oracle. Where it is not installed the test is skipped, and with
    PPO_EXT_REQUIRE_ORACLE=1 it fails."""
    try:
        trl = importlib.import_module("trl")
        importlib.import_module("trl.core")
    except ImportError as error:
        missing = f"THE ORACLE IS MISSING: {error}; pip install trl==0.11.4 rich"
    else:
        if trl.__version__ == "0.11.4":
            return trl
        missing = f"THE ORACLE IS ANOTHER VERSION: trl {trl.__version__} instead of 0.11.4"
    if os.environ.get("PPO_EXT_REQUIRE_ORACLE") == "1":
        pytest.fail(missing)
    pytest.skip(missing)


def assert_within_torch_error(name, ours, torchs, exact, units=1, scale=0.0):
    """Our error against float64 must not exceed torch's own, neither in the root mean square nor at the worst entry.

    Added to torch's error are `units` in the last place of the largest entry or, if that is larger, of `scale`: the
    size of the terms that the result is a sum or difference of. The worst entry of a gradient (a name that begins with
    "grad") may have twice torch's error: it is rounded after one more product, and which entry is the worst is chance.
    For float64 results float64 is no better oracle, so 1000 times as many units are added.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)} instead of {list(exact.shape)}"
    assert torch.isfinite(exact).all(), f"{name}: the exact values are not finite, so nothing would be compared"
    if exact.numel() == 0:
        return
    units *= 1000 if ours.dtype == torch.float64 else 1
    precision = torch.finfo(ours.dtype)
    unit = units * precision.eps * max(exact.abs().max().item(), scale, precision.smallest_normal) + 1e-30
    error, torch_error = (ours.double() - exact).abs(), (torchs.double() - exact).abs()
    worst = error.flatten().argmax().item()
    where = (
        f"worst at entry {worst}: ours {ours.flatten()[worst].item()!r}, torch {torchs.flatten()[worst].item()!r}, "
        f"exact {exact.flatten()[worst].item()!r}"
    )
    rms, torch_rms = error.square().mean().sqrt().item(), torch_error.square().mean().sqrt().item()
    assert rms <= torch_rms + unit, f"{name}: mean error {rms:.3g}, torch's {torch_rms:.3g}; {where}"
    times = 2 if name.startswith("grad") else 1
    assert error.max().item() <= times * torch_error.max().item() + unit, f"{name}: largest error; {where}"


def assert_same_bits(name, a, b):
    assert a.dtype == b.dtype and a.shape == b.shape, f"{name}: {a.dtype} {list(a.shape)}, {b.dtype} {list(b.shape)}"
    different = ~((a == b) | (a.isnan() & b.isnan()))
    assert not different.any(), f"{name}: {int(different.sum())} of {a.numel()} entries differ"


def assert_same_bits_for_any_threads(run):
    """`run()` returns a dict or a sequence of tensors, which must be the same for any number of threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            result = run()
            results.append(result if isinstance(result, dict) else dict(enumerate(result)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for name, value in result.items():
            assert_same_bits(f"{name}, other threads", value, results[0][name])
