"""Define the target p of distribution matching: constraints, the energy-based model that they make, and its lambda."""

from .constraints import Contains, Feature, FeatureValues, Moment, Scorer, ScorerCounts
from .ebm import EBM, TargetScores
from .scorers import Classifier, Reward
from .solver import LambdaFit, fit_lambda
from .verifier import Verifier, VerifierCounts

__all__ = [
    "EBM",
    "Classifier",
    "Contains",
    "Feature",
    "FeatureValues",
    "LambdaFit",
    "Moment",
    "Reward",
    "Scorer",
    "ScorerCounts",
    "TargetScores",
    "Verifier",
    "VerifierCounts",
    "fit_lambda",
]
