"""A table of evaluated networks, on which searches are replayed: `python -m nas.lab.testbed`.

`train` trains networks of a space and appends each training to a file; it may be stopped at any time, and goes on
where it was. Some networks are random, others were found by searches of stored studies. All are trained once, every
fifth with two more seeds, and some much longer, three times. `time` measures their latencies, `pack` makes a compressed
table of all that, `unpack` makes a folder of a table again, so that another machine goes on, and `show` says what the
table holds and how noisy its trainings are.

A table lets samplers and stopping rules be compared over many seeds in seconds (`nas.lab.benchmark_search`), as
NAS-Bench-201 does (Dong and Yang, 2020) for other networks.
"""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from scipy import stats

from nas.config import DataConfig, LatencyConfig, ProxyConfig
from nas.errors import CandidateFailed, contained
from nas.files import whole
from nas.latency.meter import LatencyMeter
from nas.recorded import RecordedStudy
from nas.reporting import console_table
from nas.training import data as image_data
from nas.training.pool import DataFiles, DataSource, train_new
from nas.training.proxy import CURVE_POINTS, ProxyResult
from nas.training.workers import Call, Workers, trim_heap
from search_spaces import ArchSpec, SearchSpace, cost, load_space
from studies import Store

PLAN, TRAININGS, LATENCIES, FOUND = "plan.json", "trainings.jsonl", "latencies.jsonl", "found.json"
# Every so many networks are trained with three seeds, and every so many longer.
SEVERAL_SEEDS_EVERY = 5
SEEDS = 3
# Shares of the schedule after which a network is validated.
CHECKPOINTS = (0.25, 0.35, 0.5, 0.75)
TIMED_TOGETHER = 8


@dataclass(frozen=True)
class Plan:
    """What a table holds; it is written when the table is begun, and never changes.

    Args:
        space: the space as text that `load_space` takes.
        data: source of the images.
        resolution: their width and height in pixels, for networks without a resolution of their own.
        steps, batch_size, learning_rate: the schedule.
        longer: number of steps of the long trainings, in units of `steps`.
        long_every: every so many random networks, and every so many found ones, are trained longer.
        classes: number of classes.
    """

    space: str
    data: str
    resolution: int
    steps: int
    batch_size: int
    learning_rate: float
    longer: int
    long_every: int
    classes: int = 10

    @property
    def proxy(self) -> ProxyConfig:
        return ProxyConfig(steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate)


@dataclass(frozen=True)
class Training:
    """A training of a network.

    Args:
        long: whether it has the long schedule.
        accuracy, loss: those on the validation images; None where it failed.
        curve: [step, train_loss, train_accuracy] over the training, and the two validation figures at checkpoints.
    """

    arch: str
    seed: int
    long: bool
    accuracy: float | None
    loss: float | None
    seconds: float
    curve: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Network:
    """A network of a table.

    Args:
        found: whether a search proposed it; the others are random.
        latency_ms: its latency in ONNX Runtime, on one thread.
        short, long: its trainings with each schedule, in the order of their seeds.
    """

    arch: ArchSpec
    found: bool
    params: int
    macs: int
    latency_ms: float
    short: tuple[Training, ...]
    long: tuple[Training, ...]


def read_plan(path: Path) -> Plan:
    """The plan of a packed table."""
    with lzma.open(path, "rt") as file:
        return Plan(**json.load(file)["plan"])


def read_table(path: Path) -> list[Network]:
    """The networks of a packed table, random ones first."""
    with lzma.open(path, "rt") as file:
        rows = json.load(file)["networks"]

    def trainings(row: dict[str, Any], name: str) -> tuple[Training, ...]:
        return tuple(Training(row["arch"], *each) for each in row[name])

    return [
        Network(
            ArchSpec.parse(row["arch"]), row["found"], row["params"], row["macs"], row["latency_ms"],
            trainings(row, "short"), trainings(row, "long"),
        )
        for row in rows
    ]  # fmt: skip


def given_table(path: Path) -> tuple[Plan, list[Network]]:
    """Plan and networks of the table that `--table` names.

    Raises:
        SystemExit: there is none, or the file holds something else.
    """
    try:
        return read_plan(path), read_table(path)
    except OSError as error:
        raise SystemExit(f"--table {path}: {error.strerror or error}") from error
    except (lzma.LZMAError, ValueError, KeyError, TypeError, EOFError) as error:
        raise SystemExit(f"--table {path}: is no table of nas.lab.testbed ({error})") from error


