#!/bin/sh
# Compiles the rollout of Gaussian mixtures for browsers, from the kernels' own sources, into a module of text, so that a
# bundler needs no rule for it. Needs clang and wasm-ld with WebAssembly (Debian: apt install clang lld).
# With --sources it prints the checksum of what it compiles, which the module states, and compiles nothing.
set -eu
cd "$(dirname "$0")/../kernels"
sources="wasm.cpp isa.cpp isa.h gm_schedule.h gm_gram.h gm_rollout.h lanes.h philox.h clib.h piflow_kernels.h"
# shellcheck disable=SC2086
files=$(sha256sum $sources ../web/kernel.sh)
checksum=$(echo "$files" | sha256sum | cut -d ' ' -f 1)
if [ "${1:-}" = --sources ]; then
  echo "$checksum"
  exit
fi
made=$(mktemp)
trap 'rm -f "$made"' EXIT
clang --target=wasm32 -std=c++17 -O2 -msimd128 -mbulk-memory -ffp-contract=off -fno-exceptions -fno-rtti -nostdlib \
  -DPIFLOW_ISA=wasm isa.cpp wasm.cpp -o "$made" \
  -Wl,--no-entry -Wl,--export=__heap_base -Wl,-z,stack-size=16384 -Wl,--strip-all
cat >../web/src/policies/rollout_wasm.ts <<EOT
/** Made by kernel.sh from piflow_edge/kernels; SHA-256 of its sources: $checksum. */
export const ROLLOUT =
  "$(base64 -w 0 "$made")";
EOT
