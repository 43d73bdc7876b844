#!/usr/bin/env bash
# Everything that only a GPU can say, in one go: benchmarks/gpu.sh
#
# Needs this checkout and a python3 with torch and Triton that see a card; nothing is installed. Results go to $OUT, or
# to benchmarks/results/<device>/. Every part is a process with a limit of its own and writes its results when it
# ends and while it runs, so that one that fails or hangs costs only itself. All limits together, those of what stands
# between the parts too, stay under 9 minutes.
# The suites and the profile need sentence-transformers and datasets too, and are skipped without.
#
# --minutes 7 ends within so many: a part gets its limit or what is left, and one for which too little is left is named
# and skipped. PARTS="check kernels" runs only those, and adds to what is there. ARCHIVE=FOLDER gets, after every part,
# all results so far in one file, for machines that one takes few files away from; they lie elsewhere then, in $OUT or
# in a new folder. --resume ARCHIVE_OR_FOLDER goes on from there: what ended well is not run again.
#
# Packages that a bare machine lacks are named in benchmarks/gpu-wheels.txt. Where there is a network:
#   pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels -r benchmarks/gpu-wheels.txt
# and on the machine:
#   pip install --no-index --no-deps --target site wheels/*.whl; PYTHONPATH=site benchmarks/gpu.sh --minutes 7
#
# TOY=1 TRITON_INTERPRET=1 runs it on a CPU, at sizes that say nothing about speed; MOST=SECONDS caps every
# part, PATIENCE=N gives each N times as long, for its measurements too.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# Seconds: to name the device; to note a part's end; to print the table; for a part to end after it was asked to.
NAMING=20 NOTING=3 SHOWING=5 ENDING=2
# Seconds under which no part is begun: loading torch takes as long.
LEAST=15
MINUTES='' RESUME=''

wrong() {
    echo "benchmarks/gpu.sh: $1" >&2
    exit 2
}

while [ $# -gt 0 ]; do
    case $1 in
    --minutes) MINUTES=${2:-} && [[ $MINUTES =~ ^[1-9][0-9]*$ ]] ||
        wrong "--minutes: expected a whole number above 0, got '$MINUTES'." ;;
    --resume) RESUME=${2:-} && [ -e "$RESUME" ] ||
        wrong "--resume: expected an archive or a folder of results, and there is no '$RESUME'." ;;
    *) wrong "expected --minutes N or --resume ARCHIVE_OR_FOLDER, got '$1'." ;;
    esac
    shift 2
done

limited() { # seconds, command...
    timeout --signal=KILL "$(($1 * ${PATIENCE:-1}))" "${@:2}"
}

if [ -n "${ARCHIVE:-}" ]; then
    mkdir -p "$ARCHIVE" || wrong "ARCHIVE: cannot write to $ARCHIVE."
    if [ -z "${OUT:-}" ] || [ "$(realpath -m "$OUT")" = "$(realpath "$ARCHIVE")" ]; then
        OUT=$(mktemp -d -t gist-fast-gpu-XXXXXX)
        echo "results lie in $OUT, their archive in $ARCHIVE"
    fi
fi
OUT=${OUT:-benchmarks/results/$(limited $NAMING "$PYTHON" -m benchmarks.gpu device || echo unnamed-device)}
if ! why=$(mkdir -p "$OUT" 2>&1) || ! why=$(touch "$OUT/environment.log" 2>&1); then
    echo "benchmarks/gpu.sh: OUT: no results can be written to $OUT ($why); name another folder." >&2
    exit 2
fi
if [ -n "$RESUME" ] && [ "$(realpath "$RESUME")" != "$(realpath "$OUT")" ]; then
    [ ! -e "$OUT/results.json" ] || wrong "OUT: $OUT holds results, which --resume would overwrite; name another folder."
    if [ -f "$RESUME/results.tar.gz" ]; then RESUME=$RESUME/results.tar.gz; fi
    if [ -d "$RESUME" ]; then cp -R "$RESUME/." "$OUT/"; else tar xzf "$RESUME" -C "$OUT"; fi ||
        wrong "--resume: cannot read $RESUME."
