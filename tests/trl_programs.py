"""Small programs with the calls of TRL's own examples, run once on trl and once on ppo_ext.trl by `test_trl_script.py`.

Each is text, as only its imports change. MODEL is a folder with a tiny model and tokenizer, SAVED a folder to write to,
REWARD_ADAPTER one with an adapter that has a score head; `report(stats, *texts)` keeps what is compared.
"""

_DATASET = """
from datasets import Dataset

def build_dataset(tokenizer, rows=8):
    ds = Dataset.from_dict({"review": [" ".join(f"w{3 + (i * k) % 40}" for k in range(1, 4 + i % 3)) for i in range(rows)]})

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    ds = ds.map(tokenize, batched=False)
    ds.set_format(type="torch")
    return ds

def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}
"""

# the quickstart of 0.7
HELLO_WORLD = """
import torch
from transformers import AutoTokenizer
from trl import PPOTrainer, PPOConfig, AutoModelForCausalLMWithValueHead, create_reference_model, set_seed
from trl.core import respond_to_batch

set_seed(0)
model = AutoModelForCausalLMWithValueHead.from_pretrained(MODEL)
model_ref = create_reference_model(model)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
tokenizer.pad_token = tokenizer.eos_token
ppo_config = {"batch_size": 1, "mini_batch_size": 1}
config = PPOConfig(**ppo_config)
ppo_trainer = PPOTrainer(config, model, model_ref, tokenizer)
query_tensor = tokenizer.encode("w5 w6 w7", return_tensors="pt")
response_tensor = respond_to_batch(model, query_tensor, txt_len=6)
reward = [torch.tensor(1.0)]
report(ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward), tokenizer.decode(response_tensor[0]))
"""

# examples/scripts/ppo.py of 0.8 to 0.10: settings from the command line, with and without an adapter, seq2seq or not
PPO = (
    _DATASET
    + """
from dataclasses import dataclass, field
from typing import Optional

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, HfArgumentParser
from trl import (AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, set_seed)
from trl.core import LengthSampler

@dataclass
class ScriptArguments:
    use_seq2seq: bool = field(default=False, metadata={"help": "whether to use seq2seq"})
    use_peft: bool = field(default=False)
    lora_alpha: Optional[float] = field(default=16)
    lora_r: Optional[int] = field(default=4)

parser = HfArgumentParser((ScriptArguments, PPOConfig))
args, ppo_config = parser.parse_args_into_dataclasses(
    ["--model_name", MODEL, "--batch_size", "4", "--mini_batch_size", "2", "--learning_rate", "1e-3", "--seed", "3",
     "--early_stopping", "--ppo_epochs", "2", *OPTIONS])
trl_model_class = AutoModelForSeq2SeqLMWithValueHead if args.use_seq2seq else AutoModelForCausalLMWithValueHead
tokenizer = AutoTokenizer.from_pretrained(ppo_config.model_name)
dataset = build_dataset(tokenizer)
set_seed(ppo_config.seed)
if not args.use_peft:
    ref_model = trl_model_class.from_pretrained(ppo_config.model_name, trust_remote_code=True)
    peft_config, device_map = None, None
else:
    peft_config = LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, bias="none", task_type="CAUSAL_LM")
    ref_model, device_map = None, {"": "cpu"}
model = trl_model_class.from_pretrained(
    ppo_config.model_name, trust_remote_code=True, device_map=device_map, peft_config=peft_config)
ppo_trainer = PPOTrainer(ppo_config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
device = ppo_trainer.accelerator.device
assert ppo_trainer.accelerator.num_processes == 1 and ppo_trainer.accelerator.state.deepspeed_plugin is None
generation_kwargs = {"min_new_tokens": 4, "max_new_tokens": 7, "top_k": 0, "top_p": 1.0, "do_sample": True,
                     "pad_token_id": tokenizer.pad_token_id}
for batch in ppo_trainer.dataloader:
    query_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(query_tensors, return_prompt=False, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors)
    rewards = [torch.tensor(float(len(set(ids.tolist())))) for ids in response_tensors]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response"])
    report(stats, batch["response"])
ppo_trainer._save_pretrained(SAVED)
"""
)

