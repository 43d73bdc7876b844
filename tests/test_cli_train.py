"""``gist-fast train``: it trains, saves what sentence-transformers loads, and never loses what is there."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from prestarted import Command
from sentence_transformers import SentenceTransformer

from gist_fast.pipeline.run_folder import prepare_folder, replacing
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import replace_folder
from gist_fast.training.checkpoints import whole_checkpoints
from gist_fast.training.stop_on_signal import StopOnSignal


@pytest.fixture
def run(run_command):
    """`run_command` of ``gist-fast train``."""
    return functools.partial(run_command, "train")


@pytest.fixture
def config(tmp_path, pairs, tiny_student, tiny_guide):
    """A configuration of four steps an epoch, beside its data."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    path = tmp_path / "config.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "student": str(tiny_student),
                "guide": str(tiny_guide),
                "data": {"train": "pairs.jsonl"},
                "loss": {"temperature": 0.05},
                "training": {
                    "output_dir": "out",
                    "num_train_epochs": 1,
                    "per_device_train_batch_size": 16,
                    "learning_rate": 0.001,
                    "logging_steps": 2,
                    "use_cpu": True,
                },
            }
        )
    )
    return path


def refused(result, says: str) -> None:
    assert result.code == 2
    assert result.out == ""
    assert "Traceback" not in result.err
    last = result.err.strip().splitlines()[-1]
    assert last.startswith("gist-fast: ")
    assert says in last


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return SentenceTransformer(str(folder), device="cpu").state_dict()


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


