"""Form the weight A of each sequence in ``loss = -(1/B) sum_i A_i log pi(x_i)``, as its objective says.

Every method of the field is one choice of the return r in ``A = rho * (r - baseline)``, where
``rho = pi/q`` is the importance ratio of the policy and ``u = p/q`` that of the target (Korbak et al. 2022,
arXiv:2206.00761, sections 2 and 3; f-DPG: Go et al. 2023, arXiv:2302.08215). This module has the formula in plain
torch, in fp64 and vectorised over sequences. ``csrc/objective.h`` has it for the kernels, and no other file has it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Literal, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor

# Flag of csrc/objective.h
ON_POLICY, _UNNORMALIZED, _HAS_TARGET, _INFINITE_AT_ZERO, _FACTOR_LEFT_OUT = 1, 2, 4, 8, 16


def _never(_: float) -> bool:
    return False


def _always(_: float) -> bool:
    return True


def _from_one(value: float) -> bool:
    return value >= 1


def is_number(x: object) -> TypeGuard[float]:
    """Return whether x is a number of Python or NumPy. A bool is not."""
    return isinstance(x, (float, int, Real)) and not isinstance(x, bool)


def is_baseline(x: object, names: Sequence[str]) -> bool:
    """Return whether x is None, one of these names, a tensor or a number. Within a graph only strings are checked."""
    if isinstance(x, str):
        return x in names
    return x is None or torch.compiler.is_compiling() or hasattr(x, "__float__")


@dataclass(frozen=True)
class Kind:
    """The record of an objective: everything that the code must know about it besides its formula in ``weigh``.

    Attributes:
        number: its number in the enum Kind of csrc/objective.h.
        needs: the per-sequence inputs of ``dm_loss`` that it needs.
        return_of: what rho * r depends on when rho is 1: only the ``sample``, also the ``proposal``'s log q, or also
            the ``policy``'s log pi. If rho * r is known before the forward, so is a leave-one-out baseline.
        weight_of: what A depends on off-policy without a baseline, in the same words. If that is not the ``policy``,
            one pass over the logits computes both forward and backward.
        has_target: whether it matches a target p = P/Z. Then A is 0 in a context where every P is 0, and
            ``normalize=False`` has a meaning.
        infinite_at_zero: a function of the parameter that returns whether r is infinite where P(x) = 0.
        parameter: the name of its parameter in ``Objective``, if it has one.
        allowed: a function that returns whether the parameter may have a value, and words for the allowed values.
        baseline: the constant baseline that belongs to it. Such an objective takes no other.
    """

    number: int
    needs: tuple[str, ...] = ("log_target", "log_z")
    return_of: Literal["sample", "proposal", "policy"] = "policy"
    weight_of: Literal["sample", "proposal", "policy"] = "policy"
    has_target: bool = True
    infinite_at_zero: Callable[[float], bool] = _never
    parameter: str | None = None
    allowed: tuple[Callable[[float], bool], str] = (math.isfinite, "finite")
    baseline: float | None = None


KINDS: dict[str, Kind] = {
    "dpg": Kind(1, return_of="proposal", weight_of="proposal"),
    "gdc++": Kind(1, return_of="proposal", weight_of="proposal", baseline=1.0),
    "reverse_kl": Kind(2, infinite_at_zero=_always),
    "js": Kind(3),
    "tv": Kind(4),
    "chi2": Kind(5),
    "reverse_chi2": Kind(6, infinite_at_zero=_always),
    "alpha": Kind(10, infinite_at_zero=_from_one, parameter="alpha"),
    "reinforce": Kind(7, needs=("reward",), return_of="sample", has_target=False),
    "reinforce_p": Kind(8, needs=("log_target",), return_of="sample", has_target=False, parameter="log_scale"),
    "kl_control": Kind(9, needs=("reward", "log_base"), has_target=False, parameter="beta"),
}
OBJECTIVES = tuple(KINDS)
"""The names of all objectives. ``gdc++`` is ``dpg`` with the constant baseline 1."""
#: The objectives that match an explicit target p = P/Z. They need log_target and log_z.
TARGET_OBJECTIVES = frozenset(name for name, kind in KINDS.items() if kind.has_target)

Baseline: TypeAlias = float | Tensor | Literal["leave_one_out", "leave_one_out_context"] | None


@dataclass(frozen=True)
class Objective:
    """An objective with its parameters.

    It is frozen. The loss never updates running values; their owner passes them in
    (``dataclasses.replace(objective, baseline=running.value)``).

    Args:
        name: one of ``OBJECTIVES``.
        baseline: the number subtracted from the return r, so that ``A = rho * (r - baseline)``. It may be ``None``; a
            float, such as a constant or a running mean of rho*r over earlier steps; a (B,) tensor, or one number as a
            0-d tensor; or ``"leave_one_out"`` or ``"leave_one_out_context"``, the mean of the other sequences of this
            call (of the same ``context_id``), which must be known before the forward. ``gdc++`` has the baseline 1 and
            takes no other.
        normalize: ``False`` multiplies A by Z, which gives the paper's own scale (R - Z pi/q with R = P/q). Only
            objectives with a target take it.
        beta: the KL coefficient of ``kl_control``, where r = R - beta (log pi - log a).
        log_scale: c of ``reinforce_p``, whose reward is R = exp(log P - c), since P itself underflows.
        alpha: the order of the divergence that ``alpha`` descends, any finite number: 0 is KL(p||pi), 1 is KL(pi||p).
        normalize_alpha: ``False`` leaves the factor 1/(1 - alpha) out of the return of ``alpha``. This keeps the size
            of A as alpha approaches 1. It is allowed only for alpha below 1, since the factor is negative above.
        max_return: M, positive, the upper bound of (p/pi)^(1 - alpha) - 1 of ``alpha``, before the factor
            1/(1 - alpha) and the baseline. It is allowed only for alpha below 1.

    Raises:
        ValueError: the name is unknown, a parameter is missing or not one of the objective's, or a value is out of
            range.
    """

    name: str
    baseline: Baseline = None
    normalize: bool = True
    beta: float | None = None
    log_scale: float | None = None
    alpha: float | None = None
    normalize_alpha: bool = True
    max_return: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise ValueError(
                f"unknown objective {self.name!r}; dmfast has {', '.join(OBJECTIVES)}, and takes a "
                "function of dmfast.Terms that returns the (B,) weights"
            )
        kind = KINDS[self.name]
        if kind.baseline is not None and self.baseline is not None:
            same = next(name for name, other in KINDS.items() if other.number == kind.number)
            raise ValueError(
                f"objective {self.name!r} is {same!r} with the constant baseline {kind.baseline:g}; for another "
                f"baseline use Objective({same!r}, baseline=...), got baseline={self.baseline!r}"
            )
        if not is_baseline(self.baseline, ("leave_one_out", "leave_one_out_context")):
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
        if not self.normalize and not kind.has_target:
            raise ValueError(
                f"normalize=False multiplies A by Z, which objective {self.name!r} does not have; "
                f"it applies to {', '.join(sorted(TARGET_OBJECTIVES))}"
            )
        for parameter in sorted({each.parameter for each in KINDS.values() if each.parameter is not None}):
            value = getattr(self, parameter)
            if (value is not None) != (parameter == kind.parameter):
                verb = "needs" if parameter == kind.parameter else "does not take"
                raise ValueError(f"objective {self.name!r} {verb} {parameter}, got {value!r}")
            allowed, words = kind.allowed
            if value is not None and not (is_number(value) and allowed(value)):
                raise ValueError(f"{parameter} must be a number that is {words}, got {value!r}")
        if self.max_return is not None and not (is_number(self.max_return) and 0 < self.max_return < math.inf):
            raise ValueError(f"max_return must be a positive finite number or None, got {self.max_return!r}")
        below_one = self.alpha is not None and self.alpha < 1
        if not below_one and (self.max_return is not None or not self.normalize_alpha):
            what = "max_return bounds the return"
            if not self.normalize_alpha:
                what = "normalize_alpha=False leaves the factor 1/(1 - alpha) out of the return"
            raise ValueError(
                f"{what} of objective 'alpha' with alpha below 1; got objective {self.name!r}"
                + (f" with alpha={self.alpha!r}" if self.alpha is not None else "")
            )

    @property
    def kind(self) -> Kind:
        """The record of this objective."""
        return KINDS[self.name]

    @property
    def parameter(self) -> float:
        """The value of its parameter; 0 for an objective that has none."""
        name = self.kind.parameter
        return 0.0 if name is None else float(getattr(self, name))

    @property
    def max_log_return(self) -> float:
        """The bound of log (p/pi)^(1 - alpha), which is log(1 + max_return); inf without a bound."""
        return math.inf if self.max_return is None else math.log1p(self.max_return)

    @cached_property
    def for_kernels(self) -> tuple[int, int, float, float]:
        """Its number, flags, parameter and ``max_log_return``, as csrc/objective.h takes them."""
        flags = 0 if self.normalize else _UNNORMALIZED
        flags |= _HAS_TARGET if self.kind.has_target else 0
        flags |= _INFINITE_AT_ZERO if self.infinite_at_zero else 0
        flags |= 0 if self.normalize_alpha else _FACTOR_LEFT_OUT
        return self.kind.number, flags, self.parameter, self.max_log_return

    @property
    def alone(self) -> Objective:
        """The same objective without a baseline, normalised by Z."""
        name = self.kind.parameter
        parameter = {} if name is None else {name: self.parameter}
        return Objective(self.name, normalize_alpha=self.normalize_alpha, max_return=self.max_return, **parameter)  # type: ignore[arg-type]

    @property
    def needs(self) -> tuple[str, ...]:
        """The per-sequence inputs of ``dm_loss`` that this objective needs."""
        return self.kind.needs

    @property
    def infinite_at_zero(self) -> bool:
        """Whether its return is infinite where P(x) = 0."""
        return self.kind.infinite_at_zero(self.parameter)


#: The per-sequence inputs, in the order in which kernels get them. csrc/batch.h has the same order.
COLUMNS = ("log_proposal", "log_target", "log_z", "reward", "log_base", "baseline")
NO_CONSTANTS = (0.0,) * len(COLUMNS)
#: The bit of each in ``Terms.present`` and ``Terms.given``.
LOG_PROPOSAL, LOG_TARGET, LOG_Z, REWARD, LOG_BASE, BASELINE = (1 << c for c in range(len(COLUMNS)))


class Group(NamedTuple):
    """The facts about B sequences that a function of ``Terms`` may use beside their inputs.

    Attributes:
        length: (B,) fp64, the number of scored tokens of each.
        n_tokens: 0-d fp64 or a number, the number of scored tokens of the whole optimiser step. On several ranks it is
            the average over ranks, because the gradients are averaged, too.
        n_sequences: the number of sequences of the whole optimiser step, likewise.
        context_id: (B,) int64, the prompt of each. If it was not given it is None, and all have the same prompt.
        step: the whole step, if the B sequences are a part of it; None if they are all of it.
    """

    length: Tensor
    n_tokens: Tensor | float
    n_sequences: Tensor | float
    context_id: Tensor | None = None
    step: OfStep | None = None

    def told(self) -> dict[str, object]:
        """Return by name the values that must be the same on ranks that share a vocabulary."""
        numbers = tuple(float(x) if isinstance(x, Tensor) else x for x in (self.n_tokens, self.n_sequences))
        return {
            "context_id": self.length[:0] if self.context_id is None else self.context_id,
            "num_tokens or num_sequences": numbers,
        }


def stacked(columns: Sequence[Tensor]) -> Tensor:
    """Return K columns (B,) as a block (K, B) fp64, with one operation, or two if no column is fp64."""
    block = torch.stack(tuple(columns))
    return block if block.dtype is torch.float64 else block.double()


class Terms:
    """The per-sequence inputs of B sequences: fp64 (B,) tensors without gradient, or None for what was not given.

    A user's own objective is a function of these terms that returns the (B,) weights A. The inputs that were given as
    tensors are stored as one block. An input that is one number for all sequences is stored as a constant.

    Attributes:
        objective: an ``Objective``, or a function of ``Terms``.
        on_policy: whether rho is exactly 1.
        max_weight: the bound of A; inf without a bound.
        block: (K, B) fp64, the K columns that were given, in the order of ``COLUMNS``. If the terms have ``columns``,
            the block is made when it is first read.
        columns: the same columns before a block was made of them, (B,) each and of any floating-point dtype, or None.
        present: the set of columns in the block, as bits: bit c stands for ``COLUMNS[c]``.
        given: the set of columns and constants, as bits.
        constants: the constant of each of ``COLUMNS``, or 0.
        log_prob: (B,) fp64, log pi, or None as long as it is not known.
        entropy_coefficient: the factor of the policy's entropy in the loss; 0 leaves the entropy out.
        group: lengths and contexts, if the objective is a function.
    """

    def __init__(
        self, objective: Objective | Callable[[Terms], Tensor], on_policy: bool, max_weight: float,
        block: Tensor | Sequence[Tensor], present: int, given: int, constants: tuple[float, ...] = NO_CONSTANTS,
        log_prob: Tensor | None = None, entropy_coefficient: float = 0.0, group: Group | None = None,
    ) -> None:  # fmt: skip
        self.objective, self.on_policy, self.max_weight = objective, on_policy, max_weight
        self._block: Tensor | None = block if isinstance(block, Tensor) else None
        self.columns: Sequence[Tensor] | None = None if isinstance(block, Tensor) else block
        self._place: tuple[Tensor, int, int, int] | None = None
        self.present, self.given, self.constants = present, given, constants
        self.log_prob = log_prob
        self.entropy_coefficient, self.group = entropy_coefficient, group

    @staticmethod
    def of(
        objective: Objective | Callable[[Terms], Tensor],
        on_policy: bool,
        max_weight: float,
        log_proposal: Tensor | None = None,
        log_target: Tensor | None = None,
        log_z: Tensor | float | None = None,
        reward: Tensor | None = None,
        log_base: Tensor | None = None,
        baseline: Tensor | float | None = None,
        log_prob: Tensor | None = None,
    ) -> Terms:
        """Return the terms that have these inputs. Each is (B,), or a number that all sequences share."""
        inputs = (log_proposal, log_target, log_z, reward, log_base, baseline)
        columns, present, given, constants = [], 0, 0, list(NO_CONSTANTS)
        for c, value in enumerate(inputs):
            if value is None:
                continue
            given |= 1 << c
            if isinstance(value, Tensor):
                columns.append(value)
                present |= 1 << c
            else:
                constants[c] = float(value)
        if columns:
            block = torch.stack(columns).double()
        elif log_prob is not None:
            block = log_prob.new_empty(0, log_prob.shape[0])
        else:
            block = torch.empty(0, 0, dtype=torch.float64)
        return Terms(objective, on_policy, max_weight, block, present, given, tuple(constants), log_prob)

    @property
    def block(self) -> Tensor:
        """(K, B) fp64, the columns that were given."""
        if self._block is None:
            if self._place is not None:
                memory, offset, k, n = self._place
                self._block = memory.as_strided((k, n), (n, 1), offset)
            else:
                assert self.columns
                self._block = stacked(self.columns)
        return self._block

    def lie_in(self, memory: Tensor, offset: int, n: int) -> None:
        """Use (K, n) numbers of a 1-D fp64 tensor from ``offset`` on as the block. A kernel puts the columns there."""
        assert self.columns is not None
        self._place, self.columns = (memory, offset, len(self.columns), n), None

    def column(self, c: int) -> Tensor | float | None:
        """Return ``COLUMNS[c]``: (B,), a constant, or None where it was not given."""
        if self.present >> c & 1:
            return self.block.select(0, bin(self.present & ((1 << c) - 1)).count("1"))
        return self.constants[c] if self.given >> c & 1 else None

    def _tensor(self, c: int) -> Tensor | None:
        value = self.column(c)
        return value if value is None or isinstance(value, Tensor) else self.block.new_full(self.block.shape[1:], value)

    @property
    def log_proposal(self) -> Tensor | None:
        """(B,) log q(x), nats."""
        return self._tensor(0)

    @property
    def log_target(self) -> Tensor | None:
        """(B,) log P(x), nats; -inf where P = 0."""
        return self._tensor(1)

    @property
    def log_z(self) -> Tensor | None:
        """(B,) log Z, nats."""
        return self._tensor(2)

    @property
    def reward(self) -> Tensor | None:
        """(B,) R(x)."""
        return self._tensor(3)

    @property
    def log_base(self) -> Tensor | None:
        """(B,) log a(x), nats."""
        return self._tensor(4)

    @property
    def baseline(self) -> Tensor | float | None:
        """(B,) or a number, the baseline that is subtracted from the return r."""
        return self.column(5)

    def _of_group(self) -> Group:
        if self.group is None:
            raise ValueError(
                "these Terms know no lengths and no contexts: dm_loss, linear_dm_loss and LanguageModel.loss give them "
                "to an objective that is a function"
            )
        return self.group

    @property
    def context_id(self) -> Tensor | None:
        """(B,) int64, the prompt of each sequence; None where the call got none."""
        return self._of_group().context_id

    @property
    def length(self) -> Tensor:
        """(B,) fp64, the number of scored tokens of each sequence."""
        return self._of_group().length

    @property
    def n_tokens(self) -> Tensor | float:
        """The number of scored tokens of the whole optimiser step: ``num_tokens`` of the call, or the call's own.

        On several ranks it is the average over ranks, because the gradients are averaged, too.
        """
        return self._of_group().n_tokens

    @property
    def n_sequences(self) -> Tensor | float:
        """The number of sequences of the whole optimiser step: ``num_sequences`` of the call, or the call's own.

        On several ranks it is the average over ranks, because the gradients are averaged, too.
        """
        return self._of_group().n_sequences

    def group_size(self) -> Tensor:
        """Return for each sequence the number of sequences of its prompt in this call, (B,) fp64."""
        context_id, length = self.context_id, self.length
        if context_id is None:
            return torch.full_like(length, len(length))
        return _Groups.of(context_id).size.to(length.dtype)

    def group_mean(self, values: Tensor, leave_one_out: bool = False) -> Tensor:
        """Return for each sequence the mean of the values over the sequences of its prompt in this call, (B,).

        All sequences of the prompt must be in the call. A mean of values that are known when a step is drawn (R, log P,
        log a, log q) belongs inside ``at_draw``, which sees the whole step. A function that takes means of log pi needs
        the attribute ``whole_contexts = True``. Then a ``Matcher`` never cuts a group, and refuses one that lies on
        several ranks.

        Args:
            values: (B,). The mean of a group with a value that is not finite is inf.
            leave_one_out: whether the sequence itself is left out of its mean.

        Raises:
            ValueError: a sequence is the only one of its prompt, or the call has only a part of a step and the function
                has no ``whole_contexts``.
        """
        step = self._of_group().step
        if step is not None and not getattr(step.objective, "whole_contexts", False):
            name = getattr(step.objective, "__name__", type(step.objective).__name__)
            raise ValueError(
                f"{name} takes a mean over the sequences of a prompt in a call that has a part of the step, which may "
                "cut the prompt's sequences. Where the values are known when a step is drawn, such as the reward, "
                "write terms.at_draw(lambda terms: terms.group_mean(terms.reward)); where they depend on log pi, set "
                f"{name}.whole_contexts = True"
            )
        return _group_mean(values, self.context_id, leave_one_out)

    def at_draw(self, function: Callable[[Terms], Tensor]) -> Tensor:
        """Return values of these sequences, (B,), that are fixed when the step is drawn.

        The function gets the ``Terms`` of the whole optimiser step, over all ranks and without log pi, and returns a
        value for each sequence. So a mean over a prompt's sequences does not depend on how the step is cut into
        microbatches or on which ranks have the sequences. A call of ``dm_loss`` outside of a ``Matcher`` counts as the
        whole step.

        Args:
            function: a function of ``Terms`` whose ``log_prob`` is None. It may be called several times in a step.
        """
        step = self._of_group().step
        if step is None:
            return function(self._with(None, self.group))
        return function(step.whole)[step.places].to(self.block.device)

    def _with(self, log_prob: Tensor | None, group: Group | None) -> Terms:
        return Terms(self.objective, self.on_policy, self.max_weight, self.block, self.present, self.given,
                     self.constants, log_prob, self.entropy_coefficient, group)  # fmt: skip

    def with_group(self, group: Group) -> Terms:
        """Return these terms with the facts of a ``Group``."""
        return self._with(self.log_prob, group)

    def with_log_prob(self, log_prob: Tensor) -> Terms:
        """Return these terms with log pi, (B,) fp64 without gradient."""
        return self._with(log_prob, self.group)

    def under(self, objective: Objective) -> Terms:
        """Return these terms with another objective and without a baseline."""
        block = self.block[:-1] if self.present & BASELINE else self.block
        present, given, constants = self.present & ~BASELINE, self.given & ~BASELINE, (*self.constants[:-1], 0.0)
        return Terms(objective, self.on_policy, self.max_weight, block, present, given, constants, self.log_prob,
                     self.entropy_coefficient, self.group)  # fmt: skip

    def cut(self, i: int, j: int) -> Terms:
        """Return the terms of sequences [i, j). The ``at_draw`` of a function still sees all sequences."""
        log_prob = None if self.log_prob is None else self.log_prob[i:j]
        objective, group = self.objective, self.group
        if group is not None and (i, j) != (0, len(group.length)):
            if isinstance(objective, OfStep):
                objective = replace(objective, places=objective.places[i:j], first=objective.first + i)
            elif not isinstance(objective, Objective):
                objective = OfStep(objective, self._with(None, group), torch.arange(i, j), first=i)
            context_id = None if group.context_id is None else group.context_id[i:j]
            group = group._replace(length=group.length[i:j], context_id=context_id)
        return Terms(objective, self.on_policy, self.max_weight, self.block[:, i:j], self.present, self.given,
                     self.constants, log_prob, self.entropy_coefficient, group)  # fmt: skip

    @staticmethod
    def join(parts: Sequence[Terms], gather: Callable[[Tensor], Tensor] = lambda x: x) -> Terms:
        """Return the terms of several calls as one, with the objective of the first.

        Args:
            parts: terms with the same inputs.
            gather: a function that concatenates the values of all ranks along the first dimension.

        Raises:
            ValueError: the parts have different inputs.
        """
        first = parts[0]
        given, present = first.given, first.present
        if any(part.given != given for part in parts):
            raise ValueError("terms with other inputs can't be joined")
        # a constant may have another value in another part, and is then joined as a column
        for c in range(len(COLUMNS)):
            if given >> c & 1 and len({(part.present >> c & 1, part.constants[c]) for part in parts}) > 1:
                present |= 1 << c
        columns = [c for c in range(len(COLUMNS)) if present >> c & 1]
        if not columns:
            block = gather(torch.cat([part.block.T for part in parts])).T
        else:
            block = gather(torch.cat([torch.stack([part._filled(c) for c in columns], 1) for part in parts])).T
        return Terms(first.objective, first.on_policy, first.max_weight, block, present, given, first.constants,
                     None, first.entropy_coefficient)  # fmt: skip

    def _filled(self, c: int) -> Tensor:
        value = self._tensor(c)
        assert value is not None
        return value

    @property
    def weight_known(self) -> bool:
        """Whether A can be formed before log pi is."""
        if not isinstance(self.objective, Objective):
            return False
        kind = self.objective.kind
        if self.on_policy:
            return bool(self.given & LOG_PROPOSAL) or kind.return_of == "sample"
        return kind.weight_of != "policy" and not self.given & BASELINE

    @property
    def _proposal(self) -> Tensor:
        """(B,) log q, or the detached log pi if the call is on-policy and has no log_proposal."""
        log_proposal = self.log_proposal
        if log_proposal is not None:
            return log_proposal
        assert self.log_prob is not None
        return self.log_prob

    @property
    def log_ratio(self) -> Tensor | None:
        """(B,) log rho = log pi - log q; exactly 0 on-policy."""
        assert self.log_prob is not None
        if self.on_policy:
            return torch.zeros_like(self.log_prob)
        log_proposal = self.log_proposal
        return None if log_proposal is None else self.log_prob - log_proposal

    @property
    def log_target_ratio(self) -> Tensor | None:
        """(B,) log u = log P - log Z - log q; -inf where P = 0 or the context's Z is 0."""
        log_target, log_z = self.log_target, self.log_z
        if log_target is None or log_z is None:
            return None
        if not self.given & LOG_PROPOSAL and not self.on_policy:
            return None
        log_u = log_target - log_z - self._proposal
        return torch.where(log_z == -math.inf, -math.inf, log_u)


