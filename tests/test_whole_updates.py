"""An update over accumulation and processes is that of one process with the whole batch, and so are its statistics."""

import functools
import itertools
import warnings

import numpy as np
import process_group
import pytest
import tiny_models
import torch

import ppo_ext
from ppo_ext.trainer.config import AGGREGATIONS

ROWS = 4  # samples of a process
BATCHES = ("equal", "ragged", "empty")
ACCUMULATION = (1, 2, 4)
OPTIMIZERS = ("sgd", "adam")
# scenarios beyond the grid: what is decided or computed over all processes
OPTIONS = {
    "whitened": {"whiten_rewards": True, "use_score_scaling": True, "use_score_norm": True},
    "early": {"early_stopping": True, "target_kl": 1e-6, "ppo_epochs": 4},
    "late": {"early_stopping": True, "target_kl": 1e6},
    "clipped": {"max_grad_norm": 0.1},
    "guarded": {"ratio_threshold": 1.0},
    "options": {
        "kl_penalty": "k3",
        "cliprange_high": 0.05,
        "dual_clip": 1.01,
        "lam_returns": 1.0,
        "bootstrap_truncated": True,
        "entropy_coef": 0.1,
    },
    "critic": {"critic_warmup_steps": 1, "max_grad_norm": 0.1},
    **{name: {"loss_aggregation": name, "entropy_coef": 0.1} for name in AGGREGATIONS[1:]},
    "rollout": {"rollout_kind": "tis"},
    "padding": {"whiten_rewards": True, "gae_through_padding": True},
    "scheduled": {},
}
GRID = [*itertools.product(BATCHES, ACCUMULATION, OPTIMIZERS, [None])]
SCENARIOS = [*GRID, *[("ragged", 2, "sgd", name) for name in OPTIONS], ("empty", 1, "sgd", "whitened")]
THREE = [("ragged", 2, "adam", None), ("empty", 1, "sgd", "whitened"), ("empty", 4, "adam", None)]
name_of = pytest.mark.parametrize("scenario", SCENARIOS, ids=str)


def optimizer(name, option):
    if name == "sgd":  # the gradient of a sum over some 50 tokens is as many times larger than that of their mean
        return lambda parameters: torch.optim.SGD(parameters, lr=0.001 if option == "token_sum" else 0.05)
    # Adam scales gradients up that are nothing but rounding errors; eps keeps these small
    return lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-3)


def samples(kind, rank, step):
    """The batch of one process."""
    queries, responses, scores = tiny_models.batch(ROWS, 10 * step + rank, equal_lengths=kind == "equal")
    if kind != "equal":
        responses = [ids[: 3 + 2 * rank] for ids in responses]
    counts = 0 if sits_out(kind, rank) else 1
    return queries, responses, scores, [torch.full_like(ids, counts) for ids in responses]


def sits_out(kind, rank):
    return kind == "empty" and rank == 1


def order(epoch):
    """Indices of the samples of a process in one epoch."""
    return [(i + epoch) % ROWS for i in (2, 0, 3, 1)]


def critic_model():
    return ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2", 5))


def all_weights(trainer, critic):
    of_critic = (
        {} if critic is None else {f"critic.{name}": p.detach().clone() for name, p in critic.named_parameters()}
    )
    return {**tiny_models.weights(trainer), **of_critic}


