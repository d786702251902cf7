"""Measure one configuration, in a process of its own, since threads, huge pages and peak memory are a process's."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .. import eager
from ..functional import sample_tokens
from ..kernels import linear, products
from . import rivals
from .measure import extra_memory, interleaved, wall_ms

STEPS = 64  # tokens of a sequence


@dataclass(frozen=True)
class Config:
    """Say what to run.

    Attributes:
        form: ``logits``, ``head`` (hidden states through an nn.Linear) or ``sampling``.
        rows, vocab, dim: the number of scored tokens, V and D.
        dtype: the dtype of logits, hidden states and head, ``float32`` or ``bfloat16``.
        threads: the number of torch's threads.
        huge_pages: whether torch asks for huge pages (THP_MEM_ALLOC_ENABLE).
        logits: ``randn``, or ``model`` for those of the biography model on its own text, which are repeated.
        rounds: the number of calls of each rival.
        memory_of: the one rival whose peak memory is measured, and nothing else is.
        steps: the number of tokens of a sequence.
        device: ``cpu`` or ``cuda``. On ``cuda`` the times are the device's, and each rival's peak memory comes along.
    """

    form: str
    rows: int
    vocab: int
    dim: int = 0
    dtype: str = "float32"
    threads: int = 2
    huge_pages: bool = False
    logits: str = "randn"
    rounds: int = 15
    memory_of: str | None = None
    steps: int = STEPS
    device: str = "cpu"

    @property
    def title(self) -> str:
        """The title of its table."""
        form = f"{self.form}, D {self.dim}" if self.dim else self.form
        pages = ", huge pages" if self.huge_pages else ""
        where = f"{self.threads} threads{pages}" if self.device == "cpu" else self.device
        return f"{form} ({self.rows}, {self.vocab}) {self.dtype}, {self.logits}, {where}"


class _FromModel(torch.autograd.Function):
    """Return logits as a model does, which may be overwritten, without what a model costs."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, box: list[Tensor]) -> Tensor:
        return box[0].data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _FromModel.seen = grad
        return grad.new_zeros(1), None

    seen: Tensor


