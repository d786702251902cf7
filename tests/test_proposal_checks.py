"""Test how the proposal is checked on fresh samples.

The check is compared with exact divergences. Its cost is known, it does not touch the training, and it is known how
often noise alone passes k standard errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_proposal import ALL, DIVERGENCES, P_TABLE, Q_TABLE, SPACE, TARGET, Q, Table, policies
from torch import nn
from trainer_job import PROMPTS, digest, gpt2, job, tokenizer
from trainer_tools import Keep, one_thread  # noqa: F401

import dmfast
from dmfast import Contains, OfflineProposal, Scorer
from dmfast.batch import Prompts, SamplingOptions
from dmfast.estimators import PartitionFunction

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")


def scores(table, which=ALL, log_z=None):
    """Return what ``fresh`` gives for sequences of q."""
    log_z = TARGET.z.log() if log_z is None else log_z
    return SPACE.log_prob(table)[which], SPACE.log_prob(Q_TABLE)[which], TARGET.log_score[which], log_z


def after_a_step(criterion, table, *, says, **options):
    """Return a proposal with a step behind it whose sequences say that pi is nearer, or that it is not."""
    proposal = OfflineProposal(Table(Q_TABLE), criterion, interval=1, **options)
    then = torch.lerp(Q_TABLE, P_TABLE, 0.5 if says else -0.5)
    log_prob, log_proposal, log_target, log_z = scores(then)
    out = dmfast.eager.dm_loss(SPACE.logits(then)[ALL], SPACE.tokens[ALL], log_target=log_target,
                               log_proposal=log_proposal, log_z=log_z)  # fmt: skip
    torch.testing.assert_close(out.log_prob, log_prob)
    proposal.update(out)
    proposal.policy.set(table)
    return proposal


@pytest.mark.parametrize("criterion", ["kl", "tvd", "js"])
def test_fresh_samples_decide_as_the_exact_divergences_do(criterion):
    """Fresh samples decide, whatever the training steps say."""
    divergence, decisions = DIVERGENCES[criterion], []
    for table in policies():
        exact = float(divergence(TARGET.p, Q) - divergence(TARGET.p, SPACE.log_prob(table).exp()))
        proposal = after_a_step(criterion, table, says=exact < 0)
        assert proposal.maybe_update(fresh=lambda table=table: scores(table)) == (exact > 0)
        assert proposal.last_check.value == pytest.approx(exact, abs=1e-13)
        decisions.append(exact > 0)
        assert after_a_step(criterion, table, says=exact < 0).maybe_update() == (exact < 0)
    assert 8 < sum(decisions) < len(decisions) - 8


@pytest.mark.parametrize("criterion", ["kl", "tvd", "js", "interval"])
def test_the_best_so_far_is_that_of_the_fresh_samples(criterion):
    table, name = torch.lerp(Q_TABLE, P_TABLE, 0.3), "kl" if criterion == "interval" else criterion
    exact = float(DIVERGENCES[name](TARGET.p, SPACE.log_prob(table).exp()))
    for best, expected in ((exact - 1e-6, False), (exact + 1e-6, True)):
        proposal = after_a_step(criterion, table, says=True, best_only=True)
        proposal.best = best
        assert proposal.maybe_update(fresh=lambda: scores(table, log_z=float(TARGET.z.log()))) == expected
        assert proposal.best == (pytest.approx(exact, rel=1e-9) if expected else best)


@pytest.mark.parametrize("criterion", ["kl", "interval"])
def test_fresh_samples_are_drawn_when_a_check_needs_them_and_only_then(criterion):
    proposal, asked = OfflineProposal(Table(Q_TABLE), criterion, interval=3), []
    for step in range(7):
        proposal.steps += 1
        proposal.maybe_update(fresh=lambda step=step: asked.append(step) or scores(Q_TABLE))
    assert asked == ([2, 5] if criterion == "kl" else [])
    assert proposal.swaps == (0 if criterion == "kl" else 2)


def test_fresh_samples_that_do_not_fit_change_nothing():
    table = torch.lerp(Q_TABLE, P_TABLE, 0.5)
    log_prob, log_proposal, log_target, log_z = scores(table)
    proposal = after_a_step("kl", table, says=True)
    for bad in (
        (log_prob[1:], log_proposal, log_target, log_z),
        (log_prob, log_proposal, log_target, log_z.expand(3)),
        (log_prob[:, None], log_proposal[:, None], log_target[:, None], log_z),
    ):
        with pytest.raises(ValueError, match=r"\(N,\) each, and log Z, \(N,\) or a number; got the shapes"):
            proposal.maybe_update(fresh=lambda bad=bad: bad)
        assert proposal.swaps == 0 and len(proposal.running) == 1 and proposal.last_check is None
    for i, value in ((0, math.inf), (1, -math.inf), (1, math.nan), (2, math.nan), (2, math.inf)):
        bad = [log_prob.clone(), log_proposal.clone(), log_target.clone(), log_z]
        bad[i][0] = value
        with pytest.raises(ValueError, match="no check can rest on that"):
            proposal.maybe_update(fresh=lambda bad=bad: bad)
        assert proposal.swaps == 0 and len(proposal.running) == 1 and proposal.last_check is None
    assert proposal.maybe_update(fresh=lambda: (log_prob.float(), log_proposal, log_target, log_z.expand_as(log_prob)))


# --- in the trainer


def finished(out, *, keep=None, **wanted):
    """Return a finished job, which checks every second step."""
    callbacks = [] if keep is None else [keep]
    trainer = job(out, callbacks=callbacks, **({"max_steps": 6, "proposal_interval": 2} | wanted))
    if keep is not None:
        keep.trainer = trainer
    trainer.train()
    return trainer


def logged(trainer, name):
    return [h[name] for h in trainer.state.log_history if name in h]


@pytest.mark.parametrize("prompts", [None, PROMPTS])
def test_checks_on_fresh_samples_leave_the_training_s_alone(tmp_path, prompts):
    """Sequences, Z, gradients and parameters are the same to the bit, as long as q is the same."""
    never = {"proposal_stderrs": 1e9, "prompts": prompts, "samples_per_context": 4 if prompts else None}
    keeps = Keep(), Keep()
    without = finished(tmp_path / "without", keep=keeps[0], **never)
    with_checks = finished(tmp_path / "with", keep=keeps[1], proposal_check_samples=40, **never)
    for one, other in zip(keeps[0].steps, keeps[1].steps, strict=True):
        assert torch.equal(one.samples.tokens, other.samples.tokens)
        assert one.inputs.keys() == other.inputs.keys()
        assert all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
    assert digest(without.model) == digest(with_checks.model)
    assert without.proposal.last_check != with_checks.proposal.last_check
    assert logged(without, "log_z") == logged(with_checks, "log_z")
    assert "seconds_check" not in without.state.log_history[0]
    assert len(logged(with_checks, "seconds_check")) == 6


def test_the_trainer_s_check_is_that_of_the_samples_that_it_drew(tmp_path):
    """Its verdict follows from the samples' tokens and the three models alone."""
    seen, criterion = [], "kl"
    # the steps are large, so that pi comes nearer to p on any machine, whatever its rounding lets them draw
    trainer = job(tmp_path, max_steps=9, proposal_interval=3, per_device_train_batch_size=128, lambda_=3.0,
                  proposal_criterion=criterion, proposal_check_samples=256)  # fmt: skip
    draw, fresh = dmfast.LanguageModel.sample, trainer.matcher._fresh

    def check(*step):
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dmfast.LanguageModel, "sample",
                          lambda self, *a, **k: drawn.append(draw(self, *a, **k)) or drawn[-1])  # fmt: skip
            found = fresh(*step)
        (x,) = drawn
        assert len(x) == 256
        log_q = trainer.proposal.snapshot.log_prob(x)
        log_target = trainer.target.base.log_prob(x) + 3.0 * Contains("w3")(x)
        for mine, wanted in zip(found, (trainer.policy.log_prob(x), log_q, log_target), strict=False):
            torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)
        z = PartitionFunction()
        z.load_state_dict(step[0].partitions[0].state_dict())
        before = z.log_z
        z.update(found[2], found[1])
        assert found[3].tolist() == pytest.approx([z.log_z] * 256) and z.log_z != before
        seen.append((x, found))
        return found

    trainer.matcher._fresh = check
    trainer.train()
    assert len(seen) == 3 and trainer.proposal.swaps > 0
    assert len({str(x.tokens.tolist()) for x, _ in seen}) == 3
    checks = logged(trainer, "proposal_check")[::3]
    for (_, found), value, swapped in zip(seen, checks, logged(trainer, "swapped")[2::3], strict=True):
        verdict = dmfast.proposal.nearer(criterion, *found, torch.ones(256))
        assert value == pytest.approx(verdict.value, abs=1e-12) and swapped == (verdict.value > 0)


