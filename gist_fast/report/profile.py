"""A profile as tables and pictures, the same regions under the same names and colours in all of them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gist_fast.report.facts import machine_facts
from gist_fast.report.page import Section, Table, make_page, shown
from gist_fast.report.plots import NARROW, PALETTE, figure, stacked_bars, to_svg
from gist_fast.runtime.errors import InputError
from gist_fast.runtime.files import PREVIOUS, try_to_write, written_folder
from gist_fast.runtime.profiler_regions import IDLE, MEANINGS, NAMES, OTHER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from gist_fast.pipeline.plan import RunPlan
    from gist_fast.profiling.run import Profile

logger = logging.getLogger(__name__)

HOST_PICTURE, DEVICE_PICTURE = "steps", "steps-device"
"""Files' names without their ending."""
TRACE, FIGURES = "trace.json.gz", "profile.json"
_OURS = {TRACE, FIGURES, *(f"{name}.{ending}" for name in ("steps", "steps-device") for ending in ("svg", "png"))}
"""All that a folder of a profile may hold."""
COLOURS = {name: PALETTE[place % len(PALETTE)] for place, name in enumerate((*NAMES, OTHER, IDLE))}
"""Of the bars and of the table's marks."""
_LONGEST_NAME = 90
_UNITS = {
    "pairs_per_second": "pairs a second",
    "tokens_per_second": "tokens a second",
    "process_memory_mib": "memory of the process, MiB",
    "gpu_allocated_peak_mib": "GPU memory of tensors at most, MiB",
    "gpu_reserved_peak_mib": "GPU memory reserved at most, MiB",
    "gpu_power_w": "power of the card, W",
    "gpu_energy_j": "energy of the card, J",
    "energy_per_pair_j": "energy a pair, J",
    "gpu_sm_clock_mhz": "clock of the card's cores, MHz",
    "gpu_memory_clock_mhz": "clock of the card's memory, MHz",
}


def parts_table(profile: Profile) -> Table:
    """Where the time of a step goes; the last row is the whole step."""
    device = profile.steps[0].device is not None
    columns = ["region", "calls", "ms a step", "share", "least", "most"]
    columns += ["device ms", "of device"] if device else []
    rows: list[list[object]] = []
    for one in profile.parts:
        host = [shown(one.host_ms), f"{one.host_share:.1%}", shown(one.least_ms), shown(one.most_ms)]
        calls = shown(one.calls) if one.calls else None
        row: list[object] = [one.name, calls, *(host if one.name != IDLE else [None] * 4)]
        if one.device_ms is not None and one.device_share is not None:
            row += [shown(one.device_ms), f"{one.device_share:.1%}"]
        rows.append(row)
    walls = [step.wall_ms for step in profile.steps]
    mean = sum(walls) / len(walls)
    whole: list[object] = ["the step", None, shown(mean), "100.0%", shown(min(walls)), shown(max(walls))]
    rows.append([*whole, *((shown(mean), "100.0%") if device else ())])
    return Table(columns, rows, f"Wall time, means of {len(walls)} steps")


def machine_table(profile: Profile) -> Table:
    """What the steps took of the machine."""
    rows = [(_UNITS.get(name, name), shown(float(value))) for name, value in profile.machine.items()]
    return Table(("what", "value"), rows, "The profiled steps")


def busiest_table(profile: Profile) -> Table:
    """Kernels or operators that took the most time."""
    count, wall = len(profile.steps), sum(step.wall_ms for step in profile.steps)
    rows = [
        (_short(work.name), work.part, shown(work.calls / count), shown(work.ms / count), f"{work.ms / wall:.1%}")
        for work in profile.busiest
    ]
    what = "kernel" if profile.steps[0].device is not None else "operator"
    return Table((what, "mostly in", "calls", "ms a step", "share"), rows, f"Busiest {what}s, mean of a step")


