"""Test recipes, the commands that run them, and the loop of examples/custom_loop.py, on the tiny biography model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from custom_loop import train
from safetensors.torch import load_file
from trainer_job import gpt2, tokenizer

import dmfast.cli
from dmfast import EBM, Classifier, DMTrainer, LanguageModel, Moment, Scorer
from dmfast.demo import RECIPES, about_women, loop_parser, run_loop
from dmfast.kernels import warn_caller
from dmfast.training import recipe
from dmfast.training.recipe import TINY_BIOS, RecipeError, constraint, feature, load, read

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")

SMALL = {
    "model": "tiny-bios",
    "constraints": [{"moment": {"contains": {"any_of": ["she", "her"], "name": "women"}, "value": 0.5}}],
    "fit": {"n": 512},
    "train": {
        "max_steps": 2, "per_device_train_batch_size": 16, "max_new_tokens": 48, "save_strategy": "no",
        "use_cpu": True, "proposal_interval": 1,
    },
    "evaluate": {"samples": 32},
}  # fmt: skip


def write(tmp_path, changed=(), **entries):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **entries, **dict(changed)}))
    return path


def of_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_recipe_from_the_wish_to_the_report(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    code = dmfast.cli.main(["train", str(write(tmp_path)), "--out", str(out), "--set", "train.seed=5",
                            "--set", "monitor=[{\"contains\": {\"word\": \"amazing\"}}]"])  # fmt: skip
    assert code == 0
    log, printed = of_json(out / "log.json"), capsys.readouterr().out
    assert log["recipe"]["train"]["seed"] == 5
    assert [h["step"] for h in log["history"] if "kl_policy" in h] == [1, 2]
    assert log["ideal"]["phi/women"] == {"value": 0.5, "stderr": 0.0}
    rate = log["target"]["fit"]["base"][0]["value"]
    kl = 0.5 * math.log(0.5 / rate) + 0.5 * math.log(0.5 / (1 - rate))
    assert log["ideal"]["kl_policy_base"]["value"] == pytest.approx(kl)
    assert set(log["after"]) == {
        "phi/women",
        'phi/contains "amazing"',
        "kl_policy_base",
        "kl_policy",
        "length",
        "finished",
    }
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert " ".join(log["verdict"].split()) in " ".join(printed.split()) and "Criterion: " in log["verdict"]
    for part in ("E[women]", "KL(π‖a), nats", "before", "after", "converged", "swaps of q"):
        assert part in printed, part
    assert load(str(out)).vocab_size == 1466


def test_the_fit_s_warnings_come_once_and_no_advice_on_masks_comes(tmp_path, monkeypatch):
    """The guard runs a few sequences end to end, where a mask would let them see each other."""
    transformers.utils.logging.warning_once.cache_clear()
    said, advice = [], []
    logger = logging.getLogger("transformers.modeling_utils")
    monkeypatch.setattr(logger, "handlers", [SimpleNamespace(level=0, handle=advice.append)])
    monkeypatch.setattr(logger, "propagate", False)
    changed = {"train.output_dir": str(tmp_path / "out"), "fit": {"n": 64}}
    with pytest.warns(UserWarning, match="is 1 in only . of 64 samples") as found:
        trainer = recipe.prepare(read(write(tmp_path), changed), say=said.append)
    assert len([w for w in found if "of 64 samples" in str(w.message)]) == len(trainer.target.report.warnings) > 0
    assert "converged" in said[-1] and "warning" not in said[-1]
    assert advice == [] and trainer.target.base.why_padded is None


@pytest.mark.filterwarnings("always")
def test_the_command_shows_its_own_warnings_without_a_place(monkeypatch, capsys):
    scope = {"__name__": "warnings", "warnings": warnings, "sys": sys}  # pytest has put another function in its place
    exec("def show(message):\n    sys.stderr.write(warnings._formatwarnmsg(message))", scope)
    monkeypatch.setattr(warnings, "_showwarnmsg_impl", scope["show"])

    def command(argv):
        warn_caller("of dmfast")
        warnings.warn("of another", stacklevel=1)
        return 0

    monkeypatch.setattr(dmfast.cli, "_run", command)
    assert dmfast.cli.main([]) == 0
    ours, theirs, *_ = capsys.readouterr().err.splitlines()
    assert ours == "warning: of dmfast" and theirs.endswith("UserWarning: of another") and "test_recipe.py:" in theirs


def test_files_of_prompts(tmp_path):
    rows = [{"prompt": "He was, once", "answer": "1"}, {"prompt": "She", "answer": "2"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "a.csv").write_text('prompt,answer\n"He was, once",1\nShe,2\n')
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        assert recipe._prompts(str(tmp_path / f"a.{suffix}")) == rows
    (tmp_path / "a.txt").write_text("He was, once\nShe\n")
    assert recipe._prompts(str(tmp_path / "a.txt")) == [row["prompt"] for row in rows]
    for name in ("a.jsonl", "a.csv", "a.txt"):  # with a byte order mark, as Excel saves a file
        (tmp_path / f"marked_{name}").write_text((tmp_path / name).read_text(), encoding="utf-8-sig")
        assert recipe._prompts(str(tmp_path / f"marked_{name}")) == recipe._prompts(str(tmp_path / name))
    for name, text, message in (
        ("b.jsonl", '{"prompt": "He"}\n\n{"prompt"\n', "b.jsonl: line 3 is not JSON: [^0-9]*, at column 10$"),
        ("b.csv", "question,answer\nHe,1\n", "must name a column 'prompt', got question, answer"),
        ("b.csv", "prompt,answer\nHe,1\nShe\n", "b.csv: line 3 has 1 cell, and the first line names 2 columns"),
        ("b.csv", "prompt\nHe\n\nMary, Ann\n", "b.csv: line 4 has 2 cells, and the first line names 1 column: a"),
        ("b.csv", "prompt,a,a\nHe,1\n", "b.csv: line 2 has 2 cells, and the first line names 3 columns"),
        ("b.csv", 'prompt,answer\n"He,1\nShe,2\n', "b.csv: line 3: unexpected end of data"),
        ("b.json", "[]", "a file of prompts is .txt .*, got '.json'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(RecipeError, match=message):
            recipe._prompts(str(tmp_path / name))


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c"])
def test_only_an_end_of_line_ends_a_prompt(tmp_path, mark):
    text = f"Mary{mark}Ann"
    (tmp_path / "a.csv").write_text(f'prompt,answer\r\n{text},won\r\n"{text}, who\n{mark}",2\r\n', newline="")
    rows = [{"prompt": text, "answer": "won"}, {"prompt": f"{text}, who\n{mark}", "answer": "2"}]
    assert recipe._prompts(str(tmp_path / "a.csv")) == rows
    (tmp_path / "a.txt").write_text(f"{text}\nShe\n")
    assert recipe._prompts(str(tmp_path / "a.txt")) == [text, "She"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:1]))
    if mark not in "\f\v\x1c":  # JSON escapes these
        assert mark in (tmp_path / "a.jsonl").read_text()
    assert recipe._prompts(str(tmp_path / "a.jsonl")) == rows[:1]


def test_a_recipe_with_a_reward(tmp_path):
    train = SMALL["train"] | {"objective": "kl_control", "on_policy": True, "beta": 0.5, "beta_target_kl": 0.7,
                              "ppo_epochs": 2}  # fmt: skip
    path = write(tmp_path, reward={"contains": {"word": "she"}}, train=train)
    log = recipe.run(read(path, {"train.output_dir": str(tmp_path / "out")}), say=lambda line: None)
    steps = [h for h in log["history"] if "beta" in h]
    assert steps[0]["clip_fraction"] == 0 and len(steps) == 2
    assert all(0 <= h["reward"] < 0.5 for h in steps)
    with pytest.raises(RecipeError, match="reward must be one of contains, scorer, verifier and classifier"):
        read(write(tmp_path, reward={"contain": {}}))


def test_a_pointwise_recipe_has_its_ideal_from_the_samples_before(tmp_path):
    path = write(tmp_path, constraints=[{"contains": {"word": "He"}}], evaluate={"samples": 256, "seed": 3})
    log = recipe.run(read(path, {"train.output_dir": str(tmp_path / "out")}), say=lambda line: None)
    rate = log["before"]['phi/contains "He"'].value
    assert 0.85 < rate < 1
    assert log["ideal"]['phi/contains "He"'].value == pytest.approx(1.0)
    assert log["ideal"]["kl_policy_base"].value == pytest.approx(-math.log(rate), rel=1e-6)


def test_the_texts_of_a_log_are_of_all_prompts_and_have_them():
    prompts = ["w1 w2", "w4 w5 w6", "w7"]
    x = LanguageModel(gpt2(), tokenizer()).sample(prompts, 30, max_new_tokens=2, seed=0)
    shown = recipe._shown(x, x, prompts)
    assert len(shown["samples_before"]) == len(shown["samples_prompts"]) == recipe.SHOWN
    # there are six of each prompt, and one more of the first and of the second
    assert shown["samples_prompts"] == [prompts[i % 3] for i in range(18)] + prompts[:2]
    assert shown["samples_after"] == [x.text[30 * (i % 3) + i // 3] for i in range(18)] + [x.text[6], x.text[36]]
    assert "samples_prompts" not in recipe._shown(x, x, None)


def test_a_recipe_resumes(tmp_path, monkeypatch):
    """It goes on with the lambda of its checkpoint. Other settings are refused before anything is drawn."""
    settings = SMALL["train"] | {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "out")}
    recipe.run(read(write(tmp_path, train=settings)), say=lambda line: None)
    monkeypatch.setattr(EBM, "fit", lambda *args, **options: pytest.fail("lambda was fitted again"))
    said, longer = [], read(write(tmp_path, train=settings | {"max_steps": 3}))
    log = recipe.run(longer, resume="checkpoint-2", say=lambda line: said.append(str(line)))
    assert [h["step"] for h in log["history"] if "kl_policy" in h] == [1, 2, 3]
    assert any("512 samples of a; effective sample size" in each for each in said)
    assert any("checkpoint-2, with its lambda, so that the entry fit has no effect" in each for each in said)
    said.clear()
    nothing = (
        "checkpoint-2 is at step 2, and this run ends at max_steps=2: it trains nothing, and only measures and saves "
        "the model. To go on, raise max_steps above 2 with --set train.max_steps=N"
    )
    recipe.run(read(write(tmp_path, train=settings)), resume="checkpoint-2", say=lambda line: said.append(str(line)))
    assert said[2].endswith(nothing) and f"{nothing}. The " in said[-2]
    monkeypatch.setattr(LanguageModel, "sample", lambda *args, **options: pytest.fail("a sample was drawn"))
    with pytest.raises(ValueError, match="max_new_tokens was 48 and is 40"):
        recipe.run(read(write(tmp_path, train=settings | {"max_new_tokens": 40})), resume=True, say=lambda line: None)


def test_a_recipe_with_q_in_a_server_resumes(tmp_path, monkeypatch):
    """The server was started with other weights, and is started anew before the run goes on."""
    from engine_stand_in import StandIn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(recipe.report, "plot", lambda *args, **options: None)  # it would take half of the time
    other = AutoModelForCausalLM.from_pretrained(TINY_BIOS)
    with torch.no_grad():
        other.transformer.wte.weight.mul_(0.9)
    with StandIn(other, AutoTokenizer.from_pretrained(TINY_BIOS), context=64) as server:
        train = SMALL["train"] | {
            "max_new_tokens": 12, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1,
            "sampler": server.url, "sampler_options": {"patience": 0.0}, "proposal_criterion": "interval",
            "max_steps": 1, "output_dir": str(tmp_path / "out"),
        }  # fmt: skip
        path = write(tmp_path, train=train, constraints=[{"contains": {"any_of": ["born"]}}], fit={"n": 64},
                     evaluate={"samples": 8})  # fmt: skip
        assert dmfast.cli.main(["train", str(path)]) == 0
        assert server.loads == 3  # a copy that differs everywhere, q, and q after a swap
        server.restart()
        assert dmfast.cli.main(["train", str(path), "--set", "train.max_steps=2", "--resume"]) == 0
    history = [h for h in of_json(tmp_path / "out" / "log.json")["history"] if "kl_policy" in h]
    assert [(h["step"], h["swaps"]) for h in history] == [(1, 1), (2, 2)]
    q = load_file(next((tmp_path / "out" / "_q").iterdir()) / "model.safetensors")
    assert all(torch.equal(tensor, q[name]) for name, tensor in load_file(tmp_path / "out/model.safetensors").items())


def test_lora_and_prompts_from_a_file(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "He"}\n{"prompt": "He was"}\n')
    path = write(
        tmp_path, constraints=[{"moment": {"contains": {"word": "French"}, "value": 0.3}}], prompts=str(prompts),
        lora={"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True},
        train=SMALL["train"] | {"output_dir": str(tmp_path / "out"), "samples_per_context": 8},
    )  # fmt: skip
    log = recipe.run(read(path), say=lambda line: None)
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert log["steps"] == 2


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"modle": "x"}, "unknown entry 'modle'; did you mean 'model'"),
        ({"model": None}, "has no model"),
        ({"constraints": []}, "has no constraints"),
        ({"train": {"max_step": 3}}, "train has an unknown entry 'max_step'; did you mean 'max_steps'"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
        ({"fit": {"samples": 3}}, "fit has an unknown entry 'samples'"),
        ({"evaluate": [3]}, "evaluate must be a mapping"),
        (
            {"constraints": ["amazing"]},
            "one of contains, scorer, verifier and classifier with its arguments, got 'amazing'",
        ),
        ({"constraints": [{"contains": {"wrod": "x"}}]}, "wrod"),
        ({"constraints": [{"contains": {}}]}, "exactly one of word, any_of and regex"),
        ({"constraints": [{"moment": {"contains": {"word": "x"}}}]}, "a moment needs a feature and a value"),
        ({"constraints": [{"moment": {"contains": {"word": "x"}, "value": 2}}]}, "its mean is in \\[0, 1\\]"),
        ({"constraints": [{"scorer": {"function": "math.sqrt"}}]}, "must be 'module:name'"),
        ({"constraints": [{"scorer": {"function": "math:sqroot"}}]}, "can't import 'math:sqroot'"),
        ({"monitor": [{"moment": {}}]}, "monitor must be one of contains, scorer, verifier and classifier"),
    ],
)
def test_mistakes_are_found_before_anything_runs(tmp_path, changed, message, capsys):
    path = write(tmp_path, changed)
    with pytest.raises(RecipeError, match=message):
        read(path)
    assert dmfast.cli.main(["train", str(path)]) == 1
    assert re.search(message, capsys.readouterr().err)


NO_ROOM = "output_dir='.*' has 0 GB free, and the model need 0.0024 GB"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be positive, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be positive, got 0"),
        ({"proposal_device": "cuda:7"}, "proposal_device must be a device that this machine has, .* got 'cuda:7'"),
        ({"report_to": ["clearml"]}, "report_to=.*clearml.* can't be used: .*clearml"),
        ({"report_to": ["nonsense"]}, "nonsense is not supported"),
        ({"learning_rate": -1.0}, "learning_rate must be 0 or more, got -1.0"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"nope": 1}}, "scheduler_kwargs=.*nope.*can't be made"),
        ({"optim": "lion_8bit"}, "optim='lion_8bit' can't be made: .*bitsandbytes"),
        ({"samples_per_context": 5, "prompts": ["He"]}, "samples_per_context = 5 must divide"),
        ({"objective": "reinforce"}, "objective 'reinforce' needs reward="),
        ({"proposal_criterion": "alpha"}, "proposal_criterion='alpha' compares"),
        ({"stop": "zzz"}, "stop: no token of 'tiny-bios' has 'zzz' in its text"),
        ({"stop": 5}, "stop must be a string, got 5"),
        ({"max_steps": -1}, "max_steps"),
        (
            {"max_steps": -1, "num_train_epochs": 0, "prompts": ["He"]},
            "num_train_epochs=0 trains nothing: set max_steps",
        ),
        ({"max_steps": 0, "prompts": ["He"]}, "max_steps must be positive, or -1"),
        ({"auto_find_batch_size": True}, "refuses auto_find_batch_size"),
        ({"output_dir": "/proc/here"}, "nothing can be written into output_dir='/proc/here'"),
        ({"resume": True}, "there is no checkpoint in"),
        ({"resume": "checkpoint-4"}, "checkpoint-4 can't be resumed from: there is no such folder"),
        ({"fit": {"n": 0}}, "fit.n must be a positive integer, got 0"),
        ({"evaluate": {"samples": 0.5}}, "evaluate.samples must be a positive integer, got 0.5"),
        ({"prompts": ["He", "Zxq ☃"]}, "prompt 1 can't be made token ids, .*UNK.*Zxq"),
        ({"free": 0}, NO_ROOM),
        ({"resume_from_checkpoint": "x"}, "train.resume_from_checkpoint has no effect, .*the option --resume"),
        ({"fp16": True}, "fp16=True has no effect on a CPU, .* bf16=True with use_cpu=True"),
        (
            {"push_to_hub": True},
            "push_to_hub=True needs a login at the hub, which could not be checked: ConnectionError",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_nothing_is_sampled_before_all_is_checked(tmp_path, changed, message, capsys, monkeypatch):
    def sampled(*args, **options):
        raise AssertionError("a sample was drawn before this was found")

    def no_login(token=None):
        raise ConnectionError("no network")

    monkeypatch.setattr(LanguageModel, "sample", sampled)
    monkeypatch.setattr("huggingface_hub.whoami", no_login)
    if "free" in changed:
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=changed["free"]))
    resume, entries = (
        changed.get("resume"),
        {k: v for k, v in changed.items() if k in ("fit", "evaluate", "prompts", "stop")},
    )
    own = ("fit", "evaluate", "prompts", "stop", "free", "resume")
    train = {"samples_per_context": 8} | {k: v for k, v in changed.items() if k not in own}
    path = write(tmp_path, **entries, train={**SMALL["train"], "output_dir": str(tmp_path / "out"), **train})
    words = ["--resume", *([resume] if isinstance(resume, str) else [])] if resume else []
    assert dmfast.cli.main(["train", str(path), *words]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()  # what was refused leaves no folder


@pytest.mark.parametrize("where", ["constraints", "monitor", "reward"])
def test_a_feature_that_fails_is_found_before_lambda_is_fitted(tmp_path, monkeypatch, where):
    """One text fewer is what such a function returns that was written for one text."""
    monkeypatch.setattr(EBM, "fit", lambda *args, **options: pytest.fail("lambda was fitted before this was found"))
    (tmp_path / "mine.py").write_text("def first(texts):\n    return [1.0][: len(texts) - 1]\n")
    wrong = {"scorer": {"function": f"{tmp_path / 'mine.py'}:first", "name": "first"}}
    changed = {
        "constraints": {"constraints": [{"moment": {**wrong, "value": 0.5}}]},
        "monitor": {"monitor": [wrong]},
        "reward": {"reward": wrong, "train": {**SMALL["train"], "objective": "reinforce", "on_policy": True}},
    }[where]
    with pytest.raises(ValueError, match="scorer 'first' must return one number for each of 2 samples"):
        recipe.run(read(write(tmp_path, **changed), {"train.output_dir": str(tmp_path / "out")}), say=lambda line: None)


@pytest.mark.filterwarnings("ignore:.*with one sample per context")
def test_messages_on_prompts_name_their_file(tmp_path):
    for rows, message in (
        (
            [{"prompt": "He"}, {"prompt": 3}],
            r"prompts: can't read .*\.jsonl: line 2 has a prompt of type int, and",
        ),
        ([{"prompt": "He"}, {"text": "She"}], r"jsonl: line 2 has no column 'prompt', only text"),
        ([{"prompt": "He"}, {"prompt": "He " * 2000}], r"^prompts \(.*\.jsonl\): prompt 1 has 2\d+ tokens"),
        ([], r"^prompts \(.*\.jsonl\) is empty"),
    ):
        (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(ValueError, match=message):
            recipe.prepare(read(write(tmp_path, prompts=str(tmp_path / "my.jsonl"))), say=lambda line: None)
    long = {**SMALL["train"], "max_new_tokens": 5000}
    with pytest.raises(ValueError, match=r"^the empty context: prompt 0 has 1 tokens"):
        recipe.prepare(read(write(tmp_path, train=long)), say=lambda line: None)


@pytest.mark.parametrize("parts", [["model"], ["png"], ["json"], ["model", "json", "png"]], ids="-".join)
def test_a_full_disk_loses_no_verdict_and_nothing_that_could_be_written(tmp_path, monkeypatch, capsys, parts):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if "model" in parts:
        monkeypatch.setattr(DMTrainer, "save_model", full)
    if "png" in parts:
        monkeypatch.setattr(recipe.report, "plot", full)
    out = tmp_path / "out"
    out.mkdir()
    (out / "log.json").write_text("{}")  # of an earlier run
    if "json" in parts:
        replace = os.replace
        monkeypatch.setattr("os.replace", lambda a, b: full() if str(b).endswith("log.json") else replace(a, b))
    changed = {"evaluate": {"samples": 16}, "fit": {"n": 256}}
    assert dmfast.cli.main(["train", str(write(tmp_path, changed)), "--out", str(out)]) == 1
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    for part, name in {"model": "the model", "json": "log.json", "png": "report.png"}.items():
        refused = f"{name} could not be written into {out}: [Errno 28] No space left on device"
        assert (refused in said) == (part in parts), said
    assert "All else of the run has been written" in said
    assert "before" in printed.out and "Criterion: " in printed.out
    assert ("after" in of_json(out / "log.json")) == ("json" not in parts)
    assert (out / "report.png").exists() == ("png" not in parts)
    assert not list(out.glob(".*.new"))


def test_numbers_that_yaml_takes_for_strings(tmp_path):
    path = write(tmp_path)
    assert read(path, {"train.learning_rate": "1e-4"})["train"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[Mary, John]", ["Mary", "John"]),
        ("[{moment: {contains: {word: she}, value: 5e-1}}]", [{"moment": {"contains": {"word": "she"}, "value": 0.5}}]),
        ("[1e-4, 2.E3, -.5e+1, e5]", [1e-4, 2e3, -5.0, "e5"]),
        ("{a: 1}", {"a": 1}),
        ("'no'", "no"),
        ("1e-4", 1e-4),
        ("5", 5),
        ("True", True),
        ("null", None),
        ("no", "no"),
        ("She: a", "She: a"),
        ("\n", "\n"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_a_value_of_the_command_line_is_json_or_yaml_or_text(text, value):
    assert dmfast.cli._override(f"a.b={text}") == ("a.b", value)


def test_a_value_that_is_no_yaml_is_refused(capsys):
    with pytest.raises(SystemExit):
        dmfast.cli.main(["train", "x.yaml", "--set", "prompts=[Mary"])
    assert "the value of prompts: '[Mary' is not YAML" in capsys.readouterr().err


def test_a_recipe_with_a_byte_order_mark_and_numbers_with_an_exponent(tmp_path):
    path = write(tmp_path)
    text = path.read_text().replace("value: 0.5", "value: 5e-1")
    path.write_text(text, encoding="utf-8-sig")
    assert "5e-1" in text and read(path)["constraints"] == SMALL["constraints"]


def test_a_help_is_plain_text(capsys):
    with pytest.raises(SystemExit):
        dmfast.cli.main(["--help"])
    printed = capsys.readouterr().out
    assert "demo trains a small model" in printed and "`" not in printed
    for command, words in (("report", ["Write one HTML page", "(default report.html)"]), ("demo", ["(default 0)"])):
        with pytest.raises(SystemExit):
            dmfast.cli.main([command, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert all(word in printed for word in words)


def test_what_goes_wrong_later_is_said_without_a_traceback(tmp_path, capsys):
    unreachable = [{"moment": {"contains": {"word": "zebra"}, "value": 0.5}}]
    assert dmfast.cli.main(["train", str(write(tmp_path, constraints=unreachable))]) == 1
    assert "never fires in 512" in capsys.readouterr().err


def test_a_scorer_from_where_the_command_runs(tmp_path):
    (tmp_path / "mine.py").write_text("def length(texts):\n    return [len(text) for text in texts]\n")
    path = write(tmp_path, constraints=[{"scorer": {"function": "mine:length"}}])
    command = [sys.executable, "-P", "-c", "import sys; from dmfast.cli import main; sys.exit(main())", "train"]
    done = subprocess.run([*command, str(path), "--out", "out"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def test_scorers_of_a_recipe_see_the_rows_of_its_prompts(tmp_path, monkeypatch):
    """Scorers see the rows in the fit, in the training, and in the evaluations before and after."""
    (tmp_path / "with_rows.py").write_text(
        "import torch\n\nseen = []\n\n\ndef right(x):\n    seen.append({row['answer'] for row in x.rows})\n"
        "    return torch.tensor([float(row['answer'] in text) for row, text in zip(x.rows, x.text)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "He", "answer": "was"}\n{"prompt": "She", "answer": "the"}\n')
    right = {"scorer": {"function": "with_rows:right", "on": "samples", "binary": True, "name": "right"}}
    path = write(tmp_path, constraints=[{"moment": right | {"value": 0.9}}], prompts=str(tmp_path / "prompts.jsonl"))
    overrides = {"train.samples_per_context": 8, "train.output_dir": str(tmp_path / "out")}
    log = recipe.run(recipe.read(path, overrides), say=lambda line: None)
    from with_rows import seen

    assert seen == [{"was", "the"}] * len(seen) and len(seen) >= 5
    assert 0 < log["before"]["phi/right"].value < 1


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="No such file"):
        read(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        read(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(RecipeError, match="must hold a mapping"):
        read(tmp_path / "list.yaml")
    with pytest.raises(RecipeError, match="can't load"):
        load(str(tmp_path / "none"))


IN_A_FILE = """
def is_even(texts, rows):
    return [len(text) % 2 == 0 and row["kind"] == "quick" for text, row in zip(texts, rows)]

