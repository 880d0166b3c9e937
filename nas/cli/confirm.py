"""`confirm`: the accuracies of a front."""

from __future__ import annotations

import typer

from nas.cli.console import interruptible, note, reported, say
from nas.cli.fronts import print_front
from nas.cli.opening import existing_study
from nas.cli.options import Storage, StudyName, given, made, takes
from nas.config import DEFAULT_STORAGE, DEFAULT_STUDY
from nas.validation.config import ConfirmConfig


@takes(ConfirmConfig)
def confirm(context: typer.Context, storage: Storage = DEFAULT_STORAGE, study: StudyName = DEFAULT_STUDY) -> None:
    """Train the likely members of a study's front again with other seeds, and print the front of their means."""
    with interruptible(), reported(storage), existing_study(storage, study, write=True) as recorded:
        from nas.search.progress import hypervolume_words
        from nas.training.weights import Weights, weight_folder
        from nas.validation.confirm import confirm as confirm_front
        from studies import LatencyStage

        done = confirm_front(recorded, made(ConfirmConfig, given(ConfirmConfig, context)), note)
        front = recorded.front()
        print_front(front, f"Pareto front of {study}")
        say(f"{done}; {hypervolume_words(recorded.hypervolumes())}")
        once = int((front["latency_stage"] != LatencyStage.FINAL).sum())
        if once:
            say(f"{once} of the front were timed in the search only; the command remeasure times the front in turns")
        # What confirms here keeps no weights, so a member that was far from the front before may have none.
        kept = Weights(weight_folder(storage), recorded.study_id)
        lacking = kept.without(zip(front["number"].astype(int), front["arch_id"], strict=True))
        if lacking and kept.any_kept():
            say(lacking)
