"""Test Z of each prompt where the target filters the base: how it is read, and the preset that rests on it."""

from __future__ import annotations

import json
import math

import pytest
import torch
from test_matcher import PROMPTS, draw, matcher, sgd, step
from trainer_job import job

import dmfast
from dmfast import EBM, Contains, Moment, Reward, Scorer, Verifier, step_terms
from dmfast.presets import PRESETS
from dmfast.training import recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")


def has_w3(texts, rows):
    return ["w3" in text.split() for text in texts]


def nothing(texts, rows):
    return [False] * len(texts)


def verifier(fn=has_w3):
    return Verifier(fn, truncated="judge")


W3 = Contains("w3")


@pytest.mark.parametrize(
    ("constraints", "filters"),
    [
        ([W3], True),
        ([verifier(), W3], True),
        ([Moment(W3, 0)], True),  # this counts as the constraint b = 1 - phi
        ([Scorer(lambda texts: [1.0] * len(texts), binary=True)], True),
        # without binary=True it may be 2 for another sequence
        ([Scorer(lambda texts: [1.0] * len(texts))], False),
        ([W3, Moment(Contains("w4"), 0.5)], False),
        ([W3, Reward(lambda texts: [0.0] * len(texts), beta=1.0)], False),
    ],
)
def test_what_filters_the_base(constraints, filters):
    assert EBM(matcher().target.base, constraints).is_filter is filters


@pytest.mark.parametrize("filters", [True, False])
def test_z_is_read_as_at_most_1_and_its_sums_stay(filters):
    m = matcher(constraints=[W3 if filters else Scorer(W3, on="samples")])
    much = torch.full((40,), math.log(3.0)).double()  # P/q = 3
    m.running.partitions = m.running.partitions.updated(torch.full((40,), 7), much, torch.zeros(40).double())
    batch = draw(m, ["w1"], 4, context_id=[7])
    kept = batch.pending.partitions[7]
    w = (batch.inputs["log_target"] - batch.inputs["log_proposal"]).exp()
    assert kept.n == 44 and kept.log_z == pytest.approx(math.log((120 + float(w.sum())) / 44)) and kept.log_z > 1
    assert batch.inputs["log_z"].tolist() == [0.0 if filters else kept.log_z] * 4
    m.loss(batch).loss.backward()
    assert m.commit()["log_z"] == (0.0 if filters else pytest.approx(kept.log_z))
    assert m.running.partitions[7].log_z == kept.log_z


def test_a_fresh_check_reads_z_alike():
    m = matcher(constraints=[W3], proposal={"interval": 1}, check_samples=8)
    much = torch.full((40,), math.log(3.0)).double()
    m.running.partitions = m.running.partitions.updated(torch.full((40,), 7), much, torch.zeros(40).double())
    batch = draw(m, ["w1"], 4, context_id=[7])
    *_, log_z = m._fresh(batch.pending, *batch.drawn)
    assert log_z.tolist() == [0.0] * 8


def test_z_of_a_prompt_of_which_nothing_was_right():
    for floor in (None, 1e-4):
        m = matcher(constraints=[verifier(nothing)], z_floor=floor)
        batch = draw(m, ["w1"], 4)
        assert batch.inputs["log_z"].tolist() == [-math.inf if floor is None else math.log(1e-4)] * 4
        out = m.loss(batch)
        rho = (out.log_prob - out.log_proposal).exp()
        # gdc++ has this weight where P = 0
        assert torch.allclose(out.weight, 0 * rho if floor is None else -rho)
        assert m.commit()["n_empty"] == (4 if floor is None else 0)
    # an estimate is taken as it is, also below the floor
    m = matcher(constraints=[verifier()], z_floor=1.0)
    batch = draw(m, ["w1"], 64)
    assert batch.inputs["log_z"][0] == batch.pending.partitions[int(batch.samples.context_id[0])].log_z < 0


@pytest.mark.parametrize("floor", [0, 0.0, -1e-4, 1.5, math.nan, True, "small"])
def test_a_floor_out_of_range_is_refused(tmp_path, floor):
    with pytest.raises(ValueError, match=r"z_floor must be above 0 and at most 1.*got"):
        matcher(constraints=[W3], z_floor=floor)
    with pytest.raises(ValueError, match="z_floor must be above 0 and at most 1"):
        dmfast.DMConfig(str(tmp_path), z_floor=floor)


def test_a_floor_is_refused_where_z_may_be_above_1(tmp_path):
    with pytest.raises(ValueError, match=r"z_floor=0.1 .* is not the base filtered .* write the constraint as a Verif"):
        matcher(z_floor=0.1)
    with pytest.raises(ValueError, match=r"z_floor=0.1 .* is not the base filtered"):
        job(tmp_path, z_floor=0.1)


# --- the preset


