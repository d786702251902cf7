"""Test `make gpu` as far as it needs no device.

The tests hold the order and the limits of its parts, what is left of a run that is killed, where results go, how times
are taken, how ncu's table is read, and what the summary says.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

GPU = Path(__file__).parents[1] / "scripts" / "gpu"
pytestmark = pytest.mark.skipif(not GPU.exists(), reason="no source tree")
NAMES = [path.stem for path in GPU.glob("*.py")]


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the scripts be found by their names for one test, as they find each other."""
    monkeypatch.syspath_prepend(str(GPU))
    before = {name: sys.modules.pop(name, None) for name in NAMES}
    yield
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def script(name: str) -> Any:
    return importlib.import_module(name)


# --- the run --------------------------------------------------------------------------------------------------------


def test_the_order_of_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DMFAST_GPU_SECONDS", raising=False)
    run = script("run")
    found = run.parts(False, Path("work"))
    assert list(found["gpu"]) == ["machine", "build", "checks", "times", "counters", "suite", "head", "triton",
                                  "memcheck", "racecheck", "more"]  # fmt: skip
    assert list(found["rivals"]) == ["machine", "build", "rivals", "bench"]
    for parts in found.values():
        assert all(part.least <= part.limit < run.SECONDS for part in parts.values())
        assert all(set(part.needs) <= parts.keys() for part in parts.values())
    assert all((GPU.parents[1] / "tests" / name).exists() for name in run.SUITE + run.MORE)
    assert run.seconds(dry=True) == run.PATIENCE * run.SECONDS
    assert run.parts(True, Path("work"))["gpu"]["build"].limit == run.PATIENCE * found["gpu"]["build"].limit
    assert [list(x) for x in run.parts(True, Path("work")).values()] == [list(x) for x in found.values()]


def test_parts_by_name() -> None:
    run = script("run")
    found = run.parts(False, Path("work"))["gpu"]
    assert list(run.chosen(found, "triton,head")) == ["machine", "build", "head", "triton"]
    assert run.chosen(found, "") == found
    with pytest.raises(SystemExit, match=r"there is no part heads; there are machine, build, checks"):
        run.chosen(found, "heads")


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