def parity(text):
    return len(text) % 2
"""
BY_ROW = [{"prompt": "Mary", "kind": "quick"}, {"prompt": "John", "kind": "quick"}]


def test_a_recipe_with_a_verifier_and_pass_rates(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(IN_A_FILE)
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in BY_ROW))
    entry = {"function": "judge.py:is_even", "answer": "judge.py:parity", "truncated": "judge", "binary": True}
    train = SMALL["train"] | {"output_dir": "out", "samples_per_context": 8, "max_new_tokens": 4, "max_steps": 1}
    path = write(tmp_path, constraints=[{"verifier": entry}], fit={}, prompts="asked.jsonl", train=train)
    assert dmfast.cli.main(["fit-z", str(path), "--n", "32", "--out", "rated.jsonl"]) == 0
    rows = recipe._prompts("rated.jsonl")
    assert [row["kind"] for row in rows] == ["quick"] * 2 and all(0.1 < row["pass_rate"] <= 1 for row in rows)
    assert {row["pass_rate_n"] for row in rows} == {
        32
    } and "wrote rated.jsonl: 2 prompts, 32" in capsys.readouterr().out
    assert dmfast.cli.main(["fit-z", str(path), "--out", "rated.jsonl"]) == 1
    assert "rated.jsonl is there already" in capsys.readouterr().err
    trained = ["train", str(path), "--set", "prompts=rated.jsonl", "--set", "train.z_from_rows=true"]
    assert dmfast.cli.main([*trained, "--set", "train.eval_samples=32"]) == 0
    log = of_json(Path("out/log.json"))
    assert log["target"]["pointwise"][0]["feature"]["truncated"] == "judge"
    assert log["target"]["pointwise"][0]["name"] == "is_even" and {"pass@4", "maj@4"} <= log["after"].keys()
    assert 0.1 < log["before"]["pass@1"]["value"] <= 1


def test_a_worker_loads_the_file_of_a_verifier(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(IN_A_FILE)
    entry = {"function": "judge.py:is_even", "workers": 1, "time_limit": 0.5, "truncated": "judge"}
    verifier = feature({"verifier": entry}, "constraints")
    assert (verifier.workers, verifier.time_limit, verifier.truncated) == (1, 0.5, "judge")
    packed, elsewhere = pickle.dumps(verifier.fn), tmp_path / "elsewhere"
    for name in [name for name in sys.modules if name.startswith("dmfast_recipe_")]:
        monkeypatch.delitem(sys.modules, name)  # another process has not imported it either
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert pickle.loads(packed)(["be", "was"], [{"kind": "quick"}] * 2) == [True, False]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"function": "nowhere.py:f"}, "there is no Python file .*nowhere.py"),
        ({"function": "broken.py:f"}, "broken.py can't be loaded: ZeroDivisionError: division by zero"),
        ({"function": "judge.py:f"}, "judge.py has no function 'f'"),
        ({"function": "judge.py"}, "function must be 'module:name' or 'file.py:name', got 'judge.py'"),
        ({}, "function must be 'module:name' or 'file.py:name', got None"),
        ({"function": "judge.py:is_even", "truncated": "no"}, 'truncated must be "wrong" or "judge", got \'no\''),
        ({"function": "judge.py:is_even", "time_limit": 3}, "time_limit needs workers"),
        ({"function": "judge.py:is_even", "workers": 1, "memory_limit": 2e9}, "memory_limit must be an integer"),
        ({"function": "judge.py:is_even", "answer": "judge.py:g"}, "judge.py has no function 'g'"),
        ({"function": "judge.py:is_even", "worker": 1}, "unexpected keyword argument 'worker'"),
    ],
)
def test_a_verifier_that_can_not_be_made_is_found_before_anything_runs(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    Path("judge.py").write_text(IN_A_FILE)
    Path("broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match=message):
        read(write(tmp_path, constraints=[{"verifier": entry}]))


def test_the_recipe_of_the_example(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    found = recipe.prepare(read("examples/verified.yaml", {"train.use_cpu": True}), say=lambda line: None)
    assert found.judge is not None and found.target.is_filter and found.samples_per_context == 32


def test_a_scorer_by_its_name():
    scorer = feature({"scorer": {"function": "trainer_job:digest", "name": "d", "on": "samples"}}, "monitor")
    assert scorer.name == "d" and scorer.fn.__name__ == "digest"
    moment = constraint({"moment": {"scorer": {"function": "math:sqrt", "batched": False}, "value": 2.5, "name": "r"}})
    assert (moment.name, moment.value) == ("r", 2.5)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_ship_are_valid(path):
    ready = read(path)
    assert ready["train"]["max_steps"] >= 30


def test_the_demo(tmp_path, capsys, monkeypatch):
    out, whole = tmp_path / "demo", recipe.read

    def smaller(path, overrides):
        return whole(path, overrides | {"fit.n": 512, "train.per_device_train_batch_size": 16})

    monkeypatch.setattr(recipe, "read", smaller)
    assert dmfast.cli.main(["demo", "--steps", "2", "--samples", "32", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("The run did not come to its target") == 1 and "samples before and after" in printed
    assert (out / "report.png").exists() and of_json(out / "log.json")["steps"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "0"], "dmfast demo: --steps must be a positive integer, got 0"),
        (["--steps", "-1"], "dmfast demo: --steps must be a positive integer, got -1"),
        (["--samples", "0"], "dmfast demo: --samples must be a positive integer, got 0"),
        (["--out", "/proc/here"], "dmfast demo: nothing can be written into output_dir='/proc/here'"),
    ],
)
def test_the_demo_refuses_without_a_traceback(words, message, capsys):
    assert dmfast.cli.main(["demo", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_tiny_model_never_changes():
    """The results and the base rates that are shipped are of this checkpoint."""
    weights = (TINY_BIOS / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == "e4672f9c8e53d17cf297f7c43da5bc774da10fb8e170ff7d05959590a6669337"
    assert len(weights) < 2e6


@pytest.mark.parametrize("objective", ["gdc++", "dpg"])
def test_the_custom_loop(objective):
    policy = load("tiny-bios")
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    target = EBM(load("tiny-bios"), [Moment(Scorer(about_women, name="women", binary=True), 0.5)])
    target.lambda_ = [math.log((1 - 0.0674) / 0.0674)]
    settings = {"steps": 2, "batch_size": 64, "microbatch": 40, "interval": 1, "warmup": 1}
    history = list(train(policy, target, objective=objective, **settings))
    assert [metrics["step"] for metrics in history] == [1, 2]
    for metrics in history:
        wanted = {"phi/women", "swapped", "log_z", "kl_policy", "kl_policy_stderr", "kl_proposal", "ess"}
        assert wanted <= metrics.keys()
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert 0 < metrics["ess"] <= 64 + 1e-9
    moved = {name for name, p in policy.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved == start.keys()
    assert policy.model.training and all(p.isfinite().all() for p in policy.model.parameters())


def test_the_custom_loop_as_a_script(tmp_path):
    args = ["--steps=2", "--batch=16", "--samples=256", "--eval-batch=64", f"--out={tmp_path / 'new' / 'loop'}"]
    run_loop(loop_parser().parse_args(args), train)
    written = of_json(tmp_path / "new" / "loop" / "log.json")
    assert [metrics["step"] for metrics in written["history"]] == [1, 2]
    assert 0 <= written["after"]["phi/women"]["value"] <= 1 and len(written["samples_after"]) == 20
    assert (tmp_path / "new" / "loop" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert len(Path(train.__code__.co_filename).read_text().splitlines()) <= 80


def test_the_smollm2_example(tmp_path):
    """The example runs as it stands, on a small model in SmolLM2's place, and saves the model."""
    out, small = tmp_path / "out", tmp_path / "small"
    gpt2(n_positions=128).save_pretrained(small)
    tokenizer().save_pretrained(small)
    done = subprocess.run(
        [sys.executable, str(Path(train.__code__.co_filename).parent / "smollm2.py"), "--model", str(small),
         "--wish", "known", "--steps", "2", "--batch", "8", "--eval-samples", "16", "--out", str(out)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("evaluation") == 2 and (out / "model.safetensors").exists()


def test_a_classifier_and_a_reward_in_a_recipe(tmp_path):
    """The classifier is read from a folder, and is the same as one that is built by hand."""
    from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

    words = AutoTokenizer.from_pretrained(recipe.TINY_BIOS)
    config = GPT2Config(vocab_size=len(words), n_embd=8, n_layer=1, n_head=1, n_positions=64, num_labels=2,
                        id2label={0: "BAD", 1: "GOOD"}, pad_token_id=words.pad_token_id)  # fmt: skip
    folder = str(tmp_path / "classifier")
    model = GPT2ForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    entry = {"classifier": {"model": folder, "label": "GOOD"}}
    given = read(write(tmp_path, constraints=[{"reward": entry | {"beta": 0.5}}], monitor=[entry]))
    base = recipe.load("tiny-bios")
    x = base.sample(n=16, max_new_tokens=8, seed=0)
    by_hand = Classifier(model, words, label="GOOD")(x)
    assert torch.equal(recipe.feature(given["monitor"][0], "monitor")(x), by_hand)
    target = EBM(base, [recipe.constraint(given["constraints"][0])])
    torch.testing.assert_close(target.log_prob(x), base.log_prob(x) + by_hand / 0.5)
    for wrong, message in (
        ({"classifier": {"model": folder, "label": "UGLY"}}, "label must be one of 'BAD', 'GOOD'"),
        ({"classifier": {"model": str(tmp_path / "none"), "label": "GOOD"}}, "constraints: classifier .*none"),
        ({"reward": entry}, "a reward needs a feature and a beta"),
        ({"reward": entry | {"beta": 0}}, "constraints: reward: beta must be positive"),
    ):
        with pytest.raises(RecipeError, match=message):
            read(write(tmp_path, constraints=[wrong]))


@pytest.mark.parametrize("lora", [{"rank": 8}, ["c_attn"]])
def test_the_adapter_s_arguments_are_checked(tmp_path, lora):
    with pytest.raises(RecipeError, match=r"lora must hold arguments of peft.LoraConfig"):
        read(write(tmp_path, lora=lora))


def test_the_adapter_starts_from_the_seed(tmp_path):
    train = SMALL["train"] | {"output_dir": str(tmp_path / "out")}
    lora = {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}

    def start(seed):
        given = read(
            write(tmp_path, lora=lora, constraints=[{"contains": {"word": "he"}}], train=train | {"seed": seed})
        )
        parameters = recipe.prepare(given, say=lambda line: None).policy.model.named_parameters()
        return torch.cat([p.flatten() for name, p in parameters if "lora_A" in name])

    first = start(3)
    assert torch.equal(start(3), first) and not torch.equal(start(4), first)


def test_prepare_takes_a_lambda_that_is_known(tmp_path):
    given = read(write(tmp_path, constraints=[{"moment": {"contains": {"word": "she"}, "value": 0.5}}]))
    said = []
    first = recipe.prepare(given, say=said.append)
    again = recipe.prepare(given, fitted=first.target.state_dict(), reward=lambda x: x.log_prob, say=said.append)
    assert torch.equal(again.target.lambda_, first.target.lambda_) and str(first.target.report) in said
    assert again.matcher.reward is not None and again.policy.model is not again.target.base.model


def test_a_model_of_a_recipe_ends_by_its_own_ends_beside_the_stop(tmp_path):
    model = gpt2()
    model.generation_config.eos_token_id = [5, 8]
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert load(str(tmp_path)).eos_token_ids == [5, 8]
    stopped = load(str(tmp_path), stop="3", chat_template_kwargs={"enable_thinking": False})
    assert stopped.eos_token_ids == [5, 8, 3] and stopped.chat_template_kwargs == {"enable_thinking": False}
    path = write(tmp_path, chat_template_kwargs={"enable_thinking": False}, model=str(tmp_path),
                 constraints=[{"contains": {"word": "w3"}}],
                 train=SMALL["train"] | {"max_new_tokens": 6, "output_dir": str(tmp_path)})  # fmt: skip
    for lora in (None, {"target_modules": ["c_attn"], "fan_in_fan_out": True}):
        trainer = recipe.prepare(read(path) | {"lora": lora}, say=lambda line: None)
        for each in (trainer.policy, trainer.target.base):
            assert each.chat_template_kwargs == {"enable_thinking": False} and each.eos_token_ids == [5, 8]
