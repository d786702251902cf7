"""Resolve each extra of pyproject.toml in a clean environment, and check what it resolves to.

    python scripts/ci/extras.py UV

UV is the program `uv`, which reads what packages say that they need and downloads none of them. Every extra for users
is resolved alone, with the releases that constraints.txt pins, on the oldest Python that the extra has. What users
combine is resolved without pins on the newest Python, and so is vLLM. A resolution is refused that holds releases that
dmfast refuses, or that were never run, such as transformers 4 beside an old vLLM. A resolver takes these where an extra
does not name a floor.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

HERE = Path(__file__).parents[2]
DEVELOPERS = {"test", "docs", "demo"}  # demo is another name of train
NEWEST = "3.13"
# the oldest Python of the others is FIRST
OLDEST = {"trl": "3.11", "vllm": "3.11", "bench": "3.11", "deepspeed": "3.11"}
FIRST = "3.10"
#: These are resolved together, unpinned. DeepSpeed was tried with transformers 5.24, which vLLM 0.33 does not take.
TOGETHER = [
    ("vllm",),
    ("train", "vllm", "trl", "ray", "triton", "verify", "bench"),
    ("deepspeed", "trl", "ray", "triton"),
]
#: These are not resolved together, as docs/guide/install.md says.
APART = ("vllm", "deepspeed")
# the others bring a package of their own name
BRINGS = {"train": "transformers", "verify": "math-verify", "bench": "liger-kernel"}
#: dmfast runs on these releases and on no older ones, by docs/versions.md and docs/engines.md. They are not read from
#: pyproject.toml, so that a floor that is lost there is found.
FLOORS = {
    "torch": "2.6", "numpy": "1.26", "transformers": "5.0", "accelerate": "1.3", "vllm": "0.32", "trl": "1.16",
    "ray": "2.60",
}  # fmt: skip


def tried(module: str) -> dict[str, str]:
    """Return what a module of dmfast/training/ refuses older releases than, without importing it."""
    source = ast.parse((HERE / "dmfast" / "training" / f"{module}.py").read_text(encoding="utf-8"))
    for node in source.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TRIED":
            return dict(ast.literal_eval(node.value))
    raise SystemExit(f"dmfast/training/{module}.py has no TRIED")


def older(found: str, floor: str) -> bool:
    """Return whether a release is older than another. Only the leading numbers count."""
    numbers = [[int(x) for x in each.split("+")[0].split(".") if x.isdigit()] for each in (found, floor)]
    return numbers[0] < numbers[1]


def faults(extras: Iterable[str], resolved: Mapping[str, str]) -> list[str]:
    """Return what is wrong with a resolution.

    Args:
        extras: what was asked for.
        resolved: the release of each package.
    """
    floors = dict(FLOORS)
    wanted = {"torch", "numpy"}
    for extra in extras:
        wanted.add(BRINGS.get(extra, extra))
        if extra == "deepspeed":
            floors |= tried("deepspeed")
    absent = [f"{package} is missing" for package in sorted(wanted - set(resolved))]
    return absent + [
        f"{package} {resolved[package]} is older than {floor}, which dmfast needs"
        for package, floor in floors.items()
        if package in resolved and older(resolved[package], floor)
    ]


def resolve(uv: str, extras: Iterable[str], python: str, pinned: bool) -> dict[str, str]:
    """Return the release of each package that a new environment would have.

    Raises:
        RuntimeError: there is no solution.
    """
    cache = str(Path(uv).parents[1] / "cache")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--cache-dir", cache]
    command += ["--python-version", python, "pyproject.toml"]
    for extra in extras:
        command += ["--extra", extra]
    if pinned:
        command += ["--constraint", "constraints.txt"]
    done = subprocess.run(command, cwd=HERE, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip())
    pairs = (line.split(";")[0].split("==") for line in done.stdout.splitlines() if "==" in line)
    return {name.strip().lower(): version.strip() for name, version in pairs}


def main() -> None:
    uv = str(Path(sys.argv[1]).absolute())
    start = time.monotonic()
    known = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    cases = [((extra,), OLDEST.get(extra, FIRST), True) for extra in known if extra not in DEVELOPERS]
    cases += [(extras, NEWEST, False) for extras in TOGETHER]
    bad = 0

    def one(case: tuple[tuple[str, ...], str, bool]) -> tuple[dict[str, str], list[str]]:
        try:
            resolved = resolve(uv, *case)
        except RuntimeError as error:
            return {}, [str(error)]
        return resolved, faults(case[0], resolved)

    def apart() -> str:
        try:
            resolve(uv, APART, NEWEST, pinned=False)
        except RuntimeError as error:
            if "No solution found" in str(error):
                return ""
            raise
        return f"FAULT: {' and '.join(APART)} go together now, and docs/guide/install.md says that they do not"

    with ThreadPoolExecutor(8) as pool:  # resolutions wait for the network, so many run at once
        together = pool.submit(apart)
        for (extras, python, pinned), (resolved, found) in zip(cases, pool.map(one, cases), strict=True):
            names = sorted({*FLOORS, *tried("deepspeed"), "triton"} & set(resolved))
            asked = f"[{','.join(extras)}] Python {python}{', constraints.txt' * pinned}"
            print(f"{asked}: {len(resolved)} packages, {', '.join(f'{name} {resolved[name]}' for name in names)}")
            for fault in found:
                bad += 1
                print(f"  FAULT: {fault}")
        if together.result():
            bad += 1
            print(together.result())
    print(f"{len(cases)} resolutions, {bad} faults, {time.monotonic() - start:.0f} s")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    main()
