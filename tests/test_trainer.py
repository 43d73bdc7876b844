"""The losses in sentence-transformers' own trainer, and `GISTTrainer` on top of it."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import TrainerCallback

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.losses.mini_batches import default_tokens


def arguments(tmp_path, cls=GISTTrainingArguments, **kwargs):
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return cls(**{**defaults, **kwargs})


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(first, second):
    return all(torch.equal(first[n], second[n]) for n in first)


@pytest.fixture
def evaluator(pairs):
    return InformationRetrievalEvaluator(
        queries={str(i): t for i, t in enumerate(pairs["anchor"])},
        corpus={str(i): t for i, t in enumerate(pairs["positive"])},
        relevant_docs={str(i): {str(i)} for i in range(len(pairs))},
        name="pairs",
    )


@pytest.mark.parametrize("loss", [GISTEmbedLoss, CachedGISTEmbedLoss])
@pytest.mark.parametrize("sampler", ["batch_sampler", "no_duplicates"])
def test_the_stock_trainer_trains_with_it(loss, sampler, student, guide, pairs, evaluator, tmp_path):
    before = weights(student)
    guide_before = weights(guide)
    trainer = SentenceTransformerTrainer(
        student,
        arguments(
            tmp_path, SentenceTransformerTrainingArguments, batch_sampler=sampler, eval_strategy="steps", eval_steps=2
        ),
        pairs,
        eval_dataset=pairs,
        loss=loss(student, guide),
        evaluator=evaluator,
    )
    trainer.train()
    assert not same(before, weights(student))
    assert same(guide_before, weights(guide))
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimized == {id(p) for p in student.parameters()}
    logged = [set(entry) for entry in trainer.state.log_history]
    assert any({"eval_loss", "eval_pairs_cosine_ndcg@10"} <= entry for entry in logged)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"loss:{loss.__name__}" in card
    assert "2402.16829" in card


def test_the_guide_reads_raw_texts_with_its_own_prompt_and_length(student, guide, tmp_path):
    texts = {"anchor": ["Ça VA bien?"] * 4, "positive": [" ".join(["Tout va très bien"] * 20)] * 4}
    guide.prompts = {"query": "Suche: ", "document": "Text: "}
    seen = []
    preprocess = guide.preprocess
    guide.preprocess = lambda inputs, prompt=None, **kw: (
        seen.append((inputs[0], prompt)),
        preprocess(inputs, prompt=prompt, **kw),
    )[1]
    lengths = []
    forward = guide.forward
    guide.forward = lambda features, **kw: (lengths.append(features["input_ids"].shape[1]), forward(features, **kw))[1]
    for limit, longest in ((None, guide.max_seq_length), (9, 9)):
        seen.clear(), lengths.clear()
        trainer = GISTTrainer(
            student,
            arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, guide_max_length=limit),
            Dataset.from_dict(texts),
            guide=guide,
        )
        trainer.train()
        # The student's prompt, case folding and 48 tokens play no part.
        assert seen == [(texts["anchor"][0], "Suche: "), (texts["positive"][0], "Text: ")]
        assert max(lengths) == longest


def test_guide_columns_give_the_training_run_of_the_guide_itself(tiny_student, guide, pairs, tmp_path):
    results = []
    embedded = embed_guide(pairs, guide, dtype="float32", cache_dir=tmp_path / "cache", show_progress_bar=False)
    for dataset, teacher in ((pairs, guide), (embedded, None)):
        model = SentenceTransformer(str(tiny_student), device="cpu")
        trainer = GISTTrainer(model, arguments(tmp_path, temperature=0.1), dataset, guide=teacher)
        trainer.train()
        results.append((trainer.state.log_history, weights(model)))
    for first, second in zip(results[0][0], results[1][0], strict=True):
        for key in {"loss", "masked_ap", "masked_aa", "masked_pp"} & set(first):
            assert first[key] == pytest.approx(second[key], rel=1e-4, abs=1e-6)
    for name, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][name], rtol=0, atol=1e-4)


def test_logs_carry_what_the_guide_did(student, guide, pairs, tmp_path):
    trainer = GISTTrainer(student, arguments(tmp_path, temperature=0.1), pairs, guide=guide)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 4
    for entry in steps:
        shares = [entry[f"masked_{block}"] for block in ("ap", "aa", "pp")]
        assert all(0 <= share <= 1 for share in shares)
        assert sum(shares) > 0
        assert -1 <= entry["hardest_negative_similarity"] <= 1


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_built_from_the_arguments(cached, student, guide, pairs, tmp_path):
    options = {"temperature": 0.07, "margin": 0.1, "margin_strategy": "relative", "contrast_anchors": False}
    options |= {"contrast_positives": False, "backend": "reference", "mask_bits": "recompute"}
    sizes = {"mini_batch_size": 6} if cached else {}
    trainer = GISTTrainer(student, arguments(tmp_path, **options, **sizes), pairs, guide=guide)
    assert type(trainer.loss) is CachedGISTEmbedLoss
    assert (trainer.loss.mini_batch_num_tokens, trainer.loss.activation_memory.limit) == (
        None if cached else default_tokens(torch.device("cpu")),
        "auto",
    )
    for name, value in {**options, **sizes}.items():
        assert getattr(trainer.loss, name) == value
    assert trainer.loss.guide is guide
    assert trainer.loss.guided


def test_a_static_student_cannot_be_cut_and_need_not_be(guide, pairs, tmp_path):
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(0)
    student = SentenceTransformer(modules=[StaticEmbedding(guide.tokenizer, embedding_dim=16)], device="cpu")
    before = weights(student)
    embedded = embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
    trainer = GISTTrainer(student, arguments(tmp_path, max_steps=1), embedded)
    assert type(trainer.loss) is GISTEmbedLoss
    trainer.train()
    assert not same(before, weights(student))


def test_unguided_beside_guide_columns(student, guide, pairs, tmp_path):
    embedded = embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
    trainer = GISTTrainer(student, arguments(tmp_path, max_steps=1), embedded, guided=False)
    trainer.train()
    assert [e["masked_ap"] for e in trainer.state.log_history if "loss" in e] == [0.0]
    with pytest.raises(ValueError, match="guide: the dataset carries embeddings of a guide already"):
        GISTTrainer(student, arguments(tmp_path), embedded, guide=guide)
    with pytest.raises(ValueError, match="guided: expected True with a guide, got False"):
        GISTTrainer(student, arguments(tmp_path), pairs, guide=guide, guided=False)


def test_no_guide_at_all_and_the_student_as_one(student, pairs, tmp_path, run_command, tiny_student):
    with pytest.raises(
        ValueError, match=r"^self_guided: expected False where training without any guide was asked for"
    ):
        GISTTrainer(student, arguments(tmp_path, self_guided=True), pairs, guided=False)
    assert GISTTrainer(student, arguments(tmp_path, self_guided=True), pairs).loss.guided
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"{{student: {tiny_student}, guide: null, data: {{train: pairs.jsonl}}, loss: {{self_guided: true}}, "
        "training: {output_dir: out, use_cpu: true}}"
    )
    result = run_command("train", config)
    assert result.code == 2
    assert "self_guided: expected False where training without any guide" in result.err.splitlines()[-1]
    assert "'guide: null' in a configuration" in result.err.splitlines()[-1]


def test_a_loss_that_remembers_gets_the_texts_names(student, guide, pairs, tmp_path):
    loss = CachedGISTEmbedLoss(student, guide, guide_cache=True)
    trainer = GISTTrainer(student, arguments(tmp_path, max_steps=1), pairs, loss=loss)
    trainer.train()
    assert [len(memory) for memory in loss._encoder._memories.values()] == [32]


def test_arguments_that_contradict(student, guide, pairs, tmp_path):
    with pytest.raises(ValueError, match="mini_batch_num_tokens: expected None with mini_batch_size 8, got 64"):
        GISTTrainer(student, arguments(tmp_path, mini_batch_size=8, mini_batch_num_tokens=64), pairs, guide=guide)
    with pytest.raises(ValueError, match="mini_batch_size: expected an int of at least 1, got 0"):
        GISTTrainer(student, arguments(tmp_path, mini_batch_size=0), pairs, guide=guide)
    with pytest.raises(ValueError, match=r"prompts: .*'achor'|prompts.*achor"):
        GISTTrainer(student, arguments(tmp_path, prompts={"achor": "query: "}), pairs, guide=guide)


def test_a_new_model_gets_a_loss_of_the_present_arguments(tiny_student, guide, pairs, tmp_path):
    args = arguments(tmp_path, max_steps=1)
    trainer = GISTTrainer(
        args=args,
        train_dataset=pairs,
        guide=guide,
        model_init=lambda: SentenceTransformer(str(tiny_student), device="cpu"),
    )
    args.temperature = 0.5
    trainer.train()
    assert trainer.loss.temperature == 0.5


def test_without_a_guide_it_says_so(student, pairs, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "gist_fast"):
        trainer = GISTTrainer(student, arguments(tmp_path, max_steps=1), pairs)
    assert "No guide, and no guide embeddings" in caplog.text
    trainer.train()
    assert [e["masked_ap"] for e in trainer.state.log_history if "loss" in e] == [0.0]


def test_a_loss_of_ones_own_brings_its_guide(student, guide, pairs, tmp_path):
    loss = MatryoshkaLoss(student, GISTEmbedLoss(student, guide), [32, 16])
    with pytest.raises(ValueError, match="guide: a loss was given too"):
        GISTTrainer(student, arguments(tmp_path), pairs, loss=loss, guide=guide)
    trainer = GISTTrainer(student, arguments(tmp_path, max_steps=1), pairs, loss=loss)
    assert trainer.data_collator.tokenize_for_guide.guide is guide
    trainer.train()
    assert any("masked_pp" in entry for entry in trainer.state.log_history)


def test_a_loss_made_by_a_function_of_the_model_reads_raw_texts_too(student, guide, pairs, tmp_path):
    args = arguments(tmp_path, max_steps=1, guide_max_length=9)
    trainer = GISTTrainer(student, args, pairs, loss=lambda model: GISTEmbedLoss(model, guide))
    assert trainer.data_collator.tokenize_for_guide.guide is guide
    assert trainer.data_collator.tokenize_for_guide.max_length == 9


def test_half_embedded_datasets_are_refused(student, guide, pairs, tmp_path):
    half = embed_guide(pairs, guide, ["anchor"], cache_dir=tmp_path, show_progress_bar=False)
    with pytest.raises(ValueError, match=r"columns anchor have guide embeddings, but positive do not"):
        GISTTrainer(student, arguments(tmp_path), half)


def test_several_datasets_and_duplicates_with_guide_columns(student, guide, pairs, tmp_path):
    embedded = embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
    parts = DatasetDict({"one": embedded.select(range(32)), "two": embedded.select(range(32, 64))})
    trainer = GISTTrainer(
        student,
        arguments(tmp_path, batch_sampler="no_duplicates", prompts={"one": {"anchor": "q: "}, "two": {}}),
        parts,
    )
    trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("precision", [{}, {"bf16": True, "use_cpu": True}], ids=["float32", "bfloat16"])
def test_resumed_training_ends_in_the_same_weights(precision, tiny_student, guide, pairs, tmp_path):
    def train(folder, **kwargs):
        torch.manual_seed(3)
        model = SentenceTransformer(str(tiny_student), device="cpu")
        resume = kwargs.pop("resume", None)
        stop = kwargs.pop("stop_after", None)
        args = arguments(folder, save_strategy="steps", save_steps=2, max_steps=6, **precision, **kwargs)
        trainer = GISTTrainer(model, args, pairs, guide=guide)
        if stop:
            trainer.add_callback(_StopAfter(stop))
        trainer.train(resume_from_checkpoint=resume)
        return weights(model)

    whole = train(tmp_path / "whole")
    train(tmp_path / "parts", stop_after=4)
    resumed = train(tmp_path / "parts", resume=str(tmp_path / "parts" / "run" / "checkpoint-4"))
    assert same(whole, resumed)


def test_the_best_model_is_kept_and_loads_in_plain_sentence_transformers(student, guide, pairs, evaluator, tmp_path):
    args = arguments(
        tmp_path,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_pairs_cosine_ndcg@10",
        report_to=["tensorboard"],
    )
    trainer = GISTTrainer(student, args, pairs, guide=guide, evaluator=evaluator)
    trainer.train()
    scores = [e["eval_pairs_cosine_ndcg@10"] for e in trainer.state.log_history if "eval_pairs_cosine_ndcg@10" in e]
    assert trainer.state.best_metric == pytest.approx(max(scores))
    trainer.save_model(str(tmp_path / "final"))
    loaded = SentenceTransformer(str(tmp_path / "final"), device="cpu")
    text = pairs["anchor"][:3]
    torch.testing.assert_close(
        loaded.encode(text, convert_to_tensor=True), student.encode(text, convert_to_tensor=True)
    )
    assert list(tmp_path.rglob("events.out.tfevents*"))


class _StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
