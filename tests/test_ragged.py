"""PPOConfig.ragged_batches: `step` with fewer samples than batch_size."""

import warnings

import numpy as np
import process_group
import pytest
import tiny_models
import torch
from test_critic import same
from tiny_models import weights

import ppo_ext
from ppo_ext.trainer.ragged import cut, rows_of_step


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def trainer(**config):
    settings = {"ppo_epochs": 2, "use_score_scaling": True, "whiten_rewards": True, "accelerator_kwargs": {"cpu": True}}
    return tiny_models.trainer("llama", optimizer=sgd, **{**settings, **config})


def samples(count, seed=3):
    return tiny_models.batch(count, seed)


def plain(stats):
    return {key: value for key, value in stats.items() if not key.startswith("time/")}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for key in expected:
        a, b = (np.asarray(x[key], dtype=np.float64) for x in (found, expected))
        a, b = (x if x.size == 1 else np.sort(x[x != 0]) for x in (a, b))  # of arrays, what counts, in any order
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=key)


def change(before, ours):
    return torch.cat([(now - before[name]).flatten().double() for name, now in weights(ours).items()])


# ---- one process -----------------------------------------------------------------------------------------------------


def test_without_accumulation_a_smaller_batch_is_that_of_a_smaller_config():
    found = []
    for config in (
        {"batch_size": 8, "mini_batch_size": 8, "ragged_batches": True},
        {"batch_size": 5, "mini_batch_size": 5},
    ):
        ours = trainer(**config)
        stats = [ours.step(*samples(5, seed)) for seed in (3, 4)]
        found.append((plain(stats[-1]), weights(ours), ours.kl_ctl.value, vars(ours.running)["mean"]))
    assert all(np.array_equal(found[0][0][key], found[1][0][key]) for key in found[1][0])
    assert same(found[0][1], found[1][1]) and found[0][2:] == found[1][2:]


def test_a_whole_batch_keeps_its_bits():
    found = []
    for ragged in (True, False):
        ours = trainer(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=2, ragged_batches=ragged)
        found.append((plain(ours.step(*samples(8))), weights(ours)))
    assert all(np.array_equal(found[0][0][key], found[1][0][key]) for key in found[1][0])
    assert same(found[0][1], found[1][1])


@pytest.mark.parametrize("mini, accumulation", [(2, 1), (2, 2), (1, 4), (3, 2), (8, 1)])
@pytest.mark.parametrize("count", [1, 3, 5, 7])
def test_updates_of_unequal_parts_are_those_of_whole_minibatches(count, mini, accumulation):
    ours = trainer(
        batch_size=24,
        mini_batch_size=mini,
        gradient_accumulation_steps=accumulation,
        ragged_batches=True,
        max_grad_norm=0.5,
    )
    seen, draw = [], ours._minibatches
    ours._minibatches = lambda: seen.append(draw()) or seen[-1]
    before = weights(ours)
    found = plain(ours.step(*samples(count)))
    moved = change(before, ours)
    whole = trainer(batch_size=count, mini_batch_size=count, max_grad_norm=0.5)
    rows = [  # of each update, without those that fill it up
        [
            [row for part in parts[i : i + accumulation] for row in part if row < count]
            for i in range(0, len(parts), accumulation)
        ]
        for parts in seen
    ]
    assert all(sorted(sum(epoch, [])) == list(range(count)) and all(epoch) for epoch in rows)
    epochs = iter(rows)
    whole._minibatches = lambda: next(epochs)
    assert_close(found, plain(whole.step(*samples(count))))
    assert (change(before, whole) - moved).norm() <= 1e-5 * moved.norm()


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_minibatches_of_an_update_are_of_one_size(accumulation):
    for count in range(1, 30):
        rows = rows_of_step(count, 4, accumulation)
        assert count <= rows < count + accumulation
        parts = cut(list(range(rows)), 4, accumulation)
        assert sorted(sum(parts, [])) == list(range(rows)) and len(parts) % accumulation == 0
        for i in range(0, len(parts), accumulation):
            assert len({len(part) for part in parts[i : i + accumulation]}) == 1
            assert 1 <= len(parts[i]) <= 4


def test_statistics_are_of_the_samples():
    ours = trainer(batch_size=8, mini_batch_size=2, gradient_accumulation_steps=4, ragged_batches=True)
    queries, responses, scores = samples(5)
    stats = ours.step(queries, responses, scores)
    assert (
        len(stats["objective/kl_dist"]) == len(stats["tokens/responses_dist"]) == len(stats["objective/logprobs"]) == 5
    )
    assert stats["ppo/mean_scores"] == pytest.approx(torch.stack(scores).div(ours.running.std).mean().item(), rel=1e-5)


