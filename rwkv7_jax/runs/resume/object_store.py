"""A folder of an object store, in which a run has a copy or its checkpoints.

A store has keys and no folders, and nothing in it can be renamed. What is written in one request is
there completely or not at all.
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

# Seconds after which a store that does not answer counts as absent.
_TIMEOUT_SECONDS = 120.0

# What Orbax reaches stores with, and the extra that installs it, by scheme. Copies need neither.
_PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}

# Files that are on their way at the same time.
_TRANSFERS = 8


class ObjectStore:
    """The keys below one URL. Whatever fails is a DiskError that names the URL.

    Attributes:
        url: as the user wrote it.
    """

    def __init__(self, url: str):
        """Names the store; it is opened when it is first used.

        Args:
            url: "gs://bucket/run", "s3://bucket/run" or "file:///folder".
        """
        self.url = url

    @functools.cached_property
    def _keys(self) -> Any:
        # An import of a second, for runs that have a store.
        import tensorstore

        base = self.url if self.url.endswith("/") else f"{self.url}/"
        return tensorstore.KvStore.open(base).result(timeout=_TIMEOUT_SECONDS)

    def local_folder(self) -> Path | None:
        """Returns the folder that a URL of the scheme "file" names; None of another."""
        parts = urlparse(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def folder(self) -> Any:
        """Returns the store as a folder that Orbax reads and writes."""
        from etils import epath

        local = self.local_folder()
        return epath.Path(self.url if local is None else local)

    def check_folder(self) -> None:
        """Checks that Orbax can reach the store.

        Raises:
            ImportError: a package that this needs is not installed.
            DiskError: it cannot.
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
        """Returns all keys that are paths inside of a folder."""
        with self.named_errors():
            keys = [key.decode() for key in self._keys.list().result()]
        return [key for key in keys if is_inside(key)]

    def read(self, key: str) -> tuple[bytes, bytes]:
        """Returns the value of a key, which is empty if there is none, and its generation."""
        with self.named_errors():
            found = self._keys.read(key).result(timeout=_TIMEOUT_SECONDS)
            return found.value, found.stamp.generation

    def write(self, key: str, value: str | bytes, *, expected: bytes) -> bytes:
        """Writes a small value if the key still has the generation that is expected.

        Returns:
            The new generation; empty if the key had another one and nothing was written.
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
            prefix: the folder, with a slash at its end.
        """
        doomed = [key for key in self.list() if key.startswith(prefix)]

        def delete(key: str, _: None) -> None:
            self._keys.write(key, None).result()

        with self.named_errors():
            _in_parallel(delete, dict.fromkeys(doomed))

    def upload(self, files: Mapping[str, Path]) -> None:
        """Copies files into the store, by key."""

        def put(key: str, path: Path) -> None:
            self._keys.write(key, path.read_bytes()).result()

        with self.named_errors():
            _in_parallel(put, files)

    def download(self, files: Mapping[str, Path]) -> None:
        """Copies values out of the store to files, by key."""

        def get(key: str, path: Path) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = self._keys.read(key).result().value
            with atomic_write(path) as file:
                file.write(content)

        with self.named_errors():
            _in_parallel(get, files)

    def digests(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Returns the digests of values, as manifests have them, by the names of their keys."""
        found = {}

        def read(name: str, key: str) -> None:
            value = self._keys.read(key).result().value
            found[name] = new_hash(value).hexdigest()

        with self.named_errors():
            _in_parallel(read, keys)
        return found

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Turns whatever a store or a disk raises into one sentence that names the store."""
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
    """Tells whether a key is a path that stays inside a folder."""
    path = PurePosixPath(key)
    return not path.is_absolute() and ".." not in path.parts


def _in_parallel(
    transfer: Callable[[str, Any], None], items: Mapping[str, Any]
) -> None:
    with ThreadPoolExecutor(max_workers=_TRANSFERS) as threads:
        # Drawing the results raises what a thread raised.
        list(threads.map(transfer, items.keys(), items.values()))
