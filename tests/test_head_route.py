"""Steps without logits: the same numbers as with them, no tensor of their size, and when they are made all the same."""

import logging

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from accelerate.state import AcceleratorState
from tiny_models import EOS, PAD, VOCAB, scalars, steps
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_ext
from ppo_ext.trainer.head_route import HeadRoute, Scaling

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 48,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def of(kind, **changes):
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    return lambda **more: getattr(transformers, f"{kind}ForCausalLM")(config)


def with_bias_gpt_j():
    config = transformers.GPTJConfig(n_embd=24, n_layer=2, n_head=2, rotary_dim=4, n_positions=48, vocab_size=VOCAB)
    model = transformers.GPTJForCausalLM(config)
    model.lm_head.bias.data.normal_()
    return model


PLAIN = Scaling(1.0, None)
MODELS = {  # what is made, and what it does to its head's output
    "gpt2": (tiny_models.gpt2, PLAIN),
    "gpt2, untied": (lambda: tiny_models.gpt2(tie_word_embeddings=False), PLAIN),
    "llama": (tiny_models.llama, PLAIN),
    "gpt_neox": (tiny_models.gpt_neox, PLAIN),
    "gpt-j, bias": (with_bias_gpt_j, PLAIN),
    "phi, bias": (of("Phi"), PLAIN),
    "t5": (tiny_models.t5, PLAIN),
    "gemma2": (of("Gemma2", head_dim=12, final_logit_softcapping=3.0), Scaling(1.0, 3.0)),
    "cohere": (of("Cohere", logit_scale=0.25), Scaling(0.25, None)),
    "granite": (of("Granite", logits_scaling=4.0), Scaling(0.25, None)),
}


def sgd(parameters):
    # Adam would scale up the rounding of gradients that are exactly 0 in theory, such as that of an attention key's bias
    return torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], lr=1e-2)


def with_logits(trainer):
    trainer.model.register_forward_hook(lambda *_: None)  # it could keep them
    return trainer


def make(monkeypatch, name, **options):
    monkeypatch.setitem(tiny_models.BUILDERS, name, MODELS[name][0])
    options["changes"] = {"scale": 1.0} if name == "t5" else {}
    return tiny_models.trainer(name, **{"optimizer": sgd, **options})


def assert_same_steps(make_trainer, count=2, rel=1e-5, **options):
    """Steps of a trainer, and of one that makes logits; each is made right before, as that seeds what it draws."""
    ours = make_trainer()
    history = steps(ours, count, **options)
    theirs = with_logits(make_trainer())
    for stats, expected in zip(history, steps(theirs, count, **options), strict=True):
        assert scalars(stats) == pytest.approx(scalars(expected), rel=rel, abs=rel)
        for key in ("objective/logprobs", "ppo/policy/ratio", "ppo/policy/advantages"):
            np.testing.assert_allclose(stats[key], expected[key], rtol=10 * rel, atol=10 * rel, err_msg=key)
    assert ours.why_logits is None and theirs.why_logits is not None
    expected = tiny_models.weights(theirs)
    for name, weight in tiny_models.weights(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=rel, atol=rel, msg=name)
    return ours


@pytest.mark.parametrize("name", MODELS)
def test_the_same_numbers_with_and_without_logits(name, monkeypatch):
    options = {"start_token": PAD} if name == "t5" else {}
    ours = assert_same_steps(lambda: make(monkeypatch, name), 5 if name == "gpt2" else 2, **options)
    assert [scaling for _, scaling in ours._head_route._measured.values()] == [MODELS[name][1]] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"padding_side": "left", "whiten_rewards": True, "gae_through_padding": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"mini_batch_size": 1},
    ],
    ids=str,
)
def test_the_same_numbers_with_options(options, monkeypatch):
    assert_same_steps(lambda: make(monkeypatch, "llama", **options))


def test_the_same_numbers_with_holes_in_the_masks():
    queries, responses, scores = tiny_models.batch(4, 1)
    masks = [torch.arange(len(ids)) % 3 != 1 for ids in responses]
    stats = scalars(tiny_models.trainer(optimizer=sgd).step(queries, responses, scores, masks))
    expected = scalars(with_logits(tiny_models.trainer(optimizer=sgd)).step(queries, responses, scores, masks))
    assert stats == pytest.approx(expected, rel=1e-5, abs=1e-5)


def lora(**options):
    peft = pytest.importorskip("peft")
    defaults = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**{**defaults, **options})


