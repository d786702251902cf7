"""Objectives: how the weight A of each sequence is formed in ``loss = -(1/B) sum_i A_i log pi(x_i)``.

Every method of the field is one choice of the return r in ``A = rho * (r - baseline)``, where
``rho = pi/q`` is the policy ratio and ``u = p/q`` the target ratio (Korbak et al. 2022,
arXiv:2206.00761, sections 2 and 3; f-DPG: Go et al. 2023, arXiv:2302.08215). This module is the
formula in plain torch, fp64, vectorised over sequences. Its twin for kernels is
``csrc/objective.h``; the formula stands nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

# The numbers are those of the enum Kind in csrc/objective.h.
KINDS = {
    "none": 0,
    "dpg": 1,
    "reverse_kl": 2,
    "js": 3,
    "tv": 4,
    "chi2": 5,
    "reverse_chi2": 6,
    "reinforce": 7,
    "reinforce_p": 8,
    "kl_control": 9,
}
OBJECTIVES = ("dpg", "gdc++", *(name for name in KINDS if name not in ("none", "dpg")))
"""The names of all objectives. ``gdc++`` is ``dpg`` with the constant baseline 1."""
#: Objectives that match an explicit target p = P/Z, and so need log_target and log_z.
TARGET_OBJECTIVES = frozenset({"dpg", "gdc++", "reverse_kl", "js", "tv", "chi2", "reverse_chi2"})
#: Objectives whose return is infinite where P(x) = 0.
INFINITE_AT_ZERO = frozenset({"reverse_kl", "reverse_chi2"})

Baseline: TypeAlias = "float | Tensor | Literal['leave_one_out', 'leave_one_out_context'] | None"


@dataclass(frozen=True)
class Objective:
    """An objective with its parameters. Frozen: running values are passed in by their owner
    (``dataclasses.replace(objective, baseline=running.value)``), never updated by the loss.

    Args:
        name: one of ``OBJECTIVES``.
        baseline: subtracted from the return r, so that ``A = rho * (r - baseline)``. ``None``; a
            float (a constant, or a running mean of rho*r over earlier steps); a (B,) tensor; or
            ``"leave_one_out"`` / ``"leave_one_out_context"``: the mean of the other sequences of
            this call (of the same ``context_id``), only where it is known before the forward.
            ``gdc++`` has the baseline 1 and takes no other.
        normalize: ``False`` multiplies A by Z, the paper's own scale (R - Z pi/q with R = P/q).
            Only for objectives with a target.
        beta: the KL coefficient of ``kl_control``: r = R - beta (log pi - log a).
        log_scale: c of ``reinforce_p``, whose reward is R = exp(log P - c): P itself underflows.

    Raises:
        ValueError: unknown name, or a parameter that the objective does not have or lacks.
    """

    name: str
    baseline: Baseline = None
    normalize: bool = True
    beta: float | None = None
    log_scale: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.name!r}; dmfast has {', '.join(OBJECTIVES)}, and takes a "
                "function of dmfast.Terms that returns the (B,) weights"
            )
        if self.name == "gdc++" and self.baseline is not None:
            raise ValueError(
                "objective 'gdc++' is 'dpg' with the constant baseline 1; for another baseline use "
                f"Objective('dpg', baseline=...), got baseline={self.baseline!r}"
            )
        if isinstance(self.baseline, str) and self.baseline not in (
            "leave_one_out",
            "leave_one_out_context",
        ):
            raise ValueError(
                "baseline must be None, a number, a (B,) tensor, 'leave_one_out' or "
                f"'leave_one_out_context', got {self.baseline!r}"
            )
        if (
            not torch.compiler.is_compiling()
            and isinstance(self.baseline, (int, float))
            and not math.isfinite(self.baseline)
        ):
            raise ValueError(f"baseline must be finite, got {self.baseline!r}")
        if not self.normalize and self.name not in TARGET_OBJECTIVES:
            raise ValueError(
                f"normalize=False multiplies A by Z, which objective {self.name!r} does not have; "
                f"it applies to {', '.join(sorted(TARGET_OBJECTIVES))}"
            )
        for parameter, owner in (("beta", "kl_control"), ("log_scale", "reinforce_p")):
            value = getattr(self, parameter)
            if (value is not None) != (self.name == owner):
                verb = "needs" if self.name == owner else "does not take"
                raise ValueError(f"objective {self.name!r} {verb} {parameter}, got {value!r}")
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{parameter} must be finite, got {value!r}")

    @property
    def kind(self) -> str:
        """The row of the formula: the name, with ``gdc++`` a ``dpg``."""
        return "dpg" if self.name == "gdc++" else self.name

    @property
    def needs(self) -> tuple[str, ...]:
        """The per-sequence inputs of ``dm_loss`` that this objective can't do without."""
        if self.name in TARGET_OBJECTIVES:
            return ("log_target", "log_z")
        return {
            "reinforce": ("reward",),
            "reinforce_p": ("log_target",),
            "kl_control": ("reward", "log_base"),
        }[self.name]


