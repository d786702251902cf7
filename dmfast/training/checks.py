"""What ``DMTrainer`` refuses or warns of before a run: arguments of transformers that it can't honour."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from .. import sharding
from ..models import LanguageModel
from ..objectives import TARGET_OBJECTIVES
from ..prompts import text_part
from ..ranks import Ranks
from ..seeds import seed_for
from ..targets import EBM
from . import deepspeed, fsdp
from .card import SETTINGS
from .config import DMConfig, refuse_parallelism

# of a model's generation_config: what would change the distribution that is sampled from
_SAMPLER_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias", "num_beams",
)  # fmt: skip


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse what transformers offers and distribution matching can't honour.

    Raises:
        ValueError: it is asked for.
    """
    refuse_parallelism(args)
    fsdp.refuse_arguments(args)
    deepspeed.refuse_arguments(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"DMTrainer does not run under DataParallel ({args.n_gpu} GPUs in one process); start one process per "
            "GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    refused = {
        "auto_find_batch_size": args.auto_find_batch_size,
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "neftune_noise_alpha": args.neftune_noise_alpha is not None,
    }
    why = {
        "auto_find_batch_size": "set per_device_train_batch_size by hand",
        "label_smoothing_factor": "there are no labels to smooth",
        "neftune_noise_alpha": "noise in the policy would make log pi(x) another than that of the model",
    }
    for name, found in refused.items():
        if found:
            raise ValueError(f"DMTrainer refuses {name}={getattr(args, name)!r}: {why[name]}")
    picks = args.load_best_model_at_end or args.save_strategy == "best"
    if picks and args.metric_for_best_model in (None, "loss", "eval_loss"):
        raise ValueError(
            "load_best_model_at_end and save_strategy='best' need metric_for_best_model, one of what evaluate() gives: "
            "kl_policy, kl_policy_base, phi/<feature>, and with several eval sets <name>_kl_policy and so on; got "
            f"{args.metric_for_best_model!r}. An evaluation has no loss"
        )


def refuse_stream(args: DMConfig, *, has_eval: bool) -> None:
    """Refuse what needs to know the prompts of a data set without a length.

    Raises:
        ValueError: it is asked for.
    """
    if args.max_steps <= 0:
        raise ValueError("train_dataset is a stream, which has no epochs to count: set max_steps in DMConfig")
    if args.sampler_ahead:
        raise ValueError(
            f"sampler_ahead={args.sampler_ahead} draws the sequences of coming steps, whose prompts a stream has not "
            "given yet: set sampler_ahead=0, or give a train_dataset with a length"
        )
    evaluates = str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no" or args.eval_on_start
    if evaluates and not has_eval:
        raise ValueError(
            "train_dataset is a stream, which an evaluation does not read: give an eval_dataset (for instance "
            "list(stream.take(128))), or set eval_strategy='no'"
        )


def with_pad_token(processing_class: Any) -> Any:
    """Return a tokenizer or processor, whose tokenizer gets EOS as its pad token where it has none."""
    tokenizer, _ = text_part(processing_class, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(f"the tokenizer has no pad token; padding with EOS, {tokenizer.eos_token!r}", stacklevel=3)
    return processing_class


def check_fit(
    policy: LanguageModel, target: EBM, args: DMConfig, contexts: int, objective: str | None, *, has_prompts: bool
) -> None:
    """Check that vocabularies, lengths of sequences, prompts and steps go together.

    Args:
        policy, target, args: what is trained, towards what and how.
        contexts: how many the data set has.
        objective: the name of the built-in one, or None.
        has_prompts: whether there is a data set.

    Raises:
        ValueError: they do not.
    """
    tokens, base = len(policy.tokenizer), target.base.vocab_size
    if tokens > policy.vocab_size or policy.vocab_size != base:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, the model {policy.vocab_size} embeddings and the base {base}: they "
            "don't belong together"
        )
    if not has_prompts and args.max_steps <= 0:
        raise ValueError("without a train_dataset there are no epochs to count: set max_steps in DMConfig")
    if contexts > 1 and (args.samples_per_context or 1) < 2 and objective in TARGET_OBJECTIVES:
        warnings.warn(
            "with one sample per context (DMConfig.samples_per_context) a context's first visit estimates its Z "
            "from that sample alone, which makes the weight of the sample p/q = 1 whatever it is; draw more",
            stacklevel=3,
        )


def warn_of_generation_config(model: nn.Module) -> None:
    """Warn of what a model's ``generation_config`` says of sampling, since it is ignored."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return
    found = {k: v for k, v in config.to_diff_dict().items() if k in _SAMPLER_OPTIONS and v is not None}
    if found:
        warnings.warn(
            f"the model's generation_config sets {found}, which is ignored: sequences are drawn from the model's own "
            "distribution at DMConfig.temperature, the only one whose log-probabilities are known",
            stacklevel=3,
        )


def check_alike(
    ranks: Ranks, policy: LanguageModel, target: EBM, args: DMConfig, data: str, *, weights: bool = True
) -> None:
    """Check that all ranks train the same model towards the same target on the same data.

    Args:
        ranks: which call this together.
        policy, target, args: of this rank.
        data: a digest of its data set.
        weights: False where they come from rank 0 later.

    Raises:
        ValueError: they do not, on every rank, with what differs.
    """
    if ranks.size == 1:
        return
    mine = {f"DMConfig.{name}": str(getattr(args, name)) for name in SETTINGS}
    mine |= {"the data set": data, "the tokenizer": f"{len(policy.tokenizer)} {policy.eos_token_ids}"}
    mine["the target's constraints"] = f"{target.moment_names} {list(target.scorers)} {target.monitor_names}"
    if weights:
        mine |= {"the model's weights": _digest(policy.model), "the base's weights": _digest(target.base.model)}
    digests = ranks.gather(torch.tensor([[seed_for(0, each) for each in mine.values()]], device=args.device))
    differs = (digests != digests[0]).any(0).tolist()
    found = [name for name, each in zip(mine, differs, strict=True) if each]
    if "the target's constraints" not in found and target.moment_names:
        lambdas = ranks.gather(target.lambda_.to(args.device)[None])
        if bool(((lambdas - lambdas[0]).abs() > 1e-3 * lambdas[0].abs().clamp(min=1.0)).any()):
            found.append(f"the target's lambda ({'; '.join(str(each) for each in lambdas.tolist())})")
    if found:
        raise ValueError(
            f"the {ranks.size} processes do not train the same thing: they differ in {', '.join(found)}. Give all of "
            "them the same arguments and files, and set a seed before whatever is made at random"
        )


def _digest(model: nn.Module) -> str:
    """Return a digest of a few values of each parameter."""
    # parts of one tensor differ between the processes that hold it
    there = [p.detach() for p in model.parameters() if not (p.is_meta or sharding.is_shard(p))]
    return str([float(parameter.flatten()[:8].double().sum()) for parameter in there])
