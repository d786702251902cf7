"""Test benchmarks/paper: the estimate of KL(p||pi) where it is known, the choice of learning rates, and a small run."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from trainer_job import WORDS, gpt2, tokenizer

from dmfast import EBM, Contains, LanguageModel, Moment, Scorer
from dmfast.diagnostics import gradient_variance
from dmfast.estimators import Estimate, PartitionFunctions, estimate
from dmfast.training import recipe

PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"
# the tests may stand alone, such as beside an installed wheel
if not (PAPER.parents[1] / "pyproject.toml").exists():
    pytest.skip("no source tree", allow_module_level=True)
sys.path.insert(0, str(PAPER))
import grid  # noqa: E402
import run  # noqa: E402
import store  # noqa: E402
import truth  # noqa: E402
import variance  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")
END = WORDS.index("<e>")


def every_sequence(model):
    """Return the log-probability of each sequence of up to two tokens, by its words."""
    start = model.tokenizer.bos_token_id
    start = model.eos_token_ids[0] if start is None else start
    with torch.no_grad():
        first = model.model(torch.tensor([[start]])).logits[0, -1].double().log_softmax(-1)
        rows = torch.tensor([[start, token] for token in range(len(WORDS))])
        second = model.model(rows).logits[:, -1].double().log_softmax(-1)
    found = {("<e>",): float(first[END])}
    others = [i for i in range(len(WORDS)) if i != END]
    return found | {(WORDS[x], WORDS[y]): float(first[x] + second[x, y]) for x in others for y in range(len(WORDS))}


@pytest.mark.parametrize("kind", ["pointwise", "moment", "hybrid"])
def test_kl_from_exact_samples_where_every_sequence_is_known(kind):
    """Exact samples follow p. Both estimates of KL(p||pi) are right. Far from p, that of exact samples varies less."""
    base, policy = LanguageModel(gpt2(), tokenizer()), LanguageModel(gpt2(seed=1), tokenizer())
    constraints = {"pointwise": [Contains("w6")], "moment": [Moment(Contains("w4", name="w4"), 0.3)],
                   "hybrid": [Contains("w6"), Moment(Contains("w4", name="w4"), 0.3)]}[kind]  # fmt: skip
    target = EBM(base, constraints)
    target.fit(n=4000, max_new_tokens=2)
    lambda_ = float(target.lambda_[0]) if target.moment_names else 0.0
    a, pi = every_sequence(base), every_sequence(policy)
    log_p = {x: v + lambda_ * ("w4" in x) for x, v in a.items() if kind == "moment" or "w6" in x}
    z = sum(math.exp(v) for v in log_p.values())
    exact = sum(math.exp(v) / z * (v - math.log(z) - pi[x]) for x, v in log_p.items())
    share = sum(math.exp(v) / z for x, v in log_p.items() if "w4" in x)

    n = 4000
    x, drawn, log_z = truth.draw(target, n, max_new_tokens=2, seed=5)
    assert drawn > n and abs(log_z.value - math.log(z)) < 4 * log_z.stderr
    seen = sum("w4" in text.split() for text in x.text) / n
    assert abs(seen - share) < 4 * math.sqrt(share * (1 - share) / n)
    known = truth.Truth(x, target.log_prob(x), log_z, {})
    found = known.kl(policy.log_prob(x))
    assert abs(found.value - exact) < 4 * found.stderr

    # the evaluation estimates KL(p||pi) in the paper's way, from samples of the policy
    y = policy.sample(n=n, max_new_tokens=2, seed=6)
    log_target = target.log_prob(y)
    z_of_y = PartitionFunctions().updated(y.context_id, log_target, y.log_prob).log_z(y.context_id)
    weighted = estimate(y.log_prob, y.log_prob, log_target, z_of_y, z_of=y.context_id).kl_policy
    assert abs(weighted.value - exact) < 4 * weighted.stderr
    # pi lies 1.2 to 1.9 nats from p; near p the weights would tell more than exact samples
    assert found.stderr < 0.8 * weighted.stderr


@pytest.mark.parametrize("kind", ["pointwise", "moment"])
def test_kl_on_the_biographies_where_the_model_gives_it_exactly(kind):
    """The rate r of a feature of the first token is one softmax, so Z and KL(p||a) are known up to rounding."""
    base = recipe.load("tiny-bios")
    with torch.no_grad():
        first = base.model(torch.tensor([[0]])).logits[0, -1].double().softmax(-1)
    names = set(first.argsort(descending=True)[5:25].tolist())
    r = float(first[sorted(names)].sum())
    feature = Scorer(lambda rows: [float(row[0] in names) for row in rows], on="tokens", name="name", binary=True)
    target = EBM(base, [feature] if kind == "pointwise" else [Moment(feature, 0.6)])
    if kind == "moment":
        target.lambda_ = [math.log(0.6 / 0.4 * (1 - r) / r)]
    exact = -math.log(r) if kind == "pointwise" else 0.6 * math.log(0.6 / r) + 0.4 * math.log(0.4 / (1 - r))
    x, _, log_z = truth.draw(target, 500, max_new_tokens=6, seed=1, batch_size=256)
    z = r if kind == "pointwise" else r * math.exp(float(target.lambda_[0])) + 1 - r
    assert abs(log_z.value - math.log(z)) < 4 * log_z.stderr
    found = truth.Truth(x, target.log_prob(x), Estimate(math.log(z), 0.0), {}).kl(base.log_prob(x))
    assert abs(found.value - exact) < 4 * found.stderr + 1e-4
    assert found.stderr < 0.05


def test_what_is_kept_of_a_target_is_read_back():
    for task in truth.TASKS:
        policy = recipe.load("tiny-bios")
        known = truth.read(task, policy)
        some = known.samples[:64]
        assert len(known.samples) == truth.SAMPLES
        torch.testing.assert_close(policy.log_prob(some), some.log_prob, atol=1e-3, rtol=0)


def test_the_mean_of_two_estimates():
    both = truth.both(Estimate(1.0, 0.3), Estimate(2.0, 0.1))
    # the weights are 1 to 9
    assert both.value == pytest.approx(1.9) and both.stderr == pytest.approx(0.3 / 10**0.5)


def test_what_samples_of_the_base_say_of_a_target(tmp_path):
    """A few new samples agree with what is kept of each task within four errors.

    KL(p||a) is -log Z where p is the part of a that has a feature, and a target of one moment is known from its rate.
    """
    tasks = {"women": 3000, "word_restaurant": 2000, "women_science": 1000}
    for task in tasks:
        kept = json.loads((truth.RESULTS / "targets" / f"{task}.json").read_text())
        del kept["base"]
        (tmp_path / f"{task}.json").write_text(json.dumps(kept))
    truth.measure(tasks, tmp_path, chunk=1000)
    for task, n in tasks.items():
        state = json.loads((tmp_path / f"{task}.json").read_text())
        here = state["base"]
        there = json.loads((truth.RESULTS / "targets" / f"{task}.json").read_text())["base"]
        assert here["samples"] == n and there["samples"] == truth.BASE_SAMPLES
        pairs = [(here[key], there[key]) for key in ("log_z", "kl_target_base")]
        pairs += [(here[key][name], there[key][name]) for key in ("rates", "target_means") for name in there[key]]
        for mine, kept in pairs:
            assert abs(mine["value"] - kept["value"]) <= 4 * math.hypot(mine["stderr"], kept["stderr"])
        if task == "women":
            rate, lambda_ = here["rates"]["women"]["value"], state["target"]["lambda"][0]
            z = rate * math.exp(lambda_) + 1 - rate
            share = rate * math.exp(lambda_) / z
            assert here["log_z"]["value"] == pytest.approx(math.log(z), rel=1e-9)
            assert here["target_means"]["women"]["value"] == pytest.approx(share, rel=1e-9)
            assert here["kl_target_base"]["value"] == pytest.approx(share * lambda_ - math.log(z), rel=1e-9)
        if task == "word_restaurant":
            assert here["kl_target_base"]["value"] == pytest.approx(-here["log_z"]["value"], abs=1e-9)


def test_which_learning_rate_is_taken(tmp_path):
    """The choice is the smallest rate within an error of the best, by each method's own aim, once all were tried."""
    kl = {5e-5: 0.9, 1.5e-4: 0.52, 5e-4: 0.5, 1.5e-3: 3.0}
    phi = {5e-5: 0.2, 1.5e-4: 0.5, 5e-4: 0.9, 1.5e-3: 0.99}
    for each in grid.tuning():
        if each.method == "gdc" and each.learning_rate == 5e-5:
            continue
        last = {"kl_exact": kl[each.learning_rate], "kl_exact_stderr": 0.03, "phi/politics": phi[each.learning_rate],
                "phi/politics_stderr": 0.01, "kl_policy_base": 4 * phi[each.learning_rate] ** 2,
                "kl_policy_base_stderr": 0.0}  # fmt: skip
        finite = each.method != "reinforce" or each.learning_rate < 1e-3
        last |= {} if finite else dict.fromkeys(last)  # JSON has None where a figure is NaN
        path = tmp_path / each.name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"method": each.method, "evaluations": [last], "finite": finite}))
    chosen = grid.learning_rates(tmp_path)
    near_p = dict.fromkeys(("gdc++", "js", "tv"), 1.5e-4)
    assert chosen == near_p | {"reinforce": 5e-4, "reinforce_p": 1.5e-3, "kl_control": 1.5e-4}
    with pytest.raises(LookupError, match="no learning rate for gdc: run the tuning"):
        list(grid.plan(["main"], tmp_path))


