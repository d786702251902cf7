"""Measure one configuration of bench.py in a process of its own.

It runs dmfast.bench.worker on a CUDA device with Triton's kernels, the rivals that run there, its clock and its memory.
A dry run is on the CPU, with Triton's kernels in their interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import clock
import torch
from torch import Tensor

from dmfast import kernels
from dmfast.bench import rivals
from dmfast.bench.rivals import HeadLogProb, TokenLogProb
from dmfast.bench.worker import Call, Config, Place, Run, run
from dmfast.kernels import triton

_TRITON = ("dm_loss gdc++, in place", "dm_loss dpg (known weight), in place", "scoring: sequence_log_prob",
           "linear_dm_loss gdc++")  # fmt: skip


def cuda_ms(call: Callable[[], Any]) -> tuple[float, bool]:
    """Return the milliseconds of what a call queues on the current CUDA stream, and whether a gate held it back.

    If it was not, the host waits for the device in it, and the time contains Python's latency.
    """
    for cycles in clock.GATES:
        gated = clock.Clock().gated(call, cycles)
        if gated is not None:
            return gated, True
    return clock.Clock().in_a_row(call), False


def cuda_memory(call: Callable[[], Any], forget: Callable[[], Any] = lambda: None) -> float:
    """Return the MB that a call allocated at its peak, beyond what was allocated before."""
    forget()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def trl_kernel() -> TokenLogProb:
    # selective_log_softmax would use plain torch without its kernel, and not say so
    function: Any = getattr(importlib.import_module("trl.kernels"), "selective_log_softmax_and_entropy", None)
    if function is None:
        raise ImportError("trl.kernels has no selective_log_softmax_and_entropy: that takes trl 1.16 and triton")
    return lambda z, x: function(z, x)[0]


def _liger_cross_entropy() -> TokenLogProb:
    function: Any = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda z, x: -function(z.flatten(0, -2), x.flatten(), reduction="none").view(x.shape)


def _quack() -> TokenLogProb:
    function: Any = importlib.import_module("quack.cross_entropy").cross_entropy
    return lambda z, x: -function(z.flatten(0, -2), x.flatten(), reduction="none").view(x.shape)


def _on_triton(call: Call) -> Call:
    def forced() -> None:
        # use_backend() would look around on the host at every call, inside the time
        before, kernels.forced = kernels.forced, "triton"
        try:
            call()
        finally:
            kernels.forced = before

    return forced


class WithTriton(Place):
    """Measure dmfast's own functions with the Triton kernels, too."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def variants(
        self, found: dict[str, Run], others: dict[str, Call], missing: dict[str, str]
    ) -> tuple[dict[str, Run], dict[str, Call]]:
        """Return both with the Triton kernels' rows."""
        ours = [name for name in (*found, *others) if name in _TRITON]
        if why := triton.why_not(self.device):
            missing.update({f"{name} (Triton)": why for name in ours})
            return found, others
        for name in ours:
            if name in found:
                call, gradients, forget = found[name]
                found[f"{name} (Triton)"] = (_on_triton(call), gradients, forget)
            else:
                others[f"{name} (Triton)"] = _on_triton(others[name])
        return found, others


class OnDevice(WithTriton):
    """Measure on a CUDA device with its clock, its memory, and the rivals that have kernels for it.

    ``with_latency`` holds the names of the calls whose times contain Python's latency.
    """

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.names: dict[int, str] = {}
        self.with_latency: set[str] = set()

    def variants(
        self, found: dict[str, Run], others: dict[str, Call], missing: dict[str, str]
    ) -> tuple[dict[str, Run], dict[str, Call]]:
        """Return both with the Triton kernels' rows, and keep their names."""
        found, others = super().variants(found, others, missing)
        self.names = {id(call): name for name, (call, *_) in found.items()} | {id(c): n for n, c in others.items()}
        return found, others

    def on_logits(self, dtype: torch.dtype) -> dict[str, Callable[[], TokenLogProb]]:
        """Return fewer compilations than on a CPU, and the kernels that only a device has."""
        makers = {n: make for n, make in rivals.on_logits(dtype).items() if not n.startswith(("compiled", "trl"))}
        makers["compiled log_softmax + gather"] = lambda: rivals.compiled(rivals.log_softmax_gather)
        return makers | {"liger-kernel cross_entropy": _liger_cross_entropy, "quack cross_entropy": _quack,
                         "trl fused log-prob and entropy": trl_kernel}  # fmt: skip

    def on_hidden(self) -> dict[str, Callable[[], HeadLogProb]]:
        """Return cut-cross-entropy with its Triton kernels instead of its torch.compile."""
        makers = {n: make for n, make in rivals.on_hidden().items() if not n.startswith("cut-cross-entropy")}
        return makers | {"cut-cross-entropy cce": lambda: rivals.cut_cross_entropy("cce")}

    def roofs(self, z: Tensor, copy: Tensor) -> dict[str, Call]:
        """Return a copy, which reads and writes each logit once."""
        return {"roof: copy_": lambda: copy.copy_(z)}

    def milliseconds(self, call: Call) -> float:
        """Return the device's time of what a call queues."""
        ms, gated = cuda_ms(call)
        if not gated:
            self.with_latency.add(self.names.get(id(call), "a call"))
        return ms

    def memory_mb(self, found: Mapping[str, Run]) -> dict[str, float]:
        """Return the peak of each."""
        return {name: cuda_memory(call, forget) for name, (call, _, forget) in found.items()}


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    place = WithTriton("cpu") if config.device == "cpu" else OnDevice(config.device)
    with torch.device(config.device):
        result = run(config, place)
    if isinstance(place, OnDevice):
        result["with_latency"] = sorted(place.with_latency)
    print(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # the pools of the compilers would keep the process alive


if __name__ == "__main__":
    main()
