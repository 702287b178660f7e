"""Strict ground: shapes are checked at each call; warnings and rank promotion are errors."""

import os

# Before JAX starts: two CPU devices, and no accelerator that would change these tests' numbers.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the suite's time, and LLVM's optimisation half of that: it is off, except
# where a test asks for a program as users get it (`AS_USERS` in test_wkv_laws.py).
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",
        "--xla_backend_optimization_level=0",
    ]
)

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes in signatures become checks; modules imported before the hook would escape it.
jaxtyping.install_import_hook(["rwkv7_jax", "pallas_kernels"], "beartype.beartype")


@pytest.fixture
def unchecked(monkeypatch):
    """Signatures go unchecked, as for users: the public doors find what is wrong themselves."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
