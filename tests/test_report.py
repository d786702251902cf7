"""``dmfast report``: the page against the logs that it was made of, number by number; what a page must not do."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
import torch
from trainer_job import job

from dmfast import cli
from dmfast.report import page, read
from dmfast.report.curves import legend
from dmfast.training import samples

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}
NASTY = "<script>alert('1')</script> & \"$x^2$\" ]]> \u2028"


class Parsed(HTMLParser):
    """Tables as {(group, row): cells}, texts, svg paths, all attributes; fails on tags that don't match."""

    def __init__(self, html):
        super().__init__()
        self.stack, self.attributes, self.tags = [], [], Counter()
        self.tables, self.headings, self.items, self.paths = [], [], [], []
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
        if tag in ("td", "th", "h3", "li", "title"):
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
            self.group = text
        elif tag == "th" and self.scope == "row":
            self.row = text
        elif tag == "td" and self.row is not None:
            self.cells.append(text)
        elif tag == "tr" and self.row is not None:
            self.tables[-1][self.group, self.row] = self.cells
        elif tag == "h3":
            self.headings.append(text)
        elif tag == "li":
            self.items.append(text)


def estimate(value, stderr):
    return {"value": value, "stderr": stderr}


def a_log(seed=0, rate=1e-4, **others):
    generator = torch.Generator().manual_seed(seed)

    def step(i):
        a, b, c = torch.rand(3, generator=generator).tolist()
        return {
            "step": i, "phi/women": a, "kl_policy": b, "kl_policy_stderr": 0.1 * c, "kl_proposal": a + b, "log_z": c,
            "ess": 10 * a, "weight_std": 1 + b, "swapped": float(i == 3), "swaps": float(i >= 3),
            "seconds_sampling": 0.5, "seconds_scoring": 0.25, "seconds_policy": 1.0,
        }  # fmt: skip

    evaluation = {"step": 4, "eval_phi/women": 0.4, "eval_phi/women_stderr": 0.03, "eval_kl_policy_base": 0.6}
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
    """The logs of two runs, and their page, as the command makes it."""
    logs = [a_log(0), a_log(1, 3e-4)]
    runs = [write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)]
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", *runs, "--out", str(out)]) == 0
    assert f"wrote {out}: 2 runs" in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    return logs, html, Parsed(html)


def test_the_numbers_are_those_of_the_logs(two):
    logs, html, found = two
    table = found.tables[0]

    def cells(key, name):
        e = [log[key][name] for log in logs]
        return [f"{x['value']:.4g}" + (f" ± {x['stderr']:.2g}" if x["stderr"] else "") for x in e]

    for row, key in (("before", "before"), ("after", "after"), ("target p", "ideal")):
        assert table["E[women]", row] == cells(key, "phi/women")
        assert table["KL(π‖a), nats", row] == cells(key, "kl_policy_base")
    assert table["training", "steps"] == ["4", "4"]
    assert table["training", "swaps of q"] == ["1", "1"]
    assert table["training", "seconds"] == ["41.55", "41.55"]
    for row, key in (("KL(p‖π), last", "kl_policy"), ("KL(p‖q), last", "kl_proposal"), ("ESS, last", "ess")):
        assert table["training", row] == [f"{log['history'][3][key]:.4g}" for log in logs]
    assert [row for row in table if row[0] == "settings that differ"] == [
        ("settings that differ", "train.learning_rate")
    ]
    assert table["settings that differ", "train.learning_rate"] == ["0.0001", "0.0003"]
    assert found.tables[1] == {("", "model"): ["tiny-bios"], ("", "stop"): ['"\\n"']}
    assert found.tables[2] == {("", "sampling"): ["0.5"] * 2, ("", "scoring"): ["0.25"] * 2, ("", "policy"): ["1"] * 2}
    assert html.count("<span>1.75 s</span>") == 2
    assert found.tables[3] == {("", "cpu"): ["a <b> processor"], ("", "threads"): ["2"]}
    samples = [item for item in found.items if "run" not in item]
    assert samples == ["A man.", "Another man.", "A woman 0.", "A man.", "A woman 1.", "A man."]
    assert found.headings[-3:] == ["before", "after: run0", "after: run1"]


@pytest.mark.parametrize(("title", "key"), [("E[women]", "phi/women"), ("KL(p‖π)", "kl_policy"), ("log Z", "log_z")])
def test_the_lines_go_through_the_points_of_the_logs(two, title, key):
    logs, html, _ = two
    (figure,) = re.findall(rf"<figure><h3>{re.escape(title)}</h3>(.*?)</figure>", html, re.S)
    paths = Parsed(figure).paths
    values = torch.tensor([[h[key] for h in log["history"][:4]] for log in logs], dtype=torch.float64)
    drawn = []
    for i in range(2):
        (line,) = [p["d"] for p in paths if f"stroke: var(--run{i})" in p.get("style", "") and p["d"].count("L") == 3]
        drawn.append([[float(v) for v in point.split()] for point in re.split("[ML]", line)[1:]])
    x, y = torch.tensor(drawn, dtype=torch.float64).unbind(-1)
    even = x[:1, :1] + (x[0, 1] - x[0, 0]) * torch.arange(4.0).double()
    torch.testing.assert_close(x, even.expand(2, 4), rtol=0, atol=1e-3)
    scale = (y[1, 3] - y[0, 0]) / (values[1, 3] - values[0, 0])  # of both runs in one panel
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
    assert found.tables[0][f"E[{NASTY}]", "after"] == ["0.25 ± 0.01"]
    assert found.tables[0]["settings", f"train.{NASTY}"] == [json.dumps(NASTY, ensure_ascii=False)]
    assert NASTY.strip() in found.items
    assert f"E[{NASTY}]" in found.headings
    assert any(folder in item for item in found.items)


