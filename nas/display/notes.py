"""Words for a study and its trials, names of attributes, and the dashboard's notes in Markdown."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pandas as pd

from nas.config import SearchConfig
from nas.recorded import RecordedStudy, is_confirmed
from nas.training.curves import from_json
from search_spaces import ArchSpec, SearchSpace
from search_spaces.arch import Step
from search_spaces.cost import steps_cost
from search_spaces.timm_config import model_args
from studies import TRAINED, Candidate, CandidateLatency, CandidateState, LatencyStage

# Names of user attributes of trials: the reason why a trial is not complete, and the number of the trial it repeats.
REASON, DUPLICATE_OF = "reason", "duplicate_of"
# Those of a training that was given up: the accuracy that was expected at its end, and its standard deviation; and the
# latency of that trial.
PREDICTED, DEVIATION, TIMED = "predicted_accuracy", "predicted_deviation", "latency_ms"
# The reason of a trial whose search was interrupted.
INTERRUPTED = "interrupted"
HEADERS = ("stage", "blocks", "kernel", "group width", "expansion", "width", "stride", "output", "MMACs", "params k")
STATES = {
    CandidateState.COMPLETE: "complete", CandidateState.OVER_LIMIT: "over a limit, not trained",
    CandidateState.FAILED: "failed", CandidateState.STOPPED: "stopped early",
}  # fmt: skip


def duration(seconds: float) -> str:
    """A duration as text, such as `0:00:42`."""
    return str(timedelta(seconds=round(seconds)))


def deployment_line(row: Mapping[str, Any] | pd.Series) -> str:
    """The deployment of a row of `pareto_front`, in words."""
    own = ArchSpec.from_json(row["arch"]).resolution is not None
    shown = "each network at its own resolution" if own else f"{row['resolution']}x{row['resolution']}"
    return (
        f"{row['device_name']}, {row['engine']}, {row['dtype']}, batch {row['batch_size']}, {shown}, "
        f"{row['threads']} thread(s)"
    )


def accuracy_line(front: pd.DataFrame) -> str:
    """What the accuracies of rows of `pareto_front` are, in words."""
    # All have the study's schedule.
    steps, batch = (front[name].max() for name in ("training_steps", "training_batch_size"))
    schedule = "" if pd.isna(steps) else f" of {steps:.0f} steps of {batch:.0f} images"
    if not is_confirmed(front):
        return f"accuracies as searched: of the one training{schedule} by which each network was chosen"
    least, most = int(front["accuracy_trainings"].min()), int(front["accuracy_trainings"].max())
    if most == 1:
        return f"accuracies as confirmed: each of one other training{schedule}, with 95 % intervals"
    count = str(least) if least == most else f"{least} to {most}"
    return f"accuracies as confirmed: means of {count} other trainings{schedule}, with 95 % intervals"


def candidates_words(complete: int, stopped: int) -> str:
    """How many candidates were trained to the end, and how many were given up, in words."""
    words = f"{complete} candidate{'' if complete == 1 else 's'}"
    return f"{words}, and {stopped} that were stopped early" if stopped else words


def stopping_line(candidates: Sequence[Candidate], steps: int) -> str | None:
    """How many trainings were given up, what that saved, and how often it was wrong; None where none was.

    Args:
        steps: length of the schedule.
    """
    trained = [each for each in candidates if each.state in TRAINED]
    judged = [each for each in trained if each.given_up_at is not None and each.needed_accuracy is not None]
    stopped = [each.given_up_at or 0 for each in judged if each.state == CandidateState.STOPPED]
    if not judged:
        return None
    saved = sum(1 - step / steps for step in stopped) / len(trained)
    line = f"stopped early: {len(stopped)} of {len(trained)} trainings, which saved {saved:.0%} of all steps"
    controls = [each for each in judged if each.state == CandidateState.COMPLETE]
    wrong = sum((each.accuracy or 0) >= (each.needed_accuracy or 0) for each in controls)
    checked = f"{len(controls)} that {'was' if len(controls) == 1 else 'were'} trained to the end all the same"
    return f"{line}; of {checked}, {wrong} reached the accuracy that it was thought to miss" if controls else line


def code(text: str) -> str:
    """A text as code in Markdown, which shows it as it is, whatever it holds."""
    # A run of backticks within may be as long as none of the two around.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def plain(text: str) -> str:
    """A text in Markdown, with its punctuation escaped that would be markup."""
    return re.sub(r"([\\`*_{}\[\]<>#~&$])", r"\\\1", text)


def markdown_table(headers: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A table in GitHub's Markdown; a bar or the end of a line within a cell ends no cell."""

    def shown(cell: object) -> str:
        return " ".join(str(cell).splitlines()).replace("|", "\\|")

    lines = [headers, ("---",) * len(headers), *rows]
    return "\n".join("| " + " | ".join(shown(cell) for cell in line) + " |" for line in lines)


