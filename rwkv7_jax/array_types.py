"""The axis letters of every shape in this package, and the aliases used everywhere.

B batch, T tokens, L layers, D width, H heads, N head size, `Nk` key channels (columns of a state),
`Nv` value channels (rows of a state), F feed-forward width, R low rank, C chunk, V vocabulary,
M kernel features.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

# Ids may come straight from the host.
Tokens = Int[Array | np.ndarray, "B T"]

Lengths = Int[Array | np.ndarray, " B"]

Activations = Float[Array, "B T D"]

Heads = Float[Array, "B T H N"]

Logits = Float[Array, "B T V"]

# The inner tree of weights: nested dicts whose paths are the official checkpoint names, `layer_0`
# apart and the blocks behind it stacked under `layers`.
Params = dict[str, Any]
