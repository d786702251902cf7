"""The build of dmfast's kernels; all else is in pyproject.toml.

DMFAST_BUILD says what to build: ``auto`` (default: the CPU kernels where there is a compiler for them), ``cpu``
(an error if they can't be built), ``none`` (plain torch only). ``cuda`` is refused: this release has no CUDA kernels.
"""

import os
import platform
import shutil
import sys

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

# -ffp-contract: gcc's default, said because exp2's accuracy relies on it. No -ffast-math: it breaks the
# round-to-nearest of exp2. No -march: rows.cpp chooses the instruction set when it runs.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/loss.cpp", "csrc/cpu/rows.cpp", "csrc/cpu/sample.cpp"]
HEADERS = [
    "csrc/objective.h",
    "csrc/random.h",
    *(f"csrc/cpu/{name}.h" for name in ("loss", "rows", "sample", "scan", "simd")),
]


def why_not() -> str | None:
    """None where the CPU kernels can be built, else the reason that they can't."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return f"there are kernels for Linux on x86-64 and aarch64, not for {sys.platform} on {platform.machine()}"
    if not shutil.which((os.environ.get("CXX") or "g++").split()[0]):
        return "there is no C++ compiler (g++, or what CXX names)"
    return None


class BuildKernels(build_ext):
    """Skips what was not asked for and can't be built, and says so."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            if WANTED == "cpu":
                raise
            print(f"dmfast: building without kernels (plain torch only): {error}", file=sys.stderr)


WANTED = os.environ.get("DMFAST_BUILD", "auto")
if WANTED not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"DMFAST_BUILD must be auto, cpu, cuda or none, got {WANTED!r}")
if WANTED == "cuda":
    sys.exit("DMFAST_BUILD=cuda: this release of dmfast has no CUDA kernels; use auto or cpu")
REASON = "DMFAST_BUILD=none" if WANTED == "none" else why_not()
if REASON and WANTED == "cpu":
    sys.exit(f"DMFAST_BUILD=cpu: {REASON}")
if REASON:
    print(f"dmfast: building without kernels (plain torch only): {REASON}", file=sys.stderr)
EXTRA = os.environ.get("DMFAST_CXXFLAGS", "").split()

ParallelCompile("DMFAST_BUILD_JOBS", default=2).install()
setup(
    ext_modules=[]
    if REASON
    else [
        Pybind11Extension(
            "dmfast._C",
            SOURCES,
            depends=HEADERS,
            cxx_std=17,
            extra_compile_args=FLAGS + EXTRA,
            extra_link_args=["-fopenmp", *EXTRA],
            optional=WANTED != "cpu",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
