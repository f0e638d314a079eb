"""report.html: the run on one page that needs no other file."""

import re
from html import escape
from importlib.resources import files
from string import Template

from . import base_model
from . import metrics as metrics_module
from .gate import Check
from .metrics import Metrics
from .report import SHORT, Row, figures, one_line
from .settings import Settings

READING = """\
PPO trained on {reward} alone, with a penalty on the KL divergence from the model before PPO. Whether the texts are really
friendlier is judged by another metric, which PPO never saw: {rating}. A reward that is a formula can be gamed: look for
strings of marked words, for a KL that runs away, and for a distinct-2 that falls. The samples are the first held-out
openings, one draw each, not selected; compare them yourself.{agreement}"""
AGREEMENT = """ On review sentences that it was not fitted to, {rating} correlates with the mean of about twenty people's \
ratings at {r_rating:.2f}, {reward} at {r_reward:.2f}."""


def write_page(path, title: str, subtitle: str, panels: str, stages: dict, metrics: Metrics, rows: list[Row],
               checks: list[Check]) -> None:  # fmt: skip
    page = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    valences = metrics_module.vader_valences() if metrics.reward.name == metrics_module.VADER else {}
    note = f"The first {len(rows)} held-out openings, one sample each, not selected. In brackets the rating."
    if valences:
        note += " Underlined: the words that the reward counts, green for it and red against it."
    text = page.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        cards=_cards(stages, metrics),
        samples_note=escape(note),
        samples="\n".join(_sample(row, valences) for row in rows),
        panels=panels,
        table=_table(*figures(stages, metrics)),
        gate=_gate(checks),
        reading=escape(_reading(metrics)),
    )
    path.write_text(text, encoding="utf-8")


def subtitle(settings: Settings, seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"seed {settings.seed} · {settings.steps} steps of {settings.batch} responses · LoRA rank {settings.lora_rank} · "
        f"{str(base_model.fast_dtype()).removeprefix('torch.')} · "
        f"{minutes} min {rest} s in all"
    )


def _cards(stages: dict, metrics: Metrics) -> str:
    before, after = stages["before"], stages["ppo"]

    def change(key):
        return (
            f'<span class="from">{before[key]:+.2f}</span> → <span class="to">{after[key]:+.2f}</span> '
            f"<small>± {after[f'{key}_ci']:.2f}</small>"
        )

    variety = (
        f'<span class="from">{before["distinct_2"]:.2f}</span> → <span class="to">{after["distinct_2"]:.2f}</span>'
    )
    cards = {
        f"{metrics.rating.name}, held-out openings; PPO never sees it": change("rating"),
        f"{metrics.reward.name}, the reward, on held-out openings": change("reward"),
        "KL to the model before PPO, nats per response": f'<span class="to">{after["kl"]:.1f}</span>',
        "distinct-2: different word pairs among all": variety,
    }
    return "\n".join(
        f'<div class="card"><div class="name">{escape(name)}</div><div class="number">{number}</div></div>'
        for name, number in cards.items()
    )


def _sample(row: Row, valences: dict[str, float]) -> str:
    texts = "\n".join(
        f'<div><span class="tag {stage}">{SHORT[stage]} ({sample["rating"]:+.2f})</span><br>'
        f"{_marked(one_line(sample['response']), valences)}</div>"
        for stage, sample in row
    )
    opening = escape(one_line(row[0][1]["prompt"]))
    return f'<div class="panel sample"><div class="opening">{opening} …</div><div class="texts">{texts}</div></div>'


def _marked(text: str, valences: dict[str, float]) -> str:
    """The text as HTML, with the words that the lexicon knows underlined."""

    def mark(word: str) -> str:
        valence = valences.get(word.lower(), 0.0)
        kind = "up" if valence > 0 else "down"
        return f'<mark class="{kind}">{escape(word)}</mark>' if valence else escape(word)

    return "".join(mark(part) for part in re.split(r"(\W+)", text))


def _table(head: list[str], rows: list[list[str]]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line(head, "th") + "".join(line(row, "td") for row in rows) + "</table>"


def _gate(checks: list[Check]) -> str:
    if not checks:
        return ""
    lines = "".join(f'<li class="{"yes" if c.passed else "no"}">{escape(c.text)}</li>' for c in checks)
    return f'<h2>Gate</h2><div class="panel"><ul class="gate">{lines}</ul></div>'


def _reading(metrics: Metrics) -> str:
    agreement = ""
    if metrics.agreement:
        agreement = AGREEMENT.format(
            rating=metrics.rating.name,
            reward=metrics.reward.name,
            r_rating=metrics.agreement[metrics.rating.name],
            r_reward=metrics.agreement[metrics.reward.name],
        )
    return READING.format(reward=metrics.reward.name, rating=metrics.rating.name, agreement=agreement)
