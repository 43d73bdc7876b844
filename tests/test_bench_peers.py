"""The competitors: the table of who supports what, that each computes the same loss, and how they may fail."""

from __future__ import annotations

import importlib.util
import inspect
import re
import tomllib
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gist_fast.bench import exact, isolated, peers
from gist_fast.bench.cases import BLOCKS, LossCase, WrongResult, coarse, exact_gradients
from gist_fast.bench.isolated import check_and_measure, in_own_process
from gist_fast.bench.loss import LossSuite
from gist_fast.bench.peers import PEERS, Peer
from gist_fast.runtime.memory import free_memory, is_out_of_memory, peak_memory

SUITE = LossSuite()
KINDS = [(guide, blocks) for guide, blocks in product(("model", "self", "none"), (BLOCKS, ("ap",), ("ap", "pp")))]
ON_A_CPU = [name for name in PEERS if name not in ("gist_fast tiled", "memeff", "inf-cl", "plain compiled")]


@pytest.mark.parametrize("name", ON_A_CPU)
@pytest.mark.parametrize(("guide", "blocks"), KINDS)
def test_every_competitor_computes_the_reference(name, guide, blocks):
    case = LossCase(61, 24, 17, guide=guide, blocks=blocks)
    if SUITE.obstacle(case, name) is None:
        SUITE.check(case, name)
        parts = SUITE.build(case, name)
        assert set(parts) == ({"both"} if PEERS[name].whole else {"forward", "backward"})
        for call in parts.values():
            call()
    else:
        assert name.startswith("st ")
        assert guide != "model"


@pytest.mark.slow
@pytest.mark.skipif(peers._compiler_missing(LossCase(8)) is not None, reason="no C++ compiler")
def test_the_compiled_competitor_computes_the_reference():
    SUITE.check(LossCase(61, 24, 17), "plain compiled")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_types_are_checked_too(dtype):
    for name in ("gist_fast", "plain"):
        SUITE.check(LossCase(61, 24, 17, dtype=dtype), name)


def test_a_wrong_result_is_seen_and_not_timed(monkeypatch):
    def almost(case):
        right = peers.plain_matmul(case)
        return lambda e: right(e) * 1.001

    monkeypatch.setitem(PEERS, "plain", Peer("plain", lambda case: None, almost))
    case = LossCase(61, 24, 17)
    with pytest.raises(WrongResult, match=r"relative error of the loss 1\.0e-03 at B 61, allowed 1e-04"):
        SUITE.check(case, "plain")
    assert check_and_measure(SUITE, case, "plain").outcome == "wrong"


@pytest.mark.parametrize("name", ["gist_fast", "gist_fast tiled", "gist_fast reference"])
def test_in_bfloat16_ours_are_held_to_less_than_others(name, monkeypatch):
    def off_by_three_per_cent(case):
        right = peers.ours(case, "reference")
        return lambda e: right(e) * 1.03

    case = LossCase(61, 24, 17, dtype="bfloat16")
    for who in (name, "plain"):
        monkeypatch.setitem(PEERS, who, Peer(who, lambda case: None, off_by_three_per_cent))
    SUITE.check(case, "plain")
    with pytest.raises(WrongResult, match="allowed 2e-02"):
        SUITE.check(case, name)


@pytest.mark.parametrize(("guide", "blocks"), KINDS)
def test_sampled_rows_have_the_reference_s_gradients(guide, blocks, monkeypatch):
    monkeypatch.setattr(exact, "CHUNK_PAIRS", 61 * 7)
    case = LossCase(61, 24, 17, guide=guide, blocks=blocks)
    e = case.embeddings() if guide == "self" else coarse(case.embeddings())
    rows = torch.tensor([60, 0, 17])
    loss, anchors, positives = exact_gradients(case, e)
    found = exact.exact_sample(case, e, rows)
    for got, want in ((found.loss, loss), (found.anchors, anchors[rows]), (found.positives, positives[rows])):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_large_batches_are_held_to_float32(monkeypatch):
    monkeypatch.setattr(exact, "FLOAT64_ROWS", 60)
    case = LossCase(61, 24, 17)
    e = coarse(case.embeddings())
    found = exact.exact_sample(case, e, torch.tensor([5, 6]))
    assert found.anchors.dtype == torch.float32
    torch.testing.assert_close(found.anchors.double(), exact_gradients(case, e)[1][5:7], rtol=1e-4, atol=1e-7)


