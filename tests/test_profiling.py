"""The times of a step's parts: they add up, and each lies where its work was done."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from gist_fast.losses import CachedGISTEmbedLoss, GISTEmbedLoss
from gist_fast.profiling import trace as step_times
from gist_fast.profiling.run import Profile, _of_card, _Watch
from gist_fast.profiling.trace import Span, StepTimes, busiest, innermost, median_step, read_trace, regions
from gist_fast.runtime import profiler_regions as ranges
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.power import PowerMeter
from gist_fast.runtime.profiler_regions import (
    GUIDE,
    IDLE,
    LOSS_BACKWARD,
    LOSS_FORWARD,
    NAMES,
    OPTIMIZER,
    OTHER,
    STUDENT_BACKWARD,
    STUDENT_FORWARD,
    STUDENT_FORWARD_AGAIN,
    TOKENISE,
    WAITING,
)


def event(name: str, ts: float, dur: float, cat: str = "user_annotation", tid: object = 1, **args: object) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur, "args": args}


class TestInnermost:
    def test_against_looking_at_every_moment(self):
        """Ranges nested at random on several threads; every half of the clock's ticks is looked at by itself."""
        for seed in range(60):
            draw = random.Random(seed)
            spans = []
            for _ in range(draw.randrange(12)):
                begin = draw.randrange(-5, 45)
                spans.append(Span(begin, begin + draw.randrange(0, 30), draw.choice("abc")))
            pieces = innermost(spans, 0, 40, "rest")
            assert [p.begin for p in pieces] == [0, *(p.end for p in pieces[:-1])]
            assert pieces[-1].end == 40
            for tick in range(40):
                open_now = [s for s in spans if s.begin <= tick < s.end]
                # The one that began last; of those that began together, the shortest.
                wanted = {"rest"}
                if open_now:
                    latest = max((s.begin, -s.end) for s in open_now)
                    wanted = {s.name for s in open_now if (s.begin, -s.end) == latest}
                assert next(p.name for p in pieces if p.begin <= tick < p.end) in wanted, (seed, tick)

    def test_ranges_on_the_border_and_outside(self):
        spans = [Span(-3, 2, "a"), Span(8, 30, "b"), Span(40, 50, "c"), Span(4, 4, "d")]
        assert innermost(spans, 0, 10, "-") == [Span(0, 2, "a"), Span(2, 8, "-"), Span(8, 10, "b")]
        assert innermost([], 1, 3, "-") == [Span(1, 3, "-")]


