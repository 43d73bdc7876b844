"""Every setting of the guided loss, once: type, default, range, help and source.

`gist_fast.GISTTrainingArguments` inherits the declaration, `gist_fast.functional.loss_config.LossConfig` checks and
freezes it, the losses take the settings as arguments, and the YAML section ``loss``, the record of a run and the model
card are made from them. Without torch, which a configuration is read before.

To add a setting, follow its row in the table of ``CONTRIBUTING.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Any, Literal

from gist_fast.functional.choices import (
    Backend,
    Direction,
    Groups,
    HardnessMode,
    MarginStrategy,
    MaskBits,
    PartitionMode,
    Scope,
)

STOCK = "sentence-transformers 6.2"


def setting(
    default: Any,
    help: str,  # as transformers' own argument parser calls it
    *,
    source: str = "",
    decides: bool = False,
    recorded: bool = True,
    needs_guide: bool = False,
    **bounds: Any,
) -> Any:
    """A field of `LossSettings`.

    Args:
        help: one or two sentences, for ``--help`` and the documentation.
        source: the paper or the library that it comes from.
        decides: whether it says which pairs count, or with what weight, so that the custom operators need it.
        recorded: whether the model card and the record of a run list it: False where it changes no more than how the
            loss is computed.
        needs_guide: whether it is about what a guide does, so that it stays at its default without any.
        bounds: of a number, as `gist_fast.functional.values.check_number` takes them.
    """
    about = {"help": help, "source": source, "decides": decides, "recorded": recorded, "needs_guide": needs_guide}
    return field(default=default, metadata={**about, "bounds": bounds})


@dataclass
class LossSettings:
    """The settings of a guided loss that training arguments have too; not checked until a `LossConfig` is made of them.

    The first six are positional in the losses of sentence-transformers, in this order.

    Example:
        >>> LossSettings(margin=0.05).loss_settings()["margin"]
        0.05
    """

    temperature: float = setting(0.01, "Divides the cosine similarities in the softmax.", source=STOCK, above=0)
    margin_strategy: MarginStrategy = setting(
        "absolute",
        "How the margin lowers the guide's threshold t: 'absolute' (t - margin) or 'relative' (t - |t| * margin).",
        source=STOCK,
        decides=True,
        needs_guide=True,
    )
    margin: float = setting(
        0.0,
        "The larger, the more pairs are taken for false negatives and dropped.",
        source=STOCK,
        decides=True,
        needs_guide=True,
    )
    contrast_anchors: bool = setting(True, "Whether anchors are negatives of each other.", source=STOCK, decides=True)
    contrast_positives: bool = setting(
        True, "Whether positives are negatives of each other; retrieval may prefer False.", source=STOCK, decides=True
    )
    gather_across_devices: bool = setting(
        False, "Whether the candidates of all ranks are negatives on every rank.", source=STOCK
    )
    _: KW_ONLY
    directions: list[Direction] | None = setting(
        None,
        "What is compared, in the place of contrast_anchors and contrast_positives: 'query_to_doc' (anchors with "
        "positives and negatives; always), 'query_to_query', 'doc_to_query' (each positive with all anchors) and "
        "'doc_to_doc' (each positive with all other positives and negatives). None: as those two say.",
        source=f"arXiv 2308.03281; {STOCK}",
        decides=True,
    )
    partition_mode: PartitionMode = setting(
        "joint",
        "How many softmaxes there are: one over all directions ('joint'), or one each ('per_direction'), whose losses "
        "are averaged.",
        source=f"arXiv 2310.19923; {STOCK}",
        decides=True,
    )
    self_guided: bool = setting(
        False,
        "Whether the student's own similarities decide what is a false negative, without a guide; mostly with a "
        "negative margin, as -0.1.",
        decides=True,
    )
    mask_ties: bool = setting(
        False,
        "Whether what ties with the positive for the guide, as copies of its text do, is dropped.",
        decides=True,
        needs_guide=True,
    )
    row_margins: bool = setting(
        False,
        "Whether each row brings a margin of its own, in the column 'margin', which is added to 'margin'.",
        needs_guide=True,
    )
    groups: Groups | None = setting(
        None,
        "Rows that are no negatives of each other: 'anchor', those with the same anchor text; 'positive', those with "
        "the same positive text, and no mined negative of that text is one; 'anchor_or_positive', both; 'column', what "
        "the columns of groups say. None: all are.",
        source="'anchor_or_positive': arXiv 2503.07891",
    )
    mask_negatives: bool = setting(
        True,
        "Whether the guide may drop mined negatives too. False: it does not read the columns of negatives.",
        decides=True,
        needs_guide=True,
    )
    negatives_scope: Scope | list[Scope] = setting(
        "all",
        "Whose negatives the columns of negatives are: 'all', every anchor's, or 'own', the anchor's alone in whose "
        "row they stand; one for all columns, or a list of one a column.",
        source="'own': arXiv 2506.05176, arXiv 2503.07891",
    )
    hard: bool = setting(
        False, "Whether negatives that the student already ranks below the positive are dropped too.", decides=True
    )
    hardness_mode: HardnessMode | None = setting(
        None,
        "Which negatives weigh the more the more similar they are: 'in_batch_negatives', 'hard_negatives' (each row's "
        "own) or 'all_negatives'.",
        source="arXiv 2503.04812, arXiv 2509.20354",
        decides=True,
    )
    hardness_strength: float = setting(
        0.0,
        "How much more: this times the similarity is added to their logits.",
        source="arXiv 2503.04812, arXiv 2509.20354",
        decides=True,
        at_least=0,
    )
    distill_weight: float = setting(
        0.0,
        "Weight of an added term: the KL divergence of the student's distribution over a row's candidates from the "
        "guide's, masked ones among them.",
        source="arXiv 2212.03533, arXiv 2402.03216",
        needs_guide=True,
        at_least=0,
    )
    distill_temperature: float = setting(
        0.05,
        "What divides the guide's similarities in its distribution.",
        source="arXiv 2212.03533",
        needs_guide=True,
        above=0,
    )
    triplet_margin: float | None = setting(
        None,
        "Margin of an added soft triplet term (guided-triplet-soft). None: no such term.",
        source="GISTEmbed's training code",
        above=0,
    )
    label_smoothing: float = setting(
        0.0,
        "Share of each row's target that the positive and all negatives that count get alike.",
        source="arXiv 1512.00567",
        at_least=0,
        below=1,
    )
    positive_prior: float = setting(
        0.0,
        "Share of the negatives that is expected to be positive, by which their sum is corrected (debiased contrastive "
        "learning).",
        source="arXiv 2007.00224",
        at_least=0,
        below=1,
    )
    spread_out_weight: float = setting(
        0.0,
        "Weight of an added term that spreads the embeddings: the mean squared similarity of the batch's anchors with "
        "each other, and of its positives.",
        source="arXiv 2509.20354, arXiv 1708.06320",
        at_least=0,
    )
    matryoshka_dims: list[int] | None = setting(
        None,
        "Dims of nested embeddings to train, which share one run of the guide. None: the whole width alone.",
        source="arXiv 2205.13147",
    )
    matryoshka_weights: list[float] | None = setting(
        None, "A weight for each of matryoshka_dims. None: 1 each.", source="arXiv 2205.13147"
    )
    learn_temperature: bool = setting(False, "Whether the temperature is trained, from 'temperature' on.")
    temperature_min: float = setting(0.001, "The least that a learnt temperature may become.", above=0)
    temperature_max: float = setting(1.0, "The most that a learnt temperature may become.", above=0)
    gather_guide_dtype: Literal["float16", "bfloat16"] | None = setting(
        None,
        "The type that the guide's embeddings are rounded to before they are gathered: 'float16' or 'bfloat16'. None: "
        "the type they have.",
        recorded=False,
    )
    guide_cache: bool = setting(
        False,
        "Whether to remember the guide's embedding of each text over steps and epochs, in main memory.",
        recorded=False,
    )
    backend: Backend = setting(
        "auto", "How the loss is computed: 'auto', 'triton', 'tiled' or 'reference'.", recorded=False
    )
    mask_bits: MaskBits = setting(
        "auto",
        "Whether masks are kept for the backward pass ('keep'), decided again ('recompute'), or by size ('auto').",
        recorded=False,
    )

    def scopes_of(self, columns: int) -> Scope | Sequence[Scope]:
        """`negatives_scope` for so many columns of negatives, of which a batch may lack some: by one word where all
        have the same."""
        scope = self.negatives_scope
        return scope[0] if not isinstance(scope, str) and len(set(scope)) == 1 and columns <= len(scope) else scope

    @property
    def pairs_positives_with_negatives(self) -> bool:
        """Whether positives are compared with the columns of negatives, but for a row's own: in doc_to_doc by that
        name."""
        return self.directions is not None and "doc_to_doc" in self.directions

    @property
    def relative(self) -> bool:
        """Whether the margin is a share of the threshold."""
        return self.margin_strategy == "relative"

    def loss_settings(self) -> dict[str, Any]:
        """The settings by name."""
        return {f.name: getattr(self, f.name) for f in fields(LossSettings)}
