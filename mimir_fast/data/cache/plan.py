"""The plan of a cache: what it is to be made of, kept beside the shards until it is complete; and the space it takes."""

import json
from dataclasses import asdict
from pathlib import Path

from PIL import __version__ as pillow
from PIL import features

from mimir_fast import __version__
from mimir_fast.checkpoints.atomic import remove_temporaries, write_text_atomically
from mimir_fast.checkpoints.lock import NAME as LOCK
from mimir_fast.data.cache.encoding import PARTIAL
from mimir_fast.data.cache.format import Options
from mimir_fast.data.cache.originals import Originals, fingerprint, sampled_bytes
from mimir_fast.data.cache.pixels import reduced_size, stored_bytes
from mimir_fast.data.cache.staging import free_bytes
from mimir_fast.data.crops import evaluated_side
from mimir_fast.data.errors import DataError

# Headers that are read to tell the size beforehand.
SAMPLE = 1000
PLAN = "plan.json"


def make_plan(originals: Originals, options: Options) -> dict:
    """What decides the bytes of a cache."""
    decoder = f"libjpeg-turbo {features.version('libjpeg_turbo')}"
    return {
        "options": asdict(options),
        "source_fingerprint": fingerprint(originals),
        "classes": originals.classes,
        "versions": {"mimir_fast": __version__, "pillow": pillow, "decoder": decoder},
    }


def estimated_bytes(originals: Originals, options: Options) -> int:
    """Bytes of all shards, from the headers of a sample."""

    def stored(width: int, height: int) -> int:
        if options.input_size:
            shorter = evaluated_side(options.input_size)
            sides = shorter, shorter * max(width, height) // min(width, height)
        else:
            sides = reduced_size(width, height, options.size)
        return stored_bytes(options.pixels, sides[1], sides[0])

    return round(sampled_bytes(originals, SAMPLE, stored) * len(originals))


def begin(folder: Path, plan: dict, originals: Originals) -> None:
    """Write the plan, or compare it with the one that is there, and remove parts of shards."""
    if (folder / PLAN).exists():
        check_plan(folder, json.loads((folder / PLAN).read_text(encoding="utf-8")), plan, originals)
    elif any(path.name != LOCK for path in folder.iterdir()):
        raise DataError(f"dst: {folder} holds other files; choose another folder")
    write_text_atomically(folder / PLAN, json.dumps(plan) + "\n", "dst")
    # Nobody writes here now: the build holds the folder's lock.
    remove_temporaries(folder)
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()


def check_plan(folder: Path, found: dict, plan: dict, originals: Originals) -> None:
    """Raise DataError naming what differs between what is there and what is asked for."""
    for name, value in plan["options"].items():
        if found["options"][name] != value:
            raise DataError(
                f"{'format' if name == 'pixels' else name}: {folder} was made with {found['options'][name]}, not {value}; "
                "pass the same, or choose another DST"
            )
    for name in ("classes", "source_fingerprint"):
        if found[name] != plan[name]:
            what = "other classes" if name == "classes" else "other images"
            raise DataError(
                f"src: {originals.where} has {what} than {folder} was made of; choose another DST, or remove it"
            )
    # Another decoder or filter gives other pixels, in a part of the shards.
    if found["versions"] != plan["versions"]:
        raise DataError(
            f"dst: {folder} was begun with {found['versions']}, this is {plan['versions']}: images would differ; "
            "remove it to begin again"
        )


def check_space(folder: Path, originals: Originals, options: Options) -> None:
    """Raise DataError if the shards that are missing do not fit."""
    there = sum(path.stat().st_size for path in folder.glob("shard-*.bin"))
    needed, free = estimated_bytes(originals, options) - there, free_bytes(folder)
    if needed > free:
        raise DataError(
            f"dst: {folder} needs about {needed / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free; "
            "make room, or choose a smaller --size"
        )
