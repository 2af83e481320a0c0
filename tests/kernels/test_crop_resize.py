"""crop_resize, of windows in interleaved RGB: see tests/support/crop_checks.py."""

from mimir_fast.kernels import crop_resize
from mimir_fast.kernels.crop_resize import kernel
from tests.support.crop_checks import CropChecks


class TestCropResize(CropChecks):
    op, kernel, yuv = staticmethod(crop_resize), kernel.crop_resize, False
