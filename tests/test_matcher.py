"""Test the step that every loop shares: its gradients, what a commit takes in and when, and what must not change."""

from __future__ import annotations

import copy
import io
import json
import math
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import accelerate
import peft
import pytest
import torch
from launch import launch
from torch import nn
from trainer_job import PROMPTS, digest, gpt2, job, tokenizer

import dmfast
from dmfast import (
    EBM,
    Contains,
    LanguageModel,
    Matcher,
    Moment,
    Objective,
    OfflineProposal,
    Scorer,
    Terms,
    tensor_parallel,
)
from dmfast.estimators import estimate
from dmfast.proposal import nearer
from dmfast.training.recipe import load

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

KL = {"objective": "kl_control", "beta": 0.3, "reward": Contains("w3")}


def matcher(*, proposal=None, constraints=None, model=None, on_policy=False, **options):
    """Return a matcher on GPT-2 of 2 layers x 16. Its lambda is set by hand."""
    torch.manual_seed(0)
    model = gpt2() if model is None else model
    base = LanguageModel(copy.deepcopy(model), tokenizer())
    if constraints is None:
        constraints = [Moment(Contains("w3", name="w3"), 0.6)]
    target = EBM(base, constraints, monitor=[Contains("w4", name="w4")])
    if target.moment_names:
        target.lambda_ = [1.5]
    policy = LanguageModel(model, tokenizer())
    q = None if on_policy else OfflineProposal(policy, **({"interval": 2} | (proposal or {})))
    return Matcher(policy, target, q, **({"seed": 29} | options))


def draw(m, prompts=None, n=8, **options):
    return m.draw(prompts, n, **({"max_new_tokens": 6} | options))


def step(m, optimizer, prompts=None, n=8, size=None, **options):
    """Take one step of the loop, and return its metrics."""
    for part in draw(m, prompts, n, **options).split(size):
        m.loss(part).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return m.commit()


def sgd(m, lr=1e-2):
    return torch.optim.SGD(m.policy.model.parameters(), lr=lr)


def gradients(m):
    found = {name: p.grad.clone() for name, p in m.policy.model.named_parameters() if p.grad is not None}
    m.policy.model.zero_grad()
    return found


def timeless(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("seconds_") and not math.isnan(value)}


def state_of(m):
    """Return as text all that a step may change, except for the policy.

    Whether q is a is found out only once, and is left out.
    """
    return str({name: value for name, value in m.state_dict().items() if name != "q_is_base"})


# --- the loop


def test_the_loop_of_the_readme_on_a_real_model():
    policy = load("tiny-bios")
    base = policy.around(copy.deepcopy(policy.model).requires_grad_(False))
    women = Contains(any_of=["she", "her"], name="women")
    target = EBM(base, [Moment(women, 0.5)]).fit(n=512, max_new_tokens=48)
    m = Matcher(policy, target, proposal=OfflineProposal(policy, "interval", interval=2))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-4)
    before = digest(policy.model)
    for number in range(1, 4):
        batch = m.draw(n=24, max_new_tokens=48)
        assert len(batch) == 24
        for part in batch.split(10):
            m.loss(part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = m.commit()
        assert metrics["swaps"] == number // 2 and m.running.steps == number
        wanted = {"phi/women", "kl_policy", "kl_policy_stderr", "log_z", "ess", "swapped", "seconds_policy", "length"}
        assert wanted <= metrics.keys()
        error = float(batch.features[:, 0].std()) / 24**0.5
        assert metrics["phi/women_stderr"] == pytest.approx(error)
    assert digest(policy.model) != before and m.proposal.steps == 3


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_a_loop_is_the_trainer(tmp_path, prompts):
    """The loop gives the same parameters and metrics as the trainer for the same seeds."""
    n = 8 if prompts is None else 2
    trainer = job(tmp_path, prompts=prompts, samples_per_context=n, max_steps=5, optim="sgd", learning_rate=0.05,
                  lr_scheduler_type="constant", warmup_steps=0, proposal_criterion="interval",
                  per_device_train_batch_size=4, gradient_accumulation_steps=2)  # fmt: skip
    trainer.train()
    loader, m = trainer.get_train_dataloader(), matcher(proposal={"criterion": "interval"})
    m.policy.model.train()
    optimizer, logged = sgd(m, 0.05), []
    batches = []
    for epoch in range(5):
        loader.set_epoch(epoch)
        batches += list(loader)
    for number in range(5):
        rows = [row for batch in batches[2 * number : 2 * number + 2] for row in batch][::n]
        indices, texts = zip(*rows, strict=True)
        logged.append(step(m, optimizer, list(texts), n, size=4, context_id=indices))
    assert digest(m.policy.model) == digest(trainer.model) != digest(trainer.target.base.model)
    assert digest(m.proposal.snapshot.model) == digest(trainer.proposal.snapshot.model)
    steps = [h for h in trainer.state.log_history if "kl_policy" in h]
    for mine, other in zip(logged, steps, strict=True):
        assert timeless(mine) == {name: other[name] for name in timeless(mine)}


CASES = {
    "gdc++": {},
    "dpg, leave one out": {"objective": "dpg", "baseline": "leave_one_out_context"},
    "on-policy": {"on_policy": True, "objective": "reinforce", "reward": Contains("w3"), "baseline": 0.25},
    "kl_control": KL,
    "alpha": {"objective": "alpha", "alpha": 0.5, "max_return": 0.1, "normalize_alpha": False, "baseline": "mean"},
    "skipping": {"objective": "dpg", "skip_zero_weight": True, "constraints": [Contains("w4")]},
    "a function": {"objective": lambda t: t.log_target_ratio.exp() - t.log_ratio.exp()},
    "entropy": {"objective": "dpg", "entropy_coefficient": 0.3, "constraints": [Contains("w4")]},
}  # fmt: skip


@pytest.mark.parametrize(("case", "size"), [*((case, 3) for case in CASES), ("gdc++", 1), ("kl_control", 8)])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(case, size):
    whole, cut = matcher(**CASES[case]), matcher(**CASES[case])
    whole.loss(draw(whole, PROMPTS[:4], 4)).loss.backward()
    for part in draw(cut, PROMPTS[:4], 4).split(size):
        assert len(part) <= size
        cut.loss(part).loss.backward()
    mine, other = gradients(cut), gradients(whole)
    scale = max(float(g.abs().max()) for g in other.values())
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, other[name], rtol=0, atol=2e-5 * max(scale, 0.1), msg=name)
    found, wanted = timeless(cut.commit()), timeless(whole.commit())
    # js_policy is NaN where a sequence got no forward
    common = found.keys() & wanted.keys()
    assert {*found, *wanted} - common <= {"js_policy", "js_policy_stderr"}
    assert all(found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5) for name in common)


