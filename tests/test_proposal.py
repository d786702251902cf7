"""Test OfflineProposal on a tabular model.

It swaps exactly when the policy is nearer to the target by its criterion. Only the samples since the last swap count. q
is a copy. A failure changes nothing, and a state goes on where it was taken.
"""

from __future__ import annotations

import io
import math

import pytest
import torch
from tabular import (
    Space,
    Target,
    counts,
    js,
    kl,
    one_thread,  # noqa: F401
    soft_target,
    tv,
)
from torch import nn

import dmfast
from dmfast.proposal import CRITERIA, OfflineProposal, nearer

SPACE = Space()
TARGET = soft_target(SPACE.log_prob(SPACE.table(1, 0.5)), SPACE.tokens)
# q is a multiple of 1/1000 everywhere, so that a step of 1,000 sequences has q's exact expectation
COUNTS = counts(SPACE.log_prob(SPACE.table(2, 0.25)).exp(), 1000)
Q = COUNTS / COUNTS.sum().double()
Q_TABLE, P_TABLE = SPACE.table_of(Q), SPACE.table_of(TARGET.p)
ALL = torch.arange(SPACE.n).repeat_interleave(COUNTS)
ALPHA = 0.4
DIVERGENCES = {
    "kl": kl, "tvd": tv, "js": js,
    "alpha": lambda p, q: (1 - (p ** (1 - ALPHA) * q**ALPHA).sum()) / (ALPHA * (1 - ALPHA)),
}  # fmt: skip


class Table(nn.Module):
    """Be a policy: a table of logits, a tied view of it, and a buffer."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table.clone())
        self.tied = self.table
        self.register_buffer("version", torch.zeros((), dtype=torch.int64))

    def set(self, table):
        with torch.no_grad():
            self.table.copy_(table)
            self.version += 1


class Wrapper:
    """Be to the table what LanguageModel is to a model."""

    def __init__(self, model):
        self.model, self.note = model, "kept"


def alpha_of(criterion):
    return ALPHA if criterion == "alpha" else None


def proposal_of(criterion, table=Q_TABLE, **options):
    return OfflineProposal(Table(table), criterion, alpha=alpha_of(criterion), **options)


def log_prob(policy):
    return SPACE.log_prob((policy if isinstance(policy, nn.Module) else policy.model).table.detach())


def step(proposal, which=ALL, target=TARGET, log_z=None):
    """Return one training step's output for sequences from q."""
    table = proposal.policy.table if isinstance(proposal.policy, nn.Module) else proposal.policy.model.table
    return dmfast.eager.dm_loss(
        SPACE.logits(table.detach())[which],
        SPACE.tokens[which],
        log_target=target.log_score[which],
        log_proposal=log_prob(proposal.snapshot)[which],
        log_z=target.z.log() if log_z is None else log_z,
    )


def policies():
    """Yield policies on the way from q to p, away from p, and in random directions, near and far."""
    for s in (-0.4, -0.05, 0.05, 0.4, 0.9, 1.6, 2.5):
        yield torch.lerp(Q_TABLE, P_TABLE, s)
    for seed in range(30):
        yield torch.lerp(Q_TABLE, P_TABLE, 0.3) + (0.2 * (seed % 3) + 0.3) * SPACE.table(100 + seed)


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_decides_as_the_exact_divergences_do(criterion):
    divergence, decisions = DIVERGENCES[criterion], []
    for table in policies():
        proposal = proposal_of(criterion, interval=1)
        proposal.policy.set(table)
        exact = divergence(TARGET.p, Q) - divergence(TARGET.p, SPACE.log_prob(table).exp())
        proposal.update(step(proposal))
        swapped = proposal.maybe_update()
        assert swapped == bool(exact > 0)
        assert proposal.last_check.value == pytest.approx(float(exact), abs=1e-13)
        assert proposal.swaps == int(swapped)
        expected = log_prob(proposal.policy) if swapped else SPACE.log_prob(Q_TABLE)
        assert torch.equal(log_prob(proposal.snapshot), expected)
        decisions.append(swapped)
    assert 8 < sum(decisions) < len(decisions) - 8


