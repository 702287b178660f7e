"""Every setting rejects impossible values by its dotted name, before they are used."""

import dataclasses
import math
import re
import runpy
import types
import typing

import pytest
from run_programs import ROOT

from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.runs.settings import Settings, read_settings

HUGE = 10**400


def all_settings():
    """Returns every setting: its dotted name, its types, and the metadata of its field."""
    for field in dataclasses.fields(Settings):
        kind = typing.get_type_hints(Settings)[field.name]
        if not dataclasses.is_dataclass(kind):
            yield field.name, kind, field.metadata
            continue
        hints = typing.get_type_hints(kind)
        for inner in dataclasses.fields(kind):
            yield f"{field.name}.{inner.name}", hints[inner.name], inner.metadata
    for name, kind in typing.get_type_hints(RWKV7Config).items():
        yield f"model.{name}", kind, {}
        yield f"observer.model.{name}", kind, {}


def kinds_of(kind):
    is_union = isinstance(kind, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


def beyond_range(limits, numeric):
    """Lists numbers outside a range; in a list where the setting has several numbers."""
    if limits is None:
        return []
    numbers = [math.nan, math.inf, HUGE, limits.low - 1, limits.high + 1]
    if limits.above:
        numbers.append(limits.low)
    if limits.below:
        numbers.append(limits.high)
    # A float as large as 1e30 has no next one.
    outside = [number for number in numbers if number not in (limits.low, limits.high)]
    outside += [limits.low] * limits.above + [limits.high] * limits.below
    return outside if numeric else [[number] for number in outside]


def impossible_values(kind, metadata):
    """Lists values that a setting of these types cannot have."""
    kinds = kinds_of(kind)
    values = [object(), b"bytes", 1j, {1, 2}]
    numeric = int in kinds or float in kinds
    if numeric:
        values += [math.nan, math.inf, -math.inf, HUGE, -HUGE, "1", True, [1]]
    else:
        values += [math.nan, -1, HUGE]
    if int in kinds:
        values += [1.5, -1, 2**63]
    if any(typing.get_origin(one) is tuple for one in kinds):
        values += ["text", [object()], [None], {"a": 1}]
    values += beyond_range(metadata.get("range"), numeric)
    if metadata.get("choices") or typing.get_origin(kind) is typing.Literal:
        values += ["none of them", "NONE"]
    if metadata.get("place"):
        values += ["gs://bucket/x", "s3://bucket/x", "http://host/x", "hf://a/b", "\0"]
    if str in kinds:
        values += [3, ["list"], math.nan]
    if bool in kinds:
        values += ["maybe", 2, 0.0, None]
    return values


CASES = [
    (name, value)
    for name, kind, metadata in all_settings()
    for value in impossible_values(kind, metadata)
]


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def test_there_are_many_cases():
    print(f"{len(CASES)} cases of {len({name for name, _ in CASES})} settings")
    assert len(CASES) > 1000


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_impossible_values_are_rejected_by_name(name):
    for other, value in CASES:
        if other != name:
            continue
        with pytest.raises(ValueError, match=f"^`config\\.{name}` must ") as caught:
            read_settings(nested(name, value))
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_every_number_has_a_range():
    for name, kind, metadata in all_settings():
        kinds = kinds_of(kind)
        tuples = [typing.get_args(one)[0] for one in kinds if typing.get_origin(one)]
        numeric = {int, float} & {*kinds, *tuples}
        if numeric and "model." not in name:
            assert "range" in metadata, name


def named_configs():
    """Returns the configs that the documents and configs name, with the word after the colon."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    found = set()
    for page in [*pages, *(ROOT / "configs").glob("*.py")]:
        found |= set(re.findall(r"(configs/\w+\.py)(?::(\w+))?", page.read_text()))
    return sorted(found)


def test_the_documents_name_every_config():
    paths = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert paths == {path for path, _ in named_configs()}


@pytest.mark.parametrize(("path", "word"), named_configs())
def test_the_configs_that_come_with_the_package_are_valid(path, word):
    get_config = runpy.run_path(str(ROOT / path))["get_config"]
    config = get_config(word) if word else get_config()
    read_settings(config.to_dict())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer.clip", None),
        ("optimizer.clip", 0.25),
        ("optimizer.eps", 1e-18),
        ("optimizer.final_learning_rate", 0),
        ("optimizer.b1", 0),
        ("data.held_out", 0),
        ("data.held_out", 1),
        ("tuning.alpha", 0.5),
        ("sample.temperature", 0),
        ("sample.top_p", 0),
        ("evaluation.prompt_tokens", (-1, 100)),
        ("evaluation.enough", -3.5),
        ("seed", 2**32 - 1),
        ("upscaling.widths", [1, 4.5]),
        ("upscaling.widths", ()),
        ("model.ffn_width", 0),
        ("model.remat", "block"),
    ],
)
def test_values_at_the_limits_are_accepted(name, value):
    # Elsewhere these groups are not read.
    modes = {"tuning": "state", "upscaling": "upscaled_state"}
    mode = modes.get(name.split(".")[0], "pretrain")
    read_settings({"mode": mode} | nested(name, value))
