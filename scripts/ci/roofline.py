"""A model of what bounds each kernel on two cards, and by how much: written into docs/gpu.md, between its marks. No
device was involved.

Bytes are those that csrc/cuda/plan.h declares and trace.sh counts. Instructions are those of a kernel's inner loops in
the machine code, for each logit: along the shortest way through a loop, and where threads keep a running maximum also
those by which one takes a new one, as often as a warp does that on random logits. Each goes to a unit of the
multiprocessor; what takes longest, a unit, the issue of instructions or memory at its data-sheet bandwidth, is what
bounds the kernel. Latencies, caches, heads and tails of rows, and clocks below the data sheet's are left out.

    python scripts/ci/roofline.py [FILE WRITTEN]    FILE must hold what is found; WRITTEN is it, brought up to date
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from aot import stale
from machine_code import ROOT, SIZE, Code, all_code, versions

VOCAB = 128256  # of which only the number of packs of a thread depends


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
)
UNITS = {
    "fp32": "FADD FMUL FFMA IMAD HFMA2",
    "int": "IADD3 VIADD LOP3 SHF LEA ISETP FSETP FMNMX IMNMX VIMNMX FSEL SEL PRMT F2FP MOV FSET",
    "special": "MUFU F2F I2F F2I FRND",  # and conversions
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
}
UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}


# --- loops --------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    """A line of machine code."""

    address: int
    predicate: str
    opcode: str
    operands: str


def instructions(code: Code) -> list[Instruction]:
    found = re.findall(r"^([0-9a-f]{4,}) (@!?U?P\w+ )?([A-Z][\w.]*)(.*)$", code.sass, re.MULTILINE)
    return [Instruction(int(address, 16), predicate, opcode, rest) for address, predicate, opcode, rest in found]


class Loop(NamedTuple):
    """An innermost loop: what is done every time, and what on longer ways only."""

    always: list[Instruction]
    sometimes: list[Instruction]

    def accesses(self, opcode: str, width: str = ".128") -> int:
        """Of a thread, of that width."""
        return sum(x.opcode.startswith(opcode) and width in x.opcode for x in self.always)


def loops(code: Code) -> list[Loop]:
    """Those that a branch backwards closes and that hold no other: blocks of instructions from its target to it."""
    lines = instructions(code)
    index = {x.address: i for i, x in enumerate(lines)}
    target = {i: index.get(int(x.operands.split()[-1], 16)) for i, x in enumerate(lines)
              if x.opcode.startswith("BRA") and x.operands.split()[-1].startswith("0x")}  # fmt: skip
    spans = sorted({(at, i) for i, at in target.items() if at is not None and at < i})
    found = []
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        # the least number of instructions from the first one to each, by the branches that lead forward
        length: dict[int, tuple[int, int]] = {first: (1, first)}  # and the one before
        for i in range(first, last):
            if i not in length:
                continue
            ways = [i + 1] if i not in target or lines[i].predicate or "P" in lines[i].operands else []
            if i in target and target[i] is not None and first <= target[i] <= last:
                ways.append(target[i])
            for to in ways:
                if to > i and (to not in length or length[i][0] + 1 < length[to][0]):
                    length[to] = (length[i][0] + 1, i)
        at, way = last, {last, first}
        while at != first:
            at = length[at][1]
            way.add(at)
        found.append(Loop([lines[i] for i in sorted(way)], [lines[i] for i in range(first, last + 1) if i not in way]))
    return found


# --- the model ----------------------------------------------------------------------------------------------------


def traffic() -> dict[str, tuple[float, float]]:
    """Reads and writes of each logit, as plan.h declares them."""
    text = (ROOT / "csrc/cuda/plan.h").read_text()
    return {name: (float(r), float(w)) for name, r, w in re.findall(r"(k\w+)\{([\d.]+), ([\d.]+)\}", text)}


def declared(kernel: str) -> tuple[float, float]:
    """Of a kernel by name; of a row to sample from without the tile that is read again."""
    if "known" in kernel:
        return traffic()["kKnownKept" if "kept" in kernel else "kKnownReread"]
    names = {"score": "kForward", "write": "kBackward", "scale": "kScale", "sample": "kForward"}
    return traffic()[names[kernel.split("_", 1)[0]]]


def sizes(kernel: str) -> tuple[int, int]:
    """Bytes of a logit and of its gradient."""
    dtype, gradient = re.findall(r"<(\w+)(?: -> (\w+))?", kernel)[0]
    return SIZE[dtype], SIZE[gradient or dtype]


def bytes_of(kernel: str) -> float:
    """That are moved for each logit."""
    return sum(times * size for times, size in zip(declared(kernel), sizes(kernel), strict=True))


def rises(packs: int) -> float:
    """In how many of a thread's packs its warp takes a new maximum, on average: where one of 32 threads does, which is
    so for a thread's k-th pack of independent logits with probability 1/k."""
    return sum(1 - (1 - 1 / k) ** 32 for k in range(1, packs + 1)) / packs


