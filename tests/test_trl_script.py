"""Programs written for TRL 0.7 to 0.11: under ppo_ext.trl they run with only their imports changed, and compute the same."""

import contextlib
import importlib.util
import io
import json
import sys
import warnings

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from conftest import require_trl
from trl_programs import PROGRAMS

SCRIPT = """
import json

import torch
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model, set_seed
from trl.core import LengthSampler
from transformers import AutoTokenizer


class Prompts(torch.utils.data.Dataset):
    def __init__(self, tokenizer):
        words = [f"w{i}" for i in range(3, 27)]
        self.samples = []
        for start in range(0, 24, 2):
            query = " ".join(words[start : start + 2 + start % 3])
            self.samples.append({"input_ids": torch.tensor(tokenizer.encode(query)), "query": query})

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def collator(data):
    return {key: [d[key] for d in data] for key in data[0]}


config = PPOConfig(
    model_name=MODEL, task_name="script", reward_model="words", query_dataset="words", learning_rate=1e-3,
    batch_size=4, mini_batch_size=2, gradient_accumulation_steps=1, ppo_epochs=2, early_stopping=False, target_kl=0.1,
    kl_penalty="kl", seed=3, use_score_scaling=False, use_score_norm=False, score_clip=None,
    remove_unused_columns=False, optimize_cuda_cache=False,
    tracker_project_name="script", accelerator_kwargs={"cpu": True},
)
set_seed(config.seed)
tokenizer = AutoTokenizer.from_pretrained(config.model_name)
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
ref_model = create_reference_model(model)
optimizer = torch.optim.Adam(filter(lambda p: p.requires_grad, model.parameters()), lr=config.learning_rate)
ppo_trainer = PPOTrainer(
    config, model, ref_model, tokenizer, dataset=Prompts(tokenizer), data_collator=collator, optimizer=optimizer)
generation_kwargs = {
    "min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True, "pad_token_id": tokenizer.eos_token_id
}
output_length_sampler = LengthSampler(4, 8)
assert ppo_trainer.accelerator.num_processes == 1 and ppo_trainer.accelerator.is_main_process

for epoch, batch in enumerate(ppo_trainer.dataloader):
    query_tensors = batch["input_ids"]
    response_tensors, ref_response_tensors = ppo_trainer.generate(
        query_tensors, return_prompt=False, generate_ref_response=True, length_sampler=output_length_sampler,
        batch_size=2, **generation_kwargs)
    batch["response"] = tokenizer.batch_decode(response_tensors)
    batch["ref_response"] = ref_texts = tokenizer.batch_decode(ref_response_tensors)
    rewards = [torch.tensor(float(len(set(ids.tolist()))) - 3.0) for ids in response_tensors]
    stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
    ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["query", "response", "ref_response"])
    scalars = {key: value for key, value in stats.items() if isinstance(value, float) and not key.startswith("time/")}
    print(json.dumps({"texts": batch["response"] + ref_texts, "kl_coef": float(ppo_trainer.kl_ctl.value), **scalars}))

one = ppo_trainer.generate(query_tensors[0], max_new_tokens=5, **generation_kwargs)
print(json.dumps({"texts": tokenizer.batch_decode(one)}))
ppo_trainer.save_pretrained(SAVED)
reloaded = AutoModelForCausalLMWithValueHead.from_pretrained(SAVED)
print(json.dumps({"v_head": reloaded.v_head.summary.weight.sum().item()}))
"""


def printed(script, folder, saved):
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(script, "script.py", "exec"), {"MODEL": str(folder), "SAVED": str(saved), "__name__": "__main__"})
    return [json.loads(line) for line in output.getvalue().splitlines()]


def test_a_script_prints_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    require_trl()
    folder = tmp_path / "model"
    # TRL leaves the model in training mode after its first step and then samples with dropout; ppo_ext does not.
    tiny_models.build("gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    theirs = printed(SCRIPT, folder, tmp_path / "theirs")
    changed = SCRIPT.replace("from trl", "from ppo_ext.trl")
    assert changed.count("ppo_ext.trl") == 2
    ours = printed(changed, folder, tmp_path / "ours")
    assert len(theirs) == len(ours) == 5
    for their_line, our_line in zip(theirs, ours, strict=True):
        assert our_line.keys() == their_line.keys()
        for key, expected in their_line.items():
            same = expected if key == "texts" else pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert our_line[key] == same, key


def write_reward_adapter(folder, base):
    """An adapter of a reward model with a score for each of two labels, in the files that peft and TRL exchange."""
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False)).save_pretrained(
        folder
    )
    tensors = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    # TRL loads the adapter into a causal language model, whose score head is no part of it
    assert any("score" in name for name in tensors)


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_like_trls_examples(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    require_trl()
    program, architecture, options = PROGRAMS[name]
    model = tiny_models.build(architecture)
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)  # TRL samples with dropout after its first step, we do not
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    if "REWARD_ADAPTER" in program:
        torch.manual_seed(0)
        write_reward_adapter(tmp_path / "adapter", tmp_path / "model")
    kept = {}
    for root in ("trl", "ppo_ext.trl"):
        changed = program.replace("from trl", f"from {root}")
        if root == "ppo_ext.trl":  # accumulated minibatches are averaged as in TRL, not weighted by their tokens
            changed = changed.replace(
                "gradient_accumulation_steps=", "exact_update=False, gradient_accumulation_steps="
            )
        kept[root] = run_program(changed, tmp_path / "model", tmp_path / root, tmp_path / "adapter", options)
    assert len(kept["trl"]) == len(kept["ppo_ext.trl"]) >= 1
    for (their_stats, their_texts), (our_stats, our_texts) in zip(kept["trl"], kept["ppo_ext.trl"], strict=True):
        assert our_texts == their_texts and their_stats.keys() == our_stats.keys()
        for key, expected in their_stats.items():
            if expected == expected:  # what is undefined is NaN in TRL
                assert our_stats[key] == pytest.approx(expected, rel=1e-3, abs=1e-4), key


def run_program(program, model, saved, adapter, options):
    kept = []

    def report(stats, *texts):
        kept.append((scalars(stats), texts))

    given = {"MODEL": str(model), "SAVED": str(saved), "REWARD_ADAPTER": str(adapter), "OPTIONS": options}
    saved.mkdir()
    # a module from a file, as argument parsers read the annotations and the source of the classes in it
    path = saved / "program.py"
    path.write_text(program, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("program", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(given, report=report)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        patch.setitem(sys.modules, "program", module)
        warnings.simplefilter("ignore")
        spec.loader.exec_module(module)
    return kept


def scalars(stats):
    return {key: float(x) for key, x in stats.items() if isinstance(x, float) and not key.startswith("time/")}
