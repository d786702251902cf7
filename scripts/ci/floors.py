"""Run the tests that involve transformers on the oldest releases that pyproject.toml allows.

    python scripts/ci/floors.py [PACKAGE==VERSION ...] [-- PYTEST ARGUMENTS]

The script makes an environment that holds transformers, accelerate and peft at their floors, and what these need in
older releases. All other packages are those of the environment that runs the script. torch's floor has a job of its own
(.github/workflows/ci.yml), because it needs another Python. Releases that are named, such as `transformers==5.17.0`,
replace the floors.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import tomllib

HERE = Path(__file__).parents[2]
PACKAGES = ("transformers", "accelerate", "peft")
# These tests differed between the releases that were tried. Slow ones are left out; `-- tests` runs all tests.
TESTS = [
    "tests/test_models.py", "tests/test_head.py", "tests/test_adapters.py", "tests/test_sampling.py",
    "tests/test_families.py", "tests/test_prompts.py", "tests/test_completions.py", "tests/test_trainer_step.py",
    "tests/test_trainer_saving.py", "tests/test_trainer_config.py", "tests/test_trainer_checkpoint.py",
    "tests/test_trainer_stop.py", "tests/test_diagnostics.py",
    "-k", "not two_processes and not both and not example and not compile and not never_stopped and not truncated and "
    "not full_disk and not sigterm and not ctrl_c and not doctor and not lean",
]  # fmt: skip


def floors() -> dict[str, str]:
    """Return the oldest releases that are allowed, by package."""
    extras = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    every = extras["train"] + extras["test"]
    found = {}
    for package in PACKAGES:
        lowest = {match[1] for line in every if (match := re.match(rf"{package}>=([\d.]+)", line))}
        if len(lowest) != 1:
            raise SystemExit(
                f"[train] and [test] must name one floor of {package}, as {package}>=1.2; they have {lowest}"
            )
        found[package] = lowest.pop()
    return found


def main() -> None:
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    named, tests = arguments[:cut], arguments[cut + 1 :]
    wanted = {package: f"{package}=={floor}" for package, floor in floors().items()}
    wanted |= {re.split("[=<>~!]", each)[0]: each for each in named}
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        site = sysconfig.get_path("purelib", vars={"base": folder})
        Path(site, "zz_beneath.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-compile"]
        subprocess.run([*pip, "-c", str(HERE / "constraints.txt"), *wanted.values()], check=True)
        show = "import sys; from importlib.metadata import version; print(*(f'{p} {version(p)}' for p in sys.argv[1:]))"
        subprocess.run([str(python), "-c", show, "torch", *PACKAGES], check=True)
        done = subprocess.run(
            [str(python), "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *(tests or TESTS)],
            cwd=HERE, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
