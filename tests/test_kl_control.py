"""Test KL-control in the trainer, with several steps on a batch and after resuming.

Adaptive beta is compared with its recurrence and with the KL that it is to reach, and PPO's clipping with the gradient
of the clipped surrogate.
"""

from __future__ import annotations

import math

import pytest
import torch
from tabular import Space, kl, one_thread  # noqa: F401
from trainer_job import PROMPTS, StopAt, digest, gpt2, job, tokenizer
from trainer_tools import assert_close, run

import dmfast
from dmfast import LanguageModel, Scorer
from dmfast.objectives import AdaptiveBeta, PPOClip, leave_one_out
from dmfast.training.data import StepSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")

SPACE = Space()
BASE = SPACE.log_prob(SPACE.table(1))
REWARD = torch.randn(SPACE.n, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


# --- adaptive beta


def test_adaptive_beta_is_ziegler_s_recurrence():
    beta = AdaptiveBeta(0.5, target=6.0, horizon=1000)
    wanted = 0.5
    for seen, clipped in ((6.0, 0.0), (6.6, 0.1), (60.0, 0.2), (5.4, -0.1), (0.0, -0.2), (-1.0, -0.2)):
        beta.update(seen, 100)
        wanted *= 1 + clipped * 100 / 1000
        assert beta.value == pytest.approx(wanted, rel=1e-12), seen
    other = AdaptiveBeta(9.0, target=6.0, horizon=1000)
    other.load_state_dict(beta.state_dict())
    assert other.value == beta.value


@pytest.mark.parametrize("wanted", [0.05, 0.3, 1.0])
def test_adaptive_beta_brings_the_exact_policy_to_the_wanted_kl(wanted):
    """The optimum of KL-control is a exp(R/beta)/Z, whose KL to a is known here for every beta."""

    def kl_of(beta):
        return float(kl((BASE + REWARD / beta).softmax(0), BASE.exp()))

    beta = AdaptiveBeta(1.0, wanted, horizon=100)
    for _ in range(600):
        beta.update(kl_of(beta.value), 32)
    assert kl_of(beta.value) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: AdaptiveBeta(0.0, 6.0), "value must be positive"),
        (lambda: AdaptiveBeta(0.1, -1.0), "target must be positive"),
        (lambda: AdaptiveBeta(0.1, 1.0, math.inf), "horizon must be positive and finite"),
        (lambda: AdaptiveBeta(0.1, 1.0).update(math.nan, 1), "kl must be finite"),
        (lambda: AdaptiveBeta(0.1, 1.0, 10).update(0.0, 50), r"n must be below 5 \* horizon = 50"),
        (lambda: PPOClip(0.0), "eps must be between 0 and 1"),
        (lambda: PPOClip(1.0), "eps must be between 0 and 1"),
    ],
)
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# --- clipping


def surrogate(log_pi, log_q, advantage, eps):
    """Return E_q[min(rho d, clip(rho, 1 - eps, 1 + eps) d)], the paper's eq. 7."""
    rho = (log_pi - log_q).exp()
    return (log_q.exp() * torch.minimum(rho * advantage, rho.clamp(1 - eps, 1 + eps) * advantage)).sum()


