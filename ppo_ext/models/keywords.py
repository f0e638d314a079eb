"""Keywords of `from_pretrained` from programs written for transformers 4, in the words of every release since 4.46.

transformers 5 hands a keyword that it does not know to the model's constructor, which raises TypeError.
"""

from importlib.util import find_spec

from transformers import BitsAndBytesConfig

_QUANTIZED = ("load_in_8bit", "load_in_4bit")
_QUANTIZATION_PREFIXES = ("bnb_4bit_", "llm_int8_")
_WITHOUT_EFFECT = ("resume_download",)  # an interrupted download is always resumed by now


def translate(kwargs, device):
    """A copy of the keywords as transformers takes them today.

    load_in_8bit, load_in_4bit: with their bnb_4bit_* and llm_int8_* become quantization_config, on `device` unless
    device_map says otherwise, as in TRL; False asks for nothing. use_auth_token becomes token, use_flash_attention_2
    attn_implementation.
    Raises ValueError for an old keyword beside its new one, ImportError for quantization without bitsandbytes.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in _WITHOUT_EFFECT}
    kwargs = _rename(kwargs, "use_auth_token", "token", lambda value: value)
    kwargs = _rename(
        kwargs, "use_flash_attention_2", "attn_implementation", lambda value: "flash_attention_2" if value else None
    )
    return _with_quantization_config(kwargs, device)


def _rename(kwargs, old, new, convert):
    rest = {name: value for name, value in kwargs.items() if name != old}
    value = convert(kwargs.get(old))
    if value is None:
        return rest
    if rest.get(new) is not None:
        raise ValueError(
            f"from_pretrained: {old} must not be given beside {new}, got {kwargs[old]!r} and {rest[new]!r}"
        )
    return {**rest, new: value}


def _with_quantization_config(kwargs, device):
    flags = {name: kwargs[name] for name in _QUANTIZED if name in kwargs}
    if not flags:
        return kwargs
    options = {name: value for name, value in kwargs.items() if name.startswith(_QUANTIZATION_PREFIXES)}
    rest = {name: value for name, value in kwargs.items() if name not in flags and name not in options}
    wanted = [name for name, value in flags.items() if value]
    if not wanted:
        return rest
    if rest.get("quantization_config") is not None:
        raise ValueError(f"from_pretrained: {wanted[0]} must not be given beside quantization_config, got both")
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"bitsandbytes must be installed for {wanted[0]}=True: pip install bitsandbytes")
    rest["quantization_config"] = BitsAndBytesConfig(**flags, **options)
    rest.setdefault("device_map", {"": device})
    return rest
