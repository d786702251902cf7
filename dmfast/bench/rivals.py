"""Collect the rivals: functions that compute log pi of tokens from logits, or from hidden states and a head.

Their gradients come from autograd. All are given to one loss, ``sequence_loss``, so that they compute the same thing,
GDC++, whose A depends on pi. A library that can't be asked for log pi gets A without having to compute it, and its name
says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from ..functional import dm_loss, linear_dm_loss, sequence_log_prob


@dataclass
class Problem:
    """Hold one batch of B sequences of T tokens, all scored.

    Attributes:
        z: (B, T, V) logits; in the form ``head`` a stand-in that is never filled.
        hidden: (B, T, D) hidden states in the form ``head``, else None.
        weight: (V, D) the head's weight in the form ``head``, else None.
        tokens: (B, T) int64.
        log_target, log_proposal: (B,) fp64.
        log_z: log Z.
        weight_a: (B,) fp64, A of GDC++ by the oracle.
    """

    z: Tensor
    hidden: Tensor | None
    weight: Tensor | None
    tokens: Tensor
    log_target: Tensor
    log_proposal: Tensor
    log_z: float
    weight_a: Tensor

    @property
    def terms(self) -> dict[str, Any]:
        """Return what the losses take beside logits and tokens."""
        return {"log_target": self.log_target, "log_proposal": self.log_proposal, "log_z": self.log_z}


TokenLogProb: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (B,T,V) or (N,V), tokens -> log pi of each
HeadLogProb: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, tokens -> log pi of each


def sequence_loss(token_log_prob: Tensor, p: Problem) -> Tensor:
    """Return the loss of GDC++ in plain torch, with per-sequence values in fp64."""
    log_prob = token_log_prob.double().sum(-1)
    with torch.no_grad():
        a = (p.log_target - p.log_z - p.log_proposal).exp() - (log_prob - p.log_proposal).exp()
    return -(a * log_prob).mean()


def log_softmax_gather(z: Tensor, x: Tensor) -> Tensor:
    """Return log pi as nearly everybody writes it."""
    return z.log_softmax(-1).gather(-1, x[..., None]).squeeze(-1)


def cross_entropy(z: Tensor, x: Tensor) -> Tensor:
    """Return log pi by torch's fused cross-entropy."""
    return -F.cross_entropy(z.flatten(0, -2), x.flatten(), reduction="none").view(x.shape)


def gather_logsumexp(z: Tensor, x: Tensor) -> Tensor:
    """Return log pi without forming the N x V log-probabilities."""
    return z.gather(-1, x[..., None]).squeeze(-1) - z.logsumexp(-1)


def upcast(z: Tensor, x: Tensor) -> Tensor:
    """Return log pi of 16-bit logits that are cast to fp32 first, which keeps ratios precise."""
    return log_softmax_gather(z.float(), x)


def compiled(function: TokenLogProb) -> TokenLogProb:
    """Return the function under torch.compile."""

    def loss(z: Tensor, x: Tensor) -> Tensor:
        return function(z, x)

    made: TokenLogProb = torch.compile(loss, dynamic=False)
    return made


def _trl() -> TokenLogProb:
    function: TokenLogProb = importlib.import_module("trl.trainer.utils").selective_log_softmax
    return function


def on_logits(dtype: torch.dtype) -> dict[str, Callable[[], TokenLogProb]]:
    """Return makers of the rivals that take logits. A maker raises ImportError if its package is missing."""
    plain = {"log_softmax + gather": log_softmax_gather, "cross_entropy": cross_entropy,
             "gather - logsumexp": gather_logsumexp}  # fmt: skip
    makers: dict[str, Callable[[], TokenLogProb]] = {f"eager {name}": lambda f=f: f for name, f in plain.items()}  # type: ignore[misc]
    if dtype != torch.float32:
        makers["eager, logits in fp32"] = lambda: upcast
    makers |= {f"compiled {name}": lambda f=f: compiled(f) for name, f in plain.items()}  # type: ignore[misc]
    makers["trl selective_log_softmax"] = _trl
    return makers


def _torch_linear(options: Any) -> HeadLogProb:
    def log_prob(h: Tensor, w: Tensor, x: Tensor) -> Tensor:
        linear: Any = F.linear_cross_entropy
        loss: Tensor = linear(h.flatten(0, -2), w, x.flatten(), reduction="none", options=options)
        return -loss.view(x.shape)

    return log_prob


def cut_cross_entropy(impl: str) -> HeadLogProb:
    """Return cut-cross-entropy's loss in one of its implementations."""
    function: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda h, w, x: -function(h, w, x, reduction="none", impl=impl)


def on_hidden() -> dict[str, Callable[[], HeadLogProb]]:
    """Return makers of the rivals that take hidden states and a head, as ``on_logits`` does for logits."""
    makers: dict[str, Callable[[], HeadLogProb]] = {}
    if hasattr(F, "linear_cross_entropy"):
        makers["torch linear_cross_entropy"] = lambda: _torch_linear(None)
        makers["torch linear_cross_entropy, chunked"] = lambda: _torch_linear(torch.nn.LinearCrossEntropyOptions())
    makers["cut-cross-entropy torch_compile"] = lambda: cut_cross_entropy("torch_compile")
    return makers


def liger(p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Return liger-kernel's chunked policy-gradient loss, which gets A. At old log pi = log pi its gradient is ours."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    steps = p.tokens.shape[1]
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dr_grpo", max_completion_length=steps, compiled=True
    )
    ones = torch.ones(p.tokens.shape)

    def call(h: Tensor, w: Tensor) -> Tensor:
        value: Tensor = loss(h, w, p.tokens, ones, p.weight_a.float())[0] * steps
        return value

    return call


def dmfast_logits(z: Tensor, p: Problem, *, objective: str = "gdc++", inplace: bool) -> Tensor:
    """Call ``dm_loss``."""
    return dm_loss(z, p.tokens, objective=objective, inplace=inplace, **p.terms).loss


def dmfast_hidden(h: Tensor, w: Tensor, p: Problem, **options: Any) -> Tensor:
    """Call ``linear_dm_loss``."""
    return linear_dm_loss(h, w, p.tokens, **p.terms, **options).loss


def dmfast_score(z: Tensor, p: Problem) -> Tensor:
    """Call ``sequence_log_prob``."""
    return sequence_log_prob(z, p.tokens)
