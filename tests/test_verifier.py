"""Test the target that is filtered by a verifier.

The tests say what the function sees, what it may answer, and what happens to a run when a call of it hangs, dies, leaks
or raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from test_targets import Base, byte_tokenizer, written
from verifier_functions import bad, equals, leaks, right

from dmfast import EBM, Verifier

BYTES = byte_tokenizer()


def samples(texts, answers, *, ended=None, **columns):
    """Return completions with rows that have an answer each. Those that did not end lack their EOS."""
    rows = [{"answer": each} | {name: value[i] for name, value in columns.items()} for i, each in enumerate(answers)]
    x = written(texts, tokenizer=BYTES)
    for i in range(len(texts)):
        if ended is not None and not ended[i]:
            last = int(x.score_mask[i].nonzero()[-1, 0])
            x.score_mask[i, last], x.attention_mask[i, last], x.tokens[i, last] = False, 0, x.pad_token_id
    return dataclasses.replace(x, rows=rows)


class Seen:
    def __init__(self, fn=right):
        self.fn, self.calls = fn, []

    def __call__(self, texts, rows):
        self.calls.append((list(texts), [dict(row) for row in rows]))
        return self.fn(texts, rows)


def test_the_function_sees_completions_and_the_columns_of_their_rows():
    fn = Seen()
    x = samples(["4", "5"], ["4", "4"], level=[1, 2])
    assert Verifier(fn)(x).tolist() == [1.0, 0.0]
    (texts, rows), = fn.calls  # fmt: skip
    assert texts == ["4", "5"]
    assert rows == [{"answer": "4", "level": i, "prompt": "", "finished": True} for i in (1, 2)]
    fn.calls.clear()
    asked = dataclasses.replace(x, rows=[{"answer": "4", "prompt": "2+2="}, {"answer": "4", "prompt": "1+3="}])
    Verifier(fn)(asked)
    assert [row["prompt"] for row in fn.calls[0][1]] == ["2+2=", "1+3="]


def test_a_completion_that_did_not_end_is_wrong_unless_the_function_is_to_judge():
    x = samples(["4", "4"], ["4", "4"], ended=[True, False])
    fn = Seen()
    verifier = Verifier(fn)
    assert verifier(x).tolist() == [1.0, 0.0] and verifier.counts.unfinished == 1
    assert [texts for texts, _ in fn.calls] == [["4"]]
    judged = Verifier(fn, truncated="judge", cache=0)
    assert judged(x).tolist() == [1.0, 1.0] and judged.counts.unfinished == 0
    assert [row["finished"] for row in fn.calls[-1][1]] == [True, False]


def test_what_ends_a_sequence_may_be_another_token_than_the_tokenizers():
    x = samples(["4", "4"], ["4", "4"], ended=[True, False])
    last = x.tokens[1][x.score_mask[1]][-1].item()
    assert Verifier(right)(dataclasses.replace(x, eos_token_ids=(last,))).tolist() == [0.0, 1.0]


def test_verdicts_are_kept_by_text_and_row():
    fn = Seen()
    verifier = Verifier(fn)
    verifier(samples(["4", "5", "4"], ["4", "4", "4"]))
    assert verifier(samples(["4", "4"], ["4", "5"])).tolist() == [1.0, 0.0]
    assert [texts for texts, _ in fn.calls] == [["4", "5"], ["4"]]
    assert (verifier.counts.scored, verifier.counts.cached) == (3, 2)
    forgetful = Verifier(fn, cache=1)
    for _ in range(2):
        forgetful(samples(["4", "5"], ["4", "4"]))
    assert forgetful.counts.scored == 3


def test_a_filtered_target_is_the_base_where_the_verifier_says_yes():
    x = samples(["4", "5", "6"], ["4", "4", "6"])
    target = EBM(Base(), [Verifier(right)])
    scores = target.score(x)
    assert scores.log_target[1] == -math.inf and torch.equal(scores.log_target[[0, 2]], scores.log_base[[0, 2]])
    half = EBM(Base(), [Verifier(lambda texts, rows: [0.25] * len(texts))]).score(x)
    assert torch.allclose(half.log_target, half.log_base + math.log(0.25))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([math.nan, 1.0], "from 0 to 1, got nan"),
        ([0.0, -0.5], "from 0 to 1, got -0.5"),
        ([0.0, 1.5], "from 0 to 1, got 1.5"),
        ([1.0], r"2 bools or numbers from 0 to 1, one for each completion, got shape \(1,\)"),
        (None, "got NoneType"),
        ("yes", "got str"),
    ],
)
def test_what_is_no_verdict_is_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        Verifier(lambda texts, rows: answer, name="mine")(samples(["4", "5"], ["4", "4"]))


def test_a_column_that_a_row_does_not_have_is_named():
    message = "'right' reads the column 'answer', which the row .* it has 'question', 'prompt', 'finished'"
    x = dataclasses.replace(samples(["4"], ["4"]), rows=[{"question": "2+2"}])
    with pytest.raises(RuntimeError, match=message):
        Verifier(right)(x)
    with pytest.raises(RuntimeError, match=message):
        Verifier(right, workers=1)(x)


def careful(texts, rows):
    """Ask for a column that is not there, and fail for another reason."""
    assert "hint" not in rows[0] and rows[0].get("hint") is None
    return {}["other"]


@pytest.mark.parametrize("options", [{}, {"workers": 1}])
def test_asking_whether_a_column_is_there_is_not_reading_it(options):
    x = samples(["4"], ["4"])
    if options:
        with pytest.warns(UserWarning, match="KeyError"):
            assert Verifier(careful, **options)(x).tolist() == [0.0]
        return
    with pytest.raises(RuntimeError, match="'careful' raised KeyError: 'other'"):
        Verifier(careful)(x)


def test_a_worker_that_died_while_idle_costs_nothing():
    verifier = Verifier(right, workers=1, cache=0)
    x = samples(["4"], ["4"])
    assert verifier(x).tolist() == [1.0]
    verifier._pool._workers[0].process.kill()
    verifier._pool._workers[0].process.join()
    assert verifier(x).tolist() == [1.0] and verifier.counts.died == 0


def test_rows_that_differ_in_the_middle_of_an_array_are_two():
    fn = Seen(lambda texts, rows: [float(row["table"][2000]) for row in rows])
    one, other = torch.zeros(4000), torch.zeros(4000)
    other[2000] = 1.0
    x = dataclasses.replace(samples(["4", "4"], ["", ""]), rows=[{"table": one}, {"table": other}])
    assert Verifier(fn)(x).tolist() == [0.0, 1.0]
    deep = Seen(lambda texts, rows: [float(row["a"][0]["table"][2000]) for row in rows])
    x = dataclasses.replace(x, rows=[{"a": [{"table": each.numpy()}]} for each in (one, other)])
    assert Verifier(deep)(x).tolist() == [0.0, 1.0]


def test_an_error_of_the_function_is_raised_with_the_completion():
    with pytest.raises(RuntimeError, match=r"verifier 'bad' raised ArithmeticError: no such number; .*'raise'"):
        Verifier(bad, batch_size=1)(samples(["raise"], ["4"]))


def test_a_call_in_a_worker_that_misbehaves_costs_its_completion_alone():
    verifier = Verifier(bad, workers=2, time_limit=2.0, memory_limit=1 << 30)
    texts = ["4", "hang", "5", "die", "leak", "raise", "4"]
    start = time.monotonic()
    with pytest.warns(UserWarning, match="counts as wrong") as warned:
        found = verifier(samples(texts, ["4"] * 6 + ["5"]))
    assert time.monotonic() - start < 120 and found.tolist() == [1.0, 0, 0, 0, 0, 0, 0]
    counts = verifier.counts
    assert (counts.timed_out, counts.died, counts.out_of_memory, counts.raised) == (1, 1, 1, 1) and counts.scored == 7
    said = " ".join(str(each.message) for each in warned)
    assert "raised (ArithmeticError: no such number)" in said and "'hang'" in said and "timed out" in said
    again = verifier(samples(["4", "raise", "6"], ["4", "4", "6"]))
    assert again.tolist() == [1.0, 0.0, 1.0] and counts.cached == 2 and counts.raised == 1
    verifier._pool.close()


def test_what_earlier_calls_leaked_costs_no_verdict_and_a_call_may_start_processes(tmp_path):
    verifier = Verifier(leaks, workers=1, time_limit=20.0, memory_limit=280 << 20)
    texts = ["start", "2", "3", "4", "5", "6"]
    assert verifier(samples(texts, [str(tmp_path / "started")] * 6)).tolist() == [1.0] * 6
    assert (tmp_path / "started").read_text().isdigit()
    assert verifier.counts.out_of_memory == verifier.counts.raised == 0
    verifier._pool.time_limit = 5.0
    with pytest.warns(UserWarning, match="timed out"):
        assert verifier(samples(["hang"], [str(tmp_path / "hangs")])).tolist() == [0.0]
    ends(tmp_path / "hangs")
    verifier._pool.close()


def ends(pid):
    """Wait until a process whose id is in a file is gone."""
    deadline = time.monotonic() + 30
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        while Path("/proc", pid.read_text(), "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline, "the process of a call that was ended still runs"
            time.sleep(0.05)


def judge(text, file):
    Verifier(leaks, workers=1)(samples([text], [str(file)]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_workers_end_with_the_process_that_started_them(tmp_path):
    fork = multiprocessing.get_context("fork").Process
    leaves = fork(target=judge, args=("start", tmp_path / "started"))  # it closes nothing
    leaves.start()
    leaves.join(60)
    assert leaves.exitcode == 0
    killed = fork(target=judge, args=("hang", tmp_path / "hangs"))
    killed.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() or not (tmp_path / "hangs").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.join()
    ends(tmp_path / "hangs")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"truncated": "maybe"}, ValueError, '"wrong" or "judge"'),
        ({"workers": -1}, ValueError, "workers must be"),
        ({"time_limit": 1.0}, ValueError, "time_limit needs workers"),
        ({"memory_limit": 1 << 30}, ValueError, "memory_limit needs workers"),
        ({"workers": 1, "time_limit": 0.0}, ValueError, "time_limit must be positive"),
        ({"workers": 1, "batch_size": 8}, ValueError, "one completion at a time"),
        ({"cache": -1}, ValueError, "cache must be"),
    ],
)
def test_settings_that_can_not_be_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Verifier(right, **options)


def test_a_function_that_no_process_can_load_is_refused():
    with pytest.raises(TypeError, match="can be pickled"):
        Verifier(lambda texts, rows: [True], workers=1)


@pytest.mark.parametrize("options", [{}, {"workers": 1}])
def test_mathematics_is_compared_by_math_verify(options):
    x = samples(["$\\frac{1}{2}$", "0.5", "$\\frac{2}{3}$", "so it is $x = 1/2$"], ["$1/2$"] * 4)
    assert Verifier(equals, **options)(x).tolist() == [1.0, 1.0, 0.0, 1.0]


def test_answers_are_those_of_completions_that_count():
    ended = [True, False, True]
    by_word = Verifier(right, answer=lambda text: text.split()[-1] if text else None)
    assert by_word.answers(["so 4", "so 5", ""], ended) == ["4", None, None]
    assert Verifier(right, answer=str.upper, truncated="judge").answers(["a", "b", "c"], ended) == ["A", "B", "C"]
    assert Verifier(right).answers(["a"], [True]) is None
    with pytest.raises(TypeError, match=r"must return a string, .* can be hashed, got list \['a'\] for 'a'"):
        Verifier(right, answer=list).answers(["a"], [True])
    with pytest.raises(RuntimeError, match=r"answer of the verifier 'right' raised ValueError: .*; completion: 'x'"):
        Verifier(right, answer=int).answers(["x"], [True])
    with pytest.raises(TypeError, match=r"answer must be a function .*got 3"):
        Verifier(right, answer=3)


def test_what_has_finished_is_what_ends_in_an_eos():
    x = samples(["4", "5", ""], ["4"] * 3, ended=[True, False, True])
    assert x.finished.tolist() == [True, False, True]
    nothing = dataclasses.replace(x, score_mask=torch.zeros_like(x.score_mask))
    assert nothing.finished.tolist() == [False] * 3
    # here "4" ends a sequence, and EOS does not
    other = dataclasses.replace(x, eos_token_ids=(int(x.tokens[0, x.prompt_len]),))
    assert other.finished.tolist() == [False] * 3
