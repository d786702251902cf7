"""Test benchmarks/paper/report.py on a few runs of which every mean, error, interval and count is known."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"
# the tests may stand alone, such as beside an installed wheel
if not (PAPER.parents[1] / "pyproject.toml").exists():
    pytest.skip("no source tree", allow_module_level=True)
sys.path.insert(0, str(PAPER))
import report  # noqa: E402

grid = report.grid

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")
KL = {"gdc": {0: 0.5, 1: 0.6, 2: 0.7}, "gdc++": {0: 0.4, 1: 0.45, 2: 0.53}}


def write(folder, task, method, seed, *, part="main", finite=True, log_prob=None, history=None, **changed):
    """Write a run of two evaluations as run.py writes it. ``changed`` replaces figures of the last one."""
    phi = dict.fromkeys((f"phi/{name}" for name in report.wanted(task)), 0.4)
    first = {"samples": 0 if method == "base" else 10_240, **phi, "kl_exact": 1.0, "kl_policy": 0.9,
             "kl_policy_base": 0.5, "self_bleu_5": 0.3, "distinct_1": 0.9, "length": 29.0}  # fmt: skip
    end = first | {"samples": 20_480} | changed
    run = grid.Run(part, task, method, seed, 1e-4)
    result = {
        "task": task, "method": method, "seed": seed, "batch": 256, "samples": 20_480, "finite": finite,
        "log_z": vars(report.truth.log_z_of(report.target(task))),
        "settings": {"learning_rate": 1e-4, "max_steps": 80, "proposal_interval": 10}
        | ({"proposal_check_samples": 2048} if method == "gdc++_fresh" else {}),
        "evaluations": [first] if method == "base" else [first, end], "history": history or {},
    }  # fmt: skip
    if log_prob is not None:
        result["log_prob"] = log_prob
    path = folder / run.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))


def rows(text):
    """Return a table's rows as dicts."""
    header, _, *others = [[cell.strip() for cell in line[1:-2].split("|")] for line in text.splitlines()]
    return [dict(zip(header, cells, strict=True)) for cells in others]


@pytest.fixture
def folder(tmp_path):
    """Write three seeds of both methods on a task. On another, GDC++ has one of GDC's two seeds and is worse there."""
    for method, of_seed in KL.items():
        for seed, value in of_seed.items():
            write(tmp_path, "women", method, seed, kl_exact=value, **{"phi/women": 0.4 + 0.02 * (method == "gdc++")})
    for method, of_seed in {"gdc": {0: 2.0, 1: 0.8}, "gdc++": {1: 0.9}}.items():
        for seed, value in of_seed.items():
            write(tmp_path, "word_amazing", method, seed, kl_exact=value)
    return tmp_path


def test_means_and_errors(folder):
    found = {(row["task"], row["method"]): row for row in rows(report.main_table(report.Runs(folder)))}
    assert list(found) == [(t, m) for t in ("word_amazing", "women") for m in ("GDC", "GDC++")]
    gdc = found["women", "GDC"]
    assert gdc["seeds"] == "3" and gdc["KL(p‖π)"] == "0.600 ± 0.058"  # .1 / sqrt 3
    assert found["women", "GDC++"]["KL(p‖π)"] == "0.460 ± 0.038"
    assert found["word_amazing", "GDC++"]["KL(p‖π)"] == "0.900"  # one seed gives no error
    assert gdc["sequences drawn in training"] == "20,480" and gdc["tokens of a sequence"] == "29.0 ± 0.0"
    assert float(gdc["its distance from KL(p‖a)"].split()[0]) == pytest.approx(
        report.kl_target_base("women").value - 0.5, abs=1e-3
    )
    assert float(gdc["distance of E_π[φ] from E_p[φ]"].split()[0]) == pytest.approx(
        report.attained("women")["women"] - 0.4, abs=1e-3
    )


def test_differences_are_of_the_seeds_that_both_have(folder):
    found = {row["task"]: row for row in rows(report.paired_table(report.Runs(folder)))}
    # the differences are -.1, -.15 and -.17; their deviation is .0361, and t of two degrees of freedom is 4.303
    assert found["women"]["KL(p‖π)"] == "-0.140 ± 0.090" and found["women"]["seeds"] == "3"
    assert found["women"]["its distance from what is wanted"] == "-0.020 ± 0.000"
    assert found["women"]["E_π[φ], mean over features"] == "+0.020 ± 0.000"
    assert found["word_amazing"]["KL(p‖π)"] == "+0.100" and found["word_amazing"]["seeds"] == "1"
    # no run has kept log pi
    assert "standard error of it from the shared samples of p" not in found["women"]