class TestRun:
    def test_trains_evaluates_and_saves(self, run, config, tmp_path, tiny_student, tiny_guide, pairs):
        guide_before = contents(tiny_guide)
        result = run(config, "--json", "--evaluation.pairs", config.parent / "pairs.jsonl", "--save_strategy", "no")
        assert result.code == 0, result.err
        summary = json.loads(result.out)
        final = tmp_path / "out" / "final"
        assert summary["model"] == str(final)
        assert (summary["rows"], summary["steps"], summary["epochs"]) == (64, 4, 1)
        assert set(summary["masked"]) == {"masked_ap", "masked_aa", "masked_pp"}
        assert all(0 < share < 1 for share in summary["masked"].values())
        assert summary["evaluation"]["before"] != summary["evaluation"]["after"]
        trained = weights(final)
        assert moved(trained, weights(tiny_student))
        # The guide is no part of what is saved, and stays as it was.
        assert set(trained) == set(weights(tiny_student))
        assert contents(tiny_guide) == guide_before
        # The scores are those of the model that was saved, by an evaluation of its own.
        from gist_fast.evaluation.evaluators import evaluate, make_evaluator, retrieval_from_pairs

        again = evaluate(SentenceTransformer(str(final), device="cpu"), make_evaluator(retrieval_from_pairs(pairs)))
        assert again == pytest.approx(summary["evaluation"]["after"])
        assert not list((tmp_path / "out").glob("checkpoint-*"))

    def test_the_summary_as_a_table(self, run, config):
        result = run(config, "--max_steps", "1", "--evaluation.triplet", "x.jsonl")
        refused(result, "x.jsonl: no such file")
        result = run(config, "--max_steps", "2")
        assert result.code == 0
        assert "masked ap" in result.out
        assert f'Load it: SentenceTransformer("{config.parent / "out" / "final"}")' in result.out

    def test_without_a_guide(self, run, config):
        result = run(config, "--guide", "null", "--max_steps", "1", "--json")
        assert result.code == 0
        # Nothing masks, so whatever is logged of it is zero.
        assert not any(json.loads(result.out)["masked"].values())

    def test_embeddings_in_the_data_replace_the_guide(self, run, config, tmp_path, pairs, guide):
        from datasets import Dataset

        rows = pairs.to_dict()
        carried = {f"{name}_guide_embedding": guide.encode(texts).tolist() for name, texts in rows.items()}
        Dataset.from_dict(rows | carried).save_to_disk(tmp_path / "embedded")
        run(config, "--output_dir", tmp_path / "with_guide")
        text = [line for line in config.read_text().splitlines() if not line.startswith("guide")]
        config.write_text("\n".join(text))
        result = run(config, "--data.train", tmp_path / "embedded", "--json")
        assert result.code == 0, result.err
        # The same masks to the last pair or two near a threshold, hence the same model.
        one, other = weights(tmp_path / "out" / "final"), weights(tmp_path / "with_guide" / "final")
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)

    def test_the_guide_s_embeddings_made_beforehand(self, run, config, tmp_path, tiny_guide, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        from gist_fast.losses.guide import GuideEncoder

        settings = yaml.safe_load(config.read_text())
        settings["data"]["eval"] = "pairs.jsonl"
        losses = []
        for columns in (False, True):
            settings["guide"] = {"path": str(tiny_guide), "columns": columns}
            settings["training"]["guide_prompts"] = {"anchor": "query: "}
            settings["training"]["output_dir"] = f"out-{columns}"
            config.write_text(yaml.safe_dump(settings))
            if columns:
                monkeypatch.setattr("gist_fast.pipeline.plan.rehearse", lambda *_, **__: None)
                monkeypatch.setattr(GuideEncoder, "__init__", lambda *_, **__: pytest.fail("the guide was loaded"))
            result = run(config, "--json")
            assert result.code == 0, result.err
            losses.append(json.loads(result.out)["loss"])
        assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        settings["training"]["guide_max_length"] = {"anchor": 5}
        config.write_text(yaml.safe_dump(settings))
        refused(run(config, "--overwrite"), "guide_max_length: expected one number")

    def test_settings_reach_their_places(self, run, config, tmp_path):
        result = run(
            config, "--max_steps=1", "--student.max_seq_length", "11", "--mini_batch_size", "4", "--margin", "-0.05"
        )
        assert result.code == 0, result.err
        assert SentenceTransformer(str(tmp_path / "out" / "final"), device="cpu").max_seq_length == 11
        card = (tmp_path / "out" / "final" / "README.md").read_text()
        assert "CachedGISTEmbedLoss" in card


class TestRunFolder:
    def test_an_older_run_is_never_overwritten_silently(self, run, config, tmp_path):
        assert run(config, "--max_steps", "2").code == 0
        out = tmp_path / "out"
        before = contents(out)
        refused(run(config), "already holds a run (checkpoint-2, final); continue it with --resume, start anew with")
        refused(run(config, "--resume", "--overwrite"), "exclude each other")
        assert contents(out) == before
        # Even with --overwrite nothing is lost before all is known to be well.
        refused(run(config, "--overwrite", "--data.train", "nothing.jsonl"), "nothing.jsonl: no such file")
        refused(run(config, "--overwrite", "--guide", "./nothing"), "guide: ")
        assert contents(out) == before
        (out / "notes.txt").write_text("mine")
        result = run(config, "--overwrite", "--max_steps", "1")
        assert result.code == 0
        assert f"Deleted from {out}: checkpoint-2, final." in result.err
        assert sorted(path.name for path in out.iterdir()) == ["checkpoint-1", "final", "notes.txt"]

    def test_resuming_gives_what_an_unbroken_run_gives(self, run, config, tmp_path):
        # The schedule must be that of four steps in both, so the first part is cut off by removing what came later.
        assert run(config, "--save_steps", "2", "--output_dir", tmp_path / "whole").code == 0
        part = tmp_path / "part"
        part.mkdir()
        os.rename(tmp_path / "whole" / "checkpoint-2", part / "checkpoint-2")
        # A checkpoint that was cut off while it was written is passed over.
        (part / "checkpoint-3").mkdir()
        result = run(config, "--resume", "--save_steps", "2", "--output_dir", part, "--json")
        assert result.code == 0
        assert json.loads(result.out)["resumed_from"] == str(part / "checkpoint-2")
        assert "warning: " in result.err
        assert "checkpoint-3" in result.err
        whole, resumed = weights(tmp_path / "whole" / "final"), weights(part / "final")
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6)

    def test_nothing_to_resume(self, run, config, tmp_path):
        refused(run(config, "--resume"), "holds no checkpoint to resume from; leave out --resume")
        assert not (tmp_path / "out").exists()

    def test_the_folder_by_itself(self, tmp_path):
        assert prepare_folder(tmp_path / "new", resume=False, overwrite=False) is None
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="is a file"):
            prepare_folder(tmp_path / "file", resume=False, overwrite=False)
        for step in (2, 10, 9):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        (tmp_path / "checkpoint-old").mkdir()
        assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
        assert prepare_folder(tmp_path, resume=True, overwrite=False) == tmp_path / "checkpoint-10"
        (tmp_path / "final").mkdir()
        (tmp_path / "final" / "old").write_text("")
        (tmp_path / "final.part").mkdir()
        (tmp_path / "final.part" / "new").write_text("")
        replace_folder(tmp_path / "final.part", tmp_path / "final")
        assert [path.name for path in (tmp_path / "final").iterdir()] == ["new"]
        with replacing(tmp_path):
            assert len(list(tmp_path.iterdir())) == 3  # the folder aside, and what is no run's
            (tmp_path / "final").mkdir()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-old", "file", "final"]


