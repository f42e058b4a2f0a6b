"""This process among its peers: ranks of torchrun or srun, parts of job arrays, and the process group.

Ranks talk to each other (one training run, one caching job); parts do not (each writes its own shards, or runs by
itself). torchrun and srun start ranks; Slurm arrays and Kubernetes indexed jobs start parts.

A group lives inside ``with worker.process_group(device)``: it is left on every way out, and when one rank fails, the
first failure is the one that is reported. The others find its word in the group's store and end with
`PeerFailedError`, which the command line does not print: one job, one message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from feedfast.errors import FeedfastError, PeerFailedError, RequestError

log = logging.getLogger(__name__)

FAILED = "feedfast/failed"
END = "feedfast/end"
AHEAD = 3  # steps: all ranks get a launcher's signal within that time
PORTS = range(20000, 40000)  # below the kernel's ephemeral range; a job's number picks one


@dataclass(frozen=True)
class Worker:
    """Rank ``rank`` of ``world``, the ``local``-th on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Worker:
        """From torchrun's variables (also set by accelerate and Kubernetes' training operators), else srun's.

        A batch script of Slurm carries SLURM_NTASKS without being a rank; only a step of srun sets
        SLURM_STEP_NUM_TASKS.

        Raises:
            RequestError: a variable is no number, or the rank is not below the world's size.
        """
        env = os.environ if env is None else env
        if "RANK" in env or "WORLD_SIZE" in env:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
            names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        else:
            return cls()
        rank, world, local = (_number(env, name, default) for name, default in zip(names, (0, 1, 0), strict=True))
        if not 0 <= rank < world:
            raise RequestError(f"{names[0]}: expected a rank below {names[1]} = {world}, found {rank}")
        return cls(rank, world, local)

    @property
    def first(self) -> bool:
        """Whether this process reports and writes the shared files."""
        return self.rank == 0

    def part(self, asked: str, env: Mapping[str, str] | None = None) -> tuple[int, int]:
        """(i, n): which n-th of a caching job this process does.

        Ranks divide the job among themselves. Else ``asked`` ("i/n") counts; where it is the default "0/1", the place
        in a Slurm array or a Kubernetes indexed job (which must pass its ``completions`` as JOB_COMPLETIONS).
        """
        env = os.environ if env is None else env
        if self.world > 1:
            return self.rank, self.world
        if asked == "0/1":
            if "SLURM_ARRAY_TASK_ID" in env and "SLURM_ARRAY_TASK_COUNT" in env:
                first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
                step = max(1, _number(env, "SLURM_ARRAY_TASK_STEP", 1))
                index = (_number(env, "SLURM_ARRAY_TASK_ID", 0) - first) // step
                return _placed(index, _number(env, "SLURM_ARRAY_TASK_COUNT", 1), "SLURM_ARRAY_TASK_ID")
            if "JOB_COMPLETION_INDEX" in env and "JOB_COMPLETIONS" in env:
                index = _number(env, "JOB_COMPLETION_INDEX", 0)
                return _placed(index, _number(env, "JOB_COMPLETIONS", 1), "JOB_COMPLETION_INDEX")
        index, parts = (int(text) for text in asked.split("/"))
        return index, parts

    @contextlib.contextmanager
    def process_group(self, device: torch.device, *, memory: bool = False) -> Iterator[None]:
        """Inside, ``torch.distributed`` is initialized for these ranks; a single process needs and gets no group.

        Args:
            device: what ranks exchange lies there.
            memory: also in main memory.

        The device is set first: NCCL would otherwise put a context of every rank on GPU 0.

        Raises:
            PeerFailedError: another rank failed first.
        """
        if self.world == 1 or dist.is_initialized():  # a caller's own group stays the caller's
            yield
            return
        cuda = device.type == "cuda"
        backend = ("cpu:gloo,cuda:nccl" if memory else "nccl") if cuda else "gloo"
        if cuda:
            torch.cuda.set_device(device)
        _set_rendezvous(self)
        dist.init_process_group(backend, rank=self.rank, world_size=self.world, device_id=device if cuda else None)
        store = dist.distributed_c10d._get_default_store()
        try:
            yield
            dist.barrier()  # nobody leaves while a peer may still fail in its last step
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt | SystemExit) and not self._fails_first(store, error):
                raise PeerFailedError(f"rank {self.rank}: ended, because another rank failed") from error
            raise
        finally:
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def agreed_end(self, step: int) -> int:
        """The step at which all ranks end, when they have been told to by a signal; this one has taken ``step``.

        A rank that ended at once would leave the others waiting for it in their next step. The first that asks says
        where; ranks are at most a step apart, since each step needs all of them.
        """
        if self.world == 1 or not dist.is_initialized():
            return step
        store = dist.distributed_c10d._get_default_store()
        return int(store.compare_set(END, "", str(step + AHEAD)))

    def _fails_first(self, store: Any, error: BaseException) -> bool:
        """Whether this rank's error is the job's; told to the others through the store."""
        try:
            if not isinstance(error, FeedfastError):
                # A collective breaks when a peer dies; the peer's own word may be a moment later in the store.
                with contextlib.suppress(RuntimeError):
                    store.wait([FAILED], timedelta(seconds=2))
            return int(store.add(FAILED, 1)) == 1
        except RuntimeError:  # rank 0, which keeps the store, is gone
            return isinstance(error, FeedfastError)