@dataclass(frozen=True)
class Terms:
    """What is known of B sequences: fp64 (B,) tensors without gradient, or None where not given.

    A user's own objective is a function of this that returns the (B,) weights A.
    """

    objective: Objective | Callable[[Terms], Tensor]
    on_policy: bool
    max_weight: float  # inf: not clipped
    log_proposal: Tensor | None = None
    log_target: Tensor | None = None
    log_z: Tensor | None = None
    reward: Tensor | None = None
    log_base: Tensor | None = None
    baseline: Tensor | float | None = None
    log_prob: Tensor | None = None

    def with_log_prob(self, log_prob: Tensor) -> Terms:
        """These terms with log pi, (B,) fp64 without gradient."""
        return self._with(self.objective, self.baseline, log_prob)

    def under(self, objective: Objective) -> Terms:
        """These terms with another objective and without a baseline."""
        return self._with(objective, None, self.log_prob)

    def _with(
        self, objective: Objective | Callable[[Terms], Tensor], baseline: Tensor | float | None, log_prob: Tensor | None
    ) -> Terms:
        # not dataclasses.replace, which torch.compile can't trace before torch 2.7
        return Terms(
            objective, self.on_policy, self.max_weight, self.log_proposal, self.log_target, self.log_z, self.reward,
            self.log_base, baseline, log_prob,
        )  # fmt: skip

    @property
    def weight_known(self) -> bool:
        """Whether A can be formed before log pi is."""
        if not isinstance(self.objective, Objective):
            return False
        if self.on_policy:
            return self.log_proposal is not None or self.objective.name.startswith("reinforce")
        return self.objective.kind == "dpg" and self.baseline is None

    @property
    def _proposal(self) -> Tensor:
        """log q; on-policy without the sampler's log-probabilities it is the detached log pi."""
        if self.log_proposal is not None:
            return self.log_proposal
        assert self.log_prob is not None
        return self.log_prob

    @property
    def log_ratio(self) -> Tensor | None:
        """(B,) log rho = log pi - log q; exactly 0 on-policy."""
        assert self.log_prob is not None
        if self.on_policy:
            return torch.zeros_like(self.log_prob)
        return None if self.log_proposal is None else self.log_prob - self.log_proposal

    @property
    def log_target_ratio(self) -> Tensor | None:
        """(B,) log u = log P - log Z - log q; -inf where P = 0 or the context's Z is 0."""
        if self.log_target is None or self.log_z is None:
            return None
        if self.log_proposal is None and not self.on_policy:
            return None
        log_u = self.log_target - self.log_z - self._proposal
        return torch.where(self.log_z == -math.inf, -math.inf, log_u)


def _signed_sum(c1: Tensor | float, e1: Tensor, c2: Tensor, e2: Tensor) -> Tensor:
    """c1 e^e1 + c2 e^e2 with one common exponent taken out, so that neither inf - inf nor 0 * inf arises where the sum
    has a sign: ratios reach e^+-11,500.
    """
    c1 = torch.as_tensor(c1, dtype=torch.float64, device=e2.device)
    e1, e2 = torch.where(c1 == 0, -math.inf, e1), torch.where(c2 == 0, -math.inf, e2)
    m = torch.maximum(e1, e2)
    common = torch.where(m.isinf(), 0.0, m)
    s = torch.where(c1 == 0, 0.0, c1 * (e1 - common).exp()) + torch.where(c2 == 0, 0.0, c2 * (e2 - common).exp())
    total = torch.where((s == 0) | s.isinf(), s, s * common.exp())
    return torch.where(m == math.inf, torch.where(e1 == math.inf, c1, c2).sign() * math.inf, total)