def stage_table(arch: ArchSpec, resolution: int, num_classes: int) -> str:
    """A Markdown table of an architecture's stem, stages and head, with the cost of each."""

    def row(steps: Sequence[Step], name: object, *fields: object) -> tuple[object, ...]:
        cost = steps_cost(steps, num_classes)
        return (name, *fields, f"{cost.macs / 1e6:.2f}", f"{cost.params / 1e3:.1f}")

    def output(step: Step) -> str:
        return f"{step.out_size}x{step.out_size}"

    stem, *blocks, head = arch.walk(resolution)
    rows = [row([stem], "stem", 1, "3x3", "full", "", arch.stem_width, arch.stem_stride, output(stem))]
    for number, stage in enumerate(arch.stages, start=1):
        steps, blocks = blocks[: stage.blocks], blocks[stage.blocks :]
        rows.append(row(
            steps, number, stage.blocks, f"{stage.kernel_size}x{stage.kernel_size}", stage.group_width,
            f"{stage.expansion:g}", stage.width, stage.stride, output(steps[-1]),
        ))  # fmt: skip
    conv = ("1x1", "full", "", arch.head_width) if arch.head_width else ("", "", "", "none")
    rows.append(row([head], "head", 1, *conv, "", f"{num_classes} classes"))
    return markdown_table(HEADERS, rows)


def pixels(resolution: int, space: SearchSpace) -> str:
    """The size of the images of a study in words: the one resolution of all, or those that its networks have."""
    own = space.own_resolutions
    if not own:
        return f"{resolution}x{resolution} pixels"
    return f"each network's own resolution ({', '.join(map(str, own[:-1]))} or {own[-1]} pixels)"


def trial_note(
    candidate: Candidate, latency: CandidateLatency | None, config: SearchConfig, curve: str | None
) -> str:  # fmt: skip
    """The outcome of a candidate, its stages as a table, and the learning curve of one that was given up.

    Args:
        curve: learning curve of the search's training; None where there is none.
        latency: latency in the study's deployment; None where it was not measured.
        config: configuration of the study.
    """
    arch = ArchSpec.from_json(candidate.arch)
    lines = [
        f"**{STATES[CandidateState(candidate.state)]}**" + (f": {plain(candidate.reason)}" if candidate.reason else "")
    ]
    if candidate.accuracy is not None:
        lines.append(f"accuracy {candidate.accuracy:.2%} after {config.proxy.steps} steps, as searched")
    if candidate.state == CandidateState.COMPLETE and candidate.given_up_at is not None:
        lines.append(
            f"trained to the end to check the rule that would have given it up after {candidate.given_up_at} steps: "
            f"{candidate.predicted_accuracy:.2%} +- {candidate.predicted_deviation:.2%} expected, "
            f"{candidate.needed_accuracy:.2%} needed"
        )
    if candidate.confirmed_accuracy is not None:
        lines.append(
            f"accuracy {candidate.confirmed_accuracy:.2%} ({candidate.confirmed_low:.2%} to "
            f"{candidate.confirmed_high:.2%}) as confirmed by "
            f"{candidate.confirmed_trainings} other training{'s' if candidate.confirmed_trainings != 1 else ''}"
        )
    if latency is not None:
        lines.append(latency_words(latency))
    parts = [
        f"`{arch}`", "  \n".join(lines), stage_table(arch, config.latency.resolution, config.latency.num_classes),
        f"timm: `{model_args(arch)}`",
    ]  # fmt: skip
    if candidate.state == CandidateState.STOPPED and curve:
        parts.append(curve_table(curve))
    return "\n\n".join(parts)


