"""Tiny stand-ins for what a user brings: two models that differ in every way that matters, and a file of pairs.

The student and the guide are untrained two-layer BERTs with word-piece vocabularies made here. They differ in
vocabulary, width and maximum length, so that a test sees it when one gets what belongs to the other.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models spend their time on waking threads: one is up to a hundred times as fast on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

# Question and answer, distinct throughout, several about one subject: a guide then finds pairs to drop.
PAIRS = [
    line.split(" | ")
    for line in """\
at what temperature does water boil | Water boils at 100 degrees Celsius at the pressure of the sea's level.
why does water boil sooner on a mountain | The air presses less up there, so that vapour escapes at fewer degrees.
what does water turn into when it freezes | Below zero degrees Celsius water becomes ice.
why does ice float | Ice is less dense than the water it came from.
which planet is the largest | Jupiter is larger than all other planets together.
which planet is nearest to the sun | Mercury goes round the sun in 88 days, closer than any other.
which planet is known for its rings | Saturn's rings are made of ice and rock.
how long does the earth need to go round the sun | The earth completes its orbit in about 365 days and a quarter.
why does the moon show phases | We see a changing share of the half that the sun lights.
what causes the tides | The moon, and less so the sun, pull at the oceans.
how far away is the moon | On average 384,400 kilometres lie between us and the moon.
what is a leap year for | An added day keeps the calendar in step with the seasons.
who wrote the play about the prince of Denmark | Hamlet was written by William Shakespeare around 1600.
who wrote the novel with the white whale | Herman Melville published Moby-Dick in 1851.
who painted the ceiling of the Sistine chapel | Michelangelo worked on those frescoes for four years.
who composed the ninth symphony with a choir | Beethoven finished it in 1824, already deaf.
what is the capital of France | Paris lies on the Seine and is the seat of the French government.
what is the capital of Australia | Canberra was built as a compromise between Sydney and Melbourne.
what is the capital of Canada | Ottawa stands in Ontario, near the border of Quebec.
what is the longest river of Africa | The Nile flows north for some 6,650 kilometres.
which ocean is the deepest | The Pacific holds the Mariana Trench, nearly eleven kilometres down.
which desert is the largest of the hot ones | The Sahara covers much of northern Africa.
which mountain is the highest above the sea | Mount Everest rises to 8,849 metres.
how do bees make honey | They thicken nectar by fanning it with their wings.
why do birds fly south in winter | Food grows scarce in the north, so they move to where it does not.
how do fish breathe | Their gills take oxygen out of the water.
how do bats find their way in the dark | They call, and listen for the echo.
why do cats purr | Contentment, comfort in pain, and a call for food all bring it on.
how long does an elephant carry its young | About twenty-two months pass before a calf is born.
what do pandas eat | Nearly all of a panda's diet is bamboo.
which animal runs fastest | A cheetah reaches some 100 kilometres an hour for a few seconds.
why are flamingos pink | The colour comes from the shrimps and algae they eat.
how do plants make sugar | Leaves use sunlight, water and carbon dioxide.
why do leaves turn red in autumn | Green fades when chlorophyll breaks down, and other pigments show.
what do roots do | They hold a plant in place and drink for it.
how old can trees grow | Some bristlecone pines have stood for almost five thousand years.
what is bread made of | Flour, water, salt and yeast are enough.
why does dough rise | Yeast gives off gas that the dough traps.
how is cheese made | Milk is curdled, drained, salted and left to ripen.
what makes chilli hot | Capsaicin excites the nerves that also report heat.
how is tea different from coffee | One is steeped from leaves, the other brewed from roasted seeds.
why do onions make us cry | Cutting frees a gas that turns to acid in the eye.
how does a refrigerator cool | A fluid evaporates inside and condenses outside.
how does a battery give power | Two metals trade electrons through an electrolyte.
how does a compass point north | Its needle follows the magnetic field of the earth.
what does a lens do to light | Glass of a curved shape bends rays to a point.
how does a plane stay in the air | Wings push air down, and are pushed up in return.
how does a sailing boat go against the wind | It tacks, letting the sail act as a wing.
what is inflation | Prices rise in general, so that money buys less.
what does a central bank do | It sets the rate at which banks borrow, and issues notes.
what is a mortgage | A loan for a house, with the house as security.
what is a share of a company | Its owner holds a part of the firm and of its profits.
how is a law passed | Parliament debates a bill, votes, and sends it to be signed.
what does a judge decide | Whether the law was broken, and what follows.
how is a fever treated | Rest, fluids and, where needed, paracetamol.
what helps against a headache | Water, sleep and quiet do more than most expect.
why do we need vitamin C | Without it the body cannot build sound connective tissue.
how much sleep does an adult need | Seven to nine hours suit most.
what does the heart do | It pumps blood through lungs and body.
how many bones has a grown person | There are 206 in most skeletons.
how is a fracture healed | The ends are set, held still, and grow together.
how many players has a football team | Eleven stand on the field, one of them in goal.
how long is a marathon | Runners cover 42.195 kilometres.
what ends a game of chess | Checkmate, a resignation or a draw.""".splitlines()
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first; the others stay in their order."""
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)


