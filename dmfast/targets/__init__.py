"""The target p of distribution matching: constraints, the energy-based model that they define, and its lambda."""

from .constraints import Contains, Feature, Moment, Scorer
from .ebm import EBM, TargetScores
from .solver import LambdaFit, fit_lambda

__all__ = ["EBM", "Contains", "Feature", "LambdaFit", "Moment", "Scorer", "TargetScores", "fit_lambda"]
