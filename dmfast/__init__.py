"""Fine-tune language models by distribution matching, fast and exact (Korbak et al. 2022, arXiv:2206.00761).

The names here serve a training loop: losses, model, target, proposal, trainer. Everything else is imported from its
module, such as ``dmfast.estimators``.
"""

from typing import TYPE_CHECKING, Any

from . import eager, moved
from .functional import (
    dm_loss,
    linear_dm_loss,
    linear_sequence_log_prob,
    sequence_log_prob,
    shift_labels,
)
from .kernels import backends
from .matcher import Matcher
from .models import LanguageModel
from .objectives import Objective, Terms
from .proposal import OfflineProposal
from .targets import EBM, Classifier, Contains, Moment, Reward, Scorer, Verifier

if TYPE_CHECKING:
    from .training import DMConfig, DMTrainer

__version__ = "0.2.0"
__all__ = [
    "EBM",
    "Classifier",
    "Contains",
    "DMConfig",
    "DMTrainer",
    "LanguageModel",
    "Matcher",
    "Moment",
    "Objective",
    "OfflineProposal",
    "Reward",
    "Scorer",
    "Terms",
    "Verifier",
    "backends",
    "dm_loss",
    "eager",
    "linear_dm_loss",
    "linear_sequence_log_prob",
    "sequence_log_prob",
    "shift_labels",
]


def __getattr__(name: str) -> Any:
    """Return the trainer, whose transformers ``import dmfast`` must not bring, or a name that has moved."""
    if name in ("DMConfig", "DMTrainer"):
        from . import training

        return getattr(training, name)
    return moved.find(name)
