"""The real package mteb on tasks of local data: the scores are those that can be found without it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from gist_fast.runtime.errors import InputError

# Looked for, not imported: that takes seconds.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mteb") is None, reason="mteb is not installed: pip install 'gist-fast[mteb]'"
)

TASKS = """\
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata

ROWS = {rows!r}


def described(name, kind, main_score):
    return TaskMetadata(
        name=name, description="Local data.", type=kind, category="t2t", eval_splits=["test"],
        eval_langs=["eng-Latn"], main_score=main_score, dataset={{"path": "local/" + name, "revision": "1"}},
    )


class Likeness(AbsTaskSTS):
    metadata = described("LocalLikeness", "STS", "cosine_spearman")

    def load_data(self, *args, **kwargs):
        self.dataset = {{"test": Dataset.from_list(ROWS)}}
        self.data_loaded = True


class Answers(AbsTaskRetrieval):
    metadata = described("LocalAnswers", "Retrieval", "ndcg_at_10")

    def load_data(self, *args, **kwargs):
        queries = [{{"id": f"q{{k}}", "text": row["sentence1"]}} for k, row in enumerate(ROWS)]
        corpus = [{{"id": f"d{{k}}", "text": row["sentence2"], "title": ""}} for k, row in enumerate(ROWS)]
        self.dataset = {{"default": {{"test": {{
            "queries": Dataset.from_list(queries),
            "corpus": Dataset.from_list(corpus),
            "relevant_docs": {{f"q{{k}}": {{f"d{{k}}": 1}} for k in range(len(ROWS))}},
            "top_ranked": None,
        }}}}}}
        self.data_loaded = True
"""


@pytest.fixture
def rows(pairs) -> list[dict]:
    return [
        {"sentence1": row["anchor"], "sentence2": row["positive"], "score": k * 7 % 5 + k / 100}
        for k, row in enumerate(pairs.select(range(20)))
    ]


@pytest.fixture
def tasks(tmp_path, rows) -> Path:
    path = tmp_path / "tasks.py"
    path.write_text(TASKS.format(rows=rows))
    return path


@pytest.fixture
def scored(tmp_path, rows) -> Path:
    path = tmp_path / "scored.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_of_ones_own(run_command, tasks, scored, rows, tiny_student, tiny_guide, student):
    scored.with_name("pairs.jsonl").write_text(
        "".join(json.dumps({"anchor": row["sentence1"], "positive": row["sentence2"]}) + "\n" for row in rows)
    )
    result = run_command(
        *("evaluate", tiny_student, "--baseline", tiny_guide, "--device", "cpu", "--json"),
        *("--mteb", f"{tasks}:Likeness", "--mteb", f"{tasks}:Answers", "--sts", scored),
        *("--pairs", scored.with_name("pairs.jsonl")),
    )
    assert result.code == 0, result.err
    found = json.loads(result.out)
    first, second = (student.encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    wanted = spearmanr([row["score"] for row in rows], student.similarity_pairwise(first, second))[0]
    metrics = found["model"]["metrics"]
    assert metrics["LocalLikeness"] == pytest.approx(wanted, abs=1e-6)
    for role in ("model", "baseline"):
        metrics = found[role]["metrics"]
        assert metrics["LocalLikeness"] == pytest.approx(metrics["sts_spearman"], abs=1e-6)
        # mteb rounds what it finds in retrieval.
        assert metrics["LocalAnswers"] == pytest.approx(metrics["ndcg@10"], abs=1e-5)
        task = found[role]["mteb"]["LocalLikeness"]
        assert (task["metric"], task["main_score"]) == ("cosine_spearman", metrics["LocalLikeness"])
        assert task["scores"]["test"][0]["pearson"] == pytest.approx(metrics["sts_pearson"], abs=1e-6)
    assert found["model"]["metrics"] != found["baseline"]["metrics"]


GRADED = """
import json


def rows(name):
    return [json.loads(line) for line in open(__file__.replace("tasks.py", name))]


class Graded(AbsTaskRetrieval):
    metadata = described("LocalGraded", "Retrieval", "ndcg_at_10")
    ignore_identical_ids = True

    def load_data(self, *args, **kwargs):
        relevant = {}
        for row in rows("r.jsonl"):
            relevant.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
        self.dataset = {"default": {"test": {
            "queries": Dataset.from_list(rows("q.jsonl")),
            "corpus": Dataset.from_list(rows("c.jsonl")),
            "relevant_docs": relevant,
            "top_ranked": None,
        }}}
        self.data_loaded = True
