"""Test ``dmfast report``: the page against the logs it was made of, number by number, and what a page must not do."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch
from trainer_job import job

from dmfast import cli
from dmfast.estimators import Estimate
from dmfast.report import page, read, results, texts
from dmfast.report.marks import letter, symbol
from dmfast.report.plots import plots, svg
from dmfast.report.results import TITLES
from dmfast.report.words import WORDS, word
from dmfast.training import samples
from dmfast.training.verdict import verdict

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
NASTY = "<script>alert('1')</script> & \"$x^2$\" ]]> \u2028"


class Parsed(HTMLParser):
    """Parse a page into tables {(group, row): cells}, texts, svg paths and attributes. Its tags have to match."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.attributes, self.tags = [], [], Counter()
        self.tables, self.headings, self.items, self.paths, self.columns = [], [], [], [], []
        self.group, self.row, self.text = "", None, []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)
        attrs = dict(attrs)
        if tag == "path":
            self.paths.append(attrs)
        if tag == "table":
            self.tables.append({})
            self.group = ""
        if tag == "tr":
            self.row, self.cells = None, []
        if tag in ("td", "th", "h3", "h4", "li", "title"):
            self.text = []
            self.scope = attrs.get("scope")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        text = "".join(self.text)
        if tag == "th" and self.scope == "rowgroup":
            self.group = text.strip()
        elif tag == "th" and self.scope == "row":
            self.row = text.strip()
        elif tag == "td" and self.row is not None:
            self.cells.append(text)
        elif tag == "tr" and self.row is not None:
            self.tables[-1][self.group, self.row] = self.cells
        elif tag == "h3":
            self.headings.append(text)
        elif tag == "h4":
            self.columns.append(" ".join(text.split()))
        elif tag == "li":
            self.items.append(text)


def estimate(value, stderr):
    return {"value": value, "stderr": stderr}


def a_log(seed=0, rate=1e-4, **others):
    generator = torch.Generator().manual_seed(seed)

    def step(i):
        a, b, c = torch.rand(3, generator=generator).tolist()
        return {
            "step": i, "phi/women": a, "phi/women_stderr": 0.03, "kl_policy": b, "kl_policy_stderr": 0.1 * c,
            "kl_proposal": a + b, "log_z": c, "ess": 10 * a, "weight_std": 1 + b, "swapped": float(i == 3),
            "swaps": float(i >= 3),
            "seconds_sampling": 0.5, "seconds_scoring": 0.25, "seconds_policy": 1.0,
        }  # fmt: skip

    evaluation = {"step": 2, "eval_phi/women": 0.4, "eval_phi/women_stderr": 0.03, "eval_kl_policy_base": 0.6}
    return {
        "machine": {"cpu": "a <b> processor", "threads": 2}, "swaps": 1, "seconds_training": 41.552807,
        "recipe": {"model": "tiny-bios", "stop": "\n", "train": {"learning_rate": rate, "output_dir": f"out{seed}"}},
        "before": {"phi/women": estimate(0.0683 + seed, 0.0056), "kl_policy_base": estimate(0.0, 0.0)},
        "after": {"phi/women": estimate(0.4795 + seed, 0.011), "kl_policy_base": estimate(0.7072, None)},
        "ideal": {"phi/women": estimate(0.5, 0.0), "kl_policy_base": estimate(0.6785, 0.037)},
        "samples_before": ["A man.", "Another man."], "samples_after": [f"A woman {seed}.", "A man."],
        "history": [*map(step, range(1, 5)), evaluation], **others,
    }  # fmt: skip


def write(folder, log):
    folder.mkdir(parents=True)
    (folder / "log.json").write_text(json.dumps(log))
    return str(folder)


@pytest.fixture
def two(tmp_path, capsys):
    """Return the logs of two runs, and their page, as the command makes it."""
    logs = [a_log(0), a_log(1, 3e-4)]
    runs = [write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)]
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", *runs, "--out", str(out)]) == 0
    assert f"wrote {out}: 2 runs" in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    return logs, html, Parsed(html)