def test_the_grid_is_that_of_the_issue(monkeypatch):
    monkeypatch.setattr(grid, "learning_rates", lambda folder: dict.fromkeys(grid.TUNED, 1e-4))
    assert {each.learning_rate for each in grid.quick()} == {1e-4}
    runs = list(grid.plan(grid.PARTS, Path()))
    assert len({each.name for each in runs}) == len(runs)
    main = [each for each in runs if each.part == "main"]
    assert len(main) == 5 * 10 * 3 and {each.task for each in main} == set(truth.TASKS) - {"tuning"}
    for each in runs:
        if each.method == "base":
            continue
        settings = run.settings(each.method, each.batch, each.learning_rate, run.SAMPLES)
        per_step = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
        epochs = settings.get("ppo_epochs", 1)
        assert per_step == each.batch and per_step * settings["max_steps"] == 20_480 * epochs
        assert settings["max_steps"] % settings["eval_steps"] == 0
        assert settings["warmup_steps"] * per_step == 2560 * epochs
        assert settings["proposal_interval"] * per_step == 2560
        assert settings["proposal_decay"] ** (1 / per_step) == pytest.approx(0.8 ** (1 / 256))


RUN_PY = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.parent.mkdir(parents=True, exist_ok=True)
(out.parent / (out.name + ".part")).write_text("half of it")
if sys.argv[2] == {dies!r}:
    raise ValueError("the logits hold NaN or +inf in row 3") if {nan} else SystemExit("nan\\nkilled")
