"""Run ``DMTrainer`` under DeepSpeed: refuse what was not tried, and sample and copy a policy that ZeRO-3 cuts.

ZeRO-1 and ZeRO-2 leave every parameter whole, so that everything runs as under DDP. ZeRO-3 leaves each process a part
of each parameter. A forward through the engine gathers the parameters layer by layer, and all processes have to make it
together. Sampling, scoring and q <- pi need more than such a forward: they run within ``gathered``, which makes all
parameters whole.

The proposal and the base are never cut. They are frozen, so that there is neither a gradient nor an optimiser's state
to share, and q has to be whole while it is sampled from.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from packaging.version import Version
from torch import Tensor, nn
from transformers import TrainingArguments

from .. import sharding
from ..models import LanguageModel
from ..proposal import OfflineProposal
from ..samples import Samples
from . import launcher

TRIED = {"torch": "2.13", "accelerate": "1.15", "transformers": "5.24", "deepspeed": "0.19.8"}
STAGES = (1, 2, 3)
_HOW = "start one process for each GPU by accelerate launch, torchrun or deepspeed"
#: The keys that a DeepSpeed config may hold. Any other key changes what is computed, or was not tried.
_TRIED_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "bf16", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "dump_state",
})  # fmt: skip
_TRIED_ZERO_KEYS = frozenset({
    "stage", "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_partitions",
    "allgather_bucket_size", "sub_group_size", "round_robin_gradients", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance",
    "stage3_gather_16bit_weights_on_model_save",
})  # fmt: skip
_OFF = (None, False, 0, "none")


# ---- arguments and configs that are refused


def asked(args: TrainingArguments) -> str | None:
    """Return the name of what asks for DeepSpeed, an argument or ``accelerate launch``, or None if nothing does."""
    return launcher.asked(args, "deepspeed", "ACCELERATE_USE_DEEPSPEED")


def refuse_absent(args: TrainingArguments) -> None:
    """Refuse DeepSpeed if it is not installed or FSDP is asked for too, before transformers looks for it.

    Raises:
        ImportError: DeepSpeed is asked for and not installed.
        ValueError: FSDP is asked for too.
    """
    by = asked(args)
    if by is None:
        return
    if args.fsdp:
        raise ValueError(f"{by} asks for DeepSpeed and fsdp={args.fsdp!r} for FSDP: leave one of them out")
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError(f"{by} asks for DeepSpeed, which is not installed: pip install 'dmfast[deepspeed]'")


def load_models_whole() -> None:
    """Let transformers load models whole.

    Once a config with ZeRO-3 exists, transformers would cut models as it loads them. But the base and the proposal stay
    whole, and the engine cuts the policy when training begins.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def refuse_arguments(args: TrainingArguments) -> None:
    """Refuse what does not go with DeepSpeed, before an accelerator is made.

    Raises:
        ValueError: DeepSpeed is asked for in one process, without an accelerator, after ``DMConfig`` was made, or
            together with an option that was not tried with it.
        ImportError: a library is missing, or older than the version that DeepSpeed was tried with.
    """
    by = asked(args)
    if by is None:
        return
    refuse_absent(args)
    if args.deepspeed_plugin is None:
        raise ValueError(
            f"{by} asks for DeepSpeed, and DMConfig was made before that, when the processes had been set up without "
            "it: give deepspeed=... to DMConfig(...)"
        )
    if args.world_size == 1:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise ValueError(
                f"{by} asks for DeepSpeed in {processes} processes, and accelerate found no accelerator, so that each "
                "of them would train alone: DeepSpeed needs a GPU for each process. On CPUs set use_cpu=True"
            )
        raise ValueError(f"{by} asks for DeepSpeed, and this is one process, which has nothing to share: {_HOW}")
    for library, floor in TRIED.items():
        found = version(library)
        if Version(found) < Version(floor):
            raise ImportError(
                f"DeepSpeed, which {by} asks for, was tried with {library} {floor}, and {found} is installed: update "
                "it, or use DDP"
            )
    refused = {
        "gradient_variance_steps": "it differentiates each sequence alone; measure it in one process",
        "proposal_device": "that was not tried",
        "torch_compile": "that was not tried",
        "fp16": "that was not tried; take bf16=True",
    }
    for name, why in refused.items():
        if getattr(args, name):
            raise ValueError(f"{name}={getattr(args, name)!r} does not run under DeepSpeed, which {by} asks for: {why}")
    if args.sampler != "model":
        raise ValueError(
            f"sampler={args.sampler!r} does not run under DeepSpeed, which {by} asks for: that was not tried"
        )
    if not args.gather_for_sampling:
        raise ValueError(
            "gather_for_sampling=False needs FSDP: under DeepSpeed q is whole on every process, and pi is made whole "
            "to be sampled from"
        )


