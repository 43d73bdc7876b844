"""`embed_guide`: right values, each text once, again only when something changed, and nothing lost or half-written."""

from __future__ import annotations

import errno
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from gist_fast import embed_guide
from gist_fast.bench import isolated
from gist_fast.data.per_column import guide_prompt
from gist_fast.guide_columns import Report, job, probe
from gist_fast.guide_columns.progress import Progress


@pytest.fixture
def encoded(guide, monkeypatch):
    """The texts that the guide tokenised for the store, in the order of doing (the probe has tests of its own)."""
    monkeypatch.setattr(probe, "PROBED", 0)
    texts = []
    preprocess = guide.preprocess
    monkeypatch.setattr(guide, "preprocess", lambda batch, **kw: (texts.extend(batch), preprocess(batch, **kw))[1])
    return texts


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of eight texts, and a shard for each batch."""
    monkeypatch.setattr(job, "WINDOW_TEXTS", (8, 8))
    monkeypatch.setattr(job, "SHARD_SECONDS", 0.0)


def embed(dataset, guide, tmp_path, columns=None, **kwargs):
    return embed_guide(dataset, guide, columns, cache_dir=tmp_path / "cache", show_progress_bar=False, **kwargs)


def vectors(dataset, column):
    return np.stack([dataset[i][f"{column}_guide_embedding"] for i in range(len(dataset))])


def assert_right(embedded, guide, columns=("anchor", "positive"), prompt="", dtype="float16"):
    """Against sentence-transformers, one text at a time, which pads nothing."""
    for column in columns:
        texts = list(embedded[column])
        spy = guide.__dict__.pop("preprocess", None)
        expected = np.concatenate([guide.encode([text], prompt=prompt) for text in texts])
        if spy is not None:
            guide.preprocess = spy
        np.testing.assert_allclose(vectors(embedded, column), expected, rtol=2 * np.finfo(dtype).eps, atol=2e-5)


def files(tmp_path, pattern):
    return sorted((tmp_path / "cache").glob(f"*/{pattern}"))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_hold_the_guides_embeddings(dtype, guide, pairs, tmp_path):
    embedded = embed(pairs, guide, tmp_path, dtype=dtype)
    assert embedded.column_names == ["anchor", "positive", "anchor_guide_embedding", "positive_guide_embedding"]
    assert embedded.cache_files, "the embeddings are not memory-mapped"
    assert embedded[0]["anchor_guide_embedding"].dtype == dtype
    assert all(list(embedded[column]) == list(pairs[column]) for column in pairs.column_names)
    assert isinstance(embedded[0]["anchor"], str)
    assert_right(embedded, guide, dtype=dtype)


@pytest.mark.parametrize("batching", [{"batch_size": 1}, {"batch_tokens": 1}, {"batch_size": 5, "batch_tokens": 70}])
@pytest.mark.parametrize("side", ["right", "left"])
def test_however_texts_are_batched_and_padded(side, batching, guide, pairs, tmp_path, small_windows):
    guide.tokenizer.padding_side = side
    # Padding on the left moves a text to other positions, which a model with absolute ones would notice.
    guide[0].auto_model.embeddings.position_embeddings.weight.data.zero_()
    embedded = embed(pairs.select(range(21)), guide, tmp_path, prompts="query: ", **batching)
    assert_right(embedded, guide, prompt="query: ")


def test_the_guides_own_length_counts(guide, tmp_path):
    long = "water boils " * 100
    dataset = Dataset.from_dict({"anchor": [long, long + "and more", "ice"]})
    rows = vectors(embed(dataset, guide, tmp_path), "anchor")
    np.testing.assert_array_equal(rows[0], rows[1])
    short = embed(dataset, guide, tmp_path, max_length=5)
    guide.max_seq_length = 5
    assert_right(short, guide, ["anchor"])
    assert np.abs(vectors(short, "anchor")[0].astype(float) - rows[0]).max() > 0.01


def test_each_distinct_text_is_encoded_once(guide, encoded, tmp_path):
    dataset = Dataset.from_dict({"anchor": ["a", "b", "a", "c"], "positive": ["b", "d", "d", "b"]})
    report = Report()
    embedded = embed(dataset, guide, tmp_path, report=report)
    assert sorted(encoded) == ["a", "b", "c", "d"]
    assert (report.distinct, report.missing, report.embedded, report.columns) == (4, 4, 4, 2)
    rows = [embedded[i] for i in range(4)]
    np.testing.assert_array_equal(rows[0]["anchor_guide_embedding"], rows[2]["anchor_guide_embedding"])
    np.testing.assert_array_equal(rows[1]["anchor_guide_embedding"], rows[0]["positive_guide_embedding"])


def test_the_same_text_under_two_prompts_is_two_texts(guide, encoded, tmp_path):
    dataset = Dataset.from_dict({"anchor": ["ice", "water"], "positive": ["ice", "the moon"]})
    embedded = embed(dataset, guide, tmp_path, prompts={"anchor": "q: ", "positive": ""})
    assert sorted(encoded) == ["ice", "ice", "the moon", "water"]
    assert_right(embedded, guide, ["anchor"], prompt="q: ")
    assert_right(embedded, guide, ["positive"])


def test_nothing_is_encoded_again_unless_something_changed(guide, encoded, pairs, tmp_path):
    embed(pairs, guide, tmp_path)
    encoded.clear()
    embed(pairs, guide, tmp_path)
    assert encoded == []
    for change in ({"prompts": "q: "}, {"max_length": 5}, {"dtype": "float32"}):
        embed(pairs, guide, tmp_path, **change)
        assert len(encoded) == 128, change
        encoded.clear()
    guide[0].auto_model.get_input_embeddings().weight.data[0, 0] += 1
    embed(pairs, guide, tmp_path)
    assert len(encoded) == 128


def test_another_width_tokenizer_or_setting_of_the_same_weights_is_another_guide(guide, encoded, pairs, tmp_path):
    embed(pairs, guide, tmp_path)
    for change in (
        lambda: setattr(guide, "truncate_dim", 16),
        lambda: setattr(guide.tokenizer.backend_tokenizer, "normalizer", None),
        lambda: setattr(guide[0].auto_model.config, "layer_norm_eps", 1e-3),
        lambda: setattr(guide[1], "pooling_mode", "cls"),
    ):
        encoded.clear()
        change()
        assert len(embed(pairs, guide, tmp_path)[0]["anchor_guide_embedding"]) == 16
        assert len(encoded) == 128


def test_texts_are_known_again_wherever_they_stand(guide, encoded, pairs, tmp_path):
    whole = embed(pairs, guide, tmp_path)
    encoded.clear()
    renamed = pairs.rename_columns({"anchor": "question", "positive": "answer"})
    shuffled, some = pairs.shuffle(seed=3), pairs.select([7, 3, 50])
    for dataset, columns in ((renamed, ("question", "answer")), (shuffled, None), (some, None)):
        assert_right(embed(dataset, guide, tmp_path), guide, columns or ("anchor", "positive"))
    assert encoded == []
    new = Dataset.from_dict({"anchor": ["is glass a liquid"], "positive": [pairs[5]["anchor"]]})
    grown = embed(concatenate_datasets([pairs, new]), guide, tmp_path)
    assert encoded == ["is glass a liquid"]
    np.testing.assert_array_equal(vectors(grown, "anchor")[:64], vectors(whole, "anchor"))
    assert_right(grown, guide)


def test_columns_added_one_by_one_are_saved_and_loaded_again(guide, pairs, tmp_path):
    embedded = embed(embed(pairs, guide, tmp_path, ["anchor"]), guide, tmp_path, ["positive"])
    embedded.save_to_disk(str(tmp_path / "saved"))
    for dataset in (embedded, load_from_disk(str(tmp_path / "saved"))):
        assert {dataset[0][f"{c}_guide_embedding"].dtype for c in ("anchor", "positive")} == {np.dtype("float16")}
    wide = embed(embed(pairs, guide, tmp_path, ["anchor"], dtype="float32"), guide, tmp_path, ["positive"])
    assert vectors(wide, "anchor").dtype == "float32", "what was stored in float32 is read as less"


def test_the_guide_is_left_as_it_was(guide, pairs, tmp_path):
    guide.train()
    guide[1].eval()
    before = guide.max_seq_length
    embedded = embed(pairs.select(range(5)), guide, tmp_path, max_length=7)
    assert guide.training
    assert not guide[1].training
    assert guide.max_seq_length == before
    again = embed_guide(pairs.select(range(5)), guide, cache_dir=tmp_path / "other", max_length=7)
    np.testing.assert_array_equal(vectors(again, "anchor"), vectors(embedded, "anchor"))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_was_embedded_before_an_interruption_is_kept(error, guide, encoded, pairs, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "WINDOW_TEXTS", (8, 8))
    forward, calls = guide.forward, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(guide, "forward", interrupted)
    report = Report()
    with pytest.raises(error):
        embed(pairs, guide, tmp_path, report=report)
    assert report.embedded == 16, "two windows were embedded before"
    encoded.clear()
    assert_right(embed(pairs, guide, tmp_path), guide)
    assert len(encoded) == 112


def killed_while_writing(guide_path, rows, folder, survives):
    """Embed, and be killed while a shard is written; `survives` were before."""
    from sentence_transformers import SentenceTransformer

    from gist_fast.guide_columns import files

    job.WINDOW_TEXTS, job.SHARD_SECONDS = (8, 8), 0.0
    fsync, written = os.fsync, []

    def kill_at_last(descriptor):
        written.append(1)
        if len(written) > survives + 1:  # the first file says what the folder is for
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    files.os.fsync = kill_at_last
    guide = SentenceTransformer(guide_path, device="cpu")
    embed(Dataset.from_list(rows), guide, Path(folder))


def test_a_killed_run_goes_on_where_it_was(tiny_guide, guide, encoded, pairs, tmp_path, small_windows):
    process = isolated._context().Process(
        target=killed_while_writing, args=(str(tiny_guide), pairs.to_list(), str(tmp_path), 5)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert len(files(tmp_path, "*.shard")) == 5
    assert len(files(tmp_path, ".*.partial")) == 1, "it was not killed in the middle of a file"
    assert_right(embed(pairs, guide, tmp_path), guide)
    assert len(encoded) == 128 - 5 * 8
    assert files(tmp_path, ".*.partial") == []


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-300]), id="cut off"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.write_bytes(bytes(path.stat().st_size)), id="zeros"),
        pytest.param(lambda path: flip(path, path.stat().st_size // 2), id="a bit of a vector"),
        pytest.param(lambda path: flip(path, path.read_bytes().rindex(b"vectors") - 20), id="a bit of the head"),
    ],
)
def test_damaged_files_are_named_and_made_again(damage, guide, encoded, pairs, tmp_path, small_windows, caplog):
    embed(pairs, guide, tmp_path)
    encoded.clear()
    shard = files(tmp_path, "*.shard")[3]
    for column in files(tmp_path, "*.arrow"):
        column.unlink()
    try:
        damage(shard)
    except ValueError:
        pytest.fail("the shard has no such place")
    with caplog.at_level(logging.WARNING):
        assert_right(embed(pairs, guide, tmp_path), guide)
    assert len(encoded) == 8
    assert f"{shard}: damaged" in caplog.text
    assert shard.with_name(shard.name + ".damaged").exists()
    caplog.clear()
    encoded.clear()
    column = files(tmp_path, "*.arrow")[0]
    flip(column, column.stat().st_size // 2)
    with caplog.at_level(logging.WARNING):
        assert_right(embed(pairs, guide, tmp_path), guide)
    assert encoded == []
    assert f"{column}: damaged" in caplog.text


def test_any_damaged_byte_of_a_shard_is_seen_or_harmless(guide, pairs, tmp_path):
    few = pairs.select(range(3))
    right = vectors(embed(few, guide, tmp_path, ["anchor"]), "anchor")
    (shard,) = files(tmp_path, "*.shard")
    whole = shard.read_bytes()
    for place in np.random.default_rng(0).choice(len(whole), 60, replace=False):
        for made in (*files(tmp_path, "*.shard"), *files(tmp_path, "*.arrow"), *files(tmp_path, "*.damaged")):
            made.unlink()
        shard.write_bytes(whole)
        flip(shard, int(place))
        np.testing.assert_array_equal(vectors(embed(few, guide, tmp_path, ["anchor"]), "anchor"), right)


def test_a_full_disk_leaves_what_was_good(guide, encoded, pairs, monkeypatch, tmp_path, small_windows):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr("gist_fast.guide_columns.files.os.fsync", full)
        with pytest.raises(OSError, match=r"cache.*no space left on the disk.*run again to go on"):
            embed(pairs, guide, tmp_path)
    assert len(files(tmp_path, "*.shard")) == 3
    assert files(tmp_path, ".*.partial") == []
    encoded.clear()
    assert_right(embed(pairs, guide, tmp_path), guide)
    assert len(encoded) == 128 - 3 * 8


def test_two_runs_at_once_do_not_disturb_each_other(guide, pairs, monkeypatch, tmp_path, small_windows):
    forward, inner = guide.forward, []

    def another_run_meanwhile(*args, **kwargs):
        if not inner:
            inner.append(None)
            inner[0] = embed(pairs, guide, tmp_path)
        return forward(*args, **kwargs)

    monkeypatch.setattr(guide, "forward", another_run_meanwhile)
    outer = embed(pairs, guide, tmp_path)
    for embedded in (outer, inner[0]):
        assert_right(embedded, guide)


def one_rank(rank, folder, guide_path, rows):
    from sentence_transformers import SentenceTransformer

    job.WINDOW_TEXTS = (8, 8)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        guide = SentenceTransformer(guide_path, device="cpu")
        report = Report()
        dataset = Dataset.from_list(rows)
        embedded = embed(dataset, guide, Path(folder), report=report)
        found = {column: vectors(embedded, column) for column in ("anchor", "positive")}
        errors = []
        if rank == 1:
            guide.forward = None
        for other in (dataset.select(range(10 + rank)), Dataset.from_dict({"anchor": ["something new"] * 2})):
            try:
                embed(other, guide, Path(folder), prompts="new: ")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}")
        torch.save({"found": found, "embedded": report.embedded, "errors": errors}, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(tiny_guide, guide, pairs, tmp_path, monkeypatch):
    folder = tmp_path / "two"
    folder.mkdir()
    context = isolated._context()  # forked from a process that has imported torch
    processes = [
        context.Process(target=one_rank, args=(rank, str(folder), str(tiny_guide), pairs.to_list())) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    monkeypatch.setattr(job, "WINDOW_TEXTS", (8, 8))
    alone = embed(pairs, guide, tmp_path)
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert [rank["embedded"] for rank in ranks] == [64, 64]
    for rank in ranks:
        for column in ("anchor", "positive"):
            np.testing.assert_array_equal(rank["found"][column], vectors(alone, column))
        assert "dataset: process 1 has another than process 0" in rank["errors"][0]
    # One window is one process's work: rank 0 had it, so what rank 1 lacks harms nobody.
    assert [len(rank["errors"]) for rank in ranks] == [1, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x * torch.nan, "holds NaN or infinity"),
        (lambda x: x * torch.inf, "holds NaN or infinity"),
        (lambda x: x * 0 + 70000.0, r"holds 70000, above the largest float16, 65504; set dtype='float32'"),
        (lambda x: x * 1e-5, r"norm of .*, too small for float16 .* set dtype='float32'"),
    ],
)
def test_what_cannot_be_stored_is_named(change, says, guide, encoded, pairs, monkeypatch, tmp_path):
    bad, forward = pairs[40]["positive"], guide.forward

    def spoiled(features, **kwargs):
        ids = guide.preprocess([bad])["input_ids"][0]
        out = forward(features, **kwargs)
        for row, tokens in enumerate(features["input_ids"]):
            if tokens[tokens != 0].tolist() == ids.tolist():
                out["sentence_embedding"][row] = change(out["sentence_embedding"][row])
        return out

    with monkeypatch.context() as patched:
        patched.setattr(guide, "forward", spoiled)
        with pytest.raises(ValueError, match=rf"dataset: row 40, column 'positive' \('One is steeped.*{says}"):
            embed(pairs, guide, tmp_path)
    encoded.clear()
    assert_right(embed(pairs, guide, tmp_path), guide)
    assert 0 < len(encoded) < 128, "what was good was not kept"


def test_wrong_input_is_named(guide, pairs, tmp_path):
    with pytest.raises(ValueError, match=r"columns: the dataset has no 'query', only anchor, positive"):
        embed(pairs, guide, tmp_path, ["query"])
    with pytest.raises(ValueError, match=r"dataset: row 1, column 'anchor': expected a text, got None"):
        embed(Dataset.from_dict({"anchor": ["a", None]}), guide, tmp_path)
    with pytest.raises(ValueError, match=r"dataset: row 0, column 'label': expected a text, got 3"):
        embed(Dataset.from_dict({"anchor": ["a"], "label": [3]}), guide, tmp_path, ["anchor", "label"])
    with pytest.raises(ValueError, match="dataset: it has no rows"):
        embed(pairs.select([]), guide, tmp_path)
    with pytest.raises(ValueError, match=r"columns: none to embed; the dataset has label"):
        embed(Dataset.from_dict({"label": [3]}), guide, tmp_path)
    with pytest.raises(ValueError, match=r"dtype: expected one of 'float16', 'float32', got 'int8'"):
        embed(pairs, guide, tmp_path, dtype="int8")
    for name in ("batch_size", "batch_tokens", "max_length"):
        with pytest.raises(ValueError, match=rf"{name}: expected at least 1, or None, got 0"):
            embed(pairs, guide, tmp_path, **{name: 0})
    with pytest.raises(ValueError, match=r"max_length: expected at most 64, the positions that the guide has, got 65"):
        embed(pairs, guide, tmp_path, max_length=65)
    with pytest.raises(ValueError, match=r"'anchor' has guide embeddings already"):
        embed(embed(pairs, guide, tmp_path, ["anchor"]), guide, tmp_path, ["anchor"])
    with pytest.raises(TypeError, match=r"dataset: expected a datasets.Dataset, .* got DatasetDict"):
        embed(DatasetDict(train=pairs), guide, tmp_path)
    with pytest.raises(TypeError, match=r"columns: expected a list of names, as \['anchor'\], got the text 'anchor'"):
        embed(pairs, guide, tmp_path, "anchor")
    with pytest.raises(ValueError, match=r"prompts: one is for 'anchr', .*did you mean 'anchor'"):
        embed(pairs, guide, tmp_path, prompts={"anchr": "q: "})
    with pytest.raises(ValueError, match=r"dataset: it has a transform"):
        embed(pairs.with_transform(lambda batch: batch), guide, tmp_path)


def test_a_prompt_for_queries_is_not_given_to_documents_unnoticed(guide, pairs, tmp_path):
    guide.prompts = {"query": "Q: ", "document": "D: "}
    with pytest.raises(ValueError, match=r"columns: whether 'positive' holds queries is unclear"):
        embed(pairs, guide, tmp_path, ["positive"])
    embedded = embed(pairs.select(range(4)), guide, tmp_path)
    assert_right(embedded, guide, ["anchor"], prompt="Q: ")
    assert_right(embedded, guide, ["positive"], prompt="D: ")


def test_progress_is_told_on_stderr_or_not_at_all(guide, pairs, tmp_path, capsys):
    embed_guide(pairs, guide, cache_dir=tmp_path / "told")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Guide: 128/128 texts, ")
    assert "texts/s, " in err
    assert "tokens/s" in err
    embed(pairs, guide, tmp_path)
    assert capsys.readouterr() == ("", "")


def test_time_left_goes_by_work_not_by_texts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("Guide", 10, 1000, shown=False) as progress:
        now[0] += 8.0
        progress.advance(2, 64, 800)
        assert progress.rates() == "2/10 texts, 0 texts/s, 8 tokens/s"
        assert progress.seconds_left() == 2.0


def test_whose_prompt_is_read(guide):
    guide.prompts, guide.default_prompt_name = {"query": "Q: ", "document": "D: ", "other": "O: "}, "other"
    assert guide_prompt(guide, "anchor", 0, None) == "Q: "
    assert guide_prompt(guide, "positive", 1, None) == "D: "
    assert guide_prompt(guide, "anchor", 0, {"anchor": "mine: "}) == "mine: "
    assert guide_prompt(guide, "positive", 1, {"anchor": "mine: "}) == ""
    assert guide_prompt(guide, "positive", 1, "all: ") == "all: "
    guide.prompts = {"query": None, "document": "", "other": "O: "}
    assert guide_prompt(guide, "anchor", 0, None) == "O: "
