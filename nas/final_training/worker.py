"""One of the processes of a training on several devices: `torchrun -m nas.final_training.worker FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

import torch

from nas.final_training.fit import Epoch, Fitted, fit, rank, read_job
from nas.locks import training_on

RESULT = "result.pt"


def main(place: Path) -> None:
    """Train what a folder says, and write the result into it."""
    from nas.files import save_tensors

    job, recipe = read_job(place)
    local = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if recipe.kind == "cuda" else torch.device("cpu")
    if recipe.kind == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if recipe.kind == "cuda" else "gloo")

    def told(epoch: Epoch, epochs: int) -> None:
        print(json.dumps(asdict(epoch)), flush=True)

    def turn() -> AbstractContextManager[None]:
        return training_on([device], lambda line: print(line, file=sys.stderr))

    found = fit(place, recipe, job, device, told=told, turn=turn)
    if rank() == 0:
        save_tensors({**asdict(found), "epochs": [asdict(each) for each in found.epochs]}, place / RESULT)
    torch.distributed.destroy_process_group()


def result(place: Path) -> Fitted:
    """What `main` wrote."""
    stored = torch.load(place / RESULT, weights_only=True)
    return Fitted(**{**stored, "epochs": tuple(Epoch(**each) for each in stored["epochs"])})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
