"""Features with a model or a temperature in them: what a classifier says of a text, and rewards as constraints."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..samples import Samples
from .constraints import Feature, Scorer


class Classifier(Scorer):
    """What a sequence classifier of transformers says of the continuation: the probability of a label, its log, or
    whether it reaches a threshold.

    Args:
        model: a ``...ForSequenceClassification``, or a ``text-classification`` pipeline, whose model and tokenizer are
            taken. It stays where it is (a GPU serves as it stands) and is put into eval mode.
        tokenizer: the model's own, not that of the samples. A pipeline brings it.
        label: a name of ``model.config.id2label``.
        output: "probability" (softmax over labels; a sigmoid where the labels are independent or there is one),
            "log_probability", or "binary": 1 where the probability is at least ``threshold``, else 0.
        threshold: of "binary".
        batch_size: texts in a forward.
        max_length: tokens of a text that are read. Default: as many as the tokenizer says the model takes.
        cache: as in ``Scorer``.
        name: in logs, reports and errors. Default: the label.

    Raises:
        TypeError, ValueError: no classifier, no tokenizer, an unknown label (the message lists them) or output, a model
            that was trained for regression, which has no probabilities (use ``Scorer``), a tokenizer without padding.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: str,
        output: Literal["probability", "log_probability", "binary"] = "probability",
        threshold: float = 0.5,
        batch_size: int = 64,
        max_length: int | None = None,
        cache: int = 16_384,
        name: str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module) and hasattr(model, "model"):
            model, tokenizer = model.model, tokenizer or model.tokenizer
        names = getattr(getattr(model, "config", None), "id2label", None)
        if not isinstance(model, nn.Module) or not names:
            raise TypeError(
                "Classifier takes a sequence classifier of transformers or a text-classification pipeline, got "
                f"{type(model).__name__}"
            )
        if tokenizer is None:
            raise ValueError("Classifier needs the tokenizer of its model, or a pipeline, which brings it")
        if getattr(tokenizer, "pad_token_id", None) is None:
            raise ValueError("the classifier's tokenizer has no pad_token, and texts go through it in batches; set one")
        if label not in names.values():
            raise ValueError(f"label must be one of {', '.join(map(repr, names.values()))}, got {label!r}")
        if output not in ("probability", "log_probability", "binary"):
            raise ValueError(f'output must be "probability", "log_probability" or "binary", got {output!r}')
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold must be above 0 and at most 1, got {threshold!r}")
        kind = getattr(model.config, "problem_type", None)
        if kind == "regression":
            raise ValueError("the model was trained for regression, so its outputs are no probabilities: use Scorer")
        super().__init__(
            self._classify, on="text", batch_size=batch_size, binary=output == "binary", cache=cache,
            name=label if name is None else name,
        )  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.label, self.output, self.threshold, self.max_length = label, output, threshold, max_length
        self._column = next(i for i, each in enumerate(names.values()) if each == label)
        self._independent = kind == "multi_label_classification" or len(names) == 1

    @torch.no_grad()
    def _classify(self, texts: list[str]) -> Tensor:
        # a text of no tokens would be a row of nothing but padding
        limit = self.max_length or self.tokenizer.model_max_length
        limits = {} if limit > 10**9 else {"truncation": True, "max_length": limit}  # 1e30 where it is not known
        rows = self.tokenizer(texts, **limits)["input_ids"]
        rows = [torch.tensor(row or [self.tokenizer.pad_token_id]) for row in rows]
        device = next(self.model.parameters()).device
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        logits = self.model(input_ids=tokens.to(device), attention_mask=mask.to(device)).logits.double()
        log_p = nn.functional.logsigmoid(logits) if self._independent else logits.log_softmax(-1)
        log_p = log_p[:, self._column]
        if self.output == "log_probability":
            return log_p
        return log_p.exp() if self.output == "probability" else (log_p.exp() >= self.threshold).double()

    def describe(self) -> dict[str, Any]:
        """Model, label and what is read of it."""
        config: Any = self.model.config
        return {"type": "Classifier", "name": self.name,
                "model": getattr(config, "_name_or_path", None) or type(self.model).__name__, "label": self.label,
                "output": self.output, "threshold": self.threshold, "max_length": self.max_length,
                "batch_size": self.batch_size, "cache": self.cache}  # fmt: skip


class Reward(Feature):
    """A reward R(x). As a pointwise constraint it is b(x) = exp(R(x)/beta): the target a exp(R/beta)/Z is the optimum
    of KL-control with the coefficient beta (Korbak et al. 2022, arXiv:2206.00761).

    Everywhere else it is R itself: in a ``Moment``, among what is monitored, as ``DMTrainer(reward=...)``, in the logs.

    Args:
        fn: a ``Feature``, or a function, which becomes a ``Scorer``.
        beta: positive, in units of R.
        options: those of ``Scorer``, where ``fn`` is a function: ``on``, ``batched``, ``batch_size``, ``cache``, ...

    Raises:
        TypeError, ValueError: beta not positive and finite; as ``Scorer``; options along with a ``Feature``.
    """

    def __init__(self, fn: Feature | Callable[..., Any], beta: float, **options: Any) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta!r}")
        if isinstance(fn, Feature) and options:
            raise TypeError(f"{fn!r} has its options already; got {', '.join(options)}")
        self.fn = fn if isinstance(fn, Feature) else Scorer(fn, **options)
        self.beta, self.name, self.binary = float(beta), self.fn.name, False

    def __call__(self, samples: Samples) -> Tensor:
        """(N,) fp64: R(x)."""
        return self.fn(samples)

    @property
    def source(self) -> Feature:
        """R without beta."""
        return self.fn.source

    def log_b(self, value: Tensor) -> Tensor:
        """R/beta, never exponentiated on its own: exp(R/beta) may be beyond any float."""
        return value / self.beta

    def describe(self) -> dict[str, Any]:
        """beta and the description of R."""
        return {"type": "Reward", "name": self.name, "beta": self.beta, "reward": self.fn.describe()}
