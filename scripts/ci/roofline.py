"""A model of what bounds each kernel on three cards, and by how much: written into docs/gpu.md, between its marks. No
device was involved.

Bytes are those that csrc/cuda/plan.h declares and trace.sh counts. Instructions are those of a kernel's inner loops in
the machine code, for each logit: along the shortest way through a loop, and where threads keep a running maximum also
the longer way by which they take a new one, as often as a warp does that on random logits. Each goes to a unit of the
multiprocessor; what takes longest, a unit, the issue of instructions or memory at its data-sheet bandwidth, is what
bounds the kernel. Latencies, caches, heads and tails of rows, and clocks below the data sheet's are left out.

    python scripts/ci/roofline.py [FILE WRITTEN]    FILE must hold what is found; WRITTEN is it, brought up to date
"""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

from inner_loops import per_logit
from machine_code import ROOT, SIZE, Code, all_code, versions
from marked import brought_up_to_date

FEW = 151936  # of a row that is sampled beside few others


class Card(NamedTuple):
    """As in its data sheet, and in the throughput table of the CUDA programming guide for its architecture."""

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float  # TB/s
    fp32: float  # Tflop/s
    lanes: dict[str, int]  # threads whose instruction each unit takes in a cycle

    def picoseconds(self, unit: str, instructions: float) -> float:
        """What so many of each thread take, for each thread."""
        clock = self.fp32 / 2 / self.multiprocessors / self.lanes["fp32"]  # THz
        return instructions / (clock * self.multiprocessors * self.lanes[unit])


CARDS = (
    Card("A100", 80, 108, 2.039, 19.5, {"issue": 128, "fp32": 64, "int": 64, "special": 16, "fp64": 32}),
    Card("H100", 90, 132, 3.35, 66.9, {"issue": 128, "fp32": 128, "int": 64, "special": 16, "fp64": 64}),
    Card("H200", 90, 132, 4.8, 66.9, {"issue": 128, "fp32": 128, "int": 64, "special": 16, "fp64": 64}),
)


# --- the model ----------------------------------------------------------------------------------------------------


def traffic() -> dict[str, tuple[float, float]]:
    """Reads and writes of each logit, as plan.h declares them."""
    text = (ROOT / "csrc/cuda/plan.h").read_text()
    return {name: (float(r), float(w)) for name, r, w in re.findall(r"(k\w+)\{([\d.]+), ([\d.]+)\}", text)}


def declared(kernel: str) -> tuple[float, float]:
    """Of a kernel by name; of a row to sample from without the tile that is read again."""
    if "known" in kernel:
        return traffic()["kKnownKept" if "kept" in kernel else "kKnownReread"]  # Triton's reads twice
    names = {"score": "kForward", "write": "kBackward", "scale": "kScale", "sample": "kForward"}
    return traffic()[names[kernel.split("_", 1)[0]]]


def bytes_of(kernel: str) -> float:
    """For each logit; a gradient may be narrower."""
    reads, writes = declared(kernel)
    types = re.findall("|".join(SIZE), kernel)
    return reads * SIZE[types[0]] + writes * SIZE[types[-1]]


def bound(card: Card, kernel: str, counts: dict[str, float]) -> tuple[str, float]:
    """What takes longest, and the share of the card's bandwidth that it leaves."""
    memory = bytes_of(kernel) / card.bandwidth
    times = {unit: card.picoseconds(unit, n) for unit, n in counts.items()}
    slowest = max(times, key=lambda unit: times[unit])
    return ("memory", 1.0) if times[slowest] <= memory else (slowest, memory / times[slowest])


def shown(code: Code) -> bool:
    """A row's kernel as most calls take it: long rows, no entropy, fp16 as bf16."""
    others = ("fp16", "short", "middle", "entropy", "bonus", "sum_rows")
    narrow = code.source == "Triton" and code.kernel.startswith("sample_rows") and "wide" not in code.kernel
    return not narrow and not any(word in code.kernel for word in others)


def table() -> str:
    codes = {(c.source, c.kernel, c.arch): c for c in all_code("", tuple({card.arch for card in CARDS})) if shown(c)}
    head = " | ".join(f"{card.name}: instructions | bound by | bandwidth" for card in CARDS)
    lines = [f"| | kernel | bytes | {head} |", "|---|---|---|" + "---|" * 3 * len(CARDS)]
    for source, kernel in sorted({(source, kernel) for source, kernel, _ in codes}):
        cells = []
        for card in CARDS:
            least, random = per_logit(codes[source, kernel, card.arch])
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
    """What sampling takes where a row has a multiprocessor to itself."""
    codes = {
        c.arch: c
        for c in all_code("cuda/sample", tuple({card.arch for card in CARDS}))
        if c.kernel == "sample_rows<bf16>"
    }
    said = []
    for card in CARDS:
        counts, _ = per_logit(codes[card.arch])
        slowest = max(card.picoseconds(unit, n) for unit, n in counts.items()) * card.multiprocessors
        memory = 2 / card.bandwidth * card.multiprocessors
        said.append(f"{FEW * max(slowest, memory) / 1e6:.0f} µs on an {card.name}")
    return (
        f"Where a batch has 64 rows of {FEW:,} bf16 logits, each row has a multiprocessor to itself. `sample_rows`\n"
        f"then sums up a row in {', '.join(said[:-1])} and {said[-1]}.\n"
    )


def main() -> int:
    """The exit status."""
    made = f"{table()}\n{few_rows()}\nThe machine code comes from {versions()}.\n"
    return brought_up_to_date("roofline", made, sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
