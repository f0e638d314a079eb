"""What comes before PPO: supervised fine-tuning, preference pairs, the reward model."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
)

from ...supervised.reward_scores import normalize_rewards
from ...supervised.reward_trainer import RewardConfig, RewardTrainer
from ...supervised.sft import SFTConfig, SFTTrainer
from ..display import Display, ProgressCallback
from ..folder import RunFolder
from .corpus import Corpus, prompts, windows
from .evaluate import Samples, sample
from .gold import GoldMetric
from .settings import Settings


def train_sft(corpus: Corpus, settings: Settings, folder: RunFolder, display: Display) -> dict:
    """Trains a GPT-2 from scratch on windows of the text; writes sft_model."""
    torch.manual_seed(settings.seed)
    config = GPT2Config(
        vocab_size=len(corpus.tokenizer),
        n_positions=settings.context,
        n_embd=settings.width,
        n_layer=settings.layers,
        n_head=settings.heads,
        activation_function="gelu_pytorch_tanh",  # one fused op; gelu_new costs a sixth of the step on a CPU
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=corpus.tokenizer.eos_token_id,
        eos_token_id=corpus.tokenizer.eos_token_id,
        pad_token_id=corpus.tokenizer.pad_token_id,
    )
    model = GPT2LMHeadModel(config)
    arguments = SFTConfig(
        **trainer_arguments(settings, folder, "sft_model"),
        max_steps=settings.sft_steps,
        per_device_train_batch_size=settings.sft_batch,
        per_device_eval_batch_size=4 * settings.sft_batch,
        learning_rate=settings.sft_learning_rate,
        warmup_steps=round(0.3 * settings.sft_steps),  # a short warm-up at this rate costs a tenth of a nat
        weight_decay=0.1,
    )
    train = windows(corpus.train, settings.sft_window, stride=settings.sft_window // 4)
    held_out = windows(corpus.held_out, settings.sft_window, stride=settings.sft_window)
    with display.bar("SFT", settings.sft_steps) as advance:
        trainer = SFTTrainer(
            model,
            arguments,
            train_dataset=[{"input_ids": window} for window in train],
            eval_dataset=[{"input_ids": window} for window in held_out],
            callbacks=[ProgressCallback("sft", folder, advance)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    results = {"loss": folder.read_log("sft")[-1]["loss"], "eval_loss": trainer.evaluate()["eval_loss"]}
    save(model, corpus, folder, "sft_model")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    display.note(f"{size:.2f} M parameters, held-out loss {results['eval_loss']:.2f} nats per token")
    return results


def label_pairs(corpus: Corpus, settings: Settings, gold: GoldMetric, folder: RunFolder, display: Display) -> dict:
    """Samples responses of the SFT model, and has pairs of them compared; writes pairs.jsonl, held-out pairs last."""
    torch.manual_seed(settings.seed + 1)
    model = load(AutoModelForCausalLM, folder / "sft_model")
    count = settings.responses_per_prompt
    per_part = (corpus.train, settings.train_pairs // count), (corpus.held_out, settings.held_out_pairs // count)
    asked = [p for part, n in per_part for p in prompts(corpus, part, settings.prompt_tokens, n, settings.seed)]
    asked = [prompt for prompt in asked for _ in range(count)]
    with display.bar("sampling", len(asked)) as advance:
        samples = sample(model, corpus.tokenizer, asked, settings.response_tokens, advance)
    # Response i of a prompt is compared with response i + 1, and the last one with the first, so each is in two pairs.
    # With pairs of samples that are used once, held-out accuracy is .64 instead of .72 for the same time.
    ring = torch.arange(len(asked)).view(-1, count).roll(-1, dims=1).flatten()
    scores = gold(samples.texts)
    wins = gold.prefer_first(scores, scores[ring], torch.Generator().manual_seed(settings.seed))
    _write_pairs(folder, samples, ring, wins)
    agrees = ((scores > scores[ring]) == wins).double().mean().item()
    display.note(f"{len(asked)} pairs; the labeller agrees with {gold.name} on {100 * agrees:.0f} % of them")
    return {"gold_mean": scores.mean().item(), "gold_sd": scores.std().item(), "ceiling": agrees}


def train_reward_model(corpus: Corpus, settings: Settings, folder: RunFolder, display: Display) -> dict:
    """Trains the SFT model with a scalar head on the pairs; writes reward_model, normalised on SFT samples."""
    torch.manual_seed(settings.seed + 2)
    model = load(AutoModelForSequenceClassification, folder / "sft_model", num_labels=1)
    pairs = _read_pairs(folder)
    train, held_out = pairs[: settings.train_pairs], pairs[settings.train_pairs :]
    steps = settings.reward_epochs * -(-len(train) // settings.reward_batch)
    arguments = RewardConfig(
        **trainer_arguments(settings, folder, "reward_model"),
        num_train_epochs=settings.reward_epochs,
        per_device_train_batch_size=settings.reward_batch,
        per_device_eval_batch_size=4 * settings.reward_batch,
        learning_rate=settings.reward_learning_rate,
        warmup_steps=round(0.1 * steps),
        center_rewards_coefficient=0.01,
    )
    with display.bar("reward model", steps) as advance:
        callback = ProgressCallback("reward", folder, advance)
        trainer = RewardTrainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    evaluated = trainer.evaluate()
    results = {name: evaluated[f"eval_{name}"] for name in ("loss", "accuracy", "ties", "margin")}
    normalize_rewards(model, [pair[f"input_ids_{side}"] for side in ("chosen", "rejected") for pair in held_out])
    save(model, corpus, folder, "reward_model")
    display.note(f"held-out accuracy {results['accuracy']:.3f} on noisy votes, ties {results['ties']:.3f}")
    return results


def trainer_arguments(settings: Settings, folder: RunFolder, name: str) -> dict[str, Any]:
    """What both trainers get: a cosine schedule, a record per update, no checkpoints, no output of transformers' own."""
    on_cpu = default_device() == "cpu"
    return {
        "output_dir": str(folder / name),
        "seed": settings.seed,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
    }


def load(auto_class: Any, path: Path, **changes: Any) -> Any:
    """A saved model in eval mode, on the device that the demo uses."""
    return auto_class.from_pretrained(path, **changes).to(default_device()).eval()


def save(model: Any, corpus: Corpus, folder: RunFolder, name: str) -> None:
    model.save_pretrained(folder / name)
    corpus.tokenizer.save_pretrained(folder / name)


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _write_pairs(folder: RunFolder, samples: Samples, opponents: torch.Tensor, wins: torch.Tensor) -> None:
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        for i, (opponent, first_wins) in enumerate(zip(opponents.tolist(), wins.tolist(), strict=True)):
            chosen, rejected = (i, opponent) if first_wins else (opponent, i)
            pair = {
                "prompt_ids": samples.prompts[i].tolist(),
                "chosen_ids": samples.responses[chosen].tolist(),
                "rejected_ids": samples.responses[rejected].tolist(),
                "chosen": samples.texts[chosen],
                "rejected": samples.texts[rejected],
            }
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def _read_pairs(folder: RunFolder) -> list[dict[str, list[int]]]:
    with open(folder / "pairs.jsonl", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    return [{f"input_ids_{side}": p["prompt_ids"] + p[f"{side}_ids"] for side in ("chosen", "rejected")} for p in pairs]