def train(kind, accumulation, optimizer_name, option, processes, rank=None):
    """The statistics of each step and the change of the weights; rank None: one process with the batches of all."""
    ranks = [r for r in range(processes) if not sits_out(kind, r)] if rank is None else [rank]
    parts = 1 if rank is None else accumulation  # of an update in this process
    rows_of_update = 4 if accumulation == 4 else 2
    config = {
        "batch_size": ROWS * len(ranks),
        "mini_batch_size": rows_of_update * len(ranks) // parts,
        "gradient_accumulation_steps": parts,
        "target": 0.01,
        "horizon": 1000.0,
        "accelerator_kwargs": {"cpu": True},
        "seed": 3,
        **OPTIONS.get(option, {}),
    }
    small = {"num_hidden_layers": 1}
    critic = critic_model() if option == "critic" else None
    of_critic = [] if critic is None else [*critic.parameters()]
    trainer = tiny_models.trainer(
        "llama",
        changes=small,
        optimizer=lambda parameters: optimizer(optimizer_name, option)([*parameters, *of_critic]),
        critic_model=critic,
        **config,
    )
    if option == "scheduled":
        schedule = torch.optim.lr_scheduler.StepLR(trainer.optimizer.optimizer, step_size=1)
        trainer.lr_scheduler = trainer.accelerator.prepare(schedule)
    epochs = itertools.count()

    def minibatches():
        rows = order(next(epochs))
        size = len(rows) // (ROWS // rows_of_update) // parts
        cuts = [rows[i : i + size] for i in range(0, ROWS, size)]
        return [[r * ROWS + i for r in range(len(ranks)) for i in cut] for cut in cuts]

    trainer._minibatches = minibatches
    before = all_weights(trainer, critic)
    history = []
    for step in range(1 if option is None else 2):
        batch = [
            [x for part in column for x in part]
            for column in zip(*[samples(kind, r, step) for r in ranks], strict=True)
        ]
        batch += [[-(ids % 7) / 3.0 for ids in batch[1]]] if option == "rollout" else []
        history.append({k: v for k, v in trainer.step(*batch).items() if not k.startswith("time/")})
    after = all_weights(trainer, critic)
    change = torch.cat([(after[name] - before[name]).flatten().double() for name in before])
    facts = {"kl_coef": trainer.kl_ctl.value, "skipped": trainer.skipped_minibatches > 0}
    facts |= {"moments": [trainer.running.mean, trainer.running.std, trainer.running.count]}
    return {"stats": history, "change": change, **facts}


def work(rank, folder, scenarios=SCENARIOS, processes=2):
    warnings.simplefilter("ignore")
    return {scenario: train(*scenario, processes, rank) for scenario in scenarios}


def work_of_three(rank, folder):
    return work(rank, folder, THREE, 3)


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    return process_group.run(__file__, {"work": 2, "work_of_three": 3}, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def two(groups):
    return groups["work"]


@pytest.fixture(scope="module")
def three(groups):
    return groups["work_of_three"]


@functools.cache
def whole_batch(kind, rows_of_update, optimizer_name, option, processes):
    """What one process makes of the batches of all, each update in one minibatch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(kind, rows_of_update, optimizer_name, option, processes)


def compare(results, scenario):
    kind, accumulation, *rest = scenario
    whole = whole_batch(kind, 4 if accumulation == 4 else 2, *rest, len(results))
    first, *others = results
    for other in others:
        assert torch.equal(other["change"], first["change"])
    moved = whole["change"].norm()
    assert moved > 1e-3 or scenario[-1] == "guarded"
    assert (first["change"] - whole["change"]).norm() <= 1e-5 * moved
    assert first["kl_coef"] == pytest.approx(whole["kl_coef"], rel=1e-5)
    assert first["moments"] == pytest.approx(whole["moments"], rel=1e-5) and first["skipped"] == whole["skipped"]
    for other in results:
        for got, expected in zip(other["stats"], whole["stats"], strict=True):
            assert got.keys() == expected.keys()
            for key in expected:
                a, b = np.asarray(got[key], dtype=np.float64), np.asarray(expected[key], dtype=np.float64)
                assert a.size == b.size or "/policy/" in key or "logprobs" in key, key
                # of arrays, what counts and whatever the order; the samples of a process that sits out are masked
                a, b = (x if x.size == 1 else np.sort(x[x != 0]) for x in (a, b))
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=key)


@name_of
def test_two_processes_make_the_update_of_one(two, scenario):
    compare([result[scenario] for result in two], scenario)


@pytest.mark.parametrize("scenario", THREE, ids=str)
def test_three_processes_make_the_update_of_one(three, scenario):
    compare([result[scenario] for result in three], scenario)


@pytest.mark.parametrize("option", [None, *OPTIONS])
@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_in_one_process_makes_the_update_of_one_minibatch(accumulation, option):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts = train("ragged", accumulation, "adam", option, processes=1, rank=0)
    compare([parts], ("ragged", accumulation, "adam", option))


def test_a_guarded_update_is_left_out_whole(two):
    assert all(result[("ragged", 2, "sgd", "guarded")]["skipped"] for result in two)


@pytest.mark.parametrize("exact", [True, False])
def test_without_parts_the_setting_changes_no_bit(exact, monkeypatch):
    results = []
    for setting in (exact, True):
        trainer = tiny_models.trainer(exact_update=setting, whiten_rewards=True, early_stopping=True)
        stats = tiny_models.steps(trainer, 2)
        results.append((tiny_models.scalars(stats[-1]), tiny_models.weights(trainer)))
    assert results[0][0] == results[1][0]
    tiny_models.assert_unmoved(results[0][1], trainer)
