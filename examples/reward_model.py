"""A reward model from preferences, and PPO against it.

    python examples/reward_model.py MODEL_FOLDER OUTPUT_FOLDER

MODEL_FOLDER holds any causal language model of transformers; `make demo` leaves one in ppo_ext_demo/base_model. Pairs are
made here: a text with more vowels is preferred. Yours come as dicts with the texts "chosen" and "rejected".
"""

import argparse
import random

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import ppo_ext

VOWELS, OTHERS = "aeiou", "bcdfg"


def made_up_pairs(count, seed):
    draw = random.Random(seed)
    pairs = []
    for _ in range(count):
        texts = ["".join(draw.choice(VOWELS + OTHERS) for _ in range(12)) for _ in range(2)]
        rejected, chosen = sorted(texts, key=lambda text: sum(letter in VOWELS for letter in text))
        pairs.append({"chosen": chosen, "rejected": rejected})
    return pairs


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("output_folder")
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    # The trunk of the language model with one output.
    reward_model = AutoModelForSequenceClassification.from_pretrained(options.model_folder, num_labels=1)
    reward_model.config.pad_token_id = tokenizer.pad_token_id
    arguments = ppo_ext.RewardConfig(
        output_dir=options.output_folder, per_device_train_batch_size=32, learning_rate=1e-3, report_to=[], use_cpu=True
    )
    train, held_out = made_up_pairs(options.pairs, 0), made_up_pairs(128, 1)
    reward_trainer = ppo_ext.RewardTrainer(
        reward_model, arguments, train_dataset=train, eval_dataset=held_out, tokenizer=tokenizer
    )
    reward_trainer.train()
    print(f"held-out pairs: {reward_trainer.evaluate()['eval_accuracy']:.2f} ordered as the labels are")
    # A reward of mean 0 and standard deviation 1 on plain samples makes KL coefficients comparable between models.
    ppo_ext.normalize_rewards(reward_model, [tokenizer(pair["chosen"])["input_ids"] for pair in held_out])

    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(options.model_folder, dtype=torch.float32)
    config = ppo_ext.PPOConfig(batch_size=16, mini_batch_size=8, ppo_epochs=2, learning_rate=2e-5, init_kl_coef=0.05)
    trainer = ppo_ext.PPOTrainer(config, model, tokenizer=tokenizer)
    queries = [torch.tensor(ids) for ids in tokenizer(["a", "be", "ci", "do"] * 4)["input_ids"]]
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 12,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(options.steps):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **sampling)
        sequences = [torch.cat([query, response]) for query, response in zip(queries, responses)]
        scores = ppo_ext.reward_scores(reward_model, sequences)
        stats = trainer.step(queries, responses, list(scores))
        print(f"step {step:2d}  score {scores.mean():+.3f}  KL {stats['objective/kl']:6.3f}")


if __name__ == "__main__":
    main()