def test_the_error_of_a_difference_from_the_samples_that_all_share(folder):
    """The gaps of two seeds on four samples are averaged over seeds before their deviation is taken."""
    pi = {"gdc": {0: [-5.0, -6.0, -7.0, -8.0], 1: [-5.0, -6.0, -7.0, -8.0]},
          "gdc++": {0: [-4.0, -6.0, -6.0, -8.0], 1: [-6.0, -6.0, -6.0, -8.0]}}  # fmt: skip
    for method, of_seed in pi.items():
        for seed, log_prob in of_seed.items():
            write(folder, "women", method, seed, kl_exact=KL[method][seed], log_prob=log_prob)
    runs = report.Runs(folder)
    (women,) = (row for row in rows(report.paired_table(runs)) if row["task"] == "women")
    # the mean gaps are 0, 0, -1, 0
    assert women["standard error of it from the shared samples of p"] == "0.250"
    # .0896 is the half of the interval that comes from the seeds alone, as above
    assert women["KL(p‖π)"] == f"-0.140 ± {math.hypot(0.0896, 1.96 * 0.25):.3f}"
    (claim,) = (row for row in rows(report.claims(runs)) if row["claim"] == "GDC++ at or below GDC in KL(p‖π)")
    assert "excludes 0 on 0 of 1" in claim["here"]


def test_the_base_has_the_error_of_the_exact_samples(folder):
    """The base is the same at every seed, so the spread over seeds says nothing."""
    for seed in (0, 1):
        write(folder, "women", "base", seed, part="base", kl_exact_stderr=0.03)
        path = folder / grid.Run("base", "women", "base", seed).name
        result = json.loads(path.read_text())
        result["evaluations"][0] |= {"kl_exact": 0.736, "kl_exact_stderr": 0.03}
        path.write_text(json.dumps(result))
    for seed, value in KL["gdc"].items():
        write(folder, "women", "gdc", seed, kl_exact=value, history={"kl_policy": [0.9, value + 0.1, None]})
    found = {row["method"]: row for row in rows(report.main_table(report.Runs(folder))) if row["task"] == "women"}
    assert found["a"]["KL(p‖π)"] == "0.736" and found["a"]["its standard error from samples of p and log Z"] == "0.030"
    assert found["a"]["its distance from KL(p‖a)"] == ""
    # this is the last estimate that is not None
    assert found["GDC"]["x ~ q, running Z, as in the paper"] == "0.700 ± 0.058"
    assert found["a"]["x ~ q, running Z, as in the paper"] == ""


def test_wins(folder):
    """Wins count in pairs. On "amazing" the mean of GDC++ is lower only because GDC++ lacks a seed."""
    found = {row["claim"]: row["here"] for row in rows(report.claims(report.Runs(folder)))}
    assert found["GDC++ at or below GDC in KL(p‖π)"] == (
        # the differences are +.1 and -.14; their error is .12, and t of one degree of freedom is 12.706
        f"1 of 2; not word_amazing; mean over tasks -0.020 ± {12.706 * 0.12:.3f}; "
        "the 95% interval excludes 0 on 1 of 1, and on 0 the other way"
    )
    assert found["GDC++ at or below GDC in KL(π‖a)"].startswith(
        "2 of 2; mean over tasks +0.000 ± 0.000; the 95% interval excludes 0 on 0 of 1,"
    )
    assert found["GDC++ at or above GDC in E[φ], the mean of a task's features"].startswith(
        # the differences are +.02 on one task and 0 on the other
        f"2 of 2; mean over tasks +0.010 ± {12.706 * 0.01:.3f}; the 95% interval excludes 0 on 1 of 1,"
    )
    for seed, value in {0: 0.65, 1: 0.75, 2: 0.84}.items():
        write(folder, "women", "gdc++", seed, kl_exact=value)
    found = {row["claim"]: row["here"] for row in rows(report.claims(report.Runs(folder)))}
    assert found["GDC++ at or below GDC in KL(p‖π)"] == (
        "0 of 2; not word_amazing, women; mean over tasks +0.123 ± 0.296; "
        "the 95% interval excludes 0 on 0 of 1, and on 1 the other way"
    )


