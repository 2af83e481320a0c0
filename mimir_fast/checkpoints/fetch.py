"""Sources of checkpoints: a path, or a URL that is downloaded once."""

import hashlib
from pathlib import Path, PurePosixPath
from stat import S_ISDIR
from urllib.error import URLError
from urllib.parse import urlsplit

import torch

from mimir_fast.checkpoints.errors import CheckpointError


def is_url(source: str) -> bool:
    """Whether a source is a URL."""
    return source.startswith(("https://", "http://"))


def beside(source: str, folder: str) -> Path:
    """Path for results about a checkpoint: folder/NAME beside the file, or in the working directory for a URL."""
    path = PurePosixPath(source) if is_url(source) else Path(source)
    # A download lies in torch.hub's cache, which is no place for results.
    return (Path() if is_url(source) else Path(source).parent) / folder / path.stem


def local_file(source: str, flag: str) -> Path:
    """The path of a file; of a URL its copy in torch.hub's folder, downloaded the first time.

    flag   the flag that named it, for messages
    Raises CheckpointError if there is no such file, if it is a folder, or if it could not be downloaded.
    """
    try:
        path = _fetched(source) if is_url(source) else Path(source)
        if S_ISDIR(path.stat().st_mode):
            raise CheckpointError(f"{flag}: {source} is a folder; name a file in it")
    except URLError as error:
        raise CheckpointError(f"{flag}: {source} could not be fetched ({error})") from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{flag}: no file {source}") from error
    except OSError as error:
        raise CheckpointError(f"{flag}: {source} cannot be read ({error})") from error
    return path


def _fetched(source: str) -> Path:
    name = PurePosixPath(urlsplit(source).path).name
    # Many files are called checkpoint-99.pth.
    digest = hashlib.sha256(source.encode()).hexdigest()[:16]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{digest}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # It writes beside the path and renames: a download that was stopped leaves no file of this name.
        torch.hub.download_url_to_file(source, str(path))
    return path