class TestDryRun:
    def test_writes_nothing_and_tells_all(self, run, config, tmp_path):
        result = run(
            config, "--dry-run", "--json", "--learning_rate", "3e-5", "--data.eval", config.parent / "pairs.jsonl"
        )
        assert result.code == 0
        plan = json.loads(result.out)
        assert plan["steps"] == 4
        assert plan["rows_a_step"] == 16
        assert plan["train"].endswith("pairs.jsonl: 64 rows of anchor, positive")
        assert plan["settings"]["learning_rate"] == 3e-5
        assert not (tmp_path / "out").exists()
        table = run(config, "--dry-run").out
        assert "All is well; this would be run" in table
        assert "per_device_train_batch_size │ 16" in table

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--student", "./nothing"], "student: "),
            (["--guide", "no one/nothing"], "guide: no one/nothing: no such folder"),
            (["--data.train", "nothing.csv"], "nothing.csv: no such file"),
            (["--data.train.columns.anchor", "question"], "no column 'question', named for anchor"),
            (["--data.train.split", "train"], "a file has no split"),
            (["--lerning_rate", "1"], "(did you mean '--learning_rate'?)"),
            (["--temperature", "0"], "temperature: expected a finite float above 0, got 0."),
            (
                ["--load_best_model_at_end"],
                "training.load_best_model_at_end: expected a value with which training can start, got True (--load",
            ),
            (["--resume_from_checkpoint", "x"], "the command continues a run with --resume instead"),
            (["--max_steps", "many"], "training.max_steps: expected a whole number, got 'many'"),
        ],
    )
    def test_finds_what_is_wrong(self, run, config, overrides, says):
        refused(run(config, "--dry-run", *overrides), says)

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--self_guided"], "loss.self_guided: expected False with a guide, got True"),
            (
                ["--guide", "null", "--margin", "0.1"],
                "loss.margin: expected 0.0 without a guide, which it is about, got 0.1",
            ),
            (["--matryoshka_weights", "[1, 2]"], "loss.matryoshka_weights: "),
            (["--hardness_mode", "hard_negatives"], "loss.hardness_strength: "),
            (
                ["--hardness_strength", "-1", "--hardness_mode", "all_negatives"],
                "loss.hardness_strength: expected a finite float of at least 0, got -1",
            ),
            (["--hard", "--triplet_margin", "0.3"], "loss.hard: expected False with triplet_margin"),
            (["--triplet_margin", "-1"], "loss.triplet_margin: expected a finite float above 0, got -1"),
            (
                ["--learn_temperature", "--temperature", "5"],
                "loss.temperature: expected a start between temperature_min 0.001 and temperature_max 1.0, got 5",
            ),
            (
                ["--learn_temperature", "--temperature_schedule", "linear", "--temperature_end", "0.9"],
                "loss.temperature_schedule: expected None with learn_temperature",
            ),
            (
                ["--temperature_schedule", "exponential", "--temperature_end", "0.5"],
                "loss.temperature_end: expected at most the temperature 0.05,",
            ),
            (["--temperature_end", "0.001"], "loss.temperature_end: got 0.001, which only the schedule"),
            (["--backend", "triton"], "loss.backend: 'triton' cannot run here"),
            (
                ["--guide", "null", "--self_guided"],
                "loss.self_guided: expected False where training without any guide was",
            ),
        ],
    )
    def test_finds_a_loss_that_makes_no_sense(self, run, config, overrides, says):
        refused(run(config, "--dry-run", *overrides), says)

    def test_finds_a_student_that_would_guide_itself_while_hard(self, run, config):
        change(config, guide=yaml.safe_load(config.read_text())["student"])
        refused(run(config, "--dry-run", "--hard"), "loss.hard: expected a guide other than the student, got ")

    @pytest.mark.parametrize(
        ("part", "says"),
        [
            ("group", "has a column 'group', and the loss does not ask for it. Set groups: 'column'"),
            ("margin", "has a column 'margin', and the loss does not ask for it. Set row_margins: True"),
        ],
    )
    def test_finds_a_column_that_nothing_reads(self, run, config, tmp_path, pairs, part, says):
        write_rows(tmp_path / "pairs.jsonl", [{**row, "extra": k} for k, row in enumerate(pairs)])
        change(config, data={"train": {"path": "pairs.jsonl", "columns": {part: "extra"}}})
        refused(run(config, "--dry-run"), says)

    @pytest.mark.parametrize(
        ("overrides", "says"),
        [
            (["--groups", "column"], "groups: 'column', and data.train has no column 'group'; its columns are anchor"),
            (["--row_margins"], "row_margins: True, and data.train has no column 'margin'"),
            (
                ["--hardness_mode", "hard_negatives", "--hardness_strength", "5"],
                "hardness_mode: expected 'in_batch_negatives', as data.train has no column of negatives",
            ),
        ],
    )
    def test_what_the_data_lack_is_found_before_a_run_is_deleted(self, run, config, overrides, says):
        kept = config.parent / "out" / "final" / "config.json"
        kept.parent.mkdir(parents=True)
        kept.write_text("{}")
        refused(run(config, "--overwrite", *overrides), says)
        assert kept.exists()

    def test_widths_above_the_student_s_are_found_before_texts_are_embedded(self, run, config, monkeypatch):
        monkeypatch.setattr("gist_fast.pipeline.plan.with_guide_columns", lambda *_: pytest.fail("texts were embedded"))
        refused(
            run(config, "--guide.columns", "true", "--matryoshka_dims", "[4096]"),
            "matryoshka_dims: expected at most 32, the width of the embeddings, got 4096",
        )

    def test_finds_wrong_data(self, run, config):
        data = config.parent / "pairs.jsonl"
        lines = data.read_text().splitlines()
        lines[41] = '{"anchor": "x", "positive": null}'
        data.write_text("\n".join(lines))
        refused(run(config, "--dry-run"), "pairs.jsonl: row 42 (line 42), column 'positive': is None; a text is needed")

    def test_a_missing_guide_must_be_meant(self, run, config):
        text = "\n".join(line for line in config.read_text().splitlines() if not line.startswith("guide"))
        config.write_text(text)
        refused(run(config, "--dry-run"), "'guide' is missing, and the training data carry no embeddings of one")