def draw_steps(profile: Profile, *, device: bool = False, narrow: bool = False) -> Figure:
    """A bar for each step and one for the median step, stacked of its parts.

    Args:
        device: the device's time instead of the host's.
        narrow: so that a phone shows all of it.

    Raises:
        InputError: matplotlib is not installed.
    """
    names = (*NAMES, OTHER, IDLE) if device else (*NAMES, OTHER)
    steps = {f"step {step.step}": step for step in profile.steps} | {f"median ({profile.median.step})": profile.median}
    bars = {name: (step.device or {}) if device else step.host for name, step in steps.items()}
    columns = 2 if narrow else 3
    picture = figure(NARROW if narrow else 8.0, 1.2 + 0.32 * len(bars) + 0.2 * -(-len(names) // columns))
    axes = picture.subplots()
    # All regions in all bars, so that a region's colour is the same in every picture.
    lengths = {bar: {name: times.get(name, 0.0) for name in names} for bar, times in bars.items()}
    stacked_bars(axes, lengths, columns=columns)
    axes.set_title("What the device works on, by step" if device else "Where the wall time goes, by step")
    return picture


def save_pictures(profile: Profile, folder: Path) -> list[Path]:
    """Write each picture as SVG and PNG.

    Raises:
        InputError: matplotlib is not installed.
    """
    written = []
    for name, device in _pictures(profile):
        picture = draw_steps(profile, device=device)
        for ending in ("svg", "png"):
            path = folder / f"{name}.{ending}"
            picture.savefig(path, facecolor="white", dpi=150)
            written.append(path)
    return written


def report_page(profile: Profile, facts: Mapping[str, str], settings: Mapping[str, object]) -> str:
    """The profile as an HTML page.

    Args:
        facts: names and values of what ran, and where.
        settings: of the run, other than by default.

    Raises:
        InputError: matplotlib is not installed.
    """
    host, *others = (
        to_svg(draw_steps(profile, device=device, narrow=True), _in_words(profile, device=device))
        for _, device in _pictures(profile)
    )
    device = bool(others)
    text = "Each moment of a step belongs to the innermost region that is running, so that the shares sum to the step."
    if device:
        text += (
            " The device's columns divide the same wall time by the region that launched the kernel running at each"
            " moment; on a GPU the host waits wherever it needs a result, so these say where the time goes."
        )
    sections = [
        Section("Where the time goes", text, (parts_table(profile), host, *others)),
        Section("The machine", "", (machine_table(profile),)),
        Section("Busiest kernels" if device else "Busiest operators", "", (busiest_table(profile),)),
        Section("The regions", "", (Table(("region", "meaning"), list(MEANINGS.items())),)),
        Section("Settings", "", (Table(("setting", "value"), [(k, str(v)) for k, v in settings.items()], prose=True),)),
    ]
    return make_page("Profile of a training run", facts, sections)


def _pictures(profile: Profile) -> list[tuple[str, bool]]:
    both = profile.steps[0].device is not None
    return [(HOST_PICTURE, False), *([(DEVICE_PICTURE, True)] if both else [])]


def _in_words(profile: Profile, *, device: bool) -> str:
    step = profile.median
    times = (step.device or {}) if device else step.host
    largest = sorted(((ms, name) for name, ms in times.items() if ms > 0), reverse=True)[:3]
    said = ", ".join(f"{name} {ms / step.wall_ms:.0%}" for ms, name in largest)
    return f"{'Device' if device else 'Wall'} time of each step by region; in the median step {said}."


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def check_folder(target: Path, overwrite: bool) -> None:
    """Raise `InputError` where a profile could not be written to `target`; nothing is left behind."""
    if target.exists() and not target.is_dir():
        raise InputError(f"--output: {target} is a file; name a folder that does not exist yet.")
    held = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    strange = [name for name in held if name not in _OURS]
    if strange:
        raise InputError(f"--output: {target} holds {strange[0]}, which is no profile's; name a folder of its own.")
    if held and not overwrite:
        raise InputError(f"--output: {target} holds a profile; give --overwrite to replace it, or another --output.")
    # Beside it: a folder that holds a profile is replaced as a whole.
    place = target.resolve()
    try_to_write(place.parent, "--output", "name another folder", f"{place.name}{PREVIOUS}")


def write_folder(found: Profile, result: dict[str, Any], trace: Path, target: Path) -> list[str]:
    """Put a profile in place; the paths written.

    Args:
        result: the figures.
        trace: a file, which is moved.
    """
    target = target.resolve()
    try:
        with written_folder(target) as part:
            shutil.move(trace, part / TRACE)
            (part / FIGURES).write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            try:
                save_pictures(found, part)
            except InputError as error:
                logger.info("No picture: %s.", error)
    except OSError as error:
        raise InputError(f"--output: {target} cannot be written ({error.strerror or error}).") from error
    return sorted(str(path) for path in target.iterdir())


def profile_facts(plan: RunPlan, found: Profile) -> dict[str, str]:
    """What was profiled, where and with which versions."""
    config, arguments, half = plan.config, plan.arguments, plan.arguments.half_precision
    return {
        "configuration": config.source,
        "student": config.student.path,
        "guide": config.guide.path if config.guide else ("none" if config.unguided else "in the data"),
        "pairs a step": str(round(sum(found.pairs) / len(found.pairs))),
        "steps": f"{len(found.steps)}, after {len(found.warmup_ms)} to warm up",
        "computes in": "float32" if half is None else str(half).removeprefix("torch."),
        "dataloader workers": str(arguments.dataloader_num_workers),
        **machine_facts(arguments.device.type),
    }
