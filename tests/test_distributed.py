"""Several ranks train as one process with their joined batch would: weights, losses, and what is refused.

Real models, the real trainer, the launcher behind ``torchrun`` (or itself, where the command is started), gloo on the
CPU. What they are held to is computed here in float64, in one process, by the reference backend and a hand-written step
of gradient descent.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PAIRS
from distributed_worker import ALL_DIRECTIONS, GROUPS, MARGINS, OF_NEGATIVES, OTHERS, VARIANTS, load, without_dropout
from oracle import assert_close
from prestarted import Command, on_ranks

from gist_fast import guided_contrastive_loss

pytestmark = pytest.mark.skipif(os.name == "nt", reason="torchrun's rendezvous with gloo is not offered on Windows")

BATCH, TEMPERATURE, RATE = 4, 0.1, 0.1
HAVING = (0, 2, 3, 6, 8, 9)
"""The rows of ``uneven`` that have a negative: of the last ranks' none."""
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node"]


def launch(world: int, *command: object, folder: Path, launcher: list[str]) -> None:
    """Run ``-m module`` on `world` ranks."""
    log = folder / "log.txt"
    with log.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", *launcher, str(world), *map(str, command)],
            stdout=out, stderr=subprocess.STDOUT, timeout=400, cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    assert done.returncode == 0, log.read_text()[-6000:]


def run_cases(world: int, cases: list[dict], folder: Path) -> list[dict]:
    """What each rank wrote about each case."""
    (folder / "cases.json").write_text(json.dumps(cases))
    process = Command(folder=folder, first=on_ranks(world, "distributed_worker"))
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, (out + err).decode()[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_student, tiny_guide):
    """Fourteen rows of three columns of texts, of widely mixed length; with guide columns, and without."""
    from datasets import Dataset

    from gist_fast import embed_guide

    folder = tmp_path_factory.mktemp("data")
    texts = [[], [], []]
    for k, (question, answer) in enumerate(PAIRS[:14]):
        texts[0].append(" ".join([question] * (1 + k % 3)))
        texts[1].append(answer)
        texts[2].append(PAIRS[20 + (5 * k) % 14][1])
    plain = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), texts, strict=True)))
    plain.save_to_disk(str(folder / "plain"))
    guide = load(str(tiny_guide))
    columns = embed_guide(plain, guide, cache_dir=folder / "cache", show_progress_bar=False)
    columns.save_to_disk(str(folder / "columns"))
    pairs = plain.remove_columns("negative")
    pairs.save_to_disk(str(folder / "pairs"))
    uneven = pairs.add_column("negative", [text if k in HAVING else "" for k, text in enumerate(texts[2])])
    uneven.save_to_disk(str(folder / "uneven"))
    stored = [torch.tensor(columns[:][f"{name}_guide_embedding"]) for name in plain.column_names]
    live = [guide.encode(column, convert_to_tensor=True, show_progress_bar=False) for column in texts]
    return SimpleNamespace(folder=folder, texts=texts, stored=stored, live=live, student=str(tiny_student),
                           guide=str(tiny_guide))  # fmt: skip


def steps_of(world: int, rows: int) -> list[list[range]]:
    """For each step, the rows of each rank: whole batches go round, the last may be short."""
    batches = [range(k, min(k + BATCH, rows)) for k in range(0, rows, BATCH)]
    assert len(batches) % world == 0
    return [batches[k : k + world] for k in range(0, len(batches), world)]


def first(x: torch.Tensor, own: slice) -> torch.Tensor:
    """Some rows before all others."""
    return torch.cat([x[own], x[: own.start], x[own.stop :]])


def joined_step(
    student, texts: list[list[str]], guide: list[torch.Tensor], ranks: list[range], **options
) -> torch.Tensor:
    """The mean loss over the rows of all ranks, every rank's anchors against all candidates, and against its own
    anchors, or with directions against all anchors."""
    joined = [k for rows in ranks for k in rows]
    embeddings = [student(student.preprocess([column[k] for k in joined]))["sentence_embedding"] for column in texts]
    # In the type they have, since the loss rounds unit vectors to it, which may decide a comparison.
    guides = [g[joined] for g in guide[: len(texts)]]
    total, offset = 0.0, 0
    for rows in ranks:
        own = slice(offset, offset + len(rows))
        anchors = [first(x[0], own) if "directions" in options else x[0][own] for x in (embeddings, guides)]
        total = total + guided_contrastive_loss(
            anchors[0], embeddings[1], anchors[1], guides[1],
            negatives=embeddings[2:], guide_negatives=guides[2:], temperature=TEMPERATURE, offset=offset,
            rows=len(rows), reduction="sum", backend="reference", **options,
        )  # fmt: skip
        offset += len(rows)
    return total / len(joined)