# examples/scripts/ppo_multi_adapter.py: policy, reference and reward model in one backbone. It accumulates gradients, this
# does not: TRL ends an accumulation early in the last batch of a dataloader
MULTI_ADAPTER = (
    _DATASET
    + """
import torch
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

set_seed(1)
lora_config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(
    MODEL, device_map={"": "cpu"}, peft_config=lora_config, reward_adapter=REWARD_ADAPTER)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
config = PPOConfig(model_name=MODEL, log_with=None, learning_rate=1e-3, batch_size=4, mini_batch_size=2,
    gradient_accumulation_steps=1, optimize_cuda_cache=True, seed=1)
ppo_trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer, dataset=build_dataset(tokenizer, 4),
    data_collator=collator)
sampler = LengthSampler(5, 6)
for batch in ppo_trainer.dataloader:
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(question_tensors, return_prompt=False, length_sampler=sampler,
        do_sample=True, top_k=0.0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    texts = [q + r for q, r in zip(batch["query"], batch["response"])]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt", return_token_type_ids=False)
    raw_rewards = ppo_trainer.accelerator.unwrap_model(ppo_trainer.model).compute_reward_score(**inputs)
    rewards = [raw_rewards[i, -1, 1] for i in range(len(raw_rewards))]
    report(ppo_trainer.step(question_tensors, response_tensors, rewards), batch["response"])
"""
)

# examples/research_projects/stack_llama/scripts/rl_training.py
STACK_LLAMA = (
    _DATASET
    + """
import torch
from accelerate import Accelerator
from peft import LoraConfig
from transformers import Adafactor, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

config = PPOConfig(steps=2, model_name=MODEL, learning_rate=1e-3, log_with=None, batch_size=4, mini_batch_size=1,
    gradient_accumulation_steps=4, optimize_cuda_cache=True, early_stopping=False, target_kl=0.1, ppo_epochs=4, seed=0,
    init_kl_coef=0.2, adap_kl_ctrl=False)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(MODEL)
if getattr(tokenizer, "pad_token", None) is None:
    tokenizer.pad_token = tokenizer.eos_token
current_device = Accelerator().local_process_index
lora_config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name, device_map={"": "cpu"}, peft_config=lora_config)
optimizer = Adafactor(filter(lambda p: p.requires_grad, model.parameters()), scale_parameter=False, relative_step=False,
    warmup_init=False, lr=config.learning_rate)
ppo_trainer = PPOTrainer(config, model, ref_model=None, tokenizer=tokenizer, dataset=build_dataset(tokenizer),
    data_collator=collator, optimizer=optimizer)
generation_kwargs = {"top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
output_length_sampler = LengthSampler(4, 7)
for epoch, batch in enumerate(ppo_trainer.dataloader):
    if epoch >= config.total_ppo_epochs:
        break
    question_tensors = batch["input_ids"]
    response_tensors = ppo_trainer.generate(question_tensors, return_prompt=False,
        length_sampler=output_length_sampler, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors, skip_special_tokens=True)
    rewards = [torch.tensor(len(text) / 10 - 1.0) for text in batch["response"]]
    stats = ppo_trainer.step(question_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    report(stats, batch["response"])
    ppo_trainer.save_pretrained(SAVED + f"/step_{epoch}")
"""
)

