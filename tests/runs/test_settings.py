"""What train.py and eval.py accept as settings."""

import json
import typing

import pytest

from rwkv7_jax.model import FEATURE_MAPS, MEMORY_FORMS
from rwkv7_jax.runs.modes.registry import MODES
from rwkv7_jax.runs.settings import Mode, Settings, as_config, read_settings


def test_an_empty_mapping_gives_the_defaults():
    assert read_settings({}) == Settings()


def test_nested_values_are_read_and_integers_pass_as_floats():
    settings = read_settings(
        {"steps": 3, "optimizer": {"learning_rate": 1, "clip": None}}
    )
    assert settings.steps == 3
    assert settings.optimizer.learning_rate == 1.0
    assert settings.optimizer.clip is None


def test_a_list_of_prompts_becomes_a_tuple():
    assert read_settings({"sample": {"prompts": ["a", "b"]}}).sample.prompts == (
        "a",
        "b",
    )


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"stepz": 3},
            r"`config.stepz` is not a setting; the nearest is `config.steps`",
        ),
        (
            {"optimizer": {"learnig_rate": 1.0}},
            r"`config.optimizer.learnig_rate` is not a setting; the nearest is "
            r"`config.optimizer.learning_rate`",
        ),
        ({"model": {"widht": 3}}, r"nearest is `config.model.width`"),
        ({"steps": "many"}, r"`config.steps` must be int; got 'many'"),
        ({"steps": True}, r"`config.steps` must be int; got True"),
        (
            {"optimizer": {"clip": "no"}},
            r"`config.optimizer.clip` must be float or None;",
        ),
        (
            {"mode": "state", "tuning": {"rates": (0.1, 1.0, 0.10000001)}},
            r"`config.tuning.rates` must differ .* got 0.1 more than once",
        ),
        (
            {"steps": 20, "profile_steps": "15:21"},
            r"`config.profile_steps` must end within `config.steps`, 20; got '15:21'",
        ),
        (
            {"profile_steps": "1:" + "9" * 5000},
            r"`config.profile_steps` must be \"first:last\", .* got '1:999",
        ),
        (
            {"mesh": "fsdp=" + "9" * 5000},
            r"`config.mesh` must be auto, or sizes of .* got 'fsdp=999",
        ),
        ({"data": 3}, r"`config.data` must be a group of settings; got 3"),
        ({"steps": 0}, r"`config.steps` must be at least 1; got 0"),
        (
            {"mode": "magic"},
            r"`config.mode` must be pretrain, state, upscaled_state, observer or",
        ),
        ({"tuning": {"leaves": "emb"}}, r"`config.tuning.leaves` must be wkv or all"),
        (
            {"mode": "observer", "data": {"packing": "packed"}},
            r"`config.data.packing` must be .* got \"packed\" in mode 'observer'",
        ),
        (
            {
                "mode": "upscaled_state",
                "data": {"packing": "packed"},
                "upscaling": {"dynamics": "delta"},
            },
            r"`config.upscaling.dynamics` must be \"static\" .* got 'delta'",
        ),
        (
            {"data": {"packing": "packed", "order": "cubic"}},
            r"`config.data.order` must be \"shuffled\" .* \"packed\"; got \"cubic\"",
        ),
        (
            {"data": {"batch_size": 8}, "optimizer": {"accumulate": 3}},
            r"must be a multiple of `config.optimizer.accumulate`; got 8 and 3",
        ),
        (
            {"sample": {"prompts": ["a", "b\udce4"]}},
            r"`config.sample.prompts` must be valid Unicode; character 1 of 'b\\udce4'",
        ),
        (
            {"test_time": {"hint": "\ud800"}},
            r"`config.test_time.hint` must be valid Unicode; character 0",
        ),
    ],
)
def test_a_bad_setting_is_one_sentence_that_names_it(values, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_settings(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"init": ""},
        {"save_every": 0, "keep_every": 0, "tuning": {"anchor_path": ""}},
        {"evaluation": {"every": 0, "patience": 0}},
        {"profile_steps": "", "workdir": ""},
        {"upscaling": {"size": 0, "widths": [], "kind": "", "prepare": ""}},
        {"observer": {"most": 0}},
        {"test_time": {"guide": "", "context": ""}},
        {"data": {"evaluation": ""}, "evaluation": {"measure": ""}},
    ],
)
def test_older_spellings_of_an_absent_value_are_accepted(values):
    assert read_settings(values) == Settings()