# -- Collecting --------------------------------------------------------------------------------------------------------


def random_networks(space: SearchSpace, count: int) -> list[ArchSpec]:
    """So many different random networks; those of a smaller count are the first ones of a greater."""
    rng, found = random.Random(0), dict[str, ArchSpec]()
    while len(found) < count:
        arch = space.sample(rng)
        found.setdefault(arch.arch_id, arch)
    return list(found.values())


def jobs_of(archs: Sequence[ArchSpec], found: Sequence[ArchSpec], plan: Plan) -> Iterator[tuple[ArchSpec, int, bool]]:
    """All trainings, (network, seed, long), in an order in which any first part is a balanced table."""
    # Random and found networks come in turns, as many of each as their shares are.
    places = [((index + 0.5) / len(group), index, arch) for group in (archs, found) for index, arch in enumerate(group)]
    for _, index, arch in sorted(places, key=lambda place: place[0]):
        several = index % SEVERAL_SEEDS_EVERY == 0
        for seed in range(SEEDS if several else 1):
            yield arch, seed, False
        if index % plan.long_every == 0:
            for seed in range(SEEDS):
                yield arch, 100 + seed, True


def train_checked(
    arch: ArchSpec, data: DataSource, config: ProxyConfig, seed: int, checkpoints: Sequence[int], device: str
) -> ProxyResult:
    """Train a network in this process, which is a worker."""
    try:
        with contained():
            return train_new(arch.build, data, config, seed, device, checkpoints)[1]
    finally:
        trim_heap()


def checkpoints_of(steps: int) -> list[int]:
    """The numbers of steps after which a network is validated; the learning curve has points there."""
    every = max(1, steps // CURVE_POINTS)
    return [round(share * steps / every) * every for share in CHECKPOINTS]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is appended to; a last one that a killed process left unfinished is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, value: Any) -> None:
    unfinished = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        # What a killed process left unfinished stays a line of its own.
        file.write(("\n" if unfinished else "") + json.dumps(value) + "\n")


def found_networks(studies: Sequence[str], before: Sequence[ArchSpec] = ()) -> list[ArchSpec]:
    """The networks that searches of stored studies evaluated.

    Args:
        studies: each as URL and name, with a # between them.
        before: networks that were found before; they come first.
    """
    found = {arch.arch_id: arch for arch in before}
    for each in studies:
        with stored_study(each) as recorded:
            for candidate in recorded.candidates():
                if candidate.accuracy is not None:
                    found.setdefault(candidate.arch_id, ArchSpec.from_json(candidate.arch))
    return list(found.values())


@contextmanager
def stored_study(named: str) -> Iterator[RecordedStudy]:
    """A stored study that is named as URL#NAME, while the block runs."""
    url, _, name = named.rpartition("#")
    store = Store.open(url, create=False)
    if store is None:
        raise SystemExit(f"--study {named}: there is no study database")
    with closing(store):
        yield RecordedStudy.open(store, name)


app = typer.Typer(add_completion=False, help=(__doc__ or "").splitlines()[0])
Folder = Annotated[Path, typer.Argument(help="Folder of the table while it is made.")]
Studies = Annotated[
    list[str] | None,
    typer.Option("--study", help="URL#NAME of a study whose candidates are the found networks; may be repeated."),
]


