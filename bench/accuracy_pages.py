"""The figures of accuracy.py: where they are kept, the pages made of them, and whether an error has grown."""

import json
import math
import pathlib

from .table import number
from .trl_baseline import NAME

EVIDENCE = pathlib.Path(__file__).parent / "evidence"
TORCH = "torch float32"
GROWTH = 1.1
_HEADER = ("op", "result", "dtype", "ours: largest", "mean", "torch: largest", "mean", "TRL: largest", "mean")
_INPUT = ("op", "dtype", "V", "scale", "offset", "ref_scale", "ref_offset")  # what names the input of a row
_PLOTTED = (("logprobs", "logprobs"), ("logprobs_and_entropy", "entropy"), ("full_kl", "kl"))
_LARGEST, _MEAN = 0, 1


def is_ours(who):
    return who not in (TORCH, NAME)


def ours(row):
    """[largest, mean] error of the worst of our levels."""
    return [max(errors[i] for who, errors in row["errors"].items() if is_ours(who)) for i in (_LARGEST, _MEAN)]


def of_everyone(row):
    """{"ours", torch, TRL: [largest, mean]}."""
    return {"ours": ours(row), **{who: errors for who, errors in row["errors"].items() if not is_ours(who)}}


def aggregate(rows):
    """{who: [largest error of any row, mean of the rows' means]}."""
    found = [of_everyone(row) for row in rows]
    return {
        who: [max(of[who][_LARGEST] for of in found), math.fsum(of[who][_MEAN] for of in found) / len(found)]
        for who in found[0]
    }


def grouped(rows, *fields):
    groups = {}
    for row in rows:
        groups.setdefault(tuple(row[field] for field in fields), []).append(row)
    return groups


def growth(measured, kept, level):
    """Yields a sentence for each of our errors at this level that has grown by more than 10 % since it was kept.

    On another machine another entry may have the largest error, so half a unit in the last place of the largest value
    is added to the limit for the largest error, and a hundredth of a unit to that for the mean.
    """
    fields = ("result", *_INPUT)
    before = {tuple(row[field] for field in fields): row for row in kept}
    for row in measured:
        old = before[tuple(row[field] for field in fields)]
        if level not in old["errors"]:
            continue
        for name, i, units in (("largest", _LARGEST, 0.5), ("mean", _MEAN, 0.01)):
            limit = GROWTH * old["errors"][level][i] + units * old["unit"]
            if not row["errors"][level][i] <= limit:
                where = ", ".join(str(row[field]) for field in ("op", *(name for name in fields if name != "op")))
                yield f"{where}: {name} error {row['errors'][level][i]:.3g}, kept {old['errors'][level][i]:.3g}"


# ---- pages ----------------------------------------------------------------------------------------------------------


def _cells(errors):
    return [number(error) for who in ("ours", TORCH, NAME) for error in errors.get(who, (None, None))]


def _table(header, lines):
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def _by_op(rows):
    groups = grouped(rows, "op", "result", "dtype")
    return _table(_HEADER, [(*key, *_cells(aggregate(group))) for key, group in groups.items()])


def _by_size(rows):
    rows = [row for row in rows if row["dtype"] == "float32" and (row["op"], row["result"]) in _PLOTTED]
    groups = grouped(rows, "result", "V", "scale", "offset")
    lines = [
        (name, str(V), f"{scale:g}", f"{offset:g}", *_cells(aggregate(group)))
        for (name, V, scale, offset), group in groups.items()
    ]
    return _table(("result", "V", "scale", "offset", *_HEADER[3:]), lines)


def differs(row):
    """Whether policy and reference logits have different scales or offsets."""
    return row["ref_scale"] is not None and (row["ref_scale"], row["ref_offset"]) != (row["scale"], row["offset"])


def _by_difference(rows):
    fields = ("result", "dtype", "scale", "ref_scale", "offset", "ref_offset")
    lines = [
        (name, dtype, *(f"{x:g}" for x in numbers), *_cells(aggregate(group)))
        for (name, dtype, *numbers), group in grouped(rows, *fields).items()
    ]
    header = ("result", "dtype", "scale", "reference's", "offset", "reference's", *_HEADER[3:])
    return _table(header, lines)


