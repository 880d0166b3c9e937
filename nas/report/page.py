"""The report of a study: one HTML file, which needs no network connection, and its main figures as PNGs beside it."""

from __future__ import annotations

import base64
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from nas import pareto
from nas.display.charts import Chart, save_charts
from nas.display.notes import deployment_line, duration
from nas.display.study_plots import front_chart
from nas.errors import UsageError
from nas.files import folder_for
from nas.recommendation import commands, doubt_line, recommend
from nas.recorded import RecordedStudy, is_confirmed
from nas.report.architectures import MOST_COLUMNS, chosen_members, figure_width, plot_architectures
from nas.report.data import Material, gather
from nas.report.figures import PARTS, contender_series, contenders_chart, hypervolume_charts, plot_time, plot_workers
from nas.report.importance import EVALUATOR
from nas.report.interactive import plotly_figure
from nas.report.words import front_words, history_words, set_up
from nas.validation.contenders import Contender
from studies import displayed

PAGE = "report.html"
# Greatest numbers of rows in a table: nobody reads longer ones, and the database has all rows.
MOST_ROWS, MOST_ROWS_ELSEWHERE = 40, 10

# Name of a PNG -> the charts that stand in it side by side, each by its name in the page.
Charts = dict[str, dict[str, Chart]]


@dataclass(frozen=True)
class Picture:
    """A PNG in the page and beside it.

    Args:
        file: name of the PNG file.
        data: bytes of the file in base64.
        alt: description of the picture in words.
    """

    file: str
    data: str
    alt: str