@pytest.mark.parametrize(
    ("tuning", "learning_rate", "reason"),
    [
        ({"states": {"one": "a.txt"}}, 0.1, "`config.tuning.states` is set"),
        ({}, None, "`config.optimizer.learning_rate` is left to a search"),
    ],
)
def test_a_tensor_axis_is_rejected_where_devices_share_states(
    tuning, learning_rate, reason
):
    values = {
        "mode": "state",
        "init": "a.pth",
        "data": {"path": "a.txt"},
        "mesh": "tensor=2",
        "tuning": tuning,
        "optimizer": {"learning_rate": learning_rate},
    }
    with pytest.raises(ValueError) as caught:
        read_settings(values)
    message = f"`config.mesh` must have no tensor axis if {reason}"
    assert str(caught.value).startswith(message)


def test_other_spellings_of_an_absent_value_are_rejected():
    assert read_settings({"stop_after_bad": 0}).stop_after_bad is None
    with pytest.raises(ValueError, match=r"`config\.save_every` must be int or"):
        read_settings({"save_every": False})
    with pytest.raises(
        ValueError, match=r"`config\.keep_every` must be at least 0; got -1"
    ):
        read_settings({"keep_every": -1})


def test_settings_are_written_as_config_files_spell_them():
    written = as_config(Settings())
    assert written["init"] == ""
    assert written["upscaling"]["widths"] == () and written["upscaling"]["size"] == 0
    assert (
        written["optimizer"]["clip"] == 1.0 and written["evaluation"]["enough"] is None
    )
    assert read_settings(json.loads(json.dumps(written))) == Settings()


def test_imported_modules_add_feature_maps_and_forms_of_memory(tmp_path, monkeypatch):
    (tmp_path / "my_maps.py").write_text(
        "from rwkv7_jax.model import FEATURE_MAPS, MEMORY_FORMS\n"
        "FEATURE_MAPS['mine'] = FEATURE_MAPS['gaussian']\n"
        "MEMORY_FORMS['own'] = MEMORY_FORMS['decay']\n"
    )
    (tmp_path / "broken_maps.py").write_text("1 /\n  0\n")
    monkeypatch.syspath_prepend(tmp_path)
    asked = {"mode": "upscaled_state", "upscaling": {"kind": "mine", "dynamics": "own"}}
    with pytest.raises(ValueError, match=r"^`config.upscaling.\w+` must be"):
        read_settings(asked)
    try:
        found = read_settings(asked | {"imports": ["my_maps"]})
        assert read_settings(json.loads(json.dumps(as_config(found)))) == found
    finally:
        FEATURE_MAPS.pop("mine", None)
        MEMORY_FORMS.pop("own", None)
    for module, reason in {
        "broken_maps": "SyntaxError",
        "no_maps": "No module",
    }.items():
        with pytest.raises(
            ValueError, match=rf"^`config.imports` must .*{reason}"
        ) as e:
            read_settings({"imports": [module]})
        assert "\n" not in str(e.value)


def test_weights_are_decorrelated_only_in_mode_pretrain():
    with pytest.raises(ValueError, match=r"`config\.optimizer\.decorrelate` must be"):
        read_settings({"mode": "state", "optimizer": {"decorrelate": "dbp"}})


@pytest.mark.parametrize(
    ("learning_rate", "final"), [(6e-4, 6e-5), (0.3, 6e-5), (1e-5, 1e-6), (0, 0)]
)
def test_a_rate_never_rises_towards_a_default(learning_rate, final):
    settings = read_settings({"optimizer": {"learning_rate": learning_rate}})
    assert settings.optimizer.final_learning_rate == pytest.approx(final)


def test_the_final_rate_cannot_be_set_if_the_peak_rate_is_searched():
    values = {"mode": "state", "optimizer": {"final_learning_rate": 0.01}}
    with pytest.raises(
        ValueError, match=r"^`config.optimizer.final_learning_rate` must be left out"
    ):
        read_settings(values)
    values["optimizer"]["learning_rate"] = 0.3
    assert read_settings(values).optimizer.final_learning_rate == 0.01


def test_the_start_of_tuning_is_described():
    assert read_settings({"mode": "state"}).untuned == "no state"
    started = read_settings({"mode": "state", "start": "poet.pth"})
    assert started.untuned == "the state of `config.start`"


def test_every_mode_of_the_settings_has_its_class():
    assert set(MODES) == set(typing.get_args(Mode))
