"""dmfast: fine-tune language models by distribution matching, fast and exact (Korbak et al. 2022, arXiv:2206.00761)."""

from typing import TYPE_CHECKING, Any

from . import eager
from .diagnostics import GradientVariance, distinct_n, gradient_variance, self_bleu, weight_statistics
from .estimators import (
    Estimate,
    Estimates,
    PartitionFunction,
    PartitionFunctions,
    RunningEstimates,
    effective_sample_size,
    estimate,
    estimate_log_z,
    estimate_moments,
)
from .functional import (
    dm_loss,
    linear_dm_loss,
    linear_sequence_log_prob,
    sample_tokens,
    sequence_log_prob,
    shift_labels,
)
from .kernels import BackendInfo, backends, use_backend
from .kernels.result import DMLossOutput
from .matcher import Matcher
from .models import AdapterView, LanguageModel
from .objectives import OBJECTIVES, AdaptiveBeta, Objective, PPOClip, Terms, leave_one_out
from .proposal import OfflineProposal
from .rejection import (
    RejectionCurve,
    RejectionPoint,
    plot_rejection,
    quasi_rejection_sample,
    rejection_curve,
)
from .samples import Samples
from .sampling import Mixture, Prompted, Sampler
from .targets import (
    EBM,
    Classifier,
    Contains,
    Feature,
    LambdaFit,
    Moment,
    Reward,
    Scorer,
    ScorerCounts,
    TargetScores,
    fit_lambda,
)

if TYPE_CHECKING:
    from .training import DMConfig, DMTrainer

__version__ = "0.1.0"
__all__ = [
    "EBM",
    "OBJECTIVES",
    "AdapterView",
    "AdaptiveBeta",
    "BackendInfo",
    "Classifier",
    "Contains",
    "DMConfig",
    "DMLossOutput",
    "DMTrainer",
    "Estimate",
    "Estimates",
    "Feature",
    "GradientVariance",
    "LambdaFit",
    "LanguageModel",
    "Matcher",
    "Mixture",
    "Moment",
    "Objective",
    "OfflineProposal",
    "PPOClip",
    "PartitionFunction",
    "PartitionFunctions",
    "Prompted",
    "RejectionCurve",
    "RejectionPoint",
    "Reward",
    "RunningEstimates",
    "Sampler",
    "Samples",
    "Scorer",
    "ScorerCounts",
    "TargetScores",
    "Terms",
    "backends",
    "distinct_n",
    "dm_loss",
    "eager",
    "effective_sample_size",
    "estimate",
    "estimate_log_z",
    "estimate_moments",
    "fit_lambda",
    "gradient_variance",
    "leave_one_out",
    "linear_dm_loss",
    "linear_sequence_log_prob",
    "plot_rejection",
    "quasi_rejection_sample",
    "rejection_curve",
    "sample_tokens",
    "self_bleu",
    "sequence_log_prob",
    "shift_labels",
    "use_backend",
    "weight_statistics",
]


def __getattr__(name: str) -> Any:
    """The trainer, when it is asked for: it brings transformers, which ``import dmfast`` must not."""
    if name in ("DMConfig", "DMTrainer"):
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module 'dmfast' has no attribute {name!r}")
