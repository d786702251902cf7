"""Test the PTX that nvcc makes of csrc/cuda/loss.cu against dmfast.eager. Run it by `make ptx`.

machine.py runs the PTX on tiny shapes. The same source is also tested on the host (scripts/ci/host_cuda.sh). This adds
the compiler's own expf, log and expm1, its contraction of a*b+c, the alignment of instructions, memory that only fences
bring up to date, and counted traffic.
"""

from __future__ import annotations

import ctypes
import functools
import math
import re
from dataclasses import dataclass
from typing import Any

import machine
import module
import numpy as np
import nvcc
import pytest
import torch

from dmfast import eager

NAN = math.nan
_I64, _F64, _PTR = ctypes.c_int64, ctypes.c_double, ctypes.c_uint64


def struct(name: str, **fields: Any) -> Any:
    """Return a struct of csrc/batch.h, csrc/objective.h or csrc/cuda/loss.h. launch() checks its size with the PTX."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


Batch = struct("Batch", dtype=ctypes.c_int, threads=ctypes.c_int, logits=_PTR, sequences=_I64, steps=_I64, rows=_I64,
               stride_sequence=_I64, stride_row=_I64, cu_seqlens=_PTR, labels=_PTR, vocab=_I64, scale=_F64,
               softcap=_F64, vocab_start=_I64, whole_vocab=_I64, token_weight=_PTR)  # fmt: skip
Terms = struct("Terms", kind=ctypes.c_int, flags=ctypes.c_int, parameter=_F64, max_weight=_F64,
               max_log_return=_F64, columns=_PTR * 6, constants=_F64 * 6, entropy_coefficient=_F64)  # fmt: skip
Outputs = struct("Outputs", rows_block=_PTR, sequences_block=_PTR, rows=_I64, sequences=_I64, total=_PTR,
                 entropy=ctypes.c_bool, divide_by=_F64)  # fmt: skip
Gradient = struct("Gradient", dtype=ctypes.c_int, data=_PTR, stride_sequence=_I64, stride_row=_I64)
Constants = struct("Constants", bits=ctypes.c_float * 2, inverse=ctypes.c_float * 2, bound=ctypes.c_float,
                   step=ctypes.c_float, least=ctypes.c_float, zero=ctypes.c_int)  # fmt: skip
Bonus = struct("Bonus", entropy=_PTR, weight=_PTR, constant=_F64)
Workspace = struct("Workspace", device=ctypes.c_int, stream=_PTR, faults=_PTR, counters=_PTR, status=_PTR)
MOST_PARTS = 32  # kMostParts of csrc/cuda/plan.h
HAS_TARGET = 4  # a Flag of csrc/objective.h
PASSES = {"score": 0, "kept": 1}


@functools.cache
def kernels() -> dict[str, module.Kernel]:
    return module.parse(nvcc.ptx("loss"))


@functools.cache
def program(pattern: str) -> machine.Program:
    """Return the kernel whose mangled name has this pattern."""
    (name,) = (n for n in kernels() if re.search(pattern, n))
    return machine.Program(kernels()[name])


def two_floats(x: float) -> Any:
    """Return x as the Double of csrc/cuda/rows.cuh, whose first number is below x."""
    high = np.float32(x)
    high = np.nextafter(high, np.float32(0)) if float(high) >= x else high
    return (ctypes.c_float * 2)(high, x - float(high))


TYPES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


def types(dtype: torch.dtype, of_gradient: torch.dtype) -> str:
    """Return the types as a mangled name has them. A struct that comes again is a substitution there."""
    again = "S\\d*_" if dtype == of_gradient != torch.float32 else TYPES[of_gradient]
    return TYPES[dtype] + again


def score_rows(dtype: torch.dtype, of_gradient: torch.dtype, cap: bool, entropy: bool, way: str) -> machine.Program:
    names = types(dtype, dtype if way == "score" else of_gradient)
    return program(f"score_rowsI{names}Lb{cap:d}ELb{entropy:d}ELNS\\w*_4PassE{PASSES[way]}E")


def score_parts(dtype: torch.dtype, cap: bool, entropy: bool) -> machine.Program:
    return program(f"score_partsI{TYPES[dtype]}Lb{cap:d}ELb{entropy:d}E")


def write_rows(dtype: torch.dtype, of_gradient: torch.dtype, cap: bool, bonus: bool) -> machine.Program:
    return program(f"write_rowsI{types(dtype, of_gradient)}Lb{cap:d}ELb{bonus:d}E")


def numpy_of(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bits of a tensor."""
    return x.view(torch.int16).numpy() if x.dtype in (torch.bfloat16, torch.float16) else x.numpy()


