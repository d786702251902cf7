"""Provide the options of published runs by name.

``DMConfig.preset("alpha_dpg", alpha=0.5)`` takes them, or in a loop of your own
``Matcher(policy, target, **PRESETS["alpha_dpg"].options, alpha=0.5)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Preset(NamedTuple):
    """The options of a published run.

    Attributes:
        options: arguments that ``Matcher`` and ``DMConfig`` both have.
        samples_per_context: n, the number of sequences of a prompt in a step.
    """

    options: Mapping[str, Any]
    samples_per_context: int


#: alpha-DPG as its authors ran it (Kruszewski et al. 2025, arXiv:2512.05962), for a target that filters the base by a
#: verifier, ``EBM(base, [Verifier(fn)])``. ``alpha`` must be given. The policy itself draws n = 4 sequences of each
#: prompt, and log pi is the sampler's. Z is the mean of P/pi over the four, at most 1, and 1e-4 where none is right.
#: A = r - (the mean r of the prompt's other sequences), with r = min((p/pi)^(1 - alpha) - 1, 10) and p = P/Z. The
#: factor 1/(1 - alpha) is left out.
ALPHA_DPG = Preset(
    {
        "objective": "alpha", "normalize_alpha": False, "max_return": 10.0, "baseline": "leave_one_out_context",
        "on_policy": True, "partition": "step", "z_floor": 1e-4,
    },
    samples_per_context=4,
)  # fmt: skip

PRESETS: dict[str, Preset] = {"alpha_dpg": ALPHA_DPG}


def named(name: str) -> Preset:
    """Return the preset of a name.

    Raises:
        ValueError: there is no preset of this name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(map(repr, PRESETS))}, got {name!r}")
    return PRESETS[name]