def test_collapse_is_counted_where_there_is_something_to_compare(folder):
    # topics has no base to compare with
    for task, kl_base, distinct in (("women", 1.1, 0.2), ("topics", 9.0, 0.1)):
        write(folder, task, "reinforce", 0, kl_policy_base=kl_base, distinct_1=distinct)
    write(folder, "women", "base", 0, part="base")
    found = {row["claim"]: row["here"] for row in rows(report.claims(report.Runs(folder)))}
    assert found["REINFORCE's KL(π‖a) is twice that of GDC++ or more"] == "1 of 1; times 2 to 2"
    assert found["REINFORCE's Distinct-1 falls below the base's"] == "1 of 1; to 0.20 to 0.20"
    # neither task is pointwise
    assert found["REINFORCE satisfies the constraint: E[φ] on the pointwise tasks"] == ""
    write(folder, "word_restaurant", "reinforce", 0, **{"phi/restaurant": 0.98})
    found = {row["claim"]: row["here"] for row in rows(report.claims(report.Runs(folder)))}
    assert found["REINFORCE satisfies the constraint: E[φ] on the pointwise tasks"] == "0.980 to 0.980"


def test_runs_that_died_or_diverged_are_counted(folder):
    claim = "no run ends in a NaN"
    (row,) = (row for row in rows(report.claims(report.Runs(folder))) if row["claim"] == claim)
    assert row["here"] == "9 of 9 trainings are finite, the tuning's too; none died"
    write(folder, "women", "js", 0, part="variants", finite=False, kl_exact=None, log_prob=[None, -5.0])
    write(folder, "women", "gdc++", 0, kl_exact=0.4, log_prob=[-4.0, -5.0])
    write(folder, "tuning", "gdc", 100, part="tuning", finite=False, kl_exact=None)
    for name, nan in (("women-tv-seed0", True), ("women-tv-seed1", False)):
        (folder / "variants" / f"{name}{grid.FAILED}").write_text(json.dumps({"nan": nan, "status": 1}))
    runs = report.Runs(folder)
    (row,) = (row for row in rows(report.claims(runs)) if row["claim"] == claim)
    assert row["here"] == ("9 of 11 trainings are finite, the tuning's too; 2 died, 1 of them by what is not finite: "
                           "variants/women-tv-seed0, variants/women-tv-seed1")  # fmt: skip
    write(folder, "women", "tv", 1, part="variants")
    (row,) = (row for row in rows(report.claims(report.Runs(folder))) if row["claim"] == claim)
    assert row["here"].endswith("variants/women-tv-seed0, variants/women-tv-seed1 (run again since)")
    (js,) = (row for row in rows(report.variants_table(runs)) if row[""] == "JS")
    assert js["KL(p‖π)"] == "" and js["seeds"] == "1"


def test_all_methods_at_one_learning_rate(folder, monkeypatch):
    """The table has the runs at GDC++'s rate and no others, with the errors of the one run."""
    errors = {"phi/politics_stderr": 0.011, "kl_exact_stderr": 0.02, "kl_policy_base_stderr": 0.03}
    for method, kl in (("reinforce", 2.5), ("gdc++", 0.2)):
        write(folder, "tuning", method, 100, part="tuning", kl_exact=kl, **errors)
    monkeypatch.setattr(grid, "learning_rates", lambda _: {"gdc++": 1e-4})
    found = rows(report.equal_rate_table(report.Runs(folder), folder))
    assert [row["method"] for row in found] == ["REINFORCE", "GDC++"]
    assert found[0]["KL(p‖π)"] == "2.500 ± 0.020" and found[0]["E_π[φ]"] == "0.400 ± 0.011"
    monkeypatch.setattr(grid, "learning_rates", lambda _: {"gdc++": 5e-4})
    assert report.equal_rate_table(report.Runs(folder), folder) == ""


