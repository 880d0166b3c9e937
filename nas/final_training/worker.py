"""One of the processes of a training on several devices: `torchrun -m nas.final_training.worker FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from nas.errors import CandidateFailed, UsageError, message_line
from nas.files import save_tensors
from nas.final_training.fit import Epoch, Fitted, Within, fit, rank, read_job
from nas.final_training.launch import end_with_launcher

# The result of a training, and why it failed.
RESULT, ERROR = "result.pt", "error.txt"


def main(place: Path) -> None:
    """Train what a folder says, and write the result into it."""
    end_with_launcher()
    job, recipe = read_job(place)
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if recipe.kind == "cuda" else torch.device("cpu")
    if recipe.kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if recipe.kind == "cuda" else "gloo")

    def told(moment: Epoch | Within, epochs: int) -> None:
        print(json.dumps(asdict(moment)), flush=True)

    try:
        # The process that started this one keeps others from measuring meanwhile.
        found = fit(place, recipe, job, device, told=told, told_within=told)
        if rank() == 0:
            save_tensors({**asdict(found), "epochs": [asdict(each) for each in found.epochs]}, place / RESULT)
    except (CandidateFailed, UsageError, OSError) as error:
        (place / ERROR).write_text(message_line(error))
        raise
    torch.distributed.destroy_process_group()


def result(place: Path) -> Fitted:
    """What `main` wrote."""
    stored = torch.load(place / RESULT, weights_only=True)
    return Fitted(**{**stored, "epochs": tuple(Epoch(**each) for each in stored["epochs"])})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
