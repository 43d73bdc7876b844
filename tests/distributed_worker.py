"""What the ranks of `test_distributed.py` run: reads the cases of ``cases.json``, writes what came out of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist


def sequential(dataset, batch_size, drop_last, **kwargs):
    """A batch sampler in the order of the dataset, so that a test knows which rank gets which rows."""
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from torch.utils.data import SequentialSampler

    return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def load(path: str):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(path, device="cpu")


def make_trainer(case: dict, folder: Path):
    from datasets import load_from_disk

    from gist_fast import GISTTrainer, GISTTrainingArguments
    from gist_fast import losses as ours

    dataset = load_from_disk(case["dataset"])
    student = without_dropout(load(case["student"]))
    guide = load(case["guide"]) if case["guide"] else None
    drop_last = case["arguments"].pop("dataloader_drop_last", False)
    args = GISTTrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=4,
        num_train_epochs=1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        batch_sampler=sequential,
        gather_across_devices=True,
        **case["arguments"],
    )
    # sentence-transformers sets it to True where there are several processes.
    args.dataloader_drop_last = drop_last
    loss = None
    if case["loss"]:
        loss = getattr(ours, case["loss"])(student, guide, gather_across_devices=True, **case["loss_arguments"])
        guide = None
    return GISTTrainer(student, args, dataset, loss=loss, guide=guide)


def train(case: dict, folder: Path) -> dict:
    trainer = make_trainer(case, folder)
    trainer.train()
    saved = folder / case["name"]
    trainer.save_model(str(saved))
    dist.barrier()
    return {
        "state": {name: x.detach().clone() for name, x in load(str(saved)).state_dict().items()},
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def refused(case: dict, folder: Path) -> dict:
    """The message with which a training run stops on this rank."""
    try:
        train(case, folder)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {}


def sharded(case: dict, folder: Path) -> dict:
    """One step of plain torch with a student that FSDP2 has sharded: its gradients, put together again."""
    from datasets import load_from_disk
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from gist_fast import losses as ours

    student = without_dropout(load(case["student"]))
    loss = ours.GISTEmbedLoss(student, None, gather_across_devices=True, **case["loss_arguments"])
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in student[0].auto_model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(student, mesh=mesh)
    rows = load_from_disk(case["dataset"])[slice(*case["rows"][dist.get_rank()])]
    names = [name for name in rows if name + "_guide_embedding" in rows]
    features = [dict(student.preprocess(rows[name])) for name in names]
    for f, name in zip(features, names, strict=True):
        f["guide_embedding"] = torch.as_tensor(rows[name + "_guide_embedding"])
    loss(features).backward()
    return {name: p.grad.full_tensor() for name, p in student.named_parameters() if p.grad is not None}


def embeddings(width: int, seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Anchors, positives and negatives of all ranks, six rows each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6 * dist.get_world_size(), width, generator=generator).to(dtype) for _ in range(3)]


GROUPS = torch.tensor([0, 1, 2, 0, 3, 4, 1, 5, 0, 6, 7, 2])
"""Of the joined batch; some rows share theirs with rows of the other rank."""
MARGINS = torch.linspace(-0.1, 0.1, 12)
OTHERS, OF_NEGATIVES = torch.arange(12) // 2, torch.arange(12).roll(4) // 2
"""The second groups, of positives, and those of negatives."""
ALL_DIRECTIONS = ["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"]
VARIANTS = {
    "variants": {"groups": "column", "row_margins": True, "matryoshka_dims": [8, 3], "triplet_margin": 0.3},
    "own negatives": {"groups": "column", "negatives_scope": "own"},
    "protected negatives": {"mask_negatives": False},
    "all directions": {"groups": "column", "directions": ALL_DIRECTIONS, "triplet_margin": 0.3},
    "distilled": {"directions": ALL_DIRECTIONS, "distill_weight": 2.0, "distill_temperature": 0.2},
    "one softmax a direction": {"directions": ALL_DIRECTIONS[:2], "partition_mode": "per_direction"},
}


def on_embeddings(case: dict, folder: Path) -> dict:
    """Loss and gradients of given embeddings: ours, sentence-transformers', and ours in half types."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from gist_fast import losses as ours

    student, guide = load(case["student"]), load(case["guide"])
    own = slice(6 * dist.get_rank(), 6 * (dist.get_rank() + 1))
    results = {}
    for name, module, dtype in (
        ("ours", ours, torch.float32),
        ("theirs", theirs, torch.float32),
        ("half", ours, torch.float32),
        ("bf16", ours, torch.bfloat16),
        *((name, ours, torch.float32) for name in VARIANTS),
    ):
        kind = module.CachedGISTEmbedLoss
        variants = VARIANTS.get(name, {})
        loss = kind(
            student, guide, temperature=0.1, mini_batch_size=6, margin=0.05, gather_across_devices=True, **variants
        )
        if name == "variants":
            loss._rows = [{"group": GROUPS[own], "margin": MARGINS[own]}]
        if name == "all directions":
            loss._rows = [{"group": GROUPS[own]}]
        if name == "own negatives":
            loss._rows = [{"group": each[own]} for each in (GROUPS, OTHERS, OF_NEGATIVES)]
        if name == "half":
            loss.gather_guide_dtype = "float16"
        leaves = [[x[own].clone().requires_grad_()] for x in embeddings(8, 0, dtype)]
        judged = 2 if name == "protected negatives" else 3
        value = loss.calculate_loss(leaves, [[x[own]] for x in embeddings(5, 1)][:judged])
        value.backward()
        results[name] = [value.detach(), *(parts[0].grad for parts in leaves)]
    for name, module in (("our ranking", ours), ("their ranking", theirs)):
        loss = module.CachedMultipleNegativesRankingLoss(
            student, gather_across_devices=True, directions=ALL_DIRECTIONS, hardness_mode="in_batch_negatives",
            hardness_strength=3.0,
        )  # fmt: skip
        leaves = [[x[own].clone().requires_grad_()] for x in embeddings(8, 0)]
        value = loss.calculate_loss(leaves, []) if module is ours else loss.calculate_loss(leaves)
        value.backward()
        results[name] = [value.detach(), *(parts[0].grad for parts in leaves)]
    results["student"], results["guide"] = embeddings(8, 0), embeddings(5, 1)
    return results


def odd_batch(case: dict, folder: Path) -> dict:
    """The loss called as a trainer calls it, with rows or columns that differ between the ranks."""
    from gist_fast import losses as ours

    student, guide = load(case["student"]), load(case["guide"])
    loss = getattr(ours, case["loss"])(student, guide, gather_across_devices=True)
    rows, columns = case["rows"][dist.get_rank()], case["columns"][dist.get_rank()]
    features = []
    for _ in range(columns):
        f = dict(student.preprocess([f"row {k}" for k in range(max(rows, 1))]))
        features.append({k: v[:rows] if isinstance(v, torch.Tensor) else v for k, v in f.items()})
    try:
        loss(features)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {}


def main() -> None:
    folder = Path.cwd()
    cases = json.loads((folder / "cases.json").read_text())
    results = {}
    for case in cases:
        results[case["name"]] = globals()[case["run"]](case, folder)
    torch.save(results, folder / f"rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
