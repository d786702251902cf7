"""Test what is refused of DeepSpeed, without DeepSpeed. ``make deepspeed`` installs it and trains."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from trainer_job import gpt2, job, llama, tokenizer

from dmfast import LanguageModel
from dmfast.training import deepspeed

CONFIG = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.0}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that DeepSpeed is installed, and everything in the version that it was tried with."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(deepspeed, "version", lambda name: deepspeed.TRIED[name])


def arguments(**settings):
    plugin = SimpleNamespace(deepspeed_config=CONFIG)
    usual = {"deepspeed": CONFIG, "deepspeed_plugin": plugin, "fsdp": False, "world_size": 2, "max_grad_norm": 0.0,
             "gradient_variance_steps": 0, "proposal_device": None, "torch_compile": False, "fp16": False,
             "bf16": False, "gather_for_sampling": True, "use_cpu": False, "sampler": "model"}  # fmt: skip
    return SimpleNamespace(**(usual | settings))


def accelerator(config=CONFIG, *, zero=None, device="cuda", **more):
    config = config | {"zero_optimization": config["zero_optimization"] | (zero or {})} | more
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return SimpleNamespace(state=state, device=torch.device(device), num_processes=2,
                           distributed_type=SimpleNamespace(value="DEEPSPEED"))  # fmt: skip


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="it is installed")
def test_a_missing_deepspeed_is_said(tmp_path, monkeypatch):
    with pytest.raises(ImportError, match=r"^deepspeed asks for DeepSpeed, which is not installed: pip install 'dmfas"):
        job(tmp_path, deepspeed=CONFIG)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ImportError, match=r"^ACCELERATE_USE_DEEPSPEED, which accelerate launch sets, asks for"):
        job(tmp_path)


def test_fsdp_beside_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"deepspeed asks for DeepSpeed and fsdp=.* for FSDP: leave one"):
        job(tmp_path, deepspeed=CONFIG, fsdp=True)


def test_one_process_is_refused(installed, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=r"^deepspeed asks for DeepSpeed, and this is one process"):
        deepspeed.refuse_arguments(arguments(world_size=1))


def test_processes_that_would_each_train_alone_are_refused(installed, monkeypatch):
    """Without an accelerator, accelerate lets each of several processes train alone. ``make deepspeed`` runs it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"in 2 processes, and accelerate found no accelerator.* set use_cpu=True$"):
        deepspeed.refuse_arguments(arguments(world_size=1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gradient_variance_steps", 2, "gradient_variance_steps=2 does not run under DeepSpeed, which deepspeed asks"),
        ("proposal_device", "cpu", "proposal_device='cpu' does not run under DeepSpeed"),
        ("torch_compile", True, "torch_compile=True does not run under DeepSpeed"),
        ("fp16", True, "fp16=True does not run under DeepSpeed.*take bf16=True"),
        ("gather_for_sampling", False, "gather_for_sampling=False needs FSDP"),
        ("sampler", "vllm", "sampler='vllm' does not run under DeepSpeed"),
        ("deepspeed_plugin", None, "DMConfig was made before that"),
    ],
)
def test_arguments_that_do_not_go_with_it(installed, name, value, message):
    deepspeed.refuse_arguments(arguments())
    with pytest.raises(ValueError, match=message):
        deepspeed.refuse_arguments(arguments(**{name: value}))


