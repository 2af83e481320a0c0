"""DataError, which the data package raises for all that a user can put right, and the record of unreadable images."""

import logging

log = logging.getLogger("mimir_fast.data")


class DataError(ValueError):
    """A problem with the data or its flags; one line that names the file, folder or flag and what to do."""


class NoBatchError(DataError):
    """The data workers deliver nothing any more; one line that says why and what to do."""


class BadFiles:
    """Distinct unreadable images met so far, path -> reason; too many of them are an error.

    where        the folder, for messages
    num_images   images in the folder, readable or not; 1 % of them may be unreadable, in tiny folders one, never all
    """

    def __init__(self, where: str, num_images: int):
        self.where = where
        self.num_images = num_images
        self.limit = min(max(1, num_images // 100), max(num_images - 1, 0))
        self.reasons: dict[str, str] = {}

    def record(self, found: dict[str, str]) -> None:
        """Add path -> reason and warn once per file that is skipped.  Raises DataError when more than `limit` files are bad."""
        for path, reason in found.items():
            if path not in self.reasons:
                self.reasons[path] = reason
                # Where none is tolerated nothing is skipped: the error below names it.
                if self.limit:
                    log.warning("skipping unreadable image %s: %s", path, reason)
        if len(self.reasons) > self.limit:
            path, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{self.where}: at least {len(self.reasons)} of {self.num_images} images are unreadable "
                f"(at most {self.limit} tolerated), for example {path} ({reason}): replace or remove them"
            )
