"""Every file in ``recipes/`` reads as it stands, and trains small stand-ins with the setting that it is about."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import PAIRS, _save_model, _words
from sentence_transformers import SentenceTransformer

from gist_fast.config.load import load_config
from gist_fast.config.schema import LoraConfig
from gist_fast.pipeline import plan
from gist_fast.runtime.errors import InputError

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = [
    *("--training.max_steps", "2", "--training.per_device_train_batch_size", "8", "--training.logging_steps", "1"),
    *("--training.use_cpu", "true", "--training.report_to", "none", "--training.save_strategy", "no"),
]


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory):
    """A student as wide as bge-small, so that the widths of the recipe fit."""
    words = sorted({word for question, _ in PAIRS for word in _words(question)})
    return _save_model(tmp_path_factory.mktemp("wide"), words, width=384, max_seq_length=48, seed=3)


@pytest.fixture
def trained(run_command, monkeypatch, tmp_path, pairs, tiny_student, tiny_guide):
    """Train a recipe for two steps; returns the trainer, the summary, and the parameters before."""

    def call(name: str, *overrides: object, student: Path = tiny_student):
        path = shutil.copy(recipe(name), tmp_path)
        _write_data(load_config(path), pairs)
        models = ["--student.path", student]
        if load_config(path).guide:
            models += ["--guide.path", tiny_guide]
        kept = {}
        make = plan.make_trainer

        def keep(ready):
            trainer = make(ready)
            kept["trainer"] = trainer
            kept["before"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            return trainer

        monkeypatch.setattr(plan, "make_trainer", keep)
        result = run_command("train", path, *models, *SMALL, *overrides, "--json")
        assert result.code == 0, result.err
        summary = json.loads(result.out)
        assert summary["steps"] == 2
        assert math.isfinite(summary["loss"]) and summary["loss"] > 0
        trainer, before = kept["trainer"], kept["before"]
        moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p.detach(), before[n])}
        assert moved
        assert all(p.isfinite().all() for p in trainer.model.parameters())
        return trainer, summary, moved

    return call


def _write_data(config, pairs) -> None:
    """The files that a recipe names, with the columns that it names."""
    rows = [{**row, "negative": pairs["positive"][k - 1]} for k, row in enumerate(pairs)]
    sources = config.data.train if isinstance(config.data.train, dict) else {"": config.data.train}
    for part, source in enumerate(sources.values()):
        names = source.columns or {"anchor": "anchor", "positive": "positive"}
        mine = [{theirs: row[ours] for ours, theirs in names.items()} for row in rows[part * 8 :]]
        _write(source.path, mine)
    if config.evaluation:
        _write(config.evaluation.pairs.path, list(pairs.select(range(8))))


def _write(path: str, rows: list) -> None:
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_each_has_a_test_and_stands_in_the_table():
    assert [p.stem for p in RECIPES] == ["lora", "matryoshka", "paper", "retrieval", "self-guided"]
    table = (ROOT / "docs" / "recipes.md").read_text()
    assert re.findall(r"^\| \[([\w.-]+)\]\(\.\./recipes/\1\)", table, flags=re.MULTILINE) == [
        f"{name}.yaml" for name in ("paper", "self-guided", "retrieval", "matryoshka", "lora")
    ]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_reads_as_it_stands(path):
    config = load_config(path)
    arguments = config.training_arguments(use_cpu=True, bf16=False)
    assert arguments.temperature == 0.01
    assert config.arguments["bf16"] is True
    assert config.output_dir == path.parent / "runs" / path.stem
    # A name of the hub, not made a path.
    assert config.student.path.count("/") == 1
    head = path.read_text().split("student:")[0]
    assert all(line.startswith("# ") for line in head.splitlines())
    assert all(word in head for word in ("# For ", "# Needs: ", "# Source: "))


def test_paper(trained):
    trainer, summary, _ = trained("paper", "--student.max_seq_length", "48")
    assert (trainer.args.learning_rate, trainer.args.warmup_steps, trainer.args.bf16) == (5e-6, 0.1, True)
    assert trainer.loss.temperature == 0.01
    assert trainer.loss.guided
    assert set(trainer.train_dataset) == {"natural_questions", "banking77", "emotion"}
    assert trainer.args.multi_dataset_batch_sampler.value == "proportional"
    # Triplets arrived as triplets: the block of negatives is there.
    assert any(name.startswith("masked_an") for name in summary["masked"])
    config = load_config(recipe("paper"))
    assert (config.student.path, config.guide.path) == ("BAAI/bge-small-en-v1.5", "WhereIsAI/UAE-Large-V1")
    assert (config.student.max_seq_length, config.arguments["per_device_train_batch_size"]) == (512, 16)


def test_one_task_a_batch(trained):
    """Each batch of the paper's recipe is of one dataset."""
    trainer, *_ = trained("paper", "--student.max_seq_length", "48")
    data = trainer.train_dataset
    starts = {name: sum(len(d) for d in list(data.values())[:k]) for k, name in enumerate(data)}
    # The stand-ins hold 64, 56 and 48 rows, one after the other in the concatenation that batches index.
    batches = list(trainer.get_train_dataloader().batch_sampler)
    assert len(batches) == 8 + 7 + 6
    for batch in batches:
        assert len({sum(row >= start for start in starts.values()) for row in batch}) == 1


