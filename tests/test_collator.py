"""What the guide needs of a batch travels through it; each distinct text is tokenised, and encoded, once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import ByteLevel

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss, guide_memory
from gist_fast.losses.guide_memory import GuideMemory
from gist_fast.runtime.errors import InputError
from gist_fast.training.collator import GISTDataCollator, GuideTokenizer

ROWS = [
    {"anchor": "why does ice float", "positive": "Ice is less dense than the water it came from."},
    {"anchor": "why do cats purr", "positive": "Contentment, comfort in pain, and a call for food."},
    {"anchor": "why does ice float", "positive": "why do cats purr"},
    {"anchor": "what do roots do", "positive": "Contentment, comfort in pain, and a call for food."},
]


@pytest.fixture
def collator(student, guide):
    return GISTDataCollator(preprocess_fn=student.preprocess, tokenize_for_guide=GuideTokenizer(guide))


@pytest.fixture
def read(guide):
    """The shapes of what the guide reads, call by call."""
    shapes = []
    forward = guide.forward
    guide.forward = lambda f, **kw: (shapes.append(tuple(f["input_ids"].shape)), forward(f, **kw))[1]
    return shapes


def features(batch, columns=("anchor", "positive")):
    return [{k[len(c) + 1 :]: v for k, v in batch.items() if k.startswith(f"{c}_")} for c in columns]


def test_embeddings_of_the_dataset_and_tokens_for_the_rest(collator, guide):
    rows = [
        {**row, "anchor_guide_embedding": np.array([i, 2.5], np.float16), "label": i} for i, row in enumerate(ROWS[:2])
    ]
    batch = collator(rows)
    assert batch["anchor_guide_embedding"].tolist() == [[0.0, 2.5], [1.0, 2.5]]
    expected = guide.preprocess([row["positive"] for row in rows])
    assert torch.equal(batch["positive_guide"]["input_ids"], expected["input_ids"])
    assert batch["positive_guide_source"] == 1
    assert not {"anchor_guide", "anchor_guide_rows"} & set(batch)
    assert batch["label"].tolist() == [0, 1]
    assert not any(k.startswith("anchor_guide_embedding_") for k in batch)
    rows[1]["anchor_guide_embedding"] = np.zeros(3, np.float16)
    with pytest.raises(ValueError, match=r"anchor_guide_embedding: row 1 of the batch has 3 numbers and row 0 has 2"):
        collator(rows)


def test_extents_of_the_students_tokens(collator):
    batch = collator(ROWS)
    for column in ("anchor", "positive"):
        lengths = batch[f"{column}_attention_mask"].sum(1)
        assert batch[f"{column}_extents"].tolist() == [[0, n] for n in lengths]


@pytest.mark.parametrize("kind", [GISTEmbedLoss, CachedGISTEmbedLoss])
def test_distinct_texts_are_encoded_once_over_all_columns(kind, collator, student, guide, read):
    loss = kind(student, guide, temperature=0.1)
    student.eval()
    batch = collator(ROWS)
    assert len(batch["anchor_guide"]["input_ids"]) == 5
    assert "positive_guide" not in batch
    with torch.no_grad():
        value = loss(features(batch), None)
    assert sum(rows for rows, _ in read) == 5
    each = [
        {**student.preprocess([row[c] for row in ROWS]), "guide": guide.preprocess([row[c] for row in ROWS])}
        for c in ("anchor", "positive")
    ]
    with torch.no_grad():
        assert value.item() == pytest.approx(loss(each, None).item(), rel=1e-5)


def test_a_text_under_another_prompt_is_another_text(student, guide, read):
    tokenizer = GuideTokenizer(guide, prompts={"anchor": "query: "})
    batch = GISTDataCollator(preprocess_fn=student.preprocess, tokenize_for_guide=tokenizer)(ROWS)
    assert [len(batch[f"{c}_guide"]["input_ids"]) for c in ("anchor", "positive")] == [3, 3]
    assert [batch[f"{c}_guide_source"] for c in ("anchor", "positive")] == [0, 1]
    with torch.no_grad():
        loss = GISTEmbedLoss(student, guide)
        embeddings = loss.guide_embeddings(features(batch), features(batch))
    for column, prompt, embedding in zip(("anchor", "positive"), ("query: ", ""), embeddings, strict=True):
        expected = guide.encode([row[column] for row in ROWS], prompt=prompt, convert_to_tensor=True, batch_size=1)
        torch.testing.assert_close(embedding, expected)


def test_the_guide_remembers_texts_over_steps(student, guide, read):
    tokenizer = GuideTokenizer(guide, with_keys=True)
    collator = GISTDataCollator(preprocess_fn=student.preprocess, tokenize_for_guide=tokenizer)
    student.eval()
    loss, forgetful = (GISTEmbedLoss(student, guide, guide_cache=remember) for remember in (True, False))
    values = []
    with torch.no_grad():
        for rows in (ROWS[:2], ROWS, ROWS[2:]):
            read.clear()
            values.append(loss(features(collator(rows)), None).item())
            encoded = sum(n for n, _ in read)
            read.clear()
            assert values[-1] == pytest.approx(forgetful(features(collator(rows)), None).item(), rel=1e-5)
            assert encoded == {0: 4, 1: 1, 2: 0}[len(values) - 1]


def test_a_guide_that_trains_cannot_be_remembered(student):
    with pytest.raises(ValueError, match="guide_cache: True, but the guide shares weights with the student"):
        GISTEmbedLoss(student, student, guide_cache=True)


class Numbers:
    """Recalls embeddings of numbers, and notes which of them had to be encoded."""

    def __init__(self) -> None:
        self.memory = GuideMemory()
        self.encoded: list[list[int]] = []

    def recall(self, numbers: list[int]) -> list[float]:
        keys = np.array([int(n).to_bytes(16, "little") for n in numbers], dtype="V16")

        def encode(places):
            self.encoded.append([numbers[p] for p in places])
            return torch.tensor([[float(numbers[p]), -1.0] for p in places])

        return self.memory.recall(keys, encode, torch.device("cpu"))[:, 0].tolist()


def test_memory_grows_and_keeps_order():
    numbers, many = Numbers(), list(range(3000))
    assert numbers.recall(many) == many
    assert numbers.recall([7, 5000, 2, 4000]) == [7, 5000, 2, 4000]
    assert numbers.recall([4000, 1, 5000]) == [4000, 1, 5000]
    assert numbers.encoded == [many, [5000, 4000]]
    assert len(numbers.memory) == 3002


def test_memory_stops_growing_where_none_is_free(monkeypatch, caplog):
    numbers, first, later = Numbers(), list(range(1024)), list(range(1024, 1500))
    numbers.recall(first)
    monkeypatch.setattr(guide_memory, "free_memory", lambda: 0)
    for _ in range(2):
        assert numbers.recall(later) == later
        assert numbers.recall([3, 1400, 5]) == [3, 1400, 5]
    assert numbers.encoded == [first, later, [1400], later, [1400]]
    assert len(numbers.memory) == len(first)
    assert [record.message for record in caplog.records] == [
        "guide_cache: no memory for embeddings of more than 1024 texts; the guide encodes the others anew each time."
    ]


def test_each_process_of_a_machine_takes_its_part(monkeypatch):
    # Half of the free memory holds just the first table of one process: 1024 embeddings of two float32.
    monkeypatch.setattr(guide_memory, "free_memory", lambda: 2 * 8 * 1024)
    for processes, remembered in (("1", 1), ("2", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        numbers = Numbers()
        numbers.recall([7])
        assert len(numbers.memory) == remembered


def test_without_any_memory_nothing_is_remembered(monkeypatch):
    numbers = Numbers()
    monkeypatch.setattr(guide_memory, "free_memory", lambda: 0)
    assert numbers.recall([1, 2]) == numbers.recall([1, 2]) == [1, 2]
    assert numbers.encoded == [[1, 2], [1, 2]]


def test_negatives_with_numbered_names_do_not_mix(student, guide, tmp_path):
    from datasets import Dataset

    from gist_fast import GISTTrainer, GISTTrainingArguments

    texts = {"anchor": ["a"], "positive": ["b"], "negative": ["c d"], "negative_1": ["e f g"]}
    arguments = GISTTrainingArguments(str(tmp_path), report_to=[], per_device_train_batch_size=1)
    trainer = GISTTrainer(student, arguments, Dataset.from_dict(texts), guide=guide)
    columns, _ = trainer.collect_features(trainer.data_collator([{c: v[0] for c, v in texts.items()}]))
    assert [set(c) for c in columns[1:]] == [set(columns[1])] * 3
    assert [c["input_ids"].shape[1] for c in columns[2:]] == [4, 5]


class TestTextsThatCannotBeRead:
    @pytest.mark.parametrize("value", [None, 3, 0.5, float("nan")])
    def test_no_text_is_named_with_its_column(self, collator, value):
        rows = [dict(ROWS[0]), {**ROWS[1], "positive": value}]
        with pytest.raises(InputError, match=f"positive: expected a text in each row, got {value!r} in row 1 of the"):
            collator(rows)

    @pytest.mark.parametrize("whose", ["student", "guide"])
    def test_texts_without_any_token(self, student, guide, whose):
        # As of a tokenizer that puts nothing before and after a text; BERT's drops characters without a width.
        model = {"student": student, "guide": guide}[whose]
        model.tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
        collator = GISTDataCollator(student.preprocess, tokenize_for_guide=GuideTokenizer(guide))
        rows = [{**row, "positive": "\u200b"} for row in ROWS]
        mixed = collator([*rows[:2], ROWS[1]])
        assert mixed["positive_input_ids"].shape[0] == 3
        # The guide reads both columns' texts together where their settings are the same.
        rows = [{**row, "anchor": "\u200b"} for row in rows] if whose == "guide" else rows
        column = "positive: student" if whose == "student" else "guide"
        with pytest.raises(
            InputError, match=rf"{column}: its tokenizer finds no token in any of the . texts .* '\\u200b'"
        ):
            collator(rows)


def test_columns_whose_names_begin_alike(tmp_path, student, guide):
    # What is there for the guide of a column x has keys x_guide...; a column x_guide has keys of its own.
    losses = {}
    for names in (("q", "d", "n"), ("q", "q_guide", "n"), ("q_guide", "q", "q_guide_rows"), ("n_guide", "q", "n")):
        rows = [dict(zip(names, (*row.values(), ROWS[k - 1]["anchor"]), strict=True)) for k, row in enumerate(ROWS)]
        args = GISTTrainingArguments(str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True)
        trainer = GISTTrainer(model=student, args=args, train_dataset=Dataset.from_list(rows), guide=guide)
        losses[names] = trainer.compute_loss(student, trainer.data_collator(rows)).item()
    assert len(set(losses.values())) == 1, losses


@pytest.mark.parametrize(("column", "values", "says"), [
    ("negative", ["x", None], "train_dataset: row 2, column 'negative' is None; a text is needed there."),
    ("negative", [["x"], ["y"]], "train_dataset: column 'negative' holds lists of texts, and each column is a text"),
    ("id", [7, 8], "train_dataset: column 'id' holds int64, and each column is a text that the model reads; leave it"),
    ("none", [None, None], "train_dataset: column 'none' holds null, and each column is a text that the model reads"),
])  # fmt: skip
def test_columns_that_no_model_reads(tmp_path, student, guide, column, values, says):
    args = GISTTrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True)
    # Labels are no inputs, and what was not selected is not read.
    rows = {"anchor": ["a", "b", "c"], "positive": ["c", "d", "e"], "label": [0, 1, 0], column: [*values, None]}
    dataset = Dataset.from_dict(rows).select([0, 1])
    with pytest.raises(InputError) as caught:
        GISTTrainer(model=student, args=args, train_dataset=dataset, guide=guide)
    assert str(caught.value).startswith(says)
    if says.endswith("there."):
        assert GISTTrainer(model=student, args=args, train_dataset=dataset.select([0]), guide=guide) is not None