def test_an_adapter_on_the_layers_trains_through_a_frozen_head(monkeypatch):
    ours = assert_same_steps(lambda: make(monkeypatch, "llama", peft_config=lora()))
    head = ours.model.pretrained_model.get_output_embeddings()
    assert not head.weight.requires_grad and head.weight.grad is None


# ---- memory --------------------------------------------------------------------------------------------------------

TILE = 1 << 20  # entries, on a CPU
WIDE = 40009


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that an operator returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return result


def largest_tensor(trainer):
    generator = torch.Generator().manual_seed(0)
    queries = [torch.randint(3, WIDE, (9,), generator=generator) for _ in range(4)]
    responses = [torch.randint(3, WIDE, (9 + i,), generator=generator) for i in range(4)]
    with Largest() as seen:
        trainer.step(queries, responses, [1.0, 2.0, 3.0, 4.0])
    return seen.entries


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_tensor_of_the_logits_size_exists_in_a_step(checkpointing):
    options = {"changes": {"vocab_size": WIDE}, "mini_batch_size": 4, "gradient_checkpointing": checkpointing}
    assert WIDE * 24 <= largest_tensor(tiny_models.trainer(**options)) <= TILE
    assert largest_tensor(with_logits(tiny_models.trainer(**options))) >= 4 * 20 * WIDE


def test_only_rows_of_the_response_go_through_the_head(monkeypatch):
    from ppo_ext.models import token_scores

    rows, op = [], token_scores.linear_logprobs_and_entropy
    spy = lambda hidden, *rest, **options: rows.append(len(hidden)) or op(hidden, *rest, **options)  # noqa: E731
    monkeypatch.setattr(token_scores, "linear_logprobs_and_entropy", spy)
    trainer = tiny_models.trainer(ppo_epochs=1, mini_batch_size=4)
    queries, responses, scores = tiny_models.batch(4, 1)
    trainer.step(queries, responses, scores)
    assert rows == [sum(map(len, responses))]


# ---- padding -------------------------------------------------------------------------------------------------------


def widths_of_a_step(trainer):
    """The width of every pass over samples, in a step whose samples have 4, 5, 6, 7 tokens."""
    trainer.step(*tiny_models.batch(4, 1, equal_lengths=True))  # so the models are measured
    widths = []
    trainer.model.pretrained_model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    queries = [torch.tensor([5, 6])] * 4
    stats = trainer.step(queries, [torch.arange(3, 5 + i) for i in range(4)], [1.0] * 4)
    assert stats["objective/logprobs"].shape == (4, 6) and stats["ppo/policy/ratio"].shape == (24,)
    return widths


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_minibatch_is_cut_to_its_own_longest_sample(side):
    trainer = tiny_models.trainer(padding_side=side, mini_batch_size=1, ppo_epochs=1)
    scored, trained = widths_of_a_step(trainer)[:4], widths_of_a_step(trainer)[-4:]
    assert scored == [4, 5, 6, 7] and sorted(trained) == [4, 5, 6, 7]


def test_padding_that_may_matter_stays():
    class Reads(ppo_ext.PPOTrainer):
        def compute_advantages(self, values, rewards, mask):
            assert (values != 0).all()
            return super().compute_advantages(values, rewards, mask)

    options = {"mini_batch_size": 1, "ppo_epochs": 1}
    widths = widths_of_a_step(tiny_models.trainer(kind=Reads, **options))
    assert widths[:4] == [7] * 4 and sorted(widths[4:]) == [4, 5, 6, 7]
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert widths_of_a_step(tiny_models.trainer("llama", changes={"rope_parameters": rope}, **options)) == [7] * 8
    assert widths_of_a_step(with_logits(tiny_models.trainer(**options))) == [7] * 8


# ---- half precision ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate():
    AcceleratorState._reset_state(True)  # mixed precision is fixed once per process
    yield
    AcceleratorState._reset_state(True)


def test_mixed_precision_rounds_what_the_head_reads(fresh_accelerate, monkeypatch):
    options = {"accelerator_kwargs": {"mixed_precision": "bf16", "cpu": True}}
    assert_same_steps(lambda: make(monkeypatch, "llama", **options), 1, rel=3e-2)


def test_a_policy_in_bfloat16_begins_at_its_reference():
    trainer = tiny_models.trainer("llama", optimizer=sgd)
    for model in (trainer.model, trainer.ref_model):
        model.pretrained_model.to(torch.bfloat16)
    (stats,) = steps(trainer)
    assert trainer.why_logits is None and stats["objective/kl"] == 0


