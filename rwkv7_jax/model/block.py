"""One block of RWKV-7: time mix and channel mix, line by line with the paper's equations.

The equations in the comments are the paper's, with the names of its symbols written out. Parameter
names are those of the official checkpoints, and matrices keep their orientation: `.weight` is
[out, in] and acts as x W^T; w1, a1, v1, g1 are [D, R], w2, a2, v2, g2 are [R, D], and act as x w1.

Source: arXiv 2503.14456, section 4; BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_demo.py:260-372.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import WKVInputs
from rwkv7_jax.array_types import Activations, Heads
from rwkv7_jax.model import initializers as initial
from rwkv7_jax.model import norms, pointwise, products, token_shift
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.layer_states import LayerMemories
from rwkv7_jax.model.recurrence import recurrence
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.model.weights import get_weight
from rwkv7_jax.sharding import sum_over_heads

# The vectors of the recurrence, which `method="trace"` returns for every block.
RECURRENCE = (*WKVInputs._fields, "icl_rate")

# The inputs of the projections.
PROJECTION_INPUTS = (
    "receptance_input",
    "key_input",
    "value_input",
    "output_input",
    "ffn_key_input",
    "ffn_hidden",
)

TRACE = (*RECURRENCE, "y", "gate", "residual", "ffn_input", *PROJECTION_INPUTS)

# The arrays whose axis after the tokens is split over the `tensor` axis of a mesh, like heads.
BY_HEADS = frozenset((*RECURRENCE, "y", "gate", "output_input", "ffn_hidden"))

# The parameters of the token shift, and the powers in their initial values.
_SHIFTS = {"x_r": 0.2, "x_w": 0.9, "x_k": 0.7, "x_v": 0.7, "x_a": 0.9, "x_g": 0.2}


def _identity(x: Array) -> Array:
    return x


# For each low-rank map, the activation between its two matrices and its bias.
_ACTIVATIONS = {"w": jnp.tanh, "a": _identity, "g": jax.nn.sigmoid, "v": _identity}
_BIASES = {
    "w": initial.decay_bias,
    "a": initial.icl_bias,
    "v": initial.value_bias,
}


# Linen derives a parameter's random key from the number of draws before it in the same module, so
# changing the order of these calls changes the weights of a new model.
def _weight(
    module: Any, name: str, draw: initial.Initial, shape: tuple[int, ...], layer=0
) -> Any:
    """Returns a weight, or this device's part of it under tensor parallelism."""
    return get_weight(module, name, draw, shape, layer, module.config)


class Norm(nn.Module):
    """A layer norm with weight and bias."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Applies the layer norm."""
        channels = (self.config.width,)
        scale = _weight(self, "weight", initial.constant(1.0), channels)
        bias = _weight(self, "bias", initial.constant(0.0), channels)
        return norms.layer_norm(x, scale, bias, self.config.norm_eps)


