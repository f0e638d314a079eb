"""The facts in a row beside its times: device, versions and date, and the peak memory of a call."""

import contextlib
import ctypes
import datetime
import gc
import os
import pathlib
import platform
import subprocess

import torch

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def stamp(device):
    """Where, when and with which versions a row was measured."""
    return {
        "device": _device_name(device),
        "device_type": device.type,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _device_name(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def _commit():
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # what is saved while it is measured is no change of the code, nor are the pages that show it
        saved = (":!bench/results", ":!bench/evidence", ":!docs", ":!README.md")
        changed = git("status", "--porcelain", "-uno", "--", ".", *saved)
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("PPO_EXT_COMMIT", "unknown")  # set where the checkout was copied without its history


def peak_extra_bytes(call, device):
    """The peak memory during `call` beyond what was held before. On a CPU it is that of the resident set, so that
    temporaries of any kind are included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    from ppo_ext.ops import _pages  # the other facts are asked for where ppo_ext is not built, too

    # without these two the call could use freed pages again that are still resident
    _pages.forget()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to the present resident set
    before = _status_bytes("VmRSS")
    result = call()
    del result
    return _status_bytes("VmHWM") - before


def _status_bytes(field):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"peak_extra_bytes: /proc/self/status must have {field}, got none")
