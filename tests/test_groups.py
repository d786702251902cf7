"""Test groups, the sequences of one prompt, in a step: means are fixed at the draw, over microbatches and ranks."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from datasets import IterableDataset
from test_engines import Threads
from test_matcher import PROMPTS, draw, gradients, matcher
from trainer_job import job

from dmfast import Contains, Moment, Verifier, dm_loss
from dmfast.batch import Prompts
from dmfast.methods import DrGRPO
from dmfast.objectives import OfStep
from dmfast.settings import Settings
from dmfast.training.data import Contexts

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


def tokens(x):
    return (x.tokens * x.score_mask).sum(1).double()


def w3(x):
    return torch.tensor([float("w3" in text.split()) for text in x.text]).double()


def right(texts, rows):
    return ["w3" in text.split() for text in texts]


def on_ranks(matchers, call):
    """Return what each rank's call gives, where each matcher is a rank in a thread, or raise the error of a rank."""
    meeting, given, found = threading.Barrier(len(matchers)), [None] * len(matchers), [None] * len(matchers)

    def run(rank):
        matchers[rank].ranks = matchers[rank]._rollouts.ranks = Threads(rank, meeting, given)
        try:
            found[rank] = call(matchers[rank], rank)
        except Exception as error:
            found[rank] = error
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(matchers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        if isinstance(each, Exception) and not isinstance(each, threading.BrokenBarrierError):
            raise each
    return found


def weights_of(m, batch, size):
    """Return A of each sequence of the batch in its order, and the gradients."""
    found = torch.empty(len(batch)).double()
    for part in batch.split(size):
        out = m.loss(part, m.policy.model)
        out.loss.backward()
        found[part.places] = out.weight
    return found, gradients(m)


@pytest.mark.parametrize(
    "objective", ["grpo", "dapo", "maxrl", "gspo", DrGRPO(9)], ids=lambda x: getattr(x, "__name__", x)
)
def test_a_group_that_is_cut_among_microbatches_and_ranks_is_the_whole_group(objective):
    options = {"objective": objective, "on_policy": True, "reward": tokens}
    alone = matcher(**options)
    expected, whole = weights_of(alone, draw(alone, ["w1 w2"], 6), 6)

    def call(m, rank):
        batch = draw(m, ["w1 w2"], 3)
        found = weights_of(m, batch, 2)
        return found, m.commit()

    ranks = on_ranks([matcher(**options) for _ in range(2)], call)
    assert torch.allclose(torch.cat([found for (found, _), _ in ranks]), expected, rtol=1e-9, atol=1e-12)
    assert len(set(expected.tolist())) > 1
    for name, gradient in whole.items():
        mean = sum(g[name] for (_, g), _ in ranks) / 2  # DDP takes this mean
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-5, msg=name)
    assert ranks[0][1]["reward"] == ranks[1][1]["reward"] == pytest.approx(float(alone.batch.inputs["reward"].mean()))


def test_a_group_of_which_log_pi_is_compared_is_refused_on_several_ranks():
    constraints = [Moment(lambda x: x.score_mask.sum(1).double(), 3.0)]
    ranks = [matcher(objective="vargrad", constraints=constraints) for _ in range(2)]
    with pytest.raises(ValueError, match="'vargrad' needs all sequences of a prompt on one rank, and those of context"):
        on_ranks(ranks, lambda m, rank: draw(m, ["w1"], 4))


def test_a_function_says_what_is_fixed_at_the_draw():
    seen = []

    def own(terms):
        seen.append(terms.at_draw(lambda whole: whole.group_mean(whole.reward)))
        return terms.reward - seen[-1]

    m = matcher(objective=own, reward=tokens)
    batch = draw(m, PROMPTS[:2], 4)
    for part in batch.split(3):
        m.loss(part).loss.backward()
    reward = batch.inputs["reward"].view(2, 4)
    found = torch.empty(8).double()
    for part, mean in zip(batch.split(3), seen, strict=True):
        found[part.places] = mean
    assert torch.allclose(found, reward.mean(1).repeat_interleave(4))

    def cut(terms):
        return terms.reward - terms.group_mean(terms.reward)

    m = matcher(objective=cut, reward=tokens)
    with pytest.raises(ValueError, match=r"cut takes a mean .* write terms.at_draw\(.*cut.whole_contexts = True"):
        m.loss(draw(m, PROMPTS[:2], 4).split(3)[0])


