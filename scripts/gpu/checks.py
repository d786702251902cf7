"""Check the kernels on a device: against the oracle, in a CUDA graph, on several streams, and on two devices.

``checks.py dry`` runs on the CPU, whose tensors the host build treats like those of a device. Graphs and streams are
then plain calls. ``few`` selects what compute-sanitizer has time for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

import dmfast
from dmfast import eager
from dmfast.functional import sample_tokens

DRY, FEW = "dry" in sys.argv, "few" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def example(v: int, dtype: torch.dtype = torch.float32, device: str = DEVICE, seed: int = 0) -> dict[str, Any]:
    """Return arguments of dm_loss with a row that is not scored."""
    torch.manual_seed(seed)
    tokens = torch.randint(v, (4, 6))
    tokens[1, 2] = -100
    logits = (3 * torch.randn(4, 6, v)).to(dtype)
    log_prob = eager.sequence_log_prob(logits.double(), tokens)
    terms = {"log_target": log_prob + torch.randn(4) / 2, "log_proposal": log_prob + torch.randn(4) / 2}
    moved = {name: x.to(device) for name, x in {"logits": logits, "tokens": tokens, **terms}.items()}
    return {**moved, "log_z": 0.3}


def step(call: dict[str, Any], objective: str = "gdc++") -> list[Tensor]:
    """Return loss, log pi, A and gradient."""
    leaf = call["logits"].detach().requires_grad_()
    out = dmfast.dm_loss(leaf, **{k: x for k, x in call.items() if k != "logits"}, objective=objective)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return [out.loss.detach(), out.log_prob, out.weight, gradient]


def same(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    """Return whether two results have the same bits."""
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.to(b.device), b), what


def against_the_oracle() -> None:
    for dtype, rounding in ROUNDING.items():
        for v in (37, 1000) if DRY or FEW else (37, 1000, 50257, 151936):
            for objective in ("gdc++", "dpg"):
                call = example(v, dtype)
                loss, log_prob, weight, gradient = step(call, objective)
                exact = {**call, "logits": call["logits"].double().requires_grad_()}
                out = eager.dm_loss(**exact, objective=objective)
                (expected,) = torch.autograd.grad(out.loss, exact["logits"])
                assert torch.allclose(log_prob, out.log_prob.detach(), rtol=0, atol=1e-5), (dtype, v, log_prob)
                assert torch.allclose(weight, out.weight, rtol=1e-4, atol=1e-5), (dtype, v, weight)
                assert torch.allclose(loss, out.loss.detach(), rtol=1e-4, atol=1e-4), (dtype, v, loss)
                bound = rounding * expected.abs() + 1e-4 * expected.abs().max()
                assert bool(((gradient.double() - expected).abs() <= bound).all()), (dtype, v, objective)


def sampling() -> None:
    logits = 3 * torch.randn(64, 1000, device=DEVICE)
    tokens, log_prob = sample_tokens(logits, seed=5)
    expected, expected_log_prob = eager.sample_tokens(logits, seed=5)
    agree = tokens == expected
    assert int(agree.sum()) >= 63, "the draws of the oracle, up to a boundary within rounding"
    assert float((log_prob - expected_log_prob)[agree].abs().max()) < 1e-5


def hidden_states() -> None:
    torch.manual_seed(1)
    call = example(333)
    del call["logits"]
    h, w = torch.randn(4, 6, 32, device=DEVICE), torch.randn(333, 32, device=DEVICE)
    found, expected = [], []
    for function, kind, into in ((dmfast.linear_dm_loss, torch.float32, found),
                                 (eager.linear_dm_loss, torch.float64, expected)):  # fmt: skip
        leaves = [x.to(kind).requires_grad_() for x in (h, w)]
        out = function(*leaves, **call, max_weight=2.0)
        into += [out.loss.detach(), *torch.autograd.grad(out.loss, leaves)]
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) <= 1e-2 * float(b.abs().max()), "TF32 at worst"


def packed(call: dict[str, Any]) -> dict[str, Any]:
    """Return the same sequences, one after the other."""
    starts = torch.arange(0, 25, 6, device=call["tokens"].device)
    return {**call, "logits": call["logits"].flatten(0, 1), "tokens": call["tokens"].flatten(), "cu_seqlens": starts}


# The losses on hidden states are left out, because the host reads which rows are scored.
CAPTURED: dict[str, Callable[[dict[str, Any]], list[Tensor]]] = {
    "gdc++": step,
    "dpg": lambda call: step(call, "dpg"),  # a known weight takes one kernel
    "gdc++, packed": lambda call: step(packed(call)),
    "scoring": lambda call: [dmfast.sequence_log_prob(call["logits"], call["tokens"])],
    "sampling": lambda call: list(sample_tokens(call["logits"].flatten(0, 1), seed=3)),
}


def captured() -> None:
    """Check that a graph that is replayed three times gives the same results, and the right ones for new inputs."""
    for name, work in CAPTURED.items():
        call = example(1000)
        expected = work(call)
        found, replay = graph_of(work, call)
        for _ in range(3):
            for x in found:
                x.zero_()
            replay()
            same(found, expected, f"a replayed graph of {name}")
        other = example(1000, seed=1)
        for tensor in ("logits", "tokens", "log_target", "log_proposal"):
            call[tensor].copy_(other[tensor])
        replay()
        same(found, work(other), f"a graph of {name} with other inputs")
        print("  captured:", name)


def graph_of(
    work: Callable[[dict[str, Any]], list[Tensor]], call: dict[str, Any]
) -> tuple[list[Tensor], Callable[[], Any]]:
    """Return what a graph writes, and a function that replays it."""
    if DRY:
        kept = work(call)

        def replay() -> None:
            for x, new in zip(kept, work(call), strict=True):
                x.copy_(new)

        return kept, replay
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work(call)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work(call)
    return found, graph.replay


def at_once(queued: Callable[[], Any], streams: list[Any]) -> Any:
    """Return the results of ``queued`` on streams that wait until everything is queued."""
    for cycles in (10**8, 10**9, 10**10):
        torch.cuda.synchronize()
        torch.cuda._sleep(cycles)
        gate = torch.cuda.current_stream().record_event()
        for stream in streams:
            stream.wait_event(gate)
        found = queued()
        waited = not gate.query()
        torch.cuda.synchronize()
        if waited:
            return found
    raise AssertionError("the gate opened before all was queued: nothing shows that streams ran side by side")


def streams() -> None:
    """Check kernels of several streams at the same time, each with counters of its own.

    They have few blocks, so that all fit on the device, and none begins before all are queued.
    """
    calls = [example(v, seed=seed) for seed, v in enumerate((4099, 4099, 50257, 50257))]
    works = [step, CAPTURED["dpg"], step, CAPTURED["dpg"]]
    expected = [work(call) for work, call in zip(works, calls, strict=True)]
    streams = [] if DRY else [torch.cuda.Stream() for _ in calls]

    def queued() -> list[list[list[Tensor]]]:
        contexts: list[Any] = [torch.cuda.stream(x) for x in streams] or [nullcontext() for _ in calls]
        found: list[list[list[Tensor]]] = [[] for _ in calls]
        for _ in range(10):
            for context, work, call, into in zip(contexts, works, calls, found, strict=True):
                with context:
                    into.append(work(call))
        return found

    found = queued() if DRY else at_once(queued, streams)
    for many, one in zip(found, expected, strict=True):
        for result in many:
            same(result, one, "streams side by side")


def two_devices() -> None:
    """Check the second device's tensors while the first is the current device."""
    count = 2 if DRY else torch.cuda.device_count()
    if count < 2:
        print("two devices: there is one")
        return
    expected = step(example(1000))
    for device in ("cpu", "cpu") if DRY else ("cuda:1", "cuda:0"):
        same(step(example(1000, device=device)), expected, device)


def main() -> None:
    print(dmfast.kernels.backends())
    everything = (against_the_oracle, sampling, hidden_states, captured, streams, two_devices)
    for check in (against_the_oracle, sampling) if FEW else everything:
        check()
        if not DRY:
            torch.cuda.synchronize()
        print("ok:", check.__name__)


if __name__ == "__main__":
    main()
