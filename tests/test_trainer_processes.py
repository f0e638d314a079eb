"""Two processes on the CPU (gloo) with responses of different lengths: same statistics, same weights."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = """
import json, os, sys, warnings

import accelerate
import tiny_models
import torch

warnings.simplefilter("ignore")
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
report = {}


def trainer(**config):
    config = {"accelerator_kwargs": {"cpu": True}, "gradient_accumulation_steps": 2, "mini_batch_size": 1, **config}
    return tiny_models.trainer(**config)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=1e-2)


def batch(seed):
    queries, responses, scores = tiny_models.batch(4, 10 * seed + rank)
    return queries, [ids[: 3 + 2 * rank] for ids in responses], scores


def digest(ours):
    return [parameter.double().sum().item() for parameter in ours.model.parameters()]


ours = trainer(use_score_scaling=True)
assert ours.is_distributed and ours.config.world_size == 2 and ours.config.global_batch_size == 8
stats = [ours.step(*batch(i)) for i in range(2)][-1]
report["stats"] = {key: value for key, value in stats.items() if isinstance(value, float) and "/len" not in key
                   and not key.startswith(("time/", "tokens/"))}
report["shape"] = list(stats["objective/logprobs"].shape)
report["keys"] = len(stats)
report["moments"] = [ours.running.mean, ours.running.std, ours.running.count]
report["kl_coef"] = ours.kl_ctl.value
report["trained"] = digest(ours)

if rank == 0:  # one process skips every minibatch, the other none: both must still make the same updates
    ours.config.ratio_threshold = 1e-6
ours.step(*batch(3))
report["one_skips"] = digest(ours)
report["skipped"] = ours.skipped_minibatches
ours.config.ratio_threshold = 1e-6
ours.step(*batch(4))
report["both_skip"] = digest(ours)

ours = trainer(early_stopping=True, target_kl=1e-9, ppo_epochs=4)
report["tokens_trained"] = ours.step(*batch(5))["ppo/policy/ratio"].size

for unused in (False, True):  # DDP looks for weights that the outputs do not depend on
    handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=unused)
    pair = []
    for logits in (False, True):
        ours = trainer(accelerator_kwargs={"cpu": True, "kwargs_handlers": [handler]}, optimizer=sgd)
        if logits:
            ours.model.register_forward_hook(lambda *_: None)
        ours.step(*batch(6))
        assert (ours.why_logits is None) != logits, ours.why_logits
        pair.append(digest(ours))
    report[f"without and with logits, {unused}"] = pair

logged = []
ours.accelerator.log = lambda values, step=None: logged.append(values)
ours.log_stats(stats, {"query": [], "response": []}, [float(rank)] * 4)
report["rewards"] = [values["env/reward_dist"].tolist() for values in logged]
with open(os.path.join(sys.argv[1], f"{rank}.json"), "w") as file:
    json.dump(report, file)
del ours
torch.distributed.barrier()  # without a barrier gloo's threads may abort the process that exits first
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    tests = pathlib.Path(__file__).parent
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tests), str(tests.parent)]))
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", worker, folder],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        check=True,
        timeout=240,
    )
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_statistics_are_the_same_on_every_process(reports):
    first, second = reports
    assert first["stats"] == second["stats"] and len(first["stats"]) > 20
    assert first["shape"] == second["shape"] and first["keys"] == second["keys"] == 40
    assert first["kl_coef"] == second["kl_coef"]


def test_weights_stay_the_same_on_every_process(reports):
    first, second = reports
    assert first["trained"] == second["trained"] != first["one_skips"] == second["one_skips"]


def test_an_update_is_left_out_only_when_every_process_skips(reports):
    first, second = reports
    assert (first["skipped"], second["skipped"]) == (8, 0)
    assert first["both_skip"] == first["one_skips"] and second["both_skip"] == second["one_skips"]


def test_score_moments_are_those_of_all_processes(reports):
    import tiny_models
    import torch

    first, second = reports
    scores = torch.stack(
        [score for i in range(2) for rank in range(2) for score in tiny_models.batch(4, 10 * i + rank)[2]]
    )
    assert first["moments"] == second["moments"]
    assert first["moments"] == pytest.approx([scores.mean().item(), scores.std().item(), 16], rel=1e-5)


def test_early_stopping_is_decided_together(reports):
    first, second = reports
    assert first["tokens_trained"] == second["tokens_trained"]


@pytest.mark.parametrize("unused", [False, True])
def test_a_head_without_logits_takes_part_in_ddp(reports, unused):
    (ours, theirs), second = (report[f"without and with logits, {unused}"] for report in reports)
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5) and [ours, theirs] == second


def test_rewards_are_gathered_and_logged_once(reports):
    first, second = reports
    assert first["rewards"] == [[0.0] * 4 + [1.0] * 4] and second["rewards"] == []
