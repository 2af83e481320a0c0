"""CheckpointError, raised for everything that is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; one line that names the file and what to do."""
