"""Keep the figures of every GPU kernel's machine code, for aot.py, roofline.py and stated.py.

They stand in benchmarks/results/aot.json. The file also names the compilers, and it holds a digest of the sources from
which the figures were made.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from inner_loops import per_logit, rounds
from machine_code import ROOT, Code

# The kernels are made from these files. How the scripts read them shows in the architecture that CI compiles.
SOURCES = ("csrc/*.h", "csrc/cuda/*", "dmfast/kernels/triton/*.py")


class Figures(NamedTuple):
    """Hold what aot.py looks at in one kernel's machine code for one of NVIDIA's architectures."""

    source: str
    kernel: str
    arch: int
    threads: int
    registers: int
    stack: int
    spills: int  # instructions that spill: STL and LDL
    loads: int  # these two count accesses of 128 bits
    stores: int
    late: int  # 128-bit loads of a round behind its first special-function instruction
    least: dict[str, float]  # the instructions of each unit for each logit, at least
    random: dict[str, float]  # and on random logits


def figures_of(code: Code) -> Figures:
    """Return the figures of a kernel's code."""
    # Triton's rounds that write may load their second pack late (docs/gpu.md)
    watched = [loop for loop in rounds(code) if code.source == "CUDA" or not loop.accesses("STG")]
    counts = per_logit(code) if "<" in code.kernel else ({}, {})  # sum_rows has no logits
    least, random = ({unit: round(n, 6) for unit, n in each.items()} for each in counts)
    return Figures(
        code.source, code.kernel, code.arch, code.threads, code.registers, code.stack,
        code.count(r" (?:STL|LDL)\b"), code.count(r" LDG\.E\S*\.128"), code.count(r" STG\.E\S*\.128"),
        sum(loop.late_loads for loop in watched), least, random,
    )  # fmt: skip


def digest() -> str:
    """Return a digest of the sources. Blank lines at the end of a file do not change it."""
    found = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern)):
        found.update(f"{path.relative_to(ROOT)}\n{path.read_text().rstrip()}\n".encode())
    return found.hexdigest()[:16]


def write(path: Path, kept: dict[str, Any]) -> None:
    """Write the figures with a line for each kernel, so that a change of one shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {name: ",\n".join(map(json.dumps, kept[name])) for name in ("kernels", "amd")}
    head = json.dumps({name: kept[name] for name in ("compilers", "sources")})[:-1]
    path.write_text(f'{head},\n"kernels": [\n{lines["kernels"]}\n],\n"amd": [\n{lines["amd"]}\n]}}\n')


def read(path: Path) -> dict[str, Any]:
    """Return what ``write`` wrote, with a ``Figures`` for each kernel of NVIDIA's architectures."""
    kept: dict[str, Any] = json.loads(path.read_text())
    kept["kernels"] = [Figures(*each) for each in kept["kernels"]]
    return kept


def kept_figures() -> tuple[list[Figures], str]:
    """Return the figures that the repository keeps, and the compilers that made them."""
    kept = read(Path(__file__).parents[2] / "benchmarks" / "results" / "aot.json")
    return kept["kernels"], kept["compilers"]
