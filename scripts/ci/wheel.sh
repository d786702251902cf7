#!/bin/sh
# Builds the wheel in a new environment without torch, with pip's ordinary isolation, and says how long it took. Then
# runs the tests against that wheel, installed beside the torch of the given environment, away from the source tree.
set -eu
system_python=$1
python=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
"$system_python" -m venv "$out/venv"
start=$(date +%s)
DMFAST_BUILD=cpu "$out/venv/bin/python" -m pip -q --disable-pip-version-check wheel . --no-deps -w "$out/dist"
echo "wheel: $(ls "$out/dist") in $(($(date +%s) - start)) s, without torch: $("$out/venv/bin/python" -m pip list 2>/dev/null | grep -c '^torch ' || true) copies of torch there"
"$python" -m pip install -q --no-deps --target "$out/site" "$out"/dist/*.whl
cp -r tests "$out/tests"
cd "$out/tests"
PYTHONPATH="$out/site" "$python" -c "import dmfast; assert dmfast.__file__.startswith('$out/site'), dmfast.__file__"
PYTHONPATH="$out/site" "$python" -m pytest -p no:cacheprovider --rootdir "$out/tests" -q test_errors.py test_models.py test_proposal.py test_recipe.py