out.write_text("{{}}")
"""


def test_a_run_that_dies(tmp_path, monkeypatch):
    """A failed run is on record with its error, the others go on, and a later start tries it again."""
    monkeypatch.setattr(grid, "HERE", tmp_path)
    folder = tmp_path / "runs"
    runs = [grid.Run("main", "women", method, 0) for method in ("gdc", "gdc++", "js")]

    def start(dies, nan=False):
        (tmp_path / "run.py").write_text(RUN_PY.format(dies=dies, nan=nan))
        said = io.StringIO()
        return grid.work(runs, folder, 1, Console(file=said, width=200), commits=True), said.getvalue()

    def git(*command):
        return subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    git("config", "user.name", "x")
    git("config", "user.email", "x@example.org")
    failed, said = start("gdc++", nan=True)
    assert failed == 1 and "row 3" in said and "3 runs, 0 done" in said
    record = json.loads((folder / "main" / "women-gdcpp-seed0.failed.json").read_text())
    assert record["status"] == 1 and record["nan"] and record["arguments"][:2] == ["women", "gdc++"]
    assert record["stderr"][-1] == "ValueError: the logits hold NaN or +inf in row 3"
    names = {"women-gdc-seed0.json", "women-gdcpp-seed0.failed.json", "women-js-seed0.json"}
    assert git("ls-files").split() == sorted(f"runs/main/{name}" for name in names) and not git("diff", "HEAD")

    failed, said = start("gdc++")
    assert failed == 1 and "3 runs, 2 done" in said
    assert not json.loads((folder / "main" / "women-gdcpp-seed0.failed.json").read_text())["nan"]
    # the record of the failed run stays
    assert start("no method")[0] == 0 and len(list(folder.glob("*/*.failed.json"))) == 1
    names.add("women-gdcpp-seed0.json")
    assert git("ls-files").split() == sorted(f"runs/main/{name}" for name in names)

    monkeypatch.setattr(grid, "plan", lambda parts, folder: runs)
    monkeypatch.setattr(sys, "argv", ["grid.py", "main", "--out", str(folder), "--commit"])
    with pytest.raises(SystemExit) as ended:
        grid.main()
    assert not ended.value.code and store.read(folder).keys() == {f"main/{name}" for name in names}
    assert git("ls-files").split() == [f"runs/{store.ARCHIVE}"] and not git("diff", "HEAD")


def test_results_are_packed_into_one_archive(tmp_path):
    """No run is lost, a later file replaces what is packed, and the bytes do not depend on the order."""
    results = {f"main/women-gdc-seed{i}.json": {"seed": i, "kl": 0.1 + i, "text": ["a “b”\n"]} for i in range(3)}
    results["variants/women-tv-seed0.failed.json"] = {"nan": True}

    def write(folder, names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(results[name]))

    assert store.read(tmp_path) == {} and not store.pack(tmp_path)
    write(tmp_path / "at_once", results)
    assert store.pack(tmp_path / "at_once")
    for name in reversed(results):
        write(tmp_path / "in_turn", [name])
        assert store.read(tmp_path / "in_turn")[name] == results[name]
        store.pack(tmp_path / "in_turn")
    both = [folder / store.ARCHIVE for folder in (tmp_path / "at_once", tmp_path / "in_turn")]
    assert both[0].read_bytes() == both[1].read_bytes() and list(both[0].parent.iterdir()) == [both[0]]
    assert store.read(tmp_path / "at_once") == results and list(store.read(tmp_path / "at_once")) == sorted(results)

    results["main/women-gdc-seed1.json"]["kl"] = 0.5
    write(tmp_path / "at_once", ["main/women-gdc-seed1.json"])
    assert store.read(tmp_path / "at_once") == results
    store.pack(tmp_path / "at_once")
    assert store.read(tmp_path / "at_once") == results and both[0].read_bytes() != both[1].read_bytes()


def test_the_reward_of_a_task_is_the_mean_of_its_features():
    read = recipe.read(PAPER / "tasks" / "women_sports.yaml")
    x = recipe.load("tiny-bios").sample(n=400, max_new_tokens=48, seed=0)
    women, sports = (set(read["constraints"][0]["moment"]["contains"]["any_of"]),
                     set(read["constraints"][1]["contains"]["any_of"]))  # fmt: skip
    wanted = [(bool(women & set(text.split())) + bool(sports & set(text.split()))) / 2 for text in x.text]
    assert run.reward_of(read)(x).tolist() == wanted and len(set(wanted)) == 3


def test_the_gradients_variance_in_one_state(tmp_path):
    """Before the first step q is pi and the baseline is 1, so A = u and A = u - 1 on the same sequences."""
    state = json.loads((truth.RESULTS / "targets" / "women.json").read_text())
    changed = {"train.objective": "gdc++", "train.output_dir": str(tmp_path)}
    read = recipe.read(PAPER / "tasks" / "women.yaml", changed)
    trainer = recipe.prepare(read, fitted=state["target"], say=lambda line: None)
    log_z = state["log_z"]["value"]
    found = variance.measure(trainer, log_z, 24, seed=3)
    x = trainer.policy.sample(n=24, max_new_tokens=48, seed=3)
    u = (trainer.target.log_prob(x) - log_z - x.log_prob).exp()
    for method, weight in (("gdc", u), ("gdc++", u - 1)):
        expected = gradient_variance(trainer.policy, x, weight)
        assert found[method]["gradient_variance"] == pytest.approx(expected.variance, rel=1e-3)
        assert found[method]["gradient_norm"] == pytest.approx(expected.norm, rel=1e-3)
        assert found[method]["advantage_variance"] == pytest.approx(float(u.var()), rel=1e-3)


def test_a_run(tmp_path, monkeypatch):
    """A run of one step for each kind of method works, and the base's evaluation is the same at any method's seed."""
    small = {"batch": 16, "samples": 16, "evaluations": 1, "eval_samples": 64}
    known = truth.read("women", recipe.load("tiny-bios"))
    part = truth.Truth(known.samples[:32], known.log_target[:32], known.log_z, known.target_state)
    monkeypatch.setattr(run.truth, "read", lambda *a: part)
    found = run.run("women", "kl_control", 3, learning_rate=1e-4, **small)
    (last,) = found["evaluations"]
    assert last["samples"] == 16 and found["finite"] and found["history"]["step"] == [1, 2]
    assert {"phi/women", "kl_policy_base", "kl_policy", "kl_exact", "distinct_1", "self_bleu_5"} <= set(last)
    (before,) = run.run("women", "base", 3, **small)["evaluations"]
    assert abs(before["kl_policy_base"]) < 1e-5 and before["samples"] == 0
    of_base = part.kl(part.samples.log_prob)  # the base's own log-probabilities are stored with the samples
    assert before["kl_exact"] == pytest.approx(of_base.value, abs=1e-4)
    assert before["kl_exact_stderr"] == pytest.approx(of_base.stderr, rel=1e-4)
    assert found["log_z"] == vars(known.log_z)
    json.dumps(found, allow_nan=False)
