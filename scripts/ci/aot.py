"""Looks at the machine code of every GPU kernel for sm_80, 90, 100 and 120: no stack, no spill (STL, LDL), the wide
accesses that are meant, registers within the bound that keeps the intended occupancy. Writes what it found to
benchmarks/results/aot.md; exits with 1 if a kernel is not as it should be.

    python scripts/ci/aot.py [--only NAME] [--archs 90] [--table FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from machine_code import ARCHS, Code, all_code, triton

REGISTERS = 65536  # of a multiprocessor, of all these architectures
# Of two loads of 16 bytes a thread, with which 24 KB are under way; an H100 needs 17 where memory answers after 0.7 us.
WARPS = 24


def resident_warps(code: Code) -> int:
    """Warps that a multiprocessor's registers hold, in whole blocks."""
    warps = code.threads // 32
    of_warp = -(-code.registers * 32 // 256) * 256
    return REGISTERS // of_warp // warps * warps


def accesses(code: Code) -> tuple[int, int]:
    """Loads and stores of 128 bits."""
    return code.count(r" LDG\.E\S*\.128"), code.count(r" STG\.E\S*\.128")


def faults(code: Code) -> list[str]:
    """What is not as it should be."""
    said = []
    spills, (loads, stores) = code.count(r" (?:STL|LDL)\b"), accesses(code)
    name = code.kernel.split("<")[0]
    if code.stack or spills:
        said.append(f"spills: stack {code.stack}, {spills} STL and LDL")
    # Triton's rows to sample from are read wide only where all of them are aligned
    narrow = name == "sum_rows" or (name == "sample_rows" and code.source == "Triton" and "wide" not in code.kernel)
    if not loads and not narrow:
        said.append("no 128-bit load")
    if not stores and (name in ("write_rows", "scale_rows") or "known" in code.kernel):
        said.append("no 128-bit store")
    if resident_warps(code) < WARPS:
        said.append(f"{code.registers} registers leave room for {resident_warps(code)} warps")
    return said


def table(found: list[Code], wrong: list[str]) -> str:
    """Markdown: a line for each kernel, a figure for each architecture; what is not as it should be."""
    lines = [
        "# What the compilers make of the GPU kernels", "",
        f"By `make aot`, triton {triton.__version__}; no device was involved. Registers of a thread and 128-bit "
        "loads / stores in the code, for sm_" + ", ".join(map(str, ARCHS)) + " (Triton's fp16 and short rows: sm_90); "
        f"warps are what the registers of a multiprocessor hold on the worst of them. {len(found)} kernels "
        f"{'as they should be, but for these:' if wrong else 'without stack or spills.'}", "",
        *[f"- {each}" for each in wrong], *[""] * bool(wrong),
        "| | kernel | registers | 128-bit loads / stores | warps |", "|---|---|---|---|---|",
    ]  # fmt: skip
    kernels: dict[tuple[str, str], list[Code]] = {}
    for code in found:
        kernels.setdefault((code.source, code.kernel), []).append(code)
    for (source, kernel), same in sorted(kernels.items()):
        registers = ", ".join(str(code.registers) for code in same)
        wide = ", ".join(dict.fromkeys("{} / {}".format(*accesses(code)) for code in same))
        warps = min(resident_warps(code) for code in same)
        lines.append(f"| {source} | `{kernel}` | {registers} | {wide} | {warps} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of cuda/loss.cu, cuda/sample.cu or triton/KERNEL")
    parser.add_argument("--archs", type=int, nargs="*", default=ARCHS)
    parser.add_argument("--table")
    args = parser.parse_args()

    found = list(all_code(args.only, tuple(args.archs)))
    wrong = [f"{code.source} {code.kernel} sm_{code.arch}: {said}" for code in found for said in faults(code)]
    print(*wrong, f"{len(found)} kernels compiled, {len(wrong)} faults", sep="\n")
    if args.table:
        Path(args.table).write_text(table(found, wrong))
    return 1 if wrong or not found else 0


if __name__ == "__main__":
    sys.exit(main())
