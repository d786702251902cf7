"""Provide features from classifiers, and pointwise constraints from rewards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..samples import Samples
from ..tensors import fingerprint
from .constraints import Feature, Scorer


class Classifier(Scorer):
    """A feature that scores the continuation with a sequence classifier of transformers.

    The value is the probability of a label, its log, or 1 or 0 for a probability that does or does not reach a
    threshold.

    Args:
        model: a ``...ForSequenceClassification``, or a ``text-classification`` pipeline, whose model and tokenizer are
            taken. It stays on its device, which may be a GPU, and is put into eval mode.
        tokenizer: the tokenizer of this model, not that of the samples. A pipeline brings it.
        label: a name of ``model.config.id2label``.
        output: "probability" (a softmax over labels, or a sigmoid if the labels are independent or there is only one),
            "log_probability", or "binary", which is 1 if the probability is at least ``threshold`` and else 0.
        threshold: the threshold of "binary".
        batch_size: the number of texts in a forward.
        max_length: the number of tokens of a text that are read. Default: the tokenizer's limit for the model.
        cache: as in ``Scorer``.
        name: the name in logs, reports and errors. Default: the label.

    Raises:
        TypeError, ValueError: the model is not a classifier, or was trained for regression and so has no probabilities
            (use ``Scorer``); there is no tokenizer, or it can't pad; the label is unknown (the message lists the
            labels), or the output is.
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
            raise ValueError("the model was trained for regression, so its outputs are not probabilities: use Scorer")
        super().__init__(
            self._classify, on="text", batch_size=batch_size, binary=output == "binary", cache=cache,
            name=label if name is None else name,
        )  # fmt: skip
        self.model, self.tokenizer = model.eval(), tokenizer
        self.label, self.output, self.threshold, self.max_length = label, output, threshold, max_length
        self._column = next(i for i, each in enumerate(names.values()) if each == label)
        self._independent = kind == "multi_label_classification" or len(names) == 1

    @property
    def at_most_one(self) -> bool:
        """Whether the value is a probability, or 0 or 1."""
        return self.output != "log_probability"

    @torch.no_grad()
    def _classify(self, texts: list[str]) -> Tensor:
        # a text without tokens would be a row of padding alone
        limit = self.max_length or self.tokenizer.model_max_length
        limits = {} if limit > 10**9 else {"truncation": True, "max_length": limit}  # 1e30 says that it is unknown
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
        """Return the model, the label and the kind of output."""
        config: Any = self.model.config
        return {"type": "Classifier", "name": self.name,
                "model": getattr(config, "_name_or_path", None) or type(self.model).__name__, "label": self.label,
                "output": self.output, "threshold": self.threshold, "max_length": self.max_length,
                "batch_size": self.batch_size, "cache": self.cache}  # fmt: skip

    def identity(self) -> dict[str, Any]:
        """Return a few numbers of the model's weights, the label and the kind of output."""
        found: dict[str, Any] = {"type": type(self).__name__, "label": self.label, "output": self.output}
        found["max_length"] = self.max_length
        if self.output == "binary":
            found["threshold"] = self.threshold
        # the name of a model would not do, because a folder may have moved
        weights = fingerprint(self.model.parameters())
        return found if weights is None else {**found, "weights": weights}


class Reward(Feature):
    """A reward R(x) as the pointwise constraint b(x) = exp(R(x)/beta).

    The target a exp(R/beta)/Z is the optimum of KL-control with the coefficient beta (Korbak et al. 2022,
    arXiv:2206.00761).

    In all other places (in a ``Moment``, in ``monitor``, as ``DMTrainer(reward=...)`` and in logs) the value is R
    itself.

    Args:
        fn: a ``Feature``, or a function, which becomes a ``Scorer``.
        beta: the positive temperature, in units of R.
        options: the options of ``Scorer`` if ``fn`` is a function: ``on``, ``batched``, ``batch_size``, ``cache``, ...

    Raises:
        TypeError, ValueError: beta is not positive and finite; ``fn`` is a ``Feature`` and options are given; or as
            ``Scorer``.
    """

    def __init__(self, fn: Feature | Callable[..., Any], beta: float, **options: Any) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"beta must be positive and finite, got {beta!r}")
        if isinstance(fn, Feature) and options:
            raise TypeError(f"{fn!r} has its options already; got {', '.join(options)}")
        self.fn = fn if isinstance(fn, Feature) else Scorer(fn, **options)
        self.beta, self.name, self.binary = float(beta), self.fn.name, False

    def __call__(self, samples: Samples) -> Tensor:
        """Return R(x), (N,) fp64."""
        return self.fn(samples)

    @property
    def source(self) -> Feature:
        """The feature that computes R, without beta."""
        return self.fn.source

    def log_b(self, value: Tensor) -> Tensor:
        """Return R/beta. It is never exponentiated alone, because exp(R/beta) may overflow."""
        return value / self.beta

    def describe(self) -> dict[str, Any]:
        """Return beta and the description of R."""
        return {"type": "Reward", "name": self.name, "beta": self.beta, "reward": self.fn.describe()}

    def identity(self) -> dict[str, Any]:
        """Return beta and what identifies R."""
        return {**super().identity(), "beta": self.beta, "reward": self.fn.identity()}