def test_the_numbers_are_those_of_the_logs(two):
    logs, html, found = two
    measures, training, phases, differ, alike, machine = found.tables
    names = ("A run0", "B run1")

    def cells(log, name):
        e = [log[key][name] for key in ("before", "after", "ideal")]
        digits = [2 if not x["stderr"] else 1 - math.floor(math.log10(x["stderr"])) for x in e]
        return [
            f"{x['value']:.{d}f} ±\u00a0{x['stderr']:.{d}f}" if x["stderr"] else f"{x['value']:.4g}"
            for x, d in zip(e, digits, strict=True)
        ]

    for name, log in zip(names, logs, strict=True):
        assert measures["E[women]", name] == cells(log, "phi/women")
        assert measures["KL(π‖a), nats", name] == cells(log, "kl_policy_base")
    assert measures["E[women]", "A run0"] == ["0.0683 ±\u00a00.0056", "0.479 ±\u00a00.011", "0.5"]
    assert training["", "steps"] == ["4", "4"]
    assert training["", "swaps of q"] == ["1", "1"]
    assert training["", "seconds"] == ["41.55", "41.55"]
    for row, key in (("KL(p‖π)", "kl_policy"), ("KL(p‖q)", "kl_proposal"), ("ESS", "ess")):
        assert training["", f"{row}, last step"] == [f"{log['history'][3][key]:.4g}" for log in logs]
    assert differ == {("settings that differ", "train.learning_rate"): ["0.0001", "0.0003"]}
    assert alike == {
        ("settings of all runs", "model"): ["tiny-bios"],
        ("settings of all runs", "stop"): ['"\\n"'],
    }
    assert phases == {("", "sampling"): ["0.5"] * 2, ("", "scoring"): ["0.25"] * 2, ("", "policy"): ["1"] * 2}
    assert html.count("<span>1.75 s</span>") == 2
    assert machine == {("", "cpu"): ["a <b> processor"], ("", "threads"): ["2"]}
    assert [item for item in found.items if "log.json" not in item] == [
        "A man.", "Another man.", "A woman 0.", "A man.", "A woman 1.", "A man."]  # fmt: skip
    assert found.columns == ["before", "after: A run0", "after: B run1"]
    assert [item.split()[-2:] for item in found.items if "log.json" in item] == [
        ["train.learning_rate", "0.0001"], ["train.learning_rate", "0.0003"]]  # fmt: skip


def test_the_verdict_comes_first_and_settings_are_folded(tmp_path):
    """The words are those of a real verdict, so that another wording of it fails here."""
    women = {"phi/women": Estimate(0.07, 0.01), "kl_policy_base": Estimate(0.0, 0.0)}
    wanted = {"phi/women": Estimate(0.5, 0.0), "kl_policy_base": Estimate(0.7, 0.0)}
    logs = [a_log(i, verdict=verdict(women, after, wanted, ["women"])) for i, after in enumerate((wanted, women))]
    html = page(read([write(tmp_path / f"run{i}", log) for i, log in enumerate([*logs, a_log(2)])]))
    yes, no, none = re.findall(r'<section class="(\w*)"><h3>.*?<strong>(.*?)</strong>', html)
    assert yes == ("yes", "✓ The policy matches the target: ")
    assert no == ("no", "✗ The run did not come to its target: ")
    assert none[0] == "" and none[1].startswith("No verdict: ")
    assert html.count("Criterion: ") == 1
    places = [html.index(each) for each in ("Result<", "Criterion", "<figure>", "Samples<", "Training<", "Settings<")]
    assert places == sorted(places)
    assert html.index("<summary><h2>Settings") < html.index("train.<wbr>learning_<wbr>rate</th>")
    assert "<details open" not in html


