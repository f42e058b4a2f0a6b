"""Requests to an object store through `obstore`: tried again where that can help, and told in one sentence where not.

A request that was not answered, or answered with "later" (429, 500 to 504, 409), is made again after a pause that
doubles, with jitter, a bounded number of times. What cannot succeed, such as a missing permission or bucket, is a
`RequestError` at once. A request that was answered too late may have been carried out: whoever creates an object and
finds it there compares its content.

Credentials, endpoint and region come from the environment, by the names each provider uses. No message quotes what the
store or `obstore` says: there may be credentials in it.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import itertools
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar

from feedfast.errors import FeedfastError, RequestError

log = logging.getLogger(__name__)

T = TypeVar("T")

_PLACE: Final = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]*)(?P<prefix>(/[^/]+)*)/?")
_PREFIX: Final = re.compile(r"[A-Za-z0-9 !_.'()=+,@:/-]*")  # what no client or server spells in two ways
CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
# where the client asks for the credentials of a machine's own role: what it does when it has found no others
_ROLES: Final = ("/latest/api/token", "/computeMetadata/", "/metadata/identity/")
_LATER: Final = {408, 409, 429, 500, 502, 503, 504}  # the only answers to which the same request may get another


@dataclass(frozen=True)
class Patience:
    """How often and how long a request is tried.

    Attributes:
        tries: of each request, the first included.
        first_s: the pause after the first, at most; each further one is twice as long.
        longest_s: but no longer than this.
        connect_s: for a connection.
        answer_s: for the answer to begin, and between two pieces of it.
    """

    tries: int = 8
    first_s: float = 0.1
    longest_s: float = 8.0
    connect_s: float = 5.0
    answer_s: float = 60.0

    def pause_s(self, tried: int) -> float:
        """The pause after so many tries: half of it is fixed, half random, so that many clients come back apart."""
        return min(self.longest_s, self.first_s * 2.0 ** (tried - 1)) * random.uniform(0.5, 1.0)


PATIENCE: Final = Patience()
_WHOLE: Final = 1 << 40  # more bytes than any object has


@dataclass(frozen=True)
class Version:
    """What tells one content of an object from another; which of the two counts is the store's business."""

    e_tag: str | None
    version: str | None = None

    @classmethod
    def of(cls, answer: Any) -> Version:
        """As ``obstore`` says it, of a put or of an object."""
        return cls(answer.get("e_tag"), answer.get("version"))

    @property
    def mode(self) -> dict[str, str]:
        """For a put in place of this content only."""
        return {name: value for name, value in vars(self).items() if value is not None}


class ChangedError(Exception):
    """An object is not the one that was expected to be there."""


@dataclass(frozen=True)
class Found:
    """What a request for an object found: bytes of it, its size in all, and its tag, which changes with its content."""

    data: memoryview
    size: int
    tag: Version


