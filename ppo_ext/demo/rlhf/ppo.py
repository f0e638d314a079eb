"""The last stages: PPO against the reward model with a KL penalty, and the control without one."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import ppo_ext

from ...supervised.reward_scores import reward_scores
from ..display import Display
from ..folder import RunFolder
from .corpus import Corpus, prompts
from .evaluate import evaluate, generation_kwargs, sample
from .gold import GoldMetric
from .settings import Settings
from .stages import load, save


def train_ppo(corpus: Corpus, settings: Settings, gold: GoldMetric, folder: RunFolder, display: Display) -> dict:
    """PPO with an adaptive KL penalty; writes ppo_model."""
    config = ppo_config(
        settings,
        learning_rate=settings.ppo_learning_rate,
        init_kl_coef=settings.kl_coef,
        target=settings.kl_target,
        horizon=settings.kl_horizon,
    )
    return _run("ppo", "PPO", config, settings.ppo_steps, corpus, settings, gold, folder, display)


def train_control(corpus: Corpus, settings: Settings, gold: GoldMetric, folder: RunFolder, display: Display) -> dict:
    """PPO without a KL penalty and at a larger learning rate, to show what the penalty prevents; writes control_model."""
    config = ppo_config(settings, learning_rate=settings.control_learning_rate, init_kl_coef=0.0, adap_kl_ctrl=False)
    return _run("control", "control, no KL", config, settings.control_steps, corpus, settings, gold, folder, display)


def ppo_config(settings: Settings, **changes: Any) -> "ppo_ext.PPOConfig":
    return ppo_ext.PPOConfig(
        seed=settings.seed,
        batch_size=settings.ppo_batch,
        mini_batch_size=settings.ppo_mini_batch,
        ppo_epochs=settings.ppo_epochs,
        vf_coef=settings.vf_coef,
        **changes,
    )


def _run(
    stage: str,
    title: str,
    config: "ppo_ext.PPOConfig",
    steps: int,
    corpus: Corpus,
    settings: Settings,
    gold: GoldMetric,
    folder: RunFolder,
    display: Display,
) -> dict:
    """Trains, logs each step to metrics.jsonl, saves the policy and returns its held-out figures."""
    torch.manual_seed(settings.seed + 3)  # for the new value head; the trainer seeds the rest
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "sft_model"))
    reward_model = load(AutoModelForSequenceClassification, folder / "reward_model")
    trainer = ppo_ext.PPOTrainer(config, model, tokenizer=corpus.tokenizer)
    asked = prompts(corpus, corpus.train, settings.prompt_tokens, steps * settings.ppo_batch, settings.seed + 3)
    with display.bar(title, steps) as advance:
        for step in range(1, steps + 1):
            queries = asked[(step - 1) * settings.ppo_batch : step * settings.ppo_batch]
            record = ppo_step(trainer, reward_model, queries, corpus.tokenizer, settings)
            # The gold metric is logged for the plot; training does not use it.
            record["gold"] = gold(record.pop("texts")).mean().item()
            folder.log(stage, {"step": step} | record)
            advance(f"score {record['rm_score']:+.2f}  KL {record['kl']:.1f}")
    policy = model.pretrained_model
    save(policy, corpus, folder, f"{stage}_model")
    return held_out_figures(stage, policy, reward_model, corpus, settings, gold, folder)


def ppo_step(trainer: Any, reward_model: Any, queries: list[torch.Tensor], tokenizer: Any, settings: Settings) -> dict:
    """One PPO iteration: generate, score, step. Returns what is logged, and the texts."""
    device = trainer.accelerator.device
    queries = [query.to(device) for query in queries]
    responses = trainer.generate(
        queries, batch_size=len(queries), return_prompt=False, **generation_kwargs(tokenizer, settings.response_tokens)
    )
    sequences = [torch.cat([query, response]) for query, response in zip(queries, responses, strict=True)]
    scores = reward_scores(reward_model, sequences)
    stats = trainer.step(queries, responses, list(scores))
    return {
        "rm_score": scores.mean().item(),
        "kl": float(stats["objective/kl"]),
        "kl_coef": float(stats["objective/kl_coef"]),
        "policy_loss": float(stats["ppo/loss/policy"]),
        "value_loss": float(stats["ppo/loss/value"]),
        "clipfrac": float(stats["ppo/policy/clipfrac"]),
        "var_explained": float(stats["ppo/val/var_explained"]),
        "seconds": float(stats["time/ppo/total"]),
        "texts": tokenizer.batch_decode(responses),
    }


def evaluate_sft(corpus: Corpus, settings: Settings, gold: GoldMetric, folder: RunFolder, display: Display) -> dict:
    """The held-out figures before PPO."""
    policy = load(AutoModelForCausalLM, folder / "sft_model")
    reward_model = load(AutoModelForSequenceClassification, folder / "reward_model")
    return held_out_figures("before", policy, reward_model, corpus, settings, gold, folder)


def held_out_figures(
    stage: str,
    policy: Any,
    reward_model: Any,
    corpus: Corpus,
    settings: Settings,
    gold: GoldMetric,
    folder: RunFolder,
) -> dict:
    """`evaluate` on prompts that no stage trained on, with the SFT model as reference; writes samples/<stage>.jsonl."""
    reference = load(AutoModelForCausalLM, folder / "sft_model")
    policy.eval()
    # The same prompts and the same random numbers for each policy, so that only the policies differ.
    torch.manual_seed(settings.seed + 4)
    asked = prompts(corpus, corpus.held_out, settings.prompt_tokens, settings.eval_prompts, settings.seed + 4)
    samples = sample(policy, corpus.tokenizer, asked, settings.response_tokens)
    prompt_texts = corpus.tokenizer.batch_decode(samples.prompts)
    folder.write_samples(stage, prompt_texts, samples.texts, gold=gold(samples.texts).tolist())
    return evaluate(policy, reference, reward_model, gold, samples)