def step_with_own_negatives(
    student, texts: list[list[str]], guide: list[torch.Tensor], ranks: list[range]
) -> torch.Tensor:
    """The same where the rows of `HAVING` have a negative, which is their own alone."""
    joined = [k for rows in ranks for k in rows]
    having = [k for k in joined if k in HAVING]
    chosen = zip(texts, (joined, joined, having), strict=True)
    anchors, positives, negatives = (
        student(student.preprocess([column[k] for k in rows]))["sentence_embedding"] for column, rows in chosen
    )
    total, offset = 0.0, 0
    for rows in ranks:
        own, theirs = slice(offset, offset + len(rows)), [k for k in rows if k in HAVING]
        options = {}
        if theirs:
            options["negatives"] = [negatives[[having.index(k) for k in theirs]]]
            options["guide_negatives"] = [guide[2][theirs]]
            options["negative_rows"] = [torch.tensor([k - rows.start for k in theirs])]
            options["negatives_scope"] = "own"
        total = total + guided_contrastive_loss(
            anchors[own], positives, guide[0][joined][own], guide[1][joined], temperature=TEMPERATURE, offset=offset,
            reduction="sum", backend="reference", **options,
        )  # fmt: skip
        offset += len(rows)
    return total / len(joined)


def one_process(
    data, guide: list[torch.Tensor], *, columns: int, steps: list[list[range]], accumulate: int = 1, step=joined_step
):
    """Changes of the student's weights, and the losses, by gradient descent in float64."""
    student = without_dropout(load(data.student)).double().train()
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    losses = []
    for k in range(0, len(steps), accumulate):
        parts = [step(student, data.texts[:columns], guide, ranks) for ranks in steps[k : k + accumulate]]
        loss = sum(parts) / len(parts)
        student.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in student.parameters():
                p -= RATE * p.grad if p.grad is not None else 0
        losses.append(loss.item())
    return {name: p.detach() - before[name] for name, p in student.named_parameters()}, losses


def changes(data, state: dict) -> dict:
    before = load(data.student).state_dict()
    return {name: (x.double() - before[name].double()) for name, x in state.items()}


def relative_error(got: dict, wanted: dict) -> float:
    """Of all weights together: the distance, in units of the wanted change."""
    assert got.keys() >= wanted.keys()
    difference = sum((got[name] - x).square().sum() for name, x in wanted.items())
    return (difference / sum(x.square().sum() for x in wanted.values())).sqrt().item()


def case(data, name: str, loss: str, dataset: str = "columns", *, guide: bool = False, run: str = "train", **options):
    arguments = {"learning_rate": RATE, **options.pop("arguments", {})}
    return {
        "name": name, "run": run, "loss": loss, "dataset": str(data.folder / dataset), "student": data.student,
        "guide": data.guide if guide else None, "arguments": arguments,
        "loss_arguments": {"temperature": TEMPERATURE, **options.pop("loss_arguments", {})}, **options,
    }  # fmt: skip


# Few tokens a mini-batch, so that ranks cut their batches into different numbers of them; some activations kept.
CACHED = {"mini_batch_num_tokens": 40, "activation_memory": 0.0}
KEPT = {"mini_batch_num_tokens": 40, "activation_memory": "auto"}
EVERY = {"directions": ALL_DIRECTIONS}
EACH = {"directions": ALL_DIRECTIONS[:2], "partition_mode": "per_direction"}
OWN = {"negatives_scope": "own"}


