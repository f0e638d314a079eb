"""Any Python function as the reward: of one text, of many texts at a time, slow, or failing now and then.

    python examples/reward_function.py MODEL_FOLDER

MODEL_FOLDER holds any causal language model of transformers; `make demo` leaves one in ppo_ext_demo/base_model. `PPOTrainer`
takes scores, not a function: call yours between `generate` and `step`, and decide there what a failure is worth.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import torch
from transformers import AutoTokenizer

from ppo_ext import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

FALLBACK = 0.0  # the score of a text that the function failed on; choose one that is neither a prize nor a punishment


def short_words(text):
    """The function: the share of words of at most four letters. Raises ZeroDivisionError for a text without words."""
    words = text.split()
    return sum(len(word) <= 4 for word in words) / len(words)


def score_one(text):
    """The function on one text, with the failures that are expected. Others should stop the run: they are bugs."""
    try:
        return short_words(text)
    except ZeroDivisionError:
        return FALLBACK


def score_all(texts, workers=8):
    """Scores of a batch [B]. Threads help where the function waits, such as for a server that judges texts.

    A reward model or another function that takes many texts at once needs no threads: call it on the list.
    """
    with ThreadPoolExecutor(workers) as pool:
        scores = torch.tensor(list(pool.map(score_one, texts)))
    # `step` refuses NaN and infinity before anything changes; replace them here if they can come up.
    return torch.nan_to_num(scores, nan=FALLBACK, posinf=1.0, neginf=0.0)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model_folder, dtype=torch.float32)
    config = PPOConfig(batch_size=16, mini_batch_size=8, ppo_epochs=2, learning_rate=2e-5, init_kl_coef=0.05)
    # With scaling and clipping, a function in any unit will do.
    config.use_score_scaling, config.use_score_norm, config.score_clip = True, True, 3.0
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    queries = [torch.tensor(ids) for ids in tokenizer(["In the morning", "The report says that"] * 8)["input_ids"]]
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 16,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(options.steps):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **sampling)
        scores = score_all(tokenizer.batch_decode(responses, skip_special_tokens=True))
        stats = trainer.step(queries, responses, list(scores))
        print(f"step {step:2d}  score {scores.mean():.3f}  KL {stats['objective/kl']:6.3f}")


if __name__ == "__main__":
    main()