def per_logit(code: Code) -> tuple[dict[str, float], dict[str, float]]:
    """Instructions of each unit for each logit, at least and on random logits."""
    width = 16 // sizes(code.kernel)[0]
    least: Counter[str] = Counter()
    random: Counter[str] = Counter()
    for loop in loops(code):
        reads, writes = max(loop.accesses("LDG"), loop.accesses("LDS")), loop.accesses("STG")
        logits = width * reads
        if not reads and code.kernel.startswith("sample_rows"):  # a tile, from shared memory
            logits = loop.accesses("LDS", "")
        if logits == 0 or not (writes or loop.accesses("MUFU", ".EX2")):
            continue  # zeros, sums of what blocks have found
        count: dict[str, Counter[str]] = defaultdict(Counter)
        for name, lines in (("always", loop.always), ("sometimes", loop.sometimes)):
            for x in lines:
                for unit in ("issue", UNIT_OF.get(x.opcode.split(".")[0], "")):
                    count[name][unit] += 1 / logits
        # what a pass that writes does on longer ways, it does once a row, for the label
        often = 0.0 if writes else rises(max(VOCAB // width // code.threads, 1))
        for unit in ("issue", *UNITS):
            least[unit] += count["always"][unit]
            random[unit] += count["always"][unit] + often * count["sometimes"][unit]
    return dict(least), dict(random)


def bound(card: Card, bytes_moved: float, counts: dict[str, float]) -> tuple[str, float]:
    """What takes longest, and the share of the card's bandwidth that it leaves."""
    memory = bytes_moved / card.bandwidth
    times = {unit: card.picoseconds(unit, n) for unit, n in counts.items()}
    slowest = max(times, key=lambda unit: times[unit])
    return ("memory", 1.0) if times[slowest] <= memory else (slowest, memory / times[slowest])


def shown(code: Code) -> bool:
    """A row's kernel as most calls take it: long rows, no entropy, fp16 as bf16."""
    others = ("fp16", "short", "middle", "entropy", "sum_rows")
    narrow = code.source == "Triton" and code.kernel.startswith("sample_rows") and "wide" not in code.kernel
    return not narrow and not any(word in code.kernel for word in others)


def table() -> str:
    codes = {(c.source, c.kernel, c.arch): c for c in all_code("", tuple(card.arch for card in CARDS)) if shown(c)}
    head = " | ".join(f"{card.name}: instructions | bound by | bandwidth" for card in CARDS)
    lines = [f"| | kernel | bytes | {head} |", "|---|---|---|" + "---|" * 3 * len(CARDS)]
    for source, kernel in sorted({(source, kernel) for source, kernel, _ in codes}):
        moved, cells = bytes_of(kernel), []
        for card in CARDS:
            least, random = per_logit(codes[source, kernel, card.arch])
            said = f"{least['issue']:.1f}"
            if random["issue"] > least["issue"] + 0.05:
                said += f" to {random['issue']:.1f}"
            unit, share = bound(card, moved, random)
            best = bound(card, moved, least)[1]
            shares = f"{share:.0%}" if f"{share:.0%}" == f"{best:.0%}" else f"{share:.0%} to {best:.0%}"
            cells += [said, unit, shares]
        lines.append(f"| {source} | `{kernel}` | {moved:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The exit status."""
    made = f"{table()}\nFrom {versions()}.\n"
    if len(sys.argv) == 1:
        print(made, end="")
        return 0
    page, written = map(Path, sys.argv[1:])
    before, rest = page.read_text().split("<!-- roofline -->\n")
    after = rest.split("<!-- end of roofline -->\n")[1]
    made = f"{before}<!-- roofline -->\n{made}<!-- end of roofline -->\n{after}"
    written.write_text(made)
    if difference := stale(page, made):
        print(f"{difference}{page} is out of date: cp {written} {page}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
