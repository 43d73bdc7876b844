"""A model's fingerprint changes with all that changes its embeddings; a probe sees what it does not hold."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize
from torch import nn

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.guide_columns import Report
from gist_fast.guide_columns.probe import PROBED, allowed
from gist_fast.losses.fingerprint import model_fingerprint
from gist_fast.losses.guide import GuideEncoder, tokenized
from gist_fast.training.collator import GuideTokenizer
from gist_fast.training.resume_checks import FILE, check_settings, run_settings


def adapted(folder, alpha: float, **more) -> SentenceTransformer:
    """A model with an adapter of the same weights every time."""
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(str(folder), device="cpu")
    config = {"task_type": "FEATURE_EXTRACTION", "r": 4, "lora_alpha": alpha, "target_modules": ["query", "value"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(**config, init_lora_weights=False, **more))
    return model


class Shifted(nn.Module):
    """A module of a user's own, whose state no tensor holds."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, features):
        features["sentence_embedding"] = features["sentence_embedding"] + self.by
        return features


class Mirrored(Shifted):
    """One that prints the same and holds the same, and computes something else."""

    def _get_name(self) -> str:
        return "Shifted"

    def forward(self, features):
        features["sentence_embedding"] = self.by - features["sentence_embedding"]
        return features


def embed(pairs, guide, tmp_path, **options):
    """The anchors' embeddings, and how many texts were embedded for them."""
    report = Report()
    data = embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False, report=report, **options)
    return np.array(data["anchor_guide_embedding"]), report.embedded


def assert_own(found, guide, pairs):
    np.testing.assert_allclose(found, guide.encode(pairs["anchor"]), atol=2e-3)


def test_two_adapters_of_equal_weights_and_other_scaling_are_two_guides(tiny_guide, pairs, tmp_path):
    weak, strong = adapted(tiny_guide, 8), adapted(tiny_guide, 64)
    assert all(torch.equal(a, b) for a, b in zip(weak.state_dict().values(), strong.state_dict().values(), strict=True))
    assert np.abs(weak.encode(pairs["anchor"]) - strong.encode(pairs["anchor"])).max() > 0.1
    for guide in (weak, strong, weak):
        assert_own(embed(pairs, guide, tmp_path)[0], guide, pairs)
    assert embed(pairs, strong, tmp_path)[1] == 0, "the second adapter's embeddings are kept too"


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.disable_adapters(),
        lambda model: model[0].model.encoder.layer[0].attention.self.query.scale_layer(3.0),
        lambda model: setattr(model, "truncate_dim", 8),
        lambda model: setattr(model[1], "include_prompt", False),
        lambda model: setattr(model[1], "pooling_mode", "cls"),
        lambda model: model.append(Normalize()),
        lambda model: model.append(Dense(48, 48)),
        lambda model: model.append(Shifted(0.5)),
        lambda model: model.bfloat16(),
    ],
)
def test_what_changes_an_embedding_changes_the_fingerprint(change, tiny_guide):
    model = adapted(tiny_guide, 8)
    before = model_fingerprint(model)
    assert model_fingerprint(adapted(tiny_guide, 8)) == before
    change(model)
    assert model_fingerprint(model) != before


def test_an_own_module_is_told_by_what_it_holds_and_by_its_code(guide):
    guide.append(Shifted(0.5))
    half = model_fingerprint(guide)
    guide[-1].by = 0.75
    assert model_fingerprint(guide) != half
    guide[-1].by = 0.5
    assert model_fingerprint(guide.train()) == half, "whether it is in training is nothing of it"
    guide[-1].__class__ = Mirrored
    assert model_fingerprint(guide) != half


def test_a_quantised_guide_has_a_fingerprint_and_serves(guide, pairs, tmp_path):
    quantised = copy.deepcopy(guide)
    quantised[0].model = torch.ao.quantization.quantize_dynamic(quantised[0].model, {nn.Linear}, dtype=torch.qint8)
    other = copy.deepcopy(quantised)
    assert len({model_fingerprint(model) for model in (guide, quantised)}) == 2
    assert model_fingerprint(other) == model_fingerprint(quantised)
    found, _ = embed(pairs, quantised, tmp_path)
    np.testing.assert_allclose(found, quantised.encode(pairs["anchor"]), atol=0.1)


