"""Test models that transformers spreads over processes as it loads them, on gloo (``spread_job.py``).

``make spread`` tests more: four processes, and checkpoints.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launch import launch
from test_fsdp import FOR_FSDP
from torch import nn
from trainer_job import llama
from trainer_tools import one_thread, run  # noqa: F401

from dmfast import OfflineProposal
from dmfast.training import distributed_config
from dmfast.training.ranks import AccelerateRanks

HERE = Path(__file__).parent
# the criterion "interval" lets rounding decide no swap
STEPS = {"max_steps": 4, "warmup_steps": 0, "proposal_criterion": "interval"}


def launched(out, processes, ways, everything=False):
    """Return what the ranks of ``spread_job.py`` say, a dictionary each."""
    out.mkdir(parents=True, exist_ok=True)
    wanted = {"out": str(out), "ways": ways, "all": everything}
    done = launch(HERE / "spread_job.py", json.dumps(wanted), processes=processes, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(processes)]


def check_heads(found):
    """Values and gradients are those of the whole model, whatever the head is."""
    for name, head in found["heads"].items():
        assert head["drawn"] and head["log q"] < 1e-5, (name, head)
        assert len(head["errors"]) >= 3 and max(head["errors"].values()) < 2e-5, (name, head)
        why = "the head has hooks, which may change what it computes" if name == "hooked" else None
        assert (head["verified"], head["why not"]) == (name != "hooked", why), (name, head)


def check_alike(found, columns):
    """Assert that the ranks of one model draw and score the same bits."""
    for name, each in found["alike"].items():
        assert each["drawn"] and each["scored"] and each["error"] < 1e-4, (name, each)
        assert each["columns"] == columns, (name, each)


def check_proposal(found, kind):
    """q moves at a swap only, and then to pi."""
    for name in [name for name in found if name in ("own", "tied")]:
        each = found[name]
        assert each["moved"] > 0.01, (name, each)
        assert each["stays"] and each["swapped"] and each["back"] and each["loaded"], (name, each)
    assert found["device"].startswith("ValueError: device='cpu': transformers has spread the model over processes")
    if kind == "FSDP":
        assert "hold parts of the LlamaForCausalLM, and the sampler's ranks say 1" in found["engine"]["refusal"]
        assert found["engine"]["error"] < 1e-4
    else:
        assert "cut by tensor parallelism, whose processes need the same sequences" in found["engine"]
    assert found["whole <- parts"].startswith("RuntimeError: the parameters do not fit: model.embed_tokens.weight is ")
    if kind == "FSDP":
        assert "it has modules, hooks or parameters that its config does not make" in found["hooked"]
    else:
        assert found["hooked"] is None


def check_loop(found, ranks=1, parts=1):
    """Assert that a loop of one's own ends as in one process, and that it needs its ranks where there are several."""
    here, there = found["logs"]
    assert found["error"] < 1e-4 and found["moved"] > 1e-3, found
    for one, other in zip(here, there, strict=True):
        assert one["swapped"] == other["swapped"]
        assert one["z"] == pytest.approx(other["z"], rel=1e-4)
        assert one["kl_policy"] == pytest.approx(other["kl_policy"], abs=1e-3)
    if ranks == 1:
        assert found["alone"] is None
    else:
        cut = f", {parts}" if parts > 1 else ""
        assert f"{ranks} processes train the sharded LlamaForCausalLM together" in found["alone"], found["alone"]
        assert f"AccelerateRanks(accelerator{cut})" in found["alone"], found["alone"]


REFUSED = {
    "gradient_variance_steps": "gradient_variance_steps=1 does not run with a model that was loaded with a distributed",
    "proposal_device": "proposal_device='cpu' does not run with a model that was loaded with a distributed_config",
    "torch_compile": "torch_compile=True does not run with a model that was loaded with a distributed_config",
    "fp16": "fp16=True has no effect on a CPU",
    "fsdp": "fsdp=True does not run with a model that was loaded with a distributed_config: it is sharded already",
    "base alone": "the target's base was loaded with a distributed_config, and the policy was not",
    "base otherwise": "the target's base was loaded with DistributedConfig(dp_replicate_size=1, fsdp_size=4",
    "pp_size": "DistributedConfig(pp_size=2), and dmfast does not run under pipeline parallelism",
    "ep_size": "DistributedConfig(ep_size=2), and dmfast does not run under expert parallelism",
    "enable_sequence_parallel": "dmfast does not run under sequence parallelism",
    "fsdp_cpu_offload": "fsdp_cpu_offload of DistributedConfig was not tried",
    "fsdp_mixed_precision": "fsdp_mixed_precision of DistributedConfig was not tried",
    "hf_quantizer": "quantised models were not tried with a distributed_config",
    "peft_config": "adapters (PEFT) were not tried on a model that was loaded with a distributed_config",
}


