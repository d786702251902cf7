"""Compile the GPU kernels without a GPU and disassemble them, for aot.py and roofline.py.

The kernels are those of the tree in the current directory. nvcc compiles the CUDA kernels, and Triton compiles its
kernels ahead of time. Compiled code is kept below $XDG_CACHE_HOME/dmfast/aot by the hash of its source, and its
disassembly by the hash of the code. The Triton kernels take V and strides at run time without specialisation, so the
findings hold whether or not V is divisible by 16.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dmfast" / "aot"
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# the tree in the current directory may be another than the script's
ROOT = Path.cwd()
sys.path.insert(0, str(ROOT))
from cuda_compiler import compiled, compiler_version
from dmfast.kernels.triton import launch, loss, sample

ARCHS = (80, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def versions() -> str:
    """Return the versions of the compilers, on which all results depend."""
    return f"triton {triton.__version__}, nvcc {compiler_version()}"


class Code(NamedTuple):
    """Hold one kernel as a compiler made it for one architecture."""

    source: str  # CUDA or Triton
    kernel: str
    arch: int
    threads: int  # the most threads that a block has
    registers: int
    stack: int
    sass: str  # one line for each instruction: address, opcode, operands

    def count(self, pattern: str) -> int:
        """Return the number of matching instructions."""
        return len(re.findall(pattern, self.sass))


def _kept(cubin: Path | bytes, kind: str) -> str:
    """Return the output of cuobjdump for a cubin, without the instructions' bits."""
    raw = cubin if isinstance(cubin, bytes) else cubin.read_bytes()
    kept = CACHE / f"{hashlib.sha256(raw).hexdigest()[:16]}.{kind}.gz"
    if kept.exists():
        return gzip.decompress(kept.read_bytes()).decode()
    partial = kept.with_suffix(f".{os.getpid()}")
    partial.write_bytes(raw)
    text = subprocess.run([CUOBJDUMP, f"-{kind}", partial], check=True, text=True, capture_output=True).stdout
    text = "\n".join(re.sub(r"\s*/\* 0x\w+ \*/|\s*;", "", line) for line in text.splitlines())
    text = re.sub(r"\n\s*(?=\n)", "", re.sub(r"\n\s*/\*(\w+)\*/\s*", r"\n\1 ", text))
    partial.write_bytes(gzip.compress(text.encode(), 1))
    partial.rename(kept)
    return text


def _read(source: str, cubin: Path | bytes, arch: int, threads: Callable[[str], int], name: str = "") -> list[Code]:
    """Return every kernel of a cubin. ``name`` replaces the name of a file that has one kernel."""
    usage = _kept(cubin, "res-usage")
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", _kept(cubin, "sass"), re.DOTALL))
    return [
        Code(source, name or readable(kernel), arch, threads(kernel), int(registers), int(stack), sass[kernel])
        for kernel, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    ]


# --- CUDA ---------------------------------------------------------------------------------------------------------


def readable(kernel: str) -> str:
    """Return ``score_rows<fp32, cap, entropy, known weight>`` or ``write_rows<fp32, cap, bonus>`` for a mangled name.

    ``fp32 -> bf16`` means that the gradient of fp32 logits has another dtype.
    """
    found = re.search(r"\d+(score_rows|score_parts|write_rows|scale_rows|sample_rows)I(.*?)EEv", kernel)
    if found is None:
        return kernel
    name, arguments = found.groups()
    names = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}
    one = "|".join(names)
    of_logits, of_gradient = re.findall(rf"^({one})({one})?", arguments)[0]
    dtype = names[of_logits]
    if of_gradient and of_gradient != of_logits:
        dtype += f" -> {names[of_gradient]}"
    flags = re.findall(r"L(?:b|N\w*?Pass)E?(\d)", arguments)
    second = "bonus" if name == "write_rows" else "entropy"
    said = [(), ("cap",)][flags[:1] == ["1"]] + [(), (second,)][flags[1:2] == ["1"]]
    pass_ = ("known weight, kept",) if flags[2:3] == ["1"] else ()
    return f"{name}<{', '.join((dtype, *said, *pass_))}>"


def _most_threads(kernel: str) -> int:
    """Return the largest number of threads in a block of a kernel, by its mangled name."""
    if "sample_rows" in kernel:
        return 512
    return 384 if re.search(r"Pass\w*?E?1E", kernel) else 256


def cuda_code(source: str, arch: int) -> list[Code]:
    """Return the kernels of a file of csrc/cuda."""
    return _read("CUDA", compiled(ROOT, f"csrc/{source}", "cubin", arch, CACHE), arch, _most_threads)


# --- Triton -------------------------------------------------------------------------------------------------------


class TritonKernel(NamedTuple):
    """Describe a kernel with what is known of it when it is compiled."""

    name: str
    function: Any
    dtype: str  # the dtype of the logits
    gradient: str
    warps: int
    constants: dict[str, Any]

    @property
    def archs(self) -> tuple[int, ...]:
        """Return the architectures to check.

        fp16, which equals bf16, and rows that are not long are checked for one.
        """
        return (90,) if self.gradient == "fp16" or "short" in self.name or "middle" in self.name else ARCHS


