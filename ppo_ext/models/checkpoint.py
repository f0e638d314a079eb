"""Checkpoint files: safetensors and JSON only, written so that a crash never leaves half a file.

A save first writes to a hidden staging folder inside the target folder. Then `os.replace` moves the files into the target
folder one by one. The file that a loader opens first (the index, or the single weight file) is moved last: until then the
folder loads as the old checkpoint, afterwards as the new one. There is one exception: an adapter that overwrites another
has two weight files, and a kill between their moves leaves the new adapter with the old value head. A killed save also
leaves its `.tmp-*` folder behind.

Every reader checks the whole file before it returns, so a damaged file never changes a part of a model.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_OF = {
    WEIGHTS: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ADAPTER_WEIGHTS: ("adapter_model.bin",),
}

Path = str | os.PathLike[str]

_SHARD = re.compile(r"model-(?:\w+-)?\d{5}-of-\d{5}\.safetensors")


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON to `path`; if that fails, a file that was there stays as it was."""
    with _replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a flat dict of tensors as safetensors to `path`; if that fails, a file that was there stays as it was.

    Tensors that share memory are stored separately. metadata: dict of str to str, kept in the file's header.
    """
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    with _replacing(path) as temporary:
        save_file(stored, temporary, metadata={"format": "pt", **(metadata or {})})


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[str]:
    """Yields the name of a temporary file, which replaces the one at `path` if the block succeeds."""
    temporary = f"{path}.tmp-{uuid.uuid4().hex}"
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(os.path.dirname(os.path.abspath(path)))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[str]:
    """Yields an empty folder whose files move into `directory` if the block succeeds; otherwise nothing changes there."""
    os.makedirs(directory, exist_ok=True)
    staging = os.path.join(directory, f".tmp-{uuid.uuid4().hex}")
    os.mkdir(staging)
    try:
        yield staging
        _rename_colliding_shards(staging, directory)
        _publish(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_target(directory: str, is_adapter: bool) -> None:
    """Raises ValueError if a save would put an adapter and a full model into one folder, which would not load."""
    has_adapter = os.path.exists(os.path.join(directory, ADAPTER_CONFIG))
    has_model = not has_adapter and any(
        os.path.exists(os.path.join(directory, name)) for name in (WEIGHTS, WEIGHTS_INDEX)
    )
    if is_adapter and has_model:
        raise ValueError(f"save_pretrained: an adapter must go to a folder without a full model, got {directory}")
    if not is_adapter and has_adapter:
        raise ValueError(f"save_pretrained: a full model must go to a folder without an adapter, got {directory}")


def _publish(staging: str, directory: Path) -> None:
    """Moves the files of the staging folder into the target folder, in an order that is safe against a kill."""
    names = sorted(
        os.path.relpath(os.path.join(folder, file), staging) for folder, _, files in os.walk(staging) for file in files
    )
    names.sort(key=lambda name: _publish_rank(os.path.basename(name)))
    for name in names:
        target = os.path.join(directory, name)
        # peft writes a model card with every save; one that the user has edited must not be overwritten
        if name == "README.md" and os.path.exists(target):
            continue
        os.makedirs(os.path.dirname(target), exist_ok=True)
        _flush(os.path.join(staging, name))
        os.replace(os.path.join(staging, name), target)
    _flush(directory)
    _remove_stale_weights(directory, names)
    _flush(directory)


def _publish_rank(name: str) -> int:
    """Order of the moves: 2, the last, for the file by which a loader finds the new weights."""
    if name in (WEIGHTS, WEIGHTS_INDEX):
        return 2
    return 1 if name.endswith(".safetensors") else 0


def _rename_colliding_shards(staging: str, directory: Path) -> None:
    """Renames new shards whose names exist in the target folder, so that the old index still points to old weights."""
    index_path = os.path.join(staging, WEIGHTS_INDEX)
    if not os.path.exists(index_path):
        return
    with open(index_path, encoding="utf-8") as file:
        index = json.load(file)
    shards = set(index["weight_map"].values())
    if not any(os.path.exists(os.path.join(directory, shard)) for shard in shards):
        return
    tag = uuid.uuid4().hex[:8]
    renamed = {shard: shard.replace("model-", f"model-{tag}-", 1) for shard in shards}
    for shard, name in renamed.items():
        os.replace(os.path.join(staging, shard), os.path.join(staging, name))
    index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
    write_json(index_path, index)


def _remove_stale_weights(directory: Path, written: list[str]) -> None:
    """Removes the weights of an earlier save, which a loader might read instead of the new ones."""
    if WEIGHTS not in written and WEIGHTS_INDEX not in written:
        return
    for name in os.listdir(directory):
        if name not in written and (name in (WEIGHTS, WEIGHTS_INDEX) or _SHARD.fullmatch(name)):
            os.remove(os.path.join(directory, name))


def _flush(path: Path) -> None:
    """Waits until the file or folder is on disk. Without it a power cut may keep the rename and lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in `path`. Raises ValueError that names the file if it is missing or holds anything else."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} must exist, got no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint: {path} must be JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint: {path} must hold a JSON object, got {type(content).__name__}")
    return content


