"""Where nvcc is and how dmfast's CUDA sources are compiled: for setup.py, build_backend.py and the proofs. Needs the
standard library alone."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# cccl: <nv/target>, which cuda_fp16.h includes
PACKAGES = [f"nvidia-{name}==13.0.*" for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")]
# 177: a function that only another instance of a template uses
FLAGS = ["-std=c++17", "-O3", "-diag-suppress=177"]
FOR_HOST = "-Xcompiler=-fPIC,-fvisibility=hidden"  # of what is linked into the extension


def find_nvcc() -> str | None:
    """CUDA_HOME's, PATH's, or that of the PyPI packages."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if (home / "bin" / "nvcc").exists():
            return str(home / "bin" / "nvcc")
    # pip installs what a build requires into a folder of sys.path
    packages = sorted(path for folder in sys.path for path in Path(folder, "nvidia").glob("cu[0-9]*/bin/nvcc"))
    return shutil.which("nvcc") or (str(packages[-1]) if packages else None)


def nvcc() -> str:
    """Raises RuntimeError where ``find_nvcc`` finds none."""
    found = find_nvcc()
    if found is None:
        raise RuntimeError("there is no nvcc in CUDA_HOME, on PATH or among the PyPI packages")
    return found


def compiler_version() -> str:
    """``13.0.88``."""
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return re.findall(r"V(\d[\d.]*)", said)[0]


def compiled(root: Path, source: str, kind: str, arch: int, cache: Path) -> Path:
    """The ``kind`` (ptx, cubin) of a CUDA source of the tree at root, made once for each state of its csrc and nvcc."""
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
