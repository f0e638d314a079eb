"""Saving and loading value-head models: round trips, TRL's files, damaged and hostile files."""

import logging

import pytest
import torch
import transformers
from conftest import require_trl
from head_models import (
    ARCHITECTURES,
    all_tensors,
    assert_same_outputs,
    assert_same_state,
    inputs,
    tiny,
    wrapped,
    wrapper_name,
)

from ppo_ext.models import auto as models


@pytest.mark.parametrize("arch", ["gpt2", "neox", "t5"])
def test_trl_and_we_read_each_other(arch, tmp_path):
    trl = require_trl()
    theirs_class, ours_class = getattr(trl, wrapper_name(arch)), getattr(models, wrapper_name(arch))
    ours = wrapped(arch, seed=3)
    ours.save_pretrained(str(tmp_path / "ours"))
    assert_same_state(theirs_class.from_pretrained(str(tmp_path / "ours")), ours)
    theirs = theirs_class.from_pretrained(tiny(arch, seed=4))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    assert_same_state(ours_class.from_pretrained(tmp_path / "theirs"), theirs)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("max_shard_size", ["1GB", "6KB"])
def test_round_trip_is_bit_exact(arch, max_shard_size, tmp_path):
    model = wrapped(arch, seed=5)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "6KB")
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}
    again = type(model).from_pretrained(tmp_path).eval()
    assert_same_state(model, again)
    assert_same_outputs(model, again, inputs(arch), atol=0)


def test_loading_says_nothing_alarming_about_the_head(tmp_path, caplog):
    wrapped().save_pretrained(tmp_path)
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [r for r in caplog.records if "v_head" in r.getMessage() or "UNEXPECTED" in r.getMessage()]


def test_other_unknown_weights_are_still_told(tmp_path, caplog):
    model = wrapped()
    model.save_pretrained(tmp_path, state_dict={**model.state_dict(), "stray.weight": torch.zeros(2)})
    with caplog.at_level(logging.WARNING, "ppo_ext"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert "stray.weight: not used" in caplog.text


def test_checkpoint_without_head_gets_a_new_one(tmp_path, caplog):
    tiny("gpt2").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, "ppo_ext"):
        model = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert [r.levelname for r in caplog.records if "holds no v_head" in r.getMessage()] == ["INFO"]
    assert torch.equal(model.pretrained_model.lm_head.weight, tiny("gpt2").lm_head.weight)


def test_given_state_dict_is_saved(tmp_path):
    model = wrapped()
    doubled = {f"pretrained_model.{name}": 2 * t for name, t in model.pretrained_model.state_dict().items()}
    head = {f"v_head.{name}": 3 * t for name, t in model.v_head.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict={**doubled, **head})
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.pretrained_model.lm_head.weight, 2 * model.pretrained_model.lm_head.weight)
    assert torch.equal(again.v_head.summary.weight, 3 * model.v_head.summary.weight)


def test_only_the_main_process_writes(tmp_path):
    wrapped().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_safe_serialization_false_still_writes_safetensors(tmp_path, caplog):
    wrapped().save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "model.safetensors").exists()
    assert not list(tmp_path.glob("*.bin"))
    assert "writes safetensors although" in caplog.text


def test_model_with_attached_head_keeps_it():
    backbone, head = tiny("gpt2"), wrapped(seed=9).v_head
    backbone.v_head = head
    assert torch.equal(
        models.AutoModelForCausalLMWithValueHead.from_pretrained(backbone).v_head.summary.weight, head.summary.weight
    )


def test_half_backbone_and_float_head_round_trip(tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2").bfloat16())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {name: t.dtype for name, t in model.state_dict().items()} == {
        n: t.dtype for n, t in again.state_dict().items()
    }
    assert_same_state(model, again)


@pytest.mark.parametrize("arch", ["gpt2", "t5"])
def test_state_dict_loads_into_another_model_and_inside_a_parent(arch):
    a, b = wrapped(arch, seed=1), wrapped(arch, seed=2)
    b.load_state_dict(a.state_dict())
    assert_same_state(a, b)
    c = torch.nn.ModuleDict({"policy": wrapped(arch, seed=3)})
    parent = torch.nn.ModuleDict({"policy": a})
    assert set(dict(parent.named_parameters())) <= set(parent.state_dict())
    c.load_state_dict(parent.state_dict())
    assert_same_state(a, c["policy"])


