"""The trainer: transformers' ``Trainer`` for distribution matching. Needs ``pip install 'dmfast[train]'``."""

from .config import DMConfig
from .trainer import DMTrainer

__all__ = ["DMConfig", "DMTrainer"]
