"""Time the fused losses of others at the sizes of docs/gpu.md, each in a process of its own: ``rivals.py [dry]``.

From hidden states, each computes the mean cross-entropy with both gradients, and the gradient of some hidden states is
compared with fp64. From logits, each computes log pi of the tokens, and the entropy as well if its name says so.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import results
from clock import Clock, Wall, measure, said

DRY = "dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
HEAD_ROWS, HEAD_VOCAB, DIM = ((64,), 257, 32) if DRY else ((1024, 4096, 8192), 128256, 4096)
LOGIT_ROWS, LOGIT_VOCAB = (64, 300) if DRY else (8192, 151936)
STEPS = 8 if DRY else 512
# all rivals together may take this many seconds
LIMIT = float(os.environ.get("DMFAST_GPU_LIMIT", "400"))
# one rival may take this many seconds, since its first call compiles its kernels and tunes some of them
OF_ONE = 90.0

# --- from hidden states, head and tokens: the mean cross-entropy --------------------------------------------------


def torch_products() -> Callable[..., Any]:
    from torch.nn import functional as F

    return lambda h, w, x: F.cross_entropy(h @ w.t(), x)


def torch_linear(chunked: bool) -> Callable[..., Any]:
    import torch
    from torch.nn import functional as F

    function: Any = getattr(F, "linear_cross_entropy", None)
    if function is None:
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options: Any = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda h, w, x: function(h, w, x, options=options)


def quack() -> Callable[..., Any]:
    function: Any = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return lambda h, w, x: function(h, w, x, reduction="mean")


def liger_cute() -> Callable[..., Any]:
    name = "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90"
    function: Any = importlib.import_module(name).LigerFusedLinearCrossEntropySM90Function
    apply: Callable[..., Any] = function.apply
    return apply


def liger_cute_per_token() -> Callable[..., Any]:
    name = "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90"
    function: Any = importlib.import_module(name).LigerFusedScaledCrossEntropySM90Function

    def loss(h: Any, w: Any, x: Any) -> Any:
        found = function.apply(h, w, x)
        return (found[0] if isinstance(found, tuple) else found).mean()

    return loss


def cce() -> Callable[..., Any]:
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, x: function(h, w, x, impl="cce")


def ours(logits_dtype: str) -> Callable[..., Any]:
    """Return the loss with all weights 1, scaled to the mean over tokens."""
    import torch

    import dmfast

    def loss(h: Any, w: Any, x: Any) -> Any:
        ones = torch.zeros(len(h) // STEPS, dtype=torch.float64, device=h.device)
        out = dmfast.linear_dm_loss(
            h.view(-1, STEPS, DIM), w, x.view(-1, STEPS), log_target=ones, log_proposal=ones, log_z=0.0,
            objective="dpg", grad_scale=1 / STEPS, logits_dtype=logits_dtype,
        )  # fmt: skip
        return out.loss / STEPS

    return loss


HEAD: dict[str, Callable[[], Callable[..., Any]]] = {
    "dmfast linear_dm_loss": lambda: ours("float32"),
    "dmfast linear_dm_loss, logits_dtype same": lambda: ours("same"),
    "quack chunked_linear_cross_entropy": quack,
    "liger CuTe fused linear cross entropy": liger_cute,
    "liger CuTe scaled cross entropy, per token": liger_cute_per_token,
    "cut-cross-entropy": cce,
    "torch linear_cross_entropy": lambda: torch_linear(False),
    "torch linear_cross_entropy, chunked": lambda: torch_linear(True),
    "torch product, cross_entropy": torch_products,
}

# --- from logits and tokens: the sum of log pi, some with the entropy of each token along --------------------------


def trl() -> Callable[..., Any]:
    # selective_log_softmax would use plain torch without its kernel, and not say so
    function: Any = getattr(importlib.import_module("trl.kernels"), "selective_log_softmax_and_entropy", None)
    if function is None:
        raise ImportError("trl.kernels has no selective_log_softmax_and_entropy: that takes trl 1.16 and triton")
    return lambda z, x: function(z, x)[0].sum()


def quack_logits() -> Callable[..., Any]:
    function: Any = importlib.import_module("quack.cross_entropy").cross_entropy
    return lambda z, x: -function(z, x, reduction="none").sum()


def liger_logits() -> Callable[..., Any]:
    function: Any = importlib.import_module("liger_kernel.transformers.functional").liger_cross_entropy
    return lambda z, x: -function(z, x, reduction="none").sum()


def torch_logits() -> Callable[..., Any]:
    from torch.nn import functional as F

    return lambda z, x: -F.cross_entropy(z, x, reduction="none").sum()


def our_logits(objective: str) -> Callable[..., Any]:
    """Return the loss of an objective. The weights of gdc++ depend on log pi. Those of dpg are 1 and known before."""
    import torch

    import dmfast

    def loss(z: Any, x: Any) -> Any:
        given = torch.zeros(len(z) // STEPS, dtype=torch.float64, device=z.device)
        return dmfast.dm_loss(z.view(-1, STEPS, z.shape[-1]), x.view(-1, STEPS), log_target=given, log_proposal=given,
                              log_z=0.0, objective=objective, return_entropy=True).loss  # fmt: skip

    return loss


LOGITS: dict[str, Callable[[], Callable[..., Any]]] = {
    "dmfast dm_loss gdc++, entropy": lambda: our_logits("gdc++"),
    "dmfast dm_loss dpg, entropy": lambda: our_logits("dpg"),
    "trl fused log-prob and entropy": trl,
    "quack cross_entropy": quack_logits,
    "liger cross_entropy": liger_logits,
    "torch cross_entropy": torch_logits,
}

PACKAGES = {"quack": "quack", "liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy", "trl": "trl"}
# of the names that need no package, a dry run tries only these
FEW = ("dmfast linear_dm_loss", "torch linear_cross_entropy", "dmfast dm_loss gdc++, entropy")


def why_not(name: str) -> str | None:
    """Return why a rival is not tried. This needs no process for it."""
    package = PACKAGES.get(name.split(maxsplit=1)[0])
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    return "left out of a dry run" if DRY and package is None and name not in FEW else None


# --- one of them, in this process ----------------------------------------------------------------------------------


def gradient_off(h: Any, w: Any, x: Any) -> float:
    """Return ||dH - exact|| / ||exact|| of the first rows."""
    import torch

    some = min(32, len(h))
    wide = w.detach().double()
    p = (h[:some].detach().double() @ wide.t()).softmax(-1)
    p[torch.arange(some, device=p.device), x[:some]] -= 1
    exact = p @ wide / len(h)
    return float((h.grad[:some].double() - exact).norm() / exact.norm())


def of_head(function: Callable[..., Any], clock: Clock) -> list[dict[str, Any]]:
    """Return the times of forward and backward at each number of rows."""
    import torch
    from head import peak

    found = []
    for rows in HEAD_ROWS:
        torch.manual_seed(0)
        h = torch.randn(rows, DIM, device=DEVICE).to(torch.bfloat16).requires_grad_()
        w = (torch.randn(HEAD_VOCAB, DIM, device=DEVICE) * 3 / DIM**0.5).to(torch.bfloat16).requires_grad_()
        x = torch.randint(HEAD_VOCAB, (rows,), device=DEVICE)

        def call(i: int, h: Any = h, w: Any = w, x: Any = x) -> None:
            h.grad = w.grad = None
            function(h, w, x).backward()

        call(0)
        off = gradient_off(h, w, x)
        taken = measure(clock, call, rounds=1 if DRY else 5, captures=False, enough=0 if DRY else 40)
        found.append({"rows": rows, **taken, "peak_mb": peak(call), "gradient_off": off})
    return found


def of_logits(function: Callable[..., Any], clock: Clock) -> list[dict[str, Any]]:
    """Return the times of forward alone, and with backward."""
    import torch

    torch.manual_seed(0)
    z = torch.empty(LOGIT_ROWS, LOGIT_VOCAB, dtype=torch.bfloat16, device=DEVICE).normal_(std=3.0)
    x = torch.randint(LOGIT_VOCAB, (LOGIT_ROWS,), device=DEVICE)
    leaf = z.detach().requires_grad_()

    def forward(i: int) -> None:
        with torch.no_grad():
            function(z, x)

    def both(i: int) -> None:
        leaf.grad = None
        function(leaf, x).backward()

    some: dict[str, Any] = {"rounds": 1 if DRY else 7, "captures": False, "enough": 0 if DRY else 10}
    return [{"what": name, **measure(clock, call, **some)} for name, call in (("forward", forward), ("both", both))]


def one(name: str, path: Path) -> None:
    """Measure a rival, and store the result or the reason why there is none."""
    clock, form = Wall() if DRY else Clock(), "head" if name in HEAD else "logits"
    try:
        function = (HEAD if form == "head" else LOGITS)[name]()
        found = {"lines": (of_head if form == "head" else of_logits)(function, clock)}
    except Exception as error:  # any error of a rival is its result
        found = {"not_run": said(error)}  # type: ignore[dict-item]
    results.write(path, {"name": name, "form": form, **found})
    sys.stdout.flush()
    os._exit(0)  # the pools of the compilers would keep the process alive


def main() -> None:
    path, part = results.folder() / "rivals.json", Path(os.environ["DMFAST_GPU_WORK"]) / "rival.json"
    begin, found = time.monotonic(), []
    for name in (*HEAD, *LOGITS):
        part.unlink(missing_ok=True)
        left = LIMIT - 5 - (time.monotonic() - begin)
        entry: dict[str, Any] = {"name": name, "form": "head" if name in HEAD else "logits"}
        if why := why_not(name):
            entry["not_run"] = why
        elif left < 10:
            entry["not_run"] = f"{max(left, 0):.0f} s of {LIMIT:.0f} were left"
        else:
            command = [sys.executable, __file__, "one", name, str(part), *["dry"] * DRY]
            try:
                code = subprocess.run(command, timeout=min(left, OF_ONE), check=False).returncode
                entry = results.read(part) or {**entry, "not_run": f"its process ended with {code}"}
            except subprocess.TimeoutExpired:
                entry["not_run"] = f"cut off after {min(left, OF_ONE):.0f} s"
        found.append(entry)
        results.write(path, found)
        print(name, entry.get("not_run") or [line["ms"] for line in entry["lines"]], flush=True)
    broken = [x["name"] for x in found if x["name"].startswith("dmfast") and not why_not(x["name"]) and "not_run" in x]
    if broken:
        sys.exit(f"dmfast's own did not run: {', '.join(broken)}")


if __name__ == "__main__":
    if "one" in sys.argv:
        one(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
