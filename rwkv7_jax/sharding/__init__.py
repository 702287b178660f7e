"""One program on many devices: where arrays lie, and how devices work together.

A program is written as for one device. Rows of a batch are shared by all devices; weights and
their moments lie in shards. The compiler is told where the arrays lie and partitions the program
itself, but for the model: that runs on each device with `on_each`.
"""

from rwkv7_jax.sharding.collectives import (
    GATHERED,
    as_shards,
    gather_shards,
    has_shards,
    look_up,
    mesh_sizes,
    on_each,
    shard_map_batch,
    time_axis,
    tokens_along,
)
from rwkv7_jax.sharding.layout import (
    AXES,
    FSDP,
    ROWS,
    SEQUENCE,
    abstract_rows,
    abstract_shards,
    row_axes,
    shardings,
    share_of_rows,
    specs,
    undivided,
)
from rwkv7_jax.sharding.mesh import (
    AUTO,
    bytes_on_a_device,
    constrain_layout,
    constrain_rows,
    local_mesh,
    local_view,
    make_mesh,
    parse_sizes,
    place,
    shard_batch,
    sizes_of,
    stack_mesh,
    use_mesh,
)

__all__ = [
    "AUTO",
    "AXES",
    "FSDP",
    "GATHERED",
    "ROWS",
    "SEQUENCE",
    "abstract_rows",
    "abstract_shards",
    "as_shards",
    "bytes_on_a_device",
    "constrain_layout",
    "constrain_rows",
    "gather_shards",
    "has_shards",
    "local_mesh",
    "local_view",
    "look_up",
    "make_mesh",
    "mesh_sizes",
    "on_each",
    "parse_sizes",
    "place",
    "row_axes",
    "shard_batch",
    "shard_map_batch",
    "shardings",
    "share_of_rows",
    "sizes_of",
    "specs",
    "stack_mesh",
    "time_axis",
    "tokens_along",
    "undivided",
    "use_mesh",
]
