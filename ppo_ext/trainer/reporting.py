"""What `step` reports: its statistics, on the host and to the trackers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ops.check_labels import check_labels
from ..ops.masked import masked_mean
from .agreement import agree, gather
from .base import TrainerBase
from .callers import warn
from .processes import ProcessesMixin
from .rollout import Rollout
from .rollout_check import RolloutCheckMixin
from .stats import WANDB_PADDING, convert_to_scalar, stack_dicts, stats_to_np, unpack
from .update_guard import RATIO_MEAN, SKIPPED

# `loss` returns these beside TRL's statistics. A replaced `train_minibatch` or `step` may leave them in
GUARD = (SKIPPED, RATIO_MEAN)


def stack_train_stats(all_stats: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The statistics of all minibatches, [minibatches, 1] each; advantages and ratio as one row, [1, all tokens]."""
    stats = stack_dicts(all_stats)
    for key in ("policy/advantages", "policy/ratio"):  # without what fills up the rows of a smaller minibatch
        stats[key] = torch.cat([row[key].flatten() for row in all_stats])[None]
    stats["policy/advantages"] = torch.nan_to_num(stats["policy/advantages"], WANDB_PADDING)
    return stats


def _masked_sum(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask != 0, x, 0.0).sum(dim=-1)


def _lengths(name: str, samples: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Mean, standard deviation (0 for one sample) and list of the lengths, in tokens."""
    lengths = torch.tensor([len(sample) for sample in samples], dtype=torch.float32, device="cpu")
    std = lengths.std().item() if len(samples) > 1 else 0.0
    return {
        f"tokens/{name}_len_mean": lengths.mean().item(),
        f"tokens/{name}_len_std": std,
        f"tokens/{name}_dist": lengths.numpy(),
    }


class ReportingMixin(RolloutCheckMixin, ProcessesMixin, TrainerBase):
    """`PPOTrainer.record_step_stats`, `gather_stats`, `log_stats` and what they need."""

    def record_step_stats(self, kl_coef: float, **data: Any) -> dict[str, Any]:
        """TRL's statistics of a step.

        Args:
            kl_coef: the KL coefficient that the rewards were computed with.
            data: scores [B]; logprobs, ref_logprobs, non_score_reward, kls, masks [B, T-1]; queries, responses;
                train_stats: dict of [minibatches, n]; with step(rollout_logprobs=...) also rollout_logprobs [B, T-1].

        Returns: dict of tensors, arrays and floats under TRL's keys.

        Source: TRL 0.11.4, `PPOTrainer.record_step_stats`.
        """
        mask, scores = data["masks"], data["scores"]
        kl_list = _masked_sum(data["kls"], mask)
        stats = {
            "objective/kl": kl_list.mean(),
            "objective/kl_dist": kl_list,
            "objective/logprobs": data["logprobs"],
            "objective/ref_logprobs": data["ref_logprobs"],
            "objective/kl_coef": kl_coef,
            "objective/entropy": _masked_sum(-data["logprobs"], mask).mean(),
            "ppo/mean_non_score_reward": masked_mean(data["non_score_reward"], mask),
            "ppo/mean_scores": scores.mean(),
            "ppo/std_scores": scores.std() if len(scores) > 1 else torch.zeros_like(scores[0]),
            **_lengths("queries", data["queries"]),
            **_lengths("responses", data["responses"]),
            **{f"ppo/{key}": value.mean(dim=0) for key, value in data["train_stats"].items() if key not in GUARD},
        }
        if "rollout_logprobs" in data:
            stats |= self._rollout_stats(data["logprobs"], data["rollout_logprobs"], mask)
        error, var = stats["ppo/val/error"], stats["ppo/returns/var"]
        # returns without variance: nothing to explain, so 0
        stats["ppo/val/var_explained"] = torch.where(var > 0, 1 - error / torch.where(var > 0, var, 1.0), 0.0)
        return stats

    def gather_stats(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """The mean over all processes of each tensor, in one all-reduce; other entries stay this process's."""
        keys = [key for key, value in stats.items() if isinstance(value, torch.Tensor)]
        tensors = [stats[key].detach().to(self.accelerator.device) for key in keys]
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        mean = self.accelerator.reduce(flat, reduction="mean")
        return {**stats, **dict(zip(keys, unpack(mean, tensors), strict=True))}

    def _record(
        self,
        rollout: Rollout,
        train_stats: Mapping[str, torch.Tensor],
        scores: torch.Tensor,
        ref_logprobs: torch.Tensor,
        non_score_reward: torch.Tensor,
        kls: torch.Tensor,
    ) -> dict[str, Any]:
        """The statistics that `step` returns, see `record_step_stats`.

        With several processes and config.exact_update they are those of the samples of all processes.
        """
        data = {"scores": scores, "ref_logprobs": ref_logprobs, "non_score_reward": non_score_reward, "kls": kls}
        if rollout.rollout_logprobs is not None:
            data["rollout_logprobs"] = rollout.rollout_logprobs
        of_batch: dict[str, Any] = {
            "logprobs": rollout.logprobs,
            "masks": rollout.mask,
            "queries": rollout.queries,
            "responses": rollout.responses,
            **data,
        }
        if self._shares_statistics():
            of_batch = self._all_samples(rollout, data)
        elif not self.is_distributed:
            of_batch = {name: x[: self._own_samples()] for name, x in of_batch.items()}
        stats = self.record_step_stats(kl_coef=self.kl_ctl.value, train_stats=train_stats, **of_batch)
        return self._to_host(stats)

    def _to_host(self, stats: Mapping[str, Any]) -> dict[str, Any]:
        """Numpy and floats, averaged over processes unless they are of all of them.

        With wandb one-element arrays stay arrays, as in TRL.
        """
        averaged = self.is_distributed and not self._shares_statistics()
        stats = stats_to_np(self.gather_stats(stats) if averaged else stats)
        check_labels(self.current_device)  # no further host/device sync: the statistics have just been waited for
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if stats["objective/kl"] < -1.0:
            warn(
                f"PPOTrainer: the KL per sequence is {stats['objective/kl']:.2f}, below -1. The responses were "
                "probably not sampled from the policy that is trained: sample with top_k=0, top_p=1.0 and temperature 1",
            )
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def log_stats(
        self,
        stats: Mapping[str, Any],
        batch: Mapping[str, Sequence[Any]],
        rewards: torch.Tensor | Sequence[torch.Tensor | float],
        columns_to_log: Sequence[str] = ("query", "response"),
    ) -> None:
        """Send a step's statistics to the tracker. All processes must call it; the main one sends.

        Args:
            stats: what `step` returned.
            batch: dict with the lists named by columns_to_log, for wandb's table of samples.
            rewards: the scores of this process, a list of numbers or tensors, or a tensor [B].

        Source: TRL 0.11.4, `PPOTrainer.log_stats`.
        """
        wanted = columns_to_log if self.config.log_with == "wandb" else ()
        all_rewards = self._rewards_of_all_processes(rewards, batch, wanted)
        columns = self._columns_of_all_processes(batch, columns_to_log) if wanted else None
        if not self.accelerator.is_main_process:
            return
        logs = dict(stats)
        if columns is not None:
            import wandb

            rows = [list(row) for row in zip(*columns, all_rewards.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns_to_log, "reward"], rows=rows)
        logs = {
            k: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 else v for k, v in logs.items()
        }
        logs["env/reward_mean"] = all_rewards.mean().item()
        logs["env/reward_std"] = all_rewards.std().item() if len(all_rewards) > 1 else 0.0
        logs["env/reward_dist"] = all_rewards.cpu().numpy()
        if self.config.log_with == "tensorboard":
            self.current_step += 1  # wandb counts by itself
        self.accelerator.log(logs, step=self.current_step if self.config.log_with == "tensorboard" else None)

    def _show_tokens(self, tokens: Sequence[torch.Tensor], masks: Sequence[int]) -> None:
        """Prints the decoded tokens, those whose mask is 1 in another colour. Needs rich; for use in a debugger."""
        from rich import print as print_coloured
        from rich.text import Text

        text = Text()
        for token, mask in zip(tokens, masks, strict=True):
            colour = "deep_sky_blue1" if mask == 1 else "cyan3"
            text.append(self.tokenizer.decode(token.item()), style=f"black on {colour}").append(" ")
        print_coloured(text)

    def _rewards_of_all_processes(
        self,
        rewards: torch.Tensor | Sequence[torch.Tensor | float],
        batch: Mapping[str, Sequence[Any]],
        columns: Sequence[str],
    ) -> torch.Tensor:
        """[samples], of as many on each process as it has. An error on one of them is raised by all."""

        def check() -> torch.Tensor:
            if any(column not in batch for column in columns):
                raise ValueError(
                    f"PPOTrainer.log_stats: batch must have the columns {list(columns)}, got {list(batch)}"
                )
            if isinstance(rewards, torch.Tensor):
                return rewards.float().flatten()
            return torch.tensor([float(reward) for reward in rewards], dtype=torch.float32, device="cpu")

        own, facts = agree(self.accelerator, "log_stats", check, lambda found: (len(found), 0))
        if not self.is_distributed:
            return own
        sizes = [size for size, _ in facts]
        rows = gather(self.accelerator, torch.nn.functional.pad(own, (0, max(sizes) - len(own))))
        return torch.cat([row[:size] for row, size in zip(rows, sizes, strict=True)])

    def _columns_of_all_processes(
        self, batch: Mapping[str, Sequence[Any]], columns_to_log: Sequence[str]
    ) -> list[Sequence[Any]]:
        from accelerate.utils import gather_object

        columns = [batch[column] for column in columns_to_log]
        return [gather_object(column) for column in columns] if self.is_distributed else columns
