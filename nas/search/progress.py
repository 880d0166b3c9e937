"""The display of a running search: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

from nas.display.notes import duration
from nas.recorded import Hypervolumes
from nas.search.loop import Event, SearchResult
from studies import CandidateState

# Columns from which on there is room for the bar, which takes some of them.
WIDE, BAR = 135, 20
# Seconds of compiling and tuning a candidate, or of waiting, from which on they are shown.
WORTH_SAYING = 0.5


def scored(event: Event) -> str:
    """The last candidate in a few words."""
    outcome = event.outcome
    if outcome.state == CandidateState.COMPLETE and outcome.proxy and outcome.latency:
        ready = f"  {text}" if (text := ready_in(event)) else ""
        return f"accuracy {outcome.proxy.accuracy:.3f}  latency {outcome.latency.median_ms:.3f} ms{ready}"
    return f"{outcome.state.value.replace('_', ' ')}: {outcome.reason}"


def ready_in(event: Event) -> str:
    """The time that the network took to be ready to be timed, in words; empty where it was short."""
    latency = event.outcome.latency
    if latency is None or latency.ready_seconds < WORTH_SAYING:
        return ""
    return f"ready in {latency.ready_seconds:.1f} s"


def scored_briefly(event: Event) -> str:
    """The last candidate in fewer words: a live line has 80 columns."""
    outcome = event.outcome
    if outcome.state == CandidateState.COMPLETE and outcome.proxy and outcome.latency:
        return f"{outcome.proxy.accuracy:.3f} at {outcome.latency.median_ms:.3f} ms"
    if outcome.state == CandidateState.OVER_LIMIT and outcome.reason:
        # The first broken limit is enough, in fewer words.
        return outcome.reason.partition(";")[0]
    return outcome.state.value.replace("_", " ")


def counted(event: Event) -> str:
    """The number of candidates, of all that there will be, and of those whose training was given up."""
    return f"{event.complete}/{event.budget}" + (f" ({event.stopped} stopped early)" if event.stopped else "")


def standing(event: Event) -> str:
    """The state of the search in a few words."""
    left = f"  {duration(event.seconds_left)} left" if event.seconds_left is not None else ""
    volume = f"hypervolume as searched {event.hypervolume:.4f}"
    return f"best {event.best_accuracy:.3f}  front {event.front_size}  {volume}{left}"


def pace(event: Event) -> str:
    """The workers that train, and how fast candidates are completed, in a few words; empty at the beginning."""
    if event.per_minute is None:
        return ""
    return f"{event.busy}/{event.workers} busy, {event.per_minute:.1f} a minute"


def live_words(event: Event, room: int) -> str:
    """The last candidate and the state of the search, without what has no room in so many columns."""
    left = f"{duration(event.seconds_left)} left" if event.seconds_left is not None else ""
    words = {
        "last": scored_briefly(event), "stopped": f"{event.stopped} stopped early" if event.stopped else "",
        "best": f"best {event.best_accuracy:.3f}", "front": f"front {event.front_size}",
        "hypervolume": f"hypervolume as searched {event.hypervolume:.4f}", "pace": pace(event), "left": left,
    }  # fmt: skip
    for least in ("", "front", "stopped", "hypervolume"):
        words.pop(least, None)
        line = "  ".join(word for word in words.values() if word)
        if len(line) <= room:
            break
    return line


def confirming_words(done: int, most: int, likely: int) -> str:
    """How far the confirmation of the front has come, in a few words."""
    # Each likely member is trained once, even where that is more.
    trained = f"{done} of at most {max(done, most)} trainings"
    return f"confirming the front with other seeds: {trained}, {likely} likely member{'s' if likely != 1 else ''}"


class PlainProgress:
    """Prints one line for each candidate, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)

    def note(self, line: str) -> None:
        self._print(line)

    def begin(self, complete: int, budget: int) -> None:
        if complete:
            self._print(f"going on: {complete} of {budget} candidates are there")

    def candidate(self, event: Event) -> None:
        parts = (counted(event), scored(event), standing(event), pace(event), f"[{event.arch}]")
        self._print("  ".join(part for part in parts if part))

    def confirming(self, done: int, most: int, likely: int) -> None:
        self._print(confirming_words(done, most, likely))


class LiveProgress:
    """Shows a bar that stays in place, with the last candidate and the search's state beside it; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        # On a narrow terminal the bar is left out, never the figures.
        bar = [BarColumn(bar_width=BAR)] if console.width >= WIDE else []
        self.bar = RichProgress(
            *bar, MofNCompleteColumn(), TextColumn("{task.description}", markup=False), console=console
        )
        self.task: TaskID | None = None

    def __enter__(self) -> LiveProgress:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.stop()

    def note(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)
        if self.task is not None:
            # The bar says what the search is doing, which a candidate's figures do not say.
            self.bar.update(self.task, description=line)

    def begin(self, complete: int, budget: int) -> None:
        self.bar.start()
        self.task = self.bar.add_task("first candidate", total=budget, completed=complete)

    def candidate(self, event: Event) -> None:
        assert self.task is not None, "begin comes first"
        # The live line has no room for these words.
        if event.outcome.state == CandidateState.FAILED:
            self.note(f"{event.arch}: {scored(event)}")
        elif ready := ready_in(event):
            self.note(f"{event.arch}: {ready}")
        taken = len(f"{event.budget}/{event.budget} ") + (BAR + 1 if self.console.width >= WIDE else 0)
        words = live_words(event, self.console.width - taken)
        self.bar.update(self.task, completed=event.complete, description=words)

    def confirming(self, done: int, most: int, likely: int) -> None:
        assert self.task is not None, "begin comes first"
        self.bar.update(self.task, description=confirming_words(done, most, likely))


def shares_line(result: SearchResult) -> str:
    """The time that this run spent, and on what, in a line."""
    shares = result.shares
    parts = {"training": shares.training, "latency": shares.latency, "all else": shares.rest}
    if shares.waiting >= WORTH_SAYING:
        parts["waiting for other processes"] = shares.waiting
    listed = ", ".join(f"{name} {duration(s)} ({s / shares.total:.0%})" for name, s in parts.items())
    listed += f", where {duration(shares.both)} went to both" if shares.both else ""
    busy = f"; {shares.workers} workers were busy for {shares.busy:.0%} of the training" if shares.workers > 1 else ""
    return f"{duration(shares.total)} in all: {listed}{busy}"


def hypervolume_words(found: Hypervolumes) -> str:
    """The hypervolume of a front as searched, as confirmed, and by how much the search was too optimistic."""
    searched = f"hypervolume as searched {found.searched:.4f}"
    if found.confirmed is None:
        return searched
    return f"{searched}, as confirmed {found.confirmed:.4f} (optimism {found.optimism:+.4f})"