@dataclass(frozen=True, eq=False)
class OfStep:
    """An objective that is a function, for a part of an optimiser step, with the terms of the whole step.

    ``Terms.at_draw`` uses the whole step.

    Args:
        objective: the function of ``Terms``.
        whole: the terms of all sequences of the step, over all ranks, without log pi.
        places: (B,) int64, the numbers in the step of the sequences that the part has.
        first: the number in the call of the first of the B sequences, since a call may go through its sequences in
            parts.
    """

    objective: Callable[[Terms], Tensor]
    whole: Terms
    places: Tensor
    first: int = 0

    def __call__(self, terms: Terms) -> Tensor:
        """Return A, (B,) fp64.

        Raises:
            ValueError: the function raised it. A sequence that the message names has its number in the call.
        """
        try:
            return self.objective(terms.with_group(terms._of_group()._replace(step=self)))
        except ValueError as error:
            if not self.first:
                raise
            in_call = re.sub(r"\bsequence (\d+)", lambda found: f"sequence {int(found[1]) + self.first}", str(error))
            raise ValueError(in_call) from error


def _signed_sum(c1: Tensor | float, e1: Tensor, c2: Tensor, e2: Tensor) -> Tensor:
    """Return c1 e^e1 + c2 e^e2, formed with one common exponent taken out.

    Ratios reach e^+-11,500. This form has neither inf - inf nor 0 * inf where the sum has a sign.
    """
    c1 = torch.as_tensor(c1, dtype=torch.float64, device=e2.device)
    e1, e2 = torch.where(c1 == 0, -math.inf, e1), torch.where(c2 == 0, -math.inf, e2)
    m = torch.maximum(e1, e2)
    common = torch.where(m.isinf(), 0.0, m)
    s = torch.where(c1 == 0, 0.0, c1 * (e1 - common).exp()) + torch.where(c2 == 0, 0.0, c2 * (e2 - common).exp())
    total = torch.where((s == 0) | s.isinf(), s, s * common.exp())
    return torch.where(m == math.inf, torch.where(e1 == math.inf, c1, c2).sign() * math.inf, total)


