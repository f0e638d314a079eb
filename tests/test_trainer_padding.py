"""Every kind of positions in `step` and `generate`: padding moves nothing, and only tables of positions have an end."""

import pytest
import test_limits
import tiny_models
import torch
import transformers
from architectures import tiny
from tiny_models import EOS, PAD, VOCAB

import ppo_ext

TOKENS = {"pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS, "vocab_size": VOCAB}
SIZES = {**test_limits.SIZES, **TOKENS, "max_position_embeddings": 48}
SEQ2SEQ = {**test_limits.SEQ2SEQ, **TOKENS, "max_position_embeddings": 48}


def bart_decoder():
    return transformers.BartForCausalLM(transformers.BartConfig(**SEQ2SEQ))


def roberta():
    return transformers.RobertaForCausalLM(transformers.RobertaConfig(**{**SIZES, "pad_token_id": 0}, is_decoder=True))


CAUSAL = {
    "GPT-2, learned": tiny_models.gpt2,
    "Llama, rotary": tiny_models.llama,
    "OPT, learned": lambda: test_limits.build("OPT", **SIZES, ffn_dim=24, word_embed_proj_dim=16),
    "BLOOM, alibi, no position_ids": lambda: test_limits.build("Bloom", **TOKENS, hidden_size=16, n_layer=1, n_head=2),
    "BART, learned, no position_ids": bart_decoder,
    "RecurrentGemma, a state": lambda: test_limits.build(
        "RecurrentGemma", **{**SIZES, "num_hidden_layers": 3}, num_key_value_heads=1, head_dim=8
    ),
}
ENCODER_DECODER = {
    "BART, learned": lambda: test_limits.build("Bart", **SEQ2SEQ),
    "Pegasus-X, computed": lambda: transformers.PegasusXForConditionalGeneration(
        transformers.PegasusXConfig(**SEQ2SEQ)
    ),
    "T5, relative": lambda: test_limits.build("T5", **SEQ2SEQ),
}
MODELS = {**CAUSAL, "RoBERTa, counting from 1": roberta, **ENCODER_DECODER}


def make_trainer(name, side, **arguments):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    head = (
        ppo_ext.AutoModelForSeq2SeqLMWithValueHead
        if name in ENCODER_DECODER
        else ppo_ext.AutoModelForCausalLMWithValueHead
    )
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=4)
    return ppo_ext.PPOTrainer(config, head.from_pretrained(model), None, tiny_models.tokenizer(side), **arguments)


def forward(trainer, queries, responses):
    """Log-probabilities and values of the tokens that count, one row after another."""
    inputs = trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, values, mask = trainer.batched_forward_pass(trainer.model, queries, responses, inputs)
    return torch.cat([logprobs[mask != 0], values[mask != 0]]), inputs


def mask_of_a_batch(trainer):
    queries, responses, _ = tiny_models.batch(4, 3)
    return forward(trainer, queries, responses)[1]["attention_mask"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_what_each_sample_gives_alone(name, side):
    trainer = make_trainer(name, side)
    queries, responses, _ = tiny_models.batch(4, 3, start_token=PAD if name in ENCODER_DECODER else None)
    together, inputs = forward(trainer, queries, responses)
    assert (inputs["attention_mask"] == 0).any()
    alone = [
        forward(trainer, [query], [response])[0].chunk(2) for query, response in zip(queries, responses, strict=True)
    ]
    torch.testing.assert_close(
        together, torch.cat([torch.cat(part) for part in zip(*alone, strict=True)]), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*CAUSAL, *ENCODER_DECODER])
def test_greedy_responses_of_a_batch_are_those_of_each_query_alone(name, side):
    trainer = make_trainer(name, side)
    queries, _, _ = tiny_models.batch(4, 3)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD, "return_prompt": False}
    together = trainer.generate(queries, batch_size=4, **options)
    for query, response in zip(queries, together, strict=True):
        assert torch.equal(trainer.generate(query, **options)[0], response)
    assert trainer.tokenizer.padding_side == side


