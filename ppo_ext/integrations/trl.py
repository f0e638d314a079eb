"""`patch_trl`: TRL's trainers take their log-probabilities and entropies from ppo_ext's ops."""

import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable

from . import trl_functions
from .attributes import exchange

_log = logging.getLogger(__name__)

# The functions of `trl.trainer.utils`, and the arguments of them that the replacements know.
_FUNCTIONS: dict[str, tuple[Callable, set[str]]] = {
    "selective_log_softmax": (
        trl_functions.selective_log_softmax,
        {"logits", "index", "temperature", "row_mask"},
    ),
    "entropy_from_logits": (trl_functions.entropy_from_logits, {"logits", "chunk_size"}),
    "selective_log_softmax_and_entropy": (
        trl_functions.selective_log_softmax_and_entropy,
        {"logits", "index", "entropy_requires_grad", "temperature", "row_mask"},
    ),
}
_CHUNKED = "_ChunkedLogProbFunction"
_CHUNKED_ARGUMENTS = set(trl_functions.chunked_parameters(None))

_patched: dict[str, tuple[object, object]] = {}  # name in trl.trainer.utils: (TRL's, ours)


def patch_trl() -> list[str]:
    """Makes the trainers of an installed TRL (1.12 or newer) compute log-probabilities and entropies with ppo_ext.

    From TRL 1.15 on, GRPO, RLOO, DPO, KTO, SFT and AsyncGRPO get them from the hidden states, by `linear_statistics`;
    the trainers of `trl.experimental`, and all trainers of TRL 1.12 to 1.14, from logits, by `logprobs` and
    `logprobs_and_entropy`. It works before or after trainers are imported or made. Called again, it also reaches what
    was imported from elsewhere in the meantime. `unpatch_trl` undoes it.

    Returns:
        The names that were replaced, such as "trl.trainer.utils.selective_log_softmax".

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: it is older than 1.12, or its functions have arguments that are not known here. Nothing is
            replaced then.

    Differences from TRL's functions: results are float32 for logits in half precision too; a logit of -inf is
    probability 0 in entropies, not NaN; ids outside the vocabulary raise an error. Several ids per row (top-k) and
    weights partitioned by ZeRO-3 stay with TRL's own functions.
    """
    version = _version()
    utils = importlib.import_module("trl.trainer.utils")
    planned = {**_patched}
    for name in [*_FUNCTIONS, _CHUNKED]:
        if name not in planned and hasattr(utils, name):
            original = getattr(utils, name)
            planned[name] = (original, _replacement(name, original, version))
    if not {"selective_log_softmax", _CHUNKED} <= set(planned):
        raise _unknown(version, "trl.trainer.utils lacks selective_log_softmax or _ChunkedLogProbFunction")
    _patched.update(planned)
    changed = [name for name, pair in _patched.items() for name in _exchange(utils, name, *pair)]
    _log.info("patch_trl: TRL %s now takes from ppo_ext: %s", version, ", ".join(changed) or "nothing new")
    return changed


def unpatch_trl() -> list[str]:
    """Gives TRL its own functions back, also to modules that were imported since `patch_trl`; returns their names."""
    if not _patched:
        return []
    utils = importlib.import_module("trl.trainer.utils")
    changed = [name for name, (original, ours) in _patched.items() for name in _exchange(utils, name, ours, original)]
    _patched.clear()
    return changed


def _exchange(utils, name: str, old: object, new: object) -> list[str]:
    if old is not None:
        return exchange("trl", old, new)
    if getattr(utils, name) is None:  # None also stands in many other places
        setattr(utils, name, new)
        return [f"{utils.__name__}.{name}"]
    return []


def _version() -> str:
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError('patch_trl: TRL must be installed (pip install "trl>=1.12"), got none') from None
    if tuple(int(part) for part in version.split(".")[:2]) < (1, 12):
        raise _unknown(version, "programs for TRL 0.7 to 0.11 import ppo_ext.trl in place of trl")
    return version


def _replacement(name: str, original, version: str):
    if name == _CHUNKED:
        parameters = trl_functions.chunked_parameters(original)
        _check(version, name, parameters, _CHUNKED_ARGUMENTS)
        return trl_functions.ChunkedLogProbFunction(original, parameters)
    make, known = _FUNCTIONS[name]
    _check(version, name, list(inspect.signature(original).parameters), known)
    return make(original)


def _check(version: str, name: str, parameters: list[str], known: set[str]) -> None:
    if unknown := set(parameters) - known:
        raise _unknown(version, f"{name} has the argument {sorted(unknown)[0]!r}")


def _unknown(version: str, reason: str) -> RuntimeError:
    return RuntimeError(
        f"patch_trl: TRL must be a release from 1.12 on whose functions ppo_ext knows, got {version} ({reason}); "
        "nothing was patched"
    )
