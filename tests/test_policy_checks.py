"""What `PPOTrainer` finds out about a policy when it is made: what is trained, what the reference is, what can be saved."""

import pytest
import tiny_models
import torch

import ppo_ext

CausalLM = ppo_ext.AutoModelForCausalLMWithValueHead


def lora(**options):
    peft = pytest.importorskip("peft")
    target = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 4, **target, **options})


def peft_model(adapter_name="default", **options):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_models.build("gpt2"), lora(**options), adapter_name=adapter_name)


def trainer(model, ref_model=None, optimizer=None, **options):
    model = model if isinstance(model, CausalLM) else CausalLM.from_pretrained(model)
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-3)
    return ppo_ext.PPOTrainer(config, model, ref_model, tiny_models.tokenizer(), optimizer=optimizer, **options)


def first_kl(trainer):
    return tiny_models.steps(trainer)[0]["objective/kl"]


# ---- the reference of a peft policy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "eva"},
        {"modules_to_save": ["ln_f"]},
        {"target_modules": ["wte", "c_attn"]},
        {"trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_an_untrained_peft_policy_begins_at_its_reference(options, recwarn):
    trainer = tiny_models.trainer(peft_config=lora(**options))
    assert not [w for w in recwarn if "PPOTrainer" in str(w.message)]
    assert first_kl(trainer) == pytest.approx(0, abs=1e-6)
    with torch.no_grad(), trainer.optional_peft_ctx():
        ids = torch.tensor([[3, 4, 5]])
        assert torch.equal(trainer.model(ids)[0], tiny_models.build("gpt2")(ids).logits)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("given", [False, True])
def test_an_initialisation_that_changes_the_base_is_refused(kind, given):
    peft = pytest.importorskip("peft")
    base = tiny_models.build("llama")  # OLoRA cannot start from GPT-2's transposed weights
    config = lora(init_lora_weights=kind, target_modules=["q_proj"], fan_in_fan_out=False)
    model = CausalLM.from_pretrained(
        peft.get_peft_model(base, config) if given else base, peft_config=None if given else config
    )
    with pytest.raises(ValueError, match=rf"must be the model that was loaded, got an initialisation \({kind}\)"):
        trainer(model)
    assert first_kl(trainer(model, ppo_ext.create_reference_model(model))) == 0


def test_a_change_of_the_base_is_measured_whatever_the_config_says(monkeypatch):
    peft = pytest.importorskip("peft")
    make = peft.get_peft_model

    def changing(model, config):
        made = make(model, config)
        made.get_base_model().transformer.wte.weight.data[:9] *= 1.5
        made.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.data += 0.1
        return made

    monkeypatch.setattr(peft, "get_peft_model", changing)
    with pytest.raises(ValueError, match="must be the model that was loaded"):
        tiny_models.trainer(peft_config=lora())


def with_trained_base(weight):
    model = peft_model()
    model.get_base_model().get_parameter(weight).requires_grad_()
    return model


@pytest.mark.parametrize(
    "make, name",
    [
        (lambda: peft_model(bias="all"), "ln_1.bias"),
        (lambda: peft_model(bias="lora_only"), "c_attn.base_layer.bias"),
        (lambda: with_trained_base("transformer.wte.weight"), "wte.weight"),
        (lambda: with_trained_base("transformer.ln_f.weight"), "ln_f.weight"),
    ],
)
def test_a_reference_that_training_would_move_is_refused(make, name):
    with pytest.raises(
        ValueError, match=rf"must stay as it is, got \d+ trained weights that it uses, such as .*{name}"
    ):
        trainer(make())
    model = CausalLM.from_pretrained(make())
    reference = ppo_ext.create_reference_model(model)
    before = {name: parameter.clone() for name, parameter in reference.named_parameters()}
    assert first_kl(trainer(model, reference)) == 0
    assert all(torch.equal(parameter, before[name]) for name, parameter in reference.named_parameters())


@pytest.mark.parametrize("config", ["random", "fourier"])
def test_a_policy_that_begins_elsewhere_is_told_with_its_distance(config):
    peft = pytest.importorskip("peft")
    fourier = {"n_frequency": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    peft_config = lora(init_lora_weights=False) if config == "random" else peft.FourierFTConfig(**fourier)
    with pytest.warns(UserWarning, match=r"differs from its reference, .* by 0\.\d+ nats per token .* ref_model"):
        run = tiny_models.trainer(peft_config=peft_config)
    assert abs(first_kl(run)) > 1e-3


def test_frozen_adapters_stay_frozen_in_a_step():
    model = peft_model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="only the value head is trained"):
        run = trainer(model)
    tiny_models.steps(run)
    assert not [
        name for name, p in run.model.pretrained_model.named_parameters() if p.requires_grad or p.grad is not None
    ]


# ---- what is trained -------------------------------------------------------------------------------------------------


def test_an_adapter_loaded_for_inference_is_told(tmp_path):
    tiny_models.build("gpt2").save_pretrained(tmp_path / "base")
    CausalLM.from_pretrained(tmp_path / "base", peft_config=lora()).save_pretrained(tmp_path / "adapter")
    with pytest.warns(UserWarning, match=r"only the value head is trained, .* is_trainable=True"):
        trainer(CausalLM.from_pretrained(tmp_path / "adapter"))


def test_a_frozen_model_and_an_optimizer_of_the_head_alone_are_told():
    model = CausalLM.from_pretrained(tiny_models.build("gpt2"))
    with pytest.warns(UserWarning, match="only the value head is trained"):
        trainer(model, optimizer=torch.optim.Adam(model.v_head.parameters()))
    model.pretrained_model.requires_grad_(False)
    with pytest.warns(UserWarning, match="only the value head is trained"):
        trainer(model)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have weights that require a gradient, got none"):
        trainer(model)


def merged():
    model = peft_model(init_lora_weights=False)
    model.merge_adapter()
    return model


def with_two_adapters(active):
    model = peft_model()
    model.add_adapter("second", lora())
    model.base_model.set_adapter(active)
    return model


def test_adapters_without_effect_and_two_at_once_are_refused():
    with pytest.raises(ValueError, match=r"must have an effect on the logits, got 4 .* need unmerge_adapter\(\)"):
        trainer(merged())
    with pytest.raises(ValueError, match="must have one active adapter, got default, second"):
        trainer(with_two_adapters(["default", "second"]))
    assert first_kl(trainer(with_two_adapters(["second"]))) == 0


def added_by_transformers():
    model = tiny_models.build("gpt2")
    model.add_adapter(lora())
    return model


def loaded_by_transformers(folder):
    import transformers

    tiny_models.build("gpt2").save_pretrained(folder / "base")
    CausalLM.from_pretrained(folder / "base", peft_config=lora()).save_pretrained(folder / "adapter")
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "adapter")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: added_by_transformers(),
        loaded_by_transformers,
        lambda folder: pytest.importorskip("peft").inject_adapter_in_model(lora(), tiny_models.build("gpt2")),
        lambda folder: peft_model().get_base_model(),
        lambda folder: pytest.importorskip("peft").PeftModel(added_by_transformers(), lora()),
    ],
)
def test_adapters_inside_a_model_that_is_no_peft_model_are_refused(make, tmp_path):
    with pytest.raises(ValueError, match="the model must be without adapters or a peft.PeftModel, got GPT2LMHeadModel"):
        CausalLM.from_pretrained(make(tmp_path))


