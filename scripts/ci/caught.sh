# The proofs source this file. $out is their scratch folder.

# pytest takes these of the tests of errors. The kernels find the errors of rows, tokens and weights.
errors_of_kernels="not (test_errors and not (row or token or seqlens or masked or label or beyond or infinite))"

# caught BUG MESSAGE COMMAND [ARGUMENT...] applies tests/native/bugs/BUG.patch to a copy of the sources. COMMAND, which
# gets the path of the copy before its arguments, must then fail and print MESSAGE.
caught() {
  bug=$1 message=$2 command=$3 tree=$out/bugs/$1
  shift 3
  rm -rf "$tree"
  mkdir -p "$tree"
  cp -r csrc dmfast tests cuda_compiler.py "$tree/"
  (cd "$tree" && patch -s -p1 <"tests/native/bugs/$bug.patch")
  if "$command" "$tree" "$@" >"$tree.log" 2>&1; then
    echo "the seeded bug $bug was not caught" >&2
    exit 1
  fi
  grep -q "$message" "$tree.log" || { echo "$bug failed otherwise:" >&2; tail -30 "$tree.log" >&2; exit 1; }
  echo "caught: $bug"
}

# Takes the kernels of every dtype but one (fp32, or DMF_ONLY) out of a copy, which then compiles in a quarter of the time.
one_dtype() { # copy
  (cd "$1" && patch -s -p1 <tests/native/one_dtype.patch)
}

# Installs PyPI's nvcc for the time of the proof if the machine has none.
bring_nvcc() { # python
  if "$1" -c 'import cuda_compiler, sys; sys.exit(cuda_compiler.find_nvcc() is not None)'; then
    "$1" -m pip install -q --target "$out/nvcc" $("$1" -c 'import cuda_compiler; print(*cuda_compiler.PACKAGES)')
    export CUDA_HOME="$(echo "$out"/nvcc/nvidia/cu[0-9]*)"
  fi
}