def weigh(terms: Terms) -> Tensor:
    """Return the weights A of B sequences, (B,) fp64, before ``max_weight`` bounds them.

    ``terms.log_prob`` must be given. ``A = rho * (r - baseline)`` is formed in log space as
    ``first * e^exponent + on_rho * rho``. Where P = 0 it is the limit, with 0 * (-inf) = 0.
    """
    objective = terms.objective
    if not isinstance(objective, Objective):
        return objective(terms)
    name, log_rho, log_u = objective.name, terms.log_ratio, terms.log_target_ratio
    assert log_rho is not None
    first: Tensor | float = 0.0
    exponent, on_rho = log_rho, torch.zeros_like(log_rho)
    if name == "reinforce":
        assert terms.reward is not None
        on_rho = terms.reward
    elif name == "reinforce_p":
        assert terms.log_target is not None
        first, exponent = 1.0, log_rho + terms.log_target - objective.parameter
    elif name == "kl_control":
        assert terms.reward is not None and terms.log_base is not None and terms.log_prob is not None
        log_pi = terms._proposal if terms.on_policy else terms.log_prob
        on_rho = terms.reward - objective.parameter * (log_pi - terms.log_base)
    else:
        assert log_u is not None
        log_t = log_rho - log_u  # t = pi/p
        if name in ("dpg", "gdc++"):
            first, exponent = 1.0, log_u
        elif name == "reverse_kl":
            on_rho = -(log_t + 1)
        elif name == "js":
            on_rho = torch.nn.functional.softplus(-log_t, threshold=700) - math.log(2)
        elif name == "tv":
            on_rho = -log_t.sign() / 2
        elif name == "chi2":
            first, exponent, on_rho = 1.0, 2 * log_u - log_rho, on_rho - 1
        elif name == "reverse_chi2":
            first, exponent, on_rho = -2.0, 2 * log_rho - log_u, on_rho + 2
        elif objective.parameter == 1:  # alpha
            on_rho = -log_t
        else:
            power = 1 - objective.parameter
            log_return = _log_return(objective, log_t).clamp(max=objective.max_log_return)
            factor = 1 / power if objective.normalize_alpha else 1.0
            near = log_return.abs() < 1  # here the difference of two exponentials would lose its digits
            first, exponent = torch.full_like(log_rho, factor).masked_fill(near, 0.0), log_rho + log_return
            on_rho = torch.where(near, factor * log_return.expm1(), -factor)
    baseline, log_z = terms.baseline, terms.log_z
    if baseline is not None:
        on_rho = on_rho - baseline
    if not objective.kind.has_target:
        return _signed_sum(first, exponent, on_rho, log_rho)
    assert log_z is not None
    empty = log_z == -math.inf
    # normalize=False multiplies by Z inside the exponent, where even Z = e^-900 does not underflow
    shift = 0.0 if objective.normalize else torch.where(empty, 0.0, log_z)
    return torch.where(empty, 0.0, _signed_sum(first, exponent + shift, on_rho, log_rho + shift))