def curve_table(curve: str | None) -> str:
    """A Markdown table of a stored learning curve."""
    rows: list[tuple[object, ...]] = [
        (point.step, f"{point.train_loss:.3f}", f"{point.train_accuracy:.1%}") for point in from_json(curve)
    ]
    return markdown_table(("step", "training loss", "training accuracy"), rows)


def latency_words(latency: CandidateLatency) -> str:
    """A latency, its spread, and reasons to doubt it."""
    words = f"latency {latency.median_ms:.4g} ms (p20 to p80: {latency.p20_ms:.4g} to {latency.p80_ms:.4g}"
    if latency.interval_share is not None:
        words += f"; 95 % interval of the median {latency.interval_share:.1%} wide"
    words += ")"
    if latency.stage == LatencyStage.FINAL:
        words += ", measured in turns with the rest of the front"
    if latency.over_limit:
        words += ", **over the limit**"
    doubts = ["ended by the time cap"] if latency.capped else []
    doubts += ["on a throttling GPU"] if latency.throttled else []
    return words + (f"; {' and '.join(doubts)}" if doubts else "")


def duplicate_note(arch: ArchSpec, first: int) -> str:
    """The note of a trial that proposed the architecture of an earlier one.

    Args:
        first: number of the earlier trial.
    """
    return f"`{arch}`\n\n**duplicate**: the architecture of trial {first}, not evaluated again"


def study_note(recorded: RecordedStudy) -> str:
    """The note of a study, with its set-up as a table."""
    row, config = recorded.row, recorded.config
    data, proxy, latency = config.data, config.proxy, config.latency
    limits = [f"{name} at most {value:g}" for name, value in asdict(config.limits).items() if value is not None]
    versions = json.loads(row.versions)
    rows: list[tuple[object, ...]] = [
        ("objectives", "accuracy of the proxy training (up), latency of the deployment in ms (down)"),
        ("data", f"{code(data.source)}, {pixels(data.resolution, config.space)}"),
        (
            "training",
            f"{proxy.steps} steps of {proxy.batch_size}, AdamW, peak learning rate {proxy.learning_rate:g}, "
            f"{proxy.threads} thread(s)",
        ),
        *((("pilot", "; ".join(map(plain, recorded.pilot_lines))),) if recorded.pilot_lines else ()),
        (
            "latency",
            f"{latency.engine_label}, {latency.dtype}, batch {latency.batch_size}, "
            f"{pixels(latency.resolution, config.space)}, {latency.num_classes} classes, "
            f"{latency.threads} CPU thread(s); medians, corrected for drift by the anchor",
        ),
        ("device", plain(f"{recorded.device.name} ({recorded.device.driver})")),
        ("anchor", f"{code(str(recorded.anchor))}, {row.anchor_ms:.4g} ms"),
        ("limits", ", ".join(limits) or "none"),
        ("sampler", f"{config.sampler}, seed {config.seed}"),
        ("early stopping", "of what will hardly reach the front" if config.early_stopping else "none"),
        ("space", code(config.space.name)),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("begun", f"{row.created_at:%Y-%m-%d %H:%M} UTC"),
    ]
    return "\n\n".join([
        f"Search for ConvFirst networks, study {code(recorded.name)}.", markdown_table(("what", "how"), rows),
        "Pruned trials were given up (their notes show the learning curves), broke a limit or proposed the "
        "architecture of an earlier trial; failed ones could not run. User attributes and notes give the reasons. The "
        "objectives, and the plot of them here, are those of the search, in which the front's members look better than "
        "they are. The front that counts is the view `pareto_front` of this database: at the end of the search its "
        "latencies were measured again, and its accuracies were confirmed by trainings with other seeds (where "
        "`confirmed` is 1).",
    ])  # fmt: skip
