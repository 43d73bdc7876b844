"""Each preset against the formula of its paper, written here in float64 from the paper's own terms."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from oracle import assert_close
from torch import Tensor

from gist_fast import GISTTrainingArguments, guided_contrastive_loss
from gist_fast.config.load import load_config
from gist_fast.functional.choices import Preset
from gist_fast.functional.presets import PRESETS, preset
from gist_fast.losses import GISTEmbedLoss
from gist_fast.runtime.errors import InputError

ROWS, TEMPERATURE = 23, 0.05


@pytest.fixture
def batch() -> dict[str, Any]:
    """Queries, documents and a mined negative each; some texts occur twice."""
    generator = torch.Generator().manual_seed(7)
    q, d, n = (torch.randn(ROWS, 10, generator=generator, dtype=torch.float64) for _ in range(3))
    d += 0.6 * q
    texts = {"q": torch.arange(ROWS), "d": torch.arange(ROWS) + 100, "n": torch.arange(ROWS) + 200}
    for a, b in ((3, 9), (11, 4)):
        q[a], texts["q"][a] = q[b], texts["q"][b]
    for a, b in ((20, 2), (7, 8)):
        d[a], texts["d"][a] = d[b], texts["d"][b]
    n[5], texts["n"][5] = d[6], texts["d"][6]
    return {
        "q": q.requires_grad_(),
        "d": d.requires_grad_(),
        "n": n.requires_grad_(),
        **{f"{k}_text": v for k, v in texts.items()},
    }


def sim(x: Tensor, y: Tensor) -> Tensor:
    return torch.cosine_similarity(x[:, None], y[None], dim=-1)


def gistembed(b: dict[str, Tensor], guide: dict[str, Tensor], tau: float) -> Tensor:
    """Section 2.2 of the paper, with the triplets' third block."""
    q, d, n = b["q"], b["d"], b["n"]
    own = torch.cosine_similarity(guide["q"], guide["d"])[:, None]
    total = torch.exp(torch.cosine_similarity(q, d) / tau)
    for x, y, name in ((q, d, "qd"), (q, q, "qq"), (d, d, "dd"), (q, n, "qn")):
        keep = sim(guide[name[0]], guide[name[1]]) <= own + 1e-12
        if name != "qn":
            keep &= ~torch.eye(ROWS, dtype=torch.bool)
        total = total + (torch.exp(sim(x, y) / tau) * keep).sum(1)
    return (torch.log(total) - torch.cosine_similarity(q, d) / tau).mean()


def qwen3(b: dict[str, Tensor], tau: float) -> Tensor:
    q, d, n = b["q"], b["d"], b["n"]
    own = torch.cosine_similarity(q, d)
    others = ~torch.eye(ROWS, dtype=torch.bool)
    other_document = b["d_text"][:, None] != b["d_text"]

    def m(scores: Tensor) -> Tensor:
        return scores.detach() <= own.detach()[:, None] + 0.1 + 1e-12

    z = torch.exp(own / tau)
    of_negatives = torch.cosine_similarity(q, n)
    kept = (of_negatives <= own + 0.1) & (b["n_text"] != b["d_text"])
    z = z + kept * torch.exp(of_negatives / tau)
    for scores in (sim(q, q), sim(d, d), sim(q, d)):
        z = z + (torch.exp(scores / tau) * (m(scores) & other_document & others)).sum(1)
    return -torch.log(torch.exp(own / tau) / z).mean()


def gemini(b: dict[str, Tensor], tau: float, alpha: float = 0.0) -> Tensor:
    """The paper's mask(i, j) is 0 for j = i as well, where the positive stands; it is kept here."""
    q, d, n = b["q"], b["d"], b["n"]
    same = (b["q_text"][:, None] == b["q_text"]) | (b["d_text"][:, None] == b["d_text"])
    mask = ~same | torch.eye(ROWS, dtype=torch.bool)
    hard = torch.cosine_similarity(q, n)
    weight = torch.exp(alpha * hard.detach())
    below = weight * torch.exp(hard / tau) + (mask * torch.exp(sim(q, d) / tau)).sum(1)
    return -torch.log(torch.exp(torch.cosine_similarity(q, d) / tau) / below).mean()


def embeddinggemma(b: dict[str, Tensor], tau: float) -> Tensor:
    spread = 0.0
    for x in (b["q"], b["d"]):
        unit = x / x.norm(dim=1, keepdim=True)
        products = (unit @ unit.T) ** 2
        spread = spread + (products.sum() - products.diagonal().sum()) / (ROWS * (ROWS - 1))
    return gemini(b, tau, alpha=5.0) + spread