def test_self_guided(trained):
    overrides = ["--save_strategy", "steps", "--save_steps", "1", "--eval_steps", "1"]
    # The best checkpoint is kept, which may be the first; without a warm-up it has moved too.
    overrides += ["--warmup_steps", "0"]
    trainer, summary, _ = trained("self-guided", *overrides)
    assert trainer.loss.config.self_guided
    assert trainer.loss.guide is None
    assert trainer.loss.margin == -0.1
    # What to watch is logged.
    assert summary["best_checkpoint"]
    assert any("eval_cosine_ndcg@10" in entry for entry in trainer.state.log_history)
    assert any("masked_ap" in entry for entry in trainer.state.log_history)


def test_retrieval(trained):
    trainer, summary, _ = trained("retrieval")
    loss = trainer.loss
    assert (loss.contrast_positives, loss.margin, loss.margin_strategy) == (False, 0.05, "relative")
    assert loss.config.groups == "anchor"
    assert trainer.data_collator.groups == "anchor"
    assert "masked_pp" not in summary["masked"]


def test_matryoshka(trained, wide_student):
    trainer, *_ = trained("matryoshka", student=wide_student)
    assert trainer.loss.config.matryoshka_dims == [384, 256, 128, 64]
    assert trainer.loss.config.matryoshka_weights == [1, 1, 1, 1]


