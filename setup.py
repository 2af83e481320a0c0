"""Packaging. The kernels live in the top-level folder kernels/ and are installed as mimir_fast.kernels
(the plain name `kernels` belongs to another distribution)."""

from setuptools import find_packages, setup

KERNELS = ["kernels", *(f"kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=find_packages(include=["mimir_fast", "mimir_fast.*"]) + [f"mimir_fast.{name}" for name in KERNELS],
    package_dir={f"mimir_fast.{name}": name.replace(".", "/") for name in KERNELS},
)
