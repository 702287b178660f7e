"""The model in programs of `jax.export`: any number of rows, and states in serialised ones."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from tiny_models import SCANNED as CONFIG
from tiny_models import lively, random_state, tokens
from tolerances import SAME, assert_trees_close
from upscaled_states import empty_state, filled

from rwkv7_jax.model.rwkv7 import RWKV7

CALL = jax.jit(RWKV7(CONFIG).apply)


def described(tree, rows=None):
    """Describes arrays; with a symbolic number of rows for their axis 1."""

    def describe(leaf):
        shape = leaf.shape
        if rows is not None:
            shape = (shape[0], rows, *shape[2:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree.map(describe, tree)


def sent(exported):
    """An exported program as another process reads it; where it cannot be written, as it is."""
    if importlib.util.find_spec("flatbuffers") is None:
        return exported
    return export.deserialize(exported.serialize())


# Checks of array shapes know no symbolic ones.
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("length", [1, 9])
def test_an_exported_program_takes_any_number_of_rows(length):
    (rows,) = export.symbolic_shape("rows")
    weights = {"params": lively()}
    program = export.export(CALL)(
        described(weights),
        jax.ShapeDtypeStruct((rows, length), jnp.int32),
        described(random_state(batch=1), rows),
    )
    ids = tokens(3, length)
    state = random_state(batch=3)
    found = sent(program).call(weights, ids, state)
    assert_trees_close(found, CALL(weights, ids, state), SAME["model"])


@pytest.mark.parametrize("dynamics", ["static", "delta"])
def test_an_upscaled_state_keeps_its_form_in_an_exported_program(dynamics):
    weights = {"params": lively()}
    state = filled(empty_state(CONFIG, dynamics))
    ids = tokens(1, 5)
    arguments = (weights, ids, state)
    logits, end = sent(export.export(CALL)(*described(arguments))).call(*arguments)
    assert end.upscaled.dynamics == dynamics
    assert end.upscaled.features.kind == state.upscaled.features.kind
    np.testing.assert_array_equal(logits, CALL(*arguments)[0])