"""


KINDS = (("d", 3, 20), ("d", 7, 20), ("q", 5, 20), ("e", 1, 8))
"""Of relevant documents: the first letter of the id, and which of them there are."""


def test_retrieval_from_files_is_what_mteb_finds(run_command, tasks, rows, tiny_student, tmp_path):
    """Grades, titles, documents that are the query itself, ties, and queries without an answer."""
    tasks.write_text(tasks.read_text() + GRADED)
    queries = [{"id": f"q{k}", "text": row["sentence1"]} for k, row in enumerate(rows)]
    corpus = [{"id": f"d{k}", "title": row["sentence1"][:k], "text": row["sentence2"]} for k, row in enumerate(rows)]
    corpus += [{"id": f"q{k}", "title": "", "text": row["sentence1"]} for k, row in enumerate(rows)]
    corpus += [{"id": f"e{k}", "title": "", "text": "the same text"} for k in range(8)]
    # Two queries are not judged; that in between has nothing but a zero.
    judged = [(f"q{k}", f"{kind}{(k * step + 1) % most}", k % 4) for k in range(17) for kind, step, most in KINDS]
    judged = [row for row in dict.fromkeys(judged) if row[0] != row[1]]
    names = ("query_id", "document_id", "score")
    relevant = [dict(zip(names, values, strict=True)) for values in [*judged, ("q18", "d1", 0)]]
    options = []
    for option, name, content in (("queries", "q", queries), ("corpus", "c", corpus), ("relevant", "r", relevant)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
        options += [f"--{option}", path]
    result = run_command("evaluate", tiny_student, *options, "--mteb", f"{tasks}:Graded", "--device", "cpu", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)["model"]
    (theirs,) = found["mteb"]["LocalGraded"]["scores"]["test"]
    ours = {"ndcg_at_10": "ndcg@10", "mrr_at_10": "mrr@10", "map_at_100": "map@100", "recall_at_10": "recall@10"}
    wanted = {short: theirs[name] for name, short in {**ours, "hit_rate_at_1": "accuracy@1"}.items()}
    assert {name: found["metrics"][name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert len(set(wanted.values())) == 5
    assert 0 < wanted["ndcg@10"] < 1


def test_the_table_and_a_file_with_one_task(run_command, tasks, tiny_student, tiny_guide):
    tasks.write_text(tasks.read_text().partition("class Answers")[0])
    result = run_command("evaluate", tiny_student, "--baseline", tiny_guide, "--mteb", tasks, "--device", "cpu")
    assert result.code == 0, result.err
    assert "FutureWarning" not in result.err
    cells = next(line for line in result.out.splitlines() if "LocalLikeness (cosine_spearman)" in line).split("│")
    baseline, model, change = (float(cell) for cell in cells[2:5])
    assert model - baseline == pytest.approx(change, abs=2e-4)
    assert model != baseline


def test_the_task_of_the_documentation(run_command, scored, rows, tiny_student, student, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    (tmp_path / "my_tasks.py").write_text(re.search(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)[1])
    scored.rename(tmp_path / "contracts.jsonl")
    monkeypatch.chdir(tmp_path)
    result = run_command("evaluate", tiny_student, "--mteb", "my_tasks.py:Contracts", "--json", "--device", "cpu")
    assert result.code == 0, result.err
    first, second = (student.encode([row[name] for row in rows]) for name in ("sentence1", "sentence2"))
    wanted = spearmanr([row["score"] for row in rows], student.similarity_pairwise(first, second))[0]
    assert json.loads(result.out)["model"]["metrics"] == pytest.approx({"Contracts": wanted}, abs=1e-6)


def test_a_model_trained_anew_is_measured_anew(tasks, student):
    import torch

    from gist_fast.evaluation.mteb_tasks import find_tasks, load_data, measure

    found = find_tasks([f"{tasks}:Likeness"])
    load_data(found)
    before = measure(student, found)["LocalLikeness"]["main_score"]
    with torch.no_grad():
        student[0].auto_model.embeddings.word_embeddings.weight.normal_(generator=torch.Generator().manual_seed(3))
    assert measure(student, found)["LocalLikeness"]["main_score"] != pytest.approx(before)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("STSBenchmrk", "for one of your own, got 'STSBenchmrk' (did you mean 'STSBenchmark'?)."),
        # Offline, and in no cache.
        (
            "{folder}/away.py:Away",
            "mteb: LocalAway: its dataset 'local/LocalAway' cannot be loaded (Couldn't reach 'local/",
        ),
        ("{folder}/task.py:Likeness", "task.py: no such file (did you mean 'tasks.py'?)."),
        ("{folder}/tasks.py", "tasks.py:ClassName to say which task; it defines Likeness, Answers"),
        ("{folder}/tasks.py:Likenes", "no task 'Likenes' (did you mean 'Likeness'?); it defines Likeness, Answers"),
        ("{folder}/broken.py:X", "broken.py: cannot be run (ModuleNotFoundError: No module named 'no_such_module')."),
        ("{folder}/none.py", "none.py: defines no task, that is no class on top of one of mteb's AbsTask classes."),
        (
            "{folder}/empty.py:Empty",
            "mteb: LocalEmpty: its dataset 'local/LocalEmpty' cannot be loaded (no rows today)",
        ),
        ("{folder}/same.py:Same", "another of these tasks is called 'LocalLikeness' too; rename one."),
    ],
)
def test_what_is_wrong_is_one_line(run_command, tasks, tiny_student, name, says, tmp_path):
    text = tasks.read_text().partition("class Likeness")[0]
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    (tmp_path / "none.py").write_text("from mteb.abstasks import AbsTaskSTS\nX = 1\n")
    empty = 'class Empty(AbsTaskSTS):\n    metadata = described("LocalEmpty", "STS", "cosine_spearman")\n'
    raises = '    def load_data(self, *args, **kwargs):\n        raise OSError("no rows today")\n'
    (tmp_path / "empty.py").write_text(text + empty + raises)
    (tmp_path / "away.py").write_text(text + empty.replace("Empty", "Away"))
    (tmp_path / "same.py").write_text(text + empty.replace("LocalEmpty", "LocalLikeness").replace("Empty", "Same"))
    options = ("--mteb", name.format(folder=tmp_path), "--device", "cpu")
    more = ("--mteb", f"{tasks}:Likeness") if "same" in name else ()
    result = run_command("evaluate", tiny_student, *more, *options)
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("gist-fast: ")
    assert says in last


def test_without_the_package(monkeypatch):
    from gist_fast.evaluation.mteb_tasks import find_tasks

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "mteb" else there(name))
    with pytest.raises(
        InputError, match=r"the package mteb is not installed; pip install 'gist-fast\[mteb\]' brings it"
    ):
        find_tasks(["STSBenchmark"])
