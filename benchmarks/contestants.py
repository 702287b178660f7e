"""The models of the recall table: BASED, attention, windows, RWKV-7 and its upscaled memories."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rwkv7_jax as rwkv
from benchmarks.mqar import TRAIN, Contestant, Setting, rows
from rwkv7_jax.based import (
    Based,
    BasedConfig,
    init_based_state,
    state_bytes,
)
from rwkv7_jax.model import Features
from rwkv7_jax.tuning.upscaling import empty_memory

# The width of the kernel of an upscaled memory's features; 2 learns later.
KERNEL_WIDTH = 0.5


class BasedContestant(Contestant):
    """Any order of the mixers of BASED, attention and windows included."""

    def __init__(self, setting: Setting, layers: tuple[str, ...], **sizes: Any):
        self.config = BasedConfig(
            vocab_size=setting.vocab_size,
            width=setting.width,
            layers=layers,
            mlp_width=2 * setting.width,
            **sizes,
        )

    def init(self, key):
        """Draws the parameters that are trained."""
        one = jnp.zeros((1, 1), jnp.int32)
        state = init_based_state(self.config)
        return Based(self.config).init(key, one, state)["params"]

    def start(self, params, batch):
        """Makes the state of rows that have read nothing."""
        return init_based_state(self.config, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return Based(self.config).apply({"params": params}, x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state after some tokens."""
        return state_bytes(self.config, tokens)


class RWKVContestant(Contestant):
    """RWKV-7 with any head size and number of layers.

    Attributes:
        model: the shell around the weights.
        size: features of a head of an upscaled memory that changes in context; 0 where none does.
    """

    size = 0

    def __init__(self, setting: Setting, head_size: int, num_layers: int):
        config = rwkv.RWKV7Config(
            vocab_size=setting.vocab_size,
            num_layers=num_layers,
            width=setting.width,
            head_size=head_size,
            ffn_width=2 * setting.width,
            decay_rank=16,
            icl_rank=16,
            value_rank=16,
            gate_rank=16 if setting.width < 64 else 64,
        )
        self.model = rwkv.RWKV7(config)

    @property
    def config(self) -> rwkv.RWKV7Config:
        """The model's sizes."""
        return self.model.config

    def init(self, key):
        """Draws the parameters that are trained."""
        one = jnp.zeros((1, 1), jnp.int32)
        # Compiled: the orthogonal draws of every matrix, one by one, would take seconds.
        init = jax.jit(
            lambda key: self.model.init(key, one, rwkv.init_state(self.config))
        )
        return init(key)["params"]

    def start(self, params, batch):
        """Makes the state of rows that have read nothing."""
        return rwkv.init_state(self.config, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return self.model.apply({"params": params}, x, state)

    def state_bytes(self, tokens):
        """Computes the bytes of one row's state; a memory's features are weights."""
        return state_bytes(self.config, tokens, memory_size=self.size)


class UpscaledContestant(RWKVContestant):
    """RWKV-7 of one layer with a memory that it writes in context, all of it trained from scratch.

    The memory is read through random Fourier features, whose frequencies and phases are trained as
    well. It starts empty.
    """

    def __init__(self, setting: Setting, head_size: int, size: int, dynamics: str):
        super().__init__(setting, head_size, num_layers=1)
        self.size = size
        self.dynamics = dynamics

    def init(self, key):
        """Draws the model, the features and the strength of writes."""
        frequency_key, phase_key, model_key = jax.random.split(key, 3)
        lead = (1, 1, self.config.num_heads)
        shape = (*lead, self.size, self.config.head_size)
        frequencies = jax.random.normal(frequency_key, shape, jnp.float32)
        return {
            "model": super().init(model_key),
            "frequencies": frequencies * math.sqrt(2 * KERNEL_WIDTH),
            "phases": jax.random.uniform(phase_key, shape[:-1], maxval=2 * math.pi),
            "write": jnp.ones(lead, jnp.float32),
        }

    def start(self, params, batch):
        """Makes the state of rows that have read nothing, with the features in it."""
        features = Features(
            landmarks=params["frequencies"],
            widths=params["phases"],
            mean=jnp.zeros_like(params["phases"]),
            map=None,
            kind="fourier",
        )
        memory = empty_memory(features, dynamics=self.dynamics)
        memory = memory.replace(write=params["write"])
        state = rwkv.init_state(self.config).replace(upscaled=memory)
        return rwkv.repeat(state, batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return super().run(params["model"], x, state)


class TunedContestant(RWKVContestant):
    """A frozen RWKV-7 of one layer; only its upscaled start state is trained.

    Its features are fitted to rows of the task. The memory starts empty, and the
    strength of its writes at 0.
    """

    def __init__(
        self, setting: Setting, head_size: int, size: int, dynamics: str, weights: Any
    ):
        super().__init__(setting, head_size, num_layers=1)
        # A static memory is weights as well.
        self.size = 0 if dynamics == "static" else size
        self.weights = weights
        shown, _ = rows(
            np.random.default_rng(TRAIN), 64, setting.train[-1], setting.vocab_size
        )
        state = rwkv.upscale(self.model, weights, shown, size=size, dynamics=dynamics)
        assert state.upscaled is not None
        self.state = state
        self.upscaled = state.upscaled

    def init(self, key):
        """Returns an empty memory and the strength of its writes, 0."""
        return {"memory": self.upscaled.memory, "write": self.upscaled.write}

    def start(self, params, batch):
        """Makes rows that all start from the tuned state."""
        upscaled = self.upscaled.replace(**params)
        return rwkv.repeat(self.state.replace(upscaled=upscaled), batch)

    def run(self, params, x, state):
        """Computes logits and the state after the last token."""
        return super().run(self.weights, x, state)


def contestant(
    name: str, setting: Setting, *, context: int | None = None
) -> Contestant:
    """Makes a model of the table from its name.

    attention, window-W, based-d and hybrid-d-W begin with a convolution; rwkv-N-L1 has heads of N
    and one layer; delta-N-M and decay-N-M have a memory of M features as well.

    Args:
        name: of the model.
        setting: the sizes that all models share.
        context: tokens for which full attention has room; None for the longest test.

    Raises:
        ValueError: no such name.
    """
    kind, *numbers = name.replace("-L", "-").split("-")
    if not all(number.isdigit() for number in numbers):
        raise ValueError(f"contestant: `name` must end with numbers; got {name!r}.")
    sizes = [int(number) for number in numbers]
    if context is None:
        context = max(size.tokens for size in setting.tests)
    conv = functools.partial(BasedContestant, setting, context=context)
    match kind, sizes:
        case "attention", []:
            return conv(layers=("conv", "attention"))
        case "window", [window]:
            return conv(layers=("conv", "window"), window=window)
        case "based", [size]:
            return conv(layers=("conv", "linear"), feature_size=size)
        case "hybrid", [size, window]:
            layers = ("conv", "linear", "window")
            return conv(layers=layers, feature_size=size, window=window)
        case "rwkv", [head_size, num_layers]:
            return RWKVContestant(setting, head_size, num_layers)
        case "delta" | "decay", [head_size, size]:
            return UpscaledContestant(setting, head_size, size, kind)
    raise ValueError(f"contestant: `name` must be one of the table's; got {name!r}.")
