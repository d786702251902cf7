"""Find the inner loops of a kernel's machine code and their cost for each logit, for aot.py and roofline.py."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import NamedTuple

from machine_code import SIZE, Code

VOCAB = 128256  # only the number of packs of a thread depends on these
UNITS = {
    "fp32": "FADD FMUL FFMA IMAD HFMA2",
    "int": "IADD3 VIADD LOP3 SHF LEA ISETP FSETP FMNMX IMNMX VIMNMX FSEL SEL PRMT F2FP MOV FSET",
    "special": "MUFU F2F I2F F2I FRND",  # conversions run on this unit, too
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
}
UNIT_OF = {opcode: unit for unit, opcodes in UNITS.items() for opcode in opcodes.split()}


class Instruction(NamedTuple):
    """Hold a line of machine code."""

    address: int
    predicate: str
    opcode: str
    operands: str


def instructions(code: Code) -> list[Instruction]:
    """Return all instructions of a kernel."""
    found = re.findall(r"^([0-9a-f]{4,}) (@!?U?P\w+ )?([A-Z][\w.]*)(.*)$", code.sass, re.MULTILINE)
    return [Instruction(int(address, 16), predicate, opcode, rest) for address, predicate, opcode, rest in found]


class Loop(NamedTuple):
    """Describe an innermost loop: the instructions of every round, those of longer ways only, and the longest way."""

    always: list[Instruction]
    sometimes: list[Instruction]
    longest: list[Instruction]

    def accesses(self, opcode: str, width: str = ".128") -> int:
        """Return the accesses of a thread that have this width."""
        return sum(x.opcode.startswith(opcode) and width in x.opcode for x in self.always)

    @property
    def loads(self) -> int:
        """Return the wide loads, from either memory."""
        return max(self.accesses("LDG"), self.accesses("LDS"))

    @property
    def late_loads(self) -> int:
        """Return the wide loads from memory after the first instruction of the special-function unit."""
        special = [x.opcode.startswith("MUFU") for x in self.always]
        behind = self.always[special.index(True) :] if any(special) else []
        return sum(x.opcode.startswith("LDG") and ".128" in x.opcode for x in behind)


def _way(first: int, last: int, leads: dict[int, list[int]], better: Callable[[int, int], bool]) -> set[int] | None:
    """Return the instructions of the shortest or longest forward way from one to another, or None."""
    # for each instruction, this holds the number of instructions up to it and the one before it
    found: dict[int, tuple[int, int]] = {first: (1, first)}
    for i in range(first, last):
        for to in leads[i] if i in found else []:
            if to > i and (to not in found or better(found[i][0] + 1, found[to][0])):
                found[to] = (found[i][0] + 1, i)
    if last not in found:
        return None
    at, way = last, {last, first}
    while at != first:
        at = found[at][1]
        way.add(at)
    return way


def loops(code: Code) -> list[Loop]:
    """Return the loops that a backward branch closes and that contain no other loop, as blocks of instructions."""
    lines = instructions(code)
    index = {x.address: i for i, x in enumerate(lines)}
    target = {i: index.get(int(x.operands.split()[-1], 16)) for i, x in enumerate(lines)
              if x.opcode.startswith("BRA") and x.operands.split()[-1].startswith("0x")}  # fmt: skip
    spans = sorted({(at, i) for i, at in target.items() if at is not None and at < i})
    found = []
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        leads: dict[int, list[int]] = {}
        for i in range(first, last):
            # BRA.DIV handles warps whose threads have diverged, and these warps' threads have not
            divides = lines[i].opcode == "BRA.DIV"
            goes_on = i not in target or divides or lines[i].predicate or "P" in lines[i].operands
            leads[i] = [i + 1] if goes_on else []
            to = target.get(i)
            if not divides and to is not None and first <= to <= last:
                leads[i].append(to)
        way = _way(first, last, leads, lambda x, y: x < y)
        longest = _way(first, last, leads, lambda x, y: x > y)
        if way is None or longest is None:
            continue  # the target of BRA.DIV comes back
        rest = [lines[i] for i in range(first, last + 1) if i not in way]
        found.append(Loop([lines[i] for i in sorted(way)], rest, [lines[i] for i in sorted(longest)]))
    return found


def rounds(code: Code) -> list[Loop]:
    """Return the innermost loops that work on logits, and for sampling all of them.

    Of the loops that write and of those that do not, this is the longest of those with the most wide loads. The others
    are for the rest of a row, or for a row without a bonus.
    """
    found = [x for x in loops(code) if x.accesses("STG") or x.accesses("MUFU", ".EX2")]
    if code.kernel.startswith("sample_rows"):
        return found
    passes = [[x for x in found if (x.accesses("STG") > 0) == writes] for writes in (False, True)]
    return [max(those, key=lambda x: (x.loads, len(x.always))) for those in passes if those]


def rises(packs: int, loads: int, shared: bool) -> float:
    """Return in how many of its rounds a warp takes a new maximum, on average, for independent logits.

    If its threads share one maximum, this happens in round k with probability 1/k. Otherwise it happens if one of 32
    threads takes a new maximum, which each does for its k-th pack with that probability.
    """
    if shared:
        n = max(packs // loads, 1)
        return sum(1 / k for k in range(1, n + 1)) / n
    return sum(1 - (1 - 1 / k) ** 32 for k in range(1, packs + 1)) / packs


def per_logit(code: Code) -> tuple[dict[str, float], dict[str, float]]:
    """Return the instructions of each unit for each logit, at least and on random logits."""
    width = 16 // SIZE[code.kernel.split("<")[1][:4]]
    least: Counter[str] = Counter()
    random: Counter[str] = Counter()
    for loop in rounds(code):
        writes, logits = loop.accesses("STG"), width * loop.loads
        tile = code.source == "CUDA" and code.kernel.startswith("sample_rows") and loop.loads > 0
        # each warp has 512 logits, and the load beside its own is for rows that are not aligned
        if tile:
            logits = 512 // 32
        if logits == 0:
            continue  # this loop writes zeros
        count: dict[str, Counter[str]] = defaultdict(Counter)
        for name, lines in (("always", loop.always), ("sometimes", loop.sometimes), ("longest", loop.longest)):
            for x in lines:
                for unit in ("issue", UNIT_OF.get(x.opcode.split(".")[0], "")):
                    count[name][unit] += 1 / logits
        # a pass that writes takes its longer ways once for each row, where the label is
        shared = loop.accesses("VOTE", "") > 0
        often = 0.0 if writes or tile else rises(max(VOCAB // width // code.threads, 1), loop.loads, shared)
        for unit in ("issue", *UNITS):
            always = count["always"][unit]
            more = count["longest"][unit] - always if shared else count["sometimes"][unit]
            least[unit] += always
            random[unit] += always + often * more
    return dict(least), dict(random)