def test_what_is_drawn_is_announced_and_nothing_else(two, tmp_path):
    """The evaluations before and after have marks. A run without any has no marks, and its page speaks of none."""
    _, html, _ = two

    def figure(page, title):
        return re.search(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", page, re.S)[1]

    shown = figure(html, "E[women]")
    assert "marks: fresh samples from π" in shown and shown.count("<use") > 0
    assert "band and bars: ± one standard error" in shown
    assert "band: ±" in figure(html, "KL(p‖π)") and "ticks" in figure(html, "KL(p‖π)")
    assert "standard error" not in figure(html, "log Z")
    log = a_log()
    del log["before"], log["after"], log["history"][-1]
    for step in log["history"]:
        step["swapped"] = 0.0
    log["history"][1]["kl_policy"] = None
    alone = page(read([write(tmp_path / "alone", log)]))
    assert "marks" not in figure(alone, "E[women]") and "ticks" not in alone
    assert "gap: unknown" in figure(alone, "KL(p‖π)") and "gap" not in figure(alone, "log Z")


def test_every_word_is_explained(tmp_path):
    log, _ = with_passes(0, (1, 4), (0.1, 0.4), (0.3, 0.6))
    for when in ("before", "after"):
        log[when] |= {name: estimate(0.5, 0.1) for name in (*TITLES, "coverage", "distinct@4", "maj@4")}
    log["history"][0] |= {"seconds_check": 0.1, "reward": 0.5, "beta": 0.1, "gradient_variance": 1.0}
    run = read([write(tmp_path / "run", log)])
    found = Parsed(page(run))
    own = {"short", "precision against coverage", "steps", "seconds", "model", "stop", "cpu", "threads"}
    rows = {row for table in found.tables for _, row in table if not row.startswith("train.")}
    titles = {*rows, *found.headings} - own - {"Seconds a step"}
    assert {"KL(p‖π)", "ESS, last step", "E[women]", "pass@4", "check", "β"} <= titles
    assert {title for title in titles if word(title) not in WORDS} == set()


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-7e-08, 9e-07, "0"), (-1.454e-06, 9.6e-07, "0"), (-2.6e-07, 0.0, "0"),
        (0.7072, None, "0.7072"), (None, None, "–"),
        (0.4795, 0.0112, "0.479 ±\u00a00.011"), (28.64, 0.2, "28.64 ±\u00a00.20"), (123.4, 12.3, "123 ±\u00a012"),
        (12345.0, 400.0, "1.234e+04 ±\u00a04e+02"),
    ],
)  # fmt: skip
def test_digits_are_those_that_the_error_allows(value, error, text):
    numbers = [math.nan if each is None else each for each in (value, error)]
    assert results.estimate(Estimate(*numbers)) == text


