"""create_reference_model: what is shared, what is frozen, what never changes."""

import copy

import pytest
import tiny_models
import torch
import transformers
from conftest import require_trl
from head_models import ARCHITECTURES, LAYER_LISTS, VOCAB, assert_same_outputs, inputs, wrapped

import ppo_ext
from ppo_ext.models import auto as models


@pytest.mark.parametrize("arch", ["gpt2", "llama", "neox", "opt"])
def test_reference_freezes_what_trl_freezes(arch):
    trl = require_trl()
    ours, theirs = wrapped(arch), wrapped(arch)
    models.create_reference_model(ours, num_shared_layers=2)
    trl.create_reference_model(theirs, num_shared_layers=2)
    frozen = [{name for name, p in model.named_parameters() if not p.requires_grad} for model in (ours, theirs)]
    assert frozen[0] == frozen[1] != set()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_reference_shares_exactly_the_first_layers(arch):
    model = wrapped(arch).train()
    reference = models.create_reference_model(model, num_shared_layers=2)
    layers = LAYER_LISTS[arch]
    shared = {name for name, p in model.named_parameters() if p is reference.get_parameter(name)}
    in_layers = {int(name.split(f"{layers}.")[1].split(".")[0]) for name in shared if f"{layers}." in name}
    assert in_layers == {0, 1}
    assert (
        model.pretrained_model.get_input_embeddings().weight is reference.pretrained_model.get_input_embeddings().weight
    )
    assert all(p.requires_grad != (name in shared) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert not any(module.training for module in reference.modules())
    assert model.training
    assert_same_outputs(model.eval(), reference, inputs(arch), atol=0)


@pytest.mark.parametrize("num_shared_layers", [None, 1])
def test_training_never_changes_the_reference(num_shared_layers):
    model = wrapped()
    reference = models.create_reference_model(model, num_shared_layers)
    assert (num_shared_layers is None) == all(p.requires_grad for p in model.parameters())
    before = reference(**inputs())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    logits, _, value = model(**inputs())
    (logits.square().mean() + value.mean()).backward()
    optimizer.step()
    after = reference(**inputs())
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.equal(model(**inputs())[0], after[0])


def test_reference_takes_a_pattern_and_rejects_what_matches_nothing():
    model = wrapped("t5")
    reference = models.create_reference_model(model, 1, pattern="encoder.block.{layer}")
    assert model.pretrained_model.encoder.block[0] is not reference.pretrained_model.encoder.block[0]
    shared = [name for name, p in model.named_parameters() if p is reference.get_parameter(name)]
    assert shared and not [name for name in shared if "decoder" in name or "block.1" in name]
    with pytest.raises(ValueError, match="num_shared_layers must name a layer of the model .* got 3"):
        models.create_reference_model(wrapped(), 3)
    with pytest.raises(ValueError, match=r"by one of layers\.\{layer\}, got 1"):
        models.create_reference_model(wrapped(), 1, pattern="layers.{layer}")


def test_copied_wrapper_owns_its_methods():
    model = wrapped()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    flags = [[getattr(m, "gradient_checkpointing", False) for m in each.modules()] for each in (model, other)]
    assert not any(flags[0]) and any(flags[1])


OTHER_LAYERS = {
    "MptForCausalLM": ("transformer.blocks", {"d_model": 16, "n_layers": 3, "n_heads": 2, "expansion_ratio": 2}),
    "MambaForCausalLM": ("backbone.layers", {"hidden_size": 16, "num_hidden_layers": 3, "state_size": 4}),
    "BertLMHeadModel": (
        "bert.encoder.layer",
        {
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "is_decoder": True,
        },
    ),
}


def other(name):
    kind, (_, sizes) = getattr(transformers, name), OTHER_LAYERS[name]
    return models.AutoModelForCausalLMWithValueHead.from_pretrained(kind(kind.config_class(vocab_size=VOCAB, **sizes)))


@pytest.mark.parametrize("name", OTHER_LAYERS)
def test_layers_of_other_names_are_found(name):
    model = other(name)
    reference = models.create_reference_model(model, num_shared_layers=2)
    layers = f"pretrained_model.{OTHER_LAYERS[name][0]}."
    shared = {name for name, p in model.named_parameters() if p is reference.get_parameter(name)}
    assert {name.removeprefix(layers).split(".")[0] for name in shared if name.startswith(layers)} == {"0", "1"}
    assert_same_outputs(model.eval(), reference, inputs(), atol=0)


def test_layers_that_are_kept_in_parts_are_not_guessed():
    config = transformers.XLMConfig(vocab_size=VOCAB, emb_dim=16, n_layers=3, n_heads=2, causal=True, n_langs=1)
    model = models.AutoModelForCausalLMWithValueHead.from_pretrained(transformers.XLMWithLMHeadModel(config))
    with pytest.raises(ValueError, match="num_shared_layers must name a layer .*, got 1; pattern takes another name"):
        models.create_reference_model(model, num_shared_layers=1)
    models.create_reference_model(model, num_shared_layers=1, pattern="transformer.attentions.{layer}")


def test_a_trainer_takes_the_pattern():
    config, model = ppo_ext.PPOConfig(batch_size=2, mini_batch_size=2), wrapped("t5")
    options = {"num_shared_layers": 1, "pattern": "encoder.block.{layer}"}
    trainer = ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer(), **options)
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    assert frozen and all("encoder.block.0." in name or "shared" in name for name in frozen)
