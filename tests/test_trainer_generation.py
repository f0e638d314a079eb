"""PPOTrainer.generate: where a row ends, what it refuses, padding, dropout, and the reference of a LoRA policy."""

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


def test_the_first_of_several_reasons_ends_a_row():
    trainer = tiny_models.trainer()
    options = {"eos_token_id": [EOS, 6], "stopping_criteria": [AtToken(5), AtToken(7)], "pad_token_id": 6}
    rows = [[11, 7, 12, 6], [11, 6, 5], [5], LONG, [11, EOS, EOS, 7], [6, 6]]
    expected = [[11, 7], [11, 6], [5], LONG, [11, EOS], [6]]
    assert forced(trainer, *rows, queries=[QUERIES[0]] * 6, batch_size=6, **options) == expected
    assert forced(trainer, *rows, queries=[QUERIES[0]] * 6, batch_size=6, num_beams=2, **options) == expected


def test_padding_that_the_policy_wrote_is_kept():
    """Before its end a row may hold the padding's id, and a row that nothing stopped may end in it."""
    trainer = tiny_models.trainer()
    rows = [[11, PAD, 12, 5], [11, PAD, PAD, PAD]]
    assert forced(trainer, *rows, stopping_criteria=[AtToken(5)]) == [[11, PAD, 12, 5], [11] + 8 * [PAD]]


def test_an_end_id_that_generate_does_not_know_ends_a_row_too():
    """TRL's scripts pass eos_token_id=-1, and its trainer cuts after the tokenizer's id all the same."""
    assert forced(tiny_models.trainer(), [11, EOS, 12], LONG, eos_token_id=-1) == [[11, EOS], LONG]


