"""RWKV-7 as a thin Linen shell: declare parameters, call pure functions, return.

Parameter paths are the official checkpoint names and matrices keep their official orientation:
`.weight` is [out, in] and acts as x W^T; w1, a1, v1, g1 are [D, R] and w2, ... [R, D], acting
as x w1.

Source of the equations: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_demo.py:260-372.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rwkv7_jax.array_types import Activations, Lengths, Logits, Tokens
from rwkv7_jax.checks import check_tokens, prefix_errors
from rwkv7_jax.model import initializers as initial
from rwkv7_jax.model import layers
from rwkv7_jax.model import recurrence as upscaling
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.state import RWKV7State, check_state

# What `method="trace"` hands out of every block, stacked over layers.
RECURRENCE = ("r", "log_w", "k", "v", "a", "b", "icl_rate")

# The last six are what the projections act on.
TRACE = (*RECURRENCE, "y", "gate", "residual", "ffn_input")

TRACE += ("receptance_input", "key_input", "value_input", "output_input")

TRACE += "ffn_key_input", "ffn_hidden"


class Norm(nn.Module):
    """A layer norm's weight and bias."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Layer norm."""
        width = self.config.width
        weight = self.param("weight", initial.constant(1.0, width), 0, self.config)
        bias = self.param("bias", initial.constant(0.0, width), 0, self.config)
        return layers.layer_norm(x, weight, bias, self.config.norm_eps)


class Linear(nn.Module):
    """A projection without bias."""

    config: RWKV7Config
    initial: initial.Initial

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """x W^T."""
        return layers.linear(x, self.param("weight", self.initial, 0, self.config))


class HeadNorm(nn.Module):
    """The per-head norm behind the recurrence."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, y: Float[Array, "B T H N"], layer) -> Float[Array, "B T H N"]:
        """Group norm with one group a head."""
        zeros = initial.constant(0.0, self.config.width)
        weight = self.param("weight", initial.group_norm_weight, layer, self.config)
        bias = self.param("bias", zeros, layer, self.config)
        return layers.group_norm(y, weight, bias, self.config.group_norm_eps)


class TimeMix(nn.Module):
    """Attention's place: token shift, projections, the recurrence, norm, bonus, gate."""

    config: RWKV7Config
    first: bool

    def _weight(self, name: str, draw: initial.Initial, layer) -> Array:
        return self.param(name, draw, layer, self.config)

    def _low_rank(self, x: Activations, letter: str, rank: int, activation, layer) -> Activations:
        """x w1 -> activation -> w2, in x's dtype."""
        width = self.config.width
        down = self._weight(f"{letter}1", initial.constant(0.0, width, rank), layer)
        up = self._weight(f"{letter}2", initial.low_rank_out(rank, width), layer)
        return layers.project(activation(layers.project(x, down)), up)

    def _logit(self, x: Activations, letter: str, rank: int, activation, *, bias, layer):
        """A low-rank map plus its bias, float32."""
        raw = self._low_rank(x, letter, rank, activation, layer).astype(jnp.float32)
        return raw + layers.per_channel(self._weight(f"{letter}0", bias, layer), raw)

    def _square(self, name: str, gain: float) -> Linear:
        square = self.config.width, self.config.width
        draw = initial.orthogonal(gain, *square) if gain else initial.constant(0.0, *square)
        return Linear(self.config, draw, name=name)

    @nn.compact
    def __call__(self, x: Activations, state: RWKV7State, v_first, *, lengths, layer):
        """The block's contribution, its new shift, WKV state and memory, v_first and the trace."""
        config, same = self.config, lambda u: u
        mixed = layers.previous_tokens(x, state.att_shift)
        powers = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
        x_r, x_w, x_k, x_v, x_a, x_g = (
            layers.lerp(x, mixed, self._weight(f"x_{name}", initial.lerp(power), layer))
            for name, power in powers.items()
        )
        r, k = self._square("receptance", 1.0)(x_r), self._square("key", 0.1)(x_k)
        v = self._square("value", 1.0)(x_v)
        z = self._logit(x_w, "w", config.decay_rank, jnp.tanh, bias=initial.decay_bias, layer=layer)
        rate = self._logit(x_a, "a", config.icl_rank, same, bias=initial.icl_bias, layer=layer)
        rate = jax.nn.sigmoid(rate).astype(x.dtype)
        gate = self._low_rank(x_g, "g", config.gate_rank, jax.nn.sigmoid, layer)
        if self.first:
            v_first = v
        v = self._mix_values(x_v, v, v_first, layer)
        k_k = layers.per_channel(self._weight("k_k", initial.removal_scale, layer), x)
        k_a = self._weight("k_a", initial.constant(1.02, config.width), layer)
        k_a = layers.per_channel(k_a, x)
        removal_key = layers.unit_heads(self._heads(k * k_k))  # uses k before the next line
        k = k * (1 + (rate - 1) * k_a)
        r, log_w, k, v, rate = map(self._heads, (r, layers.log_decay(z), k, v, rate))
        a, b = -removal_key, removal_key * rate
        trace = {"r": r, "log_w": log_w, "k": k, "v": v, "a": a, "b": b, "icl_rate": rate}
        y, *memories = upscaling.recurrence(
            trace,
            state.wkv,
            state.upscaled,
            implementation=config.implementation,
            lengths=lengths,
        )

        read = self._read_out(y, r, k, v, layer=layer) * gate
        inputs = {"receptance_input": x_r, "key_input": x_k, "value_input": x_v}
        trace |= inputs | {"output_input": read, "y": y, "gate": gate}
        shift = layers.last_token(x, state.att_shift, lengths)
        return self._square("output", 0.0)(read), (shift, *memories), v_first, trace

    def _mix_values(self, x_v: Activations, v, v_first, layer) -> Activations:
        """Values drawn towards layer 0's; layer 0 keeps its own."""
        if self.first:
            return v
        rank, bias = self.config.value_rank, initial.value_bias
        mix = self._logit(x_v, "v", rank, lambda u: u, bias=bias, layer=layer)
        return v + (v_first - v) * jax.nn.sigmoid(mix).astype(v.dtype)

    def _read_out(self, y, r, k, v, *, layer) -> Activations:
        """What was read, normed per head, plus the bonus of the current token."""
        sizes = (self.config.num_heads, self.config.head_size)
        r_k = self._weight("r_k", initial.constant(-0.04, *sizes), layer)
        out = HeadNorm(self.config, name="ln_x")(y, layer)
        bonus = jnp.sum(r * k * layers.per_channel(r_k, r), axis=-1, keepdims=True) * v
        return (out + bonus).reshape(*y.shape[:2], self.config.width)

    def _heads(self, x: Activations) -> Float[Array, "B T H N"]:
        return x.reshape(*x.shape[:2], self.config.num_heads, self.config.head_size)


