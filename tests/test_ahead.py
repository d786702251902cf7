"""Test sampling that runs ahead.

It must be known which q draws which batch, however long anything takes. The tests also look at what is lost and
repeated, at checkpoints, and at a copy of the policy in a process of its own.
"""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import random
import signal
import threading
import time
import weakref

import pytest
import torch
from engine_stand_in import StandIn
from test_engines import trained
from test_matcher import matcher, sgd, step, timeless
from test_models import PAD, lm, same, tok
from test_sampling import moved
from trainer_job import StopAt, digest, gpt2, tokenizer
from transformers import TrainerCallback

from dmfast import DMConfig, LanguageModel, OfflineProposal
from dmfast.sampling import AsyncSampler, EngineError, HTTPSampler, Mixture, ProcessSampler, Prompted, Sampler
from dmfast.training import checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values", "ignore:.*from that sample alone")

PROMPTS = ["w1 w2", "w3", "w4 w5 w6", "w7", "w0 w0", "w2"]


class Engine:
    """Hold a model of its own that a thread may call, note what it is asked for, and take its time."""

    def __init__(self, wait=lambda call: None):
        self.model, self.version, self.wait = None, 0, wait
        self.calls, self.loads, self.busy, self.gone = [], 0, 0, False
        self.lock = threading.Lock()  # several threads may wait at once, but the model runs one forward at a time

    def sample(self, prompts=None, n=1, **options):
        self.busy += 1
        try:
            self.calls.append((options["seed"], self.version, prompts, n))
            self.wait(len(self.calls))
            with self.lock:
                self.model.version = self.version
                return self.model.sample(prompts, n, **options)
        finally:
            self.busy -= 1

    def log_prob(self, samples, *, batch_size=None):
        return self.model.log_prob(samples, batch_size=batch_size).detach()

    def load(self, source):
        assert not self.busy, "a load must wait for what is being drawn"
        if self.gone:
            raise ConnectionError("the engine is gone")
        # The model is frozen, because torch rounds differently where a parameter requires a gradient. The check of
        # scores is off, because it restores torch's global random state, which a real engine does not share.
        self.model = LanguageModel(
            copy.deepcopy(source.model).requires_grad_(False), source.tokenizer, check_scores=False
        )
        self.loads += 1


def randomly(seed):
    delays = random.Random(seed)
    return lambda call: time.sleep(delays.random() * 0.02)


def made(sampler, **options):
    m = matcher(proposal={"sampler": sampler, "criterion": "interval", **options.pop("proposal", {})}, **options)
    return m, sgd(m)


def coming(k, steps, ahead):
    return [[prompt] for prompt in (PROMPTS * 3)[k + 1 : min(k + 1 + ahead, steps)]]


def run(m, optimizer, last, ahead=2, first=0, steps=None):
    """Take the steps from ``first`` to before ``last``, and return their metrics without times."""
    return [
        timeless(step(m, optimizer, [(PROMPTS * 3)[k]], next_prompts=coming(k, steps or last, ahead)))
        for k in range(first, last)
    ]


def ended(m, log):
    return digest(m.policy.model), m.running.state_dict()["partitions"]["log_sum"].tolist(), log


# --- which q draws which batch