def test_with_a_critic_and_rollout_logprobs():
    found = []
    for config in (
        {"batch_size": 8, "mini_batch_size": 2, "gradient_accumulation_steps": 4, "ragged_batches": True},
        {"batch_size": 5, "mini_batch_size": 5},
    ):
        torch.manual_seed(0)
        critic = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2", 5))
        config |= {"rollout_kind": "tis", "loss_aggregation": "seq_mean_token_mean", "learning_rate": 1e-4}
        ours = tiny_models.trainer("llama", critic_model=critic, **config)
        queries, responses, scores = samples(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stats = ours.step(queries, responses, scores, None, [-(ids % 7) / 3.0 for ids in responses])
        found.append(plain(stats))
    assert_close(*found)


@pytest.mark.parametrize("count, got", [(9, "got 9"), (0, "got 0")])
def test_other_numbers_are_refused(count, got):
    ours = trainer(batch_size=8, mini_batch_size=8, ragged_batches=True)
    before = weights(ours)
    with pytest.raises(ValueError, match=f"queries must have from 1 to config.batch_size = 8 entries, {got}"):
        ours.step(*samples(count))
    queries, responses, scores = samples(5)
    with pytest.raises(ValueError, match=r"scores must have len\(queries\) = 5 entries, got 4"):
        ours.step(queries, responses, scores[:4])
    with pytest.raises(TypeError, match="queries must be a list"):
        ours.step(torch.ones(5, 4, dtype=torch.int64), responses, scores)
    assert same(weights(ours), before)
    with pytest.raises(ValueError, match="queries must have config.batch_size = 4 entries, got 3"):
        trainer().step(*samples(3))
    with pytest.raises(ValueError, match="ragged_batches must be False with exact_update=False, got True"):
        ppo_ext.PPOConfig(ragged_batches=True, exact_update=False)


def test_the_dataloader_keeps_the_last_samples():
    class Numbers(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, i):
            return i

    for ragged, sizes in ((True, [4, 4, 2]), (False, [4, 4])):
        base = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny_models.build("gpt2"))
        config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=2, ragged_batches=ragged)
        ours = ppo_ext.PPOTrainer(config, base, None, tiny_models.tokenizer(), Numbers())
        assert [len(batch) for batch in ours.dataloader] == sizes


# ---- several processes -----------------------------------------------------------------------------------------------

COUNTS = {"unequal": (5, 2), "one sits out": (3, 1), "equal": (3, 3)}


def of_process(case, rank):
    queries, responses, scores = samples(COUNTS[case][rank], 3 + rank)
    counts = int(case != "one sits out" or rank == 0)
    return queries, responses, scores, [torch.full_like(ids, counts) for ids in responses]


def work(rank, folder):
    warnings.simplefilter("ignore")
    report = {}
    for case in COUNTS:
        ours = trainer(batch_size=8, mini_batch_size=4, gradient_accumulation_steps=2, ragged_batches=True)
        before = weights(ours)
        before = {name.removeprefix("module."): x for name, x in before.items()}
        stats = plain(ours.step(*of_process(case, rank)))
        after = {name.removeprefix("module."): x for name, x in weights(ours).items()}
        moved = torch.cat([(after[name] - before[name]).flatten().double() for name in before])
        report[case] = (stats, moved, ours.kl_ctl.value, ours.running.mean)
    return report


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    return process_group.run(__file__, {"work": 2}, tmp_path_factory.mktemp("ragged"))["work"]


@pytest.mark.parametrize("case", COUNTS)
def test_processes_with_unequal_counts_make_the_update_of_one(processes, case):
    ranks = [0] if case == "one sits out" else [0, 1]
    batch = [[x for part in column for x in part] for column in zip(*[of_process(case, rank) for rank in ranks])]
    whole = trainer(batch_size=len(batch[0]), mini_batch_size=len(batch[0]))
    before = weights(whole)
    expected = plain(whole.step(*batch))
    moved = change(before, whole)
    for stats, found, kl_coef, mean in (result[case] for result in processes):
        assert_close(stats, expected)
        assert (found - moved).norm() <= 1e-5 * moved.norm()
        assert kl_coef == pytest.approx(whole.kl_ctl.value, rel=1e-6) and mean == pytest.approx(whole.running.mean)
    assert torch.equal(processes[0][case][1], processes[1][case][1])