@pytest.fixture
def make_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return a run in a folder of its own."""
    run = script("run")
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(run, "key", lambda dry: "these sources")
    (tmp_path / "tests").mkdir()
    return lambda: run.Run("gpu", tmp_path / "out", True)


def test_a_part_that_fails_stops_only_those_that_need_it(make_run: Callable[[], Any]) -> None:
    run, here = script("run"), make_run()
    wanted = {
        "build": run.Part(python("print('no compiler'); raise SystemExit(3)"), 10, 0, ()),
        "checks": run.Part(python("1 / 0"), 10, 0),
        "head": run.Part(python("print('done')"), 10, 0, ()),
        "triton": run.Part(python("1 / 0"), 10, 0, (), missing="there is no such device"),
    }
    done = here.begin(False)
    outcomes = {x.name: (x.status, x.why) for x in run.go(here, "gpu", wanted, 60, done, time.monotonic())}
    assert outcomes == {
        "build": ("failed", "exit 3: no compiler"), "checks": ("skipped", "build has not passed"),
        "head": ("passed", ""), "triton": ("skipped", "there is no such device"),
    }  # fmt: skip
    assert {x["name"]: x["status"] for x in json.loads((here.out / "parts.json").read_text())["parts"]} == {
        name: status for name, (status, _) in outcomes.items()
    }
    page = (here.out / "summary.md").read_text()
    assert all(why in page for _, why in outcomes.values()) and "no figure on this page" in page
    assert "no compiler" in (here.out / "log.txt").read_text()
    assert sorted(path.name for path in here.out.iterdir()) == ["log.txt", "parts.json", "summary.md"]


def test_a_page_that_can_not_be_made_costs_no_part(make_run: Callable[[], Any]) -> None:
    run, here = script("run"), make_run()
    leave = "import os; open(os.environ['DMFAST_GPU_OUT'] + '/times.json', 'w').write('[1]')"
    wanted = {"build": run.Part(python(leave), 9, 0, ()), "head": run.Part(python("pass"), 9, 0)}
    outcomes = run.go(here, "gpu", wanted, 60, here.begin(False), time.monotonic())
    assert [x.status for x in outcomes] == ["passed", "passed"]
    assert "No summary\n\nAttributeError" in (here.out / "summary.md").read_text()


def test_late_parts_are_left_out_when_time_is_short_and_say_so(make_run: Callable[[], Any]) -> None:
    run, here = script("run"), make_run()
    wanted = {
        "build": run.Part(python("import time; time.sleep(60)"), 0.3, 0, ()),
        "head": run.Part(python("print('in time')"), 30, 0, ()),
        "suite": run.Part(python("1 / 0"), 100, 50, ()),
    }
    outcomes = run.go(here, "gpu", wanted, 40, here.begin(False), time.monotonic())
    assert [x.status for x in outcomes] == ["cut off", "passed", "skipped"]
    assert outcomes[2].why.endswith("s of 40 are left, and it takes 50 at least")


def test_what_passed_is_not_done_again_and_its_results_are_in_the_next_folder(
    make_run: Callable[[], Any], tmp_path: Path
) -> None:
    run, here = script("run"), make_run()
    (here.work / "lib").mkdir(parents=True)
    leave = "import os; open(os.environ['DMFAST_GPU_OUT'] + '/times.json', 'w').write('[]')"
    wanted = {"build": run.Part(python("pass"), 9, 0, ()), "times": run.Part(python(leave), 9, 0)}
    assert [x.status for x in run.go(here, "gpu", wanted, 60, here.begin(False), time.monotonic())] == ["passed"] * 2
    again = make_run()
    again.out = tmp_path / "next"
    wanted = {name: part._replace(command=python("1 / 0")) for name, part in wanted.items()}
    outcomes = run.go(again, "gpu", wanted, 60, again.begin(False), time.monotonic())
    assert {(x.status, x.why) for x in outcomes} == {("passed", "by an earlier call")}
    assert (again.out / "times.json").read_text() == "[]"
    assert [x.status for x in run.go(again, "gpu", wanted, 60, again.begin(True), time.monotonic())] == [
        "failed",
        "skipped",
    ]


def test_a_sanitizer_that_refuses_the_device_is_not_taken_for_one_that_finds_nothing(
    make_run: Callable[[], Any],
) -> None:
    run, here = script("run"), make_run()
    wanted = {name: part._replace(needs=()) for name, part in run.sanitizers(True, python("print('watched')")).items()}
    outcomes = {x.name: x for x in run.go(here, "gpu", wanted, 60, here.begin(False), time.monotonic())}
    assert outcomes["memcheck"].status == "passed" and outcomes["racecheck"].status == "skipped"
    assert "Device not supported" in outcomes["racecheck"].why


KILLED = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import run
run.ROOT, run.key = Path(sys.argv[2]), lambda dry: "these"
here = run.Run("gpu", Path(sys.argv[2]) / "out", True)
import signal
signal.signal(signal.SIGTERM, run.stopped)
def leave(what, then="pass"):
    return run.Part([sys.executable, "-S", "-c", f"import os, time; {what}; {then}"], 60, 0, ())
pid = "open('pid', 'w').write(str(os.getpid()))"
found = "open(os.environ['DMFAST_GPU_OUT'] + '/machine.json', 'w').write('{}')"
waits = leave(f"print('begun', flush=True); {pid}", "time.sleep(60)")
wanted = {"machine": leave(found), "build": waits, "checks": leave("1 / 0")}
run.go(here, "gpu", wanted, 60, here.begin(False), time.monotonic())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_what_it_found(number: int, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(GPU), str(tmp_path)], stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)  # fmt: skip
    pid = tmp_path / "pid"
    limit = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(number)
    process.wait(60)
    part = int(pid.read_text())
    if number == signal.SIGTERM:
        with pytest.raises(ProcessLookupError):
            os.kill(part, 0)  # the part has ended, so it holds no device
    else:
        os.kill(part, signal.SIGKILL)
    out = tmp_path / "out"
    statuses = [x["status"] for x in json.loads((out / "parts.json").read_text())["parts"]]
    assert statuses == ["passed", "running", "not begun"]
    assert "| build | running |" in (out / "summary.md").read_text()
    assert (out / "machine.json").read_text() == "{}"
    assert "begun" in (out / "log.txt").read_text()


def test_a_file_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, path = script("results"), tmp_path / "times.json"
    results.write(path, [1])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results.write(path, list(range(1000)))
    assert results.read(path) == [1]


def test_where_results_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = script("run")
    monkeypatch.delenv("OUT", raising=False)
    assert run.folder("gpu", None, False) == run.ROOT / "benchmarks" / "results" / "gpu"
    assert run.folder("rivals", None, False) == run.ROOT / "benchmarks" / "results" / "gpu" / "rivals"
    assert run.folder("gpu", None, True).is_relative_to(run.ROOT / "build")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert run.folder("gpu", None, False) == run.folder("rivals", None, True) == tmp_path
    assert run.folder("gpu", tmp_path / "other", False) == tmp_path / "other"
    # Each run has 3 more files, and 1 file is being written.
    assert all(len(files) + 3 + 1 <= 8 for files in run.FILES.values())


@pytest.mark.parametrize("given", ["no", "-1", "0", "inf", "nan"])
def test_a_total_limit_that_is_none(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = script("run")
    monkeypatch.setenv("DMFAST_GPU_SECONDS", given)
    with pytest.raises(SystemExit, match=f"must be a positive number of seconds, got '{given}'"):
        run.seconds()
    monkeypatch.setenv("DMFAST_GPU_SECONDS", "90")
    assert run.seconds() == 90
    monkeypatch.delenv("DMFAST_GPU_SECONDS")
    assert run.seconds() == 480


def test_carried_packages_stay_on_the_path(make_run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run, here = script("run"), make_run()
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    for part in ("times", "suite", "triton"):
        paths = run.environment(here, part, 7.6)["PYTHONPATH"].split(os.pathsep)
        assert paths[0] == str(here.work / "lib") and paths[-1] == "/tmp/site"
    assert run.environment(here, "times", 7.6)["DMFAST_GPU_LIMIT"] == "8"


def test_a_log_that_grows_without_end_keeps_both_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, log = script("run"), tmp_path / "log"
    monkeypatch.setattr(run, "LOG", 100)
    log.write_bytes(b"before" + b"a" * 25 + b"b" * 1000 + b"c" * 75)
    said = run.shortened(log, 6)
    assert said == "a" * 25 + "\n... 1000 bytes left out ...\n" + "c" * 75
    assert log.read_text() == "before" + said


def test_no_part_needs_transformers() -> None:
    """The modules of dmfast that they import do not need it either. It takes seconds to import."""
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    code += "import times, head, rivals, counters, worker, bench, report, run\n"
    code += "assert not {'transformers', 'matplotlib'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code, str(GPU)], check=True, cwd=GPU.parents[1])


# --- times ----------------------------------------------------------------------------------------------------------


class Fake:
    """Stand for a device whose gates hold from ``closed_from`` cycles on, and which may refuse to capture."""

    def __init__(self, clock: ModuleType, captures: bool, closed_from: float) -> None:
        self.captures, self.closed_from, self.clock = captures, closed_from, clock
        self.replays = 0

    def capture(self, call: Callable[[int], Any], times: int) -> Callable[[], Any]:
        if not self.captures:
            raise RuntimeError("not permitted when stream is capturing\nand more")

        def replay() -> None:
            self.replays += 1

        return replay

    def gated(self, queued: Callable[[], Any], cycles: int) -> float | None:
        queued()
        return 3.0 if cycles >= self.closed_from else None

    def in_a_row(self, queued: Callable[[], Any]) -> float:
        queued()
        return 0.5


def taken(can_capture: bool, closed_from: float, **options: Any) -> tuple[dict[str, Any], Fake, list[int]]:
    clock = script("clock")
    fake, calls = Fake(clock, can_capture, closed_from), []
    return clock.measure(fake, calls.append, rounds=3, **options), fake, calls


def test_a_time_is_that_of_a_graph_behind_a_gate() -> None:
    found, fake, _ = taken(True, 0)
    assert found == {"ms": 0.6, "low": 0.6, "high": 0.6, "by": "graph replay behind a gate", "calls": 5}
    assert fake.replays == 3


def test_what_can_not_be_captured_is_queued_behind_a_gate() -> None:
    found, _, calls = taken(False, script("clock").GATES[1])  # the first gate opens too early
    assert found["by"] == "in a row behind a gate" and found["ms"] == 0.6
    assert found["why"] == "no graph: RuntimeError: not permitted when stream is capturing"
    assert calls[-5:] == [0, 1, 2, 3, 4]
    assert "why" not in taken(True, 0, captures=False)[0]


def test_where_no_gate_stays_closed_the_time_says_that_it_has_pythons_latency() -> None:
    found, _, calls = taken(True, 1e99, captures=False)
    assert found["by"] == "in a row with Python's latency" and found["ms"] == 0.1
    assert found["why"] == "no gate: it opened before all was queued"
    assert len(calls) == 3 + 2 * 5 + 3 * 5


def test_a_dw_is_compared_in_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number that the host reads of a device is a wait. To read them for each row of a head took a minute."""
    import torch

    from dmfast.bench import worker

    exact = torch.randn(50_000, 3, dtype=torch.float64)
    read: list[float] = []
    plain = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda x: read.append(plain(x)) or read[-1])
    assert worker._error([(exact * 1.5).float()], [exact]) == pytest.approx(0.5, rel=1e-6)
    assert len(read) <= 4