class ChannelMix(nn.Module):
    """The feed-forward half: token shift, squared relu."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x: Activations, shift, *, lengths, layer):
        """The block's contribution, its new shift and the trace."""
        width, hidden_width = self.config.width, self.config.ffn_width
        x_k = self.param("x_k", initial.ffn_lerp, layer, self.config)
        mixed = layers.lerp(x, layers.previous_tokens(x, shift), x_k)
        grow = Linear(self.config, initial.orthogonal(1.0, hidden_width, width), name="key")
        shrink = Linear(self.config, initial.constant(0.0, width, hidden_width), name="value")
        hidden = jnp.square(jax.nn.relu(grow(mixed)))
        trace = {"ffn_key_input": mixed, "ffn_hidden": hidden}
        return shrink(hidden), layers.last_token(x, shift, lengths), trace


class Block(nn.Module):
    """One layer. The first has no value residual: it makes the values that the others mix in."""

    config: RWKV7Config
    first: bool
    names: tuple[str, ...]

    @nn.compact
    def __call__(self, x: Activations, state: RWKV7State, layer, v_first, lengths):
        """The new residual stream; the layer's memories, layer 0's values and the named arrays."""
        att, (att_shift, wkv, memory), v_first, trace = TimeMix(
            self.config, self.first, name="att"
        )(Norm(self.config, name="ln1")(x), state, v_first, lengths=lengths, layer=layer)
        ffn_input = Norm(self.config, name="ln2")(x + att)
        ffn, ffn_shift, more = ChannelMix(self.config, name="ffn")(
            ffn_input, state.ffn_shift, lengths=lengths, layer=layer
        )
        trace |= more | {"residual": x, "ffn_input": ffn_input}
        kept = {name: trace[name] for name in self.names}
        end = (att_shift, wkv, ffn_shift, memory)
        return x + att + ffn, (end, v_first if self.first else (), kept)