@pytest.mark.parametrize("eps", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(("backend", "dtype", "rtol"), [("auto", torch.float32, 2e-6), ("eager", torch.float64, 1e-12)])
def test_clipping_is_the_gradient_of_the_clipped_surrogate(backend, dtype, rtol, eps):
    """The gradients agree on all 125 sequences, with KL-control's frozen return, in the kernels and in the oracle."""
    log_q, table = SPACE.log_prob(SPACE.table(2)), SPACE.table(2) + 0.5 * SPACE.table(3)
    advantage = REWARD - 0.4 * (log_q - BASE) - 0.1
    exact = table.clone().requires_grad_()
    (-surrogate(SPACE.log_prob(exact), log_q, advantage, eps)).backward()
    found = table.clone().requires_grad_()
    loss = dmfast.eager.dm_loss if backend == "eager" else dmfast.dm_loss
    out = loss(SPACE.logits(found).to(dtype), SPACE.tokens, log_proposal=log_q, reward=advantage,
               objective=PPOClip(eps), reduction="none")  # fmt: skip
    (out.loss @ log_q.exp()).backward()
    scale = float(exact.grad.abs().max())
    torch.testing.assert_close(found.grad, exact.grad, rtol=0, atol=rtol * scale)
    clipped = PPOClip(eps).clipped(out.log_ratio, advantage)
    assert torch.equal(clipped, out.weight == 0)
    for sign in (-1, 1):  # some of each sign are clipped, and some are not
        assert 0 < int((clipped & (advantage.sign() == sign)).sum()) < int((advantage.sign() == sign).sum())


def test_the_head_s_form_clips_too():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, 8, generator=generator)
    head = torch.randn(11, 8, generator=generator)
    tokens = torch.randint(11, (6, 4), generator=generator)
    inputs = {"log_proposal": dmfast.sequence_log_prob(hidden @ head.T, tokens) + torch.linspace(-1, 1, 6).double(),
              "reward": torch.tensor([1.0, -1, 1, -1, 1, -1]), "objective": PPOClip(0.3)}  # fmt: skip
    grads = []
    for run_ in (dmfast.linear_dm_loss, dmfast.eager.linear_dm_loss):
        leaves = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        out = run_(*leaves, tokens, **inputs)
        out.loss.backward()
        grads.append([leaf.grad for leaf in leaves])
    assert out.weight.eq(0).tolist() == [True, False, False, False, False, True]
    for mine, other in zip(*grads, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_clipping_says_what_it_lacks():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    with pytest.raises(ValueError, match="PPOClip needs reward"):
        dmfast.dm_loss(logits, torch.zeros(2, 3, dtype=torch.int64), objective=PPOClip(), log_proposal=torch.zeros(2))


# --- the trainer


def reward(texts):
    # A reward is never 0, so that no sign depends on rounding.
    return [text.count("w3") - 0.3 * len(text.split()) + 0.45 for text in texts]


PPO = {"objective": "kl_control", "beta": 0.3, "reward": Scorer(reward), "on_policy": True, "ppo_epochs": 3,
       "ppo_clip": 0.1, "learning_rate": 2e-2, "warmup_steps": 0}  # fmt: skip
CUT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
STEERED = {"beta_target_kl": 0.05, "beta_horizon": 40}


@pytest.mark.parametrize(
    ("baseline", "cut"), [(None, {}), (0.2, CUT), ("leave_one_out", {}), ("leave_one_out", CUT), ("mean", CUT)]
)
def test_several_steps_on_a_batch_are_the_clipped_surrogate_s(tmp_path, baseline, cut):
    """Each step's gradient is that of the surrogate in plain torch, with the return frozen at the draw."""
    _, gradients, keep = run(tmp_path, max_steps=6, baseline=baseline, **PPO, **cut)
    base, seen, clipped = LanguageModel(gpt2(), tokenizer()), [], 0
    for number, (model, step, found) in enumerate(zip(keep.models, keep.steps, gradients, strict=True)):
        x, first = step.samples, keep.steps[number - number % 3].samples
        assert torch.equal(x.tokens, first.tokens)
        policy = LanguageModel(model.double(), tokenizer())
        if number % 3 == 0:
            with torch.no_grad():
                log_q = scored(policy, x)
            returns = Scorer(reward)(x) - 0.3 * (log_q - base.log_prob(x))
            b = {None: 0.0, "mean": sum(seen) / len(seen) if seen else 0.0}.get(baseline, baseline)
            b = leave_one_out(returns) if baseline == "leave_one_out" else b
            advantage = (returns - b).detach()
            seen += returns.tolist()
        log_pi = scored(policy, x)
        rho = (log_pi - log_q).exp()
        clipped += int(PPOClip(0.1).clipped(log_pi - log_q, advantage).sum())
        loss = -torch.minimum(rho * advantage, rho.clamp(0.9, 1.1) * advantage).mean()
        policy.model.zero_grad()
        loss.backward()
        assert_close(found, {n: p.grad for n, p in policy.model.named_parameters()}, 3e-4)
    assert clipped > 3
    logged = [h["clip_fraction"] for h in keep.trainer.state.log_history if "clip_fraction" in h]
    assert sum(logged) * 8 == pytest.approx(clipped) and logged[0] == logged[3] == 0


def scored(policy, x):
    """Return log pi in fp64, through which gradients flow."""
    logits, labels = policy.logits(x)
    rows = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (rows * (labels >= 0)).sum(1)


def test_a_batch_adds_once_to_what_is_running(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=6, baseline="mean", **PPO, **STEERED)
    kept = [keep.steps[0], keep.steps[3]]
    log_w = torch.cat([step.inputs["log_target"] - step.samples.log_prob for step in kept])
    partitions = trainer.matcher.running.partitions
    assert partitions[0].n == 16
    assert partitions[0].log_z == pytest.approx(float(log_w.logsumexp(0)) - math.log(16))
    assert trainer.matcher.running.returns[1] == 16
    beta, logged = 0.3, [h for h in trainer.state.log_history if "beta" in h]
    for number, (entry, step) in enumerate(zip(logged, keep.steps, strict=True)):
        assert entry["beta"] == pytest.approx(beta, rel=1e-12)
        log_ratio = step.samples.log_prob - trainer.target.base.log_prob(step.samples)
        assert entry["kl_policy_base"] == pytest.approx(float(log_ratio.mean()), abs=1e-5)
        assert entry["kl_policy_base_stderr"] == pytest.approx(float(log_ratio.std()) / 8**0.5, abs=1e-5)
        if number % 3 == 2:
            beta *= 1 + min(max(float(log_ratio.mean()) / 0.05 - 1, -0.2), 0.2) * 8 / 40
    assert trainer.matcher.running.beta.value == pytest.approx(beta, rel=1e-6) != 0.3


@pytest.mark.parametrize(("stop", "prompts"), [(2, None), (3, PROMPTS), (4, None)])
def test_resumed_within_a_batch_and_between_two(tmp_path, stop, prompts):
    settings = {**PPO, **STEERED, "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "prompts": prompts,
                "baseline": "mean", "samples_per_context": 4}  # fmt: skip
    whole = job(tmp_path / "whole", **settings)
    whole.train()
    broken = job(tmp_path / "broken", callbacks=[StopAt(stop)], **settings)
    broken.train()
    resumed = job(tmp_path / "broken", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digest(resumed.model) == digest(whole.model) != digest(broken.model)
    assert resumed.matcher.running.beta.value == whole.matcher.running.beta.value != 0.3
    for mine, other in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        for key in {"loss", "beta", "clip_fraction", "kl_policy_base", "log_z", "reward"} & other.keys():
            assert repr(mine[key]) == repr(other[key]), key  # log Z is NaN while it is unknown


def test_a_new_run_of_the_same_trainer_draws_a_new_batch(tmp_path):
    trainer, _, keep = run(tmp_path, max_steps=2, **PPO)
    trainer.train()
    assert not torch.equal(keep.steps[2].samples.log_prob, keep.steps[0].samples.log_prob)
    assert keep.steps[2].epoch == 0


@pytest.mark.parametrize("contexts", [4, 7, 9])
def test_every_context_serves_as_many_steps(contexts):
    sampler = StepSampler(contexts, 2, per_device=4, accumulation=2, repeats=3)
    found = list(sampler)
    assert len(found) == len(sampler)
    steps = [found[i : i + 2] for i in range(0, len(found), 2)]
    assert len(steps) == 3 * math.ceil(contexts / 4)
    assert all(steps[i] == steps[i - i % 3] for i in range(len(steps)))
    assert {row for step in steps for batch in step for row in batch} == set(range(contexts))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (PPO | {"on_policy": False}, "ppo_epochs above 1 .* needs on_policy=True"),
        (PPO | {"objective": "gdc++", "beta": None}, "ppo_epochs above 1 .*got 'gdc\\+\\+'"),
        (PPO | {"ppo_epochs": 0}, "ppo_epochs must be positive"),
        (PPO | {"ppo_clip": 1.5}, "eps must be between 0 and 1"),
        (PPO | {"on_policy": False, "ppo_epochs": 1, "beta_target_kl": 1.0}, "beta_target_kl steers"),
        (PPO | {"beta_target_kl": -1.0}, "beta_target_kl must be positive"),
    ],
)
def test_configs_that_are_refused(tmp_path, settings, match):
    with pytest.raises(ValueError, match=match):
        job(tmp_path, **settings)


def test_one_epoch_is_plain_kl_control(tmp_path):
    """Without a second step on a batch there is nothing to clip."""
    plain = run(tmp_path / "plain", max_steps=2, **PPO | {"ppo_epochs": 1})[1]
    tight = run(tmp_path / "tight", max_steps=2, **PPO | {"ppo_epochs": 1, "ppo_clip": 1e-6})[1]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(plain, tight, strict=True) for name in a)


def test_the_example_runs(monkeypatch, capsys):
    import kl_control

    monkeypatch.setattr("sys.argv", ["kl_control.py", "--steps", "4", "--batch", "16", "--samples", "256"])
    kl_control.main()
    assert "the optimum at this beta: E_p[R]" in capsys.readouterr().out
    share, nats = kl_control.optimum(0.5, 0.1)
    p = torch.tensor([1 - share, share], dtype=torch.float64)
    assert nats == pytest.approx(float(kl(p, torch.tensor([0.9, 0.1], dtype=torch.float64))))
    assert share / (1 - share) == pytest.approx(math.exp(2) / 9)
