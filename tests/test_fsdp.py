"""Test FSDP2 on two processes: gradients, sampling and q <- pi of shards, and what is refused. ``make fsdp`` trains."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
import transformers
from launch import launch
from packaging.version import Version
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel
from trainer_job import job, llama, tokenizer
from trainer_tools import one_thread, run  # noqa: F401

from dmfast import LanguageModel
from dmfast.training import engines, fsdp

HERE = Path(__file__).parent
LIBRARIES = (torch, accelerate, transformers)
FOR_FSDP = pytest.mark.skipif(
    any(Version(each.__version__) < Version(fsdp.TRIED[each.__name__]) for each in LIBRARIES),
    reason="FSDP is refused with these versions",
)

LAUNCHER = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}
DIFFERENT = {
    "seed": "they differ in DMConfig.seed. ",
    "lambda": "they differ in the target's lambda ([1.5]; [1.6]). ",
    "prompts": "they differ in the data set. ",
    "weights": "they differ in the model's weights, the base's weights. ",
}


def launched(out, variants, checks=(), processes=2, under_fsdp=True):
    """Return what the ranks of ``fsdp_job.py`` say, a dictionary each."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = {"out": str(out), "fsdp": under_fsdp, "variants": variants, "checks": list(checks)}
    done = launch(HERE / "fsdp_job.py", json.dumps(wanted), processes=processes, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return two ranks of one launch, which takes longer to start than all that it does."""
    checks = ["gradients", "sampling", "scoring", "agreement", "swaps", "engine", "loop", "refusals"]
    runs = {"gpt2": {"verdict": True}, "bare": {"bare": True, "refused": True},
            "FSDP1": {"launcher": LAUNCHER, "refused": True}}  # fmt: skip
    runs |= {f"differs in {what}": {"differs": what, "refused": True} for what in DIFFERENT}
    return launched(tmp_path_factory.mktemp("fsdp"), runs, checks)


@FOR_FSDP
def test_a_run_is_that_of_one_process(ranks, tmp_path):
    found = ranks[0]["gpt2"]
    trainer, gradients, _ = run(tmp_path, per_device_train_batch_size=16)
    assert found["swaps"] == trainer.proposal.swaps == 1
    assert 0.45 < found["held"] < 0.55
    assert found["said"] == []  # the head is fused, so there is no warning
    assert found["verdict"] == ranks[1]["gpt2"]["verdict"] == trainer.verdict()
    for name, gradient in gradients[0].items():
        right = gradient.flatten()
        torch.testing.assert_close(
            torch.tensor(found["gradients"][name]), right, rtol=0, atol=1e-5 * float(right.abs().max())
        )
    logged = [h for h in trainer.state.log_history if "kl_policy" in h]
    for here, there in zip(logged, found["log"], strict=True):
        assert there["kl_policy"] == pytest.approx(here["kl_policy"], abs=1e-4)
        assert there["z"] == pytest.approx(here["z"], rel=1e-5)


@FOR_FSDP
def test_gradients_are_those_of_whole_parameters_however_the_head_is_sharded(ranks):
    for found in ranks:
        assert len(found["gradients"]) == 15
        assert max(found["gradients"].values()) < 1e-5


@FOR_FSDP
def test_ranks_that_end_at_different_lengths_draw_what_a_whole_model_draws(ranks):
    assert ranks[0]["sampling"]["length"] != ranks[1]["sampling"]["length"]
    for found in ranks:
        assert len(found["sampling"]["equal"]) == 10
        assert all(found["sampling"]["equal"].values())


@FOR_FSDP
def test_ranks_may_score_different_numbers_of_batches(ranks):
    assert [found["scoring"]["none"] for found in ranks] == [8, 0]
    for found in ranks:
        assert found["scoring"]["few"]
        assert "equally many batches on all ranks" in found["scoring"]["told"]
        assert "they have from 3 to 8" in found["scoring"]["told"]


@FOR_FSDP
def test_what_one_rank_finds_holds_for_all(ranks):
    for rank, found in enumerate(ranks):
        agreement = found["agreement"]
        assert agreement["padded"] is False
        assert agreement["cached"] is False
        assert ("draws random numbers (a coin)" if rank else "the message of another rank") in agreement["random"]
        assert ("it is another" if rank else "on another rank the model's logits differ") in agreement["head"]


@FOR_FSDP
def test_a_swap_copies_shards_and_gathers_nothing(ranks):
    for found in ranks:
        assert found["swaps"] == {"collectives": 0, "of a gathering": 1, "equal": True, "loaded": True}


@FOR_FSDP
def test_an_engine_gets_the_shards_of_all_ranks_as_whole_parameters(ranks):
    for found in ranks:
        assert found["engine"]["refusal"].startswith("2 processes hold parts of the LlamaForCausalLM, and the")
        assert found["engine"]["error"] < 1e-4
        assert "was not tried with a model that is sharded by FSDP" in found["engine"]["adapter"]


def test_an_engine_and_an_adapter_are_refused_before_the_engine_is_asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    args = SimpleNamespace(sampler="http://127.0.0.1:9", sampler_options=None, fsdp=None)
    with pytest.raises(ValueError, match="an adapter merged into its base, which was not tried under FSDP"):
        engines.engine_of(args, LanguageModel(model, tokenizer()), [])


@FOR_FSDP
def test_a_loop_of_ones_own_ends_as_under_ddp(ranks):
    for found in ranks:
        assert found["loop"] == {"parameters": True, "log": True}


@FOR_FSDP
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("hybrid", "lie on a mesh of 2 dimensions; hybrid sharding (HSDP)"),
        ("copy", "make the OfflineProposal before fully_shard"),
        ("hidden", "FSDP has whole parameters within a forward only"),
        ("variance", "does not run on a policy that is sharded or cut among processes"),
        ("whole <- shards", "is sharded in the source, and in another way or not at all here"),
        ("unchecked", "gather_for_sampling=False leaves the model sharded"),
        ("another sampler", "is sharded in the source, and in another way or not at all here"),
        ("no ranks", "2 processes train the sharded LlamaForCausalLM together, and the matcher's ranks say 1"),
        ("unequal", "the 2 ranks draw different numbers in this step, by rank prompts: 1, 2. Z and the loss"),
    ],
)
def test_what_a_sharded_model_refuses(ranks, what, message):
    for found in ranks:
        assert message in found["refusals"][what]


def test_a_model_that_fsdp1_has_sharded_is_refused():
    """Its constructor needs an accelerator, so the wrapper here has not run it."""
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(wrapper)
    model = llama()
    model.add_module("wrapped", wrapper)
    with pytest.raises(ValueError, match=r"sharded by FSDP1 \(FullyShardedDataParallel\), and dmfast runs under FSDP2"):
        LanguageModel(model, tokenizer())


@FOR_FSDP
def test_a_launcher_that_does_not_shard_is_found(ranks):
    """accelerate silently runs DDP on a CPU where FSDP was asked for."""
    for found in ranks:
        assert found["bare"].startswith("ValueError: fsdp asks for FSDP, and accelerate runs MULTI_CPU on cpu")
        assert "where nothing is sharded" in found["bare"]


@FOR_FSDP
def test_a_launcher_that_asks_for_fsdp1_is_refused(ranks):
    for found in ranks:
        assert "DMTrainer runs under FSDP2 and not under FSDP1" in found["FSDP1"]


@FOR_FSDP
@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_train_something_else_are_refused(ranks, what):
    for found in ranks:
        assert "the 2 processes do not train the same thing: " + DIFFERENT[what] in found[f"differs in {what}"]


def test_one_process_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"^fsdp asks for FSDP, and this is one process"):
        job(tmp_path, fsdp=True)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^ACCELERATE_USE_FSDP, which accelerate launch sets, asks for FSDP"):
        job(tmp_path)


@FOR_FSDP
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gradient_variance_steps", 2, "gradient_variance_steps=2 does not run under FSDP, which fsdp asks for"),
        ("proposal_device", "cpu", "proposal_device='cpu' does not run under FSDP"),
        ("torch_compile", True, "torch_compile=True does not run under FSDP"),
        ("gather_for_sampling", False, "gather_for_sampling=False leaves the model sharded"),
    ],
)
def test_arguments_that_do_not_go_with_it(name, value, message):
    settings = {"fsdp": True, "world_size": 2, "gradient_variance_steps": 0, "proposal_device": None,
                "torch_compile": False, "gather_for_sampling": True, "check_scores": True}  # fmt: skip
    fsdp.refuse_arguments(SimpleNamespace(**settings))
    with pytest.raises(ValueError, match=message):
        fsdp.refuse_arguments(SimpleNamespace(**(settings | {name: value})))


def test_older_libraries_are_refused(monkeypatch):
    monkeypatch.setattr(accelerate, "__version__", "1.3.0")
    with pytest.raises(ImportError, match=r"was tried with (torch|transformers|accelerate 1.15, and 1.3.0)"):
        fsdp.refuse_arguments(SimpleNamespace(fsdp=True, world_size=2))


def accelerator(*, mixed_precision="no", is_fsdp2=True, **plugin):
    settings = {"fsdp_version": 2, "cpu_offload": None, "activation_checkpointing": False, "ignored_modules": None,
                "auto_wrap_policy": None}  # fmt: skip
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**(settings | plugin)))
    return SimpleNamespace(state=state, is_fsdp2=is_fsdp2, mixed_precision=mixed_precision)


def size_based_auto_wrap_policy():
    """Have the name of torch's function, because dmfast recognises it by its name."""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, "under FSDP2 and not under FSDP1: set fsdp_config={'version': 2}"),
        ({"cpu_offload": CPUOffloadPolicy()}, "cpu_offload of FSDP was not tried with DMTrainer; leave it out"),
        ({"activation_checkpointing": True}, "take gradient_checkpointing=True of DMConfig"),
        ({"ignored_modules": []}, "ignored_modules of FSDP was not tried"),
        ({"auto_wrap_policy": size_based_auto_wrap_policy}, "auto_wrap_policy=SIZE_BASED_WRAP of FSDP was not tried"),
        ({"mixed_precision": "fp16"}, "mixed precision in fp16 was not tried under FSDP; take bf16=True"),
    ],
)
def test_other_ways_to_shard_are_refused(settings, message):
    args = SimpleNamespace(fsdp=True)
    fsdp.refuse_plugin(accelerator(), args)
    with pytest.raises(ValueError, match=message):
        fsdp.refuse_plugin(accelerator(**settings), args)


def test_hybrid_sharding_is_refused(tmp_path):
    for options in ({"fsdp": "hybrid_shard"}, {"fsdp": True, "fsdp_config": {"reshard_after_forward": "hybrid_shard"}}):
        with pytest.raises(ValueError, match="hybrid sharding"):
            job(tmp_path, **options)


def test_quantised_models_are_refused():
    model = torch.nn.Linear(1, 1)
    model.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantised models were not tried under FSDP"):
        fsdp.shard(accelerator(), [model], [])
