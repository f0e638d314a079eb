"""Two processes on the CPU (gloo) with responses of different lengths: same statistics, same weights."""

import random
import warnings

import accelerate
import numpy as np
import process_group
import pytest
import tiny_models
import torch


def trainer(**config):
    config = {"accelerator_kwargs": {"cpu": True}, "gradient_accumulation_steps": 2, "mini_batch_size": 1, **config}
    return tiny_models.trainer(**config)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


def batch(rank, seed):
    queries, responses, scores = tiny_models.batch(4, 10 * seed + rank)
    return queries, [ids[: 3 + 2 * rank] for ids in responses], scores


def digest(ours):
    return [parameter.double().sum().item() for parameter in ours.model.parameters()]


def skipping(ours, rank):
    """Makes the loss of TRL's kind skip every minibatch of process 0."""
    loss = ours.loss

    def skip(*args, **kwargs):
        before, ours.config.ratio_threshold = ours.config.ratio_threshold, 1e-6 if rank == 0 else 10.0
        try:
            return loss(*args, **kwargs)
        finally:
            ours.config.ratio_threshold = before

    return skip


def work(rank, folder):
    warnings.simplefilter("ignore")
    report = {}
    ours = trainer(use_score_scaling=True)
    assert ours.is_distributed and ours.config.world_size == 2 and ours.config.global_batch_size == 8
    stats = [ours.step(*batch(rank, i)) for i in range(2)][-1]
    report["stats"] = {
        key: value for key, value in stats.items() if isinstance(value, float) and not key.startswith("time/")
    }
    report["shape"] = list(stats["objective/logprobs"].shape)
    report["keys"] = len(stats)
    report["moments"] = [ours.running.mean, ours.running.std, ours.running.count]
    report["kl_coef"] = ours.kl_ctl.value
    report["trained"] = digest(ours)

    ours.config.exact_update = False
    plain, ours.loss = ours.loss, skipping(ours, rank)
    ours.step(*batch(rank, 3))
    report["one_skips"] = digest(ours)
    report["skipped"] = ours.skipped_minibatches
    ours.loss, ours.config.ratio_threshold = plain, 1e-6
    ours.step(*batch(rank, 4))
    report["both_skip"] = digest(ours)

    for exact in (True, False):
        ours = trainer(early_stopping=True, target_kl=1e-9, ppo_epochs=4, exact_update=exact)
        report[f"tokens_trained, {exact}"] = ours.step(*batch(rank, 5))["ppo/policy/ratio"].size

    for unused in (False, True):  # DDP looks for weights that the outputs do not depend on
        handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=unused)
        pair = []
        for logits in (False, True):
            ours = trainer(accelerator_kwargs={"cpu": True, "kwargs_handlers": [handler]}, optimizer=sgd)
            if logits:
                ours.model.register_forward_hook(lambda *_: None)
            ours.step(*batch(rank, 6))
            assert (ours.why_logits is None) != logits, ours.why_logits
            pair.append(digest(ours))
        report[f"without and with logits, {unused}"] = pair

    logged = []
    ours.accelerator.log = lambda values, step=None: logged.append(values)
    ours.log_stats(stats, {"query": [], "response": []}, [float(rank)] * (4 - rank))
    report["rewards"] = [values["env/reward_dist"].tolist() for values in logged]
    report["drawn"] = [torch.rand(()).item(), random.random(), np.random.rand()]
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    return process_group.run(__file__, {"work": 2}, tmp_path_factory.mktemp("processes"))["work"]


def test_statistics_are_the_same_on_every_process(reports):
    first, second = reports
    assert first["stats"] == second["stats"] and len(first["stats"]) > 20
    assert first["shape"] == second["shape"] and first["shape"][0] == 8 and first["keys"] == second["keys"] == 40
    assert first["kl_coef"] == second["kl_coef"]


def test_weights_stay_the_same_on_every_process(reports):
    first, second = reports
    assert first["trained"] == second["trained"] != first["one_skips"] == second["one_skips"]


def test_an_update_is_left_out_only_when_every_process_skips(reports):
    first, second = reports
    assert (first["skipped"], second["skipped"]) == (8, 0)
    assert first["both_skip"] == first["one_skips"] and second["both_skip"] == second["one_skips"]


def test_score_moments_are_those_of_all_processes(reports):
    first, second = reports
    scores = torch.stack(
        [score for i in range(2) for rank in range(2) for score in tiny_models.batch(4, 10 * i + rank)[2]]
    )
    assert first["moments"] == second["moments"]
    assert first["moments"] == pytest.approx([scores.mean().item(), scores.std().item(), 16], rel=1e-5)


def test_early_stopping_is_decided_together(reports):
    first, second = reports
    for key in ("tokens_trained, True", "tokens_trained, False"):
        assert first[key] == second[key]


def test_processes_sample_differently_and_share_the_order_of_minibatches(reports):
    (torch_a, python_a, numpy_a), (torch_b, python_b, numpy_b) = (report["drawn"] for report in reports)
    assert torch_a != torch_b and python_a != python_b and numpy_a == numpy_b


@pytest.mark.parametrize("unused", [False, True])
def test_a_head_without_logits_takes_part_in_ddp(reports, unused):
    (ours, theirs), second = (report[f"without and with logits, {unused}"] for report in reports)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and [ours, theirs] == second


def test_rewards_are_gathered_and_logged_once(reports):
    first, second = reports
    assert first["rewards"] == [[0.0] * 4 + [1.0] * 3] and second["rewards"] == []