@pytest.mark.parametrize("library", deepspeed.TRIED)
def test_older_libraries_are_refused(installed, monkeypatch, library):
    monkeypatch.setattr(deepspeed, "version", lambda name: "0.1" if name == library else deepspeed.TRIED[name])
    with pytest.raises(ImportError, match=f"was tried with {library} .*, and 0.1 is installed"):
        deepspeed.refuse_arguments(arguments())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero": {"stage": 0}}, r"stage=0 of the DeepSpeed config was not tried with DMTrainer: take 1, 2 or 3"),
        ({"zero": {"offload_optimizer": {"device": "cpu"}}}, "zero_optimization.offload_optimizer=.*leave offload out"),
        ({"zero": {"offload_param": {"device": "nvme"}}}, "zero_optimization.offload_param=.*leave offload out"),
        ({"zero": {"cpu_offload": True}}, "zero_optimization.cpu_offload=True .*leave offload out"),
        ({"zero": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights of the De"),
        ({"zero": {"zero_hpz_partition_size": 2}}, "zero_optimization.zero_hpz_partition_size of the DeepSpeed config"),
        ({"zero": {"stage": 3}}, "save_model would write no model under ZeRO-3"),
        ({"pipeline": {"stages": 2}}, "^pipeline of the DeepSpeed config was not tried"),
        ({"tensor_parallel": {"autotp_size": 2}}, "^tensor_parallel of the DeepSpeed config was not tried"),
        ({"torch_autocast": {"enabled": True}}, "^torch_autocast of the DeepSpeed config was not tried"),
        ({"fp16": {"enabled": True}}, "^fp16 of the DeepSpeed config was not tried.* take bf16=True of DMConfig"),
        ({"optimizer": {"type": "AdamW"}}, "^optimizer of the DeepSpeed config.* optim, learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "^scheduler of the DeepSpeed config.* lr_scheduler_type"),
        ({"gradient_allreduce_op": "sum"}, "^gradient_allreduce_op of the DeepSpeed config was not tried"),
        ({"gradient_clipping": 1.0}, "max_grad_norm=0.0 and the DeepSpeed config's gradient_clipping=1.0 differ"),
        ({"bf16": {"enabled": True}}, "bf16=False and the DeepSpeed config's bf16.enabled=True differ"),
    ],
)
def test_other_configs_are_refused(settings, message):
    deepspeed.refuse_plugin(accelerator(), arguments())
    with pytest.raises(ValueError, match=message):
        deepspeed.refuse_plugin(accelerator(**settings), arguments())


def test_what_is_switched_off_in_a_config_does_not_matter():
    off = {"offload_optimizer": {"device": "none", "nvme_path": None}, "zero_quantized_weights": False}
    deepspeed.refuse_plugin(accelerator(zero=off, fp16={"enabled": False}, torch_autocast=None), arguments())


@pytest.mark.parametrize("wanted", [0.0, 0.1, 1.0])
def test_clipping_that_the_config_leaves_out_is_refused(wanted):
    """DeepSpeed 0.19.8 clips by 1.0 if its config names no norm."""
    left_out = {name: value for name, value in CONFIG.items() if name != "gradient_clipping"}
    with pytest.raises(ValueError, match=rf'no gradient_clipping .*max_grad_norm={wanted} says: set .*"auto"'):
        deepspeed.refuse_plugin(accelerator(left_out), arguments(max_grad_norm=wanted))


def test_a_launcher_that_does_not_run_it_is_found():
    other = accelerator(device="cpu")
    other.state.deepspeed_plugin, other.distributed_type.value = None, "MULTI_CPU"
    with pytest.raises(ValueError, match="asks for DeepSpeed, and accelerate runs MULTI_CPU on cpu"):
        deepspeed.refuse_plugin(other, arguments())


def test_cpus_beside_gpus_are_refused(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    deepspeed.refuse_plugin(accelerator(device="cpu"), arguments(use_cpu=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"which takes the GPUs of this machine, and use_cpu=True.*DS_ACCELERATOR=cpu"):
        deepspeed.refuse_plugin(accelerator(device="cpu"), arguments(use_cpu=True))


def test_models_that_were_not_tried_are_refused():
    model, three = torch.nn.Linear(1, 1), accelerator(zero={"stage": 3})
    deepspeed.refuse_model(three, model, shared=False)
    deepspeed.refuse_model(accelerator(), model, shared=True)
    with pytest.raises(ValueError, match="LoRA on one backbone does not run under ZeRO-3"):
        deepspeed.refuse_model(three, model, shared=True)
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised models were not tried under DeepSpeed"):
        deepspeed.refuse_model(accelerator(), model, shared=False)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    mine = accelerator()
    deepspeed.refuse_state(deepspeed.mark(mine), tmp_path, mine)
    three, more = accelerator(zero={"stage": 3}), accelerator()
    more.num_processes = 3
    for other, message in (
        (deepspeed.mark(three), "of a run under ZeRO-3 of 2 processes, and this run is under ZeRO-2 of 2 processes"),
        (deepspeed.mark(more), "of a run under ZeRO-2 of 3 processes, and this run is under ZeRO-2 of 2 processes"),
        ({}, "of a run without DeepSpeed, and this run is under ZeRO-2 of 2 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            deepspeed.refuse_state(other, tmp_path, mine)


def test_parameters_that_zero_3_has_cut_are_refused():
    model = llama()
    model.lm_head.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"has cut the parameters of the LlamaForCausalLM.*load the model before"):
        LanguageModel(model, tokenizer())
    lm = LanguageModel(gpt2(), tokenizer())
    lm.model.lm_head.weight.ds_id = 0
    x = LanguageModel(gpt2(), tokenizer()).sample(n=2, max_new_tokens=3, seed=0)
    for use in (lambda: lm.sample(n=2, max_new_tokens=3), lambda: lm.log_prob(x)):
        with pytest.raises(ValueError, match=r"outside of DMTrainer: .*ZeRO-2, or make it a dmfast.*PartitionedModel"):
            use()
