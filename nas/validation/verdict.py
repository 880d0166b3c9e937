"""The result of a comparison with known networks, in sentences and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from nas.reporting import console_table
from nas.validation.contenders import MOST_GAIN, Contender, ContenderKind

# Latencies that differ by less than this share are called equal: on a CPU no smaller difference is real.
SAME_LATENCY = 0.1


def verdict(contenders: Sequence[Contender]) -> list[str]:
    """Sentences that compare the networks of a study with known ones.

    At equal accuracy each baseline is held against the fastest found network that is at least as accurate, at equal
    latency against the most accurate one that is at most as slow; nothing is interpolated. Only networks whose
    trainings have converged are compared. Where there is nothing to compare, one sentence gives the reason.
    """
    found = [each for each in contenders if each.kind is ContenderKind.FOUND]
    others = [each for each in contenders if each.kind is not ContenderKind.FOUND]
    ready = [each for each in found if each.converged]
    compared = [each for each in others if each.converged]
    if not contenders:
        return ["No verdict: no baseline has been trained and measured."]
    if not ready or not compared:
        lacking, which = (found, "found network") if not ready else (others, "baseline")
        if not lacking:
            return [f"No verdict: no {which} has been trained and measured."]
        reasons = "; ".join(f"{each.name}: {each.reason}" for each in lacking)
        return [
            f"No verdict: the training of no {which} has converged ({reasons}). A longer schedule (--steps) may help."
        ]
    sentences = [_sentence(each, ready) for each in compared]
    steps = contenders[0].steps
    gains = f"doubling the steps to {steps} gained each at most {100 * MOST_GAIN:g} points"
    sentences.append(f"All of these have converged: {gains}.")
    left_out = [each for each in contenders if not each.converged]
    if left_out:
        reasons = "; ".join(f"{each.name} ({each.reason})" for each in left_out)
        sentences.append(f"Not compared, as not converged: {reasons}.")
    return sentences


def _sentence(baseline: Contender, found: Sequence[Contender]) -> str:
    """A sentence that compares a baseline with the found networks."""
    as_accurate = [each for each in found if each.accuracy >= baseline.accuracy]
    as_fast = [each for each in found if each.latency.median_ms <= baseline.latency.median_ms]
    if as_accurate:
        fastest = min(as_accurate, key=lambda each: each.latency.median_ms)
        at_accuracy = f"at equal accuracy {fastest.name} {_faster(fastest, baseline)}"
    else:
        best = max(found, key=lambda each: each.accuracy)
        at_accuracy = f"no found network is as accurate, the best, {best.name}, {_figures(best)}"
    if as_fast:
        best = max(as_fast, key=lambda each: each.accuracy)
        points = 100 * (best.accuracy - baseline.accuracy)
        more = f"{abs(points):.1f} points {'more' if points >= 0 else 'less'} accurate"
        at_latency = f"at equal latency {best.name} is {more} ({_figures(best)})"
    else:
        fastest = min(found, key=lambda each: each.latency.median_ms)
        at_latency = f"no found network is as fast, the fastest, {fastest.name}, {_figures(fastest)}"
    return f"{baseline.name} ({_figures(baseline)}): {at_accuracy}; {at_latency}."


def _faster(found: Contender, baseline: Contender) -> str:
    ratio = baseline.latency.median_ms / found.latency.median_ms
    if 1 / (1 + SAME_LATENCY) < ratio < 1 + SAME_LATENCY:
        return f"is about as fast ({_figures(found)})"
    if ratio > 1:
        return f"is {ratio:.1f} times as fast ({_figures(found)})"
    return f"is slower, {1 / ratio:.1f} times its latency ({_figures(found)})"


def _figures(contender: Contender) -> str:
    return f"{contender.accuracy:.1%} in {contender.latency.median_ms:.3g} ms at {contender.resolution} px"


def table(contenders: Sequence[Contender], title: str) -> Table:
    """The contenders as a table for a terminal of 80 columns."""
    headers = ("network", "accuracy", "latency ms", "px", "params k", "MMACs", "converged")
    made = console_table(title, *headers, text=("network",))
    for each in contenders:
        made.add_row(
            each.name, f"{each.accuracy:.1%}", f"{each.latency.median_ms:.4f}", str(each.resolution),
            f"{each.params / 1e3:,.0f}", f"{each.macs / 1e6:,.1f}", "yes" if each.converged else "no",
        )  # fmt: skip
    return made


def training_lines(contenders: Sequence[Contender]) -> list[str]:
    """A line for each contender that says how its training ended."""
    return [f"{each.name}: {each.training}" for each in contenders]
