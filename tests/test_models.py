"""The value-head models against an installed TRL 0.11.4: head, outputs, gradients; checkpointing and the cache."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import require_trl
from head_models import (
    ARCHITECTURES,
    HIDDEN,
    LAYER_LISTS,
    VOCAB,
    assert_same_outputs,
    assert_same_state,
    inputs,
    lora,
    tiny,
    wrapped,
    wrapper_name,
)

from ppo_ext.models import auto as models
from ppo_ext.models.value_head import ValueHead


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_same_seed_gives_the_head_and_outputs_of_trl(arch):
    trl = require_trl()
    theirs_class, ours_class = getattr(trl, wrapper_name(arch)), getattr(models, wrapper_name(arch))
    torch.manual_seed(7)
    theirs = theirs_class.from_pretrained(tiny(arch)).eval()
    ours = ours_class.from_pretrained(tiny(arch)).eval()
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs, inputs(arch))
    labels = inputs(arch)["decoder_input_ids" if arch == "t5" else "input_ids"]
    assert_same_outputs(ours, theirs, {**inputs(arch), "labels": labels})


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_same_gradients_as_trl(arch):
    trl = require_trl()
    gradients = []
    for module in (models, trl):
        model = getattr(module, wrapper_name(arch)).from_pretrained(tiny(arch)).eval()
        logits, _, value = model(**inputs(arch))
        (logits.logsumexp(-1).sum() + value.square().sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"v_head_init_strategy": "normal"}, {"v_head_init_strategy": "normal", "v_head_initializer_range": 3.0}],
)
def test_init_options_draw_as_in_trl(options):
    trl = require_trl()
    heads = [
        module.AutoModelForCausalLMWithValueHead.from_pretrained(
            tiny("gpt2"), summary_dropout_prob=0.25, **options
        ).v_head
        for module in (models, trl)
    ]
    for name in ("weight", "bias"):
        assert torch.equal(getattr(heads[0].summary, name), getattr(heads[1].summary, name))
    assert heads[0].dropout.p == heads[1].dropout.p == 0.25
    after = [torch.rand(()) for _ in heads]
    assert after[0] != after[1]


def test_same_generator_state_after_loading_as_trl(tmp_path):
    trl = require_trl()
    tiny("gpt2").save_pretrained(tmp_path)
    draws = []
    for module in (models, trl):
        torch.manual_seed(11)
        module.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_half_backbone_keeps_half_logits_and_float_values(arch):
    model = getattr(models, wrapper_name(arch)).from_pretrained(tiny(arch).bfloat16()).eval()
    logits, _, value = model(**inputs(arch))
    assert (logits.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    assert model.to(torch.bfloat16)(**inputs(arch))[2].dtype == torch.float32
    assert model.double()(**inputs(arch))[2].dtype == torch.float64


def test_values_are_computed_in_float_under_autocast():
    head = ValueHead(transformers.GPT2Config(n_embd=HIDDEN)).eval()
    hidden_states = torch.randn(2, 5, HIDDEN)
    expected = head(hidden_states)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(hidden_states), expected)


def test_past_key_values_continue_the_sequence():
    model, batch = wrapped(), inputs()
    batch["attention_mask"][:] = 1
    with torch.no_grad():
        logits, _, value = model(**batch)
        start = {name: tensor[:, :6] for name, tensor in batch.items()}
        *_, past = model(**start, return_past_key_values=True)
        rest = {"input_ids": batch["input_ids"][:, 6:], "attention_mask": batch["attention_mask"]}
        later = model(**rest, past_key_values=past)
    torch.testing.assert_close(later[0], logits[:, 6:], rtol=0, atol=1e-5)
    torch.testing.assert_close(later[2], value[:, 6:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_generate_is_the_backbones(arch):
    model = wrapped(arch)
    batch = {name: tensor for name, tensor in inputs(arch).items() if name != "decoder_input_ids"}
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(model.generate(**batch, **options), model.pretrained_model.generate(**batch, **options))


@pytest.mark.parametrize(("arch", "adapter"), [*((arch, False) for arch in ARCHITECTURES), ("gpt2", True)])
def test_gradient_checkpointing_recomputes_in_train_mode(arch, adapter):
    model = wrapped(arch, peft_config=lora() if adapter else None)
    layer = dict(model.pretrained_model.named_modules())[("base_model.model." if adapter else "") + LAYER_LISTS[arch]][
        0
    ]
    calls = []
    next(m for m in layer.modules() if type(m).__name__.lower().endswith("norm")).register_forward_hook(
        lambda *_: calls.append(torch.is_grad_enabled())
    )

    def gradients():
        calls.clear()
        model.zero_grad()
        # the recomputation must draw the same dropout masks as the first pass
        torch.manual_seed(0)
        logits, _, value = model(**inputs(arch))
        (logits.square().mean() + value.square().mean()).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model.train()
    plain = gradients()
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    assert len(calls) == 2
    assert plain.keys() == recomputed.keys() != set()
    for name in plain:
        torch.testing.assert_close(plain[name], recomputed[name], rtol=0, atol=1e-6)
    model.gradient_checkpointing_disable()
    gradients()
    assert len(calls) == 1


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_value_reads_the_last_hidden_states_and_keeps_no_others(arch):
    model, batch = wrapped(arch), inputs(arch)
    kept, modules = [], list(model.pretrained_model.modules())[1:]
    model.pretrained_model.register_forward_hook(lambda module, args, output: kept.append(output))
    with torch.no_grad():
        value = model(**batch)[2]
        assert "hidden_states" not in kept[0] and "decoder_hidden_states" not in kept[0]
        assert not any(module._forward_hooks for module in modules)
        output = model.pretrained_model(**batch, output_hidden_states=True)
        hidden_states = output["decoder_hidden_states" if arch == "t5" else "hidden_states"]
        assert torch.equal(value, model.v_head(hidden_states[-1]).squeeze(-1))


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_model_whose_hooks_do_not_run_gives_the_same_value(arch, monkeypatch):
    model = wrapped(arch)
    expected = model(**inputs(arch))[2]
    monkeypatch.setattr("ppo_ext.models.value_head._backbones", lambda model: [])
    assert torch.equal(model(**inputs(arch))[2], expected)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_keywords_of_the_backbone_are_taken(arch):
    model = wrapped(arch)
    plain, given = model(**inputs(arch)), model(**inputs(arch), return_dict=True, use_cache=False)
    assert torch.equal(plain[0], given[0]) and torch.equal(plain[2], given[2])


def test_no_cache_is_built_when_none_is_asked_for():
    model, seen = wrapped(), []
    model.pretrained_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True
    )
    model(**inputs())
    assert seen == [False]


def test_rejects_a_model_without_language_model_head():
    with pytest.raises(ValueError, match=r"must have a language model head \(lm_head or embed_out\), got GPT2Model"):
        models.AutoModelForCausalLMWithValueHead(tiny("gpt2").transformer)


def test_rejects_unknown_init_and_config_without_width():
    with pytest.raises(ValueError, match="v_head_init_strategy must be None or 'normal', got 'zeros'"):
        wrapped(v_head_init_strategy="zeros")
    with pytest.raises(ValueError, match="config must have hidden_size"):
        ValueHead(object())
    with pytest.raises(TypeError, match="must be a path, a hub id or a PreTrainedModel, got int"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(3)


def test_width_is_the_last_hidden_states_own():
    config = {"is_encoder_decoder": True, "decoder": SimpleNamespace(hidden_size=6), "hidden_size": 5}
    assert ValueHead(SimpleNamespace(**config)).summary.in_features == 6
    assert ValueHead(SimpleNamespace(**{**config, "is_encoder_decoder": False})).summary.in_features == 5
    assert ValueHead(SimpleNamespace(**config, word_embed_proj_dim=4)).summary.in_features == 4
    assert ValueHead(SimpleNamespace(text_config=SimpleNamespace(hidden_size=7))).summary.in_features == 7


def test_composed_encoder_decoder_matches_trl():
    trl = require_trl()
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.BertModel(transformers.BertConfig(**sizes, intermediate_size=8))
    decoder = tiny("gpt2").config
    decoder.update({"is_decoder": True, "add_cross_attention": True})
    backbone = transformers.EncoderDecoderModel(encoder=encoder, decoder=transformers.GPT2LMHeadModel(decoder)).eval()
    pair = []
    for module in (models, trl):
        torch.manual_seed(1)
        pair.append(module.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(backbone).eval())
    assert_same_outputs(*pair, inputs("t5"))


def test_backbone_on_meta_keeps_its_head():
    with torch.device("meta"):
        backbone = transformers.GPT2LMHeadModel(tiny("gpt2").config)
    head = models.AutoModelForCausalLMWithValueHead.from_pretrained(backbone).v_head
    assert head.summary.weight.device.type == "cpu"


def test_dropout_comes_from_config_then_keyword():
    config = transformers.GPT2Config(n_embd=HIDDEN)
    assert ValueHead(config).dropout.p == 0.1
    assert isinstance(ValueHead(config, summary_dropout_prob=0).dropout, torch.nn.Identity)
    config.summary_dropout_prob = 0.5
    assert ValueHead(config, summary_dropout_prob=0.2).dropout.p == 0.5
