"""Check the machine code of every GPU kernel for sm_80, 90, 100 and 120.

A kernel must have no stack and no spill (STL, LDL). It must have the wide accesses that are meant, and so few registers
that the warps that are meant have room. Triton's kernels are checked in the same way for two of AMD's architectures
(amd_code.py). The script exits with 1 if a kernel is not as it should be, or if aot.json and aot.md in
benchmarks/results do not say what was found. If only some architectures are compiled, their figures must be those of
the file. The other figures are valid as long as the sources are those from which the file was made.

    python scripts/ci/aot.py [--only NAME] [--archs 90 gfx942] [--write FOLDER] [--kept FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import unified_diff
from pathlib import Path
from typing import Any

import amd_code
from figures import Figures, digest, figures_of, read, write
from machine_code import ARCHS, all_code, versions

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


def intended_instructions(code: Figures) -> float | None:
    """Return what INSTRUCTIONS says of a kernel, or None if it says nothing."""
    name = f"{code.source} {code.kernel}"
    return next((most for words, most in INSTRUCTIONS if all(word in name for word in words.split())), None)


def intended_warps(code: Figures) -> int:
    """Return what WARPS says of a kernel."""
    name = f"{code.source} {code.kernel}"
    return next(warps for words, warps in WARPS if all(word in name for word in words.split()))


def resident_warps(code: Figures) -> int:
    """Return how many warps the registers of a multiprocessor hold, in whole blocks."""
    warps = code.threads // 32
    of_warp = -(-code.registers * 32 // 256) * 256
    return REGISTERS // of_warp // warps * warps


def faults(code: Figures) -> list[str]:
    """Return what is not as it should be, one sentence each."""
    said = []
    name = code.kernel.split("<")[0]
    if code.stack or code.spills:
        said.append(f"spills: stack {code.stack}, {code.spills} STL and LDL")
    # Triton's rows to sample from are read wide only where all of them are aligned
    narrow = name == "sum_rows" or (name == "sample_rows" and code.source == "Triton" and "wide" not in code.kernel)
    if not code.loads and not narrow:
        said.append("no 128-bit load")
    if not code.stores and (name in ("write_rows", "scale_rows") or "known" in code.kernel):
        said.append("no 128-bit store")
    if code.late and name in ("score_rows", "score_parts", "write_rows"):
        said.append(f"{code.late} 128-bit loads of a round stand behind its first special-function instruction")
    most = intended_instructions(code)
    if most is not None and (taken := code.least["issue"]) > most:
        said.append(f"{taken:.1f} instructions for each logit, {most:.0f} are meant")
    if resident_warps(code) < intended_warps(code):
        said.append(
            f"{code.registers} registers leave room for {resident_warps(code)} warps, {intended_warps(code)} are meant"
        )
    return said


def all_faults(found: Sequence[Figures], of_amd: Sequence[amd_code.AmdCode]) -> list[str]:
    """Return what is wrong with each kernel, after its name."""
    wrong = [f"{code.source} {code.kernel} sm_{code.arch}: {said}" for code in found for said in faults(code)]
    return wrong + [f"{code.kernel} {code.arch}: {said}" for code in of_amd for said in amd_code.faults(code)]


def table(kept: dict[str, Any]) -> str:
    """Return Markdown with a line for each kernel, a figure for each architecture, and what is wrong."""
    found, of_amd = kept["kernels"], [amd_code.AmdCode(*each) for each in kept["amd"]]
    wrong = all_faults(found, of_amd)
    lines = [
        "# What the compilers make of the GPU kernels", "",
        f"`make aot-all` wrote this page with {kept['compilers']}, without a device. *Registers* are those of a "
        "thread, and the loads / stores are counted in the code. They are given for "
        f"sm_{', '.join(map(str, ARCHS))} (for Triton's "
        "fp16 kernels and short rows: sm_90). *Warps* is the number of warps that the registers of a multiprocessor "
        "hold, on the architecture that holds fewest, and *meant* is the number that the kernel is meant to have. "
        "*Instructions* are those of the inner loops for each logit, on the shortest way, with the most that are "
        f"allowed. For AMD's {' and '.join(amd_code.ARCHS)} below, warps are those of a SIMD unit. "
        f"{len(found) + len(of_amd)} kernels "
        f"{'are as they should be, but for these:' if wrong else 'have neither a stack nor spills.'}", "",
        *[f"- {each}" for each in wrong], *[""] * bool(wrong),
        "| | kernel | registers | 128-bit loads / stores | instructions | warps | meant |", "|---|" + "---|" * 6,
    ]  # fmt: skip
    kernels: dict[tuple[str, str], list[Figures]] = {}
    for code in found:
        kernels.setdefault((code.source, code.kernel), []).append(code)
    for (source, kernel), same in sorted(kernels.items()):
        meant = intended_warps(same[0])
        registers = ", ".join(str(code.registers) for code in same)
        wide = ", ".join(dict.fromkeys(f"{code.loads} / {code.stores}" for code in same))
        most = intended_instructions(same[0])
        taken = ", ".join(f"{code.least['issue']:.1f}" for code in same) + f" of {most:.0f}" if most else ""
        warps = min(resident_warps(code) for code in same)
        lines.append(f"| {source} | `{kernel}` | {registers} | {wide} | {taken} | {warps} | {meant} |")
    return "\n".join(lines) + "\n\n" + amd_code.table(of_amd)


def differences(folder: Path, now: dict[str, Any]) -> str:
    """Return how aot.json and aot.md of a folder differ from what is found now, or "" if other compilers made them.

    Figures of architectures that were not compiled now are not compared.
    """
    kept = read(folder / "aot.json")
    if kept["compilers"] != now["compilers"]:
        print(f"{folder} was made by {kept['compilers']}, and these are {now['compilers']}: not compared")
        return ""
    said = ""
    if kept["sources"] != now["sources"]:
        said += f"the kernels are not those from which {folder / 'aot.json'} was made\n"
    for kind, arch in (("kernels", lambda x: x.arch), ("amd", lambda x: x[1])):
        archs = {arch(each) for each in now[kind]}
        old, new = ([f"{each}\n" for each in of[kind] if arch(each) in archs] for of in (kept, now))
        said += "".join(unified_diff(old, new, str(folder / "aot.json"), "now", n=0))
    page = (folder / "aot.md").read_text()
    return said + "".join(unified_diff(page.splitlines(True), table(kept).splitlines(True), "aot.md", "aot.json", n=0))


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="part of cuda/loss.cu, cuda/sample.cu, triton/KERNEL or amd/KERNEL")
    parser.add_argument("--archs", nargs="*", default=[*map(str, ARCHS), *amd_code.ARCHS])
    parser.add_argument("--kept", type=Path, help="the folder whose aot.json and aot.md are to be what is found now")
    parser.add_argument("--write", type=Path, help="the folder in which to write them, once all are compiled")
    args = parser.parse_args()

    found = [figures_of(code) for code in all_code(args.only, tuple(x for x in ARCHS if str(x) in args.archs))]
    of_amd = amd_code.amd_code(args.only, [x for x in amd_code.ARCHS if x in args.archs])
    wrong = all_faults(found, of_amd)
    print(*wrong, f"{len(found) + len(of_amd)} kernels compiled, {len(wrong)} faults", sep="\n")
    now = {"compilers": versions(), "sources": digest(), "kernels": found, "amd": [list(each) for each in of_amd]}
    if args.write:
        write(args.write / "aot.json", now)
        (args.write / "aot.md").write_text(table(now))
    if args.kept and (said := differences(args.kept, now)):
        print(f"{said}{args.kept} is out of date: run `make aot-all`")
        return 1
    return 1 if wrong or not (found or of_amd) else 0


if __name__ == "__main__":
    sys.exit(main())