#: What else is refused where tensor parallelism cuts the models.
REFUSED_CUT = {
    "dp_replicate_size": "tensor parallelism together with copies of a sharded model",
    "sampler": "sampler='http://127.0.0.1:9' does not run with a model that was loaded with a distributed_config",
}


def refused_sharded(shares):
    """Return what else is refused where the models are sharded, and a head is shared among so many processes."""
    return {
        "in step": "gather_for_sampling=False leaves the model sharded, and check_scores=True compares",
        "tied unevenly": f"is its embedding, and the 11 rows do not divide among {shares} processes",
    }


def check_refusals(found, more):
    """Each error names what is refused."""
    for name, message in (REFUSED | more).items():
        assert found[name] and found[name].startswith("ValueError: ") and message in found[name], (name, found[name])


def check_run(found, trainer, gradients):
    """Assert that a run is that of one process, up to rounding."""
    assert found["written"] and found["said"] == []
    swaps = trainer.proposal.swaps if trainer.proposal else None
    assert (found["steps"], found["swaps"]) == (trainer.state.global_step, swaps)
    assert found["gradients"].keys() == gradients[0].keys()
    for name, right in gradients[0].items():
        here = torch.tensor(found["gradients"][name])
        torch.testing.assert_close(here, right.flatten(), rtol=0, atol=1e-4 * float(right.abs().max()), msg=name)
    for name, right in trainer.model.named_parameters():
        here = torch.tensor(found["parameters"][name])
        torch.testing.assert_close(here, right.detach().flatten(), rtol=0, atol=1e-3, msg=name)
    logged = [h for h in trainer.state.log_history if "kl_policy" in h]
    for here, there in zip(found["log"], logged, strict=True):
        assert here["kl_policy"] == pytest.approx(there["kl_policy"], abs=1e-3, nan_ok=True)
        assert here["z"] == pytest.approx(there["z"], rel=1e-4)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what the two ranks of one launch say, by how models are spread."""
    cut = {"checks": ["heads", "alike", "proposal", "loop", "refusals"], "runs": {"run": STEPS}}
    cut["runs"]["differs"] = {"differs": True, "refused": True}
    sharded = {"checks": ["loop", "refusals"], "runs": {"run": STEPS}}
    ways = {"cut": {"sizes": {"tp_size": 2}} | cut, "sharded": {"sizes": {"fsdp_size": 2}} | sharded}
    return launched(tmp_path_factory.mktemp("spread"), 2, ways)


@FOR_FSDP
def test_a_model_that_is_cut_is_the_whole_one(ranks):
    for columns, found in zip((6, 5), ranks, strict=True):  # the ranks share 11 tokens
        check_heads(found["cut"])
        check_alike(found["cut"], columns)


@FOR_FSDP
def test_the_proposal_of_a_model_that_is_cut_moves_at_a_swap_only(ranks):
    for found in ranks:
        check_proposal(found["cut"]["proposal"], "tensor parallelism")


@FOR_FSDP
def test_what_is_refused_of_models_that_are_spread(ranks):
    for found in ranks:
        check_refusals(found["cut"]["refusals"], REFUSED_CUT)
        check_refusals(found["sharded"]["refusals"], refused_sharded(2))
        assert "they differ in DMConfig.seed. " in found["cut"]["differs"]


@FOR_FSDP
def test_a_loop_of_ones_own_is_that_of_one_process(ranks):
    for found in ranks:
        check_loop(found["cut"]["loop"])
        check_loop(found["sharded"]["loop"], ranks=2)


@FOR_FSDP
@pytest.mark.parametrize(("way", "batch"), [("cut", 8), ("sharded", 16)])
def test_a_run_is_that_of_one_process(ranks, tmp_path, way, batch):
    trainer, gradients, _ = run(tmp_path, model=llama(), **STEPS, per_device_train_batch_size=batch)
    assert trainer.proposal.swaps == 2
    for found in ranks:
        check_run(found[way]["run"], trainer, gradients)
    assert ranks[0][way]["run"]["parameters"] == ranks[1][way]["run"]["parameters"]


# --- without processes

SIZES = {"cut": (1, 1, 2), "sharded": (1, 2, 1), "both": (1, 2, 2), "copies of shards": (2, 2, 1)}
ARGUMENTS = {
    "sampler": "http://127.0.0.1:9", "gradient_variance_steps": 1, "proposal_device": "cpu", "torch_compile": True,
    "fsdp": True, "fp16": True,
}  # fmt: skip
NO_ARGUMENTS = dict.fromkeys(ARGUMENTS) | {"sampler": "model", "gather_for_sampling": True, "check_scores": True}


def of_sizes(way):
    """Return a model that says it was spread in this way."""
    model, (copies, shards, cuts) = nn.Linear(2, 1), SIZES[way]
    sizes = SimpleNamespace(dp_replicate_size=copies, fsdp_size=shards, tp_size=cuts)
    model.is_distributed_loading_by_transformers, model.config = True, SimpleNamespace(distributed_config=sizes)
    return model


@FOR_FSDP
@pytest.mark.parametrize("way", SIZES)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_that_do_not_go_with_a_model_that_is_spread(way, name):
    """On a CPU transformers refuses fp16 by itself, so a run on processes can't show this."""
    model = of_sizes(way)
    distributed_config.refuse_model(model, model, SimpleNamespace(**NO_ARGUMENTS), None)
    with (
        nullcontext()
        if (name, SIZES[way][2]) == ("sampler", 1)
        else pytest.raises(
            ValueError,
            match=f"{name}={ARGUMENTS[name]!r} does not run with a model that was loaded with a distributed_con",
        )
    ):
        arguments = SimpleNamespace(**(NO_ARGUMENTS | {name: ARGUMENTS[name]}))
        distributed_config.refuse_model(model, model, arguments, None)


