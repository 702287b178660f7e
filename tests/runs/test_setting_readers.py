"""Settings that a run does not read are rejected by name; documented commands set none."""

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
from rwkv7_jax.runs.settings.readers import (
    _READERS,
    is_read,
    refuse_flags_without_effect,
    refuse_settings_of_evaluation,
    refuse_settings_without_effect,
)

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
        ("pretrain", "tuning.states", {"a": "a.txt"}),
        ("grpo", "tuning.states", {"a": "a.txt"}),
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
        ("observer", "tuning.decorrelate", "dbp"),
        ("grpo", "decorrelation.rate", 0.5),
        ("context", "decorrelation.damping", 0.5),
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
        ("context", "test_time.stop", ("x",)),
        ("pretrain", "start", "state.pth"),
        ("observer", "start", "state.pth"),
        ("pretrain", "tuning.layer_rates", (1.0,)),
        ("observer", "tuning.leaf_rates", {"wkv": 1.0}),
        ("grpo", "tuning.anchor", 1.0),
        ("grpo", "test_time.chains", 4),
        ("distil", "upscaling.size", 64),
        ("distil", "test_time.updates", 2),
        ("distil", "test_time.group", 4),
        ("expert", "decorrelation.rate", 0.5),
        ("expert", "test_time.importance_cap", 2.0),
    ],
)
def test_a_setting_that_a_run_does_not_read_is_rejected_by_name(kind, name, value):
    with pytest.raises(ValueError) as caught:
        read_settings(values_of(kind, {name: value}))
    message = str(caught.value)
    assert message.startswith(f"`config.{name}` must be left out")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "name", "value", "others"),
    [
        ("state", "tuning.anchor_path", "stdlib", {"tuning.anchor": 0.0}),
        ("distil", "test_time.hint", "Think.", {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.traces", 8, {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.at_once", 8, {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.chains", 2, {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.substitute", ("a", "b"), {"test_time.guide": "t.jsonl"}),
        ("distil", "test_time.keep", "all", {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.temperature", 0.5, {"test_time.guide": "traces.jsonl"}),
        ("distil", "test_time.vote_margin", 0.5, {"test_time.keep": "verified"}),
        ("grpo", "test_time.epsilon_low", 0.1, {"test_time.updates": 1}),
        ("grpo", "test_time.epsilon_high", 0.3, {"test_time.updates": 1}),
        ("state", "tuning.rates", (0.1, 1.0), {"optimizer.learning_rate": 0.1}),
        ("state", "tuning.search_share", 0.2, {"optimizer.learning_rate": 0.1}),
        ("state", "decorrelation.rate", 0.5, {"tuning.decorrelate": "whiten"}),
        (
            "upscaled_state",
            "decorrelation.damping",
            0.5,
            {"tuning.decorrelate": "whiten"},
        ),
        ("pretrain", "decorrelation.average", 0.5, {"optimizer.decorrelate": "whiten"}),
        ("distil", "decorrelation.rate", 0.5, {"tuning.decorrelate": "whiten"}),
    ],
)
def test_a_setting_that_another_setting_disables_is_rejected(kind, name, value, others):
    assert read_settings(values_of(kind, others))
    with pytest.raises(ValueError) as caught:
        read_settings(values_of(kind, others | {name: value}))
    message = str(caught.value)
    assert message.startswith(f"`config.{name}` must be left out if `config.")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "name", "value", "others"),
    [
        ("state", "tuning.anchor_path", "stdlib", {"tuning.anchor": 0.1}),
        ("distil", "test_time.hint", "Think.", {"test_time.guide": "model.pth"}),
        ("distil", "test_time.vote_margin", 0.5, {"test_time.keep": "majority"}),
        ("grpo", "test_time.epsilon_high", 0.3, {"test_time.updates": 2}),
        ("state", "decorrelation.damping", 0.5, {"tuning.decorrelate": "whiten"}),
        ("state", "decorrelation.rate", 0.5, {"tuning.decorrelate": "dbp"}),
        ("grpo", "decorrelation.rate", 0.5, {"tuning.decorrelate": "dbp"}),
        ("context", "decorrelation.damping", 0.5, {"tuning.decorrelate": "whiten"}),
    ],
)
def test_a_setting_that_another_setting_enables_is_accepted(kind, name, value, others):
    assert read_settings(values_of(kind, others | {name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("state", "poet.pth"),
        ("questions", "qa.jsonl"),
        ("tasks", "gsm8k"),
        ("shots", 5),
        ("limit", 10),
        ("bos", (0,)),
        ("workdir", "runs/x"),
        ("evaluation.prompt_tokens", (100,)),
    ],
)
def test_a_run_rejects_settings_that_only_eval_py_reads(name, value):
    refuse_settings_of_evaluation(read_settings({}))
    settings = read_settings(values_of("pretrain", {name: value}))
    with pytest.raises(ValueError, match=rf"`config\.{name}` must be left out if"):
        refuse_settings_of_evaluation(settings)


TASKS = {"data.path": "task:steer", "evaluation.retention": "task:copy"}
TEXT = {"data.path": "task:copy", "evaluation.retention": "task:copy,stdlib"}
CONSTANT = {"optimizer.schedule": "constant"}


@pytest.mark.parametrize(
    ("kind", "name", "value", "ignored", "read"),
    [
        ("grpo", "data.batch_size", 8, {}, None),
        ("expert", "data.batch_size", 4, {}, None),
        ("distil", "data.length", 64, {}, None),
        ("grpo", "evaluation.length", 64, {}, TASKS),
        ("distil", "evaluation.length", 64, {}, TASKS),
        ("pretrain", "optimizer.final_learning_rate", 1e-5, CONSTANT, {}),
        ("pretrain", "sample.top_p", 0.5, {}, {"sample.prompts": ("a",)}),
        ("pretrain", "data.held_out", 0.2, TASKS, TEXT),
        ("state", "data.packing", "stream", TASKS, TEXT),
        (
            "state",
            "data.encoding",
            "gbk",
            {"tuning.states": {"a": "task:copy"}},
            {"tuning.states": {"a": "task:copy", "b": "stdlib"}},
        ),
        ("state", "data.held_out", 0.2, {**TASKS, "tuning.anchor": 1.0}, {}),
    ],
)
def test_a_flag_without_effect_is_rejected_though_a_config_may_hold_it(
    kind, name, value, ignored, read
):
    flags = {name: value}
    # Of a config file.
    settings = read_settings(values_of(kind, ignored | flags))
    refuse_flags_without_effect(settings, {"steps": 3})
    with pytest.raises(ValueError) as caught:
        refuse_flags_without_effect(settings, flags)
    message = str(caught.value)
    assert message.startswith(f"`config.{name}` must be left out if ")
    assert "\n" not in message
    if read is not None:
        refuse_flags_without_effect(read_settings(values_of(kind, read | flags)), flags)


def test_flags_that_other_methods_read_are_accepted():
    for kind in ("pretrain", "state", "context", "distil"):
        settings = read_settings(values_of(kind, {"data.batch_size": 4}))
        refuse_flags_without_effect(settings, {"data.batch_size": 4})


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("shots", 5, {"questions": "qa.jsonl"}),
        ("bos", (0,), {"questions": "qa.jsonl"}),
        ("limit", 10, {"data.path": "stdlib"}),
        ("evaluation.retention", "stdlib", {"tasks": "gsm8k"}),
    ],
)
def test_eval_py_rejects_settings_of_what_it_does_not_measure(name, value, others):
    asked = {**others, name: value}
    settings = read_settings(values_of("pretrain", asked))
    with pytest.raises(ValueError, match=rf"^`config\.{name}` must be left out if"):
        refuse_settings_without_effect(settings)
    asked |= {"tasks": "gsm8k", "data.path": "stdlib"}
    refuse_settings_without_effect(read_settings(values_of("pretrain", asked)))


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


