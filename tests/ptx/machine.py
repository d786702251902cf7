"""Run PTX in numpy, as the manual of the instruction set says and no more. Nothing of it is fast.

Blocks take turns at random, at every fence and atomic. The warps of a block run in a shuffled order from barrier to
barrier, and the lanes of a warp run together.

Memory is as weak as PTX allows, and no stronger. A block sees global memory as it was at the launch, and its own
stores. Only a fence publishes them and brings what others have published. Atomics act at once. So where a fence is
missing, the last block may read what stood there before. Accesses must be aligned and inside a tensor.

Where the manual bounds the error of an approximation instead of defining it (ex2.approx, rcp.approx), the result is
moved at random within that bound.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from module import Instruction, Kernel, is_fence, size_of

Array = np.ndarray[Any, Any]
Action = Callable[["Warp"], None]
LANES = 32
_TYPES: dict[str, Any] = {
    "u8": np.uint8, "s8": np.int8, "b8": np.uint8, "u16": np.uint16, "s16": np.int16, "b16": np.uint16,
    "f16": np.float16, "u32": np.uint32, "s32": np.int32, "b32": np.uint32, "f32": np.float32, "u64": np.uint64,
    "s64": np.int64, "b64": np.uint64, "f64": np.float64, "pred": np.bool_,
}  # fmt: skip
_RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BASE, _GAP = 1 << 36, 256


class Fault(Exception):
    """Report what a device, or compute-sanitizer, would stop at."""


# --- memory ----------------------------------------------------------------------------------------------------


class Memory:
    """Hold the tensors of global memory with gaps between them, at the addresses of 256-byte allocations."""

    def __init__(self) -> None:
        self.data = np.zeros(_GAP, np.uint8)
        self.inside = np.zeros(_GAP, bool)

    def add(self, x: Array, inside: Array | None = None) -> int:
        """Copy a contiguous array there and return its address.

        ``inside`` says which of its bytes may be accessed. By default all of them may be.
        """
        raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        start = self.data.size
        padding = _GAP + -raw.size % _GAP
        self.data = np.concatenate([self.data, raw, np.full(padding, 0xFF, np.uint8)])
        inside = np.ones(raw.size, bool) if inside is None else inside
        self.inside = np.concatenate([self.inside, inside, np.zeros(padding, bool)])
        return _BASE + start

    def get(self, address: int, like: Array) -> Array:
        """Return what stands there now."""
        start = address - _BASE
        return self.data[start : start + like.nbytes].copy().view(like.dtype).reshape(like.shape)

    def start_counting(self) -> None:
        """Start to count by how many accesses of a warp each byte is read and written."""
        self.reads, self.writes = np.zeros(self.data.size, np.int32), np.zeros(self.data.size, np.int32)

    def traffic(self, address: int, n: int) -> tuple[float, float]:
        """Return the reads and writes per byte of n bytes since the launch."""
        at = slice(address - _BASE, address - _BASE + n)
        return float(self.reads[at].mean()), float(self.writes[at].mean())


class View:
    """Show global memory as one block sees it."""

    def __init__(self, memory: Memory, at_launch: Array) -> None:
        self.memory, self.seen = memory, at_launch.copy()
        self.pending = np.zeros(self.seen.size, bool)
        self.by, self.when = np.zeros(self.seen.size, np.int32), np.zeros(self.seen.size, np.int32)
        self.epoch = 0  # the number of barriers that were passed

    def _places(self, address: Array, n: int) -> Array:
        if (address % np.uint64(n)).any():
            raise Fault(f"misaligned access of {n} bytes at {hex(int(address[address % np.uint64(n) != 0][0]))}")
        places = (address - np.uint64(_BASE)).astype(np.int64)[:, None] + np.arange(n)
        size = self.memory.inside.size
        if (places < 0).any() or (places >= size).any() or not self.memory.inside[places].all():
            raise Fault(f"access of {n} bytes outside every tensor, near {hex(int(address[0]))}")
        return places

    def load(self, address: Array, n: int) -> Array:
        places = self._places(address, n)
        self.memory.reads[np.unique(places)] += 1  # lanes that read the same byte read it at once
        return self.seen[places]

    def store(self, address: Array, values: Array, threads: Array) -> None:
        places = self._places(address, values.shape[1])
        self.memory.writes[np.unique(places)] += 1
        self.seen[places] = values
        self.pending[places] = True
        self.by[places] = threads[:, None]
        self.when[places] = self.epoch

    def fence(self, threads: Array) -> None:
        """Publish stores of this block, and get those that others have published.

        The stores are those of these threads, and those of the whole block from before the last barrier.
        """
        out = self.pending & (np.isin(self.by, threads) | (self.when < self.epoch))
        self.memory.data[out] = self.seen[out]
        self.pending &= ~out
        self.seen = np.where(self.pending, self.seen, self.memory.data)

    def finish(self) -> None:
        """Publish the rest at the end of the kernel."""
        self.memory.data[self.pending] = self.seen[self.pending]

    def atomic(self, address: int, n: int, change: Callable[[int], int]) -> int:
        places = self._places(np.array([address], np.uint64), n)[0]
        old = int.from_bytes(self.memory.data[places].tobytes(), "little")
        new = np.frombuffer((change(old) % (1 << 8 * n)).to_bytes(n, "little"), np.uint8)
        self.memory.data[places] = self.seen[places] = new
        return old


# --- arithmetic ----------------------------------------------------------------------------------------------------


def _fma(a: Array, b: Array, c: Array) -> Array:
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    p = a * b
    split = 134217729.0
    ta, tb = split * a, split * b
    ah, bh = ta - (ta - a), tb - (tb - b)
    al, bl = a - ah, b - bh
    e = ((ah * bh - p) + ah * bl + al * bh) + al * bl  # this is the rounding error of the product
    s = p + c
    d = s - p
    t = (p - (s - d)) + (c - d)  # this is the rounding error of the sum
    exact = s + (t + e)
    return np.where(np.isfinite(exact), exact, s)


def _down(exact: Array, kind: Any) -> Array:
    near = exact.astype(kind)
    return np.where(near.astype(np.float64) > exact, np.nextafter(near, kind(-np.inf)), near)


def _to_bf16(x: Array) -> Array:
    """Return the bits of fp32 rounded to the nearest bf16."""
    raw = x.view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _ftz(x: Array) -> Array:
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x) if x.dtype == np.float32 else x


def _divide(a: Array, b: Array) -> Array:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    if a.dtype.kind == "u":
        return a // safe
    q = np.abs(a) // np.abs(safe)
    return np.where((a < 0) != (safe < 0), -q, q).astype(a.dtype)


def _remainder(a: Array, b: Array) -> Array:
    return (a - _divide(a, b) * np.where(b == 0, 1, b).astype(a.dtype)).astype(a.dtype)


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": lambda x, y: x == y, "ne": lambda x, y: (x < y) | (x > y) if x.dtype.kind == "f" else x != y,
    "lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    "lo": lambda x, y: x < y, "ls": lambda x, y: x <= y, "hi": lambda x, y: x > y, "hs": lambda x, y: x >= y,
    "equ": lambda x, y: ~((x < y) | (x > y)), "neu": lambda x, y: x != y, "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y), "gtu": lambda x, y: ~(x <= y), "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)), "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}  # fmt: skip
_BOOLEAN: dict[str, Callable[[Array, Array], Array]] = {"and": np.logical_and, "or": np.logical_or,
                                                        "xor": np.logical_xor}  # fmt: skip
_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "rem": _remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "copysign": lambda a, b: np.copysign(b, a),
    "max": lambda a, b: np.fmax(a, b) if a.dtype.kind == "f" else np.maximum(a, b),
    "min": lambda a, b: np.fmin(a, b) if a.dtype.kind == "f" else np.minimum(a, b),
}  # fmt: skip
_ONE: dict[str, Callable[[Array], Array]] = {"neg": np.negative, "abs": np.abs, "not": np.invert, "sqrt": np.sqrt,
                                             "mov": lambda x: x, "cvta": lambda x: x}  # fmt: skip


# --- instructions --------------------------------------------------------------------------------------------------


class Program:
    """Hold a kernel, with each instruction as a function of a warp."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.index: dict[str, int] = {}
        self.widths: list[Any] = []
        self.actions = [self._action(i) for i in kernel.code]
        self.guards = [None if i.guard is None else (self._register(i.guard[0]), i.guard[1]) for i in kernel.code]
        self.pauses = [i.op[0] == "atom" or is_fence(i) for i in kernel.code]

    def fresh_registers(self) -> list[Array]:
        """Return the registers of a warp, with nonsense in them."""
        start = {t: True if t is np.bool_ else 0xA5A5A5A5A5A5A5A5 & np.iinfo(t).max for t in set(self.widths)}
        rows = {t: iter(np.full((self.widths.count(t), LANES), x, t)) for t, x in start.items()}
        return [next(rows[t]) for t in self.widths]

    def _register(self, name: str) -> int:
        if name not in self.index:
            kind = self.kernel.registers.get(name) or self.kernel.registers[name.rstrip("0123456789")]
            self.index[name] = len(self.widths)
            self.widths.append(np.bool_ if kind == "pred" else _RAW[size_of(kind)])
        return self.index[name]

    def _read(self, x: str, kind: Any) -> Callable[[Warp], Array]:
        kind = np.dtype(kind)
        if x.startswith(("-%", "!%")):
            inner, op = self._read(x[1:], kind), np.negative if x[0] == "-" else np.logical_not
            return lambda w: op(inner(w))
        if x.startswith(("%tid.", "%ntid.", "%ctaid.", "%nctaid.", "%laneid")):
            return lambda w: w.special(x).astype(kind)
        if x.startswith("%"):
            i = self._register(x)
            size = np.dtype(self.widths[i]).itemsize
            if kind == np.bool_ or size == kind.itemsize:
                return lambda w: w.registers[i].view(kind)
            return lambda w: w.registers[i].astype(_RAW[kind.itemsize]).view(kind)
        if x in self.kernel.shared:
            value = np.array(self.kernel.shared[x], np.uint64)
        elif x in self.kernel.parameters:
            value = np.array(self.kernel.parameters[x][0], np.uint64)
        elif x[:2] in ("0f", "0F", "0d", "0D"):
            raw = int(x[2:], 16)
            value = np.array(raw, np.uint32).view(np.float32) if x[1] in "fF" else np.array(raw, np.uint64).view(float)
            if kind.kind != "f":
                value = np.array(raw, np.uint64)
        else:
            value = np.array(int(x.rstrip("U"), 0) % (1 << 64), np.uint64)
        if kind == np.bool_ or (value.dtype.kind == "f" and kind.kind == "f"):
            constant = value.astype(kind)
        elif kind.itemsize == value.dtype.itemsize:
            constant = value.view(kind)
        else:
            constant = value.astype(_RAW[kind.itemsize]).view(kind)
        full = np.full(LANES, constant)
        return lambda _: full

    def _write(self, x: str) -> Callable[[Warp, Array], None]:
        if x == "_":
            return lambda w, v: None
        i = self._register(x)
        width = self.widths[i]
        if width is np.bool_:
            return lambda w, v: np.copyto(w.registers[i], v, where=w.active)
        size = np.dtype(width).itemsize

        def write(w: Warp, v: Array) -> None:
            if v.dtype.itemsize != size:  # narrower values are extended
                v = v.astype(np.dtype(f"{'i' if v.dtype.kind == 'i' else 'u'}{size}"))
            np.copyto(w.registers[i], v.view(width), where=w.active)

        return write

    def _address(self, x: str) -> tuple[Callable[[Warp], Array], str]:
        found = re.match(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", x)
        assert found, x
        base = found[1]
        kind = np.uint32 if base.startswith("%") and self.widths[self._register(base)] is np.uint32 else np.uint64
        read, offset = self._read(base, kind), np.int64(int(found[2] or "0", 0))
        return lambda w: read(w).astype(np.uint64) + offset.astype(np.uint64), base

    def _action(self, i: Instruction) -> Action | None:
        op, x = i.op, i.operands
        name, kind = op[0], op[-1]
        if name in ("bra", "ret", "exit", "bar", "barrier"):
            return None  # Warp.run does these
        if is_fence(i):
            return lambda w: w.block.view.fence(w.threads[w.active])
        if name in ("membar", "fence", "createpolicy", "discard", "prefetch", "nanosleep"):
            return lambda w: None
        if name in ("ld", "st"):
            return self._access(i)
        if name == "atom":
            return self._atomic(i)
        if name == "shfl":
            return self._shuffle(i)
        if name == "mov" and (x[0].startswith("{") or x[1].startswith("{")):
            return self._pack(i)
        if name == "vote":
            return self._vote(i)
        if name in ("mul24", "prmt", "match", "activemask", "call", "mma", "cp"):
            raise NotImplementedError(i.text)
        if name in ("ldmatrix", "stmatrix"):
            return self._matrices(i)
        write = self._write(x[0].split("|")[0])
        if name == "redux":
            return self._reduce(i, write)
        if name == "setp":
            return self._compare(i)
        if name == "cvt":
            return self._convert(i, write)
        if kind == "f32x2":
            return self._pairs(i, write)
        if kind in ("bf16x2", "f16x2"):
            return self._maxima(i, write)
        if name in ("add", "sub") and op[1:-1] == ("rn", "f32"):  # the first operand is narrower than fp32
            narrow, a, b = kind == "bf16", self._read(x[1], np.uint16), self._read(x[2], np.float32)
            wide: Callable[[Array], Array] = _of_bf16 if narrow else lambda v: v.view(np.float16).astype(np.float32)
            return lambda w: write(w, _TWO[name](wide(a(w)), b(w)))
        t = np.dtype(_TYPES[kind])
        if name == "selp":
            a, b, p = self._read(x[1], t), self._read(x[2], t), self._read(x[3], np.bool_)
            return lambda w: write(w, np.where(p(w), a(w), b(w)))
        if name in ("mul", "mad") and ("wide" in op or "hi" in op):
            return self._wide(i, write)
        if name in ("fma", "mad"):
            a, b, c = (self._read(y, t) for y in x[1:4])
            if name == "mad" and t.kind != "f":
                return lambda w: write(w, a(w) * b(w) + c(w))
            if "rm" in op:
                return lambda w: write(w, _down(a(w).astype(np.float64) * b(w) + c(w), np.float32))
            assert "rn" in op, i.text
            return lambda w: write(w, _fma(a(w), b(w), c(w)))
        if name in ("shl", "shr"):
            a, n = self._read(x[1], t), self._read(x[2], np.uint32)
            return self._shift(name, t, a, n, write)
        if name == "bfe":
            first, n = int(x[2]), int(x[3])
            assert kind in ("u32", "s32") and first + n <= 32 and n > 0, i.text
            up, down, a = np.uint32(32 - first - n), np.uint32(32 - n), self._read(x[1], np.uint32)
            return lambda w: write(w, (a(w) << up).view(t) >> down.astype(t))
        if name == "bfi":
            a, b, (first, n) = self._read(x[1], t), self._read(x[2], t), map(int, x[3:])
            field = t.type((1 << n) - 1)
            return lambda w: write(w, b(w) & ~(field << t.type(first)) | (a(w) & field) << t.type(first))
        if name == "popc":
            a, bits = self._read(x[1], t), np.arange(t.itemsize * 8, dtype=t)[:, None]
            return lambda w: write(w, (a(w) >> bits & t.type(1)).sum(0, dtype=np.uint32))
        if name in ("ex2", "lg2", "rcp", "rsqrt", "tanh") or "approx" in op or "full" in op:
            return self._approximate(i, t, write)
        if name in _TWO:
            a, b, two = self._read(x[1], t), self._read(x[2], t), _TWO[name]
            if t == np.bool_:
                two = _BOOLEAN[name]
            if name in ("max", "min") and len(x) == 4:
                c = self._read(x[3], t)
                return lambda w: write(w, two(two(a(w), b(w)), c(w)))
            assert len(x) == 3 and not {"ftz", "NaN", "sat"} & set(op), i.text
            return lambda w: write(w, two(a(w), b(w)))
        if name in _ONE:
            one, a = np.logical_not if op == ("not", "pred") else _ONE[name], self._read(x[1], t)
            assert len(x) == 2, i.text
            if "ftz" in op:
                return lambda w: write(w, _ftz(one(a(w))))
            return lambda w: write(w, one(a(w)))
        raise NotImplementedError(i.text)

    def _pairs(self, i: Instruction, write: Any) -> Action:
        """Do arithmetic on two fp32 in a register of 64 bits."""
        assert "ftz" not in i.op, i.text
        function = {"fma": _fma, **_TWO}[i.op[0]]
        reads = [self._read(x, np.uint64) for x in i.operands[1:]]
        return lambda w: write(w, function(*(r(w).view(np.float32) for r in reads)).view(np.uint64))

    def _maxima(self, i: Instruction, write: Any) -> Action:
        """Take the larger of each of two pairs of 16-bit floats, and the number where the other one is NaN."""
        assert i.op[0] == "max" and len(i.op) == 2, i.text
        a, b = (self._read(x, np.uint32) for x in i.operands[1:])
        wide: Callable[[Array], Array] = _of_bf16 if i.op[1] == "bf16x2" else lambda v: v.view(np.float16)

        def act(w: Warp) -> None:
            x, y = (np.ascontiguousarray(r(w)).view(np.uint16) for r in (a, b))
            first = (wide(x) >= wide(y)) | np.isnan(wide(y))
            write(w, np.where(first, x, y).view(np.uint32))

        return act

    def _vote(self, i: Instruction) -> Action:
        """Tell whether a predicate holds for any thread of a warp."""
        assert i.op[1:3] == ("sync", "any") and i.op[-1] == "pred", i.text
        write, p, members = self._write(i.operands[0]), self._read(i.operands[1], np.bool_), self._read(
            i.operands[2], np.uint32
        )  # fmt: skip

        def act(w: Warp) -> None:
            w.meet(members(w))
            write(w, np.full(LANES, p(w)[w.active].any()))

        return act

    def _shift(self, name: str, t: Any, a: Any, n: Any, write: Any) -> Action:
        bits = t.itemsize * 8

        def act(w: Warp) -> None:
            by = np.minimum(n(w), bits - 1).astype(t)
            out = a(w) << by if name == "shl" else a(w) >> by
            if name == "shl" or t.kind == "u":
                out = np.where(n(w) >= bits, 0, out).astype(t)
            write(w, out)

        return act

    def _approximate(self, i: Instruction, t: Any, write: Any) -> Action:
        name, flush = i.op[0], "ftz" in i.op
        if name == "div":
            a, b = self._read(i.operands[1], t), self._read(i.operands[2], t)
            return lambda w: write(w, w.blur(a(w).astype(float) / b(w), 2.0**-22).astype(t))
        a = self._read(i.operands[1], t)
        if name == "rcp" and "rn" in i.op:
            return lambda w: write(w, t.type(1) / a(w))
        if name == "rcp" and t == np.float64:  # the lower half of the result is 0
            return lambda w: write(w, ((1.0 / a(w)).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(t))
        function: Callable[[Array], Array] = {
            "ex2": np.exp2, "lg2": np.log2, "rcp": lambda v: 1.0 / v, "rsqrt": lambda v: 1.0 / np.sqrt(v),
            "tanh": np.tanh, "sqrt": np.sqrt,
        }[name]  # fmt: skip
        # The PTX ISA gives these bounds, under floating-point instructions.
        bound = {"ex2": 2.0**-22, "tanh": 2.0**-11}.get(name, 2.0**-23)
        clean: Callable[[Array], Array] = _ftz if flush else lambda v: v

        def act(w: Warp) -> None:
            x = clean(a(w))
            exact = function(x.astype(float))
            write(w, clean(np.where(x == 0, exact, w.blur(exact, bound)).astype(t)))  # the manual says that e^0 is 1

        return act

    def _compare(self, i: Instruction) -> Action:
        t = _TYPES[i.op[-1]]
        p, _, other = i.operands[0].partition("|")
        write, a, b = self._write(p), self._read(i.operands[1], t), self._read(i.operands[2], t)
        write_other = self._write(other) if other else lambda w, v: None
        compare, boolean = _COMPARE[i.op[1]], next((_BOOLEAN[x] for x in i.op[2:] if x in _BOOLEAN), None)
        c = self._read(i.operands[3], np.bool_) if boolean else None

        def act(w: Warp) -> None:
            first = compare(a(w), b(w))
            second = ~first
            if boolean and c:
                first, second = boolean(first, c(w)), boolean(second, c(w))
            write(w, first)
            write_other(w, second)

        return act

    def _convert(self, i: Instruction, write: Any) -> Action:
        modes, to, source = i.op[1:-2], i.op[-2], i.op[-1]
        if to in ("bf16x2", "f16x2"):  # the first operand is the upper half
            assert modes == ("rn",), i.text
            high, low = (self._read(x, np.float32) for x in i.operands[1:])
            half = _to_bf16 if to == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
            wide = np.uint32
            return lambda w: write(w, half(high(w)).astype(wide) << wide(16) | half(low(w)).astype(wide))
        if to == "bf16":
            assert modes == ("rn",), i.text
            a = self._read(i.operands[1], np.float32)
            return lambda w: write(w, _to_bf16(a(w)))
        if source == "bf16":
            assert to in ("f32", "f64"), i.text
            a, kind = self._read(i.operands[1], np.uint16), _TYPES[to]
            return lambda w: write(w, _of_bf16(a(w)).astype(kind))
        t, a = np.dtype(_TYPES[to]), self._read(i.operands[1], _TYPES[source])
        mode = next((m for m in modes if m in ("rn", "rm", "rz", "rp", "rni", "rmi", "rzi", "rpi")), "")
        assert mode not in ("rz", "rp"), i.text

        def act(w: Warp) -> None:
            x = a(w)
            if mode in ("rni", "rmi", "rzi", "rpi"):
                x = {"rni": np.rint, "rmi": np.floor, "rzi": np.trunc, "rpi": np.ceil}[mode](x)
            if "sat" in modes:
                x = np.where(np.isnan(x), 0, np.clip(x, 0, 1))
            if x.dtype.kind == "f" and t.kind in "iu":
                limits = np.iinfo(t)
                low, high = x <= float(limits.min), x >= float(limits.max)
                x = np.where(high, limits.max, np.where(low, limits.min, np.nan_to_num(x).astype(t)))
            if mode == "rm":
                x = _down(x.astype(np.float64), t.type)
            write(w, x.astype(t))

        return act

    def _wide(self, i: Instruction, write: Any) -> Action:
        t = np.dtype(_TYPES[i.op[-1]])
        wide = np.dtype(f"{t.kind}{2 * t.itemsize}") if t.itemsize < 8 else np.dtype(object)
        a, b = (self._read(y, t) for y in i.operands[1:3])
        c = self._read(i.operands[3], wide if "wide" in i.op else t) if i.op[0] == "mad" else None

        def act(w: Warp) -> None:
            v = a(w).astype(wide) * b(w).astype(wide)
            if "hi" in i.op:
                v = (v >> 8 * t.itemsize).astype(t)
            write(w, v if c is None else v + c(w))

        return act

    def _pack(self, i: Instruction) -> Action:
        t = np.dtype(_TYPES[i.op[-1]])
        whole, parts = (i.operands[1], i.operands[0]) if i.operands[0].startswith("{") else i.operands
        names = [p.strip() for p in parts.strip("{}").split(",")]
        part = _RAW[t.itemsize // len(names)]
        if parts == i.operands[0]:
            read, writes = self._read(whole, _RAW[t.itemsize]), [self._write(p) for p in names]

            def split(w: Warp) -> None:
                pieces = read(w).copy().view(part).reshape(LANES, -1)
                for k, write in enumerate(writes):
                    write(w, np.ascontiguousarray(pieces[:, k]))

            return split
        reads, write = [self._read(p, part) for p in names], self._write(whole)
        return lambda w: write(w, np.stack([r(w) for r in reads], 1).view(_RAW[t.itemsize]).reshape(-1))

    def _access(self, i: Instruction) -> Action:
        loads = i.op[0] == "ld"
        kind = np.dtype(_TYPES[i.op[-1]] if i.op[-1] not in ("b128",) else np.uint64)
        data, at = i.operands[:2] if loads else i.operands[1::-1]
        names = [p.strip() for p in data.strip("{}").split(",")]
        n = kind.itemsize
        address, base = self._address(at)
        parameter, shared = "param" in i.op, any(part.startswith("shared") for part in i.op)
        writes = [self._write(p) for p in names] if loads else []
        reads = [] if loads else [self._read(p, kind) for p in names]
        assert not parameter or loads, i.text
        # Otherwise a register holds the place, which mov took from a parameter's name.
        named = base in self.kernel.parameters

        def act(w: Warp) -> None:
            where = address(w)
            if loads:
                raw = np.zeros((LANES, n * len(names)), np.uint8)
                if parameter and named:
                    raw[:] = w.block.parameters[int(where[0]) :][: raw.shape[1]]
                elif parameter:
                    bytes_of = where[w.active][:, None].astype(np.int64) + np.arange(raw.shape[1])
                    raw[w.active] = w.block.parameters[bytes_of]
                elif w.active.any():
                    raw[w.active] = w.block.load(shared, where[w.active], raw.shape[1])
                for k, write in enumerate(writes):
                    write(w, np.ascontiguousarray(raw[:, k * n : (k + 1) * n]).view(kind)[:, 0])
            elif w.active.any():
                raw = np.concatenate([np.ascontiguousarray(r(w)).view(np.uint8).reshape(LANES, n) for r in reads], 1)
                w.block.store(shared, where[w.active], raw[w.active], w.threads[w.active])

        return act

    def _matrices(self, i: Instruction) -> Action:
        """Move 8 x 8 matrices of 16 bits.

        Each of 8 lanes gives the place of a row of a matrix. Each of 4 lanes has 2 neighbours of a row, or of a row of
        the transpose with ``trans``.
        """
        assert i.op[1:4] == ("sync", "aligned", "m8n8") and i.op[-2:] == ("shared", "b16"), i.text
        loads, turn = i.op[0] == "ldmatrix", (0, 2, 1) if "trans" in i.op else (0, 1, 2)
        data, at = i.operands if loads else i.operands[::-1]
        names = [p.strip() for p in data.strip("{}").split(",")]
        writes = [self._write(p) for p in names] if loads else []
        reads = [] if loads else [self._read(p, np.uint32) for p in names]
        address, _ = self._address(at)

        def act(w: Warp) -> None:
            w.meet(np.full(LANES, 0xFFFFFFFF))
            rows = address(w)[: 8 * len(names)]
            if loads:
                matrices = w.block.load(True, rows, 16).view(np.uint16).reshape(-1, 8, 8).transpose(turn)
                pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, LANES)
                for write, of_lanes in zip(writes, pairs, strict=True):
                    write(w, of_lanes)
            else:
                matrices = np.stack([read(w) for read in reads]).view(np.uint16).reshape(-1, 8, 8).transpose(turn)
                raw = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
                w.block.store(True, rows, raw, w.threads[: len(rows)])

        return act

    def _atomic(self, i: Instruction) -> Action:
        kind = np.dtype(_TYPES[i.op[-1]])
        assert "add" in i.op and kind.kind != "f", i.text
        write, (address, _), read = self._write(i.operands[0]), self._address(i.operands[1]), self._read(
            i.operands[2], kind
        )  # fmt: skip
        released, acquired = (any(s in i.op for s in (one, "acq_rel")) for one in ("release", "acquire"))

        def act(w: Warp) -> None:
            view, where, by, old = w.block.view, address(w), read(w), np.zeros(LANES, kind)
            if released:
                view.fence(w.threads[w.active])
            for lane in np.nonzero(w.active)[0]:
                old[lane] = view.atomic(int(where[lane]), kind.itemsize, lambda v, d=int(by[lane]): v + d)
            if acquired:
                view.fence(w.threads[w.active])
            write(w, old)

        return act

    def _shuffle(self, i: Instruction) -> Action:
        to, _, ok = i.operands[0].partition("|")
        write, write_ok = self._write(to), self._write(ok) if ok else None
        value, by, members = self._read(i.operands[1], np.uint32), self._read(i.operands[2], np.int32), self._read(
            i.operands[4], np.uint32
        )  # fmt: skip
        clamp, whole = self._read(i.operands[3], np.uint32), 0 if i.op[2] == "up" else 31
        lanes = np.arange(LANES)
        source_of: dict[str, Callable[[Array], Array]] = {"bfly": lambda n: lanes ^ n, "down": lambda n: lanes + n,
                                                          "up": lambda n: lanes - n, "idx": lambda n: n}  # fmt: skip
        from_lane = source_of[i.op[2]]

        def act(w: Warp) -> None:
            w.meet(members(w))
            assert (clamp(w)[w.active] == whole).all(), f"segments of a warp: {i.text}"
            source = from_lane(by(w))
            good = (source >= 0) & (source < LANES)
            write(w, value(w)[np.where(good, source, lanes)])
            if write_ok:
                write_ok(w, good)

        return act

    def _reduce(self, i: Instruction, write: Any) -> Action:
        value, members = self._read(i.operands[1], _TYPES[i.op[-1]]), self._read(i.operands[2], np.uint32)
        reduce = {"add": np.add, "max": np.fmax, "min": np.fmin}[i.op[2]].reduce
        assert "NaN" not in i.op, i.text

        def act(w: Warp) -> None:
            w.meet(members(w))
            v = value(w)
            write(w, np.full(LANES, reduce(v[w.active], dtype=v.dtype)))

        return act


# --- running -------------------------------------------------------------------------------------------------------


class Warp:
    """Run 32 threads. Those at the lowest instruction go first, so that they meet again after a branch."""

    def __init__(self, block: Block, first: int) -> None:
        self.block, self.threads = block, np.arange(first, first + LANES)
        self.registers = block.program.fresh_registers()
        self.groups: dict[int, Array] = {0: np.ones(LANES, bool)}  # the lanes that are at each instruction
        self.waiting: dict[int, Array] = {}
        self.active = self.groups[0]
        self.paused = False

    def special(self, name: str) -> Array:
        value = {"%tid.x": self.threads, "%ntid.x": self.block.threads, "%ctaid.x": self.block.index,
                 "%nctaid.x": self.block.blocks, "%laneid": np.arange(LANES)}.get(name, 0)  # fmt: skip
        if name in ("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"):
            value = 1
        return np.broadcast_to(np.asarray(value, np.uint64), (LANES,))

    def meet(self, members: Array) -> None:
        """Raise Fault if other lanes are here than an instruction of several lanes wants."""
        wanted, here = members[np.argmax(self.active)], np.packbits(self.active, bitorder="little").view(np.uint32)[0]
        if wanted != here:
            raise Fault(f"lanes {wanted:#x} are to meet, {here:#x} are here")

    def blur(self, exact: Array, bound: float) -> Array:
        return exact * (1.0 + bound * self.block.random.uniform(-1, 1, LANES))

    def _join(self, groups: dict[int, Array], at: int, lanes: Array) -> None:
        groups[at] = groups[at] | lanes if at in groups else lanes

    def run(self) -> None:
        """Run to the next barrier, fence or atomic, or to the end."""
        program = self.block.program
        code, actions, guards, labels = program.kernel.code, program.actions, program.guards, program.kernel.labels
        while self.groups:
            at = min(self.groups)
            lanes = self.groups.pop(at)
            stop = min(self.groups, default=len(code))
            while at < stop:
                guard = guards[at]
                here = lanes if guard is None else lanes & (self.registers[guard[0]] ^ guard[1])
                action, i = actions[at], code[at]
                at += 1
                if action is not None:
                    if here is lanes or here.any():
                        self.active = here
                        try:
                            action(self)
                        except Fault as fault:
                            raise Fault(f"{fault}, by instruction {at - 1}, {i.text!r}") from None
                        if program.pauses[at - 1]:  # other warps and blocks may come before what follows
                            self.paused = True
                            self._join(self.groups, at, lanes)
                            return
                    continue
                if not here.any():
                    continue
                if i.op[0] == "bra":
                    self._join(self.groups, labels[i.operands[0]], here)
                elif i.op[0] in ("bar", "barrier") and i.op[1] == "sync":
                    self._join(self.waiting, at, here)
                elif i.op[0] == "bar":  # this is bar.warp.sync
                    assert i.op[1] == "warp", i.text
                    continue
                lanes = lanes & ~here
                if lanes.any():
                    self._join(self.groups, at, lanes)
                break
            else:
                if at < len(code):
                    self._join(self.groups, at, lanes)


class Block:
    """Run one block, which has shared memory, warps, and its view of global memory."""

    def __init__(self, program: Program, index: int, blocks: int, threads: int, parameters: Array, view: View,
                 shared_bytes: int, random: np.random.Generator) -> None:  # fmt: skip
        self.program, self.index, self.blocks, self.threads = program, index, blocks, threads
        self.parameters, self.view, self.random = parameters, view, random
        self.shared = np.full(program.kernel.shared_bytes + shared_bytes, 0xFF, np.uint8)
        self.warps = [Warp(self, first) for first in range(0, threads, LANES)]

    def _shared(self, address: Array, n: int) -> Array:
        places = address.astype(np.int64)[:, None] + np.arange(n)
        if (places < 0).any() or (places >= self.shared.size).any():
            raise Fault(f"access of {n} bytes beyond shared memory")
        if (places[:, 0] % n).any():
            raise Fault(f"misaligned access of {n} bytes in shared memory")
        return places

    def load(self, shared: bool, address: Array, n: int) -> Array:
        return self.shared[self._shared(address, n)] if shared else self.view.load(address, n)

    def store(self, shared: bool, address: Array, values: Array, threads: Array) -> None:
        if shared:
            self.shared[self._shared(address, values.shape[1])] = values
        else:
            self.view.store(address, values, threads)

    def run(self) -> bool:
        """Run to the next fence or atomic, or to the end. Return whether the end is reached."""
        while True:
            for k in self.random.permutation(len(self.warps)):
                self.warps[k].run()
                if self.warps[k].paused:
                    self.warps[k].paused = False
                    return False
            places = {at for w in self.warps for at in w.waiting}
            if not places:
                return True
            if len(places) > 1 or not all(w.waiting and next(iter(w.waiting.values())).all() for w in self.warps):
                raise Fault("not all threads of the block reach the same barrier")
            self.view.epoch += 1
            for w in self.warps:
                w.groups, w.waiting = w.waiting, {}


def launch(program: Program, memory: Memory, grid: int, threads: int, arguments: Sequence[bytes],
           shared_bytes: int = 0, seed: int = 0) -> None:  # fmt: skip
    """Run a kernel. ``arguments`` are the bytes of each parameter, as many as the kernel declares."""
    declared = list(program.kernel.parameters.values())
    sizes = [n for _, n in declared]
    assert [len(a) for a in arguments] == sizes, f"{program.kernel.name} takes {sizes} bytes"
    parameters = np.zeros(declared[-1][0] + declared[-1][1], np.uint8)
    for (offset, n), a in zip(declared, arguments, strict=True):
        parameters[offset : offset + n] = np.frombuffer(a, np.uint8)
    random, at_launch = np.random.default_rng(seed), memory.data.copy()
    memory.start_counting()
    waiting, live, views = list(range(grid)), dict[int, Block](), []
    with np.errstate(all="ignore"):
        while waiting:
            k = waiting[int(random.integers(len(waiting)))]
            if k not in live:
                view = View(memory, at_launch)
                live[k] = Block(program, k, grid, threads, parameters, view, shared_bytes, random)
                views.append(view)
            if live[k].run():
                waiting.remove(k)
                del live[k]
    for view in views:
        view.finish()
