"""torchrun, which ends with the process that starts it, and its workers with it: `-m nas.final_training.launch`.

torchrun starts each worker in a session of its own, and on its own stays when the command that started it is killed: a
training would go on that nobody sees, on GPUs that the next one takes for free.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from nas.child_process import die_with_parent

# Environment variable that tells workers the number of the process whose end is theirs.
LAUNCHER = "CONVFIRST_LAUNCHER"


def main(arguments: Sequence[str]) -> None:
    """Run torchrun.

    Args:
        arguments: the number of the process that starts this one, and what torchrun takes.
    """
    parent, *rest = arguments
    end_with(int(parent))
    os.environ[LAUNCHER] = str(os.getpid())
    torchrun(rest)


def torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import main as run

    run(list(arguments))


def end_with_launcher() -> None:
    """Have this process, which torchrun started, killed when torchrun ends; one that something else started stays."""
    if launcher := os.environ.get(LAUNCHER):
        end_with(int(launcher))


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, or end it if that has ended already."""
    die_with_parent()
    # It may have ended before that was set.
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
