"""Figure of an analysis: a row of panels for every series of checkpoints."""

from collections.abc import Sequence

from mimir_fast.analyze.entries import FILES, VARIABLES
from mimir_fast.analyze.estimates import ESTIMATORS
from mimir_fast.report.drawing import Figure
from mimir_fast.report.figures import BLUE, GREY, ORANGE

GREEN, PURPLE = "#009E73", "#CC79A7"
STYLES = {"x": (BLUE, "o", "I(x;z)"), "x_adv": (ORANGE, "s", "I(x_adv;z)"), "delta": (GREEN, "^", "I(δ;z)")}
TITLES = {"nhsic": "nHSIC", "renyi_1.01": "matrix Rényi, order 1.01 [bit]", "renyi_2": "matrix Rényi, order 2 [bit]"}
# On a horizontal axis.
MOST_LABELS = 8


def draw(results: list[dict]) -> Figure:
    """Draw the excess information by estimator, and bounds; a run's checkpoints at their epochs, joined by lines."""
    series = {result["series"]: [r for r in results if r["series"] == result["series"]] for result in results}
    figure = Figure(figsize=(15, 3.9 * len(series) + 0.5), layout="constrained")
    rows = figure.subfigures(len(series), 1, squeeze=False)[:, 0]
    for row, (name, members) in zip(rows, series.items()):
        models = dict.fromkeys(member["model"] for member in members)
        row.suptitle(f"{name} ({', '.join(models)})", fontsize=11)
        axes = row.subplots(1, len(ESTIMATORS) + 1)
        positions, labels = places(members)
        for ax, estimator in zip(axes, ESTIMATORS):
            _draw_estimator(ax, positions, members, estimator)
        _draw_bounds(axes[-1], positions, members)
        for ax in axes:
            _dress(ax, positions, labels)
            if name == FILES:
                _unjoin(ax)
        handles, words = axes[0].get_legend_handles_labels()
        more = axes[-1].get_legend_handles_labels()
        row.legend(handles + more[0], words + more[1], loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    return figure


def places(members: list[dict]) -> tuple[list[float], list[str] | None]:
    """Positions of checkpoints on the horizontal axis, and their names; None in place of names: positions are epochs."""
    epochs = [member["epoch"] for member in members]
    if members[0]["series"] != FILES and len(members) > 1 and None not in epochs and len(set(epochs)) == len(epochs):
        return [float(epoch) for epoch in epochs], None
    # A source may end in a word in brackets: x.pth (model_ema).
    stems = [member["checkpoint"].split("/")[-1].split(" ")[0].rsplit(".", 1)[0] for member in members]
    # Files of one name in several folders are told apart by their folders.
    if len(set(stems)) < len(stems):
        stems = ["/".join(member["checkpoint"].split(" ")[0].split("/")[-2:]) for member in members]
    return [float(i) for i in range(len(members))], stems


def _draw_estimator(ax, positions: list[float], members: list[dict], estimator: str) -> None:
    ax.set_title(f"excess, {TITLES[estimator]}", fontsize=10)
    ax.axhline(0, color=GREY, linewidth=0.8)
    for place, variable in enumerate(VARIABLES):
        colour, marker, label = STYLES[variable]
        numbers = [member["information"][variable][estimator]["excess"] for member in members]
        _points(ax, _beside(positions, place - 1), numbers, colour, marker, label)


def _draw_bounds(ax, positions: list[float], members: list[dict]) -> None:
    ax.set_title("bounds [bit]", fontsize=10)
    _points(ax, positions, [m["entropy"]["renyi_1.01"] for m in members], PURPLE, "v", "H(z), order 1.01 (estimate)")
    known = [(place, member["fano"]) for place, member in zip(positions, members) if member["fano"]]
    if known:
        at, bounds = zip(*known)
        for shift, (name, colour, marker) in enumerate((("clean", BLUE, "o"), ("adversarial", ORANGE, "s"))):
            label = f"I(y;ŷ) ≥, {name} (Fano)"
            _points(ax, _beside(at, shift), [bound[name] for bound in bounds], colour, marker, label, ":")
        entropies = [bound["clean"]["label_entropy"] for bound in bounds]
        ax.plot(at, entropies, color=GREY, marker="_", linestyle="--", label="H(y)")
    ax.margins(y=0.1)
    ax.set_ylim(bottom=0)


def _beside(positions: Sequence[float], place: int) -> list[float]:
    """Positions moved a little to the left (-1) or right (1)."""
    # So that intervals of several variables do not hide each other.
    shift = 0.012 * ((max(positions) - min(positions)) or 1) * place
    return [position + shift for position in positions]


def _points(ax, positions, numbers: list[dict], colour: str, marker: str, label: str, line: str = "-") -> None:
    values = [number["value"] for number in numbers]
    # errorbar refuses negative lengths, which rounding can give.
    below = [max(0.0, value - number["interval"][0]) for value, number in zip(values, numbers)]
    above = [max(0.0, number["interval"][1] - value) for value, number in zip(values, numbers)]
    ax.errorbar(
        positions,
        values,
        yerr=[below, above],
        color=colour,
        marker=marker,
        linestyle=line,
        markersize=5,
        capsize=3,
        linewidth=1.5,
        elinewidth=1.2,
        label=label,
    )


def _unjoin(ax) -> None:
    """Remove the lines between points."""
    # Checkpoints of different runs have no order.
    for container in ax.containers:
        container[0].set_linestyle("none")


def _dress(ax, positions: list[float], labels: list[str] | None) -> None:
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=9)
    if labels is None:
        ax.set_xlabel("epoch", fontsize=9)
        return
    step = -(-len(labels) // MOST_LABELS)
    slanted = {"rotation": 20, "ha": "right"} if len(labels) > 1 else {}
    ax.set_xticks(positions[::step], labels[::step], **slanted)
    ax.set_xlim(-0.6, len(labels) - 0.4)