def test_refused_state_dict_changes_nothing():
    model = wrapped()
    before = all_tensors(model)
    good = {name: t + 1 for name, t in model.state_dict().items()}
    missing = {name: t for name, t in good.items() if name != "v_head.summary.bias"}
    cases = [
        (
            {**good, "v_head.summary.weight": torch.zeros(1, 3)},
            r"v_head.summary.weight must have shape \[1, 16\], got \[1, 3\]",
        ),
        (missing, "must hold v_head.summary.bias"),
        ({**good, "stray": torch.zeros(1)}, "must not hold stray"),
    ]
    for state_dict, text in cases:
        with pytest.raises(ValueError, match=text):
            model.load_state_dict(state_dict)
    for name, tensor in all_tensors(model).items():
        assert torch.equal(tensor, before[name]), name


def test_shapes_that_do_not_fit_the_config_are_named(tmp_path):
    model = wrapped()
    wide = {**model.state_dict(), "transformer.h.1.mlp.c_fc.bias": torch.zeros(7)}
    model.save_pretrained(tmp_path, state_dict=wide)
    with pytest.raises(ValueError, match=r"transformer.h.1.mlp.c_fc.bias in .* must have shape \[64\] .* got \[7\]"):
        type(model).from_pretrained(tmp_path)
    wide = {**model.state_dict(), "v_head.summary.weight": torch.zeros(1, 3)}
    model.save_pretrained(tmp_path, state_dict=wide)
    with pytest.raises(ValueError, match=r"v_head: summary.weight must have shape \[1, 16\], got \[1, 3\]"):
        type(model).from_pretrained(tmp_path)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def scramble(path):
    path.write_bytes(b"\xff" * 12 + path.read_bytes()[12:])


@pytest.mark.parametrize(
    "file", ["model.safetensors", "model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json"]
)
@pytest.mark.parametrize("damage", [truncate, scramble, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damaged_file_is_named(file, damage, tmp_path):
    wrapped().save_pretrained(tmp_path, max_shard_size="1GB" if file == "model.safetensors" else "22KB")
    damage(tmp_path / file)
    with pytest.raises(ValueError, match=file.replace(".", r"\.")) as raised:
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)
    assert str(raised.value).startswith("checkpoint: ")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was read",))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin"])
def test_pickle_is_refused_unread(file, tmp_path):
    if file == "adapter_model.bin":
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    tiny("gpt2").config.save_pretrained(tmp_path)
    torch.save({"v_head.summary.weight": Bomb()}, tmp_path / file)
    with pytest.raises(ValueError, match=rf"must be safetensors, got the pickle file .*{file}.*; convert .*save_file"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/model", "runs/ppo/step_10", "nowhere/", "~/nowhere"])
def test_missing_path_never_asks_the_hub(source, monkeypatch):
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", pytest.fail)
    with pytest.raises(ValueError, match="must be an existing folder or a hub id, got " + source):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(source)


@pytest.mark.parametrize("max_shard_size", ["1GB", "6KB"])
def test_hub_id_in_the_cache_brings_its_head(max_shard_size, tmp_path, monkeypatch):
    # what HF_HUB_OFFLINE=1 sets before the import; transformers looks for an adapter online even with local_files_only
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = tmp_path / "models--me--policy" / "snapshots" / ("0" * 40)
    model = wrapped(seed=6)
    model.save_pretrained(snapshot, max_shard_size=max_shard_size)
    (tmp_path / "models--me--policy" / "refs").mkdir()
    (tmp_path / "models--me--policy" / "refs" / "main").write_text("0" * 40)
    again = type(model).from_pretrained("me/policy", cache_dir=tmp_path, local_files_only=True)
    assert_same_state(model, again)


def test_push_to_hub_has_the_head_inside(monkeypatch):
    model, seen = wrapped(), []
    monkeypatch.setattr(
        model.pretrained_model, "push_to_hub", lambda repo: seen.append((repo, *model.pretrained_model.state_dict()))
    )
    model.push_to_hub("me/policy")
    assert seen[0][0] == "me/policy" and "v_head.summary.weight" in seen[0]
    assert not hasattr(model.pretrained_model, "v_head")


def test_offloaded_model_is_refused_and_one_device_is_not():
    backbone = tiny("gpt2")
    backbone.hf_device_map = {"": "cpu"}
    assert not models.AutoModelForCausalLMWithValueHead.from_pretrained(backbone).is_sequential_parallel
    backbone.hf_device_map = {"transformer": 0, "lm_head": "disk"}
    with pytest.raises(ValueError, match="device_map must not offload to cpu or disk"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(backbone)


def test_outputs_of_a_model_on_two_devices_come_to_the_first():
    backbone = tiny("gpt2")
    backbone.hf_device_map = {"transformer": "meta", "lm_head": 0}  # a claim: all parameters are on the CPU
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(backbone)
    logits, loss, value = model(**inputs())
    assert model.is_sequential_parallel and loss is None
    assert (logits.device.type, value.device.type) == ("meta", "meta")
