"""dmfast: fine-tune language models by distribution matching, fast and exact (Korbak et al. 2022, arXiv:2206.00761)."""

from .estimators import (
    Estimate,
    Estimates,
    PartitionFunction,
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
from .kernels import BackendInfo, backends, eager, use_backend
from .kernels.result import DMLossOutput
from .models import LanguageModel, Samples
from .objectives import OBJECTIVES, Objective, Terms, leave_one_out
from .proposal import OfflineProposal

__version__ = "0.1.0"
__all__ = [
    "OBJECTIVES",
    "BackendInfo",
    "DMLossOutput",
    "Estimate",
    "Estimates",
    "LanguageModel",
    "Objective",
    "OfflineProposal",
    "PartitionFunction",
    "RunningEstimates",
    "Samples",
    "Terms",
    "backends",
    "dm_loss",
    "eager",
    "effective_sample_size",
    "estimate",
    "estimate_log_z",
    "estimate_moments",
    "leave_one_out",
    "linear_dm_loss",
    "linear_sequence_log_prob",
    "sample_tokens",
    "sequence_log_prob",
    "shift_labels",
    "use_backend",
]