# --- ncu ------------------------------------------------------------------------------------------------------------

HEAD = ["ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size", "Grid Size",
        "Device", "CC"]  # fmt: skip


def printed(kernels: list[str], values: dict[str, str]) -> str:
    """Return what ncu prints with ``--csv --page raw``: what it says, the head, the units, a line for each launch."""
    rows = [HEAD + list(values), [""] * len(HEAD) + ["unit"] * len(values)]
    for i, name in enumerate(kernels):
        rows.append([str(i), "71", "python3.12", "127.0.0.1", name, "1", "7", "(256, 1, 1)", "(1024, 1, 1)", "0", "9.0",
                     *values.values()])  # fmt: skip
    table = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    before = '==PROF== Connected to process 71\n==PROF== Profiling "x" - 0: 0%....100% - 4 passes'
    return f"{before}\n{table}\n==PROF== Disconnected from process 71\n"


def test_ncus_table_is_read() -> None:
    counters = script("counters")
    plan = [counters.Launch("cuda", line, kernel, 1024, 128256, "bfloat16")
            for line, kernel in (("scoring", "score_rows"), ("backward", "write_rows"))]  # fmt: skip
    values = dict.fromkeys(counters.METRICS.values(), "1,024.5")
    values |= {"dram__bytes_read.sum": "525,336,576", "lts__t_sectors_srcunit_tex_op_read.sum": "8,208,384",
               "launch__registers_per_thread": "40", "smsp__inst_executed.sum": "53,354,496",
               "lts__t_sector_hit_rate.pct": "n/a"}  # fmt: skip
    names = ["void dmf::cuda::score_rows<__nv_bfloat16, 0>(Batch, Terms)", "write_rows"]
    first, second = counters.matched(plan, counters.table(printed(names, values)))
    assert (
        first["reads from memory"] == 2.0 and first["reads from L2"] == 1.0 and first["instructions per logit"] == 13.0
    )
    assert first["registers"] == 40 and first["l2_hit_percent"] is None and second["line"] == "backward"
    assert first["grid"] == "(1024, 1, 1)"
    with pytest.raises(ValueError, match="launch 0 is 'write_rows' to ncu and 'score_rows' in the plan"):
        counters.matched(plan, counters.table(printed(names[::-1], values)))
    with pytest.raises(ValueError, match="ncu saw 1 launches, the plan has 2"):
        counters.matched(plan, counters.table(printed(names[:1], values)))