def _log_return(objective: Objective, log_t: Tensor) -> Tensor:
    """Return log (p/pi)^(1 - alpha) of ``alpha``, before its bound."""
    return (objective.parameter - 1) * log_t


def bounded_returns(
    objective: Objective | Callable[[Terms], Tensor], log_ratio: Tensor | None, log_target_ratio: Tensor | None
) -> Tensor | None:
    """Return whether ``max_return`` bounds the return of each sequence, (B,) bool, or None without a bound.

    The returns follow from log rho and log u.
    """
    if not isinstance(objective, Objective) or objective.max_return is None:
        return None
    assert log_ratio is not None and log_target_ratio is not None
    return _log_return(objective, log_ratio - log_target_ratio) > objective.max_log_return


def clip(weight: Tensor, max_weight: float) -> tuple[Tensor, Tensor]:
    """Return the weights clipped to [-max_weight, max_weight], and how many were outside (0-d int64)."""
    outside = weight.abs() > max_weight
    return weight.clamp(-max_weight, max_weight), outside.sum()


def bounded_weights(terms: Terms, log_prob: Tensor) -> Tensor:
    """Return A at this log pi, (B,), clipped to ``terms.max_weight``."""
    return clip(weigh(terms.with_log_prob(log_prob)), terms.max_weight)[0]


