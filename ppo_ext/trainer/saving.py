"""Saving the policy to a folder or to the hub."""

import os
from collections.abc import Callable, Mapping
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import torch
from transformers import AutoConfig, AutoTokenizer

from ..models import checkpoint, loading, lora
from ..models.auto import AutoModelForCausalLMWithValueHead, AutoModelForSeq2SeqLMWithValueHead
from ..models.staging import complete, staged
from . import critic
from .base import TrainerBase
from .config import PPOConfig, as_dict
from .processes import ProcessesMixin
from .sharding import whole_state_dict

Trainer = TypeVar("Trainer", bound="SavingMixin")

MODEL_CARD = """---
library_name: transformers
tags:
{tags}
---

# {model_name}

A language model with a value head, fine-tuned with PPO.

```python
from ppo_ext.trl import AutoModelForCausalLMWithValueHead

model = AutoModelForCausalLMWithValueHead.from_pretrained("path or id of this folder")
```
"""


class SavingMixin(ProcessesMixin, TrainerBase):
    """`PPOTrainer.from_pretrained`, `save_pretrained`, `push_to_hub`, `create_model_card` and what they need."""

    _whole_weights: dict[str, torch.Tensor] | None = None  # of a sharded model, while it is saved
    _tag_names: ClassVar[list[str]] = ["ppo_ext", "ppo", "reinforcement-learning"]  # of the model card

    @classmethod
    def from_pretrained(
        cls: type[Trainer],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: PPOConfig | None = None,
        tokenizer: Any = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Trainer:
        """A trainer of the model that `save_pretrained` wrote, with its tokenizer.

        Args:
            config: None: PPOConfig(). tokenizer: None: the one in the folder.
            model_kwargs: for the model's `from_pretrained`; the adapter of a saved peft model is trainable by default.
            kwargs: the other arguments of the constructor, such as ref_model and dataset.

        The optimizer and the KL coefficient start anew; `save_run` and `load_run` keep those. (TRL 0.11.4 inherits a
        method of this name from huggingface_hub, which fails for a trainer.)
        """
        source = os.fspath(pretrained_model_name_or_path)
        complete(source)
        options = {"is_trainable": True, **(model_kwargs or {})}
        base = lora.base_model_of(source, options) if lora.find_adapter(source, options) else source
        if critic.has_critic(source) and "critic_model" not in kwargs:
            kwargs["critic_model"] = critic.load(os.path.join(source, critic.FOLDER), options)
        encoder_decoder = AutoConfig.from_pretrained(base).is_encoder_decoder
        kind = AutoModelForSeq2SeqLMWithValueHead if encoder_decoder else AutoModelForCausalLMWithValueHead
        model: Any = kind.from_pretrained(source, **options)
        if "critic_model" in kwargs and not loading.read_v_head(source, options):
            model = model.pretrained_model
        arguments: dict[str, Any] = {
            "config": PPOConfig() if config is None else config,
            "model": model,
            "tokenizer": AutoTokenizer.from_pretrained(source) if tokenizer is None else tokenizer,
        }
        return cls(**arguments, **kwargs)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save model, value head, tokenizer and a model card to a folder: all files, or none if it is interrupted.

        The critic, if there is one, goes to the folder "critic" within it; a policy that came without a value head is saved
        without one.
        A README.md that is there stays as it is.

        push_to_hub: also upload that folder; kwargs are then those of `push_to_hub`. Returns the upload's result or None.

        All processes must call it; the main one writes and uploads, and none goes on before that is done.
        """
        name = repo_id or os.path.basename(os.path.normpath(save_directory))
        self._gather_weights()

        def save() -> None:
            checkpoint.check_target(os.fspath(save_directory), self.is_peft_model)
            with staged(save_directory) as folder:
                self._save_pretrained(folder)

        self._on_main_process("save_pretrained", save)
        if not push_to_hub:
            return None
        return self._on_main_process("push_to_hub", lambda: self._upload(save_directory, name, **kwargs))

    def _gather_weights(self) -> None:
        """Under FSDP, where no process has whole weights: those of all, for `_save_pretrained`. One collective a weight."""
        if self.accelerator.distributed_type == "FSDP":
            weights = whole_state_dict(self.accelerator.unwrap_model(self.model))
            self._whole_weights = weights if self.accelerator.is_main_process else None

    def _on_main_process(self, name: str, action: Callable[[], Any]) -> Any:
        """The action's result on the main process, None on the others, which wait; its error on all."""
        return self._alike(name, action if self.accelerator.is_main_process else lambda: None)

    def _save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes everything into a folder; called on the main process."""
        model = self.accelerator.unwrap_model(self.model)
        whole = {} if self._whole_weights is None else {"state_dict": self._whole_weights}
        if not self._saves_value_head:
            whole = {
                "state_dict": {name: x for name, x in model.state_dict().items() if not name.startswith("v_head.")}
            }
        model.save_pretrained(save_directory, **whole)
        self._whole_weights = None
        if self.critic is not None:
            folder = os.path.join(save_directory, critic.FOLDER)
            self.accelerator.unwrap_model(self.critic).model.save_pretrained(folder)
        self.tokenizer.save_pretrained(save_directory)
        self.create_model_card(save_directory)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save to a temporary folder and upload it. kwargs: commit_message, private, token, branch.

        All processes must call it; the main one saves and uploads.
        """

        self._gather_weights()

        def push() -> Any:
            with TemporaryDirectory() as folder:
                self._save_pretrained(folder)
                return self._upload(folder, repo_id, **kwargs)

        return self._on_main_process("push_to_hub", push)

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
        tags = "\n".join(f"- {tag}" for tag in self._tag_names)
        checkpoint.write_text(os.path.join(path, "README.md"), MODEL_CARD.format(model_name=model_name, tags=tags))

    def _push_if_best(self, scores: torch.Tensor) -> None:
        """Push to the hub if the mean score of all processes is the best so far; compares every compare_steps steps."""
        best_kwargs = as_dict("push_to_hub_if_best_kwargs", self.config.push_to_hub_if_best_kwargs)
        if not best_kwargs:
            return
        highest = getattr(self, "highest_reward", -float("inf"))
        if self.compare_step % self.config.compare_steps == 0:
            mean = self._mean_score(scores)
            if mean > highest:
                self.highest_reward = mean
                self.push_to_hub(**best_kwargs)
        self.compare_step += 1