fi
export GIST_FAST_CACHE="$OUT/tuned"
TOY=${TOY:+--toy}

part() { # seconds, name, command...
    case " ${PARTS:-$2} " in *" $2 "*) ;; *) return ;; esac
    local limit=$(($1 * ${PATIENCE:-1})) name=$2
    shift 2
    if [ "${MOST:-$limit}" -lt "$limit" ]; then limit=$MOST; fi
    if [ -n "$RESUME" ] && grep -qxs "$name" "$OUT/ended-well"; then
        echo "== $name: ended well before"
        return
    fi
    if [ -n "$MINUTES" ]; then
        # Bash counts SECONDS from the script's start.
        local left=$((MINUTES * 60 - SECONDS - ENDING - (NOTING + SHOWING) * ${PATIENCE:-1}))
        if [ "$left" -lt "$limit" ] && [ "$left" -lt $LEAST ]; then
            echo "== $name: skipped, no time is left for it"
            return
        fi
        if [ "$left" -lt "$limit" ]; then limit=$left; fi
    fi
    # How it ends now counts, not how it ended once.
    if [ -f "$OUT/ended-well" ]; then sed -i "/^$name\$/d" "$OUT/ended-well"; fi
    echo "== $name (at most $limit s)"
    timeout --kill-after=$ENDING "$limit" "$@" >"$OUT/$name.log" 2>&1
    local code=$?
    tail -n 25 "$OUT/$name.log"
    limited $NOTING "$PYTHON" -m benchmarks.gpu.results ended --out "$OUT" --part "$name" --code "$code"
    # One that was skipped for want of a package may run where the package is.
    if [ $code = 0 ] && ! grep -qs '"skipped":' "$OUT/parts/$name.json"; then echo "$name" >>"$OUT/ended-well"; fi
    if [ -n "${ARCHIVE:-}" ]; then
        cp "$OUT/results.json" "$ARCHIVE/"
        # Whole or not at all.
        tar czf "$ARCHIVE/results.part" -C "$OUT" . && mv "$ARCHIVE/results.part" "$ARCHIVE/results.tar.gz"
    fi
}

part 40 environment "$PYTHON" -m benchmarks.gpu environment $TOY --out "$OUT"
part 60 check "$PYTHON" -m benchmarks.gpu check $TOY --out "$OUT"
part 40 kernels "$PYTHON" -m benchmarks.gpu kernels $TOY --out "$OUT"
part 25 shapes "$PYTHON" -m benchmarks.gpu shapes $TOY --out "$OUT"
part 55 speed "$PYTHON" -m benchmarks.gpu speed $TOY --out "$OUT"
part 20 memory "$PYTHON" -m benchmarks.gpu memory $TOY --out "$OUT"
part 30 small "$PYTHON" -m benchmarks.gpu small $TOY --out "$OUT"
part 45 peers "$PYTHON" -m benchmarks.gpu peers $TOY --out "$OUT"
part 30 suites "$PYTHON" -m benchmarks.gpu suites $TOY --out "$OUT"
part 20 profile "$PYTHON" -m benchmarks.gpu profile $TOY --out "$OUT"
part 45 tuned env GIST_FAST_AUTOTUNE=1 "$PYTHON" -m benchmarks.gpu tuned $TOY --out "$OUT"
part 20 tests "$PYTHON" -m benchmarks.gpu tests $TOY --out "$OUT"
if command -v compute-sanitizer >/dev/null; then
    part 15 sanitize compute-sanitizer --error-exitcode 3 "$PYTHON" -m benchmarks.gpu sanitize $TOY --out "$OUT"
fi
limited $SHOWING "$PYTHON" -m benchmarks.gpu.results table --out "$OUT"