def test_criteria_disagree_where_the_divergences_do():
    """A policy that is nearer by KL and farther by TVD is judged by the criterion asked for."""
    found = 0
    for table in policies():
        signs = {c: bool(d(TARGET.p, Q) > d(TARGET.p, SPACE.log_prob(table).exp())) for c, d in DIVERGENCES.items()}
        if signs["kl"] == signs["tvd"]:
            continue
        found += 1
        for criterion in ("kl", "tvd"):
            proposal = proposal_of(criterion, interval=1)
            proposal.policy.set(table)
            proposal.update(step(proposal))
            assert proposal.maybe_update() == signs[criterion]
    assert found > 0


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_paired_standard_error(criterion):
    """Over 300 repetitions the error has the right size. Near q it is far below that of the two divergences apart."""
    table, generator, scores = torch.lerp(Q_TABLE, P_TABLE, 0.1), torch.Generator().manual_seed(3), []
    log_pi, log_q, log_z = SPACE.log_prob(table), SPACE.log_prob(Q_TABLE), TARGET.z.log().expand(2000)
    exact = float(DIVERGENCES[criterion](TARGET.p, Q) - DIVERGENCES[criterion](TARGET.p, log_pi.exp()))
    for _ in range(300):
        which = torch.multinomial(Q, 2000, replacement=True, generator=generator)
        values = log_pi[which], log_q[which], TARGET.log_score[which]
        check = nearer(criterion, *values, log_z, torch.ones(2000), alpha_of(criterion))
        scores.append((check.value - exact) / check.stderr)
    scores = torch.tensor(scores)
    assert abs(float(scores.mean())) < 0.2
    assert 0.8 < float(scores.std()) < 1.2
    alone = getattr(dmfast.estimators.estimate(*values, TARGET.z.log(), alpha=ALPHA), f"{criterion}_policy")
    assert check.stderr < 0.5 * alone.stderr


def test_scale_of_the_score_and_z_drop_out_of_kl():
    log_pi, log_q, log_z = SPACE.log_prob(torch.lerp(Q_TABLE, P_TABLE, 0.5)), Q.log(), TARGET.z.log().expand(SPACE.n)
    plain = nearer("kl", log_pi, log_q, TARGET.log_score, log_z, Q)
    for score_shift, z_shift in ((-900, -900), (900, 900), (0, -40)):
        check = nearer("kl", log_pi, log_q, TARGET.log_score + score_shift, log_z + z_shift, Q)
        assert (check.value, check.stderr) == pytest.approx((plain.value, plain.stderr), rel=1e-9)


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_contexts_count_alike_whatever_their_z(criterion):
    """The check is the difference of the mean divergences over two contexts, one of which has P scaled by e^-12.

    pi is nearer to p in one and farther in the other, by known amounts.
    """
    near, far = (SPACE.log_prob(torch.lerp(Q_TABLE, P_TABLE, s)) for s in (0.2, -0.9))
    divergence, log_q = DIVERGENCES[criterion], SPACE.log_prob(Q_TABLE)
    exact = float(sum(divergence(TARGET.p, Q) - divergence(TARGET.p, pi.exp()) for pi in (near, far))) / 2
    assert exact < 0
    log_z = torch.cat([TARGET.z.log().expand(SPACE.n), TARGET.z.log().expand(SPACE.n) - 12])
    log_target = torch.cat([TARGET.log_score, TARGET.log_score - 12])
    check = nearer(
        criterion, torch.cat([near, far]), log_q.repeat(2), log_target, log_z, Q.repeat(2), alpha_of(criterion)
    )
    assert check.value == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_interval_is_respected(criterion):
    """A policy that is always nearer is taken at every third step and at no other. Microbatches make one step."""
    proposal, generator = proposal_of(criterion, interval=3), torch.Generator().manual_seed(14)
    assert not proposal.maybe_update()
    swapped = []
    for i in range(9):
        proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, 0.1 * (i + 1)))
        which = torch.multinomial(log_prob(proposal.snapshot).exp(), 4000, True, generator=generator)
        proposal.update(*(step(proposal, part) for part in which.split(1500)))
        swapped.append(proposal.maybe_update())
    assert swapped == [False, False, True] * 3
    assert (proposal.steps, proposal.swaps) == (9, 3)


