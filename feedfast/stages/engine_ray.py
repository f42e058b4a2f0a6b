"""An engine: items handed out to elastic members of a crew, one Ray actor each. What is done with an item is theirs.

    driver: queue ──items──► actor 0: member.work(items) ──one report per item──┐
      ▲        └────items──► actor 1: …                  ──one report per item──┤
      └── items of a member that died, and the reports ◄────────────────────────┘

Ray places processes, starts them and says when one dies. Who does what, again, and how often is decided by this loop
alone: actors are never restarted by Ray (``max_restarts=0``), because a restarted one would be sent its last call
again, and nobody could tell an item that kills its actor from one that stood behind it. An actor that dies is replaced
by a new one in its slot; the item it was at goes to the end of the queue and from then on runs alone. An item that has
killed three is given up and named, after all others are done. What is wrong with the request, or the disk, would be
wrong again: an error of ours ends the job at once. Nothing here knows what an item is.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Generic, Protocol, Self, TypeVar

from feedfast.errors import FeedfastError, RequestError
from feedfast.stages.engine_host import Answer, Host
from feedfast.stages.interrupt import SIGNALS

log = logging.getLogger(__name__)

DEATHS: Final = 3  # of actors, after which an item is given up; as many in a row while they start end the job
PORTION: Final = 8  # items at most that a member is handed at a time
POLL_S: Final = 0.5
LOOK_S: Final = 5.0  # between looks for idle resources, which Ray itself learns with a delay
PATIENCE_S: Final = 30.0  # for members to close what they have open
STORE_BYTES: Final = 80 << 20
CONNECT_S: Final = 10.0

Item = TypeVar("Item")
Report = TypeVar("Report")
Given = TypeVar("Given", contravariant=True)
Told = TypeVar("Told", covariant=True)


class Member(Protocol[Given, Told]):
    """What works in an actor. Made there, so that nothing of it travels; its errors of ours (`FeedfastError`) do."""

    def work(self, items: Sequence[Given], again: bool) -> Iterator[Told]:
        """Do these items in their order; yields a report of each as soon as it is done for good.

        With ``again`` another member may have done one of them, or half of it, and died. Fewer reports than items come
        only after `stop`. Reports travel through Ray: a few hundred bytes each.
        """
        ...

    def stop(self) -> None:
        """Called from another thread while `work` runs: end soon, at a sound point."""
        ...

    def close(self) -> None:
        """The last call, if there is time for one."""
        ...


@dataclass(frozen=True)
class Size:
    """How many members a crew has: ``least`` are asked for at any time, up to ``most`` where resources lie idle.

    A crew of ``N`` (both) works with as many as the cluster can place, and asks for those it lacks: an autoscaler sees
    that as demand. Beyond ``least`` nothing is demanded.
    """

    least: int
    most: int

    @classmethod
    def of(cls, text: str) -> Self:
        """From ``N`` or ``MIN-MAX``.

        Raises:
            RequestError: it is neither, or not 1 <= MIN <= MAX <= 10,000.
        """
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text.strip())
        least = int(found[1]) if found else 0
        most = int(found[2] or found[1]) if found else 0
        if not 1 <= least <= most <= 10_000:
            raise RequestError(f"--workers: expected N or MIN-MAX with 1 <= MIN <= MAX <= 10000, found {text!r}")
        return cls(least, most)


@dataclass(frozen=True)
class Needs:
    """What one member occupies of a cluster."""

    cpus: int
    gpus: int

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU and " if self.gpus else ""
        return f"{gpus}{self.cpus} CPU{'' if self.cpus == 1 else 's'}"


@dataclass
class _Seat(Generic[Item]):
    """A member as the driver sees it."""

    slot: int
    actor: Any
    call: Any  # under way: a reference, or a generator of references; None = idle
    ready: bool = False
    node: str = ""
    items: deque[Item] = field(default_factory=deque)  # of the call, without those reported


class Crew(Generic[Item, Report]):
    """The members, and the queue of what they do. A context manager: its end is theirs.

    Attributes:
        lost: items that were given up → why.
        deaths: how many members have died.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[int, int], Member[Item, Report]],
        size: Size,
        needs: Needs,
        *,
        together: Callable[[Item, Item], bool],
        ended: Callable[[], bool],
    ) -> None:
        """Ask for nothing yet.

        Args:
            ray: of `session`.
            make: called in the actor's process with the number of the slot, below ``size.most``, and how many members
                have had it before; pickled, so it is a function of an importable module, or a partial of one.
            size: how many members.
            needs: what each occupies.
            together: whether an item may be handed out with the one before it.
            ended: asked in every turn; once it says yes, members stop and nothing more is handed out.
        """
        self._ray, self._make, self._size, self._needs = ray, make, size, needs
        self._together, self._ended = together, ended
        self._actors = ray.remote(Host).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0, max_concurrency=2
        )
        self._seats: dict[int, _Seat[Item]] = {}
        self._lives = [0] * size.most
        self._queue: deque[Item] | None = None  # None = not known yet
        self._killed: dict[Item, int] = {}  # item → members that died of it
        self._returned: set[Item] = set()  # from members that died
        self._failed_starts = 0
        self._looked = self._told = self._seen = self._next_start = time.monotonic()
        self._said: set[str] = set()
        self._started = self._stopping = False
        self.lost: dict[Item, str] = {}
        self.deaths = 0

    @property
    def alive(self) -> int:
        """Members that are ready or at work."""
        return sum(seat.ready for seat in self._seats.values())

    # ---- what is asked of them

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a method of a member returns; of whichever is ready first, and of another where that one dies.

        Raises:
            FeedfastError: the member's.
        """
        while True:
            seat = next((seat for seat in self._seats.values() if seat.ready and seat.call is None), None)
            if seat is None:
                for _ in self._turn():
                    raise AssertionError("a report of nothing that was handed out")
                continue
            try:
                return self._taken(self._ray.get(seat.actor.call.remote(name, arguments)), loud=True)
            except self._ray.exceptions.RayError as error:
                seat.ready = False  # nothing was achieved since it started
                self._lose(seat, error)

    def run(self, items: Iterable[Item]) -> Iterator[Report]:
        """Hand out items until each is reported or lost, or ``ended`` says yes; yields the reports as they come.

        Raises:
            FeedfastError: a member's, whichever was first.
        """
        self._queue = deque(items)
        while True:
            if self._ended() and not self._stopping:
                self._stopping = True
                self._queue.clear()
                for seat in self._seats.values():
                    if seat.items:
                        seat.actor.stop.remote()
            if not self._queue and not any(seat.items for seat in self._seats.values()):
                return
            yield from self._turn()

    # ---- a turn

    def _turn(self) -> Iterator[Report]:
        """Recruit, hand out, and wait a moment for whoever speaks first."""
        self._recruit()
        self._hand_out()
        calls = {seat.call: seat for seat in self._seats.values() if seat.call is not None}
        if not calls:
            time.sleep(POLL_S)
            return
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=POLL_S)
        for call in ready:
            yield from self._heard(calls[call])
        self._tell_waiting()

    def _recruit(self) -> None:
        """Ask for the members that are lacking, and for more where resources lie idle; never more than can be busy."""
        wanted, now = self._size.least, time.monotonic()
        if self._stopping or now < self._next_start:
            return
        if len(self._seats) >= wanted and now - self._looked > LOOK_S:
            self._looked = now
            wanted = min(self._size.most, len(self._seats) + self._room())
        if self._queue is not None:
            busy = sum(bool(seat.items) for seat in self._seats.values())
            wanted = min(wanted, max(1, len(self._queue) + busy))
        free = (slot for slot in range(self._size.most) if slot not in self._seats)
        for slot in list(itertools.islice(free, max(0, wanted - len(self._seats)))):
            actor = self._actors.remote(self._make, slot, self._lives[slot])
            self._lives[slot] += 1
            self._seats[slot] = _Seat(slot, actor, actor.begin.remote())

    def _room(self) -> int:
        """Members that would fit in what lies idle now."""
        free = self._ray.available_resources()
        asked = {"CPU": self._needs.cpus, "GPU": self._needs.gpus}
        return min((int(free.get(name, 0) // count) for name, count in asked.items() if count), default=0)

    def _hand_out(self) -> None:
        for seat in self._seats.values():
            if self._queue and seat.ready and seat.call is None:
                portion, again = self._portion()
                seat.items = deque(portion)
                seat.call = seat.actor.work.remote(portion, again)

    def _portion(self) -> tuple[list[Item], bool]:
        """The next items for one member, and whether one of them has been handed out before.

        Several, since a member starts something for each portion (a pipeline that must fill); fewer toward the end, so
        that all end together; one alone that a member died of, so that the next death is certainly its own.
        """
        assert self._queue
        portion = [self._queue.popleft()]
        if portion[0] in self._killed:
            return portion, True
        most = min(PORTION, 1 + len(self._queue) // (2 * max(self._size.least, self.alive)))
        while (
            self._queue
            and len(portion) < most
            and self._queue[0] not in self._killed
            and self._together(portion[-1], self._queue[0])
        ):
            portion.append(self._queue.popleft())
        return portion, not self._returned.isdisjoint(portion)

    def _heard(self, seat: _Seat[Item]) -> Iterator[Report]:
        """Take what a member says: that it is ready, that an item is done, that the call ended, or that it died."""
        try:
            if not seat.ready:
                seat.node, process = self._taken(self._ray.get(seat.call), loud=not self._started)
                seat.call, seat.ready, self._failed_starts, self._started = None, True, 0, True
                log.debug("worker %d is ready: process %d on node %s", seat.slot, process, seat.node)
                return
            answer = self._ray.get(next(seat.call))
        except StopIteration:
            seat.call = None
            if seat.items and not self._stopping:
                raise AssertionError(f"a member ended without a report of {seat.items[0]}") from None
            seat.items.clear()
        except self._ray.exceptions.RayError as error:
            self._lose(seat, error)
        else:
            report = self._taken(answer)
            seat.items.popleft()
            yield report

    def _taken(self, answer: Answer, *, loud: bool = False) -> Any:
        """What an answer holds. What its member logged is logged here: all of it, or warnings, each of them once."""
        for name, level, text in answer.said:
            if (level >= logging.WARNING and text not in self._said) or (level < logging.WARNING and loud):
                logging.getLogger(name).log(level, "%s", text)
                self._said.add(text)  # all members see the same data and teachers
        if answer.error is not None:
            raise answer.error
        return answer.value

    # ---- members that die

    def _lose(self, seat: _Seat[Item], error: Exception) -> None:
        """A member is gone; its items go back to the queue, or, the third time, are given up."""
        self._seats.pop(seat.slot, None)
        with contextlib.suppress(Exception):  # whatever is left of it
            self._ray.kill(seat.actor)
        if self._stopping:
            return
        self.deaths += 1
        reason = _reason(error)
        with_node = self._is_gone(seat.node)
        what = f" at {seat.items[0]}" if seat.items else ""
        log.warning("worker %d died%s%s: %s", seat.slot, what, ", with its node" if with_node else "", reason)
        log.debug("worker %d: %s", seat.slot, error)
        if not seat.ready and not with_node:
            self._failed_starts += 1
            self._next_start = time.monotonic() + 2 ** (self._failed_starts - 1)
            if self._failed_starts >= DEATHS and not self.alive:
                raise FeedfastError(f"Ray: {DEATHS} workers in a row died as they started: {reason}")
        if not seat.items:
            return
        assert self._queue is not None
        self._returned.update(seat.items)
        first = seat.items.popleft()
        self._queue.extendleft(reversed(seat.items))
        # A node that leaves says nothing about the item; it runs alone from now on all the same.
        self._killed[first] = self._killed.get(first, 0) + (not with_node)
        if self._killed[first] < DEATHS:
            self._queue.append(first)
        else:
            self.lost[first] = reason

    def _is_gone(self, node: str) -> bool:
        try:
            return any(entry["NodeID"] == node and not entry["Alive"] for entry in self._ray.nodes())
        except self._ray.exceptions.RayError:
            return False

    def _tell_waiting(self) -> None:
        """Say, now and then, that nobody is there yet, and what that needs."""
        now = time.monotonic()
        if self.alive:
            self._seen = now
        elif now - self._seen > 10 and now - self._told > 60:
            self._told = now
            have = {name: self._ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU")}
            log.info(
                "waiting for a worker: each needs %s, the cluster has %g CPUs and %g GPUs in all",
                *(self._needs, have["CPU"], have["GPU"]),
            )

    # ---- the end

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            closing = [seat.actor.close.remote() for seat in self._seats.values() if seat.ready]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=PATIENCE_S)
        for seat in self._seats.values():
            with contextlib.suppress(Exception):
                self._ray.kill(seat.actor)
        self._seats.clear()


def _reason(error: Exception) -> str:
    """One line on what ended a member: of an exception in it what it says, else what Ray found."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
    text = str(error)
    found = re.search(r"[Ww]orker exit type: (\w+)", text)
    first = text.strip().partition("\n")[0]
    return f"{first} ({found[1]})" if found else first