def test_a_call_outside_of_a_step_is_the_whole_step():
    logits, x, reward = torch.randn(4, 3, 5), torch.randint(5, (4, 3)), torch.tensor([1.0, 0.0, 3.0, 5.0])

    def own(terms):
        assert terms.log_prob is not None
        return terms.at_draw(look)

    def look(whole):
        assert whole.log_prob is None
        return whole.group_mean(whole.reward)

    out = dm_loss(logits, x, objective=own, reward=reward, on_policy=True, context_id=torch.tensor([0, 0, 1, 1]))
    assert out.weight.tolist() == [0.5, 0.5, 4.0, 4.0]


def test_weights_that_are_known_at_the_draw_take_no_function_of_terms():
    m = matcher(objective="grpo", on_policy=True, reward=tokens)
    batch = draw(m, PROMPTS[:2], 4)
    assert batch.advantage is not None and not isinstance(m.loss(batch)._terms.objective, OfStep)
    m = matcher(objective="gspo", on_policy=True, reward=tokens)
    batch = draw(m, PROMPTS[:2], 4)
    assert batch.advantage is None and isinstance(m.loss(batch)._terms.objective, OfStep)


def test_groups_that_teach_nothing_need_no_forward():
    """With skip_zero_weight, groups of one reward get no forward, and the gradient and the log stay as they are."""
    found = {}
    for skip in (False, True):
        m = matcher(objective="grpo", on_policy=True, reward=Contains("w3"), skip_zero_weight=skip)
        batch = draw(m, PROMPTS, 3)
        rewards = batch.inputs["reward"].view(-1, 3)
        mixed = (rewards != rewards[:, :1]).any(1).repeat_interleave(3)
        assert torch.equal(batch.forwarded, mixed if skip else torch.ones_like(mixed)) and 0 < int(mixed.sum()) < 21
        found[skip] = weights_of(m, batch, 4)[1], m.commit()
    for name, gradient in found[False][0].items():
        torch.testing.assert_close(found[True][0][name], gradient, rtol=0, atol=1e-6, msg=name)
    for name in ("kl_policy", "js_policy", "ess", "reward"):
        assert math.isfinite(found[True][1][name])
        assert found[True][1][name] == pytest.approx(found[False][1][name], abs=1e-4), name


@pytest.mark.parametrize("baseline", [1.0, "leave_one_out_context"])
def test_what_is_skipped_goes_with_every_baseline(baseline):
    found = []
    for skip in (False, True):
        m = matcher(objective="reinforce", on_policy=True, reward=w3, baseline=baseline, skip_zero_weight=skip)
        batch = draw(m, PROMPTS, 3)
        found.append((*weights_of(m, batch, 4), m.commit()["weight_std"]))
    assert not bool(batch.forwarded.all()) and bool(batch.forwarded.any())
    assert torch.allclose(found[0][0], found[1][0], atol=1e-12) and found[0][2] == pytest.approx(found[1][2])
    for name, each in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], each, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["grpo", "dapo", "maxrl"])
def test_a_method_for_the_policy_itself_is_refused_with_a_proposal(name):
    with pytest.raises(ValueError, match=f"^{name} is its method for sequences of the policy itself only"):
        matcher(objective=name, reward=tokens)


# --- groups whose values are all equal


def mixed_of(batch, n):
    rewards = batch.inputs["reward"].view(-1, n)
    return (rewards != rewards[:, :1]).any(1).repeat_interleave(n)


