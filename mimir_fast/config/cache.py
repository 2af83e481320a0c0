"""Configuration of a cache: one frozen dataclass per section, each field one command-line flag."""

import os
from dataclasses import dataclass

from mimir_fast.config.fields import Configuration, flag, require
from mimir_fast.data.cache.format import Options
from mimir_fast.data.cache.pixels import PIXELS

# Shorter side of training images, pixels.
SIZE = 384


@dataclass(frozen=True)
class PixelConfig:
    """What is stored of each image."""

    split: str = flag("train", "which images", choices=("train", "val"))
    format: str | None = flag(
        None,
        "yuv420: chroma at half the resolution, as in most JPEG files, 1.5 bytes a pixel; rgb: 3 bytes a pixel; default: "
        "yuv420 for train; val is always rgb",
        choices=PIXELS,
        type=str,
    )
    size: int | None = flag(
        None,
        f"reduce the shorter side of larger images; 0: never; default: {SIZE} for train; val is resized as evaluation does",
        "pixels",
        type=int,
    )
    input_size: int = flag(224, "with --split val: side of the input that images are resized for", "pixels")


@dataclass(frozen=True)
class BuildConfig:
    """How."""

    workers: int = flag(0, "processes that decode; 0: one per core", "processes")
    shard_images: int = flag(16384, "images in a file", "images")
    verify: bool = flag(
        False, "check every checksum of the cache, once it is there, and end with status 1 if one differs"
    )
    dry_run: bool = flag(False, "say how much space it takes and is there, and write nothing")


@dataclass(frozen=True)
class CacheConfig(Configuration):
    """Everything that making a cache depends on."""

    pixels: PixelConfig = PixelConfig()
    build: BuildConfig = BuildConfig()

    def check(self) -> "CacheConfig":
        """Return self if every value is possible; raises ValueError naming the flag, its value and what is allowed."""
        super().check()
        p, b = self.pixels, self.build
        require(p.size is None or p.size >= 0, "size", p.size, "0 or more")
        for name, value in (("input_size", p.input_size), ("shard_images", b.shard_images)):
            require(value >= 1, name, value, "1 or more")
        require(b.workers >= 0, "workers", b.workers, "0 or more")
        if p.split == "val":
            require(p.format in (None, "rgb"), "format", p.format, "rgb: val is stored as evaluation resizes it")
            require(p.size is None, "size", p.size, "none: val is resized for --input_size, as evaluation does")
        return self

    def options(self) -> Options:
        """What decides the bytes of the cache."""
        p, shard_images = self.pixels, self.build.shard_images
        if p.split == "val":
            return Options("val", "rgb", 0, p.input_size, shard_images)
        return Options("train", p.format or "yuv420", SIZE if p.size is None else p.size, 0, shard_images)

    def workers(self) -> int:
        """Processes that decode."""
        return self.build.workers or len(os.sched_getaffinity(0))
