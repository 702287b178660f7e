"""The recipes of docs/cloud.md name flags and settings that exist."""

import re

import pytest
from run_programs import ROOT
from tpu_slices import tpu

from rwkv7_jax import sharding
from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.names import setting_types

PAGE = (ROOT / "docs" / "cloud.md").read_text()
# Flags of a program, and the config file that all of them take.
CONFIG = {"config"}
PLAN = "python -m rwkv7_jax.plan"
SOURCES = {"python train.py": "train.py", PLAN: "rwkv7_jax/plan/__main__.py"}


def commands(program: str) -> list[str]:
    """The command lines of a program in the page's blocks, each on one line."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            _, name, words = line.partition(program)
            if name:
                found.append(words)
    return found


def flags_of(program: str) -> set[str]:
    """The flags that a program defines."""
    source = (ROOT / SOURCES[program]).read_text()
    return set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', source))


@pytest.mark.parametrize("program", SOURCES)
def test_every_flag_and_setting_of_the_recipes_exists(program):
    lines = commands(program)
    assert len(lines) >= 2
    known = flags_of(program) | CONFIG
    for line in lines:
        for name in re.findall(r"--([\w.]+)", line):
            if name.startswith("config."):
                assert name in setting_types(Settings), name
            else:
                assert name in known, name


def test_every_config_file_of_the_recipes_exists():
    files = re.findall(r"--config=(configs/\w+\.py)", PAGE)
    assert len(files) >= 4
    for name in files:
        assert (ROOT / name).is_file(), name


def test_the_table_lists_exactly_the_flags_of_plan():
    named = set()
    for row in re.findall(r"^\| (`--.*?) \|", PAGE, re.MULTILINE):
        named |= set(re.findall(r"--(\w+)", row))
    assert named - CONFIG == flags_of(PLAN)


def test_the_table_of_slices_gives_the_sharding_and_the_shared_folder():
    rows = re.findall(r"^\| `([^`]*)` \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    meshes = [row for row in rows if row[0] == "auto" or "fsdp=" in row[0]]
    assert len(meshes) == 4
    for choice, weights, folder in meshes:
        sizes = sharding.parse_sizes(choice, "`config.mesh`")
        mesh = sharding.make_mesh(sizes, 16, tpu("v5e-16"))
        copies = mesh.devices.reshape(mesh.shape["data"], -1)
        hosts = {len({chip.process_index for chip in copy}) for copy in copies}
        words = {1: "each", 2: "two hosts", 4: "all four hosts"}
        assert words[hosts.pop()] in weights and not hosts
        assert sharding.is_shared(mesh) == ("all" in folder)
