"""The plots, as SVG that is readable on light and on dark pages.  Numbers first, so that a changed figure is a stale plot."""

import io
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from bench.peaks import PEAKS
from bench.report.figures import Measurement, beside, headline, measurements, model, step
from bench.rows import FINETUNE, PRETRAIN, Row
from bench.step.pricing import CLASSES

INK = "#6e7781"  # enough contrast on white and on black
COLOURS = dict(
    zip(CLASSES, ("#F0E442", "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#999999", "#C8C8C8"))
)  # distinguishable with every colour vision
OPERATIONS = ("#D55E00", "#009E73", "#CC79A7", "#0072B2")
RIVALS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
OURS, RECIPE = "ours", "imagenet_vit_b"  # the implementation that rivals are held against, and the shapes
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mimir_fast",
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
}
FONTS = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Case(NamedTuple):
    """What is timed, and where; recipe: with the part of the model."""

    op: str
    recipe: str
    shape: str
    dtype: str
    direction: str
    device: str


def svg(draw: Callable[[dict], Figure], numbers: dict) -> str:
    """The same text for the same numbers: no date, fixed names."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        draw(numbers).savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return re.sub(r'font-family: [^;"]*', f"font-family: {FONTS}", "\n".join(lines)) + "\n"


# ---- attainable TFLOP/s over arithmetic intensity


def roofline_numbers(rows: list[Row]) -> dict | None:
    """Of the headline's step: groups with matrix products as (name, FLOP per byte, TFLOP/s, ms), the others' ms."""
    row = headline(rows)
    if row is None:
        return None
    peak, classes, ours = PEAKS[row.record["peaks"]], row.record["classes"], row.record["ours"]
    groups = {name: classes[name] for name in ("GEMM", "attention") if classes[name]["tflop"]}
    groups |= {name: group for name, group in ours.items() if group["tflop"]}
    ours_only = sum(group["bound_ms"] for name, group in ours.items() if not group["tflop"])
    rest = {name: group["bound_ms"] for name, group in classes.items() if not group["tflop"] and group["bound_ms"]}
    return {
        "title": f"{model(row.record['config'])} step on an {row.record['peaks'].upper()}",
        "TB/s": peak.bandwidth / 1e12,
        "roofs": {precision: peak.flops[precision] / 1e12 for precision in ("bf16", "tf32")},
        "points": [
            (name, 1e3 * g["tflop"] / g["gb"], 1e3 * g["tflop"] / g["bound_ms"], g["bound_ms"])
            for name, g in groups.items()
        ],
        "bytes only": {"our other operations": ours_only, **rest},
    }


def draw_roofline(numbers: dict) -> Figure:
    """Groups of the step under the roofs of the GPU; areas are milliseconds."""
    slope = numbers["TB/s"]
    figure, ax = _axes(7.6, 4.2, f"{numbers['title']}: bound, not measured")
    left, right = min([8, *(point[1] / 2 for point in numbers["points"])]), 1500
    bottom = min([20, *(point[2] / 2 for point in numbers["points"])])
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="attainable TFLOP/s")
    ax.set(xlim=(left, right), ylim=(bottom, 1600))
    for (precision, top), line in zip(numbers["roofs"].items(), ("-", "--")):
        ax.plot([1, top / slope, 1e4], [slope, top, top], line, color=INK, linewidth=1.2, zorder=1)
        ax.text(1450, top * 1.04, f"{precision} {top:g} TFLOP/s", ha="right", va="bottom", fontsize=8)
    ax.text(16, slope * 16 * 1.12, f"{slope:.2f} TB/s", rotation=33, fontsize=8, ha="center")
    operations = dict.fromkeys(_both_ways(point[0]) for point in numbers["points"] if point[0] not in CLASSES)
    colours = COLOURS | dict(zip(operations, OPERATIONS))
    for name, intensity, reached, ms in numbers["points"]:
        colour = colours.get(_both_ways(name), INK)
        group, backward = name in CLASSES, name.endswith("_grad")
        ax.scatter(
            intensity, reached, 30 + 14 * ms, marker="o" if group else "v" if backward else "^", zorder=3 + backward,
            facecolors="none" if backward else colour, edgecolors=colour, linewidths=1.5, alpha=0.5 if group else 1,
            label=f"{'all ' if group else ''}{name}: {ms:.1f} ms",
        )  # fmt: skip
    legend = ax.legend(loc="lower right", frameon=False, fontsize=8, title="least time (area)", title_fontsize=8)
    for handle in legend.legend_handles:
        handle.set_sizes([36])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:.0f}")
    ax.grid(which="major", alpha=0.25)
    return figure


# ---- least milliseconds by class of call


def shares_numbers(rows: list[Row], task: str = PRETRAIN) -> dict | None:
    """The headline's step and those that may be put beside it: milliseconds by class."""
    chosen = headline(rows, task)
    if chosen is None:
        return None
    bars = []
    for row in beside(rows, chosen):
        c, parts = row.record["config"], row.record["classes"]
        how = f"{c['residual_dtype']} residual, {'compiled' if c['compile'] else 'eager'}"
        bars.append((f"{model(c)}, {step(row)}\n{how}", {kind: parts[kind]["bound_ms"] for kind in CLASSES}))
    batch = chosen.record["config"]["batch_size"]
    what = "fine-tuning step" if task == FINETUNE else "step"
    return {"title": f"Least time of one {what}, batch {batch}, on an {chosen.record['peaks'].upper()}", "bars": bars}


