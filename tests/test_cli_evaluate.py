"""``gist-fast evaluate`` with its kinds of data, one at a time and together; mteb is in test_mteb_tasks.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers.processors import ByteLevel

from gist_fast.config.schema import EvaluationConfig, SourceConfig
from gist_fast.evaluation.evaluators import METRICS, configured_evaluator, evaluate

KINDS = ("pairs", "triplet", "sts", "pair_classification")


@pytest.fixture
def file(tmp_path, every_kind) -> Path:
    """One file that serves every kind."""
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in every_kind[:20]))
    return path


@pytest.fixture
def run(run_command):
    return lambda *arguments: run_command("evaluate", *arguments, "--device", "cpu")


def option(kind: str) -> str:
    return "--" + kind.replace("_", "-")


def refused(result: SimpleNamespace, says: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    assert says in result.err.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_one_kind_with_its_baseline(run, file, kind, tiny_student, tiny_guide, student, guide):
    result = run(tiny_student, "--baseline", tiny_guide, option(kind), file, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    for role, model in (("model", student), ("baseline", guide)):
        evaluator = configured_evaluator(EvaluationConfig(**{kind: SourceConfig(str(file))}))
        assert found[role]["metrics"] == pytest.approx(evaluate(model, evaluator))
    assert found["model"]["metrics"] != found["baseline"]["metrics"]
    sizes = {key: value for key, value in found.items() if key not in ("model", "baseline")}
    wanted = {
        "pairs": {"queries": 20, "documents": 20},
        "triplet": {"triplets": 20},
        "sts": {"sts_pairs": 20},
        "pair_classification": {"labelled_pairs": 20},
    }
    assert sizes == wanted[kind]


def test_all_kinds_in_one_table(run, file, tiny_student, tiny_guide):
    options = [part for kind in KINDS for part in (option(kind), file)]
    result = run(tiny_student, "--baseline", tiny_guide, *options)
    assert result.code == 0, result.err
    title, *lines = result.out.splitlines()
    assert title.endswith(": 20 queries, 20 documents, 20 triplets, 20 STS pairs, 20 labelled pairs")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert tuple(row[0] for row in rows) == METRICS
    for name, baseline, model, change in rows:
        assert float(model) - float(baseline) == pytest.approx(float(change), abs=2e-4), name


def test_columns_of_other_names(run, tmp_path, tiny_student):
    path = tmp_path / "s.tsv"
    path.write_text("q\tr\tgold\nwhy does ice float\twhy does ice float\t5\nwhat do roots do\twhy do cats purr\t1\n")
    for columns in ("q,r,gold", "sentence1=q,sentence2=r,score=gold"):
        result = run(tiny_student, "--sts", path, "--columns", columns, "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["model"]["metrics"] == pytest.approx({"sts_spearman": 1, "sts_pearson": 1})


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_json_has_no_nan(run, tmp_path, tiny_student):
    # One text throughout: every similarity is 1, and no correlation is defined.
    path = tmp_path / "s.csv"
    path.write_text("sentence1,sentence2,score\na,a,1\na,a,2\na,a,3\n")
    result = run(tiny_student, "--sts", path, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["model"]["metrics"] == {"sts_spearman": None, "sts_pearson": None}


def test_wrong_usage(run, file, tmp_path, tiny_student):
    refused(run(tiny_student), "nothing to measure; give any of --pairs, or --queries, --corpus and --relevant; --trip")
    refused(run(tiny_student, "--queries", "q"), "--corpus, --relevant missing; or give --pairs instead of all three.")
    one = "--columns, --split and --quoting go with one of --pairs, --triplet, --sts or --pair-classification; got "
    refused(run(tiny_student, "--pairs", file, "--sts", file, "--columns", "a,b"), one + "2 of them.")
    files = ("--queries", file, "--corpus", file, "--relevant", file)
    refused(run(tiny_student, *files, "--split", "test"), one + "0 of them.")
    refused(run(tiny_student, "--sts", file, "--query-prompt", "q: "), "--query-prompt and --corpus-prompt go with")
    refused(run(tiny_student, "--sts", tmp_path / "al.jsonl"), "al.jsonl: no such file (did you mean 'all.jsonl'?).")
    refused(run(tiny_student, "--sts", file, "--columns", "anchor=x"), "no column 'x'; it has 'anchor', 'positive'")
    refused(
        run(tiny_student, "--pair-classification", file, "--columns", "label=score"), "row 2, column 'score': is 2.01; "
    )


def test_texts_without_any_token(run_command, tmp_path, tiny_student, student, monkeypatch):
    # As of a tokenizer that puts nothing before and after a text; BERT's drops characters without a width.
    student.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    monkeypatch.setattr("gist_fast.pipeline.models.load_model", lambda *_, **__: student)
    (tmp_path / "x.csv").write_text("anchor,positive\nwhat,\u200b\nwhy,\u200d\n")
    for command in (("evaluate", tiny_student, "--pairs"), ("inspect", "--guide", tiny_student, "--data")):
        found = run_command(*command, tmp_path / "x.csv", "--device", "cpu", "--json")
        refused(found, "a text without any token: the model's tokenizer finds nothing in the texts that are read")
