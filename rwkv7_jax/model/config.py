"""The sizes and run-time choices of one RWKV-7 model."""

import contextlib
import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

from pallas_kernels import IMPLEMENTATIONS
from rwkv7_jax.checks import check_choice, check_number, check_size, prefix_errors
from rwkv7_jax.model import remat

_DTYPES = ("float32", "bfloat16")


class _Preset(NamedTuple):
    num_layers: int
    width: int
    decay_rank: int
    icl_rank: int
    value_rank: int
    gate_rank: int


# Published models. Their ranks follow no single rule.
# Source: the specification's audit of the G1 files; 0.4B in BlinkDL/RWKV-LM@524481d.
_PRESETS = {
    "0.1b": _Preset(12, 768, 64, 64, 32, 128),
    "0.4b": _Preset(24, 1024, 64, 64, 32, 128),
    "1.5b": _Preset(24, 2048, 96, 96, 64, 256),
    "2.9b": _Preset(32, 2560, 96, 96, 64, 320),
    "7.2b": _Preset(32, 4096, 128, 128, 96, 480),
    "13.3b": _Preset(61, 4096, 192, 192, 128, 384),
}


def _rank(factor: float, width: int) -> int:
    """Computes the rank of a low-rank map of a new model by the rule of BlinkDL's trainer.

    Source: BlinkDL/RWKV-LM@524481d RWKV-v7/train_temp/src/model.py:547-563.
    """
    return max(32, 32 * round(factor * math.sqrt(width) / 32))


def _dtype_name(dtype: Any) -> Any:
    """Returns the name of a dtype such as `jnp.bfloat16`; other values stay as they are."""
    if dtype is None or isinstance(dtype, str):
        return dtype
    with contextlib.suppress(TypeError):
        return np.dtype(dtype).name
    return dtype


@dataclasses.dataclass(frozen=True)
class RWKV7Config:
    """The checked sizes of a model; hashable, so it can be a static argument of `jax.jit`.

    Sizes left at 0 follow the rule for new models: `ffn_width` is 4 * `width`, and the ranks depend
    on `width`.

    Attributes:
        vocab_size: rows of the embedding and of the head (V).
        num_layers: blocks (L).
        width: channels of the residual stream (D).
        head_size: channels of a head (N); `width` is a multiple of it.
        ffn_width: hidden channels of the channel mix (F).
        decay_rank: low rank of the decay map (w1, w2).
        icl_rank: low rank of the in-context learning rate map (a1, a2).
        value_rank: low rank of the value residual's gate (v1, v2).
        gate_rank: low rank of the output gate (g1, g2).
        norm_eps: epsilon of the layer norms.
        group_norm_eps: epsilon of the per-head norm. 64e-5 in official files for every head size;
            `head_size * norm_eps` in HF folders.
        dtype: dtype of the activations, "float32" or "bfloat16". Logits, losses and the WKV state
            are always float32.
        remat: what the backward pass recomputes of each block: "none", only the cheap operations
            between matrix products and the WKV op; "op", everything but the WKV op; "block",
            everything.
        implementation: implementation of the WKV op (one of `pallas_kernels.IMPLEMENTATIONS`), or
            None for the best one available.

    Raises:
        ValueError: a size is not a positive integer, or the sizes do not match each other.
    """

    vocab_size: int
    num_layers: int
    width: int
    head_size: int = 64
    ffn_width: int = 0
    decay_rank: int = 0
    icl_rank: int = 0
    value_rank: int = 0
    gate_rank: int = 0
    norm_eps: float = 1e-5
    group_norm_eps: float = 64e-5
    dtype: str = "float32"
    remat: str = "none"
    implementation: str | None = None

    def __post_init__(self):
        """Fills in the sizes left at 0, then checks everything."""
        self._check_sizes("vocab_size", "num_layers", "width", "head_size")
        defaults = {
            "ffn_width": 4 * self.width,
            "decay_rank": _rank(2.5, self.width),
            "icl_rank": _rank(2.5, self.width),
            "value_rank": _rank(1.7, self.width),
            "gate_rank": _rank(5.0, self.width),
        }
        for name, value in defaults.items():
            if getattr(self, name) == 0:
                # The dataclass is frozen.
                object.__setattr__(self, name, value)
        self._check_sizes(*defaults)
        if self.width % self.head_size:
            raise ValueError(
                f"RWKV7Config: `width` must be a multiple of `head_size`; "
                f"got {self.width} and {self.head_size}."
            )
        with prefix_errors("RWKV7Config"):
            for name in ("norm_eps", "group_norm_eps"):
                value = getattr(self, name)
                check_number(value, -math.inf, math.inf, f"`{name}`")
                if not 0 < value < 1:
                    raise ValueError(f"`{name}` must lie between 0 and 1; got {value}.")
                # JSON cannot write NumPy's numbers.
                object.__setattr__(self, name, float(value))
            object.__setattr__(self, "dtype", _dtype_name(self.dtype))
            check_choice(self.dtype, _DTYPES, "`dtype`")
            check_choice(self.remat, remat.CHOICES, "`remat`")
            if self.implementation is not None:
                check_choice(self.implementation, IMPLEMENTATIONS, "`implementation`")

    def _check_sizes(self, *names: str) -> None:
        """Checks sizes and converts NumPy's integers, which JSON cannot write, to Python's."""
        with prefix_errors("RWKV7Config"):
            for name in names:
                size = check_size(getattr(self, name), f"`{name}`")
                object.__setattr__(self, name, size)

    @property
    def num_heads(self) -> int:
        """The number of heads (H)."""
        return self.width // self.head_size

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "RWKV7Config":
        """Makes the config of a published size.

        Args:
            name: "0.1b", "0.4b", "1.5b", "2.9b", "7.2b" or "13.3b"; case does not matter.
            **changes: fields that differ from the published model, such as `dtype="bfloat16"`.

        Raises:
            ValueError: no such size.
        """
        if not isinstance(name, str) or name.lower() not in _PRESETS:
            raise ValueError(
                f"RWKV7Config.preset: `name` must be one of {', '.join(_PRESETS)}; got {name!r}."
            )
        # The World vocabulary has 65529 entries; the published files pad it to 65536.
        fields: dict[str, Any] = {"vocab_size": 65536}
        fields.update(_PRESETS[name.lower()]._asdict())
        fields.update(changes)
        return cls(**fields)
