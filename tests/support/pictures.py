"""Class folders of small pictures of many sizes, and caches of them."""

from pathlib import Path

import numpy as np
from PIL import Image

from mimir_fast.data.cache.build import build_cache
from mimir_fast.data.cache.format import Manifest, Options, read_manifest, shard_name
from mimir_fast.data.cache.index import read_index
from mimir_fast.data.cache.originals import open_originals


def picture(number: int, height: int, width: int) -> Image.Image:
    """Smooth colours, a function of the number."""
    blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.BICUBIC)


def write_pictures(root: Path, count: int = 22, split: str = "train", unreadable: tuple[int, ...] = ()) -> Path:
    """root/SPLIT/{ant,bee}/N.jpg of many sizes, the third 1x1, the fourth of 20:1, the fifth with odd sides."""
    for number in range(count):
        path = root / split / ("ant" if number < count // 2 else "bee") / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = {2: (1, 1), 3: (30, 600), 4: (33, 31)}.get(number, (20 + 3 * number % 60, 60 - number % 40))
        picture(number, height, width).save(path, quality=90)
        if number in unreadable:
            path.write_bytes(b"not an image")
    return root


def make_cache(source: Path, dst: Path, options: Options, workers: int = 1, show=lambda done, total: None) -> Manifest:
    """Build the cache of a folder."""
    return build_cache(open_originals(source, options.split), Path(dst), options, workers, show)


def stored(folder: Path, image: int) -> bytes:
    """The bytes of one image."""
    manifest = read_manifest(folder)
    index = read_index(folder, manifest)
    start, count = int(index.offset[image]), int(index.bytes(manifest.options.pixels)[image])
    return (folder / shard_name(int(index.shard[image]))).read_bytes()[start : start + count]
