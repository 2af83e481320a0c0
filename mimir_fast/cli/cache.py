"""mimir-fast cache SRC DST: decoded images on disk, from which training reads many times as fast as from image files."""

import signal
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from mimir_fast.cli.errors import complain, guarded
from mimir_fast.cli.parser import Command, build_parser, canonical, configuration
from mimir_fast.config.cache import CacheConfig
from mimir_fast.config.fields import home_path
from mimir_fast.data import DataError
from mimir_fast.data.cache.build import KEPT, build_cache
from mimir_fast.data.cache.originals import open_originals
from mimir_fast.data.cache.plan import estimated_bytes
from mimir_fast.data.cache.staging import free_bytes
from mimir_fast.data.cache.verify import verify
from mimir_fast.evaluate.progress import Bar

DESCRIPTION = """Decode the images of a data set once.  SRC: what --data_root takes for imagenet, imagenette and imagefolder;
a tar, or a folder of tars, of KEY.jpg, .jpeg or .png with the class number in KEY.cls; or an .npz with image and label.  DST:
what --data_root takes afterwards.  Started again it goes on where it was stopped.  `mimir-fast cache DST --verify` checks one
that is finished.  Exit status: 0 done, 1 failed or damaged, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
COMMAND = Command("mimir-fast cache", DESCRIPTION, CacheConfig, {})


class TerminatedError(Exception):
    """SIGTERM."""


def main(argv: list[str] | None = None) -> int:
    """Build or verify; returns the exit status: 0 done, 1 failed or damaged, 2 wrong input, 130 Ctrl-C, 143 SIGTERM."""
    words = sys.argv[1:] if argv is None else argv

    def stop(number, frame):
        raise TerminatedError

    # An exception, so that processes end and half-written files are removed.  The main thread alone may ask for it.
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        return guarded(COMMAND.prog, lambda: run(words), f"stopped; {KEPT}")
    except TerminatedError:
        print(f"{COMMAND.prog}: stopped by SIGTERM; {KEPT}", file=sys.stderr)
        return 143
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def run(words: list[str]) -> int:
    """Build or verify; returns the exit status.  Raises ValueError for wrong input, OSError where the disk refuses."""
    parser = build_parser(COMMAND)
    words_src = "class folders, tar files or an npz; with --verify alone the cache"
    parser.add_argument("src", metavar="SRC", type=home_path, help=words_src)
    words_dst = "folder of the cache; DST/train or DST/val is made in it"
    parser.add_argument("dst", metavar="DST", type=home_path, nargs="?", help=words_dst)
    given = vars(parser.parse_args([canonical(word, COMMAND) for word in words]))
    src, dst = given.pop("src"), given.pop("dst", None)
    config, _ = configuration(COMMAND, given)
    if dst is None and not config.build.verify:
        raise ValueError("dst: none, expected a folder for the cache: mimir-fast cache SRC DST")
    folder = Path(src if dst is None else dst)
    if dst is not None:
        build(src, folder, config)
    return check(folder / config.pixels.split, config) if config.build.verify and not config.build.dry_run else 0


def build(src: str, dst: Path, config: CacheConfig) -> None:
    """Say how large the cache will be, and make it unless --dry_run."""
    originals, options = open_originals(src, config.pixels.split), config.options()
    size, free = estimated_bytes(originals, options), free_bytes(dst)
    print(
        f"{originals.where}: {len(originals)} images in {len(originals.classes)} classes -> {dst / options.split}: "
        f"{options.pixels}, about {size / 1e9:.3g} GB ({size / len(originals) / 1e3:.0f} KB an image); {free / 1e9:.3g} GB free"
    )
    if config.build.dry_run:
        return
    progress = Progress("cache")
    try:
        manifest = build_cache(originals, dst, options, config.workers(), progress.show)
    finally:
        progress.close()
    print(
        f"{dst / options.split}: {manifest.num_images} images, {manifest.bytes / 1e9:.3g} GB, {len(manifest.left_out)} left out"
    )


def check(folder: Path, config: CacheConfig) -> int:
    """Check every checksum; returns the exit status."""
    progress, started = Progress("verify"), time.perf_counter()
    try:
        count = verify(folder, config.workers(), progress.show)
    except DataError as error:
        complain(COMMAND.prog, error)
        return 1
    finally:
        progress.close()
    print(f"{folder}: {count} images, all whole; {count / (time.perf_counter() - started):.0f} images/s")
    return 0


class Progress:
    """Images done, images per second and time left: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, what: str):
        self.what, self.bar = what, Bar(print)
        self.started, self.before = time.perf_counter(), 0

    def show(self, done: int, total: int) -> None:
        """After an image or more."""
        # What was there before counts as done, but not towards the rate.
        if self.before == 0:
            self.started, self.before = time.perf_counter(), done
            return
        rate = (done - self.before) / (time.perf_counter() - self.started)
        left = tqdm.format_interval((total - done) / rate) if rate else "?"
        self.bar.show(self.what, f"{done}/{total} images, {rate:.0f} images/s, {left} left", done, total - done)

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()


if __name__ == "__main__":
    sys.exit(main())