def test_variance_ratios(folder):
    """The ratio is taken after the first quarter of the log. Each seed gives a number, for an interval over seeds."""
    measured = [9.0, 9.0, 1.0, 3.0, 2.0, 8.0, 5.0, 7.0]
    others = {0: [1.0, 1.0, 4.0, 3.0, 8.0, 8.0, 20.0, 7.0], 1: [9.0, 9.0, 8.0, 24.0, 16.0, 64.0, 40.0, 56.0]}

    def logged(values):  # None stands for a step without a measurement
        return {"gradient_variance": [v for value in values for v in (None, value)]}

    def found():
        runs = report.Runs(folder)
        return [runs.of("main", "women", method) for method in ("gdc", "gdc++")]

    for seed, other in others.items():
        for method, values in (("gdc", other), ("gdc++", measured)):
            write(folder, "women", method, seed, kl_exact=KL[method][seed], history=logged(values))
        if not seed:  # the ratios alternate between 4 and 1, and their geometric mean is 2
            assert report.ratio(*found(), "gradient_variance") == "2.00 (one seed)"
    half = 12.706 * math.log(2)  # 2 and 8 lie log 2 on either side of 4, so the error is log 2
    expected = f"4.00 (95% {4 * math.exp(-half):.2f} to {4 * math.exp(half):.2f}; 2.00, 8.00)"
    assert report.ratio(*found(), "gradient_variance") == expected
    assert report.ratio(*found(), "gradient_norm") == ""


def test_variance_ratios_of_one_state():
    """Each seed has four states. The two halves are averaged apart, with intervals over seeds."""

    def run(*ratios):
        better = {"gradient_variance": 2.0, "advantage_variance": 3.0}
        return {"tasks": {"women": [{"samples": 256 * (i + 1), "gdc++": better,
                                     "gdc": {"gradient_variance": 2.0 * r, "advantage_variance": 6.0}}
                                    for i, r in enumerate(ratios)]}}  # fmt: skip

    gradient, advantage = rows(report.same_state_table([run(1.0, 4.0, 8.0, 2.0)]))
    assert gradient["after 256, 512, 768, 1,024 sequences (mean over seeds)"] == "1.00, 4.00, 8.00, 2.00"
    assert gradient["geometric mean of the first half"] == "2.00 (one seed)"
    assert gradient["of the second"] == "4.00 (one seed)" and advantage["of the second"] == "2.00 (one seed)"
    gradient, _ = rows(report.same_state_table([run(1.0, 4.0, 8.0, 2.0), run(1.0, 4.0, 16.0, 16.0)]))
    half = 12.706 * math.log(2)
    assert gradient["of the second"] == f"8.00 (95% {8 * math.exp(-half):.2f} to {8 * math.exp(half):.2f}; 4.00, 16.00)"
    assert gradient["geometric mean of the first half"] == "2.00 (95% 2.00 to 2.00; 2.00, 2.00)"


@pytest.mark.parametrize(("n", "expected"), [(2, 12.706), (6, 2.571), (8, 2.365), (10, 2.262), (30, 2.045)])
def test_students_t(n, expected):
    assert report.student(n) == pytest.approx(expected, abs=0.02)


def test_a_curve_is_of_where_all_seeds_have_been(folder):
    """Only one seed has its base yet. A point there would be the mean of other seeds than the other points are."""
    write(folder, "women", "base", 0, part="base")
    runs = report.Runs(folder)
    curves = [runs.curve(result) for result in runs.of("main", "women", "gdc").values()]
    assert [len(curve) for curve in curves] == [3, 2, 2]
    assert report.over_seeds(curves, "kl_exact") == [
        (10_240, 1.0, 0.0),
        (20_480, pytest.approx(0.6), pytest.approx(0.1 / 3**0.5)),
    ]


def test_kl_with_all_that_is_known_of_log_z_by_now(folder):
    """The newest log Z replaces what a run used, in the value and in the error.

    A run that has no log Z of its own used that of rejection.
    """
    best = report.truth.log_z_of(report.target("women"))
    path = folder / grid.Run("main", "women", "gdc", 0).name
    result = json.loads(path.read_text())
    for kept in ({"value": best.value + 0.25, "stderr": 0.03}, None):
        result["log_z"] = kept
        if kept is None:
            del result["log_z"]
        used = kept or report.target("women")["log_z"]
        result["evaluations"][-1]["kl_exact_stderr"] = math.hypot(0.04, used["stderr"])
        path.write_text(json.dumps(result))
        last = report.Runs(folder).of("main", "women", "gdc")[0]["evaluations"][-1]
        assert last["kl_exact"] == pytest.approx(KL["gdc"][0] + used["value"] - best.value)
        assert last["kl_exact_stderr"] == pytest.approx(math.hypot(0.04, best.stderr))