# ---- what can be saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"temperature": 0.6}, {"top_p": 0.9}, {"num_return_sequences": 3}])
def test_a_generation_config_that_cannot_be_saved_is_refused(setting):
    model = tiny_models.build("gpt2")
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(
        ValueError, match="GenerationConfig must be one that save_pretrained can write, got .*do_sample"
    ):
        trainer(model)


def test_a_config_that_is_no_json_is_refused():
    model = tiny_models.build("gpt2")
    model.config.note = object()
    with pytest.raises(ValueError, match="GPT2Config must be one that save_pretrained can write"):
        trainer(model)


class Quantizer:
    """Stands for the one that transformers leaves on a quantized model."""

    quantization_config = type("Config", (), {"quant_method": "gguf"})()

    def remove_quantization_config(self, model):
        del model.hf_quantizer


def test_a_model_that_only_counts_as_quantized_is_saved_and_a_quantized_one_refused(tmp_path):
    model = tiny_models.build("gpt2")
    model.hf_quantizer = Quantizer()
    run = trainer(model)
    run.save_pretrained(tmp_path)
    again = CausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], x) for name, x in run.model.state_dict().items())
    model.hf_quantizer = Quantizer()
    model.register_buffer("packed", torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="a model without adapters must not be quantized, .* got gguf; .* peft_config"):
        trainer(model)


def write_gguf(path):
    """A tiny Llama whose matrices are in 8-bit blocks."""
    gguf, width, vocab = pytest.importorskip("gguf"), 32, 64
    kind, writer = gguf.GGMLQuantizationType.Q8_0, gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": width,
        "feed_forward_length": width,
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "vocab_size": vocab,
        "rope_dimension_count": 16,
        "tokenizer_model": "llama",
        "token_list": [f"t{i}" for i in range(vocab)],
        "token_scores": [0.0] * vocab,
        "token_types": [1] * vocab,
    }.items():
        getattr(writer, f"add_{name}")(value)
    rows = {"token_embd": vocab, "output": vocab}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    rows |= {f"blk.0.{part}": width for part in parts}
    for name, size in rows.items():
        writer.add_tensor(
            f"{name}.weight", gguf.quants.quantize(torch.randn(size, width).numpy(), kind), raw_dtype=kind
        )
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(width).numpy())
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        part()


def test_a_model_from_a_gguf_file_trains_and_is_saved(tmp_path):
    write_gguf(tmp_path / "model.gguf")
    run = trainer(CausalLM.from_pretrained(tmp_path, gguf_file="model.gguf"))
    assert first_kl(run) == 0
    run.save_pretrained(tmp_path / "saved")
    again = CausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(again[name], x) for name, x in run.model.state_dict().items())
