"""Define the target as an energy-based model: log P(x) = log a(x) + log b(x) + lambda . phi(x)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..estimators import Estimate, estimate_moments
from ..models import LanguageModel
from ..samples import Prompt, Samples
from ..seeds import seed_for
from . import pass_rates
from .constraints import Feature, FeatureValues, Moment, Scorer, as_feature, show
from .drawing import batch_within, drawn_in_parts
from .scorers import Reward
from .solver import LambdaFit, fit_lambda
from .verifier import Verifier

_ENOUGH = 2500.0  # effective samples, with which a moment is known to 2% of its feature's standard deviation under p
_WORTH_ROUNDS = 256  # samples of each context, with fewer of which a fit does not draw in rounds by default
#: b and log b of the pointwise constraints, and the features of the moments, each (N, columns) fp64.
_Scored = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TargetScores:
    """The target's scores of N sequences.

    Attributes:
        log_target: (N,) fp64, log P(x), nats; -inf where b = 0.
        log_b: (N,) fp64, log b(x), nats; -inf where b = 0.
        features: (N, F) fp64, phi(x), in the order of ``EBM.moment_names``.
        log_base: (N,) fp64, log a(x); NaN where it was not computed (b = 0).
        monitored: (N, M) fp64, in the order of ``EBM.monitor_names``: b of each pointwise constraint (R of a
            ``Reward``), then the monitored features.
    """

    log_target: Tensor
    log_b: Tensor
    features: Tensor
    log_base: Tensor
    monitored: Tensor


@dataclass(frozen=True)
class _Pointwise:
    """A pointwise constraint b(x) = phi(x), or 1 - phi(x)."""

    name: str
    feature: Feature
    negated: bool = False

    def log_b(self, column: Tensor) -> Tensor:
        """Return log b (N,) from phi, or from 1 - phi."""
        return column.log() if self.negated else self.feature.log_b(column)


class EBM:
    """The target as an energy-based model, log P(x) = log a(x) + log b(x) + lambda . phi(x).

    This is arXiv:2012.11635, eq. 1-3.

    The constraints may be pointwise, distributional or both. b is the product of the pointwise constraints, and phi are
    the features of the moments. Z is not part of log P. A feature object that is used in several places runs once.

    Args:
        base: the pretrained model a. It must not change, so train a copy of it.
        constraints: pointwise constraints and ``Moment``s. A pointwise constraint is a ``Contains``, ``Scorer``,
            ``Classifier`` or function of ``Samples``, whose value is b >= 0, or a ``Reward``, with b = exp(R/beta).
            A ``Moment`` of a binary feature with the value 0 or 1 is taken as a pointwise constraint.
        monitor: features that are reported with the scores and constrain nothing.
        batch_size: the number of sequences that the base scores at a time. Default: all.

    Raises:
        TypeError, ValueError: base is not a ``LanguageModel`` (or lacks its sample and log_prob), one of the
            constraints is not a constraint, or there is no constraint at all.
    """

    def __init__(
        self,
        base: LanguageModel,
        constraints: Sequence[Feature | Moment | Callable[[Samples], Any]],
        *,
        monitor: Sequence[Feature | Callable[[Samples], Any]] = (),
        batch_size: int | None = None,
    ) -> None:
        if not (callable(getattr(base, "sample", None)) and callable(getattr(base, "log_prob", None))):
            raise TypeError(
                f"base must be a LanguageModel, got {type(base).__name__}; write dmfast.LanguageModel(model, tokenizer)"
            )
        for argument, value in (("constraints", constraints), ("monitor", monitor)):
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise TypeError(f"{argument} must be a list, got {type(value).__name__}; write {argument}=[...]")
        if len(constraints) == 0:
            raise ValueError("constraints is empty: p would be the base itself")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size!r}")
        self.base, self.batch_size = base, batch_size
        self._pointwise: list[_Pointwise] = []
        self._moments: list[Moment] = []
        self._notes: list[str] = []
        unique = _Names()
        for each in constraints:
            if not isinstance(each, Moment):
                feature = as_feature(each, "a constraint")
                self._pointwise.append(_Pointwise(unique(feature.name), feature))
            elif each.pointwise:
                name = unique(each.name if each.value == 1 else f"not {each.name}")
                self._pointwise.append(_Pointwise(name, each.feature, negated=each.value == 0))
                self._notes.append(f"the moment {each.name!r} = {each.value:g} of a binary feature is a pointwise "
                                   f"constraint, b(x) = {'phi(x)' if each.value == 1 else '1 - phi(x)'}")  # fmt: skip
            else:
                self._moments.append(each)
        self.moment_names = [unique(moment.name) for moment in self._moments]
        watched = [as_feature(each, "a monitored feature") for each in monitor]
        self._monitor = list(zip([unique(feature.name) for feature in watched], watched, strict=True))
        self.pointwise_names = [each.name for each in self._pointwise]
        self.monitor_names = self.pointwise_names + [name for name, _ in self._monitor]
        self._lambda: Tensor | None = torch.empty(0, dtype=torch.float64) if not self._moments else None
        self.report: LambdaFit | None = None

    def __repr__(self) -> str:
        moments = [f"E[{n}] = {m.value:g}" for n, m in zip(self.moment_names, self._moments, strict=True)]
        return f"<EBM {'; '.join([each.name for each in self._pointwise] + moments)}>"

    @property
    def scorers(self) -> dict[str, Scorer]:
        """The ``Scorer``s among the features by name, each once and by the first of its names."""
        named = [(each.name, each.feature) for each in self._pointwise]
        named += [(n, m.feature) for n, m in zip(self.moment_names, self._moments, strict=True)] + self._monitor
        found: dict[int, tuple[str, Scorer]] = {}
        for name, feature in named:
            if isinstance(feature.source, Scorer):
                found.setdefault(id(feature.source), (name, feature.source))
        return dict(found.values())

    @property
    def is_filter(self) -> bool:
        """Whether P(x) <= a(x) is known for every x, so that no Z is above 1.

        That is so without a ``Moment`` or a ``Reward`` where every pointwise constraint is at most 1: ``Contains``, a
        ``Verifier``, probabilities of a ``Classifier``, and a ``Scorer`` with ``binary=True``.
        """
        return not self._moments and all(each.feature.at_most_one for each in self._pointwise)

    @property
    def verifiers(self) -> list[Verifier]:
        """The ``Verifier``s among the pointwise constraints or, if there are none, all ``Verifier``s of the target."""
        pointwise = [each.feature for each in self._pointwise if not each.negated]
        others = [*(moment.feature for moment in self._moments), *(feature for _, feature in self._monitor)]
        for features in (pointwise, others):
            found = {id(f.source): f.source for f in features if isinstance(f.source, Verifier)}
            if found:
                return list(found.values())
        return []

    @property
    def zero_one_names(self) -> list[str]:
        """The names of the pointwise constraints whose b(x) is always 0 or 1, so that b is 1 throughout p."""
        return [each.name for each in self._pointwise if each.feature.binary]

    @property
    def binary_names(self) -> list[str]:
        """The names of all features that are always 0 or 1, so that their means are shares."""
        moments = zip(self.moment_names, (moment.feature for moment in self._moments), strict=True)
        pointwise = ((each.name, each.feature) for each in self._pointwise)
        return [name for name, feature in (*moments, *pointwise, *self._monitor) if feature.binary]

    @property
    def wanted(self) -> dict[str, float]:
        """The moments' wanted values by their names."""
        return {name: moment.value for name, moment in zip(self.moment_names, self._moments, strict=True)}

    @property
    def fitted(self) -> bool:
        """Whether ``lambda_`` is known. It is always True without moments."""
        return self._lambda is not None

    @property
    def lambda_(self) -> Tensor:
        """Lambda, (F,) fp64 on the CPU, in the order of ``moment_names``; ``fit`` sets it, or the user does.

        Raises:
            RuntimeError: it is read before it is known.
            ValueError: it is set to another shape or to a value that is not finite.
        """
        if self._lambda is None:
            raise RuntimeError(
                f"lambda of {', '.join(map(repr, self.moment_names))} is not known yet: call fit() on the EBM, "
                "or set lambda_"
            )
        return self._lambda

    @lambda_.setter
    def lambda_(self, value: Tensor | Sequence[float]) -> None:
        self._lambda, self.report = self._valid_lambda(value), None

    def _valid_lambda(self, value: Any) -> Tensor:
        new = torch.as_tensor(value, dtype=torch.float64).detach().cpu().clone()
        if new.shape != (len(self._moments),) or not bool(new.isfinite().all()):
            raise ValueError(
                f"lambda_ must be {len(self._moments)} finite numbers, one for each of {self.moment_names}, got {value}"
            )
        return new

    # --- scores -------------------------------------------------------------------------------------------------

    def features(self, samples: Samples) -> Tensor:
        """Return phi(x), (N, F) fp64, in the order of ``moment_names``."""
        return _columns([moment.feature(samples) for moment in self._moments], samples)

    def log_b(self, samples: Samples) -> Tensor:
        """Return the log of the product of the pointwise constraints, (N,) fp64; -inf where one of them is 0.

        Raises:
            ValueError: a b is negative; the message shows the sample.
        """
        return self._b(samples, FeatureValues(samples))[1].sum(1)

    def log_prob(self, samples: Samples) -> Tensor:
        """Return log P(x), (N,) fp64, as ``score`` gives it."""
        return self.score(samples).log_target

    @torch.no_grad()
    def score(
        self,
        samples: Samples,
        log_base: Tensor | None = None,
        *,
        batch_size: int | None = None,
        values: FeatureValues | None = None,
    ) -> TargetScores:
        """Return log P(x) and its parts.

        Each scorer runs once per sample. The base scores only the samples with b > 0.

        Args:
            samples: N sequences, of any model.
            log_base: (N,) log a(x) where it is known already, as log q(x) is while q is a. The base then does not run.
                It may be NaN where b = 0.
            batch_size: the number of sequences that the base scores at a time. Default: the EBM's.
            values: ``FeatureValues`` of these samples. The values that it holds are not computed again, and the values
                that are computed here are added to it, so that a reward that is also a feature runs once.

        Raises:
            RuntimeError: there are moments and lambda is not known yet, or a scorer raised.
            ValueError: ``values`` is of other samples; a scorer returned a value that is not allowed; a b is negative;
                log_base has another shape or is NaN where b > 0; the temperature of the samples is not the one that
                lambda was fitted at.
        """
        lambda_ = self.lambda_.to(samples.log_prob.device)
        fitted_at = math.nan if self.report is None else self.report.temperature
        if len(samples) and not math.isnan(fitted_at) and samples.temperature != fitted_at:
            raise ValueError(f"lambda was fitted on samples at temperature {fitted_at:g}, these are at "
                             f"{samples.temperature:g}: that is another base distribution; fit again")  # fmt: skip
        values = FeatureValues(samples) if values is None else values
        if values.samples is not samples:
            raise ValueError("values must be the FeatureValues of the samples that are scored, FeatureValues(samples)")
        if log_base is not None and log_base.shape != (len(samples),):
            raise ValueError(f"log_base must be ({len(samples)},), got {tuple(log_base.shape)}")
        b, each_log_b = self._b(samples, values)
        features = _columns([values(moment.feature) for moment in self._moments], samples)
        monitored = torch.cat([b, _columns([values(feature) for _, feature in self._monitor], samples)], 1)
        log_b = each_log_b.sum(1)
        positive = log_b > -math.inf
        if log_base is None:
            log_base = torch.full_like(log_b, math.nan)
            if bool(positive.any()) or getattr(self.base, "in_step", False):
                scored = self.base.log_prob(samples[positive], batch_size=batch_size or self.batch_size)
                log_base[positive] = scored.to(log_base)
        else:
            log_base = log_base.detach().to(log_b)
        log_target = torch.where(positive, log_base + log_b + features @ lambda_, -math.inf)
        if bool(log_target.isnan().any()):
            row = int(log_target.isnan().nonzero()[0, 0])
            raise ValueError(f"log_base is NaN for sample {row}, where b > 0: {show(samples, row)}")
        return TargetScores(log_target, log_b, features, log_base, monitored)

    def _b(self, samples: Samples, values: FeatureValues) -> tuple[Tensor, Tensor]:
        """Return phi (or 1 - phi) and log b, each (N, pointwise constraints) fp64 and checked."""
        columns, logs = [], []
        for each in self._pointwise:
            value = values(each.feature)
            columns.append(1 - value if each.negated else value)
            logs.append(each.log_b(columns[-1]))
            bad = logs[-1].isnan()
            if bool(bad.any()):
                row = int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"the pointwise constraint {each.name!r} must be b(x) >= 0, got {value[row].item():g} for sample "
                    f"{row} ({int(bad.sum())} such of {len(samples)}): {show(samples, row)}; a score that may "
                    "be negative belongs in a Moment, or in b as its exponential: Reward(score, beta)"
                )
        return _columns(columns, samples), _columns(logs, samples)

    # --- lambda -------------------------------------------------------------------------------------------------

    def fit(
        self,
        samples: Samples | None = None,
        *,
        n: int = 10_240,
        contexts: Sequence[Prompt] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int | None = 0,
        batch_size: int | None = None,
        max_stderr: float | None = None,
        progress: bool | None = None,
    ) -> EBM:
        """Find the ``lambda_`` at which E_p[phi] has the wanted moments, from samples of the base.

        The fit sets ``report``, too. Without moments there is nothing to fit; the report says so, and nothing is drawn.

        Args:
            samples: samples of the base. Their ``context_id`` tells contexts apart, and all contexts weigh the same:
                E_p is the mean over contexts. Default: they are drawn here.
            n: the largest total number of samples to draw; each context gets the same number, rounded up.
            contexts: the prompts to draw for. Default: the empty context.
            rows: for each context the row of its data set, which scorers see as ``samples.rows``.
            max_new_tokens, temperature: the settings of the samples that are drawn; they must be those of the training
                (the defaults are ``DMConfig``'s).
            seed: the seed of the samples that are drawn. ``evaluate`` and ``rejection_curve`` draw other sequences with
                the same seed. None takes a seed from torch's global generator.
            batch_size: sequences drawn at a time. Default: the EBM's, or else as many as fit into 4 GiB with their
                cache and logits, 256 at most.
            max_stderr: drawing stops before there are n samples once the standard error of every attained moment (in
                the feature's units) is no larger than this and the fit has no warning. It is checked after about every
                1,024 samples, which with several contexts are shared evenly among them; drawing does not stop before
                every context has shown some b > 0. The report says if it stopped. Default: what 2,500 effective samples
                give, 2% of the feature's standard deviation under p, where n is at least 256 samples a context. 0 draws
                n samples in any case, and so does a base that several processes hold together.
            progress: whether a line on stderr says how many are drawn. Default: only if stderr is a terminal.

        Returns:
            The EBM itself.

        Raises:
            ValueError: both contexts and samples are given; max_stderr is negative; there is no sample; the samples
                are not the base's; no lambda gives the moments (``fit_lambda``). ``lambda_`` stays as it was.
        """
        if not self._moments:
            self.report = _nothing_to_fit(self._notes)
            return self
        if max_stderr is not None and not max_stderr >= 0:
            raise ValueError(f"max_stderr must not be negative, got {max_stderr!r}")
        drawn: int | None = None
        notes: list[str] = []
        if samples is None:
            samples, scored, notes = self._draw(
                n, contexts, rows, max_new_tokens, temperature, seed, batch_size, max_stderr, progress
            )
            drawn = max_new_tokens
        elif contexts is not None or rows is not None:
            raise ValueError("pass samples or contexts: the contexts of samples are told by their context_id")
        else:
            scored = None
        if len(samples) == 0:
            raise ValueError("samples is empty: pass samples of the base, or contexts to draw for")
        samples.check_log_prob("a fit of lambda")
        self._check_from_base(samples)
        b, each_log_b, features = scored or self._scored(samples)
        rates = dict(zip(self.monitor_names, estimate_moments(b, b.new_zeros(len(b))), strict=False))
        log_b = each_log_b.sum(1)
        if not bool((log_b > -math.inf).any()):
            raise ValueError(_never_satisfied(each_log_b, [each.name for each in self._pointwise]))
        found = fit_lambda(
            features, [moment.value for moment in self._moments], log_b=log_b, context_id=samples.context_id,
            names=self.moment_names,
        )  # fmt: skip
        report = replace(found, pointwise=rates, notes=self._notes + found.notes + notes,
                         temperature=samples.temperature, max_new_tokens=drawn)  # fmt: skip
        self._lambda, self.report = torch.tensor(report.lambda_, dtype=torch.float64), report
        for warning in report.warnings:
            warnings.warn(warning, stacklevel=2)
        return self

    def refit(self, features: Tensor, log_b: Tensor, log_ratio: Tensor, context_id: Tensor | None = None) -> LambdaFit:
        """Fit lambda anew from samples of a proposal q, by self-normalised importance sampling with the weights a/q.

        This helps where samples of a show the features too rarely. ``lambda_`` and ``report`` take the result if its
        effective sample size is larger than that of the fit before, and stay as they are if not.

        A caller that holds a Z of this target must start it anew after that; the trainer does.

        Args:
            features, log_b: (N, F) and (N,), as ``score`` gives them.
            log_ratio: (N,) log a(x) - log q(x); it is read only where b > 0.
            context_id: (N,), as in ``fit_lambda``.

        Returns:
            The result of the fit, whether or not it was taken.

        Raises:
            RuntimeError: there was no fit before, or there is no moment.
            ValueError: as ``fit_lambda``.
        """
        if self.report is None or not self._moments:
            raise RuntimeError("refit goes on from what fit() found: call fit() first")
        found = fit_lambda(features, [moment.value for moment in self._moments], log_b=log_b, log_ratio=log_ratio,
                           context_id=context_id, names=self.moment_names)  # fmt: skip
        found = replace(found, pointwise=self.report.pointwise, notes=self._notes + found.notes,
                        temperature=self.report.temperature, max_new_tokens=self.report.max_new_tokens)  # fmt: skip
        if found.ess > self.report.ess:
            self._lambda, self.report = torch.tensor(found.lambda_, dtype=torch.float64), found
        return found

    def fit_z(
        self,
        data: Any,
        n: int = 64,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        seed: int | None = 0,
        batch_size: int | None = None,
        drop_zero: bool = False,
        progress: bool | None = None,
    ) -> Any:
        """Draw n completions of each prompt from the base, and return the data with each prompt's pass rate.

        The pass rate is the mean of b, which for a target that filters the base (``is_filter``) is an unbiased estimate
        of the prompt's Z. ``Matcher(z_from_rows=True)`` and ``DMConfig(z_from_rows=True)`` start each prompt's Z from
        it, as if these n completions had been drawn in the run. A rate of 0 of n says that Z is below 3/n (with 95%
        confidence), and not that it is 0: such a prompt stays in the data, with a Z that is unknown.

        Args:
            data: prompts, or rows with a column ``prompt``; a ``datasets.Dataset`` too.
            n: completions of each prompt.
            max_new_tokens, temperature: those of the training (the defaults are ``DMConfig``'s).
            seed: the seed of the completions. None takes a seed from torch's global generator.
            batch_size: completions drawn at a time. Default: as in ``fit``. At most about a thousand completions, or
                those of one prompt, are in memory together.
            drop_zero: whether prompts of which no completion had b > 0 are left out. A warning counts them either way.
            progress: as in ``fit``.

        Returns:
            For a ``datasets.Dataset`` one with the columns ``pass_rate`` and ``pass_rate_n``; otherwise a list of rows.

        Raises:
            ValueError: the target is not known to filter the base; n is not positive; a row has no prompt, or has one
                of the columns already; with ``drop_zero`` no prompt is left; as ``LanguageModel.check_prompts``.
            TypeError: the data has no length.
            RuntimeError: a scorer raised.
        """
        return pass_rates.fit_z(
            self, data, n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size,
            drop_zero=drop_zero, progress=progress,
        )  # fmt: skip

    def _draw(
        self, n: int, contexts: Sequence[Prompt] | None, rows: Sequence[Mapping[str, Any]] | None, max_new_tokens: int,
        temperature: float, seed: int | None, batch_size: int | None, max_stderr: float | None, progress: bool | None,
    ) -> tuple[Samples, _Scored, list[str]]:  # fmt: skip
        """Return samples of the base, their scores, and a note if there are fewer than n because they suffice."""
        if n < 1:
            raise ValueError(f"n must be positive, got {n!r}")
        several = 1 if contexts is None else max(len(contexts), 1)
        each = math.ceil(n / several)
        # rounds over all prompts compute each prompt once a round, which pays only where they may save samples
        may_stop = each >= _WORTH_ROUNDS if max_stderr is None else max_stderr > 0
        # processes that sample together must stop together, and a scorer may judge differently in each
        may_stop = may_stop and not getattr(self.base, "in_step", False)
        parts: list[Samples] = []
        scores: list[_Scored] = []
        notes: list[str] = []
        for part in drawn_in_parts(
            self.base, contexts, each, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=None if seed is None else seed_for(seed, "fit"), progress=progress, in_rounds=may_stop,
            batch_size=batch_size or self.batch_size or batch_within(self.base, contexts, max_new_tokens),
        ):  # fmt: skip
            parts.append(part.with_rows(rows))
            scores.append(self._scored(parts[-1]))
            count = sum(map(len, parts))
            if may_stop and count < each * several:
                context_id = torch.cat([part.context_id for part in parts])
                found = self._sufficient(_cat(scores), context_id, several, max_stderr)
                if found is not None:
                    notes.append(f"drawing stopped at {count:,} of {each * several:,} samples, whose {found.ess:,.0f} "
                                 "effective samples suffice (max_stderr=0 draws all)")  # fmt: skip
                    break
        return parts[0] if len(parts) == 1 else Samples.cat(parts), _cat(scores), notes

    def _scored(self, samples: Samples) -> _Scored:
        """Return b and log b of the pointwise constraints, and the features of the moments."""
        values = FeatureValues(samples)
        b, log_b = self._b(samples, values)
        return b, log_b, _columns([values(moment.feature) for moment in self._moments], samples)

    def _sufficient(
        self, scored: _Scored, context_id: Tensor, contexts: int, max_stderr: float | None
    ) -> LambdaFit | None:
        """Return the fit if samples of the base determine every moment of p well enough, else None.

        A fit that warns does not suffice, because the error itself is unknown with few samples of a context.
        """
        _, each_log_b, features = scored
        wanted = [moment.value for moment in self._moments]
        try:
            found = fit_lambda(features, wanted, log_b=each_log_b.sum(1), context_id=context_id)
        except ValueError:  # a feature that has not been seen yet, which more samples may show
            return None
        if max_stderr is None:
            precise = found.ess >= _ENOUGH
        else:
            precise = all(each.stderr <= max_stderr for each in found.attained)
        return found if precise and found.contexts == contexts and not found.warnings else None

    @torch.no_grad()
    def _check_from_base(self, samples: Samples) -> None:
        few = samples[:16]
        log_base = self.base.log_prob(few, batch_size=self.batch_size).to(few.log_prob)
        # the bound is far above the effect of bf16 and another order of summation, and far below that of training
        if float((log_base - few.log_prob).abs().mean()) > 0.5 + 0.02 * float(log_base.abs().mean()):
            raise ValueError(
                f"samples must be the base's own: their log_prob ({few.log_prob.mean():.4g} on average over the first "
                f"{len(few)}) is not what the base gives them ({log_base.mean():.4g}); draw them with base.sample"
            )

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return lambda, the moments' names and the report as plain numbers, lists and strings."""
        return {
            "moment_names": list(self.moment_names),
            "moment_values": [moment.value for moment in self._moments],
            "lambda": None if self._lambda is None else self._lambda.tolist(),
            "report": None if self.report is None else self.report.as_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore lambda and the report from a state that ``state_dict`` returned.

        Raises:
            ValueError: the state is of an EBM with other moments or other values of them. Nothing has changed then.
        """
        if state["moment_names"] != self.moment_names:
            raise ValueError(
                f"the state is of an EBM with the moments {state['moment_names']}, and this one has "
                f"{self.moment_names}: give it the constraints of the state, or leave the state and fit() it"
            )
        values = [moment.value for moment in self._moments]
        if state["moment_values"] != values:
            raise ValueError(
                f"the state is of an EBM that gives the moments {self.moment_names} the values "
                f"{state['moment_values']}, and this one gives them {values}: give it the values of the state, or "
                "leave the state and fit() it"
            )
        new = None if state["lambda"] is None else self._valid_lambda(state["lambda"])
        report = None if state["report"] is None else LambdaFit.from_dict(state["report"])
        self._lambda, self.report = new, report

    def describe(self) -> dict[str, Any]:
        """Return the target as JSON for a model card."""
        config = getattr(getattr(self.base, "model", None), "config", None)
        lambdas = [None] * len(self._moments) if self._lambda is None else self._lambda.tolist()
        named = zip(self.moment_names, self._moments, lambdas, strict=True)
        return {
            "base": getattr(config, "_name_or_path", None) or type(self.base).__name__,
            "pointwise": [
                {
                    "name": each.name,
                    "b": "1 - phi" if each.negated else "exp(phi/beta)" if isinstance(each.feature, Reward) else "phi",
                    "feature": each.feature.describe(),
                }
                for each in self._pointwise
            ],
            "moments": [{**moment.describe(), "name": name, "lambda": x} for name, moment, x in named],
            "monitor": [{**feature.describe(), "name": name} for name, feature in self._monitor],
            "fit": None if self.report is None else self.report.as_dict(),
        }

    def identity(self) -> dict[str, dict[str, Any]]:
        """Return what identifies the feature of each constraint, as ``Feature.identity``, by a name for messages."""
        pointwise = {
            f"the constraint {each.name!r}": {"negated": each.negated, **each.feature.identity()}
            for each in self._pointwise
        }
        named = zip(self.moment_names, self._moments, strict=True)
        return pointwise | {f"the moment {name!r}": moment.feature.identity() for name, moment in named}


class _Names:
    """A function that makes names unique."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, name: str) -> str:
        unique, count = name, 1
        while unique in self._taken:
            count += 1
            unique = f"{name} #{count}"
        self._taken.add(unique)
        return unique


def _columns(columns: list[Tensor], samples: Samples) -> Tensor:
    if columns:
        return torch.stack(columns, 1)
    return torch.empty(len(samples), 0, dtype=torch.float64, device=samples.log_prob.device)


def _cat(parts: Sequence[_Scored]) -> _Scored:
    b, log_b, features = (torch.cat(each) for each in zip(*parts, strict=True))
    return b, log_b, features


def _never_satisfied(log_b: Tensor, names: list[str]) -> str:
    n, holds = len(log_b), log_b > -math.inf
    rates = ", ".join(f"{name!r} in {int(count):,}" for name, count in zip(names, holds.sum(0), strict=True))
    return (
        f"b(x) = 0 for all {n:,} samples of the base: the pointwise constraints are never satisfied together ({rates} "
        f"samples). P is then 0 almost everywhere and nothing can be learnt from it: take more samples (n), prompts "
        "that bring the feature out, or a weaker constraint"
    )


def _nothing_to_fit(notes: list[str]) -> LambdaFit:
    nothing = Estimate(math.nan, math.nan)
    notes = [*notes, "there is no moment, so no lambda to fit"]
    return LambdaFit(
        names=[], wanted=[], lambda_=[], base=[], attained=[], kl=nothing, ess=math.nan, n=0, n_positive=0, contexts=0,
        iterations=0, converged=True, seconds=0.0, notes=notes,
    )  # fmt: skip
