"""Data sets stored as arrays: CIFAR pickles, SVHN .mat, generated images in .npz, scikit-learn's digits."""

import pickle
import socket
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from mimir_fast.data.errors import DataError
from mimir_fast.data.sources import ArrayImages

# What pickle, zipfile, numpy and scipy raise on damaged files.
READ_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    AttributeError,
    NotImplementedError,
    ImportError,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
CIFAR10_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "val": ["test_batch"]}
CIFAR100_FILES = {"train": ["train"], "val": ["test"]}
# Folder, files by split, and the key of the labels.
CIFAR = {
    "cifar10": ("cifar-10-batches-py", CIFAR10_FILES, "labels"),
    "cifar100": ("cifar-100-python", CIFAR100_FILES, "fine_labels"),
}
CIFAR_NAMES = {"labels": ("batches.meta", "label_names"), "fine_labels": ("meta", "fine_label_names")}
SVHN_FILES = {"train": "train_32x32.mat", "val": "test_32x32.mat"}
# Of 1797; the later ones were written by other people.
DIGITS_TRAIN = 1500
# Seconds without an answer.
DOWNLOAD_TIMEOUT = 20

# All that a pickled array of numbers needs: a pickle that may name other globals can run any code.
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_SAFE_GLOBALS = {
    # numpy 1 and numpy 2 name the same function differently.
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    # Old pickles hold bytes as text that is to be encoded.
    ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
}


class _ArrayUnpickler(pickle.Unpickler):
    """Loads dicts, lists and numpy arrays only."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a data file")
        return _SAFE_GLOBALS[module, name]


def _checked(images: np.ndarray, labels: np.ndarray, path: Path, advice: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N,H,W,3] and labels int64 [N], or DataError naming the file."""
    labels = np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or len(images) == 0:
        raise DataError(f"{path}: expected images uint8 [N,H,W,3], got {images.dtype} {list(images.shape)}; {advice}")
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: expected {len(images)} integer labels, got {labels.dtype} {list(labels.shape)}; {advice}"
        )
    return images, labels.astype(np.int64)


@contextmanager
def _reading(path: Path, advice: str):
    """Context in which the errors that a damaged file causes become a DataError naming it."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; {advice}") from error
    except READ_ERRORS as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"{path}: cannot be read ({reason}); {advice}") from error


def read_cifar(folder: Path, files: list[str], label_key: str) -> ArrayImages:
    """The python-version batches of CIFAR-10 or CIFAR-100, label_key "labels" or "fine_labels".  Raises DataError."""
    images, labels = [], []
    advice = f"remove {folder} to download it again"
    for path in (folder / name for name in files):
        with _reading(path, advice):
            with path.open("rb") as file:
                # Python 2 wrote these pickles: latin1 decodes its byte strings, which hold the arrays.
                batch = _ArrayUnpickler(file, encoding="latin1").load()
            # A row is an image's red plane, then the green one, then the blue one.
            rows = np.asarray(batch["data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            part = _checked(rows, batch[label_key], path, advice)
        images.append(part[0])
        labels.append(part[1])
    return ArrayImages(
        np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels), classes=_cifar_names(folder, label_key)
    )


def _cifar_names(folder: Path, label_key: str) -> list[str] | None:
    """The class names beside the batches, None if the file is not there."""
    file, key = CIFAR_NAMES[label_key]
    if not (folder / file).is_file():
        return None
    with _reading(folder / file, f"remove {folder} to download it again"), (folder / file).open("rb") as content:
        return [str(name) for name in _ArrayUnpickler(content, encoding="latin1").load()[key]]


def read_svhn(path: Path) -> ArrayImages:
    """SVHN's cropped digits in a .mat file: X [32,32,3,N], y [N,1] with 10 for the digit 0.  Raises DataError."""
    # scipy, like scikit-learn below, is slow to import.
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    advice = f"remove {path} to download it again"
    with _reading(path, advice):
        try:
            content = loadmat(path, variable_names=("X", "y"))
        # Of no class that _reading knows, and importing scipy for its name would slow down all that read no .mat.
        except MatReadError as error:
            raise ValueError(error) from error
        images = np.ascontiguousarray(np.moveaxis(content["X"], -1, 0))
        images, labels = _checked(images, content["y"].reshape(-1) % 10, path, advice)
    return ArrayImages(images, labels)


def read_npz(path: Path, field: str) -> ArrayImages:
    """Arrays `image` uint8 [N,H,W,3] and `label` int [N] of an .npz file.

    field   the flag that named the file
    Raises DataError naming the field and the file.
    """
    advice = "expected an .npz file with arrays image (uint8 [N,H,W,3]) and label (int [N])"
    try:
        with _reading(path, advice), np.load(path, allow_pickle=False) as content:
            images, labels = _checked(content["image"], content["label"], path, advice)
    except DataError as error:
        raise DataError(f"{field}: {error}") from error
    return ArrayImages(images, labels)


def read_digits(split: str) -> ArrayImages:
    """scikit-learn's 8x8 handwritten digits, enlarged to 32x32 RGB; train: the first 1500, val: the other 297."""
    from sklearn.datasets import load_digits

    # 0 to 16
    grey, labels = load_digits(return_X_y=True)
    grey = np.rint(grey.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    part = slice(None, DIGITS_TRAIN) if split == "train" else slice(DIGITS_TRAIN, None)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in grey[part]]
    return ArrayImages(np.repeat(np.stack(large)[..., None], 3, axis=-1), labels[part])


def download(fetch: Callable[[], object], data_root: Path, wanted: str) -> None:
    """Call fetch, which downloads into data_root.  Raises DataError that says what to put there instead."""
    # torchvision passes no timeout on: without a default one a dead connection would wait for ever.
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        fetch()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(
            f"data_root: {data_root} does not contain {wanted}, and the download failed ({reason})"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
