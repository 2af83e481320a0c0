"""Packaging.  mimir_fast/kernels is a symbolic link to kernels/, so a checkout imports without an install step and the wheel
holds one package (the plain name `kernels` belongs to another distribution)."""

from setuptools import find_packages, setup

setup(packages=find_packages(include=["mimir_fast", "mimir_fast.*"]))
