"""Shapes, dtypes and inputs of every benchmark: the quick selection, and the full list."""

import torch

GPT2, LLAMA, QWEN = 50257, 128256, 151936  # vocabularies; the first is odd, so its rows are not aligned

# [rows, vocabulary] of the ops on logits: (selection, full)
LOGITS = {"cpu": ([(1024, GPT2)], [(1024, GPT2), (512, LLAMA), (512, QWEN), (64, GPT2), (1024, 8192)]),
          "cuda": ([(8192, LLAMA)], [(8192, LLAMA), (8192, GPT2), (4096, QWEN), (512, LLAMA), (8192, 8192)])}
LOGIT_DTYPES = (torch.float32, torch.bfloat16)
# [sequences, tokens] of the ops on per-token tensors
TOKENS = {"gae": ([(64, 512)], [(64, 512), (8, 128), (512, 1024), (8, 8192)]),
          "rewards": ([(64, 512)], [(64, 512), (8, 128), (512, 1024)]),
          "whiten": ([(64, 512)], [(64, 512), (8, 128), (512, 1024)]),
          "ppo_loss": ([(8, 512)], [(8, 512), (64, 512), (2, 64)])}
# [sequences, tokens, vocabulary] of a training minibatch's loss head
HEAD = {"cpu": (8, 128, GPT2), "cuda": (16, 512, LLAMA)}


def logits_shapes(device, full):
    return LOGITS[device.type][full]


def token_shapes(op, full):
    return TOKENS[op][full]


def logits_inputs(shape, dtype, device):
    """logits [N, V], ref_logits [N, V], labels [N], and the incoming gradients of two outputs [N]; every second row is
    peaked at its label, as a trained model's rows are."""
    rows, vocabulary = shape
    logits = torch.randn(rows, vocabulary, device=device).mul_(2.0)
    labels = torch.randint(vocabulary, (rows,), device=device)
    logits[::2].scatter_add_(1, labels[::2, None], torch.full_like(labels[::2, None], 12, dtype=logits.dtype))
    ref_logits = (logits + 0.3 * torch.randn_like(logits)).to(dtype)
    return {"logits": logits.to(dtype), "ref_logits": ref_logits, "labels": labels,
            "grad_logprobs": torch.randn(rows, device=device), "grad_entropy": torch.randn(rows, device=device)}


def token_inputs(shape, device):
    """What PPO holds per token, [B, T] float32; the mask is one block per row, as responses of varied length give."""
    sequences, tokens = shape

    def normal(scale=1.0):
        return scale * torch.randn(sequences, tokens, device=device)

    start = torch.randint(tokens // 4 + 1, (sequences, 1), device=device)
    end = tokens - torch.randint(tokens // 4 + 1, (sequences, 1), device=device)
    position = torch.arange(tokens, device=device)
    logprobs, values = -normal().abs() - 1.0, normal()
    return {"mask": ((position >= start) & (position < end)).long(), "scores": torch.randn(sequences, device=device),
            "logprobs": logprobs, "ref_logprobs": logprobs + normal(0.3), "old_logprobs": logprobs + normal(0.2),
            "values": values, "vpreds": values + normal(0.3), "returns": values + normal(0.5), "rewards": normal(0.1),
            "advantages": normal()}