# ---- where logits are made -----------------------------------------------------------------------------------------


class OwnForward(ppo_ext.AutoModelForCausalLMWithValueHead):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Bounded(transformers.GPT2LMHeadModel):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 9 * torch.sin(output.logits / 9)
        return output


class OwnLinear(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


def other_head(trainer):
    old = trainer.model.pretrained_model.lm_head
    new = OwnLinear(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    trainer.model.pretrained_model.lm_head = new


def other_model(trainer):
    model = trainer.model.pretrained_model
    model.__class__ = Bounded


def other_forward(trainer):
    model = trainer.model.pretrained_model
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def compiled(trainer):
    trainer.model.pretrained_model = torch.compile(trainer.model.pretrained_model, backend="eager")


REASONS = {
    "a forward hook sees them (of the policy)": with_logits,
    "a forward hook sees them (of the reference)": lambda t: t.ref_model.register_forward_hook(lambda *_: None),
    "a method that is given logits is replaced": lambda t: setattr(t, "loss", lambda *args: type(t).loss(t, *args)),
    "kl_penalty is 'full'": lambda t: setattr(t.config, "kl_penalty", "full"),
    "the head is no plain linear layer but a OwnLinear (of the policy)": other_head,
    "its Linear has backward hooks": lambda t: t.model.pretrained_model.lm_head.register_full_backward_hook(
        lambda *_: None
    ),
    "the forward of its GPT2LMHeadModel is replaced": other_forward,
    "the model is compiled": compiled,
    "OwnForward has a forward of its own": lambda t: setattr(t.model, "__class__", OwnForward),
    "not its head's output, scaled and capped as its config says": other_model,
    "float16 would be multiplied as float32": lambda t: [m.pretrained_model.half() for m in (t.model, t.ref_model)],
}


@pytest.mark.parametrize("reason", REASONS)
def test_logits_are_made_for_a_reason_that_is_told_once(reason, caplog):
    trainer = tiny_models.trainer(optimizer=sgd)
    REASONS[reason](trainer)
    with caplog.at_level(logging.INFO, logger="ppo_ext.trainer.head_route"):
        for stats in steps(trainer, 2):
            assert len(stats) == 40 and all(np.isfinite(value).all() for value in stats.values())
    assert reason in trainer.why_logits
    texts = [record.getMessage() for record in caplog.records if record.name == "ppo_ext.trainer.head_route"]
    assert texts == [f"PPOTrainer: logits are made, since {trainer.why_logits}"]


@pytest.mark.parametrize(
    "options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str
)
def test_an_adapted_head_makes_logits(options):
    trainer = tiny_models.trainer("llama", peft_config=lora(**options), optimizer=sgd)
    steps(trainer)
    assert "the head is no plain linear layer" in trainer.why_logits


def test_the_way_is_chosen_anew_in_every_step():
    trainer = tiny_models.trainer()
    hook = trainer.model.register_forward_hook(lambda *_: None)
    steps(trainer)
    assert trainer.why_logits is not None
    hook.remove()
    steps(trainer)
    assert trainer.why_logits is None


def test_a_softcap_that_is_changed_is_measured_again(monkeypatch):
    trainer = make(monkeypatch, "gemma2")
    steps(trainer)
    trainer.model.config.final_logit_softcapping = trainer.ref_model.config.final_logit_softcapping = 2.0
    steps(trainer)
    assert [scaling for _, scaling in trainer._head_route._measured.values()] == [Scaling(1.0, 2.0)] * 2


def test_measuring_draws_no_random_number_and_leaves_the_modes(monkeypatch):
    trainer = tiny_models.trainer()
    trainer.model.train()
    before, modes = torch.get_rng_state(), [module.training for module in trainer.model.modules()]
    assert HeadRoute().choose(trainer) == (PLAIN, PLAIN)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in trainer.model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.model.modules())


def test_a_head_that_reads_other_tokens_is_an_error():
    trainer = tiny_models.trainer()
    steps(trainer)
    head = trainer.model.pretrained_model.lm_head
    head.register_forward_pre_hook(lambda module, inputs: inputs[0][:, 1:])
    before = tiny_models.weights(trainer)
    with pytest.raises(ValueError, match=r"the head must read \[2, \d+, hidden size\], got \[2, \d+, 24\]"):
        steps(trainer)
    tiny_models.assert_unmoved(before, trainer)