@pytest.mark.parametrize("ahead", [1, 3])
def test_what_is_drawn_of_which_q_is_a_function_of_the_step(ahead):
    found, steps = [], 7
    for wait, threads in ((lambda call: None, 1), (randomly(1), 1), (randomly(2), 3)):
        engine = Engine(wait)
        m, optimizer = made(AsyncSampler(engine, ahead, threads=threads))
        log = run(m, optimizer, steps, ahead)
        found.append(ended(m, log))
        # The batch of a step is asked for ``ahead`` steps before the step. q changes every two steps.
        versions = [max(k - ahead, 0) // 2 for k in range(steps)]
        assert [each["lag"] for each in log] == [k // 2 - version for k, version in enumerate(versions)]
        seeds = [m._seed(f"step {k}") for k in range(steps)]
        asked = [
            (seed, version, [PROMPTS[k % 6]], 8) for k, (seed, version) in enumerate(zip(seeds, versions, strict=True))
        ]
        assert sorted(engine.calls) == sorted(asked) and (threads > 1 or engine.calls == asked)
        assert engine.loads == 4 and not engine.busy
    assert found[1] == found[0] and found[2] == found[0]


def test_without_a_look_ahead_and_with_max_lag_0_it_is_the_engine_alone():
    found = []
    for sampler, ahead in (
        (Engine(), 3),
        (AsyncSampler(Engine()), 0),
        (AsyncSampler(Engine(randomly(0)), 3, max_lag=0), 3),
    ):
        m, optimizer = made(sampler)
        found.append(ended(m, run(m, optimizer, 7, ahead)))
    assert found[1] == found[0] and found[2] == found[0]


def test_max_lag_bounds_the_swaps_between_draw_and_use():
    lags, calls = {}, {}
    for bound in (None, 1, 0):
        engine = Engine()
        m, optimizer = made(AsyncSampler(engine, 4, max_lag=bound), proposal={"interval": 1})
        lags[bound] = [each["lag"] for each in run(m, optimizer, 7, 4)]
        calls[bound] = [seed for seed, *_ in engine.calls]
    # q changes after each step. With max_lag=0 the batches of coming steps are drawn again each time, and the batch of
    # the past step is not.
    assert len(calls[None]) == 7 and len(set(calls[0])) == 7
    assert all(calls[0].count(m._seed(f"step {k}")) <= k + 1 for k in range(7))
    assert lags == {None: [0, 1, 2, 3, 4, 4, 4], 1: [0, 1, 0, 1, 0, 0, 0], 0: [0] * 7}


def test_it_draws_no_further_ahead_than_it_may():
    engine = Engine()
    sampler = AsyncSampler(engine, ahead=2)
    m, optimizer = made(sampler)
    for k in range(6):
        m.draw([PROMPTS[k]], 8, max_new_tokens=6, next_prompts=coming(k, 20, 9))
        sampler._drain()
        assert len(engine.calls) == k + 3 and sampler.ready == 3
        m.loss(m.batch).loss.backward()
        optimizer.step()
        m.commit()


def test_the_engine_draws_while_the_policy_is_trained():
    started, train = threading.Event(), threading.Event()
    m, _ = made(AsyncSampler(Engine(lambda call: call == 2 and (started.set(), train.wait(20)))))
    batch = m.draw([PROMPTS[0]], 8, max_new_tokens=6, next_prompts=coming(0, 9, 2))
    assert started.wait(20)  # the second batch has begun, and it can't end before the loss of the first one has run
    m.loss(batch).loss.backward()
    train.set()


def test_the_criterion_has_samples_of_the_newest_q_and_z_has_all():
    m, optimizer = made(AsyncSampler(Engine(), 2), proposal={"criterion": "kl", "interval": 3, "stderrs": 0})
    kept, log = [], []
    m.proposal.swap()
    for k in range(6):
        batch = m.draw([PROMPTS[0]], 8, max_new_tokens=6, next_prompts=[[PROMPTS[0]]] * 2)
        if k == 1:
            m.proposal.swap()  # the batches of steps 1, 2 and 3 come from the q before this swap
        m.loss(batch).loss.backward()
        optimizer.step()
        newest = m.proposal.version
        log.append(m.commit())
        kept.append((int((batch.samples.version == newest).sum()), log[-1]["lag"], len(m.proposal.running)))
    assert kept[:4] == [(8, 0, 1), (0, 1, 0), (0, 1, 0), (0, 1, 0)]
    assert kept[4][:2] == (8, 0) and kept[4][2] == 1
    (z,) = m.running.partitions._of.values()
    assert z.n == 6 * 8
    known = [each for each in log if not any(name.startswith("unseen/") for name in each)]
    # Where the newest q has drawn nothing yet, kl_policy comes from the samples of the step alone.
    assert len(known) > 3 and all(math.isfinite(each["kl_policy"]) for each in known)
    assert not any(each["swapped"] for each in log[:5])  # a check without a sample of the newest q keeps q


def test_a_check_on_fresh_samples_gets_them_from_the_newest_q():
    engine = Engine(randomly(3))
    m, optimizer = made(AsyncSampler(engine, 2), proposal={"criterion": "kl"}, check_samples=16)
    log = run(m, optimizer, 6)
    assert "proposal_check" in log[1]
    of_checks = {m._seed(f"check {k}") for k in (2, 4, 6)}
    versions = [version for seed, version, *_ in engine.calls if seed in of_checks]
    before = [int(each["swaps"] - each["swapped"]) for each in log[1::2]]
    assert versions == before and sum(each["swapped"] for each in log)


# --- what is lost


def test_what_is_lost_is_asked_for_again_and_nothing_else_changes():
    def fails(call):
        if call in (2, 5, 6):
            raise (ConnectionError, TimeoutError, EOFError)[call % 3]("gone")

    found, calls = [], []
    for wait in (lambda call: None, fails):
        engine = Engine(wait)
        m, optimizer = made(AsyncSampler(engine, 2, pause=0.0))
        with pytest.warns(UserWarning, match="the same request was repeated") if wait is fails else nothing():
            found.append(ended(m, run(m, optimizer, 5)))
        calls.append(engine.calls)
    assert found[0] == found[1]
    assert [calls[1][k] for k in range(8) if k not in (1, 4, 5)] == calls[0]
    assert calls[1][1] == calls[1][2] and calls[1][4] == calls[1][5] == calls[1][6]


def nothing():
    return pytest.MonkeyPatch.context()  # nothing is patched, so this context does nothing


def test_an_engine_that_stays_away_ends_the_run_at_its_batch_and_the_batch_can_be_asked_for_again():
    engine = Engine()
    m, optimizer = made(AsyncSampler(engine, 2, retries=2, pause=0.0))
    whole, whole_optimizer = made(Engine())
    run(m, optimizer, 2)
    run(whole, whole_optimizer, 2)

    def away(call):
        raise ConnectionRefusedError("nobody listens")

    engine.wait = away
    before, state = len(engine.calls), digest(m.policy.model)
    for attempt in (1, 2):
        with (
            pytest.raises(EngineError, match="lost 3 times with the same request, at last with ConnectionRefusedError"),
            pytest.warns(UserWarning, match="lost 2 times .* at last ConnectionRefusedError: nobody listens"),
        ):
            run(m, optimizer, 3, first=2)
        assert len(engine.calls) == before + 3 * attempt and digest(m.policy.model) == state
    engine.wait = lambda call: None
    assert run(m, optimizer, 3, first=2)[0]["log_z"] == run(whole, whole_optimizer, 3, first=2)[0]["log_z"]


def test_what_is_no_loss_is_raised_at_its_step_and_not_repeated():
    engine = Engine(lambda call: 1 / 0 if call == 2 else None)
    m, optimizer = made(AsyncSampler(engine, 2))
    with pytest.raises(ZeroDivisionError):
        run(m, optimizer, 5)
    assert m.running.steps == 1 and len(engine.calls) == 3


def test_a_load_that_fails_leaves_q_and_the_requests():
    engine = Engine()
    sampler = AsyncSampler(engine, 2, max_lag=0)
    m, optimizer = made(sampler, proposal={"interval": 99})
    run(m, optimizer, 2)
    engine.gone = True
    with pytest.raises(ConnectionError, match="the engine is gone"):
        m.proposal.swap()
    assert sampler.version == m.proposal.version == 0
    assert [each["lag"] for each in run(m, optimizer, 4, first=2)] == [0, 0]


def test_an_engine_that_holds_another_q_is_found():
    engine = Engine()
    m, optimizer = made(AsyncSampler(engine, 2))
    run(m, optimizer, 1)
    engine.version = 7  # somebody else may have restarted the engine with another q
    sampler, engine.model.sample = m.proposal.sampler, None

    class Older(Engine):
        def sample(self, *args, **options):
            drawn = super().sample(*args, **options)
            drawn.version.fill_(3)
            return drawn

    sampler = AsyncSampler(Older(), 2)
    m, optimizer = made(sampler)
    with pytest.raises(RuntimeError, match=r"sequences of the versions \[3\] of q, and was asked for version 0"):
        run(m, optimizer, 1)


# --- checkpoints


@pytest.mark.parametrize("drawn", [1, 2])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(drawn):
    """``drawn`` of the two batches ahead are drawn when the state is saved, and the others are on their way."""
    whole, optimizer = made(AsyncSampler(Engine(), 2))
    unbroken = run(whole, optimizer, 7)

    held = threading.Event()
    sampler = AsyncSampler(Engine(lambda call: call > 3 + drawn and held.wait(20)), 2)
    m, optimizer = made(sampler)
    log = run(m, optimizer, 3, steps=7)
    while sampler.ready < 1 + drawn:
        time.sleep(0.001)
    buffer = io.BytesIO()
    torch.save([m.state_dict(), m.policy.model.state_dict(), optimizer.state_dict()], buffer)
    assert sampler.ready == 1 + drawn
    held.set()
    buffer.seek(0)
    state, weights, of_optimizer = torch.load(buffer, weights_only=True)

    engine = Engine(randomly(0))
    again, optimizer = made(AsyncSampler(engine, 2))
    again.policy.model.load_state_dict(weights)
    optimizer.load_state_dict(of_optimizer)
    again.load_state_dict(state)
    log += run(again, optimizer, 7, first=3)
    assert len(engine.calls) == 4 - drawn
    assert ended(again, log) == ended(whole, unbroken)


def test_a_state_of_another_kind_changes_nothing():
    sampler = AsyncSampler(Engine(), 2)
    m, optimizer = made(sampler)
    run(m, optimizer, 2)
    state, before = m.state_dict(), digest(m.proposal.snapshot.model)
    other = copy.deepcopy(state)
    other["proposal"]["drawn_ahead"] = [{"asked": {}}]
    with pytest.raises(ValueError, match=r"not a state of AsyncSampler.state_dict: KeyError: 'samples'"):
        m.load_state_dict(other)
    assert digest(m.proposal.snapshot.model) == before and m.running.steps == 2
    alone, _ = made(Engine())
    with pytest.warns(UserWarning, match="holds 1 batches that were drawn ahead, and this run's sampler does not"):
        alone.load_state_dict(state)
    del state["proposal"]["drawn_ahead"]  # a state from before dmfast could sample ahead has no such entry
    m.load_state_dict(state)
    assert sampler.ready == 0


# --- under DMTrainer, with an engine behind HTTP

# An epoch has three steps, so the run crosses its end.
CONTEXTS = {"prompts": PROMPTS, "samples_per_context": 4, "max_steps": 7}


@pytest.fixture
def server():
    """Return a server that was started with weights of its own."""
    with StandIn(gpt2(seed=7), tokenizer()) as started:
        yield started


def test_the_trainer_draws_ahead_over_epochs_and_a_resumed_run_is_the_unbroken_one(server, tmp_path):
    def run(name, callbacks=(), resume=None, **settings):
        trainer = trained(tmp_path / name, server, callbacks, **(CONTEXTS | settings))
        trainer.train(resume_from_checkpoint=resume)
        lags = [h["lag"] for h in trainer.state.log_history if "lag" in h]
        if settings.get("sampler_ahead"):
            trainer.proposal.sampler._drain()
        return digest(trainer.model), lags

    alone, lags = run("alone")
    assert lags == [0] * 7
    assert run("lag 0", sampler_ahead=2, sampler_max_lag=0) == (alone, lags)
    ahead, lags = run("ahead", sampler_ahead=2)
    assert lags == [k // 2 - max(k - 2, 0) // 2 for k in range(7)] and ahead != alone
    run("broken", [StopAt(3)], sampler_ahead=2)
    assert run("broken", resume=True, sampler_ahead=2) == (ahead, lags)


def test_a_run_that_is_ahead_of_an_engine_that_fails_ends_with_a_checkpoint_and_goes_on(server, tmp_path):
    class Harm(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                server.faults.status["/v1/completions"] = [500]

    trainer = trained(tmp_path / "broken", server, [Harm()], sampler_ahead=2)
    with pytest.raises(EngineError, match="holds all of it, q too"):
        trainer.train()
    last = trainer.state.global_step  # the run has trained on the batches that were drawn before the engine failed
    assert 3 < last < 6 and checkpoint.fault(tmp_path / "broken" / f"checkpoint-{last}") is None
    trainer.proposal.sampler._drain()
    server.faults.status.clear()
    resumed = trained(tmp_path / "broken", server, sampler_ahead=2)
    resumed.train(resume_from_checkpoint=True)
    straight = trained(tmp_path / "straight", server, sampler_ahead=2)
    straight.train()
    assert digest(resumed.model) == digest(straight.model)


def test_only_the_main_thread_uses_the_tokenizer():
    """A fast tokenizer keeps its padding as state, so a thread would pad its prompts as the main thread pads others."""
    policy, threads = lm(), set()

    class Noted(type(policy.tokenizer)):
        def __call__(self, *args, **options):
            threads.add(threading.current_thread())
            return super().__call__(*args, **options)

    policy.tokenizer.__class__ = Noted
    policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    prompts = ["w1 w2 w3", "<p> w1", [{"role": "user", "content": "w4 w2"}], torch.tensor([6])]
    with StandIn(lm().model, tok()) as server:
        engine = HTTPSampler(server.url, policy, patience=0.0, retries=1)
        engine.load(policy)
        sampler, how = AsyncSampler(engine, 2), {"n": 2, "max_new_tokens": 3}
        wrong = {"prompts": ["w1", 5], "seed": 2, **how}
        sampler.request([{"prompts": prompts, "seed": 1, **how}, wrong])
        sampler._drain()
        assert threads == {threading.main_thread()}
        x = sampler.sample(prompts, seed=1, **how)
        with pytest.raises(TypeError, match="prompt 1 must be a string"):
            sampler.sample(**wrong)
        sampler.sample(prompts, seed=3, **how)  # this batch was not requested before
        assert threads == {threading.main_thread()}
        sent = [body["prompt"] for path, body in server.asked if path == "/v1/completions"][-8:]
        assert sorted(sent) == sorted([[1, 2, 3], [PAD, 1], [4, 2], [6]] * 2)
        server.restart()
        with pytest.warns(UserWarning, match="given q again"):  # by a thread, which also checks the server anew
            assert len(sampler.sample(prompts, seed=4, **how)) == len(x)
        assert threads == {threading.main_thread()}
        sampler.close()


HTTP = {"sampler": "http://h:1"}
CONFIGS = {
    "model": ({"sampler_ahead": 2}, "sampler_ahead=2 does not go with sampler='model', which draws in this process"),
    "vllm": (
        {"sampler": "vllm", "sampler_ahead": 2},
        "sampler_ahead=2 does not go with sampler='vllm', which draws in this process",
    ),
    "negative": (HTTP | {"sampler_ahead": -1}, "sampler_ahead must be 0 or more, got -1"),
    "lag": (HTTP | {"sampler_ahead": 2, "sampler_max_lag": 0.5}, "sampler_max_lag must be an integer, got 0.5"),
    "lag alone": (
        HTTP | {"sampler_max_lag": 1},
        "sampler_max_lag=1 bounds what is drawn ahead, and sampler_ahead is 0",
    ),
    "skip": (HTTP | {"sampler_ahead": 2, "ignore_data_skip": True}, "does not go with ignore_data_skip=True"),
    "on-policy": (HTTP | {"sampler_ahead": 2, "on_policy": True}, "on_policy=True sets the ratio of pi and q to 1"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_the_config_refuses(case):
    settings, match = CONFIGS[case]
    with pytest.raises(ValueError, match=match):
        DMConfig("out", use_cpu=True, **settings)


def test_what_the_config_refuses_in_several_processes(monkeypatch):
    monkeypatch.setattr(DMConfig, "world_size", 2)
    with pytest.raises(ValueError, match="sampler_ahead=2 does not go with several processes"):
        DMConfig("out", use_cpu=True, sampler_ahead=2, **HTTP)
    with pytest.raises(ValueError, match="sampler='vllm' does not run in several processes"):
        DMConfig("out", use_cpu=True, sampler="vllm")


# --- bad input


def test_a_batch_is_fixed_at_its_request():
    m, _ = made(AsyncSampler(Engine(), 2))
    m.draw([PROMPTS[0]], 8, max_new_tokens=6, next_prompts=[[PROMPTS[1]]])
    with pytest.raises(
        ValueError, match=r"asked for ahead with other prompts and n than now: prompts \['w1 w2'\], now"
    ):
        m.draw([PROMPTS[2]], 4, max_new_tokens=6)
    with pytest.raises(ValueError, match="next_prompts are drawn with seeds that the matcher gives, and seed=3"):
        m.draw([PROMPTS[0]], 8, max_new_tokens=6, seed=3, next_prompts=[[PROMPTS[1]]])
    assert len(m.draw([PROMPTS[0]], 4, max_new_tokens=6, seed=3)) == 4  # a call with a seed of its own draws at once
    m.forget()
    assert len(m.draw([PROMPTS[2]], 4, max_new_tokens=6)) == 4
    with pytest.raises(
        ValueError, match="next_prompts is for a proposal's sampler that runs ahead, and here the policy"
    ):
        matcher(on_policy=True).draw(None, 4, max_new_tokens=6, next_prompts=[None])


@pytest.mark.parametrize("kind", ["tokens", "tensor", "chat"])
def test_prompts_of_every_kind_are_recognised(kind):
    make = {"tokens": lambda: [[1, 2], [3]], "tensor": lambda: [torch.tensor([1, 2]), torch.tensor([3])],
            "chat": lambda: [[{"role": "user", "content": "w1"}]] * 2}[kind]  # fmt: skip
    engine = Engine()
    sampler = AsyncSampler(engine, 2)
    m, optimizer = made(sampler)
    m.policy.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    for _ in range(3):
        step(m, optimizer, make(), n=4, next_prompts=[make()] * 2)
    sampler._drain()
    assert len(engine.calls) == 5
    torch.save(m.state_dict(), io.BytesIO())


REFUSED = {
    "a LanguageModel": (lambda: AsyncSampler(lm()), TypeError, "a LanguageModel runs in this process"),
    "a view": (lambda: AsyncSampler(lm(how="lora").base()), TypeError, "a AdapterView runs in this process"),
    "a mixture": (lambda: AsyncSampler(Mixture([lm()])), TypeError, "a Mixture runs in this process"),
    "prompted": (lambda: AsyncSampler(Prompted(lm(), "w1")), TypeError, "a Prompted runs in this process"),
    "itself": (lambda: AsyncSampler(AsyncSampler(Engine())), TypeError, "a AsyncSampler runs in this process"),
    "none": (lambda: AsyncSampler(5), TypeError, "sampler must have what .* lists .*got a int"),
    "ahead": (lambda: AsyncSampler(Engine(), 0), ValueError, "ahead must be an integer, 1 or more, got 0"),
    "no ahead": (lambda: AsyncSampler(Engine(), None), ValueError, "ahead must be an integer, 1 or more, got None"),
    "lag": (lambda: AsyncSampler(Engine(), max_lag=-1), ValueError, "max_lag must be an integer, 0 or more, got -1"),
    "threads": (lambda: AsyncSampler(Engine(), threads=0.5), ValueError, "threads must be an integer, 1 or more"),
    "retries": (lambda: AsyncSampler(Engine(), retries=True), ValueError, "retries must be an integer, 0 or more"),
    "pause": (lambda: AsyncSampler(Engine(), pause=float("nan")), ValueError, "pause must be a number of seconds"),
    "no seed": (lambda: AsyncSampler(Engine()).request([{"max_new_tokens": 3}]), ValueError, "needs a seed"),
    "a module": (lambda: ProcessSampler(lm().model), TypeError, "must be a LanguageModel, .* got a GPT2LMHeadModel"),
    "timeout": (lambda: ProcessSampler(lm(), timeout=0), ValueError, "timeout must be positive, got 0"),
    "no pickle": (lambda: ProcessSampler(unpicklable()), TypeError, "can't be copied into another process"),
}  # fmt: skip


def unpicklable():
    policy = lm()
    policy.model.register_forward_hook(lambda *args: None)
    return policy


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, match = REFUSED[case]
    with pytest.raises(error, match=match):
        call()


def test_threads_end_with_the_sampler():
    before = set(threading.enumerate())
    sampler = AsyncSampler(Engine(), threads=2)
    OfflineProposal(lm(), sampler=sampler).sample(n=2, max_new_tokens=3)
    other = AsyncSampler(Engine())
    new = set(threading.enumerate()) - before
    assert len(new) == 3
    engine = weakref.ref(sampler.sampler)
    sampler.close()
    sampler.close()
    with pytest.raises(RuntimeError, match="this AsyncSampler is closed"):
        sampler.sample(n=2, max_new_tokens=3)
    del sampler, other
    gc.collect()
    for thread in new:
        thread.join(20)
    assert not any(thread.is_alive() for thread in new) and engine() is None


# --- a process of its own


def test_a_copy_in_another_process_draws_what_the_policy_draws_dies_and_starts_again_with_q(tmp_path):
    policy = lm()
    engine = ProcessSampler(policy, threads=1)
    sampler = AsyncSampler(engine, pause=0.0)
    proposal = OfflineProposal(policy, sampler=sampler)
    assert isinstance(engine, Sampler) and isinstance(sampler, Sampler)

    def draw(of, seed=0):
        return of.sample(["w3", "w1 w2"], 4, max_new_tokens=6, seed=seed, temperature=1.3)

    assert same(draw(proposal), draw(proposal.snapshot)) and draw(proposal).version.tolist() == [0] * 8
    assert len(proposal.sample(n=3, max_new_tokens=3)) == 3  # without a seed, this process chooses one
    moved(policy)
    proposal.swap()
    x = draw(proposal.snapshot)
    assert same(draw(proposal), x) and draw(proposal).version.tolist() == [1] * 8
    assert (sampler.log_prob(x, batch_size=3) - x.log_prob).abs().max() < 1e-4
    with pytest.raises(ValueError, match="n must be an integer, 1 or more, got 0"):
        proposal.sample(n=0, max_new_tokens=3)

    for source, error in ((lm("llama"), RuntimeError), ("no/such/folder", FileNotFoundError), (5, TypeError)):
        with pytest.raises(error):
            sampler.load(source)
    moved(policy, seed=1)  # q must not follow pi when pi changes
    assert same(draw(proposal), x)
    # Ctrl-C is meant for the training process, so the child ignores it.
    os.kill(engine._children[0].process.pid, signal.SIGINT)
    assert same(draw(proposal), x)
    os.kill(engine._children[0].process.pid, signal.SIGKILL)
    with pytest.warns(UserWarning, match="lost 1 time .* has died with exit code -9 in 'sample'"):
        assert same(draw(proposal), x)  # the new process starts with q, and not with the newer pi

    policy.model.save_pretrained(tmp_path)
    engine.load(tmp_path)
    assert not same(draw(engine), x) and same(draw(engine), draw(OfflineProposal(policy).snapshot))
    engine.timeout = 0.01
    with pytest.raises(TimeoutError, match=r"took longer than timeout=0.01 s for 'sample'"):
        engine.sample(n=5000, max_new_tokens=12)
    folder, processes = engine._folder, engine._children
    assert folder.is_dir() and not processes
    del proposal, sampler, engine
    gc.collect()
    assert not folder.exists()
