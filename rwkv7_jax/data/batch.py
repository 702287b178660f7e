"""The batch type of all losses, metrics and evaluations."""

import difflib
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Float, Int

from rwkv7_jax.array_types import describe_fields
from rwkv7_jax.checks import as_array, prefix_errors

# A batch holds NumPy arrays on the host, and JAX arrays on the device and under `jit`.
ArrayOfEither = np.ndarray | jax.Array


# The shapes are only documentation, as in `model/state.py`: checks would fail whenever JAX rebuilds
# the tree with other leaves (under `vmap`, `scan`, `eval_shape`).
@typing.no_type_check
@struct.dataclass
class Batch(Mapping[str, Any]):
    """Rows of tokens and the loss weights of their targets.

    A pytree whose absent fields are None. It is also a mapping of the present fields
    (`batch["tokens"]`, `"anchor" in batch`, `batch.keys()`), and `batch | {"mask": mask}` is a copy
    with replaced fields.

    Attributes:
        tokens: ids. The first T of a row are its inputs, the last T their targets.
        mask: 1 where a target counts in the loss, else 0; other weights are allowed. None if the
            reader only needs tokens, or uses `weights`.
        weights: each target's share of the loss, used instead of the normalised mask. Gradient
            accumulation sets it, because a microbatch does not know the sum of the full mask.
        anchor: ids of general text on which a tuned state must stay close to the base model. Its
            number and length of rows may differ.
        split: number of prompt tokens in each row; the rest is the answer (observers).
        advantages: advantage of each row's completion over the others of its prompt (GRPO).
        segments: ascending starts of the K sequences of a packed row, padded with T. None if each
            row is one sequence.
        old_logp: log-probability of each sampled target under the state that it was sampled from.
        importance: importance weight of each target sampled from another distribution.
    """

    tokens: Int[ArrayOfEither, "B T1"]
    mask: Float[ArrayOfEither, "B T"] | None = None
    weights: Float[ArrayOfEither, "B T"] | None = None
    anchor: Int[ArrayOfEither, "B A1"] | None = None
    split: Int[ArrayOfEither, " B"] | None = None
    advantages: Float[ArrayOfEither, " B"] | None = None
    segments: Int[ArrayOfEither, "B K"] | None = None
    old_logp: Float[ArrayOfEither, "B T"] | None = None
    importance: Float[ArrayOfEither, "B T"] | None = None
    __repr__ = describe_fields

    # `struct.dataclass` adds `replace` where type checkers cannot see it.
    if typing.TYPE_CHECKING:

        def replace(self, **changes: Any) -> "Batch":
            """Returns a copy with replaced fields."""
            ...

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        *needed: str,
        name: str = "batch",
        packed: bool = False,
    ) -> "Batch":
        """Converts a user's mapping to a `Batch` and checks shapes and dtypes.

        Shapes are static under `jit`, so the check costs nothing at run time. Lists become NumPy
        arrays. Values are not checked.

        Args:
            batch: a `Batch`, or a mapping from field names to arrays.
            *needed: names of required fields besides `tokens`.
            name: name of the argument, for error messages.
            packed: whether the caller supports packed rows of several sequences.

        Raises:
            TypeError: `batch` is not a mapping, or a field has the wrong type.
            ValueError: a field is unknown, missing or misshapen, or rows are packed and the caller
                does not support it.
        """
        with prefix_errors("Batch.of"):
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"`{name}` must be a Batch or a mapping; got {type(batch).__name__}."
                )
            if not isinstance(batch, Batch):
                batch = _without_absent(batch)
            for field in ("tokens", *needed):
                if field not in batch:
                    fields = ", ".join(map(str, batch))
                    raise ValueError(f"`{name}` must hold {field!r}; it has {fields}.")
            if "segments" in batch and not packed:
                raise ValueError(
                    f"`{name}` must have one sequence per row here; it has packed `segments`."
                )
            if isinstance(batch, Batch):
                return _checked(batch, name)
            for field in batch:
                _check_field(field, name)
            return _checked(cls(**batch), name)

    def __getitem__(self, name: str) -> Any:
        """Returns a present field by its name."""
        # Other attributes and absent fields are not keys.
        value = getattr(self, name) if name in _FIELDS else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of the present fields."""
        return (name for name in _FIELDS if getattr(self, name) is not None)

    def __len__(self) -> int:
        """Counts the present fields, like a dict; the number of rows is `tokens.shape[0]`."""
        return sum(1 for _ in self)

    def __or__(self, fields: Mapping[str, Any]) -> "Batch":
        """Returns a copy with `fields` replaced."""
        if not isinstance(fields, Mapping):
            return NotImplemented
        return Batch.of({**self, **fields}, packed=True)

    @property
    def inputs(self) -> Int[ArrayOfEither, "B T"]:
        """The input ids: all of each row except the last."""
        return self.tokens[..., :-1]

    @property
    def targets(self) -> Int[ArrayOfEither, "B T"]:
        """The target ids: all of each row except the first."""
        return self.tokens[..., 1:]

    @property
    def sequences(self) -> int:
        """The number of sequences, each of which starts from its own state."""
        if self.segments is None:
            return self.tokens.shape[0]
        return self.segments.shape[0] * self.segments.shape[1]

    @property
    def segment_ids(self) -> Int[jax.Array, "B T"] | None:
        """The index within its row of each input's sequence; None if each row is one sequence."""
        if self.segments is None:
            return None
        place = jnp.arange(self.tokens.shape[1] - 1)
        starts = jnp.asarray(self.segments, int)
        has_begun = starts[:, None] <= place[None, :, None]
        # Inputs before the first start also belong to the first sequence.
        return jnp.maximum(jnp.sum(has_begun, axis=2, dtype=jnp.int32) - 1, 0)

    def with_sequences(self, count: int) -> "Batch":
        """Returns the batch with packed rows of K sequences, padded with empty ones.

        Args:
            count: number of sequences (K), at least as many as the rows have.

        Raises:
            ValueError: the rows have more sequences.
        """
        rows = self.tokens.shape[0]
        length = self.tokens.shape[1] - 1
        begins = self.segments
        if begins is None:
            begins = np.zeros((rows, 1), np.int32)
        if count < begins.shape[1]:
            raise ValueError(
                f"Batch.with_sequences: `count` must be at least {begins.shape[1]}; got {count}."
            )
        empty = np.full((rows, count - begins.shape[1]), length, np.int32)
        return self.replace(segments=np.concatenate([begins, empty], axis=1))

    def select_rows(self, rows: slice) -> "Batch":
        """Returns some of the rows of every field."""
        # Absent fields are None, which JAX treats as an empty subtree.
        return jax.tree.map(lambda array: array[rows], self)


