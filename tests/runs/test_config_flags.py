"""The command line of train.py gives settings, or one sentence of error."""

import contextlib
import dataclasses
import sys
import time
import warnings
from pathlib import Path

import pytest
from absl import flags

from rwkv7_jax.runs import config_flags
from rwkv7_jax.runs.config_flags import _parse, config_values
from rwkv7_jax.runs.settings import Settings, read_settings
from rwkv7_jax.runs.settings.names import setting_types
from rwkv7_jax.runs.settings.other_trainers import EQUIVALENTS

FILE = """
from ml_collections import ConfigDict


def get_config(size="1"):
    config = ConfigDict()
    config.steps = int(size)
    config.data = ConfigDict({"path": "stdlib", "held_out": 0.1})
    return config
"""


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses words into settings with new flags; `FILE` stands for the config file."""
    path = tmp_path / "config.py"
    path.write_text(FILE)
    (tmp_path / "empty.py").write_text("")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def parse(*words):
        new = flags.FlagValues()
        flags.DEFINE_string("workdir", None, "Of train.py.", flag_values=new)
        monkeypatch.setattr(flags, "FLAGS", new)
        words = [word.replace("FILE", str(path)) for word in words]
        words = [word.replace("EMPTY", str(tmp_path / "empty.py")) for word in words]
        assert _parse("train.py", ["train.py", *words]) == ["train.py"]
        return read_settings(config_values())

    return parse


def test_settings_come_from_a_file_its_argument_and_overrides(parse):
    settings = parse(
        "--config=FILE:7", "--config.data.held_out=0.25", "--config.data.length=64"
    )
    assert (settings.steps, settings.data.path) == (7, "stdlib")
    assert (settings.data.held_out, settings.data.length) == (0.25, 64)


def test_a_value_may_be_the_word_after_its_flag(parse):
    words = "--config FILE:3 --config.data.length 64 --config.sample.tokens 5 --config.allow_nan"
    settings = parse(*words.split())
    assert settings.allow_nan
    assert (settings.steps, settings.data.length, settings.sample.tokens) == (3, 64, 5)


def test_groups_that_the_file_does_not_mention_can_be_set(parse):
    settings = parse(
        "--config=FILE",
        "--config.mode=observer",
        "--config.sample.tokens=3",
        "--config.observer.model.width=8",
    )
    assert settings.sample.tokens == 3
    assert settings.observer.model == {"width": 8}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--config=FILE", "--workdri=x"], "not a flag; the nearest is `--workdir`."),
        (["--config=FILE", "--stepz=3"], "the nearest is `--config.steps`."),
        (["--config=FILE", "--qqq=3"], "`--qqq` is not a flag; --help lists them."),
        (
            ["--load_model", "x.pth", "--data_file", "y", "--ctx_len", "512"],
            "`--load_model` is not a flag; the nearest is `--config.init`.",
        ),
        # The most similar names are `init` and `state`.
        (["--lr_init=1e-4"], "the nearest is `--config.optimizer.learning_rate`."),
        (["--strategy=deepspeed_stage_2"], "the nearest is `--config.mesh`."),
        (["--proj_dir=out"], "`--proj_dir` is not a flag; the nearest is `--workdir`."),
        (
            ["--config=FILE", "--config.steps.x=3"],
            "`steps` is a setting, not a group of settings.",
        ),
        (["--config=FILE:many"], "invalid literal for int() with base 10: 'many'"),
        (
            ["--config=none.py"],
            "`--config` must name a file; 'none.py' does not exist.",
        ),
        (["--config=configs"], "`--config` must name a file; 'configs' is not one."),
        (
            ["--config=FILE", "--noconfig.allow_nan=true"],
            "`--noconfig.allow_nan=true` must be a setting without a value",
        ),
        (["--config=FILE", "--noconfig"], "`--noconfig` must be a setting without"),
        (["--config=EMPTY"], "empty.py must define `get_config`."),
    ],
)
def test_an_unreadable_command_line_ends_the_program_in_one_line(
    parse, capsys, words, sentence
):
    with pytest.raises(SystemExit) as ended:
        parse(*words)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: ") and said.count("\n") == 1 and sentence in said


def test_the_settings_that_replace_flags_of_other_trainers_exist():
    flags_of_train = {"workdir", "processes"}
    known = setting_types(Settings).keys() | flags_of_train
    assert set(EQUIVALENTS.values()) <= known
    assert not {f"config.{flag}" for flag in EQUIVALENTS} & known
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    _, _, table = guide.partition("### Flags of RWKV-LM and RWKV-PEFT")
    table = table.partition("## ")[0]
    for flag, setting in EQUIVALENTS.items():
        if flag not in ("model_args", "num_fewshot"):
            (row,) = [row for row in table.splitlines() if f"`{flag}`" in row]
            assert f"`{setting}" in row


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--config=FILE", "--config.optimzer.b1=0.5"],
            "nearest is `config.optimizer`",
        ),
        # The right name in the wrong group, and a name like no other.
        (
            ["--config=FILE", "--config.tuning.learnig_rate=0.5"],
            "nearest is `config.optimizer.learning_rate`",
        ),
        (
            ["--config=FILE", "--config.data.ctx_len=512"],
            "`config.data.ctx_len` is not a setting; the nearest is `config.data.length`.",
        ),
        (
            ["--config=FILE", "--config.model.n_layer=12"],
            "nearest is `config.model.num_layers`",
        ),
        (
            ["--config=FILE", "--config.data.qqq=0.5"],
            "`config.data.qqq` is not a setting; --help lists them.",
        ),
        (
            ["--config=FILE", "--config.sample.tokens=x"],
            "`config.sample.tokens` must be int",
        ),
        (["--config=FILE", "--config.steps=many"], "`config.steps` must be int; got"),
        # Python, but for a list that no set can hold.
        (["--config=FILE", "--config.steps={[]}"], "`config.steps` must be int; got"),
        ([], "`--config` must name a file, such as"),
    ],
)
def test_settings_that_do_not_exist_are_named(parse, words, sentence):
    with pytest.raises(ValueError, match=sentence):
        parse(*words)


# As parsers meet them: nesting, runs of quotes and of backslashes, and what some programs expand.
STRANGE = [
    unit * 199 + end
    for unit in (
        "{",
        "[",
        "(",
        "{1:",
        "{'a':[",
        "'",
        '"',
        "\\",
        "'\\",
        "$",
        "a,",
        "a|",
        "9",
    )
    for end in ("", "!", "}" * 199)
]


@pytest.mark.parametrize("kind", ["text", "number", "list"])
def test_no_strange_value_takes_long_to_parse(kind):
    kinds = {"text": str, "number": float, "list": tuple}
    seen = set()
    for name, hint in config_flags._TYPES.items():
        shown = str(hint)
        is_list = "tuple" in shown
        wanted = kinds[kind].__name__ in shown and is_list == (kind == "list")
        # Settings of one type are read in one way.
        if not wanted or dataclasses.is_dataclass(hint) or shown in seen:
            continue
        seen.add(shown)
        group, _, last = name.removeprefix("config.").rpartition(".")
        for text in STRANGE:
            # Of this thread: the machine may be busy. What grows with the depth's power never ends.
            began = time.thread_time()
            value = config_flags._read_value(hint, text)
            values: dict = {last: value}
            for part in reversed(group.split(".") if group else []):
                values = {part: values}
            # A text may be a value, and a number is none of these.
            with contextlib.suppress(ValueError):
                read_settings(values)
            assert time.thread_time() - began < 5, (name, text[:20], len(text))


@pytest.mark.parametrize("text", ["1if", "0x1for", "'\\d'"])
def test_python_does_not_warn_about_values_that_are_not_numbers(text):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        config_flags._read_value(int, text)
    assert not said