def weigh(terms: Terms) -> Tensor:
    """The weights A of B sequences, (B,) fp64, before ``max_weight``.

    ``terms.log_prob`` must be there. ``A = rho * (r - baseline)`` is formed in log space as
    ``first * e^exponent + on_rho * rho``; where P = 0 it is the limit, and 0 * (-inf) = 0.
    """
    objective = terms.objective
    if not isinstance(objective, Objective):
        return objective(terms)
    kind, log_rho, log_u = objective.kind, terms.log_ratio, terms.log_target_ratio
    assert log_rho is not None
    first, exponent, on_rho = 0.0, log_rho, torch.zeros_like(log_rho)
    if kind == "reinforce":
        assert terms.reward is not None
        on_rho = terms.reward
    elif kind == "reinforce_p":
        assert terms.log_target is not None and objective.log_scale is not None
        first, exponent = 1.0, log_rho + terms.log_target - objective.log_scale
    elif kind == "kl_control":
        assert terms.reward is not None and terms.log_base is not None
        assert terms.log_prob is not None and objective.beta is not None
        log_pi = terms._proposal if terms.on_policy else terms.log_prob
        on_rho = terms.reward - objective.beta * (log_pi - terms.log_base)
    else:
        assert log_u is not None
        log_t = log_rho - log_u  # t = pi/p
        if kind == "dpg":
            first, exponent = 1.0, log_u
        elif kind == "reverse_kl":
            on_rho = -(log_t + 1)
        elif kind == "js":
            on_rho = torch.nn.functional.softplus(-log_t, threshold=700) - math.log(2)
        elif kind == "tv":
            on_rho = -log_t.sign() / 2
        elif kind == "chi2":
            first, exponent, on_rho = 1.0, 2 * log_u - log_rho, on_rho - 1
        else:  # reverse_chi2
            first, exponent, on_rho = -2.0, 2 * log_rho - log_u, on_rho + 2
    if terms.baseline is not None:
        on_rho = on_rho - terms.baseline
    if objective.name not in TARGET_OBJECTIVES:
        return _signed_sum(first, exponent, on_rho, log_rho)
    assert terms.log_z is not None
    empty = terms.log_z == -math.inf
    # normalize=False multiplies by Z inside the exponent, where Z = e^-900 still is a number
    shift = 0.0 if objective.normalize else torch.where(empty, 0.0, terms.log_z)
    return torch.where(empty, 0.0, _signed_sum(first, exponent + shift, on_rho, log_rho + shift))


