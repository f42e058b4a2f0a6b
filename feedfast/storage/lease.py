"""Ownership where there are no locks: an object that says who, made where there is none, and renewed by its owner.

A lease is dead when nobody has renewed it while somebody watched for `LEASE_S`: its owner was killed, or cut off. It is
then taken over in place, on the condition that it is still the one that was watched. No two clocks are compared.

A lease keeps others from working in vain. What must never happen does not rest on it: a line of a log is created under
its number, where there is none, so that an owner who was thought dead cannot write over what came after him.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
from types import TracebackType
from typing import Final, Self

from feedfast.errors import FeedfastError
from feedfast.storage.objects import ChangedError, Found, Objects, Version

log = logging.getLogger(__name__)

LEASE_S: Final = 30.0
_BEATS: Final = 4  # renewals within that time: three may be lost
_MOST_BYTES: Final = 4096

_held: set[str] = set()  # what this process holds: nobody need watch that
_guard: Final = threading.Lock()


class Lease:
    """A lease that is held, and renewed by a thread, until it is closed. See `feedfast.storage.store.Lock`."""

    def __init__(self, objects: Objects, key: str, token: str, tag: Version, lease_s: float) -> None:
        """Begin to renew what `take` has made."""
        self._objects, self.key, self._token, self._tag = objects, key, token, tag
        self._lease_s, self._beats = lease_s, 0
        self.lost = False
        self._ended = threading.Event()
        with _guard:
            _held.add(objects.where(key))
        self._thread = threading.Thread(target=self._keep, name="feedfast-lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._ended.wait(self._lease_s / _BEATS):
            self._beats += 1
            try:
                self._tag = self._objects.put(self.key, _content(self._token, self._beats), tag=self._tag)
            except ChangedError:
                if not self._still_ours():
                    self.lost = True
                    return
            except (OSError, FeedfastError) as error:  # not answered: the next one may be
                log.debug("%s: not renewed: %s", self._objects.where(self.key), error)

    def _still_ours(self) -> bool:
        """Whether it holds our name; a renewal whose answer was lost has changed its tag."""
        try:
            found = self._objects.get(self.key, most=_MOST_BYTES)
        except FileNotFoundError:
            return False
        except (OSError, FeedfastError):
            return True  # not known: the next renewal tells
        if _token_of(found) != self._token:
            return False
        self._tag = found.tag
        return True

    def require(self) -> None:
        """Raise if somebody has taken it over.

        Raises:
            FeedfastError: another process did.
        """
        if self.lost:
            raise FeedfastError(
                f"{self._objects.where(self.key)}: another process has taken this over, because it was not renewed for "
                f"{self._lease_s:.0f} s: this one was held up, or cut off from the store. Run the same command again"
            )

    def close(self) -> None:
        """Give it back.

        Raises:
            FeedfastError: it was taken over meanwhile.
        """
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        with _guard:
            _held.discard(self._objects.where(self.key))
        self.require()
        with contextlib.suppress(OSError, FeedfastError):  # what stays is dead after a while
            if self._still_ours():
                self._objects.delete([self.key])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        with contextlib.suppress(FeedfastError):
            self.close()


def take(
    objects: Objects, key: str, *, lease_s: float = LEASE_S, patience_s: float = 0.0, until_sure: bool = False
) -> Lease | None:
    """Take a lease; None while another process has it.

    Args:
        objects: where.
        key: of the lease.
        lease_s: a lease that is not renewed for so long while it is watched is taken over.
        patience_s: how long it is waited for.
        until_sure: wait, whatever the patience, until it is clear whether the owner lives.

    Raises:
        FeedfastError: the store does not answer, or refuses.
    """
    token, began = uuid.uuid4().hex, time.monotonic()
    watched: Found | None = None
    since = began
    while True:
        with _guard:
            own = objects.where(key) in _held
        try:
            if not own:
                return Lease(objects, key, token, objects.put(key, _content(token, 0), create=True), lease_s)
        except FileExistsError:
            pass
        now, found = time.monotonic(), _look(objects, key)
        if found is None and not own:
            time.sleep(0.02)
            continue
        if found is not None and _token_of(found) == token:  # made by a request whose answer was lost
            return Lease(objects, key, token, found.tag, lease_s)
        alive = own
        if not own and found is not None:
            if watched is None or bytes(watched.data) != bytes(found.data):
                alive = watched is not None
                watched, since = found, now
            elif now - since > lease_s:
                try:
                    log.warning(
                        "%s: its owner gave no sign of life for %.0f s: taken over", objects.where(key), lease_s
                    )
                    return Lease(objects, key, token, objects.put(key, _content(token, 0), tag=found.tag), lease_s)
                except ChangedError:
                    watched = None
        if (alive or not until_sure) and now - began >= patience_s:
            return None
        time.sleep(min(0.5, lease_s / _BEATS / 2))


def _look(objects: Objects, key: str) -> Found | None:
    try:
        return objects.get(key, most=_MOST_BYTES)
    except FileNotFoundError:
        return None


def _content(token: str, beats: int) -> bytes:
    return json.dumps({"owner": token, "renewed": beats}).encode()


def _token_of(found: Found) -> str:
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(bytes(found.data)).get("owner"))
    return ""


def is_held(objects: Objects, key: str) -> bool:
    """Whether this process holds a lease."""
    with _guard:
        return objects.where(key) in _held
