"""What is compared: arms (one way to train), and studies (data, sizes, the arms that run on them, their control).

An arm changes the loss and nothing else: student, rows, their order, batch, steps, learning rate and seed are those of
its study. Arms whose name begins with *ap* contrast anchors with positives alone, as a plain in-batch softmax does;
those that begin with *four* have all blocks of the paper (without negative columns: anchor-positive, anchor-anchor,
positive-positive).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

AP = {"contrast_anchors": False, "contrast_positives": False}


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        guide: ``"none"``; ``"model"``, the guide's embeddings of the texts; ``"perfect"``, embeddings that are alike
            exactly where two rows are of one concept, so that every false negative is dropped and nothing else;
            ``"own"``, the student itself.
        arguments: of `gist_fast.GISTTrainingArguments`, where they are not the defaults.
        library: whose loss; sentence-transformers' own has the guide itself run in every step.
        mined: negatives a row, mined by the guide out of the training rows (`gist_fast.mine_negatives`); 0 for none.
    """

    guide: Literal["none", "model", "perfect", "own"]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    library: Literal["gist_fast", "sentence-transformers"] = "gist_fast"
    mined: int = 0

    def asdict(self) -> dict[str, Any]:
        """As a plain dictionary, for the key of a run."""
        mined = {"mined": self.mined} if self.mined else {}
        return {"guide": self.guide, "arguments": dict(self.arguments), "library": self.library, **mined}


CONTROL = "ap, no guide"
PERFECT_MARGIN = {"margin": 0.5}  # embeddings of different concepts are near 0, those of the same at 1
ARMS: dict[str, Arm] = {
    CONTROL: Arm("none", AP),
    "ap, guide": Arm("model", AP),
    "ap, guide, ties": Arm("model", {**AP, "mask_ties": True}),
    "ap, no guide, duplicates out": Arm("none", {**AP, "groups": "anchor_or_positive"}),
    "ap, no guide, mined for all": Arm("none", AP, mined=2),
    "ap, no guide, mined, own": Arm("none", {**AP, "negatives_scope": "own"}, mined=2),
    "ap, perfect mask": Arm("perfect", {**AP, **PERFECT_MARGIN}),
    "four, no guide": Arm("none"),
    "four, guide": Arm("model"),
    "four, guide, margin 0.05": Arm("model", {"margin": 0.05}),
    "four, guide, margin -0.1": Arm("model", {"margin": -0.1}),
    "four, guide, ties": Arm("model", {"mask_ties": True}),
    "four, guide, duplicates out": Arm("model", {"groups": "anchor_or_positive"}),
    "four, guide, hard": Arm("model", {"hard": True}),
    "four, self-guided": Arm("own", {"self_guided": True, "margin": -0.1}),
    "four, perfect mask": Arm("perfect", PERFECT_MARGIN),
    "four, guide, sentence-transformers": Arm("model", library="sentence-transformers"),
}


@dataclass(frozen=True)
class Setting:
    """What all arms of a study share. Temperature and learning rate: see ``docs/quality.md``, "How it was chosen"."""

    trained_layers: int = 1  # of the student's three, from the top
    batch_size: int = 256
    steps: int = 24
    learning_rate: float = 3e-4
    temperature: float = 0.05
    warmup: float = 0.1  # share of the steps
    dropout: float = 0.0  # none: too few steps to overfit in, and drawing it is slow on a CPU


@dataclass(frozen=True)
class Study:
    """Arms that are compared with each other.

    Attributes:
        data: name of a collection of `benchmarks.quality.data`.
        siblings: whether the rows of a family stand together, or all are shuffled.
        control: the arm that the others are compared with.
        about: a line for the table's head.
    """

    data: str
    siblings: bool
    about: str
    arms: tuple[str, ...]
    setting: Setting = Setting()
    control: str = CONTROL


_GUIDED = ("ap, no guide", "ap, guide", "four, no guide", "four, guide")
_ALL = tuple(name for name in ARMS if ARMS[name].library == "gist_fast")
_OF_COPIES = ("ties", "duplicates out")
_WITHOUT_COPIES = tuple(name for name in _ALL if not name.endswith(_OF_COPIES))  # where there are none to speak of

STUDIES: dict[str, Study] = {
    "hpo": Study("hpo", True, "names of clinical findings, paraphrases in one batch", _WITHOUT_COPIES),
    "icd-code": Study("icd-code", True, "terms of diagnoses and their codes, siblings in one batch", _ALL),
    "icd-category": Study(
        "icd-category", True, "texts of one category of diagnoses, siblings in one batch", _WITHOUT_COPIES
    ),
    "hpo-shuffled": Study("hpo", False, "the first again, shuffled", _GUIDED),
    "hpo-sharp": Study("hpo", True, "the first again, temperature 0.01", _GUIDED, Setting(temperature=0.01)),
    "hpo-64": Study(
        "hpo",
        True,
        "the first again, batches of 64, sentence-transformers' loss beside ours",
        (*_GUIDED, "four, guide, sentence-transformers"),
        Setting(batch_size=64),
    ),
}

# Shows that everything runs, and nothing about quality.
QUICK = Setting(batch_size=32, steps=2)


def quick(study: Study) -> Study:
    """The study with tiny sizes."""
    return replace(study, setting=replace(QUICK, temperature=study.setting.temperature))
