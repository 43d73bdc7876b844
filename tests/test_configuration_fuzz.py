"""What ``gist-fast train --dry-run`` accepts trains, and what it refuses is one line and exit code 2.

Keys of all sections, alone and in pairs, with values that fit their types, lie at their bounds, or make no sense.
"""

from __future__ import annotations

import enum
import json
import os
import shutil
import types
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from gist_fast.config.schema import hint_of, known_paths

CASES = int(os.environ.get("GIST_FAST_FUZZ_CASES", "500"))
FIRST = int(os.environ.get("GIST_FAST_FUZZ_FIRST", "0"))

GOOD: dict[type, list[typing.Any]] = {
    bool: [True, False],
    int: [1, 2, 3, 7],
    float: [0.1, 0.5, 1, 2],
    str: ["x"],
    dict: [{}],
    list: [["x"]],
    type(None): [None],
}
ODD: dict[type, list[typing.Any]] = {
    bool: ["yes", 1],
    int: [-1, 0, 2**31, 1.5, "many"],
    float: [-1, 0, 1e-8, 3, 1e10, float("nan"), float("inf"), "much"],
    str: ["", "none", "a b", 5],
    dict: [{"a": 1}, {"anchor": "x"}, [1]],
    list: [[], [1, 2], {"a": 1}],
    type(None): [None],
}
# What no type tells: words that mean something, and what would take minutes or another machine's parts.
OF_KEY: dict[str, list[typing.Any]] = {
    "torch_compile": [False],  # compiling takes longer than all other cases
    "torch_compile_mode": ["nonsense", None],
    "torch_compile_backend": ["eager", "nonsense", None],
    "max_steps": [-5, -1, 0, 1, 2],
    "num_train_epochs": [-1, 0, 0.1, 1, 2],
    "dataloader_num_workers": [-1, 0, 1],
    "report_to": ["none", "all", "tensorboard", "wandb", ["tensorboard"], ["mlflow"], "nonsense", []],
    "log_level": ["passive", "info", "error", "nonsense"],
    "lr_scheduler_kwargs": [{}, {"num_cycles": 2}, {"min_lr": 1e-6}, {"min_lr_rate": 0.1}, {"num_decay_steps": 1}],
    "optim_args": ["", "a", "a=1", "momentum=0.9", "momentum=x"],
    "metric_for_best_model": ["loss", "eval_loss", "ndcg@10", "nonsense"],
    "matryoshka_dims": [[4], [32, 8], [0], [-1], [4096], [], [8, 8], ["x"]],
    "matryoshka_weights": [[1], [1, 2], [-1], []],
    "debug": ["", "underflow_overflow", "nonsense"],
    "activation_checkpointing_kwargs": [{"use_reentrant": False}, {"nonsense": 1}],
    "gradient_checkpointing_kwargs": [{"use_reentrant": True}, {"nonsense": 1}],
    "accelerator_config": [{"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}, {"a": 1}],
    "ddp_backend": ["gloo", "nonsense"],
    "mini_batch_size": [0, 1, 2, 3, 1000],
    "mini_batch_num_tokens": [0, 1, 50],
    "activation_memory": ["auto", 0, 0.5, -1, "x"],
    "temperature_end": [0.001, 0.05, 1, 0],
    "temperature": [0.001, 0.05, 1, 5, 0],
    "prompts": ["q: ", {"anchor": "q: "}, {"nothing": "q: "}, 5],
    "guide_prompts": ["q: ", {"positive": "q: "}, {"nothing": "q: "}],
    "split": ["train", "train[:2]"],
    "name": ["x"],
    "columns": [["anchor", "positive"], ["a"], {"anchor": "anchor", "positive": "positive"}, {"group": "anchor"}],
    "primary": ["retrieval", "sts", "nonsense"],
    "target_modules": ["all-linear", ["query"], ["query", "value"]],
}
PATHS = ("train", "eval", "pairs", "triplet", "sts", "pair_classification", "queries", "corpus", "relevant", "path")
# Where the models lie and how they are loaded, which only their loading can tell.
LEFT_OUT = {
    ("training", "output_dir"),
    ("student",),
    ("guide",),
    *((model, key) for model in ("student", "guide") for key in ("path", "revision", "model_kwargs")),
}


def values(path: tuple[str, ...], folder: Path, plain: dict[type, list[typing.Any]]) -> list[typing.Any]:
    name = path[-1]
    if name in OF_KEY:
        return OF_KEY[name]
    if name in PATHS and path[0] in ("data", "evaluation"):
        return [str(folder / file_of(path))] if plain is GOOD else ["nothing.jsonl", str(folder), 5]
    found: list[typing.Any] = []
    for option in options(hint_of(path)):
        if isinstance(option, type) and issubclass(option, enum.Enum):
            found += [member.value for member in option] if plain is GOOD else ["nonsense"]
        elif typing.get_origin(option) is typing.Literal:
            found += typing.get_args(option) if plain is GOOD else ["nonsense"]
        else:
            found += plain.get(typing.get_origin(option) or option, [])
    return found or ["x"]


def file_of(path: tuple[str, ...]) -> str:
    kinds = ("triplet", "sts", "pair_classification", "queries", "corpus", "relevant")
    return next((f"{kind}.jsonl" for kind in kinds if kind in path), "pairs.jsonl")


def options(hint: typing.Any) -> list[typing.Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for member in typing.get_args(hint) for option in options(member)]
    return [hint]


@pytest.fixture
def base(tmp_path, pairs, tiny_student, tiny_guide):
    rows = [dict(row) for row in pairs.select(range(12))]
    scored = [{"sentence1": row["anchor"], "sentence2": row["positive"]} for row in rows]
    files = {
        "pairs": rows,
        "triplet": [{**row, "negative": rows[k - 1]["positive"]} for k, row in enumerate(rows)],
        "sts": [{**row, "score": k / 12} for k, row in enumerate(scored)],
        "pair_classification": [{**row, "label": k % 2} for k, row in enumerate(scored)],
        "queries": [{"_id": f"q{k}", "text": row["anchor"]} for k, row in enumerate(rows)],
        "corpus": [{"_id": f"d{k}", "text": row["positive"]} for k, row in enumerate(rows)],
        "relevant": [{"query-id": f"q{k}", "corpus-id": f"d{k}", "score": 1} for k in range(12)],
    }
    for name, written in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    return {
        "student": {"path": str(tiny_student)},
        "guide": {"path": str(tiny_guide)},
        "data": {"train": {"path": str(tmp_path / "pairs.jsonl")}},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
        },
    }


def with_keys(base: dict, folder: Path, draw: np.random.Generator) -> tuple[dict, dict]:
    tree = json.loads(json.dumps(base))
    keys = [path for path in known_paths() if path not in LEFT_OUT and path[:3] != ("data", "train", "path")]
    weights = np.array([0.5 if path[0] == "evaluation" else 1.0 for path in keys])
    if draw.random() < 0.25:
        tree["guide"] = None
    if draw.random() < 0.3:
        tree["data"]["eval"] = {"path": str(folder / "pairs.jsonl")}
    if draw.random() < 0.3:
        tree["evaluation"] = {"pairs": {"path": str(folder / "pairs.jsonl")}}
    chosen = draw.choice(len(keys), size=draw.integers(1, 3), replace=False, p=weights / weights.sum())
    changed = {}
    for path in [keys[k] for k in chosen]:
        several = values(path, folder, GOOD if draw.random() < 0.7 else ODD)
        value = several[draw.integers(len(several))]
        node = tree
        for key in path[:-1]:
            below = node.get(key)
            node[key] = below if isinstance(below, dict) else {} if below is None else {"path": below}
            node = node[key]
            if key in PATHS and "path" not in node:
                node["path"] = str(folder / file_of(path))
        if isinstance(node.get(path[-1]), dict):
            continue
        node[path[-1]] = value
        changed[".".join(path)] = value
    return tree, changed


@pytest.mark.slow
@pytest.mark.longest
def test_what_the_dry_run_accepts_trains(base, tmp_path, run_command):
    wrong, accepted = [], 0
    for case in range(FIRST, FIRST + CASES):
        tree, changed = with_keys(base, tmp_path, np.random.default_rng(case))
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        dry = run_command("train", config, "--dry-run")
        lines = [line for line in dry.err.splitlines() if line.startswith("gist-fast: ")]
        if dry.code == 0:
            accepted += 1
            trained = run_command("train", config, "--json")
            steps = json.loads(trained.out)["steps"] if trained.code == 0 else 0
            if trained.code or not 1 <= steps <= 40:
                wrong.append((case, changed, "accepted", trained.code, trained.err.strip().splitlines()[-1:]))
        elif dry.code != 2 or dry.out or len(lines) != 1 or "Traceback" in dry.err or len(lines[0]) > 1200:
            wrong.append((case, changed, "refused", dry.code, dry.err.strip().splitlines()[-1:]))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        torch.use_deterministic_algorithms(False)
    assert not wrong, "\n".join(map(str, wrong))
    assert CASES / 4 < accepted < 3 * CASES / 4
