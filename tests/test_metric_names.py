"""The metrics of a run have one list of names, which is known, and refused or found in, before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from gist_fast.config.schema import EvaluationConfig, SourceConfig
from gist_fast.evaluation.evaluators import configured_evaluator
from gist_fast.evaluation.metric_names import reported_metrics
from gist_fast.pipeline.saved_model import SavedModel

KINDS = ("pairs", "triplet", "sts", "pair_classification")


@pytest.fixture
def file(tmp_path, every_kind) -> Path:
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in every_kind))
    return path


@pytest.fixture
def config(tmp_path, file, tiny_student):
    """Write a configuration; keywords are its sections, ``training`` on top of what is common to all."""

    def write(**sections) -> Path:
        common = {"output_dir": "out", "max_steps": 4, "per_device_train_batch_size": 16, "use_cpu": True}
        common |= {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
        train = {"path": file.name, "columns": ["anchor", "positive"]}
        data = {"train": train, **sections.pop("data", {})}
        whole = {"student": str(tiny_student), "guide": None, "data": data, **sections}
        whole["training"] = {**common, **sections.get("training", {})}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path / "config.yaml"

    return write


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("kinds", [*((kind,) for kind in KINDS), KINDS])
def test_the_list_is_what_the_evaluators_report(kinds, similarity, file, student):
    student.similarity_fn_name = similarity
    tasks = EvaluationConfig(**dict.fromkeys(kinds, SourceConfig(str(file))))
    found = configured_evaluator(tasks)(student)
    assert sorted(reported_metrics(tasks, None, similarity)) == sorted(found)


def test_the_list_is_what_a_run_logs(run_command, config, file, tmp_path):
    both = {"one": file.name, "two": {"path": file.name}}
    evaluation = {"pairs": file.name, "sts": file.name}
    path = config(
        data={"eval": {name: {"path": file.name, "columns": ["anchor", "positive"]} for name in both}},
        evaluation=evaluation,
        training={"metric_for_best_model": "two_loss"},
    )
    assert run_command("train", path).code == 0
    logs = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    logged = {name.removeprefix("eval_") for log in logs["log_history"] for name in log if name.startswith("eval_")}
    times = ("_runtime", "_per_second")
    tasks = EvaluationConfig(**{name: SourceConfig(str(file)) for name in evaluation})
    assert {n for n in logged if not n.endswith(times)} == set(reported_metrics(tasks, both, "cosine"))
    assert logs["best_metric"] == min(log["eval_two_loss"] for log in logs["log_history"] if "eval_two_loss" in log)


@pytest.mark.parametrize(
    ("kinds", "asked", "name"),
    [
        (("pairs",), "ndcg@10", "cosine_ndcg@10"),
        (("pairs",), "eval_ndcg@10", "cosine_ndcg@10"),
        (("pairs",), "NDCG@10", "cosine_ndcg@10"),
        (("pairs",), "ndcg_at_10", "cosine_ndcg@10"),
        (("pairs",), "eval_cosine_ndcg@10", "cosine_ndcg@10"),
        (("pairs", "sts"), "spearman", "sts_spearman_cosine"),
        (("sts",), "spearman_cosine", "sts_spearman_cosine"),
        (KINDS, "triplet_accuracy", "cosine_accuracy"),
        (KINDS, "pair_ap", "pair_cosine_ap"),
        (KINDS, "ap", "pair_cosine_ap"),
    ],
)
def test_a_short_name_chooses_the_checkpoint(kinds, asked, name, config, file):
    from gist_fast.config.load import load_config
    from gist_fast.pipeline import prepare

    path = config(evaluation=dict.fromkeys(kinds, file.name), training={"metric_for_best_model": asked})
    arguments = prepare(load_config(path)).arguments
    assert (arguments.metric_for_best_model, arguments.greater_is_better) == (name, True)


def test_a_run_by_a_short_name(run_command, config, file, tmp_path):
    path = config(
        evaluation={"pairs": file.name}, training={"metric_for_best_model": "ndcg@10", "save_strategy": "best"}
    )
    result = run_command("train", path, "--json")
    assert result.code == 0, result.err
    best = Path(json.loads(result.out)["best_checkpoint"])
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_metric"] == state["log_history"][-1]["eval_cosine_ndcg@10"]


def test_a_best_model_that_nothing_scored_is_said(run_command, config, file, tmp_path):
    training = {"metric_for_best_model": "ndcg@10", "eval_delay": 50}
    result = run_command("train", config(evaluation={"pairs": file.name}, training=training), "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["best_checkpoint"] is None
    assert (
        "warning: training.load_best_model_at_end: no checkpoint has a score of cosine_ndcg@10, so that" in result.err
    )


def test_the_names_go_by_the_similarity_of_the_student(run_command, config, file, tiny_student, tmp_path):
    folder = tmp_path / "dot"
    shutil.copytree(tiny_student, folder)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    (folder / "config_sentence_transformers.json").write_text(json.dumps({**settings, "similarity_fn_name": "dot"}))
    assert [SavedModel(str(path), "student").similarity for path in (folder, tiny_student)] == ["dot", "cosine"]
    assert SavedModel("nobody/nothing", "student").similarity is None
    path = config(evaluation={"pairs": file.name}, training={"metric_for_best_model": "cosine_ndcg@10"})
    result = run_command("train", path, "--student", folder, "--dry-run")
    assert (result.code, result.out) == (2, "")
    assert "got 'cosine_ndcg@10' (did you mean 'dot_ndcg@10'?); there are dot_ndcg@10, " in result.err
    result = run_command("train", path, "--student", folder, "--metric_for_best_model", "ndcg@10", "--json")
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"evaluation": ("sts",), "training": {"metric_for_best_model": "ndcg@10"}},
            "training.metric_for_best_model: expected a metric that is measured, got 'ndcg@10'; there are "
            "sts_spearman_cosine, sts_pearson_cosine.",
        ),
        (
            {"evaluation": ("sts",), "training": {"metric_for_best_model": "sts_spearmann_cosine"}},
            "got 'sts_spearmann_cosine' (did you mean 'sts_spearman_cosine'?); there are ",
        ),
        (
            {"evaluation": KINDS, "training": {"metric_for_best_model": "accuracy"}},
            "training.metric_for_best_model: 'accuracy' could be cosine_accuracy or pair_cosine_accuracy; write which.",
        ),
        # Without a metric, the loss is the default, which needs data.eval.
        ({"evaluation": ("triplet",)}, "got 'loss' (the default); there are cosine_accuracy."),
        (
            {"evaluation": ("sts",), "training": {"load_best_model_at_end": False, "save_strategy": "best"}},
            "training.metric_for_best_model is missing, which save_strategy: best needs; there are sts_spearman",
        ),
        (
            {"evaluation": ("sts",), "training": {"metric_for_best_model": "spearman", "greater_is_better": False}},
            "training.greater_is_better: expected true for sts_spearman_cosine, or nothing, got false, which",
        ),
        (
            {"data": ("eval",), "training": {"greater_is_better": True}},
            "training.greater_is_better: expected false for loss, or nothing, got true",
        ),
        (
            {"data": ("one", "two")},
            "training.metric_for_best_model: 'loss' could be one_loss or two_loss; write which.",
        ),
        (
            {"evaluation": ("sts",), "training": {"metric_for_best_model": "epoch"}},
            "training.metric_for_best_model: expected a metric that is measured, got 'epoch'",
        ),
        ({}, "training.eval_strategy: expected data.eval or evaluation to go with it, got neither"),
        (
            {"training": {"eval_strategy": "no", "save_strategy": "no"}},
            "training.load_best_model_at_end: nothing is evaluated, so that no model is the best; give data.eval",
        ),
        (
            {
                "evaluation": ("sts",),
                "training": {"load_best_model_at_end": False, "lr_scheduler_type": "reduce_lr_on_plateau"},
            },
            "got 'loss' (the default); there are sts_spearman_cosine, sts_pearson_cosine.",
        ),
    ],
)  # fmt: skip
def test_what_nothing_measures_is_refused_by_the_dry_run(sections, says, run_command, config, file, tmp_path):
    given = dict(sections)
    if "evaluation" in given:
        given["evaluation"] = dict.fromkeys(given["evaluation"], file.name)
    if "data" in given:
        source = {"path": file.name, "columns": ["anchor", "positive"]}
        several = len(given["data"]) > 1
        given["data"] = {"eval": dict.fromkeys(given["data"], source) if several else source}
    result = run_command("train", config(**given), "--dry-run")
    assert (result.code, result.out) == (2, ""), result.out
    assert says in result.err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
