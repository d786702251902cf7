"""Skip tests that passed before with the same sources and machine, as a pytest plugin of run.py."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

KEY, KEPT = os.environ["DMFAST_GPU_KEY"], Path(os.environ["DMFAST_GPU_PASSED"])
_failed: set[str] = set()
_left = 1


# the hook runs last, so that -k has already chosen
@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that passed."""
    global _left
    key, *passed = KEPT.read_text().splitlines() if KEPT.exists() else [""]
    if key != KEY:
        KEPT.write_text(KEY + "\n")
        return
    known = set(passed)
    before = [item for item in items if item.nodeid in known]
    items[:] = [item for item in items if item.nodeid not in known]
    config.hook.pytest_deselected(items=before)
    _left = len(items) or not before


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Record a result at once, because the process may be ended at any time."""
    if report.failed:
        _failed.add(report.nodeid)
    elif report.when == "teardown" and report.nodeid not in _failed:
        with KEPT.open("a") as file:
            file.write(report.nodeid + "\n")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Report success if no test is left, which pytest calls an error."""
    if not _left:
        session.exitstatus = pytest.ExitCode.OK
