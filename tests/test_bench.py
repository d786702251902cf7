"""Test `dmfast bench`: rivals compute what dmfast does, the eager step is honest, and the report says what was run."""

from __future__ import annotations

import argparse
import io
import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import of_scripts
import pytest
import torch
from rich.console import Console

from dmfast import cli
from dmfast.bench import measure, noise, report, rivals, run, step, worker
from dmfast.bench.worker import Config

TINY = Config("logits", 128, 211, threads=1, rounds=2)


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what Inductor would compile run as it is, because it takes half a minute to compile each rival."""
    monkeypatch.setattr(rivals, "compiled", lambda function: function)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_rival_on_logits_is_held_to_the_oracle(dtype: str) -> None:
    result = worker.run(replace(TINY, dtype=dtype))
    assert {"dm_loss gdc++, in place", "dm_loss gdc++", "eager cross_entropy"} <= result["gradient_error"].keys()
    limit = 1e-5 if dtype == "float32" else 0.5
    assert all(error < limit for error in result["gradient_error"].values()), result["gradient_error"]
    ours = result["gradient_error"]["dm_loss gdc++, in place"]
    assert ours < (1e-6 if dtype == "float32" else 4e-3)  # only the rounding of the gradient to its dtype is allowed
    assert not result["not_run"].keys() - {"trl selective_log_softmax"}
    assert all(t["low"] <= t["median"] <= t["high"] for t in result["ms"].values())


def test_every_rival_on_hidden_states_is_held_to_the_oracle() -> None:
    result = worker.run(Config("head", 128, 211, 24, threads=1, rounds=2))
    assert {"linear_dm_loss gdc++", "nn.Linear, dm_loss gdc++ in place"} <= result["gradient_error"].keys()
    assert all(error < 1e-4 for error in result["gradient_error"].values()), result["gradient_error"]


def test_a_wrong_rival_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "cross_entropy", lambda z, x: rivals.log_softmax_gather(z, x) * 1.01)
    result = worker.run(TINY)
    assert "off by" in result["not_run"]["eager cross_entropy"]
    assert "eager cross_entropy" not in result["ms"]


def test_a_rival_that_fails_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(rivals, "gather_logsumexp", broken)
    assert worker.run(TINY)["not_run"]["eager gather - logsumexp"] == "RuntimeError: no such kernel"


def gpu_worker() -> types.ModuleType:
    """Load scripts/gpu/worker.py, which belongs to no package."""
    return of_scripts.load("gpu/worker")


def test_a_gpu_has_rivals_and_rows_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU fewer rivals are compiled, and others have kernels of their own.

    Triton's rows are there, or the reason why they are not. Time and memory are measured by the functions for CUDA.
    """
    module = gpu_worker()
    place = module.OnDevice("cuda")
    assert place.on_logits(torch.float32).keys() - rivals.on_logits(torch.float32).keys() == {
        "liger-kernel cross_entropy", "quack cross_entropy", "trl fused log-prob and entropy"}  # fmt: skip
    assert [name for name in place.on_logits(torch.float32) if "compiled" in name] == ["compiled log_softmax + gather"]
    assert place.on_hidden().keys() - rivals.on_hidden().keys() == {"cut-cross-entropy cce"}
    # Where a call returns nothing, the clock says that the host waited.
    monkeypatch.setattr(module, "cuda_ms", lambda call: (7.0, call() is not None))
    monkeypatch.setattr(module, "cuda_memory", lambda call, forget: 3.0)
    monkeypatch.setattr(module.OnDevice, "on_logits", lambda self, dtype: rivals.on_logits(dtype))
    result = worker.run(TINY, place)
    ours = {"dm_loss gdc++, in place", "dm_loss dpg (known weight), in place"}
    said = {name for name in result["not_run"] if name.startswith("dm_loss")}
    assert said == {f"{name} (Triton)" for name in ours}  # this machine has no such device, or no Triton
    assert "roof: copy_" in result["ms"] and {t["median"] for t in result["ms"].values()} == {7.0}
    assert result["memory_mb"] == dict.fromkeys(result["gradient_error"], 3.0)
    assert "dm_loss gdc++" in place.with_latency and not place.with_latency & {"roof: copy_", "roof: read-sum"}


