"""Build dmfast with its CUDA kernels in a folder of its own.

It compiles by nvcc for the devices of this machine, or by g++ for the host in a dry run. It does what setup.py does
without setuptools and pybind11, which such a machine may lack. torch brings the headers of pybind11.
"""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import cuda_compiler  # noqa: E402

HOST = ["-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
if platform.machine() == "x86_64":
    HOST.append("-mno-mmx")
SHIM = ["-DDMF_SHIM", "-DDMF_NO_CLONES", "-Itests/native", "-Icsrc", "-Wno-unknown-pragmas"]


def includes() -> list[str]:
    """Return the include paths of Python and pybind11."""
    found = importlib.util.find_spec("pybind11")
    own = Path(found.origin).parent / "include" if found and found.origin else Path(torch.__file__).parent / "include"
    return [f"-I{own}", f"-I{sysconfig.get_paths()['include']}"]


def architectures() -> list[str]:
    """Return the architectures of the devices of this machine."""
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return [f"-gencode=arch=compute_{a}{b},code=sm_{a}{b}" for a, b in sorted(found)]


def build(target: Path, dry: bool) -> None:
    """Fill the target with the package and its extension."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "dmfast", target / "dmfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    objects = target / "objects"
    objects.mkdir()
    host = [*HOST, "-O1", *SHIM] if dry else [*HOST, "-O3"]
    compile_host = ["g++", *host, "-fvisibility=hidden", "-DDMF_CUDA", *includes(), "-x", "c++", "-c"]
    compile_cuda, link = compile_host, ["g++", "-shared", "-fopenmp"]
    sources = ["csrc/bindings.cpp", *(f"csrc/cpu/{path.name}" for path in sorted((ROOT / "csrc/cpu").glob("*.cpp")))]
    work = [(compile_host, source) for source in sources]
    libraries: list[str] = []
    if dry:
        work.append((compile_host, "tests/native/shim.cpp"))
    else:
        nvcc = cuda_compiler.nvcc()
        flags = [*cuda_compiler.FLAGS, cuda_compiler.FOR_HOST]
        compile_cuda, link = [nvcc, *flags, *architectures(), "-c"], [nvcc, "-shared", "-cudart=static"]
        libraries = ["-lgomp"]
    work += [(compile_cuda, f"csrc/cuda/{name}.cu") for name in ("loss", "sample")]

    def compiled(step: tuple[list[str], str]) -> str:
        command, source = step
        made = str(objects / (source.replace("/", "_") + ".o"))
        subprocess.run([*command, source, "-o", made], cwd=ROOT, check=True)
        return made

    with ThreadPoolExecutor() as pool:
        made = list(pool.map(compiled, work))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    subprocess.run([*link, *made, *libraries, "-o", str(target / "dmfast" / f"_C{suffix}")], check=True)


def why_not(target: Path) -> str | None:
    """Return why the CUDA kernels of the build cannot run here. A missing library is found now and not in each part."""
    code = "import dmfast; info = dmfast.backends()['cuda']; print(info.available or info.detail)"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, check=False)
    said = (done.stdout + done.stderr).strip()
    return None if said == "True" else said


if __name__ == "__main__":
    build(Path(sys.argv[1]), dry=sys.argv[2:] == ["dry"])
    if why := why_not(Path(sys.argv[1])):
        sys.exit(f"built {sys.argv[1]}, whose kernels can't run: {why}")
    print("built", sys.argv[1])
