"""``gist-fast embed-guide`` as a user meets it: what it writes, what it refuses, what it keeps."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from datasets import load_from_disk

from gist_fast.data.load import load_texts
from gist_fast.guide_columns import job


@pytest.fixture
def data(tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"question": r["anchor"], "answer": r["positive"]}) + "\n" for r in pairs))
    return path


@pytest.fixture
def embed(run_command, data, tiny_guide, tmp_path):
    """Run the command on the pairs; `more` is added to it."""

    def call(*more, columns="question,answer", output=tmp_path / "out"):
        return run_command(
            "embed-guide", data, "--guide", tiny_guide, "--output", output, "--columns", columns,
            "--cache-dir", tmp_path / "cache", "--device", "cpu", *more,
        )  # fmt: skip

    return call


def refused(result, says):
    assert result.code == 2, result.err
    assert result.out == ""
    assert says in result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err


def test_the_result_is_data_to_train_on_without_a_guide(embed, run_command, guide, pairs, tiny_student, tmp_path):
    result = embed("--json", "--quiet", "--prompt", "anchor=query: ")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert (told["rows"], told["embedded"], told["width"], told["dtype"]) == (64, 128, 48, "float16")
    assert told["columns"] == ["anchor_guide_embedding", "positive_guide_embedding"]
    assert "texts/s" not in result.err
    dataset = load_texts(tmp_path / "out")
    for column, prompt in (("anchor", "query: "), ("positive", "")):
        assert list(dataset[column]) == list(pairs[column])
        expected = guide.encode(list(pairs[column]), prompt=prompt)
        got = np.array(dataset[f"{column}_guide_embedding"][:])
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-5)
    config = tmp_path / "config.yaml"
    config.write_text(
        f"student: {tiny_student}\ndata: {{train: {tmp_path / 'out'}}}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, max_steps: 2, per_device_train_batch_size: 32, use_cpu: true, "
        "report_to: none, logging_steps: 1, save_strategy: 'no'}\n"
    )
    trained = run_command("train", config, "--json")
    assert trained.code == 0, trained.err
    assert json.loads(trained.out)["steps"] == 2
    assert any(share > 0 for share in json.loads(trained.out)["masked"].values()), "the guide's columns masked nothing"


def test_a_second_run_finds_everything_and_asks_before_it_replaces(embed, tmp_path):
    assert embed().code == 0
    refused(embed(), f"--output: {tmp_path / 'out'} already holds a dataset; replace it with --overwrite")
    result = embed("--overwrite", "--json", "--dtype", "float16")
    assert json.loads(result.out)["embedded"] == 0
    assert "texts/s" not in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "pairs.jsonl"]


def test_nothing_else_is_ever_replaced(embed, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter-1.txt").write_text("years of work")
    refused(embed("--overwrite", output=other), "holds other things than a saved dataset")
    refused(embed("--overwrite", output=other / "chapter-1.txt"), "got the file")
    assert (other / "chapter-1.txt").read_text() == "years of work"


def test_wrong_usage(embed, run_command, data, tiny_guide, tmp_path):
    refused(embed("--dtype", "int8"), "dtype: expected one of 'float16', 'float32', got 'int8'.")
    refused(embed("--max-length", "0"), "--max-length")
    refused(embed("--max-length", "1000"), "--max-length: expected at most 64, the positions that")
    refused(embed(columns="question,anser"), "did you mean 'answer'?")
    refused(embed("--prompt", "anchor=q: ", "--prompt", "nobody=d: "), "'nobody=d: ' is for no column")
    refused(
        embed("--prompt", "passage=x: "), "expected COLUMN=TEXT with a column of anchor, positive, got 'passage=x: '"
    )
    refused(embed(output=tmp_path / "out.parquet"), "out.parquet, as which a file would be read.")
    refused(embed("--device", "nope"), "--device: expected a device that is here, such as cpu, got nope (")
    out = ("--output", tmp_path / "out")
    refused(run_command("embed-guide", data, "--guide", tmp_path / "no-guide", *out), "no such folder")
    refused(run_command("embed-guide", tmp_path / "no.jsonl", "--guide", tiny_guide, *out), "no such file")
    refused(run_command("embed-guide", data, *out), "'--guide'")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_was_embedded(embed, monkeypatch, tmp_path):
    from sentence_transformers import SentenceTransformer

    monkeypatch.setattr(job, "WINDOW_TEXTS", (8, 8))
    forward, calls = SentenceTransformer.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SentenceTransformer, "forward", interrupted)
        result = embed()
    assert result.code == 130
    assert "interrupted; 24 of 128 texts embedded here are kept in" in result.err
    assert "the same command goes on from there" in result.err
    assert not (tmp_path / "out").exists()
    result = embed("--json")
    assert (result.code, json.loads(result.out)["embedded"]) == (0, 104)


@pytest.mark.slow
def test_torchrun_shares_the_work(data, tiny_guide, tmp_path, embed):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *("-m", "gist_fast.cli.main", "embed-guide", data, "--guide", tiny_guide, "--output", tmp_path / "two"),
        *("--columns", "question,answer", "--cache-dir", tmp_path / "other", "--json"),
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["embedded"] == 128
    assert embed().code == 0
    one, two = load_from_disk(str(tmp_path / "out")), load_from_disk(str(tmp_path / "two"))
    for column in ("anchor_guide_embedding", "positive_guide_embedding"):
        np.testing.assert_array_equal(np.array(one[column][:]), np.array(two[column][:]))