def test_a_cache_that_forgets_what_is_padding_is_measured():
    """GIT's forward pass hides padding on the left, and its generation does not."""
    head = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(tiny.build("git", tiny.CAUSAL))
    config = ppo_ext.PPOConfig(batch_size=4, mini_batch_size=4)
    trainer = ppo_ext.PPOTrainer(config, head, None, tiny_models.tokenizer("left"))
    queries = [torch.arange(3, 3 + length) for length in (2, 5, 9, 5)]
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": PAD, "return_prompt": False}
    together = trainer.generate(queries, batch_size=4, **options)
    for query, response in zip(queries, together, strict=True):
        assert torch.equal(trainer.generate(query, **options)[0], response)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_reads_its_padding_is_refused(dtype):
    def trainer(batch_size):
        backbone = tiny.build("fsmt", tiny.SEQ2SEQ).to(dtype)
        model = ppo_ext.AutoModelForSeq2SeqLMWithValueHead.from_pretrained(backbone)
        config = ppo_ext.PPOConfig(batch_size=batch_size, mini_batch_size=batch_size)
        return ppo_ext.PPOTrainer(config, model, None, tiny_models.tokenizer())

    with pytest.raises(ValueError, match="model must give a padded sample the logits that it gives the sample alone"):
        trainer(4)
    assert trainer(1)


class BlindLlama(transformers.LlamaForCausalLM):
    """It attends to padding, which a causal model forgives on the right."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_reads_padding_on_the_left_is_padded_on_the_right(monkeypatch, dtype):
    monkeypatch.setitem(MODELS, "blind", lambda: BlindLlama(tiny_models.llama().config).to(dtype))
    trainer = make_trainer("blind", "left")
    mask = mask_of_a_batch(trainer)
    assert mask[:, 0].all() and not mask.all()


class RoundingLlama(transformers.LlamaForCausalLM):
    """It rounds each width in its own way, as libraries of matrix products may, and its small differences suffer."""

    def __init__(self, config):
        super().__init__(config)
        embedding = self.get_input_embeddings().weight.data
        embedding.copy_(1 + 0.02 * embedding / embedding.std())

    def forward(self, input_ids=None, **options):
        embedded = self.get_input_embeddings()(input_ids)
        lots = torch.Generator().manual_seed(input_ids.shape[1])
        signs = 2 * torch.randint(2, embedded.shape[1:], generator=lots) - 1
        eps = torch.finfo(embedded.dtype).eps
        return super().forward(inputs_embeds=embedded * (1 + signs.to(embedded) * eps), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_not_taken_for_padding_that_is_read(monkeypatch, dtype):
    monkeypatch.setitem(MODELS, "rounding", lambda: RoundingLlama(tiny_models.llama().config).to(dtype))
    trainer = make_trainer("rounding", "left")
    mask = mask_of_a_batch(trainer)
    assert mask[:, -1].all() and not mask.all()
    assert calls_of_generate(trainer) == [(4, 8)]


def calls_of_generate(trainer):
    """The shapes of the ids in its calls for queries of 3, 2, 3 and 4 tokens, after it has measured what it needs."""
    shapes = []
    model = trainer.model.pretrained_model
    queries = [torch.full((length,), 5) for length in (3, 2, 3, 4)]
    options = {"batch_size": 4, "max_new_tokens": 1, "pad_to_multiple_of": 8}
    trainer.generate(queries, **options)
    generate = model.generate
    model.generate = lambda **inputs: shapes.append(inputs["input_ids"].shape) or generate(**inputs)
    trainer.generate(queries, **options)
    return shapes


def test_queries_that_padding_would_move_are_generated_by_length():
    assert calls_of_generate(make_trainer("BART, learned, no position_ids", "left")) == [(2, 3), (1, 2), (1, 4)]


def left_collator(samples):
    return tiny_models.tokenizer("left").pad(samples, return_tensors="pt")


def test_a_collator_of_the_users_own_may_pad_on_the_left():
    """Whatever the tokenizer's side; only a model that takes no position_ids refuses it, before any weight has changed."""
    queries, responses, scores = tiny_models.batch(4, 3)
    own = make_trainer("GPT-2, learned", "right", training_data_collator=left_collator)
    expected, _ = forward(make_trainer("GPT-2, learned", "right"), queries, responses)
    torch.testing.assert_close(forward(own, queries, responses)[0], expected, atol=1e-4, rtol=1e-4)
    refused = make_trainer("BART, learned, no position_ids", "right", training_data_collator=left_collator)
    before = tiny_models.weights(refused)
    with pytest.raises(
        ValueError, match=r"training_data_collator must pad on the right for a model that cannot be told pos"
    ):
        refused.step(queries, responses, scores)
    tiny_models.assert_unmoved(before, refused)