@pytest.mark.parametrize("task", grid.GRID)
def test_the_exact_samples_and_those_of_the_base_agree(task):
    """Both agree on log Z and E_p of the moments. log P - log a = lambda . phi tells an exact sample's moments."""
    state = report.target(task)
    base, lambda_ = state["base"], np.array(state["target"]["lambda"])
    error = math.hypot(base["log_z"]["stderr"], state["log_z"]["stderr"])
    assert abs(base["log_z"]["value"] - state["log_z"]["value"]) < 4 * error
    arrays = np.load(grid.RESULTS / "targets" / f"{task}.npz")
    subsets = (np.arange(2 ** len(lambda_))[:, None] >> np.arange(len(lambda_))) & 1
    gaps = (arrays["log_target"] - arrays["log_base"])[:, None] - subsets @ lambda_
    assert abs(gaps).min(1).max() < 1e-6
    shares = subsets[abs(gaps).argmin(1)].mean(0)
    found = report.attained(task)
    for name, share in zip(state["target"]["moment_names"], shares, strict=True):
        error = math.hypot(base["target_means"][name]["stderr"], math.sqrt(share * (1 - share) / len(gaps)))
        assert abs(found[name] - share) < 4 * error
    assert all(found[name] == 1.0 for name in set(found) - set(state["target"]["moment_names"]))


def test_all_of_it(folder, monkeypatch, capsys):
    write(folder, "women", "gdc++_fresh", 0, part="variants", kl_exact=0.3)
    monkeypatch.setattr(sys, "argv", ["report.py", "--runs", str(folder), "--out", str(folder / "out")])
    report.main()
    text = (folder / "out" / "tables.md").read_text()
    assert "from 10 runs beside the tuning's" in text and "36,864" in text
    assert {path.name for path in (folder / "out").glob("*.png")} == {"women.png", "word_amazing.png", "studies.png",
                                                                  "differences.png"}  # fmt: skip
    assert "10 runs" in capsys.readouterr().out


def test_the_tables_are_of_the_runs_that_are_there():
    folder = grid.RESULTS / "runs"
    if not folder.exists():
        pytest.skip("an sdist leaves the results of the runs out")
    runs = report.Runs(folder)
    text = (grid.RESULTS / "tables.md").read_text()
    assert text == report.page(report.written(runs, folder), runs.done), "run benchmarks/paper/report.py"


def test_the_recipes_are_those_of_the_script(tmp_path, monkeypatch):
    """The files of both models are what the script writes, and each can be read, with its constraints."""
    import recipes

    from dmfast.training import recipe

    monkeypatch.setattr(recipes, "HERE", tmp_path)
    recipes.main()
    monkeypatch.chdir(PAPER.parents[1])  # the recipes name the classifier relative to this directory
    for folder in ("tasks", "smollm2"):
        written = {path.name: path.read_text() for path in (tmp_path / folder).glob("*.yaml")}
        assert written == {path.name: path.read_text() for path in (PAPER / folder).glob("*.yaml")}
        for name in written:
            read = recipe.read(PAPER / folder / name)
            assert [recipe.constraint(each) for each in read["constraints"]]


def test_the_page_has_the_figures_of_the_tables():
    """Each verdict of docs/paper.md that counts tasks or runs agrees with the claims of tables.md."""
    path = PAPER.parents[1] / "docs" / "paper.md"
    if not path.exists():
        pytest.skip("there is no documentation beside the tests")
    text = path.read_text(encoding="utf-8")
    on_page = {cells[1].strip(): cells[3] for line in text.splitlines() if len(cells := line.split("|")) == 6}
    of_tables = dict(
        (line.split(" | ")[0].removeprefix("| "), line.split(" | ")[2])
        for line in (grid.RESULTS / "tables.md").read_text(encoding="utf-8").splitlines()
        if line.count(" | ") == 2
    )

    def shown(number: str) -> str:
        """Return a number in the form of the page."""
        return re.sub(r"\b0\.", ".", number.replace("-", "−"))

    for row, claim in (
        ("1", "GDC++ at or below GDC in KL(p‖π)"),
        ("2", "GDC++ at or above GDC in E[φ], the mean of a task's features"),
        ("3", "GDC++ at or below GDC in KL(π‖a)"),
    ):
        count, *_, mean, _ = of_tables[claim].split("; ")
        assert on_page[row].strip().startswith(f"{count}; {shown(mean)}"), (row, of_tables[claim])
    lowest, highest = re.findall(r"\d+\.\d+", of_tables["REINFORCE's Distinct-1 falls below the base's"])
    assert f"Distinct-1 {shown(lowest)} to {shown(highest)}" in on_page["8"]
    finite = re.match(r"\d+ of \d+ trainings are finite", of_tables["no run ends in a NaN"])
    assert finite and finite[0] in on_page["12"]
