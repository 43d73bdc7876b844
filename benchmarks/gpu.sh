#!/usr/bin/env bash
# Everything that only a GPU can say, in one go: benchmarks/gpu.sh
#
# Needs this checkout and a python3 with torch and Triton that see a card; nothing is installed. Results go to $OUT, or
# to benchmarks/results/<device>/. Every part is a process with a limit of its own and writes its results when it
# ends and while it runs, so that one that fails or hangs costs only itself. All limits together, those of what stands
# between the parts too, stay under 9 minutes.
# The suites and the profile need sentence-transformers and datasets too, and are skipped without.
#
# PARTS="check kernels" runs only those, and adds to what is there. ARCHIVE=FOLDER gets, after every part, all results so
# far in one file: for machines that one takes few files away from.
#
# TOY=1 TRITON_INTERPRET=1 runs it on a CPU, at sizes that say nothing about speed; MOST=SECONDS caps every
# part, PATIENCE=N gives each N times as long, for its measurements too.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# Seconds: to name the device; to note a part's end; to print the table; for a part to end after it was asked to.
NAMING=20 NOTING=3 SHOWING=5 ENDING=2

limited() { # seconds, command...
    timeout --signal=KILL "$(($1 * ${PATIENCE:-1}))" "${@:2}"
}

OUT=${OUT:-benchmarks/results/$(limited $NAMING "$PYTHON" -m benchmarks.gpu device || echo unnamed-device)}
if ! why=$(mkdir -p "$OUT" 2>&1) || ! why=$(touch "$OUT/environment.log" 2>&1); then
    echo "benchmarks/gpu.sh: OUT: no results can be written to $OUT ($why); name another folder." >&2
    exit 2
fi
export GIST_FAST_CACHE="$OUT/tuned"
TOY=${TOY:+--toy}

part() { # seconds, name, command...
    case " ${PARTS:-$2} " in *" $2 "*) ;; *) return ;; esac
    local limit=$(($1 * ${PATIENCE:-1})) name=$2
    shift 2
    if [ "${MOST:-$limit}" -lt "$limit" ]; then limit=$MOST; fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=$ENDING "$limit" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 25 "$OUT/$name.log"
    limited $NOTING "$PYTHON" -m benchmarks.gpu.results ended --out "$OUT" --part "$name" --code "$code"
    if [ -n "${ARCHIVE:-}" ]; then
        cp "$OUT/results.json" "$ARCHIVE/"
        tar czf "$ARCHIVE/results.tar.gz" -C "$OUT" .
    fi
}

part 20 environment "$PYTHON" -m benchmarks.gpu environment $TOY --out "$OUT"
part 60 check "$PYTHON" -m benchmarks.gpu check $TOY --out "$OUT"
part 40 kernels "$PYTHON" -m benchmarks.gpu kernels $TOY --out "$OUT"
part 60 speed "$PYTHON" -m benchmarks.gpu speed $TOY --out "$OUT"
part 25 memory "$PYTHON" -m benchmarks.gpu memory $TOY --out "$OUT"
part 60 peers "$PYTHON" -m benchmarks.gpu peers $TOY --out "$OUT"
part 40 suites "$PYTHON" -m benchmarks.gpu suites $TOY --out "$OUT"
part 30 profile "$PYTHON" -m benchmarks.gpu profile $TOY --out "$OUT"
part 35 tests "$PYTHON" -m benchmarks.gpu tests $TOY --out "$OUT"
if command -v compute-sanitizer >/dev/null; then
    part 25 sanitize compute-sanitizer --error-exitcode 3 "$PYTHON" -m benchmarks.gpu sanitize $TOY --out "$OUT"
fi
part 60 tuned env GIST_FAST_AUTOTUNE=1 "$PYTHON" -m benchmarks.gpu tuned $TOY --out "$OUT"
limited $SHOWING "$PYTHON" -m benchmarks.gpu.results table --out "$OUT"