def leave_one_out(values: Tensor, context_id: Tensor | None = None) -> Tensor:
    """Return for each of B values the mean of the others, (B,), or of those others that have the same context_id.

    As a baseline it keeps the gradient unbiased, because it does not depend on the sequence that it serves. The mean is
    inf if one of the others is not finite.

    Raises:
        ValueError: there is no other sequence to average over.

    Examples:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]))
        tensor([4.0000, 3.5000, 1.5000])
    """
    rest, infinite, of_group, infinite_of_group, n = _group_sums(values, context_id)
    return torch.where(infinite_of_group - infinite > 0, math.inf, (of_group - rest) / (n - 1))


def _group_sums(values: Tensor, context_id: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | int]:
    """Return the finite values, marks of the others, the sums of both over each group, and the size of each group.

    Values that are not finite are replaced by 0 and marked by 1. They are counted apart, because 0 * inf and inf - inf
    would make NaN in the means of other groups.

    Raises:
        ValueError: a sequence is the only one of its group.
    """
    n, finite = values.shape[0], values.isfinite()
    rest, infinite = torch.where(finite, values, 0.0), (~finite).to(values.dtype)
    if context_id is None:
        if n == 1:
            raise ValueError("a mean over the sequences of a prompt needs two or more; sequence 0 is alone")
        return rest, infinite, rest.sum(), infinite.sum(), n
    groups = _Groups.of(context_id)
    if not torch.compiler.is_compiling() and bool((groups.size < 2).any()):
        alone = int((groups.size < 2).nonzero()[0])
        raise ValueError(
            f"a mean over the sequences of a prompt needs two or more of each; sequence {alone} "
            f"(context_id {int(context_id[alone])}) is alone"
        )
    return rest, infinite, groups.sums(rest), groups.sums(infinite), groups.size


