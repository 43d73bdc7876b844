"""Speed, memory, power and energy in the logs: the values, by a clock and a card that are made up here."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from transformers import ProgressCallback, TrainerCallback

from gist_fast import GISTTrainer, GISTTrainingArguments
from gist_fast.losses import GISTEmbedLoss
from gist_fast.runtime import power as meters
from gist_fast.runtime.memory import process_memory_mib
from gist_fast.runtime.power import PowerMeter, power_meter
from gist_fast.training.callbacks import (
    DeviceCallback,
    ThroughputCallback,
    gathered_figures,
    mean_over_processes,
    show_on_bar,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Nvml:
    """What the driver says: 60 W, and joules as told."""

    class NVMLError(Exception):
        pass

    def __init__(self, joules=5000.0, watts=60.0):
        self.joules, self.watts, self.asked_for = joules, watts, []

    def nvmlInit(self):  # noqa: N802
        self.ready = True

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        self.asked_for.append(uuid)
        return 7

    def nvmlDeviceGetTotalEnergyConsumption(self, card):  # noqa: N802
        assert card == 7
        if self.joules is None:
            raise self.NVMLError("not supported")
        return int(self.joules * 1000)

    def nvmlDeviceGetPowerUsage(self, card):  # noqa: N802
        if self.watts is None:
            raise self.NVMLError("not supported")
        return int(self.watts * 1000)


ARGS = types.SimpleNamespace(device=torch.device("cpu"))


def batch(rows: int, lengths: tuple[int, ...], width: int) -> dict[str, torch.Tensor]:
    """Anchors and positives of the same lengths, `rows` of them, padded to `width`."""
    assert len(lengths) == rows
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    columns = {}
    for column in ("anchor", "positive"):
        columns |= {f"{column}_input_ids": mask * 9, f"{column}_attention_mask": mask}
    return columns


class TestThroughput:
    def test_counts_and_times_without_evaluating_and_saving(self):
        clock = Clock()
        source = ThroughputCallback(clock)
        source.on_train_begin(ARGS, None, None)
        for seconds in (2.0, 3.0):
            source.count(batch(3, (2, 5, 7), 11))
            clock.now += seconds
            source.on_step_end(ARGS, None, None)
        clock.now += 40
        source.on_evaluate(ARGS, None, None)
        clock.now += 60
        source.on_save(ARGS, None, None)
        clock.now += 1  # reading the next batch
        source.count(batch(2, (1, 1), 4))
        clock.now += 4
        source.on_step_end(ARGS, None, None)
        amounts = source.amounts()
        assert amounts == {"pairs": 8.0, "tokens": 2.0 * (14 + 14 + 2), "seconds": 10.0}
        assert source.figures([amounts]) == {"pairs_per_second": 0.8, "tokens_per_second": 6.0}
        # What comes after the log belongs to the next one, and an evaluation then to none.
        clock.now += 1
        source.on_evaluate(ARGS, None, None)
        source.count(batch(1, (3,), 3))
        clock.now += 2
        assert source.amounts() == {"pairs": 1.0, "tokens": 6.0, "seconds": 2.0}
        assert source.figures([source.amounts()]) == {}

    def test_processes_are_added_up(self):
        processes = [
            {"pairs": 30.0, "tokens": 100.0, "seconds": 5.0},
            {"pairs": 20.0, "tokens": 60.0, "seconds": 4.0},
        ]
        assert ThroughputCallback().figures(processes) == {"pairs_per_second": 10.0, "tokens_per_second": 32.0}

    def test_known_extents_flattened_batches_and_batches_elsewhere(self):
        source = ThroughputCallback(Clock())
        spans = np.array([[0, 4], [3, 9]])
        source.count({"a_input_ids": torch.ones(2, 9), "a_extents": spans, "b_input_ids": torch.ones(2, 5)})
        ends = torch.tensor([0, 3, 7, 8])
        source.count({"a_input_ids": torch.ones(1, 8), "a_cu_seq_lens_q": ends})
        assert (source._pairs, source._tokens) == (5, 4 + 6 + 10 + 8)
        # A mask on an accelerator is not read while steps run; the meta device could not be read at all.
        mask = torch.ones(4, 6, device="meta")
        source.count({"a_input_ids": mask, "a_attention_mask": mask})
        assert (source._pairs, source._tokens) == (9, 28)
        assert source._tokens_on_device.device.type == "meta"
        source._tokens_on_device = torch.tensor(24)
        assert source.amounts()["tokens"] == 52


class TestDevice:
    def test_energy_between_logs(self):
        clock, nvml = Clock(), Nvml()
        source = DeviceCallback(clock, PowerMeter("GPU-1", nvml))
        source.on_train_begin(ARGS, None, None)
        source.count(batch(3, (2, 5, 7), 11))
        source.count(batch(1, (2,), 2))
        clock.now += 8
        nvml.joules += 1000
        figures = source.figures([source.amounts()])
        assert figures["gpu_energy_j"] == pytest.approx(1000)
        assert figures["gpu_power_w"] == pytest.approx(125)
        assert figures["energy_per_pair_j"] == pytest.approx(250)
        nvml.joules += 10
        clock.now += 1
        again = source.figures([source.amounts()])
        assert again["gpu_energy_j"] == pytest.approx(10)
        assert "energy_per_pair_j" not in again

    def test_cards_that_tell_less(self):
        source = DeviceCallback(Clock(), PowerMeter("GPU-1", Nvml(joules=None)))
        source.on_train_begin(ARGS, None, None)
        figures = source.figures([source.amounts()])
        assert figures["gpu_power_w"] == 60
        assert not {"gpu_energy_j", "energy_per_pair_j"} & set(figures)
        source = DeviceCallback(Clock(), PowerMeter("GPU-1", Nvml(joules=None, watts=None)))
        source.on_train_begin(ARGS, None, None)
        assert set(source.figures([source.amounts()])) == {"process_memory_mib"}

    def test_processes_are_added_up_but_not_with_one_missing(self):
        one = {
            "process_memory_mib": 10.0,
            "pairs": 2.0,
            "gpu_energy_j": 5.0,
            "gpu_power_w": 50.0,
            "gpu_allocated_peak_mib": 3.0,
        }
        other = {
            "process_memory_mib": 20.0,
            "pairs": 3.0,
            "gpu_energy_j": 15.0,
            "gpu_power_w": 70.0,
            "gpu_allocated_peak_mib": 4.0,
        }
        assert DeviceCallback().figures([one, other]) == {
            "process_memory_mib": 30.0,
            "gpu_power_w": 120.0,
            "gpu_energy_j": 20.0,
            "energy_per_pair_j": 4.0,
            "gpu_allocated_peak_mib": 4.0,
        }
        del other["gpu_energy_j"], other["gpu_power_w"]
        assert set(DeviceCallback().figures([one, other])) == {"process_memory_mib", "gpu_allocated_peak_mib"}

    def test_the_card_is_named_as_torch_names_it(self, monkeypatch, caplog):
        assert power_meter(torch.device("cpu")) is None
        nvml = Nvml()
        PowerMeter("1b2c", nvml), PowerMeter("MIG-77", nvml)
        assert nvml.asked_for == ["GPU-1b2c", "MIG-77"]
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="1b2c"))
        monkeypatch.setattr(meters, "PowerMeter", lambda uuid: (_ for _ in ()).throw(OSError(f"no driver for {uuid}")))
        with caplog.at_level("INFO", "gist_fast"):
            assert power_meter(torch.device("cuda")) is None
        assert "No power and energy in the logs: NVML says no driver for 1b2c." in caplog.text

    def test_memory_of_this_process(self):
        # In a process of its own: in this one an earlier test's memory may go back to the system in between.
        run = subprocess.run([sys.executable, "-c", HOLDS_64_MIB], capture_output=True, text=True, check=True)
        assert float(run.stdout) == pytest.approx(64, abs=8)


HOLDS_64_MIB = """\
from gist_fast.runtime.memory import process_memory_mib
before = process_memory_mib()
held = b"1" * (64 * 2**20)
print(process_memory_mib() - before)
"""


class OneLog(TrainerCallback):
    """Another reporting callback, as TensorBoard's: what it is shown."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **_):
        self.seen.append(dict(logs))


