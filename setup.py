"""Build dmfast's kernels. Everything else about the package stands in pyproject.toml.

DMFAST_BUILD says what to build. The default ``auto`` builds the CPU kernels if there is a compiler for them, and the
CUDA kernels if there is nvcc too. ``cpu`` and ``cuda`` end in an error if their kernels can't be built, and ``cuda``
includes the CPU kernels. ``none`` builds nothing, and dmfast then runs in plain torch. nvcc is looked for in CUDA_HOME,
on PATH and in the PyPI packages that build_backend.py asks for. DMFAST_CUDA_ARCHS, such as "90" or "80;90", replaces
the default list of architectures. The last one of the list is also there as PTX.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
import cuda_compiler

# -ffp-contract=fast is gcc's default and stands here because exp2's accuracy relies on it. -ffast-math is left out
# because it breaks the round-to-nearest of exp2, and -march because the row kernels choose the instruction set at run
# time.
FLAGS = ["-O3", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra"]
if platform.machine() == "x86_64":  # g++ uses an MMX register as a spare one and leaves the x87 unit in MMX mode
    FLAGS.append("-mno-mmx")
# the files that take longest come first, because they are compiled side by side
SOURCES = [
    "csrc/cpu/rows_fp32.cpp", "csrc/cpu/rows_16bit.cpp", "csrc/cpu/sample.cpp", "csrc/bindings.cpp",
    "csrc/cpu/loss.cpp", "csrc/cpu/rows.cpp",
]  # fmt: skip
CUDA_SOURCES = ["csrc/cuda/loss.cu", "csrc/cuda/sample.cu"]
HEADERS = [str(path) for kind in ("*.h", "*.cuh") for path in sorted(Path("csrc").rglob(kind))]
ARCHS = ["80", "90", "100", "120"]
JOBS = int(os.environ.get("DMFAST_BUILD_JOBS", "2"))


def why_not() -> str | None:
    """Return None if the CPU kernels can be built, else the reason why they can't."""
    if not sys.platform.startswith("linux") or platform.machine() not in ("x86_64", "aarch64"):
        return f"there are kernels for Linux on x86-64 and aarch64, not for {sys.platform} on {platform.machine()}"
    if not shutil.which((os.environ.get("CXX") or "g++").split()[0]):
        return "there is no C++ compiler (g++, or what CXX names)"
    return None


def output(*command: str) -> str:
    """Return what a command prints."""
    done = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def find_cudart(nvcc: str) -> str:
    """Return the folder of libcudart_static.a that belongs to nvcc, which knows its own root."""
    found = re.search(r"^#\$ TOP=(.*)$", output(nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null"), re.MULTILINE)
    root = Path(found[1].strip()) if found else Path(nvcc).resolve().parent.parent
    for lib in (root / "lib64", root / "lib", root / "targets" / f"{platform.machine()}-linux" / "lib"):
        if (lib / "libcudart_static.a").exists():
            return str(lib)
    raise RuntimeError(f"nvcc is {nvcc}, but there is no libcudart_static.a below {root}")


def architectures(nvcc: str) -> list[str]:
    """Return nvcc's flags for machine code of each architecture, and for PTX of the last, which newer GPUs can run."""
    wanted = os.environ.get("DMFAST_CUDA_ARCHS", "").replace(",", ";").replace("sm_", "")
    archs = [arch.strip() for arch in wanted.split(";") if arch.strip()]
    if not archs:
        known = output(nvcc, "--list-gpu-code").split()
        archs = [arch for arch in ARCHS if f"sm_{arch}" in known]
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def compile_cuda(nvcc: str, folder: Path) -> list[str]:
    """Compile the CUDA sources, and return the paths of their objects."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*cuda_compiler.FLAGS, cuda_compiler.FOR_HOST, *architectures(nvcc)]
    objects = [str(folder / f"{Path(source).stem}.cuda.o") for source in CUDA_SOURCES]

    for source, target in zip(CUDA_SOURCES, objects, strict=True):  # --threads compiles the architectures side by side
        subprocess.run([nvcc, *flags, f"--threads={JOBS}", "-c", source, "-o", target], check=True)
    return objects


class BuildKernels(build_ext):
    """Build the extension, or say what can't be built and go on without it if it was not asked for."""

    def build_extension(self, ext):
        if WANTED in ("auto", "cuda"):
            self.add_cuda(ext)
        try:
            super().build_extension(ext)
        except Exception as error:
            if WANTED in ("cpu", "cuda"):
                raise
            print(f"dmfast: building without kernels (plain torch only): {error}", file=sys.stderr)

    def add_cuda(self, ext):
        try:
            nvcc = cuda_compiler.nvcc()
            lib = find_cudart(nvcc)
            ext.extra_objects = compile_cuda(nvcc, Path(self.build_temp))
        except Exception as error:
            if WANTED == "cuda":
                raise
            print(f"dmfast: building without CUDA kernels: {error}", file=sys.stderr)
            return
        ext.define_macros.append(("DMF_CUDA", None))
        ext.library_dirs.append(lib)
        ext.libraries += ["cudart_static", "dl", "rt", "pthread"]


WANTED = os.environ.get("DMFAST_BUILD", "auto")
if WANTED not in ("auto", "cpu", "cuda", "none"):
    sys.exit(f"DMFAST_BUILD must be auto, cpu, cuda or none, got {WANTED!r}")
REASON = "DMFAST_BUILD=none" if WANTED == "none" else why_not()
if REASON and WANTED in ("cpu", "cuda"):
    sys.exit(f"DMFAST_BUILD={WANTED}: {REASON}")
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
            depends=[*HEADERS, *CUDA_SOURCES],
            cxx_std=17,
            extra_compile_args=FLAGS + EXTRA,
            extra_link_args=["-fopenmp", *EXTRA],
            optional=WANTED == "auto",
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
