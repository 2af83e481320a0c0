"""Figure of the study: accuracies of the compared arms, seed by seed; what each factor changes; information of the features."""

from examples.study.plan import MIMIR, Study
from examples.study.statistics import Interval, interval, paired
from examples.study.tables import ESTIMATES, STAGES, accuracies, arms, estimates
from mimir_fast.report.drawing import Figure
from mimir_fast.report.figures import BLUE, GREEN, GREY, ORANGE

COLOURS = {"clean": BLUE, "PGD-20": ORANGE}
STAGE_COLOURS = {"pretrain": GREEN, "finetune": GREY}
SHOWN = (("x", "renyi_2"), ("delta", "renyi_2"))


def draw(study: Study, rows: list[dict]) -> Figure:
    """Above: mean over the seeds with its 95 % interval, and every seed; paired differences to MIMIR's usual values.

    Below: estimates of the information that the features have of images and of perturbations.
    """
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    (left, right), below = figure.subplots(2, 2)
    _draw_arms(left, study, rows)
    _draw_factors(right, study, rows)
    for ax, estimate in zip(below, SHOWN):
        _draw_information(ax, study, rows, estimate)
    for ax in (left, right, *below):
        ax.grid(axis="x", alpha=0.25)
        ax.invert_yaxis()
        for side in ("top", "right"):
            ax.spines[side].set_visible(False)
    for ax in (left, below[0]):
        ax.legend(frameon=False, fontsize=9)
    return figure


def _draw_arms(ax, study: Study, rows: list[dict]) -> None:
    """A line for every arm."""
    for place, (column, colour) in enumerate(COLOURS.items()):
        values = accuracies(rows, column)
        for line, arm in enumerate(arms(study)):
            seeds = list(values[arm.name].values())
            height = line + 0.24 * place - 0.12
            ax.plot(seeds, [height] * len(seeds), ".", color=colour, alpha=0.4)
            _bar(ax, interval(seeds), height, colour, column if line == 0 else "_")
    ax.set_yticks(range(len(arms(study))), [arm.title for arm in arms(study)])
    ax.set_xlabel("accuracy [%]")


def _draw_factors(ax, study: Study, rows: list[dict]) -> None:
    """A line for every value of a factor other than MIMIR's."""
    lines = [(f, v, arm) for f, values in study.factors.items() for v, arm in values.items() if arm != MIMIR.name]
    for place, (column, colour) in enumerate(COLOURS.items()):
        values = accuracies(rows, column)
        for line, (_, _, arm) in enumerate(lines):
            shared = {seed: values[arm][seed] for seed in range(study.varied[1])}
            _bar(ax, paired(shared, values[MIMIR.name]), line + 0.24 * place - 0.12, colour, "_")
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_yticks(range(len(lines)), [f"{factor}: {value}" for factor, value, _ in lines], fontsize=8)
    ax.set_xlabel(f"difference to {MIMIR.title} [points]")


def _draw_information(ax, study: Study, rows: list[dict], estimate: tuple[str, str]) -> None:
    """A line for every arm; estimate: variable and estimator."""
    titles = [arm.title for arm in arms(study)]
    for place, (stage, colour) in enumerate(STAGE_COLOURS.items()):
        label = f"after {STAGES[stage]}"
        for title, values in estimates(study, rows, stage).items():
            height = titles.index(title) + 0.24 * place - 0.12
            _bar(ax, interval([v[estimate[0]][estimate[1]] for v in values]), height, colour, label)
            label = "_"
    ax.set_yticks(range(len(titles)), titles)
    ax.set_xlabel(f"excess {ESTIMATES[estimate]}")


def _bar(ax, value: Interval, height: float, colour: str, label: str) -> None:
    error = [[value.mean - value.low], [value.high - value.mean]]
    ax.errorbar([value.mean], [height], xerr=error, fmt="o", color=colour, markersize=5, capsize=3, label=label)
