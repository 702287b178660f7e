"""Digests of file contents, to detect changes after they were written."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Large enough to rule out accidental collisions; its 32 characters still fit into a message.
_DIGEST_SIZE = 16


class ContentDigest:
    """A digest of named arrays, independent of their order and of the file format."""

    def __init__(self) -> None:
        """Starts with no arrays."""
        self._lines: list[str] = []

    def add(self, name: str, array: np.ndarray) -> None:
        """Adds the name, the shape, the dtype and the bytes of an array."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest = hashlib.blake2b(content.data, digest_size=_DIGEST_SIZE).hexdigest()
        self._lines.append(f"{name} {array.shape} {array.dtype} {digest}")

    def hexdigest(self, description: Mapping[str, Any] | None = None) -> str:
        """Returns the digest of all arrays.

        Args:
            description: JSON values that belong to the arrays and are also covered.
        """
        lines = [*sorted(self._lines), json.dumps(description or {}, sort_keys=True)]
        text = "\n".join(lines)
        return hashlib.blake2b(text.encode(), digest_size=_DIGEST_SIZE).hexdigest()


def digest_of_arrays(
    arrays: Iterable[tuple[str, np.ndarray]],
    description: Mapping[str, Any] | None = None,
) -> str:
    """Computes the digest of named arrays and of their description."""
    digest = ContentDigest()
    for name, array in arrays:
        digest.add(name, array)
    return digest.hexdigest(description)
