"""Parts of benchmarks/gpu.sh that need sentence-transformers: the suites of ``gist-fast bench``, and a profile."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path

from benchmarks.gpu.bench import Bench
from gist_fast.bench.run import SUITES

PEERS = ("loss", "self", "unguided")
MODELS = ("step", "engine", "guide")
CONFIG = """\
student: {folder}/student
guide: {folder}/guide
data:
  train: {folder}/pairs.jsonl
training:
  output_dir: {folder}/run
  per_device_train_batch_size: {batch}
  use_cpu: {cpu}
"""


def peers(bench: Bench) -> None:
    """The loss beside its peers over batch sizes: with a guide, guided by the student itself, and without."""
    # At the smallest sentence-transformers' loss fits too, which takes 13.5 GiB there, and 216 at 4096.
    chosen = PEERS[:1] if bench.toy else PEERS
    bench.measure([SUITES[name] for name in chosen], "bench.json", 28.0, (1024, 4096, 16384, 65536))


def suites(bench: Bench) -> None:
    """A training step, the engine and the guide columns beside sentence-transformers."""
    if _missing(bench):
        return
    chosen = MODELS[:2] if bench.toy else MODELS
    bench.measure([SUITES[name] for name in chosen], "bench-models.json", 18.0, (128, 512, 2048))


def profile(bench: Bench) -> None:
    """Where the time of a short run's step goes."""
    if _missing(bench):
        return
    # Elsewhere than the results: models of random weights are of no use to whoever takes those away.
    with tempfile.TemporaryDirectory(prefix="gist-fast-gpu-") as scratch:
        _profile(bench, Path(scratch))


def _profile(bench: Bench, folder: Path) -> None:
    from gist_fast.bench.models import build_model, texts
    from gist_fast.cli.main import run

    for seed, name in enumerate(("student", "guide")):
        build_model(seed=seed, device=bench.device.type).save_pretrained(str(folder / name))
    batch = 8 if bench.toy else 1024
    count = 8 * batch
    pairs = zip(texts(count, "anchor"), texts(count, "positive"), strict=True)
    lines = [json.dumps({"anchor": anchor, "positive": positive}) + "\n" for anchor, positive in pairs]
    (folder / "pairs.jsonl").write_text("".join(lines))
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder.resolve(), batch=batch, cpu=str(bench.toy).lower()))
    target = bench.out / "profile"
    steps = ("--steps", "2" if bench.toy else "5", "--warmup", "1" if bench.toy else "2")
    code = run(["profile", str(config), *steps, "--output", str(target), "--overwrite"])
    if code == 0:
        found = json.loads((target / "profile.json").read_text())
        bench.write(parts=found["parts"], machine=found["machine"], folder=target.name)
    raise SystemExit(code)


def _missing(bench: Bench) -> bool:
    missing = [name for name in ("sentence_transformers", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        bench.write(skipped=f"not installed: {', '.join(missing)}")
    return bool(missing)
