"""Loads the backbone and the state of its value head from a path or a hub id; local files are checked first."""

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import cached_file

from . import checkpoint, lora
from .staging import complete

logger = logging.getLogger(__name__)


def check_source(source: str) -> None:
    """Raises ValueError for what looks like a path but is not a folder, before the hub is asked for it."""
    looks_like_path = source.startswith((".", "~", os.sep)) or source.endswith(os.sep) or source.count(os.sep) > 1
    if not os.path.isdir(source) and (looks_like_path or os.path.exists(source)):
        raise ValueError(f"from_pretrained: the model must be an existing folder or a hub id, got {source}")


def load_pretrained(
    auto_class: Any,
    source: str,
    is_trainable: bool,
    model_args: tuple[Any, ...],
    kwargs: dict[str, Any],
    base_model: Any = None,
) -> tuple[Any, bool]:
    """Returns the transformers model in `source`, or the PeftModel if it holds an adapter, and whether it does.

    base_model: what the adapter is put on; None: the model that its config names.
    Raises: ValueError for a path that does not exist, for pickle weights, for missing or damaged files, and for tensors
    of other shapes than the config says.
    """
    check_source(source)
    complete(source)
    adapter_found = lora.find_adapter(source, kwargs)
    if base_model is not None:
        if not adapter_found or not isinstance(base_model, PreTrainedModel):
            got = type(base_model).__name__ if adapter_found else f"{source} without an adapter"
            raise ValueError(f"from_pretrained: base_model must be a transformers model for an adapter, got {got}")
        return lora.load(base_model, source, is_trainable, kwargs), True
    base = lora.base_model_of(source, kwargs) if adapter_found else source
    check_source(base)
    complete(base)
    if os.path.isdir(base):
        _check_folder(base, kwargs)
    model = _load_backbone(_class_for(auto_class, base, kwargs), base, model_args, kwargs)
    return (lora.load(model, source, is_trainable, kwargs) if adapter_found else model), adapter_found


def _class_for(auto_class: Any, base: str, kwargs: Mapping[str, Any]) -> Any:
    """The auto class, or the class by which the checkpoint was saved if the auto class would take another one or none.

    A vision-language checkpoint is such a case: AutoModelForCausalLM loads the language model alone, or refuses it.
    """
    if "gguf_file" in kwargs or kwargs.get("trust_remote_code"):
        return auto_class
    config = kwargs.get("config", base)
    if isinstance(config, (str, os.PathLike)):
        config = AutoConfig.from_pretrained(config, **lora.hub_arguments(kwargs))
    named = (getattr(config, "architectures", None) or [""])[0]
    mapped = auto_class._model_mapping.get(type(config), ())
    classes = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
    saved = getattr(transformers, named, None)
    fits = config.is_encoder_decoder == ("Seq2Seq" in auto_class.__name__)
    if not fits or named in [kind.__name__ for kind in classes] or saved is None or not saved.can_generate():
        return auto_class
    return saved


def drop_quantization_mark(model: Any) -> None:
    """Takes the mark of a quantized model from one whose weights are plain floating-point tensors, so that it can be saved.

    transformers leaves it on a model that it has dequantized while loading, for example from a GGUF file.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or not hasattr(quantizer, "remove_quantization_config"):
        return
    half_or_more = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    weights = [
        tensor for tensor in model.state_dict().values() if isinstance(tensor, torch.Tensor) and tensor.dim() > 1
    ]
    if weights and all(type(weight) is torch.Tensor and weight.dtype in half_or_more for weight in weights):
        quantizer.remove_quantization_config(model)


def _check_folder(base: str, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if a local folder has no config or no whole weights; other formats are transformers' matter."""
    if {"variant", "gguf_file", "state_dict"} & kwargs.keys():
        return
    folder = os.path.join(base, kwargs.get("subfolder", ""))
    if "config" not in kwargs:
        _refuse_inner_adapters(folder)
        checkpoint.read_json(os.path.join(folder, "config.json"))
    if not checkpoint.weight_files(folder):
        wanted = f"{checkpoint.WEIGHTS} or {checkpoint.WEIGHTS_INDEX}"
        raise ValueError(f"checkpoint: {folder} must hold {wanted}, got {sorted(os.listdir(folder))}")


