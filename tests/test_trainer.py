"""DMTrainer: its gradients against the oracle however a step is cut, checkpoints that resume to the bit and are whole
or not there, and what transformers' Trainer gives that could break.
"""

from __future__ import annotations

import concurrent.futures
import copy
import fnmatch
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import peft
import pytest
import safetensors.torch
import torch
from accelerate import ParallelismConfig
from trainer_job import PROMPTS, WORDS, AtOnce, Gradients, Kill, StopAt, digest, gpt2, job, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

import dmfast
from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.estimators import PartitionFunctions
from dmfast.targets import fit_lambda
from dmfast.training import checkpoint
from dmfast.training.callbacks import log_line
from dmfast.training.data import Contexts, StepSampler

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_process(out, processes=1, **wanted):
    """A job in a fresh process, or in several under torchrun; what it says of itself."""
    out.mkdir(parents=True, exist_ok=True)
    run = [sys.executable]
    if processes > 1:
        run += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    run += [str(HERE / "trainer_job.py"), json.dumps({"out": str(out), **wanted})]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "result.json").read_text())


class Keep(TrainerCallback):
    """The steps as the trainer drew and scored them, and the policy that each was taken with."""

    def __init__(self):
        self.steps, self.models, self.snapshots = [], [], []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.steps.append(self.trainer._step)
        self.models.append(copy.deepcopy(model))
        if self.trainer.proposal:
            self.snapshots.append(copy.deepcopy(self.trainer.proposal.snapshot.model))


def run(out, **wanted):
    """A finished job with its gradients and steps."""
    gradients, keep = Gradients(), Keep()
    trainer = job(out, callbacks=[gradients, keep, *wanted.pop("callbacks", [])], **wanted)
    keep.trainer = trainer
    trainer.train()
    return trainer, gradients.steps, keep


def oracle(model, step, inputs=None, **options):
    """The gradient of a whole step in fp64 and plain torch, and the output of its loss."""
    if inputs is None:
        inputs = {name: value for name, value in step.inputs.items() if name != "baseline"}
    policy = LanguageModel(copy.deepcopy(model).double(), step.samples.tokenizer)
    logits, labels = policy.logits(step.samples)
    out = dmfast.eager.dm_loss(logits, labels, objective=step.objective, context_id=step.samples.context_id,
                               temperature=step.samples.temperature, **inputs, **options)  # fmt: skip
    out.loss.backward()
    return {n: p.grad for n, p in policy.model.named_parameters()}, out


def inputs_by_hand(trainer, step, objective):
    """What the objective needs, from base and features, and the baseline of the whole step."""
    x = step.samples
    log_base = trainer.target.base.log_prob(x)
    inputs = {
        "log_proposal": x.log_prob,
        "log_target": log_base + 1.5 * Contains("w3")(x),
        "log_z": step.inputs["log_z"],
    }
    if objective == "kl_control":
        inputs["log_base"] = log_base
    if objective in ("kl_control", "reinforce"):
        inputs["reward"] = Contains("w3")(x)
    return inputs


def assert_close(found, wanted, tolerance=2e-5):
    assert found.keys() == wanted.keys()
    scale = max(0.1, *(float(g.abs().max()) for g in wanted.values()))  # gdc++ starts with weights of nearly 0
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.double(), wanted[name].double(), rtol=0, atol=tolerance * scale, msg=name)


# --- the step


