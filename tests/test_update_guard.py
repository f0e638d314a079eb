"""An update that would make weights NaN or infinite is not made: `step` says what is not finite, and nothing changes."""

import copy

import pytest
import tiny_models
import torch
import transformers

import ppo_ext

NAN, INF = float("nan"), float("inf")


def poison(weight, value):
    def poisoned(trainer):
        trainer.model.get_parameter(weight).data.view(-1)[:60] = value

    return poisoned


def poison_reference(trainer):
    trainer.ref_model.get_parameter("pretrained_model.lm_head.weight").data.fill_(NAN)


def poison_gradient(value):
    def poisoned(trainer):
        trainer.model.pretrained_model.transformer.ln_f.weight.register_hook(lambda gradient: gradient + value)

    return poisoned


FAULTS = {
    "logits": (
        poison("pretrained_model.lm_head.weight", NAN),
        None,
        "NaN or infinite old_logprobs: the logits of the policy",
    ),
    "layer": (
        poison("pretrained_model.transformer.h.0.mlp.c_fc.weight", INF),
        None,
        "old_logprobs: the logits of the policy",
    ),
    "value head": (poison("v_head.summary.weight", NAN), None, "infinite values: the values of the value head"),
    "infinite value": (poison("v_head.summary.bias", INF), None, "infinite values: the values of the value head"),
    "reference": (poison_reference, None, "infinite advantages: .*the logits of the reference"),
    "score": (None, 3e38, r"an overflow from returns up to 3e\+38: the returns, which come from the scores"),
    "score that overflows squared": (None, -1e25, r"an overflow from returns up to 1e\+25"),
    "gradient": (poison_gradient(NAN), None, "the gradient must be finite"),
    "infinite gradient": (poison_gradient(-INF), None, "the gradient must be finite"),
}


def facts(trainer):
    """Everything that a step changes, in a form that == compares."""
    state = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    moments = {f"{i}.{name}": x for i, entry in state.items() for name, x in entry.items()}
    weights = {name: weight.nan_to_num(7.0) for name, weight in tiny_models.weights(trainer).items()}
    everything = {**moments, **weights}
    return {name: x.tolist() for name, x in everything.items()}, trainer.kl_ctl.value


@pytest.mark.parametrize(
    "config", [{}, {"ratio_threshold": INF}, {"mini_batch_size": 1, "gradient_accumulation_steps": 2}]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_step_that_would_lose_the_weights_stops_before_it_does(fault, config):
    cause, score, text = FAULTS[fault]
    trainer = tiny_models.trainer(ppo_epochs=1, batch_size=4, **config)
    tiny_models.steps(trainer)
    queries, responses, scores = tiny_models.batch(4, 3)
    if cause:
        cause(trainer)
    # a minibatch that is fine may be trained on before the one that is not
    scores = scores if score is None else [torch.tensor(score)] * 4
    before = facts(trainer)
    with pytest.raises(ValueError, match=rf"PPOTrainer.step: .*{text}.* This update was not made"):
        trainer.step(queries, responses, scores)
    assert facts(trainer) == before
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_float16_weights_train_or_are_refused_but_never_turn_nan():
    def make(optimizer):
        model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2").half())
        config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, learning_rate=1e-3)
        made = optimizer and optimizer(model.parameters())
        return ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer(), optimizer=made)

    with pytest.raises(ValueError, match="optimizer must keep torch.float16 weights finite, got Adam with eps=1e-08"):
        make(torch.optim.Adam)
    for optimizer in (None, lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-4)):
        trainer = make(optimizer)
        tiny_models.steps(trainer, 2)
        assert all(weight.isfinite().all() for weight in tiny_models.weights(trainer).values())


def test_weights_that_an_update_made_infinite_are_told_in_the_same_step():
    trainer = tiny_models.trainer(ppo_epochs=1, mini_batch_size=4, optimizer=lambda p: torch.optim.SGD(p, lr=1.0))
    trainer.optimizer.param_groups[0]["lr"] = INF
    kl_coef = trainer.kl_ctl.value
    with pytest.raises(ValueError, match="the optimizer must keep the weights finite, got NaN or infinity .* from SGD"):
        tiny_models.steps(trainer)
    assert trainer.kl_ctl.value == kl_coef


class EndsInTanh(transformers.GPT2LMHeadModel):
    """Its last operation reads its own result in the backward pass."""

    squash = staticmethod(torch.tanh)

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = self.squash(output.logits)
        return output


@pytest.mark.parametrize("squash", [torch.tanh, torch.sigmoid, lambda logits: logits.softmax(dim=-1), torch.exp])
def test_a_model_that_reads_its_logits_backward_is_told_what_to_set(squash, monkeypatch):
    monkeypatch.setattr(EndsInTanh, "squash", staticmethod(squash))
    backbone = EndsInTanh(tiny_models.build("gpt2").config)

    def make(**options):
        config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, ppo_epochs=1, **options)
        model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(backbone)
        return ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer())

    trainer = make()
    before = tiny_models.weights(trainer)
    with pytest.raises(ValueError, match=r"reads? its logits .* set PPOConfig\(inplace_logits_grad=False\)"):
        tiny_models.steps(trainer)
    tiny_models.assert_unmoved(before, trainer)
    tiny_models.steps(make(inplace_logits_grad=False))


def collate(samples):
    """Right padding by a function that names dtype and device."""
    pad = torch.nn.functional.pad
    rows = {name: [pad(sample[name], (0, 20 - len(sample[name]))) for sample in samples] for name in samples[0]}
    return transformers.BatchEncoding({name: torch.stack(x) for name, x in rows.items()})


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64, "meta"])
@pytest.mark.parametrize(
    "config",
    [{"kl_penalty": "full", "early_stopping": True}, {"use_score_scaling": True, "whiten_rewards": True}],
    ids=str,
)
def test_defaults_of_torch_change_no_bit(config, default):
    results = []
    for changed in (False, True):
        trainer = tiny_models.trainer(**config)
        trainer.data_collator = collate
        queries, responses, scores = tiny_models.batch(4, 1)
        scores, masks = [float(score) for score in scores], [torch.ones_like(response) for response in responses]
        try:
            if changed and default == "meta":
                torch.set_default_device("meta")
            elif changed:
                torch.set_default_dtype(default)
            stats = trainer.step(queries, responses, scores, masks)
            trainer.log_stats(stats, {"query": [""] * 4, "response": [""] * 4}, scores)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        results.append((tiny_models.scalars(stats), tiny_models.weights(trainer)))
    assert results[0][0] == results[1][0]
    tiny_models.assert_unmoved(results[0][1], trainer)


def test_the_value_head_is_never_made_in_half_precision():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in model.v_head.parameters()} == {torch.float32}