def _runs(figures):
    """A line for the ops that were measured together: when and where, and at which levels of ours."""
    levels = {row["op"]: [who for who in row["errors"] if is_ours(who)] for row in figures["rows"]}
    runs = {}
    for name, stamp in figures["stamps"].items():
        when = (stamp["date"], stamp["commit"], f"torch {stamp['torch']}", stamp["device"], ", ".join(levels[name]))
        runs.setdefault(when, []).append(name)
    return "\n".join(f"- {', '.join(names)}: {', '.join(when)}" for when, names in runs.items())


def markdown(figures):
    """The page of these figures."""
    rows = figures["rows"]
    on_logits = [row for row in rows if row["V"] is not None and not differs(row)]
    parts = [
        "# How far each op is from float64",
        f"{len(rows)} results of ops on inputs of every dtype, at each level of instructions that the processor had. "
        "Written by `python -m bench.accuracy --save`; all figures are in accuracy.json, and a test fails when one of ours "
        "grows by more than 10 %.",
        _runs(figures),
        'Errors are absolute, against float64 on the same rounded inputs; ours is that of the worst level. "torch" is '
        'plain torch in float32, "TRL" TRL 0.11.4\'s own functions on float32 copies. A gradient has the dtype of its '
        "input, and its error is mostly that rounding.",
        "![error against V](accuracy.png)",
        "## Ops on logits",
        f"Over V in {sorted({row['V'] for row in on_logits})} and logits of scale "
        f"{sorted({row['scale'] for row in on_logits})}.",
        _by_op([row for row in on_logits if row["offset"] == 0]),
        "## The same with 10,000 added to all logits",
        "In half precision little but the offset is left of the logits.",
        _by_op([row for row in on_logits if row["offset"] != 0]),
        "## Policy and reference of different scale or offset",
        "full_kl, over the same V. Each side is a standard normal times its scale, plus its offset.",
        _by_difference([row for row in rows if differs(row)]),
        "## Ops on per-token tensors",
        _by_op([row for row in rows if row["V"] is None]),
        "## By size, scale and offset, float32",
        _by_size([row for row in rows if not differs(row)]),
    ]
    return "\n\n".join(parts) + "\n"


def plot(figures, path):
    """Plots the largest error against V: float32 logits without an offset, the worst of all scales."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(_PLOTTED), figsize=(11.0, 3.8), layout="constrained", sharey=True)
    styles = {"ours": "k-o", TORCH: "C0--s", NAME: "C1--D"}
    for axes, (op, result) in zip(panels, _PLOTTED):
        rows = [
            row
            for row in figures["rows"]
            if (row["op"], row["result"]) == (op, result)
            and row["dtype"] == "float32"
            and row["offset"] == 0
            and not differs(row)
        ]
        curves = {V: aggregate(group) for (V,), group in grouped(rows, "V").items()}
        for who in styles:
            largest = [errors[who][_LARGEST] for errors in curves.values()]
            axes.plot(list(curves), largest, styles[who], markersize=4, label=who)
        axes.set(xscale="log", yscale="log", xlabel="vocabulary V", title=result)
        axes.grid(linewidth=0.4)
    panels[0].set_ylabel("largest error against float64")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def save(figures, folder=EVIDENCE):
    """Writes accuracy.json, one row a line, accuracy.md and accuracy.png."""
    lines = ",\n".join(json.dumps(row) for row in figures["rows"])
    (folder / "accuracy.json").write_text(f'{{"stamps": {json.dumps(figures["stamps"])},\n"rows": [\n{lines}\n]}}\n')
    (folder / "accuracy.md").write_text(markdown(figures))
    plot(figures, folder / "accuracy.png")


def load(folder=EVIDENCE):
    """What save() wrote."""
    return json.loads((folder / "accuracy.json").read_text())
