"""Figures of a run.  Columns are float64 arrays, one value per update; images [n,3,H,W] in [0,1]; mask [n,L], 1 = removed."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mimir_fast.report.drawing import Figure

# Okabe and Ito's colours, which can be told apart with every kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#999999"
# Of removed patches.
GREY_LEVEL = 0.5
MOST_POINTS = 2000
COLUMN_TITLES = ("clean", "adversarial", "perturbation ×10", "visible patches", "reconstruction")
# Those that say something where nothing was attacked.
UNATTACKED = (0, 3, 4)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points: means over equally long stretches, NaN ignored."""
    # A long run has many times more updates than a picture has pixels, and drawing them all takes seconds.
    size = -(-len(x) // MOST_POINTS)
    if size <= 1:
        return x, y
    pad = -len(x) % size
    x, y = (np.pad(v, (0, pad), constant_values=np.nan).reshape(-1, size) for v in (x, y))
    known = np.isfinite(y)
    means = np.where(known, y, 0).sum(1) / np.maximum(known.sum(1), 1)
    return np.nanmean(x, axis=1), np.where(known.any(1), means, np.nan)


def smooth(y: np.ndarray) -> np.ndarray:
    """Running mean over a twentieth of the run, NaN ignored."""
    width = max(1, len(y) // 20)
    known = np.isfinite(y)
    window = np.ones(width)
    total = np.convolve(np.where(known, y, 0), window, mode="same")
    # At the ends and at gaps fewer values are in the window.
    count = np.convolve(known.astype(float), window, mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def axes(ylabel: str):
    """An empty figure with axes in the common style, epochs to the right."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.add_subplot(xlabel="epoch", ylabel=ylabel)
    ax.grid(alpha=0.25)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    return figure, ax


def curve(ax, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """Draw the values lightly and their running mean strongly; fewer than three values as dots."""
    x, y = thin(x, y)
    marker = "o" if np.isfinite(y).sum() < 3 else ""
    ax.plot(x, y, color=colour, alpha=0.25, linewidth=1, marker=marker)
    ax.plot(x, smooth(y), color=colour, linewidth=2, label=label)


def draw_loss(c: dict[str, np.ndarray]) -> Figure:
    figure, ax = axes("masked mean squared error")
    curve(ax, c["epoch"], c["recon"], BLUE, "reconstruction")
    gap = np.nanmax(np.abs(c["loss"] - c["recon"]), initial=0)
    # Below a hundredth the two lines would cover each other.
    if gap > 0.01 * np.nanmax(np.abs(c["recon"]), initial=0):
        curve(ax, c["epoch"], c["loss"], ORANGE, "with penalty")
    ax.legend(frameon=False)
    return figure


def draw_penalty(c: dict[str, np.ndarray]) -> Figure | None:
    """Penalty and where it was skipped; None when the run has no penalty."""
    if not np.isfinite(c["mi"]).any():
        return None
    figure, ax = axes("penalty, unweighted")
    curve(ax, c["epoch"], c["mi"], BLUE, "penalty")
    # From 0, so that a small change of the penalty does not look like a large one.
    ax.set_ylim(bottom=min(0, np.nanmin(c["mi"])))
    # The column counts from the start of the run.
    missing = np.diff(c["skipped_penalties"], prepend=0) > 0
    if missing.any():
        ax.plot(c["epoch"][missing], np.zeros(missing.sum()), "x", color=ORANGE, label="skipped")
        ax.legend(frameon=False)
    return figure


def draw_lr(c: dict[str, np.ndarray]) -> Figure:
    figure, ax = axes("learning rate")
    ax.plot(*thin(c["epoch"], c["lr"]), color=BLUE, linewidth=2, marker="o" if len(c["lr"]) < 3 else "")
    ax.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return figure


def draw_throughput(c: dict[str, np.ndarray]) -> Figure:
    figure, ax = axes("images/s")
    rate = ax.plot(*thin(c["epoch"], c["images_per_s"]), color=BLUE, linewidth=2, label="images/s")
    ax.set_ylim(bottom=0)
    if np.isfinite(c["data_wait"]).any():
        right = ax.twinx()
        x, wait = thin(c["epoch"], 100 * c["data_wait"])
        line = right.plot(x, wait, color=ORANGE, linewidth=1.2, label="waiting for data")
        right.set(ylabel="time waiting for data, %", ylim=(0, 100))
        right.spines["top"].set_visible(False)
        ax.legend(handles=rate + line, frameon=False, loc="best")
    return figure


def draw_training_loss(c: dict[str, np.ndarray]) -> Figure:
    figure, ax = axes("training loss")
    curve(ax, c["epoch"], c["loss"], BLUE, "loss")
    return figure


def draw_accuracy(c: dict[str, np.ndarray]) -> Figure | None:
    """Accuracies of the validations; None before the first one."""
    lines = {"test_acc1": "clean", "robust_acc1": "under attack"}
    held_out = {"val_acc1": "clean, held-out", "val_robust_acc1": "under attack, held-out"}
    if not any(np.isfinite(c[key]).any() for key in lines | held_out):
        return None
    figure, ax = axes("accuracy, %")
    for names, style in ((lines, "-"), (held_out, "--")):
        for (key, label), colour in zip(names.items(), (BLUE, ORANGE)):
            known = np.isfinite(c[key])
            if known.any():
                ax.plot(c["epochs"][known], c[key][known], style, color=colour, linewidth=2, marker="o", label=label)
    ax.set_ylim(0, 100)
    ax.legend(frameon=False)
    return figure


def draw_intervals(names: Sequence[str], groups: Mapping[str, Sequence[tuple[float, float, float] | None]]) -> Figure:
    """Accuracies in percent with their intervals: a group of bars for every name, with one bar for every entry of groups.

    groups   label -> for each name (value, low, high), fractions of 1, or None where there is none
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.add_subplot(ylabel="accuracy, %", ylim=(0, 100))
    width = 0.8 / len(groups)
    for i, ((label, values), colour) in enumerate(zip(groups.items(), (BLUE, ORANGE, GREEN, GREY))):
        known = [(j, *(100 * v for v in value)) for j, value in enumerate(values) if value is not None]
        if not known:
            continue
        at, mid, low, high = (np.array(part, float) for part in zip(*known))
        # errorbar refuses negative lengths, which rounding can give.
        errors = np.clip([mid - low, high - mid], 0, None)
        centres = at + (i - (len(groups) - 1) / 2) * width
        ax.bar(centres, mid, 0.9 * width, yerr=errors, color=colour, label=label, capsize=3, ecolor="#444444")
    ax.set_xticks(range(len(names)), names)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.grid(axis="y", alpha=0.25)
    ax.set_axisbelow(True)
    figure.legend(frameon=False, ncols=len(groups), loc="outside upper center")
    return figure


Figures = dict[str, tuple[str, str, Callable[[dict[str, np.ndarray]], Figure | None]]]
PRETRAIN_FIGURES: Figures = {
    "loss": ("Loss", "Every update lightly, a running mean strongly.", draw_loss),
    "penalty": ("Mutual-information penalty", "Before its weight; × marks updates that left it out.", draw_penalty),
    "lr": ("Learning rate", "Linear warm-up, then half a cosine.", draw_lr),
    "throughput": ("Throughput", "All processes together, read back every --log_every updates.", draw_throughput),
}
FINETUNE_FIGURES: Figures = {
    "loss": ("Loss", "Every update lightly, a running mean strongly.", draw_training_loss),
    "accuracy": ("Accuracy", "After an epoch; solid: test images, dashed: held-out training images.", draw_accuracy),
    "lr": ("Learning rate", "Of the head; linear warm-up, then half a cosine.", draw_lr),
    "throughput": PRETRAIN_FIGURES["throughput"],
}


def grid_images(samples: dict) -> np.ndarray:
    """The five pictures of every sample, [n,5,H,W,3] in [0,1], in the order of COLUMN_TITLES."""
    clean, adv, recon = (np.asarray(samples[key], np.float32) for key in ("clean", "adv", "recon"))
    patch = int(samples["patch_size"])
    rows, cols = clean.shape[2] // patch, clean.shape[3] // patch
    # One entry per patch -> one per pixel.
    removed = np.asarray(samples["mask"]).reshape(-1, rows, cols).repeat(patch, 1).repeat(patch, 2)[:, None] > 0.5
    # The perturbation is amplified around mid-grey: a few 255ths cannot be seen.  Kept patches are shown as they are: nothing
    # trains their predictions.
    pictures = [
        clean,
        adv,
        np.clip(0.5 + 10 * (adv - clean), 0, 1),
        np.where(removed, GREY_LEVEL, adv),
        np.where(removed, recon, adv),
    ]
    return np.stack(pictures, axis=1).transpose(0, 1, 3, 4, 2).clip(0, 1)


def attacked(samples: dict) -> bool:
    """Whether the samples' images were attacked."""
    return not np.array_equal(samples["clean"], samples["adv"])


def draw_reconstructions(samples: dict) -> Figure:
    """One row per image, one column per picture; without an attack none of the adversarial image and the perturbation."""
    shown = range(len(COLUMN_TITLES)) if attacked(samples) else UNATTACKED
    grid = grid_images(samples)[:, list(shown)]
    figure = Figure(figsize=(1.6 * len(shown), 1.62 * len(grid) + 0.3), layout="constrained")
    for row, pictures in enumerate(grid):
        for col, (number, picture) in enumerate(zip(shown, pictures)):
            ax = figure.add_subplot(len(grid), len(shown), row * len(shown) + col + 1)
            ax.imshow(picture, interpolation="nearest")
            ax.set_axis_off()
            if row == 0:
                ax.set_title(COLUMN_TITLES[number], fontsize=10)
    return figure