@FOR_FSDP
def test_a_launcher_that_would_shard_a_model_that_is_spread_is_refused(monkeypatch):
    model = of_sizes("cut")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"^ACCELERATE_USE_FSDP, which accelerate launch sets, does not run with a"):
        distributed_config.refuse_model(model, model, SimpleNamespace(**NO_ARGUMENTS), None)


def test_a_checkpoint_of_a_model_that_was_spread_otherwise_is_refused(tmp_path):
    """The optimiser's parts of another number of processes, or of another way, do not fit."""
    model = of_sizes("sharded")
    optimizer = torch.optim.AdamW(model.parameters())
    distributed_config.save_parts(tmp_path, 0, model, optimizer, None)
    assert distributed_config.load_parts(tmp_path, 0, model)["sizes"] == [1, 2, 1]
    of_sizes_2 = r"spread in another way \(dp_replicate_size, fsdp_size, tp_size of \[1, 2, 1\]\) than this one, "
    for way, named in (("cut", "fsdp_size=1, tp_size=2"), ("both", "fsdp_size=2, tp_size=2")):
        with pytest.raises(ValueError, match=of_sizes_2 + rf"DistributedConfig\(dp_replicate_size=1, {named}\)"):
            distributed_config.load_parts(tmp_path, 0, of_sizes(way))
    with pytest.raises(ValueError, match=r"spread in another way \(fewer processes\) than this one"):
        distributed_config.load_parts(tmp_path, 3, of_sizes("both"))


def test_a_copy_computes_with_itself_where_a_forward_was_put_on_an_instance():
    """deepcopy copies a function with its reference to the old module. Tensor parallelism sets such forwards."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    linear, count = model[0], 0
    original = linear.forward

    def forward(x):
        return original(x) + linear.bias

    def outer(x, *, again=True):
        nonlocal count
        count += 1
        return forward(x) if again else outer(x)

    linear.forward = outer
    q = OfflineProposal(model).snapshot
    x = torch.randn(3, 2)
    before = model(x)
    with torch.no_grad():
        linear.weight.mul_(2)
        linear.bias.add_(1)
    assert not torch.equal(model(x), before)
    assert torch.equal(q(x), before)
    assert q[0].forward.__name__ == "outer" and q[0].forward.__kwdefaults__ == {"again": True}


class Gathering:
    """Stand in for the accelerator of the third of 4 processes."""

    process_index, num_processes, device = 2, 4, torch.device("cpu")

    def gather(self, values):
        return torch.cat([values + 10 * k for k in range(4)])

    def reduce(self, values, how):
        return 4 * values


def test_processes_that_hold_one_model_are_one_rank():
    ranks = AccelerateRanks(Gathering(), 2)
    alone = AccelerateRanks(SimpleNamespace(process_index=1, num_processes=2), 2)
    assert (ranks.rank, ranks.size) == (1, 2)
    assert ranks.gather(torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 2], [3, 4], [21, 22], [23, 24]]
    assert ranks.gather_texts(["a"]) == ["a"] and alone.gather_texts(["a", "b"]) == ["a", "b"]
    assert ranks.sum(torch.tensor([3.0])).tolist() == [6.0]
    assert (ranks.processes.rank, ranks.processes.size) == (2, 4)
    assert ranks.processes.gather(torch.tensor([0])).tolist() == [0, 10, 20, 30]
    assert ranks.agree(False) is False
    assert (alone.rank, alone.size) == (0, 1)
    assert alone.gather(torch.tensor([5])).tolist() == [5]
