"""Random models of three layers for the value-head tests, their inputs, and what those tests compare."""

import pytest
import torch
import transformers

from ppo_ext.models import auto as models

VOCAB, HIDDEN, LAYERS = 53, 16, 3
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LAYER_LISTS = {
    "gpt2": "transformer.h",
    "llama": "model.layers",
    "neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "t5": "decoder.block",
}
ARCHITECTURES = list(LAYER_LISTS)


def tiny(arch, seed=0):
    """A random model of three layers, in eval mode; OPT has an embedding narrower than its layers."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        **TOKENS,
    }
    if arch == "gpt2":
        config = transformers.GPT2Config(**sizes, n_positions=64)
        model = transformers.GPT2LMHeadModel(config)
    elif arch == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=24))
    elif arch == "neox":
        model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=24))
    elif arch == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False)
        model = transformers.OPTForCausalLM(config)
    else:
        sizes = {"vocab_size": VOCAB, "d_model": HIDDEN, "num_layers": LAYERS, "num_heads": 2, "d_kv": 8, "d_ff": 24}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2)
        model = transformers.T5ForConditionalGeneration(config)
    return model.eval()


def wrapper_name(arch):
    return "AutoModelForSeq2SeqLMWithValueHead" if arch == "t5" else "AutoModelForCausalLMWithValueHead"


def wrapped(arch="gpt2", seed=0, **kwargs):
    model = tiny(arch, seed)
    return getattr(models, wrapper_name(arch)).from_pretrained(model, **kwargs).eval()


def inputs(arch="gpt2", seed=1):
    """A batch of two, the second right-padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, 9), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": attention_mask}
    if arch == "t5":
        batch["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 5), generator=generator)
    return batch


def lora(**options):
    """A small LoRA config for GPT-2 that changes the outputs from the start."""
    peft = pytest.importorskip("peft")
    target = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "init_lora_weights": False, **target, **options})


def assert_same_outputs(ours, theirs, batch, atol=1e-6):
    with torch.no_grad():
        pairs = list(zip(ours(**batch), theirs(**batch), strict=True))
    for name, (a, b) in zip(("logits", "loss", "value"), pairs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def all_tensors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