def test_before_and_after_stand_together_under_their_prompt(tmp_path):
    """Prompts come from the log, from the trainer's rows, or from a recipe's one prompt; or the page says unknown."""
    recipe = a_log()["recipe"]

    def sections(log, rows=()):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, log)
        if rows:
            (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return re.findall(r'<section class="samples">(.*?)</section>', texts.samples(read([folder])), re.S)

    several = recipe | {"prompts": ["Maria", "Robert"]}
    logged = a_log(recipe=several, samples_prompts=["Maria", "Robert"])
    rows = [
        {"step": step, "evaluation": "eval", "prompt": prompt, "text": text}
        for step, written in ((0, ("A man.", "Another man.")), (4, ("A woman 0.", "A man.")))
        for prompt, text in zip(("Maria", "Robert"), written, strict=True)
    ]
    of_rows = a_log(recipe=several, steps=4, samples_before=[], samples_after=[])
    for log, written in ((logged, ()), (of_rows, rows)):
        maria, robert = sections(log, written)
        assert "Maria" in maria and Parsed(maria).items == ["A man.", "A woman 0."]
        assert "Robert" in robert and Parsed(robert).items == ["Another man.", "A man."]
    (one,) = sections(a_log(recipe=recipe | {"prompts": ["Once " * 60]}))
    assert "<summary>…" in one and one.count("<li>") == 4
    (unknown,) = sections(a_log(recipe=several))
    assert "the log does not say which" in unknown
    (chat,) = sections(a_log(recipe=recipe | {"prompts": [[{"role": "user", "content": "Who?"}]]}))
    assert "user: Who?" in chat
    (empty,) = sections(a_log())
    assert "Prompt" not in empty


@pytest.mark.parametrize(("title", "key"), [("E[women]", "phi/women"), ("KL(p‖π)", "kl_policy"), ("log Z", "log_z")])
def test_the_lines_go_through_the_points_of_the_logs(two, title, key):
    logs, html, _ = two
    (figure,) = re.findall(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", html, re.S)
    paths = Parsed(figure).paths
    values = torch.tensor([[h[key] for h in log["history"][:4]] for log in logs], dtype=torch.float64)
    drawn = []
    for i in range(2):
        of_run = [p["d"] for p in paths if f"stroke: var(--run{i})" in p.get("style", "") and "z" not in p["d"]]
        # marks and error bars have fewer points
        (line,) = [each for each in of_run if each.count("L") == 3]
        bands = re.findall(rf"fill: var\(--run{i}\); fill-opacity: 0.16", figure)
        assert len(bands) == (key != "log_z")  # the logs have no errors of log Z
        drawn.append([[float(v) for v in point.split()] for point in re.split("[ML]", line)[1:]])
    x, y = torch.tensor(drawn, dtype=torch.float64).unbind(-1)
    even = x[:1, :1] + (x[0, 1] - x[0, 0]) * torch.arange(4.0).double()
    torch.testing.assert_close(x, even.expand(2, 4), rtol=0, atol=1e-3)
    # both runs share the scale of the panel
    scale = (y[1, 3] - y[0, 0]) / (values[1, 3] - values[0, 0])
    torch.testing.assert_close(y - y[0, 0], scale * (values - values[0, 0]), rtol=0, atol=1e-3)


def test_the_page_needs_nothing_from_outside(two):
    _, html, found = two
    assert not found.tags.keys() & {"script", "link", "img", "iframe", "object"}
    assert "http" not in html and "//" not in html and "@import" not in html
    for tag, name, value in found.attributes:
        if name in ("src", "href", "xlink:href", "action"):
            assert value.startswith("#"), (tag, name, value)
        assert not name.startswith("on")
    assert all(each.startswith("#") for each in re.findall(r"url\(([^)]*)", html))
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for _, name, value in found.attributes if name == "href"} <= set(ids)


def test_what_runs_say_is_text(tmp_path):
    log = a_log(0, samples_after=[NASTY, "see http://example.org"])
    log["after"][f"phi/{NASTY}"] = log["before"][f"phi/{NASTY}"] = estimate(0.25, 0.01)
    log["history"][0][f"phi/{NASTY}"] = 0.5
    log["recipe"]["train"][NASTY] = NASTY
    log["machine"]["cpu"] = NASTY
    folder = "<b>&amp;$a$"
    found = Parsed(page(read([write(tmp_path / folder, log)])))
    assert found.tags["script"] == found.tags["b"] == 0
    assert found.tables[0]["", f"E[{NASTY}]"][1] == "0.250 ±\u00a00.010"
    settings = next(table for table in found.tables if ("", f"train.{NASTY}".strip()) in table)
    assert settings["", f"train.{NASTY}".strip()] == [json.dumps(NASTY, ensure_ascii=False)]
    assert NASTY.strip() in found.items
    assert f"E[{NASTY}]" in found.headings
    assert any(folder in item for item in found.items)


def with_passes(seed, k, before, after):
    """Return a log with pass@k of three evaluations: the base, midway, the policy."""
    log = a_log(seed)

    def measures(values):
        return {f"pass@{each}": estimate(value, 0.01) for each, value in zip(k, values, strict=True)}

    middle = [(a + b) / 2 + 0.05 for a, b in zip(before, after, strict=True)]
    log["before"] |= measures(before)
    log["after"] |= measures(after)
    for name, each in measures(middle).items():
        log["history"][-1] |= {f"eval_{name}": each["value"], f"eval_{name}_stderr": each["stderr"]}
    log["history"][-1]["eval_truncated"] = 0.25
    log["before"]["truncated"], log["after"]["truncated"] = estimate(0.5, 0.1), estimate(0.125, 0.05)
    for i, step in enumerate(log["history"][:-1]):
        step |= {"rewards/short/mean": 0.1 * i, "rewards/short/std": 0.5}
    return log, list(zip(*([each[at] for each in (before, middle, after)] for at in (-1, 0)), strict=True))


def points(figure, number, length):
    """Return the drawn lines of a run with so many points, each (length, 2)."""
    lines = [p["d"] for p in Parsed(figure).paths if f"stroke: var(--run{number})" in p.get("style", "")]
    found = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line) for line in lines if "fill" not in line]
    return [torch.tensor([[float(v) for v in pair] for pair in line]) for line in found if len(line) == length]


