"""How far numbers may lie apart, by dtype of the tokens; and a comparison that says where they do.

The table is not there to be loosened: a test that misses its bar has found something.
"""

import numpy as np

# The suite compiles without LLVM's optimisation; where rounding is the matter, as users do.
AS_USERS = {"xla_backend_optimization_level": 3}
# Relative L2 error against float64.
WKV = {
    "float32": {"y": 5e-6, "state": 5e-6, "gradient": 2e-5},
    "bfloat16": {
        "y": 5e-3,
        "state": 5e-3,
        "gradient": 8e-3,
        "gradient of a, repeated keys": 4e-2,
        "gradient of b, repeated keys": 4e-2,
    },
}
# Two float32 ways to the same numbers; and bfloat16 activations against float32 ones.
SAME = {"op": 5e-6, "model": 1e-5, "gradient": 1e-4, "micro-batches": 1e-6}
MODEL_BFLOAT16 = 3e-2
# Decimal formulas restated in numpy.
FORMULA = 1e-6


def relative_error(actual, expected) -> float:
    """The L2 norm of the difference over that of `expected` (over 1 where that is zero)."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / (np.linalg.norm(expected) or 1.0))


def assert_close(actual, expected, bar: float, name: str = "") -> None:
    """Fail unless the relative L2 error is at most `bar`, telling how much and where."""
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    assert actual.shape == expected.shape, (
        f"{name}: shape {actual.shape}, not {expected.shape}."
    )
    error = relative_error(actual, expected)
    if error <= bar:  # NaN is not
        return
    difference = np.abs(actual - expected) / (np.sqrt(np.mean(expected**2)) or 1.0)
    worst = np.unravel_index(
        np.argmax(np.nan_to_num(difference, nan=np.inf)), actual.shape
    )
    raise AssertionError(
        f"{name}: relative L2 error {error:.3g} over {bar:.3g}; relative to the root mean square "
        f"the largest difference is {difference[worst]:.3g} at {tuple(map(int, worst))} "
        f"({actual[worst]:.6g}, not {expected[worst]:.6g}), the mean {difference.mean():.3g}."
    )


def assert_trees_close(actual: dict, expected: dict, bar: float) -> None:
    """Compare leaf by leaf; the message names the leaf."""
    import jax

    actual = jax.tree_util.tree_leaves_with_path(actual)
    expected = jax.tree_util.tree_leaves_with_path(expected)
    assert [path for path, _ in actual] == [path for path, _ in expected]
    for (path, left), (_, right) in zip(actual, expected, strict=True):
        assert_close(left, right, bar, jax.tree_util.keystr(path))
