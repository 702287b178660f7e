"""BASED as a thin Linen shell: convolutions, linear attention and windows in any order.

Each layer computes x + mixer(norm(x)) and then, with an MLP, x + MLP(norm(x)).
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Heads, Lengths, Logits, Tokens
from rwkv7_jax.based import mixers
from rwkv7_jax.based.config import BasedConfig
from rwkv7_jax.based.state import BasedState, Memory, check_based_state
from rwkv7_jax.based.taylor import linear_attention
from rwkv7_jax.checks import (
    as_array,
    check_instance,
    check_tokens,
    prefix_errors,
)
from rwkv7_jax.model import inputs, products
from rwkv7_jax.model.casts import per_channel, wide_dtype
from rwkv7_jax.model.weights import Draw, get_weight

# float32 under x64 too.
_EMBEDDING = nn.initializers.normal(0.02, jnp.float32)
_ZEROS = nn.initializers.constant(0.0, jnp.float32)
_ONES = nn.initializers.constant(1.0, jnp.float32)


def _square_root_of_inputs(key: Array, shape: tuple[int, int]) -> Array:
    """Draws a matrix [out, in] that preserves the variance of its input."""
    return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[1])


def _taps(key: Array, shape: tuple[int, int]) -> Array:
    limit = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, jnp.float32, minval=-limit, maxval=limit)


def _weight(module: nn.Module, name: str, draw: Draw, shape: tuple[int, ...]) -> Array:
    """Returns a module's weight as a JAX array; the caller may have passed a NumPy one."""
    return jnp.asarray(get_weight(module, name, draw, shape))


class Based(nn.Module):
    """The model: `apply({"params": params}, tokens, state) -> (logits, state)`.

    It is called like `RWKV7`: nothing is mutable, and the memory is an argument and a result.
    """

    config: BasedConfig

    def __post_init__(self):
        """Checks the config: a dict would fail only inside `apply`."""
        with prefix_errors("Based"):
            check_instance(self.config, BasedConfig, "`config`")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, tokens: Tokens, state: BasedState, lengths: Lengths | None = None
    ) -> tuple[Logits, BasedState]:
        """Computes the next-token logits at every position and the state after the last token.

        Args:
            tokens: ids below `config.vocab_size`; T may be 0. Traced ids are not checked: ids out
                of range are embedded as zeros.
            state: the start state, with one row for each row of `tokens`.
            lengths: the number of real tokens of each row; padding is on the right. The logits of
                padding are meaningless, and the returned state is the one after the last real
                token.

        Raises:
            ValueError: ids or lengths out of range, or a state or weights of other sizes.
            TypeError: ids that are not integers, or a state of other dtypes.
        """
        config = self.config
        with prefix_errors("Based"):
            tokens = as_array(tokens, "`tokens`")
            if len(tokens.shape) != 2:
                raise ValueError(
                    f"`tokens` must have shape [B T]; got {tuple(tokens.shape)}."
                )
            check_tokens(tokens, config.vocab_size)
            check_based_state(state, tokens.shape[0], config)
            if lengths is not None:
                lengths = inputs.safe_lengths(lengths, tokens.shape)

        table = (config.vocab_size, config.width)
        emb = _weight(self, "emb", _EMBEDDING, table)
        x = inputs.embed(tokens, emb).astype(config.dtype)
        memories = []
        for index, memory in enumerate(state.layers):
            layer = _Layer(config, config.layers[index], name=f"layer_{index}")
            x, memory = layer(x, memory, lengths)
            memories.append(memory)
        x = _Norm(config, name="norm")(x)
        head = _weight(self, "head", _square_root_of_inputs, table)
        logits = jnp.einsum(
            "btd,vd->btv",
            x,
            head.astype(x.dtype),
            precision=products.precision(x.dtype),
            preferred_element_type=wide_dtype(x.dtype),
        )
        return logits, BasedState(tuple(memories))


