"""A study as one HTML file to hand around, that needs no network, and its main figures as PNGs beside it."""

from __future__ import annotations

import base64
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from nas.display.plots import plot_front
from nas.errors import UsageError
from nas.report.data import Material, gather, set_up
from nas.report.figures import (
    COLUMN,
    MARGIN,
    MOST_COLUMNS,
    PARTS,
    chosen_members,
    plain,
    plot_architectures,
    plot_contenders,
    plot_hypervolume,
    plot_time,
)
from nas.report.importance import EVALUATOR
from nas.report.interactive import Figure, contenders_plot, front_plot, hypervolume_plots
from nas.search.progress import duration
from nas.validation.contenders import Contender
from studies import Store, displayed

PAGE = "report.html"
# Rows of a table: longer ones are no reading, and the database has them all.
MOST_ROWS, MOST_ROWS_ELSEWHERE = 40, 10
# Of the candidates at the end, over which it is told how much was still gained.
LAST_SHARE = 0.25


@dataclass(frozen=True)
class Picture:
    """A PNG in the page, and beside it."""

    file: str
    data: str
    alt: str


def write_report(
    store: Store, name: str, storage: str, folder: Path, contenders: Sequence[Contender] = (),
    verdict: Sequence[str] = (),
) -> list[Path]:  # fmt: skip
    """Make `report.html` and PNGs in a folder, which is made if need be; returns their paths, the page first.

    Each file is whole or is what it was before.

    Args:
        name: of a study that is in the store.
        storage: its URL, for the commands that the page shows.
        contenders: networks that were trained alike, to compare with.
        verdict: sentences that tell what they show.

    Raises:
        UsageError: the folder cannot be written to.
    """
    material = gather(store, name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as made_in:
            aside = Path(made_in)
            pictures = draw(material, contenders, aside)
            (aside / PAGE).write_text(page(material, storage, pictures, contenders, verdict), encoding="utf-8")
            names = [PAGE, *(picture.file for picture in pictures.values())]
            # The page last: who finds it new finds the pictures, too.
            for made in reversed(names):
                os.replace(aside / made, folder / made)
    except OSError as error:
        raise UsageError(f"--out {folder}: {error.strerror or error}") from error
    return [folder / made for made in names]


# -- Pictures --------------------------------------------------------------------------------------------------------


def draw(material: Material, contenders: Sequence[Contender], folder: Path) -> dict[str, Picture]:
    """Those figures that there is something to show in."""
    pictures = {}

    def add(key: str, alt: str) -> None:
        path = folder / f"{key}.png"
        pictures[key] = Picture(path.name, base64.b64encode(path.read_bytes()).decode(), alt)

    front, course = material.front, material.course
    if len(front):
        title = f"{plain(material.name)}: {material.complete} candidates"
        plot_front(material.evaluations, front, title, folder / "front.png")
        add("front", f"Accuracy against latency of {material.complete} candidates. {front_words(front)}")
        drawn = chosen_members(front)
        plot_architectures(drawn, folder / "architectures.png")
        columns = "; ".join(f"{row['latency_ms']:.3g} ms: {row['summary']}" for row in drawn.to_dict("records"))
        add("architectures", f"Networks of the front as stacks of stages, from the fastest. {columns}")
    if len(course):
        plot_hypervolume(course, material.reference_ms, folder / "hypervolume.png")
        add("hypervolume", f"Hypervolume over candidates and over time. {course_words(material)}")
    if len(material.spent):
        plot_time(material.spent, folder / "time.png")
        shares = ", ".join(f"{part['name']} {part['time']} ({part['share']:.0%})" for part in parts_of_time(material))
        add("time", f"Time by part, piled up over the candidates: {shares}.")
    if contenders:
        plot_contenders(contenders, folder / "contenders.png")
        listed = "; ".join(f"{each.name} {each.accuracy:.1%} at {each.latency_ms:.3g} ms" for each in contenders)
        add("contenders", f"Accuracy against latency of networks trained alike: {listed}.")
    return pictures


# -- Words and rows --------------------------------------------------------------------------------------------------


def front_words(front: pd.DataFrame) -> str:
    first, last = front.iloc[0], front.iloc[-1]
    if len(front) == 1:
        return f"The front is one network: {first['accuracy']:.1%} at {first['latency_ms']:.3g} ms."
    return (
        f"The front has {len(front)} networks, from {first['accuracy']:.1%} at {first['latency_ms']:.3g} ms "
        f"to {last['accuracy']:.1%} at {last['latency_ms']:.3g} ms."
    )


def course_words(material: Material) -> str:
    """Whether the search was still improving."""
    volumes = material.course["hypervolume"].to_numpy()
    reached = f"It came to {volumes[-1]:.4f} after {len(volumes)} candidate{'s' if len(volumes) > 1 else ''}."
    recent = round(LAST_SHARE * len(volumes))
    if not volumes[-1] or not recent:
        return reached
    gained = volumes[-1] / volumes[-1 - recent] - 1 if volumes[-1 - recent] else np.inf
    last = int(np.flatnonzero(np.diff(volumes, prepend=0))[-1]) + 1
    if not gained:
        return f"{reached} The last {recent} added nothing: the last improvement was at candidate {last}."
    grew = f"it grew by {gained:.2%}" if np.isfinite(gained) else "it grew from nothing"
    return f"{reached} Over the last {recent} candidates {grew}; the last improvement was at candidate {last}."


def parts_of_time(material: Material) -> list[dict[str, Any]]:
    total = float(material.spent.to_numpy().sum())
    sums = {part: float(material.spent[part].sum()) for part in PARTS}
    return [
        {"name": part, "time": duration(seconds), "share": seconds / total if total else 0.0, "colour": PARTS[part]}
        for part, seconds in sums.items()
    ]


def tiles(material: Material) -> list[tuple[str, str]]:
    """The figures that one looks for first, each with what it is."""
    front, course = material.front, material.course
    found = [
        (str(material.complete), f"complete of {len(material.candidates)} candidates"),
        (str(len(front)), "on the front"),
    ]
    if len(front):
        found += [
            (f"{front['accuracy'].max():.1%}", "most accurate"),
            (f"{front['latency_ms'].min():.3g} ms", "fastest of the front"),
        ]
    if len(course):
        found.append((f"{course['hypervolume'].iloc[-1]:.4f}", f"hypervolume up to {material.reference_ms:.3g} ms"))
    return [*found, (duration(float(material.spent.to_numpy().sum())), "spent on candidates")]


def some_rows(rows: pd.DataFrame, most: int) -> list[dict[str, Any]]:
    """Of too many, as many as that, evenly, with both ends; what is not known is None."""
    if len(rows) > most:
        rows = rows.iloc[np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))]
    return [
        {str(key): None if pd.isna(value) else value for key, value in row.items()} for row in rows.to_dict("records")
    ]