def draw_shares(numbers: dict) -> Figure:
    """One bar per step, one colour per class."""
    bars = numbers["bars"]
    figure, ax = _axes(7.6, 1.5 + 0.5 * len(bars), f"{numbers['title']}: bound, not measured")
    longest = max(sum(parts.values()) for _, parts in bars)
    for place, (_, parts) in enumerate(bars):
        left = 0.0
        for kind, ms in parts.items():
            ax.barh(place, ms, left=left, height=0.62, color=COLOURS[kind], label=kind if place == 0 else None)
            if ms > 0.045 * longest:
                ax.text(left + ms / 2, place, f"{ms:.1f}", ha="center", va="center", color="black", fontsize=8)
            left += ms
        ax.text(left + 0.01 * longest, place, f"{left:.1f} ms", va="center")
    ax.set(xlabel="ms", xlim=(0, 1.1 * longest), yticks=range(len(bars)), yticklabels=[name for name, _ in bars])
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


# ---- kernels beside their rivals


def rival_cases(rows: list[Row]) -> dict[Case, dict[str, Measurement]]:
    """Implementation -> its milliseconds, measured on a GPU, by case of the headline's recipe."""
    cases: dict[Case, dict[str, Measurement]] = {}
    for m in measurements(rows, "kernels", "ms"):
        r = m.row.record
        if m.on_gpu and r["recipe"].split()[0] == RECIPE:
            shape = " ".join(f"{name}{size}" for name, size in r["config"].items())
            case = Case(r["op"], r["recipe"], shape, r["dtype"], r["direction"], m.row.device)
            cases.setdefault(case, {})[r["impl"]] = m
    return dict(sorted(cases.items()))


def rivals_numbers(rows: list[Row]) -> dict | None:
    """Forward and backward: each implementation's time as a multiple of ours, with its percentiles; None without ours.

    bf16 where an operation has it, otherwise its other dtypes.
    """
    cases = {case: impls for case, impls in rival_cases(rows).items() if OURS in impls and case.direction != "both"}
    in_bf16 = {case.op for case in cases if case.dtype == "bf16"}
    cases = {case: impls for case, impls in cases.items() if case.dtype == "bf16" or case.op not in in_bf16}
    if not cases:
        return None
    devices = ", ".join(dict.fromkeys(case.device for case in cases))
    found = {}
    for case, name in zip(cases, _short_names(cases)):
        ours = cases[case][OURS].reading.value
        found[name] = {"ms": ours, "times": {impl: [v / ours for v in _span(m)] for impl, m in cases[case].items()}}
    return {"title": f"Kernels of {RECIPE} on {devices}, measured", "cases": found}


def _short_names(cases: Iterable[Case]) -> list[str]:
    """With their shape and device only where names would be the same without."""
    words = {case: [case.op, case.recipe.removeprefix(RECIPE).strip(), case.dtype, case.direction] for case in cases}
    alike = Counter(map(tuple, words.values()))
    own = (found + [case.shape, case.device] * (alike[tuple(found)] > 1) for case, found in words.items())
    return [", ".join(word for word in found if word) for found in own]


def _span(m: Measurement) -> list[float]:
    low, high = (m.reading.value if v is None else v for v in (m.reading.low, m.reading.high))
    return [m.reading.value, low, high]


def draw_rivals(numbers: dict) -> Figure:
    """One line per case, one mark per implementation; right of 1 is slower than ours."""
    cases = numbers["cases"]
    figure, ax = _axes(7.6, 1.4 + 0.24 * len(cases), numbers["title"])
    impls = list(dict.fromkeys(impl for case in cases.values() for impl in case["times"]))
    for impl, colour, shape in zip(impls, itertools.cycle(RIVALS), itertools.cycle("osD^vPX*")):
        points = [(place, case["times"][impl]) for place, case in enumerate(cases.values()) if impl in case["times"]]
        places, spans = zip(*points)
        value, low, high = zip(*spans)
        ax.hlines(places, low, high, color=colour, linewidth=2)
        ax.plot(value, places, shape, color=colour, markersize=5, label=impl)
    ax.axvline(1, color=INK, linewidth=1)
    names = [f"{name}: {case['ms']:.3g} ms" for name, case in cases.items()]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="time as a multiple of ours", yticks=range(len(names)), yticklabels=names)
    ax.invert_yaxis()
    ax.grid(axis="x", alpha=0.2)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


SHARES = {PRETRAIN: "shares", FINETUNE: "finetune_shares"}  # task -> file
PLOTS = {
    "roofline": (roofline_numbers, draw_roofline),
    **{name: (partial(shares_numbers, task=task), draw_shares) for task, name in SHARES.items()},
    "rivals": (rivals_numbers, draw_rivals),
}


def _both_ways(name: str) -> str:
    return name.removesuffix("_grad")


def _axes(width: float, height: float, title: str):
    """[inches]"""
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    return figure, ax
