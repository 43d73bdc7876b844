"""``gist-fast mine`` as a user meets it."""

from __future__ import annotations

import json

import pytest
from datasets import load_from_disk

from gist_fast.data.load import load_texts


@pytest.fixture
def data(tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    rows = [{"question": r["anchor"], "answer": r["positive"], "topic": k % 3} for k, r in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mine(run_command, data, tiny_guide, tmp_path):
    def call(*more, source=data, output=tmp_path / "mined", columns="anchor=question,positive=answer,group=topic"):
        given = ("--columns", columns) if columns else ()
        return run_command(
            "mine", source, "--output", output, "--cache-dir", tmp_path / "cache", "--device", "cpu", *given, *more
        )

    return call


def refused(result, says):
    assert result.code == 2, result.err
    assert says in result.err.strip().splitlines()[-1]
    assert "Traceback" not in result.err


def test_pairs_become_rows_to_train_on(mine, run_command, tiny_guide, tiny_student, tmp_path):
    result = mine("--guide", tiny_guide, "--negatives", "2", "--relative-margin", "0.0001", "--json", "--quiet")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    mined = load_from_disk(tmp_path / "mined")
    assert mined.column_names == ["anchor", "positive", "group", "negative_1", "negative_2"]
    texts = [text for name in ("negative_1", "negative_2") for text in mined[name]]
    assert told["rows"] == 64 and told["negatives"] == sum(text != "" for text in texts) > 0
    config = tmp_path / "config.yaml"
    config.write_text(
        f"student: {tiny_student}\nguide: {tiny_guide}\n"
        f"data: {{train: {{path: {tmp_path / 'mined'}, columns: {{group: group}}}}}}\n"
        "loss: {negatives_scope: own, groups: column}\n"
        f"training: {{output_dir: {tmp_path / 'run'}, max_steps: 2, per_device_train_batch_size: 16, use_cpu: true, "
        "report_to: none}\n"
    )
    trained = run_command("train", config)
    assert trained.code == 0, trained.err


def test_data_that_carry_embeddings_need_no_guide(mine, run_command, data, tiny_guide, tmp_path):
    columns = ("--columns", "question,answer", "--cache-dir", tmp_path / "cache", "--device", "cpu", "--quiet")
    done = run_command("embed-guide", data, "--guide", tiny_guide, "--output", tmp_path / "embedded", *columns)
    assert done.code == 0, done.err
    result = mine("--no-relative-margin", "--negatives", "3", source=tmp_path / "embedded", columns=None)
    assert result.code == 0, result.err
    assert "Mined negatives" in result.out and "groups: anchor_or_positive" in result.out
    again = load_texts(tmp_path / "mined")
    assert [c for c in again.column_names if c.startswith("negative_3")] == [
        "negative_3", "negative_3_guide_embedding"
    ]  # fmt: skip
    assert "" not in again["negative_3"][:]
    # Once more, in the place of those.
    refused(
        mine(source=tmp_path / "mined", output=tmp_path / "more", columns=None),
        "dataset: it has negatives already, in column 'negative_1'; remove",
    )
    more = mine(
        "--replace-negatives", "--sampling", "random", source=tmp_path / "mined", output=tmp_path / "more", columns=None
    )
    assert more.code == 0, more.err
    assert len(load_texts(tmp_path / "more").column_names) == 10


WRONG = {
    "no guide": ((), "guide: none was given, and the dataset has no column 'anchor_guide_embedding'"),
    "another way": (("--sampling", "best"), "sampling: expected 'top' or 'random', got 'best'"),
    "a range too small": (("--range-max", "2"), "range_max: expected at least 3"),
    "no such guide": (("--guide", "nowhere/at-all"), "guide: nowhere/at-all"),
    "a wrong option": (("--margin", "0.1"), "no such option: --margin"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_one_line(name, mine):
    arguments, says = WRONG[name]
    refused(mine(*arguments), says)
