"""``gist-fast doctor``: what was found on this machine."""

from __future__ import annotations

from gist_fast.cli.output import Json, only_results_on_stdout, print_json, print_table


def doctor(as_json: Json = False) -> None:
    """Show torch, GPUs, Triton and the like, and which backend 'auto' takes, and why."""
    from gist_fast.pipeline.doctor import examine

    with only_results_on_stdout():
        report = examine()
    if as_json:
        print_json(report.as_dict())
        return
    rows = [("gist_fast", report.gist_fast), ("python", report.python), ("platform", report.platform)]
    rows += [(name, version or "not installed") for name, version in report.packages.items()]
    rows += [("gpu runtime", report.gpu_runtime)]
    for place, gpu in enumerate(report.gpus):
        rows.append((f"gpu {place}", f"{gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']} GiB"))
    rows.append(("cpu", f"{report.cpu['capability']}, {report.cpu['threads']} threads"))
    rows.append(("bf16 on the cpu", report.cpu["bf16"]))
    print_table("Found", ("what", "value"), rows)
    print_table(
        "Backend that 'auto' takes",
        ("device", "type", "backend", "why"),
        [(choice.device, choice.dtype, choice.backend, choice.reason) for choice in report.choices],
    )
    padding = {True: "flattened, without padding", False: "padded to others of like length"}
    print_table(
        "Padding",
        ("device", "type", "texts are", "why"),
        [(a["device"], a["dtype"], padding[a["padding_free"]], a["reason"]) for a in report.attention],
    )
