"""Parts of benchmarks/gpu.sh that need sentence-transformers: the suites of ``gist-fast bench``, and a profile."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.gpu import Bench

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
    _run(bench, PEERS[:1] if bench.toy else PEERS, "bench.json", 38.0, (1024, 4096, 16384, 65536))


def suites(bench: Bench) -> None:
    """A training step, the engine and the guide columns beside sentence-transformers."""
    if _missing(bench):
        return
    _run(bench, MODELS[:2] if bench.toy else MODELS, "bench-models.json", 25.0, (128, 512, 2048))


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


def _run(bench: Bench, names: tuple[str, ...], file: str, seconds: float, sizes: tuple[int, ...]) -> None:
    from gist_fast.bench.results import Results
    from gist_fast.bench.run import SUITES, run
    from gist_fast.bench.suite import Plan

    def keep(results: Results) -> None:
        # Again and again, as rows are finished: what an earlier call wrote is replaced, all at once.
        part = bench.out / f".{file}.part"
        part.write_text(json.dumps(results.as_dict(), indent=1) + "\n", encoding="utf-8")
        part.replace(bench.out / file)
        outcomes = [f"{row.suite} {row.size} {row.what}: {row.outcome} {row.why}".strip() for row in results.rows]
        bench.write(file=file, outcomes=outcomes)

    plan = Plan((16, 24), "cpu") if bench.toy else Plan(sizes, "cuda", "bfloat16")
    chosen = [SUITES[name] for name in names]
    run(
        chosen,
        plan,
        command="benchmarks/gpu.sh",
        budget=300.0 if bench.toy else seconds,
        rounds=7,
        say=print,
        keep=keep,
    )


def _missing(bench: Bench) -> bool:
    if importlib.util.find_spec("sentence_transformers") is not None:
        return False
    bench.write(skipped="sentence-transformers is not installed")
    return True
