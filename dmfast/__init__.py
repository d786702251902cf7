"""dmfast: fine-tune language models by distribution matching, fast and exact (Korbak et al. 2022, arXiv:2206.00761)."""

from .functional import dm_loss, sequence_log_prob, shift_labels
from .kernels import BackendInfo, backends, eager, use_backend
from .kernels.result import DMLossOutput
from .objectives import OBJECTIVES, Objective, Terms, leave_one_out

__all__ = [
    "OBJECTIVES",
    "BackendInfo",
    "DMLossOutput",
    "Objective",
    "Terms",
    "backends",
    "dm_loss",
    "eager",
    "leave_one_out",
    "sequence_log_prob",
    "shift_labels",
    "use_backend",
]
__version__ = "0.1.0"
