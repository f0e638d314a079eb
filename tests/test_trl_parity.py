"""PPOTrainer against an installed TRL 0.11.4: the same model, batches and seed; all statistics are compared."""

import copy
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from accelerate.state import GradientState
from conftest import require_trl

import ppo_ext.trl

STEPS = 5
PER_TOKEN = ("objective/logprobs", "objective/ref_logprobs", "ppo/policy/advantages", "ppo/policy/ratio")


def with_value_heads(library, name, peft_config=None, **changes):
    kind = "AutoModelForSeq2SeqLMWithValueHead" if name == "t5" else "AutoModelForCausalLMWithValueHead"
    base = tiny_models.build(name, **changes)
    torch.manual_seed(7)  # draws the value head and the adapter
    options = {} if peft_config is None else {"peft_config": copy.deepcopy(peft_config)}
    return getattr(library, kind).from_pretrained(base, **options)


def make_trainer(library, model, *, padding_side="right", optimizer=None, lr_scheduler=None, **config):
    defaults = {"batch_size": 8, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 3e-4}
    # accelerate's state belongs to the process; a training that an earlier test broke off has left its dataloader there
    GradientState._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that its PPOTrainer will be removed
        optimizer = optimizer and optimizer(model.parameters())
        return library.PPOTrainer(
            library.PPOConfig(**{**defaults, **config}),
            model,
            None,
            tiny_models.tokenizer(padding_side),
            optimizer=optimizer,
            lr_scheduler=lr_scheduler and lr_scheduler(optimizer),
        )


def run(
    library,
    name,
    *,
    peft_config=None,
    changes=None,
    response_masks=None,
    batches=None,
    steps=STEPS,
    ours=None,
    **options,
):
    """`ours` holds options that TRL does not have."""
    model = with_value_heads(library, name, peft_config, **(changes or {}))
    if library is ppo_ext.trl:
        # TRL's accumulated update is a mean of means; without accumulation either setting gives the same bits
        options |= {"exact_update": options.get("gradient_accumulation_steps", 1) == 1, **(ours or {})}
    trainer = make_trainer(library, model, **options)
    history = []
    for step in range(steps):
        queries, responses, scores = tiny_models.batch(8, 100 + step, **(batches or {}))
        masks = response_masks and [response_masks(response) for response in responses]
        history.append((trainer.step(queries, responses, scores, masks), trainer.kl_ctl.value))
    return history, trainer


def assert_same_stats(theirs, ours, rtol=1e-4, atol=2e-6):
    """The same keys, types, shapes and numbers; per-token arrays are compared where the mask is 1."""
    assert set(ours) == set(theirs) and len(ours) == 40
    for key, expected in theirs.items():
        got = ours[key]
        assert type(got) is type(expected), f"{key}: {type(got)} instead of {type(expected)}"
        expected, got = np.asarray(expected, dtype=np.float64), np.asarray(got, dtype=np.float64)
        assert got.shape == expected.shape, f"{key}: shape {got.shape} instead of {expected.shape}"
        if key.startswith("time/"):
            assert (got >= 0).all()
            continue
        if key in PER_TOKEN:
            expected, got = expected[got != 0], got[got != 0]  # ours are 0 where the mask is
            assert got.size, key
        # whitened advantages have scale 1; the small ones are differences of larger numbers, with the rounding of those
        floor = max(atol, 1e-5 * np.abs(expected).max())
        np.testing.assert_allclose(got, expected, rtol=rtol, atol=floor, err_msg=key)


def assert_parity(name, **options):
    theirs, their_trainer = run(require_trl(), name, **options)
    ours, our_trainer = run(ppo_ext.trl, name, **options)
    for step, ((their_stats, their_kl_coef), (our_stats, our_kl_coef)) in enumerate(zip(theirs, ours, strict=True)):
        assert_same_stats(their_stats, our_stats)
        assert our_kl_coef == pytest.approx(their_kl_coef, rel=1e-6), step
    return their_trainer, our_trainer


def lora(targets):
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")


def sgd(parameters):
    # Adam would scale up rounding errors of gradients that are exactly 0 in theory, such as that of an attention key's bias
    return torch.optim.SGD(parameters, lr=3e-2)


@pytest.mark.parametrize("kl_penalty", ["kl", "abs", "mse", "full"])
def test_every_kl_penalty(kl_penalty):
    assert_parity("gpt2", kl_penalty=kl_penalty)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "mini_batch_size": 1},
        {"mini_batch_size": 8, "ppo_epochs": 4},
        {"gamma": 0.9, "lam": 0.7, "cliprange": 0.05, "cliprange_value": 0.1, "vf_coef": 0.5},
        {"adap_kl_ctrl": False, "init_kl_coef": 0.5},
        {"target": 0.01, "horizon": 100.0},
        {"score_clip": 0.3},
        {"early_stopping": True, "target_kl": 1e-4},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_option(options):
    assert_parity("gpt2", **options)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_other_models(name):
    assert_parity(name)