def gte(b: dict[str, Tensor], tau: float) -> Tensor:
    """Equation 3: the sums over j go over all, or all but i."""
    q, d = b["q"], b["d"]
    others = ~torch.eye(ROWS, dtype=torch.bool)
    z = torch.exp(sim(q, d) / tau).sum(1) + (torch.exp(sim(q, q) / tau) * others).sum(1)
    z = z + torch.exp(sim(q, d).T / tau).sum(1) + (torch.exp(sim(d, d) / tau) * others).sum(1)
    return -torch.log(torch.exp(torch.cosine_similarity(q, d) / tau) / z).mean()


def mnrl(b: dict[str, Tensor], tau: float) -> Tensor:
    scores = torch.cat([sim(b["q"], b["d"]), sim(b["q"], b["n"])], dim=1) / tau
    return torch.nn.functional.cross_entropy(scores, torch.arange(ROWS))


FORMULAS = {"qwen3": qwen3, "gemini": gemini, "embeddinggemma": embeddinggemma, "gte": gte, "mnrl": mnrl}


@pytest.mark.parametrize("backend", ["reference", "tiled", "auto"])
@pytest.mark.parametrize("name", get_args(Preset))
def test_the_formula_of_the_paper(name, backend, batch):
    options = preset(name)
    tau = options.pop("temperature", TEMPERATURE)
    leaves = [batch["q"], batch["d"], batch["n"]]
    guide = {}
    if name == "gistembed":
        generator = torch.Generator().manual_seed(1)
        guide = {k: torch.randn(ROWS, 6, generator=generator, dtype=torch.float64) for k in "qdn"}
        wanted = gistembed(batch, guide, tau)
    else:
        wanted = FORMULAS[name](batch, tau)
    groups = {"positive": ["d_text"], "anchor_or_positive": ["q_text", "d_text"]}.get(options.pop("groups", None))
    if groups is not None:
        options |= {"groups": [batch[k] for k in groups], "negative_groups": [batch["n_text"]]}
    judges = [guide[k] for k in "qdn"] if guide else leaves if options.pop("self_guided", False) else [None] * 3
    negatives: dict[str, Any] = {}
    if name != "gte":  # whose formula has no mined negatives
        negatives["negatives"] = leaves[2:]
        negatives["guide_negatives"] = None if judges[2] is None else judges[2:]
    found = guided_contrastive_loss(*leaves[:2], *judges[:2], temperature=tau, backend=backend, **negatives, **options)
    leaves = leaves[: 2 if name == "gte" else 3]
    expected = [wanted, *torch.autograd.grad(wanted, leaves)]
    assert_close([found, *torch.autograd.grad(found, leaves)], expected, 1e-10, floor=1.0)


def test_a_loss_and_the_trainers_arguments_take_them(student, tmp_path):
    for name in PRESETS:
        settings = preset(name)
        loss = GISTEmbedLoss(student, None, **settings, **({} if "self_guided" in settings else {"guided": False}))
        arguments = GISTTrainingArguments(str(tmp_path), **settings)
        for key, value in settings.items():
            assert getattr(loss, key) == getattr(arguments, key) == value


def test_what_is_passed_wins_and_a_preset_stays_as_it_is():
    found = preset("gte", temperature=0.1)
    assert found["temperature"] == 0.1
    found["directions"].append("x")
    assert preset("gte")["directions"] == PRESETS["gte"]["directions"] and "x" not in PRESETS["gte"]["directions"]
    with pytest.raises(ValueError, match=r"preset: expected 'gistembed', .* or 'mnrl', got 'gist'"):
        preset("gist")
    with pytest.raises(ValueError, match="temperature: expected a finite float above 0, got -1"):
        preset("gte", temperature=-1)


def write(folder, loss: str, training: str = "output_dir: out"):
    path = folder / "run.yaml"
    path.write_text(f"student: s\nguide: null\ndata: {{train: p.csv}}\nloss: {loss}\ntraining: {{{training}}}\n")
    return path


def test_the_configuration_takes_a_preset_beneath_what_is_written(tmp_path):
    found = load_config(write(tmp_path, "{preset: gte, temperature: 0.02}")).arguments
    assert found == {"output_dir": found["output_dir"], **preset("gte", temperature=0.02)}
    found = load_config(write(tmp_path, "{preset: mnrl}", "output_dir: out, temperature: 0.3")).arguments
    assert (found["temperature"], found["directions"]) == (0.3, ["query_to_doc"])
    found = load_config(write(tmp_path, "{preset: gte}"), ["--preset", "mnrl", "--loss.temperature", "0.2"]).arguments
    assert (found["temperature"], found["directions"]) == (0.2, ["query_to_doc"])
    assert "directions" not in load_config(write(tmp_path, "{preset: null}")).arguments
    with pytest.raises(InputError, match=r"run\.yaml, line 4: loss\.preset: expected .*, got 'qwen'.*'qwen3'"):
        load_config(write(tmp_path, "{preset: qwen}"))
    with pytest.raises(InputError, match=r"unknown key 'preset' in training \(it belongs in loss\)"):
        load_config(write(tmp_path, "{}", "output_dir: out, preset: gte"))
