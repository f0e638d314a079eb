"""What a step updates and reports: running moments, trackers, saved files, the hub."""

import pytest
import tiny_models
import torch
from tiny_models import steps

import ppo_ext
from ppo_ext.trainer.stats import RunningMoments


def test_running_moments_have_the_numbers_of_trl_0_9():
    moments = RunningMoments(tiny_models.trainer().accelerator)
    mean, std = moments.update(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (mean, std) == (2.5, pytest.approx(1.2909944)) and moments.std == pytest.approx(1.2909944)
    moments.update(torch.tensor([5.0, 6.0]))
    assert (moments.mean, moments.count) == (3.5, 6)
    assert moments.std == pytest.approx(1.8708287) and moments.var == pytest.approx(2.9166667)


def test_running_moments_of_one_score_are_finite():
    moments = RunningMoments(tiny_models.trainer().accelerator)
    assert moments.update(torch.tensor([3.0])) == (3.0, 0.0)
    assert (moments.mean, moments.std) == (3.0, 1.0)


def test_running_moments_survive_a_file(tmp_path):
    accelerator = tiny_models.trainer().accelerator
    moments = RunningMoments(accelerator)
    moments.update(torch.tensor([1.0, 2.0, 4.0]))
    moments.save_to_json(tmp_path / "moments.json")
    assert RunningMoments.load_from_json(accelerator, tmp_path / "moments.json") == moments


def test_log_stats_reaches_any_tracker():
    from accelerate.tracking import GeneralTracker

    class Kept(GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self):
            super().__init__()
            self.config, self.rows = None, []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            self.config = values

        def log(self, values, step=None, **kwargs):
            self.rows.append(values)

    kept = Kept()
    trainer = tiny_models.trainer(log_with=kept)
    (stats,) = steps(trainer)
    trainer.log_stats(
        stats, {"query": ["a"] * 4, "response": ["b"] * 4}, [1, 2.0, torch.tensor(3.0), torch.tensor([6])]
    )
    assert kept.config["trl_ppo_trainer_config"]["batch_size"] == 4
    (row,) = kept.rows
    assert row["env/reward_mean"] == 3 and row["env/reward_std"] == pytest.approx(2.1602469)
    assert row["env/reward_dist"].tolist() == [1, 2, 3, 6] and row["objective/kl"] == stats["objective/kl"]


def test_a_very_negative_kl_is_named():
    trainer = tiny_models.trainer()
    queries, _, scores = tiny_models.batch(4, 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "return_prompt": False}
    _, responses = trainer.generate(queries, generate_ref_response=True, **options)
    trainer.model.pretrained_model.lm_head.weight.data.zero_()  # uniform, so samples of the reference are unlikely
    with pytest.warns(UserWarning, match=r"the KL per sequence is -\d.*, below -1. .* sample with top_k=0"):
        stats = trainer.step(queries, responses, scores)
    assert stats["objective/kl"] < -1


def test_save_pretrained(tmp_path):
    trainer = tiny_models.trainer()
    steps(trainer)
    trainer.save_pretrained(tmp_path / "run")
    loaded = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tmp_path / "run")
    for name, parameter in tiny_models.weights(trainer).items():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert "ppo_ext" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "tokenizer.json").exists()


def test_the_best_model_is_pushed():
    trainer = tiny_models.trainer(push_to_hub_if_best_kwargs={"repo_id": "me/mine"}, compare_steps=2)
    pushed = []
    trainer.push_to_hub = lambda **options: pushed.append((options, trainer.highest_reward.item()))
    queries, responses, _ = tiny_models.batch(4, 1)
    for score in (1.0, 9.0, 0.5, 9.0, 2.0):  # every second step is compared
        trainer.step(queries, responses, [score] * 4)
    assert pushed == [({"repo_id": "me/mine"}, 1.0), ({"repo_id": "me/mine"}, 2.0)]
    with pytest.raises(ValueError, match="push_to_hub_if_best_kwargs must have a repo_id, got .'private'."):
        tiny_models.trainer(push_to_hub_if_best_kwargs={"private": True})


def test_unused_columns_of_a_dataset_are_dropped():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"input_ids": [[3, 4]] * 4, "query": ["a"] * 4, "other": [1] * 4})
    trainer = tiny_models.trainer()

    def collate(samples):
        return samples

    assert set(next(iter(trainer.prepare_dataloader(dataset, collate)))[0]) == {"input_ids", "query"}
    trainer.config.remove_unused_columns = False
    assert set(next(iter(trainer.prepare_dataloader(dataset, collate)))[0]) == {"input_ids", "query", "other"}
