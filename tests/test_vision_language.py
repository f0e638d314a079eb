"""Vision-language models and heads of other names as text policies: trained, saved and loaded as what they are."""

import pytest
import tiny_models
import torch
import transformers as tf
from architectures import tiny

import ppo_ext

SIZES = {
    "vocab_size": tiny_models.VOCAB,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def llava():
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**SIZES), vision_config=tf.CLIPVisionConfig(**VISION), image_token_index=5
    )
    return tf.LlavaForConditionalGeneration(config)


def smolvlm():
    config = tf.SmolVLMConfig(text_config=tf.LlamaConfig(**SIZES), vision_config=VISION, image_token_id=5)
    return tf.SmolVLMForConditionalGeneration(config)


def qwen2_vl():
    rope = {"type": "mrope", "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 24, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(text_config={**SIZES, "rope_scaling": rope}, vision_config=vision)
    return tf.Qwen2VLForConditionalGeneration(config)


def paligemma(attention="eager"):
    config = tf.PaliGemmaConfig(
        text_config=tf.GemmaConfig(**SIZES, head_dim=12),
        vision_config=tf.SiglipVisionConfig(**VISION, projection_dim=24),
        projection_dim=24,
        image_token_index=5,
    )
    config._attn_implementation = attention  # without token_type_ids its sdpa attends to later tokens
    return tf.PaliGemmaForConditionalGeneration(config)


def xlm(causal=True):
    sizes = {"emb_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64, "n_langs": 1}
    return tf.XLMWithLMHeadModel(tf.XLMConfig(vocab_size=tiny_models.VOCAB, causal=causal, pad_index=0, **sizes))


def bert(is_decoder=True):
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    return tf.BertLMHeadModel(
        tf.BertConfig(**sizes, num_attention_heads=2, is_decoder=is_decoder, max_position_embeddings=64)
    )


def gemma():
    return tf.GemmaForCausalLM(tf.GemmaConfig(**SIZES, head_dim=12, use_bidirectional_attention=True))


def xlnet():
    sizes = {"d_model": 24, "n_layer": 2, "n_head": 2, "d_inner": 48}
    return tf.XLNetLMHeadModel(tf.XLNetConfig(vocab_size=tiny_models.VOCAB, **sizes))


READ_AHEAD = {
    "paligemma": lambda: paligemma("sdpa"),
    "xlm": lambda: xlm(causal=False),
    "bert": lambda: bert(is_decoder=False),
    "gemma": gemma,
    "xlnet": xlnet,
    "cpmant": lambda: tiny.build("cpmant", tiny.CAUSAL),
    "prophetnet": lambda: tiny.build("prophetnet", tiny.CAUSAL),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("build", READ_AHEAD.values(), ids=READ_AHEAD)
def test_policy_whose_tokens_see_later_ones_is_refused(build, batch_size, dtype):
    config = ppo_ext.PPOConfig(batch_size=batch_size, mini_batch_size=1)
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(build().to(dtype))
    name = type(model.pretrained_model).__name__
    with pytest.raises(ValueError, match=f"^PPOTrainer: model must give a token the same logits .* got a {name} whose"):
        ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer())


@pytest.mark.parametrize("build", [llava, smolvlm, qwen2_vl, paligemma, xlm, bert])
def test_policy_begins_at_its_reference_trains_and_comes_back(build, tmp_path):
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-3)
    torch.manual_seed(0)
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(build())
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer())
    before = tiny_models.weights(trainer)
    (stats,) = tiny_models.steps(trainer, first_token=8)
    assert stats["objective/kl"] == 0
    head = next(
        name for name, p in model.named_parameters() if p is model.pretrained_model.get_output_embeddings().weight
    )
    assert not torch.equal(tiny_models.weights(trainer)[head], before[head])
    trainer.save_pretrained(tmp_path)
    attention = {"attn_implementation": "eager"} if build is paligemma else {}
    again = ppo_ext.PPOTrainer.from_pretrained(tmp_path, config=config, model_kwargs=attention).model
    assert type(again.pretrained_model) is type(model.pretrained_model)
    ids = torch.tensor([[3, 8, 9, 10]])
    for ours, theirs in zip(model.eval()(ids), again.eval()(ids), strict=True):
        assert ours is theirs is None or torch.equal(ours, theirs)