class Objects:
    """The objects below one prefix of one bucket. Safe to use from several threads."""

    def __init__(self, place: str, *, client: Any = None, patience: Patience | None = None) -> None:
        """Read the place's URL; nothing is asked of the store yet.

        Args:
            place: ``s3://BUCKET/PREFIX``, ``gs://BUCKET/PREFIX`` or ``az://CONTAINER/PREFIX``.
            client: an ``obstore`` store of the bucket, in place of the one that the URL and the environment name.
            patience: with requests.

        Raises:
            RequestError: no such URL, or the package is missing.
        """
        parts = _PLACE.fullmatch(place)
        scheme = place.partition("://")[0]
        known = client is not None or scheme in CREDENTIALS
        odd = parts is None or not _PREFIX.fullmatch(parts["prefix"]) or {".", ".."} & set(parts["prefix"].split("/"))
        if parts is None or odd or not known:
            # the text itself is not repeated: people put keys into URLs
            raise RequestError(
                f"cache: expected a folder, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX without "
                f"credentials and options in it, found another URL of {scheme[:20]!r}"
            )
        self.scheme, self.bucket, self.prefix = scheme, parts["bucket"], parts["prefix"].strip("/")
        self.place = f"{scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        self.patience = PATIENCE if patience is None else patience
        self._root = f"{self.prefix}/" if self.prefix else ""
        self._package = _package(self.place)
        self._client = client or _client(scheme, self.bucket, self.patience, _settings())

    def where(self, key: str = "") -> str:
        """The URL of an object, or of the whole place."""
        return f"{self.place}/{key}" if key else self.place

    # ---- reading

    def get(
        self, key: str, start: int = 0, stop: int | None = None, *, tag: Version | None = None, most: int | None = None
    ) -> Found:
        """Bytes of an object: all of it, [start, stop), or with a negative ``start`` the last ones.

        Args:
            key: its key.
            start: the first byte.
            stop: after the last one; within the object.
            tag: of the object as it was.
            most: raise if the object holds more bytes than this, before they are read.

        Raises:
            FileNotFoundError: there is none.
            ChangedError: another one is there.
            OSError: longer than ``most``.
            FeedfastError: the store does not answer, or refuses.
        """
        # The whole is asked for as the last many bytes: unlike an answer without a range, one of part of an object says
        # how long the object is. Azure knows no ranges from the end.
        suffix = -start if start < 0 else (_WHOLE if stop is None and self.scheme != "az" else 0)
        options: dict[str, Any] = {} if tag is None else {"if_match": tag.e_tag}
        if suffix or stop is not None:
            options["range"] = {"suffix": suffix} if suffix else (start, stop)

        def ask() -> Found:
            result = self._package.get(self._client, self._root + key, options=options)
            size, found_tag = int(result.meta["size"]), Version.of(result.meta)
            if most is not None and size > most:
                raise OSError(errno.EFBIG, f"{size} bytes long, expected at most {most} bytes")
            expected = min(suffix or size, size) if stop is None else stop - start
            data = memoryview(result.bytes()).cast("B")
            if len(data) != expected:
                raise _ShortError(f"{len(data)} bytes of {expected}")
            return Found(data, size, found_tag)

        try:
            return self._persist("read", key, ask)
        except OSError as error:
            if error.errno != errno.EINVAL or not suffix:
                raise
            return self.head(key)  # it is empty

    def head(self, key: str) -> Found:
        """Size and tag of an object, without its bytes; raises as `get`."""

        def ask() -> Found:
            meta = self._package.head(self._client, self._root + key)
            return Found(memoryview(b""), int(meta["size"]), Version.of(meta))

        return self._persist("looked up", key, ask)

    def below(self, folder: str) -> dict[str, tuple[int, Version]]:
        """Key → bytes and tag of every object below a folder."""

        def ask() -> dict[str, tuple[int, Version]]:
            chunks = self._package.list(self._client, self._root + folder, chunk_size=1000)
            return {
                meta["path"].removeprefix(self._root): (int(meta["size"]), Version.of(meta))
                for chunk in chunks
                for meta in chunk
            }

        return self._listed(folder, ask)

    def names(self, folder: str = "") -> tuple[list[str], list[str]]:
        """Names of objects and of folders directly in a folder."""
        path = (self._root + folder).rstrip("/")

        def ask() -> tuple[list[str], list[str]]:
            found = self._package.list_with_delimiter(self._client, path or None)
            objects = [meta["path"].rpartition("/")[2] for meta in found["objects"]]
            return objects, [prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]

        return self._listed(folder, ask)

    def _listed(self, folder: str, ask: Callable[[], T]) -> T:
        try:
            return self._persist("listed", folder, ask)
        except FileNotFoundError:  # a prefix is always there: what is not there is what holds it
            raise self.no_bucket() from None

    def no_bucket(self) -> RequestError:
        """The sentence for a bucket that is not there."""
        return RequestError(
            f"{self.place}: expected a bucket (container) named {self.bucket!r}, found none; "
            f"{CREDENTIALS.get(self.scheme, 'the environment')} say where it is looked for"
        )

    # ---- writing

    def put(self, key: str, data: bytes, *, create: bool = False, tag: Version | None = None) -> Version:
        """Write an object whole; durable on return. Returns its tag.

        Args:
            key: its key.
            data: its content.
            create: only where there is none.
            tag: only in place of the one that has this tag.

        Raises:
            FileExistsError: with ``create``, there is one. It may be this very one, if an answer was lost.
            ChangedError: with ``tag``, another one is there, or none any more. Likewise.
            FeedfastError: the store does not answer, or refuses.
        """
        mode: Any = "create" if create else ("overwrite" if tag is None else tag.mode)

        def ask() -> Version:
            found = self._package.put(self._client, self._root + key, data, mode=mode, use_multipart=False)
            return Version.of(found)

        try:
            return self._persist("written", key, ask)
        except (FileNotFoundError, FileExistsError) as error:  # the latter also of two that write at the same moment
            if tag is not None:
                raise ChangedError(key) from None
            if isinstance(error, FileExistsError):
                raise
            raise self.no_bucket() from None

    def create(self, key: str, data: bytes) -> Version | None:
        """Create an object where there is none; None if these bytes are there now, else which others are."""
        for tried in range(1, self.patience.tries + 1):
            with contextlib.suppress(FileExistsError):  # of another, or our own, if an answer was lost
                self.put(key, data, create=True)
                return None
            try:
                found = self.head(key)
                if found.size == len(data):
                    found = self.get(key)
                    if found.data == data:
                        return None
            except FileNotFoundError:  # a conflict with what is just being removed
                time.sleep(self.patience.pause_s(tried))
            else:
                return found.tag
        raise FeedfastError(f"{self.where(key)}: cannot be created: it conflicts with what is no longer there")

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are gone already are none of its business."""
        paths = [self._root + key for key in keys]
        if not paths:
            return
        try:  # one request for many, where the store has such a thing
            self._persist("removed", paths[0].removeprefix(self._root), lambda: self._remove(paths))
        except FileNotFoundError:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._persist("removed", path.removeprefix(self._root), partial(self._remove, [path]))

    def _remove(self, paths: list[str]) -> None:
        self._package.delete(self._client, paths)

    # ---- trying again

    def _persist(self, verb: str, key: str, ask: Callable[[], T]) -> T:
        began = time.monotonic()
        for tried in itertools.count(1):
            try:
                return ask()
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise self.no_bucket() from None
                raise FileNotFoundError(errno.ENOENT, "no such object", self.where(key)) from None
            except (self._package.exceptions.BaseError, _ShortError) as error:
                cause = self._refuse_hopeless(error, verb, key)
            if tried >= self.patience.tries:
                break
            pause = self.patience.pause_s(tried)
            log.debug("%s: %s; try %d of %d in %.2f s", self.where(key), cause, tried + 1, self.patience.tries, pause)
            time.sleep(pause)
        raise FeedfastError(
            f"{self.where(key)}: cannot be {verb}: {cause}, after {tried} tries in "
            f"{time.monotonic() - began:.0f} s. What is committed stays valid: run the same command again"
        )

    def _refuse_hopeless(self, error: Exception, verb: str, key: str) -> str:
        """What went wrong, in a few words of our own; raises if the same request would go wrong again."""
        kinds, name, where = self._package.exceptions, type(error).__name__, self.where(key)
        if isinstance(error, kinds.AlreadyExistsError):
            raise FileExistsError(errno.EEXIST, "another object is there", where) from None
        if isinstance(error, kinds.PreconditionError):
            raise ChangedError(key) from None
        text = str(error)
        status = _status_of(text)
        code = re.search(r"<Code>(\w{1,60})</Code>", text)
        cause = f"HTTP {status}" if status else _words_for(text, name)
        cause += f" {code[1]}" if code else ""
        credentials = CREDENTIALS.get(self.scheme, "the environment")
        if isinstance(error, kinds.PermissionDeniedError | kinds.UnauthenticatedError) or status in (401, 403):
            raise RequestError(
                f"{where}: may not be {verb} ({cause}): expected credentials that allow it, from {credentials}"
            ) from None
        if any(service in text for service in _ROLES) and not status:
            raise RequestError(
                f"{where}: cannot be {verb}: expected credentials in {credentials}, found none, and this machine has "
                "no role that gives some"
            ) from None
        if status == 404:  # of an object that is not there the client says so by another name
            raise self.no_bucket() from None
        if status == 416 or "source: NotPartial" in text:  # the latter of an empty object
            raise OSError(errno.EINVAL, "it has no such bytes", where) from None
        if "BareRedirect" in text:
            raise RequestError(
                f"{where}: the store answers that it is somewhere else: expected its AWS_REGION"
            ) from None
        if "source: BadScheme" in text:
            raise RequestError(f"{where}: its endpoint is http://, which AWS_ALLOW_HTTP=true allows") from None
        if (status and status not in _LATER) or not isinstance(error, kinds.GenericError | _ShortError):
            raise RequestError(f"{where}: cannot be {verb}: the store refuses the request ({cause})") from None
        return cause


class _ShortError(Exception):
    """Fewer bytes came than were announced."""


def _status_of(text: str) -> int | None:
    found = re.search(r"status(?: code)?:? (\d{3})\b", text)
    return int(found[1]) if found else None


def _words_for(text: str, kind: str) -> str:
    """A failure without an answer. The texts are the HTTP client's, and no interface: who is not known goes by kind."""
    words = {
        "kind: Timeout": "no answer in time",
        "kind: Connect,": "no connection to its endpoint",
        "ConnectionReset": "the connection was reset",
        "kind: Interrupted": "the connection ended without a whole answer",
        "IncompleteMessage": "the connection ended without a whole answer",
        "bytes of": "the answer was short",
    }
    return next((said for word, said in words.items() if word in text), f"no answer ({kind})")


