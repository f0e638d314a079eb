"""The runs, as LLaMA-Factory's own settings; {inputs} is the folder of `inputs.py`, {rewards} that of the reward runs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Run:
    """One run on each side.

    settings: for `llamafactory-cli train`. files: what must be there afterwards, as patterns.
    ours: fields of ppo_ext's PPOConfig that give TRL's numbers where ppo_ext differs by default.
    autocast: LLaMA-Factory's PPO always runs the models under autocast, on a CPU in bfloat16. False switches that off on
    both sides. With it, TRL computes the value head in bfloat16 too, ppo_ext in float32; to compare the rest, the
    baseline's value head is kept in float32.
    nudges: in half precision the last bit of a float32 number may decide between two roundings, which lie 2^16 times as far
    apart, and training goes on from there. So the baseline is also run with its advantages multiplied by 1 + nudge, for
    each of these, and one of its runs must be met.
    """

    name: str
    settings: dict
    files: tuple
    ours: dict = dataclasses.field(default_factory=dict)
    autocast: bool = False
    nudges: tuple = ()


_COMMON = {
    "do_train": True,
    "dataset_dir": "{inputs}",
    "template": "empty",
    "cutoff_len": 64,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_steps": 2,
    "seed": 5,
    "plot_loss": True,
    "preprocessing_num_workers": 1,
    "use_cpu": True,
    "report_to": "none",
}
_REWARD = {**_COMMON, "stage": "rm", "model_name_or_path": "{inputs}/reward_base", "dataset": "pairs", "max_steps": 6}
_PPO = {
    **_COMMON,
    "stage": "ppo",
    "model_name_or_path": "{inputs}/policy",
    "dataset": "prompts",
    "max_steps": 3,
    "ppo_buffer_size": 2,
    "ppo_epochs": 2,
    "max_new_tokens": 8,
    "top_k": 0,
    "top_p": 1.0,
    "temperature": 1.0,
    # TRL clips once in the trainer's life and ppo_ext at every update, so the comparison is made without clipping
    "max_grad_norm": 1e9,
    "finetuning_type": "full",
    "reward_model_type": "full",
    "reward_model": "{rewards}/reward_full",
}
_LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj"}
_STATE = ("trainer_state.json", "trainer_log.jsonl", "training_loss.png")
_FULL = (*_STATE, "model.safetensors", "value_head.safetensors", "checkpoint-2/value_head.safetensors")
_ADAPTER = (*_STATE, "adapter_model.safetensors", "value_head.safetensors", "checkpoint-2/value_head.safetensors")

_MEANS_OF_MEANS = {"exact_update": False}  # as TRL over the minibatches of an accumulation

RUNS = (
    Run("reward_full", {**_REWARD, "finetuning_type": "full"}, _FULL),
    Run("reward_lora", {**_REWARD, **_LORA, "model_name_or_path": "{inputs}/policy"}, _ADAPTER),
    Run("ppo_full", _PPO, (*_FULL, "training_reward.png"), _MEANS_OF_MEANS),
    Run(
        "ppo_lora",
        {**_PPO, **_LORA, "reward_model_type": "lora", "reward_model": "{rewards}/reward_lora"},
        (*_ADAPTER, "training_reward.png"),
        _MEANS_OF_MEANS,
    ),
    Run(
        "ppo_score_norm_tensorboard",
        {**_PPO, "ppo_score_norm": True, "report_to": "tensorboard"},
        (*_FULL, "runs/**/events.out.tfevents.*"),
        _MEANS_OF_MEANS,
    ),
    Run(
        "ppo_whitened_rewards",
        {**_PPO, "ppo_whiten_rewards": True},
        _FULL,
        {**_MEANS_OF_MEANS, "gae_through_padding": True},
    ),
    Run(
        "ppo_bf16",
        {**_PPO, "bf16": True},
        _FULL,
        _MEANS_OF_MEANS,
        autocast=True,
        nudges=(2.0**-22, -(2.0**-22), 2.0**-21, -(2.0**-21)),
    ),
)


def nudged(run):
    """The run once for each of its nudges, by (run, nudge)."""
    return [(dataclasses.replace(run, name=f"{run.name}_nudged_{i}"), nudge) for i, nudge in enumerate(run.nudges)]


def settings(run, inputs, rewards, output):
    """The settings with their folders filled in."""
    filled = {
        name: value.format(inputs=inputs, rewards=rewards) if isinstance(value, str) else value
        for name, value in run.settings.items()
    }
    return {**filled, "output_dir": str(output)}