CASES = {
    "gdc++": {},
    "dpg": {"objective": "dpg"},
    "dpg, leave one out": {"objective": "dpg", "baseline": "leave_one_out"},
    "temperature": {"temperature": 0.7},
    "max_weight": {"objective": "chi2", "max_weight": 0.5},
    "the paper's scale": {"normalize": False},
    "on-policy": {"on_policy": True},
    "reinforce": {"objective": "reinforce", "reward": Contains("w3"), "on_policy": True},
    "reinforce_p": {"objective": "reinforce_p"},
    "kl_control": {"objective": "kl_control", "beta": 0.3, "reward": Contains("w3")},
    "prompts": {"prompts": PROMPTS, "samples_per_context": 4},
    "prompts, baseline within each": {
        "prompts": PROMPTS, "samples_per_context": 4, "objective": "dpg", "baseline": "leave_one_out_context",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_oracle_s(tmp_path, case):
    """On the last of several steps, when pi, q and a differ."""
    trainer, gradients, keep = run(tmp_path, max_steps=3, **CASES[case])
    options = {"max_weight": trainer.args.max_weight, "on_policy": trainer.args.on_policy}
    for model, step, found in zip(keep.models, keep.steps, gradients, strict=True):
        inputs = inputs_by_hand(trainer, step, trainer.args.objective)
        assert_close(found, oracle(model, step, inputs, **options)[0], 2e-4)


@pytest.mark.parametrize("case", ["gdc++", "dpg, leave one out", "prompts", "prompts, baseline within each"])
@pytest.mark.parametrize(("per_device", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tmp_path, case, per_device, accumulation):
    whole = run(tmp_path / "whole", max_steps=2, **CASES[case])[1]
    cut = run(tmp_path / "cut", max_steps=2, per_device_train_batch_size=per_device,
              gradient_accumulation_steps=accumulation, **CASES[case])[1]  # fmt: skip
    assert_close(cut[0], whole[0])
    assert_close(cut[1], whole[1], 1e-3)


class Forwards:
    """The shapes of the policy's forwards."""

    def __init__(self, model):
        self.shapes = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module, args, kwargs):
        if module.training:
            self.shapes.append(tuple(kwargs["input_ids"].shape))


def test_microbatches_hold_sequences_of_about_one_length_without_common_padding(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    _, _, keep = run(tmp_path, model=model, max_steps=2, per_device_train_batch_size=2,
                           gradient_accumulation_steps=4, max_new_tokens=12)  # fmt: skip
    widths = [shape[1] for shape in forwards.shapes]
    for step, of_step in zip(keep.steps, (widths[:4], widths[4:]), strict=True):
        lengths = step.samples.attention_mask.sum(1).tolist()
        assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
        assert of_step == [max(lengths[i : i + 2]) for i in range(0, 8, 2)]


SKIP = {"constraints": [Contains("w4")], "objective": "dpg", "max_new_tokens": 3, "proposal_interval": 100}


@pytest.mark.parametrize(("per_device", "accumulation"), [(8, 1), (2, 4)])
def test_sequences_of_known_weight_0_get_no_forward(tmp_path, per_device, accumulation):
    """And nothing else changes: gradients, KL(p||pi), swaps."""
    cut = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    _, wanted, keep = run(tmp_path / "all", max_steps=2, **SKIP, **cut)
    model = gpt2()
    forwards = Forwards(model)
    trainer, found, _ = run(tmp_path / "some", model=model, max_steps=2, skip_zero_weight=True, **SKIP, **cut)
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine, other)
    positive = [int((step.inputs["log_target"] > -math.inf).sum()) for step in keep.steps]
    assert 0 < sum(positive) < 16
    assert sum(shape[0] for shape in forwards.shapes) < 16
    if accumulation == 1:
        assert [shape[0] for shape in forwards.shapes] == positive
    for mine, other in zip(trainer.state.log_history, keep.trainer.state.log_history, strict=True):
        for key in ("kl_policy", "tvd_policy", "ess", "log_z", "weight_mean"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
        if "js_policy" in other:
            assert math.isnan(mine["js_policy"]) and not math.isnan(other["js_policy"])


def test_what_a_device_has_recorded_is_raised_before_the_step_counts(tmp_path, monkeypatch):
    """Of any microbatch, also where sequences of known weight 0 are left out."""
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = job(tmp_path, max_steps=2, skip_zero_weight=True, **SKIP, **cut)
    outputs, loss = [], LanguageModel.loss

    def recorded():
        raise ValueError("NaN at (sequence 1, position 2)")

    def recording(self, *args, **kwargs):
        outputs.append(replace(loss(self, *args, **kwargs), _recorded=(recorded,) if len(outputs) == 6 else ()))
        return outputs[-1]

    monkeypatch.setattr(LanguageModel, "loss", recording)
    with pytest.raises(ValueError, match=r"NaN at \(sequence 1, position 2\)"):
        trainer.train()
    assert len(outputs) == 8 and trainer._running.steps == 1 and len(trainer._estimates) == 1


def test_a_step_of_known_weight_0_is_one_sequence_s_forward_and_no_gradient(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    with pytest.warns(UserWarning, match=r"P\(x\) = 0 for all"):
        _, found, _ = run(tmp_path, model=model, max_steps=2, skip_zero_weight=True, objective="dpg", patience_zero=2,
                          constraints=[Scorer(lambda x: torch.zeros(len(x)), name="never")])  # fmt: skip
    assert [shape[0] for shape in forwards.shapes] == [1, 1]
    assert all(not bool(gradient.any()) for step in found for gradient in step.values())


def test_on_policy_a_return_of_0_is_skipped_and_its_log_pi_is_the_sampler_s(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    settings = {"objective": "reinforce", "reward": Contains("w4"), "on_policy": True, "max_steps": 2}
    _, wanted, keep = run(tmp_path / "all", **settings)
    trainer, found, _ = run(tmp_path / "some", model=model, skip_zero_weight=True, **settings)
    assert (
        sum(shape[0] for shape in forwards.shapes) == sum(int((s.inputs["reward"] != 0).sum()) for s in keep.steps) < 16
    )
    for mine, other in zip(found, wanted, strict=True):
        assert_close(mine, other)
    for mine, other in zip(trainer.state.log_history, keep.trainer.state.log_history, strict=True):
        for key in {"kl_policy", "tvd_policy", "js_policy"} & other.keys():
            assert mine[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


def test_skipping_leaves_weights_alone_that_depend_on_the_policy(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    run(tmp_path, model=model, max_steps=2, skip_zero_weight=True, **(SKIP | {"objective": "gdc++"}))
    assert [shape[0] for shape in forwards.shapes] == [8, 8]


def test_skipping_and_the_criterion_js_are_refused(tmp_path):
    with pytest.raises(ValueError, match="use kl or tvd"):
        job(tmp_path, skip_zero_weight=True, proposal_criterion="js")


def test_a_ragged_last_step(tmp_path):
    """7 prompts, 4 in a step in microbatches of 2: the last step has 3 prompts, in microbatches of 2 and 1."""
    settings = {"prompts": PROMPTS, "max_steps": -1, "num_train_epochs": 1}
    ragged, gradients, keep = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    assert [len(step.samples) for step in keep.steps] == [4, 3]
    assert ragged.state.global_step == 2
    for model, step, found in zip(keep.models, keep.steps, gradients, strict=True):
        assert_close(found, oracle(model, step)[0])
    rows = torch.cat([step.context for step in keep.steps]).tolist()
    assert sorted(rows) == list(range(7))


def test_two_processes_give_one_process_s_gradients_and_swaps(tmp_path):
    # not Adam, which makes steps of full size out of rounding where a gradient is nearly 0
    common = {"max_steps": 6, "proposal_interval": 2, "optim": "sgd", "learning_rate": 1e-2, "warmup_steps": 0}
    common |= {"gradient_variance_steps": 1, "eval_strategy": "steps", "eval_steps": 6, "eval_diversity": 32}
    one = in_process(tmp_path / "one", per_device_train_batch_size=32, **common)
    two = in_process(tmp_path / "two", processes=2, per_device_train_batch_size=16, **common)
    assert_close(*({n: torch.tensor(g) for n, g in r["gradients"].items()} for r in (two, one)))
    assert [h["swapped"] for h in two["log"]] == [h["swapped"] for h in one["log"]]
    assert 0 < two["swaps"] == one["swaps"]
    for key in ("phi/w3", "log_z", "kl_policy", "ess", "length", "gradient_variance", "gradient_norm"):
        assert [h[key] for h in two["log"]] == pytest.approx([h[key] for h in one["log"]], rel=1e-3, abs=1e-4), key
    for key in ("eval_distinct_1", "eval_distinct_2", "eval_self_bleu_5"):
        assert [h[key] for h in two["evaluations"]] == [h[key] for h in one["evaluations"]]


def test_log_z_is_that_of_all_samples_so_far(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=3)
    log_w = [step.inputs["log_target"] - step.samples.log_prob for step in keep.steps]
    for i, step in enumerate(keep.steps):
        seen = torch.cat(log_w[: i + 1])
        assert step.inputs["log_z"].tolist() == pytest.approx([float(seen.logsumexp(0)) - math.log(len(seen))] * 8)
    logged = [h["log_z"] for h in trainer.state.log_history if "log_z" in h]
    assert logged == pytest.approx([float(step.inputs["log_z"][0]) for step in keep.steps])


@pytest.mark.parametrize("partition", ["running", "step"])
def test_each_context_has_its_own_z(tmp_path, partition):
    _, _, keep = run(
        tmp_path, max_steps=7, prompts=PROMPTS, samples_per_context=2, per_device_train_batch_size=4,
        partition=partition,
    )  # fmt: skip
    seen = {}
    for step in keep.steps:
        log_w = step.inputs["log_target"] - step.samples.log_prob
        seen = {} if partition == "step" else seen
        for row in set(step.context.tolist()):
            seen.setdefault(row, []).append(log_w[step.context == row])
        wanted = [torch.cat(seen[row]) for row in step.context.tolist()]
        wanted = [float(w.logsumexp(0)) - math.log(len(w)) for w in wanted]
        assert step.inputs["log_z"].tolist() == pytest.approx(wanted)


def test_the_target_is_scored_as_the_base_scores(tmp_path):
    """Before the first swap log a = log q is taken from the sampler; afterwards the base is asked."""
    trainer, _, keep = run(tmp_path, max_steps=4, proposal_criterion="interval")
    assert trainer.proposal.swaps == 2
    for step in keep.steps:
        wanted = trainer.target.base.log_prob(step.samples) + 1.5 * Contains("w3")(step.samples)
        torch.testing.assert_close(step.inputs["log_target"], wanted, rtol=0, atol=1e-4)


def test_a_policy_that_is_not_the_base_is_noticed(tmp_path):
    model = gpt2()
    base = LanguageModel(gpt2(seed=1), tokenizer())
    target = EBM(base, [Contains("w3")])
    args = job(tmp_path).args
    trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer())
    x = trainer.policy.sample(n=8, max_new_tokens=6, seed=0)
    assert not trainer._proposal_is_base(x)
    same = job(tmp_path)
    assert same._proposal_is_base(x)


def test_q_becomes_pi_only_at_a_swap(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=6, proposal_criterion="interval", proposal_interval=3)
    first, second = keep.snapshots[0], keep.snapshots[3]
    assert all(digest(q) == digest(first) for q in keep.snapshots[:3])
    assert all(digest(q) == digest(second) for q in keep.snapshots[3:])
    assert digest(second) == digest(keep.models[3]) != digest(first)
    assert [h["swapped"] for h in trainer.state.log_history if "swapped" in h] == [0, 0, 1, 0, 0, 1]
    assert digest(trainer.proposal.snapshot.model) == digest(trainer.model)


def test_on_policy_draws_from_pi_and_keeps_no_copy(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2, on_policy=True)
    assert trainer.proposal is None
    for model, step in zip(keep.models, keep.steps, strict=True):
        log_pi = LanguageModel(model, tokenizer()).log_prob(step.samples)
        torch.testing.assert_close(step.samples.log_prob, log_pi, rtol=0, atol=1e-4)
    assert torch.unique(torch.stack([s.samples.tokens[:, 1] for s in keep.steps]), dim=0).shape[0] == 2


def test_the_mean_baseline_is_that_of_earlier_steps(tmp_path):
    trainer, _, keep = run(
        tmp_path, max_steps=4, objective="reinforce", baseline="mean", reward=Contains("w4"), learning_rate=1e-2
    )
    returns, baselines = [], []
    for model, step in zip(keep.models, keep.steps, strict=True):
        mean = float(torch.cat(returns).mean()) if returns else 0.0
        baselines.append(mean)
        assert step.objective.baseline == pytest.approx(mean, abs=1e-6)
        log_pi = LanguageModel(model, tokenizer()).log_prob(step.samples).detach()
        returns.append((log_pi - step.samples.log_prob).exp() * step.inputs["reward"])
    assert baselines[-1] > 0
    logged = [h["baseline"] for h in trainer.state.log_history if "baseline" in h]
    assert logged == pytest.approx([*baselines[1:], float(torch.cat(returns).mean())], abs=1e-6)


def test_the_scale_of_reinforce_p_keeps_rewards_ordinary(tmp_path):
    _, _, keep = run(tmp_path, max_steps=3, objective="reinforce_p")
    seen = torch.cat([step.inputs["log_target"] for step in keep.steps])
    assert keep.steps[-1].objective.log_scale == pytest.approx(float(seen.logsumexp(0)) - math.log(24))


def test_evaluation_tells_the_truth_of_pi(tmp_path):
    trainer = job(tmp_path, eval_samples=4000, eval_strategy="steps", eval_steps=2, learning_rate=0.0, max_steps=2)
    trainer.model.lm_head.weight.data[3] *= 2  # pi is not a
    trainer.train()
    metrics = next(h for h in trainer.state.log_history if "eval_kl_policy_base" in h)
    x = trainer.policy.sample(n=20_000, max_new_tokens=6, seed=123)
    share = Contains("w3")(x).mean().item()
    gap = x.log_prob - trainer.target.base.log_prob(x)
    for name, value in (("phi/w3", share), ("kl_policy_base", gap.mean().item())):
        error = metrics[f"eval_{name}_stderr"]
        assert 0 < error < 0.05
        assert abs(metrics[f"eval_{name}"] - value) < 5 * error, name
    assert metrics["eval_kl_policy_base"] > 5 * metrics["eval_kl_policy_base_stderr"]
    assert metrics["step"] == 2 and len(trainer.eval_samples) == 4000
    assert metrics["eval_length"] == pytest.approx(float(x.score_mask.sum(1).double().mean()), abs=0.1)
    again = trainer.evaluate()
    assert again["eval_phi/w3"] == metrics["eval_phi/w3"]  # common random numbers


def test_evaluation_on_other_prompts(tmp_path):
    trainer = job(tmp_path, prompts=PROMPTS, samples_per_context=2, eval_samples=6)
    trainer.evaluate(["w1", "w2 w3", "w4"])
    assert trainer.eval_samples.context_id.tolist() == [0, 0, 1, 1, 2, 2]
    trainer.evaluate()
    assert trainer.eval_samples.context_id.tolist() == [0, 1, 2, 3, 4, 5]


# --- contexts


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("contexts", "n", "per_device", "accumulation"), [(7, 1, 2, 2), (12, 2, 4, 3), (5, 6, 4, 3)])
def test_each_context_once_an_epoch(contexts, n, per_device, accumulation, shuffle):
    sampler = StepSampler(contexts, n, per_device=per_device, accumulation=accumulation, shuffle=shuffle)
    batches = list(sampler)
    assert len(batches) == len(sampler) and max(map(len, batches)) <= per_device
    rows = [row for batch in batches for row in batch]
    assert sorted(rows) == sorted([row for row in range(contexts) for _ in range(n)])
    assert rows == [row for row in rows[::n] for _ in range(n)]  # those of a context lie together
    sampler.set_epoch(1)
    assert (list(sampler) != batches) == shuffle
    sampler.set_epoch(0)
    assert list(sampler) == batches


@pytest.mark.parametrize("contexts", [8, 9, 10, 11, 16])
def test_ranks_share_the_contexts_of_a_step(contexts):
    ranks = [
        StepSampler(contexts, 2, per_device=2, accumulation=2, rank=rank, world=2, shuffle=False) for rank in (0, 1)
    ]
    batches = [list(sampler) for sampler in ranks]
    assert len(batches[0]) == len(batches[1]) == len(ranks[0])
    assert list(map(len, batches[0])) == list(map(len, batches[1]))
    rows = {row for rank in batches for batch in rank for row in batch}
    assert rows == set(range(contexts))
    assert set(batches[0][0] + batches[0][1]) == {0, 1} and set(batches[1][0] + batches[1][1]) == {2, 3}


def test_a_context_that_is_split_is_refused():
    with pytest.raises(ValueError, match=r"samples_per_context = 3 must divide .* 4 \* 2 = 8"):
        StepSampler(5, 3, per_device=4, accumulation=2)


class Hub:
    """Like a datasets.Dataset."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"prompt": ["w1", "w2 w3"][i], "other": 1}


@pytest.mark.parametrize("rows", [["w1", "w2 w3"], [{"prompt": "w1"}, {"prompt": "w2 w3"}], Hub()])
def test_where_prompts_come_from(rows):
    assert [prompt for _, prompt in Contexts(rows)] == ["w1", "w2 w3"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (iter(["w1"]), "must have a length"),
        ({"a": ["w1"]}, "must have a length"),
        ("w1", "must have a length"),
        ([], "is empty"),
        ([{"text": "w1"}], "no column 'prompt', only text"),
        ([3], "must be a string or a list of chat messages, got int"),
    ],
)
def test_bad_prompts(rows, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Contexts(rows)


def test_chat_messages_go_through_the_template(tmp_path):
    tok = tokenizer()
    with pytest.raises(ValueError, match="has no chat_template"):
        job(tmp_path, prompts=[[{"role": "user", "content": "w1 w2"}]], tok=tok)
    tok.chat_template = (
        "{% for m in messages %}{{ m['content'] }} w7 {% endfor %}{% if add_generation_prompt %}w6{% endif %}"
    )
    _, _, keep = run(
        tmp_path, max_steps=1, prompts=[[{"role": "user", "content": "w1 w2"}]], samples_per_context=8, tok=tok
    )
    prompt = keep.steps[0].samples.tokens[:, : keep.steps[0].samples.prompt_len]
    assert prompt.tolist() == [[WORDS.index(w) for w in ("w1", "w2", "w7", "w6")]] * 8


# --- checkpoints


@pytest.mark.parametrize(
    "settings",
    [
        {"proposal_interval": 4},  # stopped between two checks
        {"proposal_interval": 5, "proposal_criterion": "interval"},  # stopped just after a swap
        {  # 3 prompts a step in 3 microbatches: stopped in the middle of an epoch of 7
            "proposal_interval": 4,
            "proposal_criterion": "interval",
            "prompts": PROMPTS,
            "samples_per_context": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
        },
        {"objective": "dpg", "baseline": "mean", "partition": "step"},
    ],
    ids=["in an interval", "after a swap", "prompts", "mean baseline"],
)
def test_resumed_is_as_if_never_stopped(tmp_path, settings):
    settings = {"max_steps": 20, "learning_rate": 2e-3, "per_device_train_batch_size": 32, **settings}
    straight = in_process(tmp_path / "straight", **settings)
    stopped = in_process(tmp_path / "stopped", stop=10, **settings)
    assert (stopped["steps"], straight["steps"]) == (10, 20) and stopped["digest"] != straight["digest"]
    resumed = in_process(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-10"), **settings)
    assert resumed["digest"] == straight["digest"]
    assert resumed["swaps"] == straight["swaps"] > 0
    timeless = [{k: v for k, v in h.items() if not k.startswith("seconds_")} for h in straight["log"]]
    assert [{k: v for k, v in h.items() if not k.startswith("seconds_")} for h in resumed["log"]] == timeless


def test_on_policy_resumes_too(tmp_path):
    settings = {"max_steps": 6, "on_policy": True}
    straight = job(tmp_path / "a", **settings)
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(3)], **settings).train()
    resumed = job(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)
    offline = job(tmp_path / "b", max_steps=6)
    before = digest(offline.model)
    with pytest.raises(ValueError, match="one is on-policy and one is not"):
        offline.train(resume_from_checkpoint=True)
    assert digest(offline.model) == before


@pytest.mark.parametrize("stop", [3, 4], ids=["within an epoch", "between epochs"])
def test_random_scorers_go_on_where_they_stopped(tmp_path, stop):
    """Of everything random only a user's function draws from torch's own state."""
    settings = {
        "prompts": PROMPTS[:4], "samples_per_context": 8, "max_steps": 6, "num_train_epochs": 2,
        "constraints": [Scorer(lambda texts: torch.rand(len(texts)), name="random")],
    }  # fmt: skip
    straight = job(tmp_path / "a", **settings)
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(stop)], **settings).train()
    resumed = job(tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(straight.model)


def test_lambda_is_the_checkpoint_s(tmp_path):
    straight = job(tmp_path / "a")
    straight.train()
    job(tmp_path / "b", callbacks=[StopAt(2)]).train()
    resumed = job(tmp_path / "b", lambda_=1.4)  # as another fit of the same wish finds it
    resumed.train(resume_from_checkpoint=True)
    assert resumed.target.lambda_.tolist() == [1.5]
    assert resumed._running.partitions[0].n == 32
    assert digest(resumed.model) == digest(straight.model)


def test_rotation_and_the_best_model(tmp_path):
    """KL(pi||a) grows by far more than its error."""
    trainer = job(
        tmp_path, learning_rate=0.03, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="kl_policy_base",
        greater_is_better=False,
    )  # fmt: skip
    trainer.train()
    trainer.save_model(str(tmp_path.parent / "best"))
    card = (tmp_path.parent / "best" / "README.md").read_text()
    assert "1 optimiser steps of 8" in card and "Evaluation at step 1" in card  # of the model that is there
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-1")  # at learning rate 0 nothing has moved
    kept = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert kept == ["checkpoint-1", "checkpoint-5"]
    assert all(checkpoint.fault(tmp_path / name) is None for name in kept)
    assert json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["best_model_checkpoint"] == best
    assert digest(trainer.model) == digest(trainer.target.base.model)


@pytest.mark.parametrize("name", ["model.safetensors", "dmfast_state.pt", "optimizer.pt", "dmfast_manifest.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_truncated_checkpoint_is_refused(tmp_path, name, how):
    job(tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    newest, good = tmp_path / "checkpoint-3", tmp_path / "checkpoint-2"
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if how == "cut":
        (newest / name).write_bytes(data[: len(data) // 2])
    for resume in (True, str(newest)):
        trainer = job(tmp_path, max_steps=5)
        before = digest(trainer.model)
        with pytest.raises(ValueError, match=r"checkpoint-3 can't be resumed from: .*checkpoint-2") as error:
            trainer.train(resume_from_checkpoint=resume)
        assert name in str(error.value) and digest(trainer.model) == before
    trainer = job(tmp_path, max_steps=5)
    trainer.train(resume_from_checkpoint=str(good))
    assert trainer.state.global_step == 5


def test_there_is_nothing_to_resume_from(tmp_path):
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        job(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="there is no such folder; no other is whole"):
        job(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


class Fill(TrainerCallback):
    """A disk that takes no file of more than ``size`` bytes from a step on."""

    def __init__(self, step, size):
        self.step, self.size = step, size

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("size", [200, 20_000, 60_000])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, size, capsys):
    """Written in part: the model's file, then the optimiser's, then none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = job(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, callbacks=[Fill(2, size)])
    try:
        with pytest.raises(OSError, match=r"checkpoint-2 could not be written: .*checkpoint-1, is whole"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    resumed = job(tmp_path, max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", max_steps=4)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)


def test_a_checkpoint_of_the_same_name_is_replaced(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "stale").write_text("x")
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert not (tmp_path / "checkpoint-1" / "stale").exists()
    assert checkpoint.fault(tmp_path / "checkpoint-1") is None


def test_training_again_draws_other_sequences(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2)
    trainer.train()
    tokens = [step.samples.tokens for step in keep.steps]
    assert not torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[1], tokens[3])
    assert trainer._running.partitions[0].n == 32


def test_another_lambda_starts_z_anew(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2)
    trainer.target.lambda_ = [-3.0]
    trainer.train()
    step = keep.steps[2]
    log_w = step.inputs["log_target"] - step.samples.log_prob
    assert step.inputs["log_z"].tolist() == pytest.approx([float(log_w.logsumexp(0)) - math.log(8)] * 8)
    assert trainer._running.partitions[0].n == 16


REFIT = {"constraints": [Moment(Contains("w4", name="four"), 0.3)], "lambda_": 0.0, "refit_ess": 1e9,
         "refit_samples": 16, "proposal_criterion": "interval", "max_steps": 6}  # fmt: skip


def poorly_fitted(out, **settings):
    """A job whose lambda rests on 6 samples."""
    trainer = job(out, **{**REFIT, **settings})
    x = trainer.target.base.sample(n=200, max_new_tokens=6, seed=5)
    has = Contains("w4")(x)
    some = torch.cat([(has == 1).nonzero()[:1], (has == 0).nonzero()[:5]])[:, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.target.fit(x[some])
    trainer._running.lambda_ = trainer.target.lambda_.tolist()
    return trainer


def test_lambda_is_fitted_again_from_the_samples_of_the_steps(tmp_path):
    """It is what fit_lambda gives for them with the weights a/q by hand; then Z starts anew."""
    keep = Keep()
    trainer = keep.trainer = poorly_fitted(tmp_path, callbacks=[keep])
    first = trainer.target.lambda_.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    logged = [h for h in trainer.state.log_history if "fit_ess" in h]
    seen, ess = first, logged[0]["fit_ess"]
    for start in (0, 2, 4):
        steps = keep.steps[start : start + 2]
        assert [h["lambda/four"] for h in logged[start : start + 2]] == pytest.approx([seen[0]] * 2)
        log_ratio = torch.cat([trainer.target.base.log_prob(s.samples) - s.samples.log_prob for s in steps])
        phi = torch.cat([Contains("w4")(s.samples) for s in steps])
        found = fit_lambda(phi[:, None], [0.3], log_ratio=log_ratio)
        if found.ess > ess:
            seen, ess = found.lambda_, found.ess
            if start < 4:
                following = keep.steps[start + 2]
                log_w = following.inputs["log_target"] - following.samples.log_prob
                wanted = float(log_w.logsumexp(0)) - math.log(8)
                assert following.inputs["log_z"].tolist() == pytest.approx([wanted] * 8)
    assert seen != first
    assert trainer.target.lambda_.tolist() == pytest.approx(seen, abs=1e-3)


def test_fitting_again_resumes(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 1, "seed": 3}  # lambda is fitted before the break and after it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = poorly_fitted(tmp_path / "whole", **save)
        whole.train()
        broken = poorly_fitted(tmp_path / "broken", callbacks=[StopAt(3)], **save)
        broken.train()
        resumed = job(tmp_path / "broken", **REFIT, **save)
        resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(whole.model)
    assert resumed.target.lambda_.tolist() == whole.target.lambda_.tolist() != broken.target.lambda_.tolist()


def test_a_step_draws_none_of_the_samples_of_a_fit(tmp_path):
    _, _, keep = run(tmp_path, max_steps=1, seed=0, per_device_train_batch_size=16)
    fitted = keep.trainer.target.base.sample(n=16, max_new_tokens=6, seed=0).tokens.tolist()
    assert sum(row in fitted for row in keep.steps[0].samples.tokens.tolist()) < 8  # a short one may come up again


def test_a_checkpoint_of_another_wish_is_refused(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = job(tmp_path, constraints=[Moment(Contains("w3", name="w3"), 0.9)], lambda_=4.0)
    before = digest(other.model)
    with pytest.raises(ValueError, match=r"gives \['w3'\] the values \[0.6\], this EBM wants \[0.9\]"):
        other.train(resume_from_checkpoint=True)
    assert digest(other.model) == before and other.target.lambda_.tolist() == [4.0]


def test_other_prompts_have_another_z(tmp_path):
    settings = {"samples_per_context": 4, "save_strategy": "steps", "save_steps": 1}
    job(tmp_path, prompts=["w1", "w2"], max_steps=1, **settings).train()
    other = job(tmp_path, prompts=["w1", "w4"], max_steps=2, **settings)
    with pytest.warns(UserWarning, match="on other prompts"):
        other.train(resume_from_checkpoint=True)
    assert [other._running.partitions[i].n for i in (0, 1)] == [4, 4]


def test_the_policy_of_the_config_holds_after_resuming(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = job(tmp_path, max_steps=2, proposal_decay=0.3)
    other.train(resume_from_checkpoint=True)
    assert other.proposal.running.decay == 0.3


def test_a_move_that_fails_keeps_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    before = (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes()
    replace = os.replace

    def failing(source, target):
        if Path(target) == tmp_path / "checkpoint-1" and "replaced" not in str(source):
            raise OSError("no")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="could not be written: no"):
        job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, seed=9).train()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").read_bytes() == before
    assert checkpoint.fault(tmp_path / "checkpoint-1") is None


def test_models_alone_can_t_be_resumed_from(tmp_path):
    job(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, save_only_model=True).train()
    with pytest.raises(ValueError, match="written with save_only_model=True"):
        job(tmp_path).train(resume_from_checkpoint=True)


def test_ctrl_c_of_one_process_ends_both(tmp_path):
    """The signal comes to one rank alone, at the end of a step; both end after the next, with one checkpoint."""
    result = in_process(tmp_path, processes=2, max_steps=6, interrupt=2, per_device_train_batch_size=4)
    assert result["steps"] == 3
    assert checkpoint.fault(tmp_path / "checkpoint-3") is None


def test_sigterm_of_one_process_ends_both(tmp_path):
    """The signal comes to one rank alone, at the start of step 3; both end after it, with one checkpoint."""
    result = in_process(tmp_path, processes=2, max_steps=6, terminate=2, per_device_train_batch_size=4,
                        enable_jit_checkpoint=True)  # fmt: skip
    assert result["steps"] == 3 and [h["step"] for h in result["log"]] == [1, 2, 3]
    assert checkpoint.fault(tmp_path / "checkpoint-3") is None


def test_ctrl_c_ends_after_the_step_and_saves(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = job(tmp_path, callbacks=[Kill(signal.SIGINT, 2)], **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert signal.getsignal(signal.SIGINT) == handler
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)


@pytest.mark.parametrize("eval_steps", [1, 2], ids=["evaluated at that step", "not evaluated"])
def test_ctrl_c_saves_where_only_the_best_is_saved(tmp_path, eval_steps):
    """KL(pi||a) grows by far more than its error: no evaluation after the first is the best."""
    settings = {
        "learning_rate": 0.03, "max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "eval_strategy": "steps", "eval_steps": eval_steps, "save_strategy": "best",
        "metric_for_best_model": "kl_policy_base", "greater_is_better": False,
    }  # fmt: skip
    trainer = job(tmp_path, callbacks=[Kill(signal.SIGINT, 2)], **settings)
    trainer.train()
    assert trainer.state.global_step == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{eval_steps}", "checkpoint-3"]
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)
    assert resumed.state.best_metric == straight.state.best_metric


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    again = Kill(signal.SIGINT, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer = job(tmp_path, gradient_accumulation_steps=2, callbacks=[again])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.state.global_step == 2 and not list(tmp_path.glob("checkpoint-*"))
    assert signal.getsignal(signal.SIGINT) == handler


def test_sigterm_saves_a_checkpoint_that_resumes(tmp_path):
    """transformers' own just-in-time checkpoint; it may come in the middle of a step."""
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    handler = signal.getsignal(signal.SIGTERM)

    def wait():  # for the three seconds of transformers between the signal and the checkpoint
        limit = time.monotonic() + 60
        while not trainer._jit.asked and time.monotonic() < limit:
            time.sleep(0.05)

    trainer = job(tmp_path, callbacks=[Kill(signal.SIGTERM, 2, wait)], enable_jit_checkpoint=True, **settings)
    assert signal.getsignal(signal.SIGTERM) == handler
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-2"]
    assert checkpoint.fault(tmp_path / "checkpoint-2") is None
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)
    assert resumed._running.partitions[0].n == straight._running.partitions[0].n == 48


@pytest.fixture
def no_wait(monkeypatch):
    """transformers' three seconds between SIGTERM and its checkpoint."""
    monkeypatch.setattr(threading, "Timer", AtOnce)


def test_sigterm_at_the_end_of_a_step_keeps_what_was_logged(tmp_path, no_wait):
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    kill = Kill(signal.SIGTERM, 3, event="on_step_end")
    stopped = job(tmp_path, callbacks=[kill], enable_jit_checkpoint=True, **settings)
    stopped.train()
    assert stopped.state.global_step == 3 and [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    resumed = job(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    straight = job(tmp_path / "straight", **settings)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)

    def timeless(trainer):
        return [
            {k: v for k, v in line.items() if not k.startswith("seconds_") and not k.endswith("_runtime")}
            for line in trainer.state.log_history
            if "train_loss" not in line
        ]

    assert timeless(resumed) == timeless(straight)


@pytest.mark.parametrize("size", [0, 20_000])
@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end", "on_step_end"])
@pytest.mark.parametrize("saves", [True, False], ids=["after others", "the first"])
def test_sigterm_on_a_full_disk(tmp_path, no_wait, event, size, saves, capsys):
    """Nothing of the checkpoint is left, transformers' mark of an unfinished one neither; earlier ones are whole."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    kill = Kill(signal.SIGTERM, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1])), event)
    trainer = job(
        tmp_path, callbacks=[kill], enable_jit_checkpoint=True, save_steps=1,
        save_strategy="steps" if saves else "no", **settings,
    )  # fmt: skip
    kept = [] if not saves else ["checkpoint-1"] if event == "on_step_end" else ["checkpoint-1", "checkpoint-2"]
    wanted = f"the previous one, .*{kept[-1]}, is whole" if kept else "There is no earlier one"
    try:
        with pytest.raises(OSError, match=f"checkpoint-2 could not be written: .*{wanted}"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
    assert not list(tmp_path.rglob("*incomplete*"))
    if kept:
        resumed = job(tmp_path, **settings)
        resumed.train(resume_from_checkpoint=True)
        straight = job(tmp_path / "straight", **settings)
        straight.train()
        assert digest(resumed.model) == digest(straight.model)


# --- errors: nothing is lost


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda texts: 1 / 0, "scorer 'service' raised ZeroDivisionError: division by zero.*the first of them: '"),
        (lambda texts: [1.0] * 7, r"'service' must return one number for each of 8 samples.*got shape \(7,\).*: '"),
        (lambda texts: [1.0] * 7 + [math.nan], "'service' must return a finite number, got nan for sample 7 .*: '"),
        (lambda texts: [1.0] * 7 + [-1.0], "'service' must be b\\(x\\) >= 0, got -1 for sample 7 .*: '"),
    ],
    ids=["raises", "wrong shape", "NaN", "negative"],
)
def test_an_error_in_a_step_changes_nothing(tmp_path, wrong, message):
    calls = []

    def scorer(texts):
        calls.append(len(texts))
        return wrong(texts) if len(calls) == 3 else [1.0] * len(texts)

    trainer = job(tmp_path, constraints=[Scorer(scorer, name="service")])
    with pytest.raises((RuntimeError, ValueError), match=message):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer._running.partitions[0].n == 16 and trainer.proposal.steps == 2
    weights = digest(trainer.model)
    straight = job(tmp_path / "straight", max_steps=4, callbacks=[StopAt(2)],
                   constraints=[Scorer(lambda texts: [1.0] * len(texts))])  # fmt: skip
    straight.train()
    assert digest(straight.model) == weights


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "gdc+"}, "unknown objective"),
        ({"objective": "reinforce"}, "needs reward="),
        ({"objective": "kl_control"}, "needs beta"),
        ({"baseline": "median"}, "baseline must be a number"),
        ({"baseline": "mean"}, "gdc\\+\\+.*constant baseline 1"),
        ({"proposal_criterion": "chi2"}, "proposal_criterion must be one of kl, tvd, js, interval"),
        ({"partition": "global"}, "'running' or 'step'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be positive"),
        ({"temperature": -1.0}, "temperature must be positive"),
        ({"max_steps": -1}, "set max_steps"),
        ({"auto_find_batch_size": True}, "refuses auto_find_batch_size"),
        ({"label_smoothing_factor": 0.1}, "no labels to smooth"),
        ({"neftune_noise_alpha": 5.0}, "noise in the policy"),
        ({"fsdp": "full_shard"}, "does not run under FSDP yet"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "does not run under DeepSpeed yet"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "under tensor, context or sequence parallelism yet"),
        (
            {
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "save_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
            },
            "need metric_for_best_model, one of",
        ),
        ({"objective": "reinforce_p", "baseline": "mean"}, "whose scale differs"),
        ({"prompts": PROMPTS, "samples_per_context": 1}, "takes 8 contexts of 1 sequences, and the data set has 7"),
    ],
)
def test_what_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        job(tmp_path, **settings)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fsdp", True, "does not run under FSDP yet, which fsdp asks for; use DDP"),
        ("deepspeed", "ds.json", "does not run under DeepSpeed yet, which deepspeed asks for; use DDP"),
        ("parallelism_config", ParallelismConfig(cp_size=2), "context or sequence parallelism yet"),
        ("_n_gpu", 2, r"under DataParallel \(2 GPUs in one process\); start one process per GPU"),
    ],
)
def test_parallelism_that_is_set_after_construction_is_refused(tmp_path, name, value, message):
    trainer = job(tmp_path)
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        dmfast.DMTrainer(gpt2(), trainer.target, trainer.args)


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "PARALLELISM_CONFIG"])
def test_parallelism_that_accelerate_launch_sets_is_refused(tmp_path, name, monkeypatch):
    args = job(tmp_path).args
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    for make in (lambda: job(tmp_path), lambda: dmfast.DMTrainer(gpt2(), job(tmp_path).target, args)):
        with pytest.raises(
            ValueError, match=f"yet, which ACCELERATE_USE_{name}, which accelerate launch sets, asks for"
        ):
            make()


def test_a_sharded_model_is_refused(tmp_path):
    model = gpt2()
    model._tp_size = 2  # what from_pretrained(tp_plan="auto") notes
    with pytest.raises(ValueError, match="tensor parallelism yet, and the model was sharded as it was loaded"):
        job(tmp_path, model=model)


def test_a_base_that_would_move_is_refused(tmp_path):
    model, tok = gpt2(), tokenizer()
    target = EBM(LanguageModel(model, tok), [Contains("w3")])
    adapter = peft.get_peft_model(model, peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for trained in (model, adapter):
        with pytest.raises(ValueError, match="the target would move with it"):
            dmfast.DMTrainer(trained, target, job(tmp_path).args, processing_class=tok)


def test_one_sample_per_context_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="from that sample alone"):
        trainer = job(tmp_path, prompts=PROMPTS, per_device_train_batch_size=4)
    assert trainer.samples_per_context == 1
    assert job(tmp_path, prompts=["w1"]).samples_per_context == 8


def test_a_target_that_is_not_fitted_is_refused(tmp_path):
    target = EBM(LanguageModel(gpt2(), tokenizer()), [Moment(Contains("w3"), 0.5)])
    with pytest.raises(ValueError, match="not fitted"):
        dmfast.DMTrainer(gpt2(), target, job(tmp_path).args)


def test_a_fit_on_sequences_of_another_length_is_warned_of(tmp_path):
    target = EBM(LanguageModel(gpt2(), tokenizer()), [Moment(Contains("w3"), 0.5)])
    target.fit(n=256, max_new_tokens=5)
    with pytest.warns(UserWarning, match="fitted on samples of up to 5 new tokens, and DMConfig.max_new_tokens is 6"):
        dmfast.DMTrainer(gpt2(), target, job(tmp_path).args)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path):
    tok = tokenizer()
    tok.add_tokens(["w8", "w9"])
    with pytest.raises(ValueError, match="the tokenizer has 13 tokens, the model 11 embeddings"):
        job(tmp_path, tok=tok)


def test_a_base_of_another_vocabulary_is_refused(tmp_path):
    trainer, model = job(tmp_path), gpt2()
    model.resize_token_embeddings(16)
    with pytest.raises(ValueError, match="the tokenizer has 11 tokens, the model 16 embeddings and the base 11"):
        dmfast.DMTrainer(model, trainer.target, trainer.args)


def said(recorded, part):
    """How often."""
    return sum(part in str(each.message) for each in recorded)


def test_what_is_said_once_is_said_once(tmp_path):
    """However many steps, evaluations, checkpoints, and trainers with the tokenizer."""
    tok, model = tokenizer(pad_token=None), gpt2()
    model.generation_config.update(top_k=5, temperature=0.5)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer = job(
            tmp_path, tok=tok, model=model, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, sampling_batch_size=2, proposal_criterion="interval",
        )  # fmt: skip
        trainer.train()
        trainer.policy.sample(n=2, max_new_tokens=3)
        trainer.save_model()
        assert trainer.proposal.swaps == 2
        assert said(recorded, "no pad token") == 1
        assert said(recorded, "generation_config sets") == 1
        job(tmp_path, tok=tok)
    assert said(recorded, "no pad token") == 1


def test_a_missing_pad_token_is_eos_and_said(tmp_path):
    tok = tokenizer(pad_token=None)
    with pytest.warns(UserWarning, match="no pad token; padding with EOS, '<e>'"):
        trainer = job(tmp_path, tok=tok)
    assert tok.pad_token == "<e>"
    trainer.train()


def test_a_prompt_beyond_the_context_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompt 2 has 20 tokens; with max_new_tokens=6 that is beyond"):
        job(tmp_path, prompts=["w1", "w2", "w1 " * 20])


def test_a_prompt_to_evaluate_on_beyond_the_context_is_refused(tmp_path):
    trainer = job(tmp_path)
    with pytest.raises(ValueError, match="prompt 1 has 20 tokens; with max_new_tokens=6 that is beyond"):
        dmfast.DMTrainer(gpt2(), trainer.target, trainer.args, eval_dataset=["w1", "w1 " * 20])
    with pytest.raises(ValueError, match="the longest prompt has 20 tokens"):
        trainer.evaluate(["w1 " * 20])


def test_generation_config_is_ignored_and_said(tmp_path):
    plain = run(tmp_path / "plain", max_steps=1)[2].steps[0].samples
    model = gpt2()
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    with pytest.warns(UserWarning, match=r"generation_config sets .*top_k.*is ignored"):
        _, _, keep = run(tmp_path / "set", model=model, max_steps=1)
    assert torch.equal(keep.steps[0].samples.tokens, plain.tokens)


def test_steps_without_a_sequence_of_the_target(tmp_path):
    """All P = 0: no NaN, nothing moves, and a warning says how rare the feature is."""
    nothing = Scorer(lambda texts: [0.0] * len(texts), name="nothing")
    trainer = job(tmp_path, constraints=[nothing], max_steps=6, patience_zero=3)
    before = digest(trainer.model)
    with pytest.warns(UserWarning, match=r"P\(x\) = 0 for all 24 sequences of the last 3 steps.*fewer than 0.12"):
        trainer.train()
    assert digest(trainer.model) == before
    logs = [h for h in trainer.state.log_history if "ess" in h]
    assert [(h["ess"], h["z"], h["n_empty"]) for h in logs] == [(0.0, 0.0, 8.0)] * 6
    assert all(h["loss"] == 0 for h in logs)


@pytest.mark.parametrize(("hits", "warned"), [((3,), False), ((), True)])
def test_steps_in_a_row_without_a_sequence_of_the_target(tmp_path, hits, warned):
    calls = []

    def scorer(texts):
        calls.append(len(texts))
        return [float(len(calls) in hits)] * len(texts)

    trainer = job(tmp_path, constraints=[Scorer(scorer)], max_steps=5, patience_zero=3)
    with warnings.catch_warnings(record=True) as recorded:
        warnings.simplefilter("always")
        trainer.train()
    assert said(recorded, "P(x) = 0 for all") == warned


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda x: [1.0], r"scorer 'reward' must return one number for each of 8 samples"),
        (lambda x: torch.tensor(1.0), "must return one number for each of 8"),
        (lambda x: torch.full((8,), math.nan), r"must return a finite number, got nan for sample 0 "),
        (lambda x: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_a_reward_is_checked_as_scorers_are(tmp_path, reward, message):
    trainer = job(tmp_path, objective="reinforce", reward=Scorer(reward, on="samples", name="reward"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        trainer.train()


def test_the_reward_is_logged(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=1, objective="reinforce", reward=lambda x: x.score_mask.sum(1).double())
    assert trainer.state.log_history[0]["reward"] == keep.steps[0].samples.score_mask.sum(1).double().mean()


def test_the_base_scores_in_small_batches(tmp_path, monkeypatch):
    sizes = []
    log_prob = LanguageModel.log_prob

    def counting(self, samples, *, batch_size=None):
        sizes.append(min(batch_size or len(samples), len(samples)))
        return log_prob(self, samples, batch_size=batch_size)

    monkeypatch.setattr(LanguageModel, "log_prob", counting)
    job(tmp_path, max_steps=3, proposal_criterion="interval", proposal_interval=1, sampling_batch_size=2).train()
    assert sizes[-2:] == [2, 2]


def test_the_command_line_parses_a_config():
    from transformers import HfArgumentParser

    for text, wanted in (("mean", "mean"), ("0.5", 0.5)):
        line = ["--output_dir", "x", "--objective", "dpg", "--baseline", text, "--report_to", "tensorboard"]
        (args,) = HfArgumentParser(dmfast.DMConfig).parse_args_into_dataclasses(line)
        assert args.baseline == wanted


def test_a_progress_bar_of_the_user_s_own_stays(tmp_path):
    from transformers import ProgressCallback

    class Mine(ProgressCallback):
        pass

    names = [type(c).__name__ for c in job(tmp_path, callbacks=[Mine()], disable_tqdm=False).callback_handler.callbacks]
    assert "Mine" in names and "Progress" in names and "ProgressCallback" not in names


def test_the_progress_bar_shows_the_line(tmp_path, capsys):
    job(tmp_path, max_steps=2, disable_tqdm=False).train()
    printed = capsys.readouterr()
    assert "step    2  E_q[w3]" in printed.out + printed.err and "2/2" in printed.err


def test_predict_has_no_meaning(tmp_path):
    with pytest.raises(NotImplementedError, match=r"use evaluate\(\)"):
        job(tmp_path).predict(None)


# --- what transformers' Trainer gives


@pytest.mark.parametrize(
    "settings",
    [{"gradient_checkpointing": True}, {"activation_checkpointing": True}, {"torch_compile": True}],
    ids=["gradient checkpointing", "activation checkpointing", "torch.compile"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:dmfast forms all logits of OptimizedModule")
def test_ways_to_run_the_model_change_no_gradient(tmp_path, settings):
    _, plain, _ = run(tmp_path / "plain", max_steps=1)
    _, found, _ = run(tmp_path / "other", max_steps=1, **settings)
    found = [{name.removeprefix("_orig_mod."): g for name, g in step.items()} for step in found]
    assert_close(found[0], plain[0])


def test_bf16(tmp_path):
    trainer, found, keep = run(tmp_path / "bf16", max_steps=2, bf16=True, objective="dpg")
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert all(h["kl_policy"] == h["kl_policy"] for h in trainer.state.log_history if "kl_policy" in h)
    wanted, _ = oracle(keep.models[0], keep.steps[0])
    assert_close(found[0], wanted, 0.1)


def test_lora_trains_the_adapter_alone(tmp_path):
    torch.manual_seed(0)
    base = gpt2()
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(
        target_modules=["c_attn", "c_proj"], r=4, lora_dropout=0.3, fan_in_fan_out=True))  # fmt: skip
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = EBM(LanguageModel(base, tokenizer()), [Moment(Contains("w3", name="w3"), 0.6)])
    target.lambda_ = [1.5]
    args = job(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, proposal_criterion="interval").args
    trainer = dmfast.DMTrainer(model, target, args, processing_class=tokenizer())
    trainer.train()
    assert trainer.proposal.swaps == 2
    moved = [n for n, p in model.named_parameters() if n in frozen and not torch.equal(p, frozen[n])]
    assert moved == []
    state = torch.load(tmp_path / "checkpoint-2" / "dmfast_state.pt", weights_only=True)
    assert all("lora" in name for name in state["proposal"]["model"])  # of q, what training moves
    trainer.save_model(str(tmp_path / "final"))
    assert "library_name: peft" in (tmp_path / "final" / "README.md").read_text()
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "final")
    x = trainer.policy.sample(n=8, max_new_tokens=6, seed=0)
    torch.testing.assert_close(LanguageModel(loaded, tokenizer()).log_prob(x), trainer.policy.log_prob(x))
    again = dmfast.DMTrainer(
        peft.get_peft_model(copy.deepcopy(base), model.peft_config["default"]), target, args,
        processing_class=tokenizer(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    torch.testing.assert_close(again.policy.log_prob(x), trainer.policy.log_prob(x), rtol=0, atol=0)


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "board")
    try:
        job(tmp_path, report_to="tensorboard", max_steps=2, eval_strategy="steps", eval_steps=2).train()
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    board = EventAccumulator(str(next((tmp_path / "board").rglob("events*")).parent))
    board.Reload()
    assert {"train/kl_policy", "train/phi/w3", "train/ess", "eval/phi/w3", "eval/kl_policy_base"} <= set(
        board.Tags()["scalars"]
    )
    assert len(board.Scalars("train/kl_policy")) == 2


def test_a_plain_folder_that_needs_no_dmfast(tmp_path):
    trainer = job(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    script = (
        "import sys; sys.modules['dmfast'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'final')!r})\n"
        f"tok = AutoTokenizer.from_pretrained({str(tmp_path / 'final')!r})\n"
        "print(model(**tok('w1 w2', return_tensors='pt')).logits[0, -1].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    wanted = trainer.model(**tokenizer()("w1 w2", return_tensors="pt")).logits[0, -1].tolist()
    assert json.loads(done.stdout) == pytest.approx(wanted, abs=1e-5)
    card = (tmp_path / "final" / "README.md").read_text()
    for text in ("library_name: transformers", '"value": 0.6', '"lambda": 1.5', "| objective | gdc++ |", "phi/w3",
                 "2 optimiser steps of 8 sequences"):  # fmt: skip
        assert text in card, text


@pytest.mark.parametrize("ends", [[5, 3], [3]], ids=["two ends", "one"])
def test_generate_of_a_saved_model_ends_where_training_did(tmp_path, ends):
    """And the user's temperature and top_k, which training ignores, are as the user had them; transformers refuses to
    save these, since do_sample is not set."""
    model, tok = gpt2(), tokenizer()
    model.generation_config.update(temperature=0.7, top_k=7)
    target = EBM(LanguageModel(gpt2(), tok, eos_token_id=ends), [Contains("w4")])
    args = job(tmp_path, max_steps=2, save_strategy="steps", save_steps=2).args
    with pytest.warns(UserWarning, match="which is ignored"):
        trainer = dmfast.DMTrainer(model, target, args, processing_class=tok)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-2", tmp_path / "final"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        config = loaded.generation_config
        assert config.eos_token_id == (ends if len(ends) > 1 else ends[0]), folder
        assert (config.temperature, config.top_k, config.pad_token_id) == (0.7, 7, 7)
    assert (model.generation_config.temperature, model.generation_config.top_k) == (0.7, 7)
    torch.manual_seed(0)
    rows = loaded.generate(
        torch.full((200, 1), 9), do_sample=True, temperature=1.0, top_k=0, max_new_tokens=12
    )[:, 1:].tolist()  # fmt: skip
    last = []
    for row in rows:
        while row[-1] == 7 and len(row) > 1:
            row.pop()
        last.append(row[-1])
        assert not set(row[:-1]) & set(ends), row
    assert set(ends) <= set(last)


class Uploads:
    """In the place of the hub: what was in a folder when it was pushed, without what was to be left out."""

    def __init__(self, monkeypatch):
        self.pushed = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/me/{repo_id}")

    def upload_folder(self, *, folder_path, path_in_repo="", ignore_patterns=(), run_as_future=False, **kwargs):
        files = {str(p.relative_to(folder_path)): p.read_bytes() for p in Path(folder_path).rglob("*") if p.is_file()}
        files = {
            name: data for name, data in files.items() if not any(fnmatch.fnmatch(name, x) for x in ignore_patterns)
        }
        self.pushed.append((path_in_repo, Path(folder_path), checkpoint.fault(Path(folder_path)), files))
        done = concurrent.futures.Future()
        done.set_result(None)
        return done if run_as_future else None


PLAIN = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json", "training_args.bin"}  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        ("every_save", ["", ""]),
        ("checkpoint", ["", "last-checkpoint", "", "last-checkpoint"]),
        ("all_checkpoints", ["", "checkpoint-2", "", "checkpoint-4"]),
        ("end", []),
    ],
)
def test_what_is_pushed_is_whole(tmp_path, strategy, wanted, monkeypatch):
    uploads = Uploads(monkeypatch)
    trainer = job(
        tmp_path, max_steps=4, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        push_to_hub=True, hub_strategy=strategy,
    )  # fmt: skip
    weights = {}

    class Weights(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights[state.global_step] = {n: p.clone() for n, p in model.state_dict().items()}

    trainer.add_callback(Weights)
    trainer.train()
    assert [place for place, *_ in uploads.pushed] == wanted
    trainer.push_to_hub()
    half = len(wanted) // 2
    for step, (place, folder, fault, files) in zip([2] * half + [4] * (half + 1), uploads.pushed, strict=True):
        if place:  # a checkpoint, in its own place
            assert folder == tmp_path / f"checkpoint-{step}" and fault is None
            assert {"dmfast_state.pt", "dmfast_manifest.json", "optimizer.pt", "trainer_state.json"} <= files.keys()
            assert files.keys() >= PLAIN
        else:
            assert folder == tmp_path and files.keys() == PLAIN
        loaded = safetensors.torch.load(files["model.safetensors"])
        assert all(torch.equal(value, weights[step][name]) for name, value in loaded.items())
        card = files["README.md"].decode()
        assert "# A language model matched to a target distribution" in card
        assert f"{step} optimiser steps of 8 sequences" in card and f"Evaluation at step {step}" in card


def test_the_log_line(tmp_path, capsys):
    job(tmp_path, max_steps=1, eval_strategy="steps", eval_steps=1).train()
    step, evaluation, *_ = capsys.readouterr().out.splitlines()
    for part in (
        "step    1",
        "E_q[w3] 0.",
        "KL(p‖π) ",
        " ± ",
        "Z ",
        "ESS ",
        "swaps 0",
        "sampling",
        "scoring",
        "policy",
    ):
        assert part in step, step
    assert evaluation.startswith("step    1 evaluation  E_π[w3] 0.") and "KL(π‖a)" in evaluation


def test_log_line_of_logs_that_lack_some():
    assert log_line(3, {"loss": 0.5}) == "step    3  loss 0.5"
    assert "± " not in log_line(1, {"kl_policy": 0.5, "kl_policy_stderr": None})


def test_logs_between_two_lines_are_means(tmp_path):
    every = job(tmp_path / "a", max_steps=4)
    every.train()
    second = job(tmp_path / "b", max_steps=4, logging_steps=2)
    second.train()
    one, two = ([h for h in t.state.log_history if "kl_policy" in h] for t in (every, second))
    assert len(two) == 2
    assert two[1]["phi/w3"] == pytest.approx((one[2]["phi/w3"] + one[3]["phi/w3"]) / 2)
    assert two[1]["log_z"] == one[3]["log_z"] and two[0]["swapped"] == one[0]["swapped"] + one[1]["swapped"]


def test_partition_functions_are_persistent():
    first = PartitionFunctions()
    ids, log_w = torch.tensor([4, 4, 9]), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    second = first.updated(ids, log_w, torch.zeros(3, dtype=torch.float64))
    third = second.updated(ids[:1], log_w[:1], torch.zeros(1, dtype=torch.float64))
    assert (len(first), len(second), second[4].n, third[4].n) == (0, 2, 2, 3)
    assert second.log_z(ids).tolist() == pytest.approx([math.log((math.exp(0.5) + math.exp(-1)) / 2)] * 2 + [2.0])


def test_partition_functions_go_on_to_the_bit():
    """Also of a context whose P was 0, and in tensors: a dict for each of many contexts takes seconds to load."""
    ids = torch.tensor([4, 4, 9, 10**12, 0])
    log_w = torch.tensor([0.1, -700.3, 2.0 / 3, -math.inf, 1e3], dtype=torch.float64)
    zero = torch.zeros(5, dtype=torch.float64)
    first = PartitionFunctions().updated(ids, log_w, zero)
    state = first.state_dict()
    assert all(isinstance(column, torch.Tensor) and column.shape == (4,) for column in state.values())
    second = PartitionFunctions()
    second.load_state_dict(state)
    for _ in range(2):
        assert len(second) == 4
        for context in ids.tolist():
            assert second[context].state_dict() == first[context].state_dict()
            assert type(second[context].n) is int
        first, second = (z.updated(ids, log_w.flip(0), zero) for z in (first, second))
    second.load_state_dict(PartitionFunctions().state_dict())
    assert len(second) == 0


def test_the_trainer_comes_with_import_dmfast_only_when_asked(tmp_path):
    there = "'transformers' in sys.modules"
    code = f"import dmfast, sys; assert not {there}; dmfast.DMConfig; assert {there}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