class _Groups(NamedTuple):
    """Hold the groups of B sequences with the same context, and sum values over them.

    A step of thousands of sequences is summed for each of its parts, so that B x B comparisons would take longer than
    the step. The sequences are sorted instead. Each group is summed in its own order, which gives the same bits on all
    ranks. torch.compile gets the comparisons, because the sums of segments have no fake kernel in every torch.
    """

    size: Tensor  # (B,) int64, the number of sequences in the group of each sequence
    same: Tensor | None  # (B, B) bool, under torch.compile only
    order: Tensor | None = None  # (B,) int64, the sequences by group
    place: Tensor | None = None  # (B,) int64, the number of the group of each sequence
    lengths: Tensor | None = None  # (groups,) int64, the size of each group

    @staticmethod
    def of(context_id: Tensor) -> _Groups:
        """Return the groups of (B,) contexts."""
        if torch.compiler.is_compiling():
            same = context_id[:, None] == context_id[None, :]
            return _Groups(same.sum(1), same)
        _, place, lengths = torch.unique(context_id, return_inverse=True, return_counts=True)
        return _Groups(lengths[place], None, place.argsort(stable=True), place, lengths)

    def sums(self, values: Tensor) -> Tensor:
        """Return for each sequence the sum of (B,) finite values over its group, (B,)."""
        if self.same is not None:
            return self.same.to(values.dtype) @ values
        if not len(values):  # segment_reduce refuses a tensor without elements
            return values
        assert self.order is not None and self.place is not None and self.lengths is not None
        return torch.segment_reduce(values[self.order], "sum", lengths=self.lengths)[self.place]


