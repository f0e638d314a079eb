"""Writing to a folder so that a kill, an error or a second writer leaves the old files or the new ones and no mixture.

A save is written to a hidden folder `.tmp-*` inside the target folder and flushed to disk. Then that folder is renamed to
`.new-*`: from here on the save counts. Its files move into the target folder one by one, the file by which a loader finds
the weights last. If the process is killed meanwhile, `complete` moves the rest, before the next load or save.

Whoever writes holds a lock (flock) on the folder that it works in. A lock ends with its process, so the folders that a
killed save has left are known from those that are in use, and the next save removes them. Where a file system has no such
locks, two writers are not kept apart, and nothing is removed.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

Path = str | os.PathLike[str]

_PLAN = ".plan.json"  # {"move": names in order, "remove": names}, beside the files of a save
_SHARD = re.compile(r"model-(?:\w+-)?\d{5}-of-\d{5}\.safetensors")
_STAGING, _SAVED = re.compile(r"\.tmp-[0-9a-f]{32}"), re.compile(r"\.new-[0-9a-f]{32}")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")  # safetensors and tokenizers are written in Rust, and name no file


@contextlib.contextmanager
def staged(directory: Path) -> Iterator[str]:
    """Yields an empty folder whose files move into `directory` if the block succeeds; otherwise nothing changes there.

    Weights of an earlier save that the new ones replace are removed. A README.md that is there stays as it is: users edit
    the model card that every save writes.
    Raises: OSError that names `directory` if the disk is full or refuses.
    """
    with _staging_folder(directory) as staging:
        yield staging
        _settle(staging)
        with _locked(directory):
            _complete_all(directory)
            _publish(staging, directory)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[str]:
    """Yields the name of a file that replaces the one at `path` if the block succeeds. Raises: OSError as `staged`."""
    directory, name = os.path.split(os.path.abspath(path))
    with _staging_folder(directory) as staging:
        yield os.path.join(staging, name)
        _settle(staging)
        os.replace(os.path.join(staging, name), path)
        flush(directory)


@contextlib.contextmanager
def _staging_folder(directory: Path) -> Iterator[str]:
    """Yields an empty folder inside `directory`, which is removed at the end; removes those of killed saves too."""
    is_new = not os.path.isdir(directory)
    with _naming(directory):
        try:
            os.makedirs(directory, exist_ok=True)
            with _locked(directory):
                _remove_abandoned(directory)
                own = os.path.join(directory, f".tmp-{uuid.uuid4().hex}")
                staging = os.path.join(own, "files")  # not `own` itself, since a save into the staging folder locks it
                os.makedirs(staging)
                lock = _lock(own)
            try:
                yield staging
            finally:
                shutil.rmtree(own, ignore_errors=True)
                _unlock(lock)
        except BaseException:
            if is_new:
                with contextlib.suppress(OSError):  # it holds something after all
                    os.rmdir(directory)
            raise


def complete(directory: Path) -> None:
    """Finishes a save that was killed while its files moved into the folder; call it before reading from there."""
    if os.path.isdir(directory) and any(map(_SAVED.fullmatch, os.listdir(directory))):
        with _naming(directory), _locked(directory):  # waits for the writer if it is alive
            _complete_all(directory)


def _publish(staging: str, directory: Path) -> None:
    """Makes the files of the staging folder those of the target folder, whose lock the caller holds."""
    if os.path.exists(os.path.join(directory, "README.md")):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(staging, "README.md"))
    _rename_colliding_shards(staging, directory)
    names = _files(staging)
    plan = {"move": sorted(names, key=_rank), "remove": _stale_weights(directory, names)}
    write_inside(os.path.join(staging, _PLAN), json.dumps(plan))
    flush(staging)
    saved = os.path.join(directory, f".new-{uuid.uuid4().hex}")
    os.rename(staging, saved)
    flush(directory)
    _move(saved, directory)


def _complete_all(directory: Path) -> None:
    for name in sorted(filter(_SAVED.fullmatch, os.listdir(directory))):
        _move(os.path.join(directory, name), directory)


def _move(saved: str, directory: Path) -> None:
    """Carries out the plan of a save, or what is left of it. Without the plan, only its removal is left."""
    plan: dict[str, list[str]] = {"move": [], "remove": []}
    with contextlib.suppress(FileNotFoundError), open(os.path.join(saved, _PLAN), encoding="utf-8") as file:
        plan = json.load(file)
    for name in plan["move"]:
        target = os.path.join(directory, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # moved before the kill
            os.replace(os.path.join(saved, name), target)
    flush(directory)
    for name in plan["remove"]:
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(directory, name))
    flush(directory)
    shutil.rmtree(saved)


def _rank(name: str) -> tuple[int, str]:
    """Order of the moves: the file by which a loader finds the new weights is the last one."""
    base = os.path.basename(name)
    return (2 if base in (WEIGHTS, WEIGHTS_INDEX) else 1 if base.endswith(".safetensors") else 0), name


def _files(folder: str) -> list[str]:
    """The files below a folder, by names relative to it."""
    return [
        os.path.relpath(os.path.join(parent, file), folder) for parent, _, files in os.walk(folder) for file in files
    ]


def _stale_weights(directory: Path, written: list[str]) -> list[str]:
    """The weights of an earlier save, which a loader might read instead of the new ones."""
    if WEIGHTS not in written and WEIGHTS_INDEX not in written:
        return []
    found = set(os.listdir(directory)) - set(written)
    return sorted(name for name in found if name in (WEIGHTS, WEIGHTS_INDEX) or _SHARD.fullmatch(name))


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
    write_inside(index_path, json_text(index))


# ---- files -----------------------------------------------------------------------------------------------------------


def json_text(content: Any) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_inside(path: Path, text: str) -> None:
    """Writes a text file inside a staging folder and waits until it is on disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Waits until the file or folder is on disk. Without it a power cut may keep the rename and lose the content."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _settle(staging: str) -> None:
    """Gives all files the mode that the umask asks for, and waits until they are on disk; safetensors makes them 0600."""
    write_inside(os.path.join(staging, _PLAN), "")
    mode = os.stat(os.path.join(staging, _PLAN)).st_mode & 0o777
    os.remove(os.path.join(staging, _PLAN))
    for name in _files(staging):
        os.chmod(os.path.join(staging, name), mode)
        flush(os.path.join(staging, name))
    for folder, _, _ in os.walk(staging):
        flush(folder)


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Makes the errors of a disk that is full or refuses name the folder, whichever library met them."""
    try:
        yield
    except Exception as error:
        found = _RUST_ERRNO.search(str(error))
        code = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if code not in _DISK:
            raise
        why = os.strerror(code)
        raise OSError(
            code, f"checkpoint: {directory} must be a folder that can be written to, got {why}; its files are as before"
        ) from error


# ---- locks -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Waits until no other writer changes the folder, and keeps them out during the block."""
    lock = _lock(directory)
    try:
        yield
    finally:
        _unlock(lock)


def _lock(directory: Path, wait: bool = True) -> int | None:
    """A descriptor that holds the folder's lock. None: another one holds it, or the file system has no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _remove_abandoned(directory: Path) -> None:
    """Removes the staging folders of saves that were killed; the caller holds the target's lock."""
    for name in filter(_STAGING.fullmatch, os.listdir(directory)):
        path = os.path.join(directory, name)
        with contextlib.suppress(FileNotFoundError):  # a writer has just removed its own
            lock = _lock(path, wait=False)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