class _Norm(nn.Module):
    """A root mean square norm with a weight."""

    config: BasedConfig

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Applies the norm."""
        weight = _weight(self, "weight", _ONES, (self.config.width,))
        return mixers.root_mean_square_norm(x, weight, self.config.norm_eps)


class _Layer(nn.Module):
    """One mixer of any kind, and the MLP after it."""

    config: BasedConfig
    kind: str

    @nn.compact
    def __call__(
        self, x: Activations, memory: Memory, lengths
    ) -> tuple[Activations, Memory]:
        """Computes the new residual stream and the new memory."""
        normed = _Norm(self.config, name="mixer_norm")(x)
        mixer = _MIXERS[self.kind](self.config, name="mixer")
        y, memory = mixer(normed, memory, lengths)
        x = x + y
        if self.config.mlp_width is not None:
            normed = _Norm(self.config, name="mlp_norm")(x)
            x = x + _MLP(self.config, name="mlp")(normed)
        return x, memory


class _Mixer(nn.Module):
    """The base class of mixers, with projections without bias and heads."""

    config: BasedConfig

    def project(
        self, x: Float[Array, "B T I"], name: str, width: int
    ) -> Float[Array, "B T O"]:
        """Computes x W^T with a new matrix."""
        shape = (width, x.shape[-1])
        weight = _weight(self, name, _square_root_of_inputs, shape)
        return products.linear(x, weight)

    def heads(self, x: Activations, name: str, size: int) -> Heads:
        """Projects to `size` channels per head."""
        count = self.config.num_heads
        x = self.project(x, name, count * size)
        return x.reshape(*x.shape[:2], count, size)

    def joined(self, y: Heads) -> Activations:
        """Joins the heads and projects them."""
        width = self.config.width
        return self.project(y.reshape(*y.shape[:2], width), "output", width)


class _Convolution(_Mixer):
    """The gated short convolution: conv(x) (W x + b) + x."""

    @nn.compact
    def __call__(self, x, memory, lengths):
        """Computes the contribution to the residual stream, and the new memory."""
        width = self.config.width
        taps = _weight(self, "taps", _taps, (self.config.kernel_size, width))
        shift = _weight(self, "shift", _ZEROS, (width,))
        bias = _weight(self, "gate_bias", _ZEROS, (width,))
        mixed, memory = mixers.short_convolution(x, taps, shift, memory, lengths)
        gate = self.project(x, "gate", width) + per_channel(bias, x)
        return mixed * gate + x, memory


class _LinearAttention(_Mixer):
    """Attention over all tokens, through Taylor features."""

    @nn.compact
    def __call__(self, x, memory, lengths):
        """Computes the contribution to the residual stream, and the new memory."""
        q = self.heads(x, "query", self.config.feature_size)
        k = self.heads(x, "key", self.config.feature_size)
        v = self.heads(x, "value", self.config.head_size)
        y, sums = linear_attention(q, k, v, memory.sums, lengths=lengths)
        return self.joined(y), memory._replace(sums=sums)


class _WindowAttention(_Mixer):
    """Softmax attention over the last tokens, as many as the memory has slots."""

    @nn.compact
    def __call__(self, x, memory, lengths):
        """Computes the contribution to the residual stream, and the new memory."""
        size = self.config.head_size
        q = self.heads(x, "query", size)
        k = self.heads(x, "key", size)
        v = self.heads(x, "value", size)
        y, memory = mixers.window_attention(q, k, v, memory, lengths)
        return self.joined(y), memory


_MIXERS: dict[str, type[_Mixer]] = {
    "conv": _Convolution,
    "linear": _LinearAttention,
    "window": _WindowAttention,
    "attention": _WindowAttention,
}


class _MLP(_Mixer):
    """The feed-forward half of a layer: squared ReLU, as in RWKV-7's channel mix."""

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        """Computes the contribution to the residual stream."""
        config = self.config
        assert config.mlp_width is not None
        hidden = jnp.square(jax.nn.relu(self.project(x, "up", config.mlp_width)))
        # Starts from zeros: the MLP of a new layer adds nothing.
        shape = (config.width, config.mlp_width)
        down = _weight(self, "down", _ZEROS, shape)
        return products.linear(hidden, down)