def test_right_answers_are_drawn_over_k_and_against_each_other(tmp_path):
    """The lines go through the points of the logs, and each run has a mark and a dash of its own."""
    k = (1, 4, 16)
    passes = [(0.1, 0.4, 0.9), (0.3, 0.6, 0.95)], [(0.1, 0.4, 0.9), (0.7, 0.75, 0.8)]
    logs, fronts = zip(*(with_passes(i, k, *each) for i, each in enumerate(passes)), strict=True)
    runs = read([write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)])
    html = page(runs)
    found = Parsed(html)
    assert {"pass@k", "precision against coverage", "pass@1", "pass@16", "short", "cut off"} <= set(found.headings)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    after = [found.tables[0]["pass@4", name][1] for name in ("A run0", "B run1")]
    assert after == ["0.600 ±\u00a00.010", "0.750 ±\u00a00.010"]
    over_k, front = (
        re.search(rf"<figure><h3>{title}</h3>(.*?)</figure>", html, re.S)[1]
        for title in ("pass@k", "precision against coverage")
    )
    for figure, wanted in (
        (over_k, [[(i, v) for i, v in enumerate(after)] for _, after in passes]),
        (front, fronts),
    ):
        drawn = torch.stack([points(figure, i, 3)[0] for i in range(2)])
        values = torch.tensor(wanted)
        for axis in (0, 1):
            at, of = drawn[..., axis].flatten(), values[..., axis].flatten()
            low, high = int(of.argmin()), int(of.argmax())
            scale = (at[high] - at[low]) / (of[high] - of[low])
            torch.testing.assert_close(at - at[low], scale * (of - of[low]), rtol=0, atol=0.01)
    names = re.search(r'<ul class="runs">(.*?)</ul>', html, re.S)[1]
    shapes, dashes = re.findall(r'points="([^"]*)"', names), re.findall(r"<line [^>]*>", names)
    assert len(set(shapes)) == len(set(dashes)) == 2 and "A</b>" in names and "B</b>" in names
    assert "stroke-dasharray" in over_k and over_k.count("<use") >= 6
    assert all(f">{each}</text>" in figure for figure in (over_k, front) for each in "AB")


def test_a_coverage_that_stays_as_it_is_has_a_readable_axis(tmp_path):
    passes = (0.1, 0.4, 1 - 1e-12), (0.3, 0.6, 1.0)
    log, _ = with_passes(0, (1, 4, 16), *passes)
    log["history"][-1] |= {"eval_pass@16": 1.0, "eval_pass@16_stderr": 0.0}
    log["after"]["pass@16"] = estimate(1.0, 0.0)
    html = page(read([write(tmp_path / "run", log)]))
    front = re.search(r"<figure><h3>precision against coverage</h3>(.*?)</figure>", html, re.S)[1]
    labels = re.findall(r">([^<>]+)</text>", front)
    assert {"0.90", "1.00"} <= set(labels) and not [each for each in labels if re.search(r"\de|\+", each)]


def test_many_runs_are_told_apart_without_their_colours():
    shown = [re.sub(r"color:[^\"]*", "", symbol(i)) for i in range(16)]
    assert len(set(shown)) == 16
    letters = [letter(i) for i in range(60)]
    assert len(set(letters)) == 60 and letters[0] == "A" and letters[25:28] == ["Z", "AA", "AB"]


def test_each_line_has_its_letter_and_no_two_of_them_meet(tmp_path):
    # the runs are alike, so that all lines end in one point
    logs = [a_log(0) for _ in range(6)]
    runs = read([write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)])
    figure = svg(next(plot for plot in plots(runs) if plot.title == "log Z"), runs, 0)
    at = {found[2]: float(found[1]) for found in re.finditer(r'y="([\d.]+)"[^>]*>([A-F])</text>', figure)}
    assert sorted(at) == list("ABCDEF")
    heights = sorted(at.values())
    assert all(b - a > 7 for a, b in itertools.pairwise(heights)) and heights[0] > 0


def test_runs_without_a_verifier_have_no_right_answers(two):
    assert "Right answers" not in two[1]


def of_trainer(tmp_path):
    trainer = job(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, log_samples=3,
                  eval_diversity=20, eval_on_start=True)  # fmt: skip
    trainer.train()
    return trainer


