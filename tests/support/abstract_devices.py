"""Devices that are not here, for lowering."""

import jax

KINDS = {"tpu": ("TPU v5 lite", 1), "gpu": ("NVIDIA H200", 132)}
# What a kernel looks like to each platform's compiler.
MARKS = {"tpu": "tpu_custom_call", "cuda": "triton"}


def mesh(platform, shape=(1,), names=("x",)):
    """An abstract mesh of `platform`'s devices."""
    kind, cores = KINDS[platform]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform=platform)
    axes = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(shape, names, axis_types=axes, abstract_device=device)
