"""Value-head models over peft: adapters, the reward adapter, and what is refused."""

import sys

import pytest
import torch
import transformers
from conftest import require_trl
from head_models import VOCAB, assert_same_outputs, assert_same_state, inputs, lora, tiny, wrapped

from ppo_ext.models import auto as models


def test_lora_matches_trl():
    trl = require_trl()
    ours, theirs = (
        module.AutoModelForCausalLMWithValueHead.from_pretrained(tiny("gpt2"), peft_config=lora()).eval()
        for module in (models, trl)
    )
    assert_same_state(ours, theirs)
    assert list(dict(ours.named_parameters())) == list(dict(theirs.named_parameters()))
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    assert_same_outputs(ours, theirs, inputs())


def test_trl_reads_our_adapter(tmp_path):
    trl = require_trl()
    tiny("gpt2").save_pretrained(tmp_path / "base")
    ours = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "base", peft_config=lora()).eval()
    ours.save_pretrained(tmp_path / "adapter")
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter")).eval()
    assert_same_state(ours, theirs)
    assert_same_outputs(ours, theirs, inputs())


def test_trl_adapter_with_pickled_head_is_refused(tmp_path):
    trl = require_trl()
    tiny("gpt2").save_pretrained(tmp_path / "base")
    theirs = trl.AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=lora())
    (tmp_path / "adapter").mkdir()
    theirs.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ValueError, match=r"must be safetensors, got the pickle file .*pytorch_model.bin"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter")


