"""A tiny random model of any architecture of transformers, from nothing but its configuration class."""

import inspect

import torch
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

VOCAB, LENGTH, PAD, EOS = 48, 64, 0, 1
LAYERS = 3
CAUSAL, SEQ2SEQ = "causal", "seq2seq"
KINDS = {
    CAUSAL: (modeling_auto.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    SEQ2SEQ: (modeling_auto.AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
}

# The fields of configurations that set a size, by its value. A field that a configuration lacks is left out.
_SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input src_vocab_size tgt_vocab_size decoder_vocab_size",
    LENGTH: "max_position_embeddings n_positions n_ctx max_sequence_length seq_length max_seq_len block_size",
    LAYERS: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
    32: "hidden_size n_embd d_model dim embedding_size word_embed_proj_dim hidden_dim lru_width",
    40: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim n_inner ffn_hidden_size shared_intermediate_size",
    64: "mamba_d_ssm",
    16: "mamba_d_head moe_intermediate_size moe_shared_expert_intermediate_size shared_expert_intermediate_size q_lora_rank "
    "kv_lora_rank hidden_size_per_layer_input expert_ffn_hidden_size",
    8: "head_dim d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim kv_channels attention_head_dim index_head_dim "
    "linear_key_head_dim linear_value_head_dim mamba_d_state rotary_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_decoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts index_n_heads "
    "linear_num_value_heads mamba_n_heads",
    2: "num_key_value_heads num_kv_heads num_query_groups num_experts_per_tok moe_k linear_num_key_heads mamba_expand",
    1: "n_group topk_group n_groups mamba_n_groups first_k_dense_replace n_shared_experts",
}
SIZES = {name: value for value, names in _SIZES.items() for name in names.split()}
# What a tiny model needs beyond that, by model type.
SPECIAL = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "ctrl": {"dff": 40},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "mamba": {"state_size": 8},
    "reformer": {"is_decoder": True},
}
TOKENS = {
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "sep_token_id": EOS,
}


class CannotBuild(Exception):
    """Why no tiny model of an architecture can be made this way."""


def architectures():
    """(model type, kind) of every architecture with a language model head."""
    return [(name, kind) for kind, (_, names) in KINDS.items() for name in names]


def _fields(config_class):
    names = {name for kind in config_class.__mro__ for name in getattr(kind, "__annotations__", {})}
    return names | set(inspect.signature(config_class.__init__).parameters)


def _arguments(config_class, special):
    fields, renamed = _fields(config_class), getattr(config_class, "attribute_map", {})
    found = {
        name: value
        for name, value in (SIZES | TOKENS | {"is_decoder": True, "use_cache": True}).items()
        if name in fields and name not in renamed
    }
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has keys for every head
    for name, part in getattr(config_class, "sub_configs", {}).items():
        if inspect.isclass(part) and part.__name__ != "AutoConfig":
            found[name] = _arguments(part, {})
    return found | special


def config(model_type):
    config_class = CONFIG_MAPPING[model_type]
    made = config_class(**_arguments(config_class, SPECIAL.get(model_type, {})))
    for part in {id(c): c for c in (made, made.get_text_config(), made.get_text_config(decoder=True))}.values():
        for name, value in TOKENS.items():
            setattr(part, name, value)
    return made


def build(model_type, kind):
    """The model in eval mode, with weights large enough for log-probabilities worth comparing."""
    torch.manual_seed(0)
    try:
        # the grouped kernel of the experts takes no float64
        model = KINDS[kind][0].from_config(config(model_type), experts_implementation="eager").eval()
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    if sum(parameter.numel() for parameter in model.parameters()) > 20_000_000:
        raise CannotBuild("some of its sizes have fields of other names, so it has more than 20 million weights")
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, bos_token_id=EOS, decoder_start_token_id=PAD)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.15)
    return model