def importance_rows(material: Material) -> list[dict[str, Any]]:
    """A row a parameter, with its share of each objective; what matters most to any of them first."""
    shares = [each.shares for each in material.importances]
    names = sorted({name for each in shares for name in each}, key=lambda name: -max(e.get(name, 0) for e in shares))
    return [
        {"name": name.replace("_", " ").replace("stage", "stage "), "shares": [each.get(name) for each in shares]}
        for name in names
    ]


def comparable(material: Material, contender: Contender) -> bool:
    """Whether a contender was trained and measured as the search's candidates were."""
    training, latency = material.config["proxy"], material.config["latency"]
    return (contender.resolution, contender.steps, contender.batch_size) == (
        latency["resolution"], training["steps"], training["batch_size"],
    ) and contender.resolution == material.config["data"]["resolution"]  # fmt: skip


def command(line: str) -> Markup:
    """A command's line that breaks at spaces, and not within a flag."""
    words = (Markup("<span>{}</span>").format(w) if w.startswith("--") else escape(w) for w in line.split(" "))
    return Markup(" ").join(words)


# -- The page --------------------------------------------------------------------------------------------------------


def page(
    material: Material, storage: str, pictures: dict[str, Picture], contenders: Sequence[Contender],
    verdict: Sequence[str],
) -> str:  # fmt: skip
    """The page's HTML. All that comes from the database or a user is escaped by the template."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("nas.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["command"] = command
    plots: dict[str, Figure] = {}
    if len(material.front):
        marks = [contender for contender in contenders if comparable(material, contender)]
        plots["front"] = front_plot(material.evaluations, material.front, marks)
    if len(material.course):
        plots["hypervolume_trials"], plots["hypervolume_seconds"] = hypervolume_plots(material.course)
    if contenders:
        plots["contenders"] = contenders_plot(contenders)
    of_study = f"--study {shlex.quote(material.name)} --storage {shlex.quote(displayed(storage))}"
    return environment.get_template(PAGE).render(
        material=material,
        made_at=f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        set_up=set_up(material),
        tiles=tiles(material),
        # Without contenders it says that there are none, which the page says in their place.
        verdict=list(verdict) if contenders else [],
        pictures=pictures,
        plots=plots,
        plotly_js=get_plotlyjs() if plots else "",
        of_study=of_study,
        front_words=front_words(material.front) if len(material.front) else "",
        front_rows=some_rows(material.front, MOST_ROWS),
        columns_drawn=min(len(material.front), MOST_COLUMNS),
        architectures_px=round(100 * max(MARGIN + COLUMN * min(len(material.front), MOST_COLUMNS), 5.5)),
        contenders=sorted(contenders, key=lambda contender: contender.latency_ms),
        course_words=course_words(material) if len(material.course) else "",
        importance_rows=importance_rows(material),
        evaluator=EVALUATOR,
        time_rows=parts_of_time(material),
        elsewhere=[
            (line, len(members), some_rows(members, MOST_ROWS_ELSEWHERE)) for line, members in material.elsewhere
        ],
    )