@dataclass
class Call:
    """Hold sequences of 3 tokens, of which some are not scored.

    Rows lie at odd places, with NaN in gaps and unscored rows.

    ``pad`` is the number of logits between the rows. ``same`` says whether the gradient's rows are aligned as the
    logits' are. ``narrow`` is the gradient's dtype if it is not that of the logits. ``bonus`` is the coefficient of the
    entropy in the loss. ``weighted`` says whether tokens have weights.
    """

    v: int
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    temperature: float = 1.0
    pad: int = 0
    b: int = 2
    t: int = 3
    same: bool = True
    narrow: torch.dtype | None = None
    bonus: float = 0.0
    weighted: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(self.v)
        b, t, v = self.b, self.t, self.v
        self.stride = v + self.pad
        self.of_gradient = self.narrow or self.dtype
        self.tokens = torch.randint(v, (b, t))
        self.tokens[0, 1] = -100
        self.storage = torch.full((b * t * self.stride + 8,), NAN, dtype=self.dtype)
        self.logits = self.storage[self.pad :].as_strided((b, t, v), (t * self.stride, self.stride, 1))
        self.logits.copy_(3 * torch.randn(b, t, v))
        if v > 1:
            self.logits[0, 2, v // 2] = -math.inf
            self.tokens[0, 2] = 0
        self.logits[0, 1] = NAN
        self.rows = {"temperature": self.temperature, "softcap": self.softcap or None}
        self.oracle = self.logits.double().nan_to_num(nan=0.0).requires_grad_()
        self.mask = self.tokens != -100
        self.log_prob = eager.sequence_log_prob(self.oracle, self.tokens, self.mask, **self.rows)
        log_pi = self.log_prob.detach()
        self.terms = {"log_proposal": log_pi + torch.randn(b).double() / 2, "log_target": log_pi + torch.randn(b),
                      "log_z": torch.randn(b).double()}  # fmt: skip
        if self.bonus:
            self.terms["log_target"][1] = -math.inf
        self.memory = machine.Memory()
        self.at = {"columns": self.memory.add(torch.stack(list(self.terms.values())).numpy())}
        self.at["labels"] = self.memory.add(self.tokens.numpy())
        self.token_weight = torch.randn(b, t).double() if self.weighted else torch.ones(b, t).double()
        self.token_weight[0, 0] = 0.0 if self.weighted else 1.0
        self.at["token_weight"] = self.memory.add(self.token_weight.numpy()) if self.weighted else 0
        self.at["logits"] = self.memory.add(numpy_of(self.storage))
        self.at["dz"] = self.memory.add(numpy_of(torch.full((len(self.storage) + 8,), NAN, dtype=self.of_gradient)))
        # A kernel gets memory of torch.empty, which may hold anything. Here it holds NaN and nonsense, so that nothing
        # stale passes.
        of_parts = 2 * MOST_PARTS * b * t
        sizes = {"sequences": 7 * b, "rows": 3 * b * t, "faults": b + of_parts, "total": 1, "status": 1}
        for name, n in sizes.items():
            self.at[name] = self.memory.add(np.full(n, NAN))
        columns = ("log_prob", "entropy", "log_ratio", "log_target_ratio", "weight", "loss", "clipped")
        self.at |= {name: self.at["sequences"] + 8 * b * i for i, name in enumerate(columns)}
        self.at["lse"] = self.at["rows"]
        self.at["counters"] = self.memory.add(np.zeros(b + 1 + b * t, np.int32))

    @property
    def batch(self) -> Any:
        size = self.storage.element_size()
        return Batch(
            dtype=list(TYPES).index(self.dtype), logits=self.at["logits"] + self.pad * size, sequences=self.b,
            steps=self.t, rows=self.b * self.t, stride_sequence=self.t * self.stride, stride_row=self.stride,
            labels=self.at["labels"], vocab=self.v, scale=1 / self.temperature, softcap=self.softcap,
            whole_vocab=self.v, token_weight=self.at["token_weight"],
        )  # fmt: skip

    @property
    def gradient(self) -> Any:
        """Return the gradient in a new tensor with the strides of the logits."""
        start = self.at["dz"] + (self.pad + (not self.same)) * self.of_gradient.itemsize
        return Gradient(list(TYPES).index(self.of_gradient), start, self.t * self.stride, self.stride)

    @property
    def constants(self) -> Any:  # the values are those of csrc/cuda/terms.cuh
        bits, c = math.log2(math.e) / self.temperature, self.softcap or 1.0
        of_distance = 2 * c * bits if self.softcap else bits
        return Constants(bits=two_floats(of_distance), inverse=two_floats(2 * math.log2(math.e) / c), bound=14 * c,
                         step=2.0**-23 / bits, least=-192 / of_distance)  # fmt: skip

    def threads(self, most: int) -> int:  # the number is that of csrc/cuda/plan.h
        return min(most // 32, max(-(-self.v * self.storage.element_size() // 1024), 1)) * 32

    def score(self, objective: str, way: str = "score", seed: int = 0, factor: float = 0.0, parts: int = 1) -> None:
        kind, baseline = {"gdc++": (1, 1.0), "dpg": (1, 0.0), "js": (3, 0.0)}[objective]
        columns = (_PTR * 6)(*(self.at["columns"] + 8 * self.b * i for i in range(3)))
        constants = (_F64 * 6)(0, 0, 0, 0, 0, baseline)
        terms = Terms(kind=kind, flags=HAS_TARGET, max_weight=math.inf, max_log_return=math.inf, columns=columns,
                      constants=constants, entropy_coefficient=self.bonus)  # fmt: skip
        out = Outputs(rows_block=self.at["rows"], sequences_block=self.at["sequences"], rows=self.b * self.t,
                      sequences=self.b, total=self.at["total"], entropy=True, divide_by=float(self.b))  # fmt: skip
        space = Workspace(faults=self.at["faults"], counters=self.at["counters"], status=self.at["status"])
        of_loss = [bytes(x) for x in (self.batch, terms, out)]
        if parts > 1:
            rest = [bytes(x) for x in (ctypes.c_int(parts), space, self.constants)]
            machine.launch(score_parts(self.dtype, self.softcap > 0, True), self.memory,
                           self.b * self.t * parts + self.b + 1, 32, of_loss + rest, 0, seed)  # fmt: skip
            return
        arguments = of_loss + [bytes(x) for x in (_F64(factor), self.gradient, space, self.constants)]
        bytes_of_row = (self.v * self.storage.element_size() + 31) // 16 * 16
        kernel = score_rows(self.dtype, self.of_gradient, self.softcap > 0, True, way)
        machine.launch(kernel, self.memory, self.b * self.t + self.b + 1, self.threads(256 if way == "score" else 384),
                       arguments, bytes_of_row if way == "kept" else 0, seed)  # fmt: skip

    def write(self, factor: float, inplace: bool, seed: int = 0) -> None:
        size = self.storage.element_size()
        place = self.gradient
        if inplace:
            place = Gradient(list(TYPES).index(self.dtype), self.at["logits"] + self.pad * size, self.t * self.stride,
                             self.stride)  # fmt: skip
        pointers = [bytes(_PTR(self.at[name])) for name in ("lse", "weight")]
        of_entropy = Bonus()
        if self.bonus:
            of_entropy = Bonus(self.at["rows"] + 16 * self.b * self.t, self.memory.add(np.full(self.b, self.bonus)))
        rest = (of_entropy, _F64(factor), _PTR(0), _F64(NAN), place, self.constants)
        kernel = write_rows(self.dtype, self.of_gradient, self.softcap > 0, bool(self.bonus))
        machine.launch(kernel, self.memory, self.b * self.t, self.threads(256),
                       [bytes(self.batch), *pointers, *map(bytes, rest)], 0, seed)  # fmt: skip

    def get(self, name: str, n: int | None = None) -> torch.Tensor:
        like = np.empty(n or self.b, np.float64)
        return torch.from_numpy(self.memory.get(self.at[name], like))

    def written(self) -> torch.Tensor:
        """Return the gradient as (B,T,V). The gaps between its rows must be as they were."""
        empty = torch.empty(len(self.storage) + 8, dtype=self.of_gradient)
        raw = torch.from_numpy(self.memory.get(self.at["dz"], numpy_of(empty))).view(self.of_gradient)
        rows = raw[self.pad + (not self.same) :].as_strided(self.logits.shape, self.logits.stride())
        found = rows.clone()
        rows.fill_(NAN)
        assert bool(raw.isnan().all()), "written between the rows"
        return found

    def gradient_in_place(self) -> torch.Tensor:
        raw = torch.from_numpy(self.memory.get(self.at["logits"], numpy_of(self.storage))).view(self.dtype)
        return raw[self.pad :].as_strided(self.logits.shape, self.logits.stride())

    def check_traffic(self, name: str, reads: int, writes: int, more: int, again: int = 0) -> None:
        """Check reads and writes.

        ``more`` is how often the label's logit is read again. ``again`` is how often at most it is written again.
        """
        size = self.storage.element_size()
        for row, scored in enumerate(self.mask.flatten().tolist()):
            r, w = self.memory.traffic(self.at[name] + (self.pad + row * self.stride) * size, self.v * size)
            assert r == pytest.approx((reads + more / self.v) * scored), f"reads of a logit of row {row}"
            assert writes <= w <= writes + again / self.v * scored + 1e-9, f"writes of a logit of row {row}"

    def check_scores(self, objective: str) -> None:
        log_prob = self.get("log_prob")
        assert (log_prob - self.log_prob.detach()).abs().max() < 1e-6 * self.t
        same = eager.dm_loss(self.oracle.detach(), self.tokens, self.mask, objective=objective,
                             entropy_coefficient=self.bonus, **self.terms, **self.rows)  # fmt: skip
        assert torch.allclose(self.get("weight"), same.weight, rtol=1e-5, atol=2e-6)
        assert torch.allclose(self.get("total", 1)[0], same.loss, rtol=1e-5, atol=2e-6)
        assert (self.get("entropy") - eager.dm_loss(
            self.oracle.detach(), self.tokens, self.mask, objective=objective, return_entropy=True, **self.terms,
            **self.rows).entropy).abs().max() < 1e-5  # fmt: skip
        assert self.memory.get(self.at["status"], np.empty(1, np.int64))[0] == -1

    def check_gradient(self, found: torch.Tensor, factor: float) -> None:
        weight = self.get("weight")
        loss = eager.dm_loss(self.oracle, self.tokens, self.mask, objective=lambda _: weight, reduction="sum",
                             token_weight=self.token_weight, entropy_coefficient=self.bonus, **self.terms,
                             **self.rows).loss  # fmt: skip
        (want,) = torch.autograd.grad(loss * factor, self.oracle)
        # dz is weight * factor * (softmax - onehot), which has the sign of the loss, -A log pi, in it.
        assert bool((found[0, 1] == 0).all()), "a row that is not scored has gradient 0"
        rounding = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[found.dtype]
        assert bool(((found.double() - want).abs() <= rounding * want.abs() + 1e-7 + 2e-6 * self.bonus).all())


SHAPES = [
    dict(v=37, pad=0),  # V is odd, so every row starts at another alignment
    dict(v=261, pad=3),  # it takes two warps and has a tail
    dict(v=256, pad=0),  # every row is aligned
    dict(v=1, pad=2),
    dict(v=133, pad=1, softcap=5.0, temperature=0.7),
    dict(v=150, pad=1, dtype=torch.bfloat16),
    dict(v=75, pad=0, dtype=torch.float16),
]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(str(x) for x in s.values()))


@shapes
@pytest.mark.parametrize("inplace", [False, True])
def test_forward_and_backward(shape: dict[str, Any], inplace: bool) -> None:
    """A scored logit is read once by each pass, and the label's logit once more. Other rows are not read."""
    call = Call(**shape)
    call.score("gdc++", seed=inplace)
    call.check_scores("gdc++")
    call.check_traffic("logits", reads=1, writes=0, more=1)
    call.write(0.5, inplace, seed=inplace)
    call.check_traffic("logits", reads=1, writes=int(inplace), more=1, again=int(inplace))
    call.check_gradient(call.gradient_in_place() if inplace else call.written(), 0.5)


@shapes
def test_known_weight(shape: dict[str, Any]) -> None:
    call = Call(**shape)
    call.score("dpg", "kept", factor=0.5)
    call.check_scores("dpg")
    call.check_traffic("logits", reads=1, writes=0, more=1)
    call.check_gradient(call.written(), 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_blocks(seed: int) -> None:
    """Ten blocks meet at one counter. Without one of its two fences the last one reads what stood there before."""
    call = Call(v=5, b=1, t=8)
    call.score("gdc++", seed=seed)
    call.check_scores("gdc++")


@pytest.mark.parametrize("parts", [2, 5])
@pytest.mark.parametrize(
    "shape", [dict(v=1100, pad=1), dict(v=37), dict(v=1300, pad=1, dtype=torch.bfloat16, softcap=5.0)],
    ids=lambda s: "-".join(str(x) for x in s.values()),
)  # fmt: skip
def test_rows_in_parts(shape: dict[str, Any], parts: int) -> None:
    """Blocks of a row meet at its counter, and rows at that of their sequence. No logit is read twice."""
    call = Call(**shape)
    for seed in range(2):
        call.at["counters"] = call.memory.add(np.zeros(call.b + 1 + call.b * call.t, np.int32))
        call.score("gdc++", parts=parts, seed=seed)
        call.check_scores("gdc++")
        call.check_traffic("logits", reads=1, writes=0, more=1)


def score_and_write(call: Call, way: str) -> None:
    """Score and write a gradient beside the logits, in one pass where the row is kept, and check scores and reads."""
    objective = "gdc++" if way == "score" else "dpg"
    call.score(objective, way, factor=0.5)
    call.check_scores(objective)
    call.check_traffic("logits", reads=1, writes=0, more=1)
    if way == "score":
        call.write(0.5, inplace=False)
        call.check_traffic("logits", reads=1, writes=0, more=1)


@pytest.mark.parametrize(
    "shape",
    [
        dict(v=261, pad=3, narrow=torch.bfloat16),
        dict(v=133, pad=1, softcap=5.0, narrow=torch.float16),
        dict(v=71, pad=1, narrow=torch.bfloat16, same=False),
    ],
    ids=lambda s: "-".join(str(x) for x in s.values()),
)
@pytest.mark.parametrize("way", ["score", "kept"])
def test_gradient_narrower_than_its_logits(shape: dict[str, Any], way: str) -> None:
    call = Call(**shape)
    score_and_write(call, way)
    call.check_gradient(call.written(), 0.5)


@pytest.mark.parametrize(
    "shape",
    [
        dict(v=261, pad=3),
        dict(v=133, pad=1, softcap=5.0, temperature=0.7, narrow=torch.float16),
        dict(v=150, pad=1, dtype=torch.bfloat16),
    ],
    ids=lambda s: "-".join(str(x) for x in s.values()),
)
@pytest.mark.parametrize("way", ["score", "kept"])
def test_entropy_bonus(shape: dict[str, Any], way: str) -> None:
    """There are no more reads and writes. Sequence 1 has weight 0, and its gradient is the entropy's alone."""
    call = Call(**shape, bonus=0.4)
    score_and_write(call, way)
    found = call.written()
    call.check_gradient(found, 0.5)
    assert bool((found[1] != 0).any())


@pytest.mark.parametrize(
    "shape", [dict(v=133, pad=1, softcap=5.0), dict(v=150, pad=1, dtype=torch.bfloat16, bonus=0.4)],
    ids=lambda s: "-".join(str(x) for x in s.values()),
)  # fmt: skip
@pytest.mark.parametrize("way", ["score", "kept"])
def test_token_weights(shape: dict[str, Any], way: str) -> None:
    """A row of weight 0 has the gradient of the entropy alone, and the scores stay what they are."""
    call = Call(**shape, weighted=True)
    objective = "gdc++" if way == "score" else "dpg"
    call.score(objective, way, factor=0.5)
    call.check_scores(objective)
    if way == "score":
        call.write(0.5, inplace=False)
    found = call.written()
    call.check_gradient(found, 0.5)
    assert bool((found[0, 0] != 0).any()) == bool(call.bonus) and bool((found[1] != 0).any())


def test_source_and_gradient_aligned_differently() -> None:
    call = Call(v=71, pad=1, same=False)
    call.score("js")
    call.check_scores("js")
    call.write(-2.0, inplace=False)
    call.check_gradient(call.written(), -2.0)


def test_a_fault_costs_its_sequence_alone() -> None:
    call = Call(v=37)
    call.logits[1, 0, 5] = NAN
    call.at["logits"] = call.memory.add(numpy_of(call.storage))
    call.score("dpg", "kept", factor=1.0)
    assert call.get("log_prob").isnan().tolist() == [False, True] and call.get("weight")[1] == 0
    code = int(call.memory.get(call.at["status"], np.empty(1, np.int64))[0])
    assert divmod(code, 8) == (3, 1)  # row 3 has a NaN
    assert bool((call.written()[1] == 0).all())


def test_every_kernel_fences_before_and_after_its_atomics() -> None:
    """There is a fence on every path, in program order.

    One stands between the stores of a block and its counter, and one between a counter and reads of what others wrote.
    """
    with_sampling = kernels() | module.parse(nvcc.ptx("sample"))
    missing = {name: found for name, kernel in with_sampling.items() if (found := module.missing_fences(kernel))}
    assert not missing
    counting = [name for name, kernel in with_sampling.items() if module.atomics(kernel)]
    found = {name: sum(name in x for x in counting) for name in ("score_rows", "score_parts", "sample_rows")}
    assert found == {"score_rows": 32, "score_parts": 12, "sample_rows": 6}, "each instance of them"
    assert len(counting) == sum(found.values())
