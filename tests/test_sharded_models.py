"""FSDP2 by accelerate's plugin on two processes of a CPU, where accelerate itself would leave it out; and tp_plan."""

import pathlib
import types
import warnings

import process_group
import pytest
import tiny_models
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

import ppo_ext
from ppo_ext.trainer import acceleration, construction, sharding

CPU = {"accelerator_kwargs": {"cpu": True}, "ppo_epochs": 1}
KINDS = ("full", "lora", "accumulated")


def make(kind):
    options = {}
    if kind == "lora":
        peft = pytest.importorskip("peft")
        options["peft_config"] = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    if kind == "accumulated":
        options |= {"mini_batch_size": 1, "gradient_accumulation_steps": 2}
    return tiny_models.trainer("llama", optimizer=lambda p: torch.optim.SGD(p, lr=0.05), **CPU, **options)


def sharding_accelerator(config):
    """`make_accelerator`, but with the plugin that accelerate takes on GPUs only."""
    accelerator = acceleration.make_accelerator(config)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    plugin = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=False, **plugin
    )
    return accelerator


class Accelerated:
    """What `construction` takes from `acceleration`, with another accelerator."""

    def __getattr__(self, name):
        return sharding_accelerator if name == "make_accelerator" else getattr(acceleration, name)


def train(kind, rank, folder):
    trainer = make(kind)
    queries, responses, scores = tiny_models.batch(4, 10 + rank)
    stats = trainer.step(queries, responses, scores)
    trainer.save_pretrained(folder)
    torch.manual_seed(0)
    greedy = trainer.generate(queries[: 1 + rank], return_prompt=False, do_sample=False, max_new_tokens=5 + rank)
    trainer.step(*tiny_models.batch(4, 20 + rank))  # after the weights were gathered
    try:
        trainer.save_run(folder)
        refused = None
    except ValueError as error:
        refused = str(error)
    sharded = sum(hasattr(p, "full_tensor") for p in trainer.model.parameters())
    return tiny_models.scalars(stats), [ids.tolist() for ids in greedy], refused, sharded


def work(rank, folder):
    warnings.simplefilter("ignore")
    folder = pathlib.Path(folder)
    report = {(kind, "whole"): train(kind, rank, folder / f"{kind}-whole") for kind in KINDS}
    construction.acceleration = Accelerated()
    report |= {(kind, "sharded"): train(kind, rank, folder / f"{kind}-sharded") for kind in KINDS}
    construction.acceleration = acceleration
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def reports(folder):
    return process_group.run(__file__, {"work": 2}, folder)["work"]


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_weights_train_generate_and_are_saved_as_whole_ones_are(reports, folder, kind):
    for report in reports:
        stats, greedy, _, plain = report[(kind, "whole")]
        sharded_stats, sharded_greedy, refused, sharded = report[(kind, "sharded")]
        assert plain == 0 and sharded > 10
        assert sharded_stats == pytest.approx(stats, rel=1e-5, abs=1e-6)
        assert sharded_greedy == greedy
        assert (
            "save_run: every process must hold whole weights, got FSDP; use trainer.accelerator.save_state" in refused
        )
    models = [folder / f"{kind}-{way}" for way in ("whole", "sharded")]
    if kind == "lora":
        import safetensors.torch

        files = [safetensors.torch.load_file(path / "adapter_model.safetensors") for path in models]
    else:
        files = [ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(path).state_dict() for path in models]
    assert files[0].keys() == files[1].keys()
    for name, tensor in files[0].items():
        torch.testing.assert_close(files[1][name], tensor, rtol=1e-5, atol=1e-6)


def test_the_plugin_is_refused_in_version_1_and_told_of_on_a_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # the plugin sets it
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    with pytest.warns(
        UserWarning, match=r"accelerate leaves FSDP out on cpu, and every process holds all weights \(NO\)"
    ):
        tiny_models.trainer(accelerator_kwargs={"cpu": True, "fsdp_plugin": plugin})
    for second, text in (
        (False, "fsdp_version must be 2, got 1; give accelerate launch --fsdp_version 2"),
        (True, "fsdp_cpu_ram_efficient_loading must be false, got true"),
    ):
        state = types.SimpleNamespace(
            is_fsdp2=second, fsdp_plugin=types.SimpleNamespace(cpu_ram_efficient_loading=True)
        )
        with pytest.raises(ValueError, match=text):
            sharding.check_accelerator(types.SimpleNamespace(distributed_type="FSDP", state=state), {})


def test_a_model_that_is_split_already_is_refused(tmp_path_factory):
    found = process_group.run(__file__, {"split": 2}, tmp_path_factory.mktemp("split"))["split"]
    for error in found:
        assert "PPOTrainer: model must be whole, got pretrained_model.model" in error and "without tp_plan" in error


def split(rank, folder):
    tiny_models.build("llama").save_pretrained(folder)
    torch.distributed.barrier()
    import transformers

    backbone = transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto")
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(backbone)
    try:
        ppo_ext.PPOTrainer(ppo_ext.PPOConfig(**CPU), model, None, tiny_models.tokenizer())
    except ValueError as error:
        return str(error)
    return None
