"""PPO on a LoRA policy: only the adapter is trained, and the reference is the same model with the adapter off.

    python examples/lora.py MODEL_FOLDER ADAPTER_FOLDER

MODEL_FOLDER holds any causal language model of transformers; `make demo` leaves one in ppo_ext_demo/base_model. The trained
adapter and the value head are written to ADAPTER_FOLDER. The reward is the share of words that begin with a capital letter.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from ppo_ext import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

PROMPTS = ["The city on the river", "In the first week of March,", "My neighbour told me that", "We walked along"]


def reward(text):
    words = text.split()
    return sum(word[0].isupper() for word in words) / max(len(words), 1)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("adapter_folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model_folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        options.model_folder, dtype=torch.float32, peft_config=adapter
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained} of {sum(p.numel() for p in model.parameters())} parameters are trained")

    # No second model in memory: without ref_model, the trainer switches the adapter off for the reference.
    config = PPOConfig(batch_size=16, mini_batch_size=8, ppo_epochs=2, learning_rate=5e-4, init_kl_coef=0.05)
    trainer = PPOTrainer(config, model, tokenizer=tokenizer)
    prompts = PROMPTS * (config.batch_size // len(PROMPTS))
    queries = [torch.tensor(ids) for ids in tokenizer(prompts)["input_ids"]]
    sampling = {
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": 16,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for step in range(options.steps):
        responses = trainer.generate(queries, batch_size=16, return_prompt=False, **sampling)
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        stats = trainer.step(queries, responses, [torch.tensor(reward(text)) for text in texts])
        print(f"step {step:2d}  score {stats['ppo/mean_scores']:.3f}  KL {stats['objective/kl']:6.3f}")

    trainer.save_pretrained(options.adapter_folder)
    # It comes back by the folder's name: adapter_config.json knows where the base model is.
    AutoModelForCausalLMWithValueHead.from_pretrained(options.adapter_folder)
    print(f"adapter and value head: {options.adapter_folder}")


if __name__ == "__main__":
    main()
