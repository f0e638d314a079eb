"""Checkpoint files: atomic writes, kills at every step, hostile and damaged input."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ppo_ext.models import checkpoint
from ppo_ext.models.staging import staged


def fill(folder, value, shards):
    """Writes a checkpoint of `shards` files, all tensors of which hold `value`."""
    names = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)] if shards > 1 else None
    if names is None:
        return checkpoint.write_tensors(
            f"{folder}/model.safetensors", {f"t{n}": torch.full((4,), value) for n in range(3)}
        )
    for n, name in enumerate(names):
        checkpoint.write_tensors(f"{folder}/{name}", {f"t{n}": torch.full((4,), value)})
    weight_map = {f"t{n}": name for n, name in enumerate(names)}
    return checkpoint.write_json(f"{folder}/model.safetensors.index.json", {"weight_map": weight_map})


def value_of(folder):
    """The one value that all tensors of a checkpoint hold; fails if it mixes two saves."""
    files = checkpoint.weight_files(folder)
    values = {checkpoint.read_tensors(path)[name].unique().item() for name, path in files.items()}
    assert len(files) == 3 and len(values) == 1, (files, values)
    return values.pop()


def test_tensors_and_json_round_trip(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    tensors = {
        "a": shared,
        "same": shared,
        "strided": shared.t(),
        "rng": torch.get_rng_state(),
        "half": torch.randn(3).bfloat16(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
    }
    checkpoint.write_tensors(tmp_path / "x.safetensors", tensors)
    again = checkpoint.read_tensors(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype for name in tensors)
    assert checkpoint.read_tensors(tmp_path / "x.safetensors", "s").keys() == {"same", "strided", "scalar"}
    assert set(checkpoint.tensor_names(tmp_path / "x.safetensors")) == tensors.keys()
    checkpoint.write_json(tmp_path / "x.json", {"step": 3, "text": "ä"})
    assert checkpoint.read_json(tmp_path / "x.json") == {"step": 3, "text": "ä"}
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_json(path, {"step": 1})
    with pytest.raises(TypeError):
        checkpoint.write_json(path, {"step": object()})
    assert checkpoint.read_json(path) == {"step": 1}
    fill(tmp_path, 1.0, 3)
    with pytest.raises(ZeroDivisionError), staged(tmp_path) as staging:
        fill(staging, 2.0, 1)
        raise ZeroDivisionError
    assert value_of(tmp_path) == 1.0
    assert not [name for name in os.listdir(tmp_path) if "tmp" in name]


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("old", [1, 3])
def test_kill_at_any_step_leaves_the_old_or_the_new_checkpoint(old, new, tmp_path):
    seen = []
    for steps in range(80):
        folder = tmp_path / str(steps)
        with staged(folder) as staging:
            fill(staging, 1.0, old)
        child = os.fork()
        if child == 0:
            save_and_die(folder, new, steps)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen.append(value_of(folder))
        if status == 0:
            break
    assert status == 0 and steps >= 4
    # killed later means never an older checkpoint: old values first, then new ones
    assert seen == sorted(seen) and {seen[0], seen[-1]} == {1.0, 2.0}
    weights = [name for name in os.listdir(folder) if "model" in name]
    assert len(weights) == (1 if new == 1 else new + 1)
    with staged(tmp_path / "1") as staging:
        fill(staging, 3.0, new)
    assert value_of(tmp_path / "1") == 3.0


def save_and_die(folder, shards, steps):
    """Overwrites the checkpoint in a forked process that dies without any clean-up before step number `steps`."""
    left = [steps]

    def dying(call):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os._exit(9)
            return call(*args, **kwargs)

        return wrapped

    try:
        with staged(folder) as staging:
            fill(staging, 2.0, shards)
            for name in ("replace", "rename", "remove", "rmdir", "mkdir", "chmod", "fsync"):
                setattr(os, name, dying(getattr(os, name)))
        os._exit(0)
    finally:
        os._exit(1)


def test_unrelated_files_stay(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model-notes.txt").write_text("mine")
    for shards in (3, 1, 3):
        with staged(tmp_path) as staging:
            fill(staging, 1.0, shards)
            (tmp_path / "sub").mkdir(exist_ok=True)
            os.makedirs(f"{staging}/sub")
            checkpoint.write_json(f"{staging}/sub/facts.json", {"shards": shards})
    assert checkpoint.read_json(tmp_path / "sub" / "facts.json") == {"shards": 3}
    assert {"tokenizer.json", "model-notes.txt"} < set(os.listdir(tmp_path))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("weight_map", "text"),
    [
        (None, "must hold a weight_map"),
        (["t0"], "must hold a weight_map"),
        ({"t0": 3}, "must hold a weight_map"),
        ({"t0": "../secret.safetensors"}, r"must name files of its own folder, got '../secret.safetensors'"),
        ({"t0": "/etc/passwd"}, "must name files of its own folder"),
        ({"t0": "absent.safetensors"}, "absent.safetensors must exist, got no such file"),
        ({"t7": "model-00001-of-00003.safetensors"}, "model-00001-of-00003.safetensors must hold t7"),
    ],
)
def test_hostile_index_is_refused(weight_map, text, tmp_path):
    fill(tmp_path, 1.0, 3)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=text):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        b"\xff" * 64,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (70).to_bytes(8, "little")
        + b'{"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}'.ljust(70)
        + b"\x00" * 4,
        b"\x80\x04}q\x00.",
    ],
)
def test_no_safetensors_file_is_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} must be a whole safetensors file, got {len(content)} bytes"):
        checkpoint.weight_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"3", b"\x80\x04}q\x00."])
def test_no_json_object_is_refused(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} must "):
        checkpoint.read_json(path)


def test_state_dict_that_does_not_fit_is_named():
    expected = {name: torch.zeros(2, 3) for name in "abcde"}
    cases = [
        ({}, ValueError, "owner: the state dict must hold a, b, c and 2 more, got 0 tensors"),
        ({**expected, "f": torch.zeros(1)}, ValueError, "owner: the state dict must not hold f, got 6 tensors"),
        ({**expected, "c": torch.zeros(3, 2)}, ValueError, r"owner: c must have shape \[2, 3\], got \[3, 2\]"),
        ({**expected, "c": [1]}, TypeError, "owner: c must be a tensor, got list"),
    ]
    for found, error, text in cases:
        with pytest.raises(error, match=text):
            checkpoint.check_fits("owner", expected, found)
    checkpoint.check_fits("owner", expected, {"a": torch.zeros(2, 3), "f": torch.zeros(1)}, strict=False)


def test_needs_no_transformers():
    code = "import sys; import ppo_ext.models.checkpoint; sys.exit('transformers' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )
