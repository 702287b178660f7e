"""Settings that a run does not read are refused by name, and nothing that is documented is."""

import ast
import dataclasses
import re
import runpy
import typing

import pytest
from run_programs import ROOT

from rwkv7_jax.runs.resume.run_identity import flat_settings
from rwkv7_jax.runs.settings import (
    Settings,
    TestTimeMethod,
    as_config,
    read_settings,
)
from rwkv7_jax.runs.settings.readers import _READERS, is_read

METHODS = typing.get_args(TestTimeMethod)


def values_of(kind, changes):
    """Returns nested settings of a mode, or of a method of mode "test_time"."""
    flat = dict(changes)
    if kind in METHODS:
        flat |= {"mode": "test_time", "test_time.method": kind}
    else:
        flat["mode"] = kind
    nested: dict = {}
    for name, value in flat.items():
        *groups, key = name.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[key] = value
    return nested


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("pretrain", "tuning.anchor", 1.0),
        ("pretrain", "tuning.anchor_path", "stdlib"),
        ("pretrain", "tuning.decorrelate", "dbp"),
        ("pretrain", "tuning.leaves", "all"),
        ("pretrain", "upscaling.size", 64),
        ("pretrain", "observer.variance", 0.5),
        ("pretrain", "test_time.method", "distil"),
        ("pretrain", "decorrelation.rate", 0.5),
        ("state", "optimizer.weight_decay", 0.1),
        ("state", "optimizer.kind", "muon"),
        ("state", "upscaling.size", 64),
        ("state", "decorrelation.rate", 0.5),
        ("state", "test_time.kl", 0.1),
        ("upscaled_state", "tuning.leaves", "all"),
        ("upscaled_state", "optimizer.kind", "muon"),
        ("observer", "upscaling.size", 64),
        ("observer", "decorrelation.rate", 0.5),
        ("observer", "optimizer.l2wrap", 1e-4),
        ("grpo", "test_time.guide", "model.pth"),
        ("grpo", "test_time.hint", "Think."),
        ("grpo", "test_time.context", "prompt.txt"),
        ("grpo", "test_time.substitute", ("a", "b")),
        ("grpo", "data.packing", "documents"),
        ("grpo", "optimizer.weight_decay", 0.1),
        ("expert", "test_time.kl", 0.1),
        ("expert", "test_time.redraws", 2),
        ("expert", "test_time.average", "row"),
        ("distil", "test_time.baseline", "leave_one_out"),
        ("distil", "test_time.scale", "none"),
        ("distil", "test_time.prompts", 4),
        ("context", "test_time.verifier", "letter"),
        ("context", "test_time.tokens", 8),
    ],
)
def test_a_setting_that_a_run_does_not_read_is_refused_by_name(kind, name, value):
    with pytest.raises(ValueError) as caught:
        read_settings(values_of(kind, {name: value}))
    message = str(caught.value)
    assert message.startswith(f"`config.{name}` must be left out")
    assert "\n" not in message


@pytest.mark.parametrize("kind", ["pretrain", "state", "upscaled_state", "observer"])
def test_one_file_with_every_setting_at_its_default_serves_all_modes(kind):
    written = as_config(Settings())
    # These two have the defaults of a mode.
    written["optimizer"] |= {"learning_rate": None, "final_learning_rate": None}
    assert read_settings(written | {"mode": kind}).mode == kind


@pytest.mark.parametrize("method", METHODS)
def test_one_file_with_every_setting_at_its_default_serves_all_methods(method):
    written = as_config(Settings())
    written["test_time"] |= {"method": method}
    assert read_settings(written | {"mode": "test_time"}).test_time.method == method


def test_every_name_of_the_table_is_a_setting():
    hints = typing.get_type_hints(Settings)
    for name in _READERS:
        group, _, key = name.partition(".")
        assert group in hints, name
        if key:
            assert key in {field.name for field in dataclasses.fields(hints[group])}


def test_a_setting_inside_of_another_is_read_where_that_is():
    assert is_read("tuning.states.poet", "state", "grpo")
    assert not is_read("tuning.states.poet", "pretrain", "grpo")
    assert is_read("observer.model.width", "observer", "grpo")


def test_what_a_run_does_not_read_does_not_keep_it_from_going_on():
    was = as_config(Settings(mode="state"))
    was["optimizer"] |= {"weight_decay": 0.1}
    assert flat_settings(was) == flat_settings(Settings(mode="state"))
    was["tuning"] |= {"anchor": 1.0}
    assert flat_settings(was) != flat_settings(Settings(mode="state"))


def documented_commands():
    """Yields the config file and the changes of every command of the documentation."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in [*pages, *(ROOT / "configs").glob("*.py")]:
        text = page.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            if "python train.py --config=" not in line:
                continue
            yield line


def typed(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("'\"")


@pytest.mark.parametrize("line", sorted(set(documented_commands())))
def test_documented_commands_have_no_setting_that_is_not_read(line):
    path = re.search(r"--config=(\S+)", line)[1]
    file, _, argument = path.partition(":")
    get_config = runpy.run_path(str(ROOT / file))["get_config"]
    values = get_config(*filter(None, [argument])).to_dict()
    for name, value in re.findall(r"--config\.([\w.]+)=(\S+)", line):
        *groups, key = name.split(".")
        place = values
        for group in groups:
            if not isinstance(place.get(group), dict):
                place[group] = {}
            place = place[group]
        place[key] = typed(value)
    read_settings(values)
