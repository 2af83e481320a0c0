"""The report's figures: curves of a run and the picture grid.  Colours are Okabe and Ito's, told apart by all eyes."""

import io

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from mimir_fast.report_data import Metrics, Samples

BLUE, VERMILION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#555555"
DPI = 150
POINTS = 1500  # drawn per curve, more than its pixels
SMOOTHED_SHARE = 0.02  # of the run, the window of the running mean
FEW = 30  # points from which a curve needs no markers
TILE = 224  # pixels: smaller pictures are enlarged by a whole factor, at most to this side
GAP, HEAD = 8, 40  # pixels between pictures and above them
UNITS = {
    "hsic": "normalised HSIC (no unit)",
    "dib_mi": "mutual information (bits)",
    "renyi2": "mutual information (bits)",
}
GRID_COLUMNS = ("clean", "adversarial", "perturbation × 10", "visible patches", "reconstruction")


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


# ---- curves


def thin(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> dict[str, np.ndarray]:
    """Group consecutive entries of x, y [n] into at most `points` groups: {x, mean, low, high, count} of each.

    NaN in y is left out; a group without a number has NaN and count 0.
    """
    starts = np.unique(np.linspace(0, len(x), min(points, len(x)), endpoint=False).astype(np.int64))
    finite = np.isfinite(y)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    with np.errstate(all="ignore"):
        mean = np.add.reduceat(np.where(finite, y, 0.0), starts) / count  # 0/0 is the NaN of an empty group
        low = np.minimum.reduceat(np.where(finite, y, np.inf), starts)
        high = np.maximum.reduceat(np.where(finite, y, -np.inf), starts)
    empty = count == 0
    low[empty] = high[empty] = np.nan
    return {"x": x[starts], "mean": mean, "low": low, "high": high, "count": count}


def running_mean(mean: np.ndarray, count: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` (odd) groups, each weighted by its count; shorter at both ends, NaN where none counts."""
    half = window // 2
    ones = np.ones(window)
    total = np.convolve(np.where(count > 0, mean, 0.0) * count, ones)[half : half + len(mean)]
    weight = np.convolve(count, ones)[half : half + len(mean)]
    with np.errstate(all="ignore"):
        return np.where(weight > 0, total / weight, np.nan)


def view_limits(y: np.ndarray) -> tuple[float, float]:
    """The range a curve is shown in: all of y, but for outliers three times as far out as the middle 99 % is wide."""
    y = y[np.isfinite(y)]
    low, high = np.percentile(y, [0.5, 99.5])
    width = max(high - low, 1e-6 * max(abs(high), 1e-30))
    low = y.min() if y.min() >= low - 3 * width else low
    high = y.max() if y.max() <= high + 3 * width else high
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def _new_axes(title: str, x_label: str, y_label: str, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, fontweight="semibold")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015)
    if x_label == "update":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _curve(axes: Axes, x: np.ndarray, y: np.ndarray, color: str, label: str, dashed: bool = False) -> None:
    """Every update light (or the range of those that share a pixel), the running mean dark."""
    groups = thin(x, y)
    window = int(SMOOTHED_SHARE * len(groups["x"])) | 1
    style = {"color": color, "linewidth": 1.8, "linestyle": (0, (4, 2)) if dashed else "-", "label": label}
    if len(x) <= FEW:
        axes.plot(groups["x"], groups["mean"], marker="o", markersize=4, **style)
        return
    if len(x) > len(groups["x"]):
        axes.fill_between(groups["x"], groups["low"], groups["high"], color=color, alpha=0.22, linewidth=0)
    else:
        axes.plot(groups["x"], groups["mean"], color=color, alpha=0.3, linewidth=0.8)
    axes.plot(groups["x"], running_mean(groups["mean"], groups["count"], window), **style)


def _frame(axes: Axes, y: np.ndarray) -> None:
    """Set the y range; say how many updates lie outside it."""
    low, high = view_limits(y)
    axes.set_ylim(low, high)
    outside = int(((y < low) | (y > high)).sum())
    if outside:
        peak = y[np.nanargmax(np.abs(y))]
        text = f"{outside:,} update{'s' * (outside > 1)} outside the frame, the farthest at {peak:.3g}"
        axes.annotate(
            text, (1, 1), (0, 3), "axes fraction", textcoords="offset points", ha="right", fontsize=8, color=GREY
        )


def _mark(axes: Axes, x: np.ndarray, label: str) -> None:
    """Crosses on the floor of the axes at x."""
    if len(x):
        low, high = axes.get_ylim()
        axes.set_ylim(low - 0.05 * (high - low), high)
        where = {"transform": axes.get_xaxis_transform(), "color": "black", "clip_on": False, "zorder": 5}
        axes.plot(x, np.full(len(x), 0.025), "x", markersize=5, markeredgewidth=1.2, label=label, **where)


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=9, loc="best")


def loss_figure(metrics: Metrics) -> Figure:
    """Training and reconstruction loss; crosses at updates the optimizer skipped."""
    figure, axes = _new_axes("Loss while training", metrics.x_label, "loss (mean squared error)")
    _curve(axes, metrics.x, metrics["loss"], BLUE, "training loss")
    _curve(axes, metrics.x, metrics["recon"], VERMILION, "reconstruction loss", dashed=True)
    _frame(axes, np.concatenate([metrics["loss"], metrics["recon"]]))
    skipped = metrics.x[metrics.increases("skipped_steps")]
    _mark(axes, skipped, f"updates skipped ({len(skipped):,})")
    _legend(axes)
    return figure


def penalty_figure(metrics: Metrics, kind: str = "") -> Figure:
    """The unweighted penalty; crosses at updates that had to do without it.  kind: --mi_train, for the unit."""
    title = f"Mutual-information penalty, before its weight{f': {kind}' if kind in UNITS else ''}"
    figure, axes = _new_axes(title, metrics.x_label, UNITS.get(kind, "penalty"))
    _curve(axes, metrics.x, metrics["mi"], GREEN, "penalty")
    _frame(axes, metrics["mi"])
    skipped = metrics.x[metrics.increases("skipped_penalties")]
    _mark(axes, skipped, f"penalty skipped ({len(skipped):,} updates)")
    _legend(axes)
    return figure


def lr_figure(metrics: Metrics, warmup_epochs: float = 0.0) -> Figure:
    """The learning rate, with the end of the warm-up if the run got there."""
    figure, axes = _new_axes("Learning rate", metrics.x_label, "learning rate", height=2.8)
    _curve(axes, metrics.x, metrics["lr"], PURPLE, "learning rate")
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(metrics["lr"]))))
    axes.yaxis.set_major_formatter(FuncFormatter(scientific))
    if metrics.x_label == "epoch" and metrics.x.min() < warmup_epochs < metrics.x.max():
        axes.axvline(warmup_epochs, color=GREY, linewidth=1, linestyle=":", label=f"warm-up ends ({warmup_epochs:g})")
        _legend(axes)
    return figure


def scientific(value: float, _position: int = 0) -> str:
    """1.5e-4 for 0.00015, 0 for 0."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def throughput_figure(metrics: Metrics) -> Figure:
    """Images per second; the share of time spent waiting for data on a second axis, where it was measured."""
    figure, axes = _new_axes("Throughput", metrics.x_label, "images per second", height=3.0)
    _curve(axes, metrics.x, metrics["images_per_s"], BLUE, "images per second (left)")
    axes.set_ylim(0, view_limits(metrics["images_per_s"])[1] * 1.12)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.5g}"))
    handles = axes.get_legend_handles_labels()
    if np.isfinite(metrics["data_wait"]).any():
        right = axes.twinx()
        right.spines["top"].set_visible(False)
        right.set_ylabel("waiting for data (% of the time)", color=VERMILION)
        axes.set_ylabel("images per second", color=BLUE)
        _curve(right, metrics.x, 100 * metrics["data_wait"], VERMILION, "waiting for data (right)", dashed=True)
        right.set_ylim(0, 112)
        right.set_yticks(range(0, 101, 20))
        handles = tuple(a + b for a, b in zip(handles, right.get_legend_handles_labels()))
        axes = right
    axes.legend(*handles, frameon=False, fontsize=9, loc="upper right", ncols=2)
    return figure


# ---- pictures


def grid_pictures(samples: Samples) -> np.ndarray:
    """[n,5,H,W,3] in [0,1], in the order of GRID_COLUMNS; numbers that are not finite are black.

    perturbation: 0.5 + 10 (adv - clean).  visible patches: removed ones grey.  reconstruction: the prediction where
    patches were removed, the adversarial picture elsewhere.
    """
    n, _, height, width = samples.clean.shape
    p = samples.patch_size
    removed = samples.removed.reshape(n, 1, height // p, width // p).repeat(p, axis=2).repeat(p, axis=3)
    columns = (
        samples.clean,
        samples.adv,
        0.5 + 10 * (samples.adv - samples.clean),
        np.where(removed, np.float32(0.5), samples.adv),
        np.where(removed, samples.recon, samples.adv),
    )
    pictures = np.nan_to_num(np.stack(columns, axis=1), nan=0.0, posinf=0.0, neginf=0.0)
    return np.clip(pictures, 0, 1).transpose(0, 1, 3, 4, 2)


def compose(pictures: np.ndarray, factor: int, gap: int = GAP) -> np.ndarray:
    """[n,k,H,W,3] -> one picture [rows,columns,3]: enlarged by a whole factor (no blending), white gaps between."""
    big = pictures.repeat(factor, axis=2).repeat(factor, axis=3)
    n, k, height, width, _ = big.shape
    padded = np.ones((n, k, height + gap, width + gap, 3), dtype=big.dtype)
    padded[:, :, :height, :width] = big
    whole = padded.transpose(0, 2, 1, 3, 4).reshape(n * (height + gap), k * (width + gap), 3)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def reconstruction_figure(samples: Samples, rows: int = 8) -> Figure:
    """The grid of up to `rows` images, one screen pixel for one pixel of the composed picture."""
    factor = max(1, TILE // samples.clean.shape[3])
    pictures = grid_pictures(samples)[:rows]
    whole = compose(pictures, factor)
    height, width, _ = whole.shape
    total = height + HEAD + GAP
    figure = Figure(figsize=((width + 2 * GAP) / DPI, total / DPI))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((GAP / (width + 2 * GAP), GAP / total, width / (width + 2 * GAP), height / total))
    axes.imshow(whole, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    tile = pictures.shape[3] * factor
    size = min(11.0, 11.0 * tile / TILE)
    for column, name in enumerate(GRID_COLUMNS):
        axes.annotate(name, (column * (tile + GAP) + tile / 2, 0), (0, 5), textcoords="offset points",
                      ha="center", va="bottom", fontsize=size, annotation_clip=False)  # fmt: skip
    return figure


def has_values(metrics: Metrics, *names: str) -> bool:
    """Whether any of the columns holds a number."""
    return any(np.isfinite(metrics[name]).any() for name in names)
