"""Records of an evaluation: the outcome of an attack for every image, and results.json.  N images."""

import glob
import json
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mimir_fast.checkpoints.atomic import move, write_atomically, write_text_atomically
from mimir_fast.checkpoints.errors import CheckpointError

# Larger than any number of rounds.
ROBUST = 127


class Record:
    """One attack on N images: which are broken, by which round, and what is left to do.

    An attack has rounds (restarts, AutoAttack's parts); each attacks the images that those before it did not break.
    indices int64    the images' indices in the data set
    label int64      -1: not read yet
    broken int8      0: misclassified unattacked; r: misclassified after round r; ROBUST: not (yet) broken
    rounds int8      rounds that the image went through
    prediction int32 predicted class after the last round it went through, -1: none
    loss float32     highest cross-entropy after a round, NaN: none
    seconds          time spent so far, of all processes together

    Of several processes the first keeps the whole in `path`; the others keep what they do in a round in PATH.part-RANK until
    its end.
    """

    # Names on disk -> attributes.  The indices keep the name that earlier versions wrote.
    ARRAYS: ClassVar = {
        "number": "indices",
        **{name: name for name in ("label", "broken", "rounds", "prediction", "loss")},
    }

    def __init__(self, path: Path, indices: np.ndarray, correct: np.ndarray | bool = True):
        """correct: bool [N], whether the image is classified correctly unattacked, as far as is known."""
        n = len(indices)
        self.path, self.seconds = path, 0.0
        self.indices = np.asarray(indices, np.int64)
        self.label, self.prediction = np.full(n, -1, np.int64), np.full(n, -1, np.int32)
        self.broken = np.where(np.broadcast_to(correct, n), ROBUST, 0).astype(np.int8)
        self.rounds, self.loss = np.zeros(n, np.int8), np.full(n, np.nan, np.float32)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]: classified correctly unattacked and after every round so far."""
        return self.broken == ROBUST

    def reached(self, round: int, everything: bool = False) -> np.ndarray:
        """bool [N]: images that a round (from 1) attacks; everything: broken ones too."""
        # >= and not ==: an image that this round itself broke belongs to it.
        return np.ones(len(self.indices), bool) if everything else self.broken >= round

    def left(self, round: int, everything: bool = False) -> np.ndarray:
        """Rows that a round has still to attack, ascending."""
        return np.flatnonzero(self.reached(round, everything) & (self.rounds < round))

    def note(
        self, rows: np.ndarray, round: int, labels: np.ndarray, predictions: np.ndarray, losses: np.ndarray
    ) -> None:
        """Enter the outcome of a round for some rows."""
        newly = self.correct[rows] & (predictions != labels)
        self.broken[rows] = np.where(newly, round, self.broken[rows])
        self.rounds[rows], self.label[rows], self.prediction[rows] = round, labels, predictions
        # fmax ignores the NaN that stands for no loss.
        self.loss[rows] = np.fmax(self.loss[rows], losses)

    def arrays(self) -> dict[str, Any]:
        """The arrays by their names on disk."""
        return {stored: getattr(self, name) for stored, name in self.ARRAYS.items()}

    def take(self, arrays: dict[str, Any]) -> bool:
        """Take over the images that another process brought farther, from its arrays; returns whether there are any."""
        farther = arrays["rounds"] > self.rounds
        for stored, name in self.ARRAYS.items():
            setattr(self, name, np.where(farther, arrays[stored], getattr(self, name)))
        return bool(farther.any())

    def part(self, rank: int) -> Path:
        """Where a process other than the first keeps what it does in a round."""
        return self.path.with_name(f"{self.path.name}.part-{rank}")

    def save(self) -> None:
        """Write atomically.  Raises OSError if the disk refuses."""
        # Into an open file: to a name without its ending numpy would add .npz, and the rename would miss it.
        write_atomically(self.path, lambda file: np.savez_compressed(file, seconds=self.seconds, **self.arrays()))

    def resume(self) -> bool:
        """Read the file, and what other processes left beside it when they were stopped; returns whether there is any.

        Raises CheckpointError if a file is damaged or about other images.
        """
        left = sorted(self.path.parent.glob(f"{glob.escape(self.path.name)}.part-*"))
        # A kill while a part was written leaves its temporary file.
        parts = [path for path in left if path.suffix != ".tmp"]
        whole = [self.path] if self.path.exists() else []
        for path in whole:
            arrays, self.seconds = self._read(path)
            for stored, name in self.ARRAYS.items():
                setattr(self, name, arrays[stored])
        for path in parts:
            arrays, seconds = self._read(path)
            # A part that brings nothing was taken in before a kill that left it there: its time is counted already.
            self.seconds += seconds if self.take(arrays) else 0.0
        if parts:
            self.save()
        # When the whole is on the disk.
        for path in left:
            path.unlink()
        return bool(whole or parts)

    def _read(self, path: Path) -> tuple[dict[str, Any], float]:
        try:
            with np.load(path) as stored:
                arrays = {name: stored[name] for name in self.ARRAYS}
                seconds = float(stored["seconds"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"output_dir: {path} is damaged ({error}); remove it to begin again") from error
        # Rows are matched by position: with other images they would be another image's outcome.
        if not np.array_equal(arrays["number"], self.indices):
            raise CheckpointError(f"output_dir: {path} is about other images; remove it or take another output_dir")
        return arrays, seconds


class Results:
    """results.json of a folder: one entry per attack and its settings, all about the same model and images.

    identity   what they are, a dictionary with the hashes "model" and "images" in it
    Results of another model or other images are moved to set_aside/HASHES, and back when they are asked for again; `note` says
    so, else it is empty.  Raises CheckpointError for a damaged results.json, or if there are records without one.
    """

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.path, self.note = folder, folder / "results.json", ""
        found = self._read()
        mine = _key(identity)
        if found is not None and _key(found["identity"]) != mine:
            target = folder / "set_aside" / _key(found["identity"])
            # In this order, and back in the other: a kill between two moves leaves no records without the results.json that
            # says whose they are.
            _move(folder, target, ("per_image", "results.json"))
            self.note = f"output_dir: the results there were of another model or other images; they are in {target}"
            found = None
        if found is None and (folder / "set_aside" / mine).is_dir():
            _move(folder / "set_aside" / mine, folder, ("results.json", "per_image"))
            (folder / "set_aside" / mine).rmdir()
            found = self._read()
        if found is None and self.record_path("").parent.is_dir():
            raise CheckpointError(
                f"output_dir: {self.record_path('').parent} is there without the results.json that says of which model; "
                "move it away"
            )
        self.data = {"identity": identity, "attacks": {}, "checks": [], **(found or {})}
        # Of two equal hashes the newer words, such as the path of a model that has moved.
        self.data["identity"] = identity
        self.save()

    def _read(self) -> dict | None:
        if not self.path.exists():
            return None
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            _key(data["identity"])
            data["attacks"].keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"output_dir: {self.path} is no results file of ours ({error}); move it away"
            ) from error
        return data

    def save(self) -> None:
        """Write results.json.  Raises OSError if the disk refuses."""
        write_text_atomically(self.path, json.dumps(self.data, indent=1) + "\n")

    def record_path(self, key: str) -> Path:
        """Path of the record of an attack with this key."""
        return self.folder / "per_image" / (key.replace(" ", "_") + ".npz")


def _key(identity: dict) -> str:
    # 48 bits of each hash: enough to tell the few models of one folder apart, and a name that people can still read.
    return f"{identity['model']['hash'][:12]}-{identity['images']['hash'][:12]}"


def _move(source: Path, target: Path, names: tuple[str, str]) -> None:
    for name in names:
        if (source / name).exists():
            move(source / name, target / name)