def test_a_change_that_no_fingerprint_holds_is_seen_by_the_probe(guide, pairs, tmp_path, caplog):
    embed(pairs, guide, tmp_path)
    before = model_fingerprint(guide)
    taken = guide[1].register_forward_hook(lambda m, i, out: {**out, "sentence_embedding": -out["sentence_embedding"]})
    assert model_fingerprint(guide) == before
    with caplog.at_level(logging.WARNING):
        found, count = embed(pairs, guide, tmp_path)
    assert_own(found, guide, pairs)
    assert count == 2 * len(pairs) and "holds other embeddings than this guide makes" in caplog.text
    assert_own(embed(pairs, guide, tmp_path)[0], guide, pairs)
    assert embed(pairs, guide, tmp_path)[1] == 0, "both are kept"
    taken.remove()
    assert_own(embed(pairs, guide, tmp_path)[0], guide, pairs)


def test_the_probe_sees_it_where_only_some_texts_are_known(guide, pairs, tmp_path):
    embed(pairs.select(range(8)), guide, tmp_path)
    guide[1].register_forward_hook(lambda m, i, out: {**out, "sentence_embedding": 2 * out["sentence_embedding"]})
    found, count = embed(pairs, guide, tmp_path)
    assert_own(found, guide, pairs)
    assert count == 2 * len(pairs)


def test_the_probe_reads_few_texts_and_lets_rounding_pass(guide, pairs, monkeypatch, tmp_path, caplog):
    embed(pairs, guide, tmp_path, batch_size=1)
    read: list[str] = []
    preprocess = guide.preprocess
    monkeypatch.setattr(guide, "preprocess", lambda texts, **kw: (read.extend(texts), preprocess(texts, **kw))[1])
    within = allowed(guide) / 2
    guide[1].register_forward_hook(
        lambda m, i, out: {**out, "sentence_embedding": (1 + within) * out["sentence_embedding"]}
    )
    assert embed(pairs, guide, tmp_path)[1] == 0
    assert 0 < len(read) <= 2 * PROBED and not caplog.records
    assert allowed(guide.bfloat16()) > 2 * within


def test_remembered_texts_are_forgotten_when_the_guide_changes(student, tiny_guide, pairs):
    guide = adapted(tiny_guide, 64)
    encoder, tokenize = GuideEncoder(student, guide, remember=True), GuideTokenizer(guide, with_keys=True)
    texts = pairs["anchor"][:6]

    def remembered():
        return encoder.encode_batch([{"guide": tokenize(texts, "", None)}])[0]

    first = remembered()
    assert remembered() is not first and torch.equal(remembered(), first)
    guide.disable_adapters()
    with torch.no_grad():
        bare = guide(tokenized(guide, list(texts)))["sentence_embedding"]
    assert (bare - first).abs().max() > 0.1
    torch.testing.assert_close(remembered(), bare)
    guide.enable_adapters()
    torch.testing.assert_close(remembered(), first)
    with torch.no_grad():
        guide[0].model.embeddings.word_embeddings.weight.mul_(2)
    assert (remembered() - first).abs().max() > 0.1


def test_a_resumed_run_is_refused_another_scaling_and_told_of_an_old_digest(
    student, tiny_guide, pairs, tmp_path, caplog
):
    def settings(alpha):
        arguments = GISTTrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
        return run_settings(GISTTrainer(student, arguments, pairs, guide=adapted(tiny_guide, alpha)))

    before, now = settings(8), settings(64)
    file = tmp_path / FILE
    file.write_text(json.dumps(before))
    check_settings(tmp_path, settings(8), accept=False)
    assert not caplog.records
    with pytest.raises(ValueError, match=r"loss\.guide was '\w{32}', is '\w{32}'"):
        check_settings(tmp_path, now, accept=False)
    file.write_text(json.dumps({**before, "loss.guide": "0123456789abcdef"}))
    check_settings(tmp_path, settings(8), accept=False)
    assert "digest of a guide cannot be compared" in caplog.text