def host_events() -> list[dict]:
    """Two steps of 100 and 60 microseconds; autograd in a thread of its own (tid 2)."""
    return [
        event("step 3", 1000, 100),
        event(WAITING, 1002, 20),
        event(TOKENISE, 1005, 12),
        event(GUIDE, 1030, 10),
        event(STUDENT_FORWARD, 1040, 15),
        event(LOSS_FORWARD, 1055, 5),
        # The caller waits in here, while the other thread works.
        event(LOSS_BACKWARD, 1060, 30),
        event(STUDENT_BACKWARD, 1064, 20, tid=2),
        event(STUDENT_FORWARD_AGAIN, 1066, 8, tid=2),
        event(OPTIMIZER, 1092, 6),
        event("step 4", 1100, 60),
        event(WAITING, 1100, 20),
        event("somebody's own", 1130, 20),
        # Another library's range of the same kind, and the device's copy of one.
        event(GUIDE, 1130, 20, cat="gpu_user_annotation", tid=9),
        event("ProfilerStep#4", 1100, 60),
        {"ph": "i", "name": "Iteration Start", "ts": 1000},
        {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    ]


class TestStepTimes:
    def test_self_times_that_sum_to_the_wall_time(self):
        first, second = step_times.step_times(host_events())
        assert (first.step, second.step, first.device) == (3, 4, None)
        assert first.wall_ms == pytest.approx(0.1)
        expected = {
            WAITING: 8, TOKENISE: 12, GUIDE: 10, STUDENT_FORWARD: 15, LOSS_FORWARD: 5, LOSS_BACKWARD: 10,
            STUDENT_BACKWARD: 12, STUDENT_FORWARD_AGAIN: 8, OPTIMIZER: 6, OTHER: 14,
        }  # fmt: skip
        assert {name: round(1e3 * ms, 6) for name, ms in first.host.items()} == expected
        assert sum(expected.values()) == 100
        assert first.calls == dict.fromkeys(NAMES, 1)
        assert {n: round(1e3 * ms, 6) for n, ms in second.host.items() if ms} == {WAITING: 20, OTHER: 40}
        assert second.calls == {WAITING: 1}

    def test_no_step(self):
        with pytest.raises(InputError, match="no step"):
            step_times.step_times([event(GUIDE, 0, 1)])

    def test_device_time_goes_to_the_part_that_launched(self):
        """Kernels run late and overlap, one is a graph's, one has no launch, one runs over the step's end."""
        events = [
            *host_events(),
            event("cudaLaunchKernel", 1031, 2, cat="cuda_runtime", correlation=1),  # guide
            event("cuLaunchKernelEx", 1045, 1, cat="cuda_driver", correlation=2),  # student forward
            event("cudaLaunchKernel", 1068, 1, cat="cuda_runtime", tid=2, correlation=3),  # second pass
            event("cudaLaunchKernel", 1080, 1, cat="cuda_runtime", tid=2, correlation=4),  # student backward
            event("cudaMemcpyAsync", 1025, 1, cat="cuda_runtime", correlation=5),  # outside of all parts
            event("gemm", 1040, 20, cat="kernel", tid=7, correlation=1),
            event("gemm", 1055, 10, cat="kernel", tid=8, correlation=2),  # beside the first one from 1055 to 1060
            event("gemm", 1070, 5, cat="kernel", tid=7, correlation=3),
            event("softmax", 1090, 20, cat="kernel", tid=7, correlation=4),  # 10 of them in the next step
            event("Memcpy HtoD", 1026, 2, cat="gpu_memcpy", tid=7, correlation=5),
            event("fill", 1140, 5, cat="gpu_memset", tid=7, correlation=99),
        ]
        first, second = step_times.step_times(events)
        assert first.device is not None and second.device is not None
        micro = {name: round(1e3 * ms, 6) for name, ms in first.device.items() if ms}
        assert micro == {
            GUIDE: 15, STUDENT_FORWARD: 10, STUDENT_FORWARD_AGAIN: 5, STUDENT_BACKWARD: 10, OTHER: 2, IDLE: 58,
        }  # fmt: skip
        assert sum(micro.values()) == 100
        assert {n: round(1e3 * ms, 6) for n, ms in second.device.items() if ms} == {
            STUDENT_BACKWARD: 10, OTHER: 5, IDLE: 45,
        }  # fmt: skip
        # The host's times are as without a device.
        assert [step.host for step in (first, second)] == [s.host for s in step_times.step_times(host_events())]

        whole = {part.name: part for part in regions([first, second])}
        assert sum(part.device_share for part in whole.values()) == pytest.approx(1)
        assert sum(part.host_share for part in whole.values()) == pytest.approx(1)
        assert whole[IDLE].device_share == pytest.approx((58 + 45) / 160)
        assert whole[STUDENT_BACKWARD].device_ms == pytest.approx(0.010)
        assert (whole[WAITING].host_ms, whole[WAITING].least_ms) == pytest.approx((0.014, 0.008))
        assert (whole[WAITING].most_ms, whole[GUIDE].calls) == pytest.approx((0.02, 0.5))

        work = {one.name: one for one in busiest(events)}
        assert work["gemm"] == step_times.Work("gemm", 3, pytest.approx(0.035), GUIDE)
        assert work["softmax"].ms == pytest.approx(0.02)
        assert work["fill"].part == OTHER
        assert [one.name for one in busiest(events, count=2)] == ["gemm", "softmax"]

    def test_busiest_operators_without_a_device(self):
        """Self times: an operator that calls others is left with what it does itself."""
        events = [
            *host_events(),
            event("aten::linear", 1041, 12, cat="cpu_op"),
            event("aten::addmm", 1042, 10, cat="cpu_op"),
            event("aten::addmm", 1067, 5, cat="cpu_op", tid=2),
            event("aten::mul", 1067, 4, cat="cpu_op"),  # another thread, at the same time
            event("aten::mul", 2000, 500, cat="cpu_op"),  # outside of the steps
        ]
        assert busiest(events) == [
            step_times.Work("aten::addmm", 2, pytest.approx(0.015), STUDENT_FORWARD),
            step_times.Work("aten::mul", 1, pytest.approx(0.004), STUDENT_FORWARD_AGAIN),
            step_times.Work("aten::linear", 1, pytest.approx(0.002), STUDENT_FORWARD),
        ]

    def test_ranges_that_lie_across_nodes_of_autograd(self, tmp_path):
        node = "autograd::engine::evaluate_function: MulBackward0"
        events = [
            event(node, 10, 10, cat="cpu_op"),
            event(LOSS_BACKWARD, 12, 30),
            event(node, 40, 20, cat="cpu_op"),
            event(node, 41, 15, cat="cpu_op", tid=2),
            event(STUDENT_BACKWARD, 43, 47),
            event(STUDENT_FORWARD_AGAIN, 44, 5),  # lies in its node
        ]
        straight = step_times.straightened(events)
        assert [(e["ts"], e["dur"]) for e in straight] == [(10, 10), (10, 30), (40, 20), (41, 15), (40, 50), (44, 5)]
        step_times.write_trace(straight, tmp_path / "t.json.gz")
        assert read_trace(tmp_path / "t.json.gz") == straight

    def test_the_median_step_is_one_that_was(self):
        steps = [StepTimes(k, wall, {}, None, {}) for k, wall in enumerate([5.0, 1.0, 9.0, 2.0])]
        assert median_step(steps).wall_ms == 2.0
        assert median_step(steps[:3]).wall_ms == 5.0

    def test_files_that_are_no_traces(self, tmp_path):
        good = json.dumps({"traceEvents": [event(GUIDE, 0, 1)]}).encode()
        for name, content in (("plain.json", good), ("packed.json.gz", gzip.compress(good))):
            (tmp_path / name).write_bytes(content)
            assert read_trace(tmp_path / name) == [event(GUIDE, 0, 1)]
        for content in (b"", b"[1]", b"{}", gzip.compress(good)[:20], b"\xff\xfe"):
            (tmp_path / "bad.json").write_bytes(content)
            with pytest.raises(InputError, match=r"bad\.json: is no trace"):
                read_trace(tmp_path / "bad.json")


class TestRanges:
    def test_nothing_is_made_where_no_profiler_runs(self):
        assert not ranges.recording()
        assert ranges.within(GUIDE) is ranges.within(WAITING)
        x = torch.ones(3, requires_grad=True)
        loss = (2 * x).sum()
        ranges.follow_backward(loss, [x])
        assert x._backward_hooks is None and loss._backward_hooks is None

    def test_a_decorated_function_is_the_function(self):
        @ranges.named(GUIDE)
        def add(a: int, *, b: int = 2) -> int:
            """Adds."""
            return a + b

        assert (add(1), add(1, b=5), add.__name__, add.__doc__) == (3, 6, "add", "Adds.")
        with profile(activities=[ProfilerActivity.CPU]) as watched:
            assert ranges.recording()
            assert add(1, b=5) == 6
        assert [e.name for e in watched.events()].count(GUIDE) == 1

    def test_compiled_code_is_traced_as_if_ranges_were_not_there(self):
        compiled = []

        def backend(graph, inputs):
            compiled.append(graph)
            return graph.forward

        @ranges.named(LOSS_FORWARD)
        def part(x):
            with ranges.within(GUIDE):
                y = 2 * x
            loss = (y * x).sum()
            ranges.follow_backward(loss, [x])
            return loss

        fast = torch.compile(part, backend=backend, fullgraph=True)
        x = torch.arange(5.0, requires_grad=True)
        assert torch.equal(fast(x), part(x))
        with profile(activities=[ProfilerActivity.CPU]):
            assert torch.equal(fast(x), part(x))
        # Not once more for the profiler's sake.
        assert len(compiled) == 1

    def test_what_a_backward_pass_opens_it_closes(self, monkeypatch):
        log = []

        class Recorded:
            def __init__(self, name: str) -> None:
                self.name = name

            def __enter__(self) -> None:
                log.append(f"+{self.name}")

            def __exit__(self, *_: object) -> None:
                log.append(f"-{self.name}")

        class Node(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                log.append("node")
                return gradient

        monkeypatch.setattr(ranges, "profiler", SimpleNamespace(_is_profiler_enabled=True, record_function=Recorded))
        x = torch.ones(3, requires_grad=True)
        embeddings = [Node.apply(x), Node.apply(x)]
        loss = Node.apply(sum(embeddings).sum())
        ranges.follow_backward(loss, embeddings)
        loss.backward()
        assert log == [
            f"+{LOSS_BACKWARD}", "node", f"-{LOSS_BACKWARD}", f"+{STUDENT_BACKWARD}", "node", "node",
            f"-{STUDENT_BACKWARD}",
        ]  # fmt: skip

    def test_nothing_stays_open_after_a_backward_pass_that_fails(self):
        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise ValueError("on purpose")

        with profile(activities=[ProfilerActivity.CPU]) as watched:
            x = torch.ones(3, requires_grad=True)
            embedding = Fails.apply(x)
            loss = embedding.sum()
            ranges.follow_backward(loss, [embedding])
            with pytest.raises(ValueError, match="on purpose"):
                loss.backward()
            with ranges.within("after"):
                torch.ones(3) + 1
        found = {e.name: e.time_range for e in watched.events() if e.name in (STUDENT_BACKWARD, LOSS_BACKWARD, "after")}
        assert set(found) == {LOSS_BACKWARD, STUDENT_BACKWARD, "after"}
        assert found[LOSS_BACKWARD].end <= found[STUDENT_BACKWARD].start
        assert found[STUDENT_BACKWARD].end <= found["after"].start


class Probe(nn.Module):
    """The last module of a model: marks its forward and its backward pass in the trace, and changes nothing."""

    config_keys: tuple[str, ...] = ()

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, features: dict) -> dict:
        features["sentence_embedding"] = _Marked.apply(features["sentence_embedding"], self.name)
        return features


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        with torch.profiler.record_function(f"{name} forward"):
            return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.profiler.record_function(f"{ctx.name} backward"):
            return gradient.clone(), None


@pytest.fixture
def tokens(student, pairs):
    """Features of 13 rows, by column."""

    def make() -> list[dict]:
        rows = pairs[:13]
        return [student.preprocess(rows[name]) for name in ("anchor", "positive")]

    return make


def traced(run, path: Path) -> list:
    """The events of a trace of `run`, as one step."""
    with profile(activities=[ProfilerActivity.CPU]) as watched, ranges.within(ranges.step_name(1)):
        run()
    watched.export_chrome_trace(str(path))
    return read_trace(path)


def lies_across(events: list) -> list[tuple[str, str]]:
    """Pairs of events of one thread of which neither lies in the other, nor beside it."""
    spans: dict[object, list[Span]] = {}
    for one in events:
        if one.get("cat") in ("user_annotation", "cpu_op") and one["dur"] > 0:
            spans.setdefault(one["tid"], []).append(step_times._span(one))
    pairs = [(a, b) for found in spans.values() for a in found if a.name in NAMES for b in found]
    return [
        (a.name, b.name) for a, b in pairs if a.begin < b.begin < a.end < b.end or b.begin < a.begin < b.end < a.end
    ]


def where(events: list, name: str) -> Counter[str]:
    """Of the events of a name, the parts that the step was in at their begin and at their end."""
    timeline = step_times._Timeline(step_times._windows(events), step_times._region_spans(events))
    found: Counter[str] = Counter()
    for one in (e for e in events if e.get("name") == name):
        at = {timeline.region_at(float(one["ts"])), timeline.region_at(float(one["ts"]) + float(one["dur"]))}
        found[" and ".join(sorted(at))] += 1
    return found


class TestAttribution:
    """Which part the work of each model and of the loss is counted for, by marks inside of that work."""

    @pytest.mark.parametrize("backend", ["tiled", "reference"])
    def test_one_backward_pass(self, student, guide, tokens, tmp_path, backend):
        student.append(Probe("student-model"))
        guide.append(Probe("guide-model"))
        loss = GISTEmbedLoss(student, guide, backend=backend)
        events = traced(lambda: loss(tokens()).backward(), tmp_path / "t.json")
        assert lies_across(events)
        events = step_times.straightened(events)
        assert lies_across(events) == []
        self._check(events, forward=None, again=0)
        # All of the student's backward pass, to its first layer.
        deepest = where(events, "aten::embedding_dense_backward")
        assert set(deepest) == {STUDENT_BACKWARD} and deepest.total() > 0
        if backend == "tiled":
            assert where(events, "gist_fast::guided_forward") == {LOSS_FORWARD: 1}
            assert where(events, "gist_fast::guided_backward") == {LOSS_BACKWARD: 1}

    @pytest.mark.parametrize(("memory", "again"), [(0.0, 8), (4.0, 0)])
    def test_gradient_cache(self, student, guide, tokens, tmp_path, memory, again):
        """13 rows in fours: 4 mini-batches a column."""
        student.append(Probe("student-model"))
        guide.append(Probe("guide-model"))
        loss = CachedGISTEmbedLoss(student, guide, mini_batch_size=4, backend="tiled", activation_memory=memory)
        events = traced(lambda: loss(tokens()).backward(), tmp_path / "t.json.gz")
        self._check(events, forward=8, again=again)
        assert step_times.straightened(events) == events
        assert lies_across(events) == []
        assert where(events, "gist_fast::guided_forward") == {LOSS_FORWARD: 1}
        assert where(events, "gist_fast::guided_backward") == {LOSS_BACKWARD: 1}
        (step,) = step_times.step_times(events)
        assert step.calls.get(STUDENT_FORWARD_AGAIN, 0) == again
        assert (step.host[STUDENT_FORWARD_AGAIN] > 0) == (again > 0)
        assert sum(step.host.values()) == pytest.approx(step.wall_ms, rel=1e-9)

    @staticmethod
    def _check(events: list, forward: int | None, again: int) -> None:
        seen = where(events, "student-model forward")
        wanted = {STUDENT_FORWARD: forward or seen[STUDENT_FORWARD]}
        assert seen == Counter({**wanted, **({STUDENT_FORWARD_AGAIN: again} if again else {})})
        assert seen[STUDENT_FORWARD] > 0
        backward = where(events, "student-model backward")
        assert backward == {STUDENT_BACKWARD: seen[STUDENT_FORWARD]}
        guided = where(events, "guide-model forward")
        assert set(guided) == {GUIDE} and guided[GUIDE] > 0

    def test_a_loss_called_for_several_widths(self, student, tokens, tmp_path):
        """MatryoshkaLoss: the loss's backward and the student's take turns."""
        from sentence_transformers.losses import MatryoshkaLoss

        student.append(Probe("student-model"))
        inner = GISTEmbedLoss(student, None, guided=False, backend="tiled")
        loss = MatryoshkaLoss(student, inner, [32, 8])
        events = traced(lambda: loss(tokens(), None).backward(), tmp_path / "t.json")
        assert where(events, "gist_fast::guided_backward") == {LOSS_BACKWARD: 2}
        events = step_times.straightened(events)
        assert lies_across(events) == []
        assert set(where(events, "student-model backward")) == {STUDENT_BACKWARD}

    def test_gradients_are_the_same_while_profiled(self, student, guide, tokens, tmp_path):
        loss = GISTEmbedLoss(student, guide)
        loss(tokens()).backward()
        wanted = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        student.zero_grad()
        traced(lambda: loss(tokens()).backward(), tmp_path / "t.json")
        found = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        assert wanted.keys() == found.keys()
        assert all(torch.equal(wanted[name], found[name]) for name in wanted)


class FakeNvml:
    """A card of 300 W at 1500 MHz, that counts no energy if told so."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    class NVMLError(Exception):
        pass

    def __init__(self, clock, silent: tuple[str, ...] = ()) -> None:
        self.clock, self.silent = clock, silent

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, card: str) -> int:  # noqa: N802
        self._say("energy")
        return int(1e6 + 300_000 * self.clock.now)

    def nvmlDeviceGetPowerUsage(self, card: str) -> int:  # noqa: N802
        self._say("power")
        return 290_000

    def nvmlDeviceGetClockInfo(self, card: str, kind: int) -> int:  # noqa: N802
        self._say({1: "sm", 2: "memory"}[kind])
        return {1: 1500, 2: 2600}[kind]

    def _say(self, what: str) -> None:
        if what in self.silent:
            raise self.NVMLError(what)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched_steps(clock: Clock, meter: PowerMeter | None, monkeypatch) -> _Watch:
    """Two steps to warm up and three to profile, of 2 s each, 1 s between them; the profiler's end takes 50 s."""
    watch = _Watch(torch.device("cpu"), 3, 2, meter, None, clock)
    ends = iter([0, 0, 0, 0, 50])

    def step() -> None:
        clock.now += next(ends)

    watch.profiler = SimpleNamespace(start=lambda: None, stop=lambda: None, step=step)
    watch.on_train_begin(None, None, None)
    for k in range(5):
        clock.now += 2
        ids = torch.ones(4 + k, 7, dtype=torch.long)
        batch = {"anchor_input_ids": ids, "anchor_attention_mask": ids, "positive_input_ids": ids}
        watch.count(batch)
        watch.on_pre_optimizer_step(None, None, None)
        watch._on_step = lambda _: setattr(clock, "now", clock.now + 1)
        watch.on_step_end(None, None, None)
    return watch


class TestWatch:
    def test_figures_of_the_profiled_steps_alone(self, monkeypatch):
        clock = Clock()
        watch = watched_steps(clock, PowerMeter("GPU-1", FakeNvml(clock)), monkeypatch)
        assert watch.measured == [2.0] * 5
        assert (watch.pairs, watch.tokens) == ([4, 5, 6, 7, 8], [14 * n for n in (4, 5, 6, 7, 8)])
        machine = watch.machine()
        assert machine.pop("process_memory_mib") > 10
        # Energy from the end of warming up to that of the last step: 3 steps and the 2 s between them.
        energy = 300 * 8
        assert machine == pytest.approx(
            {
                "pairs_per_second": 21 / 6,
                "tokens_per_second": 14 * 21 / 6,
                "gpu_energy_j": energy,
                "gpu_power_w": 300,
                "energy_per_pair_j": energy / 21,
                "gpu_sm_clock_mhz": 1500,
                "gpu_memory_clock_mhz": 2600,
            }
        )

    def test_what_a_card_does_not_tell_is_left_out(self, monkeypatch):
        clock = Clock()
        meter = PowerMeter("GPU-1", FakeNvml(clock, silent=("energy", "memory")))
        machine = watched_steps(clock, meter, monkeypatch).machine()
        assert {name: value for name, value in machine.items() if name.startswith("gpu")} == {
            "gpu_power_w": 290,
            "gpu_sm_clock_mhz": 1500,
        }
        assert "energy_per_pair_j" not in machine
        assert meter.clocks_mhz() == {"sm": 1500}
        assert _of_card([(1.0, 5.0)], [], [{}], 3) == {}

    def test_nothing_in_the_trainers_own_log(self):
        watch = _Watch(torch.device("cpu"), 1, 1, None, None)
        assert watch.figures([watch.asked()]) == {}


def fabricated(*, device: bool) -> Profile:
    events = host_events()
    if device:
        events += [
            event("cudaLaunchKernel", 1031, 2, cat="cuda_runtime", correlation=1),
            event("void gemm<" + "x" * 200 + ">", 1040, 20, cat="kernel", tid=7, correlation=1),
        ]
    steps = step_times.step_times(events)
    return Profile(
        steps=steps,
        parts=regions(steps),
        measured_ms=[0.1, 0.06],
        warmup_ms=[1.0],
        pairs=[16, 16],
        tokens=[100, 100],
        machine={"gpu_power_w": 300.0, "energy_per_pair_j": 0.25} if device else {},
        busiest=busiest(events),
    )


class TestReport:
    def test_device_columns_and_picture_only_with_a_device(self, tmp_path):
        from gist_fast.report.profile import busiest_table, machine_table, parts_table, report_page, save_pictures

        for device in (False, True):
            found = fabricated(device=device)
            table = parts_table(found)
            by_name = {row[0]: row for row in table.rows}
            assert (IDLE in by_name, "device ms" in table.columns) == (device, device)
            assert all(len(row) == len(table.columns) for row in table.rows)
            # 160 microseconds in all, 28 of them waiting.
            assert by_name[WAITING][2:4] == ["0.014", "17.5%"]
            assert by_name["the step"][2:4] == ["0.08", "100.0%"]
            folder = tmp_path / str(device)
            folder.mkdir()
            names = {path.name for path in save_pictures(found, folder)}
            assert names == {path.name for path in folder.iterdir()}
            assert ("steps-device.svg" in names) == device
            page = report_page(found, {"configuration": "a.yaml"}, {"learning_rate": 1e-4})
            assert page.count("<img") == 1 + device
            assert ("power of the card" in page) == device
            assert ("Busiest kernels" in page) == device
        assert machine_table(found).rows[1] == ("energy a pair, J", "0.25")
        (row,) = busiest_table(found).rows
        assert len(row[0]) == 90 and row[1:] == (GUIDE, "0.5", "0.01", "12.5%")

    def test_a_part_has_one_colour_in_table_and_pictures(self):
        from matplotlib.colors import to_hex

        from gist_fast.report.profile import COLOURS, draw_steps

        for device in (False, True):
            (axes,) = draw_steps(fabricated(device=device), device=device).axes
            drawn = {bars.get_label(): to_hex(bars[0].get_facecolor()) for bars in axes.containers}
            assert drawn == {name: colour.lower() for name, colour in COLOURS.items() if device or name != IDLE}
            ends = [round(sum(bars[row].get_width() for bars in axes.containers), 6) for row in range(3)]
            # Two steps, and the median one: the shorter of the two.
            assert ends == [0.1, 0.06, 0.06]