def _group_mean(values: Tensor, context_id: Tensor | None, without_own: bool) -> Tensor:
    """Return ``Terms.group_mean``."""
    if without_own:
        return leave_one_out(values, context_id)
    _, _, of_group, infinite_of_group, n = _group_sums(values, context_id)
    return torch.where(infinite_of_group > 0, math.inf, of_group / n).expand_as(values)


def number_in_graph(value: float, n_sequences: int, device: torch.device) -> Tensor:
    """Return a number as a (B,) fp64 tensor of a compiled graph, which then serves for other numbers too.

    As a float, or in ``torch.full``, a number that changes at every step would be compiled again at every step.
    """
    return torch.zeros(n_sequences, dtype=torch.float64, device=device) + value


def plain_baseline(
    objective: Objective | Callable[[Terms], Tensor], n_sequences: int, device: torch.device
) -> Baseline:
    """Return the baseline of this call: a number, a (B,) fp64 tensor, or None.

    A baseline that depends on the sequences is returned by its name.
    """
    if not isinstance(objective, Objective):
        return None
    own = objective.kind.baseline
    baseline = objective.baseline if own is None else own
    if isinstance(baseline, Tensor):
        baseline = baseline.detach().to(device=device, dtype=torch.float64)
        return (baseline.expand(n_sequences) if baseline.dim() == 0 else baseline).contiguous()
    if baseline is None or isinstance(baseline, str):
        return baseline
    return number_in_graph(baseline, n_sequences, device) if torch.compiler.is_compiling() else float(baseline)