def test_ours_is_checked_at_its_full_size(monkeypatch):
    case = LossCase(2000, 24, 17)
    assert check_and_measure(SUITE, case, "gist_fast").outcome == "ok"

    def almost(case):
        right = peers.ours(case)
        # Right at the size that everybody is checked at.
        return lambda e: right(e) * (1.001 if len(e.anchors) > 1000 else 1.0)

    monkeypatch.setitem(PEERS, "gist_fast", Peer("gist_fast", lambda case: None, almost))
    outcome = check_and_measure(SUITE, case, "gist_fast")
    assert (outcome.outcome, outcome.why) == ("wrong", "relative error of the loss 1.0e-03 at B 2000, allowed 1e-04")


def test_a_failure_is_a_row(monkeypatch):
    def broken(case):
        raise ValueError("no such kernel")

    monkeypatch.setitem(PEERS, "plain", Peer("plain", lambda case: None, broken))
    outcome = check_and_measure(SUITE, LossCase(61, 24, 17), "plain")
    assert (outcome.outcome, outcome.why) == ("failed", "ValueError: no such kernel (broken)")


def test_the_table_in_the_module_names_every_competitor():
    listed = re.findall(r"^(\S.*?)  +", peers.__doc__.split("\n====")[2], flags=re.MULTILINE)
    named = {line for line in listed if not line.startswith("=")}
    assert named == set(PEERS)


def test_who_needs_a_card_says_so():
    case = LossCase(64, 128, guide="none", blocks=("ap",))
    assert PEERS["memeff"].obstacle(case) == PEERS["inf-cl"].obstacle(case) == "runs on a CUDA device only"
    assert "no guide model" in PEERS["memeff"].obstacle(LossCase(64))
    assert "multiples of 128" in PEERS["inf-cl"].obstacle(LossCase(64, 96, guide="none", blocks=("ap",)))
    assert "always has the block ap" in PEERS["memeff"].obstacle(LossCase(64, guide="none", blocks=("aa",)))


def test_the_tiled_backend_is_a_competitor_on_a_card_alone(monkeypatch):
    peer = PEERS["gist_fast tiled"]
    assert peer.obstacle(LossCase(64)) == "where there is no card, auto takes it for all but small batches"
    assert peer.obstacle(LossCase(64, device="cuda:0")) is None
    taken = []
    function = "gist_fast.functional.function.guided_contrastive_loss"
    monkeypatch.setattr(function, lambda *_, backend, **__: taken.append(backend))
    case = LossCase(61, 24, 17)
    peer.make(case)(case.embeddings())
    assert taken == ["tiled"]


def test_sentence_transformers_has_a_size_that_fits_the_card_s_memory(monkeypatch, tmp_path):
    from benchmarks.gpu import suites
    from benchmarks.gpu.bench import Bench

    plans = []

    def run(suites, plan, **_):
        plans.append(plan)
        return SimpleNamespace(rows=[])

    monkeypatch.setattr("benchmarks.gpu.bench.run", run)
    suites.peers(Bench(tmp_path, "peers", toy=False))
    cases = SUITE.cases(plans[0])
    bytes_of = [PEERS["st GISTEmbedLoss"].least_memory(case) for case in cases]
    assert bytes_of[0] == 13.5 * 2**30 < 0.8 * 80e9 < bytes_of[1]