def read_until(process: Command, text: bytes, seen: bytes = b"") -> bytes:
    """What the process says on stderr, up to and with `text`."""
    deadline = time.monotonic() + 120
    while text not in seen:
        assert time.monotonic() < deadline, seen.decode()
        piece = os.read(process.stderr.fileno(), 1 << 16)
        assert piece, seen.decode()
        seen += piece
    return seen


class TestCtrlC:
    def test_once_saves_and_the_run_goes_on_from_there(self, run, config, tmp_path):
        process = Command("train", config, "--max_steps", "1000000", "--save_strategy", "no")
        seen = read_until(process, b"'loss':")
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=120)
        last = (seen + rest).decode().strip().splitlines()[-1]
        (checkpoint,) = whole_checkpoints(tmp_path / "out")
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        assert process.returncode == 130
        assert out == b""
        assert last == (
            f"gist-fast: stopped after step {step} of 1000000; {tmp_path / 'out'} holds {checkpoint.name} "
            "(continue with --resume)."
        )
        assert b"Traceback" not in seen + rest
        result = run(config, "--resume", "--max_steps", step + 1, "--json")
        assert result.code == 0
        assert json.loads(result.out)["steps"] == step + 1

    def test_twice_stops_at_once_and_says_so(self, config, tmp_path):
        process = Command(
            "train", config, "--max_steps", "1000000", "--save_strategy", "no", "--gradient_accumulation_steps", "4"
        )
        seen = read_until(process, b"'loss':")
        process.send_signal(signal.SIGINT)
        seen = read_until(process, b"Ctrl-C again stops at once", seen)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=120)
        assert process.returncode == 130
        assert b"Traceback" not in seen + rest
        # Whether the first step's end or the second signal came first is the machine's business; both keep their word.
        said = (seen + rest).decode()
        kept = whole_checkpoints(tmp_path / "out")
        assert ("holds no checkpoint." in said) == (not kept)

    def test_the_signal_s_bookkeeping(self):
        stop = StopOnSignal()
        before = signal.getsignal(signal.SIGINT)
        control = types.SimpleNamespace(should_training_stop=False, should_save=False, should_evaluate=True)
        with stop:
            stop.on_step_end(None, None, control)
            assert not control.should_training_stop
            signal.raise_signal(signal.SIGINT)
            stop.on_step_end(None, None, control)
            assert (control.should_training_stop, control.should_save, control.should_evaluate) == (True, True, False)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before

    def test_while_getting_ready(self, run, config, tmp_path, monkeypatch):
        def interrupted(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("gist_fast.config.load.load_config", interrupted)
        result = run(config)
        assert (result.code, result.out) == (130, "")
        assert result.err == "gist-fast: interrupted while getting ready; nothing was written.\n"
        monkeypatch.undo()
        monkeypatch.setattr("gist_fast.pipeline.models.load_model", interrupted)
        result = run(config)
        assert result.code == 130
        assert "interrupted before the first step" in result.err
        assert not (tmp_path / "out").exists()


@pytest.fixture
def seen(monkeypatch):
    """Each batch that is collated: the rows that went in and what came out."""
    from gist_fast.training.collator import GISTDataCollator

    batches, collate = [], GISTDataCollator.__call__

    def spy(self, features):
        batch = collate(self, features)
        batches.append((features, batch))
        return batch

    monkeypatch.setattr(GISTDataCollator, "__call__", spy)
    # Of the training, not of its rehearsal.
    monkeypatch.setattr("gist_fast.pipeline.plan.rehearse", lambda *_, **__: None)
    return batches


def change(config: Path, **sections: object) -> None:
    """Set keys of a configuration: ``data={...}`` replaces the section, ``training={...}`` adds to it."""
    tree = yaml.safe_load(config.read_text())
    for name, value in sections.items():
        tree[name] = tree.get(name, {}) | value if name == "training" else value
    config.write_text(yaml.safe_dump(tree, sort_keys=False))


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(model: SentenceTransformer, tokens: dict) -> list[str]:
    return [model.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens["input_ids"]]


class TestSeveralDatasets:
    @pytest.fixture
    def two(self, config, pairs, tmp_path):
        """Questions of 40 rows, and titles of 24 with a negative."""
        rows = list(pairs)
        write_rows(tmp_path / "questions.jsonl", rows[:40])
        write_rows(
            tmp_path / "titles.jsonl",
            [
                {"title": r["anchor"], "text": r["positive"], "negative": rows[k]["positive"]}
                for k, r in enumerate(rows[40:])
            ],
        )
        titles = {"path": "titles.jsonl", "columns": {"anchor": "title", "positive": "text"}}
        change(config, data={"train": {"questions": "questions.jsonl", "titles": titles}})
        return config

    @pytest.mark.parametrize(("mixing", "counts"), [("round_robin", (3, 3)), ("proportional", (5, 3))])
    def test_one_dataset_a_batch(self, run, two, seen, mixing, counts):
        change(
            two,
            training={
                "multi_dataset_batch_sampler": mixing,
                "batch_sampler": "no_duplicates",
                "per_device_train_batch_size": 8,
            },
        )
        result = run(two, "--json")
        assert result.code == 0, result.err
        # A dataset of other columns in the batch would be an error in the collator; this one just has one more.
        kinds = [{"negative" in row for row in features} for features, _ in seen]
        assert all(len(kind) == 1 for kind in kinds)
        assert (kinds.count({False}), kinds.count({True})) == counts
        assert json.loads(result.out)["steps"] == sum(counts)
        assert json.loads(result.out)["rows"] == 64
        if mixing == "round_robin":
            assert kinds == [{False}, {True}] * 3

    def test_prompts_and_lengths_by_dataset_and_column(self, run, two, seen, tiny_student, tiny_guide):
        change(
            two,
            student={
                "path": str(tiny_student),
                "prompts": {"questions": {"anchor": "which planet "}, "titles": "water "},
            },
            guide={"path": str(tiny_guide), "prompts": {"titles": {"positive": "pressure "}}},
            training={"max_length": {"questions": {"positive": 7}, "titles": 9}, "guide_max_length": {"anchor": 6}},
        )
        result = run(two, "--max_steps", "5")
        assert result.code == 0, result.err
        student, guide = (SentenceTransformer(str(path), device="cpu") for path in (tiny_student, tiny_guide))
        checked = set()
        for features, batch in seen:
            name = features[0]["dataset_name"]
            checked.add(name)
            anchors, positives = ({"input_ids": batch[f"{c}_input_ids"]} for c in ("anchor", "positive"))
            if name == "questions":
                assert all(text.startswith("which planet ") for text in words(student, anchors))
                assert positives["input_ids"].shape[1] == 7
                assert anchors["input_ids"].shape[1] > 9
            else:
                for column in (anchors, positives, {"input_ids": batch["negative_input_ids"]}):
                    assert all(text.startswith("water") for text in words(student, column))
                    assert column["input_ids"].shape[1] == 9
            # The guide reads the raw texts: none of the student's prompts, and its own only where it is given.
            tokens = {key: value for key, value in batch.items() if key.endswith("_guide")}
            assert tokens
            for key, value in tokens.items():
                heard = words(guide, value)
                own = name == "titles" and key == "positive_guide"
                assert not any(text.startswith(("w h i c h p l a n e t w", "water w")) for text in heard)
                assert all(text.startswith("pressure ") == own for text in heard)
            # Columns of one prompt and length share their tokens; the anchors are cut at six, [CLS] and [SEP] included.
            assert batch["anchor_guide"]["input_ids"].shape[1] == 6
            assert "positive_guide" in tokens
            assert batch["positive_guide"]["input_ids"].shape[1] > 6
        assert checked == {"questions", "titles"}

    def test_an_evaluation_loss_for_each(self, run, two):
        tree = yaml.safe_load(two.read_text())
        change(two, data=tree["data"] | {"eval": {"near": "questions.jsonl", "far": "titles.jsonl"}})
        refused(run(two, "--dry-run"), "titles.jsonl: no column 'anchor'")
        change(two, data=tree["data"] | {"eval": {"near": "questions.jsonl", "far": "pairs.jsonl"}})
        change(two, training={"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2})
        result = run(two, "--max_steps", "2")
        assert result.code == 0, result.err
        state = json.loads((two.parent / "out" / "checkpoint-2" / "trainer_state.json").read_text())
        logged = {key for entry in state["log_history"] for key in entry}
        assert {"eval_near_loss", "eval_far_loss"} <= logged

    def test_the_plan_names_both(self, run, two):
        result = run(two, "--dry-run", "--json")
        assert result.code == 0, result.err
        told = json.loads(result.out)
        assert "questions: " in told["train"]
        assert "questions.jsonl: 40 rows of anchor, positive; titles: " in told["train"]
        assert told["steps"] == 3 + 2

    @pytest.mark.parametrize(
        ("training", "says"),
        [
            ({"max_length": {"anchr": 5}}, "training.max_length: 'anchr' is no column or dataset of the data (did you"),
            ({"max_length": {"titles": {"anchr": 5}}}, "training.max_length.titles: 'anchr' is no column of the data"),
            (
                {"prompts": {"title": {"anchor": "x"}}},
                "training.prompts: 'title' is no dataset of the data (did you mean",
            ),
            ({"guide_prompts": {"questions": {"negative": "x"}}}, "training.guide_prompts.questions: 'negative' is no"),
        ],
    )
    def test_a_setting_for_what_does_not_exist(self, run, two, training, says):
        change(two, training=training)
        refused(run(two, "--dry-run"), says)

    def test_streams_are_not_mixed(self, run, two):
        refused(
            run(two, "--dry-run", "--data.train.titles.streaming", "--max_steps", "2"),
            "data.train.titles.streaming: one of several datasets cannot be streamed",
        )


class TestStreaming:
    def test_a_stream_trains_as_the_file_would_in_its_order(self, run, config, seen, pairs):
        change(config, data={"train": {"path": "pairs.jsonl", "streaming": True}})
        result = run(config, "--max_steps", "6", "--json")
        assert result.code == 0, result.err
        # One batch is fetched ahead.
        read = [row["anchor"] for features, _ in seen[:6] for row in features]
        assert read == [*pairs["anchor"], *pairs["anchor"][:32]]
        summary = json.loads(result.out)
        assert (summary["steps"], summary["rows"]) == (6, None)
        assert all(0 < share < 1 for share in summary["masked"].values())

    def test_shuffled(self, run, config, seen, pairs):
        change(config, data={"train": {"path": "pairs.jsonl", "streaming": True, "shuffle_buffer": 64}})
        assert run(config, "--max_steps", "8").code == 0
        read = [[row["anchor"] for features, _ in seen[k : k + 4] for row in features] for k in (0, 4)]
        # Each is drawn among 64 rows that are held.
        assert set(read[0]) | set(read[1]) <= set(pairs["anchor"])
        assert read[0][:16] != pairs["anchor"][:16]
        assert read[0] != read[1]
        first = [[row["anchor"] for row in features] for features, _ in seen[:8]]
        seen.clear()
        assert run(config, "--max_steps", "8", "--overwrite").code == 0
        assert [[row["anchor"] for row in features] for features, _ in seen[:8]] == first

    def test_resumed_where_it_was(self, run, config, seen):
        change(config, data={"train": {"path": "pairs.jsonl", "streaming": True}}, training={"save_steps": 5})
        run(config, "--max_steps", "7", "--lr_scheduler_type", "constant", "--save_strategy", "steps")
        whole = [[row["anchor"] for row in features] for features, _ in seen]
        for later in whole_checkpoints(config.parent / "out")[1:]:
            shutil.rmtree(later)
        assert [path.name for path in whole_checkpoints(config.parent / "out")] == ["checkpoint-5"]
        final = weights(config.parent / "out" / "final")
        seen.clear()
        result = run(config, "--max_steps", "7", "--lr_scheduler_type", "constant", "--resume")
        assert result.code == 0, result.err
        # The second time through the file: the five batches before are read and skipped.
        assert [[row["anchor"] for row in features] for features, _ in seen][:7] == whole[:7]
        assert whole[5] == whole[1]
        assert not moved(final, weights(config.parent / "out" / "final"))

    def test_the_wrong_row_is_named_and_the_last_checkpoint_stays(self, run, config, tmp_path, pairs):
        rows = list(pairs)
        rows[47]["positive"] = 5
        write_rows(tmp_path / "pairs.jsonl", rows)
        change(config, data={"train": {"path": "pairs.jsonl", "streaming": True}}, training={"save_steps": 1})
        import gist_fast.data.text_files

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gist_fast.data.text_files, "CHUNK_ROWS", 8)
            result = run(config, "--max_steps", "4", "--save_strategy", "steps")
        refused(result, "pairs.jsonl: row 48 (line 48), column 'positive': is 5; a text is needed there")
        kept = whole_checkpoints(tmp_path / "out")
        # The wrong batch is the third, and is fetched before the second is trained on.
        assert [path.name for path in kept] == ["checkpoint-1"]
        weights(kept[-1])
        assert not (tmp_path / "out" / "final").exists()

    @pytest.mark.parametrize(
        ("data", "overrides", "says"),
        [
            ({"path": "pairs.jsonl", "streaming": True}, (), "so training.max_steps must say when to stop"),
            (
                {"path": "pairs.jsonl", "streaming": True},
                ("--max_steps", "3", "--batch_sampler", "no_duplicates"),
                "training.batch_sampler: no_duplicates chooses among all rows",
            ),
            (
                {"path": "pairs.jsonl", "shuffle_buffer": 9},
                (),
                "line 4: data.train.shuffle_buffer is for streaming: true",
            ),
            (
                {"path": "pairs.jsonl", "streaming": True, "shuffle_buffer": 0},
                (),
                "shuffle_buffer: expected an int of at least 1, got 0",
            ),
            ({"path": ".", "streaming": True}, ("--max_steps", "3"), "a saved directory is mapped into memory"),
        ],
    )
    def test_refused(self, run, config, data, overrides, says):
        change(config, data={"train": data})
        refused(run(config, "--dry-run", *overrides), says)
        assert not (config.parent / "out").exists()


class TestSeveralNegatives:
    def rows(self, pairs) -> list[dict]:
        names = ("negative", "negative_1", "negative_2")
        texts = pairs["positive"]
        return [
            row | {name: texts[(k + 7 * (n + 1)) % len(texts)] for n, name in enumerate(names)}
            for k, row in enumerate(pairs)
        ]

    def test_three_columns_reach_the_loss_in_order(self, run, config, seen, pairs, tmp_path):
        write_rows(tmp_path / "pairs.jsonl", [dict(reversed(row.items())) for row in self.rows(pairs)])
        result = run(config, "--json", "--batch_sampler", "no_duplicates", "--per_device_train_batch_size", "6")
        assert result.code == 0, result.err
        masked = json.loads(result.out)["masked"]
        assert set(masked) == {"masked_ap", "masked_aa", "masked_pp", "masked_an_0", "masked_an_1", "masked_an_2"} or (
            sum(name.startswith("masked_an") for name in masked) == 3
        )
        for features, batch in seen:
            columns = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
            assert columns == ["anchor", "positive", "negative", "negative_1", "negative_2"]
            texts = [text for row in features for text in row.values()]
            assert len(texts) == len(set(texts))

    @pytest.mark.parametrize("missing", [{"negative_1": None}, {}])
    def test_a_row_without_one(self, run, config, pairs, tmp_path, missing):
        rows = self.rows(pairs)
        del rows[16]["negative_1"]
        rows[16] |= missing
        write_rows(tmp_path / "pairs.jsonl", rows)
        says = "column 'negative_1': is None" if missing else "has no 'negative_1', as the first row has"
        refused(run(config, "--dry-run"), says)
        assert "row 17 (line 17)" in run(config, "--dry-run").err