def ranks_here(env: Mapping[str, str] | None = None) -> int:
    """How many ranks run on this machine, as torchrun and srun say; all of them where neither does."""
    env = os.environ if env is None else env
    world = Worker.from_env(env).world
    text = env.get("LOCAL_WORLD_SIZE", "") or env.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = [int(count) for count in re.findall(r"(\d+)(?:\(x\d+\))?", text)]
    return min(max(counts, default=world), world)


def pick_device(text: str, local_rank: int = 0, key: str = "train.device") -> torch.device:
    """``auto`` = this rank's CUDA device when there is one, else the CPU; ``key`` begins the message.

    Raises:
        RequestError: not "cpu" or an available CUDA device.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text.startswith("cuda") and not torch.cuda.is_available():
        raise RequestError(f"{key}: expected an available device, found {text!r} but torch sees no CUDA GPU")
    try:
        device = torch.device(f"cuda:{local_rank}" if text == "cuda" else text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise RequestError(f"{key}: expected auto, cpu or one of {count} CUDA devices, found {text!r}")
    return device


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not text.strip().isdigit():
        raise RequestError(f"{name}: expected a whole number in the environment, found {text!r}")
    return int(text)


def _placed(index: int, parts: int, name: str) -> tuple[int, int]:
    if not 0 <= index < parts:
        raise RequestError(f"{name}: expected a place below {parts}, found {index}")
    return index, parts


def _set_rendezvous(worker: Worker) -> None:
    """Where ranks meet: torchrun says it; of srun it follows from the step's first host and the job's number.

    Raises:
        RequestError: neither is known.
    """
    env = os.environ
    nodes, job = env.get("SLURM_STEP_NODELIST"), env.get("SLURM_JOB_ID", "")
    if "MASTER_ADDR" not in env and nodes:
        env["MASTER_ADDR"] = _first_host(nodes)
    if "MASTER_PORT" not in env and job.isdigit():
        env["MASTER_PORT"] = str(PORTS[int(job) % len(PORTS)])
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise RequestError(
            f"{', '.join(missing)}: expected in the environment of {worker.world} ranks, found nothing; "
            "start them with torchrun or srun"
        )


def _first_host(nodes: str) -> str:
    """The first of Slurm's list: ``gpu[03-05,9],cpu1`` → ``gpu03``."""
    head = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    return head.group(1) + (head.group(2) or "") if head else nodes