def test_a_trainer_s_folder_is_a_run(tmp_path):
    """The page has the newest checkpoint's state, and samples of the first and the last evaluation."""
    trainer = of_trainer(tmp_path)
    (run,) = read([tmp_path])
    assert run.source == tmp_path / "checkpoint-4" / "trainer_state.json"
    assert [h["step"] for h in run.steps] == [1, 2, 3, 4] and [h["step"] for h in run.evaluations] == [0, 2, 4]
    evaluations = [h for h in trainer.state.log_history if "eval_runtime" in h]
    for found, logged in ((run.before, evaluations[0]), (run.after, evaluations[-1])):
        assert found["phi/w3"].value == logged["eval_phi/w3"]
        assert found["phi/w3"].stderr == logged["eval_phi/w3_stderr"]
        assert found["self_bleu_5"].value == logged["eval_self_bleu_5"]
    assert run.samples_after == trainer.eval_samples.text[:3] and len(run.samples_before) == 3
    assert run.series("eval_distinct_1")[1] == [h["eval_distinct_1"] for h in evaluations]
    assert run.swaps == trainer.proposal.swaps
    (early,) = read([tmp_path / "checkpoint-2"])
    assert early.steps[-1]["step"] == 2
    assert early.samples_after == [row["text"] for row in samples.read(tmp_path) if row["step"] == 2]
    found = Parsed(page([run, early]))
    shown = [cells[1] for (group, _), cells in found.tables[0].items() if group == "Self-BLEU-5"]
    assert shown == [f"{h['eval_self_bleu_5']:.4g}" for h in (evaluations[-1], evaluations[1])]
    assert found.headings.count("Distinct-1") == 1


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / name, a_log()) for name in ("a/run", "b/run", "c")]
    assert [run.name for run in read(folders)] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert [run.name for run in read(folders[2:])] == ["c"]
    assert [run.name for run in read([folders[2]] * 2)] == ["c (1)", "c (2)"]
    assert [run.name for run in read([f"{folders[2]}/log.json"])] == ["c"]


def test_what_is_not_finite_is_left_out(tmp_path):
    """A null in JSON gives a line no point, and gives a table a dash."""
    log = a_log()
    log["history"][1]["kl_policy"] = None
    log["history"][2]["kl_policy"] = float("nan")
    log["after"]["phi/women"] = estimate(None, None)
    (run,) = read([write(tmp_path / "run", log)])
    assert run.series("kl_policy")[0] == [1, 4]
    assert Parsed(page([run])).tables[0]["", "E[women]"][1] == "–"


WHOLE = json.dumps(a_log())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "holds no run: neither log.json"),
        ({"log.json": WHOLE[: len(WHOLE) // 2]}, "log.json is not complete JSON"),
        ({"log.json": ""}, "log.json is not complete JSON"),
        ({"log.json": "[1, 2]"}, "is not of a run: it has no history"),
        ({"log.json": '{"history": [{"step": 1, "loss": 2.0}]}'}, "has no steps"),
        ({"log.json": '{"history": []}'}, "has no steps"),
        ({"trainer_state.json": '{"log_history": []}'}, "has no steps"),
        ({"log.json": json.dumps(a_log(before=estimate(0.1, 0.01)))}, "'before' must hold estimates by name"),
        ({"trainer_state.json": json.dumps({"log_history": a_log()["history"]}), "samples.jsonl": '{"st'},
         "samples.jsonl is not the samples of a run"),
    ],
)  # fmt: skip
def test_what_is_no_run(tmp_path, capsys, files, message):
    for name, text in (files or {}).items():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text(text)
    if files == {}:
        (tmp_path / "run").mkdir()
    good = write(tmp_path / "good", a_log())
    assert cli.main(["report", good, str(tmp_path / "run"), "--out", str(tmp_path / "out.html")]) == 1
    error = capsys.readouterr().err
    assert message in error and str(tmp_path / "run") in error and error.startswith("dmfast report: ")
    assert not (tmp_path / "out.html").exists()


def test_a_page_that_can_t_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "page.html"
    assert cli.main(["report", write(tmp_path / "run", a_log()), "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("dmfast report: ") and str(tmp_path / "file") in error


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.util, "find_spec", lambda name: None if name == "matplotlib" else object())
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "dmfast report needs matplotlib" in capsys.readouterr().err
