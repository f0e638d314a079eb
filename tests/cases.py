"""Inputs of the ops, shared by the tests and the benchmarks, so that every input that is timed is also tested."""

import torch

GPT2, LLAMA, QWEN = 50257, 128256, 151936  # vocabularies; the first is odd, so its rows are not aligned
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# One entry; sizes below, at and above the kernels' vectors and blocks; each remainder of V % 8; aligned rows that a
# block reads in several whole batches of loads, with and without a part of one.
VOCABULARIES = (1, 2, 7, 15, 16, 17, 33, 250, 1000, 1023, 1024, 1025, 3200, 4099, 6400, GPT2)
TOKEN_SHAPES = ((0, 3), (3, 0), (1, 1), (2, 3), (5, 33), (8, 1), (9, 257), (64, 1025))


def logits_inputs(shape, dtype, device="cpu"):
    """logits [..., V], ref_logits [..., V], labels [...], mask [...] and the incoming gradients of two outputs [...].
    In every second row the logit of the label is much larger than the rest, as in the rows of a trained model."""
    *rows, vocabulary = shape
    logits = torch.randn(shape, device=device).mul_(2.0)
    labels = torch.randint(vocabulary, rows, device=device)
    peak = torch.where(torch.arange(labels.numel(), device=device).reshape(rows) % 2 == 0, 12.0, 0.0)
    logits.scatter_add_(-1, labels[..., None], peak[..., None])
    ref_logits = (logits + 0.3 * torch.randn_like(logits)).to(dtype)
    return {
        "logits": logits.to(dtype),
        "ref_logits": ref_logits,
        "labels": labels,
        "mask": torch.rand(rows, device=device) > 0.3,
        "grad_logprobs": torch.randn(rows, device=device),
        "grad_entropy": torch.randn(rows, device=device),
    }


def block_mask(shape, device="cpu"):
    """A mask [B, T] int64 that is one block of counted tokens in each row, as of responses of different lengths."""
    sequences, tokens = shape
    start = torch.randint(tokens // 4 + 1, (sequences, 1), device=device)
    end = tokens - torch.randint(tokens // 4 + 1, (sequences, 1), device=device)
    position = torch.arange(tokens, device=device)
    return ((position >= start) & (position < end)).long()


def token_inputs(shape, device="cpu", dtype=torch.float32):
    """The tensors of a PPO step: [B, T] for each token, and scores [B]."""

    def normal(scale=1.0):
        return (scale * torch.randn(shape, device=device)).to(dtype)

    logprobs, values = -normal().abs() - 1.0, normal()
    return {
        "mask": block_mask(shape, device),
        "scores": normal()[:, 0] if shape[1] else normal().sum(1),
        "logprobs": logprobs,
        "ref_logprobs": logprobs + normal(0.3),
        "old_logprobs": logprobs + normal(0.2),
        "values": values,
        "vpreds": values + normal(0.3),
        "returns": values + normal(0.5),
        "rewards": normal(0.1),
        "advantages": normal(),
    }


def valid_arguments(op, shape=(2, 3), vocabulary=7, device="cpu", dtype=torch.float32, mode=None):
    """Arguments that `op`, an entry of `ops.OPS`, accepts, by name; about two thirds of the tokens count."""
    inputs = token_inputs(shape, device, dtype) | logits_inputs((*shape, vocabulary), dtype, device)
    return op.pick(inputs, shape, vocabulary, dtype, device, mode)
