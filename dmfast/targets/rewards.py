"""Make one reward of several: R(x) = w_1 R_1(x) + w_2 R_2(x) + ..."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..samples import Samples
from .constraints import Feature, FeatureValues, as_feature

#: A reward, or several of them by name or in a list. In a list each has the name of its feature.
AnyReward: TypeAlias = (
    Feature | Callable[[Samples], Any] | Mapping[str, Callable[[Samples], Any]] | Sequence[Callable[[Samples], Any]]
)
#: The weights of several rewards: a number for each, in their order or by name.
Weights: TypeAlias = Sequence[float] | Mapping[str, float]


class WeightedSum(Feature):
    """A feature that is the weighted sum of several features.

    Args:
        parts: the features by name, in order.
        weights: a number for each feature, in their order or by name. Default: 1 for each.

    Attributes:
        parts: the features by name.
        weights: their weights by name.

    Raises:
        TypeError: a part is neither a feature nor a function, or a weight is not a number.
        ValueError: there are no parts; the number or the names of the weights are not those of the parts; or a weight
            is not finite.
    """

    binary = False

    def __init__(self, parts: Mapping[str, Any], weights: Weights | None = None, *, name: str = "reward") -> None:
        if not parts:
            raise ValueError(f"{name} holds no reward")
        self.parts = {each: as_feature(part, f"{name}[{each!r}]") for each, part in parts.items()}
        self.weights, self.name = _weights(list(parts), weights), name

    def __call__(self, samples: Samples) -> Tensor:
        """Return the weighted sum, (N,) fp64."""
        return self.of_values(FeatureValues(samples))

    def of_values(self, values: FeatureValues) -> Tensor:
        """Return the weighted sum, (N,) fp64, from values of which some may be known already."""
        terms = [self.weights[name] * values(part) for name, part in self.parts.items()]
        return torch.stack(terms).sum(0)

    def describe(self) -> dict[str, Any]:
        """Return the parts with their weights."""
        parts = {name: {"weight": self.weights[name], **part.describe()} for name, part in self.parts.items()}
        return {"type": "WeightedSum", "name": self.name, "parts": parts}

    def identity(self) -> dict[str, Any]:
        """Return what identifies each part, by its name, and its weight."""
        parts = {name: {"weight": self.weights[name], **part.identity()} for name, part in self.parts.items()}
        return {**super().identity(), "parts": parts}


def as_reward(reward: AnyReward, weights: Weights | None = None) -> Feature:
    """Return a reward, or several, as one feature.

    Raises:
        TypeError, ValueError: as ``WeightedSum``. Also if two rewards of a list have the same name, or a single reward
            has weights.
    """
    if isinstance(reward, Mapping):
        unnamed = [name for name in reward if not isinstance(name, str)]
        if unnamed:
            raise TypeError(f"reward must have strings as the names of its rewards, got {unnamed[0]!r}")
        return WeightedSum(reward, weights)
    if isinstance(reward, (list, tuple)):
        parts = [as_feature(each, f"reward[{i}]") for i, each in enumerate(reward)]
        names = [part.name for part in parts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"two of the rewards have the name {twice!r}, and each is logged by its own: give them as a mapping by "
                "name, or name their scorers"
            )
        return WeightedSum(dict(zip(names, parts, strict=True)), weights)
    if weights is not None:
        raise ValueError(
            f"reward_weights={weights!r} is for several rewards, in a list or by name, and there is one: multiply its "
            "values instead"
        )
    return as_feature(reward, "reward")


def parts_of(reward: Feature | None) -> dict[str, Feature]:
    """Return by name the rewards that a reward is made of. A single reward has the name ``reward``."""
    if reward is None:
        return {}
    return dict(reward.parts) if isinstance(reward, WeightedSum) else {"reward": reward}


def _weights(names: Sequence[str], weights: Weights | None) -> dict[str, float]:
    if weights is None:
        return dict.fromkeys(names, 1.0)
    listed = f"the {len(names)} rewards {', '.join(names)}"
    if isinstance(weights, Mapping):
        unknown, missing = [n for n in weights if n not in names], [n for n in names if n not in weights]
        if unknown or missing:
            what = f"has no {missing[0]!r}" if missing else f"has {unknown[0]!r}"
            raise ValueError(f"reward_weights must hold one number for each of {listed}, and {what}")
        given = [weights[name] for name in names]
    elif isinstance(weights, (list, tuple)):
        if len(weights) != len(names):
            raise ValueError(
                f"reward_weights must hold one number for each of {listed}, got {len(weights)}: {weights!r}"
            )
        given = list(weights)
    else:
        raise TypeError(f"reward_weights must be a list of numbers, or numbers by name, got {weights!r}")
    for name, weight in zip(names, given, strict=True):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"the weight of the reward {name!r} must be a number, got {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of the reward {name!r} must be finite, got {weight!r}")
    return {name: float(weight) for name, weight in zip(names, given, strict=True)}