def refuse_plugin(accelerator: Any, args: TrainingArguments) -> None:
    """Refuse a DeepSpeed config that was not tried, once accelerate says what it runs.

    Raises:
        ValueError: accelerate does not run DeepSpeed; the config asks for something that was not tried, such as offload
            or another stage; or it asks for another precision or clipping than the arguments.
    """
    by = asked(args)
    if by is None:
        return
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        raise ValueError(
            f"{by} asks for DeepSpeed, and accelerate runs {accelerator.distributed_type.value} on "
            f"{accelerator.device}: {_HOW}"
        )
    if accelerator.device.type == "cpu" and torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ValueError(
            f"{by} asks for DeepSpeed, which takes the GPUs of this machine, and use_cpu={args.use_cpu!r} lets "
            "everything else run on its CPUs: set DS_ACCELERATOR=cpu in the environment, or leave use_cpu out"
        )
    config: dict[str, Any] = plugin.deepspeed_config
    zero: dict[str, Any] = config.get("zero_optimization", {})
    stage = _stage(plugin)
    if stage not in STAGES:
        raise ValueError(
            f"zero_optimization.stage={stage!r} of the DeepSpeed config was not tried with DMTrainer: take "
            f"{', '.join(map(str, STAGES[:-1]))} or {STAGES[-1]}, or leave DeepSpeed out, which is DDP"
        )
    for name, value in zero.items():
        if name.startswith(("offload_", "cpu_offload")) and not _is_off(value):
            raise ValueError(
                f"zero_optimization.{name}={value!r} of the DeepSpeed config was not tried with DMTrainer: leave "
                "offload out"
            )
    for part, values, tried in (("", config, _TRIED_KEYS), ("zero_optimization.", zero, _TRIED_ZERO_KEYS)):
        for name, value in values.items():
            if name not in tried and not _is_off(value):
                raise ValueError(
                    f"{part}{name} of the DeepSpeed config was not tried with DMTrainer: leave it out{_instead(name)}"
                )
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            "save_model would write no model under ZeRO-3: set zero_optimization's "
            "stage3_gather_16bit_weights_on_model_save to true (accelerate launch: --zero3_save_16bit_model true)"
        )
    clipping = config.get("gradient_clipping")
    if clipping is None:
        raise ValueError(
            "the DeepSpeed config has no gradient_clipping (accelerate drops a 0), and DeepSpeed then clips by a norm "
            f"of its own, 1.0 in 0.19.8, whatever max_grad_norm={args.max_grad_norm!r} says: set "
            '"gradient_clipping": "auto" in it (accelerate launch: leave --gradient_clipping out)'
        )
    if float(clipping) != float(args.max_grad_norm or 0.0):
        raise ValueError(
            f"max_grad_norm={args.max_grad_norm!r} and the DeepSpeed config's gradient_clipping={clipping!r} differ, "
            'and DeepSpeed clips by the latter: set "gradient_clipping": "auto" in it'
        )
    half = bool(config.get("bf16", {}).get("enabled", False))
    if half != bool(args.bf16):
        raise ValueError(
            f"bf16={args.bf16!r} and the DeepSpeed config's bf16.enabled={half!r} differ: set "
            '"bf16": {"enabled": "auto"} in it'
        )


def _is_off(value: Any) -> bool:
    """Return whether a value of a DeepSpeed config switches its section off."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("device") == "none"
    return value in _OFF


def _instead(name: str) -> str:
    """Return the end of an error that says which argument takes the place of a section of a DeepSpeed config."""
    return {
        "optimizer": "; optim, learning_rate and weight_decay of DMConfig say the same",
        "scheduler": "; lr_scheduler_type and warmup_steps of DMConfig say the same",
        "fp16": "; take bf16=True of DMConfig",
    }.get(name, "")


def refuse_model(accelerator: Any, model: nn.Module, *, shared: bool) -> None:
    """Refuse a policy that was not tried under DeepSpeed.

    Args:
        accelerator: the accelerator of the run.
        model: the policy.
        shared: whether the base is a view of the policy.

    Raises:
        ValueError: the policy is quantised, was spread as it was loaded, or shares its parameters with the base under
            ZeRO-3.
    """
    if getattr(accelerator.state, "deepspeed_plugin", None) is None:
        return
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("quantised models were not tried under DeepSpeed; load the model in bfloat16 or float32")
    if any(sharding.is_shard(parameter) for parameter in model.parameters()):
        raise ValueError(
            "the model was spread over processes as it was loaded, which was not tried under DeepSpeed: load it "
            "without tp_plan and distributed_config"
        )
    if shared and stage_of(accelerator) == 3:
        raise ValueError(
            "LoRA on one backbone does not run under ZeRO-3, which cuts the backbone: take ZeRO-2, or give the EBM a "
            "base of its own, a copy of the model from before the adapter"
        )


# ---- checkpoints


def stage_of(accelerator: Any) -> int:
    """Return the stage of ZeRO that runs, or 0 if DeepSpeed does not run."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else _stage(plugin)