def write_report(
    recorded: RecordedStudy, storage: str, folder: Path, contenders: Sequence[Contender] = (),
    verdict: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Write `report.html` and PNGs into a folder, made if need be; return their paths, the page first.

    Each file is replaced as a whole or stays as it was.

    Args:
        storage: URL of the database, for the commands that the page shows.
        contenders: networks that were trained alike, to compare with.
        verdict: sentences that compare the contenders.

    Raises:
        UsageError: the folder cannot be written to.
    """
    material = gather(recorded)
    try:
        with folder_for(folder), tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as made_in:
            aside = Path(made_in)
            charts = charts_of(material, contenders)
            pictures = draw(material, charts, contenders, aside)
            text = page(material, storage, charts, pictures, contenders, verdict)
            # A folder's name may hold bytes that are no text.
            (aside / PAGE).write_text(text, encoding="utf-8", errors="backslashreplace")
            names = [PAGE, *(picture.file for picture in pictures.values())]
            # The page comes last, so that the pictures beside a new page are new, too.
            for made in reversed(names):
                os.replace(aside / made, folder / made)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror or error}") from error
    return [folder / made for made in names]


# -- Figures ---------------------------------------------------------------------------------------------------------


def charts_of(material: Material, contenders: Sequence[Contender]) -> Charts:
    """The charts for which the study has data."""
    charts: Charts = {}
    if len(material.front):
        chart = front_chart(material.evaluations, material.front)
        alike = [contender for contender in contenders if comparable(material.recorded, contender)]
        charts["front"] = {"front": replace(chart, series=[*chart.series, *contender_series(alike)])}
    if len(material.history):
        charts["hypervolume"] = hypervolume_charts(material.history, material.recorded.reference_latency_ms)
    if contenders:
        charts["contenders"] = {"contenders": contenders_chart(contenders)}
    return charts


def draw(material: Material, charts: Charts, contenders: Sequence[Contender], folder: Path) -> dict[str, Picture]:
    """Draw the charts, the architectures and the time into PNGs; return the pictures by their names in the template."""
    pictures = {}

    def add(key: str, alt: str) -> None:
        path = folder / f"{key}.png"
        pictures[key] = Picture(path.name, base64.b64encode(path.read_bytes()).decode(), alt)

    front = material.front
    if "front" in charts:
        title = f"{material.recorded.name}: {material.counted}\n{deployment_line(front.iloc[0])}"
        save_charts(charts["front"].values(), folder / "front.png", title=title)
        add("front", f"Accuracy against latency of {material.counted}. {front_words(front)}")
        drawn = chosen_members(front)
        plot_architectures(drawn, folder / "architectures.png")
        columns = "; ".join(f"{row['latency_ms']:.3g} ms: {row['summary']}" for row in drawn.to_dict("records"))
        add("architectures", f"Networks of the front as stacks of stages, from the fastest. {columns}")
    if "hypervolume" in charts:
        save_charts(charts["hypervolume"].values(), folder / "hypervolume.png", 9, 3.4)
        add("hypervolume", f"Hypervolume over candidates and over time. {history_words(material)}")
    if len(material.time_spent):
        plot_time(material.time_spent, folder / "time.png")
        shares = ", ".join(f"{part['name']} {part['time']} ({part['share']:.0%})" for part in parts_of_time(material))
        add("time", f"Time by part, piled up over the candidates: {shares}.")
    if material.workers > 1:
        plot_workers(material.trainings, folder / "workers.png")
        add("workers", f"Trainings of each worker over the time of the search. {workers_words(material)}")
    if "contenders" in charts:
        title = "networks that were trained alike, bars from p20 to p80"
        save_charts(charts["contenders"].values(), folder / "contenders.png", title=title)
        listed = "; ".join(f"{each.name} {each.accuracy:.1%} at {each.latency.median_ms:.3g} ms" for each in contenders)
        add("contenders", f"Accuracy against latency of networks trained alike: {listed}.")
    return pictures


# -- Rows of tables --------------------------------------------------------------------------------------------------


def parts_of_time(material: Material) -> list[dict[str, Any]]:
    """The rows of the table of time."""
    total = float(material.time_spent.to_numpy().sum())
    sums = {part: float(material.time_spent[part].sum()) for part in PARTS}
    return [
        {"name": part, "time": duration(seconds), "share": seconds / total if total else 0.0, "colour": PARTS[part]}
        for part, seconds in sums.items()
    ]


def workers_words(material: Material) -> str:
    """How many workers trained, and how busy they were, in a sentence."""
    return f"{material.workers} workers trained side by side, each for {material.busy:.0%} of the time on average."


def tiles(material: Material) -> list[tuple[str, str]]:
    """The main numbers of a study, each with its meaning."""
    front, history = material.front, material.history
    shown = [
        (str(material.complete), f"complete of {len(material.candidates)} candidates"),
        *([(str(material.stopped), "stopped early")] if material.stopped else []),
        (str(len(front)), "on the front"),
    ]
    if len(front):
        shown += [
            (f"{front['accuracy'].max():.1%}", "most accurate"),
            (f"{front['latency_ms'].min():.3g} ms", "fastest of the front"),
        ]
    if len(history):
        reference = f"up to {material.recorded.reference_latency_ms:.3g} ms"
        volumes = material.hypervolumes
        shown.append((f"{volumes.searched:.4f}", f"hypervolume as searched, {reference}"))
        if volumes.confirmed is not None:
            shown.append((f"{volumes.confirmed:.4f}", f"hypervolume as confirmed, {reference}"))
            shown.append((f"{volumes.optimism:+.4f}", "optimism: as searched minus as confirmed"))
    return [*shown, (duration(float(material.time_spent.to_numpy().sum())), "spent on candidates")]


def some_rows(rows: pd.DataFrame, most: int) -> list[dict[str, Any]]:
    """At most `most` rows of a front, evenly spaced, as dictionaries; unknown values are None."""
    rows = rows.iloc[pareto.evenly_spaced(len(rows), most)]
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows.to_dict("records")
    ]


def importance_rows(material: Material) -> list[dict[str, Any]]:
    """A row for each parameter, with its share of each objective; the greatest share of any objective first."""
    shares = [each.shares for each in material.importances]
    names = sorted({name for each in shares for name in each}, key=lambda name: -max(e.get(name, 0) for e in shares))
    return [
        {"name": name.replace("_", " ").replace("stage", "stage "), "shares": [each.get(name) for each in shares]}
        for name in names
    ]


def comparable(recorded: RecordedStudy, contender: Contender) -> bool:
    """Whether a contender was trained and measured as the search's candidates were."""
    config = recorded.config
    # Contenders are trained and measured at one resolution.
    sizes = {*config.resolutions} & {*(config.space.own_resolutions or (config.latency.resolution,))}
    schedule = (config.proxy.steps, config.proxy.batch_size)
    return contender.resolution in sizes and schedule == (contender.steps, contender.batch_size)


def command(line: str) -> Markup:
    """A command line in HTML that breaks at spaces, and not within a flag."""
    words = (Markup("<span>{}</span>").format(w) if w.startswith("--") else escape(w) for w in line.split(" "))
    return Markup(" ").join(words)


# -- The page --------------------------------------------------------------------------------------------------------


def page(
    material: Material, storage: str, charts: Charts, pictures: dict[str, Picture],
    contenders: Sequence[Contender], verdict: Sequence[str],
) -> str:  # fmt: skip
    """The page's HTML. All that comes from the database or a user is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("nas.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["command"] = command
    plots = {name: plotly_figure(chart) for members in charts.values() for name, chart in members.items()}
    try:
        recommended = recommend(material.recorded, front=material.front)
    except UsageError:
        # The front is empty, or was measured again, and over the limit.
        recommended = None
    of_study = f"--study {shlex.quote(material.recorded.name)} --storage {shlex.quote(displayed(storage))}"
    return environment.get_template(PAGE).render(
        material=material,
        recorded=material.recorded,
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        set_up=set_up(material),
        tiles=tiles(material),
        recommended=recommended,
        doubt=doubt_line(material.recorded, storage, material.front),
        does=commands(material.recorded.name, storage, recommended.chosen) if recommended else [],
        # Without contenders the verdict says that there are none, which the page says in their place.
        verdict=list(verdict) if contenders else [],
        pictures=pictures,
        plots=plots,
        plotly_js=get_plotlyjs() if plots else "",
        of_study=of_study,
        front_words=front_words(material.front) if len(material.front) else "",
        confirmed=is_confirmed(material.front),
        tested=bool(material.front["test_accuracy"].notna().any()) if len(material.front) else False,
        front_rows=some_rows(material.front, MOST_ROWS),
        columns_drawn=min(len(material.front), MOST_COLUMNS),
        architectures_px=round(100 * figure_width(min(len(material.front), MOST_COLUMNS))),
        contenders=sorted(contenders, key=lambda contender: contender.latency.median_ms),
        history_words=history_words(material) if len(material.history) else "",
        importance_rows=importance_rows(material),
        evaluator=EVALUATOR,
        time_rows=parts_of_time(material),
        workers_words=workers_words(material) if material.workers > 1 else "",
        elsewhere=[
            (line, len(members), some_rows(members, MOST_ROWS_ELSEWHERE)) for line, members in material.elsewhere
        ],
    )
