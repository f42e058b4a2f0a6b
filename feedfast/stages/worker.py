"""This process among its peers: ranks of torchrun or srun, parts of job arrays, and the process group.

Ranks talk to each other (one training run); parts do not (each writes its own shards of a cache, or runs by itself).
torchrun and srun start ranks; Slurm arrays and Kubernetes indexed jobs start parts. Ranks that cache are parts, too:
they divide among themselves what their array task was given, and need no group.

A group lives inside ``with worker.process_group(device)``: it is left on every way out, and when one rank fails, the
first failure is the one that is reported (`feedfast.stages.peers`). The others end with `PeerFailedError`, which the
command line does not print: one job, one message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from feedfast.errors import FeedfastError, PeerFailedError, RequestError
from feedfast.stages.peers import Peers, is_broken

log = logging.getLogger(__name__)

END = "feedfast/end"
AHEAD = 3  # steps: all ranks get a launcher's signal within that time
PORTS = range(20000, 40000)  # below the kernel's ephemeral range; a job's number picks one
AUTO = "auto"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
INDEXED = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


@dataclass(frozen=True)
class Share:
    """Part ``index`` of ``parts`` of a caching job, and ``said``: who named it, "" where nobody did."""

    index: int
    parts: int
    said: str

    @property
    def part(self) -> tuple[int, int]:
        """(i, n), as writers take it."""
        return self.index, self.parts


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
        names = _rank_names(env)
        if names is None:
            return cls()
        rank, world, local = (_number(env, name, default) for name, default in zip(names, (0, 1, 0), strict=True))
        if not 0 <= rank < world:
            raise RequestError(f"{names[0]}: expected a rank below {names[1]} = {world}, found {rank}")
        return cls(rank, world, local)

    @property
    def first(self) -> bool:
        """Whether this process reports and writes the shared files."""
        return self.rank == 0

    def share(self, asked: str, env: Mapping[str, str] | None = None) -> Share:
        """Which part of a caching job this process does, and who said so.

        What is ``asked`` ("i/n") counts. Where it is "auto", the place in a Slurm array, else in a Kubernetes indexed
        job (which must pass its ``completions`` as JOB_COMPLETIONS), else all of it. Ranks divide that among
        themselves.

        Raises:
            RequestError: a variable is no number, the place is outside the array, or JOB_COMPLETIONS is missing.
        """
        env = os.environ if env is None else env
        given = _given(asked, env, alone=self.world == 1)
        if self.world == 1:
            return given
        names = _rank_names(env) or TORCHRUN
        ranks = f"{names[0]}={self.rank}, {names[1]}={self.world}"
        said = f"{given.said}, {ranks}" if given.said else ranks
        return Share(given.index * self.world + self.rank, given.parts * self.world, said)

    @contextlib.contextmanager
    def process_group(
        self, device: torch.device | Callable[[], torch.device], *, memory: bool = False
    ) -> Iterator[None]:
        """Inside, ``torch.distributed`` is initialized for these ranks; a single process needs and gets no group.

        Args:
            device: what ranks exchange lies there; or what picks it, which may fail on one rank alone.
            memory: also in main memory.

        The device is set first: NCCL would otherwise put a context of every rank on GPU 0.

        Raises:
            PeerFailedError: another rank failed first.
            FeedfastError: the ranks cannot meet, or one is gone without a word.
        """
        if self.world == 1 or dist.is_initialized():  # a caller's own group stays the caller's
            yield
            return
        _set_rendezvous(self)
        store = _met(self)
        peers = Peers(self.rank, self.world, store)
        failed = False
        try:
            self._make_group(device if isinstance(device, torch.device) else device(), store, memory=memory)
            yield
            dist.barrier()  # nobody leaves while a peer may still fail in its last step
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            failed = True
            if not peers.fails_first(error):
                raise PeerFailedError(f"rank {self.rank}: ended, because another rank failed") from error
            if is_broken(error):
                found = str(error).partition("\n")[0][:200]
                raise FeedfastError(
                    f"rank {self.rank}: expected all {self.world} ranks to answer, found one gone without a word "
                    f"(killed, or its machine is lost: the launcher knows), {found}; the same command continues"
                ) from error
            raise
        finally:
            peers.leave(failed=failed)
            with contextlib.suppress(RuntimeError, ValueError, AssertionError):  # nothing to destroy: it was not made
                dist.destroy_process_group()

    def _make_group(self, device: torch.device, store: Any, *, memory: bool) -> None:
        cuda = device.type == "cuda"
        backend = ("cpu:gloo,cuda:nccl" if memory else "nccl") if cuda else "gloo"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=store,
            rank=self.rank,
            world_size=self.world,
            device_id=device if cuda else None,
        )

    def agreed_end(self, step: int) -> int:
        """The step at which all ranks end, when they have been told to by a signal; this one has taken ``step``.

        A rank that ended at once would leave the others waiting for it in their next step. The first that asks says
        where; ranks are at most a step apart, since each step needs all of them.
        """
        if self.world == 1 or not dist.is_initialized():
            return step
        store = dist.distributed_c10d._get_default_store()
        return int(store.compare_set(END, "", str(step + AHEAD)))


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


def _rank_names(env: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The variables that make this process a rank; None where it is none."""
    if "RANK" in env or "WORLD_SIZE" in env:
        return TORCHRUN
    return SRUN if SRUN[0] in env and SRUN[1] in env else None


