"""Find nvcc and compile dmfast's CUDA sources, for setup.py, build_backend.py and the proofs.

This module needs nothing beyond the standard library.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# cuda-cccl has <nv/target>, which cuda_fp16.h includes
PACKAGES = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
# warning 177 is about a function that only another instance of a template uses
FLAGS = ["-std=c++17", "-O3", "-diag-suppress=177"]
FOR_HOST = "-Xcompiler=-fPIC,-fvisibility=hidden"  # for what is linked into the extension


def find_nvcc() -> str | None:
    """Return the first nvcc of CUDA_HOME, CUDA_PATH, PATH and the PyPI packages, or None if there is none."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (home / "bin" / "nvcc").exists():
            return str(home / "bin" / "nvcc")
    # pip installs what a build requires into a folder of sys.path
    packages = sorted(path for folder in sys.path for path in Path(folder, "nvidia").glob("cu[0-9]*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packages[-1]) if packages else None)


def nvcc() -> str:
    """Return what ``find_nvcc`` finds, and raise RuntimeError if it finds none."""
    found = find_nvcc()
    if found is None:
        raise RuntimeError("there is no nvcc in CUDA_HOME, on PATH or among the PyPI packages")
    return found


def compiler_version() -> str:
    """Return the version of nvcc, such as ``13.0.88``."""
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"V(\d[\d.]*)", said)[0]


def compiled(root: Path, source: str, kind: str, arch: int, cache: Path) -> Path:
    """Compile a CUDA source of the tree at root to ptx or cubin, once for each state of csrc and nvcc.

    The result is the path of the compiled file.
    """
    compiler, flags = nvcc(), [*FLAGS, f"-arch=sm_{arch}", f"-{kind}"]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    texts = [path.read_bytes() for path in sorted((root / "csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".cu")]
    key = hashlib.sha256(b"\0".join([version, *(flag.encode() for flag in flags), *texts])).hexdigest()[:16]
    target = cache / f"{Path(source).stem}-{arch}-{key}.{kind}"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *flags, str(root / source), "-o", str(partial)], check=True)
        partial.rename(target)
    return target