def test_responses_to_one_query_follow_one_another():
    trainer = tiny_models.trainer()
    queries = [torch.tensor(ids) for ids in ([5], [6, 7], [8, 9, 10])]
    options = {"max_new_tokens": 6, "pad_token_id": PAD, "do_sample": True, "num_return_sequences": 3, "batch_size": 2}
    rows = trainer.generate(queries, **options)
    assert len(rows) == 9
    for i, row in enumerate(rows):
        query = queries[i // 3]
        assert torch.equal(row[: len(query)], query)
        assert len(row) == len(query) + 6 or row[-1] == EOS


def test_end_ids_of_an_encoder_decoder():
    trainer = tiny_models.trainer("t5")
    _config(trainer.model.pretrained_model, eos_token_id=[EOS, 5])
    assert forced(trainer, [10, 11, 5], LONG, start=1) == [[PAD, 10, 11, 5], [PAD, *LONG]]
    stopped = forced(trainer, [10, 7, 5], LONG, start=1, stopping_criteria=[AtToken(7)])
    assert stopped == [[PAD, 10, 7], [PAD, *LONG]]


@pytest.mark.parametrize("queries", [tuple(QUERIES), [ids.int() for ids in QUERIES]], ids=["tuple", "int32"])
def test_other_forms_of_queries(queries):
    assert forced(tiny_models.trainer(), LONG, LONG, queries=queries) == [LONG, LONG]


def test_no_queries_give_no_responses():
    assert tiny_models.trainer().generate([]) == []


ONE = torch.tensor([5, 6])
BAD = {
    "a row of a batch": (torch.ones(1, 2, dtype=torch.int64), {}, ValueError,
                         "query_tensor must be a 1-D tensor or a list of 1-D tensors, got shape [1, 2]"),
    "text": ("w5 w6", {}, TypeError, "query_tensor must be a 1-D tensor or a list of 1-D tensors, got str"),
    "a list of ids": ([5, 6], {}, TypeError, "query_tensor[0] must be a 1-D tensor of token ids, got int"),
    "lists of ids": ([[5, 6]], {}, TypeError, "query_tensor[0] must be a 1-D tensor of token ids, got list"),
    "rows of batches": ([ONE, ONE[None]], {}, ValueError,
                        "query_tensor[1] must be a 1-D tensor of token ids, got shape [1, 2]"),
    "an empty query": ([ONE, ONE[:0]], {}, ValueError, "query_tensor[1] must hold at least one token, got 0"),
    "an empty tensor": (ONE[:0], {}, ValueError, "query_tensor[0] must hold at least one token, got 0"),
    "floats": ([ONE.float()], {}, TypeError, "query_tensor[0] must hold integer token ids, got torch.float32"),
    "an id beyond the vocabulary": ([ONE, ONE + 42], {}, ValueError,
                                    "query_tensor[1][1] must lie in the vocabulary [0, 48), got 48"),
    "a negative id": (-ONE, {}, ValueError, "query_tensor[0][0] must lie in the vocabulary [0, 48), got -5"),
    "no batch": ([ONE], {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "a negative batch": ([ONE], {"batch_size": -4}, ValueError, "batch_size must be at least 1, got -4"),
    "half a batch": ([ONE], {"batch_size": 0.5}, TypeError, "batch_size must be an int, got float"),
    "several responses to one": (ONE, {"num_return_sequences": 2}, ValueError,
                                 "num_return_sequences must be 1 for one query (for a list of queries it gives a list of "
                                 "responses), got 2"),
    "a mask": ([ONE], {"attention_mask": ONE}, TypeError,
               "attention_mask must be left out, since it is made of query_tensor, got Tensor"),
    "ids twice": (ONE, {"input_ids": ONE[None]}, TypeError,
                  "input_ids must be left out, since it is made of query_tensor, got Tensor"),
    "too many new tokens": ([ONE], {"max_new_tokens": 47}, ValueError,
                            "query_tensor and max_new_tokens must together fit the model's context of 48 tokens, got "
                            "2 + 47 = 49"),
    "too long": (ONE, {"max_length": 49}, ValueError,
                 "query_tensor and max_new_tokens must together fit the model's context of 48 tokens, got 2 + 47 = 49"),
    "too long a sample": ([ONE], {"length_sampler": lambda: 60}, ValueError,
                          "query_tensor and max_new_tokens must together fit the model's context of 48 tokens, got "
                          "2 + 60 = 62"),
    "too long a query": ([torch.full((49,), 5)], {}, ValueError,
                         "query_tensor and max_new_tokens must together fit the model's context of 48 tokens, got "
                         "49 + 0 = 49"),
}  # fmt: skip


@pytest.fixture(scope="module")
def shared():
    return tiny_models.trainer()


@pytest.mark.parametrize("case", BAD)
def test_rejects(shared, case):
    queries, options, kind, text = BAD[case]
    with pytest.raises(kind) as error:
        shared.generate(queries, **{"pad_token_id": PAD, **options})
    assert str(error.value) == f"PPOTrainer.generate: {text}"


def test_a_query_may_fill_the_context_with_its_new_tokens(shared):
    rows = shared.generate([ONE, ONE + 2], max_new_tokens=46, min_new_tokens=46, pad_token_id=PAD)
    assert [len(row) for row in rows] == [48, 48]


def test_a_padding_id_beyond_the_vocabulary_is_refused(shared, monkeypatch):
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    monkeypatch.setattr(shared, "tokenizer", tokenizer)
    text = r": tokenizer.pad_token_id must lie in the vocabulary \[0, 48\), got 48; call resize_token_embeddings"
    with pytest.raises(ValueError, match="PPOTrainer.generate" + text):
        shared.generate([ONE, ONE])
    with pytest.raises(ValueError, match="PPOTrainer.step" + text):
        shared.step(*tiny_models.batch(4, 1))
    assert shared.generate(ONE, max_new_tokens=2).shape[0] == 1


def test_padding_in_a_query_counts_as_in_step_and_is_warned_of():
    """For one query and for a list alike; without a mask `generate` would leave it out for one query alone."""
    query = torch.tensor([PAD, PAD, 7, 8])
    trainer = tiny_models.trainer()
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": PAD}
    with pytest.warns(
        UserWarning, match=r"PPOTrainer.generate: 2 tokens at the ends of queries and 0 at the ends of resp"
    ):
        (listed,) = trainer.generate([query], **options)
    one = trainer.generate(query, **options)[0]
    assert torch.equal(one, listed)
    logits = trainer.model(listed[None])[0][0]
    assert torch.equal(logits[3:-1].argmax(-1)[-3:], listed[-3:]), "it attends to every id, as step does"
    masked = trainer.generate(query, attention_mask=(query != PAD).long()[None], **options)[0]
    assert not torch.equal(masked, one), "a mask of the user's own is taken"


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
