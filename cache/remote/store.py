"""A folder on remote storage through fsspec, with retries and errors in one line.

`s3://` needs the extra `remote` (s3fs); `file://` and `memory://` need fsspec only. `gs://` and `hf://datasets/...` go
the same way and are untested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sae_granary.cache.errors import CacheError, CorruptCacheError, NotACacheError
from sae_granary.common.errors import one_line

MARKER = ".push"  # at the remote while a push has not finished: the checksum of the manifest that will come
THREADS = 8  # files that travel at once
AGAIN = 0.2  # seconds until it is looked again for what another process does
TRIES, FIRST_WAIT, LONGEST_WAIT = 6, 0.2, 10.0  # seconds
CONTINUES = "; the same command continues"
_LOCAL = ("file", "local", "memory")
_EVERYONE = ("AllUsers", "AuthenticatedUsers")
T = TypeVar("T")
Progress = Callable[[int], None]  # is told how many more bytes have arrived


class RemoteError(CacheError, OSError):
    """Remote storage failed, refused, or is not reachable. What has arrived is kept: the same command continues."""


def is_url(text: object) -> bool:
    """Whether a path is a URL of remote storage."""
    return isinstance(text, str) and "://" in text


@contextmanager
def files_at_once(name: str = "") -> Iterator[ThreadPoolExecutor]:
    """Context manager: threads for files that travel; after an error those that have not begun are left out."""
    with ThreadPoolExecutor(THREADS, thread_name_prefix=name) as threads:
        try:
            yield threads
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


class Store:
    """A remote folder. Raises RemoteError."""

    def __init__(self, url: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise RemoteError("remote storage needs fsspec: pip install 'sae-granary[remote]'") from None
        self.url = url.rstrip("/")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            hint = "; pip install 'sae-granary[remote]'" if isinstance(error, ImportError) else ""
            raise RemoteError(f"{url}: {one_line(error)}{hint}") from None
        self._root = str(self._root).rstrip("/")
        protocol = self._fs.protocol
        self.protocol: str = protocol if isinstance(protocol, str) else protocol[0]

    def listing(self) -> dict[str, int]:
        """Path below the folder -> bytes of every file; empty where there is no such folder."""

        def find() -> dict[str, int]:
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {self._relative(name): int(entry["size"]) for name, entry in found.items()}

        return self._retry("list", "", find)

    def _relative(self, name: str) -> str:
        return name.removeprefix("/").removeprefix(self._root.removeprefix("/")).removeprefix("/")

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a file, or `end - start` of them: a reply that is shorter is asked for again."""

        def read() -> bytes:
            data = self._fs.cat_file(f"{self._root}/{path}", start=start or None, end=end)
            if end is not None and len(data) != end - start:
                raise OSError(f"a reply of {len(data)} bytes, expected {end - start}")
            return bytes(data)

        return self._retry("read", path, read)

    def write(self, path: str, data: bytes) -> None:
        """Write a small file."""
        self._retry("write", path, lambda: self._put(path, lambda name: self._fs.pipe_file(name, data), len(data)))

    def upload(self, path: str, source: Path) -> None:
        """Copy a local file there."""
        size = source.stat().st_size
        self._retry("write", path, lambda: self._put(path, lambda name: self._fs.put_file(str(source), name), size))

    def _put(self, path: str, put: Callable[[str], Any], size: int) -> None:
        name = f"{self._root}/{path}"
        if self.protocol not in _LOCAL:
            put(name)
        else:  # object stores show whole files only; here a rename does
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            put(f"{name}.part")
            with suppress(FileNotFoundError):  # another push of this file has moved it; the size tells
                self._fs.mv(f"{name}.part", name)
        self._fs.invalidate_cache()
        if (found := int(self._fs.info(name)["size"])) != size:
            raise OSError(f"{found} bytes arrived of {size}")

    def remove(self, path: str) -> None:
        """Remove a file, if it is there."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(f"{self._root}/{path}")

        self._retry("remove", path, remove)

    def why_public(self) -> str | None:
        """Why what is written there may be seen by everyone; None where it is known that it is not."""
        if self.protocol in _LOCAL:
            return None
        if self.protocol not in ("s3", "s3a"):
            return f"who can read {self.url} is not known"
        try:
            grants = self._fs.call_s3("get_bucket_acl", Bucket=self._root.split("/")[0])["Grants"]
        except Exception:
            return f"the access list of {self.url} cannot be read"
        everyone = any(str(g.get("Grantee", {}).get("URI", "")).endswith(_EVERYONE) for g in grants)
        return f"{self.url} can be read by everyone" if everyone else None

    def _retry(self, what: str, path: str, call: Callable[[], T]) -> T:
        place = f"{self.url}/{path}".rstrip("/")
        wait = FIRST_WAIT
        for left in reversed(range(TRIES)):
            try:
                return call()
            except FileNotFoundError:
                raise NotACacheError(f"{place} does not exist") from None
            except PermissionError as error:
                raise RemoteError(f"no right to {what} {place} ({one_line(error)})") from None
            except Exception as error:  # each file system brings errors of its own
                name = type(error).__name__
                if "Credential" in name or "TokenRetrieval" in name:
                    raise RemoteError(f"no right to {what} {place}: {one_line(error)}") from None
                if not left:
                    told = f"cannot {what} {place} after {TRIES} tries: {name}: {one_line(error)}"
                    raise RemoteError(told + CONTINUES) from None
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("unreachable")


def damaged(place: str) -> CorruptCacheError:
    """The error for a file whose bytes are not those that the manifest promises."""
    return CorruptCacheError(f"{place}: the checksum does not fit the manifest; restore it there from a whole copy")
