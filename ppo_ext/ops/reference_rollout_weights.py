"""The specification of `rollout_weights`, in plain torch."""

import torch


@torch.no_grad()
def rollout_weights(old_logprobs, rollout_logprobs, mask, *, kind="tis", level="token", bounds=(0.0, 2.0)):
    counts = mask != 0
    dtype = torch.float64 if torch.float64 in (old_logprobs.dtype, rollout_logprobs.dtype) else torch.float32
    d = torch.where(counts, old_logprobs.double() - rollout_logprobs.double(), 0.0)
    if level != "token":
        whole = d.sum(-1, keepdim=True)
        d = (whole if level == "sequence" else whole / counts.sum(-1, keepdim=True)).expand(d.shape)
    ratio, (low, high) = torch.exp(d), bounds
    below, above, invalid = (counts & x for x in (ratio < low, ratio > high, ratio.isnan()))
    weights = ratio.clamp(low, high) if kind == "tis" else torch.where(below | above, 0.0, ratio)
    weights = torch.where(counts & ~invalid, weights, 0.0)
    count = counts.sum()

    def share(x):
        return torch.where(count == 0, 0.0, x.double().sum() / count.clamp(min=1))

    squares = weights.square().sum()
    stats = {
        "mean": share(weights),
        "ess": torch.where(squares == 0, 0.0, share(weights) * weights.sum() / squares),
        "share_low": share(below),
        "share_high": share(above),
        "share_invalid": share(invalid),
        "ratio_max": torch.where(counts & ~invalid, ratio, 0.0).max() if d.numel() else d.sum(),
    }
    stats["ratio_max"] = stats["ratio_max"].clamp(max=torch.finfo(torch.float32).max)
    return weights.to(dtype), {name: x.to(dtype) for name, x in stats.items()}
