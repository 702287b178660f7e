"""An observer: a small RWKV-7 that proposes start states of a large, frozen one.

The large model is the teacher. The observer reads a prompt in its place. The observer's WKV states
S_j after the prompt, of every layer and head, are mapped to a start state of the teacher:

    proposal[l, h] = sum over j of left[l, h, j] S_j right[l, h, j]^T + bias[l, h]

Its parameters are one tree: "model" (the small RWKV-7's), "left" [L H J Nv n], "right"
[L H J Nk n] and "bias" [L H Nv Nk]. L, H, N are the teacher's. J is the number of the observer's
heads in all layers, layer by layer, and n is their size.

The small model remains a language model: `observer.model.apply({"params": params["model"]}, ...)`
gives its logits. If it is trained with the divergence term, it can draft for the teacher.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from rwkv7_jax.array_types import Activations, Lengths, Params, Tokens
from rwkv7_jax.checks import (
    as_array,
    check_instance,
    check_key,
    check_lengths,
    check_not_intercepted,
    check_params,
    check_placed,
    check_runnable,
    check_tokens,
    prefix_errors,
)
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.rwkv7 import RWKV7
from rwkv7_jax.model.state import RWKV7State, init_state

WKV = Float[Array, "L B H Nv Nk"]

# The sizes that determine whether an observer can propose states for a teacher.
SIZES = ("vocab_size", "num_layers", "width", "head_size")


@dataclasses.dataclass(frozen=True)
class Observer:
    """The shells of both models; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        model: the shell of the small model.
        teacher: sizes of the model whose states are proposed.

    Raises:
        TypeError: not a model and a config.
        ValueError: the vocabularies differ.
    """

    model: RWKV7
    teacher: RWKV7Config

    def __post_init__(self):
        """Checks that both read the same tokens."""
        with prefix_errors("Observer"):
            check_instance(self.model, RWKV7, "`model`")
            check_instance(self.teacher, RWKV7Config, "`teacher`")
            own = self.model.config.vocab_size
            other = self.teacher.vocab_size
            if own != other:
                raise ValueError(
                    f"`model` must have the teacher's vocab_size {other}; got {own}."
                )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of left, right and bias."""
        config = self.model.config
        teacher = self.teacher
        heads = (teacher.num_layers, teacher.num_heads)
        # J of the module's equation: the observer's heads in all layers.
        sources = config.num_layers * config.num_heads
        maps = (*heads, sources, teacher.head_size, config.head_size)
        return {
            "left": maps,
            "right": maps,
            "bias": (*heads, teacher.head_size, teacher.head_size),
        }


class Moments(NamedTuple):
    """Statistics of a teacher's WKV states over rows.

    Attributes:
        mean: the bias that a new observer should start from.
        variance: of each layer and head, averaged over the state's entries.
    """

    mean: Float[Array, "L H Nv Nk"]
    variance: Float[Array, "L H"]


def init_observer(
    config: RWKV7Config,
    teacher_config: RWKV7Config,
    key: Shaped[Array, "..."],
    *,
    bias: Float[Array, "L H Nv Nk"] | None = None,
) -> tuple[Observer, Params]:
    """Makes a new observer and its parameters, float32.

    The maps are scaled so that proposals have about the scale of the observer's own states.

    Args:
        config: of the small model.
        teacher_config: of the large model; width, heads and layers may differ.
        key: a random key.
        bias: the proposal for an empty prompt, preferably the teacher's mean state from
            `state_moments`; zeros by default.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: the vocabularies differ, or a bias of other sizes.
    """
    with prefix_errors("init_observer"):
        check_instance(config, RWKV7Config, "`config`")
        check_instance(teacher_config, RWKV7Config, "`teacher_config`")
        observer = Observer(RWKV7(config), teacher_config)
        key = check_key(key)
        shapes = observer.shapes
        first: Any = jnp.zeros(shapes["bias"])
        if bias is not None:
            first = as_array(bias, "`bias`")
        if tuple(first.shape) != shapes["bias"]:
            raise ValueError(
                f"`bias` must have [layers, heads, value, key] = {shapes['bias']}; "
                f"got {tuple(first.shape)}."
            )
    # Keep the order of the keys, so that a seed always gives the same observer.
    model_key, left_key, right_key = jax.random.split(key, 3)
    tokens = jnp.zeros((1, 1), jnp.int32)
    variables = observer.model.init(model_key, tokens, init_state(config))
    # A proposal sums J products, each with two sums over n.
    scale = (config.head_size * shapes["left"][2] ** 0.5) ** -0.5
    params = {
        "model": variables["params"],
        "left": scale * jax.random.normal(left_key, shapes["left"], jnp.float32),
        "right": scale * jax.random.normal(right_key, shapes["right"], jnp.float32),
        "bias": jnp.asarray(first, jnp.float32),
    }
    return observer, params


