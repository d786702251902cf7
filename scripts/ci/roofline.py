"""Predict what limits each kernel on three cards, and write the figures between the marks of docs/gpu.md.

This is a model, and no device is involved. Bytes are those that csrc/cuda/plan.h declares and trace.sh counts.
Instructions for each logit are those of a kernel's inner loops in the machine code, on the shortest way through a loop,
as benchmarks/results/aot.json has them. Where threads keep a running maximum, the longer way on which they take a new
one also counts, as often as a warp takes it on random logits. Each instruction goes to a unit of the multiprocessor.
The kernel is limited by whatever takes longest: a unit, the issue of instructions, or memory at the bandwidth of the
data sheet. The model leaves out latencies, caches, the beginnings and ends of rows, and clocks below the data sheet's.

    python scripts/ci/roofline.py [FILE WRITTEN]    checks FILE, and writes it to WRITTEN with the current figures
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from figures import Figures, kept_figures
from machine_code import ROOT, SIZE
from marked import brought_up_to_date

# a row of this length is sampled beside few others
FEW = 151936


class Card(NamedTuple):
    """Hold the data sheet of a card, and the throughput table of the CUDA programming guide for its architecture."""

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float  # TB/s
    fp32: float  # Tflop/s
    lanes: dict[str, int]  # how many threads can issue to each unit in a cycle

    def picoseconds(self, unit: str, instructions: float) -> float:
        """Return the time that each thread needs for so many instructions."""
        clock = self.fp32 / 2 / self.multiprocessors / self.lanes["fp32"]  # THz
        return instructions / (clock * self.multiprocessors * self.lanes[unit])


CARDS = (
    Card("A100", 80, 108, 2.039, 19.5, {"issue": 128, "fp32": 64, "int": 64, "special": 16, "fp64": 32}),
    Card("H100", 90, 132, 3.35, 66.9, {"issue": 128, "fp32": 128, "int": 64, "special": 16, "fp64": 64}),
    Card("H200", 90, 132, 4.8, 66.9, {"issue": 128, "fp32": 128, "int": 64, "special": 16, "fp64": 64}),
)


# --- the model ----------------------------------------------------------------------------------------------------


def traffic() -> dict[str, tuple[float, float]]:
    """Return reads and writes of each logit, as plan.h declares them."""
    text = (ROOT / "csrc/cuda/plan.h").read_text()
    return {name: (float(r), float(w)) for name, r, w in re.findall(r"(k\w+)\{([\d.]+), ([\d.]+)\}", text)}


def declared(kernel: str) -> tuple[float, float]:
    """Return the reads and writes of a kernel by name. For sampling they exclude the tile that is read again."""
    if "known" in kernel:
        return traffic()["kKnownKept" if "kept" in kernel else "kKnownReread"]  # Triton's kernel reads twice
    names = {"score": "kForward", "write": "kBackward", "scale": "kScale", "sample": "kForward"}
    return traffic()[names[kernel.split("_", 1)[0]]]


def bytes_of(kernel: str) -> float:
    """Return the bytes for each logit. A gradient may have a narrower dtype."""
    reads, writes = declared(kernel)
    types = re.findall("|".join(SIZE), kernel)
    return reads * SIZE[types[0]] + writes * SIZE[types[-1]]


def bound(card: Card, kernel: str, counts: dict[str, float]) -> tuple[str, float]:
    """Return what takes longest, and the share of the card's bandwidth that it leaves."""
    memory = bytes_of(kernel) / card.bandwidth
    times = {unit: card.picoseconds(unit, n) for unit, n in counts.items()}
    slowest = max(times, key=lambda unit: times[unit])
    return ("memory", 1.0) if times[slowest] <= memory else (slowest, memory / times[slowest])


def shown(code: Figures) -> bool:
    """Return whether the table shows a kernel. It shows long rows without entropy, not in parts, and no fp16."""
    others = ("score_parts", "fp16", "short", "middle", "entropy", "bonus", "sum_rows")
    narrow = code.source == "Triton" and code.kernel.startswith("sample_rows") and "wide" not in code.kernel
    return not narrow and not any(word in code.kernel for word in others)


def table() -> str:
    codes = {(c.source, c.kernel, c.arch): c for c in kept_figures()[0] if shown(c)}
    head = " | ".join(f"{card.name}: instructions | bound by | bandwidth" for card in CARDS)
    lines = [f"| | kernel | bytes | {head} |", "|---|---|---|" + "---|" * 3 * len(CARDS)]
    for source, kernel in sorted({(source, kernel) for source, kernel, _ in codes}):
        cells = []
        for card in CARDS:
            code = codes[source, kernel, card.arch]
            least, random = code.least, code.random
            said = f"{least['issue']:.1f}"
            if random["issue"] > least["issue"] + 0.05:
                said += f" to {random['issue']:.1f}"
            unit, share = bound(card, kernel, random)
            best = bound(card, kernel, least)[1]
            shares = f"{share:.0%}" if f"{share:.0%}" == f"{best:.0%}" else f"{share:.0%} to {best:.0%}"
            cells += [said, unit, shares]
        lines.append(f"| {source} | `{kernel}` | {bytes_of(kernel):g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def few_rows() -> str:
    """Return a sentence on the time of sampling where a row has a multiprocessor to itself."""
    codes = {c.arch: c for c in kept_figures()[0] if c.source == "CUDA" and c.kernel == "sample_rows<bf16>"}
    said = []
    for card in CARDS:
        counts = codes[card.arch].least
        slowest = max(card.picoseconds(unit, n) for unit, n in counts.items()) * card.multiprocessors
        memory = 2 / card.bandwidth * card.multiprocessors
        said.append(f"{FEW * max(slowest, memory) / 1e6:.0f} µs on an {card.name}")
    return (
        f"Where a batch has 64 rows of {FEW:,} bf16 logits, each row has a multiprocessor to itself. `sample_rows`\n"
        f"then sums up a row in {', '.join(said[:-1])} and {said[-1]}.\n"
    )


def main() -> int:
    """Return the exit status."""
    made = f"{table()}\n{few_rows()}\nThe machine code comes from {kept_figures()[1]}.\n"
    return brought_up_to_date("roofline", made, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
