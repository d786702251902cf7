"""Refuse, or warn of, arguments that ``DMTrainer`` can't honour, before a run begins."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from .. import sharding
from ..kernels import warn_caller
from ..models import LanguageModel
from ..objectives import TARGET_OBJECTIVES, Objective
from ..prompts import text_part
from ..ranks import Ranks
from ..seeds import seed_for
from ..settings import Settings
from ..targets import EBM
from ..targets.constraints import Feature
from ..tensors import address
from . import deepspeed, fsdp
from .config import DMConfig, refuse_parallelism
from .resume import features_of, plain

# the entries of a model's generation_config that would change the distribution that is sampled from
_SAMPLER_OPTIONS = (
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "no_repeat_ngram_size", "min_length", "min_new_tokens", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids", "sequence_bias", "num_beams",
)  # fmt: skip
# A rank may have its own value of these arguments, which say where it lies, reads and writes, and what it shows.
_OF_EACH_RANK = frozenset((
    "local_rank", "output_dir", "resume_from_checkpoint", "sampler", "sampler_options", "proposal_device",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name",
    "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_token",
    "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision",
))  # fmt: skip


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse the arguments of transformers that distribution matching can't honour.

    Raises:
        ValueError: one of them is set.
    """
    refuse_parallelism(args)
    fsdp.refuse_arguments(args)
    deepspeed.refuse_arguments(args)
    if args.n_gpu > 1:
        raise ValueError(
            f"DMTrainer does not run under DataParallel ({args.n_gpu} GPUs in one process); start one process per "
            "GPU with accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES"
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "fp16=True has no effect on a CPU, which would train in float32 without a word; take bf16=True with "
            "use_cpu=True, or leave it out"
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
    """Refuse the arguments that need to know all prompts, which a data set without a length does not tell.

    Raises:
        ValueError: one of them is set.
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


def check_environment(args: DMConfig, *, own_optimizer: bool = False, own_scheduler: bool = False) -> None:
    """Check what a run needs besides its model, before anything is loaded or drawn.

    Args:
        args: the arguments of the run.
        own_optimizer: whether the caller brings an optimiser, so that ``args.optim`` is not used.
        own_scheduler: whether the caller brings a scheduler, so that ``args.lr_scheduler_type`` is not used.

    Raises:
        ImportError: a package of ``report_to`` or ``optim`` is not installed.
        ValueError: ``report_to`` or ``optim`` is unknown, or no optimiser or scheduler can be made of the arguments.
        OSError: nothing can be written into ``output_dir``, or ``push_to_hub`` is set and the hub can't be reached.
    """
    for each in get_reporting_integration_callbacks(args.report_to):
        try:
            each()
        except (ImportError, RuntimeError, AssertionError, ValueError) as error:
            raise ImportError(f"report_to={args.report_to!r} can't be used: {error}") from error
    if args.push_to_hub and args.process_index == 0:
        _check_hub(args)
    optimizer = None if own_optimizer else _optimizer_of(args)
    if not own_scheduler:
        _check_scheduler(args, optimizer)
    if args.should_save:
        check_writable(Path(args.output_dir))


def _check_hub(args: DMConfig) -> None:
    """Check that the hub can be reached and knows who asks.

    Raises:
        OSError: it can't be reached, or there is no login.
    """
    from huggingface_hub import whoami

    try:
        whoami(token=args.hub_token)
    except Exception as error:  # the hub's client has errors of its own and of the library that sends its requests
        raise OSError(
            f"push_to_hub=True needs a login at the hub, which could not be checked: {type(error).__name__}: {error}. "
            "Run hf auth login, or leave push_to_hub out"
        ) from error


def _optimizer_of(args: DMConfig) -> torch.optim.Optimizer | None:
    """Return the optimiser of ``args`` for one parameter, or None where transformers makes it of a model's own.

    Raises:
        ImportError: its package is not installed.
        ValueError: it can't be made.
    """
    name = str(getattr(args.optim, "value", args.optim))
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):
        _check_package_of(args, name)
        return None
    _check_form(args.optim_args)
    parameter = nn.Parameter(torch.zeros(1, device=args.device))
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        made: torch.optim.Optimizer = kind([{"params": [parameter], "weight_decay": args.weight_decay}], **options)
    except (ImportError, ValueError, RuntimeError, TypeError, AssertionError) as error:
        given = f" with optim_args={args.optim_args!r}" if args.optim_args else ""
        kind_of_error = ImportError if isinstance(error, ImportError) else ValueError
        raise kind_of_error(f"optim={name!r}{given} can't be made: {error}") from error
    _refuse_unread(args, name)
    return made


def _check_package_of(args: DMConfig, name: str) -> None:
    """Check the package of an optimiser that transformers makes of a model, which is not there yet.

    Raises:
        ImportError: it is not installed.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except ImportError as error:
        raise ImportError(f"optim={name!r} can't be made: {error}") from error
    except (ValueError, AttributeError):
        return  # transformers looks for the package first, so it is here, and only the model is missing


def _check_form(optim_args: str | None) -> None:
    """Refuse ``optim_args`` that are not ``key=value`` pairs, of which transformers would complain without a name."""
    if optim_args and any(each.count("=") != 1 for each in optim_args.split(",")):
        raise ValueError(f"optim_args must be like 'momentum=0.9, nesterov=True', got {optim_args!r}")


def _refuse_unread(args: DMConfig, name: str) -> None:
    """Refuse ``optim_args`` that would have no effect, because transformers passes over those that it does not know.

    Raises:
        ValueError: the message names them.
    """
    given = dict(each.split("=") for each in (args.optim_args or "").replace(" ", "").split(",") if each)
    if "weight_decay" in given:
        raise ValueError(
            f"weight_decay in optim_args={args.optim_args!r} would have no effect, because each parameter group has a "
            "weight decay of its own: set DMConfig.weight_decay instead"
        )
    unread = [key for key in given if not _is_read(args, given, key)]
    if unread:
        adam = "; the settings of Adam are adam_beta1, adam_beta2, adam_epsilon and weight_decay of DMConfig"
        raise ValueError(
            f"optim={name!r} does not read {', '.join(unread)} of optim_args={args.optim_args!r}, which would have no "
            f"effect: leave it out{adam if 'adam' in name else ''}"
        )


def _is_read(args: DMConfig, given: Mapping[str, str], key: str) -> bool:
    """Return whether transformers reads a key of ``optim_args``, so that another value of it changes something."""
    other = copy.copy(args)

    def made_of(pairs: Mapping[str, str]) -> Any:
        other.optim_args = ",".join(f"{name}={value}" for name, value in pairs.items())
        return Trainer.get_optimizer_cls_and_kwargs(other)

    without = {name: each for name, each in given.items() if name != key}
    try:
        return bool(made_of({**given, key: "x"}) != made_of(without))
    except (ValueError, TypeError, AttributeError, KeyError):  # x is not a value for it, or it must not be left out
        return True


def _check_scheduler(args: DMConfig, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuse a scheduler that can't be made of ``args``, and arguments that it would not see.

    Raises:
        ValueError: the message names the arguments.
    """
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.lr_scheduler_kwargs and name in ("constant", "constant_with_warmup"):
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} would be ignored, because lr_scheduler_type={name!r} "
            "takes none: leave them out, or choose another scheduler"
        )
    steps = args.max_steps if args.max_steps > 0 else 10**6  # the length does not matter here
    if optimizer is None:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # its own rate is not known here
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r} can't be made: {error}"
        ) from error


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or that the folder can be made if it does not exist.

    Raises:
        OSError: no file can be written; the message names the folder.
    """
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"nothing can be written into output_dir={str(folder)!r}: {error.strerror or error}") from error


def _existing(folder: Path) -> Path:
    """Return a folder, or if it does not exist yet, the nearest of its parents that does."""
    whole = folder.absolute()
    return next(each for each in (whole, *whole.parents) if each.exists())


def check_space(folder: Path, model: nn.Module, *, checkpoints: bool) -> None:
    """Check that a disk has room for a model, and for one checkpoint if the run writes checkpoints.

    Args:
        folder: the folder that they are written into.
        model: the model that is saved. Of a PEFT model only the adapter is saved, which needs no check.
        checkpoints: whether the run writes checkpoints. Each holds the model, two moments of Adam and q.

    Raises:
        OSError: the disk has too little room; the message has both sizes.
    """
    if hasattr(model, "peft_config"):
        return
    parameters = {address(p): p.numel() * p.element_size() for p in model.parameters() if not sharding.is_shard(p)}
    needed = sum(parameters.values()) * (5 if checkpoints else 1)
    free = shutil.disk_usage(_existing(folder)).free
    if free < needed:
        what = "the model and a checkpoint with optimiser and q" if checkpoints else "the model"
        raise OSError(
            f"output_dir={str(folder)!r} has {free / 1e9:.2g} GB free, and {what} need {needed / 1e9:.2g} GB: free "
            "some, choose another folder" + (", or set save_strategy='no'" if checkpoints else "")
        )


def with_pad_token(processing_class: Any) -> Any:
    """Return the tokenizer or processor. If its tokenizer has no pad token, EOS becomes the pad token."""
    tokenizer, _ = text_part(processing_class, None)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        warnings.warn(f"the tokenizer has no pad token; padding with EOS, {tokenizer.eos_token!r}", stacklevel=3)
    return processing_class


def check_fit(
    policy: LanguageModel, target: EBM, args: DMConfig, contexts: int, settings: Settings, *, has_prompts: bool
) -> None:
    """Check that vocabularies, lengths of sequences, prompts and steps go together.

    Args:
        policy, target, args: the policy, its target and the arguments of the run.
        contexts: the number of contexts in the data set.
        settings: the settings of a step.
        has_prompts: whether there is a data set.

    Raises:
        ValueError: two of them do not go together.
    """
    tokens, base = len(policy.tokenizer), target.base.vocab_size
    if tokens > policy.vocab_size or policy.vocab_size != base:
        raise ValueError(
            f"the tokenizer has {tokens} tokens, the model {policy.vocab_size} embeddings and the base {base}: they "
            "don't belong together"
        )
    if not has_prompts and args.max_steps <= 0:
        raise ValueError(
            "without a train_dataset there are no epochs to count: set max_steps in DMConfig to 1 or more, got "
            f"max_steps={args.max_steps!r}"
        )
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ValueError(
            f"a run with num_train_epochs={args.num_train_epochs:g} trains nothing: set max_steps, or "
            "num_train_epochs, to more than 0"
        )
    of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    if not has_prompts and args.samples_per_context not in (None, of_step):
        warn_caller(
            f"samples_per_context={args.samples_per_context!r} is ignored, because there are no prompts: all {of_step} "
            "sequences of a step come from the one empty context. Give prompts, or leave it out"
        )
    warmup = args.get_warmup_steps(args.max_steps) if args.lr_scheduler_type != "constant" else 0
    if 0 < args.max_steps <= warmup:
        warn_caller(
            f"the warm-up takes {warmup} steps (warmup_steps={args.warmup_steps:g}) and the run {args.max_steps} "
            f"(max_steps): it ends before it has come to learning_rate={args.learning_rate:g}; lower warmup_steps or "
            "raise max_steps"
        )
    template = settings.template
    infinite = isinstance(template, Objective) and template.infinite_at_zero and args.max_weight is None
    if infinite and target.is_filter:
        of_alpha = "" if args.alpha is None else f" with alpha={args.alpha!r}"
        warn_caller(
            f"objective {settings.name!r}{of_alpha} is infinite where P(x) = 0, and {target} has such sequences: the "
            "first one ends the run; set max_weight, or take another objective"
        )
    if contexts > 1 and (args.samples_per_context or 1) < settings.least_of_context:
        raise ValueError(
            f"{settings.comparing}, and samples_per_context={args.samples_per_context!r} draws one of each: set it to "
            f"{settings.least_of_context} or more"
        )
    if contexts > 1 and (args.samples_per_context or 1) < 2 and settings.built_in in TARGET_OBJECTIVES:
        warnings.warn(
            "with one sample per context (DMConfig.samples_per_context) a context's first visit estimates its Z "
            "from that sample alone, which makes the weight of the sample p/q = 1 whatever it is; draw more",
            stacklevel=3,
        )


def warn_of_generation_config(model: nn.Module) -> None:
    """Warn of the settings for sampling in a model's ``generation_config``, because they are ignored."""
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
    ranks: Ranks,
    policy: LanguageModel,
    target: EBM,
    args: DMConfig,
    data: str,
    *,
    reward: Feature | None = None,
    weights: bool = True,
) -> None:
    """Check that all ranks train the same model towards the same target on the same data.

    Args:
        ranks: the ranks, all of which call this together.
        policy, target, args: those of this rank.
        data: a digest of this rank's data set.
        reward: the reward of this rank.
        weights: whether to compare the model's weights. False if every rank gets them from rank 0 later.

    Raises:
        ValueError: the ranks differ. It is raised on every rank, and the message says what differs.
    """
    if ranks.size == 1:
        return
    mine = {f"DMConfig.{name}": value for name, value in _compared(args).items()}
    mine |= {"the data set": data, "the tokenizer": f"{len(policy.tokenizer)} {policy.eos_token_ids}"}
    mine["the target's constraints"] = f"{target.wanted} {list(target.scorers)} {target.monitor_names}"
    rewards = features_of(reward)
    mine["the rewards"] = f"{getattr(reward, 'name', None)} {list(rewards)}"
    if weights:
        mine |= {"the model's weights": _digest(policy.model), "the base's weights": _digest(target.base.model)}
    found = _differing(mine, ranks, args.device)
    if not found:  # so that all ranks have the same names to compare
        made_of = {**target.identity(), **rewards}
        of_features = {f"what {name} is made of": plain(_told(each, weights)) for name, each in made_of.items()}
        found = _differing(of_features, ranks, args.device) if of_features else []
    if "the target's constraints" not in found and target.moment_names:
        lambdas = ranks.gather(target.lambda_.to(args.device)[None])
        if bool(((lambdas - lambdas[0]).abs() > 1e-3 * lambdas[0].abs().clamp(min=1.0)).any()):
            found.append(f"the target's lambda ({'; '.join(str(each) for each in lambdas.tolist())})")
    if found:
        raise ValueError(
            f"the {ranks.size} processes do not train the same thing: they differ in {', '.join(found)}. Give all of "
            "them the same arguments and files, and set a seed before whatever is made at random"
        )


