"""Devices that this machine does not have, to lower programs for."""

import jax

# Device kind and number of cores.
KINDS = {
    "tpu": ("TPU v5 lite", 1),
    "gpu": ("NVIDIA H200", 132),
    "newer gpu": ("NVIDIA B200", 148),
}
# How a kernel is named in a lowered program, by platform.
MARKS = {"tpu": "tpu_custom_call", "cuda": "triton"}


def mesh(platform, shape=(1,), names=("x",)):
    """Returns an abstract mesh of devices by a name of `KINDS`."""
    kind, cores = KINDS[platform]
    device = jax.sharding.AbstractDevice(
        device_kind=kind, num_cores=cores, platform=platform.removeprefix("newer ")
    )
    axes = (jax.sharding.AxisType.Auto,) * len(shape)
    return jax.sharding.AbstractMesh(
        shape, names, axis_types=axes, abstract_device=device
    )
