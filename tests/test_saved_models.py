"""What a saved model is, is told before its weights are read; what cannot be used is refused, the rest works."""

from __future__ import annotations

import copy
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding
from transformers import (
    AutoTokenizer,
    BartConfig,
    BartModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from gist_fast import GISTTrainer, GISTTrainingArguments, embed_guide
from gist_fast.data.per_column import guide_prompt, positions
from gist_fast.losses import GISTEmbedLoss
from gist_fast.pipeline.saved_model import SavedModel
from gist_fast.runtime.errors import InputError

POOL = """\
from sentence_transformers.sentence_transformer.modules import Pooling
from .shift import SHIFT


class Moved(Pooling):
    def forward(self, features):
        out = super().forward(features)
        out["sentence_embedding"] = out["sentence_embedding"] + SHIFT
        return out
"""


@pytest.fixture
def run(run_command, tmp_path, pairs, tiny_student, tiny_guide):
    """Call ``gist-fast train`` on small pairs with another student or guide, and further options."""
    pairs.to_json(tmp_path / "pairs.jsonl")
    training = {"output_dir": "out", "max_steps": 2, "per_device_train_batch_size": 8, "use_cpu": True}
    config = {"student": str(tiny_student), "guide": str(tiny_guide), "data": {"train": "pairs.jsonl"}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**config, "training": {**training, "report_to": "none", "save_steps": 1}}))

    def call(*options, **paths):
        named = [part for role, path in paths.items() for part in (f"--{role}.path", path)]
        return run_command("train", file, *named, *options)

    return call


def copied(folder, to, *without: str):
    shutil.copytree(folder, to)
    for name in without:
        (shutil.rmtree if (to / name).is_dir() else os.remove)(to / name)
    return to


def assert_refused(result, *parts: str):
    lines = [line for line in result.err.splitlines() if line.startswith("gist-fast: ")]
    assert result.code == 2 and len(lines) == 1 and not result.out
    for part in parts:
        assert part in lines[0]


