"""From a path or hub id to a backbone and the state of its value head; local files are checked before they are used."""

import contextlib
import logging
import os

from transformers.utils import cached_file

from . import checkpoint, lora

logger = logging.getLogger(__name__)


def check_source(source):
    """Raises ValueError for what looks like a path but is no folder, before anything asks the hub for it."""
    looks_like_path = source.startswith((".", "~", os.sep)) or source.endswith(os.sep) or source.count(os.sep) > 1
    if not os.path.isdir(source) and (looks_like_path or os.path.exists(source)):
        raise ValueError(f"from_pretrained: the model must be an existing folder or a hub id, got {source}")


def load_pretrained(auto_class, source, is_trainable, model_args, kwargs):
    """Returns the transformers model in `source`, or the PeftModel if it holds an adapter, and whether it does.

    Raises ValueError for a path that is not there, for pickle weights, and for files that are missing, damaged or of
    other shapes than the config says.
    """
    check_source(source)
    adapter_found = lora.find_adapter(source, kwargs)
    base = lora.base_model_of(source, kwargs) if adapter_found else source
    check_source(base)
    if os.path.isdir(base):
        _check_folder(base, kwargs)
    model = _load_backbone(auto_class, base, model_args, kwargs)
    return (lora.load(model, source, is_trainable, kwargs) if adapter_found else model), adapter_found


def _check_folder(base, kwargs):
    if {"variant", "gguf_file", "state_dict"} & kwargs.keys():
        return
    folder = os.path.join(base, kwargs.get("subfolder", ""))
    if "config" not in kwargs:
        checkpoint.read_json(os.path.join(folder, "config.json"))
    if not checkpoint.weight_files(folder):
        wanted = f"{checkpoint.WEIGHTS} or {checkpoint.WEIGHTS_INDEX}"
        raise ValueError(f"checkpoint: {folder} must hold {wanted}, got {sorted(os.listdir(folder))}")


def _load_backbone(auto_class, base, model_args, kwargs):
    kwargs = dict(kwargs)
    ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    # use_safetensors holds for the hub too: no file is ever unpickled. Mismatches are let through to be named here
    with _without_v_head_report():
        model, info = auto_class.from_pretrained(
            base,
            *model_args,
            **{"use_safetensors": True, **kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True},
        )
    if info["mismatched_keys"] and not ignore_mismatched_sizes:
        name, found, expected = _mismatch(min(info["mismatched_keys"]), model, base)
        raise ValueError(f"checkpoint: {name} in {base} must have shape {expected} as its config says, got {found}")
    unexpected = sorted(name for name in info["unexpected_keys"] if not name.startswith("v_head."))
    for names, fate in ((unexpected, "not used"), (sorted(info["missing_keys"]), "initialised anew")):
        if names and len(unexpected) < len(info["unexpected_keys"]):
            logger.warning("%s: %s", base, f"{', '.join(names)}: {fate}")
    return model


def _mismatch(entry, model, base):
    """Returns name, found and expected shape; transformers 4.57 gives the name alone where 5.23 gives all three."""
    if not isinstance(entry, str):
        return entry[0], list(entry[1]), list(entry[2])
    path = checkpoint.weight_files(base).get(entry) if os.path.isdir(base) else None
    found = list(checkpoint.read_tensors(path, entry)[entry].shape) if path else "another"
    return entry, found, list(model.state_dict()[entry].shape)


@contextlib.contextmanager
def _without_v_head_report():
    """Drops transformers' table of unknown weights where it names the v_head, which is read right afterwards."""

    def keep(record):
        return "v_head" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)


def read_v_head(source, kwargs):
    """Returns the v_head.* tensors of a checkpoint, {} with an info message if it has none."""
    if os.path.isdir(source):
        files = checkpoint.weight_files(os.path.join(source, kwargs.get("subfolder", "")))
    else:
        files = _cached_weight_files(source, kwargs)
    state = {}
    for path in sorted({path for name, path in files.items() if name.startswith("v_head.")}):
        state.update(checkpoint.read_tensors(path, "v_head."))
    if not state:
        logger.info("%s holds no v_head, so a new one is initialised, as expected before the first PPO run", source)
    return state


def _cached_weight_files(source, kwargs):
    """Returns {tensor name: file path} for a hub id whose weights transformers has just put into its cache."""
    kwargs = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in kwargs}
    for name in (checkpoint.WEIGHTS, checkpoint.WEIGHTS_INDEX):
        path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False, **kwargs)
        if path is not None:
            return checkpoint.weight_files(os.path.dirname(path))
    return {}
