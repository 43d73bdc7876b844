#!/usr/bin/env bash
# Everything that only a GPU can say, in one go: benchmarks/gpu.sh
#
# Needs this checkout and a python3 with torch and Triton that see a card; nothing is installed. Results go to $OUT, or
# to benchmarks/results/<device>/. Every part is a process with a limit of its own and writes its results when it
# ends, so that one that fails or hangs costs only itself. All limits together stay under 9 minutes.
#
# TOY=1 TRITON_INTERPRET=1 runs it on a CPU, at sizes that say nothing about speed; MOST=SECONDS caps every part.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-benchmarks/results/$("$PYTHON" benchmarks/gpu.py device)}
mkdir -p "$OUT"
export GIST_FAST_CACHE="$OUT/tuned"
TOY=${TOY:+--toy}

part() { # seconds, name, command...
    local limit=$1 name=$2
    shift 2
    if [ "${MOST:-$limit}" -lt "$limit" ]; then limit=$MOST; fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 25 "$OUT/$name.log"
    "$PYTHON" benchmarks/gpu.py ended --out "$OUT" --part "$name" --code "$code"
}

part 20 environment "$PYTHON" benchmarks/gpu.py environment $TOY --out "$OUT"
part 95 check "$PYTHON" benchmarks/gpu.py check $TOY --out "$OUT"
part 110 speed "$PYTHON" benchmarks/gpu.py speed $TOY --out "$OUT"
part 45 memory "$PYTHON" benchmarks/gpu.py memory $TOY --out "$OUT"
part 80 peers "$PYTHON" benchmarks/gpu.py peers $TOY --out "$OUT"
part 50 tests "$PYTHON" benchmarks/gpu.py tests $TOY --out "$OUT"
if command -v compute-sanitizer >/dev/null; then
    part 40 sanitize compute-sanitizer --error-exitcode 3 "$PYTHON" benchmarks/gpu.py sanitize $TOY --out "$OUT"
fi
part 75 tuned env GIST_FAST_AUTOTUNE=1 "$PYTHON" benchmarks/gpu.py tuned $TOY --out "$OUT"
"$PYTHON" benchmarks/gpu.py table --out "$OUT"
