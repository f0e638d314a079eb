"""Stopping a PPO run at any time and going on later with the same bits.

    python examples/resume.py MODEL_FOLDER STATE_FOLDER

Stop it with Ctrl-C, or kill it, and start it again with the same arguments: it goes on after the last saved step, and every
number is the one that an uninterrupted run would have had. MODEL_FOLDER holds any causal language model of transformers;
`make demo` leaves one in ppo_ext_demo/base_model. The reward is the number of different words.
"""

import argparse
import json
import os

import torch
from transformers import AutoTokenizer

from ppo_ext import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

PROMPTS = ["The garden behind the house", "On the way to the station", "The letter began with", "At night the harbour"]


def saved_steps(folder):
    """Steps with a state, in order. `save_run` writes its one file whole or not at all, so one that is there is good."""
    steps = [int(name) for name in os.listdir(folder)] if os.path.isdir(folder) else []
    return sorted(step for step in steps if os.path.exists(f"{folder}/{step}/trainer_state.safetensors"))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("state_folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    # Everything is built as in the first run; then the state is loaded over it.
    torch.manual_seed(0)  # for the value head; the trainer seeds the rest
    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model_folder, dtype=torch.float32)
    config = PPOConfig(batch_size=16, mini_batch_size=8, ppo_epochs=2, learning_rate=2e-5, init_kl_coef=0.05, seed=0)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    steps = saved_steps(options.state_folder)
    done = steps[-1] if steps else 0
    if done:
        trainer.load_run(f"{options.state_folder}/{done}")
        print(f"going on after step {done}")

    queries = [torch.tensor(ids) for ids in tokenizer(PROMPTS * 4)["input_ids"]]
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 16,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(done + 1, options.steps + 1):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **sampling)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        stats = trainer.step(queries, responses, [torch.tensor(float(len(set(text.split())))) for text in texts])
        # What is yours to keep: the trainer knows its own state, not where you are in your data.
        print(json.dumps({"step": step, "score": float(stats["ppo/mean_scores"]), "kl": float(stats["objective/kl"])}))
        if step % 5 == 0 or step == options.steps:
            trainer.save_run(f"{options.state_folder}/{step}")


if __name__ == "__main__":
    main()
