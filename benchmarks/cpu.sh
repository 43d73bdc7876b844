#!/usr/bin/env bash
# The figures of a CPU, and the README's tables out of them: benchmarks/cpu.sh, on a machine that does nothing else.
#
# Writes benchmarks/results/<device>/{bench,growth,loss_cpu,step}.json and the README. Takes an hour or more on two cores,
# nearly all of it sentence-transformers' training steps; STEPS=0 leaves these out. bench.json of an earlier run
# is moved to bench-previous.json, or with the first number of which nothing is there, its plots with it; what moved since
# is printed at the end.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1
DEVICE=$("$PYTHON" -c 'from gist_fast.runtime.environment import device_name; print(device_name())')
OUT=benchmarks/results/$DEVICE
mkdir -p "$OUT"

PREVIOUS=
if [ -e "$OUT/bench.json" ]; then
    PREVIOUS=$OUT/bench-previous NUMBER=1
    while [ -e "$PREVIOUS.json" ] || ls "$PREVIOUS"-[a-z]*.svg >/dev/null 2>&1; do
        NUMBER=$((NUMBER + 1))
        PREVIOUS=$OUT/bench-previous-$NUMBER
    done
    mv "$OUT/bench.json" "$PREVIOUS.json"
    for KIND in time memory share; do
        for PLOT in "$OUT"/bench-*-"$KIND".svg; do
            NAME=${PLOT##*/bench-}
            case $NAME in
            previous-* | [0-9]* | "*"*) ;; # another file's
            *) mv "$PLOT" "$PREVIOUS-$NAME" ;;
            esac
        done
    done
fi
"$PYTHON" -m gist_fast bench --output benchmarks/results
rm -rf "build/$DEVICE"
"$PYTHON" -m gist_fast bench --suite loss,step --sizes 256,512,1024,2048,4096 --seconds 700 --output build
mv "build/$DEVICE/bench.json" "$OUT/growth.json"
"$PYTHON" -m benchmarks.loss_cpu --keep
if [ "${STEPS:-1}" != 0 ]; then
    "$PYTHON" -m benchmarks.step --batch 512 --rounds 3
fi
"$PYTHON" -m benchmarks.readme --device "$DEVICE"
if [ -n "$PREVIOUS" ]; then
    "$PYTHON" -m gist_fast bench compare "$PREVIOUS.json" "$OUT/bench.json"
fi
