"""Find lambda of a distributional target p(x) ~ a(x) b(x) exp(lambda . phi(x)) from samples of a, by its convex dual.

With wanted moments mu, contexts c and samples x ~ a(. | c),

    f(lambda) = mean_c log mean_x [b(x) exp(lambda . phi(x))] - lambda . mu

has the gradient E_p[phi] - mu and the Hessian Cov_p[phi], and the moments hold at its minimum (arXiv:2012.11635,
section 2.2, finds the same lambda by stochastic descent on (E_p[phi] - mu)^2). Newton's method with
backtracking reaches the minimum in a few steps.

The minimum exists if and only if mu is in the interior of the set of reachable moments, the convex hull of the phi(x)
with b(x) > 0 (for contexts: the mean of their hulls). If mu is not, a direction d has
mean_c max_x d . (phi(x) - mu) <= 0. The solver looks for such a d first, and the error gives it as the proof.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..estimators import Estimate, _from_influence, _mean_in, effective_sample_size, estimate_moments

_RARE = 10  # with fewer samples that have (or lack) a feature, its rate says little
_FEW = 50.0  # with fewer effective samples, the attained moments say little


@dataclass(frozen=True)
class LambdaFit:
    """The report of how lambda was found and how well the moments hold.

    Standard errors are for fixed contexts.

    Attributes:
        names, wanted, lambda_: one for each moment; lambda in units of 1 / feature.
        base: E[phi] at lambda = 0, under a(x) b(x), from the same samples.
        attained: E_p[phi], self-normalised. The value is the wanted one; the error says how well it is known.
        pointwise: the mean of each pointwise b under a.
        source: the model that the samples come from: "a", or "q", a proposal whose samples were weighted by a/q. All
            means, also those under a, are then self-normalised.
        kl: KL(p||a) in nats, the mean over contexts. No policy with these moments has a smaller one.
        ess: the effective sample size, out of n, of the weights p/a or p/q.
        n, n_positive: the number of samples, and of those with b > 0. Samples in contexts where b is always 0 count
            in n alone.
        contexts: the number of contexts with some b > 0.
        temperature: the temperature of the samples; NaN if it is not known.
        max_new_tokens: the ``max_new_tokens`` of the samples; None if it is not known.
        log_z: log Z of the target with this lambda, nats, the mean over contexts; NaN in an older state.
        notes: what the solver did on the way.
        warnings: reasons to doubt the result.
    """

    names: list[str]
    wanted: list[float]
    lambda_: list[float]
    base: list[Estimate]
    attained: list[Estimate]
    kl: Estimate
    ess: float
    n: int
    n_positive: int
    contexts: int
    iterations: int
    converged: bool
    seconds: float
    temperature: float = math.nan
    max_new_tokens: int | None = None
    log_z: Estimate = Estimate(math.nan, math.nan)  # noqa: RUF009  # an Estimate is frozen
    source: str = "a"
    pointwise: dict[str, Estimate] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return all attributes for JSON, with None in place of NaN, which JSON lacks."""
        return {key: _to_json(value) for key, value in vars(self).items()}

    @staticmethod
    def from_dict(state: dict[str, Any]) -> LambdaFit:
        """Build the report from what ``as_dict`` returned."""
        numbers = {key: math.nan if state[key] is None else state[key] for key in ("ess", "seconds", "temperature")}
        made = {
            "base": [_estimate_of(e) for e in state["base"]],
            "attained": [_estimate_of(e) for e in state["attained"]],
            "kl": _estimate_of(state["kl"]),
            "log_z": _estimate_of(state["log_z"]) if "log_z" in state else Estimate(math.nan, math.nan),
            "pointwise": {name: _estimate_of(e) for name, e in state["pointwise"].items()},
        }
        return LambdaFit(**{**state, **numbers, **made})

    def __str__(self) -> str:
        lines = []
        if self.names:
            rows = [("moment", "wanted", "under a b" if self.pointwise else "under a", "attained", "lambda")]
            columns = zip(self.names, self.wanted, self.base, self.attained, self.lambda_, strict=True)
            rows += [(n, f"{w:.4g}", str(b), str(a), f"{x:.4g}") for n, w, b, a, x in columns]
            widths = [max(len(row[i]) for row in rows) for i in range(5)]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
            positive = f", {self.n_positive:,} of them with b > 0" if self.pointwise else ""
            contexts = f" in {self.contexts:,} contexts" if self.contexts > 1 else ""
            lines.append(
                f"{self.n:,} samples of {self.source}{contexts}{positive}; effective sample size {self.ess:,.0f}"
            )
            lines.append(f"KL(p‖a) {self.kl} nats")
            how = "converged" if self.converged else "NOT converged"
            lines.append(f"{how} after {self.iterations} Newton steps, {self.seconds:.2g} s")
        lines += [f"b: {name}: {mean} under a" for name, mean in self.pointwise.items()]
        lines += [f"note: {note}" for note in self.notes] + [f"warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _to_json(value: Any) -> Any:
    if isinstance(value, Estimate):
        return _to_json(vars(value))
    if isinstance(value, dict):
        return {key: _to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _estimate_of(state: dict[str, Any]) -> Estimate:
    return Estimate(*(math.nan if state[key] is None else state[key] for key in ("value", "stderr")))


@dataclass(frozen=True)
class _Dual:
    """The function f in the coordinates theta = lambda * scale.

    ``y`` (M, F) is (phi - mu) / scale of the samples with b > 0.
    """

    y: Tensor
    log_b: Tensor  # (M,)
    context: Tensor  # (M,), each of 0 .. contexts - 1 at least once
    contexts: int

    def log_z(self, log_weight: Tensor) -> Tensor:
        """Return the log of the sum of exp(log_weight) of each context, (contexts,)."""
        top = self._per_context(log_weight)
        total = torch.zeros_like(top).index_add(0, self.context, (log_weight - top[self.context]).exp())
        return top + total.log()

    def _per_context(self, values: Tensor) -> Tensor:
        start = torch.full((self.contexts,), -math.inf, dtype=torch.float64)
        return start.scatter_reduce(0, self.context, values, "amax")

    def at(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of p (M,), whose sum is 1, and f up to a constant."""
        log_weight = self.log_b + self.y @ theta
        log_z = self.log_z(log_weight)
        return (log_weight - log_z[self.context]).exp() / self.contexts, log_z.mean()

    def derivatives(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient (F,) and the Hessian (F, F)."""
        weighted = weight[:, None] * self.y
        means = self.y.new_zeros(self.contexts, self.y.shape[1]).index_add(0, self.context, self.contexts * weighted)
        centred = self.y - means[self.context]
        return weighted.sum(0), centred.T @ (weight[:, None] * centred)

    def highest(self, direction: Tensor) -> float:
        """Return mean_c max_x direction . y; a value <= 0 proves that mu is not an interior point of the hulls."""
        return float(self._per_context(self.y @ direction).mean())

    def scale_of(self, direction: Tensor) -> Tensor:
        """Return how far each feature moves ``highest``, (F,)."""
        return direction.abs() * (self.y.amax(0) - self.y.amin(0))


def _newton(dual: _Dual, steps: int = 200) -> tuple[Tensor, int, bool, bool]:
    """Return theta, the number of steps, whether the gradient vanishes, and whether theta disproves a minimum."""
    theta = dual.y.new_zeros(dual.y.shape[1])
    weight, f = dual.at(theta)
    gradient, hessian = dual.derivatives(weight)
    ridge = 1e-12 * hessian.diagonal().mean() * torch.eye(len(theta), dtype=torch.float64)
    step = 0
    for step in range(steps):
        if gradient.abs().max() < 1e-11:
            break
        if step and dual.highest(theta) <= 0:
            return theta, step, False, True
        direction = -torch.linalg.lstsq(hessian + ridge, gradient).solution
        slope, size = gradient @ direction, 1.0
        rounding = 1e-14 * (1 + abs(float(f)))
        while size > 1e-12:
            weight, new_f = dual.at(theta + size * direction)
            if new_f <= f + 1e-4 * size * slope + rounding:
                break
            size /= 2
        else:
            break
        theta, f = theta + size * direction, new_f
        gradient, hessian = dual.derivatives(weight)
    return theta, step, bool(gradient.abs().max() < 1e-8), False


def fit_lambda(
    features: Tensor,
    wanted: Sequence[float] | Tensor,
    *,
    log_b: Tensor | None = None,
    log_ratio: Tensor | None = None,
    context_id: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> LambdaFit:
    """Find lambda with E_p[phi] = wanted, from N samples of the base model a or of another model q.

    Args:
        features: (N, F) phi(x).
        wanted: (F,) mu.
        log_b: (N,) log b(x), -inf where b = 0. Default: 0.
        log_ratio: (N,) log a(x) - log q(x) for samples of q; each then weighs a/q. It is not read where b = 0.
            Default: 0, for samples of a.
        context_id: (N,) int, the context of each sample; all contexts weigh the same. Default: one context.
        names: the F names of the features, for errors and the report.

    Raises:
        ValueError: a shape is wrong, a value is NaN, or b = 0 in all samples. No lambda gives a moment, because the
            feature is constant, the value is outside the range of the feature, features are linearly dependent, or the
            moments contradict each other; the message names the features and the numbers.

    Examples:
        A quarter of the samples has the feature and half of them should have it, so exp(lambda) is 3.

        >>> fit = fit_lambda(torch.tensor([[1.0]] * 250 + [[0.0]] * 750), [0.5])
        >>> round(math.exp(fit.lambda_[0]), 6)
        3.0
    """
    start = time.perf_counter()
    phi, mu, log_b, context, names = _checked(features, wanted, log_b, context_id, names)
    n = len(phi)
    kept = log_b > -math.inf
    of = "the base" if log_ratio is None else "the proposal"
    if not bool(kept.any()):
        raise ValueError(f"b(x) = 0 for all {n:,} samples of {of}: the pointwise constraints are never satisfied")
    log_ratio = _checked_ratio(log_ratio, kept)
    log_b = log_b + log_ratio  # the weight is a b / q for samples of q, and b for samples of a
    ids, dense = torch.unique(context, return_inverse=True)
    alive = torch.zeros(len(ids), dtype=torch.bool).index_fill(0, dense[kept], True)
    in_alive = alive[dense]
    dense = (alive.cumsum(0) - 1)[dense[in_alive]]
    phi, log_b, kept, log_ratio = phi[in_alive], log_b[in_alive], kept[in_alive], log_ratio[in_alive]
    contexts = int(alive.sum())
    notes = []
    if contexts < len(ids):
        notes.append(f"b(x) = 0 for all samples of {len(ids) - contexts} of {len(ids)} contexts; the moments are "
                     "those of the others")  # fmt: skip

    positive = int(kept.sum())
    where = f"{n:,} samples of {of}"
    if positive < n:
        where = f"{positive:,} samples of {of} with b > 0 (of {n:,})"
    support = _Dual(phi[kept], log_b[kept], dense[kept], contexts)
    warnings = _check_each(support, mu, names, where)
    scale = _check_rank(support, mu, names, where)
    dual = replace(support, y=(support.y - mu) / scale)
    _check_jointly(dual, support, mu, scale, names, where)
    theta, iterations, converged, _ = _newton(dual)
    lambda_ = theta / scale

    log_weight = log_b + (phi - mu) @ lambda_
    counts = torch.bincount(dense, minlength=contexts)
    log_z = support.log_z(log_weight[kept]) - counts.double().log()
    log_u = log_weight - log_z[dense]
    each = 1 / counts.double()[dense]
    ess = effective_sample_size(log_u, each).value
    if not converged:
        warnings.append("Newton did not converge: the moments are at the edge of what the samples can reach")
    if ess < max(_FEW, 0.01 * positive):
        warnings.append(f"the effective sample size is {ess:.1f}, of {where}: lambda rests on few samples; take more "
                        "(n), or ask for values nearer to the base's")  # fmt: skip
    elif contexts > 1 and ess < 10 * contexts:
        warnings.append(f"the effective sample size is {ess / contexts:.1f} per context: Z of a context is poorly "
                        "known; take more samples (n)")  # fmt: skip
    return LambdaFit(
        names=names,
        wanted=mu.tolist(),
        lambda_=lambda_.tolist(),
        base=_moments(phi, log_b, dense, contexts),
        attained=_moments(phi, log_weight, dense, contexts),
        kl=_kl(phi, log_u, log_ratio, dense, each),
        log_z=_from_influence(log_z.mean() + mu @ lambda_, log_u.exp() - 1, each),
        source="a" if of == "the base" else "q",
        ess=ess,
        n=n,
        n_positive=positive,
        contexts=contexts,
        iterations=iterations,
        converged=converged,
        seconds=time.perf_counter() - start,
        notes=notes,
        warnings=warnings,
    )


def _checked(
    features: Tensor, wanted: Sequence[float] | Tensor, log_b: Tensor | None, context_id: Tensor | None,
    names: Sequence[str] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:  # fmt: skip
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(f"features must be (N, F), N samples and F moments, got {tuple(features.shape)}")
    n, width = features.shape
    mu = torch.as_tensor(wanted, dtype=torch.float64).detach().cpu()
    if mu.shape != (width,):
        raise ValueError(f"wanted must have one value for each of {width} features, got {tuple(mu.shape)}")
    names = [f"feature {i}" for i in range(width)] if names is None else list(names)
    if len(names) != width:
        raise ValueError(f"names must be {width}, one for each feature, got {len(names)}")
    log_b = torch.zeros(n) if log_b is None else log_b
    context = torch.zeros(n, dtype=torch.int64) if context_id is None else context_id
    for name, value in (("log_b", log_b), ("context_id", context)):
        if value.shape != (n,):
            raise ValueError(f"{name} must be ({n},), got {tuple(value.shape)}")
    phi, log_b = features.detach().double().cpu(), log_b.detach().double().cpu()
    for name, column, value in zip(names, phi.unbind(1), mu.tolist(), strict=True):
        if not bool(column.isfinite().all()) or not math.isfinite(value):
            raise ValueError(f"{name!r} and its wanted value must be finite, got {value!r}, features {column}")
    if not bool((log_b < math.inf).all()):
        raise ValueError("log_b holds NaN or +inf")
    return phi, mu, log_b, context.cpu(), names


def _checked_ratio(log_ratio: Tensor | None, kept: Tensor) -> Tensor:
    """Return log_ratio, (N,) fp64 and checked, with 0 where b = 0."""
    if log_ratio is None:
        return torch.zeros(len(kept), dtype=torch.float64)
    if log_ratio.shape != kept.shape:
        raise ValueError(f"log_ratio must be ({len(kept)},), got {tuple(log_ratio.shape)}")
    log_ratio = torch.where(kept, log_ratio.detach().double().cpu(), 0.0)
    if not bool(log_ratio.isfinite().all()):
        raise ValueError("log_ratio must be finite where b > 0")
    return log_ratio


def _moments(phi: Tensor, log_weight: Tensor, context: Tensor, contexts: int) -> list[Estimate]:
    """Return the mean over contexts of E_p[phi]."""
    order = context.argsort(stable=True)
    sizes = torch.bincount(context, minlength=contexts).tolist()
    parts = zip(torch.split(phi[order], sizes), torch.split(log_weight[order], sizes), strict=True)
    each = [estimate_moments(*part) for part in parts]
    return [
        Estimate(sum(e.value for e in column) / contexts, math.sqrt(sum(e.stderr**2 for e in column)) / contexts)
        for column in zip(*each, strict=True)
    ]


def _kl(phi: Tensor, log_u: Tensor, log_ratio: Tensor, context: Tensor, weight: Tensor) -> Estimate:
    """Return KL(p||a), the mean over contexts, from u = p/q; each context has a ``weight`` of 1.

    Its error takes into account that log Z and lambda come from the same samples. Through lambda, KL moves with the
    part of log p/a that is correlated with phi under p. That part is not an error, because the moments are held. If b
    is only 0 or 1, that part is all of log p/a, and only the error of log Z remains.
    """
    u = log_u.exp()
    gap = torch.where(u > 0, log_u - log_ratio, 0.0)  # log p - log a
    means = _mean_in(context, u * gap, weight)
    centred = phi - _mean_in(context, u[:, None] * phi, weight)
    root = (weight * u).sqrt()
    scale = (root[:, None] * centred).norm(dim=0).clamp(min=1e-300)  # features may be of any size
    slope = torch.linalg.lstsq(root[:, None] * centred / scale, (root * (gap - means))[:, None]).solution[:, 0]
    influence = u * (gap - means - centred @ (slope / scale)) - (u - 1)
    return _from_influence((weight * u * gap).sum() / weight.sum(), influence, weight)


def _check_each(support: _Dual, mu: Tensor, names: list[str], where: str) -> list[str]:
    """Refuse a value that a feature can't have on its own, and warn of one that depends on few samples."""
    warnings = []
    for name, column, value in zip(names, support.y.unbind(1), mu.tolist(), strict=True):
        one = replace(support, y=column[:, None])
        low, high = (sign * one.highest(torch.tensor([sign]).double()) + 0.0 for sign in (-1, 1))  # + 0: no -0
        zero_one = bool(((column == 0) | (column == 1)).all())
        fires = int(column.sum()) if zero_one else 0
        if zero_one and fires in (0, len(column)):
            how = "never" if fires == 0 else "always"
            raise ValueError(
                f"the moment {name!r} = {value:g} can't be reached: the feature {how} fires in {where} (its rate is "
                f"{'below' if fires == 0 else 'above'} {_rule_of_three(fires, len(column)):.2g} with 95% confidence); "
                "take more samples (n), contexts that bring it out, or another feature"
            )
        if high - low <= 1e-12 * max(abs(low), abs(high)):
            inside = "" if support.contexts == 1 else " within each context"
            raise ValueError(f"the moment {name!r} = {value:g} is degenerate: the feature is constant{inside} in "
                             f"{where} ({column[0]:g} in the first), so that no lambda moves it; drop it")  # fmt: skip
        if not low < value < high:
            at_edge = value in (low, high)
            mean = " on average over contexts" if support.contexts > 1 else ""
            why = "only in the limit of an infinite lambda: it is the edge of" if at_edge else "because it is outside"
            raise ValueError(
                f"the moment {name!r} = {value:g} can{'' if at_edge else chr(39) + 't'} be reached {why} what the "
                f"feature takes in {where}, [{low:.6g}, {high:.6g}]{mean}"
                + ("; declare the feature binary=True, and it becomes a pointwise constraint" if zero_one else "")
            )
        rare = min(fires, len(column) - fires)
        if zero_one and rare < _RARE:
            how = "is 1" if rare == fires else "is 0"
            warnings.append(f"{name!r} {how} in only {rare} of {where}: its lambda means little; take more samples (n)")
    return warnings


def _rule_of_three(fires: int, n: int) -> float:
    return min(3 / n, 1.0) if fires == 0 else max(1 - 3 / n, 0.0)


def _check_rank(support: _Dual, mu: Tensor, names: list[str], where: str) -> Tensor:
    """Return the features' standard deviations within contexts (F,) and refuse linearly dependent features."""
    weight = 1 / torch.bincount(support.context).double()[support.context] / support.contexts
    _, covariance = support.derivatives(weight)
    scale = covariance.diagonal().sqrt()
    eigenvalues, vectors = torch.linalg.eigh(covariance / scale / scale[:, None])
    null = vectors[:, eigenvalues < 1e-10].T / scale  # each row d: d . phi is the same for all samples of a context
    if len(null) == 0:
        return scale
    said = []
    for d in _reduced(null):
        among = [i for i in range(len(names)) if abs(float(d[i] * scale[i])) > 1e-6 * float((d * scale).abs().max())]
        constant = support.highest(d)
        asked = float(d @ mu)
        size = float((d.abs() * scale).max())
        consistent = abs(asked - constant) <= 1e-6 * size
        inside = "" if support.contexts == 1 else " (on average over contexts)"
        said.append(
            f"{_sum(d, among, names)} = {_number(constant, size)}{inside} in every sample, the wanted values "
            + (f"agree: drop one of {_list(among, names)}" if consistent else
               f"give {_number(asked, size)}: {_list(among, names)} contradict each other")
        )  # fmt: skip
    raise ValueError(f"moments are linearly dependent (collinear) in {where}: {'; '.join(said)}")


def _reduced(rows: Tensor) -> Tensor:
    """Return the reduced row echelon form with full pivoting, so that each dependency has few features."""
    rows = rows.clone()
    for i in range(len(rows)):
        pivot = int(rows[i:].abs().argmax())
        row, column = i + pivot // rows.shape[1], pivot % rows.shape[1]
        rows[[i, row]] = rows[[row, i]]
        rows[i] = rows[i] / rows[i, column]
        others = torch.arange(len(rows)) != i
        rows[others] = rows[others] - rows[others, column, None] * rows[i]
    return rows


def _check_jointly(dual: _Dual, support: _Dual, mu: Tensor, scale: Tensor, names: list[str], where: str) -> None:
    """Refuse moments that can each be reached but not together, or only in the limit of an infinite lambda."""
    # a mu on the boundary is moved a little outward, because strictly outside Newton finds a proof in finite time
    outward, _ = dual.derivatives(dual.at(torch.zeros_like(mu))[0])
    moved = replace(dual, y=dual.y + 1e-6 * outward)
    theta, _, _, proven = _newton(moved)
    if not proven:
        return
    # the proof is no weaker without the features that it does not need, and the error is easier to read
    for i in moved.scale_of(theta).argsort().tolist():
        without = theta.clone()
        without[i] = 0
        if moved.highest(without) <= min(0.5 * moved.highest(theta), -1e-300):
            theta = without
    d = theta / scale
    d = d / d.abs().max()
    if moved.highest(d.sign() * scale) <= 0.5 * moved.highest(d * scale):  # a + b + c reads better than fitted factors
        d = d.sign()
    among = [i for i in range(len(names)) if d[i] != 0]
    asked = ", ".join(f"{names[i]!r} = {float(mu[i]):g}" for i in among)
    mean = " on average over contexts" if support.contexts > 1 else ""
    size = float((d.abs() * scale).max())
    most, given = support.highest(d), float(d @ mu)
    beyond = given > most + 1e-5 * size
    raise ValueError(
        (f"the moments {asked} contradict each other: each can be reached, but not all together" if len(among) > 1 else
         f"the moment {asked} is at the edge of what can be reached")
        + ("" if beyond else "; only an infinite lambda would give them")
        + f". In {where}, {_sum(d, among, names)} is at most {_number(most, size)}{mean}; the wanted values give "
        f"{_number(given, size)}"
    )  # fmt: skip


def _number(x: float, size: float) -> str:
    return f"{x:.6g}" if abs(x) > 1e-5 * size else "0"


def _sum(d: Tensor, among: list[int], names: list[str]) -> str:
    """Return d . phi as text."""
    terms = []
    for i in among:
        size = abs(float(d[i]))
        factor = "" if abs(size - 1) < 1e-6 else f"{size:.4g} * "
        terms.append(f"{'- ' if d[i] < 0 else '+ '}{factor}{names[i]!r}")
    return " ".join(terms).removeprefix("+ ")


def _list(among: list[int], names: list[str]) -> str:
    return ", ".join(repr(names[i]) for i in among)
