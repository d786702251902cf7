"""Provide neighbouring methods as objectives: functions that return A of ``loss = -(1/B) sum_i A_i log pi(x_i)``.

Each is a function of ``Terms``. It computes what its authors' released code does for whole sequences, and its docstring
has the formula and the source. A group is the sequences of one prompt. What compares the rewards of a group is fixed
when a step is drawn (``Terms.at_draw``), so that a ``Matcher`` may cut the group, and ranks may share it. ``vargrad``
compares log pi, and needs all sequences of a prompt in one call of the loss. A ``Matcher`` sees to that, and refuses
steps where it is not possible.

A ``Matcher`` reads these attributes of a function:

- ``needs``: the inputs that it can't do without;
- ``whole_contexts``: whether it needs all sequences of a prompt in one call;
- ``least_of_context``: the least number of sequences of a prompt that it compares;
- ``weight_known``: whether A does not depend on log pi, so that it is formed once, when the step is drawn, and one pass
  over the logits is enough;
- ``centred``: whether A is 0 for all sequences of a prompt whose values are equal;
- ``only_on_policy``: whether it is for sequences of the policy itself only.

The linear losses read ``per_sequence``: whether A depends only on the sequence's own log pi and on what ``at_draw``
gives, so that a call may be cut between its sequences.

The notation is that of ``objectives.py``: rho = pi/q, u = p/q, t = pi/p, R is the reward, and |x| is the number of
scored tokens. R_hat = (R - mean)/(std + 1e-6) compares R with its group, where std is that of a sample (n - 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .objectives import Terms

_Function = TypeVar("_Function", bound=Callable[[Terms], Tensor])
_EPSILON = 1e-6


def _marked(*needs: str, **attributes: object) -> Callable[[_Function], _Function]:
    """Give a function the attributes that a ``Matcher`` reads."""

    def mark(function: _Function) -> _Function:
        for name, value in {"needs": needs, **attributes}.items():
            setattr(function, name, value)
        return function

    return mark


_GROUP = {"least_of_context": 2, "centred": True, "per_sequence": True}  # what it compares is known at the draw
_ON_POLICY_GROUP = {**_GROUP, "weight_known": True, "only_on_policy": True}


def _needed(terms: Terms, method: str, *names: str) -> list[Tensor]:
    found = [getattr(terms, name) for name in names]
    missing = [name for name, value in zip(names, found, strict=True) if value is None]
    if missing:
        raise ValueError(f"{method} needs {' and '.join(missing)}")
    return found


def _log_ratio(terms: Terms, method: str) -> Tensor:
    log_ratio = terms.log_ratio
    if log_ratio is None:
        raise ValueError(f"{method} needs log_proposal, or on_policy=True where the policy itself drew the sequences")
    return log_ratio


def _refuse_zeros(log_target: Tensor, method: str) -> None:
    if not torch.compiler.is_compiling() and bool((log_target == -math.inf).any()):
        at = int((log_target == -math.inf).nonzero()[0, 0])
        raise ValueError(
            f"{method} compares log pi with log P, which is -inf for sequence {at}, where P = 0: take a target that is "
            "positive everywhere, such as a exp(R/beta) by Reward, or another objective"
        )


def _on_policy_only(terms: Terms, method: str) -> None:
    if not terms.on_policy:
        raise ValueError(
            f"{method} is its method for sequences of the policy itself only: set on_policy=True. Off-policy the "
            "method clips each token, which a weight of a sequence can't do"
        )


def advantage(terms: Terms, method: str) -> Tensor:
    """Return R_hat, (B,): the reward less the mean of its group, divided by the group's standard deviation.

    Raises:
        ValueError: there is no reward, or a sequence is the only one of its prompt.
    """
    _needed(terms, method, "reward")
    return terms.at_draw(_standardised)


def _standardised(terms: Terms) -> Tensor:
    centred, n = _centred(terms), terms.group_size()
    std = (terms.group_mean(centred * centred) * n / (n - 1)).sqrt()
    return centred / (std + _EPSILON)


def _centred(terms: Terms) -> Tensor:
    (reward,) = _needed(terms, "a mean of rewards", "reward")
    return reward - terms.group_mean(reward)


@_marked(per_sequence=True)
def trajectory_balance(terms: Terms) -> Tensor:
    """Return A = -2 log t, so that the loss has the gradient of (log pi - log p)^2 with log Z known, at any q.

    This is eq. 14 of Malkin et al. 2022, arXiv:2201.13259, with a Z that is estimated and not learned. It needs no rho,
    because the square is 0 for every sequence at pi = p, whatever q draws. On-policy it is twice ``reverse_kl`` with
    the baseline -1.

    Raises:
        ValueError: log_target, log_z or log q is missing, or a sequence has P = 0.
    """
    log_target, log_z, log_prob = _needed(terms, "trajectory_balance", "log_target", "log_z", "log_prob")
    _refuse_zeros(log_target, "trajectory_balance")
    return -2 * (log_prob - log_target + log_z)


@_marked(whole_contexts=True, least_of_context=2)
def vargrad(terms: Terms) -> Tensor:
    """Return A = -2 (d - the group's mean of d) with d = log pi - log P.

    It gives the gradient of the variance of d over q, which needs no Z (Richter et al. 2020, arXiv:2010.10436). For n
    sequences of a prompt its expectation is (n - 1)/n of that gradient.

    Raises:
        ValueError: log_target is missing, or a sequence has P = 0 or is the only one of its prompt.
    """
    log_target, log_prob = _needed(terms, "vargrad", "log_target", "log_prob")
    _refuse_zeros(log_target, "vargrad")
    d = log_prob - log_target
    return -2 * (d - terms.group_mean(d))


@_marked("log_base", **_ON_POLICY_GROUP)
def maxrl(terms: Terms) -> Tensor:
    """Return A = (v - v_mean)/v_mean, and 0 where no sequence of the prompt is right.

    This is MaxRL, arXiv:2602.02710. v is ``reward`` or, without a reward, P/a of a target a v. For v in {0, 1} its
    expectation is the gradient of the sum of pass@k/k over k < n.

    Raises:
        ValueError: there is neither a reward nor log_target and log_base; ``on_policy`` is not True; or a sequence is
            the only one of its prompt.
    """
    _on_policy_only(terms, "maxrl")
    return terms.at_draw(_over_the_mean)


def _over_the_mean(terms: Terms) -> Tensor:
    v = terms.reward
    if v is None:
        log_target, log_base = _needed(terms, "maxrl without a reward", "log_target", "log_base")
        v = torch.where(log_target == -math.inf, 0.0, (log_target - log_base).exp())
    mean = terms.group_mean(v)
    return torch.where(mean == 0, 0.0, (v - mean) / torch.where(mean == 0, 1.0, mean))


@_marked("reward", **_GROUP)
def gspo(terms: Terms) -> Tensor:
    """Return A = s R_hat/|x| with s = rho^(1/|x|), or 0 where s is clipped.

    s is clipped where R_hat > 0 and s > 1 + 4e-4, and where R_hat < 0 and s < 1 - 3e-4. This is GSPO (Zheng et al.
    2025, arXiv:2507.18071, eq. 5-7).

    Raises:
        ValueError: there is no reward or log q, or a sequence is the only one of its prompt.
    """
    log_ratio, value = _log_ratio(terms, "gspo"), advantage(terms, "gspo")
    length = terms.length.clamp(min=1)
    log_s = log_ratio / length
    clipped = (value > 0) & (log_s > math.log1p(4e-4)) | (value < 0) & (log_s < math.log1p(-3e-4))
    return torch.where(clipped | (value == 0), 0.0, log_s.exp() * value / length)


@_marked("reward", **_GROUP)
def vespo(terms: Terms) -> Tensor:
    """Return A = f(rho) R_hat with f(w) = w^k e^(c (1 - w)) and f(0) = 0.

    (k, c) is (2, 3) where R_hat >= 0, and (3, 2) elsewhere. This is VESPO, arXiv:2602.10693.

    Raises:
        ValueError: there is no reward or log q, or a sequence is the only one of its prompt.
    """
    log_ratio, value = _log_ratio(terms, "vespo"), advantage(terms, "vespo")
    k, c = torch.where(value >= 0, 2.0, 3.0).double(), torch.where(value >= 0, 3.0, 2.0).double()
    ratio = log_ratio.clamp(max=700).exp()  # the bound changes nothing, because e^(-c rho) is 0 there already
    return torch.where(log_ratio == -math.inf, 0.0, (k * log_ratio + c * (1 - ratio)).exp() * value)


@_marked("reward", **_ON_POLICY_GROUP)
def grpo(terms: Terms) -> Tensor:
    """Return A = R_hat/|x|: GRPO on sequences of the policy itself (Shao et al. 2024, arXiv:2402.03300, eq. 3).

    Raises:
        ValueError: there is no reward, ``on_policy`` is not True, or a sequence is the only one of its prompt.
    """
    _on_policy_only(terms, "grpo")
    return advantage(terms, "grpo") / terms.length.clamp(min=1)


@_marked("reward", **_ON_POLICY_GROUP)
def dapo(terms: Terms) -> Tensor:
    """Return A = R_hat B/n for a step of B sequences and n tokens: DAPO on sequences of the policy itself.

    This is eq. 8 of Yu et al. 2025, arXiv:2503.14476. If a step goes through the loss in several parts,
    ``num_sequences`` and ``num_tokens`` are the numbers of the whole step. A ``Matcher`` gives both. Without them the
    numbers are those of the call.

    Raises:
        ValueError: there is no reward, ``on_policy`` is not True, or a sequence is the only one of its prompt.
    """
    _on_policy_only(terms, "dapo")
    n_tokens = torch.as_tensor(terms.n_tokens).clamp(min=1)  # a step without a scored token has no gradient anyway
    return advantage(terms, "dapo") * terms.n_sequences / n_tokens


@dataclass(frozen=True)
class DrGRPO:
    """Dr. GRPO on sequences of the policy itself: A = (R - the group's mean)/``max_length``.

    This is eq. 3 of Liu et al. 2025, arXiv:2503.20783.

    Args:
        max_length: the most tokens that a sequence may have, positive.

    Raises:
        ValueError: max_length is not positive. When called: there is no reward, ``on_policy`` is not True, or a
            sequence is the only one of its prompt.
    """

    max_length: float
    needs = ("reward",)
    least_of_context = 2
    weight_known = centred = only_on_policy = per_sequence = True

    def __post_init__(self) -> None:
        if not 0 < self.max_length < math.inf:
            raise ValueError(f"max_length must be positive and finite, got {self.max_length!r}")

    def __call__(self, terms: Terms) -> Tensor:
        """Return A, (B,) fp64."""
        _on_policy_only(terms, "DrGRPO")
        _needed(terms, "DrGRPO", "reward")
        return terms.at_draw(_centred) / self.max_length


#: The functions by the names that ``DMConfig(objective=...)`` takes.
METHODS: dict[str, Callable[[Terms], Tensor]] = {
    each.__name__: each for each in (trajectory_balance, vargrad, maxrl, gspo, vespo, grpo, dapo)
}