def test_trl_without_its_kernel_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", types.ModuleType("trl"))
    kernels = types.ModuleType("trl.kernels")
    monkeypatch.setitem(sys.modules, "trl.kernels", kernels)
    make = gpu_worker().OnDevice("cuda").on_logits(torch.float32)["trl fused log-prob and entropy"]
    missing: dict[str, str] = {}
    assert not list(worker._made({"trl": make}, missing)) and "takes trl 1.16 and triton" in missing["trl"]
    kernels.selective_log_softmax_and_entropy = lambda z, x: (rivals.cross_entropy(z, x), None)  # type: ignore[attr-defined]
    z, x = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
    assert torch.equal(make()(z, x), rivals.cross_entropy(z, x))


def test_logits_of_the_model_fill_the_shape() -> None:
    p = worker.make_problem(replace(TINY, vocab=3000, logits="model"))
    v = worker._model_rows(1).shape[1]
    assert p.z.shape == (2, 64, 3000) and torch.equal(p.z[..., :v], p.z[..., v : 2 * v])
    assert float(p.z.std()) > 1


def test_the_order_is_rotated_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    rivals_ = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = measure.interleaved(rivals_, 2, before=lambda: calls.append("-"))
    assert "".join(calls) == "-a-b-c-b-c-a-c-a-b"
    assert found.keys() == rivals_.keys()


def test_quartiles_are_never_beyond_the_values() -> None:
    assert measure.spread([1.0, 5.0]) == {"median": 3.0, "low": 1.0, "high": 5.0}  # extrapolation would give 0 and 6
    assert measure.spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 1.5, "high": 4.5}


def test_extra_memory_sees_what_a_call_takes_at_its_peak() -> None:
    config = replace(TINY, rows=512, vocab=20000)  # the logits take 41 MB
    in_place, fresh = (
        run.in_process(replace(config, memory_of=name))["memory_mb"]
        for name in ("dm_loss gdc++, in place", "dm_loss gdc++")
    )
    assert in_place < 10 and 35 < fresh < 60


def test_the_plain_step_is_the_same_step() -> None:
    """On the same sequences both score alike and give the policy the same gradient."""
    ours = step.make("dmfast", "tiny-bios", 16, 24)
    plain = step.make("eager", "tiny-bios", 16, 24)
    assert isinstance(ours, step.DMFastStep) and isinstance(plain, step.EagerStep)
    x = ours.proposal.sample(n=16, max_new_tokens=24, seed=3)
    mask = x.score_mask[:, 1:]
    assert not bool(mask.all()), "no sequence has ended: nothing shows that the masks agree"
    ended = torch.isin(x.tokens[:, 1:], torch.tensor(plain.eos)).long()
    plain.generate = lambda: (x.tokens, (ended.cumsum(-1) - ended == 0))  # type: ignore[method-assign]
    ours.proposal.sample = lambda **_: x  # type: ignore[method-assign,assignment]
    assert torch.equal(plain.generate()[1], mask)
    gradients = []
    for one in (ours, plain):
        model = one.policy.model if isinstance(one, step.DMFastStep) else one.policy
        one.optimizer.step = lambda *_: None  # type: ignore[method-assign]
        one.optimizer.zero_grad = lambda *_: None  # type: ignore[method-assign]
        loss = one()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert loss == pytest.approx(one(), rel=1e-4)
    assert len(gradients[0]) == len(gradients[1]) > 10
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    assert set(plain.seconds) == set(measure.PHASES)
    assert set(ours.seconds) == set(measure.PHASES) - {"scoring by q"}


def test_the_plain_step_is_short_and_knows_nothing_of_dmfast() -> None:
    text = (Path(step.__file__).parent / "eager_step.py").read_text()
    assert len(text.splitlines()) < 150
    assert "from .." not in text and "import dmfast" not in text


