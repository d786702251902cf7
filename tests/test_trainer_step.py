"""Test a step of DMTrainer: its gradients against the oracle however it is cut, Z, the proposal, baselines, rewards."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers
from trainer_job import PROMPTS, StopAt, digest, gpt2, job, tokenizer
from trainer_tools import (
    SKIP,
    Forwards,
    assert_close,
    here,
    in_process,
    inputs_by_hand,
    one_thread,  # noqa: F401
    oracle,
    run,
)

import dmfast
from dmfast import EBM, Contains, LanguageModel, Scorer

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


CASES = {
    "gdc++": {},
    "dpg": {"objective": "dpg"},
    "dpg, leave one out": {"objective": "dpg", "baseline": "leave_one_out"},
    "temperature": {"temperature": 0.7},
    "max_weight": {"objective": "chi2", "max_weight": 0.5},
    "the paper's scale": {"normalize": False},
    "entropy": {"entropy_coefficient": 0.05},
    "on-policy": {"on_policy": True},
    "reinforce": {"objective": "reinforce", "reward": Contains("w3"), "on_policy": True},
    "reinforce_p": {"objective": "reinforce_p"},
    "alpha": {"objective": "alpha", "alpha": 0.5, "proposal_criterion": "alpha"},
    "kl_control": {"objective": "kl_control", "beta": 0.3, "reward": Contains("w3")},
    "prompts": {"prompts": PROMPTS, "samples_per_context": 4},
    "prompts, baseline within each": {
        "prompts": PROMPTS, "samples_per_context": 4, "objective": "dpg", "baseline": "leave_one_out_context",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_oracle_s(tmp_path, case):
    """The gradient is right on the last of several steps, when pi, q and a differ."""
    trainer, gradients, keep = run(tmp_path, max_steps=3, **CASES[case])
    options = {name: getattr(trainer.args, name) for name in ("max_weight", "on_policy", "entropy_coefficient")}
    for model, step, found in zip(keep.models, keep.steps, gradients, strict=True):
        inputs = inputs_by_hand(trainer, step, trainer.args.objective)
        assert_close(found, oracle(model, step, inputs, **options)[0], 2e-4)


@pytest.mark.parametrize(
    ("case", "per_device", "accumulation"),
    [
        ("gdc++", 4, 2), ("gdc++", 1, 8), ("dpg, leave one out", 2, 4), ("prompts", 2, 4), ("prompts", 1, 8),
        ("prompts, baseline within each", 4, 2),
    ],
)  # fmt: skip
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(tmp_path, case, per_device, accumulation):
    whole = run(tmp_path / "whole", max_steps=2, **CASES[case])[1]
    cut = run(tmp_path / "cut", max_steps=2, per_device_train_batch_size=per_device,
              gradient_accumulation_steps=accumulation, **CASES[case])[1]  # fmt: skip
    assert_close(cut[0], whole[0])
    assert_close(cut[1], whole[1], 1e-3)


def test_microbatches_hold_sequences_of_about_one_length_without_common_padding(tmp_path):
    model = gpt2()
    forwards = Forwards(model)
    _, _, keep = run(tmp_path, model=model, max_steps=2, per_device_train_batch_size=2,
                           gradient_accumulation_steps=4, max_new_tokens=12)  # fmt: skip
    for step, shapes in zip(keep.steps, (forwards.shapes[:4], forwards.shapes[4:]), strict=True):
        lengths = [x for part in step.split(2) for x in part.samples.attention_mask.sum(1).tolist()]
        assert lengths == sorted(lengths) and lengths[0] < lengths[-1]
        for i, shape in enumerate(shapes):
            both = lengths[2 * i : 2 * i + 2]
            assert shape in ((2, max(both)), (1, sum(both)))  # the sequences lie side by side or end to end


def test_what_a_device_has_recorded_is_raised_before_the_step_counts(tmp_path, monkeypatch):
    """A fault of any microbatch is found, also where sequences of known weight 0 are left out."""
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = job(tmp_path, max_steps=2, skip_zero_weight=True, **SKIP, **cut)
    outputs, loss = [], LanguageModel.loss

    def recorded():
        raise ValueError("NaN at (sequence 1, position 2)")

    def recording(self, *args, **kwargs):
        out = loss(self, *args, **kwargs)
        found = (recorded,) if len(outputs) == 6 else ()
        outputs.append(replace(out, _scores=out._scores.replaced(recorded=found)))
        return outputs[-1]

    monkeypatch.setattr(LanguageModel, "loss", recording)
    with pytest.raises(ValueError, match=r"NaN at \(sequence 1, position 2\)"):
        trainer.train()
    assert len(outputs) == 8 and trainer.matcher.running.steps == 1 and len(trainer.matcher.estimates) == 1


def test_a_ragged_last_step(tmp_path):
    """Of 7 prompts a step takes 4 in microbatches of 2, so the last step has 3, in microbatches of 2 and 1."""
    settings = {"prompts": PROMPTS, "max_steps": -1, "num_train_epochs": 1}
    ragged, gradients, keep = run(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    assert [len(step.samples) for step in keep.steps] == [4, 3]
    assert ragged.state.global_step == 2
    for model, step, found in zip(keep.models, keep.steps, gradients, strict=True):
        assert_close(found, oracle(model, step)[0])
    rows = torch.cat([step.samples.context_id for step in keep.steps]).tolist()
    assert sorted(rows) == list(range(7))


def test_two_processes_give_one_process_s_gradients_and_swaps(tmp_path):
    # Adam would make steps of full size out of rounding where a gradient is nearly 0
    common = {"max_steps": 6, "proposal_interval": 2, "optim": "sgd", "learning_rate": 1e-2, "warmup_steps": 0}
    common |= {"gradient_variance_steps": 1, "eval_strategy": "steps", "eval_steps": 6, "eval_diversity": 32}
    one = here(tmp_path / "one", per_device_train_batch_size=32, **common)
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
        for row in set(step.samples.context_id.tolist()):
            seen.setdefault(row, []).append(log_w[step.samples.context_id == row])
        wanted = [torch.cat(seen[row]) for row in step.samples.context_id.tolist()]
        wanted = [float(w.logsumexp(0)) - math.log(len(w)) for w in wanted]
        assert step.inputs["log_z"].tolist() == pytest.approx(wanted)


def test_the_target_is_scored_as_the_base_scores(tmp_path):
    """Before the first swap log a = log q comes from the sampler, and afterwards the base is asked."""
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
    assert not trainer.matcher._rollouts.proposal_is_base(x)
    same = job(tmp_path)
    assert same.matcher._rollouts.proposal_is_base(x)


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
    assert trainer.matcher.running.partitions[0].n == 16 and trainer.proposal.steps == 2
    weights = digest(trainer.model)
    straight = job(tmp_path / "straight", max_steps=4, callbacks=[StopAt(2)],
                   constraints=[Scorer(lambda texts: [1.0] * len(texts))])  # fmt: skip
    straight.train()
    assert digest(straight.model) == weights


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


@pytest.mark.parametrize("how", ["gradient_checkpointing", "activation_checkpointing", "torch_compile"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:dmfast forms all logits of OptimizedModule")
def test_ways_to_run_the_model_change_no_gradient(tmp_path, how):
    if not hasattr(dmfast.DMConfig, how):
        pytest.skip(f"transformers {transformers.__version__} has no {how}")
    _, plain, _ = run(tmp_path / "plain", max_steps=1)
    _, found, _ = run(tmp_path / "other", max_steps=1, **{how: True})
    found = [{name.removeprefix("_orig_mod."): g for name, g in step.items()} for step in found]
    assert_close(found[0], plain[0])


def test_bf16(tmp_path):
    trainer, found, keep = run(tmp_path / "bf16", max_steps=2, bf16=True, objective="dpg")
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert all(h["kl_policy"] == h["kl_policy"] for h in trainer.state.log_history if "kl_policy" in h)
    wanted, _ = oracle(keep.models[0], keep.steps[0])
    assert_close(found[0], wanted, 0.1)


def test_training_again_draws_other_sequences(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2)
    trainer.train()
    tokens = [step.samples.tokens for step in keep.steps]
    assert not torch.equal(tokens[0], tokens[2]) and not torch.equal(tokens[1], tokens[3])
    assert trainer.matcher.running.partitions[0].n == 32


def test_a_step_draws_none_of_the_samples_of_a_fit(tmp_path):
    _, _, keep = run(tmp_path, max_steps=1, seed=0, per_device_train_batch_size=16)
    fitted = keep.trainer.target.base.sample(n=16, max_new_tokens=6, seed=0).tokens.tolist()
    # a short sequence may come up in both
    assert sum(row in fitted for row in keep.steps[0].samples.tokens.tolist()) < 8


@pytest.mark.parametrize(
    "objective",
    [lambda t: t.log_target_ratio.exp() - t.log_ratio.exp(), dmfast.Objective("gdc++")],
    ids=["a function", "an Objective"],
)
def test_an_objective_of_one_s_own(tmp_path, objective):
    """Its gradients are those of the named objective that it stands for, and the card names it."""
    named = run(tmp_path / "named", max_steps=2)[1]
    trainer, found, _ = run(tmp_path / "own", max_steps=2, objective=objective)
    assert_close(found[0], named[0])
    trainer.save_model(str(tmp_path / "final"))
    name = "gdc++" if isinstance(objective, dmfast.Objective) else "<lambda>"
    assert f"| objective | {name} |" in (tmp_path / "final" / "README.md").read_text()


def test_a_reward_that_is_part_of_the_target_is_scored_once(tmp_path):
    """A step of 8 sequences makes 8 calls of the scorer."""
    calls = []

    def score(x):
        calls.append(1)
        return float(x.score_mask.sum())

    feature = Scorer(score, on="samples", batched=False, name="score")
    trainer = job(tmp_path, constraints=[dmfast.Reward(feature, beta=2.0)], objective="kl_control", beta=2.0,
                  reward=feature, max_steps=2)  # fmt: skip
    trainer.train()
    assert len(calls) == 16
    assert [h["scorer/score/scored"] for h in trainer.state.log_history if "scorer/score/scored" in h] == [8, 8]
