"""The documentation names what exists, and every room is documented."""

import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from run_programs import ROOT

from rwkv7_jax.model import TRACE

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ROOMS = sorted(path.parent.name for path in (ROOT / "rwkv7_jax").glob("*/__init__.py"))


def relative(path: Path) -> str:
    """The path from the repository's root."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_to_files_and_headings_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            anchors = [
                re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                for title in titles
            ]
            assert heading in anchors, target


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_files_and_modules_exist(page):
    text = page.read_text()
    for name in re.findall(
        r"`((?:rwkv7_jax|pallas_kernels|tests|configs|docs)/[\w/.]*)`", text
    ):
        assert (ROOT / name).exists(), name
    for path in re.findall(r"\b(tests/[\w/]+\.py)\b", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"-m ((?:benchmarks|pallas_kernels)\.\w+)", text):
        assert importlib.util.find_spec(name), name


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_flags_of_named_programs_exist(page):
    commands = r"-m ((?:benchmarks|pallas_kernels)\.\w+)((?: [^`\s|]+)*)"
    for name, words in re.findall(commands, page.read_text()):
        found = importlib.util.find_spec(name)
        assert found and found.origin, name
        source = Path(found.origin)
        if source.name == "__init__.py":
            source = source.with_name("__main__.py")
        code = source.read_text(encoding="utf-8")
        for flag in re.findall(r"--[a-z][\w-]*", words):
            assert f'"{flag}"' in code, (name, flag)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_named_tests_exist(page):
    for path, word in re.findall(r"(tests/[\w/]+\.py) -k (\w+)", page.read_text()):
        assert re.search(rf"def test_\w*{word}", (ROOT / path).read_text()), (
            path,
            word,
        )


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_charter_a_page_and_its_public_names(room):
    module = importlib.import_module(f"rwkv7_jax.{room}")
    assert module.__doc__
    assert module.__all__
    for name in module.__all__:
        assert hasattr(module, name), name
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
    assert f"::: rwkv7_jax.{room}\n" in page


def test_the_picture_of_the_rooms_matches_the_contract():
    spec = importlib.util.spec_from_file_location(
        "draw_rooms", ROOT / "docs" / "draw_rooms.py"
    )
    draw_rooms = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(draw_rooms)
    assert draw_rooms.PICTURE.read_text() == draw_rooms.draw(draw_rooms.layers())


def test_every_folder_of_the_package_is_in_the_contract():
    spec = (ROOT / "setup.cfg").read_text()
    for room in ROOMS:
        assert re.search(rf"\brwkv7_jax\.{room}\b", spec), room


def test_the_table_of_a_trace_lists_its_names():
    page = (ROOT / "docs" / "extending.md").read_text()
    section = page[
        page.index("## Look inside") : page.index("## Write a decoding loop")
    ]
    first_cells = re.findall(r"^\| (`[^|]*) \|", section, re.MULTILINE)
    listed = re.findall(r"`(\w+)`", " ".join(first_cells))
    assert sorted(listed) == sorted(TRACE)
