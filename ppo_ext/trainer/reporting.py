"""What a step tells the world: its statistics, the trackers, and the files it leaves."""

import os
import warnings

import torch

from ..ops.check_labels import check_labels
from ..ops.masked import masked_mean
from .stats import WANDB_PADDING, convert_to_scalar, stack_dicts, stats_to_np, unpack

MODEL_CARD = """---
library_name: transformers
tags:
- ppo_ext
- ppo
- reinforcement-learning
---

# {model_name}

A language model with a value head, fine-tuned with PPO.

```python
from ppo_ext.trl import AutoModelForCausalLMWithValueHead

model = AutoModelForCausalLMWithValueHead.from_pretrained("{path}")
```
"""


def stack_train_stats(all_stats):
    """The statistics of all mini batches, [mini batches, 1] each; advantages and ratio as one row, [1, all tokens]."""
    stats = stack_dicts(all_stats)
    stats["policy/advantages"] = torch.nan_to_num(stats["policy/advantages"].reshape(1, -1), WANDB_PADDING)
    stats["policy/ratio"] = stats["policy/ratio"].reshape(1, -1)
    return stats


def _masked_sum(x, mask):
    return torch.where(mask != 0, x, 0.0).sum(dim=-1)


def _lengths(name, samples):
    """Mean, standard deviation (0 for one sample) and list of the lengths, in tokens."""
    lengths = torch.tensor([float(len(sample)) for sample in samples])
    std = lengths.std().item() if len(samples) > 1 else 0.0
    return {
        f"tokens/{name}_len_mean": lengths.mean().item(),
        f"tokens/{name}_len_std": std,
        f"tokens/{name}_dist": lengths.numpy(),
    }


class ReportingMixin:
    """Statistics, trackers, saving and the hub, for `PPOTrainer`."""

    def record_step_stats(self, kl_coef, **data):
        """TRL's statistics of a step.

        Args:
            kl_coef: the KL coefficient that made the rewards.
            data: scores [B]; logprobs, ref_logprobs, non_score_reward, kls, masks [B, T-1]; queries, responses;
                train_stats: dict of [mini batches, n].

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
            **{f"ppo/{key}": value.mean(dim=0) for key, value in data["train_stats"].items()},
        }
        error, var = stats["ppo/val/error"], stats["ppo/returns/var"]
        # returns that do not vary leave nothing to explain
        stats["ppo/val/var_explained"] = torch.where(var > 0, 1 - error / torch.where(var > 0, var, 1.0), 0.0)
        return stats

    def gather_stats(self, stats):
        """The mean over all processes of each tensor, in one all-reduce; other entries stay this process's."""
        keys = [key for key, value in stats.items() if isinstance(value, torch.Tensor)]
        tensors = [stats[key].detach().to(self.accelerator.device) for key in keys]
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        mean = self.accelerator.reduce(flat, reduction="mean")
        return {**stats, **dict(zip(keys, unpack(mean, tensors), strict=True))}

    def _record(self, rollout, train_stats, **data):
        """The statistics that `step` returns, from the rollout, the mini batches and what only `step` has seen."""
        stats = self.record_step_stats(
            kl_coef=self.kl_ctl.value,
            train_stats=train_stats,
            logprobs=rollout.logprobs,
            masks=rollout.mask,
            queries=rollout.queries,
            responses=rollout.responses,
            **data,
        )
        return self._to_host(stats)

    def _to_host(self, stats):
        """Numpy and floats, averaged over processes; with wandb one-element arrays stay arrays, as in TRL."""
        stats = stats_to_np(self.gather_stats(stats) if self.is_distributed else stats)
        check_labels(self.current_device)  # the device has been waited for anyway
        stats["ppo/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        if stats["objective/kl"] < -1.0:
            warnings.warn(
                f"PPOTrainer: the KL per sequence is {stats['objective/kl']:.2f}, below -1. The responses were "
                "probably not sampled from the policy that is scored: sample with top_k=0, top_p=1.0 and temperature 1",
                stacklevel=3,
            )
        return stats if self.config.log_with == "wandb" else convert_to_scalar(stats)

    def log_stats(self, stats, batch, rewards, columns_to_log=("query", "response")):
        """Send a step's statistics to the tracker.

        Args:
            stats: what `step` returned.
            batch: dict with the lists named by columns_to_log, for wandb's table of samples.
            rewards: the scores of this process, a list of numbers or tensors, or a tensor [B].

        Source: TRL 0.11.4, `PPOTrainer.log_stats`.
        """
        if not isinstance(rewards, torch.Tensor):
            rewards = torch.tensor([float(reward) for reward in rewards])
        rewards = self.accelerator.gather(rewards.float().to(self.current_device)).flatten()
        columns = self._columns_of_all_processes(batch, columns_to_log) if self.config.log_with == "wandb" else None
        if not self.accelerator.is_main_process:
            return
        logs = dict(stats)
        if columns is not None:
            import wandb

            rows = [list(row) for row in zip(*columns, rewards.tolist(), strict=True)]
            logs["game_log"] = wandb.Table(columns=[*columns_to_log, "reward"], rows=rows)
        logs = {
            k: v.float() if isinstance(v, torch.Tensor) and v.dtype == torch.bfloat16 else v for k, v in logs.items()
        }
        logs["env/reward_mean"] = rewards.mean().item()
        logs["env/reward_std"] = rewards.std().item() if len(rewards) > 1 else 0.0
        logs["env/reward_dist"] = rewards.cpu().numpy()
        if self.config.log_with == "tensorboard":
            self.current_step += 1  # wandb counts by itself
        self.accelerator.log(logs, step=self.current_step if self.config.log_with == "tensorboard" else None)

    def _columns_of_all_processes(self, batch, columns_to_log):
        from accelerate.utils import gather_object

        missing = [column for column in columns_to_log if column not in batch]
        if missing:
            raise ValueError(
                f"PPOTrainer.log_stats: batch must have the columns {list(columns_to_log)}, got {list(batch)}"
            )
        columns = [batch[column] for column in columns_to_log]
        return [gather_object(column) for column in columns] if self.is_distributed else columns

    def save_pretrained(self, save_directory, push_to_hub=False, repo_id=None, **kwargs):
        """Save model, value head, tokenizer and a model card to a folder; optionally push that folder to the hub."""
        os.makedirs(save_directory, exist_ok=True)
        self._save_pretrained(save_directory)
        if not push_to_hub:
            return None
        return self._upload(save_directory, repo_id or os.path.basename(os.path.normpath(save_directory)), **kwargs)

    def _save_pretrained(self, save_directory):
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def push_to_hub(self, repo_id, **kwargs):
        """Save to a temporary folder and upload it. kwargs: commit_message, private, token, branch."""
        from tempfile import TemporaryDirectory

        with TemporaryDirectory() as folder:
            self._save_pretrained(folder)
            return self._upload(folder, repo_id, **kwargs)

    def _upload(
        self, folder, repo_id, commit_message="Push model using ppo_ext", private=None, token=None, branch=None
    ):
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=branch)

    def create_model_card(self, path, model_name="A model trained with ppo_ext"):
        """Write a short README.md into a folder."""
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
            file.write(MODEL_CARD.format(model_name=model_name, path=path))

    def _push_if_best(self, scores):
        """Push to the hub when the mean score is the best so far, looking every config.compare_steps steps."""
        if not self.config.push_to_hub_if_best_kwargs:
            return
        if self.compare_step % self.config.compare_steps == 0 and scores.mean() > self.highest_reward:
            self.highest_reward = scores.mean()
            self.push_to_hub(**self.config.push_to_hub_if_best_kwargs)
        self.compare_step += 1