def check_teacher(observer: Observer, config: RWKV7Config) -> None:
    """Checks that an observer proposes states for models with the sizes of `config`.

    Raises:
        ValueError: a size differs.
    """
    for name in SIZES:
        expected = getattr(observer.teacher, name)
        size = getattr(config, name)
        if size != expected:
            raise ValueError(
                f"`teacher` must have the observer's {name} {expected}; got {size}."
            )


def check_maps(observer: Observer, params: Params) -> None:
    """Checks that `params` hold a model and maps of the observer's sizes.

    Raises:
        TypeError: not a dict, or a part that is not an array.
        ValueError: a part is missing, unknown or of the wrong shape.
    """
    if not isinstance(params, Mapping):
        raise TypeError(
            f"`params` must be an observer's parameters, a dict; got {type(params).__name__}."
        )
    expected = {"model", *observer.shapes}
    if set(params) != expected:
        raise ValueError(
            f"`params` must hold {', '.join(sorted(expected))}; "
            f"got {', '.join(sorted(map(str, params))) or 'nothing'}."
        )
    check_params(params["model"], observer.model.config, "`params['model']`")
    for name, shape in observer.shapes.items():
        actual = tuple(as_array(params[name], f"`params[{name!r}]`").shape)
        if actual != shape:
            raise ValueError(
                f"`params[{name!r}]` must have shape {shape}; got {actual}."
            )


def _map_states(params: Params, wkv: Float[Array, "K B G n n"]) -> WKV:
    """Maps the observer's states to the teacher's sizes, one layer of the teacher at a time."""
    # [B J n n]: the observer's heads in all layers on one axis, layer by layer.
    sources = jnp.moveaxis(wkv, 1, 0).reshape(wkv.shape[1], -1, *wkv.shape[3:])
    product = functools.partial(jnp.einsum, precision="highest")

    # Recomputed in the backward pass: a layer's `half` is J n / N times as large as its states.
    @jax.checkpoint
    def layer(maps):
        # States are float32 even if the observer's weights were saved in 16 bits.
        left, right, bias = (leaf.astype(jnp.float32) for leaf in maps)
        half = product("hjvm,bjmp->bhjvp", left, sources)
        return product("bhjvp,hjkp->bhvk", half, right) + bias[None]

    # [L B H Nv Nk]. A map instead of an einsum over L, whose `half` would be L times as large.
    return jax.lax.map(layer, (params["left"], params["right"], params["bias"]))


@functools.partial(jax.jit, static_argnums=0)
def read_prompts(
    model: RWKV7, params: Params, tokens: Tokens, lengths: Lengths | None = None
) -> tuple[Activations, RWKV7State]:
    """Computes a model's normed activations in the prompts, and its state after them."""
    start = init_state(model.config, tokens.shape[0])
    outputs: Any = model.apply(
        {"params": params}, tokens, start, lengths, method="hidden"
    )
    return outputs


