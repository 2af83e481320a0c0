"""TensorBoard's files of scalars: writing them, and dropping points that will be written again."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from mimir_fast.checkpoints.atomic import write_atomically

FILES = "events.out.tfevents.*"
# A record: the content's length and the length's checksum, the content, its checksum.
HEADER, FOOTER = struct.Struct("<QI"), 4
_numbers = count()


class Events:
    """TensorBoard's file of scalars.

    log_dir      a folder, or a URL of one (see Upload)
    purge_step   x from which TensorBoard hides what earlier files of the folder hold; None: nothing
    """

    # Not torch's SummaryWriter: it writes in a thread, where a full disk is a traceback, and its `flush` then waits for ever.

    def __init__(self, log_dir: str, say: Callable[[str], None], purge_step: int | None = None):
        # Slow to import: only where it writes.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.say, self.told = say, False
        # None until it could be opened.
        self.file: Any = None
        self.events, self.summaries, self.record_writer = event_pb2, summary_pb2, RecordWriter
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_numbers)}"
        # A Path would make one slash of a URL's two.
        self.path = f"{log_dir.rstrip('/')}/{name}" if is_url(log_dir) else str(Path(log_dir) / name)
        self.purge_step = purge_step
        self.add([])

    def add(self, points: list[tuple[str, float, int]]) -> None:
        """Write points (tag, value, x); they are in the file when it returns."""
        try:
            if self.file is None:
                self._open()
            length = self.file.tell()
            try:
                self._write([self._point(*point) for point in points])
            except OSError:
                # A half-written record would hide all that follows it.
                with contextlib.suppress(OSError):
                    self.file.truncate(length)
                    self.file.seek(length)
                raise
        except OSError as error:
            if not self.told:
                self.say(
                    f"warning: log_dir: could not write {self.path}: {error}; training goes on, points will be missing"
                )
            self.told = True

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.close()

    def _open(self) -> None:
        if is_url(self.path):
            self.file = Upload(self.path)
        else:
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what the disk refuses must not stay in a buffer and be tried again out of place.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        try:
            first = [self.events.Event(wall_time=time.time(), file_version="brain.Event:2")]
            if self.purge_step is not None:
                log = self.events.SessionLog(status=self.events.SessionLog.START)
                first.append(self.events.Event(wall_time=time.time(), step=self.purge_step, session_log=log))
            self._write(first)
        except OSError:
            # Made anew the next time: a file without its beginning cannot be read.
            self.file.close()
            self.file = None
            raise

    def _point(self, tag: str, value: float, x: int):
        scalar = self.summaries.Summary.Value(tag=tag, simple_value=value)
        return self.events.Event(wall_time=time.time(), step=x, summary=self.summaries.Summary(value=[scalar]))

    def _write(self, events: list) -> None:
        parts = _Parts()
        records = self.record_writer(parts)
        for event in events:
            records.write(event.SerializeToString())
        rest = memoryview(b"".join(parts))
        while rest:
            rest = rest[self.file.write(rest) :]


class _Parts(list):
    """What TensorBoard's writer of records writes, in pieces."""

    write = list.append


def is_url(log_dir: str) -> bool:
    """Whether a log_dir is no local folder but s3://..., gs://... and the like."""
    return "://" in log_dir


class Upload:
    """A file at a URL, through the file systems that TensorBoard knows; uploaded whole at its first bytes, then every two
    minutes, and when it is closed.  Raises OSError for whatever goes wrong there."""

    EVERY_S = 120.0

    def __init__(self, url: str):
        self.url, self.content, self.due = url, bytearray(), 0.0

    def write(self, part: bytes | memoryview) -> int:
        self.content += part
        if time.monotonic() >= self.due:
            self._upload()
        return len(part)

    def tell(self) -> int:
        return len(self.content)

    def seek(self, length: int) -> None:
        """Nothing: bytes are added at the end."""

    def truncate(self, length: int) -> None:
        del self.content[length:]

    def close(self) -> None:
        self._upload()

    def _upload(self) -> None:
        # Stub or TensorFlow itself, as in TensorBoard: packages such as boto3, s3fs and gcsfs decide which URLs there are.
        from tensorboard.compat import tf

        self.due = time.monotonic() + self.EVERY_S
        try:
            with tf.io.gfile.GFile(self.url, "wb") as file:
                file.write(bytes(self.content))
        # Each of those packages has exceptions of its own.
        except Exception as error:
            raise OSError(str(error)) from error


def drop_points(log_dir: Path, tags: tuple[str, ...], first: int, say: Callable[[str], None]) -> None:
    """Remove the points of some tags from x = first on from the files of a folder; all other records stay as they are.

    For tags whose x is not that of the others, which TensorBoard's own purge_step cannot tell apart.  What the disk refuses is
    said: those points are then there twice.
    """
    try:
        _drop(log_dir, tags, first)
    except OSError as error:
        say(f"warning: {error}; points of {', '.join(tags[:2])}, ... may appear twice in TensorBoard")


def _drop(log_dir: Path, tags: tuple[str, ...], first: int) -> None:
    from tensorboard.compat.proto import event_pb2

    def dropped(record: memoryview) -> bool:
        event = event_pb2.Event.FromString(bytes(record[HEADER.size : -FOOTER]))
        return event.step >= first and any(value.tag in tags for value in event.summary.value)

    words = [tag.encode() for tag in tags]
    for path in sorted(log_dir.glob(FILES)):
        content = path.read_bytes()
        if any(word in content for word in words):
            kept = [r for r in _records(content) if not (any(word in bytes(r) for word in words) and dropped(r))]
            if sum(map(len, kept)) < len(content):
                write_atomically(path, partial(_write_lines, kept), "log_dir")


def _write_lines(lines: list[memoryview], file: BinaryIO) -> None:
    file.writelines(lines)


def _records(content: bytes) -> Iterator[memoryview]:
    """The whole records of a file; what a kill cut is left out."""
    view, start = memoryview(content), 0
    while start + HEADER.size <= len(view):
        length, _ = HEADER.unpack_from(view, start)
        end = start + HEADER.size + length + FOOTER
        if end > len(view):
            return
        yield view[start:end]
        start = end
