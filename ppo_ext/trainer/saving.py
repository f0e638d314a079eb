"""Saving the policy to a folder or to the hub."""

import os
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .base import TrainerBase
from .config import as_dict

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


class SavingMixin(TrainerBase):
    """`PPOTrainer.save_pretrained`, `push_to_hub`, `create_model_card` and what they need."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model, value head, tokenizer and a model card to a folder.

        push_to_hub: also upload that folder; kwargs are then those of `push_to_hub`. Returns the upload's result or None.
        """
        os.makedirs(save_directory, exist_ok=True)
        self._save_pretrained(save_directory)
        if not push_to_hub:
            return None
        return self._upload(save_directory, repo_id or os.path.basename(os.path.normpath(save_directory)), **kwargs)

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(save_directory)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a temporary folder and upload it. kwargs: commit_message, private, token, branch."""
        with TemporaryDirectory() as folder:
            self._save_pretrained(folder)
            return self._upload(folder, repo_id, **kwargs)

    def _upload(
        self,
        folder: str | os.PathLike[str],
        repo_id: str,
        commit_message: str = "Push model using ppo_ext",
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
    ) -> Any:
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id=repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(
            repo_id=repo_id, folder_path=os.fspath(folder), commit_message=commit_message, revision=branch
        )

    def create_model_card(
        self, path: str | os.PathLike[str], model_name: str | None = "A model trained with ppo_ext"
    ) -> None:
        """Write a short README.md into a folder."""
        os.makedirs(path, exist_ok=True)
        with open(os.path.join(path, "README.md"), "w", encoding="utf-8") as file:
            file.write(MODEL_CARD.format(model_name=model_name, path=path))

    def _push_if_best(self, scores: torch.Tensor) -> None:
        """Push to the hub if the mean score is the best so far; compares every config.compare_steps steps."""
        best_kwargs = as_dict(self.config.push_to_hub_if_best_kwargs)
        if not best_kwargs:
            return
        highest = getattr(self, "highest_reward", -float("inf"))
        if self.compare_step % self.config.compare_steps == 0 and scores.mean() > highest:
            self.highest_reward = scores.mean()
            self.push_to_hub(**best_kwargs)
        self.compare_step += 1
