"""Files as they lie on the disk: what kind a file is, whether it is whole, and the objects in it.

Only tensors, plain values, argparse.Namespace, numpy's scalars and paths are read; no code in a file is ever run.
"""

import errno
import json
import pickle
import re
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mimir_fast.checkpoints.errors import CheckpointError
from mimir_fast.checkpoints.hashing import tensors_hash
from mimir_fast.checkpoints.unpickling import Loaded, unpickled

# Keys of the metadata in a .safetensors of ours: as JSON, the args that tensors cannot tell; the hash of the tensors.
METADATA, CHECKSUM = "mimir_fast", "mimir_fast_sha256"
# First bytes of files that are often found under a checkpoint's name.
LFS_POINTER, HTML_PAGE = b"version https://git-lfs", re.compile(rb"\s*<(!doctype\s+html|html)", re.IGNORECASE)
# Of an archive's member, read at once to verify it.
PIECE = 2**24


def parsed(path: Path) -> Loaded:
    """The object in a file; of a .safetensors its parameters and args as a checkpoint holds them.

    Raises CheckpointError that says what the file is, or what is damaged, without naming it.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(512)
            if other := _other_kind(head, path):
                raise CheckpointError(other)
            # A .safetensors begins with 8 bytes for the length of a JSON object, then the object.
            if head[8:9] == b"{":
                return Loaded(_safetensors(path), {})
            if zipfile.is_zipfile(path):
                _verify(path)
            return unpickled(file)
    except (CheckpointError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it holds {found[1]}" if found else "it is damaged, or no checkpoint, or holds something else"
        raise CheckpointError(f"is refused: {why}; only tensors and plain values are read") from error
    except OSError as error:
        # torch's reader seeks before the beginning of an archive that was cut off
        if error.errno == errno.EINVAL:
            raise CheckpointError("is damaged or no checkpoint") from error
        raise CheckpointError(f"cannot be read ({error})") from error
    # Bytes that are no pickle make torch's reader fail with any exception, KeyError and IndexError among them.
    except Exception as error:
        raise CheckpointError(f"is damaged or no checkpoint{_reason(error)}") from error


def _other_kind(head: bytes, path: Path) -> str | None:
    """What a file is, if it is a known kind that holds no parameters; head: its first bytes."""
    if not head:
        return "is empty"
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file it stands for; `git lfs pull` fetches that"
    if HTML_PAGE.match(head):
        return "is an HTML page, no checkpoint"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = {name.rsplit("/", 1)[-1] for name in archive.namelist()}
    if "constants.pkl" in names:
        return "is a TorchScript archive; save the state_dict of its module instead"
    return None if "data.pkl" in names else "is a zip archive, but no checkpoint"


def _verify(path: Path) -> None:
    """Raise CheckpointError if a member of the archive that torch.save wrote has another content than its CRC-32 says."""
    # torch.load does not look at the CRC-32 that torch.save writes for every tensor.
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        # Written under torch.serialization.set_crc32_options(False).
        if not any(member.CRC for member in members):
            return
        for member in members:
            try:
                with archive.open(member) as content:
                    while content.read(PIECE):
                        pass
            except zipfile.BadZipFile as error:
                raise CheckpointError(
                    f"is damaged: the checksum of {member.filename} is wrong; copy the file again, or take an older one"
                ) from error


def _safetensors(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get(CHECKSUM, tensors_hash(tensors)) != tensors_hash(tensors):
        raise CheckpointError("is damaged: the checksum of its tensors is wrong; copy the file again")
    return {"state_dict": tensors, "args": json.loads(metadata.get(METADATA, "{}"))}


def _reason(error: Exception) -> str:
    """The first sentence of a library's error, in brackets, if the error is about the file."""
    # Without the advice that follows, which names functions of the library, and without control codes.
    if not isinstance(error, (RuntimeError, ValueError, SafetensorError)):
        return ""
    lines = str(error).strip().splitlines()
    sentence = "".join(filter(str.isprintable, lines[0].split(". ")[0])) if lines else ""
    return f" ({sentence})" if sentence else ""