def test_a_function_is_what_its_name_is():
    named, own = matcher(), matcher(objective=lambda t: t.log_target_ratio.exp() - t.log_ratio.exp())
    for m in (named, own):
        m.loss(draw(m)).loss.backward()
    for (name, mine), other in zip(gradients(own).items(), gradients(named).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)


def test_a_function_sees_log_a_and_reward_of_all_sequences():
    seen = []

    def own(terms):
        seen.append((terms.log_base, terms.reward))
        return torch.zeros_like(terms.log_prob)

    m = matcher(objective=own, reward=Contains("w3"), constraints=[Contains("w4")])
    batch = draw(m, n=16)
    m.loss(batch)
    assert 0 < float((batch.inputs["log_target"] > -math.inf).double().mean()) < 1
    ((log_base, reward),) = seen
    torch.testing.assert_close(log_base, m.target.base.log_prob(batch.samples), rtol=0, atol=1e-4)
    assert torch.equal(reward, Contains("w3")(batch.samples))


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_accelerate_divides_once_more(steps):
    """Matcher.loss says this: multiplied by accelerate's accumulation steps, the gradient is the same at 1, 2 and 4."""
    plain, m = matcher(), matcher()
    plain.loss(draw(plain)).loss.backward()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=steps, cpu=True)
    model = accelerator.prepare_model(m.policy.model)
    for part in draw(m).split(8 // steps):
        with accelerator.accumulate(model):
            out = m.loss(part, model)
            accelerator.backward(out.loss * accelerator.gradient_accumulation_steps)
    for (name, mine), other in zip(gradients(m).items(), gradients(plain).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6, msg=name)
    m.commit()


def test_a_wrapped_module_is_what_runs():
    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args, **kwargs):
            self.calls += 1
            return self.module(*args, **kwargs)

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.module, name)

    m = matcher()
    wrapped = Wrapped(m.policy.model)
    for part in draw(m).split(4):
        m.loss(part, wrapped).loss.backward()
    assert wrapped.calls == 2
    m.commit()


# --- several ranks


class TwoRanks:
    """Stand in for rank 0 of two ranks that have drawn the same sequences."""

    rank, size = 0, 2

    def __init__(self):
        self.verdicts = []

    def gather(self, values):
        return torch.cat([values, values])

    def agree(self, mine):
        self.verdicts.append(mine)
        return mine


def test_several_ranks_need_the_wrapped_model():
    ranks = TwoRanks()
    m = matcher(ranks=ranks)
    batch = draw(m)
    with pytest.raises(
        ValueError, match=r"2 ranks take this step together, and without model= the gradients would not"
    ):
        m.loss(batch)
    out = m.loss(batch, m.policy.model)
    assert len(out.weight) == 8
    m.commit()
    assert next(iter(m.running.partitions._of.values())).n == 16
    draw(m)
    m.loss(m.batch, m.policy.model)
    m.commit()
    assert len(ranks.verdicts) == 1


def test_ranks_that_draw_different_numbers_are_refused_on_all_of_them():
    class Other(TwoRanks):
        def gather(self, values):
            return torch.cat([values, values + torch.tensor([0, 1, 2])]) if values.shape == (1, 3) else values

    m = matcher(ranks=Other())
    with pytest.raises(ValueError, match=r"by rank n: 8, 9 and max_new_tokens: 6, 8\. .* equally many prompts"):
        draw(m)
    m.ranks = m._rollouts.ranks = TwoRanks()
    assert len(draw(m)) == 8
    with pytest.raises(ValueError, match="n must be an integer"):  # it is not compared, and no other error hides it
        draw(m, n="8")