@contextlib.contextmanager
def session() -> Iterator[Any]:
    """The module ``ray``, connected as `ray.init` does: to RAY_ADDRESS, a cluster on this machine, or a new local one.

    A caller's own connection is used and stays; one that is made here ends here. What Ray prints meanwhile is logged
    for debugging: stdout is the command's.

    Raises:
        RequestError: the package is missing, or no cluster answers.
        FeedfastError: the cluster is lost.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise RequestError(
            f"RAY_ADDRESS: expected a cluster that this machine is a node of, found {address!r}; "
            "`ray job submit -- feedfast cache ...` runs the command there"
        )
    _refuse_silent(address)
    with _handlers_kept(), _loopback(address):  # ray takes SIGTERM for itself
        try:
            import ray
        except ImportError:
            raise RequestError(
                "--engine ray: expected the package ray, found none; pip install 'feedfast[ray]'"
            ) from None
        mine = not ray.is_initialized()
        if mine:
            _connect(ray, address)
    try:
        with contextlib.redirect_stdout(_Logged()):
            yield ray
    except ray.exceptions.RayError as error:
        raise FeedfastError(f"Ray: {_reason(error)}") from error
    finally:
        if mine:
            with _handlers_kept():
                ray.shutdown()


def _refuse_silent(address: str) -> None:
    """Raise if nobody listens at ``host:port``: Ray itself would try for minutes."""
    found = re.fullmatch(r"([^:\s]+|\[[^\]]+\]):([0-9]{1,5})", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise RequestError(f"RAY_ADDRESS={address}: expected a Ray cluster, found: {error}") from None


def _connect(ray: Any, address: str) -> None:
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        try:
            # A store of the least size there is: what travels is small.
            ray.init(include_dashboard=False, object_store_memory=STORE_BYTES, **options)
        except ValueError:  # there is a cluster, whose store has its size
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        where = f"RAY_ADDRESS={address}" if address else "Ray"
        first = str(error).strip().partition("\n")[0]
        raise RequestError(f"{where}: expected a Ray cluster, found none that answers: {first}") from error


@contextlib.contextmanager
def _loopback(address: str) -> Iterator[None]:
    """A cluster that is started inside listens on this machine alone, and reports to nobody.

    Ray's own default is every interface, without a password; whoever reaches it may run anything. The variable is
    named after the systems where Ray does this by itself. It is read when ray is imported, and by the processes that it
    starts; a cluster that runs already is found all the same.
    """
    wanted = {} if address else {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    added = {name: text for name, text in (wanted | {"RAY_USAGE_STATS_ENABLED": "0"}).items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


class _Logged(io.TextIOBase):
    """In the place of stdout: each line goes to the log."""

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                log.debug("ray: %s", line.strip())
        return len(text)


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Signals keep the handlers they have, whatever is done inside."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError, TypeError):  # not the main thread; a handler not set from Python
                if signal.getsignal(number) is not handler:
                    signal.signal(number, handler)
