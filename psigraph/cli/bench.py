"""`psigraph bench`: measures decoding, prints the figures and writes the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click

from ..bench.report import validate_report
from ..ir.errors import UsageError
from ..ir.program import DECODE, PREFILL
from ..json_file import check_new_folder, check_writable, read_json, write_json_atomically
from ..options import SessionOptions
from .begin_gpu import begin_gpu
from .first_token import first_token
from .model_argument import model_argument
from .notes import warn, warn_of_file
from .options import (
    DEPTHS,
    FILE_PATH,
    TOKEN_IDS,
    admission_options,
    backend_option,
    prefill_option,
    run_options,
)
from .sampling_options import sampling_options
from .stages import stages

EPILOG = """\b
The rate divides the generated tokens by the time of generation alone: as many decode steps, no load, no
compilation, no prompt. End tokens do not stop it, as in the peers' benchmarks. One run before the timed ones
warms up and is not counted.

\b
Examples:
  psigraph bench qwen3-1.7b.gguf --artifact-kind gguf --model-size 1.7b --backend cuda \\
      --prompt-token-ids 151644 --max-new-tokens 512 --repeats 3 --json-out report.json
  psigraph bench qwen3-1.7b.gguf --mode forced --depth 4096 --max-new-tokens 128
  psigraph bench qwen3-1.7b.gguf --prompt-tokens 512
  psigraph bench qwen3-1.7b.gguf --profile --prompt-tokens 512
  psigraph bench qwen3-1.7b.gguf --profile --baseline report.json
  psigraph bench qwen3-1.7b.gguf --sweep depth=0,512,1024,4096,16384 --max-new-tokens 64"""


@click.command("bench", epilog=EPILOG)
@model_argument("--model-path")
@click.option(
    "--artifact-kind", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="What the model file is."
)
@click.option("--model-size", metavar="SIZE", help="Checked against the file: 0.6b, 1.7b, 4b, 8b, ...")
@backend_option()
@click.option(
    "--prompt-token-ids",
    "prompt",
    type=TOKEN_IDS,
    help="Prompt, as token ids. Default: 151644, Qwen's <|im_start|>, or the bos token of a smaller vocabulary.",
)
@click.option(
    "-n", "--max-new-tokens", type=click.IntRange(1), default=512, show_default=True, metavar="N", help="Tokens a run."
)
@click.option("-r", "--repeats", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Timed runs.")
@click.option(
    "--mode",
    type=click.Choice(["chained", "forced", "text"]),
    default="chained",
    show_default=True,
    help="chained: each token feeds the next step on the device. forced: ids are given, and the host waits and takes "
    "all logits for every token, as llama-bench does. text: as generate and chat do it, with their sampling options.",
)
@click.option(
    "-d",
    "--depth",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    metavar="N",
    help="Fill N positions first, untimed.",
)
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Measure too how fast a prompt of N tokens goes in from position 0: time to the first token, prompt tokens a "
    "second; 0: not. Slow without a GPU; in numpy one run.",
)
@click.option(
    "--profile",
    is_flag=True,
    help="Time every kernel of the step: its own time, its hand-over, its bytes; with --prompt-tokens those of the "
    "prompt's first chunk too.",
)
@click.option(
    "--sweep",
    type=DEPTHS,
    metavar="depth=N,N,...",
    help="Measure at several depths in one process; --json-out is then a folder's name, one report in it a depth.",
)
@click.option("--baseline", type=FILE_PATH, metavar="R", help="Compare with this report of the same work.")
@sampling_options
@run_options
@prefill_option
@admission_options
@click.option("--json-out", type=FILE_PATH, metavar="R", help="Write the report here.")
def command(
    model: Path,
    artifact_kind: str,
    model_size: str | None,
    prompt: tuple[int, ...] | None,
    max_new_tokens: int,
    repeats: int,
    mode: str,
    depth: int,
    prompt_tokens: int,
    profile: bool,
    sweep: tuple[int, ...] | None,
    baseline: Path | None,
    sampling: dict[str, Any],
    options: SessionOptions,
    allow_blocked: bool,
    expect_sha256: str | None,
    json_out: Path | None,
) -> None:
    """Measure how many tokens a second a model decodes, and write a report that says on what and how.

    At least three repeats make a row that can be cited; fewer are for trying things out.
    """
    del artifact_kind  # there is one kind; the option keeps command lines of other tools working
    if sweep and (profile or baseline or depth or prompt_tokens):
        raise UsageError(
            "--sweep goes without --profile, --baseline, --depth and --prompt-tokens: "
            "give it the depths, and nothing more"
        )
    if json_out is not None:
        (check_new_folder if sweep else check_writable)(json_out)
    if sampling and mode != "text":
        raise UsageError("sampling options are measured by --mode text; chained and forced take the likeliest token")
    if sampling and profile:
        raise UsageError("--profile times the kernels of the greedy step; give it without sampling options")
    before = read_json(baseline) if baseline is not None else None
    start = begin_gpu(options.backend, options.device, with_snapshot=True)
    if prompt is None:
        prompt = (first_token(model),)
    # numpy and the rest take a third of a second to import: not before the options are known to be sound.
    from ..bench.baseline import check_baseline, check_work, compare_reports
    from ..bench.measure import Work, run_bench, run_sweep
    from ..text.sampler import SamplerSettings

    sampler = SamplerSettings(**sampling) if sampling else None  # seed 0: the same tokens every time
    if sampler is not None and sampler.greedy:
        sampler = None  # as `generate` and `chat` have it: another graph takes the likeliest token
    if before is not None:
        known = {"prompt_tokens": list(prompt), "max_new_tokens": max_new_tokens, "decode_row": mode, "depth": depth}
        known |= {"kv_type": options.kv_type, "sampler": sampler.record() if sampler is not None else None}
        check_baseline(before)
        check_work(before, known if options.backend == "auto" else {**known, "backend": options.backend})

    def check_size(size: str) -> None:
        if before is not None:
            check_work(before, {"model_size": size})

    work = Work(prompt, max_new_tokens, repeats, mode, depth, sampler)

    with stages() as bars:
        preparing: dict[str, Any] = {
            "model_size": model_size,
            "allow_blocked": allow_blocked,
            "expect_sha256": expect_sha256,
            "on_admission": lambda admission: warn_of_file(model, admission.said),
            "on_size": check_size,
            "on_hash": bars.bar(f"hashing {model.name}", in_bytes=True),
        }
        options = replace(
            options,
            start=start,
            on_compile=bars.bar("compiling kernels"),
            on_load=bars.bar("loading weights", in_bytes=True),
        )
        on_run = bars.bar("measuring")
        if sweep:
            reports = run_sweep(model, work, options, depths=sweep, on_run=on_run, **preparing)
        else:
            preparing |= {"profile": profile, "prompt_tokens": prompt_tokens}
            on_prompt = bars.bar("measuring the prompt")
            reports = [run_bench(model, work, options, on_run=on_run, on_prompt=on_prompt, **preparing)]
    if sweep:
        click.echo(sweep_table(reports))
        if json_out is not None:
            json_out.mkdir(exist_ok=True)
        targets = [json_out / f"depth-{report['depth']}.json" if json_out else None for report in reports]
    else:
        click.echo(summary(reports[0]))
        if profile:
            click.echo(profile_table(reports[0]))
            if prompt_tokens and "profile" not in reports[0]["timings"]["prompt"]:
                way = reports[0]["timings"]["prompt"]["way"]
                warn(f"--profile: no rows for the prompt, whose {prompt_tokens} tokens go in {way}")
        targets = [json_out]
    # Before the comparison: whatever that says, what was measured is kept.
    for report, target in zip(reports, targets, strict=True):
        _keep(report, target)
    if before is not None:
        click.echo("\n".join(compare_reports(reports[0], before)))


def _keep(report: dict[str, Any], target: Path | None) -> None:
    """Check a report and write it."""
    for problem in validate_report(report):
        warn(f"report: {problem}")
    if target is not None:
        write_json_atomically(target, report)
        click.echo(f"report: {target}")


def summary(report: dict[str, Any]) -> str:
    """The figures of a report, for people."""
    environment, timings, artifact = report["environment"], report["timings"], report["artifact"]
    where = environment.get("gpu") or f"{environment.get('processor') or 'CPU'}, {environment['cores']} cores"
    synthetic = ", synthetic" if artifact["synthetic"] else ""
    rates = [run["decode_tokens_per_second"] for run in report["runs"]]
    middle = median(rates)
    lines = [
        f"{artifact['file']}  {report['model_size']} {artifact['tier']}{synthetic}",
        f"{report['execution_engine']} on {where} ({environment['arithmetic']})",
    ]
    row = f"{report['decode_row']}: {report['work_per_token']}"
    if report["sampler"] is not None:
        kept = {key: value for key, value in report["sampler"].items() if value or key == "seed"}
        row += "; drawn with " + ", ".join(f"{key} {value}" for key, value in kept.items())
    lines += [row, "", *_costs(timings), ""]
    for run in report["runs"]:
        rate, tokens, ms = run["decode_tokens_per_second"], run["output_tokens"], run["decode_ms"]
        lines.append(f"  run {run['run_index'] + 1}   {rate:8.1f} tok/s   {tokens} tokens in {ms:,.1f} ms")
    spread = 100 * (max(rates) - min(rates)) / middle
    lines.append(
        f"  median  {middle:8.1f} tok/s   {1e6 / middle:,.1f} us a token, "
        f"{min(rates):.1f} to {max(rates):.1f} (spread {spread:.1f} %)"
    )
    if not report["runs_identical"]:
        lines.append("  the runs' tokens differ: one seed, or none, gives one text, so this is a defect")
    steps = timings.get("step_us")
    if steps:
        lines.append(f"  steps   p10 {steps['p10']:,.1f}  p50 {steps['p50']:,.1f}  p90 {steps['p90']:,.1f} us")
    prompt = timings.get("prompt")
    if prompt:
        lines.append(
            f"  prompt  {prompt['prompt_tokens_per_second']:8,.0f} tok/s   {prompt['tokens']:,} tokens, "
            f"{prompt['median_first_token_ms']:,.1f} ms to the first token ({prompt['way']})"
        )
    return "\n".join(lines + _roofline_lines(report))


def profile_table(report: dict[str, Any]) -> str:
    """The kernels of a step, and of a prompt's chunk if it was measured, for people; the rows add up to the step and
    what their stamps cost."""
    timings = report["timings"]
    lines = _profile_lines(f"one step at position {timings['profile']['position']}", timings["profile"], report, DECODE)
    prompt = timings.get("prompt", {})
    if "profile" in prompt:
        lines += _profile_lines(f"the first chunk of {prompt['tokens']:,} tokens", prompt["profile"], report, PREFILL)
    return "\n".join(lines)


def _profile_lines(what: str, profile: dict[str, Any], report: dict[str, Any], step: str) -> list[str]:
    lines = [
        "",
        f"  {what}: {profile['step_us']:,.1f} us; the rows add up to {profile['rows_us']:,.1f} us",
        f"  {'kernel':26} {'launches':>8} {'us':>9} {'own':>9} {'hand-over':>9} {'MB':>8} {'of bandwidth':>12}",
    ]
    for row in report["kernels"]:
        if row["step"] != step:
            continue
        share = row["share_of_read_bandwidth"]
        lines.append(
            f"  {row['name']:26} {row['launches']:8} {row['us']:9.1f} {row['own_us']:9.1f} {row['handover_us']:9.1f} "
            f"{row['bytes'] / 1e6:8.1f} " + (f"{100 * share:10.1f} %" if share is not None else f"{'-':>12}")
        )
    return lines


def sweep_table(reports: list[dict[str, Any]]) -> str:
    """A line a depth: rate, its spread, and what a token costs more than at the first depth."""
    first = reports[0]["timings"]["step_us"].get("p50")
    lines = [summary(reports[0]), "", f"  {'depth':>7} {'tok/s':>9} {'spread':>8} {'step us':>9} {'more us':>9}"]
    for report in reports:
        rates = [run["decode_tokens_per_second"] for run in report["runs"]]
        step = report["timings"]["step_us"].get("p50")
        spread = 100 * (max(rates) - min(rates)) / median(rates)
        more = f"{step - first:9.1f}" if step and first else f"{'-':>9}"
        shown = f"{step:9.1f}" if step else f"{'-':>9}"
        lines.append(f"  {report['depth']:7} {median(rates):9.1f} {spread:6.1f} % {shown} {more}")
    return "\n".join(lines)


def _costs(timings: dict[str, Any]) -> list[str]:
    shown = [("open", "open_ms"), ("compile", "compile_ms"), ("load", "load_ms"), ("capture", "capture_ms")]
    parts = [f"{name} {timings[key]:,.0f} ms" for name, key in shown if timings.get(key)]
    if timings.get("start_to_first_token_ms"):
        parts.append(f"start to first token {timings['start_to_first_token_ms']:,.0f} ms")
    return ["  " + ", ".join(parts)]


def _roofline_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    environment, roofline = report["environment"], report["roofline"]
    if roofline is not None:
        lines.append(
            f"  {roofline['bytes_per_token'] / 1e9:.3f} GB a token, read bandwidth "
            f"{roofline['read_bandwidth_gb_s']:,.0f} GB/s (measured): {100 * roofline['share_of_read_bandwidth']:.1f} %"
        )
        if not roofline["valid"]:
            lines.append("  this row is void: the GPU reads slower than its kind must; it is shared or throttled")
    if environment.get("gpu_idle") is False:
        lines.append(f"  the GPU was not idle: {environment.get('gpu_idle_check')}")
    return lines