class TestLora:
    SHORT = ("--student.max_seq_length", "48", "--guide.max_seq_length", "64")

    def test_only_the_adapter_is_trained_and_saved(self, trained):
        pytest.importorskip("peft")
        trainer, summary, moved = trained("lora", *self.SHORT)
        trainable = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
        assert trainable and all("lora_" in name for name in trainable)
        assert moved <= trainable
        named = dict(trainer.model.named_parameters())
        assert {named[name].dtype for name in trainable} == {torch.float32}
        assert {p.dtype for n, p in named.items() if n not in trainable} == {torch.bfloat16}
        adapter = next(iter(trainer.model[0].auto_model.peft_config.values()))
        assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (16, 32, 0.05)
        final = Path(summary["model"])
        assert (final / "adapter_model.safetensors").is_file()
        assert not (final / "model.safetensors").exists()
        loaded = dict(SentenceTransformer(str(final), device="cpu").named_parameters())
        assert loaded.keys() == named.keys()
        assert all(torch.equal(loaded[name], named[name]) for name in trainable)

    def test_resumes(self, trained, run_command, tmp_path, tiny_student, tiny_guide):
        pytest.importorskip("peft")
        steps = ["--training.save_strategy", "steps", "--training.save_steps", "1", "--student.model_kwargs", "null"]
        trainer, summary, _ = trained("lora", *self.SHORT, *steps)
        whole = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        run = Path(summary["output_dir"])
        shutil.rmtree(run / "checkpoint-2")
        shutil.rmtree(run / "final")
        trainer, summary, _ = trained("lora", *self.SHORT, *steps, "--resume")
        assert summary["resumed_from"] == str(run / "checkpoint-1")
        assert all(torch.equal(p, whole[n]) for n, p in trainer.model.named_parameters())

    def test_another_alpha_is_another_run(self, trained, run_command, tmp_path, tiny_student, tiny_guide):
        pytest.importorskip("peft")
        steps = ["--training.save_strategy", "steps", "--training.save_steps", "1", "--student.model_kwargs", "null"]
        trained("lora", *self.SHORT, *steps)
        models = ["--student.path", tiny_student, "--guide.path", tiny_guide]
        other = [*models, *SMALL, *self.SHORT, *steps, "--student.lora.alpha", "8", "--resume"]
        result = run_command("train", tmp_path / "lora.yaml", *other)
        assert result.code == 2
        assert "student.adapter[default].lora_alpha was 32, is 8." in result.err

    @pytest.mark.parametrize(
        ("lora", "says"),
        [
            ({"r": 0}, "student.lora.r: expected an int of at least 1 and below 65536, got 0."),
            ({"dropout": 1}, "student.lora.dropout: expected a finite float of at least 0 and below 1, got 1"),
            (
                {"target_modules": []},
                "student.lora.target_modules: expected names of layers",
            ),
            ({"rank": 4}, "unknown key 'rank' in student.lora"),
            ({"r": "many"}, "student.lora.r: expected a whole number, got 'many'"),
            (16, "student.lora: expected a mapping with r, alpha, dropout, target_modules, got 16."),
        ],
    )
    def test_what_is_wrong_in_the_section(self, tmp_path, lora, says):
        tree = {"student": {"path": "a/b", "lora": lora}, "data": {"train": "x.csv"}, "training": {"output_dir": "o"}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        with pytest.raises(InputError, match=re.escape(says)):
            load_config(tmp_path / "config.yaml")

    def test_a_guide_has_none(self, tmp_path):
        with pytest.raises(InputError, match="unknown key 'lora' in guide"):
            load_config(recipe("lora"), ["--guide", "{path: a/b, lora: {r: 4}}"])

    def test_set_on_the_command_line(self):
        config = load_config(recipe("paper"), ["--student.lora.r", "4", "--student.lora.target_modules", "[query]"])
        assert config.student.lora == LoraConfig(r=4, target_modules=["query"])
        assert load_config(recipe("lora"), ["--student.lora", "null"]).student.lora is None

    @pytest.mark.parametrize(
        ("modules", "says"), [("[nothing]", "Target modules {'nothing'} not found"), ("'('", "missing ), unterminated")]
    )
    def test_layers_that_are_not_there(self, run_command, tmp_path, pairs, tiny_student, tiny_guide, modules, says):
        pytest.importorskip("peft")
        path = shutil.copy(recipe("lora"), tmp_path)
        _write_data(load_config(path), pairs)
        models = ["--student.path", tiny_student, "--guide.path", tiny_guide, *self.SHORT, *SMALL]
        result = run_command("train", path, *models, "--student.lora.target_modules", modules)
        assert result.code == 2
        assert f"gist-fast: student.lora.target_modules: {says}" in result.err

    def test_without_peft(self, run_command, monkeypatch, tmp_path, pairs, tiny_student, tiny_guide):
        monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
        path = shutil.copy(recipe("lora"), tmp_path)
        _write_data(load_config(path), pairs)
        models = ["--student.path", tiny_student, "--guide.path", tiny_guide]
        result = run_command("train", path, *models, *SMALL, "--dry-run")
        assert result.code == 2
        assert "gist-fast: student.lora: peft is not installed; run pip install peft." in result.err


def test_the_data_of_the_paper_are_cut_by_task(monkeypatch, tmp_path, capsys):
    """The Python of docs/recipes.md, on rows of the same columns."""
    import datasets

    rows = [{"query": f"q{k}", "pos": "p", "neg": "n", "task_name": name} for k, name in enumerate("aba")]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "recipes.md").read_text(), flags=re.DOTALL)
    exec(compile(code, "recipes.md", "exec"), {})
    written = yaml.safe_load(capsys.readouterr().out)
    assert list(written) == ["a", "b"]
    assert written["a"] == {
        "path": "medi/a.jsonl", "columns": {"anchor": "query", "positive": "pos", "negative": "neg"}
    }  # fmt: skip
    lines = (tmp_path / "medi" / "a.jsonl").read_text().splitlines()
    assert [json.loads(line)["query"] for line in lines] == ["q0", "q2"]