def test_two_ranks(data, tmp_path):
    """One start of two processes, since starting takes longest."""
    odd = {"run": "odd_batch", "guide": data.guide, "student": data.student}
    ranks = run_cases(
        2,
        [
            case(data, "plain", "GISTEmbedLoss"),
            case(data, "cached", "CachedGISTEmbedLoss", loss_arguments=CACHED),
            case(data, "kept", "CachedGISTEmbedLoss", "plain", guide=True, loss_arguments=KEPT),
            case(data, "accumulated", "CachedGISTEmbedLoss", loss_arguments=KEPT,
                 arguments={"gradient_accumulation_steps": 2}),
            case(data, "in the loop", "GISTEmbedLoss", "plain", guide=True,
                 arguments={"gradient_accumulation_steps": 2}),
            case(data, "bf16", "CachedGISTEmbedLoss", loss_arguments=CACHED, arguments={"bf16": True}),
            case(data, "all directions", "GISTEmbedLoss", loss_arguments=EVERY),
            case(data, "one softmax a direction", "CachedGISTEmbedLoss", loss_arguments={**KEPT, **EACH}),
            *(
                case(data, f"uneven {loss}", loss, "uneven", guide=True, loss_arguments={**more, **OWN})
                for loss, more in (("GISTEmbedLoss", {}), ("CachedGISTEmbedLoss", KEPT))
            ),
            {"name": "on embeddings", "run": "on_embeddings", "guide": data.guide, "student": data.student},
            case(data, "no batch", "GISTEmbedLoss", run="refused",
                 arguments={"accelerator_config": {"split_batches": True}}),
            {**odd, "name": "no row", "loss": "GISTEmbedLoss", "rows": [3, 0], "columns": [2, 2]},
            {**odd, "name": "no row, cached", "loss": "CachedGISTEmbedLoss", "rows": [0, 3], "columns": [2, 2]},
            {**odd, "name": "other columns", "loss": "GISTEmbedLoss", "rows": [3, 3], "columns": [2, 3]},
            case(data, "sharded", "GISTEmbedLoss", run="sharded", rows=[[0, 4], [4, 7]]),
        ],
        tmp_path,
    )  # fmt: skip
    steps = steps_of(2, 14)
    assert [[len(rows) for rows in step] for step in steps] == [[4, 4], [4, 2]]
    for name, guide, accumulate in (
        ("plain", data.stored, 1),
        ("cached", data.stored, 1),
        ("kept", data.live, 1),
        ("accumulated", data.stored, 2),
        ("in the loop", data.live, 2),
    ):
        wanted, losses = one_process(data, guide, columns=3, steps=steps, accumulate=accumulate)
        for results in ranks:
            assert relative_error(changes(data, results[name]["state"]), wanted) < 2e-5, name
            assert results[name]["losses"] == pytest.approx(losses, rel=1e-5), name
            assert results[name]["wrapper"] == "DistributedDataParallel"

    for name, options in (("all directions", EVERY), ("one softmax a direction", EACH)):
        step = functools.partial(joined_step, **options)
        wanted, losses = one_process(data, data.stored, columns=3, steps=steps, step=step)
        for results in ranks:
            assert relative_error(changes(data, results[name]["state"]), wanted) < 2e-5, name
            assert results[name]["losses"] == pytest.approx(losses, rel=1e-5), name

    wanted, losses = one_process(data, data.live, columns=3, steps=steps, step=step_with_own_negatives)
    for results in ranks:
        for name in ("uneven GISTEmbedLoss", "uneven CachedGISTEmbedLoss"):
            assert relative_error(changes(data, results[name]["state"]), wanted) < 2e-5, name
            assert results[name]["losses"] == pytest.approx(losses, rel=1e-5), name

    wanted, losses = one_process(data, data.stored, columns=3, steps=steps)
    assert 1e-5 < relative_error(changes(data, ranks[0]["bf16"]["state"]), wanted) < 0.1
    assert ranks[0]["bf16"]["losses"] == pytest.approx(losses, rel=0.02)

    for results in ranks:
        assert "dataloader_drop_last" in results["no batch"]["message"]
        assert "rank 1 of 2 has an empty batch" in results["no row"]["message"]
        assert "rank 0 of 2 has an empty batch" in results["no row, cached"]["message"]
        assert "number of columns differs between ranks: 2, 3" in results["other columns"]["message"]
        assert {results[name]["type"] for name in ("no batch", "no row", "no row, cached", "other columns")} == {
            "InputError"
        }

    student = without_dropout(load(data.student)).double()
    joined_step(student, data.texts, data.stored, [range(4), range(4, 7)]).backward()
    wanted = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    for results in ranks:
        # The ranks' losses are weighted by their rows, and FSDP averages as DistributedDataParallel does.
        assert relative_error({k: v.double() for k, v in results["sharded"].items()}, wanted) < 2e-5

    results = [rank["on embeddings"] for rank in ranks]
    for result in results:
        assert_close(result["ours"], result["theirs"], 1e-5)
        assert_close(result["our ranking"], result["their ranking"], 1e-5)
    for name, dtype, guide_dtype, tolerance in (
        ("ours", torch.float32, torch.float32, 1e-5),
        ("half", torch.float32, torch.float16, 1e-5),
        ("bf16", torch.bfloat16, torch.float32, 2e-2),
        *((name, torch.float32, torch.float32, 1e-5) for name in VARIANTS),
    ):
        joined = [x.to(dtype).double().requires_grad_() for x in results[0]["student"]]
        guide = [x.to(guide_dtype).double() for x in results[0]["guide"]]
        for rank, result in enumerate(results):
            own = slice(6 * rank, 6 * rank + 6)
            options = {"margin": 0.05}
            if name == "variants":
                options = {"margin": 0.05 + MARGINS[own], "groups": GROUPS}
                options |= {"matryoshka_dims": [8, 3], "triplet_margin": 0.3}
            kept = slice(None)
            if name == "own negatives":
                kept, groups = own, [OF_NEGATIVES[own]]
                options |= {"negatives_scope": "own", "groups": [GROUPS, OTHERS], "negative_groups": groups}
            if name == "protected negatives":
                options["mask_negatives"] = False
            anchors, guide_anchors = joined[0][own], guide[0][own]
            if "directions" in VARIANTS.get(name, {}):
                anchors, guide_anchors = first(joined[0], own), first(guide[0], own)
                options |= VARIANTS[name] | ({"groups": GROUPS} if "groups" in VARIANTS[name] else {})
            loss = guided_contrastive_loss(
                anchors, joined[1], guide_anchors, guide[1],
                negatives=[x[kept] for x in joined[2:]], guide_negatives=[x[kept] for x in guide[2:]],
                temperature=0.1, rows=6, offset=6 * rank, backend="reference", **options,
            )  # fmt: skip
            loss.backward()
            assert_close([result[name][0].double()], [loss.detach()], tolerance)
        # A rank's anchors get the gradient of its own loss; a candidate gets the sum over all ranks' losses.
        for k, whole in enumerate(joined):
            gathered = torch.cat([result[name][1 + k] for result in results])
            assert gathered.dtype == dtype
            assert_close([gathered.double()], [whole.grad], tolerance)


