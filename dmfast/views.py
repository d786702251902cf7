"""A policy's backbone under another of its adapters: a, pi and q in the memory of one model (``adapters.py``)."""

from __future__ import annotations

import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import adapters
from .models import LanguageModel, Source, module_of, of_adapter
from .samples import Samples
from .tensors import copy_into


class AdapterView(LanguageModel):
    """A policy's backbone under another of its adapters, or under none. It is frozen: nothing has a gradient.

    Args:
        policy: a ``LanguageModel`` around a ``peft.PeftModel`` with one active adapter of LoRA's kind.
        adapter: the one to see it under; None: none, the pretrained model.

    Raises:
        ValueError: what ``policy`` wraps can't be switched (no PEFT model, ``modules_to_save``, trained biases, a
            merged adapter, several active ones, ...); no such adapter, or the policy's own.
    """

    def __init__(self, policy: LanguageModel, adapter: str | None = None) -> None:
        model: Any = policy._unwrapped()
        trained = adapters.check(model)
        if adapter is not None and adapter not in model.peft_config:
            raise ValueError(f"the model has no adapter {adapter!r}, only {', '.join(model.peft_config)}")
        if adapter == trained:
            raise ValueError(f"the adapter {adapter!r} is the policy's, which moves; a view of it would move too")
        super().__init__(
            model, policy.tokenizer, eos_token_id=policy.eos_token_ids, logits_dtype=policy.logits_dtype,
            chat_template_kwargs=policy.chat_template_kwargs,
        )  # fmt: skip
        self._guard, self._said = policy._guard, policy._said
        self.gather_for_sampling, self.packs = policy.gather_for_sampling, policy.packs
        self.adapter = adapter
        self._config = model.peft_config.get(adapter)

    def _tensors(self) -> dict[str, Tensor]:
        self.check_there()
        return adapters.tensors_under(self.model, self.adapter)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Replace the adapter's weights: q <- pi.

        Args:
            source: the policy that this is a view of, another view of its model, or a folder with an adapter.

        Raises:
            TypeError: this is a view under no adapter, or the source is another model, whose base may be another.
            FileNotFoundError, RuntimeError: as ``LanguageModel.load``; the adapter stays as it was.
        """
        if self.adapter is None:
            raise TypeError("this AdapterView is the base, without an adapter, so there is nothing to load into")
        if not isinstance(source, (str, os.PathLike)) and module_of(source) is not self.model:
            raise TypeError(
                "an AdapterView loads what is an adapter of its own model, the policy or a folder that has one saved; "
                f"the source, a {type(source).__name__}, is another model, whose base may be another"
            )
        copy_into(of_adapter(self._tensors()), of_adapter(self._given(source)))

    def check_there(self) -> None:
        """Check that the adapter is the one that this is a view of.

        Raises:
            RuntimeError: it was deleted, or another of its name took its place, as that of a newer proposal does.
        """
        model: Any = self.model
        if self.adapter is not None and model.peft_config.get(self.adapter) is not self._config:
            raise RuntimeError(
                f"the adapter {self.adapter!r} that this is a view of was deleted or replaced (a newer OfflineProposal "
                "of the same model takes the place of an older one); make a new trainer or proposal"
            )

    def sample(self, *args: Any, **kwargs: Any) -> Samples:
        """Draw as ``LanguageModel.sample`` does."""
        self.check_there()
        with self._ready_to_sample(), adapters.switched(self.model, self.adapter):
            return super().sample(*args, **kwargs)

    @torch.no_grad()
    def _run(self, tokens: Tensor, **inputs: Any) -> Any:
        self.check_there()
        with adapters.switched(self.model, self.adapter):
            return super()._run(tokens, **inputs)

    def loss(self, samples: Samples, **options: Any) -> NoReturn:
        """Refuse: a view has no gradient.

        Raises:
            TypeError: always.
        """
        raise TypeError("an AdapterView is frozen, so it has no loss; call loss of the policy's own LanguageModel")
