#!/usr/bin/env bash
# The figures of a CPU, and the README's tables out of them: benchmarks/cpu.sh, on a machine that does nothing else.
#
# Writes benchmarks/results/<device>/{bench,loss_cpu,step}.json and the README. Takes about an hour and a half on two
# cores, nearly all of it sentence-transformers' training steps; STEPS=0 leaves these out. bench.json of an earlier run
# is moved to bench-previous.json, and what moved since is printed at the end.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=1
DEVICE=$("$PYTHON" -c 'from gist_fast.bench.results import device_name; print(device_name())')
OUT=benchmarks/results/$DEVICE
mkdir -p "$OUT"

if [ -e "$OUT/bench.json" ]; then mv "$OUT/bench.json" "$OUT/bench-previous.json"; fi
"$PYTHON" -m gist_fast bench --output benchmarks/results
"$PYTHON" -m benchmarks.loss_cpu --keep
if [ "${STEPS:-1}" != 0 ]; then
    "$PYTHON" -m benchmarks.step --batch 512 --rounds 3
fi
"$PYTHON" -m benchmarks.readme --device "$DEVICE"
if [ -e "$OUT/bench-previous.json" ]; then
    "$PYTHON" -m gist_fast bench compare "$OUT/bench-previous.json" "$OUT/bench.json"
fi