def by_hand(log_p, log_pi, alpha):
    """Return A of alpha-DPG for the n sequences of a prompt, number by number."""
    n, w = len(log_p), [math.exp(p - q) for p, q in zip(log_p, log_pi, strict=True)]
    z = min(sum(w) / n, 1.0) or 1e-4
    r = [min((x / z) ** (1 - alpha) - 1, 10.0) for x in w]
    return [r[i] - (sum(r) - r[i]) / (n - 1) for i in range(n)]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_alpha_dpg_is_its_formula(alpha):
    m = matcher(constraints=[verifier()], alpha=alpha, **PRESETS["alpha_dpg"].options)
    optimizer, seen = sgd(m, 2.0), set()
    for number in range(3):  # Z of a prompt comes from the step's own four sequences alone
        batch = draw(m, PROMPTS, 4)
        found = torch.empty(len(batch)).double()
        for part in batch.split(7):
            out = m.loss(part)
            out.loss.backward()
            found[part.places] = out.weight
        log_p, log_pi = batch.inputs["log_target"], batch.samples.log_prob
        for i in range(0, len(batch), 4):
            expected = by_hand(log_p[i : i + 4].tolist(), log_pi[i : i + 4].tolist(), alpha)
            assert found[i : i + 4].tolist() == pytest.approx(expected, abs=1e-9)
            seen.add(int((log_p[i : i + 4] > -math.inf).sum()))
        optimizer.step()
        optimizer.zero_grad()
        m.commit()
        assert m.running.steps == number + 1
    assert 0 in seen and len(seen) > 1  # some groups have no right answer, and others have one


def test_alpha_dpg_where_z_is_above_1_or_the_return_is_bounded():
    m = matcher(constraints=[verifier()], alpha=0.5, **PRESETS["alpha_dpg"].options)
    log_pi = torch.tensor([-9.0, -2.0, -3.0, -8.0]).double()
    # u is 1097, .6, 0 and 2.7 before Z is bounded by 1
    log_p = torch.tensor([-2.0, -2.5, -math.inf, -7.0]).double()
    partitions = m.running.partitions.updated(torch.zeros(4, dtype=torch.int64), log_p, log_pi)
    inputs = {"log_target": log_p, "log_proposal": log_pi, "log_z": m._log_z(partitions, torch.zeros(4))}
    objective = m.settings.objective_of(0.0, 0.0, None)
    contexts = torch.zeros(4, dtype=torch.int64)
    baseline = step_terms.leave_one_out(m.settings, m.ranks, objective, contexts, inputs)
    found = dmfast.objectives.weigh(
        step_terms.terms_at_proposal(m.settings, objective, inputs | {"baseline": baseline})
    )
    assert found.tolist() == pytest.approx(by_hand(log_p.tolist(), log_pi.tolist(), 0.5))
    assert float(partitions.log_z(torch.zeros(4))[0]) > 0


def test_a_preset_by_its_name(tmp_path):
    args = dmfast.DMConfig.preset("alpha_dpg", output_dir=str(tmp_path), alpha=0.5, max_return=5.0)
    assert (args.objective, args.alpha, args.max_return, args.samples_per_context) == ("alpha", 0.5, 5.0, 4)
    assert args.settings().z_floor == 1e-4 and args.on_policy and not args.normalize_alpha
    with pytest.raises(ValueError, match="preset must be one of 'alpha_dpg', got 'alphadpg'"):
        dmfast.DMConfig.preset("alphadpg", output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="objective 'alpha' needs alpha, got None"):
        dmfast.DMConfig.preset("alpha_dpg", output_dir=str(tmp_path))


def test_a_recipe_takes_a_preset_by_its_name(tmp_path):
    path = tmp_path / "recipe.yaml"
    train = {"preset": "alpha_dpg", "alpha": 0.5, "use_cpu": True, "per_device_train_batch_size": 8,
             "max_new_tokens": 8, "output_dir": str(tmp_path), "z_floor": 1e-3}  # fmt: skip
    what = {"model": "tiny-bios", "prompts": ["Mary", "John"], "constraints": [{"contains": {"word": "she"}}]}
    path.write_text(json.dumps(what | {"train": train}))
    args = recipe.prepare(recipe.read(path), say=lambda _: None).args
    assert (args.objective, args.max_return, args.z_floor, args.samples_per_context) == ("alpha", 10.0, 1e-3, 4)
    path.write_text(json.dumps(what | {"train": {"preset": "alpha-dpg"}}))
    with pytest.raises(recipe.RecipeError, match="train: preset must be one of 'alpha_dpg', got 'alpha-dpg'"):
        recipe.read(path)


def test_a_step_of_the_preset_in_the_matcher_is_logged():
    m = matcher(constraints=[verifier()], alpha=0.5, **PRESETS["alpha_dpg"].options)
    metrics = step(m, sgd(m), PROMPTS, 4)
    assert metrics["n_empty"] == 0 and "n_clipped_return" in metrics and metrics["log_z"] <= 0