@pytest.mark.parametrize("name", ["memeff", "inf-cl"])
def test_what_is_said_to_install_a_competitor_installs_it(name, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    said = PEERS[name].obstacle(LossCase(64, 128, device="cuda", guide="none", blocks=("ap",)))
    pattern = r"the package (\S+) is not installed \(pip install 'gist-fast\[(\w+)\]'\)"
    package, extra = re.fullmatch(pattern, said).groups()
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert package in [re.match(r"[\w-]+", given).group() for given in project["optional-dependencies"][extra]]


def test_the_adapters_give_what_the_real_ones_take():
    """Their losses compute on a card only; their arguments can be looked at anywhere."""
    for module in ("memeff", "inf_cl"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} (the extra [bench]) is not installed")
    from inf_cl import cal_flash_loss
    from memeff import MemoryEfficientQwen3Loss

    for case in (LossCase(64, guide="self"), LossCase(64, guide="none", blocks=("ap", "pp"))):
        call = PEERS["memeff"].make(case)
        (loss,) = (cell.cell_contents for cell in call.__closure__)
        assert isinstance(loss, MemoryEfficientQwen3Loss)
        assert (loss.temperature, loss.stable, loss.normalized_inputs) == (0.05, False, False)
        assert loss.margin == (0.1 if case.guide == "self" else 2.0)
        assert (loss.use_qq_negatives, loss.use_dd_negatives) == ("aa" in case.blocks, True)
        with pytest.raises(ValueError, match="CUDA"):
            call(case.embeddings())
    inspect.signature(cal_flash_loss).bind(None, None, scale=20.0, head_dim=128)


def test_a_missing_compiler_is_a_reason(monkeypatch):
    monkeypatch.setattr(peers.shutil, "which", lambda name: None)
    assert "needs a C++ compiler" in PEERS["plain compiled"].obstacle(LossCase(64))


def test_minimal_work():
    unit = 2 * 100**2
    assert LossCase(100, 30, 7).flops() == (8 * 30 + 2 * 7) * unit
    assert LossCase(100, 30, 7).flops("forward") == 2 * (30 + 7) * unit
    assert LossCase(100, 30, 7, blocks=("ap",)).flops() == (30 + 7 + 3 * 30) * unit
    assert LossCase(100, 30, 7, guide="self", blocks=("ap",)).flops() == 4 * 30 * unit


def test_memory_by_formula_is_a_lower_bound_that_is_not_far_off():
    """The formula leaves out what cannot fit; it must never leave out what would."""
    case = LossCase(192, 256, 256)
    for name, most in (("st GISTEmbedLoss", 2.0), ("plain", 6.0), ("gist_fast reference", 6.0)):
        outcome = in_own_process(SUITE, case, name, 4 << 30, 120)
        assert outcome.outcome == "ok", outcome
        least = PEERS[name].least_memory(case)
        assert least <= outcome.memory <= most * least + (8 << 20), (name, outcome.memory / least)


def test_a_call_that_takes_too_much_is_an_outcome_and_the_process_lives():
    case = LossCase(700, 256, 256)  # some 4 GB
    outcome = in_own_process(SUITE, case, "st GISTEmbedLoss", 1 << 30, 120, known_right=True)
    assert outcome.outcome == "out of memory"
    assert outcome.why == "ran out: 1.2 GiB are free, of which 80 % may be taken"


@pytest.mark.parametrize(
    ("cold", "budget", "patience", "found"),
    [
        (7.2, 12.0, 60.0, 0.1),  # 2 x 7.2 s are more than 12: a second iteration tells
        (7.2, 15.0, 60.0, 7.2),  # no need of one
        (7.2, 7.0, 60.0, 7.2),  # the first alone is more than there is
        (4.9, 1.0, 60.0, 0.1),  # so little is worth it anyhow
        (7.2, 12.0, 10.0, 7.2),  # it might be stopped before it is done
    ],
)
def test_who_was_slow_because_it_was_cold_takes_a_second_turn(monkeypatch, cold, budget, patience, found):
    now, iterations = [0.0], iter((cold, 0.1))

    def iteration():
        now[0] += next(iterations)

    monkeypatch.setattr(isolated, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for name in ("check", "check_whole"):
        monkeypatch.setattr(SUITE, name, lambda case, name: None)
    monkeypatch.setattr(SUITE, "build", lambda case, name: {"whole": iteration})
    outcome = check_and_measure(SUITE, LossCase(8), "plain", budget=budget, patience=patience)
    assert (outcome.outcome, outcome.seconds) == ("ok", pytest.approx(found))


def test_what_torch_holds_of_a_card_counts_as_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 << 30, 9 << 30))
    assert free_memory("cuda:0") == 8 << 30


def test_patience_ends():
    outcome = in_own_process(SUITE, LossCase(600, 256, 256), "st GISTEmbedLoss", 8 << 30, 0.05)
    assert outcome.outcome == "not run"
    assert "took more than" in outcome.why


def test_peak_memory_counts_what_a_call_takes_and_gives_back():
    def call():
        x = torch.ones(40 << 20, dtype=torch.uint8)
        del x
        return torch.ones(8 << 20, dtype=torch.uint8)

    assert 40 << 20 <= peak_memory(call) + (1 << 20) < 56 << 20


@pytest.mark.parametrize(
    ("error", "out_of_memory"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error, out_of_memory):
    assert is_out_of_memory(error) is out_of_memory