@app.command()
def train(
    folder: Folder,
    random_count: Annotated[int, typer.Option("--random", help="Number of random networks.")] = 800,
    study: Studies = None,
    found_count: Annotated[int, typer.Option("--found", help="Greatest number of found networks.")] = 400,
    space: Annotated[str, typer.Option(help="Search space.")] = "small",
    data: Annotated[str, typer.Option(help="Source of the images.")] = "digits",
    resolution: Annotated[int, typer.Option(help="Width and height of the images, in pixels.")] = 32,
    steps: Annotated[int, typer.Option(help="Training steps.")] = ProxyConfig().steps,
    batch: Annotated[int, typer.Option(help="Images per training step.")] = ProxyConfig().batch_size,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = ProxyConfig().learning_rate,
    longer: Annotated[int, typer.Option(help="Length of the long trainings, in units of the others.")] = 8,
    long_every: Annotated[int, typer.Option(help="Every so many networks are trained longer.")] = 20,
    classes: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    workers: Annotated[int, typer.Option(help="Number of trainings at once.")] = 2,
) -> None:
    """Train what the table lacks."""
    console = Console()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(space, data, resolution, steps, batch, rate, longer, long_every, classes)
    if (folder / PLAN).exists() and (begun := _plan(folder)) != plan:
        raise SystemExit(f"{folder}: was begun with another plan, {begun}")
    with whole(folder / PLAN) as part:
        part.write_text(json.dumps(asdict(plan)))
    searched = load_space(space)
    archs = random_networks(searched, random_count)
    known = {arch.arch_id for arch in archs}
    before = [ArchSpec.parse(text) for text in _read(folder / FOUND, [])]
    found = [arch for arch in found_networks(study or (), before) if arch.arch_id not in known][:found_count]
    with whole(folder / FOUND) as part:
        part.write_text(json.dumps([str(arch) for arch in found]))
    done = {(row["arch"], row["seed"], row["long"]) for row in lines_of(folder / TRAININGS)}
    jobs = [job for job in jobs_of(archs, found, plan) if (str(job[0]), job[1], job[2]) not in done]
    console.print(f"{len(archs)} random and {len(found)} found networks, {len(jobs)} trainings to do")
    with ExitStack() as stack:
        files, pool = stack.enter_context(DataFiles()), stack.enter_context(Workers(workers, ["cpu"]))
        config = DataConfig(source=data, resolution=resolution)
        own = searched.own_resolutions or (resolution,)
        sources = {size: files.write(images) for size, images in image_data.load_all(config, own)}
        calls = []
        for arch, seed, long in jobs:
            schedule = replace(plan.proxy, steps=steps * longer) if long else plan.proxy
            at = checkpoints_of(schedule.steps)
            calls.append(Call(train_checked, (arch, sources[arch.shown(resolution)], schedule, seed, at)))
        results = stack.enter_context(closing(pool.run(calls)))
        for each in track(results, "training", len(calls), console=console):
            arch, seed, long = jobs[each.index]
            append(folder / TRAININGS, asdict(_training(str(arch), seed, long, each.result)))


def _training(arch: str, seed: int, long: bool, result: ProxyResult | CandidateFailed) -> Training:
    if isinstance(result, CandidateFailed):
        return Training(arch, seed, long, None, None, 0.0)
    curve = [
        [point.step, round(point.train_loss, 4), round(point.train_accuracy, 4)]
        + ([] if point.val_accuracy is None else [round(point.val_accuracy, 4), round(point.val_loss or 0.0, 4)])
        for point in result.curve
    ]
    return Training(arch, seed, long, round(result.accuracy, 5), round(result.loss, 5), round(result.seconds, 2), curve)


@app.command(name="time")
def time_(folder: Folder) -> None:
    """Time what was trained and not timed yet; nothing else should run meanwhile."""
    plan = _plan(folder)
    space = load_space(plan.space)
    done = {row["arch"] for row in lines_of(folder / LATENCIES)}
    wanted = dict.fromkeys(row["arch"] for row in lines_of(folder / TRAININGS))
    lacking = [ArchSpec.parse(text) for text in wanted if text not in done]
    config = LatencyConfig(device="cpu", engine="onnxruntime", resolution=plan.resolution, num_classes=plan.classes)
    torch.set_num_threads(1)
    meter = LatencyMeter(config, space.anchor().build(plan.classes))
    for begin in track(range(0, len(lacking), TIMED_TOGETHER), "timing"):
        group = lacking[begin : begin + TIMED_TOGETHER]
        for arch, measured in zip(
            group, meter.measure_together([arch.build(plan.classes) for arch in group]), strict=True
        ):
            append(folder / LATENCIES, {"arch": str(arch), "latency_ms": measured.latency.median_ms})


