"""The list of settings of `--help`: flags, limits and descriptions."""

import dataclasses
import re

import pytest

from rwkv7_jax.runs.settings import Settings
from rwkv7_jax.runs.settings.help import attribute_descriptions, describe_settings

DEFAULTS = Settings()
GROUPS = {"": DEFAULTS}
for _field in dataclasses.fields(Settings):
    if dataclasses.is_dataclass(getattr(DEFAULTS, _field.name)):
        GROUPS[f"{_field.name}."] = getattr(DEFAULTS, _field.name)


@pytest.mark.parametrize("prefix", GROUPS)
def test_every_setting_has_a_flag_with_a_description_below(prefix):
    lines = list(describe_settings())
    group = GROUPS[prefix]
    descriptions = attribute_descriptions(type(group))
    for field in dataclasses.fields(group):
        if f"{field.name}." in GROUPS:
            continue
        flag = f"  --config.{prefix}{field.name}="
        (place,) = [i for i, line in enumerate(lines) if line.startswith(flag)]
        first_words = " ".join(descriptions[field.name].split())[:40]
        assert first_words
        assert lines[place + 1].strip().startswith(first_words)


def test_ranges_show_the_limits_that_matter():
    lines = "\n".join(describe_settings())
    for limits in (
        r"data.held_out=0.05 +at least 0, at most 1$",
        r"steps=1000 +at least 1$",
        r"optimizer.clip=1.0 +above 0$",
        r"optimizer.b1=0.9 +at least 0, below 1$",
        r"data.order='shuffled' +shuffled, cubic$",
        r"evaluation.enough=None$",
    ):
        assert re.search(limits, lines, re.MULTILINE), limits


def test_a_description_covers_names_that_share_an_entry_and_further_lines():
    @dataclasses.dataclass
    class Group:
        """A group.

        Attributes:
            a, b: both of them: first line,
                second line.

                * an item
            c: another.
        """

        a: int = 0
        b: int = 0
        c: int = 0
        d: int = 0

    found = attribute_descriptions(Group)
    assert found["a"] == found["b"]
    assert found["a"].startswith("both of them: first line,\n")
    assert found["a"].endswith("* an item")
    assert (found["c"], found["d"]) == ("another.", "")
