"""Check the machine code of every GPU kernel for sm_80, 90, 100 and 120.

A kernel must have no stack and no spill (STL, LDL). It must have the wide accesses that are meant, and so few registers
that the warps that are meant have room. Triton's kernels are checked in the same way for two of AMD's architectures
(amd_code.py). The script exits with 1 if a kernel is not as it should be, or if benchmarks/results/aot.md does not say
what was found.

    python scripts/ci/aot.py [--only NAME] [--archs 90] [--write FILE] [--table FILE]
"""

from __future__ import annotations

import argparse
import sys
from difflib import unified_diff
from pathlib import Path

import amd_code
from inner_loops import per_logit, rounds
from machine_code import ARCHS, Code, all_code, versions

# each multiprocessor of these architectures has this many
REGISTERS = 65536
# A multiprocessor must hold at least this many warps of a kernel. The first line whose words are all in the name of the
# kernel counts. No kernel has fewer than 24 warps. With two loads of 16 bytes a thread, 24 warps have 24 KB under way,
# and an H100 needs 17 KB where memory answers after 0.7 us. A kernel that is not bound by memory needs more warps to
# hide its arithmetic. It has them, unless a softcap takes the registers.
WARPS = [
    ("CUDA score_rows known", 24),  # plan.h gives a block 384 threads, so these are two blocks
    ("CUDA score_", 32),
    ("CUDA write_rows cap", 32),
    # these are the five blocks of its __launch_bounds__, and there may be six
    ("CUDA write_rows", 40),
    ("CUDA scale_rows", 48),
    # these are two blocks, whose warps load a tile ahead
    ("CUDA sample_rows", 32),
    ("Triton score_rows known cap", 24),
    ("Triton score_rows", 32),
    ("Triton write_rows cap bonus", 24),
    ("Triton write_rows bonus", 32),
    ("Triton write_rows cap", 28),
    ("Triton write_rows short", 32),  # a block has one warp, and there are 32 blocks
    ("Triton write_rows", 40),
    ("Triton scale_rows", 48),
    ("Triton sample_rows", 24),
    ("Triton sum_rows", 24),  # a warp takes a sequence, and there are few
]

# A kernel's rounds may take at most this many instructions for each logit on their shortest way. The first line whose
# words are all in the kernel's name counts.
INSTRUCTIONS = [
    ("CUDA score_rows known cap", 84.0),
    ("CUDA score_rows known entropy", 34.0),
    ("CUDA score_rows known", 26.0),
    ("CUDA score_ cap", 42.0),
    ("CUDA score_ entropy", 18.0),
    ("CUDA score_", 14.0),
    ("CUDA write_rows cap", 45.0),
    ("CUDA write_rows bonus", 18.0),
    ("CUDA write_rows", 15.0),
    ("CUDA sample_rows cap", 90.0),
    ("CUDA sample_rows", 24.0),
]


def intended_instructions(code: Code) -> float | None:
    """Return what INSTRUCTIONS says of a kernel, or None if it says nothing."""
    name = f"{code.source} {code.kernel}"
    return next((most for words, most in INSTRUCTIONS if all(word in name for word in words.split())), None)


def intended_warps(code: Code) -> int:
    """Return what WARPS says of a kernel."""
    name = f"{code.source} {code.kernel}"
    return next(warps for words, warps in WARPS if all(word in name for word in words.split()))