def test_a_step_of_ones_own_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", "tiny-bios", "--batch", "4", "--length", "6", "--rounds", "2",
                     "--out", str(tmp_path)]) == 0  # fmt: skip
    written = json.loads((tmp_path / "step.json").read_text())
    assert set(written["ms"]["eager"]) == {*measure.PHASES, measure.BOTH, "whole step"}
    q, a, policy = (written["forwards"]["dmfast"][name] for name in ("q", "a", "policy"))
    assert q["forwards"] == 6 and a["forwards"] == policy["forwards"] == 1
    assert a["rows"] == policy["rows"] == q["rows"] == a["tokens"] - 4 == 24
    plain = written["forwards"]["eager"]
    assert plain["q"]["forwards"] == 7 and plain["a"]["rows"] == plain["policy"]["rows"] == 24
    assert written["memory_mb"]["dmfast"] > 0 and written["machine"]["torch"]
    assert (tmp_path / "step.png").stat().st_size > 10_000
    said = " ".join(capsys.readouterr().out.split())
    assert "whole step" in said and "What to do with this" in said
    parts = ("loading tiny-bios", "round 1 of 2", "round 2 of 2", "the memory of the eager step", "whole step")
    places = [said.index(part) for part in parts]
    assert places == sorted(places)


def test_a_model_that_is_not_there_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--model", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 1
    assert "can't load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "tiny-bios", "--rounds", "0"], "--rounds must be a positive integer, got 0"),
        (["--model", "tiny-bios", "--batch", "0"], "--batch must be a positive integer, got 0"),
        (["--model", "tiny-bios", "--length", "-3"], "--length must be a positive integer, got -3"),
        (["--rounds", "3"], "--rounds 3 has no effect without --model"),
        (["--only", "fp32"], "--only 'fp32' chooses among the configurations of --full"),
        (["--model", "tiny-bios", "--full"], "--full has no effect with --model"),
        (["--full", "--only", "nothing"], "no configuration of --full has this in its title"),
    ],
)
def test_options_are_checked_before_anything_is_loaded(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*args: object, **options: object) -> None:
        raise AssertionError("something was loaded or measured before this was found")

    monkeypatch.setattr(step, "load", loaded)
    monkeypatch.setattr(run, "measure", loaded)
    assert cli.main(["bench", *words, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_benchmark_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form runs through to the report, with its JSON, its ratios and a picture."""
    configs = [TINY, Config("head", 128, 211, 24, threads=1, rounds=2), Config("sampling", 8, 211, threads=1, rounds=2)]
    monkeypatch.setattr(run, "quick", lambda: configs)
    monkeypatch.setattr(run, "in_process", worker.run)
    monkeypatch.setattr(noise, "NOISE", float("inf"))  # two rounds of such short calls always count as noisy
    said: list[object] = []
    args = argparse.Namespace(out=tmp_path, model=None, full=False, only=None, resume=True,
                              batch=None, length=None, rounds=None)  # fmt: skip
    run.bench(args, said.append)
    written = json.loads((tmp_path / "bench.json").read_text())
    for r in written["results"]:
        del r["config"]["device"]  # files from before there was a device lack this entry
    (tmp_path / "bench.json").write_text(json.dumps(written))
    run.bench(args, said.append)  # every result is there already, so nothing is measured again
    assert sum("1 of 3" in str(line) for line in said) == 1
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [r["config"]["form"] for r in written["results"]] == ["logits", "head", "sampling"]
    found = {ratio.what: ratio.value for ratio in report.ratios(written["results"])}
    assert str(said[-2]).startswith("What to do with this")
    ms = written["results"][0]["ms"]
    roof = ms["roof: read-sum"]["median"] + ms["roof: in-place mul_"]["median"]
    assert found["dm_loss in place over read-sum + mul_"] == ms["dm_loss gdc++, in place"]["median"] / roof
    assert "sample_tokens over read-sum" in found and "frozen head over two products" in found
    assert (tmp_path / "bench.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError"),
        ('{"step": 1}', "KeyError: 'results'"),
        ('{"results": [{"machine": MACHINE, "config": {"of_another_version": 1}}]}', "TypeError"),
    ],
)
def test_a_file_that_can_t_be_resumed_is_named(tmp_path: Path, text: str, reason: str) -> None:
    here = {"cpu": "c"}
    (tmp_path / "bench.json").write_text(text.replace("MACHINE", json.dumps(here)))
    with pytest.raises(ValueError, match=rf"can't read .*bench\.json .*{reason}.*leave --resume out"):
        run._earlier(tmp_path / "bench.json", here)


def test_the_full_run_has_what_was_asked_for() -> None:
    configs = list(run.full())
    assert len(set(configs)) == len(configs)
    logits = [c for c in configs if c.form == "logits"]
    for shape in run.SHAPES:
        here = [c for c in logits if (c.rows, c.vocab) == shape]
        for values in (("float32", "bfloat16"), (1, 2), (True, False), ("randn", "model")):
            assert any(set(values) == {getattr(c, name) for c in here} for name in vars(TINY))
    assert {c.dim for c in configs if c.form == "head"} == {576, 768}


def times(**medians: float | tuple[float, float, float]) -> dict[str, dict[str, float]]:
    """Return median and quartiles by name. The quartiles of a single number lie a hundredth of it away."""
    found = {}
    for name, t in medians.items():
        low, median, high = t if isinstance(t, tuple) else (0.99 * t, t, 1.01 * t)
        found[name] = {"low": low, "median": median, "high": high}
    return found


def a_result(**changed: object) -> dict[str, object]:
    """Return what ``worker.run`` returns, with known figures."""
    ms = times(**{
        "roof: read-sum": 2.0, "roof: in-place mul_": 4.0, "dm_loss gdc++, in place": 6.6, "dm_loss gdc++": 9.0,
        "eager log_softmax + gather": 33.0, "compiled log_softmax + gather": 22.0,
    })  # fmt: skip
    return {
        "config": {"form": "logits"}, "title": Config("logits", 512, 50257).title, "ms": ms,
        "gradient_error": {"dm_loss gdc++": 1.2e-7}, "memory_mb": {"dm_loss gdc++": 98.4},
        "not_run": {"trl selective_log_softmax": "ModuleNotFoundError: No module named 'trl'"}, **changed,
    }  # fmt: skip


def printed(shown: object, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO(), markup=False, highlight=False)
    console.print(shown)
    return console.export_text()


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_table_cuts_nothing_whatever_the_width(width: int) -> None:
    result = a_result()
    text = printed(report.table(result), width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    one_line = " ".join(text.split())
    for part in ("6.6 6.5 – 6.7 5.00", "98 1e-07", "No module named 'trl'") if width > 60 else ("6.6", "5.00", "1e-07"):
        assert part in one_line
    for word in " ".join(result["ms"]).replace("_", " ").split():
        assert word in text.replace("_", " ")
    assert "noisy" not in text


def test_rounds_that_disagree_are_said_to_be_noisy() -> None:
    wild = times(**{"sample_tokens": 1.5, "roof: read-sum": (1.0, 1.2, 17.0),
                    "eager softmax, multinomial, log_softmax, gather": 12.0})  # fmt: skip
    calm = wild | times(**{"roof: read-sum": 1.2})
    results = [a_result(config={"form": "sampling"}, ms=ms, gradient_error={}, memory_mb={}) for ms in (wild, calm)]
    noisy, quiet = ({r.what: str(r) for r in report.ratios([result])} for result in results)
    assert noisy["sample_tokens over read-sum"].endswith(", noisy")
    assert not noisy["sample_tokens: times eager's speed"].endswith("noisy")
    assert quiet["sample_tokens over read-sum"].split("  sample")[0].strip() == "1.25 (1.23 – 1.28)"
    assert "noisy" not in "".join(quiet.values())
    assert "noisy: half of the rounds" in printed(report.table(results[0]), 100)
    assert "measure them again" in report.advice(results[:1]) and "noisy" not in report.advice(results[1:])


def test_noisy_rounds_are_measured_again_and_the_calmest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    spreads = iter([(5.0, 10.0, 40.0), (8.0, 10.0, 16.0), (9.0, 10.0, 15.0), (9.9, 10.0, 10.1)])
    monkeypatch.setattr(run, "in_process", lambda c: a_result(ms=times(**{"dm_loss gdc++": next(spreads)})))
    monkeypatch.setattr(noise, "TRIES", 3)
    said: list[object] = []
    config = Config("logits", 512, 50257, logits="model")
    # All three tries are noisy, and the calmest of them counts.
    assert run.measure(config, said.append)["ms"]["dm_loss gdc++"]["high"] == 15.0
    assert [str(line) for line in said[:-1]] == [
        "noisy: half of the rounds lie outside of these ranges, which are wide: "
        f"dm_loss gdc++ {low} – {high} ms; measured again"
        for low, high in (("5.0", "40.0"), ("8.0", "16.0"))
    ]
    said.clear()
    assert run.measure(config, said.append)["ms"]["dm_loss gdc++"]["high"] == 10.1
    assert len(said) == 1


def test_a_noisy_step_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds of both steps are timed again, and the calmer try is in the result."""
    seconds = iter([1.0, 9.0, 1.0, 1.0] + [2.0] * 4)  # the first try has a round of nine seconds
    clock = [0.0]

    class Step:
        seconds = dict.fromkeys(measure.PHASES, 0.5)
        timed = False

        def __call__(self) -> None:
            clock[0] += next(seconds) if self.timed else 0.0
            self.timed = True

    monkeypatch.setattr(step, "make", lambda *args: Step())
    monkeypatch.setattr(step, "_count", lambda made: {})
    monkeypatch.setattr(step, "_memory", lambda *args: 1.0)
    monkeypatch.setattr(step.time, "perf_counter", lambda: clock[0])
    said: list[str] = []
    found = step.profile("tiny-bios", 2, 3, 2, said.append)
    assert {kind: found["ms"][kind]["whole step"]["median"] for kind in found["ms"]} == {"dmfast": 2000, "eager": 2000}
    again = [line for line in said if "noisy" in line]
    assert len(again) == 1 and again[0].endswith("measured again") and "whole step" in again[0]
    assert sum("round 1 of 2" in line for line in said) == 2


def test_the_table_of_a_step_says_what_it_compares() -> None:
    phases = dict(zip(measure.PHASES, (50.0, 20.0, 10.0, 30.0, 5.0, 4.0), strict=True))
    both = {kind: times(**phases, **{measure.BOTH: 35.0, "whole step": (80.0, 100.0, each)})
            for kind, each in (("dmfast", 150.0), ("eager", 101.0))}  # fmt: skip
    del both["dmfast"]["scoring by q"]
    counts = {name: {"forwards": 1, "tokens": 40, "rows": 38} for name in ("q", "a", "policy")}
    result = {"model": "tiny-bios", "parameters": 570_000, "batch": 4, "length": 6, "threads": 2, "ms": both,
              "forwards": {"dmfast": counts, "eager": counts}, "memory_mb": {"dmfast": 10, "eager": 30}}  # fmt: skip
    text = " ".join(printed(report.step_table(result), 100).split())
    times_, memory = text.split("its memory and work")
    assert "MB" not in times_ and "peak memory" in memory and "3.00" in memory
    assert "not needed" in times_ and measure.BOTH in times_
    assert "plain transformers and torch" in text and "makes the gradients of the head" in text
    assert "noisy: half of the rounds" in text and "dmfast: whole step" in text and "eager: whole step" not in text
    assert "sampling takes 51% of dmfast's step; docs/engines.md" in report.step_advice(result)