def _stage(plugin: Any) -> int:
    return int(plugin.deepspeed_config.get("zero_optimization", {}).get("stage", 0))


def mark(accelerator: Any) -> dict[str, int]:
    """Return what a checkpoint records of its optimiser: the stage of ZeRO and the number of processes.

    Both are 0 if DeepSpeed does not run.
    """
    stage = stage_of(accelerator)
    return {"zero_stage": stage, "zero_processes": int(accelerator.num_processes) if stage else 0}


def refuse_state(state: dict[str, Any], folder: Path, accelerator: Any) -> None:
    """Refuse a checkpoint whose optimiser is stored in another way than this run's.

    Raises:
        ValueError: one of the runs is under DeepSpeed and the other is not, or their stages or processes differ.
    """
    mine = mark(accelerator)
    theirs = {name: int(state.get(name, 0)) for name in mine}
    if theirs != mine:
        raise ValueError(
            f"the checkpoint {folder} is of a run {_described(theirs)}, and this run is {_described(mine)}: the "
            "optimiser is kept in another way. Go on as the run began, or train the saved model anew"
        )


def _described(marked: dict[str, int]) -> str:
    if not marked["zero_stage"]:
        return "without DeepSpeed"
    return f"under ZeRO-{marked['zero_stage']} of {marked['zero_processes']} processes"


# ---- ZeRO-3


_gathered: WeakSet[Any] = WeakSet()


@contextmanager
def gathered(engine: Any) -> Iterator[None]:
    """Make all parameters of ZeRO-3 whole on every process within the block.

    All processes enter the block together. Within it each may run forwards that the others do not run.

    Args:
        engine: DeepSpeed's engine, or None if no parameter is cut yet.
    """
    if engine is None or engine in _gathered:
        yield
        return
    import deepspeed

    offload = engine.optimizer.parameter_offload
    _gathered.add(engine)
    try:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
            # DeepSpeed's unwrap_model_for_generation leaves the hook that lets ranks compare their forwards, and waits
            # for ever where their numbers differ
            offload._remove_module_hooks()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload.setup_zero_stage3_hooks()
    finally:
        _gathered.discard(engine)


class PartitionedModel(LanguageModel):
    """The policy under ZeRO-3.

    It is whole until training begins. From then on it is gathered for everything but a training step.

    Attributes:
        engine: DeepSpeed's engine, once training has begun.
    """

    engine: Any = None
    _gathers_zero = True

    def cut_by(self, engine: Any) -> None:
        """Note the engine that has cut the parameters. The fused losses can't read them between two forwards."""
        self.engine = engine
        self._head.failure = "DeepSpeed's ZeRO-3 gives away the head's parameters after its forward"

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        if self.engine is not None and torch.is_grad_enabled():
            raise ValueError(
                f"{what} with a gradient does not run on a model that DeepSpeed's ZeRO-3 has cut; call it under "
                "torch.no_grad()"
            )
        with gathered(self.engine):
            yield

    @contextmanager
    def _ready_to_sample(self) -> Iterator[None]:
        with gathered(self.engine), super()._ready_to_sample():
            yield

    def log_prob(self, samples: Samples, *, batch_size: int | None = None) -> Tensor:
        """Return log pi(x) as ``LanguageModel.log_prob`` does, without a gradient. All processes call it."""
        with self._alone("log_prob"):
            return super().log_prob(samples, batch_size=batch_size)

    def logits(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Return logits and labels as ``LanguageModel.logits`` does, without a gradient. All processes call it."""
        with self._alone("logits"):
            return super().logits(samples)


class PartitionedProposal(OfflineProposal[LanguageModel]):
    """The proposal of a policy under ZeRO-3: a whole copy, into which a swap gathers the policy's parameters."""

    def swap(self) -> None:
        """Replace q by pi. All processes call it."""
        policy = self.policy
        with gathered(policy.engine if isinstance(policy, PartitionedModel) else None):
            super().swap()


def kinds(args: TrainingArguments) -> tuple[type[LanguageModel], type[OfflineProposal[LanguageModel]]]:
    """Return the classes of policy and proposal for these arguments."""
    if asked(args) is not None and _stage(args.deepspeed_plugin) == 3:
        return PartitionedModel, PartitionedProposal
    return LanguageModel, OfflineProposal


@torch.no_grad()
def begin(engine: Any, policy: LanguageModel, proposal: OfflineProposal[LanguageModel] | None) -> None:
    """Adapt policy and proposal to the engine that DeepSpeed has made when training began.

    ZeRO-3 has cut the policy's parameters, and bf16 has made them 16-bit. A proposal that is a copy gets the dtypes of
    the policy's parameters, so that q computes what pi does.
    """
    if isinstance(policy, PartitionedModel):
        policy.cut_by(engine)
    if proposal is not None and proposal.snapshot.model is not policy.model:
        dtypes = {name: parameter.dtype for name, parameter in policy.model.named_parameters()}
        for name, parameter in proposal.snapshot.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])
