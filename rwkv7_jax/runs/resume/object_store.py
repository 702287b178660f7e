"""A folder in an object store, for the backup or the checkpoints of a run.

A store has keys but no folders, and cannot rename a key. Each write is atomic.
"""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlparse

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checks import first_line
from rwkv7_jax.runs.exit_codes import DiskError
from rwkv7_jax.runs.resume.steps import new_hash

# Seconds to wait for the reply of a store.
_TIMEOUT_SECONDS = 120.0

# The package with which Orbax reaches a store, and the extra that installs it, by scheme. Backups
# need neither.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}

# How many files are transferred concurrently.
_TRANSFERS = 8


class ObjectStore:
    """The keys below one URL. Every failure raises a DiskError that names the URL.

    Attributes:
        url: the URL as the user wrote it.
    """

    def __init__(self, url: str):
        """Stores the URL; the store is opened on first use.

        Args:
            url: "gs://bucket/run", "s3://bucket/run" or "file:///folder".
        """
        self.url = url

    @functools.cached_property
    def _keys(self) -> Any:
        # This import takes a second, so only runs with a store import it.
        import tensorstore

        base = self.url if self.url.endswith("/") else f"{self.url}/"
        return tensorstore.KvStore.open(base).result(timeout=_TIMEOUT_SECONDS)

    def local_folder(self) -> Path | None:
        """Returns the folder that a "file" URL names; None for another scheme."""
        parts = urlparse(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def folder(self) -> Any:
        """Returns the store as a path that Orbax can read and write."""
        from etils import epath

        local = self.local_folder()
        return epath.Path(self.url if local is None else local)

    def check_folder(self) -> None:
        """Checks that Orbax can reach the store.

        Raises:
            ImportError: the package for the store is not installed.
            DiskError: the store cannot be reached.
        """
        scheme = urlparse(self.url).scheme
        package, extra = _PACKAGES.get(scheme, ("", ""))
        if package and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"`config.backup` {self.url} needs {package}, because each process writes its own "
                f"shards there: pip install 'rwkv7_jax[{extra}]'"
            )
        with self.named_errors():
            self.folder().exists()

    def list(self) -> list[str]:
        """Returns all keys that are paths within a folder."""
        with self.named_errors():
            keys = [key.decode() for key in self._keys.list().result()]
        return [key for key in keys if is_inside(key)]

    def read(self, key: str) -> tuple[bytes, bytes]:
        """Returns the value of a key, empty if the key is missing, and its generation."""
        with self.named_errors():
            found = self._keys.read(key).result(timeout=_TIMEOUT_SECONDS)
            return found.value, found.stamp.generation

    def write(self, key: str, value: str | bytes, *, expected: bytes) -> bytes:
        """Writes a small value if the key still has the expected generation.

        Returns:
            The new generation; empty if the key had another one, and nothing was written.
        """
        with self.named_errors():
            written = self._keys.write(key, value, if_equal=expected)
            return written.result(timeout=_TIMEOUT_SECONDS).generation

    def put(self, key: str, value: str | bytes | None) -> None:
        """Writes the value of a key; None deletes it."""
        with self.named_errors():
            self._keys.write(key, value).result()

    def delete_folder(self, prefix: str) -> None:
        """Deletes all keys below a folder.

        Args:
            prefix: the folder, with a trailing slash.
        """
        doomed = [key for key in self.list() if key.startswith(prefix)]

        def delete(key: str, _: None) -> None:
            self._keys.write(key, None).result()

        with self.named_errors():
            _in_parallel(delete, dict.fromkeys(doomed))

    def upload(self, files: Mapping[str, Path]) -> None:
        """Uploads files, by key."""

        def put(key: str, path: Path) -> None:
            self._keys.write(key, path.read_bytes()).result()

        with self.named_errors():
            _in_parallel(put, files)

    def download(self, files: Mapping[str, Path]) -> None:
        """Downloads values to files, by key."""

        def get(key: str, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self._keys.read(key).result().value
            with atomic_write(path) as file:
                file.write(content)

        with self.named_errors():
            _in_parallel(get, files)

    def digests(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Returns the digests of values, in the form of a manifest.

        Args:
            keys: the keys of the values, by the names to use in the result.
        """
        found = {}

        def read(name: str, key: str) -> None:
            value = self._keys.read(key).result().value
            found[name] = new_hash(value).hexdigest()

        with self.named_errors():
            _in_parallel(read, keys)
        return found

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Converts any error of the store or a disk to a DiskError that names the store."""
        try:
            yield
        except DiskError:
            raise
        # TensorStore raises ValueError for most failures.
        except Exception as error:
            raise DiskError(
                f"`config.backup` {self.url} cannot be read or written: {first_line(error)}."
            ) from None


def is_inside(key: str) -> bool:
    """Returns whether a key is a relative path that stays within its folder."""
    path = PurePosixPath(key)
    return not path.is_absolute() and ".." not in path.parts


def _in_parallel(
    transfer: Callable[[str, Any], None], items: Mapping[str, Any]
) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as threads:
        # Consuming the results raises the errors of the threads.
        list(threads.map(transfer, items.keys(), items.values()))
