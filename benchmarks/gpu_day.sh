#!/bin/bash
# All that a machine with an NVIDIA GPU must tell, in nine minutes at most, as JSON files in a folder.
#
#   benchmarks/gpu_day.sh OUT [PART ...]
#
# Parts: facts, kernels, tests, torch, engines, large, exits, memory; all without names. Each has a time limit, and one that
# fails or runs out of it stops no other: OUT/gpu_day.json says how each ended. Bundles and engines stay in OUT, so that a
# second run builds none of them again. PYTHON is the interpreter, python unless set.
# Needs torch for CUDA, onnxruntime-gpu and cuda-bindings; tensorrt where it is to be measured. Without a GPU the parts say
# so, and the bundles are still made.
set -u
out=${1:?give a folder for the results}
shift
mkdir -p "$out" && out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python}
export PIFLOW_EDGE_CACHE="$out/cache" ORT_DISABLE_TELEMETRY=1

parts=${*:-facts kernels tests torch engines large exits memory}
asked() { [[ " $parts " == *" $1 "* ]]; }

ended=()
note() { # PART STATUS SECONDS
  ended+=("\"$1\": {\"status\": $2, \"seconds\": $3, \"ran_out_of_time\": $([ "$2" = 124 ] && echo true || echo false)}")
  (IFS=, && echo "{${ended[*]}}") > "$out/gpu_day.json"
  echo "$1: status $2 after $3 s"
}
run() { # PART LIMIT COMMAND...
  asked "$1" || return 0
  local part=$1 limit=$2 began=$SECONDS
  shift 2
  timeout --kill-after=5 "$limit" "$@" > "$out/$part.log" 2>&1
  note "$part" $? $((SECONDS - began))
}

# Exports need the CPU alone; kernels, tests and PyTorch need the GPU meanwhile. Each bundle is whole or not there.
bundles=
if asked engines || asked large || asked exits || asked memory; then
  timeout --kill-after=5 300 "$python" -m benchmarks.gpu_day bundles --out "$out" > "$out/bundles.log" 2>&1 &
  bundles=$!
fi
wait_for() { # FILE SECONDS
  for ((i = 0; i < $2; i++)); do
    [ -e "$1" ] && return 0
    kill -0 "$bundles" 2> /dev/null || break
    sleep 1
  done
  [ -e "$1" ]
}

run facts 25 "$python" -m benchmarks.gpu_day facts --out "$out"
run kernels 70 "$python" -m benchmarks.gpu_check --checks 20 --rounds 8 --seconds 1.5 --out "$out/kernels.json"
run tests 50 "$python" -m benchmarks.gpu_day tests --out "$out"
run torch 80 "$python" -m benchmarks.gpu_day torch --out "$out"

engines=$("$python" -m benchmarks.gpu_day engines 2> "$out/engines.log")
measure() { # PART LIMIT WAIT BUNDLE...
  asked "$1" || return 0
  local part=$1 limit=$2 last=${*: -1}
  if [ -z "$engines" ] || ! wait_for "$last/bundle.json" "$3"; then
    echo "no engine for a GPU, or no bundle $last" > "$out/$part.log"
    note "$part" 2 0
    return 0
  fi
  # shellcheck disable=SC2086 - names of engines, several words
  run "$part" "$limit" "$python" -m benchmarks.gpu_engines --bundle "${@:4}" --engine $engines --repeats 15 \
    --cache "$PIFLOW_EDGE_CACHE" --out "$out/$part.json"
}
measure engines 115 30 "$out/digits" "$out/large"
run exits 35 "$python" -m benchmarks.gpu_day exits --out "$out"
run memory 15 "$python" -m benchmarks.gpu_day memory --out "$out"
measure large 90 5 "$out/675M"
[ -n "$bundles" ] && kill "$bundles" 2> /dev/null
cat "$out/gpu_day.json"
