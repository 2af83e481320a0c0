"""What would make the host wait for a GPU, found on a CPU: numbers read back, shapes that depend on data."""

from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select", "aten.item")


class no_waiting(TorchDispatchMode):  # noqa: N801 (used as a context manager)
    """Inside, such an operation raises AssertionError."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(WAITS), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
