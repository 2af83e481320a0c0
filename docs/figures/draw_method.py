"""Draw method.png from the samples of a pre-training run.

mimir-fast pretrain --recipe digits_demo --patch_size 4 --epochs 30 --warmup_epochs 3 --output_dir runs/method --log_dir ""
python docs/figures/draw_method.py runs/method/samples.npz
"""

import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

ROWS = 3
GREY = 0.5


def columns(samples: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Title -> images [n,3,H,W] in [0,1]; samples: what a run keeps in samples.npz."""
    clean, adv, side = samples["clean"], samples["adv"], int(samples["patch_size"])
    grid = clean.shape[-1] // side
    removed = samples["mask"].reshape(-1, 1, grid, grid).repeat(side, axis=2).repeat(side, axis=3).astype(bool)
    return {
        "clean image": clean,
        "perturbation × 10": 0.5 + 10 * (adv - clean),
        "adversarial image": adv,
        "the encoder sees": np.where(removed, GREY, adv),
        "reconstruction": samples["recon"],
        "target: clean": np.where(removed, clean, GREY),
    }


def draw(samples: dict[str, np.ndarray]) -> Figure:
    shown = columns(samples)
    figure = Figure(figsize=(8.4, 1.5 * ROWS), layout="constrained")
    axes = figure.subplots(ROWS, len(shown))
    for column, (title, images) in zip(axes.T, shown.items()):
        column[0].set_title(title, fontsize=9)
        for ax, image in zip(column, images):
            ax.imshow(image.transpose(1, 2, 0).clip(0, 1), interpolation="nearest")
            ax.set_axis_off()
    return figure


if __name__ == "__main__":
    with np.load(sys.argv[1]) as file:
        figure = draw(dict(file))
    figure.savefig(Path(__file__).with_name("method.png"), dpi=110)
