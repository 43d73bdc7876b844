"""A model that gives NaN is said to do so, and has no score, in every kind of evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from gist_fast.config.schema import EvaluationConfig, SourceConfig
from gist_fast.evaluation.evaluators import configured_evaluator
from gist_fast.evaluation.metric_names import reported_metrics

KINDS = ("pairs", "triplet", "sts", "pair_classification")


@pytest.fixture
def file(tmp_path, every_kind) -> Path:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in every_kind[:20]))
    return path


@pytest.fixture
def broken(student):
    """Gives NaN for texts with the word 'boil', which only some have."""
    token = student.tokenizer.convert_tokens_to_ids("boil")
    assert token != student.tokenizer.unk_token_id
    with torch.no_grad():
        student[0].auto_model.embeddings.word_embeddings.weight[token] = math.nan
    return student


@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_nan_is_said_and_no_score(kinds, file, broken, caplog):
    config = EvaluationConfig(**dict.fromkeys(kinds, SourceConfig(str(file))))
    evaluator = configured_evaluator(config)
    found = evaluator(broken)
    assert sorted(found) == sorted(reported_metrics(config, None, "cosine"))
    assert all(map(math.isnan, found.values()))
    assert found[evaluator.primary_metric] is not None
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == len(kinds)
    for kind, line in zip(kinds, told, strict=True):
        assert line.startswith(f"{'retrieval' if kind == 'pairs' else kind}: the embeddings of ")
        assert "texts hold NaN or infinite numbers, so that the metrics are NaN; the first is that of " in line
        assert "boil" in line


def test_the_command_says_it_too(run_command, file, broken, tmp_path):
    broken.save(str(tmp_path / "broken"))
    options = [part for kind in KINDS for part in ("--" + kind.replace("_", "-"), file)]
    result = run_command("evaluate", tmp_path / "broken", *options, "--json", "--device", "cpu")
    assert result.code == 0, result.err
    assert set(json.loads(result.out)["model"]["metrics"].values()) == {None}
    assert result.err.count("hold NaN or infinite numbers, so that the metrics are NaN") == 4


def test_a_run_is_not_ended_by_its_evaluators(run_command, file, tmp_path, pairs, broken):
    import yaml

    broken.save(str(tmp_path / "broken"))
    training = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True}
    pairs.select(range(20, 40)).to_json(tmp_path / "train.jsonl")
    data = {"train": str(tmp_path / "train.jsonl")}
    config = {"student": str(tmp_path / "broken"), "guide": None, "data": data, "training": training}
    training |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 2}
    config["evaluation"] = {kind: str(file) for kind in KINDS}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    result = run_command("train", tmp_path / "c.yaml", "--json")
    # It evaluates before the first step and after it. What ends it is that such weights are not saved.
    assert (result.code, result.out) == (1, "")
    assert "after step 2 the weights of 0.model.embeddings.word_embeddings.weight are not finite" in result.err
    assert result.err.count("warning: pair_classification: the embeddings of 3 of 40 texts hold NaN") == 2
