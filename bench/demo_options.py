"""PPO in the setting of the three-stage demo, plain and with the options of today, from one SFT model and one reward model.

python -m bench.demo_options FOLDER trains into FOLDER, keeps the rows of both runs in bench/demo/rlhf/options.jsonl, and
draws them into options.png beside it; without FOLDER it draws the rows that are kept. docs/losses.md shows the picture.
"""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend has to be chosen first)

ROWS = Path(__file__).parent / "demo" / "rlhf" / "options.jsonl"
PICTURE = ROWS.with_suffix(".png")
OPTIONS = {
    "kl_penalty": "k3",
    "cliprange_high": 0.28,
    "dual_clip": 3.0,
    "lam_returns": 1.0,
    "critic_learning_rate": 1e-3,
    "critic_warmup_steps": 4,
}
LABELS = {
    "plain": "plain: one trunk, the demo's settings",
    "options": "k3, clip-higher, dual clip, λ = 0.95 and 1 for the returns, a critic that begins as the reward model",
}
PANELS = (
    ("rm_score", "Reward model score", "standard deviations of SFT samples"),
    ("kl", "KL to the SFT model", "nats per response"),
    ("var_explained", "Variance that the values explain", "share"),
)


def prepare(folder, settings, corpus, gold, display):
    """The demo's stages before PPO: folder gets sft_model and reward_model."""
    from ppo_ext.demo.rlhf import stages

    stages.train_sft(corpus, settings, folder, display)
    stages.label_pairs(corpus, settings, gold, folder, display)
    stages.train_reward_model(corpus, settings, folder, display)


def train(name, folder, settings, corpus, display):
    """One run of PPO; yields a row for each step."""
    import torch
    from transformers import AutoModelForSequenceClassification

    import ppo_ext
    from ppo_ext.demo.rlhf import ppo, stages

    def reward_model():
        return stages.load(AutoModelForSequenceClassification, folder / "reward_model")

    own = {"init_kl_coef": settings.kl_coef, "target": settings.kl_target, "horizon": settings.kl_horizon}
    config = ppo.ppo_config(
        settings, learning_rate=settings.ppo_learning_rate, **own, **(OPTIONS if name == "options" else {})
    )
    torch.manual_seed(settings.seed + 3)  # for the new value head; the trainer seeds the rest
    model = ppo_ext.AutoModelForCausalLMWithValueHead.from_pretrained(str(folder / "sft_model"))
    critic = {"critic_model": reward_model()} if name == "options" else {}
    trainer = ppo_ext.PPOTrainer(config, model, tokenizer=corpus.tokenizer, **critic)
    scorer, batch = reward_model(), settings.ppo_batch
    asked = ppo.prompts(corpus, corpus.train, settings.prompt_tokens, settings.ppo_steps * batch, settings.seed + 3)
    with display.bar(name, settings.ppo_steps) as advance:
        for step in range(settings.ppo_steps):
            queries = asked[step * batch : (step + 1) * batch]
            row = ppo.ppo_step(trainer, scorer, queries, corpus.tokenizer, settings)
            del row["texts"]
            advance(f"score {row['rm_score']:+.2f}  KL {row['kl']:.1f}")
            yield {"run": name, "step": step + 1, **row}


def run(path):
    """Trains both and keeps their rows."""
    from ppo_ext.demo.display import Display
    from ppo_ext.demo.folder import RunFolder
    from ppo_ext.demo.rlhf.corpus import build_corpus, python_reference
    from ppo_ext.demo.rlhf.gold import flesch_metric
    from ppo_ext.demo.rlhf.settings import full
    from ppo_ext.demo.runner import prepare_torch

    prepare_torch(cpu_threads=1)
    settings, display = full(0), Display()
    corpus = build_corpus(python_reference(), settings.vocab_size, settings.held_out_fraction, settings.seed, display)
    folder = RunFolder(Path(path), dataclasses.asdict(settings), overwrite=True, written=("metrics.jsonl",))
    prepare(folder, settings, corpus, flesch_metric(), display)
    rows = [row for name in LABELS for row in train(name, folder, settings, corpus, display)]
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))


def draw(rows):
    """Three panels over the steps, a curve for each run."""
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    for axis, (key, title, unit) in zip(axes, PANELS, strict=True):
        for name, color in zip(LABELS, ("#555555", "#1f6fb4"), strict=True):
            own = [row for row in rows if row["run"] == name]
            axis.plot([row["step"] for row in own], [row[key] for row in own], color=color, lw=1.8, label=LABELS[name])
        axis.set(title=title, xlabel="PPO step", ylabel=unit)
        axis.axvspan(1, OPTIONS["critic_warmup_steps"] + 1, color="#1f6fb4", alpha=0.08, lw=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes[2].set_ylim(-1, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})  # no version in it: same rows, same bytes
    pyplot.close(figure)


def main(arguments):
    if arguments:
        run(arguments[0])
    draw([json.loads(line) for line in ROWS.read_text().splitlines()])


if __name__ == "__main__":
    main(sys.argv[1:])