@pytest.mark.slow
def test_four_ranks(data, tmp_path):
    """Fourteen rows in one step: 4, 4, 4 and 2."""
    odd = {"run": "odd_batch", "guide": data.guide, "student": data.student, "columns": [2] * 4}
    ranks = run_cases(
        4,
        [
            case(data, "plain", "GISTEmbedLoss"),
            case(data, "kept", "CachedGISTEmbedLoss", "plain", guide=True, loss_arguments=KEPT),
            case(data, "pairs", "CachedGISTEmbedLoss", "pairs", guide=True, loss_arguments=CACHED),
            case(data, "all directions", "GISTEmbedLoss", loss_arguments=EVERY),
            case(data, "uneven", "CachedGISTEmbedLoss", "uneven", guide=True, loss_arguments={**KEPT, **OWN}),
            {**odd, "name": "no row", "loss": "CachedGISTEmbedLoss", "rows": [0, 3, 2, 0]},
        ],
        tmp_path,
    )
    steps = steps_of(4, 14)
    assert [[len(rows) for rows in step] for step in steps] == [[4, 4, 4, 2]]
    for name, guide, columns in (("plain", data.stored, 3), ("kept", data.live, 3), ("pairs", data.live, 2)):
        wanted, losses = one_process(data, guide, columns=columns, steps=steps)
        for results in ranks:
            assert relative_error(changes(data, results[name]["state"]), wanted) < 2e-5, name
            assert results[name]["losses"] == pytest.approx(losses, rel=1e-5), name
    step = functools.partial(joined_step, **EVERY)
    wanted, losses = one_process(data, data.stored, columns=3, steps=steps, step=step)
    for results in ranks:
        assert relative_error(changes(data, results["all directions"]["state"]), wanted) < 2e-5
        assert results["all directions"]["losses"] == pytest.approx(losses, rel=1e-5)
    wanted, losses = one_process(data, data.live, columns=3, steps=steps, step=step_with_own_negatives)
    for results in ranks:
        assert relative_error(changes(data, results["uneven"]["state"]), wanted) < 2e-5
        assert results["uneven"]["losses"] == pytest.approx(losses, rel=1e-5)
        assert "rank 0, 3 of 4 has an empty batch" in results["no row"]["message"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_the_command_on_two_ranks(launcher, data, tmp_path):
    """``gist-fast train``, unchanged, under either launcher: half the steps, and a model that loads."""
    from sentence_transformers import SentenceTransformer

    rows = [{"anchor": question, "positive": answer} for question, answer in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "output_dir": "out", "num_train_epochs": 1, "per_device_train_batch_size": 16, "learning_rate": 0.001,
        "logging_steps": 1, "use_cpu": True,
    }  # fmt: skip
    config = {"student": data.student, "guide": data.guide, "data": {"train": "pairs.jsonl"}, "training": training,
              "loss": {"temperature": 0.1, "gather_across_devices": True}}  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    if launcher == "torchrun":
        start = TORCHRUN
    else:
        # Its --cpu would start one process; the configuration says use_cpu.
        start = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
                 "--dynamo_backend", "no", "--num_processes"]  # fmt: skip
    launch(2, "-m", "gist_fast", "train", "config.yaml", folder=tmp_path, launcher=start)
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["max_steps"] == len(rows) // (2 * training["per_device_train_batch_size"])
    trained = SentenceTransformer(str(tmp_path / "out" / "final"), device="cpu").state_dict()
    changed = [name for name, x in load(data.student).state_dict().items() if not torch.equal(x, trained[name])]
    assert changed