@pytest.mark.parametrize("objective", ["grpo", "dapo", "gspo", "reinforce"])
def test_groups_of_one_value_are_skipped(objective):
    options = {"objective": objective, "on_policy": True, "reward": w3}
    if objective == "reinforce":
        options["baseline"] = "leave_one_out_context"
    kept, m = (matcher(uniform_groups=how, **options) for how in ("keep", "skip"))
    batch = draw(kept, PROMPTS, 3)
    mixed = mixed_of(batch, 3)
    expected, gradient = weights_of(kept, batch, 4)
    batch = draw(m, PROMPTS, 3)
    assert torch.equal(batch.forwarded, mixed) and 0 < int(mixed.sum()) < 21
    found, own = weights_of(m, batch, 4)
    share = float(mixed.double().mean())
    if objective == "dapo":  # dapo takes a mean over tokens, which is now over the tokens that stay
        lengths = batch.samples.score_mask.sum(1)
        expected = expected * share * float(lengths.sum()) / float(lengths[mixed].sum())
        share = float(lengths[mixed].sum() / lengths.sum())
    assert torch.allclose(found, expected, atol=1e-9)
    for name, each in gradient.items():  # the gradient is the mean over the sequences that stay
        torch.testing.assert_close(own[name], each / share, rtol=1e-4, atol=1e-5, msg=name)
    metrics = m.commit()
    assert metrics["n_uniform"] == kept.commit()["n_uniform"] == 7 - int(mixed.sum()) / 3
    assert math.isfinite(metrics["kl_policy"])


def test_groups_of_one_value_are_drawn_again():
    plain, m = (matcher(objective="grpo", on_policy=True, reward=w3, uniform_groups=how) for how in ("keep", "redraw"))
    first = draw(plain, PROMPTS, 3)
    mixed = mixed_of(first, 3)
    batch = draw(m, PROMPTS, 3)
    assert torch.equal(batch.samples.tokens[mixed][:, -6:], first.samples.tokens[mixed][:, -6:])  # mixed groups stay
    assert int(mixed_of(batch, 3).sum()) > int(mixed.sum()) and len(batch) == 21
    log_pi = m.policy.log_prob(batch.samples)  # pi itself has drawn all of them
    assert torch.allclose(log_pi, batch.samples.log_prob, atol=1e-4)
    again = draw(m, PROMPTS, 3)
    assert torch.equal(again.samples.tokens, batch.samples.tokens)
    weights_of(m, again, 4)
    weights_of(plain, first, 4)
    metrics, other = m.commit(), plain.commit()
    redrawn = int((~mixed).sum())
    assert metrics["n_uniform"] == redrawn / 3 and metrics["n_redrawn"] >= redrawn
    seen = sum(m.running.partitions[i].n for i in m.running.partitions._of)
    assert seen == 21 + metrics["n_redrawn"]  # Z has all that was drawn
    log_prob, *_ = m.estimates.samples()  # the estimates have what was drawn at first
    assert torch.allclose(log_prob, plain.estimates.samples()[0], atol=1e-4)
    assert other["reward"] != metrics["reward"]


def test_redrawing_ends_and_leaves_out_what_stays_of_one_value():
    m = matcher(objective="grpo", on_policy=True, reward=lambda x: torch.zeros(len(x)).double(),
                uniform_groups="redraw", max_redraws=2)  # fmt: skip
    batch = draw(m, PROMPTS[:2], 3)
    found, gradient = weights_of(m, batch, 2)
    assert found.tolist() == [0.0] * 6 and all(float(g.abs().max()) == 0 for g in gradient.values())
    metrics = m.commit()
    assert (metrics["n_uniform"], metrics["n_redrawn"]) == (2, 12) and batch.n_sequences == 6


def test_ranks_that_draw_again_draw_equally_many():
    """A group that lies on both ranks is one group. Each rank has as many sequences as before."""
    options = {"objective": "grpo", "on_policy": True, "reward": w3, "uniform_groups": "redraw"}

    def call(m, rank):
        batch = draw(m, [PROMPTS[0], PROMPTS[1 + 2 * rank]], 2)
        weights, _ = weights_of(m, batch, 2)
        return batch, weights, m.commit()

    ranks = on_ranks([matcher(**options) for _ in range(2)], call)
    # These are the rewards of the shared prompt.
    rewards = torch.stack([batch.inputs["reward"].view(2, 2)[0] for batch, *_ in ranks])
    assert {len(batch) for batch, *_ in ranks} == {4} and ranks[0][2]["n_redrawn"] == ranks[1][2]["n_redrawn"] > 0
    weights = torch.stack([w.view(2, 2)[0] for _, w, _ in ranks])
    assert bool((rewards.flatten() == rewards[0, 0]).all()) == bool((weights == 0).all())
    assert ranks[0][0].n_sequences == ranks[1][0].n_sequences


