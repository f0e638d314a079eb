"""Checkpoint files: safetensors and JSON only, written whole or not at all (see `staging`), and checked before use.

Every reader checks the whole file before it returns, so a damaged file never changes a part of a model. A file with a
digest, which `write_tensors` adds if asked to, is refused if any bit of it is another one than was written.
"""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .staging import WEIGHTS, WEIGHTS_INDEX, Path, complete, json_text, replacing, write_inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLE_OF = {
    WEIGHTS: ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ADAPTER_WEIGHTS: ("adapter_model.bin",),
}

_DIGEST = "sha256"  # key in the header; while the digest is computed, its hexadecimal digits are zeros
_NO_DIGEST = "0" * 64
_DIGEST_IN_HEADER = re.compile(rb'"sha256":"([0-9a-f]{64})"')


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, content: Any) -> None:
    """Writes `content` as JSON to `path`; if that fails, a file that was there stays as it was."""
    write_text(path, json_text(content))


def write_text(path: Path, text: str) -> None:
    """Writes a text to `path`; if that fails, a file that was there stays as it was."""
    with replacing(path) as temporary:
        write_inside(temporary, text)


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None, digest: bool = False
) -> None:
    """Writes a flat dict of tensors as safetensors to `path`; if that fails, a file that was there stays as it was.

    Tensors that share memory are stored separately. metadata: dict of str to str, kept in the file's header.
    digest: the header also gets the SHA-256 of the file, which `read_tensors` then checks.
    """
    stored = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    header = {"format": "pt", **(metadata or {}), **({_DIGEST: _NO_DIGEST} if digest else {})}
    with replacing(path) as temporary:
        save_file(stored, temporary, metadata=header)
        if digest:
            _write_digest(temporary)


def check_target(directory: str, is_adapter: bool) -> None:
    """Raises ValueError if a save would put an adapter and a full model into one folder, which would not load."""
    complete(directory)
    has_adapter = os.path.exists(os.path.join(directory, ADAPTER_CONFIG))
    has_model = not has_adapter and any(
        os.path.exists(os.path.join(directory, name)) for name in (WEIGHTS, WEIGHTS_INDEX)
    )
    if is_adapter and has_model:
        raise ValueError(f"save_pretrained: an adapter must go to a folder without a full model, got {directory}")
    if not is_adapter and has_adapter:
        raise ValueError(f"save_pretrained: a full model must go to a folder without an adapter, got {directory}")


# ---- digests ---------------------------------------------------------------------------------------------------------


def _find_digest(path: Path) -> tuple[int, str] | None:
    """Where the digest stands in a safetensors file, in bytes, and the digest; None if there is none, or more than one."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, os.path.getsize(path)))
    found = list(_DIGEST_IN_HEADER.finditer(header))
    return (8 + found[0].start(1), found[0][1].decode()) if len(found) == 1 else None


def _compute_digest(path: Path, position: int) -> str:
    """SHA-256 of the file with zeros as the digest at `position`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        digest.update(file.read(position) + _NO_DIGEST.encode())
        file.seek(len(_NO_DIGEST), os.SEEK_CUR)
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _write_digest(path: Path) -> None:
    found = _find_digest(path)
    assert found is not None  # save_file has just written the zeros
    digest = _compute_digest(path, found[0])
    with open(path, "r+b") as file:
        file.seek(found[0])
        file.write(digest.encode())


def check_digest(path: Path) -> None:
    """Raises ValueError unless the file at `path` has a digest and is what was written."""
    found = _find_digest(path)
    if found is None:
        raise ValueError(f"checkpoint: {path} must hold the digest that save_run writes, got none; it is damaged")
    if _compute_digest(path, found[0]) != found[1]:
        raise ValueError(f"checkpoint: {path} must be as it was written, got another SHA-256; it is damaged")


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

    A save that was killed while its files moved into the folder is finished before.

    name: WEIGHTS (one file or shards with an index) or ADAPTER_WEIGHTS.
    Raises: ValueError for a missing, truncated or corrupt file, for an index that names files or tensors that do not
    exist, and for weights that exist only as pickle; pickle files are never opened.
    """
    complete(directory)
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
