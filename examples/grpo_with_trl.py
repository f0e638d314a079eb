"""GRPO with TRL's own trainer, whose log-probabilities and entropies are computed by ppo_ext.

    pip install "trl>=1.12"
    python examples/grpo_with_trl.py MODEL_FOLDER

MODEL_FOLDER holds any causal language model of transformers; `make demo` leaves one in ppo_ext_demo/base_model. All that is
needed of ppo_ext is `patch_trl()`; from TRL 1.15 on, no tensor of [tokens, vocabulary] is made then. The reward is the share
of words that begin with a capital letter.
"""

import argparse

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import ppo_ext

PROMPTS = ["The city on the river", "In the first week of March,", "My neighbour told me that", "We walked along"]


def reward(completions, **_):
    return [sum(word[0].isupper() for word in text.split()) / max(len(text.split()), 1) for text in completions]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("--out", default="grpo_model")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    for name in ppo_ext.patch_trl():
        print(f"computed by ppo_ext: {name}")

    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(options.model_folder, dtype=torch.float32)
    config = GRPOConfig(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        learning_rate=1e-5,
        beta=0.05,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    data = Dataset.from_dict({"prompt": PROMPTS * 4})
    trainer = GRPOTrainer(model, reward, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    for entry in trainer.state.log_history:
        if "reward" in entry:
            print(f"step {entry['step']:2d}  score {entry['reward']:.3f}  entropy {entry['entropy']:.2f}")
    trainer.save_model(options.out)


if __name__ == "__main__":
    main()
