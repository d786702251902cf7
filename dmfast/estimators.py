"""Estimate Z, divergences from the target and the effective sample size from the scalars of a training step.

All estimates come from sequences x ~ q and their log pi(x), log q(x), log P(x), and need no further forward. With
w = P/q, u = p/q and rho = pi/q (arXiv:2206.00761, section 3.3 and appendix B; the standard errors are the delta
method's):

    Z            mean w
    KL(p||pi)    mean[u (log P - log Z - log pi)]              KL(p||q) likewise
    TVD(p, pi)   mean max(0, u - rho)                          TVD(p, q) = mean max(0, u - 1)
    JS(p, pi)    (1/2) mean[u log(2u / (u + rho)) + rho log(2 rho / (u + rho))]
    D_a(p, pi)   mean[(1 - a) u + a rho - u^(1-a) rho^a] / (a (1 - a))
    ESS          (sum w)^2 / sum w^2
    E_p[phi]     sum w phi / sum w

The paper writes KL(p||pi) as -log Z + (1/Z) mean[w (log P - log pi)], which is the same in expectation. The form here
does not change when P is multiplied by a constant. With log Z = -900 the paper's form is the difference of two numbers
near 900, each with the noise of mean u.

D_a is the divergence of the objective ``alpha``, (1 - mean[u^(1-a) rho^a]) / (a (1 - a)). The form above replaces the 1
by means of u and rho, because E_q[u] = E_q[rho] = 1. It is a mean of numbers that are 0 or more and vanish near p. The
limits are KL(p||pi) at a = 0 and KL(pi||p) at a = 1.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels.result import DMLossOutput

_LOG2 = math.log(2)

#: A smaller value counts as zero. Means over samples and divergences are not known to this precision, because log pi
#: and log a of a sequence are sums of fp32 numbers, which differ by about this much even where pi equals a.
ZERO = 1e-5


@dataclass(frozen=True)
class Estimate:
    """A value with its standard error.

    Both are NaN where no sequence with P > 0 was seen, or where log pi is NaN.
    """

    value: float
    stderr: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.stderr:.2g}"


def rounded(value: float) -> float:
    """Return 0 for a value below ``ZERO``, and any other value as it is."""
    return 0.0 if abs(value) < ZERO else value


def to_show(found: Estimate) -> Estimate:
    """Return what a table or a sentence shows of an estimate: 0 for a value or a standard error below ``ZERO``.

    A standard error of 0 is not shown. A value whose standard error is unknown gets 0, too.
    """
    return Estimate(rounded(found.value), rounded(found.stderr) if math.isfinite(found.stderr) else 0.0)


@dataclass(frozen=True)
class Estimates:
    """The estimates of p, pi and q from a set of sequences x ~ q.

    ``log_z`` and the KL and JS divergences are in nats, ``ess`` in sequences. ``alpha_policy`` and ``alpha_proposal``
    are None unless an alpha was given.
    """

    log_z: Estimate
    kl_policy: Estimate
    kl_proposal: Estimate
    tvd_policy: Estimate
    tvd_proposal: Estimate
    js_policy: Estimate
    js_proposal: Estimate
    ess: Estimate
    alpha_policy: Estimate | None = None
    alpha_proposal: Estimate | None = None

    def as_dict(self) -> dict[str, float]:
        """Return the estimates as a flat dictionary for a logger: ``kl_policy``, ``kl_policy_stderr``, ..."""
        flat = {}
        for name, estimate in vars(self).items():
            if estimate is None:
                continue
            flat[name], flat[f"{name}_stderr"] = estimate.value, estimate.stderr
        return flat


_NOTHING = Estimate(math.nan, math.nan)


def _from_influence(value: float | Tensor, influence: Tensor, weight: Tensor) -> Estimate:
    """Return the value with the standard error of a weighted mean whose terms deviate by ``influence``.

    The error is NaN for one sample.
    """
    total = weight.sum()
    variance = (weight * influence).square().sum() / total**2
    effective = float(total**2 / weight.square().sum())  # n for equal weights; n / (n - 1) is Bessel's correction
    stderr = math.sqrt(float(variance) * effective / (effective - 1)) if effective > 1 + 1e-9 else math.nan
    return Estimate(float(value), stderr)


def _mean(values: Tensor, weight: Tensor) -> Estimate:
    mean = (weight * values).sum() / weight.sum()
    return _from_influence(mean, values - mean, weight)


def _mean_in(context_id: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Return, for each sequence, the mean over its context, for values (N,) or columns of them (N, F)."""
    contexts, which = torch.unique(context_id, return_inverse=True)
    weight = weight.view(-1, *[1] * (values.dim() - 1))

    def sums(x: Tensor) -> Tensor:
        return x.new_zeros(len(contexts), *x.shape[1:]).index_add_(0, which, x)

    return (sums(weight * values) / sums(weight))[which]