OTHERS = [f"w{i} w{k}" for i in (1, 2, 4) for k in (5, 6, 7, 0)]


def others(seed, n, taken):
    """Return up to ``n`` of the prompts 100 to 111 that are not taken."""
    order = torch.randperm(len(OTHERS), generator=torch.Generator().manual_seed(seed)).tolist()
    found = [place for place in order if 100 + place not in taken][:n]
    return Prompts([OTHERS[place] for place in found], [100 + place for place in found])


def test_other_prompts_take_the_place_of_groups_of_one_value():
    options = {"objective": "grpo", "on_policy": True, "reward": w3}
    plain, m = matcher(**options), matcher(**options, uniform_groups="replace", other_contexts=others)
    first, batch = (draw(each, PROMPTS, 3, context_id=range(7)) for each in (plain, m))
    mixed = mixed_of(first, 3)
    groups, was_mixed = batch.samples.context_id.view(7, 3), mixed.view(7, 3)[:, 0]
    assert bool((groups == groups[:, :1]).all()) and len(set(groups[:, 0].tolist())) == 7
    assert groups[was_mixed, 0].tolist() == was_mixed.nonzero()[:, 0].tolist()  # mixed groups stay
    assert bool((groups[~was_mixed] >= 100).all()) and not bool(was_mixed.all())
    for place, context in enumerate(groups[:, 0].tolist()):
        head = batch.samples.tokens[3 * place, : batch.samples.prompt_len]
        asked = PROMPTS[place] if context < 100 else OTHERS[context - 100]
        assert batch.samples.tokenizer.decode(head, skip_special_tokens=True) == asked
    assert torch.allclose(m.policy.log_prob(batch.samples), batch.samples.log_prob, atol=1e-4)
    weights, _ = weights_of(m, batch, 4)
    rewards = batch.inputs["reward"].view(7, 3)
    centred = rewards - rewards.mean(1, keepdim=True)
    assert torch.equal(weights.sign(), centred.flatten().sign())
    metrics = m.commit()
    assert metrics["n_uniform"] == int((~was_mixed).sum()) and metrics["n_redrawn"] >= 3 * metrics["n_uniform"]
    assert sum(z.n for z in m.running.partitions.values()) == 21 + metrics["n_redrawn"]


def test_where_no_other_prompt_is_left_groups_of_one_value_are_skipped():
    asked = []

    def two(seed, n, taken):
        asked.append((n, taken))
        return Prompts(["w1", "w2"], [8, 9]) if len(asked) == 1 else Prompts([], [])

    m = matcher(objective="grpo", on_policy=True, reward=lambda x: torch.zeros(len(x)).double(),
                uniform_groups="replace", other_contexts=two)  # fmt: skip
    batch = draw(m, PROMPTS[:3], 2, context_id=[0, 1, 2])
    assert asked == [(3, {0, 1, 2}), (3, {0, 1, 2, 8, 9})]
    assert batch.samples.context_id.tolist() == [8, 8, 9, 9, 2, 2] and batch.n_sequences == 6


def test_ranks_share_the_other_prompts():
    options = {"objective": "grpo", "on_policy": True, "reward": w3, "uniform_groups": "replace"}

    def call(m, rank):
        batch = draw(m, PROMPTS[3 * rank :][:3], 3, context_id=[10 * rank + i for i in range(3)])
        return batch.samples.context_id[::3].tolist(), weights_of(m, batch, 3) and m.commit()["n_redrawn"]

    ranks = on_ranks([matcher(**options, other_contexts=others) for _ in range(2)], call)
    contexts = [context for found, _ in ranks for context in found]
    assert len(set(contexts)) == 6 and max(contexts) >= 100 and ranks[0][1] == ranks[1][1] > 0