@pytest.mark.parametrize("options", [{}, {"kl_penalty": "full"}, {"gradient_accumulation_steps": 4}], ids=str)
def test_encoder_decoder(options):
    assert_parity("t5", changes={"scale": 1.0}, batches={"start_token": tiny_models.PAD}, **options)


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
def test_left_padding_of_a_rotary_model(kl_penalty):
    assert_parity("llama", padding_side="left", kl_penalty=kl_penalty)


@pytest.mark.parametrize("kl_penalty", ["kl", "full"])
def test_lora_policy_is_its_own_reference(kl_penalty):
    assert_parity("llama", peft_config=lora(["q_proj", "v_proj"]), kl_penalty=kl_penalty, learning_rate=3e-3)


def test_whitened_rewards_without_padding_behind_a_response():
    assert_parity("gpt2", whiten_rewards=True, batches={"equal_lengths": True})
    assert_parity("llama", whiten_rewards=True, padding_side="left")


THROUGH_PADDING = {"gae_through_padding": True}


@pytest.mark.parametrize(
    "options", [{}, {"kl_penalty": "full"}, {"gradient_accumulation_steps": 2, "gamma": 0.9}], ids=str
)
def test_whitened_rewards_with_padding_behind_responses(options):
    assert_parity("gpt2", whiten_rewards=True, ours=THROUGH_PADDING, **options)


def test_one_block_response_masks():
    def middle(response):
        return torch.tensor([0] + [1] * (len(response) - 2) + [0])

    assert_parity("gpt2", response_masks=middle)


def with_holes(response):
    return torch.tensor([1] + [0] * (len(response) - 2) + [1])


def test_response_masks_with_holes_when_nothing_decays():
    # with gamma = lam = 1 TRL's sum of deltas telescopes over a hole, which gives the same as skipping the hole
    assert_parity("gpt2", response_masks=with_holes, gamma=1.0, lam=1.0)


def test_response_masks_with_holes_skip_the_hole_where_trl_decays():
    theirs, _ = run(require_trl(), "gpt2", response_masks=with_holes, steps=1)
    ours, _ = run(ppo_ext.trl, "gpt2", response_masks=with_holes, steps=1)
    key = "ppo/returns/mean"
    assert abs(theirs[0][0][key] - ours[0][0][key]) > 1e-3
    assert ours[0][0]["objective/kl"] == pytest.approx(theirs[0][0]["objective/kl"], abs=1e-6)


@pytest.mark.parametrize(
    "options", [{}, {"whiten_rewards": True}, {"gamma": 0.9, "lam": 0.7, "optimizer": sgd}], ids=" ".join
)
def test_response_masks_with_holes_that_decay(options):
    assert_parity("gpt2", response_masks=with_holes, ours=THROUGH_PADDING, **options)


def test_learning_rate_schedule():
    def schedule(optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)

    def adam(parameters):
        return torch.optim.Adam(parameters, lr=3e-4)

    theirs, ours = assert_parity("gpt2", optimizer=adam, lr_scheduler=schedule, gradient_accumulation_steps=2)
    assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"] == 3e-4 * 0.5**STEPS


def test_one_update_with_a_clipped_gradient():
    options = {"mini_batch_size": 8, "ppo_epochs": 1, "max_grad_norm": 1e-2, "steps": 1, "optimizer": sgd}
    assert_same_weights(*assert_parity("gpt2", **options))


def assert_same_weights(theirs, ours):
    expected = dict(theirs.accelerator.unwrap_model(theirs.model).named_parameters())
    got = dict(ours.accelerator.unwrap_model(ours.model).named_parameters())
    assert set(got) == set(expected)
    for name, parameter in expected.items():
        same = torch.allclose(got[name], parameter, rtol=1e-4, atol=1e-5)
        assert same, f"{name}: largest difference {(got[name] - parameter).abs().max().item()}"


@pytest.mark.parametrize(
    "name, options",
    [
        ("gpt2", {}),
        ("gpt2", {"gradient_accumulation_steps": 4, "kl_penalty": "mse"}),
        ("llama", {"padding_side": "left"}),
        ("gpt_neox", {}),
        ("t5", {"changes": {"scale": 1.0}, "batches": {"start_token": tiny_models.PAD}}),
    ],
    ids=str,
)
def test_weights_after_five_steps(name, options):
    theirs, ours = assert_parity(name, optimizer=sgd, **options)
    assert_same_weights(theirs, ours)
    start = with_value_heads(ppo_ext.trl, name, **options.get("changes", {}))
    trained = dict(ours.model.named_parameters())
    moved = max((trained[name] - parameter).abs().max().item() for name, parameter in start.named_parameters())
    assert moved > 1e-3, "the comparison means nothing if training moved nothing"