def test_interval_criterion_always_swaps():
    proposal = OfflineProposal(Table(Q_TABLE), "interval", interval=1)
    proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, -1.0))
    proposal.update(step(proposal))
    assert proposal.maybe_update()
    assert proposal.last_check is None


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_nothing_known_means_no_swap(criterion):
    """There is nothing to judge by if P = 0 on every sequence, or if no step came since the last swap."""
    proposal = proposal_of(criterion, interval=1)
    proposal.policy.set(P_TABLE)
    nothing = Target(torch.full_like(TARGET.log_score, -math.inf))
    proposal.update(step(proposal, target=nothing, log_z=0.0))
    assert not proposal.maybe_update()
    proposal.update(step(proposal))
    assert proposal.maybe_update()
    proposal.policy.set(2 * P_TABLE)
    assert not proposal.maybe_update()
    assert proposal.swaps == 1


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_only_samples_since_the_last_swap_count(criterion):
    """After a window of steps that say no and a swap, the next check equals that of a fresh proposal."""
    used, fresh = (proposal_of(criterion, interval=1, decay=1.0) for _ in range(2))
    used.policy.set(torch.lerp(Q_TABLE, P_TABLE, -1.5))
    for _ in range(5):
        used.update(step(used))
        assert not used.maybe_update()
    used.policy.set(Q_TABLE)
    used.swap()
    assert len(used.running) == 0
    for proposal in (used, fresh):
        proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, 0.1))
        proposal.update(step(proposal))
        assert proposal.maybe_update()
    assert used.last_check == fresh.last_check


def test_recent_steps_weigh_more():
    """Old steps said no as clearly as the last one says yes: by decay the last one wins, without decay it loses."""
    for decay, expected in ((0.3, True), (1.0, False)):
        proposal = OfflineProposal(Table(Q_TABLE), "kl", interval=4, decay=decay)
        for s in (-0.3, -0.3, -0.3, 0.5):
            proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, s))
            proposal.update(step(proposal))
        assert proposal.maybe_update() == expected


@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_standard_error_hysteresis(criterion):
    """A policy that is nearer by r standard errors is taken for stderrs below r, and not above."""

    def run(stderrs):
        proposal = proposal_of(criterion, interval=1, stderrs=stderrs)
        proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, 0.3))
        which = torch.multinomial(Q, 50, replacement=True, generator=torch.Generator().manual_seed(12))
        proposal.update(step(proposal, which))
        return proposal.maybe_update(), proposal.last_check

    swapped, check = run(0.0)
    assert swapped
    ratio = check.value / check.stderr
    assert 0.1 < ratio < 100
    assert run(0.99 * ratio)[0]
    assert not run(1.01 * ratio)[0]


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("criterion", DIVERGENCES)
def test_one_sample_passes_no_hysteresis(criterion, alone):
    """The standard error is unknown, and not 0, where only one sequence has P > 0 or where there is only one."""
    hard = Target(torch.where(torch.arange(SPACE.n) == 17, 0.0, -math.inf))
    table = Q_TABLE.clone()
    table[SPACE.rows[17], SPACE.tokens[17]] += 0.1
    which = torch.tensor([17]) if alone else torch.arange(SPACE.n)
    proposal = proposal_of(criterion, interval=1, stderrs=3.0)
    proposal.policy.set(table)
    proposal.update(step(proposal, which, target=hard, log_z=-3.0))
    assert not proposal.maybe_update()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_best_only(criterion):
    """A swap needs a divergence below that of every earlier swap, which is then the new best."""
    name = "kl" if criterion == "interval" else criterion
    exact = float(DIVERGENCES[name](TARGET.p, SPACE.log_prob(torch.lerp(Q_TABLE, P_TABLE, 0.3)).exp()))
    for best, expected in ((exact - 1e-6, False), (exact + 1e-6, True), (math.inf, True)):
        proposal = proposal_of(criterion, interval=1, best_only=True)
        proposal.best = best
        proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, 0.3))
        proposal.update(step(proposal))
        assert proposal.maybe_update() == expected
        assert proposal.best == (pytest.approx(exact, rel=1e-9) if expected else best)
        assert proposal.swaps == int(expected)


