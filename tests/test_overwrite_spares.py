"""What ``--overwrite`` spares: all that the new run reads, what no run wrote, and a run that nothing replaces."""

from __future__ import annotations

import functools
import re
import shutil

import pytest
import yaml


@pytest.fixture
def run(run_command):
    return functools.partial(run_command, "train")


@pytest.fixture
def config(tmp_path, pairs, tiny_student):
    pairs.to_json(tmp_path / "pairs.jsonl")
    training = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 16, "use_cpu": True}
    whole = {"student": str(tiny_student), "guide": None, "data": {"train": "pairs.jsonl"}, "training": training}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(whole))
    return tmp_path / "config.yaml"


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("key", ["student", "guide", "data.train", "the configuration"])
def test_what_the_new_run_reads_stays(run, config, tmp_path, key):
    assert run(config).code == 0
    out = tmp_path / "out"
    shutil.copy(tmp_path / "pairs.jsonl", out / "final")
    named = {"data.train": "--data.train", "student": "--student.path", "guide": "--guide.path"}
    options = (named.get(key), out / "final" / ("pairs.jsonl" if key == "data.train" else ""))
    if key not in named:
        config = shutil.copy(config, out / "final" / "config.yaml")
        options = ("--output_dir", out, "--data.train", tmp_path / "pairs.jsonl")
    before = contents(out)
    for more in (("--dry-run",), ()):
        result = run(config, *options, "--overwrite", *more)
        assert (result.code, result.out) == (2, "")
        assert re.search(rf"gist-fast: {key}[a-z._]*: .* lies in what --overwrite deletes \(", result.err)
        assert contents(out) == before


def test_an_adapter_s_base_stays(run, config, tmp_path):
    assert run(config).code == 0
    out = tmp_path / "out"
    lora = (
        "--student",
        f"{{path: {out / 'final'}, lora: {{r: 2, alpha: 4}}}}",
        "--output_dir",
        tmp_path / "adapted",
    )
    assert run(config, *lora).code == 0
    result = run(config, "--student.path", tmp_path / "adapted" / "final", "--overwrite")
    assert result.code == 2 and "student.path (the base of its adapter): " in result.err
    assert (out / "final" / "model.safetensors").exists()


def test_folders_of_the_user_s_stay(run, config, tmp_path):
    assert run(config).code == 0
    for name in ("eval", "runs"):
        (tmp_path / "out" / name).mkdir(exist_ok=True)
        (tmp_path / "out" / name / "notes.md").write_text("mine")
    assert run(config, "--overwrite", "--seed", "3").code == 0
    assert all((tmp_path / "out" / name / "notes.md").read_text() == "mine" for name in ("eval", "runs"))
    (tmp_path / "out" / "checkpoint-999").mkdir()
    (tmp_path / "out" / "checkpoint-999" / "mine.txt").write_text("mine")
    said = "checkpoint-999: holds nothing of a checkpoint, and --overwrite would delete it;"
    assert said in run(config, "--overwrite").err


@pytest.mark.parametrize("steps", ["1", "3"])
def test_a_run_that_diverges_leaves_the_older_one(run, config, tmp_path, steps):
    assert run(config).code == 0
    before = contents(tmp_path / "out" / "final")
    options = ("--learning_rate", "1e38", "--max_steps", steps, "--save_steps", "1", "--max_grad_norm", "0")
    result = run(config, "--overwrite", *options)
    assert (result.code, result.out) == (1, "")
    assert "are not finite, so the model is not saved. A lower learning_rate" in result.err
    assert contents(tmp_path / "out" / "final") == before
