"""The start states that requests may name; all have the same leaves and shapes."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import jax

from rwkv7_jax.checks import check_instance
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, check_state, init_state, select, stack
from rwkv7_jax.serving.requests import UnknownState


class Start(NamedTuple):
    """A start state.

    Attributes:
        key: a unique key; a state that replaces this one under its name has another key.
        state: the state of one row.
    """

    key: int
    state: RWKV7State


class StartStates:
    """Start states by name; None is the name of the empty state.

    All have the same leaves and shapes, so one compiled program serves all of them. All methods are
    thread-safe.
    """

    def __init__(self, config: RWKV7Config, states: Mapping[str, RWKV7State]):
        """Converts the initial states to common leaves and shapes.

        Args:
            config: the config of the model.
            states: states by name, each of one sequence.

        Raises:
            TypeError: `states` is not a mapping of names to states.
            ValueError: a state belongs to another model, or upscaled states cannot share a batch.
        """
        check_instance(states, Mapping, "`states`")
        for name, state in states.items():
            check_instance(name, str, "each name in `states`")
            check_state(state, 1, config)
        self._config = config
        self._keys = itertools.count()
        rows = _cast(stack([init_state(config), *states.values()]), config)
        self._starts: dict[str | None, Start] = {}
        for row, name in enumerate((None, *states)):
            self._starts[name] = Start(next(self._keys), select(rows, [row]))

    def get(self, name: str | None) -> Start:
        """Returns the start state of a name.

        Raises:
            UnknownState: no state has the name.
        """
        # Another thread may remove it at any time, also between a check and a lookup.
        start = self._starts.get(name)
        if start is None:
            names = ", ".join(self.names()) or "none is served"
            raise UnknownState(
                f"`state` must name a state that is served ({names}); got {name!r}."
            )
        return start

    def names(self) -> tuple[str, ...]:
        """Returns all names, without None."""
        # Copied at once: another thread may add a name, which would break a loop over the names.
        return tuple(name for name in self._starts.copy() if name is not None)

    def put(self, name: str, state: RWKV7State) -> None:
        """Adds a state, or replaces the one of the same name.

        Raises:
            TypeError: `state` is not a state.
            ValueError: the state belongs to another model, or its memory differs in kind or size
                from that of the initial states.
        """
        check_state(state, 1, self._config)
        nothing = self._starts[None].state
        other_form = ValueError(
            "`state` must have a memory of the same kind and size as the initial states; another "
            "one would recompile every program."
        )
        try:
            row = select(_cast(stack([nothing, state]), self._config), [1])
        except ValueError:
            raise other_form from None
        if jax.tree.map(jax.typeof, row) != jax.tree.map(jax.typeof, nothing):
            raise other_form
        self._starts[name] = Start(next(self._keys), row)

    def remove(self, name: str) -> None:
        """Removes a state.

        Raises:
            UnknownState: no state has the name.
        """
        self.get(name)
        self._starts.pop(name, None)


def _cast(rows: RWKV7State, config: RWKV7Config) -> RWKV7State:
    """Casts the token shifts to the dtype that they have after the first token."""
    return rows.replace(
        att_shift=rows.att_shift.astype(config.dtype),
        ffn_shift=rows.ffn_shift.astype(config.dtype),
    )