def _type(name: str, kernel: TritonKernel) -> str:
    if name in ("logits", "dz"):
        return "*" + (kernel.dtype if name == "logits" else kernel.gradient)
    if name in ("labels", "sequence_of", "starts", "faults", "row_ids", "tokens"):
        return "*i64"
    if name in ("lse_of", "label_of", "entropy_of", "weights", "bonuses", "factors", "log_prob", "entropy", "uniforms"):
        return "*fp64"
    if name == "there":
        return "*i32"
    if name.startswith(("scale_", "cap_")):
        return "fp32"
    return "i64" if "stride" in name else "i32"


def triton_kernels(warp_size: int = 32) -> Iterator[TritonKernel]:
    """Return the kernels that launch.py launches, with three lengths of rows in bf16."""
    for dtype, gradient in (*((x, x) for x in SIZE), ("fp32", "bf16"), ("fp32", "fp16")):
        size, size_dz, same = SIZE[dtype], SIZE[gradient], dtype == gradient
        kinds = {50257: "", 9000: ", middle", 1000: ", short"} if dtype == "bf16" else {50257: ""}
        for (vocab, kind), cap in product(kinds.items(), (False, True)):
            if cap and kind == ", middle":
                continue  # this kernel equals that of longer rows
            shape = launch.shape_of(vocab, size, cap, warp_size)
            row = {"W": 16 // size, "PACKS": shape.packs, "THREADS": shape.threads}
            row_dz = {"DZ_W": 16 // size_dz, "DZ_PACKS": shape.packs * size_dz // size, "THREADS": shape.threads}
            wide = {"WIDE": True, "CAP": cap}
            tag = f"{dtype if same else f'{dtype} -> {gradient}'}{', cap' if cap else ''}{kind}"
            entropies = (False, True) if cap and dtype == "bf16" else (False,)
            for write, entropy in product((False, True) if same else (True,), entropies):
                name = f"score_rows<{tag}{', entropy' if entropy else ''}{', known weight' if write else ''}>"
                # of the kernels with a bonus, only the one that does the most work is compiled
                constants = {**row, **row_dz, **wide, "ENTROPY": entropy, "WRITE": write, "BONUS": entropy and write}
                yield TritonKernel(name, loss.score_rows, dtype, gradient, shape.warps, constants)
            for bonus in (False, True) if gradient == "bf16" and not kind else (False,):
                # backward usually launches this kernel with one load less
                writes = {**row_dz, **wide, "MAY_BE_THERE": True, "BONUS": bonus}
                name = f"write_rows<{tag}{', bonus' if bonus else ''}>"
                yield TritonKernel(name, loss.write_rows, dtype, gradient, shape.warps, writes)
            if same and not cap:
                yield TritonKernel(f"scale_rows<{tag}>", loss.scale_rows, dtype, dtype, shape.warps, row_dz)
        for wide in (False, True) if same else ():
            constants = {"CAP": False, "IDS": True, "GIVEN": False, "WIDE": wide, "TILES": 64, "SIZE": sample.TILE}
            name = f"sample_rows<{dtype}{', wide' if wide else ''}>"
            yield TritonKernel(name, sample.sample_rows, dtype, dtype, launch.sample_warps(size, warp_size), constants)
    summed = {"ENTROPY": True, "ROWS": launch.SUMMED}
    yield TritonKernel("sum_rows", loss.sum_rows, "fp32", "fp32", launch.SUMMED // warp_size, summed)


def triton_compiled(kernel: TritonKernel, target: GPUTarget) -> Any:
    """Compile a kernel as at run time, where nothing is known of a number or an address."""
    names = kernel.function.arg_names
    signature = {n: "constexpr" if n in kernel.constants else _type(n, kernel) for n in names}
    values = {(names.index(n),): value for n, value in kernel.constants.items()}
    source = ASTSource(fn=kernel.function, signature=signature, constexprs=values, attrs={})
    return triton.compile(source, target=target, options={"num_warps": kernel.warps})


def triton_code(kernel: TritonKernel, arch: int) -> list[Code]:
    """Return the code that NVIDIA's assembler makes of a kernel."""
    made = triton_compiled(kernel, GPUTarget("cuda", arch, 32))
    return _read("Triton", bytes(made.asm["cubin"]), arch, lambda _: 32 * kernel.warps, kernel.name)


# --- all of them --------------------------------------------------------------------------------------------------


def _code(job: tuple[str, int]) -> list[Code]:
    name, arch = job
    if name.startswith("cuda/"):
        return cuda_code(name, arch)
    return triton_code(next(k for k in triton_kernels() if "triton/" + k.name == name), arch)


def all_code(only: str, archs: tuple[int, ...]) -> Iterator[Code]:
    """Return the kernels whose source (cuda/loss.cu, cuda/sample.cu, triton/KERNEL) contains ``only``.

    Two cores compile them.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    jobs = [(source, arch) for source in ("cuda/loss.cu", "cuda/sample.cu") for arch in archs]
    jobs += [("triton/" + kernel.name, arch) for kernel in triton_kernels() for arch in archs if arch in kernel.archs]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        for found in pool.map(_code, [job for job in jobs if only in job[0]]):
            yield from found