def tensor_names(path: Path) -> list[str]:
    """Returns the names in a safetensors file; checks its header and length."""
    with _opened(path) as file:
        return list(file.keys())


def read_tensors(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """Returns the tensors in a safetensors file whose names start with `prefix`, on the CPU, under their full names."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefix)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Yields an open safetensors file. Raises ValueError that names it if it is missing, truncated or damaged."""
    if not os.path.isfile(path):
        raise ValueError(f"checkpoint: {path} must exist, got no such file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        size = os.path.getsize(path)
        raise ValueError(
            f"checkpoint: {path} must be a whole safetensors file, got {size} bytes with {error}"
        ) from None


def weight_files(directory: Path, name: str = WEIGHTS) -> dict[str, str]:
    """Checks every weight file of a local checkpoint and returns {tensor name: file path}; {} if there is none.

    name: WEIGHTS (one file or shards with an index) or ADAPTER_WEIGHTS.
    Raises: ValueError for a missing, truncated or corrupt file, for an index that names files or tensors that do not
    exist, and for weights that exist only as pickle; pickle files are never opened.
    """
    path, index_path = os.path.join(directory, name), os.path.join(directory, WEIGHTS_INDEX)
    if os.path.exists(path):
        return dict.fromkeys(tensor_names(path), path)
    if name == WEIGHTS and os.path.exists(index_path):
        return _sharded_files(directory, index_path)
    for pickle in PICKLE_OF[name]:
        _refuse_pickle(os.path.join(directory, pickle), path)
    return {}


def _sharded_files(directory: Path, index_path: str) -> dict[str, str]:
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"checkpoint: {index_path} must hold a weight_map from tensor to file, got {weight_map!r:.80}")
    names: dict[str, set[str]] = {}
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard:
            raise ValueError(f"checkpoint: {index_path} must name files of its own folder, got {shard!r}")
        names[shard] = set(tensor_names(os.path.join(directory, shard)))
    for tensor, shard in weight_map.items():
        if tensor not in names[shard]:
            raise ValueError(
                f"checkpoint: {os.path.join(directory, shard)} must hold {tensor} as its index says, got none"
            )
    return {tensor: os.path.join(directory, shard) for tensor, shard in weight_map.items()}


def _refuse_pickle(pickle: str, path: str) -> None:
    if os.path.exists(pickle):
        raise ValueError(
            f"checkpoint: weights must be safetensors, got the pickle file {pickle}, which can run code when read; "
            "convert one that you trust with safetensors.torch.save_file({k: v.clone() for k, v in "
            f"torch.load({pickle!r}, weights_only=True).items()}}, {path!r}, metadata={{'format': 'pt'}})"
        )


def check_fits(owner: str, expected: Mapping[str, torch.Tensor], found: Mapping[str, Any], strict: bool = True) -> None:
    """Raises ValueError or TypeError that names the tensors in `found` that cannot be loaded into `expected`.

    owner: begins the error. strict: raise also for missing and for unknown names.
    """
    if strict:
        for what, names in (("hold", expected.keys() - found.keys()), ("not hold", found.keys() - expected.keys())):
            if names:
                some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                raise ValueError(f"{owner}: the state dict must {what} {some}, got {len(found)} tensors")
    for name in sorted(expected.keys() & found.keys()):
        if not isinstance(found[name], torch.Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor, got {type(found[name]).__name__}")
        if expected[name].shape != found[name].shape:
            raise ValueError(
                f"{owner}: {name} must have shape {list(expected[name].shape)}, got {list(found[name].shape)}"
            )
