"""The sizes of one BASED model."""

import dataclasses
from typing import Any

from rwkv7_jax.checks import check_choice, check_count, check_number, prefix_errors

LAYER_KINDS = ("conv", "linear", "window", "attention")

DTYPES = ("float32", "bfloat16", "float64")

# Source: HazyResearch/based train/configs/experiment/reference/based-1b.yaml.
_LINEAR_LAYERS = (1, 6, 11, 16, 21, 27, 33)
_NUM_LAYERS = 36
# The published code halves the `window_size` of 256 to the number of previous tokens.
# Source: HazyResearch/based based/models/mixers/slide_attention.py.
_WINDOW = 256 // 2 + 1


def published_order() -> tuple[str, ...]:
    """Returns the 36 layers of the published model of 1.3 billion parameters.

    A window follows each linear attention; all others are convolutions.
    """
    layers = ["conv"] * _NUM_LAYERS
    for index in _LINEAR_LAYERS:
        layers[index] = "linear"
        layers[index + 1] = "window"
    return tuple(layers)


@dataclasses.dataclass(frozen=True)
class BasedConfig:
    """The checked sizes of a model; hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        vocab_size: rows of the embedding and of the head (V).
        width: channels of the residual stream (D).
        layers: the kind of each layer, of `LAYER_KINDS`.
        num_heads: heads (H) of every attention; `width` is a multiple of it.
        feature_size: channels of a query and a key of linear attention (Nk).
        window: tokens of a window, including the current one.
        context: maximum number of tokens of full attention, for which its state has room.
        kernel_size: taps of a convolution, including the current token's.
        mlp_width: hidden channels of the MLP after each mixer, or None for no MLP.
        norm_eps: epsilon of the norms.
        dtype: dtype of the activations, "float32", "bfloat16", or "float64" for references under
            x64. Logits and the state of linear attention are float32, or float64 if this is.

    Raises:
        TypeError: a size that is not an integer.
        ValueError: a size below 1, an unknown kind of layer, or sizes that do not match each other.
    """

    vocab_size: int
    width: int
    layers: tuple[str, ...]
    num_heads: int = 1
    feature_size: int = 16
    window: int = 64
    context: int = 2048
    kernel_size: int = 3
    mlp_width: int | None = None
    norm_eps: float = 1e-5
    dtype: str = "float32"

    def __post_init__(self):
        """Checks everything."""
        with prefix_errors("BasedConfig"):
            for field in dataclasses.fields(self):
                value = getattr(self, field.name)
                # In Python, True is an int.
                if field.type is int and isinstance(value, bool):
                    raise TypeError(f"`{field.name}` must be an integer; got {value}.")
                if field.type is int:
                    check_count(value, 1, f"`{field.name}`")
            if self.mlp_width is not None:
                check_count(self.mlp_width, 1, "`mlp_width`")
            check_number(self.norm_eps, 0, 1, "`norm_eps`", above=True)
            check_choice(self.dtype, DTYPES, "`dtype`")
            self._check_layers()
            if self.width % self.num_heads:
                raise ValueError(
                    f"`width` must be a multiple of `num_heads`; "
                    f"got {self.width} and {self.num_heads}."
                )

    def _check_layers(self) -> None:
        # A list is not hashable; a string is a sequence of letters.
        if not isinstance(self.layers, tuple):
            kind = type(self.layers).__name__
            raise TypeError(f'`layers` must be a tuple such as ("conv",); got {kind}.')
        if not self.layers:
            raise ValueError("`layers` must name a layer; got none.")
        for kind in self.layers:
            check_choice(kind, LAYER_KINDS, "`layers`")

    @property
    def head_size(self) -> int:
        """The number of value channels of a head (Nv)."""
        return self.width // self.num_heads

    @classmethod
    def published(cls, **changes: Any) -> "BasedConfig":
        """Makes a config with the published model's sizes and order of layers.

        Everything else is shared by all models here, so that mixers can be compared. It differs
        from the published model:

        * The MLP is RWKV-7's squared ReLU with the published hidden width, not SwiGLU.
        * Convolutions are those of the published recall table, which do not expand and have neither
          SiLU nor an output matrix.
        * Windows have no rotary position embedding.
        * The head is not tied to the embedding.

        Args:
            **changes: fields that differ from the published model.
        """
        fields: dict[str, Any] = {
            "vocab_size": 50257,
            "width": 1792,
            "layers": published_order(),
            "num_heads": 16,
            "window": _WINDOW,
            "mlp_width": 2 * 1792,
            "dtype": "bfloat16",
        }
        fields.update(changes)
        return cls(**fields)
