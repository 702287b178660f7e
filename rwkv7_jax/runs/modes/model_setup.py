"""The model and the vocabulary of a run, as its settings describe them."""

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
from rwkv7_jax.text.tokenizer import Tokenizer

# Sizes that a new model must be given; the others follow from them.
_SIZES = ("vocab_size", "num_layers", "width")

# Settings of a model that its checkpoint does not fix: how it computes, not what it is.
_CHANGEABLE = ("dtype", "remat", "implementation")

# A setting next to the model's own: how the checkpoint's weights are held.
_WEIGHTS = "weights"


def load_or_init(settings: Settings, mesh: Mesh | None = None) -> tuple[RWKV7, Params]:
    """Loads the model of `config.init`, or makes a new one where no checkpoint is named.

    Args:
        settings: of the run; `config.model` has the sizes of a new model, or what a checkpoint does
            not fix.
        mesh: the devices that hold the weights; None for the default one.

    Raises:
        ValueError: neither a checkpoint nor sizes are given, or sizes that the checkpoint fixes.
    """
    init = settings.init
    changes = dict(settings.model)
    if init is None:
        refuse_int8(changes, "without `config.init`: new weights are floats")
        model = new_model(changes)
        return model, init_weights(model, settings.seed, mesh)
    weights = changes.pop(_WEIGHTS, None)

    def load() -> tuple[Params, RWKV7Config]:
        return load_model(
            init, weights=weights, allow_nan=settings.allow_nan, mesh=mesh
        )

    # The hash of a model in 8 bits may need all processes, and then none may end before.
    waits = weights is not None
    params, config = load() if waits else group_of_mesh(mesh).run_in_all(load)
    # Refused rather than ignored: the run would not be the one that the settings describe.
    fixed = [name for name in changes if name not in _CHANGEABLE]
    if fixed:
        raise ValueError(
            f"`config.model.{fixed[0]}` is fixed by the checkpoint {init}; "
            "only dtype, remat, implementation and weights may be changed "
            "(configs/pretrain.py:checkpoint leaves the others out)."
        )
    return RWKV7(dataclasses.replace(config, **changes)), params


def load_frozen(
    settings: Settings, purpose: str, *, mesh: Mesh | None
) -> tuple[RWKV7, Params]:
    """Loads the model of `config.init` for a run that never changes its weights.

    Args:
        settings: of the run.
        purpose: of the model, which ends the message where no checkpoint is named.
        mesh: the devices that hold the weights; None for a single one.

    Raises:
        ValueError: no checkpoint is named.
    """
    if settings.init is None:
        raise ValueError(f"`config.init` must name the checkpoint {purpose}.")
    return load_or_init(settings, mesh)


def tokenizer_of(settings: Settings, config: RWKV7Config) -> Tokenizer:
    """Returns the vocabulary of a run: that of `config.data.vocabulary`, or of its checkpoint.

    Raises:
        ValueError: a vocabulary that does not fit the model, or none that is known to.
        ImportError: a package is missing that reads it.
    """
    return model_tokenizer(
        settings.init,
        config.vocab_size,
        settings.data.vocabulary,
        argument="`config.data.vocabulary`",
    )


def refuse_int8(changes: Mapping[str, Any], where: str) -> None:
    """Refuses `config.model.weights` where no weights are frozen.

    Args:
        changes: `config.model`.
        where: the end of the sentence.

    Raises:
        ValueError: it is there.
    """
    if changes.get(_WEIGHTS) is not None:
        raise ValueError(
            f"`config.model.weights` must be left out {where}; got {changes[_WEIGHTS]!r}."
        )


def new_model(sizes: Mapping[str, Any]) -> RWKV7:
    """Makes the shell of a new model.

    Raises:
        ValueError: a size is missing.
    """
    missing = [name for name in _SIZES if name not in sizes]
    if missing:
        raise ValueError(
            "`config.init` must name a checkpoint, or `config.model` the new sizes; it has no "
            f"{', '.join(missing)}."
        )
    return RWKV7(RWKV7Config(**sizes))


def init_weights(model: RWKV7, seed: int, mesh: Mesh | None = None) -> Params:
    """Makes new weights; on a mesh in their shards.

    Raises:
        ValueError: a mesh that does not divide the heads.
    """
    if mesh is not None:
        parts = mesh.shape.get(sharding.TENSOR, 1)
        sharding.check_shared_heads(model.config, parts, "`config.mesh`")
    return _initializer(model.config, mesh)(jax.random.key(seed))


# Kept: a run describes its weights before it makes them, and tracing takes as long as compiling.
@functools.lru_cache(maxsize=4)
def _initializer(config: RWKV7Config, mesh: Mesh | None) -> Callable[[Array], Params]:
    """Makes the program from a key to new weights; on a mesh in their shards."""

    # One program: without `jit`, Flax would run the model's forward pass op by op.
    @jax.jit
    def init(key):
        # One token is enough: no parameter's shape depends on the batch or the length.
        tokens = jnp.zeros((1, 1), jnp.int32)
        return RWKV7(config).init(key, tokens, init_state(config))["params"]

    if mesh is None:
        return init
    shards = sharding.shardings(mesh, jax.eval_shape(init, jax.random.key(0)))
    return jax.jit(init, out_shardings=shards)