def _refuse_inner_adapters(folder: str) -> None:
    """Raises ValueError for a folder with adapters inside folders of their names, as peft saves those not called default."""
    if os.path.exists(os.path.join(folder, "config.json")):
        return
    configs = {name: os.path.join(folder, name, checkpoint.ADAPTER_CONFIG) for name in sorted(os.listdir(folder))}
    inner = [name for name, config in configs.items() if os.path.exists(config)]
    if inner:
        raise ValueError(
            f"checkpoint: {folder} must hold a model or an adapter itself, got adapters in folders inside it: "
            f"{', '.join(inner)}; give from_pretrained one of those folders"
        )


def _load_backbone(auto_class: Any, base: str, model_args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    kwargs = dict(kwargs)
    ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
    # use_safetensors: pickle files are not read from the hub either. Tensors of a wrong shape are ignored at first, so
    # that the error below can name them
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
    _check_any_weight_was_found(model, info["missing_keys"], unexpected, base)
    for names, fate in ((unexpected, "not used"), (sorted(info["missing_keys"]), "newly initialised")):
        if names and len(unexpected) < len(info["unexpected_keys"]):
            logger.warning("%s: %s", base, f"{', '.join(names)}: {fate}")
    return model


def _check_any_weight_was_found(model: Any, missing: Collection[str], unexpected: list[str], base: str) -> None:
    """Raises ValueError if every weight of the model is newly initialised although the checkpoint has other tensors."""
    if unexpected and {name for name, _ in model.named_parameters()} <= set(missing):
        some = ", ".join(unexpected[:3])
        hint = "; it was saved from a compiled model: remove _orig_mod. from the names" if "_orig_mod." in some else ""
        raise ValueError(f"checkpoint: {base} must hold weights of {type(model).__name__}, got {some}{hint}")


def _mismatch(entry: Any, model: Any, base: str) -> tuple[str, Any, list[int]]:
    """Returns name, found and expected shape of a mismatch; transformers 4.57 reports only the name, 5.23 all three."""
    if not isinstance(entry, str):
        return entry[0], list(entry[1]), list(entry[2])
    path = checkpoint.weight_files(base).get(entry) if os.path.isdir(base) else None
    found = list(checkpoint.read_tensors(path, entry)[entry].shape) if path else "another"
    return entry, found, list(model.state_dict()[entry].shape)


@contextlib.contextmanager
def _without_v_head_report() -> Iterator[None]:
    """Suppresses transformers' warning about unknown weights if it names the v_head, which is loaded afterwards."""

    def keep(record: logging.LogRecord) -> bool:
        return "v_head" not in record.getMessage()

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "utils.loading_report")]
    for each in loggers:
        each.addFilter(keep)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(keep)


def read_v_head(source: str, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns the v_head.* tensors of a checkpoint; {} and an info message if it has none."""
    if os.path.isdir(source):
        files = checkpoint.weight_files(os.path.join(source, kwargs.get("subfolder", "")))
    else:
        files = _cached_weight_files(source, kwargs)
    state: dict[str, torch.Tensor] = {}
    for path in sorted({path for name, path in files.items() if name.startswith("v_head.")}):
        state.update(checkpoint.read_tensors(path, "v_head."))
    if not state:
        logger.info("%s holds no v_head, so a new one is initialised, as expected before the first PPO run", source)
    return state


def read_v_head_of(model: Any) -> dict[str, torch.Tensor]:
    """The v_head.* tensors in the local folder that a transformers model says it was loaded from; {} if it has none."""
    folder = "" if lora.is_peft_model(model) else getattr(model, "name_or_path", "")
    with contextlib.suppress(ValueError):  # weights that are not safetensors; the user has chosen to load them
        return read_v_head(folder, {}) if os.path.isdir(folder) else {}
    return {}


def _cached_weight_files(source: str, kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Returns {tensor name: file path} for a hub id whose weights transformers has just downloaded to its cache."""
    kwargs = {name: kwargs[name] for name in ("cache_dir", "revision", "subfolder", "token") if name in kwargs}
    for name in (checkpoint.WEIGHTS, checkpoint.WEIGHTS_INDEX):
        path = cached_file(source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False, **kwargs)
        if path is not None:
            return checkpoint.weight_files(os.path.dirname(path))
    return {}