def _model_rows(rows: int) -> Tensor:
    """Return (rows, V) logits of the biography model."""
    from ..training.recipe import load

    model = load("tiny-bios")
    samples = model.sample(n=32, max_new_tokens=48, seed=0)
    with torch.no_grad():
        logits, labels = model.logits(samples)
    found = logits[labels != -100]
    return found.repeat(rows // len(found) + 1, 1)[:rows]


def make_problem(c: Config) -> rivals.Problem:
    """Return the batch, with A by the oracle in fp64."""
    torch.manual_seed(0)
    dtype = getattr(torch, c.dtype)
    b, t = c.rows // c.steps, c.steps
    tokens = torch.randint(0, c.vocab, (b, t))
    hidden = weight = None
    if c.form == "head":
        hidden = torch.randn(b, t, c.dim).to(dtype)
        weight = (torch.randn(c.vocab, c.dim) * 3 / c.dim**0.5).to(dtype)
        z = torch.empty(0)
        logits = ((h[None].double() @ weight.double().T) for h in hidden)
    else:
        z = torch.empty(b, t, c.vocab, dtype=dtype)
        if c.logits == "model":
            some = _model_rows(c.rows)
            z.view(c.rows, -1).copy_(some.repeat(1, c.vocab // some.shape[1] + 1)[:, : c.vocab])
        else:
            for row in z:
                row.copy_(torch.randn(row.shape) * 3)
        logits = (row[None].double() for row in z)
    if c.memory_of is None:
        log_prob = torch.cat([eager.sequence_log_prob(y, x[None]) for y, x in zip(logits, tokens, strict=True)])
    else:  # the values do not matter
        log_prob = torch.full((b,), -math.log(c.vocab) * t, dtype=torch.float64)
    log_proposal = log_prob + 0.2 * torch.randn(b, dtype=torch.float64)
    log_target = log_prob + 0.5 * torch.randn(b, dtype=torch.float64) - 7.0
    a = (log_target + 7.0 - log_proposal).exp() - (log_prob - log_proposal).exp()
    return rivals.Problem(z, hidden, weight, tokens, log_target, log_proposal, -7.0, a)


_T = TypeVar("_T")
Call = Callable[[], Any]
Run = tuple[Call, Callable[[], list[Tensor]], Call]  # the timed call; the gradients that it leaves; lets go of them


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _made(makers: Mapping[str, Callable[[], _T]], missing: dict[str, str]) -> Iterator[tuple[str, _T]]:
    """Yield the rivals that are there. Why the others are not goes into ``missing``."""
    for name, make in makers.items():
        try:
            made = make()
        except Exception as error:
            missing[name] = _said(error)
        else:
            yield name, made


class Place:
    """Hold what depends on where a measurement is made: the rivals, what is measured beside them, the clock.

    This one is for a CPU. scripts/gpu/worker.py has that of a GPU.
    """

    def on_logits(self, dtype: torch.dtype) -> Mapping[str, Callable[[], rivals.TokenLogProb]]:
        """Return the makers of the rivals that take logits."""
        return rivals.on_logits(dtype)

    def on_hidden(self) -> Mapping[str, Callable[[], rivals.HeadLogProb]]:
        """Return the makers of the rivals that take hidden states and a head."""
        return rivals.on_hidden()

    def roofs(self, z: Tensor, copy: Tensor) -> dict[str, Call]:
        """Return further calls that bound the losses from logits; ``copy`` has the shape and values of z."""
        return {}

    def variants(
        self, found: dict[str, Run], others: dict[str, Call], missing: dict[str, str]
    ) -> tuple[dict[str, Run], dict[str, Call]]:
        """Return both with what else is measured of them; what can't be goes into ``missing`` with its reason."""
        return found, others

    def milliseconds(self, call: Call) -> float:
        """Return how long a call takes."""
        return wall_ms(call)

    def memory_mb(self, found: Mapping[str, Run]) -> dict[str, float]:
        """Return the peak memory of each in this very process; on a CPU that takes a process of its own."""
        return {}


CPU = Place()


def _logits_runs(
    p: rivals.Problem, c: Config, place: Place
) -> tuple[dict[str, Run], dict[str, Call], dict[str, str], Call]:
    source, leaf, parameter = p.z.clone(), p.z.detach().requires_grad_(), torch.zeros(1, requires_grad=True)
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}

    def on_leaf(loss: Callable[[Tensor], Tensor]) -> Run:
        def call() -> None:
            leaf.grad = None
            loss(leaf).backward()  # type: ignore[no-untyped-call]

        return call, lambda: [cast(Tensor, leaf.grad)], lambda: setattr(leaf, "grad", None)

    def in_place(objective: str) -> Run:
        def call() -> None:
            z = cast(Tensor, _FromModel.apply(parameter, [p.z]))  # type: ignore[no-untyped-call]
            rivals.dmfast_logits(z, p, objective=objective, inplace=True).backward()  # type: ignore[no-untyped-call]

        return call, lambda: [_FromModel.seen], lambda: None

    found["dm_loss gdc++, in place"] = in_place("gdc++")
    found["dm_loss gdc++"] = on_leaf(lambda z: rivals.dmfast_logits(z, p, inplace=False))
    found["dm_loss dpg (known weight), in place"] = in_place("dpg")
    for name, log_prob in _made(place.on_logits(p.z.dtype), missing):
        found[name] = on_leaf(lambda z, f=log_prob: rivals.sequence_loss(f(z, p.tokens), p))  # type: ignore[misc]
    score = torch.no_grad()
    others: dict[str, Call] = {
        "roof: read-sum": p.z.sum,
        "roof: in-place mul_": lambda: p.z.mul_(1.0),
        **place.roofs(p.z, source),
        "scoring: sequence_log_prob": score(lambda: rivals.dmfast_score(p.z, p)),
        "scoring: eager log_softmax + gather": score(lambda: rivals.log_softmax_gather(p.z, p.tokens).sum(-1)),
    }
    return *place.variants(found, others, missing), missing, lambda: p.z.copy_(source)


def _head_runs(
    p: rivals.Problem, c: Config, place: Place
) -> tuple[dict[str, Run], dict[str, Call], dict[str, str], Call]:
    assert p.hidden is not None and p.weight is not None
    hidden = p.hidden.requires_grad_()
    head = nn.Linear(c.dim, c.vocab, bias=False, dtype=hidden.dtype)
    head.weight.data = p.weight
    found: dict[str, Run] = {}
    missing: dict[str, str] = {}

    def forget() -> None:
        hidden.grad = head.weight.grad = None

    def run(loss: Callable[[], Tensor]) -> Run:
        def call() -> None:
            forget()
            loss().backward()  # type: ignore[no-untyped-call]

        return call, lambda: [cast(Tensor, hidden.grad), cast(Tensor, head.weight.grad)], forget

    found["linear_dm_loss gdc++"] = run(lambda: rivals.dmfast_hidden(hidden, head.weight, p))
    found["nn.Linear, dm_loss gdc++ in place"] = run(lambda: rivals.dmfast_logits(head(hidden), p, inplace=True))
    for name, log_prob in _made(place.on_logits(hidden.dtype), missing):
        found[f"nn.Linear, {name}"] = run(
            lambda f=log_prob: rivals.sequence_loss(f(head(hidden), p.tokens), p)  # type: ignore[misc]
        )
    for name, of_head in _made(place.on_hidden(), missing):
        found[name] = run(
            lambda f=of_head: rivals.sequence_loss(f(hidden, head.weight, p.tokens), p)  # type: ignore[misc]
        )
    for name, loss in _made({"liger-kernel chunked GRPO (told A)": lambda: rivals.liger(p)}, missing):
        found[name] = run(lambda f=loss: f(hidden, head.weight))  # type: ignore[misc]

    h, w, frozen = hidden.detach().view(-1, c.dim), head.weight.detach(), head.weight.detach()
    z, dh, dw = (torch.empty(s, dtype=h.dtype) for s in ((len(h), len(w)), h.shape, w.shape))
    sums = torch.empty(w.shape, dtype=torch.float32)
    rows = min(linear.rows_of_buffer(c.vocab, torch.float32.itemsize, h.device, None), len(h))
    way = products.ways(h.device, h.dtype, torch.float32)
    half = torch.rand(p.tokens.shape) < 0.5

    def least(wants_head: bool) -> None:
        torch.mm(h, w.t(), out=z)
        torch.mm(z, w, out=dh)
        if wants_head:
            torch.mm(z.t(), h, out=dw)

    def accumulated() -> None:
        for first in range(0, len(h), rows):
            x, dx = h[first : first + rows], dh[first : first + rows]
            dz = z[: len(x)]
            torch.mm(x, w.t(), out=dz)
            torch.mm(dz, w, out=dx)
            products.add_product(way.d_head, sums, dz, x, first == 0)

    def backward(loss: Tensor) -> None:
        forget()
        loss.backward()  # type: ignore[no-untyped-call]

    others: dict[str, Call] = {
        "roof: its three products": lambda: least(True),
        "roof: two products": lambda: least(False),
        "roof: its three products, dW added up in fp32": accumulated,
        "linear_dm_loss, frozen head": lambda: backward(rivals.dmfast_hidden(hidden, frozen, p)),
        "linear_dm_loss, half of the rows masked": lambda: backward(
            rivals.dmfast_hidden(hidden, head.weight, p, mask=half, max_weight=5.0)
        ),
    }
    return *place.variants(found, others, missing), missing, lambda: None


def truth(p: rivals.Problem, c: Config) -> list[Tensor]:
    """Return the gradients of GDC++ in fp64, formed sequence by sequence."""
    b = len(p.tokens)
    if c.form == "logits":
        out = torch.empty(p.z.shape, dtype=torch.float64)
        for i in range(b):
            z = p.z[i : i + 1].double().requires_grad_()
            loss = -(p.weight_a[i] / b) * eager.sequence_log_prob(z, p.tokens[i : i + 1]).sum()
            (out[i],) = torch.autograd.grad(loss, z)[0]
        return [out]
    assert p.hidden is not None and p.weight is not None
    w = p.weight.detach().double().requires_grad_()
    d_hidden, d_weight = torch.empty(p.hidden.shape, dtype=torch.float64), torch.zeros_like(w)
    for i in range(b):
        h = p.hidden[i : i + 1].detach().double().requires_grad_()
        loss = -(p.weight_a[i] / b) * eager.sequence_log_prob(h @ w.T, p.tokens[i : i + 1]).sum()
        dh, dw = torch.autograd.grad(loss, (h, w))
        d_hidden[i] = dh[0]
        d_weight += dw
    return [d_hidden, d_weight]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    """Return ||gradient - exact|| / ||exact||, the larger of the two where there are two."""

    def relative(a: Tensor, b: Tensor) -> float:
        # Blocks avoid an fp64 copy of the whole gradient. Their sums stay on the device, because fetching each would
        # make the device wait, and a head's gradient has many blocks.
        rows = max(2**24 // max(b[0].numel(), 1), 1)
        parts = [slice(first, first + rows) for first in range(0, len(b), rows)]
        off = torch.stack([(a[part] - b[part]).pow(2).sum() for part in parts]).sum()
        return math.sqrt(float(off) / float(b.pow(2).sum()))

    return max(relative(a, b) for a, b in zip(found, exact, strict=True))


def run(c: Config, place: Place = CPU) -> dict[str, Any]:
    """Return the times or, with ``memory_of``, the peak memory of one rival."""
    torch.set_num_threads(c.threads)
    if c.form == "sampling":
        return _sampling(c)
    p = make_problem(c)
    make = _logits_runs if c.form == "logits" else _head_runs
    found, others, missing, before = make(p, c, place)
    if c.memory_of is not None:
        before()
        if c.memory_of not in found:
            raise ValueError(f"no rival {c.memory_of!r} in {sorted(found)}")
        call, _, forget = found[c.memory_of]
        return {"memory_mb": extra_memory(call, forget)}
    exact = truth(p, c)
    errors: dict[str, float] = {}
    for name, (call, gradients, _) in list(found.items()):
        before()
        try:
            call()
        except Exception as error:
            missing[name] = _said(error)
            del found[name]
            continue
        left = [g.detach() for g in gradients()]
        if "dpg" in name:  # a sequence's gradient is A times what does not depend on the objective
            u = (p.log_target - p.log_z - p.log_proposal).exp()
            left = [left[0] * (p.weight_a / u).to(left[0].dtype)[:, None, None]]
        errors[name] = _error(left, exact)
        # In bf16 a rival's log pi is off by up to nats, and A by factors: that is told beside its time. The same code
        # is held to the oracle in fp32, where eager is off by .001 at V = 151936.
        limit = 1e-2 if c.dtype == "float32" and c.steps <= STEPS else math.inf
        if not errors[name] < limit:
            missing[name] = f"wrong: its gradient is off by {errors[name]:.2g} of the exact one"
            del found[name]
    del exact
    calls = {**others, **{name: call for name, (call, *_) in found.items()}}
    times = interleaved(calls, c.rounds, before, place.milliseconds)
    result = {"config": asdict(c), "title": c.title, "ms": times, "gradient_error": errors, "not_run": missing}
    if memory := place.memory_mb(found):
        result["memory_mb"] = memory
    return result


def _sampling(c: Config) -> dict[str, Any]:
    z, seed = torch.randn(c.rows, c.vocab).to(getattr(torch, c.dtype)) * 3, iter(range(10**9))

    def eager_draw() -> Tensor:
        return z.log_softmax(-1).gather(-1, z.softmax(-1).multinomial(1))

    calls: dict[str, Call] = {
        "roof: read-sum": z.sum,
        "sample_tokens": lambda: sample_tokens(z, seed=next(seed)),
        "eager softmax, multinomial, log_softmax, gather": eager_draw,
    }
    return {"config": asdict(c), "title": c.title, "ms": interleaved(calls, c.rounds), "gradient_error": {},
            "not_run": {}}  # fmt: skip


def main() -> None:
    """Print what ``run`` returns for the process's argument."""
    print(json.dumps(run(Config(**json.loads(sys.argv[1])))))
    sys.stdout.flush()
    os._exit(0)  # compilers' pools would keep the process