def _package(place: str) -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError:
        raise RequestError(f"{place}: expected the package obstore: pip install 'feedfast[cloud]'") from None
    return obstore


def _settings() -> str:
    """What tells one environment from another, without its secrets."""
    found = sorted((name, os.environ[name]) for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_")))
    return hashlib.sha256(repr(found).encode()).hexdigest()


@functools.lru_cache(maxsize=16)  # its connections are worth keeping
def _client(scheme: str, bucket: str, patience: Patience, settings: str) -> Any:
    """The ``obstore`` store of a bucket, as the environment describes it. Trying again is ours, so it does not."""
    from obstore import store as stores

    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=patience.connect_s),
        "read_timeout": timedelta(seconds=patience.answer_s),
        "timeout": timedelta(seconds=max(600.0, patience.answer_s)),
    }
    # given options take the place of those from the environment
    if any(os.environ.get(name, "").lower() in ("1", "true") for name in ("AWS_ALLOW_HTTP", "AZURE_ALLOW_HTTP")):
        options["allow_http"] = True
    retry: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    kinds: dict[str, Any] = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}
    # the server compares what it has received with this before it keeps it
    more = {"checksum_algorithm": "SHA256"} if scheme == "s3" else {}
    try:
        return kinds[scheme](bucket, client_options=options, retry_config=retry, **more)
    except Exception:
        raise RequestError(
            f"{scheme}://{bucket}: expected {CREDENTIALS[scheme]} to say how to reach it, found what no client takes"
        ) from None
