from typing import NamedTuple
class Tile(NamedTuple):
    warps: int
    stages: int
    values: int | None = None
class Tiles(NamedTuple):
    forward: Tile
    state_gradient: Tile
    gradients: Tile