# What public functions accept: a batch, or a mapping that `Batch.of` converts.
BatchLike = Batch | Mapping[str, Any]

_FIELDS = tuple(Batch.__dataclass_fields__)


def _without_absent(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a mapping without the fields that are None, which means absent as in a `Batch`."""
    present = {}
    for field, value in batch.items():
        # Unknown fields stay, so that they are reported.
        if value is not None or field not in _FIELDS:
            present[field] = value
    return present


def _check_field(field: Any, name: str) -> None:
    """Raises unless a key is a field name."""
    if field in _FIELDS:
        return
    nearest = difflib.get_close_matches(str(field), _FIELDS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"`{name}` must hold no field {field!r}; the nearest is {nearest!r}, "
        f"and the fields are {', '.join(_FIELDS)}."
    )


def _checked(batch: Batch, name: str) -> Batch:
    """Returns a batch whose fields are arrays, and checks their shapes.

    Broadcasting would hide a wrong shape: a mask [1 T] multiplies the loss of B rows by B. All
    fields may have additional leading axes, such as one over microbatches.
    """
    changes = {}
    for field in batch:
        array = as_array(batch[field], f"`{name}.{field}`")
        _check_dtype(field, array.dtype, name)
        if array is not batch[field]:
            changes[field] = array
    batch = batch.replace(**changes) if changes else batch
    tokens = tuple(batch.tokens.shape)
    if len(tokens) < 2 or tokens[-1] < 1:
        raise ValueError(f"`{name}.tokens` must have shape [B T+1]; got {tokens}.")
    rows = tokens[:-1]
    targets = (*rows, tokens[-1] - 1)
    shapes = {"split": rows, "advantages": rows}
    shapes |= dict.fromkeys(("mask", "weights", "old_logp", "importance"), targets)
    segments = batch.segments
    if segments is not None and (
        tuple(segments.shape[:-1]) != rows or not segments.shape[-1]
    ):
        raise ValueError(
            f"`{name}.segments` must have shape {(*rows, 'K')} to fit tokens of shape {tokens}; "
            f"got {tuple(segments.shape)}."
        )
    for field, wanted in shapes.items():
        if field in batch and tuple(batch[field].shape) != wanted:
            raise ValueError(
                f"`{name}.{field}` must have shape {wanted} to fit tokens of shape {tokens}; "
                f"got {tuple(batch[field].shape)}."
            )
    if batch.anchor is not None and len(batch.anchor.shape) != len(tokens):
        raise ValueError(
            f"`{name}.anchor` must have shape [B T+1]; got {tuple(batch.anchor.shape)}."
        )
    return batch


def _check_dtype(field: str, dtype: Any, name: str) -> None:
    """Raises unless a field has a valid dtype: integers for ids and positions, else numbers."""
    if field in ("tokens", "anchor", "split", "segments"):
        if not np.issubdtype(dtype, np.integer):
            raise TypeError(f"`{name}.{field}` must hold integers; got {dtype}.")
    elif not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"`{name}.{field}` must hold numbers; got {dtype}.")