def _given(asked: str, env: Mapping[str, str], *, alone: bool) -> Share:
    """The part before ranks divide it; see `Worker.share`. ``alone``: there are no ranks."""
    if asked != AUTO:
        index, parts = (int(text) for text in asked.split("/"))
        passed_over = "".join(f", not by {name}={env[name]}" for name in (ARRAY[0], INDEXED[0]) if name in env)
        return Share(index, parts, f"--part or cache.part{passed_over}")
    if all(name in env for name in ARRAY):
        first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(env, "SLURM_ARRAY_TASK_STEP", 1))
        return _placed(env, ARRAY, (_number(env, ARRAY[0], 0) - first) // step)
    if all(name in env for name in INDEXED):
        return _placed(env, INDEXED, _number(env, INDEXED[0], 0))
    if alone and INDEXED[0] in env:  # operators that start ranks set the index for purposes of their own
        raise RequestError(
            f"{INDEXED[1]}: expected in the environment with {INDEXED[0]}={env[INDEXED[0]]}, found nothing: every pod "
            "would write the whole cache; pass it the job's completions, or give --part"
        )
    return Share(0, 1, "")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, str(default))
    if not text.strip().isdigit():
        raise RequestError(f"{name}: expected a whole number in the environment, found {text!r}")
    return int(text)


def _placed(env: Mapping[str, str], names: tuple[str, str], index: int) -> Share:
    parts = _number(env, names[1], 1)
    if not 0 <= index < parts:
        raise RequestError(
            f"{names[0]}: expected a place below {parts}, found {index}; where the indexes of an array have gaps, say "
            f"--part ${names[0]}/N"
        )
    return Share(index, parts, f"{names[0]}={env[names[0]]}, {names[1]}={parts}")


def _met(worker: Worker) -> Any:
    """torch's store of the ranks, once all of them are there.

    Raises:
        FeedfastError: they cannot meet.
    """
    try:
        store, _, _ = next(iter(rendezvous("env://", worker.rank, worker.world)))
    except (RuntimeError, OSError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        found = str(error).partition("\n")[0]
        raise FeedfastError(
            f"MASTER_ADDR, MASTER_PORT: expected the {worker.world} ranks to meet at {where}, found: {found}"
        ) from error
    return store


def _set_rendezvous(worker: Worker) -> None:
    """Where ranks meet: torchrun says it; of srun it follows from the step's first host and the job's number.

    Raises:
        RequestError: neither is known, or the port is no number.
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
    _number(env, "MASTER_PORT", 0)


def _first_host(nodes: str) -> str:
    """The first of Slurm's list: ``gpu[03-05,9],cpu1`` → ``gpu03``."""
    head = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    return head.group(1) + (head.group(2) or "") if head else nodes