@app.command()
def pack(folder: Folder, table: Annotated[Path, typer.Argument(help="File of the table, NAME.json.xz.")]) -> None:
    """Write a compressed table of all networks that were trained and timed."""
    plan = _plan(folder)
    latencies = {row["arch"]: row["latency_ms"] for row in lines_of(folder / LATENCIES)}
    found = _read(folder / FOUND, [])
    by_arch: dict[str, list[dict[str, Any]]] = {}
    seen = set()
    for row in lines_of(folder / TRAININGS):
        # Two calls at once may have made the same training.
        if (row["arch"], row["seed"], row["long"]) not in seen:
            by_arch.setdefault(row["arch"], []).append(row)
        seen.add((row["arch"], row["seed"], row["long"]))
    networks = []
    for text, rows in by_arch.items():
        if text not in latencies:
            continue
        counted = cost(ArchSpec.parse(text), plan.resolution, plan.classes)
        ordered = sorted(rows, key=lambda row: row["seed"])
        networks.append({
            "arch": text, "found": text in found, "params": counted.params, "macs": counted.macs,
            "latency_ms": round(latencies[text], 5),
            **{name: [[row[key] for key in ("seed", "long", "accuracy", "loss", "seconds", "curve")]
                      for row in ordered if row["long"] == (name == "long")] for name in ("short", "long")},
        })  # fmt: skip
    networks.sort(key=lambda row: row["found"])
    with whole(table) as part, lzma.open(part, "wt", preset=9) as file:
        # Those that were not trained yet keep their places.
        json.dump({"plan": asdict(plan), "found": found, "networks": networks}, file, separators=(",", ":"))
    Console().print(f"{len(networks)} networks in {table}, {table.stat().st_size / 2**20:.2f} MB")


@app.command()
def unpack(
    table: Annotated[Path, typer.Argument(help="File of the table.")],
    folder: Annotated[Path, typer.Argument(help="Folder to make, in which `train` and `time` go on.")],
) -> None:
    """Make a folder of a table."""
    if folder.exists():
        raise SystemExit(f"{folder}: is there already")
    with lzma.open(table, "rt") as file:
        packed = json.load(file)
    folder.mkdir(parents=True)
    (folder / PLAN).write_text(json.dumps(packed["plan"]))
    (folder / FOUND).write_text(json.dumps(packed["found"]))
    for network in read_table(table):
        append(folder / LATENCIES, {"arch": str(network.arch), "latency_ms": network.latency_ms})
        for training in (*network.short, *network.long):
            append(folder / TRAININGS, asdict(training))


def _plan(folder: Path) -> Plan:
    return Plan(**json.loads((folder / PLAN).read_text()))


def _read(path: Path, otherwise: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else otherwise


@app.command()
def show(table: Annotated[Path, typer.Argument(help="File of the table.")]) -> None:
    """Say what a table holds, how noisy its trainings are, and how well one ranks networks."""
    networks = read_table(table)
    short = [[each.accuracy for each in network.short if each.accuracy is not None] for network in networks]
    several = [each for each in short if len(each) == SEEDS]
    noise = float(np.sqrt(np.mean([np.var(each, ddof=1) for each in several]))) if several else float("nan")
    spread = float(np.std([each[0] for each in short if each], ddof=1))
    # Accuracy of one training, mean of the long ones, and latency.
    long = [
        (one[0], float(np.mean(longer)), network.latency_ms)
        for one, network in zip(short, networks, strict=True)
        if one and len(longer := [each.accuracy for each in network.long if each.accuracy is not None]) == SEEDS
    ]
    long.sort(key=lambda each: each[2])
    slow = long[len(long) - len(long) // 3 :]
    lines = console_table(str(table), "what", "value", text=("what",))
    for name, value in (
        ("networks", f"{len(networks):,}"), ("of them found", f"{sum(each.found for each in networks):,}"),
        ("trainings", f"{sum(len(each.short) + len(each.long) for each in networks):,}"),
        ("with three seeds", f"{len(several)}"), ("with long trainings", f"{len(long)}"),
        ("noise of one training, points", f"{100 * noise:.2f}"),
        ("spread between networks, points", f"{100 * spread:.2f}"),
        ("tau of one training to the long mean", _tau(long)),
        (f"the same in the slow third, {len(slow)} networks", _tau(slow)),
        ("seconds of a training, median", f"{np.median([each.seconds for n in networks for each in n.short]):.1f}"),
    ):  # fmt: skip
        lines.add_row(name, value)
    Console().print(lines)


def _tau(scored: Sequence[tuple[float, float, float]]) -> str:
    """Kendall's tau of the first figures to the second ones; nothing where there are too few."""
    return (
        f"{stats.kendalltau([one for one, *_ in scored], [two for _, two, _ in scored])[0]:.2f}"
        if len(scored) > 2
        else ""
    )


if __name__ == "__main__":
    # Workers import what they call, which they cannot from __main__.
    from nas.lab import testbed

    testbed.app()