@pytest.mark.parametrize(
    ("said", "why"), [("", "nothing"), ("==ERROR== ERR_NVGPUCTRPERM - no permission\n", "no permission")]
)
def test_ncu_that_counts_nothing_says_why(said: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"ncu printed no table: .*{why}"):
        script("counters").table(said)


def test_what_the_counters_and_times_decide() -> None:
    report = script("report")
    launch = {"backend": "cuda", "line": "known weight", "vocab": 128256, "dtype": "bfloat16"}
    reads = [(1.0, 1.0), (1.05, 2.0), (1.9, 2.0), (None, 2.0)]
    said = report.second_read([{**launch, "reads from memory": m, "reads from L2": l2} for m, l2 in reads])
    assert [x.split(": ", 1)[1] for x in said] == [
        "the row is kept, 1.00 reads a logit",
        "the second read comes from L2 (2.00 reads, 1.05 of them from memory)",
        "the second read comes from memory (2.00 reads, 1.90 from memory)",
    ]
    ms = {"known weight": {"ms": 2.0}, "known weight, two launches": {"ms": 1.5}, "roof: copy": {"ms": 1.0}}
    assert report.launches_of_known([{"title": "t", "lines": ms}, {"title": "u", "not_run": "why"}]) == [
        "t: two launches (2.000 ms against 1.500; a copy takes 1.000)"
    ]


