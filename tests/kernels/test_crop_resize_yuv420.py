"""crop_resize_yuv420, of windows in luma and chroma: see tests/support/crop_checks.py."""

import pytest

from mimir_fast.kernels import crop_resize_yuv420
from mimir_fast.kernels.crop_resize_yuv420 import kernel
from tests.support.crop_checks import CropChecks


@pytest.mark.slow
class TestCropResizeYuv420(CropChecks):
    op, kernel, yuv = staticmethod(crop_resize_yuv420), kernel.crop_resize_yuv420, True
