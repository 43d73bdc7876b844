"""What a guide, its columns and its settings may be, and what everybody else is told, before anything runs."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.bench import isolated
from gist_fast.guide_columns import share
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.losses.guide import GuideEncoder
from gist_fast.training.collator import GISTDataCollator, GuideTokenizer


def arguments(tmp_path, **more):
    return GISTTrainingArguments(
        str(tmp_path / "run"), report_to=[], use_cpu=True, per_device_train_batch_size=16, disable_tqdm=True, **more
    )


COUNT = "expected a whole number of at least 1, or None"


@pytest.mark.parametrize(
    ("wrong", "kind", "says"),
    [
        ({"batch_size": "8"}, TypeError, rf"batch_size: {COUNT}, got '8' of type str"),
        (
            {"batch_size": 1.5},
            TypeError,
            r"batch_size: expected a whole number of at least 1, or None, got 1.5 of type float",
        ),
        (
            {"batch_size": True},
            TypeError,
            r"batch_size: expected a whole number of at least 1, or None, got True of type bool",
        ),
        (
            {"batch_tokens": 1e9},
            TypeError,
            r"batch_tokens: expected a whole number of at least 1, or None, got 1000000000.0 of type float",
        ),
        (
            {"max_length": "12"},
            TypeError,
            r"max_length: expected a whole number of at least 1, or None, got '12' of type str",
        ),
        (
            {"max_length": 3.7},
            TypeError,
            r"max_length: expected a whole number of at least 1, or None, got 3.7 of type float",
        ),
        (
            {"max_length": True},
            TypeError,
            r"max_length: expected a whole number of at least 1, or None, got True of type bool",
        ),
        ({"max_length": np.int64(0)}, ValueError, r"max_length: expected at least 1, or None, got 0"),
        ({"dtype": ["float16"]}, ValueError, r"dtype: expected one of 'float16', 'float32', got \['float16'\]"),
        ({"prompts": 5}, TypeError, r"prompts: expected one text .*, \{column: text\}, or None, got 5 of type int"),
        ({"prompts": ["a"]}, TypeError, r"prompts: expected one text .*, got \['a'\] of type list"),
        (
            {"prompts": {"anchor": 5}},
            TypeError,
            r"prompts: expected a text, perhaps an empty one, for 'anchor', got 5 of type int",
        ),
        ({"columns": 3}, TypeError, r"columns: expected a list of names, or None, got 3 of type int"),
        ({"columns": [1]}, TypeError, r"columns: expected names of columns, got 1 of type int"),
        (
            {"columns": ["anchor", "anchor"]},
            ValueError,
            r"columns: expected each name once, got 'anchor' more than once",
        ),
        ({"cache_dir": 5}, TypeError, r"cache_dir: expected the path of a folder, or None, got 5 of type int"),
        ({"report": 3}, TypeError, r"report: expected a gist_fast.guide_columns.Report, got 3 of type int"),
        (
            {"guide": "guide"},
            TypeError,
            r"guide: expected a SentenceTransformer, as SentenceTransformer\('guide'\), got str\.",
        ),
        ({"guide": None}, TypeError, r"guide: expected a SentenceTransformer, got NoneType\.$"),
        ({"guide": torch.nn.Linear(2, 2)}, TypeError, r"guide: expected a SentenceTransformer, got Linear\.$"),
    ],
)
def test_arguments_of_a_wrong_type(wrong, kind, says, guide, pairs, tmp_path):
    options = {"guide": guide, "cache_dir": tmp_path / "cache", "show_progress_bar": False, **wrong}
    with pytest.raises(kind, match="^" + says) as caught:
        embed_guide(pairs, **options)
    assert type(caught.value).__module__ == "gist_fast.runtime.errors"
    assert not (tmp_path / "cache").exists()


def test_whole_numbers_of_other_kinds_are_taken(guide, pairs, tmp_path):
    few = pairs.select(range(3))
    options = {"cache_dir": str(tmp_path), "show_progress_bar": False, "columns": ("anchor",)}
    one = embed_guide(few, guide, batch_size=np.int32(2), max_length=np.int64(9), **options)
    np.testing.assert_array_equal(
        one[0]["anchor_guide_embedding"], embed_guide(few, guide, max_length=9, **options)[0]["anchor_guide_embedding"]
    )


@pytest.mark.parametrize("loss", [GISTEmbedLoss, CachedGISTEmbedLoss])
@pytest.mark.parametrize("wrong", ["guide", 3, torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_refused_by_losses_and_trainer(loss, wrong, student, guide, pairs, tmp_path):
    says = f"expected a SentenceTransformer.*, got {type(wrong).__name__}"
    with pytest.raises(TypeError, match=f"^guide: {says}"):
        loss(student, wrong)
    with pytest.raises(TypeError, match=f"^model: {says}"):
        loss(wrong, guide)
    with pytest.raises(TypeError, match=f"^guide: {says}"):
        GISTTrainer(student, arguments(tmp_path), pairs, guide=wrong)


@pytest.mark.parametrize("length", [65, {"positive": 65}])
def test_a_maximum_length_above_the_guides_positions_is_refused_at_once(length, student, guide, pairs, tmp_path):
    settings = arguments(tmp_path, guide_max_length=length)
    says = r"^guide_max_length(\.positive)?: expected at most 64, the positions that the guide has, got 65"
    with pytest.raises(ValueError, match=says):
        GISTTrainer(student, settings, pairs, guide=guide)
    with pytest.raises(ValueError, match=says):
        GISTTrainer(student, settings, pairs, loss=lambda model: GISTEmbedLoss(model, guide))
    GISTTrainer(student, arguments(tmp_path, guide_max_length=64), pairs, guide=guide)


@pytest.mark.parametrize("own_tokens", [True, False], ids=["raw texts", "the student's tokens"])
def test_the_guides_width_counts_in_the_loop_as_in_the_columns(own_tokens, student, guide, pairs, tmp_path):
    guide.truncate_dim = 16
    embedded = embed_guide(pairs, guide, dtype="float32", cache_dir=tmp_path, show_progress_bar=False)
    tokenize = GuideTokenizer(guide) if own_tokens else None
    rows = [pairs[k] for k in range(20)]
    batch = GISTDataCollator(preprocess_fn=student.preprocess, tokenize_for_guide=tokenize)(rows)
    columns = [{k[len(c) + 1 :]: v for k, v in batch.items() if k.startswith(f"{c}_")} for c in pairs.column_names]
    for column, found in zip(pairs.column_names, GuideEncoder(student, guide).encode_batch(columns), strict=True):
        assert found.shape == (20, 16)
        expected = np.stack([embedded[k][f"{column}_guide_embedding"] for k in range(20)])
        if own_tokens:
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)
        else:
            ids = student.preprocess([row[column] for row in rows])["input_ids"]
            texts = student.tokenizer.batch_decode(ids, skip_special_tokens=True)
            np.testing.assert_allclose(found.numpy(), guide.encode(texts), rtol=1e-4, atol=1e-5)


def routed(student, guide):
    """A guide that reads queries by one model and documents by another."""
    router = Router.for_query_document(list(guide.children()), [guide[0], guide[1]])
    return SentenceTransformer(modules=[router], device="cpu")


def test_a_guide_with_routes_for_queries_and_documents_is_refused(student, guide, pairs, tmp_path):
    says = r"^guide: its Router has a route of its own for document and query, .* Use a guide without a Router"
    asymmetric = routed(student, guide)
    with pytest.raises(ValueError, match=says):
        embed_guide(pairs, asymmetric, cache_dir=tmp_path, show_progress_bar=False)
    with pytest.raises(ValueError, match=says):
        GISTEmbedLoss(student, asymmetric)
    with pytest.raises(ValueError, match=says):
        GISTTrainer(student, arguments(tmp_path), pairs, guide=asymmetric)
    with pytest.raises(ValueError, match=says):
        GuideTokenizer(asymmetric)
    # By what a text is, not by its part in the data.
    by_kind = SentenceTransformer(modules=[Router({"text": list(guide.children())})], device="cpu")
    few = pairs.select(range(3))
    one, other = (embed_guide(few, model, cache_dir=tmp_path, show_progress_bar=False)[2] for model in (by_kind, guide))
    np.testing.assert_allclose(one["anchor_guide_embedding"], other["anchor_guide_embedding"], rtol=2e-3, atol=1e-5)


def test_only_datasets_with_a_guided_loss_need_embeddings(student, guide, pairs, tmp_path):
    embedded = embed_guide(pairs, guide, cache_dir=tmp_path, show_progress_bar=False)
    half = embed_guide(pairs, guide, ["anchor"], cache_dir=tmp_path, show_progress_bar=False)
    settings = arguments(tmp_path, max_steps=4, save_strategy="no", logging_steps=1)
    plain = MultipleNegativesRankingLoss(student)
    losses = {"x": GISTEmbedLoss(student, None), "y": plain}
    for other in (pairs, half):
        trainer = GISTTrainer(student, settings, DatasetDict({"x": embedded, "y": other}), loss=losses)
        trainer.train()
        assert trainer.state.global_step == 4
    both = {"x": GISTEmbedLoss(student, None), "y": GISTEmbedLoss(student, None)}
    says = (
        r"columns anchor of train_dataset\['x'\], positive of train_dataset\['x'\] have guide embeddings, but anchor "
        r"of train_dataset\['y'\], positive of train_dataset\['y'\] do not"
    )
    with pytest.raises(ValueError, match=says):
        GISTTrainer(student, settings, DatasetDict({"x": embedded, "y": pairs}), loss=both)
    with pytest.raises(ValueError, match=r"have guide embeddings, but anchor of eval_dataset, positive of eval_dat"):
        GISTTrainer(student, settings, embedded, pairs)


def waits(rank, folder):
    import torch.distributed as dist

    from gist_fast.guide_columns.share import Team

    short = timedelta(seconds=3)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=short)
    team = Team()
    assert Team()._group is team._group
    value = team.first(lambda: (time.sleep(4), "done")[1])
    both = team.together(lambda: (time.sleep(4 * rank), rank)[1])
    dist.destroy_process_group()
    assert (value, both) == ("done", [0, 1])


@pytest.mark.slow
def test_processes_wait_longer_than_a_step_may_take(tmp_path):
    context = isolated._context()  # forked from a process that has imported torch
    processes = [context.Process(target=waits, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert timedelta(days=1) < share.PATIENCE
