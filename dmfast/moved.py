"""Find the names that were in ``dmfast`` before 0.2 and are in its modules now. 0.3 removes the old ones."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

MOVED = {
    name: f"dmfast.{module}"
    for module, names in {
        "diagnostics": ("GradientVariance", "distinct_n", "gradient_variance", "self_bleu", "weight_statistics"),
        "estimators": (
            "Estimate", "Estimates", "PartitionFunction", "PartitionFunctions", "RunningEstimates",
            "effective_sample_size", "estimate", "estimate_log_z", "estimate_moments",
        ),
        "functional": ("DMLossOutput", "sample_tokens"),
        "kernels": ("BackendInfo", "use_backend"),
        "log_probs": ("dm_loss_from_log_probs",),
        "models": ("AdapterView",),
        "objectives": ("OBJECTIVES", "AdaptiveBeta", "PPOClip", "leave_one_out"),
        "rejection": (
            "RejectionCurve", "RejectionPoint", "plot_rejection", "quasi_rejection_sample", "rejection_curve",
        ),
        "samples": ("Samples",),
        "sampling": ("Mixture", "Prompted", "Sampler"),
        "targets": ("Feature", "LambdaFit", "ScorerCounts", "TargetScores", "fit_lambda"),
    }.items()
    for name in names
}  # fmt: skip


def find(name: str) -> Any:
    """Return what has moved out of ``dmfast``, with a DeprecationWarning at the line that asks for it.

    Raises:
        AttributeError: there is no such name, and there was none.
    """
    if name not in MOVED:
        raise AttributeError(f"module 'dmfast' has no attribute {name!r}")
    module = MOVED[name]
    # 3: past this function and dmfast.__getattr__, to the line that asks
    warnings.warn(
        f"dmfast.{name} has moved to {module}.{name}, and dmfast 0.3 will not have it here: "
        f"from {module} import {name}",
        DeprecationWarning, stacklevel=3,
    )  # fmt: skip
    return getattr(importlib.import_module(module), name)