def _fp64(x: Tensor) -> Tensor:
    return x.detach().to(torch.float64)


def _check(**each: Tensor | None) -> None:
    """Check that each tensor has one value per sequence.

    Shapes that broadcast would be averaged as if there were N * N sequences.

    Raises:
        ValueError: the shapes are not the same (N,).
    """
    shapes = {name: tuple(x.shape) for name, x in each.items() if x is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(
            f"{', '.join(shapes)} must {'all ' if len(shapes) > 1 else ''}be (N,), one value per sequence; got "
            f"{', '.join(map(str, shapes.values()))}"
        )


def _check_scores(log_target: Tensor, log_proposal: Tensor) -> None:
    if not bool(((log_target < math.inf) & log_proposal.isfinite()).all()):
        raise ValueError("log_target holds NaN or +inf, or log_proposal is not finite")


def _weights(like: Tensor, sample_weight: Tensor | None) -> Tensor:
    """Return the sample weights g, (N,) fp64.

    Raises:
        ValueError: a weight is not positive and finite.
    """
    if sample_weight is None:
        return torch.ones_like(like)
    if not bool(((sample_weight > 0) & (sample_weight < math.inf)).all()):
        raise ValueError("sample_weight must be positive and finite")
    return sample_weight.to(torch.float64)


def _checked(log_weight: Tensor, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both tensors in fp64, checked.

    Raises:
        ValueError: as in ``estimate_log_z``.
    """
    _check(log_weight=log_weight, sample_weight=sample_weight)
    log_weight = _fp64(log_weight)
    if not bool((log_weight < math.inf).all()):
        raise ValueError("log_weight = log P - log q holds NaN or +inf, from such a log P or from a log q of -inf")
    return log_weight, _weights(log_weight, sample_weight)


def estimate_log_z(log_weight: Tensor, sample_weight: Tensor | None = None) -> Estimate:
    """Estimate log Z = log mean w from log_weight = log P - log q, (N,) fp64; -inf if no P > 0.

    Raises:
        ValueError: a shape is not (N,), log_weight has NaN or +inf, or weights are not positive and finite.
    """
    return _log_z(*_checked(log_weight, sample_weight))


def _log_z(log_weight: Tensor, g: Tensor) -> Estimate:
    top = log_weight.max() if log_weight.numel() else torch.tensor(-math.inf)
    if top == -math.inf:
        return Estimate(-math.inf, math.nan)
    mean = _mean((log_weight - top).exp(), g)
    return Estimate(float(top) + math.log(mean.value), mean.stderr / mean.value)


def effective_sample_size(log_weight: Tensor, sample_weight: Tensor | None = None) -> Estimate:
    """Return (sum w)^2 / sum w^2 in sequences, from log_weight = log P - log q, (N,); 0 if no P > 0.

    Raises:
        ValueError: as in ``estimate_log_z``.
    """
    return _ess(*_checked(log_weight, sample_weight))


def _ess(log_weight: Tensor, g: Tensor) -> Estimate:
    top = log_weight.max() if log_weight.numel() else torch.tensor(-math.inf)
    if top == -math.inf:
        return Estimate(0.0, math.nan)
    w = (log_weight - top).exp()
    n = g.sum()
    m1, m2 = (g * w).sum() / n, (g * w * w).sum() / n
    influence = 2 * m1 / m2 * (w - m1) - (m1 / m2) ** 2 * (w * w - m2)
    fraction = _from_influence(m1 * m1 / m2, influence, g)
    size = float(n * n / g.square().sum())  # the effective number of sequences with the weights g
    return Estimate(fraction.value * size, fraction.stderr * size)


def estimate_moments(features: Tensor, log_weight: Tensor, sample_weight: Tensor | None = None) -> list[Estimate]:
    """Estimate E_p[phi], self-normalised, for each column of features (N, F), from log_weight = log P - log q, (N,).

    If ``log_weight`` is all 0, these are plain means, such as E_pi[phi] from samples of pi.

    Raises:
        ValueError: the features are not (N, F), or as in ``estimate_log_z``.
    """
    log_weight, g = _checked(log_weight, sample_weight)
    if features.dim() != 2 or features.shape[0] != log_weight.shape[0]:
        raise ValueError(f"features must be (N, F) with N = {log_weight.shape[0]}, got {tuple(features.shape)}")
    if log_weight.numel() == 0 or log_weight.max() == -math.inf:
        return [_NOTHING] * features.shape[1]
    w = g * (log_weight - log_weight.max()).exp()
    return [_mean(column, w) for column in _fp64(features).unbind(1)]


# The following functions return the terms f(u), whose mean is a divergence, and their derivative by log u, u f'(u),
# which gives the error from that of log Z.


def _kl_terms(u: Tensor, log_gap: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms whose mean is KL(p || .), from log_gap = log p - log of the other distribution."""
    terms = torch.where(u == 0, 0.0, u * log_gap)  # 0 * -inf = 0
    return terms, terms + u


def _tvd_terms(u: Tensor, rho: Tensor | float) -> tuple[Tensor, Tensor]:
    return (u - rho).clamp(min=0), torch.where(u > rho, u, 0.0)


def _js_terms(log_u: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor]:
    log_sum = torch.logaddexp(log_u, log_rho)
    from_p = torch.where(log_u == -math.inf, 0.0, log_u.exp() * (_LOG2 + log_u - log_sum))
    return (from_p + log_rho.exp() * (_LOG2 + log_rho - log_sum)) / 2, from_p / 2


def _alpha_terms(alpha: float, log_u: Tensor, log_rho: Tensor) -> tuple[Tensor, Tensor]:
    """Return the terms of D_alpha. One form is exact near alpha = 0 and the other near 1, where the first is 0/0."""
    u, rho, log_gap = log_u.exp(), log_rho.exp(), log_u - log_rho
    if alpha < 0.5:
        of_u = torch.where(u == 0, 0.0, u * _scaled_expm1(-alpha, log_gap))
        return (rho - u + of_u) / (1 - alpha), of_u
    of_rho = rho * _scaled_expm1(1 - alpha, log_gap)
    return (u - rho - of_rho) / alpha, (u - rho - (1 - alpha) * of_rho) / alpha


def _scaled_expm1(k: float, x: Tensor) -> Tensor:
    """Return (e^(kx) - 1)/k, which is x where k = 0."""
    return x if k == 0 else (k * x).expm1() / k


def _mean_given_one(values: Tensor, rho: Tensor, weight: Tensor) -> Estimate:
    """Return the mean of values under q, with less error because the mean of rho is known to be 1.

    rho - 1 is the control variate: the multiple of it that leaves the least variance is subtracted. A multiple that the
    values contain cancels.
    """
    deviation = rho - (weight * rho).sum() / weight.sum()
    square = (weight * deviation.square()).sum()
    slope = torch.where(square > 0, (weight * deviation * values).sum() / square, 0.0)
    found = _mean(values - slope * (rho - 1), weight)
    n = float(weight.sum() ** 2 / weight.square().sum())  # mean and slope take one degree of freedom each
    return Estimate(found.value, found.stderr * math.sqrt((n - 1) / (n - 2)) if n > 2 + 1e-9 else math.nan)


def estimate(
    log_prob: Tensor,
    log_proposal: Tensor,
    log_target: Tensor,
    log_z: Tensor | float,
    *,
    sample_weight: Tensor | None = None,
    z_of: Tensor | None = None,
    alpha: float | None = None,
) -> Estimates:
    """Return all estimates from N sequences x ~ q.

    Args:
        log_prob, log_proposal, log_target: (N,) log pi, log q, log P, nats. log_target may be -inf, and log_prob may be
            NaN (unknown) there. Only ``js_policy`` and ``alpha_policy`` need it there. They are then NaN, too.
        log_z: the current log Z (0-d, float or (N,)). The standard errors of divergences include its error only with
            ``z_of``.
        sample_weight: (N,) positive weights, for instance smaller ones for older steps. Default: 1.
        z_of: (N,) integers, the context of each sequence, if ``log_z`` was estimated from these very sequences, for
            each context separately. Then u has mean 1 for every draw, and near p a divergence varies far less than it
            would if log Z were known.
        alpha: the alpha of ``alpha_policy`` and ``alpha_proposal``. None: they are left out. From 1 on they are
            infinite where P = 0.

    Raises:
        ValueError: the tensors are not all (N,), log_target has NaN or +inf, log_proposal is not finite, or weights are
            not positive and finite.
    """
    of_each = log_z if isinstance(log_z, Tensor) and log_z.dim() else None
    _check(log_prob=log_prob, log_proposal=log_proposal, log_target=log_target, log_z=of_each, z_of=z_of,
           sample_weight=sample_weight)  # fmt: skip
    log_prob, log_proposal, log_target = _fp64(log_prob), _fp64(log_proposal), _fp64(log_target)
    _check_scores(log_target, log_proposal)
    g = _weights(log_prob, sample_weight)
    log_w = log_target - log_proposal
    if log_w.numel() == 0 or log_w.max() == -math.inf:
        nan = _NOTHING
        of_alpha = [None if alpha is None else nan] * 2
        return Estimates(_log_z(log_w, g), nan, nan, nan, nan, nan, nan, _ess(log_w, g), *of_alpha)
    z = torch.as_tensor(log_z, dtype=torch.float64, device=log_w.device).expand_as(log_w)
    log_u = torch.where(z == -math.inf, -math.inf, log_w - z)
    log_rho = log_prob - log_proposal
    u, log_one = log_u.exp(), torch.zeros_like(log_rho)
    rho = torch.where(u == 0, 0.0, log_rho.exp())  # where u = 0 any rho gives max(0, u - rho) = 0

    def divergence(terms: Tensor, slope: Tensor) -> Estimate:
        mean = _mean(terms, g)
        if z_of is None:
            return mean
        # log Z is too large by the mean of u - 1, which makes u and the divergence too small
        return _from_influence(mean.value, terms - mean.value - _mean_in(z_of, slope, g) * (u - 1), g)

    return Estimates(
        log_z=_log_z(log_w, g),
        kl_policy=divergence(*_kl_terms(u, log_u - log_rho)),
        kl_proposal=divergence(*_kl_terms(u, log_u)),
        tvd_policy=divergence(*_tvd_terms(u, rho)),
        tvd_proposal=divergence(*_tvd_terms(u, 1.0)),
        js_policy=divergence(*_js_terms(log_u, log_rho)),
        js_proposal=divergence(*_js_terms(log_u, log_one)),
        ess=_ess(log_u, g),
        alpha_policy=None if alpha is None else divergence(*_alpha_terms(alpha, log_u, log_rho)),
        alpha_proposal=None if alpha is None else divergence(*_alpha_terms(alpha, log_u, log_one)),
    )


class PartitionFunction:
    """The running log Z: the log-mean-exp of log P - log q over all sequences so far, from any q.

    Update it with a step's samples before the step's loss, so that the Z of a step includes them. Reset it when the
    target changes (a re-fit of lambda).
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        self._log_sum = -math.inf  # log sum w
        self._log_sum_squares = -math.inf
        self.n = 0  # sequences seen

    def update(self, log_target: Tensor, log_proposal: Tensor) -> None:
        """Take in log P and log q of sequences x ~ q, both (N,).

        Raises:
            ValueError: the shapes differ, log_target has NaN or +inf, or log_proposal is not finite. Nothing is taken
                in then.
        """
        if log_target.shape != log_proposal.shape or log_target.dim() != 1:
            raise ValueError(
                f"log_target and log_proposal must both be (N,), got {tuple(log_target.shape)} and "
                f"{tuple(log_proposal.shape)}"
            )
        _check_scores(log_target, log_proposal)
        log_w = _fp64(log_target) - _fp64(log_proposal)
        both = torch.tensor([[self._log_sum, self._log_sum_squares]], dtype=torch.float64, device=log_w.device)
        self._log_sum, self._log_sum_squares = (
            torch.cat([both, torch.stack([log_w, 2 * log_w], 1)]).logsumexp(0).tolist()
        )
        self.n += log_w.shape[0]

    @classmethod
    def of_rate(cls, rate: float, n: int) -> PartitionFunction:
        """Return a Z that has seen n samples of the base, for which w = b with the mean ``rate`` and b is in [0, 1].

        Only ``stderr`` depends on the sum of squares. It gets its upper bound, which holds if b is 0 or 1.
        """
        found = cls()
        found._log_sum = found._log_sum_squares = math.log(rate * n) if rate else -math.inf
        found.n = n
        return found

    @property
    def log_z(self) -> float:
        """The estimate of log Z in nats, -inf until a sequence with P > 0 was seen."""
        return self._log_sum - math.log(self.n) if self.n else -math.inf

    @property
    def stderr(self) -> float:
        """The standard error of ``log_z``."""
        if self.n < 2 or self._log_sum == -math.inf:
            return math.nan
        second = self.n / self.ess  # mean w^2 / (mean w)^2
        return math.sqrt(max(second - 1.0, 0.0) / self.n)

    @property
    def ess(self) -> float:
        """The effective number of sequences, (sum w)^2 / sum w^2; 0 until a sequence with P > 0 was seen."""
        return 0.0 if self._log_sum == -math.inf else math.exp(2 * self._log_sum - self._log_sum_squares)

    def state_dict(self) -> dict[str, float]:
        """Return the state that ``load_state_dict`` restores."""
        return {"log_sum": self._log_sum, "log_sum_squares": self._log_sum_squares, "n": self.n}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Replace the current state by a state of ``state_dict``."""
        log_sum, log_sum_squares, n = state["log_sum"], state["log_sum_squares"], int(state["n"])
        self._log_sum, self._log_sum_squares, self.n = log_sum, log_sum_squares, n


class PartitionFunctions:
    """The running log Z of each context, kept across visits.

    Z depends on the context and on nothing that is trained.
    """

    def __init__(self) -> None:
        self._of: dict[int, PartitionFunction] = {}

    def __len__(self) -> int:
        return len(self._of)

    def __getitem__(self, context: int) -> PartitionFunction:
        return self._of[context]

    def values(self) -> list[PartitionFunction]:
        """Return the running Z of each context that was seen."""
        return list(self._of.values())

    def updated(self, context_id: Tensor, log_target: Tensor, log_proposal: Tensor) -> PartitionFunctions:
        """Return a copy that includes further sequences x ~ q, all (N,). The object itself stays as it is.

        Raises:
            ValueError: as in ``PartitionFunction.update``.
        """
        new = PartitionFunctions()
        new._of = dict(self._of)
        for context in sorted(set(context_id.tolist())):
            z, which = copy.copy(new._of.get(context, PartitionFunction())), context_id == context
            z.update(log_target[which], log_proposal[which])
            new._of[context] = z
        return new

    def started(self, context_id: Tensor, rate: Tensor, n: Tensor) -> PartitionFunctions:
        """Return a copy in which contexts that were not seen yet start from samples of the base.

        Args:
            context_id: (N,) integers. Only the first entry of a repeated context counts.
            rate, n: (N,), as in ``PartitionFunction.of_rate``.
        """
        new = PartitionFunctions()
        new._of = dict(self._of)
        for context, each, drawn in zip(context_id.tolist(), rate.tolist(), n.tolist(), strict=True):
            if context not in new._of:
                new._of[context] = PartitionFunction.of_rate(each, int(drawn))
        return new

    def log_z(self, context_id: Tensor, *, most: float = math.inf, unknown: float = -math.inf) -> Tensor:
        """Return (N,) fp64, the log Z of each sequence's context in nats. Each context must have been seen.

        Args:
            context_id: (N,) integers.
            most: an upper bound of log Z. A larger estimate is replaced by it. The sums stay as they are.
            unknown: the value for a context of which no sequence with P > 0 was seen.
        """
        values = [min(self._of[context].log_z, most) for context in context_id.tolist()]
        values = [unknown if value == -math.inf else value for value in values]
        return torch.tensor(values, dtype=torch.float64, device=context_id.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state that ``load_state_dict`` restores. A column is a quantity, and a row of it a context."""
        states = [z.state_dict() for z in self._of.values()]
        dtypes = {"log_sum": torch.float64, "log_sum_squares": torch.float64, "n": torch.int64}
        columns = {key: torch.tensor([state[key] for state in states], dtype=dtype) for key, dtype in dtypes.items()}
        return {"context": torch.tensor(list(self._of), dtype=torch.int64), **columns}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the current state by a state of ``state_dict``."""
        new: dict[int, PartitionFunction] = {}
        columns = {key: column.tolist() for key, column in state.items()}
        for row, context in enumerate(columns.pop("context")):
            new[context] = PartitionFunction()
            new[context].load_state_dict({key: column[row] for key, column in columns.items()})
        self._of = new


class RunningEstimates:
    """The scalars of recent steps, with larger weights for later steps, and the estimates from them.

    Args:
        decay: the weight of a step relative to the one after it, in (0, 1]. Old values of log pi become stale as pi
            moves.
    """

    _MIN_WEIGHT = 1e-3  # older steps are dropped

    def __init__(self, decay: float = 0.8) -> None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], got {decay!r}")
        self.decay = decay
        self._steps: deque[Tensor] = deque()  # each (4, N): log_prob, log_proposal, log_target, log_z

    @classmethod
    def kept_steps(cls, decay: float) -> int | None:
        """Return how many steps are kept with a decay, or None for all of them."""
        return None if decay == 1 else math.floor(math.log(cls._MIN_WEIGHT) / math.log(decay)) + 1

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def update(self, *outputs: DMLossOutput, of_q: Tensor | None = None) -> None:
        """Take in one optimiser step: the ``dm_loss`` outputs of all of its microbatches.

        Args:
            outputs: the outputs for sequences x ~ q.
            of_q: (N,) bool, True for the sequences that this q drew, where an earlier one drew the others. Default: all
                True. A step without any True is not counted.

        Raises:
            ValueError: there is no output, the loss of an output had no log_target or log_z, or a device has recorded a
                fault of an output, such as NaN among its logits. Nothing is taken in then.
        """
        if not outputs:
            raise ValueError("a step needs the output of one dm_loss call or more")
        columns = []
        for out in outputs:
            out.check()  # a recorded fault must not become a sample; the host reads the values below anyway
            if out.log_target is None or out.log_z is None:
                raise ValueError(
                    "estimates need log_target and log_z: pass them to dm_loss, whatever its objective needs"
                )
            log_proposal = out.log_prob if out.log_proposal is None else out.log_proposal
            columns.append(torch.stack([out.log_prob, log_proposal, out.log_target, out.log_z]))
        step = torch.cat(columns, 1)
        if of_q is not None:
            step = step[:, of_q]
            if not step.shape[1]:
                return
        self._append(step)

    def take(self, log_prob: Tensor, log_proposal: Tensor, log_target: Tensor, log_z: Tensor) -> None:
        """Take in one optimiser step by its scalars, each (N,), nats, of sequences x ~ q."""
        self._append(torch.stack([_fp64(each) for each in (log_prob, log_proposal, log_target, log_z)]))

    def _append(self, step: Tensor) -> None:
        self._steps.append(step)
        while self.decay ** (len(self._steps) - 1) < self._MIN_WEIGHT:
            self._steps.popleft()

    def samples(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return log_prob, log_proposal, log_target, log_z and sample_weight of the kept sequences, each (N,) fp64."""
        if not self._steps:
            nothing = torch.empty(0, dtype=torch.float64)
            return nothing, nothing, nothing, nothing, nothing
        ages = range(len(self._steps) - 1, -1, -1)
        weights = [torch.full_like(s[0], self.decay**age) for s, age in zip(self._steps, ages, strict=True)]
        log_prob, log_proposal, log_target, log_z = torch.cat(list(self._steps), 1)
        return log_prob, log_proposal, log_target, log_z, torch.cat(weights)

    def estimates(self, alpha: float | None = None) -> Estimates:
        """Return ``estimate`` over the kept sequences, each with the log Z that its step used."""
        log_prob, log_proposal, log_target, log_z, weight = self.samples()
        return estimate(log_prob, log_proposal, log_target, log_z, sample_weight=weight, alpha=alpha)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that ``load_state_dict`` restores."""
        return {"decay": self.decay, "steps": [s.clone() for s in self._steps]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the current state by a state of ``state_dict``."""
        decay, steps = float(state["decay"]), deque(s.clone() for s in state["steps"])
        self.decay, self._steps = decay, steps
