"""Test that each use of a seed draws with a seed of its own, so that no curve is measured on lambda's sample."""

from __future__ import annotations

import itertools

import pytest
import torch
from trainer_job import gpt2, tokenizer

import dmfast
from dmfast import EBM, LanguageModel, Moment
from dmfast.rejection import quasi_rejection_sample, rejection_curve
from dmfast.sampling import Mixture
from dmfast.seeds import seed_for
from dmfast.training.evaluation import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


class Watched(LanguageModel):
    """Be a model that keeps what was drawn of it, and with which seeds."""

    def sample(self, *args, **options):
        x = super().sample(*args, **options)
        self.drawn.append((options["seed"], x))
        return x


def run(seeds, of_torch=0):
    """Return what each function draws, by its name. ``seeds`` are the options that set the seed."""
    model = Watched(gpt2(), tokenizer())
    torch.manual_seed(of_torch)
    target, found = EBM(model, [Moment(dmfast.Contains("w3", name="w3"), 0.7)]), {}
    calls = {
        "fit": lambda: target.fit(n=256, max_new_tokens=6, **seeds),
        "rejection_curve": lambda: rejection_curve(target, model, 256, max_new_tokens=6, **seeds),
        "quasi_rejection_sample": lambda: quasi_rejection_sample(
            target, model, 300, log_beta=0.5, max_new_tokens=6, **seeds
        ),
        "evaluate": lambda: evaluate(model, target, n=256, max_new_tokens=6, **seeds),
        "mixture": lambda: Mixture([model, model]).sample(n=256, max_new_tokens=6, **({"seed": 0} | seeds)),
        "sample": lambda: model.sample(n=256, max_new_tokens=6, **({"seed": 0} | seeds)),
    }
    for name, call in calls.items():
        model.drawn = []
        call()
        found[name] = model.drawn
    return found


@pytest.mark.parametrize("seeds", [{}, {"seed": 0}, {"seed": 5}, {"seed": 10**6}])
def test_no_two_functions_draw_the_same_sequences(seeds):
    found = run(seeds)
    assert len(found["quasi_rejection_sample"]) > 1 and len(found["mixture"]) == 2
    drawn = [(name, each) for name, several in found.items() for each in several]
    assert len({seed for _, (seed, _) in drawn}) == len(drawn)
    for (one, (_, x)), (other, (_, y)) in itertools.combinations(drawn, 2):
        n = min(len(x), len(y))
        assert not torch.equal(x.log_prob[:n], y.log_prob[:n]), (one, other)


def test_the_default_seed_is_0_and_a_seed_gives_the_same_again():
    first, again, named = run({}), run({}), run({"seed": 0})
    for name, drawn in first.items():
        for other in (again, named):
            for (seed, x), (other_seed, y) in zip(drawn, other[name], strict=True):
                assert seed == other_seed and torch.equal(x.tokens, y.tokens) and torch.equal(x.log_prob, y.log_prob)


def test_neighbouring_seeds_share_nothing():
    purposes = ("fit", "evaluate", "quasi_rejection_sample 0", "quasi_rejection_sample 256")
    found = {seed_for(seed, purpose) for seed in range(-50, 50) for purpose in purposes}
    assert len(found) == 100 * len(purposes) and all(0 <= seed < 2**56 for seed in found)
    # the seed is the same on every machine and in all releases to come
    assert seed_for(0, "fit") == 0xF7A7BA1347D76C


def test_without_a_seed_what_is_drawn_is_torch_s():
    first, again, other = (run({"seed": None}, of_torch) for of_torch in (3, 3, 4))
    for name in first:
        assert torch.equal(first[name][0][1].log_prob, again[name][0][1].log_prob)
        assert not torch.equal(first[name][0][1].log_prob, other[name][0][1].log_prob)