@pytest.mark.parametrize("never_positive", [False, True])
def test_what_a_check_costs(tmp_path, never_positive, monkeypatch):
    """q draws N sequences, and a and pi score them. a scores none while q still is a, and neither does where P = 0."""
    drawn, scored = [], []
    draw, log_prob = dmfast.LanguageModel.sample, dmfast.LanguageModel.log_prob
    constraints = [Scorer(lambda x: torch.zeros(len(x)), name="never")] if never_positive else None
    trainer = job(tmp_path, max_steps=4, proposal_check_samples=24, sampling_batch_size=8, patience_zero=9,
                  constraints=constraints, proposal_criterion="kl")  # fmt: skip
    names = {id(trainer.policy): "pi", id(trainer.proposal.snapshot): "q", id(trainer.target.base): "a"}

    def drawing(self, *args, **options):
        drawn.append(names[id(self)])
        return draw(self, *args, **options)

    def scoring(self, x, **options):
        scored.append((names[id(self)], len(x)))
        return log_prob(self, x, **options)

    monkeypatch.setattr(dmfast.LanguageModel, "sample", drawing)
    monkeypatch.setattr(dmfast.LanguageModel, "log_prob", scoring)
    costs, fresh = [], trainer.matcher._fresh

    def check(*step):
        drawn.clear(), scored.clear()
        found = fresh(*step)
        costs.append((list(drawn), list(scored)))
        return found

    trainer.matcher._fresh = check
    trainer.train()
    if never_positive:
        assert costs == [(["q"], [("pi", 0)])] * 2
        return
    assert costs[0] == (["q"], [("pi", 24)])
    trainer.proposal.swap()
    costs.clear()
    check(trainer.matcher.running, Prompts(), SamplingOptions(6))
    assert costs == [(["q"], [("a", 24), ("pi", 24)])]


