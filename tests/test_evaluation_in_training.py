"""Several kinds of evaluation in one run of ``gist-fast train``: what is logged, the best checkpoint, what is told."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from gist_fast.evaluation.evaluators import METRICS


@pytest.fixture
def config(tmp_path, every_kind, tiny_student) -> Path:
    """Eight steps, evaluated and saved at every second one."""
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every_kind))
    training = {
        "output_dir": "out",
        "max_steps": 8,
        "per_device_train_batch_size": 16,
        "learning_rate": 0.003,
        "use_cpu": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "sequential_score",
    }
    kinds = dict.fromkeys(("pairs", "triplet", "sts", "pair_classification"), "all.jsonl")
    whole = {
        "student": str(tiny_student),
        "guide": None,
        "data": {"train": {"path": "all.jsonl", "columns": ["anchor", "positive"]}},
        "training": training,
        "evaluation": {**kinds, "primary": "sts"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(whole))
    return path


def spearman(model: SentenceTransformer, rows: list[dict]) -> float:
    # In the batches of the evaluator: ranks that are nearly the same could change places by rounding.
    first, second = (model.encode([row[name] for row in rows], batch_size=64) for name in ("anchor", "positive"))
    return spearmanr([row["score"] for row in rows], model.similarity_pairwise(first, second))[0]


def test_the_primary_one_chooses_the_checkpoint(run_command, config, tmp_path, every_kind, student):
    result = run_command("train", config, "--json")
    assert result.code == 0, result.err
    summary = json.loads(result.out)
    state = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    logged = {log["step"]: log for log in state["log_history"] if "eval_sequential_score" in log}
    assert list(logged) == [2, 4, 6, 8]
    scores = {}
    for step, log in logged.items():
        assert {"eval_cosine_ndcg@10", "eval_cosine_accuracy", "eval_pair_cosine_ap"} <= set(log)
        found = spearman(SentenceTransformer(str(tmp_path / "out" / f"checkpoint-{step}"), device="cpu"), every_kind)
        assert log["eval_sequential_score"] == log["eval_sts_spearman_cosine"] == pytest.approx(found, abs=1e-6)
        scores[step] = found
    best = max(scores, key=lambda step: scores[step])
    assert summary["best_checkpoint"].endswith(f"checkpoint-{best}")
    # Neither the first nor the last, nor what another kind would have chosen: the choice was made.
    assert best != max(logged, key=lambda step: logged[step]["eval_cosine_ndcg@10"])
    before, after = summary["evaluation"]["before"], summary["evaluation"]["after"]
    assert tuple(before) == tuple(after) == METRICS
    assert before["sts_spearman"] == pytest.approx(spearman(student, every_kind), abs=1e-6)
    assert after["sts_spearman"] == pytest.approx(scores[best], abs=1e-6)


def test_another_primary_and_a_metric_by_its_own_name(run_command, config, tmp_path):
    for options, name in (
        (("--primary", "pair_classification"), "eval_pair_cosine_ap"),
        (("--metric_for_best_model", "cosine_ndcg@10"), "eval_cosine_ndcg@10"),
    ):
        result = run_command("train", config, "--max_steps", "4", "--overwrite", *options, "--json")
        assert result.code == 0, result.err
        state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
        assert state["best_metric"] == max(log[name] for log in state["log_history"] if name in log)


def test_the_plan_names_the_evaluators(run_command, config):
    result = run_command("train", config, "--dry-run", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["evaluator"] == (
        "InformationRetrievalEvaluator, TripletEvaluator, EmbeddingSimilarityEvaluator, BinaryClassificationEvaluator"
    )


def test_a_wrong_file_is_told_before_training(run_command, config, tmp_path):
    (tmp_path / "labels.csv").write_text("sentence1,sentence2,label\na,b,1\nc,d,yes\n")
    result = run_command("train", config, "--pair_classification", tmp_path / "labels.csv")
    assert result.code == 2
    assert "labels.csv: row 2 (line 3), column 'label': is 'yes'; a finite number is needed there" in result.err
    assert not (tmp_path / "out").exists()


def test_the_configuration_of_the_documentation(tmp_path, tiny_student):
    from gist_fast.config.load import load_config

    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    part = yaml.safe_load(re.search(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1])
    part["training"]["output_dir"] = "out"
    whole = {"student": str(tiny_student), "data": {"train": "all.jsonl"}, **part}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    config = load_config(tmp_path / "config.yaml")
    assert config.evaluation.sts.columns == ["a", "b", "gold"]
    assert config.evaluation.primary == "sts"
    assert config.arguments["metric_for_best_model"] == "sequential_score"
