"""Build as setuptools does, and ask PyPI for the CUDA compiler if DMFAST_BUILD=cuda and there is no nvcc."""

import os

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  pip calls the hooks that are not replaced below, too

from cuda_compiler import PACKAGES, find_nvcc


def _more() -> list[str]:
    return PACKAGES if os.environ.get("DMFAST_BUILD") == "cuda" and find_nvcc() is None else []


def get_requires_for_build_wheel(config_settings=None):
    """Return the packages that building a wheel needs."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _more()


def get_requires_for_build_editable(config_settings=None):
    """Return the packages that an editable install needs."""
    return build_meta.get_requires_for_build_editable(config_settings) + _more()
