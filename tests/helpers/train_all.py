"""One rank that trains several recipes in turn, since starting ranks takes seconds: ``train_all.py A.toml B.toml``."""

from __future__ import annotations

import sys

import torch

from feedfast.recipe import load_recipe
from feedfast.stages.student import run_train
from feedfast.stages.worker import Worker


def main(files: list[str]) -> None:
    with Worker.from_env().process_group(torch.device("cpu")):
        for file in files:
            run_train(load_recipe(file))


if __name__ == "__main__":
    main(sys.argv[1:])