# examples/research_projects/toxicity/scripts/gpt-j-6b-toxicity.py: shared layers, one query at a time
TOXICITY = (
    _DATASET
    + """
import torch
from torch.optim import Adam
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler

config = PPOConfig(model_name=MODEL, learning_rate=1e-3, log_with=None, ppo_epochs=2, mini_batch_size=4, batch_size=4,
    gradient_accumulation_steps=1)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
set_seed(config.seed)
model = AutoModelForCausalLM.from_pretrained(config.model_name, torch_dtype=torch.float32)
model = AutoModelForCausalLMWithValueHead.from_pretrained(model)
ref_model = create_reference_model(model, num_shared_layers=1)
optimizer = Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=config.learning_rate)
ppo_trainer = PPOTrainer(config, model, ref_model=ref_model, tokenizer=tokenizer, dataset=build_dataset(tokenizer),
    data_collator=collator, optimizer=optimizer)
generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.pad_token_id}
output_length_sampler = LengthSampler(4, 7)
for epoch, batch in enumerate(ppo_trainer.dataloader):
    query_tensors, response_tensors = batch["input_ids"], []
    for query in query_tensors:
        gen_len = output_length_sampler()
        generation_kwargs["max_new_tokens"] = gen_len
        response = ppo_trainer.generate(query, **generation_kwargs)
        response_tensors.append(response.squeeze()[-gen_len:])
    batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
    rewards = [torch.tensor(float("w5" in text)) for text in batch["response"]]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards)
    report(stats, batch["response"])
if ppo_trainer.accelerator.is_main_process:
    ppo_trainer.save_pretrained(SAVED)
"""
)

# examples/scripts/sentiment_tuning.py of 0.7: settings by tyro
SENTIMENT_TUNING = (
    _DATASET
    + """
from dataclasses import dataclass, field
from typing import Optional

import torch
import tyro
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, set_seed
from trl.core import LengthSampler

@dataclass
class ScriptArguments:
    ppo_config: PPOConfig = field(
        default_factory=lambda: PPOConfig(model_name=MODEL, query_dataset="imdb", reward_model="sentiment",
            learning_rate=1.41e-5, log_with=None, mini_batch_size=4, batch_size=4, gradient_accumulation_steps=1,
            early_stopping=False, target_kl=6.0, kl_penalty="kl", seed=0, use_score_scaling=False, use_score_norm=False,
            score_clip=None))
    use_seq2seq: bool = False
    use_peft: bool = False
    peft_config: Optional[LoraConfig] = field(
        default_factory=lambda: LoraConfig(r=16, lora_alpha=16, bias="none", task_type="CAUSAL_LM"))

args = tyro.cli(ScriptArguments, args=["--ppo-config.learning-rate", "1e-3", "--ppo-config.score-clip", "0.5"])
assert args.ppo_config.learning_rate == 1e-3 and args.ppo_config.score_clip == 0.5
set_seed(args.ppo_config.seed)
model = AutoModelForCausalLMWithValueHead.from_pretrained(args.ppo_config.model_name)
ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(args.ppo_config.model_name)
tokenizer = AutoTokenizer.from_pretrained(args.ppo_config.model_name)
tokenizer.pad_token_id = tokenizer.eos_token_id
ppo_trainer = PPOTrainer(args.ppo_config, model, ref_model, tokenizer, dataset=build_dataset(tokenizer),
    data_collator=collator)
for batch in ppo_trainer.dataloader:
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(query_tensors, return_prompt=False,
        generate_ref_response=True, min_length=-1, top_k=0.0, top_p=1.0, do_sample=True, max_new_tokens=5,
        pad_token_id=tokenizer.eos_token_id)
    batch["response"] = tokenizer.batch_decode(response_tensors)
    batch["ref_response"] = tokenizer.batch_decode(ref_response_tensors)
    rewards = [torch.tensor(float(len(text))) for text in batch["response"]]
    batch["ref_rewards"] = [torch.tensor(float(len(text))) for text in batch["ref_response"]]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response", "ref_rewards"])
    report(stats, batch["response"], batch["ref_response"])
"""
)

# name -> (program, architecture, options for its command line)
PROGRAMS = {
    "hello_world": (HELLO_WORLD, "gpt2", []),
    "ppo": (PPO, "gpt2", []),
    "ppo_peft": (PPO, "llama", ["--use_peft"]),
    "ppo_seq2seq": (PPO, "t5", ["--use_seq2seq"]),
    "multi_adapter": (MULTI_ADAPTER, "llama", []),
    "stack_llama": (STACK_LLAMA, "llama", []),
    "toxicity": (TOXICITY, "gpt2", []),
    "sentiment_tuning": (SENTIMENT_TUNING, "gpt2", []),
}