def pytest_collection_finish() -> None:
    """What has been imported by now stays: a collection of garbage, of which trainers make many, passes it over."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers directory: width 32, 48 tokens at most, knows the questions' words."""
    words = sorted({word for question, _ in PAIRS for word in _words(question)})
    return _save_model(tmp_path_factory.mktemp("student"), words, width=32, max_seq_length=48, seed=1)


@pytest.fixture(scope="session")
def tiny_guide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another: width 48, 64 tokens at most, knows the answers' words, in another order of ids."""
    words = sorted({word for _, answer in PAIRS for word in _words(answer)}, reverse=True)
    return _save_model(tmp_path_factory.mktemp("guide"), words, width=48, max_seq_length=64, seed=2)


@pytest.fixture
def student(tiny_student: Path) -> SentenceTransformer:
    """A fresh copy of the student, on the CPU."""
    return _load(tiny_student)


@pytest.fixture
def guide(tiny_guide: Path) -> SentenceTransformer:
    """A fresh copy of the guide, on the CPU."""
    return _load(tiny_guide)


@pytest.fixture
def pairs() -> Dataset:
    """64 rows of distinct texts: ``anchor`` and ``positive``."""
    from datasets import Dataset

    anchors, positives = zip(*PAIRS, strict=True)
    return Dataset.from_dict({"anchor": list(anchors), "positive": list(positives)})


@pytest.fixture
def every_kind(pairs: Dataset) -> list[dict]:
    """The pairs, with what triplets, similarities and pair classification need besides."""
    return [
        {**row, "negative": pairs["positive"][k - 1], "score": k * 7 % 5 + k / 100, "label": k * 3 % 4 // 2}
        for k, row in enumerate(pairs)
    ]


@pytest.fixture
def run_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Run ``gist-fast`` in this process; returns its exit code, its stdout and its stderr."""
    from gist_fast.cli import main as cli

    def call(*arguments: object) -> SimpleNamespace:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def _load(path: Path) -> SentenceTransformer:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(path), device="cpu")


def _save_model(folder: Path, words: list[str], *, width: int, max_seq_length: int, seed: int) -> Path:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [*string.ascii_lowercase, *string.digits]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *string.punctuation]
    vocabulary = list(dict.fromkeys([*pieces, *words]))
    tokenizer = BertTokenizerFast(vocab={piece: place for place, piece in enumerate(vocabulary)}, do_lower_case=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(
            BertConfig(
                vocab_size=len(vocabulary),
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=2 * width,
                max_position_embeddings=max_seq_length,
                # Wide enough that texts spread out; with the usual 0.02 all of them look alike.
                initializer_range=0.2,
            )
        )
    parts = folder / "parts"
    bert.save_pretrained(parts)
    tokenizer.save_pretrained(parts)
    model = SentenceTransformer(
        modules=[Transformer(str(parts), max_seq_length=max_seq_length), Pooling(width)], device="cpu"
    )
    model.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"