def resident_warps(code: Code) -> int:
    """Return how many warps the registers of a multiprocessor hold, in whole blocks."""
    warps = code.threads // 32
    of_warp = -(-code.registers * 32 // 256) * 256
    return REGISTERS // of_warp // warps * warps


def accesses(code: Code) -> tuple[int, int]:
    """Return the numbers of loads and of stores of 128 bits."""
    return code.count(r" LDG\.E\S*\.128"), code.count(r" STG\.E\S*\.128")


def faults(code: Code) -> list[str]:
    """Return what is not as it should be, one sentence each."""
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
    # Triton's rounds that write may load their second pack late (docs/gpu.md)
    watched = [loop for loop in rounds(code) if code.source == "CUDA" or not loop.accesses("STG")]
    late = sum(loop.late_loads for loop in watched)
    if late and name in ("score_rows", "score_parts", "write_rows"):
        said.append(f"{late} 128-bit loads of a round stand behind its first special-function instruction")
    most = intended_instructions(code)
    if most is not None and (taken := per_logit(code)[0]["issue"]) > most:
        said.append(f"{taken:.1f} instructions for each logit, {most:.0f} are meant")
    if resident_warps(code) < intended_warps(code):
        said.append(
            f"{code.registers} registers leave room for {resident_warps(code)} warps, {intended_warps(code)} are meant"
        )
    return said


def stale(old: Path, new: str) -> str:
    """Return how a stored table differs from what is found now; "" if other compilers made it."""
    kept = old.read_text() if old.exists() else ""
    if kept == new:
        return ""
    if kept and versions() not in kept:
        print(f"{old} was made by other compilers than {versions()}: not compared")
        return ""
    return "".join(unified_diff(kept.splitlines(True), new.splitlines(True), str(old), "now", n=0))


def table(found: list[Code], of_amd: list[amd_code.AmdCode], wrong: list[str]) -> str:
    """Return Markdown with a line for each kernel, a figure for each architecture, and what is wrong."""
    lines = [
        "# What the compilers make of the GPU kernels", "",
        f"`make aot` wrote this page with {versions()}, without a device. *Registers* are those of a thread, and the "
        f"loads / stores are counted in the code. They are given for sm_{', '.join(map(str, ARCHS))} (for Triton's "
        "fp16 kernels and short rows: sm_90). *Warps* is the number of warps that the registers of a multiprocessor "
        "hold, on the architecture that holds fewest, and *meant* is the number that the kernel is meant to have. "
        "*Instructions* are those of the inner loops for each logit, on the shortest way, with the most that are "
        f"allowed. For AMD's {' and '.join(amd_code.ARCHS)} below, warps are those of a SIMD unit. "
        f"{len(found) + len(of_amd)} kernels "
        f"{'are as they should be, but for these:' if wrong else 'have neither a stack nor spills.'}", "",
        *[f"- {each}" for each in wrong], *[""] * bool(wrong),
        "| | kernel | registers | 128-bit loads / stores | instructions | warps | meant |", "|---|" + "---|" * 6,
    ]  # fmt: skip
    kernels: dict[tuple[str, str], list[Code]] = {}
    for code in found:
        kernels.setdefault((code.source, code.kernel), []).append(code)
    for (source, kernel), same in sorted(kernels.items()):
        meant = intended_warps(same[0])
        registers = ", ".join(str(code.registers) for code in same)
        wide = ", ".join(dict.fromkeys("{} / {}".format(*accesses(code)) for code in same))
        most = intended_instructions(same[0])
        taken = ", ".join(f"{per_logit(code)[0]['issue']:.1f}" for code in same) + f" of {most:.0f}" if most else ""
        warps = min(resident_warps(code) for code in same)
        lines.append(f"| {source} | `{kernel}` | {registers} | {wide} | {taken} | {warps} | {meant} |")
    return "\n".join(lines) + "\n\n" + amd_code.table(of_amd)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of cuda/loss.cu, cuda/sample.cu, triton/KERNEL or amd/KERNEL")
    parser.add_argument("--archs", type=int, nargs="*", default=ARCHS)
    parser.add_argument("--table", type=Path, help="where the table is kept, which is to be what is found now")
    parser.add_argument("--write", type=Path, help="where to write it")
    args = parser.parse_args()

    found = list(all_code(args.only, tuple(args.archs)))
    of_amd = list(amd_code.amd_code(args.only))
    wrong = [f"{code.source} {code.kernel} sm_{code.arch}: {said}" for code in found for said in faults(code)]
    wrong += [f"{code.kernel} {code.arch}: {said}" for code in of_amd for said in amd_code.faults(code)]
    print(*wrong, f"{len(found) + len(of_amd)} kernels compiled, {len(wrong)} faults", sep="\n")
    made = table(found, of_amd, wrong)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        args.write.write_text(made)
    if args.table and (difference := stale(args.table, made)):
        print(f"{difference}{args.table} is out of date: cp {args.write} {args.table}")
        return 1
    return 1 if wrong or not (found or of_amd) else 0


if __name__ == "__main__":
    sys.exit(main())
