#!/bin/sh
# Names what a fresh machine lacks to build dmfast, with the names of the Debian packages.
python=${1:-python3}
missing=
command -v "$python" >/dev/null || { echo "dmfast needs $python: apt-get install python3" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dmfast with transformers needs Python 3.11 or newer, $python is $("$python" -V)" >&2; exit 1; }
"$python" -c 'import venv, ensurepip' 2>/dev/null || missing="$missing python3-venv"
"$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || missing="$missing python3-dev"
command -v "${CXX:-g++}" >/dev/null || missing="$missing g++"
[ -z "$missing" ] || { echo "dmfast can't be built here; missing:$missing (on Debian: apt-get install$missing)" >&2; exit 1; }
