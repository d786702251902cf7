"""Compiles every GPU kernel for sm_80, 90, 100 and 120 without a GPU, CUDA by nvcc and Triton ahead of time, and reads
the machine code: no stack, no spill (STL, LDL), the wide accesses that are meant, registers within the bound that keeps
the intended occupancy. Writes what it found to benchmarks/results/aot.md; exits with 1 if a kernel is not as it should.

The Triton kernels take V and strides at run time, unspecialised: what is found holds for V divisible by 16 and not.

    python scripts/ci/aot.py [--only NAME] [--archs 90] [--table FILE]

Compiled code is kept by the hash of its source below $XDG_CACHE_HOME/dmfast/aot.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dmfast" / "aot"
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path.cwd()  # of the tree that is looked at
sys.path.insert(0, str(ROOT))
from cuda_compiler import compiled
from dmfast.kernels.triton import loss, sample

ARCHS = (80, 90, 100, 120)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BITS = {"fp32": 32, "bf16": 16, "fp16": 16}
REGISTERS = 65536  # of a multiprocessor, of all these architectures


class Found(NamedTuple):
    """One kernel for one architecture."""

    source: str
    kernel: str
    arch: int
    registers: int
    stack: int
    spills: int  # STL and LDL
    loads: int  # of 128 bits
    stores: int


class Wanted(NamedTuple):
    """What a kernel must have."""

    threads: int
    warps_resident: int  # on a multiprocessor
    load: bool
    store: bool


def read(source: str, cubin: Path, arch: int, name: str | None = None) -> list[Found]:
    """Every kernel of a cubin; ``name`` where the file has one that is called otherwise."""
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], check=True, text=True, capture_output=True).stdout
    code = subprocess.run([CUOBJDUMP, "-sass", cubin], check=True, text=True, capture_output=True).stdout
    sass = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, re.DOTALL))
    found = []
    for kernel, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage):

        def count(pattern: str, text: str = sass[kernel]) -> int:
            return len(re.findall(pattern, text))

        found.append(Found(source, name or kernel, arch, int(registers), int(stack), count(r"\b(?:STL|LDL)\b"),
                           count(r"\bLDG\.E\S*\.128"), count(r"\bSTG\.E\S*\.128")))  # fmt: skip
    return found


# --- CUDA ---------------------------------------------------------------------------------------------------------


def readable(kernel: str) -> str:
    """``score_rows<f, cap, entropy, pass>`` of a mangled name."""
    name = re.search(r"\d+(score_rows|write_rows|scale_rows|sample_rows)I(.*?)EEv", kernel)
    if name is None:
        return kernel
    arguments = re.sub(r"L(?:b|N\w*?Pass)E?(\d)E?", r" \1", name[2])
    return f"{name[1]}<{arguments.replace('13__nv_bfloat16', 'bf16').replace('6__half', 'fp16')}>"


def wanted_of_cuda(kernel: str) -> Wanted:
    """Registers as the launch bounds say, at least that; 128-bit accesses wherever logits are read or written."""
    if "sample_rows" in kernel:
        return Wanted(256, 24, True, False)
    if "score_rows" in kernel:
        known = re.search(r"Pass\w*?E?[12]E", kernel) is not None
        return Wanted(768 if known else 256, 24, True, known)
    return Wanted(256, 24, True, True)


# --- Triton -------------------------------------------------------------------------------------------------------


def _type(name: str, dtype: str) -> str:
    if name in ("logits", "dz"):
        return "*" + dtype
    if name in ("labels", "sequence_of", "starts", "faults", "row_ids", "tokens"):
        return "*i64"
    if name in ("lse_of", "log_prob_of", "entropy_of", "weights", "factors", "log_prob", "entropy", "uniforms"):
        return "*fp64"
    if name.startswith(("scale_", "cap_")):
        return "fp32"
    return "i64" if "stride" in name else "i32"


def compile_triton(kernel: Any, dtype: str, arch: int, warps: int, constants: dict[str, Any]) -> bytes:
    """As at run time: nothing is known of a number or an address."""
    signature = {n: "constexpr" if n in constants else _type(n, dtype) for n in kernel.arg_names}
    values = {(kernel.arg_names.index(n),): value for n, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs={})
    target = GPUTarget("cuda", arch, 32)
    return bytes(triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"])


def triton_kernels() -> list[tuple[str, Any, str, int, dict[str, Any], Wanted]]:
    """name, kernel, dtype, warps, constants, what it must have."""
    found = []
    for dtype, bits in BITS.items():
        width = 128 // bits
        for warps in (8, 1) if dtype == "bf16" else (8,):
            shape = {"W": width, "LANES": 64 * warps}
            for cap in (False, True):
                few = 16 if cap else 24
                tag = f"{dtype}{', cap' if cap else ''}{f', {warps} warp' if warps == 1 else ''}"
                for write in (False, True):
                    constants = {**shape, "CAP": cap, "ENTROPY": cap, "WRITE": write, "WIDE": True}
                    name = f"score_rows<{tag}{', known weight' if write else ''}>"
                    wanted = Wanted(32 * warps, few, True, write)
                    found.append((name, loss.score_rows, dtype, warps, constants, wanted))
                constants = {**shape, "CAP": cap, "WIDE": True}
                wanted = Wanted(32 * warps, few, True, True)
                found.append((f"write_rows<{tag}>", loss.write_rows, dtype, warps, constants, wanted))
            wanted = Wanted(32 * warps, 24, True, True)
            found.append((f"scale_rows<{tag}>", loss.scale_rows, dtype, warps, shape, wanted))
        for wide in (False, True):
            constants = {"CAP": False, "IDS": True, "GIVEN": False, "WIDE": wide, "TILES": 64, "SIZE": sample.TILE}
            name = f"sample_rows<{dtype}{', wide' if wide else ''}>"
            warps = sample.TILE * bits // 8 // 512
            found.append((name, sample.sample_rows, dtype, warps, constants, Wanted(32 * warps, 24, wide, False)))
    found.append(("sum_rows", loss.sum_rows, "fp32", 4, {"ENTROPY": True, "ROWS": 128}, Wanted(128, 24, False, False)))
    return found


# --- the verdict --------------------------------------------------------------------------------------------------


def resident_warps(found: Found, threads: int) -> int:
    """Warps that a multiprocessor's registers hold, in whole blocks."""
    warps = threads // 32
    of_warp = -(-found.registers * 32 // 256) * 256
    return REGISTERS // of_warp // warps * warps


def faults(found: Found, wanted: Wanted) -> list[str]:
    """What is not as it should be."""
    said = []
    if found.stack or found.spills:
        said.append(f"spills: stack {found.stack}, {found.spills} STL and LDL")
    if wanted.load and not found.loads:
        said.append("no 128-bit load")
    if wanted.store and not found.stores:
        said.append("no 128-bit store")
    if resident_warps(found, wanted.threads) < wanted.warps_resident:
        said.append(f"{found.registers} registers leave room for {resident_warps(found, wanted.threads)} warps")
    return said


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of cuda/loss.cu, cuda/sample.cu or triton/KERNEL")
    parser.add_argument("--archs", type=int, nargs="*", default=ARCHS)
    parser.add_argument("--table")
    args = parser.parse_args()

    rows: list[tuple[Found, Wanted]] = []
    with ThreadPoolExecutor(2) as pool:
        sources = [s for s in ("csrc/cuda/loss.cu", "csrc/cuda/sample.cu") if args.only in s.removeprefix("csrc/")]
        jobs = [(source, arch) for source in sources for arch in args.archs]
        for (_, arch), cubin in zip(
            jobs, pool.map(lambda job: compiled(ROOT, job[0], "cubin", job[1], CACHE), jobs), strict=True
        ):
            rows += [
                (x._replace(kernel=readable(x.kernel)), wanted_of_cuda(x.kernel)) for x in read("CUDA", cubin, arch)
            ]
        wanted_kernels = [k for k in triton_kernels() if args.only in "triton/" + k[0]]
        for name, kernel, dtype, warps, constants, wanted in wanted_kernels:
            for arch in args.archs:
                if dtype == "fp16" and arch != 90:
                    continue  # as bf16
                cubin = CACHE / f"triton-{os.getpid()}.cubin"
                cubin.parent.mkdir(parents=True, exist_ok=True)
                cubin.write_bytes(compile_triton(kernel, dtype, arch, warps, constants))
                rows += [(x, wanted) for x in read("Triton", cubin, arch, name)]
                cubin.unlink()
    wrong = [(x, said) for x, wanted in rows for said in faults(x, wanted)]
    for x, said in wrong:
        print(f"{x.source} {x.kernel} sm_{x.arch}: {said}")
    if args.table:
        Path(args.table).write_text(table(rows, [f"{x.source} {x.kernel} sm_{x.arch}: {said}" for x, said in wrong]))
    print(f"{len(rows)} kernels compiled, {len(wrong)} faults")
    return 1 if wrong or not rows else 0


def table(rows: list[tuple[Found, Wanted]], wrong: list[str]) -> str:
    """Markdown: a line for each kernel, a figure for each architecture; what is not as it should be."""
    lines = [
        "# What the compilers make of the GPU kernels", "",
        f"By `make aot`, triton {triton.__version__}; no device was involved. Registers of a thread and 128-bit "
        "loads / stores in the code, for sm_" + ", ".join(map(str, ARCHS)) + "; warps are what the registers of a "
        f"multiprocessor hold on the worst of them. {len(rows)} kernels, {len(wrong)} not as they should be:", "",
        *[f"- {each}" for each in wrong], "",
        "| | kernel | registers | 128-bit loads / stores | warps |", "|---|---|---|---|---|",
    ]  # fmt: skip
    kernels: dict[tuple[str, str], list[tuple[Found, Wanted]]] = {}
    for x, wanted in rows:
        kernels.setdefault((x.source, x.kernel), []).append((x, wanted))
    for (source, kernel), found in sorted(kernels.items()):
        registers = ", ".join(str(x.registers) for x, _ in found)
        accesses = ", ".join(dict.fromkeys(f"{x.loads} / {x.stores}" for x, _ in found))
        warps = min(resident_warps(x, wanted.threads) for x, wanted in found)
        lines.append(f"| {source} | `{kernel}` | {registers} | {accesses} | {warps} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