def arguments(cls, tmp_path, **more):
    options = {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 16}
    options |= {"logging_steps": 2, "report_to": [], "save_strategy": "no", "use_cpu": True}
    return cls(**{**options, **more})


FIGURES = {"pairs_per_second", "tokens_per_second", "process_memory_mib"}


def test_they_reach_the_log_the_bar_and_every_reporter(student, guide, pairs, tmp_path, monkeypatch):
    reporter, shown = OneLog(), []
    clock = Clock()
    speed = ThroughputCallback(clock)
    monkeypatch.setattr(ProgressCallback, "on_step_end", lambda self, *_, **__: shown.append(self.training_bar.postfix))
    trainer = GISTTrainer(
        student, arguments(GISTTrainingArguments, tmp_path), pairs, guide=guide, callbacks=[reporter, speed]
    )
    assert sum(isinstance(callback, ThroughputCallback) for callback in trainer.callback_handler.callbacks) == 1
    step = trainer.training_step

    def takes_half_a_second(*args, **kwargs):
        clock.now += 0.5
        return step(*args, **kwargs)

    trainer.training_step = takes_half_a_second
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 2
    for entry, seen in zip(steps, [entry for entry in reporter.seen if "loss" in entry], strict=True):
        assert set(entry) >= FIGURES | {"hardest_negative_similarity", "masked_ap", "masked_aa", "masked_pp"}
        assert entry["pairs_per_second"] == 32.0
        assert {name: entry[name] for name in FIGURES} == {name: seen[name] for name in FIGURES}
    # Every text once an epoch, all four steps: the tokens are those that the student makes of the 64 pairs.
    texts = [*pairs["anchor"], *pairs["positive"]]
    tokens = sum(len(student.preprocess([text])["input_ids"][0]) for text in texts)
    assert sum(entry["tokens_per_second"] for entry in steps) == pytest.approx(tokens)
    assert any(postfix and "pairs/s=32" in postfix for postfix in shown)