def _compared(args: DMConfig) -> dict[str, str]:
    """Return as text those arguments that must be equal on all ranks."""
    found = {each.name: str(getattr(args, each.name)) for each in fields(args) if each.name not in _OF_EACH_RANK}
    # the text of a function, for example, holds its address, which every process has of its own
    return {name: re.sub(r" at 0x[0-9a-f]+", "", value) for name, value in found.items()}


def _differing(mine: Mapping[str, str], ranks: Ranks, device: torch.device) -> list[str]:
    """Return the names of those values that differ among the ranks. All ranks must have the same names."""
    digests = ranks.gather(torch.tensor([[seed_for(0, each) for each in mine.values()]], device=device))
    differs = (digests != digests[0]).any(0).tolist()
    return [name for name, each in zip(mine, differs, strict=True) if each]


def _told(identity: Mapping[str, Any], weights: bool) -> dict[str, Any]:
    """Return what identifies a feature, without a model's weights if they are not to be compared."""
    parts = {name: _told(each, weights) if isinstance(each, Mapping) else each for name, each in identity.items()}
    return parts if weights else {name: each for name, each in parts.items() if name != "weights"}


def _digest(model: nn.Module) -> str:
    """Return a digest of a few values of each parameter."""
    # shards are left out, because the processes that share a tensor hold different parts of it
    there = [p.detach() for p in model.parameters() if not (p.is_meta or sharding.is_shard(p))]
    return str([float(parameter.flatten()[:8].double().sum()) for parameter in there])