@functools.partial(jax.jit, static_argnums=0)
def propose_wkv(
    observer: Observer, params: Params, tokens: Tokens, lengths: Lengths | None = None
) -> tuple[Activations, WKV]:
    """Computes the small model's normed activations and the proposed WKV states."""
    x, end = read_prompts(observer.model, params["model"], tokens, lengths)
    return x, _map_states(params, end.wkv)


def propose(
    observer: Observer, params: Params, tokens: Tokens, lengths: Lengths | None = None
) -> RWKV7State:
    """Proposes a start state of the teacher for each row, with zero token shifts.

    Args:
        observer: the shells of both models; a static argument under `jax.jit`.
        params: the observer's.
        tokens: prompts.
        lengths: the number of real tokens of each row; padding on the right has no influence.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ids or lengths out of range, or parameters of another observer.
    """
    with prefix_errors("propose"):
        check_not_intercepted()
        check_instance(observer, Observer, "`observer`")
        check_maps(observer, params)
        check_placed(params, "`params`")
        tokens, lengths = check_prompt_tokens(
            tokens, lengths, observer.teacher.vocab_size
        )
    _, wkv = propose_wkv(observer, params, tokens, lengths)
    return init_state(observer.teacher, tokens.shape[0]).replace(wkv=wkv)


def check_prompt_tokens(
    tokens: Any, lengths: Any, vocab_size: int
) -> tuple[Tokens, Lengths | None]:
    """Checks prompts and optional lengths, and returns them as arrays.

    Raises:
        TypeError: ids or lengths that are not integers.
        ValueError: no rows, or ids or lengths out of range.
    """
    tokens = as_array(tokens, "`tokens`")
    shape = tuple(tokens.shape)
    # Moments and errors are means over rows.
    if len(shape) != 2 or not shape[0]:
        raise ValueError(f"`tokens` must have shape [B T], B at least 1; got {shape}.")
    check_tokens(tokens, vocab_size)
    if lengths is not None:
        lengths = as_array(lengths, "`lengths`")
        check_lengths(lengths, shape)
    return tokens, lengths


def moments(wkv: WKV) -> Moments:
    """Computes mean and variance of states over their rows."""
    # Not E[x^2] - E[x]^2, which loses precision if states hardly vary.
    mean = jnp.mean(wkv, axis=1)
    variance = jnp.mean(jnp.square(wkv - mean[:, None]), axis=(1, 3, 4))
    return Moments(mean, variance)


def fraction_of_variance_unexplained(
    proposed: WKV, own: WKV, variance: Float[Array, "L H"]
) -> Float[Array, " B"]:
    """Divides each row's squared error by the variance, averaged over layers and heads.

    With the variance of the same rows, its mean over rows is the fraction of variance unexplained.
    The variance of a head is at least a millionth of the average variance.
    """
    # 1e-12 applies if no state varies, as with one repeated prompt.
    floor = jnp.maximum(1e-6 * jnp.mean(variance), 1e-12)
    error = jnp.mean(jnp.square(proposed - own), axis=(3, 4))
    return jnp.mean(error / jnp.maximum(variance, floor)[:, None], axis=(0, 2))


def state_moments(
    teacher: RWKV7,
    teacher_params: Params,
    tokens: Tokens,
    lengths: Lengths | None = None,
) -> Moments:
    """Measures mean and variance of the teacher's own states after typical prompts.

    Args:
        teacher: the shell around `teacher_params`.
        teacher_params: all weights.
        tokens: prompts, as many as fit into memory.
        lengths: the number of real tokens of each row; padding is on the right.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: no rows, ids or lengths out of range, or weights of another model.
    """
    with prefix_errors("state_moments"):
        check_runnable(teacher, teacher_params, "`teacher`", "`teacher_params`")
        tokens, lengths = check_prompt_tokens(
            tokens, lengths, teacher.config.vocab_size
        )
    _, end = read_prompts(teacher, teacher_params, tokens, lengths)
    return moments(end.wkv)
