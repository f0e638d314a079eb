"""The classic sentiment tutorial of TRL 0.11 on `ppo_ext.trl`: a language model learns to continue texts in a friendly way.

    python examples/sentiment.py MODEL_FOLDER

MODEL_FOLDER holds any causal language model of transformers; `make demo` leaves one in ppo_ext_demo/base_model. The reward
is VADER's sentiment score (pip install vaderSentiment).
"""

import argparse

import torch
from transformers import AutoTokenizer
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ppo_ext.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from ppo_ext.trl.core import LengthSampler

PLACES = ("restaurant", "hotel", "museum", "cafe", "shop", "cinema", "library", "market")
OPENINGS = [
    f"The {part} of the {place} was" for place in PLACES for part in ("entrance", "floor", "service", "back room")
]


class Prompts(torch.utils.data.Dataset):
    def __init__(self, tokenizer, steps, batch_size):
        texts = [OPENINGS[i % len(OPENINGS)] for i in range(steps * batch_size)]
        self.samples = [{"query": text, "input_ids": torch.tensor(tokenizer.encode(text))} for text in texts]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def collator(samples):
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    config = PPOConfig(batch_size=32, mini_batch_size=16, ppo_epochs=2, learning_rate=2e-5, init_kl_coef=0.05, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLMWithValueHead.from_pretrained(options.model_folder, dtype=torch.float32)
    ref_model = create_reference_model(model)
    dataset = Prompts(tokenizer, options.steps, config.batch_size)
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
    analyzer = SentimentIntensityAnalyzer()
    # Plain sampling, so that the sampled distribution is the one whose log-probabilities PPO computes.
    generation_kwargs = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": tokenizer.pad_token_id}
    output_length_sampler = LengthSampler(12, 24)

    for step, batch in enumerate(ppo_trainer.dataloader):
        query_tensors = batch["input_ids"]
        response_tensors = ppo_trainer.generate(
            query_tensors, return_prompt=False, batch_size=32, length_sampler=output_length_sampler, **generation_kwargs
        )
        batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
        rewards = [torch.tensor(analyzer.polarity_scores(text)["compound"]) for text in batch["response"]]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        print(f"step {step:2d}  score {stats['ppo/mean_scores']:+.3f}  KL {stats['objective/kl']:6.3f}")
        print(f"         {batch['query'][0]}{batch['response'][0]!r}")


if __name__ == "__main__":
    main()
