"""Makes or loads the model and the tokenizer of a run from its settings."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from rwkv7_jax import sharding
from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints.model_files import load_model
from rwkv7_jax.checkpoints.model_vocabulary import model_tokenizer
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.process_group import group_of_mesh
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.tokenizer import Tokenizer

# Required sizes of a new model; the others follow from them.
_SIZES = ("vocab_size", "num_layers", "width")

# Settings of a model that its checkpoint does not fix.
_CHANGEABLE = ("dtype", "remat", "implementation")

# The setting of how to hold a checkpoint's weights, next to the fields of the model's config.
_WEIGHTS = "weights"


def load_or_init(settings: Settings, mesh: Mesh | None = None) -> tuple[RWKV7, Params]:
    """Loads the model of `config.init`, or makes a new one without a checkpoint.

    Args:
        settings: settings of the run; `config.model` has the sizes of a new model, or changes to a
            checkpoint.
        mesh: the devices that hold the weights; None for the default device.

    Raises:
        ValueError: neither a checkpoint nor sizes are given, or a given size is fixed by the
            checkpoint.
    """
    init = settings.init
    changes = dict(settings.model)
    if init is None:
        refuse_int8(changes, "without `config.init`: new weights are floats")
        model = new_model(changes)
        return model, init_weights(model, settings.seed, mesh)
    weights = changes.pop(_WEIGHTS, None)
    fixed = [name for name in changes if name not in _CHANGEABLE]
    if fixed:
        raise ValueError(
            f"`config.model.{fixed[0]}` must be left out, because the checkpoint {init} fixes it; "
            "only dtype, remat, implementation and weights may be changed "
            "(configs/pretrain.py:checkpoint leaves the others out)."
        )
    load = functools.partial(
        load_model, init, weights=weights, allow_nan=settings.allow_nan, mesh=mesh
    )
    # The hash of an int8 model may need all processes, so none may fail alone before it.
    waits = weights is not None
    with report_wait(f"the weights of {init}"):
        params, config = load() if waits else group_of_mesh(mesh).run_in_all(load)
    return RWKV7(dataclasses.replace(config, **changes)), params


def tokenizer_of(settings: Settings, config: RWKV7Config) -> Tokenizer:
    """Returns the tokenizer of a run: that of `config.data.vocabulary`, or of its checkpoint.

    Raises:
        ValueError: the vocabulary does not fit the model, or no vocabulary is known for it.
        ImportError: a package that reads the vocabulary is missing.
    """
    return model_tokenizer(
        settings.init,
        config.vocab_size,
        settings.data.vocabulary,
        argument="`config.data.vocabulary`",
    )


def refuse_int8(changes: Mapping[str, Any], where: str) -> None:
    """Rejects `config.model.weights` if weights are trained.

    Args:
        changes: `config.model`.
        where: condition in the message.

    Raises:
        ValueError: `config.model.weights` is set.
    """
    if changes.get(_WEIGHTS) is not None:
        raise ValueError(
            f"`config.model.weights` must be left out {where}; got {changes[_WEIGHTS]!r}."
        )


def new_model(sizes: Mapping[str, Any]) -> RWKV7:
    """Makes the network of a new model, without weights.

    Raises:
        ValueError: a size is missing.
    """
    missing = [name for name in _SIZES if name not in sizes]
    if missing:
        raise ValueError(
            "`config.init` must name a checkpoint, or `config.model` must have all sizes; it has "
            f"no {', '.join(missing)}."
        )
    return RWKV7(RWKV7Config(**sizes))


def init_weights(model: RWKV7, seed: int, mesh: Mesh | None = None) -> Params:
    """Makes new weights, sharded over the mesh.

    Raises:
        ValueError: the mesh does not divide the heads.
    """
    if mesh is not None:
        parts = mesh.shape.get(sharding.TENSOR, 1)
        sharding.check_shared_heads(model.config, parts, "`config.mesh`")
    return _initializer(model.config, mesh)(jax.random.key(seed))


# A run first traces the initializer for the shapes, and tracing is as slow as compiling.
@functools.lru_cache(maxsize=4)
def _initializer(config: RWKV7Config, mesh: Mesh | None) -> Callable[[Array], Params]:
    """Makes the program from a key to new weights, sharded over the mesh."""

    # Without `jit`, Flax would run the model's forward pass op by op.
    @jax.jit
    def init(key):
        # No parameter's shape depends on the batch or the length.
        tokens = jnp.zeros((1, 1), jnp.int32)
        return RWKV7(config).init(key, tokens, init_state(config))["params"]

    if mesh is None:
        return init
    shards = sharding.shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=shards)