def test_float64_is_padded_on_the_right():
    """In float64 BLOOM gives NaN behind padding."""
    trainer = make_trainer("BLOOM, alibi, no position_ids", "left")
    trainer.model.double()
    wide = ppo_ext.PPOTrainer(trainer.config, trainer.model, None, trainer.tokenizer)
    queries, responses, _ = tiny_models.batch(4, 3)
    result, inputs = forward(wide, queries, responses)
    assert inputs["attention_mask"][:, 0].all() and torch.isfinite(result).all()


ENDLESS = {
    "Llama, rotary": lambda: tiny_models.llama(max_position_embeddings=6),
    "Qwen2, YaRN": lambda: test_limits.build(
        "Qwen2", **{**SIZES, "max_position_embeddings": 6}, num_key_value_heads=1, rope_parameters=test_limits.YARN
    ),
    "BLOOM, alibi, no position_ids": MODELS["BLOOM, alibi, no position_ids"],
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_model_without_an_end_trains_on_what_it_generates(name, monkeypatch):
    monkeypatch.setitem(MODELS, name, ENDLESS[name])
    trainer = make_trainer(name, "left")
    queries, _, scores = tiny_models.batch(4, 3)
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "pad_token_id": PAD, "do_sample": True, "top_k": 0}
    responses = trainer.generate(queries, return_prompt=False, **options)
    before = tiny_models.weights(trainer)
    stats = trainer.step(queries, responses, scores)
    assert all(len(response) == 60 for response in responses) and abs(stats["objective/kl"]) < 1e-4
    assert any(not torch.equal(parameter, before[n]) for n, parameter in tiny_models.weights(trainer).items())


@pytest.mark.parametrize(
    "name, query, response, text",
    [
        (
            "OPT, learned",
            20,
            29,
            r"queries\[1\] and responses\[1\] must together fit the model's context of 48 tokens, got 20",
        ),
        ("RoBERTa, counting from 1", 20, 28, r"together fit the model's context of 47 tokens, got 20 \+ 28 = 48"),
        ("BART, learned", 49, 4, r"queries\[1\] must fit the model's context of 48 tokens, got 49"),
        ("BART, learned", 4, 49, r"responses\[1\] must fit the model's context of 48 tokens, got 49"),
    ],
)
def test_a_sample_beyond_a_table_is_refused(name, query, response, text):
    trainer = make_trainer(name, "right")
    queries, responses, scores = tiny_models.batch(4, 3, start_token=PAD if name in ENCODER_DECODER else None)
    queries[1], responses[1] = torch.full((query,), 5), torch.full((response,), 5)
    before = tiny_models.weights(trainer)
    with pytest.raises(ValueError, match=text):
        trainer.step(queries, responses, scores)
    tiny_models.assert_unmoved(before, trainer)


def test_an_encoder_decoder_generates_as_far_as_its_tables_go():
    trainer = make_trainer("BART, learned", "right")
    query, options = torch.full((48,), 5), {"pad_token_id": PAD}
    assert len(trainer.generate(query, max_new_tokens=47, min_new_tokens=47, **options)[0]) == 48
    with pytest.raises(ValueError, match=r"query_tensor and max_new_tokens .* 48 tokens, got 1 \+ 48 = 49"):
        trainer.generate(query, max_new_tokens=48, **options)
    with pytest.raises(ValueError, match="query_tensor must fit the model's context of 48 tokens, got 49"):
        trainer.generate(torch.full((49,), 5), max_new_tokens=2, **options)
