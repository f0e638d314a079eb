"""Models under torch.compile: in the trainer, and in checkpoints, whose names are those of the plain model."""

import pytest
import safetensors.torch
import tiny_models
import torch
from accelerate.state import AcceleratorState

import ppo_ext

MODEL = ppo_ext.AutoModelForCausalLMWithValueHead


def compiled(module):
    return torch.compile(module, backend="eager")


def whole(model):
    return compiled(model)


def backbone(model):
    model.pretrained_model = compiled(model.pretrained_model)
    return model


def layers(model):
    blocks = model.pretrained_model.transformer.h
    for i, block in enumerate(blocks):
        blocks[i] = compiled(block)
    return model


def before_wrapping(model):
    return MODEL.from_pretrained(compiled(model.pretrained_model))


def plain_weights(model):
    return {name.replace("_orig_mod.", ""): x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("compile_model", [whole, backbone, layers, before_wrapping])
def test_train_save_and_load(compile_model, tmp_path):
    torch.manual_seed(0)
    model = compile_model(MODEL.from_pretrained(tiny_models.build("gpt2")))
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3)
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer())
    trainer.step(*tiny_models.batch(4, 1))
    trainer.save_pretrained(tmp_path)
    names = list(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert names and not [name for name in names if "_orig_mod" in name]
    loaded, trained = MODEL.from_pretrained(tmp_path), plain_weights(trainer.accelerator.unwrap_model(trainer.model))
    expected = dict(loaded.named_parameters())
    assert trained.keys() == expected.keys() and all(torch.equal(x, expected[name]) for name, x in trained.items())
    # and back into the compiled one
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    inner = getattr(trainer.model, "_orig_mod", trainer.model)
    inner.load_state_dict(loaded.state_dict())
    assert all(torch.equal(x, expected[name]) for name, x in plain_weights(inner).items())


def test_a_run_goes_on_with_or_without_compilation(tmp_path):
    first, second = tiny_models.trainer(), tiny_models.trainer()
    backbone(second.model)
    first.step(*tiny_models.batch(4, 1))
    first.save_run(tmp_path)
    second.load_run(tmp_path)
    expected = plain_weights(first.model)
    assert all(torch.equal(x, expected[name]) for name, x in plain_weights(second.model).items())


def test_an_adapter_on_a_compiled_backbone(tmp_path):
    peft = pytest.importorskip("peft")
    base = tmp_path / "base"
    tiny_models.build("llama").save_pretrained(base)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False)
    model = backbone(MODEL.from_pretrained(base, peft_config=config))
    model.save_pretrained(tmp_path / "adapter")
    names = list(safetensors.torch.load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert names and not [name for name in names if "_orig_mod" in name]
    loaded = MODEL.from_pretrained(tmp_path / "adapter")
    expected = plain_weights(loaded)
    assert all(torch.equal(x, expected[name]) for name, x in plain_weights(model).items())


@pytest.fixture
def fresh_state():
    """accelerate reads mixed precision and the dynamo backend once in a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_dynamo_backend_of_accelerate(monkeypatch, tmp_path, mixed_precision, fresh_state):
    options = {"accelerator_kwargs": {"mixed_precision": mixed_precision}}
    plain = tiny_models.trainer(**options)
    plain.model.register_forward_hook(lambda *_: None)  # so it makes logits, too: without them, less is rounded
    expected = plain.step(*tiny_models.batch(4, 1))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    AcceleratorState._reset_state(True)
    trainer = tiny_models.trainer(**options)
    assert isinstance(trainer.model, torch._dynamo.eval_frame.OptimizedModule)
    got = trainer.step(*tiny_models.batch(4, 1))
    for key in ("ppo/loss/total", "objective/kl", "ppo/policy/entropy"):
        assert got[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key
    queries = tiny_models.batch(4, 2)[0]
    options = {"return_prompt": False, "max_new_tokens": 3, "pad_token_id": 0}
    assert len(trainer.generate(queries, generate_ref_response=True, **options)[0]) == 4
    trainer.save_pretrained(tmp_path)
    assert MODEL.from_pretrained(tmp_path)


def test_a_checkpoint_without_a_weight_of_the_backbone_is_refused(tmp_path):
    model = tiny_models.build("gpt2")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    renamed = {f"_orig_mod.{name}": x for name, x in tensors.items()}
    safetensors.torch.save_file(renamed, path, metadata={"format": "pt"})
    sentence = (
        "must hold weights of GPT2LMHeadModel, got _orig_mod.*; it was saved from a compiled model: remove _orig_mod"
    )
    with pytest.raises(ValueError, match=sentence):
        MODEL.from_pretrained(tmp_path)
    safetensors.torch.save_file({f"other.{name}": x for name, x in tensors.items()}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold weights of GPT2LMHeadModel, got other\.[^;]*$"):
        MODEL.from_pretrained(tmp_path)
