"""The start states that requests may name: rows of one form, which come and go by name."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax

from rwkv7_jax.checks import check_instance
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, select, stack


class Start(NamedTuple):
    """A start state.

    Attributes:
        key: of this one alone; a state that replaces it under its name has another.
        state: of one row.
    """

    key: int
    state: RWKV7State


class StartStates:
    """Start states by name; None is the model that has read nothing.

    All have the same leaves and shapes, so that programs do not depend on which is used. Any thread
    may call it.
    """

    def __init__(self, config: RWKV7Config, states: Mapping[str, RWKV7State]):
        """Brings states to one form.

        Args:
            config: of their model.
            states: by name, each of one sequence.

        Raises:
            TypeError: something else than states by name.
            ValueError: a state of another model, or upscaled ones that cannot share a batch.
        """
        check_instance(states, Mapping, "`states`")
        for state in states.values():
            check_state(state, 1, config)
        self._config = config
        self._keys = itertools.count()
        rows = _cast(stack([init_state(config), *states.values()]), config)
        self._starts: dict[str | None, Start] = {}
        for row, name in enumerate((None, *states)):
            self._starts[name] = Start(next(self._keys), select(rows, [row]))

    def get(self, name: str | None) -> Start | None:
        """Returns the start of a name; None where none has it."""
        return self._starts.get(name)

    def names(self) -> tuple[str, ...]:
        """Lists the names."""
        return tuple(name for name in self._starts if name is not None)

    def put(self, name: str, state: RWKV7State) -> None:
        """Adds a state, or replaces the one that has its name.

        Raises:
            TypeError: something else than a state.
            ValueError: a state of another model, or with a memory that those from the beginning
                do not have.
        """
        check_state(state, 1, self._config)
        nothing = self._starts[None].state
        other_form = ValueError(
            "`state` must have the form of the states from the beginning; its memory is of "
            "another kind or size, and every program would be compiled anew."
        )
        try:
            row = select(_cast(stack([nothing, state]), self._config), [1])
        except ValueError:
            raise other_form from None
        if jax.tree.map(jax.typeof, row) != jax.tree.map(jax.typeof, nothing):
            raise other_form
        self._starts[name] = Start(next(self._keys), row)

    def remove(self, name: str) -> None:
        """Removes a state."""
        self._starts.pop(name, None)


def _cast(rows: RWKV7State, config: RWKV7Config) -> RWKV7State:
    """Gives the shifts the dtype that they have after the first token."""
    return rows.replace(
        att_shift=rows.att_shift.astype(config.dtype),
        ffn_shift=rows.ffn_shift.astype(config.dtype),
    )
