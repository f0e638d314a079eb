"""Tiny random language models, a tokenizer without a file, and batches of ids, for the trainer's tests."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCAB = 48
PAD, EOS = 0, 1


def tokenizer(padding_side="right"):
    vocab = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2, **{f"w{i}": i for i in range(3, VOCAB)}}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side=padding_side
    )


def gpt2(**changes):
    sizes = {"vocab_size": VOCAB, "n_positions": 48, "n_embd": 24, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(
        GPT2Config(**{**sizes, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, **changes})
    )


def llama(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 48,
    }
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": PAD, **changes})
    )


def gpt_neox():
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=48,
            bos_token_id=EOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=24,
            d_kv=12,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=PAD,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


BUILDERS = {"gpt2": gpt2, "llama": llama, "gpt_neox": gpt_neox, "t5": t5}


def build(name, seed=0, scale=4.0, **changes):
    torch.manual_seed(seed)
    model = BUILDERS[name](**changes).eval()
    # the default initialisation is close to uniform; larger weights make log-probabilities worth comparing
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(scale)
    return model


def batch(size, seed, *, first_token=3, start_token=None, equal_lengths=False):
    """(queries, responses, scores) of random ids; an encoder-decoder response begins with start_token."""
    generator = torch.Generator().manual_seed(seed)

    def integer(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    def ids(length):
        return torch.randint(first_token, VOCAB, (length,), generator=generator)

    queries, responses = [], []
    for _ in range(size):
        query, response = (4, 6) if equal_lengths else (integer(2, 8), integer(3, 9))
        queries.append(ids(query))
        start = [] if start_token is None else [torch.tensor([start_token])]
        responses.append(torch.cat([*start, ids(response)]))
    scores = list(torch.randn(size, generator=generator).unbind())
    return queries, responses, scores


def trainer(
    name="gpt2",
    *,
    padding_side="right",
    peft_config=None,
    changes=None,
    kind=None,
    optimizer=None,
    critic_model=None,
    **config,
):
    """A PPOTrainer (or a subclass, `kind`) on a tiny model, for batches of 4."""
    import ppo_ext

    base = build(name, **(changes or {}))
    torch.manual_seed(7)
    wrapper = ppo_ext.AutoModelForSeq2SeqLMWithValueHead if name == "t5" else ppo_ext.AutoModelForCausalLMWithValueHead
    model = wrapper.from_pretrained(base, **({"peft_config": peft_config} if peft_config else {}))
    defaults = {"batch_size": 4, "mini_batch_size": 2, "ppo_epochs": 2, "learning_rate": 1e-3}
    return (kind or ppo_ext.PPOTrainer)(
        ppo_ext.PPOConfig(**{**defaults, **config}),
        model,
        None,
        tokenizer(padding_side),
        optimizer=optimizer and optimizer(model.parameters()),
        **({} if critic_model is None else {"critic_model": critic_model}),
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def steps(trainer, count=1, **options):
    """The statistics of some steps on batches of random ids."""
    return [trainer.step(*batch(trainer.config.batch_size, 20 + i, **options)) for i in range(count)]


def scalars(stats):
    return {key: value for key, value in stats.items() if isinstance(value, float) and not key.startswith("time/")}


def assert_unmoved(before, trainer):
    for name, parameter in weights(trainer).items():
        assert torch.equal(parameter, before[name]), name


def spy_on_updates(trainer):
    """The gradient's norm at every optimizer update."""
    norms, step = [], trainer.optimizer.step

    def counted(*args, **kwargs):
        if trainer.accelerator.sync_gradients:
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            norms.append(torch.stack([grad.norm() for grad in grads]).norm().item())
        return step(*args, **kwargs)

    trainer.optimizer.step = counted
    return norms
