"""The search: the loop, the study that it fills, proposals, evaluation and progress.

This room imports from cluster, display, latency, training and the modules of nas/ itself; cli, validation and the labs
import from it.
"""

from nas.search.loop import SearchResult, run

__all__ = ["SearchResult", "run"]