def test_a_nested_setting_is_read_if_its_parent_is():
    assert is_read("tuning.states.poet", "state", "grpo")
    assert not is_read("tuning.states.poet", "pretrain", "grpo")
    assert is_read("observer.model.width", "observer", "grpo")


def test_an_unread_setting_does_not_keep_a_run_from_resuming():
    was = as_config(Settings(mode="state"))
    was["optimizer"] |= {"weight_decay": 0.1}
    assert flat_settings(was) == flat_settings(Settings(mode="state"))
    was["tuning"] |= {"anchor_path": "stdlib"}
    was["decorrelation"] |= {"rate": 0.5}
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
def test_documented_commands_set_only_settings_that_are_read(line):
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


def test_questions_of_files_are_read_with_the_settings_of_answers():
    others = {"test_time.verifier": "letter", "test_time.tokens": 8}
    with pytest.raises(ValueError, match=r"`config\.test_time\.verifier` must be left"):
        read_settings(values_of("pretrain", others))
    others["questions"] = "qa.jsonl"
    assert read_settings(values_of("pretrain", others)).test_time.tokens == 8
    # Also if the state was tuned on the traces of a file.
    others |= {"test_time.guide": "traces.jsonl", "test_time.at_once": 8}
    assert read_settings(values_of("distil", others)).test_time.at_once == 8
