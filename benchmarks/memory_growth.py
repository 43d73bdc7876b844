"""Whether memory grows with the steps of a run: ``python -m benchmarks.memory_growth [--steps N]``.

Student and guide are BERTs of random weights, so small that thousands of steps take a minute or two; texts are of mixed
length. Each mode trains in a process of its own. After each epoch, and a collection, it is noted how much memory the
process holds, how many tensors are alive, how many of them hold a graph, and how many blocks Python has allocated.
Results go to ``benchmarks/results/<device>/memory_growth.json``; ``--table`` only prints the table of these.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.machine import command, measured_on
from gist_fast.bench.tables import markdown

RESULTS = Path(__file__).parent / "results"
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "activation_memory: 0": {"activation_memory": 0.0},
    "guide_cache": {"guide_cache": True},
}
"""Arguments of the training, by the name of the mode."""
BATCH, TOKENS = 8, 32
EPOCH = 100
"""Steps of an epoch: after that the guide's cache holds every text."""
LAYERS, WIDTH, HEADS = 2, 32, 2


def alive() -> dict[str, int]:
    """What this process holds, after a collection."""
    import torch

    from gist_fast.runtime.memory import process_memory_mib

    gc.collect()
    blocks = sys.getallocatedblocks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of the objects warn when they are looked at
        tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = {s.data_ptr(): s.nbytes() for x in tensors if (s := x.untyped_storage())}
    return {
        "process_memory": round(process_memory_mib() * 2**20),
        "tensors": len(tensors),
        "tensors_with_graph": sum(x.grad_fn is not None for x in tensors),
        "tensor_bytes": sum(storages.values()),
        "python_blocks": blocks,
    }


def train(mode: str, steps: int, every: int) -> list[dict[str, int]]:
    """What `alive` found after every so many steps, in this process."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from gist_fast import GISTTrainer, GISTTrainingArguments
    from gist_fast.bench.models import build_model, texts

    found: list[dict[str, int]] = []

    class Census(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0:
                found.append({"step": state.global_step, **alive()})

    student, guide = (build_model(LAYERS, WIDTH, HEADS, seed) for seed in (0, 1))
    student.max_seq_length = guide.max_seq_length = TOKENS
    data = Dataset.from_dict({role: texts(EPOCH * BATCH, role) for role in ("anchor", "positive")})
    with tempfile.TemporaryDirectory() as folder:
        arguments = GISTTrainingArguments(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            logging_steps=every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **MODES[mode],
        )
        GISTTrainer(student, arguments, data, guide=guide, callbacks=[Census()]).train()
    return found


def in_own_process(mode: str, arguments: argparse.Namespace) -> list[dict[str, int]]:
    """`train` in a fresh process."""
    started = [sys.executable, "-m", "benchmarks.memory_growth", "--mode", mode]
    started += ["--steps", str(arguments.steps), "--every", str(arguments.every)]
    done = subprocess.run(started, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(started)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def growth(found: list[dict[str, int]]) -> float:
    """Bytes of process memory that a step adds in the second half of a run: the median slope between two counts, which
    a single high one does not move."""
    half = found[len(found) // 2 - 1 :]
    return statistics.median(
        (b["process_memory"] - a["process_memory"]) / (b["step"] - a["step"]) for a, b in combinations(half, 2)
    )


def table(results: dict[str, Any]) -> str:
    """The run as Markdown: memory at five moments, and what is alive after the first count and the last."""
    runs = results["modes"]
    entries = next(iter(runs.values()))
    shown = sorted({max(0, len(entries) * k // 4 - 1) for k in range(5)})
    columns = ["mode", *(f"MiB after {entries[k]['step']:,} steps" for k in shown)]
    columns += ["highest", "KiB a step, second half", "tensors", "with a graph", "Python's blocks"]
    rows = []
    for mode, found in runs.items():
        first, last = found[0], found[-1]
        rows.append(
            [
                mode,
                *(f"{found[k]['process_memory'] / 2**20:,.1f}" for k in shown),
                f"{max(entry['process_memory'] for entry in found) / 2**20:,.1f}",
                f"{growth(found) / 2**10:.2f}",
                *(f"{first[k]:,} to {last[k]:,}" for k in ("tensors", "tensors_with_graph", "python_blocks")),
            ]
        )
    return markdown(columns, rows) + "\n\n" + measured_on(results["machine"], results["command"])


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=EPOCH, help="steps from one count to the next")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--device", default=f"cpu-{torch.get_num_threads()}-threads", help="the results' folder")
    parser.add_argument("--table", action="store_true", help="only print the table of the stored results")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        print(json.dumps(train(arguments.mode, arguments.steps, arguments.every)))
        return
    path = RESULTS / arguments.device / "memory_growth.json"
    if not arguments.table:
        from benchmarks.machine import machine

        results: dict[str, Any] = {"command": command("benchmarks.memory_growth"), "machine": machine()}
        results |= {"batch": BATCH, "most_tokens": TOKENS, "modes": {}}
        for mode in arguments.modes:
            print(f"{mode} ...", file=sys.stderr)
            results["modes"][mode] = in_own_process(mode, arguments)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=2) + "\n")
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Of the processes that train: threads that wait asleep, as in `gist-fast bench`.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