def test_contexts_of_a_check(tmp_path):
    """A check takes N / samples_per_context prompts, others each time, and each has its own Z."""
    trainer = job(tmp_path, prompts=PROMPTS, samples_per_context=4, proposal_check_samples=12, max_steps=8)
    seen, sample = [], trainer.proposal.snapshot.sample

    def drawing(prompts, n, **options):
        seen.append((prompts, n))
        return sample(prompts, n, **options)

    trainer.matcher.running.steps = 1
    trainer.proposal.snapshot.sample = drawing
    for trainer.matcher.running.steps in range(1, 9):
        log_prob, log_proposal, log_target, log_z = trainer.matcher._fresh(
            trainer.matcher.running, Prompts(), SamplingOptions(6)
        )
        assert len(log_prob) == 12
        ratio = (log_target - log_proposal).view(3, 4)
        torch.testing.assert_close(log_z.view(3, 4), (ratio.logsumexp(1, keepdim=True) - math.log(4)).expand(3, 4))
    assert all(len(set(prompts)) == 3 and n == 4 for prompts, n in seen)
    assert {prompt for prompts, _ in seen for prompt in prompts} == set(PROMPTS)


def test_resumed_runs_check_on_the_same_fresh_samples(tmp_path):
    settings = {"proposal_check_samples": 32, "save_strategy": "steps", "save_steps": 3}
    whole = finished(tmp_path / "whole", **settings)
    first = finished(tmp_path / "cut", **(settings | {"max_steps": 3}))
    assert first.state.global_step == 3
    resumed = job(tmp_path / "cut", **({"max_steps": 6, "proposal_interval": 2} | settings))
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(whole.model)
    assert logged(resumed, "proposal_check") == logged(whole, "proposal_check")
    assert whole.proposal.swaps > 0


def test_fresh_samples_make_up_for_skipped_forwards(tmp_path):
    """The criterion js needs log pi also where P = 0, which training steps lack then."""
    settings = {"skip_zero_weight": True, "proposal_criterion": "js", "objective": "dpg",
                "constraints": [Contains("w4")], "max_new_tokens": 3}  # fmt: skip
    with pytest.raises(ValueError, match="proposal_check_samples"):
        job(tmp_path, **settings)
    trainer = finished(tmp_path, **settings, proposal_check_samples=64)
    assert all(math.isfinite(value) for value in logged(trainer, "proposal_check"))
    with pytest.raises(ValueError, match="proposal_check_samples must be 0 or more, got -1"):
        job(tmp_path, proposal_check_samples=-1)


# --- hysteresis


def indifferent(criterion):
    """Return a table as near to p as q is by the criterion: some way towards p, and some way off."""
    divergence = DIVERGENCES[criterion]

    def off(much):
        return torch.lerp(Q_TABLE, P_TABLE, 0.2) + much * SPACE.table(55)

    def gain(much):
        return float(divergence(TARGET.p, Q) - divergence(TARGET.p, SPACE.log_prob(off(much)).exp()))

    low, high = 0.0, 2.0
    assert gain(low) > 0 > gain(high)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return off(low)


