"""What a command prints arrives in any encoding, and where it cannot write is told before any work."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from gist_fast.cli import main as cli

ROWS = [
    {"anchor": "wie schärfe ich eine Säge, schnell?", "positive": "Säge schärfen: 3 Schritte 日本語"},
    {"anchor": "wie schärfe ich eine Säge, schnell?", "positive": "Säge schärfen: 3 Schritte 日本語"},
    {"anchor": "wie schärfe ich die Säge, schnell?", "positive": "чистка дрели"},
    {"anchor": "中文 问题", "positive": "中文 答案"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with texts and a configuration that few encodings can write."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (tmp_path / "Sägen 日本.jsonl").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run_in(monkeypatch):
    """Run a command whose stdout and stderr have an encoding, and are strict."""

    def run(encoding: str, *arguments: object) -> SimpleNamespace:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            code = cli.run([str(argument) for argument in arguments])
            for stream in streams:
                stream.flush()
        out, err = (stream.buffer.getvalue() for stream in streams)
        return SimpleNamespace(code=code, out=out.decode(encoding), err=err.decode(encoding))

    return run


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_texts_that_an_encoding_lacks(run_in, encoding, folder, tiny_guide):
    command = ("inspect", "--data", "Sägen 日本.jsonl", "--guide", tiny_guide, "--batch-size", 4, "--device", "cpu")
    result = run_in(encoding, *command)
    assert result.code == 0, result.err
    shown = ROWS[0]["positive"].encode(encoding, errors="replace").decode(encoding)
    assert shown in result.out
    result = run_in(encoding, *command, "--json", "--report", "Bericht 日.html")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["duplicates"]["copies"][0]["text"] in (ROWS[0]["anchor"], ROWS[0]["positive"])
    assert ROWS[0]["positive"] in (folder / "Bericht 日.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_paths_that_an_encoding_lacks(run_in, encoding, folder, tiny_student, tiny_guide):
    training = {"output_dir": "Läufe 日本", "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    config = {"student": str(tiny_student), "guide": None, "data": {"train": "Sägen 日本.jsonl"}, "training": training}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    for options in ((), ("--overwrite", "--json"), ("--overwrite", "--dry-run")):
        result = run_in(encoding, "train", "c.yaml", *options)
        assert result.code == 0, result.err
    assert json.loads(run_in(encoding, "train", "c.yaml", "--overwrite", "--json").out)["output_dir"].endswith("日本")
    embed = ("embed-guide", "Sägen 日本.jsonl", "--guide", tiny_guide, "--output", "Säge 日", "--cache-dir", "c")
    for options in (("--quiet",), ("--overwrite", "--json", "--quiet")):
        assert run_in(encoding, *embed, *options).code == 0
    assert run_in(encoding, "evaluate", tiny_student, "--pairs", "Sägen 日本.jsonl").code == 0
    result = run_in(encoding, "evaluate", tiny_student, "--pairs", "keine 日.jsonl")
    assert result.code == 2
    assert "gist-fast: keine ?.jsonl: no such file" in result.err


def test_a_name_that_is_no_utf8(run_in, folder, tiny_guide):
    """What a shell hands over for the byte 0xe4; such a file cannot be made on every system."""
    result = run_in("utf-8", "inspect", "--data", "S\udce4ge.jsonl", "--guide", tiny_guide)
    assert result.code == 2
    assert "gist-fast: S?ge.jsonl: no such file" in result.err
    result = run_in("utf-8", "inspect", "--data", "Sägen 日本.jsonl", "--guide", tiny_guide, "--report", "S\udce4.html")
    assert result.code == 2
    assert "is not UTF-8, as names must be; name another place for the report." in result.err


def test_a_page_that_names_a_file_that_is_no_utf8(tmp_path):
    from gist_fast.report.page import write_page

    write_page(tmp_path / "page.html", "S\udce4ge and Säge")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == "S?ge and Säge"


def test_json_escapes_what_cannot_be_encoded(run_in, monkeypatch):
    from gist_fast.cli import output

    for encoding, shown in (("utf-8", '"日"'), ("ascii", '"\\u65e5"'), ("cp1252", '"\\u65e5"')):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            output.print_json("日")
        stream.flush()
        assert stream.buffer.getvalue().decode(encoding) == shown + "\n"


@pytest.fixture
def no_model(monkeypatch):
    """No model may be loaded."""
    import sentence_transformers

    def loaded(*_, **__):
        raise AssertionError("a model was loaded before the places were looked at")

    monkeypatch.setattr(sentence_transformers.SentenceTransformer, "__init__", loaded)


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/gist"])
def test_a_cache_that_cannot_be_written_to_is_told_first(run_command, place, folder, tiny_guide, no_model, monkeypatch):
    import datasets

    (folder / "file").touch()
    embed = ("embed-guide", "Sägen 日本.jsonl", "--guide", tiny_guide, "--output", "out")
    result = run_command(*embed, "--cache-dir", place)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("gist-fast: cache_dir: ")
    assert result.err.endswith("; name another cache_dir, or set HF_DATASETS_CACHE.\n")
    # The cache of datasets, here and where the trainer embeds.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
    training = {"output_dir": "run", "max_steps": 1, "use_cpu": True}
    data = {"train": "Sägen 日本.jsonl"}
    guide = {"path": str(tiny_guide), "columns": True}
    config = {"student": str(tiny_guide), "guide": guide, "data": data, "training": training}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    for command in (embed, ("train", "c.yaml", "--dry-run"), ("profile", "c.yaml", "--output", "p")):
        result = run_command(*command)
        assert (result.code, result.out) == (2, ""), command
        assert result.err.strip().splitlines()[-1].startswith("gist-fast: cache_dir: "), command


def test_a_cache_that_can_only_be_read_gives_what_it_holds(tmp_path, pairs, guide, monkeypatch):
    from gist_fast.guide_columns import embed_guide, files
    from gist_fast.runtime.errors import InputError

    def refuse(folder, *_):
        raise InputError(f"{folder}: cannot be written to")

    embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
    monkeypatch.setattr(files, "try_to_write", refuse)
    embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
    monkeypatch.setattr(guide, "preprocess", lambda *_, **__: pytest.fail("a text was embedded"))
    with pytest.raises(InputError, match="cannot be written to"):
        embed_guide(pairs.select(range(3)).map(lambda row: {"anchor": row["anchor"] + "?"}), guide,
                    cache_dir=tmp_path / "cache", show_progress_bar=False)  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        ("embed-guide", "Sägen 日本.jsonl", "--guide", "{guide}", "--output", "{place}"),
        ("inspect", "--data", "Sägen 日本.jsonl", "--guide", "{guide}", "--report", "{place}"),
        ("demo", "--output-dir", "{place}"),
        ("bench", "--suite", "start", "--output", "{place}"),
    ],
)
@pytest.mark.parametrize("place", ["file/below", "/proc/gist/below"])
def test_an_output_that_cannot_be_written_to_is_told_first(run_command, command, place, folder, tiny_guide, no_model):
    (folder / "file").touch()
    result = run_command(*(part.format(guide=tiny_guide, place=place) for part in command))
    assert (result.code, result.out) == (2, "")
    assert len(result.err.splitlines()) == 1
    assert "is a file, not a folder; " in result.err or "/proc cannot be written to (" in result.err
