"""Axis letters of all shapes in this package, and the aliases used everywhere.

B batch, T tokens, L layers, D width, H heads, N head size, `Nk` key channels (columns of a state),
`Nv` value channels (rows of a state), F feed-forward width, R low rank, C chunk, V vocabulary,
M kernel features.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

# Ids may come straight from the host.
Tokens = Int[Array | np.ndarray, "B T"]

# The number of tokens of each row that count; the rest of the row is padding on the right.
Lengths = Int[Array | np.ndarray, " B"]

# The sequence of each token where several share a row, numbered from 0 in each row.
SegmentIds = Int[Array | np.ndarray, "B T"]

Activations = Float[Array, "B T D"]

Heads = Float[Array, "B T H N"]

Logits = Float[Array, "B T V"]

# The inner tree of weights: nested dicts whose paths are the official checkpoint names, with the
# first block under `layer_0` and the other blocks stacked under `layers`.
Params = dict[str, Any]