def test_z_of_a_step_is_that_of_the_first_draw():
    """Whether a prompt is drawn again depends on its first draw, so the mean over all draws would be a biased Z."""
    options = {"objective": "maxrl", "on_policy": True, "constraints": [Verifier(right, truncated="judge")]}
    plain = matcher(**options, partition="step")
    expected = draw(plain, PROMPTS, 3, context_id=range(7)).pending.partitions
    for how, of in (("redraw", None), ("replace", others)):
        m = matcher(**options, partition="step", uniform_groups=how, other_contexts=of)
        found = draw(m, PROMPTS, 3, context_id=range(7)).pending.partitions
        assert [found[i].state_dict() for i in range(7)] == [expected[i].state_dict() for i in range(7)]
        assert {z.n for z in found.values()} == {3} and (len(found) > 7) == (how == "replace")
    m = matcher(**options, uniform_groups="redraw")  # a running Z takes all draws
    assert max(z.n for z in draw(m, PROMPTS, 3, context_id=range(7)).pending.partitions.values()) > 3


def test_the_trainer_draws_other_prompts_of_its_data(tmp_path):
    options = {"objective": "grpo", "on_policy": True, "reward": w3, "uniform_groups": "replace", "max_steps": 1,
               "samples_per_context": 2, "warmup_steps": 0}  # fmt: skip
    trainer = job(tmp_path, prompts=[*PROMPTS, *OTHERS], **options)
    trainer.train()
    assert len(trainer.partitions) > 4  # a step has 4 prompts, so others were drawn too
    found = Contexts([*PROMPTS, *OTHERS]).some(3, 9, set(range(8)))
    assert len(set(found.context_id.tolist())) == 9 and min(found.context_id.tolist()) >= 8
    for prompts in (["w1"], IterableDataset.from_generator(lambda: iter([{"prompt": "w1"}]))):
        with pytest.raises(ValueError, match=r"uniform_groups='replace' takes other prompts of the data set, .*redraw"):
            job(tmp_path, prompts=prompts, eval_dataset=PROMPTS, **options)


@pytest.mark.parametrize("options", [{"uniform_groups": "replace"}, {"other_contexts": others}])
def test_other_prompts_are_given_where_they_are_used(options):
    with pytest.raises(ValueError, match=r"other_contexts gives the prompts that .* pass both or neither"):
        matcher(objective="grpo", on_policy=True, reward=w3, **options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"uniform_groups": "drop"}, "uniform_groups must be 'keep', 'skip', 'redraw' or 'replace', got 'drop'"),
        ({"max_redraws": 0}, "max_redraws must be an integer of 1 or more, got 0"),
        ({"objective": "gdc++"}, r"weights of gdc\+\+ are not 0 there, .* a bias"),
        ({"objective": "alpha", "alpha": 0.5, "baseline": "leave_one_out_context"}, "weights of alpha are not 0 there"),
        ({"objective": "gspo", "on_policy": False}, "set on_policy=True, got on_policy=False"),
        ({"entropy_coefficient": 0.1}, "entropy_coefficient=0.1 needs every sequence that was drawn"),
        ({"refit_ess": 9.0, "uniform_groups": "redraw"}, "refit_ess fits lambda from them .* got refit_ess=9.0"),
    ],
)
def test_what_does_not_go_with_leaving_groups_out_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        matcher(**{"objective": "grpo", "on_policy": True, "reward": w3, "uniform_groups": "skip"} | options)


def test_weights_that_are_known_before_log_pi_are_refused_off_policy():
    def advantage(terms):
        return terms.reward

    advantage.weight_known = True
    with pytest.raises(ValueError, match=r"has weight_known=True, .* set on_policy=True"):
        Settings(objective=advantage)
    assert Settings(objective=advantage, on_policy=True).weight_known


def test_the_trainer_refuses_a_group_method_without_groups_before_it_draws(tmp_path):
    with pytest.raises(
        ValueError, match=r"'grpo' compares .*, and samples_per_context=1 draws one of each: set it to 2"
    ):
        job(tmp_path, prompts=PROMPTS, objective="grpo", on_policy=True, samples_per_context=1, reward=Contains("w3"))