class Linear(nn.Module):
    """A projection without bias."""

    config: RWKV7Config
    shape: tuple[int, int]
    initial: initial.Initial

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Computes x W^T."""
        matrix = _weight(self, "weight", self.initial, self.shape)
        return products.linear(x, matrix)


class HeadNorm(nn.Module):
    """The weight and bias of the norm of each head after the recurrence."""

    config: RWKV7Config

    @nn.compact
    def __call__(self, layer) -> tuple[Array, Array]:
        """Returns both for all channels."""
        channels = (self.config.width,)
        scale = _weight(self, "weight", initial.group_norm_weight, channels, layer)
        bias = _weight(self, "bias", initial.constant(0.0), channels, layer)
        return jnp.asarray(scale), jnp.asarray(bias)


class _Vectors(NamedTuple):
    """The vectors that a time mix computes from its input, before the recurrence.

    Attributes:
        inputs: of the WKV op.
        icl_rate: the in-context learning rate.
        gate: g, all channels.
        v_first: the first layer's values.
        shifted: the inputs of the projections to r, k and v, by their names in the trace.
    """

    inputs: WKVInputs
    icl_rate: Heads
    gate: Activations
    v_first: Activations
    shifted: dict[str, Activations]


class TimeMix(nn.Module):
    """The attention half of a block: token shift, projections, recurrence, norm, bonus, gate.

    `layer` is the block's index, on which the initial values depend. It is traced inside the scan,
    so it is an argument instead of a field. `state` is one layer's, without the axis L.
    """

    config: RWKV7Config
    first: bool

    @nn.compact
    def __call__(
        self,
        x: Activations,
        state: RWKV7State,
        v_first,
        *,
        lengths,
        segments,
        layer,
    ):
        """Computes the contribution to the residual stream.

        Returns:
            The contribution; the new shift, WKV state and upscaled memory; the first layer's
            values; the trace.
        """
        vectors = self._vectors(x, state.att_shift, v_first, segments, layer)

        # S_t = S_{t-1} (diag(w) - kappa^^T (a * kappa^)) + v^T k~,  y = r S_t^T
        y, wkv, memory = recurrence(
            vectors.inputs,
            vectors.icl_rate,
            state.wkv,
            state.upscaled,
            implementation=self.config.implementation,
            lengths=lengths,
            segments=segments,
        )

        # o = (g * p) W_o, with p = norm(y) + bonus
        gated = self._read_out(y, vectors.inputs, vectors.gate, layer)
        # Starts from zeros: a new block adds nothing to the residual stream.
        out = sum_over_heads(self._square("output", 0.0)(gated))

        # The last real token of each row instead of the last column: padding is on the right.
        att_shift = token_shift.last_token(x, state.att_shift, lengths, segments)
        trace = {
            **vectors.inputs._asdict(),
            **vectors.shifted,
            "icl_rate": vectors.icl_rate,
            "y": y,
            "gate": vectors.gate,
            "output_input": gated,
        }
        return out, (att_shift, wkv, memory), vectors.v_first, trace

    def _vectors(
        self,
        x: Activations,
        before: Float[Array, "S D"],
        v_first,
        segments,
        layer,
    ) -> _Vectors:
        """Computes the vectors of every token; `before` is the token before the first one."""
        config = self.config
        channels = (config.width,)

        # Token shift: x_c = lerp(x_t, x_{t-1}, mu_c), with one mu for each of r, w, k, v, a, g.
        coefficients = []
        for name, power in _SHIFTS.items():
            lerp = initial.lerp(power)
            coefficients.append(_weight(self, name, lerp, channels, layer))
        x_r, x_w, x_k, x_v, x_a, x_g = token_shift.mix_with_previous(
            x, before, tuple(coefficients), segments
        )

        # r = x_r W_r,  k = x_k W_k,  v = x_v W_v
        # [B T D] each; split into heads only where the recurrence needs them.
        r = self._square("receptance", 1.0)(x_r)
        k = self._square("key", 0.1)(x_k)
        v = self._square("value", 1.0)(x_v)

        # d, a, g, nu before their biases: loramlp_c(f, x) = f(x W_c1) W_c2
        inputs_of_ranks = {"w": x_w, "a": x_a, "g": x_g}
        if not self.first:
            inputs_of_ranks["v"] = x_v
        raw, bias = self._low_ranks(inputs_of_ranks, layer)

        # log w = -exp(-1/2) sigmoid(d)
        log_w = pointwise.log_decay(raw["w"], bias["w"])

        # v = lerp(v, v of layer 0, sigmoid(nu)): the value residual
        if self.first:
            v_first = v
        else:
            v = pointwise.mix_values(v, v_first, raw["v"], bias["v"])

        # kappa^ = (k * xi) / |k * xi| for each head,  k~ = k * lerp(1, sigmoid(a), alpha)
        xi = _weight(self, "k_k", initial.removal_scale, channels, layer)
        xi = xi.reshape(-1, config.head_size)
        alpha = _weight(self, "k_a", initial.constant(1.02), channels, layer)
        k, a, b, icl_rate = pointwise.removal_and_replacement(
            k, raw["a"], bias["a"], xi, alpha
        )

        inputs = WKVInputs(
            r=self._heads(r),
            log_w=self._heads(log_w),
            k=k,
            v=self._heads(v),
            a=a,
            b=b,
        )
        shifted = {"receptance_input": x_r, "key_input": x_k, "value_input": x_v}
        return _Vectors(inputs, icl_rate, raw["g"], v_first, shifted)

    def _square(self, name: str, gain: float) -> Linear:
        """Makes a D x D projection; with a gain of 0 it starts from zeros."""
        width = self.config.width
        draw = initial.orthogonal(gain) if gain else initial.constant(0.0)
        return Linear(self.config, (width, width), draw, name=name)

    def _low_ranks(
        self, inputs: dict[str, Activations], layer
    ) -> tuple[dict[str, Float[Array, "B T _"]], dict[str, Array]]:
        """Computes activation(x w1) w2 for each letter, of all channels or of the device's heads.

        Returns:
            The results by letter, in x's dtype; the biases to add, of which "g" has none.
        """
        config = self.config
        ranks = {
            "w": config.decay_rank,
            "a": config.icl_rank,
            "g": config.gate_rank,
            "v": config.value_rank,
        }
        width = config.width
        ups = []
        biases = {}
        hidden = []
        for letter, x in inputs.items():
            rank = ranks[letter]
            # Zeros here but not in `up`: if both were zero, neither would get a gradient.
            draw = initial.constant(0.0)
            down = _weight(self, f"{letter}1", draw, (width, rank), layer)
            draw = initial.low_rank_out
            up = _weight(self, f"{letter}2", draw, (rank, width), layer)
            ups.append(up)
            if letter in _BIASES:
                draw = _BIASES[letter]
                biases[letter] = _weight(self, f"{letter}0", draw, (width,), layer)
            hidden.append(_ACTIVATIONS[letter](products.project(x, down)))
        hidden = products.share_buffer_of_one_token(hidden)
        raw = {}
        for letter, one, up in zip(inputs, hidden, ups, strict=True):
            raw[letter] = products.project(one, up)
        return raw, biases

    def _read_out(
        self, y: Heads, inputs: WKVInputs, gate: Activations, layer
    ) -> Activations:
        """Computes g * p, with p = norm(y) + bonus."""
        sizes = (self.config.num_heads, self.config.head_size)
        rho = _weight(self, "r_k", initial.constant(-0.04), sizes, layer)
        norm = HeadNorm(self.config, name="ln_x")(layer)
        r_k_v = (inputs.r, inputs.k, inputs.v)
        return pointwise.read_out(y, r_k_v, gate, rho, norm, self.config.group_norm_eps)

    def _heads(self, x: Activations) -> Heads:
        # `reshape` cannot infer the heads: there may be no tokens.
        heads = x.shape[2] // self.config.head_size
        return x.reshape(*x.shape[:2], heads, self.config.head_size)


class ChannelMix(nn.Module):
    """The feed-forward half of a block: token shift, squared ReLU."""

    config: RWKV7Config

    @nn.compact
    def __call__(
        self,
        x: Activations,
        shift,
        *,
        lengths,
        segments,
        layer,
    ):
        """Computes the contribution to the residual stream, the new shift and the trace."""
        width = self.config.width
        hidden_width = self.config.ffn_width
        x_k = _weight(self, "x_k", initial.ffn_lerp, (width,), layer)
        (mixed,) = token_shift.mix_with_previous(x, shift, (x_k,), segments)
        into = (hidden_width, width)
        grow = Linear(self.config, into, initial.orthogonal(1.0), name="key")
        out_of = (width, hidden_width)
        shrink = Linear(self.config, out_of, initial.constant(0.0), name="value")
        # o = relu(x_k W_k)^2 W_v
        hidden = pointwise.squared_relu(grow(mixed))
        trace = {"ffn_key_input": mixed, "ffn_hidden": hidden}
        out = sum_over_heads(shrink(hidden))
        return out, token_shift.last_token(x, shift, lengths, segments), trace


class Block(nn.Module):
    """One layer. The first one has no value residual: it makes the values that the others add."""

    config: RWKV7Config
    first: bool
    names: tuple[str, ...]

    @nn.compact
    def __call__(
        self,
        x: Activations,
        state: RWKV7State,
        layer,
        v_first,
        lengths,
        segments=None,
    ):
        """Computes the new residual stream.

        Returns:
            The residual stream; then the layer's memories, the first layer's values (only from the
            first layer), and the arrays `names` of the trace.
        """
        att_input = Norm(self.config, name="ln1")(x)
        time_mix = TimeMix(self.config, self.first, name="att")
        att, (att_shift, wkv, memory), v_first, att_trace = time_mix(
            att_input,
            state,
            v_first,
            lengths=lengths,
            segments=segments,
            layer=layer,
        )

        ffn_input = Norm(self.config, name="ln2")(x + att)
        channel_mix = ChannelMix(self.config, name="ffn")
        ffn, ffn_shift, ffn_trace = channel_mix(
            ffn_input,
            state.ffn_shift,
            lengths=lengths,
            segments=segments,
            layer=layer,
        )

        trace = {**att_trace, **ffn_trace, "residual": x, "ffn_input": ffn_input}
        # The scan stacks every returned array over layers, so return no others.
        trace = {name: trace[name] for name in self.names}
        memories = LayerMemories(
            att_shift=att_shift,
            wkv=wkv,
            ffn_shift=ffn_shift,
            memory=memory,
        )
        return x + att + ffn, (memories, v_first if self.first else (), trace)
