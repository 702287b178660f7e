"""The batch that every loss, metric and evaluation reads."""

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

# A batch is NumPy's on the host and JAX's on the device and under `jit`.
ArrayOfEither = np.ndarray | jax.Array


# As in `model/state.py`: shaped fields would be checked whenever JAX rebuilds the tree with other
# leaves (under `vmap`, `scan`, `eval_shape`), so here they are documentation.
@typing.no_type_check
@struct.dataclass
class Batch(Mapping[str, Any]):
    """Rows of tokens, and how much each target counts.

    A pytree whose absent fields are None. The fields can also be read by name (`batch["tokens"]`,
    `"anchor" in batch`, `batch.keys()`), and `batch | {"mask": mask}` is a copy with other fields.

    Attributes:
        tokens: ids; row by row the T inputs and, one later, their T targets.
        mask: 1 where a target counts in the loss, 0 where it does not; other weights are allowed.
            None where every reader of the batch only needs tokens or has `weights`.
        weights: each target's share of the loss, used in place of the mask over its sum. Gradient
            accumulation sets it, because a piece of a batch cannot know the sum of the full mask.
        anchor: ids of general text on which a tuned state must stay close to the base model. Its
            rows may be fewer, and longer or shorter.
        split: tokens of each row's prompt; only what follows it is an answer (observers).
        advantages: of each row's completion over those of the same prompt (GRPO).
        segments: the input at which each of the K sequences of a packed row begins, ascending; T
            for those that a row does not have. None where a row is one sequence.
        old_logp: log-probability of each drawn target in the state that it was drawn from.
        importance: weight of each drawn target, for draws of another distribution.
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
            """Returns a copy with other fields."""
            ...

    @classmethod
    def of(
        cls,
        batch: Mapping[str, Any],
        *needed: str,
        name: str = "batch",
        packed: bool = False,
    ) -> "Batch":
        """Converts a mapping that a user passed and checks shapes; a `Batch` is returned as it is.

        Shapes are known inside compiled programs too, so this costs nothing at run time. Lists
        become NumPy arrays. Values are not looked at.

        Args:
            batch: a `Batch`, or a mapping of its fields' names to arrays.
            *needed: names of further fields, besides `tokens`, that the caller reads.
            name: the argument's name, for messages.
            packed: whether the caller knows rows of several sequences.

        Raises:
            TypeError: no mapping, or a field of the wrong kind.
            ValueError: a name that is no field, a missing field, shapes that do not fit, or packed
                rows where they are not known.
        """
        with prefix_errors("Batch.of"):
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"`{name}` must be a Batch or a mapping; got {type(batch).__name__}."
                )
            for field in ("tokens", *needed):
                if field not in batch:
                    fields = ", ".join(map(str, batch))
                    raise ValueError(f"`{name}` must hold {field!r}; it has {fields}.")
            if "segments" in batch and not packed:
                raise ValueError(
                    f"`{name}` must have one sequence a row here; its `segments` are several."
                )
            if isinstance(batch, Batch):
                return _checked(batch, name)
            for field in batch:
                _check_field(field, name)
            return _checked(cls(**batch), name)

    def __getitem__(self, name: str) -> Any:
        """Returns a field that is there, by its name."""
        # Other attributes are no keys, and an absent field is none either.
        value = getattr(self, name) if name in _FIELDS else None
        if value is None:
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names of the fields that are there."""
        return (name for name in _FIELDS if getattr(self, name) is not None)

    def __len__(self) -> int:
        """Counts the fields that are there, as a dict does; the rows are `tokens.shape[0]`."""
        return sum(1 for _ in self)

    def __or__(self, fields: Mapping[str, Any]) -> "Batch":
        """Returns a copy in which `fields` replace those of the same name."""
        if not isinstance(fields, Mapping):
            return NotImplemented
        return Batch.of({**self, **fields}, packed=True)

    @property
    def inputs(self) -> Int[ArrayOfEither, "B T"]:
        """The ids that are read: of each row all but the last one."""
        return self.tokens[..., :-1]

    @property
    def targets(self) -> Int[ArrayOfEither, "B T"]:
        """The ids that are predicted: of each row all but the first one."""
        return self.tokens[..., 1:]

    @property
    def sequences(self) -> int:
        """The number of sequences: as many states as the rows start from."""
        if self.segments is None:
            return self.tokens.shape[0]
        return self.segments.shape[0] * self.segments.shape[1]

    @property
    def segment_ids(self) -> Int[jax.Array, "B T"] | None:
        """The sequence of each input, from 0 in each row; None where a row is one."""
        if self.segments is None:
            return None
        place = jnp.arange(self.tokens.shape[1] - 1)
        has_begun = jnp.asarray(self.segments)[:, None] <= place[None, :, None]
        # What comes before the first one's begin belongs to it as well.
        return jnp.maximum(jnp.sum(has_begun, axis=2, dtype=jnp.int32) - 1, 0)

    def with_sequences(self, count: int) -> "Batch":
        """Returns the batch with packed rows of K sequences, some of them empty.

        Args:
            count: of the sequences (K), at least as many as the rows have.
        """
        rows = self.tokens.shape[0]
        length = self.tokens.shape[1] - 1
        begins = self.segments
        if begins is None:
            begins = np.zeros((rows, 1), np.int32)
        empty = np.full((rows, count - begins.shape[1]), length, np.int32)
        return self.replace(segments=np.concatenate([begins, empty], axis=1))

    def select_rows(self, rows: slice) -> "Batch":
        """Returns a part of the rows, of every field."""
        # Over the tree: absent fields are None, which JAX takes for an empty subtree.
        return jax.tree.map(lambda array: array[rows], self)


# What public functions accept: a batch, or a mapping of its fields that `Batch.of` converts.
BatchLike = Batch | Mapping[str, Any]

_FIELDS = tuple(Batch.__dataclass_fields__)


def _check_field(field: Any, name: str) -> None:
    """Raises unless a key is the name of a field."""
    if field in _FIELDS:
        return
    nearest = difflib.get_close_matches(str(field), _FIELDS, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"`{name}` must hold no field {field!r}; the nearest is {nearest!r}, "
        f"and all are {', '.join(_FIELDS)}."
    )


def _checked(batch: Batch, name: str) -> Batch:
    """Returns a batch whose fields are arrays, after a look at their shapes.

    Broadcasting would hide a wrong one: a mask [1 T] multiplies the loss of B rows by B. All fields
    may have further leading axes, such as that of the pieces of a batch.
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
    """Raises unless a field can have the dtype: ids and lengths are integers."""
    if field in ("tokens", "anchor", "split", "segments"):
        if not np.issubdtype(dtype, np.integer):
            raise TypeError(f"`{name}.{field}` must hold integers; got {dtype}.")
    elif not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"`{name}.{field}` must hold numbers; got {dtype}.")
