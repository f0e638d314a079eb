"""PPO on the openings: the trainer, one step, and a run that can be stopped and gone on with."""

import shutil
from pathlib import Path

import torch
from peft import LoraConfig

import ppo_ext

from ...trainer.resume import STATE_FILE
from ..display import Display
from ..figures import distinct_2
from ..folder import RunFolder
from . import base_model, openings
from .metrics import Metrics
from .settings import Settings

LOGGED = {
    "kl": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy": "ppo/policy/entropy",
    "clipfrac": "ppo/policy/clipfrac",
    "policy_loss": "ppo/loss/policy",
    "value_loss": "ppo/loss/value",
    "var_explained": "ppo/val/var_explained",
    "length": "tokens/responses_len_mean",
    "seconds": "time/ppo/total",
}


def build_trainer(model_folder: Path, settings: Settings, with_kl: bool = True) -> "ppo_ext.PPOTrainer":
    """A trainer whose policy is the model with a new LoRA adapter; the reference is the model with the adapter off."""
    model, tokenizer = base_model.load(model_folder)
    torch.manual_seed(settings.seed)  # for the new adapter and value head; the trainer seeds the rest
    adapter = LoraConfig(
        r=settings.lora_rank, lora_alpha=settings.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    config = ppo_ext.PPOConfig(
        seed=settings.seed,
        batch_size=settings.batch,
        mini_batch_size=settings.minibatch,
        ppo_epochs=settings.epochs,
        vf_coef=settings.vf_coef,
        adap_kl_ctrl=with_kl,
        init_kl_coef=settings.kl_coef if with_kl else 0.0,
        target=settings.kl_target,
        horizon=settings.kl_horizon,
    )
    policy = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(
        model,
        peft_config=adapter,
        v_head_init_strategy="normal",
        v_head_initializer_range=0.0,  # values start at 0; random ones would be larger than the rewards
    )
    return ppo_ext.PPOTrainer(config, policy, tokenizer=tokenizer, optimizer=_optimizer(policy, settings))


def _optimizer(policy, settings: Settings) -> torch.optim.Optimizer:
    """Adam with a smaller rate for the value head: it reads hundreds of features of size 1, so its output moves fast."""
    adapter = [p for name, p in policy.named_parameters() if p.requires_grad and not name.startswith("v_head")]
    groups = [
        {"params": adapter, "lr": settings.learning_rate},
        {"params": list(policy.v_head.parameters()), "lr": settings.value_learning_rate},
    ]
    return torch.optim.Adam(groups)


def sample(trainer, prompts: list[str], settings: Settings) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """(queries, responses, response texts), from torch's global generator.

    Plain sampling at temperature 1, so that the sampled distribution is the one whose KL is measured.
    """
    device = trainer.accelerator.device
    tokenizer = trainer.tokenizer
    queries = [torch.tensor(ids, device=device) for ids in tokenizer(prompts)["input_ids"]]
    responses = trainer.generate(
        queries,
        batch_size=settings.batch,
        return_prompt=False,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings.response_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return queries, responses, tokenizer.batch_decode(responses, skip_special_tokens=True)


def ppo_step(trainer, prompts: list[str], metrics: Metrics, settings: Settings) -> dict[str, float]:
    """Generate, score, step: one PPO iteration. Returns what is logged."""
    queries, responses, texts = sample(trainer, prompts, settings)
    rewards = metrics.reward(texts)
    stats = trainer.step(queries, responses, list(rewards.float()))
    return {
        "reward": rewards.mean().item(),
        # Logged for the plot; nothing of it goes back into training.
        "rating": metrics.rating(texts).mean().item(),
        "distinct_2": distinct_2(texts),
        **{name: float(stats[key]) for name, key in LOGGED.items()},
    }


def train(stage, trainer, prompts: list[str], steps: int, metrics: Metrics, settings: Settings, folder: RunFolder,
          display: Display) -> None:  # fmt: skip
    """All steps of a stage, each logged to metrics.jsonl; goes on after the last saved state, if there is one."""
    saved = folder / "state" / stage
    done = _restore(trainer, saved, stage, folder)
    asked = openings.draw(prompts, steps * settings.batch, settings.seed + 3)
    if done:
        display.note(f"going on after step {done}")
    display.note(HEADER)
    with display.bar(stage, steps) as advance:
        advance(by=done)
        for step in range(done + 1, steps + 1):
            record = ppo_step(trainer, asked[(step - 1) * settings.batch : step * settings.batch], metrics, settings)
            folder.log(stage, {"step": step} | record)
            display.note(step_line(step, record))
            advance(f"reward {record['reward']:+.2f}  KL {record['kl']:.1f}")
            if step % settings.save_every == 0 or step == steps:
                _save(trainer, saved, step)


HEADER = "step  reward  rating    KL  KL coef  entropy  clipped  explained  length  sec"


def step_line(step: int, record: dict[str, float]) -> str:
    return (
        f"{step:4d} {record['reward']:+7.2f} {record['rating']:+7.2f} {record['kl']:5.1f} {record['kl_coef']:8.3f} "
        f"{record['entropy']:8.2f} {record['clipfrac']:8.2f} {record['var_explained']:10.2f} {record['length']:7.1f} "
        f"{record['seconds']:4.0f}"
    )


def _save(trainer, saved: Path, step: int) -> None:
    trainer.save_run(str(saved / str(step)))
    for earlier in _saved_steps(saved)[:-1]:
        shutil.rmtree(saved / str(earlier))


def _restore(trainer, saved: Path, stage: str, folder: RunFolder) -> int:
    """Loads the last saved state of an interrupted stage, if any; returns its step."""
    steps = _saved_steps(saved)
    done = steps[-1] if steps else 0
    if done:
        trainer.load_run(str(saved / str(done)))
    folder.drop_log(stage, after=done)
    return done


def _saved_steps(saved: Path) -> list[int]:
    """Steps of the states in the folder, in order. A state's file is there whole or not at all."""
    return sorted(int(file.parent.name) for file in saved.glob(f"*/{STATE_FILE}"))
