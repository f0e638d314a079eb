"""A PPO script in the form of TRL 0.11, with `ppo_ext.trl` in its imports. No download, a few seconds on a CPU.

The policy is a small random GPT-2 over 32 words that this script makes; your own comes by `from_pretrained("path/or/name")`.
The reward of a response is the share of its words that are "good".
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ppo_ext.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from ppo_ext.trl.core import LengthSampler

WORDS = ["<pad>", "<eos>", "<unk>", "good", *(f"word{i}" for i in range(28))]


def build_tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


class Prompts(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        texts = [" ".join(WORDS[4 + i : 4 + i + length]) for i in range(24) for length in range(1, 5)] * 6
        self.samples = [{"query": text, "input_ids": torch.tensor(tokenizer.encode(text))} for text in texts]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def collator(samples):
    return {key: [sample[key] for sample in samples] for key in samples[0]}


def main():
    config = PPOConfig(batch_size=32, mini_batch_size=16, ppo_epochs=4, learning_rate=3e-3, init_kl_coef=0.02, seed=0)
    set_seed(config.seed)
    tokenizer = build_tokenizer()
    sizes = {"vocab_size": len(WORDS), "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    model = AutoModelForCausalLMWithValueHead.from_pretrained(GPT2LMHeadModel(GPT2Config(**sizes, **tokens)))
    ref_model = create_reference_model(model)
    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=Prompts(tokenizer), data_collator=collator)
    generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True}
    generation_kwargs["pad_token_id"] = tokenizer.pad_token_id
    output_length_sampler = LengthSampler(4, 9)

    for step, batch in enumerate(ppo_trainer.dataloader):
        query_tensors = batch["input_ids"]
        response_tensors = ppo_trainer.generate(
            query_tensors, return_prompt=False, length_sampler=output_length_sampler, batch_size=16, **generation_kwargs
        )
        batch["response"] = tokenizer.batch_decode(response_tensors)
        rewards = [torch.tensor(text.split().count("good") / len(text.split())) for text in batch["response"]]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        print(f"step {step:2d}  score {stats['ppo/mean_scores']:.3f}  KL {stats['objective/kl']:6.3f}")


if __name__ == "__main__":
    main()