class Remembers(Table):
    """Be a table that has a buffer which no state_dict has, and a state that is not a tensor."""

    def __init__(self, table):
        super().__init__(table)
        self.register_buffer("scale", torch.ones(()), persistent=False)

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}


def test_all_that_a_model_computes_with_is_copied():
    policy = Remembers(Q_TABLE)
    proposal = OfflineProposal(policy, interval=1)
    policy.scale.fill_(7.0)
    assert float(proposal.snapshot.scale) == 1.0
    proposal.swap()
    assert float(proposal.snapshot.scale) == 7.0
    state = proposal.state_dict()
    assert "scale" not in state["model"] and all(isinstance(x, torch.Tensor) for x in state["model"].values())
    proposal.load_state_dict(state)


@pytest.mark.parametrize("wrapped", [False, True])
def test_snapshot_is_a_frozen_copy(wrapped):
    model = Table(Q_TABLE)
    model.table.grad = torch.ones_like(model.table)
    policy = Wrapper(model) if wrapped else model
    proposal = OfflineProposal(policy, interval=1)
    inner = proposal.snapshot.model if wrapped else proposal.snapshot
    assert type(proposal.snapshot) is type(policy)
    assert inner is not model
    assert not any(p.requires_grad or p.grad is not None for p in inner.parameters())
    assert inner.table is inner.tied
    assert model.table.requires_grad
    assert bool((model.table.grad == 1).all())
    assert not wrapped or (policy.model is model and proposal.snapshot.note == "kept")

    model.set(torch.lerp(Q_TABLE, P_TABLE, 0.7))
    torch.testing.assert_close(log_prob(proposal.snapshot).exp(), Q, rtol=1e-13, atol=0)
    proposal.update(step(proposal))
    assert proposal.maybe_update()
    swapped = log_prob(policy)
    assert torch.equal(log_prob(proposal.snapshot), swapped)
    assert int(inner.version) == 1
    assert (proposal.snapshot.model if wrapped else proposal.snapshot) is inner
    assert model.table.data_ptr() != inner.table.data_ptr()
    model.set(Q_TABLE)
    assert torch.equal(log_prob(proposal.snapshot), swapped)
    assert model.table.requires_grad
    assert not inner.table.requires_grad


def everything(proposal):
    state = proposal.state_dict()
    return {k: v for k, v in state.items() if k not in ("model", "running")}, state["model"], state["running"]["steps"]


def assert_same(a, b):
    (scalars, model, steps), (scalars_b, model_b, steps_b) = a, b
    assert scalars == scalars_b
    assert all(torch.equal(model[k], model_b[k]) for k in model.keys() | model_b.keys())
    assert len(steps) == len(steps_b)
    assert all(torch.equal(x, y) for x, y in zip(steps, steps_b, strict=True))