def plain(model, tokenizer, folder, length: int | None):
    """A folder of plain transformers, whose tokenizer says which length it reads, or none."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("model_max_length", None)
    settings |= {} if length is None else {"model_max_length": length}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def tokenizer(tiny_guide):
    return AutoTokenizer.from_pretrained(tiny_guide)


@pytest.fixture
def adapter(tiny_student, tmp_path):
    peft = pytest.importorskip("peft")
    model = SentenceTransformer(str(tiny_student), device="cpu")
    config = {"task_type": "FEATURE_EXTRACTION", "r": 4, "target_modules": ["query", "value"]}
    model.add_adapter(peft.LoraConfig(**config, init_lora_weights=False))
    model.save(str(tmp_path / "adapter"), create_model_card=False)
    return tmp_path / "adapter"


@pytest.fixture
def with_code(tiny_student, tmp_path):
    """A model whose pooling only its own folder has, in two files."""
    folder = copied(tiny_student, tmp_path / "with_code")
    (folder / "pool.py").write_text(POOL)
    (folder / "shift.py").write_text("SHIFT = 0.25\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "pool.Moved"
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


class TestAdapters:
    def test_a_saved_adapter_is_trained_on(self, run, adapter, tiny_student, tmp_path):
        assert "the student's own, on" in run("--dry-run", student=adapter).out
        assert run(student=adapter).code == 0
        before, after = (
            load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out/final")
        )
        assert before.keys() == after.keys() and not any(torch.equal(before[name], after[name]) for name in before)
        model = SentenceTransformer(str(tmp_path / "out" / "final"), device="cpu")
        base = SentenceTransformer(str(tiny_student), device="cpu").state_dict()
        own = model[0].model.embeddings.word_embeddings.weight
        assert torch.equal(own, base["0.model.embeddings.word_embeddings.weight"]), "the base is left alone"

    def test_another_adapter_on_it_is_refused_with_a_remedy_that_works(self, run, adapter):
        assert_refused(run("--student.lora.r", "4", "--dry-run", student=adapter), "student.lora", "leave lora out")

    def test_one_whose_base_is_gone_is_refused(self, run, adapter, tmp_path):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/not/here"}))
        assert_refused(run("--dry-run", student=adapter), "its base model", "/not/here: no such folder")

    def test_a_frozen_student_is_refused_by_name(self, student, guide, pairs, adapter, tmp_path):
        arguments = GISTTrainingArguments(tmp_path / "run", report_to="none", use_cpu=True, max_steps=2)
        loaded = SentenceTransformer(str(adapter), device="cpu")
        with pytest.raises(InputError, match=r"all \d+ are frozen \('0\..*model.set_adapter\('default'\)"):
            GISTTrainer(loaded, arguments, pairs, guide=guide)
        loaded.set_adapter("default")
        GISTTrainer(loaded, arguments, pairs, guide=guide)
        student.requires_grad_(False)
        learns = GISTEmbedLoss(student, guide, temperature=torch.nn.Parameter(torch.tensor(0.05)))
        with pytest.raises(InputError, match="are frozen"):
            GISTTrainer(student, arguments, pairs, loss=learns)
        trainer = GISTTrainer(student.requires_grad_(True), arguments, pairs, guide=guide)
        student.requires_grad_(False)
        with pytest.raises(InputError, match="are frozen"):
            trainer.train()


class TestPrompts:
    @pytest.mark.parametrize(
        ("prompts", "default", "expected"),
        [
            ({"query": "q: ", "passage": "p: "}, None, ("q: ", "p: ")),
            ({"query": "q: ", "corpus": "c: "}, None, ("q: ", "c: ")),
            ({"passage": "p: ", "document": "d: ", "corpus": "c: "}, None, ("", "d: ")),
            ({"query": "q: ", "document": ""}, "query", ("q: ", "")),
            ({"sts": "s: "}, "sts", ("s: ", "s: ")),
            ({"sts": "s: "}, None, ("", "")),
        ],
    )
    def test_columns_are_read_as_encode_query_and_encode_document_read(
        self, prompts, default, expected, guide, tmp_path
    ):
        guide.prompts, guide.default_prompt_name = dict(prompts), default
        found = tuple(guide_prompt(guide, name, place, None) for place, name in enumerate("ab"))
        assert found == expected
        read = guide.encode_query("ice"), guide.encode_document("ice")
        for prompt, embedding in zip(found, read, strict=True):
            np.testing.assert_allclose(guide.encode("ice", prompt=prompt), embedding, atol=1e-6)
        guide.save(str(tmp_path / "guide"), create_model_card=False)
        # Loading adds empty prompts for both sides.
        for known in (
            SentenceTransformer(str(tmp_path / "guide"), device="cpu"),
            SavedModel(tmp_path / "guide", "guide"),
        ):
            assert tuple(guide_prompt(known, name, place, None) for place, name in enumerate("ab")) == expected

    def test_the_dry_run_shows_them(self, run, guide, tmp_path):
        guide.prompts = {"query": "query: ", "passage": "passage: "}
        guide.save(str(tmp_path / "guide"), create_model_card=False)
        result = run("--student.prompts", "{positive: 'p: '}", "--dry-run", "--json", guide=tmp_path / "guide")
        told = json.loads(result.out)
        assert told["student_prompts"] == {"anchor": "", "positive": "p: "}
        assert told["guide_prompts"] == {"anchor": "query: ", "positive": "passage: "}


class TestPositions:
    def test_places_that_are_not_used_are_counted(self, guide):
        small = {"vocab_size": 20, "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        roberta = RobertaModel(RobertaConfig(**small, max_position_embeddings=66, pad_token_id=1))
        assert positions(roberta) == 64
        sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
        assert positions(BartModel(BartConfig(**sizes))) == 32
        assert positions(guide) == 64
        assert positions(T5EncoderModel(T5Config(vocab_size=20, d_model=8, num_layers=1, num_heads=1))) is None
        ids = torch.full((1, 64), 5)
        roberta(ids)
        with pytest.raises((IndexError, RuntimeError)):
            roberta(torch.full((1, 65), 5))

    def test_above_them_nothing_starts(self, run, run_command, tmp_path, tiny_guide, student, guide, pairs):
        assert_refused(
            run("--student.max_seq_length", "49", "--dry-run"), "student.max_seq_length", "at most 48", "got 49"
        )
        assert_refused(run("--guide.max_seq_length", "65", "--dry-run"), "guide.max_seq_length", "at most 64", "got 65")
        assert_refused(run("--training.max_length", "49", "--dry-run"), "max_length", "at most 48", "got 49")
        data = tmp_path / "pairs.jsonl"
        option = ("--guide-max-length", 65)
        assert_refused(
            run_command("inspect", "--data", data, "--guide", tiny_guide, *option), "--guide-max-length", "64"
        )
        command = ("embed-guide", data, "--guide", tiny_guide, "--output", tmp_path / "embedded", "--max-length", 65)
        assert_refused(run_command(*command), "--max-length: expected at most 64")
        student.max_seq_length = 49
        arguments = GISTTrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
        with pytest.raises(InputError, match=r"model\.max_seq_length: expected at most 48"):
            GISTTrainer(student, arguments, pairs, guide=guide)

    def test_a_model_that_says_too_much_itself(self, run, run_command, tokenizer, tmp_path):
        """A tokenizer without a length: sentence-transformers takes all 66 places, of which 64 can be used."""
        config = {"vocab_size": len(tokenizer), "hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        roberta = RobertaModel(RobertaConfig(**config, max_position_embeddings=66, pad_token_id=1))
        folder = plain(roberta, tokenizer, tmp_path / "roberta", None)
        assert SentenceTransformer(str(folder), device="cpu").max_seq_length == 66
        assert_refused(run("--dry-run", student=folder), "reads 66 tokens", "set student.max_seq_length to at most 64")
        assert_refused(run("--dry-run", guide=folder), "set guide.max_seq_length to at most 64")
        rows = [json.dumps({"anchor": f"{c} " * 90, "positive": f"{d} " * 90}) for c, d in ("ab", "cd", "ef")]
        (tmp_path / "long.jsonl").write_text("\n".join(rows))
        short = ("--student.max_seq_length", "64", "--data.train.path", tmp_path / "long.jsonl")
        assert run(*short, student=folder).code == 0
        measured = run_command("evaluate", folder, "--pairs", tmp_path / "long.jsonl", "--device", "cpu")
        assert measured.code == 0 and "reads 64 tokens of a text, not 66" in measured.err

    def test_a_guide_without_a_known_length_serves(self, run, tokenizer, tmp_path, pairs):
        t5 = T5EncoderModel(T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
        folder = plain(t5, tokenizer, tmp_path / "t5", None)
        guide = SentenceTransformer(str(folder), device="cpu")
        assert guide.max_seq_length > 1e29
        embedded = embed_guide(pairs, guide, cache_dir=tmp_path / "cache", show_progress_bar=False)
        found = np.array(embedded["anchor_guide_embedding"])
        np.testing.assert_allclose(found, guide.encode(pairs["anchor"]), atol=2e-3)
        assert run(guide=folder).code == 0


class TestOwnCode:
    def test_it_travels_with_the_model(self, run, with_code, tmp_path):
        trusted = ("--student.trust_remote_code", "true")
        result = run(*trusted, student=with_code)
        assert result.code == 0 and 'final", trust_remote_code=True)' in result.out
        for folder in ("final", "checkpoint-1"):
            held = tmp_path / "out" / folder
            assert (held / "pool.py").read_text() == POOL and (held / "shift.py").is_file()
        model = SentenceTransformer(str(tmp_path / "out/final"), trust_remote_code=True, device="cpu")
        assert type(model[1]).__name__ == "Moved"
        # It resumes, and loads the best model at its end.
        more = (
            "--training.load_best_model_at_end",
            "true",
            "--training.eval_strategy",
            "steps",
            "--training.eval_steps",
        )
        more += ("1", "--data.eval", str(tmp_path / "pairs.jsonl"))
        assert run(*trusted, *more, "--training.max_steps", "3", "--resume", student=with_code).code == 0

    def test_nothing_of_it_runs_unless_it_is_trusted(self, run, run_command, with_code, tmp_path, pairs):
        (with_code / "shift.py").write_text("raise SystemExit('it ran')\n")
        remedy = ("comes with code of its own (pool.Moved)", "set student.trust_remote_code: true.")
        for more in ((), ("--dry-run",)):
            assert_refused(run(*more, student=with_code), *remedy)
        assert_refused(run(guide=with_code), "set guide.trust_remote_code: true.")
        pairs.to_json(tmp_path / "pairs.jsonl")
        data, out = tmp_path / "pairs.jsonl", tmp_path / "embedded"
        for command in (
            ("evaluate", with_code, "--pairs", data),
            ("inspect", "--data", data, "--guide", with_code),
            ("embed-guide", data, "--guide", with_code, "--output", out),
        ):
            assert_refused(run_command(*command), "set --trust-remote-code.")
        (with_code / "shift.py").write_text("SHIFT = 0.25\n")
        result = run_command("evaluate", with_code, "--pairs", data, "--trust-remote-code", "--device", "cpu")
        assert result.code == 0
        result = run_command("inspect", "--data", data, "--guide", with_code, "--trust-remote-code", "--device", "cpu")
        assert result.code == 0

    def test_a_best_model_that_does_not_load_is_no_success(self, student, guide, pairs, tmp_path):
        arguments = GISTTrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
        trainer = GISTTrainer(student, arguments, pairs, guide=guide)
        trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
        with pytest.raises(RuntimeError, match="the best model cannot be loaded"):
            trainer._load_best_model()


class TestFiles:
    @pytest.mark.parametrize(
        ("missing", "says"),
        [
            ("model.safetensors", "there are no weights"),
            ("1_Pooling", "1_Pooling/config.json is missing"),
            ("config.json", "config.json is missing"),
        ],
    )
    def test_a_half_saved_model_is_refused_by_the_dry_run(self, missing, says, run, tiny_student, tmp_path):
        folder = copied(tiny_student, tmp_path / "half", missing)
        assert_refused(run("--dry-run", student=folder), "is no whole model", says)

    def test_weights_that_are_cut_off_too(self, run, tiny_student, tmp_path):
        folder = copied(tiny_student, tmp_path / "cut")
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        assert_refused(run("--dry-run", student=folder), "model.safetensors is damaged or cut off")

    def test_shards_that_an_index_names_are_all_there(self, run, tiny_student, tmp_path):
        folder = copied(tiny_student, tmp_path / "shards", "model.safetensors")
        index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
        assert_refused(run("--dry-run", student=folder), "names model-00002-of-00002.safetensors, which is missing")

    def test_a_model_without_its_vocabulary_is_refused(self, run, tiny_student, tmp_path):
        folder = copied(tiny_student, tmp_path / "none", "tokenizer.json", "tokenizer_config.json")
        assert_refused(run("--dry-run", student=folder), "there is no tokenizer")
        folder = copied(tiny_student, tmp_path / "empty", "tokenizer.json")
        assert_refused(run("--dry-run", student=folder), "its tokenizer knows no token but")

    def test_a_tokenizer_that_cannot_pad_is_refused_with_a_remedy_that_works(self, run, tokenizer, tmp_path):
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="[SEP]")
        sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 64}
        folder = plain(GPT2Model(GPT2Config(vocab_size=len(fast), **sizes)), fast, tmp_path / "gpt", 64)
        assert_refused(run("--dry-run", student=folder), "no token to pad with", "add \"pad_token\": '[SEP]'")
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "[SEP]"}))
        assert run(student=folder).code == 0

    def test_weights_in_half_precision_are_trained_with_a_warning(self, run, student, tmp_path, caplog):
        student.bfloat16().save(str(tmp_path / "half"), create_model_card=False)
        assert run(student=tmp_path / "half").code == 0
        assert "its weights are trained in bfloat16, in which steps below about 4e-03" in caplog.text
        caplog.clear()
        remedy = ("--overwrite", "--student.model_kwargs", "{dtype: float32}")
        assert run(*remedy, student=tmp_path / "half").code == 0
        assert "are trained in" not in caplog.text
        saved = load_file(tmp_path / "out" / "final" / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {torch.float32}

    def test_an_adapter_resumes(self, run, adapter):
        assert run(student=adapter).code == 0
        assert run("--resume", "--training.max_steps", "3", student=adapter).code == 0

    @pytest.mark.parametrize("kind", ["SparseEncoder", "CrossEncoder"])
    def test_models_of_other_kinds_are_named(self, kind, run, tiny_student, tmp_path):
        folder = copied(tiny_student, tmp_path / "other")
        settings = json.loads((folder / "config_sentence_transformers.json").read_text())
        (folder / "config_sentence_transformers.json").write_text(json.dumps({**settings, "model_type": kind}))
        assert_refused(run("--dry-run", student=folder), f"is a {kind}: ", "a SentenceTransformer is needed")

    def test_plain_transformers_are_said_to_be_pooled(self, run, tiny_student):
        result = run("--dry-run", student=tiny_student.parent / "parts")
        assert (
            result.code == 0
            and "has no modules.json, so its tokens are pooled as is usual (mean pooling)" in result.err
        )


class TestOtherInputs:
    def test_static_embeddings_train_under_a_guide_and_guide(self, run, tokenizer, tmp_path):
        model = SentenceTransformer(
            modules=[StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=16)], device="cpu"
        )
        model.save(str(tmp_path / "static"), create_model_card=False)
        before = model[0].embedding.weight.clone()
        assert run(student=tmp_path / "static").code == 0
        after = SentenceTransformer(str(tmp_path / "out/final"), device="cpu")[0].embedding.weight
        assert not torch.equal(before, after)
        assert run("--overwrite", guide=tmp_path / "static").code == 0

    def test_a_router_needs_to_know_the_routes(self, run, run_command, tiny_student, tiny_guide, tmp_path, student):
        parts = str(tiny_student.parent / "parts")
        sides = ([Transformer(parts, max_seq_length=48), Pooling(32)] for _ in range(2))
        router = Router.for_query_document(*sides)
        with torch.no_grad():
            router.sub_modules["query"][0].model.embeddings.word_embeddings.weight.mul_(3)
        SentenceTransformer(modules=[router], device="cpu").save(str(tmp_path / "router"), create_model_card=False)
        folder = tmp_path / "router"
        assert_refused(run("--dry-run", student=folder), "training.router_mapping", "document, query")
        assert_refused(run("--dry-run", guide=folder), "guide: its Router has a route of its own")
        mapping = "{anchor: query, positive: document}"
        assert run("--training.router_mapping", mapping, student=folder).code == 0
        wrong = run("--training.router_mapping", "{anchr: query}", "--dry-run", "--overwrite", student=folder)
        assert_refused(wrong, "router_mapping: 'anchr' is no column")
        from gist_fast.pipeline.models import reader

        model = SentenceTransformer(str(folder), device="cpu")
        encode = reader(str(folder), "student", None, device="cpu")
        for position, own in enumerate((model.encode_query, model.encode_document)):
            np.testing.assert_allclose(encode(["ice"], "anchor", position)[0], own("ice"), atol=1e-5)
        with pytest.raises(InputError, match="guide: its Router"):
            reader(str(folder), "guide", None, device="cpu")(["ice"], "anchor", 0)

    def test_the_same_vocabulary_with_other_rules_is_another_tokenizer(self, student):
        from gist_fast.losses.guide import GuideEncoder

        twin = SentenceTransformer(modules=list(student), device="cpu")
        assert not GuideEncoder(student, twin).must_retokenize
        cased = copy.deepcopy(student)
        cased.tokenizer.backend_tokenizer.normalizer = None
        assert cased.tokenizer.get_vocab() == student.tokenizer.get_vocab()
        assert GuideEncoder(student, cased).must_retokenize
