"""Load the policy from a path, and save it as a plain folder that needs no dmfast."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, set_seed
from transformers.utils import GENERATION_CONFIG_NAME

from .. import adapters
from ..families import without_adapters
from ..shipped import located


def loaded(model: nn.Module | str | Path) -> nn.Module:
    """Return a model as it is, or load ``tiny-bios``, a folder or a name on the hub in float32."""
    if not isinstance(model, (str, Path)):
        return model
    return cast(nn.Module, AutoModelForCausalLM.from_pretrained(located(model), dtype="float32"))


def with_adapter(model: nn.Module, config: Any, seed: int) -> nn.Module:
    """Return the model with an adapter around it, or the model as it is if there is no config for an adapter.

    Args:
        model: the model that gets the adapter.
        config: the adapter's configuration of peft, or None.
        seed: the seed of the adapter's initial weights.

    Raises:
        ValueError: the model has an adapter already.
    """
    if config is None:
        return model
    import peft

    if isinstance(model, peft.PeftModel):
        raise ValueError("peft_config makes an adapter, and the model is a PeftModel already: leave one of them out")
    set_seed(seed)
    return cast(nn.Module, peft.get_peft_model(model, config))


def save_plainly(
    model: Any, folder: Path, save: Callable[[], None], eos_token_ids: Sequence[int], *, writes: bool
) -> None:
    """Save a model so that ``generate`` ends sequences as training did, and without the adapter that holds q.

    The ``generation_config`` with these ends is saved beside an adapter, too. Nothing that loads an adapter reads it by
    itself, but ``GenerationConfig.from_pretrained`` of the folder does.

    Args:
        model: the unwrapped model.
        folder: the folder that ``save`` writes into.
        save: saves the model as transformers does.
        eos_token_ids: the tokens that end a sequence.
        writes: whether this process writes files.
    """
    inner = without_adapters(model)
    config = inner.generation_config if isinstance(inner, PreTrainedModel) else None
    if config is not None:
        # transformers refuses to save some settings that it loads, such as a temperature without do_sample
        inner.generation_config = GenerationConfig()
    try:
        with _without_proposal(model):
            save()
    finally:
        if config is not None:
            inner.generation_config = config
    if writes and config is not None:
        ends, config = list(eos_token_ids), copy.deepcopy(config)
        config.eos_token_id = ends[0] if len(ends) == 1 else ends
        config.to_json_file(folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])


@contextmanager
def _without_proposal(model: Any) -> Iterator[None]:
    """Make save_pretrained of a PEFT model leave out the adapter of q within the block."""
    names = list(getattr(model, "peft_config", None) or ())
    if adapters.PROPOSAL not in names:
        yield
        return
    names.remove(adapters.PROPOSAL)
    model.save_pretrained = partial(model.save_pretrained, selected_adapters=names)
    try:
        yield
    finally:
        del model.save_pretrained