def test_two_processes_take_the_steps_of_one(tmp_path):
    """Parameters, Z, checks on fresh samples and the log agree, through DDP and ``Ranks`` of torch.distributed."""
    found = []
    for number in (1, 2):
        out = tmp_path / f"{number}.json"
        done = launch(Path(__file__).parent / "matcher_job.py", str(out), processes=number)
        assert done.returncode == 0, done.stderr[-4000:]
        found.append(json.loads(out.read_text()))
    one, two = found
    assert one["contexts"] == two["contexts"] and len(one["contexts"]) == 4
    for name, values in one["parameters"].items():
        assert two["parameters"][name] == pytest.approx(values, abs=1e-5), name
    for mine, other in zip(two["log"] + two["log ahead"], one["log"] + one["log ahead"], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            if "check" not in name and name not in ("swapped", "swaps", "lag"):
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name
    assert all("proposal_check" in metrics for metrics in two["log"][1:])
    # the sampler runs ahead, so the batches of steps 2 and 3 are drawn before the swap that follows step 1
    for each in found:
        swapped = each["log ahead"][1]["swapped"]
        assert each["lag 0 is the same"] and [step["lag"] for step in each["log ahead"]] == [0, 0, swapped, swapped]
    of_groups(one["groups"], two["groups"])
    assert "averages the gradients of 2 processes, and the matcher's ranks say 1" in two["without ranks"]


def of_groups(one, two):
    """Assert that a group on two ranks is one group, and that both ranks draw the same sequences again."""
    for how in ("keep", "skip"):  # these two draw no sequences again, so one process and two have the same
        for pair in zip(two[how]["log"], one[how]["log"], strict=True):
            mine, other = ({name: x for name, x in each.items() if "scorer/" not in name} for each in pair)
            assert mine == pytest.approx(other, rel=1e-3, abs=1e-4, nan_ok=True)
        assert two[how]["rewards"] == one[how]["rewards"]
        for mine, other in zip(two[how]["weights"], one[how]["weights"], strict=True):
            assert [w for _, w in mine] == pytest.approx([w for _, w in other], abs=1e-6)
    for how, found in two.items():
        assert found["parameters"][0] == found["parameters"][1]
        assert how not in ("keep", "skip") or found["parameters"][0] == pytest.approx(
            one[how]["parameters"][0], abs=1e-4
        )
    assert one["skip"]["log"][0]["n_uniform"] > 0
    for how in ("redraw", "replace"):
        found = two[how]
        for number, (rewards, weights) in enumerate(zip(found["rewards"], found["weights"], strict=True)):
            assert len(rewards) == 18 and found["log"][number]["n_redrawn"] > 0
            groups = {context: {r for c, r in rewards if c == context} for context, _ in rewards}
            for (context, weight), (_, reward) in zip(weights, rewards, strict=True):
                assert (weight != 0) == (len(groups[context]) == 2) and (weight > 0) <= (reward == 1)
        # all ranks draw equally many prompts again, and Z also counts the sequences that only fill up a rank
        assert found["seen"] >= 36 + sum(step["n_redrawn"] for step in found["log"])
    assert any(context >= 100 for step in two["replace"]["rewards"] for context, _ in step)


# --- commit


def test_a_commit_wants_every_sequence_once():
    m = matcher()
    with pytest.raises(RuntimeError, match="there is no batch: call draw"):
        m.commit()
    parts = draw(m).split(3)
    m.loss(parts[0]), m.loss(parts[1])
    with pytest.raises(RuntimeError, match="2 of the batch's 8 sequences have not passed the loss"):
        m.commit()
    with pytest.raises(RuntimeError, match="have passed the loss already"):
        m.loss(parts[0])
    with pytest.raises(RuntimeError, match="have passed the loss already"):
        m.loss(m.batch)
    m.loss(parts[2])
    m.commit()
    with pytest.raises(RuntimeError, match="there is no batch"):
        m.commit()
    with pytest.raises(RuntimeError, match="of a batch that is committed or discarded"):
        m.loss(parts[2])


def test_a_discarded_batch_is_drawn_again():
    m = matcher()
    before = state_of(m)
    first = draw(m, PROMPTS, 2)
    part = first.split(5)[0]
    m.loss(part)
    second = draw(m, PROMPTS, 2)
    assert state_of(m) == before
    assert torch.equal(first.samples.tokens, second.samples.tokens)
    assert all(torch.equal(value, second.inputs[name]) for name, value in first.inputs.items())
    with pytest.raises(RuntimeError, match="of a batch that is committed or discarded"):
        m.loss(part)
    m.loss(second)
    m.commit()
    third = draw(m, PROMPTS, 2)
    assert not torch.equal(third.samples.log_prob, first.samples.log_prob)
    assert state_of(m) != before


def test_a_seed_of_one_s_own():
    one, other = matcher(), matcher(seed=30)
    x, y, z = draw(one).samples, draw(other).samples, draw(other, seed=5).samples
    assert not torch.equal(x.log_prob, y.log_prob) and not torch.equal(y.log_prob, z.log_prob)
    assert torch.equal(draw(one, seed=5).samples.tokens, z.tokens)


def test_an_error_in_a_draw_leaves_all_as_it_was():
    calls = []

    def scorer(texts):
        calls.append(1)
        return [1.0] * len(texts) if len(calls) != 2 else 1 / 0

    m = matcher(constraints=[Scorer(scorer, name="service")])
    optimizer = sgd(m)
    step(m, optimizer)
    before = state_of(m)
    with pytest.raises(RuntimeError, match="'service' raised ZeroDivisionError"):
        draw(m)
    assert state_of(m) == before
    with pytest.raises(RuntimeError, match="there is no batch"):
        m.commit()
    step(m, optimizer)


def test_what_a_device_has_recorded_is_raised_before_anything_is_taken_in(monkeypatch):
    """A fault in any part is found, and the batch is still there, so that it can be looked at."""
    m = matcher(objective="dpg", skip_zero_weight=True, constraints=[Contains("w4")])
    step(m, sgd(m))
    before, outputs, loss = state_of(m), [], LanguageModel.loss

    def recorded():
        raise ValueError("NaN at (sequence 1, position 2)")

    def recording(self, *args, **kwargs):
        out = loss(self, *args, **kwargs)
        outputs.append(out)
        return replace(out, _scores=out._scores.replaced(recorded=(recorded,))) if len(outputs) == 2 else out

    monkeypatch.setattr(LanguageModel, "loss", recording)
    for part in draw(m).split(2):
        m.loss(part)
    with pytest.raises(ValueError, match=r"NaN at \(sequence 1, position 2\)"):
        m.commit()
    assert state_of(m) == before and len(m.batch) == 8 and len(outputs) == 4


@pytest.mark.parametrize(
    ("options", "here"),
    [
        ({}, "[012]"),
        # sequence 5 is the only one of its part that gets a forward, so its place in the forward is 0
        ({"on_policy": True, "skip_zero_weight": True}, "0"),
    ],
)
def test_a_fault_is_named_by_its_place_in_the_batch(options, here):
    """A part has sequences of one length together, and leaves out those of weight 0."""
    m = matcher(objective="reinforce", reward=at_5(1e300), **options)
    part = next(part for part in draw(m).split(3) if 5 in part.places)
    with pytest.raises(ValueError, match=rf"weight A of sequence {here} .*sequence {here} here is sequence 5 of the b"):
        m.loss(part)


def test_a_token_weight_is_of_a_part_s_samples():
    """This also holds where sequences of weight 0 get no forward. A token weight of 2 doubles a sequence's share."""
    m = matcher(objective="dpg", skip_zero_weight=True, constraints=[Contains("w4")])
    torch.manual_seed(0)
    scale = torch.rand(8) * 3
    found = []
    for weighted in (True, False):
        batch = draw(m)
        for part in batch.split(5):
            if weighted:
                w = scale[part.places][:, None].expand_as(part.samples.tokens)
                m.loss(part, token_weight=w).loss.backward()
            else:
                kept = batch.forwarded[part.places]
                assert 0 < int(kept.sum()) < len(kept) or len(part.places) != 5
                inputs = {name: value[kept] for name, value in part.inputs.items()}
                loss = m.policy.loss(part.samples[kept], objective="dpg", reduction="none", **inputs).loss
                ((loss * scale[part.places][kept]).sum() / len(batch)).backward()
        found.append(gradients(m))
        m.discard()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("read", ["commit", "measure_gradient"])
def test_a_recorded_fault_is_named_by_its_place_in_the_batch(monkeypatch, read):
    m, loss = (
        matcher(on_policy=True, objective="reinforce", reward=at_5(1.0), skip_zero_weight=True),
        LanguageModel.loss,
    )

    def recorded():
        raise ValueError("NaN at (sequence 0, position 2)")

    def recording(self, *args, **kwargs):
        out = loss(self, *args, **kwargs)
        return replace(out, _scores=out._scores.replaced(recorded=(recorded,) if float(out.weight[0]) else ()))

    monkeypatch.setattr(LanguageModel, "loss", recording)
    for part in draw(m).split(3):
        m.loss(part)
    with pytest.raises(ValueError, match=r"NaN at .*position 2\) \(sequence 0 here is sequence 5 of the batch\)"):
        getattr(m, read)()


def test_an_error_in_a_check_of_the_proposal_leaves_all_as_it_was():
    """The error comes after the estimates have been updated, so they have to be put back."""
    calls = []

    def scorer(texts):
        calls.append(1)
        return [1.0 if "w4" in text else 0.5 for text in texts] if len(calls) != 3 else 1 / 0

    m = matcher(constraints=[Scorer(scorer, name="service")], check_samples=16)
    optimizer = sgd(m)
    step(m, optimizer)
    before = state_of(m)
    m.loss(draw(m)).loss.backward()
    with pytest.raises(RuntimeError, match="'service' raised ZeroDivisionError"):
        m.commit()
    assert state_of(m) == before
    metrics = m.commit()  # the scorer works again
    assert m.running.steps == m.proposal.steps == 2 and "proposal_check" in metrics
    assert len(m.estimates) == (0 if metrics["swapped"] else 2)


def test_a_gradient_that_weighs_tokens_is_not_measured_as_another():
    m = matcher()
    (part,) = draw(m).split()
    m.loss(part, token_weight=torch.zeros(part.samples.tokens.shape)).loss.backward()
    with pytest.raises(ValueError, match="loss got token_weight"):
        m.measure_gradient()
    m.loss(draw(m)).loss.backward()
    m.measure_gradient()
    assert m.batch.gradient["gradient_norm"] > 0


def test_the_gradient_of_a_policy_that_is_cut_is_not_measured(monkeypatch):
    m = matcher()
    m.loss(draw(m)).loss.backward()
    monkeypatch.setattr(tensor_parallel, "is_cut", lambda model: True)
    with pytest.raises(ValueError, match="does not run on a policy that is sharded or cut among processes"):
        m.measure_gradient()


def test_a_step_that_a_gradient_scaler_skips_is_committed():
    m = matcher()
    optimizer, scaler = sgd(m), torch.amp.GradScaler("cpu")
    before = digest(m.policy.model)
    out = m.loss(draw(m))
    scaler.scale(out.loss * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    assert digest(m.policy.model) == before
    m.commit()
    assert m.running.steps == 1 and len(m.estimates) == 1 and next(iter(m.running.partitions._of.values())).n == 8
    step(m, optimizer)
    assert digest(m.policy.model) != before


def test_another_lambda_starts_all_anew_at_the_commit():
    m = matcher(proposal={"interval": 9})
    optimizer = sgd(m)
    step(m, optimizer)
    before = str(m.running.state_dict())
    m.target.lambda_ = [-3.0]
    batch = draw(m)
    assert str(m.running.state_dict()) == before and len(m.estimates) == 1
    log_w = batch.inputs["log_target"] - batch.samples.log_prob
    assert batch.inputs["log_z"].tolist() == pytest.approx([float(log_w.logsumexp(0)) - math.log(8)] * 8)
    m.loss(batch)
    m.commit()
    assert len(m.estimates) == 1 and m.running.lambda_ == [-3.0] and m.running.steps == 2


# --- contexts


def test_a_context_is_its_prompt_wherever_it_stands():
    m = matcher()
    optimizer = sgd(m)
    step(m, optimizer, ["w1 w2", "w3"], 4)
    ids = list(m.running.partitions._of)
    assert len(ids) == 2
    step(m, optimizer, ["w3", "w7", "w1 w2"], 4)
    assert list(m.running.partitions._of)[:2] == ids and len(m.running.partitions) == 3
    assert sorted(m.running.partitions[i].n for i in m.running.partitions._of) == [4, 8, 8]
    assert len(set(ids)) == 2 and all(-(2**63) <= i < 2**63 for i in ids)
    other = matcher()  # another run gives a prompt the same id, and a prompt that is passed twice is one context
    batch = draw(other, ["w3", "w3"], 2)
    assert batch.samples.context_id.tolist() == [ids[1] if ids[1] in batch.samples.context_id else ids[0]] * 4
    assert set(batch.samples.context_id.tolist()) < set(ids)


def test_the_identity_of_a_context_may_be_given():
    m = matcher()
    step(m, sgd(m), ["w1", "w3"], 4, context_id=[7, -5])
    assert sorted(m.running.partitions._of) == [-5, 7]
    for wrong, error, match in (
        ([1], ValueError, "context_id must have one entry for each of 2 prompts, got 1"),
        ([1.5, 2.0], TypeError, "one integer for each prompt"),
        (["a", "b"], TypeError, r"one integer for each prompt, .* got \['a', 'b'\]"),
        (3, TypeError, "one integer for each prompt, .* got 3"),
        ([0, 2**70], TypeError, r"from -2\*\*63 to 2\*\*63 - 1, got \[0, 1180"),
    ):
        with pytest.raises(error, match=match):
            draw(m, ["w1", "w3"], context_id=wrong)
    with pytest.raises(ValueError, match="rows must have one entry for each of 1 prompts, got 2"):
        draw(m, rows=[{}, {}])


class InGroups:
    """Weigh as dpg does, less the mean weight of a context, which needs all its sequences in one call."""

    whole_contexts = True

    def __init__(self):
        self.seen = []

    def __call__(self, terms: Terms):
        self.seen.append(len(terms.log_prob))
        weight = terms.log_target_ratio.exp().view(-1, 4)
        return (weight - weight.mean(1, keepdim=True)).flatten()


def test_the_sequences_of_a_context_stay_together_where_the_objective_needs_it():
    whole, cut = matcher(objective=InGroups()), matcher(objective=InGroups())
    whole.loss(draw(whole, PROMPTS[:5], 4)).loss.backward()
    batch = draw(cut, PROMPTS[:5], 4)
    with pytest.raises(ValueError, match=r"a context has 4 of them: parts of 3 are too small; split\(4\) or more"):
        batch.split(3)
    parts = batch.split(9)
    assert [len(part) for part in parts] == [8, 8, 4]
    for part in parts:
        ids = part.samples.context_id.tolist()
        assert all(len(set(ids[i : i + 4])) == 1 for i in range(0, len(ids), 4))
        cut.loss(part).loss.backward()
    assert cut.settings.objective.seen == [8, 8, 4]
    for (name, mine), other in zip(gradients(cut).items(), gradients(whole).values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("objective", ["dapo", "gspo", "vargrad"])
def test_a_step_of_a_group_method_is_the_same_in_parts(objective):
    options = {"on_policy": objective == "dapo", "reward": lambda x: x.tokens.sum(1).double()}
    # vargrad needs a log P that is finite everywhere
    if objective == "vargrad":
        options = {"constraints": [Moment(lambda x: x.score_mask.sum(1).double(), 3.0)]}
    grads = []
    for size in (20, 9 if objective == "vargrad" else 3):
        m = matcher(objective=objective, **options)
        for part in draw(m, PROMPTS[:5], 4).split(size):
            m.loss(part).loss.backward()
        m.commit()
        grads.append(gradients(m))
    assert max(float(each.abs().max()) for each in grads[0].values()) > 1e-6
    for (name, mine), other in zip(grads[0].items(), grads[1].values(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=name)


def test_a_group_method_is_refused_without_groups():
    m = matcher(objective="dapo", on_policy=True, reward=lambda x: x.tokens.sum(1).double())
    with pytest.raises(ValueError, match=r"'dapo' compares the sequences of a prompt, and context .* has one"):
        draw(m, PROMPTS[:5], 1)
    m = matcher(objective="dpg", baseline="leave_one_out_context")
    m.proposal.sample = None  # with the identities of the contexts nothing is drawn before the refusal
    with pytest.raises(ValueError, match=r"'dpg' with the baseline .* compares .*, and context 7 has one: draw n >= 2"):
        draw(m, PROMPTS[:2], 1, context_id=[7, 8])
    with pytest.raises(ValueError, match="objective 'dapo' needs reward="):
        matcher(objective="dapo", on_policy=True)


class WithTool:
    """A sampler whose sequences have the output of a tool, which is context, among the tokens that were drawn."""

    version = 0
    TOOL = (3, 6, 4)

    def __init__(self, q):
        self.q = q

    def sample(self, prompts=None, n=1, *, temperature=1.0, **options):
        drawn = self.q.sample(prompts, n, temperature=temperature, **options)
        starts = [each for each in prompts or [""] for _ in range(n)]
        turns = [ids[mine].tolist() for ids, mine in zip(drawn.tokens, drawn.score_mask, strict=True)]
        ids = [[*turn[:1], *self.TOOL, *turn[1:]] for turn in turns]
        mine = [[True] + [False] * 3 + [True] * (len(turn) - 1) for turn in turns]
        how = {"append_eos": False, "score_mask": mine, "temperature": temperature}
        log_q = self.q.log_prob(self.q.samples_of(starts, ids, **how)).detach()
        x = self.q.samples_of(starts, ids, log_prob=log_q, **how)
        return replace(x, context_id=drawn.context_id, version=drawn.version)

    def log_prob(self, samples, **options):
        return self.q.log_prob(samples, **options)

    def load(self, source):
        self.q.load(source)


def test_a_sampler_of_one_s_own_may_draw_around_context():
    """The gradient is that of log pi of the drawn tokens alone, from a plain forward over all of them."""
    sampler = WithTool(LanguageModel(gpt2(), tokenizer()))
    m = matcher(proposal={"interval": 5, "sampler": sampler}, objective="dpg")
    batch = draw(m, PROMPTS, n=4)
    x = batch.samples
    context = (x.attention_mask.bool() & ~x.score_mask)[:, x.prompt_len :]
    assert context.sum(1).tolist() == [3] * len(x)
    out = m.loss(batch)
    out.loss.backward()
    found = gradients(m)
    labels = torch.where(x.score_mask, x.tokens, 0)[:, 1:, None]
    logits = m.policy.model(x.tokens, attention_mask=x.attention_mask,
                            position_ids=(x.attention_mask.cumsum(1) - 1).clamp(min=0)).logits  # fmt: skip
    each = logits[:, :-1].double().log_softmax(-1).gather(-1, labels)[..., 0] * x.score_mask[:, 1:]
    torch.testing.assert_close(each.sum(1).detach(), x.log_prob, atol=1e-5, rtol=0)
    (-(out.weight.detach() * each.sum(1)).mean()).backward()
    for name, expected in gradients(m).items():
        torch.testing.assert_close(found[name], expected, atol=1e-6, rtol=1e-4)
    m.commit()


def test_scorers_see_the_rows():
    seen = []

    def right(x):
        seen.append(x.rows)
        return torch.tensor([float(row["answer"] in text) for row, text in zip(x.rows, x.text, strict=True)])

    rows = [{"prompt": "w1", "answer": "w3"}, {"prompt": "w3", "answer": "w4"}]
    m = matcher(constraints=[Scorer(right, on="samples", name="right")])
    batch = draw(m, [row["prompt"] for row in rows], 3, rows=rows)
    assert [row["answer"] for row in seen[0]] == ["w3"] * 3 + ["w4"] * 3
    part = batch.split(2)[0]
    assert [row["prompt"] for row in part.samples.rows] == [PROMPTS_OF[row["answer"]] for row in part.samples.rows]


PROMPTS_OF = {"w3": "w1", "w4": "w3"}


# --- rewards


@pytest.mark.parametrize(
    "how",
    [
        "the feature",
        "the function",
        "Reward of it",
        "a method",
        "Reward of a method",
        "Moment of a method",
        "a callable",
    ],
)
def test_a_reward_that_is_part_of_the_target_is_scored_once(how):
    """A step of 8 sequences makes 8 calls of the scorer."""
    calls = []

    def score(x):
        calls.append(1)
        return float(x.score_mask.sum())

    def whole(x):
        calls.extend([1] * len(x))
        return x.score_mask.sum(1).double()

    class Model:
        def score(self, x):
            return whole(x)

    # a dataclass can't be hashed, so the matcher must not look it up by its hash
    @dataclass
    class Callable:
        def __call__(self, x):
            return whole(x)

    rm, called = Model(), Callable()
    feature = Scorer(score, on="samples", batched=False, name="score")
    constraints, reward = {
        "the feature": ([Moment(feature, 3.0)], feature),
        "the function": ([whole], whole),
        "Reward of it": ([dmfast.Reward(feature, beta=2.0)], feature),
        "a method": ([rm.score], rm.score),
        "Reward of a method": ([dmfast.Reward(rm.score, 1.0, on="samples")], rm.score),
        "Moment of a method": ([Moment(rm.score, 0.6)], rm.score),
        "a callable": ([called], called),
    }[how]
    m = matcher(constraints=constraints, objective="kl_control", beta=0.3, reward=reward)
    batch = draw(m)
    assert len(calls) == 8
    assert torch.equal(batch.inputs["reward"], batch.samples.score_mask.sum(1).double())
    assert len(m._rollouts.scorers) == 1


@pytest.mark.parametrize("ranks", [None, "two"])
@pytest.mark.parametrize("baseline", ["leave_one_out", "leave_one_out_context"])
def test_an_infinite_return_is_named_by_its_place_in_the_batch(baseline, ranks):
    """A part of the batch would name the first sequence whose baseline averages over it."""
    reward = dmfast.Reward(at_5(2000.0), 1.0, on="samples")  # exp(2000) is infinite
    m = matcher(constraints=[reward], objective=Objective("reinforce_p", baseline=baseline, log_scale=0.0),
                ranks=None if ranks is None else TwoRanks())  # fmt: skip
    before, where = state_of(m), "the batch" if ranks is None else "the batch of rank 0"
    with pytest.raises(ValueError, match=rf"return of sequence 5 of {where} is inf.*it has {{'log_target': 19\d\d\."):
        draw(m)
    assert state_of(m) == before and m.batch is None


def test_finite_returns_whose_sum_is_infinite_are_named_by_the_largest():
    m = matcher(objective="reinforce", baseline="leave_one_out", reward=at_5(1.7e308, 1.5e308))
    with pytest.raises(ValueError, match=r"return of sequence 5 of the batch is 1.7e\+308.*'reward': 1.7e\+308"):
        draw(m)


def at_5(*values):
    """Return a reward that is 0 but for some sequences."""

    def reward(x):
        found = torch.zeros(len(x), dtype=torch.float64)
        found[5 : 5 + len(values)] = torch.tensor(values, dtype=torch.float64)
        return found

    return reward


def test_the_same_method_of_two_objects_is_two_rewards():
    class Model:
        def __init__(self, value):
            self.value = value

        def score(self, x):
            return torch.full((len(x),), self.value)

    one, other = Model(1.0), Model(2.0)
    m = matcher(constraints=[one.score], objective="reinforce", reward=other.score)
    assert draw(m).inputs["reward"].tolist() == [2.0] * 8 and len(m._rollouts.scorers) == 2


# --- several steps on a batch


PPO = {**KL, "on_policy": True, "ppo_epochs": 3, "ppo_clip": 0.1, "baseline": "mean"}


def test_again_serves_so_many_steps():
    m = matcher(**PPO)
    optimizer = sgd(m, 0.5)
    batch = draw(m)
    with pytest.raises(RuntimeError, match="serves no further step"):
        batch.again()
    before = []
    for epoch in range(3):
        assert (batch.epoch, m.running.steps) == (epoch, epoch)
        for part in batch.split(3):
            m.loss(part).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        metrics = m.commit()
        before.append(metrics)
        assert (m.to_repeat is None) == (epoch == 2)
        if epoch < 2:
            other = batch.again()
            assert torch.equal(other.samples.tokens, batch.samples.tokens)
            batch = other
    assert before[0]["clip_fraction"] == 0 < before[2]["clip_fraction"]
    assert m.running.returns[1] == 8 and next(iter(m.running.partitions._of.values())).n == 8
    with pytest.raises(RuntimeError, match="it has served ppo_epochs=3 steps; call draw"):
        batch.again()
    assert m.running.steps == 3 and not torch.equal(draw(m).samples.log_prob, batch.samples.log_prob)


def test_again_is_not_for_a_batch_of_another_lambda():
    m = matcher(**PPO)
    batch = draw(m)
    m.loss(batch)
    m.commit()
    m.target.lambda_ = [0.5]
    assert m.to_repeat is None
    with pytest.raises(RuntimeError, match="lambda has changed"):
        batch.again()


# --- state


@pytest.mark.parametrize(
    "options",
    [{}, {"objective": "dpg", "baseline": "mean", "partition": "step"}, {"check_samples": 16},
     {"objective": "reinforce_p"}, {**PPO, "beta_target_kl": 0.05, "beta_horizon": 40}],
    ids=["gdc++", "mean baseline", "fresh samples", "reinforce_p", "ppo"],
)  # fmt: skip
def test_resumed_is_as_if_never_stopped(options):
    """A state can be taken within a batch that serves three steps, and it survives a file of plain values."""
    prompts = PROMPTS[:4]

    def steps(m, optimizer, n):
        found = []
        for _ in range(n):
            batch = m.to_repeat.again() if m.to_repeat else draw(m, prompts, 4)
            for part in batch.split(6):
                m.loss(part).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(timeless(m.commit()))
        return found

    whole, broken = matcher(**options), matcher(**options)
    logged = steps(whole, sgd(whole), 9)
    steps(broken, sgd(broken), 4)
    draw(broken, prompts, 4)  # this batch is not committed, so the state does not have it
    file = io.BytesIO()
    torch.save({"matcher": broken.state_dict(), "model": broken.policy.model.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = matcher(**options)
    resumed.policy.model.load_state_dict(state["model"])
    resumed.load_state_dict(state["matcher"])
    assert steps(resumed, sgd(resumed), 5) == logged[4:]
    assert digest(resumed.policy.model) == digest(whole.policy.model) != digest(broken.policy.model)
    assert state_of(resumed) == state_of(whole)


def test_a_state_that_does_not_fit_changes_nothing():
    m = matcher()
    step(m, sgd(m))
    state, before = m.state_dict(), state_of(m)
    wrong = [
        (state | {"format": 1}, ValueError, r"the state has the format 1, and this version of dmfast reads 2"),
        ({}, ValueError, "has the format None"),
        (state | {"proposal": None}, ValueError, "one is on-policy and one is not"),
        (state | {"target": state["target"] | {"moment_values": [0.9]}}, ValueError, r"this one gives them \[0.6\]"),
        (state | {"proposal": state["proposal"] | {"model": {}}}, RuntimeError, "another model"),
        (state | {"pool": None}, ValueError, "the state's pool must be a list .* got None"),
        (state | {"pool": [{"features": 1}]}, ValueError, "the state's pool must be a list"),
    ]
    # only a state without a proposal has estimates, and states of older versions have none of the last four
    needed = state.keys() - {"format", "estimates", "seen", "seen_for_z", "objective", "drawn_with"}
    wrong += [(without(state, key), ValueError, f"the state has no {key}; pass what") for key in needed]
    for each, error, match in wrong:
        with pytest.raises(error, match=match):
            m.load_state_dict(each)
        assert state_of(m) == before
    other = matcher()
    other.load_state_dict(without(state, "estimates"))
    assert state_of(other) == before


def test_a_state_of_another_objective_lambda_or_length_is_no_silent_continuation():
    """Without a word, a run of another objective would go on with the first one's mean return, lambda and Z."""
    first = matcher(objective="reinforce", reward=Contains("w3"), baseline="mean")
    step(first, sgd(first))
    state = first.state_dict()
    assert state["running"]["returns"][1] > 0
    other = matcher(objective="dpg")
    other.target.lambda_ = [9.0]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        other.load_state_dict(state)
    said = sorted(str(w.message) for w in found)
    assert len(said) == 2 and said[0].startswith("the checkpoint's lambda of") and "given, [9.0]" in said[0]
    assert "objective was 'reinforce' and is 'dpg', which holds from here on" in said[1]
    assert other.running.returns == (0.0, 0) and other.running.partitions.state_dict()["n"].sum() > 0
    for how, message in (
        ({"max_new_tokens": 5}, "max_new_tokens was 6 in the earlier steps and is 5: Z"),
        ({"temperature": 0.5}, "temperature was 1.0 in the earlier steps and is 0.5: Z"),
    ):
        with pytest.raises(ValueError, match=message):
            other.draw(n=4, **({"max_new_tokens": 6} | how))
    other.target.lambda_ = [0.3]  # with another lambda Z starts anew
    other.draw(n=4, max_new_tokens=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        older = matcher(objective="dpg")
        older.load_state_dict(without(without(state, "objective"), "drawn_with"))
        older.draw(n=4, max_new_tokens=6, temperature=0.5)


def test_a_state_without_estimates_is_refused_on_policy():
    m = matcher(on_policy=True)
    step(m, sgd(m))
    state, before = m.state_dict(), state_of(m)
    for each in (without(state, "estimates"), state | {"estimates": None}):
        each["running"] = each["running"] | {"steps": 7}
        with pytest.raises(ValueError, match="the state has no estimates, and without a proposal"):
            m.load_state_dict(each)
        assert state_of(m) == before


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def test_the_log_has_the_divergence_of_alpha_and_the_returns_that_were_bounded():
    """The proposal is judged by this divergence too. The log of another objective does not have it."""
    alpha, most = 0.25, 0.1
    m = matcher(objective="alpha", alpha=alpha, max_return=most, proposal={"criterion": "alpha", "alpha": alpha})
    optimizer, bounded, passed = sgd(m, 0.5), 0, []
    for _ in range(2):
        out = m.loss(draw(m, n=32))
        count = int((((1 - alpha) * (out.log_target_ratio - out.log_ratio)).expm1() > most).sum())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        passed.append((out.log_prob, out.log_proposal, out.log_target, out.log_z))
        found = m.commit()
        assert found["n_clipped_return"] == found["n_clipped"] == count
        bounded += count
    assert bounded > 0
    scores = [torch.cat(each) for each in zip(*passed, strict=True)]
    # the window's decay of 0.8 weighs the older batch
    recent = torch.tensor([0.8] * 32 + [1.0] * 32, dtype=torch.float64)
    expected = estimate(*scores, sample_weight=recent, alpha=alpha).as_dict()
    for name in ("alpha_policy", "alpha_policy_stderr", "alpha_proposal", "alpha_proposal_stderr"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9)
    check = nearer("alpha", *scores, recent, alpha)
    assert found["proposal_check"] == pytest.approx(check.value, rel=1e-9) and found["swapped"] == (check.value > 0)
    plain = matcher()
    assert not {"alpha_policy", "n_clipped_return"} & step(plain, sgd(plain)).keys()


# --- what is refused


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"objective": "gdc+"}, ValueError, "unknown objective 'gdc\\+'"),
        ({"objective": 3}, TypeError, "must be a name, a dmfast.Objective or a function"),
        ({"baseline": "mean"}, ValueError, "gdc\\+\\+.*constant baseline 1.*got baseline='mean'"),
        ({"objective": Objective("gdc++"), "baseline": "mean"}, ValueError, "constant baseline 1.*got baseline='mean'"),
        ({"objective": Objective("dpg", baseline=1.0), "baseline": 2.0}, ValueError, "has its baseline, beta and"),
        ({"objective": Objective("kl_control", beta=1.0), "beta": 2.0}, ValueError, "has its baseline, beta and"),
        ({"objective": lambda t: t.log_prob, "baseline": 1.0}, ValueError, "baseline=1.0 can't act on it"),
        ({"objective": "reinforce"}, ValueError, "objective 'reinforce' needs reward="),
        ({"objective": "alpha"}, ValueError, "'alpha' needs alpha"),
        ({"alpha": 0.5}, ValueError, "'gdc\\+\\+' does not take alpha"),
        ({"objective": "alpha", "alpha": 1.5, "max_return": 10}, ValueError, "max_return .* below 1; .* alpha=1.5"),
        ({"objective": "alpha", "alpha": 0.5, "max_return": 0}, ValueError, "max_return must be a positive finite num"),
        ({"objective": Objective("alpha", alpha=0.5), "alpha": 0.4}, ValueError, "parameters itself; .*alpha=0.4"),
        ({"objective": lambda t: t.log_prob, "normalize_alpha": False}, ValueError, "normalize_alpha=False can't act"),
        ({"partition": "global"}, ValueError, "'running' or 'step'"),
        ({"max_weight": 0}, ValueError, "max_weight must be positive"),
        ({"max_weight": "4"}, ValueError, "max_weight must be a number, got '4'"),
        ({"baseline": [0.5]}, ValueError, r"baseline must be a number, .*got \[0.5\]"),
        ({"entropy_coefficient": math.nan}, ValueError, "entropy_coefficient must be from -1e30 to 1e30, got nan"),
        ({"entropy_coefficient": 0.1, "skip_zero_weight": True}, ValueError, "every sequence has an entropy bonus"),
        ({"check_samples": -1}, ValueError, "check_samples must be 0 or more"),
        ({"on_policy": True, "check_samples": 8}, ValueError, "on-policy there is none"),
        ({"proposal": {"criterion": "js"}, "skip_zero_weight": True}, ValueError, "use kl or tvd, or fresh samples"),
        ({"ppo_epochs": 2}, ValueError, "ppo_epochs above 1 .* needs"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options, error, match):
    with pytest.raises(error, match=match):
        matcher(**options)


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("kl_control", {"beta_target_kl": 1.0}, "got the function kl_control and on_policy=True"),
        ("reinforce", {"ppo_epochs": 2}, "got the function reinforce and on_policy=True"),
        ("reinforce_p", {"baseline": "mean"}, "an objective that is a function .* baseline='mean' can't act on it"),
    ],
)
def test_a_function_is_not_the_objective_whose_name_it_has(name, options, match):
    def own(terms):
        return terms.log_prob

    own.__name__ = name
    with pytest.raises(ValueError, match=match):
        matcher(on_policy=True, objective=own, **options)


def test_models_that_are_refused():
    m = matcher()
    with pytest.raises(ValueError, match="a copy of another model than policy"):
        Matcher(LanguageModel(gpt2(), tokenizer()), m.target, m.proposal)
    with pytest.raises(ValueError, match="the target would move with it"):
        Matcher(m.target.base, m.target)
    with pytest.raises(ValueError, match="the policy itself draws, and proposal is what draws"):
        Matcher(m.policy, m.target, m.proposal, on_policy=True)
    with pytest.raises(ValueError, match="is not fitted"):
        Matcher(m.policy, EBM(m.target.base, [Moment(Contains("w3"), 0.5)]))


def test_a_policy_without_anything_to_train_is_refused():
    m = matcher()
    adapted = peft.get_peft_model(gpt2(), peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    shared = LanguageModel(adapted, tokenizer())
    Matcher(shared, EBM(shared.base(), [Contains("w3")]))
    view = shared.base()
    adapted.requires_grad_(False)  # PeftModel.from_pretrained leaves it frozen like this
    for target in (m.target, EBM(shared.base(), [Contains("w3")])):
        with pytest.raises(ValueError, match=r"no parameter of .* PeftModel requires a gradient.*is_trainable=True"):
            Matcher(shared, target)
    with pytest.raises(ValueError, match="policy is an AdapterView, which is frozen"):
        Matcher(view, m.target)
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel requires a gradient.*call requires_grad_\(True\)"):
        Matcher(LanguageModel(gpt2().requires_grad_(False), tokenizer()), m.target)


def test_what_is_of_another_type_is_named():
    m = matcher()
    for arguments, match in (
        ((m.policy, None), "target must be a dmfast.EBM, got None"),
        ((m.policy.model, m.target), "policy must be a LanguageModel, got a GPT2LMHeadModel; write LanguageModel"),
        ((m.policy, m.target, "kl"), "proposal must be an OfflineProposal of the policy, or None, got 'kl'"),
    ):
        with pytest.raises(TypeError, match=match):
            Matcher(*arguments)
    batch = draw(m)
    with pytest.raises(TypeError, match=r"size must be an integer, .* got 2\.5"):
        batch.split(2.5)
    with pytest.raises(TypeError, match=r"part must be one of batch\.split.* got a list"):
        m.loss([1])


def test_an_option_of_the_loss_that_the_batch_has_is_refused():
    m = matcher()
    batch = draw(m)
    for options, match in (
        ({"temperature": 0.5}, "set temperature of the loss"),
        ({"objective": "dpg", "reward": None, "backend": "eager"}, "set objective and reward of the loss"),
    ):
        with pytest.raises(TypeError, match=match):
            m.loss(batch, **options)
    m.loss(batch, backend="eager", chunk_bytes=1 << 20)
    m.commit()


def test_a_draw_of_another_length_than_the_fit_is_warned_of_once():
    m = matcher()
    m.target.fit(m.target.base.sample(n=512, max_new_tokens=6, seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(m, max_new_tokens=5)  # dmfast can't know the length of samples that were given to fit
    m.target.fit(n=512, max_new_tokens=6)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        draw(m)
        draw(m, max_new_tokens=5)
        draw(m, max_new_tokens=5)
    mine = [each for each in found if "fitted on samples of up to 6 new tokens" in str(each.message)]
    assert len(mine) == 1 and "max_new_tokens is 5" in str(mine[0].message) and mine[0].filename == __file__


def test_without_a_proposal_rho_is_formed_where_asked():
    """rho follows what the sampler says. For another engine that may differ from what dmfast says."""
    m = matcher(on_policy=None)
    assert m.proposal is not None
    alone = Matcher(m.policy, m.target, on_policy=False)
    out = alone.loss(draw(alone))
    assert bool((out.log_ratio.abs() < 1e-4).all()) and bool((out.log_ratio != 0).any())
    exact = Matcher(m.policy, m.target)
    assert bool((exact.loss(draw(exact)).log_ratio == 0).all())


# --- where it stands


def test_it_needs_no_trainer(tmp_path):
    code = "import dmfast, sys; dmfast.Matcher; assert not {'transformers', 'accelerate', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=tmp_path)
    source = Path(dmfast.__file__).parent
    for name in ("matcher", "batch", "metrics", "running", "settings", "ranks"):
        text = (source / f"{name}.py").read_text()
        assert "torch.distributed" not in text and "transformers import" not in text, name


def test_the_entropy_of_a_step_is_logged_and_the_loss_has_it():
    """It is the mean over all sequences of the step, also those with P = 0. Without a bonus it can be logged too."""
    plain, bonus = (matcher(constraints=[Contains("w4")], entropy_coefficient=c) for c in (0.0, 0.25))
    found = {}
    for m in (plain, bonus):
        parts = draw(m, n=8).split(3)
        outs = [m.loss(part, return_entropy=True) for part in parts]
        found[m] = sum(float(out.loss) for out in outs)
        mean = torch.cat([out.entropy for out in outs]).mean()
        assert m.commit()["entropy"] == pytest.approx(float(mean), rel=1e-9)
    assert found[bonus] == pytest.approx(found[plain] - 0.25 * float(mean), rel=1e-6)
    with pytest.raises(
        TypeError, match="the matcher and its batch set entropy_coefficient of the loss, so it can't be given here"
    ):
        m.loss(draw(m), entropy_coefficient=0.5)