@pytest.fixture
def base_path(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def reward_path(tmp_path, base_path):
    """A LoRA reward model as a reward trainer saves it: adapter and score in one file."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(21)
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(base_path, num_labels=1)
    peft.get_peft_model(classifier, lora(task_type="SEQ_CLS")).save_pretrained(tmp_path / "reward")
    return tmp_path / "reward"


def load_with_reward(module, base_path, reward_path):
    torch.manual_seed(22)
    return module.AutoModelForCausalLMWithValueHead.from_pretrained(
        str(base_path), peft_config=lora(), reward_adapter=str(reward_path)
    )


def test_adapter_round_trip(base_path, tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=lora()).eval()
    assert model.is_peft_model
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "model.safetensors"} <= names
    assert not [name for name in names if name.endswith(".bin") or name.startswith(".")]
    frozen = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter").eval()
    assert_same_state(model, frozen)
    assert_same_outputs(model, frozen, inputs(), atol=0)
    assert not [n for n, p in frozen.pretrained_model.named_parameters() if p.requires_grad]
    trainable = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert [n for n, p in trainable.pretrained_model.named_parameters() if p.requires_grad]


def test_adapter_and_full_model_never_share_a_folder(base_path, tmp_path):
    adapter = models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=lora())
    with pytest.raises(ValueError, match="an adapter must go to a folder without a full model, got .*base"):
        adapter.save_pretrained(base_path)
    adapter.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="a full model must go to a folder without an adapter, got .*adapter"):
        wrapped().save_pretrained(tmp_path / "adapter")
    adapter.save_pretrained(tmp_path / "adapter")


def test_transformers_reads_our_adapter_folder(base_path, tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=lora()).eval()
    model.save_pretrained(tmp_path / "adapter")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(plain(**inputs()).logits, model(**inputs())[0])


def test_edited_model_card_survives_a_save(base_path, tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=lora())
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("my card")
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "README.md").read_text() == "my card"


def test_reward_scores_match_trl_and_the_classifier(base_path, reward_path):
    trl = require_trl()
    ours, theirs = (load_with_reward(module, base_path, reward_path).eval() for module in (models, trl))
    batch = inputs()
    scores = ours.compute_reward_score(**batch)
    assert scores.shape == (2, 9, 1)
    torch.testing.assert_close(scores, theirs.compute_reward_score(**batch), rtol=0, atol=1e-6)
    peft = pytest.importorskip("peft")
    classifier = transformers.GPT2ForSequenceClassification.from_pretrained(base_path, num_labels=1)
    classifier = peft.PeftModel.from_pretrained(classifier, reward_path).eval()
    with torch.no_grad():
        expected = classifier(**{name: tensor[:1] for name, tensor in batch.items()}).logits
    torch.testing.assert_close(scores[:1, -1], expected, rtol=0, atol=1e-6)


def test_reward_adapter_added_by_hand_as_in_trl(base_path, reward_path):
    peft, scores = pytest.importorskip("peft"), []
    for module in (models, require_trl()):
        kind = module.AutoModelForCausalLMWithValueHead
        policy = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base_path), lora())
        score = kind.add_and_load_reward_modeling_adapter(policy, str(reward_path), "second")
        assert "second" in policy.peft_config and not any(p.requires_grad for p in score.parameters())
        scores.append((score.state_dict(), policy.state_dict()))
    for ours, theirs in zip(*scores, strict=True):
        added = [name for name in theirs if "second" in name or name == "weight"]
        assert added and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in added)


def test_reward_scores_leave_the_policy_as_it_was(base_path, reward_path):
    model = load_with_reward(models, base_path, reward_path)
    model.v_head.eval()
    model.pretrained_model.train()
    before = (
        {n: p.requires_grad for n, p in model.named_parameters()},
        {n: m.training for n, m in model.named_modules()},
    )
    assert not [
        n for n, trainable in before[0].items() if trainable and ("reward_adapter" in n or n.startswith("score."))
    ]
    outputs = model.eval()(**inputs())[0]
    model.pretrained_model.train()
    model.compute_reward_score(**inputs())
    after = {n: p.requires_grad for n, p in model.named_parameters()}, {n: m.training for n, m in model.named_modules()}
    assert before[0] == after[0]
    assert model.pretrained_model.active_adapter == "default"
    assert model.pretrained_model.training and not model.v_head.training
    assert torch.equal(model.eval()(**inputs())[0], outputs)


def test_reward_scores_leave_a_frozen_policy_frozen(base_path, reward_path, tmp_path):
    load_with_reward(models, base_path, reward_path).save_pretrained(tmp_path / "policy")
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy", reward_adapter=reward_path)
    model.compute_reward_score(**inputs())
    assert not [name for name, p in model.pretrained_model.named_parameters() if p.requires_grad]


def test_reward_adapter_is_not_saved_with_the_policy(base_path, reward_path, tmp_path):
    load_with_reward(models, base_path, reward_path).save_pretrained(tmp_path / "policy")
    assert not (tmp_path / "policy" / "reward_adapter").exists()
    assert (tmp_path / "policy" / "adapter_model.safetensors").exists()


def test_rejects_reward_adapters_that_cannot_score(base_path, reward_path, tmp_path):
    load = models.AutoModelForCausalLMWithValueHead.from_pretrained
    with pytest.raises(ValueError, match="reward_adapter must come with a peft model, got GPT2LMHeadModel"):
        load(base_path, reward_adapter=reward_path)
    with pytest.raises(ValueError, match="reward_adapter must be a local folder with an adapter, got .*nowhere"):
        load(base_path, peft_config=lora(), reward_adapter=str(tmp_path / "nowhere"))
    with pytest.raises(TypeError, match="reward_adapter must be a path, got int"):
        load(base_path, peft_config=lora(), reward_adapter=3)
    with pytest.raises(ValueError, match="reward_adapter_name must be new, got 'default'"):
        load(base_path, peft_config=lora(), reward_adapter=reward_path, reward_adapter_name="default")
    load(base_path, peft_config=lora()).pretrained_model.save_pretrained(tmp_path / "no_score")
    with pytest.raises(ValueError, match="must hold score.weight"):
        load(base_path, peft_config=lora(), reward_adapter=tmp_path / "no_score")
    with pytest.raises(ValueError, match="compute_reward_score: the model must be loaded with reward_adapter"):
        wrapped().compute_reward_score(**inputs())


def test_rejects_prompt_learning_and_foreign_configs():
    peft = pytest.importorskip("peft")
    for config in (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ):
        with pytest.raises(ValueError, match=f"must not be a prompt learning method, got {type(config).__name__}"):
            wrapped(peft_config=config)
    with pytest.raises(TypeError, match="peft_config must be a peft.PeftConfig, got dict"):
        wrapped(peft_config={"r": 2})


def test_peft_is_needed_only_for_adapters(base_path, monkeypatch, tmp_path):
    config = lora()
    models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=config).save_pretrained(
        tmp_path / "a"
    )
    monkeypatch.setitem(sys.modules, "peft", None)
    models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path)
    with pytest.raises(ImportError, match="peft must be installed for peft_config: pip install peft"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=config)
    with pytest.raises(ImportError, match="peft must be installed for the adapter in"):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "a")


def test_adapter_without_base_model_says_what_to_do(tmp_path):
    model = wrapped(peft_config=lora())
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="must name its base_model_name_or_path, .* give it to from_pretrained as base_model"
    ):
        type(model).from_pretrained(tmp_path)


def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path)


def named(base_path):
    return pytest.importorskip("peft").get_peft_model(loaded(base_path), lora(), adapter_name="policy")


def second_of_two(base_path):
    model = pytest.importorskip("peft").get_peft_model(loaded(base_path), lora())
    model.add_adapter("second", lora())
    model.set_adapter("second")
    return model


def named_beside_default(base_path):
    model = named(base_path)
    model.add_adapter("default", lora())
    return model


def resized(base_path, size=VOCAB + 4, **options):
    model = loaded(base_path)
    model.resize_token_embeddings(size)
    return pytest.importorskip("peft").get_peft_model(model, lora(**options))


def merged_and_unloaded(base_path):
    return pytest.importorskip("peft").get_peft_model(loaded(base_path), lora()).merge_and_unload()


@pytest.mark.parametrize(
    "make",
    [
        named,
        second_of_two,
        named_beside_default,
        resized,
        lambda path: resized(path, VOCAB - 4),
        lambda path: resized(path, modules_to_save=["wte"]),
        lambda path: resized(path, target_modules=["wte", "c_attn"]),
        lambda path: resized(path, trainable_token_indices=[VOCAB, VOCAB + 1]),
        merged_and_unloaded,
    ],
)
def test_the_adapter_that_was_trained_is_the_one_that_is_loaded(make, base_path, tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(make(base_path)).eval()
    model.save_pretrained(tmp_path / "policy")
    again = models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "policy").eval()
    batch = inputs()
    batch["input_ids"].clamp_(max=VOCAB - 5)  # the smallest of these vocabularies
    assert_same_outputs(model, again, batch, atol=0)


def test_merging_after_training_saves_the_whole_model(base_path, tmp_path):
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(base_path, peft_config=lora()).eval()
    inner = model.pretrained_model.merge_and_unload()
    with pytest.raises(ValueError, match=r"adapter default, got none; after merge_and_unload\(\) or unload\(\) set"):
        model.save_pretrained(tmp_path / "policy")
    model.pretrained_model = inner
    assert not model.is_peft_model
    model.save_pretrained(tmp_path / "policy")
    again = type(model).from_pretrained(tmp_path / "policy").eval()
    assert_same_outputs(model, again, inputs(), atol=0)


def test_adapter_of_a_base_model_without_a_path_keeps_its_head(tmp_path):
    model = wrapped(peft_config=lora())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, base_model=tiny("gpt2")).eval()
    assert_same_outputs(model, again, inputs(), atol=0)
    with pytest.raises(ValueError, match="base_model must be a transformers model for an adapter, got str"):
        type(model).from_pretrained(tmp_path, base_model="base")


@pytest.mark.parametrize("max_shard_size", ["1GB", "6KB"])
def test_head_in_the_folder_of_a_model_object_is_found(max_shard_size, tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    again = type(model).from_pretrained(loaded(tmp_path)).eval()
    assert_same_outputs(model, again, inputs(), atol=0)


def test_an_adapter_in_a_folder_inside_is_pointed_to(base_path, tmp_path):
    named(base_path).save_pretrained(tmp_path / "by_peft")
    with pytest.raises(
        ValueError, match="got adapters in folders inside it: policy; give from_pretrained one of those"
    ):
        models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "by_peft")
    models.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "by_peft" / "policy")
