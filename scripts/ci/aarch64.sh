#!/bin/sh
# Cross-compiles the CPU kernels for aarch64 and runs their self-test in qemu. Installs Debian's cross compiler if it is
# missing.
set -eu
if ! command -v aarch64-linux-gnu-g++ >/dev/null || ! command -v qemu-aarch64 >/dev/null; then
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user >/dev/null
fi
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-O3 -std=c++17 -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Werror -Icsrc"
aarch64-linux-gnu-g++ $flags -static csrc/cpu/*.cpp tests/native/selftest.cpp -o "$out/selftest"
qemu-aarch64 "$out/selftest"