def test_in_the_stock_trainer_they_do_no_harm(student, guide, pairs, tmp_path):
    reporter = OneLog()
    trainer = SentenceTransformerTrainer(
        student,
        arguments(SentenceTransformerTrainingArguments, tmp_path),
        pairs,
        loss=GISTEmbedLoss(student, guide),
        callbacks=[ThroughputCallback(), DeviceCallback(), reporter],
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["process_memory_mib"] > 50 for entry in steps] == [True, True]
    assert not any("pairs_per_second" in entry for entry in steps)
    assert [entry["process_memory_mib"] for entry in reporter.seen if "loss" in entry] == [
        entry["process_memory_mib"] for entry in steps
    ]


def test_figures_of_one_process_and_the_mean_of_several(monkeypatch):
    figures = gathered_figures([TrainerCallback(), DeviceCallback(Clock())], 1)
    assert figures == {"process_memory_mib": pytest.approx(process_memory_mib(), abs=8)}
    monkeypatch.setattr(
        "accelerate.utils.gather_object", lambda one: [*one, {"masked_ap": 0.5}, {"masked_ap": 0.1, "masked_aa": 0.2}]
    )
    assert mean_over_processes({"masked_ap": 0.3}, 3) == {"masked_ap": pytest.approx(0.3), "masked_aa": 0.2}
    assert mean_over_processes({"masked_ap": 0.3}, 1) == {"masked_ap": 0.3}
    show_on_bar([ProgressCallback()], {"pairs_per_second": 3.0})  # before there is a bar