def with_passes(seed, k, before, after):
    """A log with pass@k of three evaluations: the base, midway, the policy."""
    log = a_log(seed)

    def measures(values):
        return {f"pass@{each}": estimate(value, 0.01) for each, value in zip(k, values, strict=True)}

    middle = [(a + b) / 2 + 0.05 for a, b in zip(before, after, strict=True)]
    log["before"] |= measures(before)
    log["after"] |= measures(after)
    for name, each in measures(middle).items():
        log["history"][-1] |= {f"eval_{name}": each["value"], f"eval_{name}_stderr": each["stderr"]}
    log["history"][-1]["eval_truncated"] = 0.25
    for i, step in enumerate(log["history"][:-1]):
        step |= {"rewards/short/mean": 0.1 * i, "rewards/short/std": 0.5}
    return log, list(zip(*([each[at] for each in (before, middle, after)] for at in (-1, 0)), strict=True))


def points(figure, number, length):
    """The drawn lines of a run with so many points, each (length, 2)."""
    lines = [p["d"] for p in Parsed(figure).paths if f"stroke: var(--run{number})" in p.get("style", "")]
    found = [re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", line) for line in lines if "fill" not in line]
    return [torch.tensor([[float(v) for v in pair] for pair in line]) for line in found if len(line) == length]


def test_right_answers_are_drawn_over_k_and_against_each_other(tmp_path):
    """Through the points of the logs, each run with a mark and a dash of its own."""
    k = (1, 4, 16)
    passes = [(0.1, 0.4, 0.9), (0.3, 0.6, 0.95)], [(0.1, 0.4, 0.9), (0.7, 0.75, 0.8)]
    logs, fronts = zip(*(with_passes(i, k, *each) for i, each in enumerate(passes)), strict=True)
    runs = read([write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)])
    html = page(runs)
    found = Parsed(html)
    assert {"pass@k", "precision against coverage", "pass@1", "pass@16", "short", "cut off"} <= set(found.headings)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert found.tables[0]["pass@4", "after"] == ["0.6 ± 0.01", "0.75 ± 0.01"]
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
    marks = re.search(r'<div class="key marks">(.*?)</div>', html, re.S)[1]
    shapes, dashes = re.findall(r'points="([^"]*)"', marks), re.findall(r"<line [^>]*>", marks)
    assert len(set(shapes)) == len(set(dashes)) == 2 and "run0" in marks and "run1" in marks
    assert "stroke-dasharray" in over_k and over_k.count("<use") >= 6


def test_sixteen_runs_differ_in_mark_or_dash(tmp_path):
    logs = [with_passes(i, (1, 4), (0.1, 0.2), (0.2, 0.3 + i / 100))[0] for i in range(16)]
    marks = legend(read([write(tmp_path / f"run{i}", log) for i, log in enumerate(logs)]))
    shown = [re.sub(r"color:[^\"]*", "", each) for each in re.findall(r"<svg.*?</svg>", marks)]
    assert len(shown) == len(set(shown)) == 16


def test_runs_without_a_verifier_have_no_right_answers(two):
    assert "Right answers" not in two[1] and "key marks" not in two[1]


def of_trainer(tmp_path):
    trainer = job(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, log_samples=3,
                  eval_diversity=20, eval_on_start=True)  # fmt: skip
    trainer.train()
    return trainer


def test_a_trainer_s_folder_is_a_run(tmp_path):
    """The newest checkpoint's state, and samples of the first and the last evaluation."""
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
    assert found.tables[0]["Self-BLEU-5", "after"] == [
        f"{h['eval_self_bleu_5']:.4g}" for h in (evaluations[-1], evaluations[1])
    ]
    assert found.headings.count("Distinct-1") == 1


def test_names_tell_runs_apart(tmp_path):
    folders = [write(tmp_path / name, a_log()) for name in ("a/run", "b/run", "c")]
    assert [run.name for run in read(folders)] == ["a/run", "b/run", f"{tmp_path.name}/c"]
    assert [run.name for run in read(folders[2:])] == ["c"]
    assert [run.name for run in read([folders[2]] * 2)] == ["c (1)", "c (2)"]
    assert [run.name for run in read([f"{folders[2]}/log.json"])] == ["c"]


def test_what_is_not_finite_is_left_out(tmp_path):
    """null in JSON: no point of a line, a dash in a table."""
    log = a_log()
    log["history"][1]["kl_policy"] = None
    log["history"][2]["kl_policy"] = float("nan")
    log["after"]["phi/women"] = estimate(None, None)
    (run,) = read([write(tmp_path / "run", log)])
    assert run.series("kl_policy")[0] == [1, 4]
    assert Parsed(page([run])).tables[0]["E[women]", "after"] == ["–"]


WHOLE = json.dumps(a_log())


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "no such folder"),
        ({}, "holds no run: neither log.json"),
        ({"log.json": WHOLE[: len(WHOLE) // 2]}, "log.json is no whole JSON"),
        ({"log.json": ""}, "log.json is no whole JSON"),
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