def test_what_fails_changes_nothing():
    proposal = OfflineProposal(Table(Q_TABLE), "kl", interval=2)
    proposal.policy.set(torch.lerp(Q_TABLE, P_TABLE, 0.5))
    proposal.update(step(proposal))
    before = everything(proposal)
    no_target = dmfast.eager.dm_loss(
        SPACE.logits(Q_TABLE), SPACE.tokens, log_proposal=Q.log(), reward=Q, objective="reinforce"
    )
    for bad in ((no_target,), (step(proposal), no_target)):
        with pytest.raises(ValueError, match="log_target and log_z"):
            proposal.update(*bad)
        assert_same(everything(proposal), before)

    proposal.update(step(proposal))
    before = everything(proposal)
    table = proposal.policy.table
    for broken in (nn.Parameter(torch.zeros(2, 5)), None):
        proposal.policy.table = broken
        with pytest.raises(RuntimeError, match="parameters"):
            proposal.maybe_update()
        assert_same(everything(proposal), before)
    proposal.policy.table = table
    assert proposal.maybe_update()

    before = everything(proposal)
    good = proposal.state_dict()
    for error, bad in (
        (RuntimeError, good | {"model": {"table": torch.zeros(2, 5)}}),
        (RuntimeError, good | {"model": good["model"] | {"table": torch.zeros(2, 5)}}),
        (KeyError, {k: v for k, v in good.items() if k != "best"} | {"steps": 99}),
        (KeyError, good | {"running": {}, "steps": 99}),
    ):
        with pytest.raises(error):
            proposal.load_state_dict(bad)
        assert_same(everything(proposal), before)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("kl, tvd", {"criterion": "nothing"}),
        ("criterion 'alpha' needs alpha", {"criterion": "alpha"}),
        ("criterion 'kl' does not take alpha, that of the divergence, got 0.5", {"alpha": 0.5}),
        *(("alpha must be a number that is finite", {"criterion": "alpha", "alpha": x}) for x in (math.nan, "half")),
        *(("interval must be an integer, 1 step or more", {"interval": x}) for x in (0, 2.5, math.nan, "5")),
        *(("stderrs must be a number, 0 or more", {"stderrs": x}) for x in (-1.0, math.nan, math.inf)),
        ("decay", {"decay": 0.0}),
    ],
)
def test_bad_arguments(name, kwargs):
    with pytest.raises(ValueError, match=name):
        OfflineProposal(Table(Q_TABLE), **kwargs)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_goes_on_after_a_break(criterion):
    """20 steps that a new object takes up from a file in the middle of a window are bitwise the same."""
    generator = torch.Generator().manual_seed(13)

    def make(table):
        return proposal_of(criterion, table, interval=3, best_only=True, decay=0.9)

    straight, resumed = make(Q_TABLE), make(Q_TABLE)
    swaps = []
    for i in range(20):
        if i == 10:
            buffer = io.BytesIO()
            state = resumed.state_dict()
            resumed.running.clear()
            resumed.swap()  # the state is a copy, so this must not change it
            torch.save(state, buffer)
            buffer.seek(0)
            # a run restores the policy from a checkpoint of its own
            resumed = make(straight.policy.table.detach())
            resumed.policy.load_state_dict(straight.policy.state_dict())
            resumed.load_state_dict(torch.load(buffer, weights_only=True))
        table = torch.lerp(Q_TABLE, P_TABLE, 0.04 * (i + 1)) + 0.1 * SPACE.table(200 + i)
        which = torch.multinomial(log_prob(straight.snapshot).exp(), 400, replacement=True, generator=generator)
        for proposal in (straight, resumed):
            proposal.policy.set(table)
            proposal.update(step(proposal, which))
        swaps.append(straight.maybe_update())
        assert resumed.maybe_update() == swaps[-1]
        assert_same(everything(straight), everything(resumed))
        assert i % 3 != 2 or resumed.last_check == straight.last_check
    assert sum(swaps[:10]) >= 1
    assert sum(swaps[10:]) >= 1