def clip(weight: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """The weights within [-max_weight, max_weight], and how many were outside (0-d int64)."""
    outside = weight.abs() > max_weight
    return weight.clamp(-max_weight, max_weight), outside.sum()


def clipped_weights(terms: Terms, log_prob: Tensor) -> Tensor:
    """``weigh`` at this log pi (B), within ``terms.max_weight``."""
    return clip(weigh(terms.with_log_prob(log_prob)), terms.max_weight)[0]


def leave_one_out(values: Tensor, context_id: Tensor | None = None) -> Tensor:
    """For each of B values the mean of the others, (B,); of those with the same context_id if given.

    A baseline that keeps the gradient unbiased: it does not depend on the sequence that it serves.

    Raises:
        ValueError: a sequence has no other to average over.

    Examples:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
        tensor([4.0000, 3.5000, 1.5000])
    """
    n = values.shape[0]
    if context_id is None:
        if n == 1:
            raise ValueError("a leave-one-out baseline needs two sequences or more; sequence 0 is alone")
        return (values.sum() - values) / (n - 1)
    same = context_id[:, None] == context_id[None, :]
    counts = same.sum(1)
    if not torch.compiler.is_compiling() and bool((counts < 2).any()):
        alone = int((counts < 2).nonzero()[0])
        raise ValueError(
            f"a leave-one-out baseline needs two sequences or more in every group; sequence {alone} "
            f"(context_id {int(context_id[alone])}) is alone"
        )
    return (same.to(values.dtype) @ values - values) / (counts - 1)


def plain_baseline(
    objective: Objective | Callable[[Terms], Tensor], n_sequences: int, device: torch.device
) -> Baseline:
    """The baseline of this call where it depends on nothing: a number, a (B,) fp64 tensor, or None where there is none;
    the name of one that does depend on the sequences.
    """
    if not isinstance(objective, Objective):
        return None
    baseline = 1.0 if objective.name == "gdc++" else objective.baseline
    if isinstance(baseline, Tensor):
        return baseline.detach().to(device=device, dtype=torch.float64).contiguous()
    if baseline is None or isinstance(baseline, str):
        return baseline
    if torch.compiler.is_compiling():  # a tensor, so that a running mean does not compile anew at every step
        return torch.full((n_sequences,), baseline, dtype=torch.float64, device=device)
    return float(baseline)


def leave_one_out_baseline(terms: Terms, context_id: Tensor | None, n_sequences: int, device: torch.device) -> Tensor:
    """(B,) fp64, for an objective whose baseline has a name.

    Raises:
        ValueError: rho*r is not known before the forward, or there is no context_id.
    """
    objective = terms.objective
    assert isinstance(objective, Objective) and isinstance(objective.baseline, str)
    name = objective.baseline
    known = terms.weight_known or objective.kind in ("dpg", "reinforce", "reinforce_p")
    if not known or (objective.kind == "dpg" and terms.log_proposal is None):
        raise ValueError(
            f"baseline={name!r} needs returns that are known before the forward; with objective "
            f"{objective.name!r} that is only so with on_policy=True and log_proposal (the sampler's "
            "stored log pi). Use a constant or a running mean"
        )
    # rho = 1 stands for what is not known yet: r itself, or u for dpg
    at_one = terms.log_proposal
    if at_one is None:
        at_one = torch.zeros(n_sequences, dtype=torch.float64, device=device)
    alone = Objective(objective.name, beta=objective.beta, log_scale=objective.log_scale)
    plain = terms.with_log_prob(at_one).under(alone)
    if name == "leave_one_out_context" and context_id is None:
        raise ValueError("baseline='leave_one_out_context' needs context_id (B,)")
    return leave_one_out(weigh(plain), context_id if name.endswith("context") else None)


@dataclass(frozen=True)
class PPOClip:
    """An objective that bounds how far several optimiser steps on one batch may move the policy: PPO's clipping
    (Schulman et al. 2017, arXiv:1707.06347, eq. 7) on whole sequences.

    With the advantage d = r - baseline, taken at the sampling policy q and frozen, it is the gradient of
    ``mean min(rho d, clip(rho, 1 - eps, 1 + eps) d)``: A = rho d, and 0 where d > 0 and rho > 1 + eps, or d < 0 and
    rho < 1 - eps. A sequence has one ratio and one advantage: this is not the per-token PPO with a value head.

    Pass d as ``reward`` and the sampler's log pi as ``log_proposal``; for KL-control
    d = R - beta (log q - log a) - baseline, the penalty frozen with the rest. It is a function of ``Terms``, no row of
    the formula: kernels need nothing new for it.

    Args:
        eps: positive and below 1.

    Raises:
        ValueError: eps out of range. When called: no reward, or no log_proposal.
    """

    eps: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be between 0 and 1, got {self.eps!r}")

    def __call__(self, terms: Terms) -> Tensor:
        """A, (B,) fp64."""
        if terms.reward is None or terms.log_ratio is None:
            raise ValueError(
                "PPOClip needs reward, the frozen advantage of each sequence, and log_proposal, its log-probability "
                "under the policy that it was drawn from"
            )
        plain = weigh(terms.under(Objective("reinforce")))
        return torch.where(self.clipped(terms.log_ratio, terms.reward), 0.0, plain)

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """(B,) bool: which sequences have weight 0, from log rho and d."""
        above, below = log_ratio > math.log1p(self.eps), log_ratio < math.log1p(-self.eps)
        return (advantage > 0) & above | (advantage < 0) & below


class AdaptiveBeta:
    """The coefficient of KL-control, steered so that KL(pi||a) comes to a wanted value (Ziegler et al. 2019,
    arXiv:1909.08593, section 2.2).

    Attributes:
        value: beta as it is now.

    Args:
        value: beta at the start, positive.
        target: the wanted KL(pi||a), nats per sequence, positive.
        horizon: sequences in which beta changes by a factor of about e^0.2 at most, positive.

    Raises:
        ValueError: a number that is not positive and finite.
    """

    def __init__(self, value: float, target: float, horizon: float = 10_000) -> None:
        for name, number in (("value", value), ("target", target), ("horizon", horizon)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number!r}")
        self.value, self.target, self.horizon = float(value), float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Takes in KL(pi||a) as n fresh sequences of pi have it:
        ``beta *= 1 + clip(KL/target - 1, -0.2, 0.2) * n/horizon``.

        Raises:
            ValueError: kl is not finite, or n beyond what leaves beta positive. Nothing has changed then.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {kl!r}")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n must be below 5 * horizon = {5 * self.horizon:g}, or beta could become negative; "
                             f"got {n!r}")  # fmt: skip
        self.value *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Everything that ``load_state_dict`` needs to go on."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Goes on from a value of beta; target and horizon stay those of this object."""
        self.value = float(state["value"])