def leave_one_out_baseline(terms: Terms, context_id: Tensor | None, n_sequences: int, device: torch.device) -> Tensor:
    """Return the leave-one-out baseline, (B,) fp64, that the objective asks for by name.

    Raises:
        ValueError: rho*r is not known before the forward, or the context_id is missing.
    """
    objective = terms.objective
    assert isinstance(objective, Objective) and isinstance(objective.baseline, str)
    name = objective.baseline
    kind = objective.kind
    of_proposal = kind.return_of == "proposal" and terms.given & LOG_PROPOSAL
    known = terms.weight_known or kind.return_of == "sample" or of_proposal
    if not known:
        raise ValueError(
            f"baseline={name!r} needs returns that are known before the forward; with objective "
            f"{objective.name!r} that is only so with on_policy=True and log_proposal (the sampler's "
            "stored log pi). Use a constant or a running mean"
        )
    if name == "leave_one_out_context" and context_id is None:
        raise ValueError("baseline='leave_one_out_context' needs context_id (B,)")
    returns = known_returns(terms, n_sequences, device)
    return leave_one_out(returns, context_id if name.endswith("context") else None)


def known_returns(terms: Terms, n_sequences: int, device: torch.device) -> Tensor:
    """Return rho * r, (B,) fp64, of an objective for which it is known before the forward.

    rho is not known yet and taken to be 1. So the result is r itself, or u for ``dpg``.
    """
    objective, at_one = terms.objective, terms.log_proposal
    assert isinstance(objective, Objective)
    if at_one is None:
        at_one = torch.zeros(n_sequences, dtype=torch.float64, device=device)
    return weigh(terms.with_log_prob(at_one).under(objective.alone))


@dataclass(frozen=True)
class PPOClip:
    """An objective with PPO's clipping on whole sequences (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    It bounds how far several optimiser steps on one batch may move the policy. The advantage d = r - baseline is taken
    at the sampling policy q and frozen. The gradient is that of ``mean min(rho d, clip(rho, 1 - eps, 1 + eps) d)``. So
    A is rho d, or 0 if d > 0 and rho > 1 + eps, or if d < 0 and rho < 1 - eps. A sequence has one ratio and one
    advantage; this is not the per-token PPO with a value head.

    Pass d as ``reward`` and the sampler's log pi as ``log_proposal``. For KL-control
    d = R - beta (log q - log a) - baseline, in which the penalty is frozen too. The class is a function of ``Terms``
    and not a row of the formula, so that the kernels need nothing new for it.

    Args:
        eps: positive and below 1.

    Raises:
        ValueError: eps is out of range, or a call has no reward or no log_proposal.
    """

    eps: float = 0.2
    per_sequence = True

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be between 0 and 1, got {self.eps!r}")

    def __call__(self, terms: Terms) -> Tensor:
        """Return A, (B,) fp64."""
        if terms.reward is None or terms.log_ratio is None:
            raise ValueError(
                "PPOClip needs reward, the frozen advantage of each sequence, and log_proposal, its log-probability "
                "under the policy that it was drawn from"
            )
        plain = weigh(terms.under(Objective("reinforce")))
        return torch.where(self.clipped(terms.log_ratio, terms.reward), 0.0, plain)

    def clipped(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        """Return from log rho and d whether each sequence is clipped to weight 0, (B,) bool."""
        above, below = log_ratio > math.log1p(self.eps), log_ratio < math.log1p(-self.eps)
        return (advantage > 0) & above | (advantage < 0) & below


class AdaptiveBeta:
    """The coefficient beta of KL-control, adapted so that KL(pi||a) reaches a wanted value.

    The rule is that of Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

    Attributes:
        value: the current beta.

    Args:
        value: beta at the start, positive.
        target: the wanted KL(pi||a) in nats per sequence, positive.
        horizon: the number of sequences in which beta changes by a factor of about e^0.2 at most, positive.

    Raises:
        ValueError: a number is not positive and finite.
    """

    def __init__(self, value: float, target: float, horizon: float = 10_000) -> None:
        for name, number in (("value", value), ("target", target), ("horizon", horizon)):
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {number!r}")
        self.value, self.target, self.horizon = float(value), float(target), float(horizon)

    def update(self, kl: float, n: int) -> None:
        """Update beta with KL(pi||a) of n fresh sequences of pi.

        ``beta *= 1 + clip(KL/target - 1, -0.2, 0.2) * n/horizon``.

        Args:
            kl: KL(pi||a), in nats per sequence.
            n: the number of sequences.

        Raises:
            ValueError: kl is not finite, or n is so large that beta could become negative. Then beta is unchanged.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl must be finite, got {kl!r}")
        if not 0 <= n < 5 * self.horizon:
            raise ValueError(f"n must be below 5 * horizon = {5 * self.horizon:g}, or beta could become negative; "
                             f"got {n!r}")  # fmt: skip
        self.value *= 1 + min(max(kl / self.target - 1, -0.2), 0.2) * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        """Return everything that ``load_state_dict`` needs to go on."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a saved value of beta. The target and the horizon of this object stay."""
        self.value = float(state["value"])
