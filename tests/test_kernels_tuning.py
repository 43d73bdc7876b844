"""Tuning, with a timer that is told the answer."""

from __future__ import annotations

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
from gist_fast.kernels import tuning
from gist_fast.kernels.config import HALF, TABLE, Config

DEFAULT = TABLE["sm_90", HALF]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})


def key(**changed: object) -> str:
    what = {
        "device": "a card", "versions": ("2.13", "3.9"), "dtypes": ("torch.bfloat16",), "dims": (384, 1024),
        "rows": 32768, "pairs": 3 << 30,
    }  # fmt: skip
    return tuning.make_key("forward", **{**what, **changed})


class Timer:
    """Likes 8 warps and 4 stages, and cannot run 2 stages at all."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, config: Config) -> float:
        self.calls += 1
        if any(launch.stages == 2 for launch in (config.forward, config.forward_symmetric)):
            raise RuntimeError("out of resource")
        return sum(10 - launch.warps + abs(launch.stages - 4) for launch in (config.forward, config.forward_symmetric))


def test_what_tells_keys_apart() -> None:
    others = [{}, {"variant": "self-guided"}, {"dims": (384, 0)}, {"rows": 65536}, {"versions": ("2.11", "3.6")}]
    assert len({key(**other) for other in others}) == len(others)
    assert key(rows=32769) == key()


def test_the_fastest_that_runs_wins_and_the_rest_stays() -> None:
    found = tuning.tuned(key(), DEFAULT, "forward", Timer())
    assert (found.forward.warps, found.forward.stages) == (8, 4)
    assert (found.forward_symmetric.warps, found.forward_symmetric.stages) == (8, 4)
    assert replace(found, forward=DEFAULT.forward, forward_symmetric=DEFAULT.forward_symmetric) == DEFAULT


def test_backward_tunes_its_own_launches_alone() -> None:
    def seconds(config: Config) -> float:
        return 5 - config.dlogits.stages - config.forward.stages

    found = tuning.tuned(key(), DEFAULT, "backward", seconds)
    assert found == replace(DEFAULT, dlogits=found.dlogits)
    assert found.dlogits.stages == 4


def test_an_answer_is_kept_for_the_process_and_for_the_next() -> None:
    timer = Timer()
    found = tuning.tuned(key(), DEFAULT, "forward", timer)
    calls = timer.calls
    assert tuning.tuned(key(), DEFAULT, "forward", timer) == found
    tuning._known.clear()
    assert tuning.tuned(key(), DEFAULT, "forward", timer) == found
    assert timer.calls == calls


@pytest.mark.parametrize(
    "changed",
    [{"device": "b card"}, {"versions": ("2.14", "3.9")}, {"dtypes": ("torch.float16",)}, {"dims": (768, 1024)},
     {"rows": 65536}, {"pairs": 1 << 20}],
)  # fmt: skip
def test_another_question_gets_another_answer(changed: dict) -> None:
    assert key(**changed) != key()
    assert key(rows=32769) == key()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"key": 1}', "\x00\xff", '{"key": KEY, "config": {}}', '{"key": KEY, "config": [1]}'],
)
def test_a_damaged_file_counts_as_absent_and_is_replaced(content: str) -> None:
    path = tuning._path(key())
    path.write_text(content.replace("KEY", json.dumps(key())))
    timer = Timer()
    found = tuning.tuned(key(), DEFAULT, "forward", timer)
    assert timer.calls > 1
    tuning._known.clear()
    assert tuning._read(key()) == found


def test_the_step_is_tuned_too() -> None:
    def seconds(config: Config) -> float:
        return abs(config.block_k - 32) + 0.01 * config.forward.stages

    found = tuning.tuned(key(), DEFAULT, "forward", seconds)
    assert {launch.block_k for launch in found.launches().values()} == {32}
    assert found.forward.stages == 2


def test_masks_decided_again_keep_the_step_of_the_forward_pass() -> None:
    steps = set()

    def seconds(config: Config) -> float:
        steps.add(config.block_k)
        return 10 - config.masks.warps - config.dlogits_symmetric.columns / 64

    found = tuning.tuned(key(), tuning.with_step(DEFAULT, 32), "recompute", seconds)
    assert steps == {32}
    assert (found.masks.warps, found.dlogits_symmetric.columns) == (8, 128)
    # Nor is an answer in other steps taken from the disk.
    tuning._write(key(rows=1), DEFAULT)
    assert tuning._read(key(rows=1)) == DEFAULT
    assert tuning._read(key(rows=1), step=32) is None


def write_often(folder: str, stages: int) -> None:
    import os

    os.environ[tuning.FOLDER] = folder
    config = replace(DEFAULT, forward=replace(DEFAULT.forward, stages=stages))
    for _ in range(200):
        tuning._write(key(), config)


def test_writers_at_once_leave_one_whole_answer(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_often, args=(str(tmp_path), stages)) for stages in (2, 3, 4)]
    for writer in writers:
        writer.start()
    seen = 0
    while any(writer.is_alive() for writer in writers):
        if tuning._path(key()).exists():
            assert tuning._read(key()) is not None, "half a file was read"
            seen += 1
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen
    assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_cannot_be_written_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(tuning.FOLDER, str(tmp_path / "file"))
    assert tuning.tuned(key(), DEFAULT, "forward", Timer()).forward.warps == 8
    assert "cannot be written" in caplog.text


def test_it_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.SWITCH, raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv(tuning.SWITCH, "1")
    assert tuning.enabled()
