"""Compile the Triton kernels for two of AMD's architectures without a device, and check the machine code, for aot.py.

The architectures are gfx942 (MI300), whose warps have 64 threads, and gfx1100 (RX 7900), whose warps have 32. A barrier
of theirs does not wait for loads. Before a row is written that may be the logits themselves, every load must have ended
that another thread's store could overtake. The check therefore looks for the wait before the barrier.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from machine_code import TritonKernel, triton_compiled, triton_kernels
from triton.backends.compiler import GPUTarget


class Arch(NamedTuple):
    """Hold the registers of a SIMD unit for each thread of its warps, and how many of them a warp gets at a time."""

    warp_size: int
    registers: int
    granularity: int


ARCHS = {"gfx942": Arch(64, 512, 8), "gfx1100": Arch(32, 1536, 24)}
# A SIMD unit must hold at least so many warps. Then as many 128-bit loads, two for each thread, are under way as memory
# needs. Kernels that a softcap limits by its arithmetic need fewer.
WARPS = {"gfx942": 4, "gfx1100": 8}
WARPS_OF_CAP = {"gfx942": 3, "gfx1100": 6}


class AmdCode(NamedTuple):
    """Hold what is looked at in one Triton kernel as it is compiled for one of AMD's architectures."""

    kernel: str
    arch: str
    registers: int
    spills: int  # spills to memory: registers, and bytes of stack. Scalar registers spill to lanes of vector registers
    loads: int  # these two count accesses of 128 bits
    stores: int
    waits: bool  # whether no load is under way at the last barrier, after which the row is overwritten

    @property
    def warps(self) -> int:
        """Return the number of warps that the registers of a SIMD unit hold."""
        _, registers, granularity = ARCHS[self.arch]
        return registers // (-(-self.registers // granularity) * granularity)


def _waits(assembly: str) -> bool:
    *before, _ = assembly.split("s_barrier")
    lines = re.findall(r"(?:global|buffer)_load|s_waitcnt.*vmcnt\(0\)", "".join(before))
    return not lines or lines[-1].startswith("s_waitcnt")


def faults(code: AmdCode) -> list[str]:
    """Return what is not as it should be."""
    said = []
    if code.spills:
        said.append(f"spills: {code.spills}")
    if not code.loads and code.kernel != "sum_rows":
        said.append("no 128-bit load")
    if not code.stores and (code.kernel.startswith(("write_rows", "scale_rows")) or "known" in code.kernel):
        said.append("no 128-bit store")
    meant = (WARPS_OF_CAP if ", cap" in code.kernel else WARPS)[code.arch]
    if code.warps < meant:
        said.append(f"{code.registers} registers leave room for {code.warps} warps, {meant} are meant")
    if "known" in code.kernel and not code.waits:
        said.append("a load is under way at the barrier before the row is written over")
    return said


def _kernels(arch: str) -> list[TritonKernel]:
    """Return the kernels of long rows, without fp16, which equals bf16, and without some variants."""
    others = ("fp16", "short", "middle", "entropy")
    return [
        kernel
        for kernel in triton_kernels(ARCHS[arch].warp_size)
        if not any(word in kernel.name for word in others)
        and (not kernel.name.startswith("sample_rows") or "wide" in kernel.name)
    ]


def _code(job: tuple[str, str]) -> AmdCode:
    name, arch = job
    kernel = next(k for k in _kernels(arch) if k.name == name)
    made = triton_compiled(kernel, GPUTarget("hip", arch, ARCHS[arch].warp_size))
    assembly = made.asm["amdgcn"]
    registers, spills, stack = (
        int(re.findall(rf"\.{count}:\s+(\d+)", assembly)[0])
        for count in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")
    )
    loads, stores = (
        len(re.findall(rf"(?:global|buffer)_{kind}_(?:dwordx4|b128)", assembly)) for kind in ("load", "store")
    )
    return AmdCode(name, arch, registers, spills + stack, loads, stores, _waits(assembly))


def amd_code(only: str, archs: Collection[str]) -> list[AmdCode]:
    """Return the kernels whose names, after amd/, contain ``only``. Two cores compile them."""
    jobs = [(kernel.name, arch) for arch in archs for kernel in _kernels(arch) if only in f"amd/{kernel.name}"]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        return list(pool.map(_code, jobs))


def table(found: list[AmdCode]) -> str:
    """Return a Markdown table with a line for each kernel."""
    lines = ["| | kernel | registers | 128-bit loads / stores | warps |", "|---|---|---|---|---|"]
    kernels: dict[str, list[AmdCode]] = {}
    for code in found:
        kernels.setdefault(code.kernel, []).append(code)
    for kernel, same in sorted(kernels.items()):
        registers = ", ".join(str(code.registers) for code in same)
        wide = ", ".join(dict.fromkeys(f"{code.loads} / {code.stores}" for code in same))
        warps = ", ".join(str(code.warps) for code in same)
        lines.append(f"| Triton | `{kernel}` | {registers} | {wide} | {warps} |")
    return "\n".join(lines) + "\n"
