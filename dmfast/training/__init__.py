"""Train by distribution matching with transformers' ``Trainer``, which ``pip install 'dmfast[train]'`` brings."""

from .config import DMConfig
from .trainer import DMTrainer

__all__ = ["DMConfig", "DMTrainer"]