class RWKV7(nn.Module):
    """The model: `apply({"params": params}, tokens, state) -> (logits, state)`.

    Nothing is mutable: memory goes in and comes back as an `RWKV7State`. Activations have
    `config.dtype`; logits and the WKV state are float32.
    """

    config: RWKV7Config

    def __call__(
        self, tokens: Tokens, state: RWKV7State, lengths: Lengths | None = None
    ) -> tuple[Logits, RWKV7State]:
        """Next-token logits at every position, and the state behind the last token.

        Args:
            tokens: ids below `config.vocab_size`; T may be 0. Concrete ids are checked here, traced
                ones cannot be: JAX clamps those that are out of range.
            state: one row per row of `tokens`.
            lengths: tokens of each row that count, from the left; a row's logits behind its length
                mean nothing, its state is the one at its length.

        Raises:
            ValueError: ids out of range, or a state of another batch or model.
            TypeError: ids that are no integers, or a WKV state that is not float32.
        """
        logits, state, _ = self._run(tokens, state, lengths)
        return logits, state

    def hidden(
        self, tokens: Tokens, state: RWKV7State, lengths: Lengths | None = None
    ) -> tuple[Activations, RWKV7State]:
        """As the call, stopped before the head: the normed activations that logits are made of."""
        x, state, _ = self._run(tokens, state, lengths, project=False)
        return x, state

    def trace(
        self, tokens: Tokens, state: RWKV7State, lengths: Lengths | None = None
    ) -> tuple[Logits, RWKV7State, dict[str, Array]]:
        """As the call, and the arrays named in `TRACE`, each stacked over layers: [L B T ...]."""
        return self._run(tokens, state, lengths, names=TRACE)

    @nn.compact
    def _run(self, tokens, state, lengths, *, names=(), project=True):
        config = self.config
        with prefix_errors("RWKV7"):
            check_tokens(tokens, config.vocab_size)
            check_state(state, tokens.shape[0], config)
        emb = Embedding(config, name="emb")(tokens).astype(config.dtype)
        x = Norm(config, name="ln0")(emb)

        block = nn.remat(Block, prevent_cse=False) if config.remat == "block" else Block
        first = jax.tree.map(lambda leaf: leaf[0], state)
        x, (end, v_first, trace) = block(config, True, names, name="layer_0")(
            x, first, 0, None, lengths
        )
        end, trace = jax.tree.map(lambda leaf: leaf[None], (end, trace))
        if config.num_layers > 1:
            # v_first is closed over, not carried: a carry would be saved once per layer.
            stacked = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, 0, nn.broadcast, nn.broadcast),
                length=config.num_layers - 1,
            )
            rest = jax.tree.map(lambda leaf: leaf[1:], state)
            index = jnp.arange(1, config.num_layers)
            x, (rest, _, more) = stacked(config, False, names, name="layers")(
                x, rest, index, v_first, lengths
            )
            end, trace = jax.tree.map(
                lambda head, tail: jnp.concatenate([head, tail]), (end, trace), (rest, more)
            )
        x = Norm(config, name="ln_out")(x)
        if project:
            x = Head(config, name="head")(x)
        att_shift, wkv, ffn_shift, memory = end
        upscaled = state.upscaled
        if upscaled is not None and upscaled.dynamics != "static":
            upscaled = upscaled.replace(memory=memory)
        end = RWKV7State(att_shift=att_shift, wkv=wkv, ffn_shift=ffn_shift, upscaled=upscaled)
        return x, end, trace


class Embedding(nn.Module):
    """The table of token vectors."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, tokens: Tokens) -> Activations:
        """Rows of the table."""
        shape = (self.config.vocab_size, self.config.width)
        return self.param("weight", initial.uniform(1e-4, *shape), 0, self.config)[tokens]


class Head(nn.Module):
    """The output projection."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x: Activations) -> Logits:
        """Float32 logits."""
        shape = (self.config.vocab_size, self.config.width)
        return layers.head_logits(x, self.param("weight", initial.head(*shape), 0, self.config))
