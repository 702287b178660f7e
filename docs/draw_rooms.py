"""Draws the picture of the rooms from the contract in setup.cfg.

python docs/draw_rooms.py           writes docs/images/rooms.svg
"""

import configparser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "rooms.svg"

# Sizes in pixels.
WIDTH = 760
BOX_HEIGHT = 34
GAP = 12
ROW = BOX_HEIGHT + GAP

# Colours by kind: programs over the rooms, rooms, base modules, the op.
PROGRAM = "#fdf0d5"
ROOM = "#dbe9f6"
BASE = "#e9ecef"
KERNELS = "#e3f4e1"


def layers() -> list[list[str]]:
    """Returns the layers of the contract from top to bottom, each a list of dotted names."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["importlinter:contract:rooms"]["layers"].strip().splitlines()
    return [[name.strip() for name in line.split("|")] for line in lines]


def colour(name: str) -> str:
    """Returns the fill of a box."""
    if name.startswith("pallas_kernels"):
        return KERNELS
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    return ROOM if is_package else BASE


def box(name: str, fill: str, left: float, top: float, width: float) -> list[str]:
    """Returns the lines of one labelled box."""
    label = name.removeprefix("rwkv7_jax.")
    middle = left + width / 2
    return [
        f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{BOX_HEIGHT}" rx="5" '
        f'fill="{fill}" stroke="#555"/>',
        f'<text x="{middle:.0f}" y="{top + 22}" text-anchor="middle">{label}</text>',
    ]


def draw(rows: list[list[str]]) -> str:
    """Returns the picture: one row of boxes a layer, programs on top."""
    rows = [["train.py", "eval.py"], *rows]
    height = len(rows) * ROW + GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="14">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for index, names in enumerate(rows):
        top = GAP + index * ROW
        width = (WIDTH - GAP * (len(names) + 1)) / len(names)
        for column, name in enumerate(names):
            fill = PROGRAM if index == 0 else colour(name)
            lines += box(name, fill, GAP + column * (width + GAP), top, width)
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(layers()))
