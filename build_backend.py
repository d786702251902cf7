"""setuptools' build backend, which asks PyPI for the CUDA compiler where DMFAST_BUILD=cuda and there is no nvcc."""

import os
import shutil
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not replaced below

# cccl: <nv/target>, which cuda_fp16.h includes
CUDA_COMPILER = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]


def find_nvcc() -> str | None:
    """CUDA_HOME's, PATH's, or that of the PyPI packages."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (home / "bin" / "nvcc").exists():
            return str(home / "bin" / "nvcc")
    # pip installs what a build requires into a folder of sys.path
    packages = sorted(path for folder in sys.path for path in Path(folder, "nvidia").glob("cu[0-9]*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packages[-1]) if packages else None)


def _more() -> list[str]:
    return CUDA_COMPILER if os.environ.get("DMFAST_BUILD") == "cuda" and find_nvcc() is None else []


def get_requires_for_build_wheel(config_settings=None):
    """Of a wheel."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _more()


def get_requires_for_build_editable(config_settings=None):
    """Of an editable install."""
    return build_meta.get_requires_for_build_editable(config_settings) + _more()
