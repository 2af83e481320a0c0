"""mimir-fast demo: the whole method on handwritten digits, in minutes on two CPU cores.  Also `python -m mimir_fast.demo`."""

import argparse
import sys

from mimir_fast.cli.errors import guarded
from mimir_fast.config.fields import home_path
from mimir_fast.demo.arms import MODEL, SIDE
from mimir_fast.demo.run import demo


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mimir-fast demo",
        description="Pre-train with and without the attack, fine-tune three classifiers alike (from scratch, from the masked "
        "autoencoder, from MIMIR), attack them, and write one page. Handwritten digits, no download, 3 to 8 minutes on two "
        "CPU cores. Stopped or killed, the same command goes on where it was.",
    )
    add = parser.add_argument
    folder = "folder of all runs (default: %(default)s)"
    add("--output_dir", default="runs/demo", metavar="FOLDER", type=home_path, help=folder)
    add("--seed", type=int, default=0, help="seed of all runs (default: %(default)s)")
    model = "classifier of any family, vit_nano takes minutes (default: %(default)s)"
    add("--model", default=MODEL, metavar="NAME", help=model)
    side = "side of the images [pixels]; a Swin wants 128, its masks are of units of 32 (default: %(default)s)"
    add("--input_size", type=int, default=SIDE, metavar="N", help=side)
    add(
        "--aa_images",
        type=int,
        default=8,
        metavar="N",
        help="test images that AutoAttack gets [images]; 0: leave AutoAttack out (default: %(default)s)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run what is left of the demo; returns the exit status: 0 done, else that of the command that ended early."""
    args = build_parser().parse_args(argv)
    return guarded("mimir-fast demo", lambda: demo(args), "stopped; the same command goes on from there")


if __name__ == "__main__":
    sys.exit(main())
