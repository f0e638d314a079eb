"""PPOTrainer.generate: dropout, end-of-sequence tokens, and the reference of a LoRA policy."""

import string

import pytest
import tiny_models
import tokenizers
import torch
import transformers
from tiny_models import EOS, PAD, steps
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList


def test_generation_runs_without_dropout():
    trainer = tiny_models.trainer(changes={"attn_pdrop": 0.5, "resid_pdrop": 0.5})
    trainer.model.train()
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    first, second = (trainer.generate(queries, batch_size=4, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.model.training, "the mode the user had set comes back"
    steps(trainer)
    assert not trainer.model.training


def test_end_of_sequence_in_the_query_cuts_nothing():
    trainer = tiny_models.trainer()
    query = torch.tensor([5, tiny_models.EOS, 6, 7])
    (whole,) = trainer.generate([query], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(whole[:4], query) and len(whole) == 7


class Forced(transformers.LogitsProcessor):
    """Makes `generate` write given tokens: scripts[row][t], and the last one for ever."""

    def __init__(self, scripts, width):
        self.scripts, self.width = scripts, width

    def __call__(self, input_ids, scores):
        t = input_ids.shape[1] - self.width
        forced = torch.full_like(scores, -float("inf"))
        for i, row in enumerate(forced):
            script = self.scripts[i * len(self.scripts) // len(forced)]
            row[script[min(t, len(script) - 1)]] = 0.0
        return forced


QUERIES = [torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])]


def forced(trainer, *scripts, queries=QUERIES, start=None, **options):
    """Responses to QUERIES that hold these tokens until something stops them."""
    processor = Forced(scripts, start or len(queries[0]))
    defaults = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": PAD, "return_prompt": False}
    responses = trainer.generate(queries, logits_processor=[processor], **{**defaults, **options})
    return [response.tolist() for response in responses]


LONG = [13, 12, 13, 14, 15, 16, 17, 18, 19]


def letters():
    """A tokenizer whose tokens 3, 4, 5, ... are single letters: id 5 is "c"."""
    vocab = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {
        letter: i + 3 for i, letter in enumerate(string.ascii_letters[:45])
    }
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    raw.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


class AtToken(transformers.StoppingCriteria):
    """Stops a row after a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def _config(model, **fields):
    for name, value in fields.items():
        setattr(model.generation_config, name, value)


STOPS = {
    "ids of the generation config": ({"eos_token_id": [EOS, 5]}, {}),
    "ids in a keyword": ({}, {"eos_token_id": [EOS, 5]}),
    "one id in a keyword": ({}, {"eos_token_id": 5}),
    "a tensor of ids": ({}, {"eos_token_id": torch.tensor([EOS, 5])}),
    "a generation config": (
        {},
        {"generation_config": transformers.GenerationConfig(eos_token_id=[5], max_new_tokens=9)},
    ),
    "a stop string": ({}, {"stop_strings": ["jc"]}),
    "a stop string of the generation config": ({"stop_strings": "ijc"}, {}),
    "a criterion": ({}, {"stopping_criteria": [AtToken(5)]}),
    "a criterion of transformers": ({}, {"stopping_criteria": [EosTokenCriteria(eos_token_id=5)]}),
    "two criteria": ({}, {"stopping_criteria": StoppingCriteriaList([AtToken(7), AtToken(5)])}),
    "sequences in a dict": ({}, {"eos_token_id": 5, "return_dict_in_generate": True}),
}


@pytest.mark.parametrize("pad", [PAD, EOS, 5], ids=["own pad", "pad is an end", "pad is this end"])
@pytest.mark.parametrize("case", STOPS)
def test_a_row_ends_where_it_was_stopped(case, pad):
    fields, options = STOPS[case]
    trainer = tiny_models.trainer()
    trainer.tokenizer = letters()
    _config(trainer.model.pretrained_model, **fields)
    assert forced(trainer, [11, 12, 5], LONG, pad_token_id=pad, **options) == [[11, 12, 5], LONG]
    kept = forced(trainer, [11, 12, 5], LONG, pad_token_id=pad, remove_padding=False, **options)
    assert kept == [[11, 12, 5] + 6 * [pad], LONG]


def test_reference_responses_of_a_lora_policy_come_without_the_adapter():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = tiny_models.trainer("llama", peft_config=config)
    queries, _, _ = tiny_models.batch(4, 1)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "batch_size": 4}
    policy, reference = trainer.generate(queries, generate_ref_response=True, **options)
    assert any(not torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    with trainer.model.pretrained_model.disable_adapter():
        without = trainer.generate(queries, **options)
    assert all(torch.equal(a, b) for a, b in zip(reference, without, strict=True))
