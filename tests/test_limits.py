"""The longest row and the vocabulary that a model can read: the rule, and what the models themselves do."""

import pytest
import tiny_models
import torch
import transformers

from ppo_ext.models.limits import NO_LIMITS, Limits, first_position, has_absolute_positions, limits_of

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 12,
    "num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 0, "forced_eos_token_id": None,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3, "rope_theta": 10000.0}


def build(name, **sizes):
    config = getattr(transformers, f"{name}Config")
    kind = {
        "Bart": "BartForConditionalGeneration",
        "Pegasus": "PegasusForConditionalGeneration",
        "T5": "T5ForConditionalGeneration",
        "Bert": "BertForSequenceClassification",
        "Roberta": "RobertaForSequenceClassification",
        "RobertaPreLayerNorm": "RobertaPreLayerNormForSequenceClassification",
        "Nystromformer": "NystromformerForSequenceClassification",
        "GPT2": "GPT2LMHeadModel",
    }.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    return getattr(transformers, kind)(config(**sizes)).eval()


MODELS = {
    "learned, GPT-2": (lambda: tiny_models.gpt2(n_positions=12), 12),
    "learned, behind two rows, OPT": (lambda: build("OPT", **SIZES, ffn_dim=24, word_embed_proj_dim=16), 12),
    "learned, decoder of BART": (lambda: transformers.BartForCausalLM(transformers.BartConfig(**SEQ2SEQ)), 12),
    "learned, BERT": (lambda: build("Bert", **SIZES), 12),
    "learned, behind the padding's row, RoBERTa": (lambda: build("Roberta", **{**SIZES, "pad_token_id": 1}), 10),
    "learned, its name has rel in it": (lambda: build("RobertaPreLayerNorm", **{**SIZES, "pad_token_id": 1}), 10),
    "learned, in a buffer": (lambda: build("Nystromformer", **SIZES, num_landmarks=4, segment_means_seq_len=4), 12),
    "rotary, from a table, GPT-J": (
        lambda: build("GPTJ", vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12, rotary_dim=4),
        12,
    ),
    "alibi, from a table, MPT": (
        lambda: build("Mpt", vocab_size=40, d_model=16, n_layers=1, n_heads=2, max_seq_len=12),
        12,
    ),
    "rotary, Llama": (lambda: tiny_models.llama(max_position_embeddings=12), None),
    "rotary, YaRN": (lambda: build("Qwen2", **SIZES, num_key_value_heads=1, rope_parameters=YARN), None),
    "rotary, GPT-NeoX": (lambda: build("GPTNeoX", **SIZES), None),
    "alibi, BLOOM": (lambda: build("Bloom", vocab_size=40, hidden_size=16, n_layer=1, n_head=2), None),
    "computed, XGLM": (
        lambda: build(
            "XGLM", vocab_size=40, d_model=16, num_layers=1, attention_heads=2, ffn_dim=16, max_position_embeddings=12
        ),
        None,
    ),
}


def reads(model, length):
    with torch.no_grad():
        try:
            model(input_ids=torch.full((1, length), 5))
        except (IndexError, RuntimeError):
            return False
    return True


@pytest.mark.parametrize("name", MODELS)
def test_the_longest_row_is_what_the_model_reads(name):
    build_model, expected = MODELS[name]
    model = build_model()
    assert limits_of(model).length == expected and limits_of(model).encoder_length is None
    assert reads(model, expected or 60)
    assert expected is None or not reads(model, expected + 1)


@pytest.mark.parametrize("name, expected", [("Bart", 12), ("Pegasus", 12), ("T5", None)])
def test_encoder_and_decoder_have_limits_of_their_own(name, expected):
    model = build(name, **SEQ2SEQ)
    assert limits_of(model) == Limits(expected, expected, 40)
    for length in (12, 13):
        ids, short = torch.full((1, length), 5), torch.full((1, 3), 5)
        for inputs in ({"input_ids": ids, "decoder_input_ids": short}, {"input_ids": short, "decoder_input_ids": ids}):
            with torch.no_grad():
                if expected is None or length <= expected:
                    model(**inputs)
                else:
                    pytest.raises(IndexError, model, **inputs)


def test_the_limits_of_a_wrapped_model_are_those_of_the_model():
    import ppo_ext

    peft = pytest.importorskip("peft")
    expected = Limits(48, None, tiny_models.VOCAB)
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["wpe"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_models.gpt2(), config)
    assert limits_of(model) == expected
    assert limits_of(ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.gpt2())) == expected
    assert limits_of(torch.nn.Linear(2, 2)) == NO_LIMITS


def test_the_smaller_of_embedding_and_head_bounds_the_ids():
    model = tiny_models.llama()
    model.set_output_embeddings(torch.nn.Linear(24, 40, bias=False))
    assert limits_of(model).vocabulary == 40


def test_both_models_have_to_read_a_sample():
    policy, reference = Limits(None, 20, 50), Limits(30, None, 48)
    assert policy.with_another(reference, "its vocabulary") == Limits(30, 20, 48, "its vocabulary")
    assert policy.with_another(policy, "its vocabulary") == policy


def test_first_position_is_that_of_the_models_own_numbering():
    model = transformers.RobertaForCausalLM(
        transformers.RobertaConfig(**{**SIZES, "pad_token_id": 1}, is_decoder=True)
    ).eval()
    assert first_position(model) == 2 and first_position(tiny_models.gpt2()) == first_position(tiny_models.llama()) == 0
    ids = torch.tensor([[5, 6, 7, 8]])
    positions = torch.arange(4)[None] + first_position(model)
    torch.testing.assert_close(model(ids).logits, model(ids, position_ids=positions).logits)


def test_absolute_positions():
    assert has_absolute_positions(tiny_models.gpt2()) and has_absolute_positions(build("Bart", **SEQ2SEQ))
    pegasus = transformers.PegasusXForConditionalGeneration(transformers.PegasusXConfig(**SEQ2SEQ))
    assert has_absolute_positions(pegasus), "computed ones are absolute, too"
    assert not has_absolute_positions(tiny_models.llama()) and not has_absolute_positions(tiny_models.t5())