def test_the_page_has_all_that_was_found_and_all_that_was_not(tmp_path: Path) -> None:
    counters, results, report = script("counters"), script("results"), script("report")
    launch = counters.Launch("cuda", "known weight", "score_rows", 1024, 1000, "bfloat16")
    row = dict.fromkeys(counters.METRICS.values(), "2,048,000") | {"launch__registers_per_thread": "n/a"}
    time_ = {"ms": 2.0, "low": 2.0, "high": 2.0, "by": "graph replay behind a gate", "calls": 1}
    found: dict[str, Any] = {
        "parts": {
            "command": "gpu",
            "dry": False,
            "parts": [{"name": "suite", "status": "failed", "seconds": 1.0, "why": "exit 1: 2 failed | 3 passed"}],
        },
        "machine": {
            "device": {"name": "a card"},
            "versions": {"ncu": None},
            "rates": {"copy": {"GB/s": 4000.0, **time_}},
        },
        "times": [
            {"title": "cuda", "lines": {"scoring": {**time_, "GB/s": 1000.0}, "backward": {"failed": "an error"}}},
            {"title": "triton", "not_run": "no triton"},
        ],
        "counters": {"launches": [counters.per_logit(launch, row)], "why": "exit 9"},
        "head": [
            {
                "rows": 8192,
                "lines": {"linear_dm_loss gdc++": {**time_, "peak_mb": 7.0}, "products": {"failed": "an error"}},
            }
        ],
        "rivals": [
            {"name": "trl", "not_run": "trl is not installed"},
            {"name": "quack", "lines": [{"rows": 1024, **time_}]},
        ],
        "bench": {
            "results": [
                {
                    "title": "logits",
                    "ms": {"eager": {"median": 1.0, "low": 1.0, "high": 1.0}},
                    "not_run": {"x": "why"},
                    "gradient_error": {"eager": 0.5},
                    "with_latency": ["eager"],
                }
            ],
            "no_memory": ["a large one"],
        },
    }
    for name, value in found.items():
        results.write(tmp_path / f"{name}.json", value)
    page = report.summary(tmp_path)
    for said in (
        "| suite | failed | 1 | exit 1: 2 failed / 3 passed |",
        "name a card",
        "| copy | 4000 | GB/s |",
        "| cuda | scoring | 2 | 1000 | 25% | graph replay behind a gate |",
        "| cuda | backward |  |  |  | an error |",
        "not run: no triton",
        "the second read comes from L2 (32.00 reads, 1.00 of them from memory)",
        "Not all of them: exit 9",
        "| 8192 | linear_dm_loss gdc++ | 2 | 7 |",
        "not run: trl is not installed",
        "| quack | 1024 | 2 |",
        "Python's latency is in the times of eager.",
        "not run: a large one",
    ):
        assert said in page, page
    assert "dry" not in page