@pytest.mark.parametrize("criterion", ["kl", "tvd", "js"])
@pytest.mark.parametrize("k", [0.0, 1.0, 2.0])
def test_noise_alone_swaps_as_often_as_the_normal_tail_says(criterion, k):
    """With pi as near to p as q, k standard errors let P(normal > k) of the checks pass."""
    table, n, repetitions = indifferent(criterion), 1000, 2000
    generator = torch.Generator().manual_seed(4)
    drawn = torch.multinomial(Q, n * repetitions, replacement=True, generator=generator).view(repetitions, n)
    log_pi, log_q, log_z = SPACE.log_prob(table), SPACE.log_prob(Q_TABLE), TARGET.z.log()
    proposal, swaps = OfflineProposal(nn.Linear(1, 1), criterion, interval=1, stderrs=k), 0
    for which in drawn:
        proposal.steps += 1
        swaps += proposal.maybe_update(
            fresh=lambda which=which: (log_pi[which], log_q[which], TARGET.log_score[which], log_z)
        )
    assert proposal.swaps == swaps
    tail = 0.5 * math.erfc(k / math.sqrt(2))
    # the bound is four standard errors of the count, and what the skewness of 1,000 terms does to the tail
    assert abs(swaps / repetitions - tail) < 4 * math.sqrt(tail * (1 - tail) / repetitions) + 0.01


# --- q on another device


def tensors(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]


def test_the_copy_is_made_on_its_device_and_nowhere_else():
    """The other device is meta, which holds no values. A tied parameter stays one."""
    policy = Table(Q_TABLE)
    policy.table.grad = torch.ones_like(policy.table)
    proposal = OfflineProposal(policy, interval=1, device="meta")
    assert all(x.device.type == "cpu" for _, x in tensors(policy)) and policy.table.requires_grad
    assert [(n, x.shape, x.dtype, x.device.type) for n, x in tensors(proposal.snapshot)] == [
        (n, x.shape, x.dtype, "meta") for n, x in tensors(policy)
    ]
    assert proposal.snapshot.table is proposal.snapshot.tied
    assert not any(p.requires_grad or p.grad is not None for p in proposal.snapshot.parameters())
    proposal.swap()
    assert proposal.swaps == 1 and proposal.snapshot.table.device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_copy_on_a_named_device_shares_nothing(device):
    policy = Table(Q_TABLE)
    proposal = OfflineProposal(policy, interval=1, device=device)
    for (_, mine), (_, other) in zip(tensors(proposal.snapshot), tensors(policy), strict=True):
        assert mine.data_ptr() != other.data_ptr() and torch.equal(mine, other)
    policy.set(P_TABLE)
    assert torch.equal(proposal.snapshot.table, Q_TABLE)
    proposal.swap()
    assert torch.equal(proposal.snapshot.table, P_TABLE) and int(proposal.snapshot.version) == 1


def test_samples_come_back_on_the_policy_s_device():
    """The policy is moved to meta, whose tensors hold no values; q draws as before."""
    policy = dmfast.LanguageModel(gpt2(), tokenizer())
    wanted = policy.sample(n=4, max_new_tokens=5, seed=1)
    proposal = OfflineProposal(policy, device="cpu")
    x = proposal.sample(n=4, max_new_tokens=5, seed=1)
    assert torch.equal(x.tokens, wanted.tokens) and torch.equal(x.log_prob, wanted.log_prob)
    policy.model.to("meta")
    x = proposal.sample(n=4, max_new_tokens=5, seed=1)
    moved = {name: value for name, value in vars(x).items() if isinstance(value, torch.Tensor)}
    assert {name: value.device.type for name, value in moved.items()} == dict.fromkeys(
        ["tokens", "attention_mask", "score_mask", "log_prob", "context_id", "version"], "meta"
    )
    assert all(value.shape == getattr(wanted, name).shape for name, value in moved.items())
    assert x.prompt_len == wanted.prompt_len and x.temperature == wanted.temperature


def test_the_trainer_s_q_on_a_named_device(tmp_path):
    """The run is the same to the bit, and the trainer takes q's samples and parameters from any device."""
    here = finished(tmp_path / "here", proposal_check_samples=32)
    there = finished(tmp_path / "there", proposal_check_samples=32, proposal_device="cpu")
    assert digest(there.model) == digest(here.model) and there.proposal.swaps == here.proposal.swaps > 0
    assert digest(there.proposal.snapshot.model) == digest(here.proposal.snapshot.model)
    away = job(tmp_path / "away", proposal_device="meta")
    assert away.proposal.snapshot.device.type == "meta" and away.policy.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_q_on_the_cpu_beside_a_policy_on_a_gpu(tmp_path):
    trainer = finished(tmp_path, proposal_check_samples=32, proposal_device="cpu", use_cpu=False)
    assert trainer.policy.device.type == "cuda" and trainer.proposal.snapshot.device.type == "cpu"
    assert trainer.proposal.swaps > 0
    x = trainer.proposal.sample(n=8, max_new_tokens=6, seed=0)
    assert x.tokens.device.type == "cuda"
    trainer.proposal.swap()
    log_q = trainer.proposal.snapshot.log_prob(x.to("cpu"))
    torch.testing.assert_close(log_q, trainer.policy.log_prob(x).cpu(), rtol=0, atol=1e-3)
