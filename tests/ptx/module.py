"""Read PTX as kernels with parameters, shared variables and instructions, and find where fences are missing."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SIZES = re.compile(r"\d+$")


def size_of(kind: str) -> int:
    """Return the bytes of a PTX type such as u32, f64, b8 or bf16."""
    found = _SIZES.search(kind)
    assert found, kind
    return int(found[0]) // 8


@dataclass(frozen=True)
class Instruction:
    """Hold an instruction.

    ``guard`` is a predicate with whether it is negated, or None. ``op`` is the opcode, split at its dots.
    """

    guard: tuple[str, bool] | None
    op: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


@dataclass
class Kernel:
    """Hold a kernel.

    Attributes:
        parameters: the offset and the bytes of each name in the parameter space.
        shared: the offset of each name in static shared memory. The dynamic one starts at ``shared_bytes``.
        registers: the PTX type of each prefix of a name.
    """

    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", re.DOTALL)
_SHARED = re.compile(r"(?:\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;")


def _statements(body: str) -> list[str]:
    return [s.strip() for s in body.split(";")]


def _end(text: str, start: int) -> int:
    depth = 1
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError("a PTX body without an end")


def parse(ptx: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX file by their names."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/|\.loc\s[^\n]*", "", ptx, flags=re.DOTALL)
    first = _ENTRY.search(text)
    outside = text[: first.start()] if first else ""
    kernels = {}
    for entry in _ENTRY.finditer(text):
        body = text[entry.end() : _end(text, entry.end())]
        kernel = Kernel(entry[1])
        offset = 0
        for declared in entry[2].split(","):
            if declared.strip():
                p = re.search(
                    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[\s.\w]*?)?\s+([\w$]+)(?:\[(\d+)\])?\s*$",
                    declared.strip(),
                )
                assert p, declared
                n = size_of(p[2]) * int(p[4] or 1)
                offset = -(-offset // int(p[1] or n)) * int(p[1] or n)
                kernel.parameters[p[3]] = (offset, n)
                offset += n
        dynamic = []
        for align, kind, name, count in _SHARED.findall(outside + body):
            if count == "" and name in outside:
                dynamic.append(name)
                continue
            start = -(-kernel.shared_bytes // int(align)) * int(align)
            kernel.shared[name] = start
            kernel.shared_bytes = start + size_of(kind) * int(count or 1)
        kernel.shared_bytes = -(-kernel.shared_bytes // 16) * 16
        kernel.shared |= dict.fromkeys(dynamic, kernel.shared_bytes)
        _read_body(kernel, body)
        kernels[kernel.name] = kernel
    return kernels


def _read_body(kernel: Kernel, body: str) -> None:
    for whole in _statements(body):
        statement = whole
        while True:  # scopes and labels come before a statement
            statement = statement.lstrip("{}\n\t ")
            label = re.match(r"([\w$]+):(?!:)", statement)
            if not label:
                break
            kernel.labels[label[1]] = len(kernel.code)
            statement = statement[label.end() :]
        statement = re.sub(r"^(\.pragma[^\n]*\n\s*)+", "", statement).strip()
        if not statement or statement.startswith((".shared", ".pragma", ".file", ".branchtargets")):
            continue
        if statement.startswith(".reg"):
            _, kind, names = statement.split(None, 2)
            for name in names.split(","):
                kernel.registers[re.sub(r"<\d+>$", "", name.strip())] = kind.lstrip(".")
            continue
        guard = None
        if found := re.match(r"@(!?)(%[\w$]+)\s+", statement):
            guard = (found[2], bool(found[1]))
            statement = statement[found.end() :]
        op, _, rest = re.sub(r"\s+", " ", statement).partition(" ")
        operands = tuple(x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s\[{][^,]*", rest))
        kernel.code.append(Instruction(guard, tuple(op.split(".")), operands, statement))


# --- fences --------------------------------------------------------------------------------------------------------


def is_fence(i: Instruction) -> bool:
    """Return whether an instruction orders this thread's accesses for all threads of the device."""
    if i.op[0] == "membar":
        return i.op[1] in ("gl", "sys")
    return i.op[0] == "fence" and "cta" not in i.op


def _orders(i: Instruction, *kinds: str) -> bool:
    return is_fence(i) or (i.op[0] in ("atom", "red") and any(kind in i.op for kind in kinds))


def missing_fences(kernel: Kernel) -> list[str]:
    """Return the accesses to global memory that lack a fence.

    An atomic lacks one if a path without a fence leads to it from the kernel's start or from a store to global memory.
    A load from global memory lacks one if such a path leads to it from an atomic.
    """
    code, found = kernel.code, []
    for what, start, taints, clears, is_bad in (
        ("no fence before", True, lambda i: i.op[0] == "st" and "global" in i.op, ("release", "acq_rel"),
         lambda i: i.op[0] == "atom" and not _orders(i, "release", "acq_rel")),
        ("no fence after the atomic and before", False,
         lambda i: i.op[0] == "atom" and not _orders(i, "acquire", "acq_rel"), ("acquire", "acq_rel"),
         lambda i: i.op[0] == "ld" and "global" in i.op),
    ):  # fmt: skip
        tainted: set[int] = set()
        waiting = [(0, start)]
        visited: set[tuple[int, bool]] = set()
        while waiting:
            at, taint = waiting.pop()
            if at >= len(code) or (at, taint) in visited:
                continue
            visited.add((at, taint))
            i = code[at]
            if taint and is_bad(i):
                tainted.add(at)
            after = (taint and not (_orders(i, *clears) and i.guard is None)) or taints(i)
            if i.op[0] == "bra":
                waiting.append((kernel.labels[i.operands[0]], after))
                if i.guard is None:
                    continue
            if i.op[0] in ("ret", "exit") and i.guard is None:
                continue
            waiting.append((at + 1, after))
        found += [f"{what} {code[at].text!r} at instruction {at}" for at in sorted(tainted)]
    return found


def atomics(kernel: Kernel) -> int:
    """Return how many atomics a kernel has."""
    return sum(i.op[0] == "atom" for i in kernel.code)
