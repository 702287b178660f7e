"""What train.py and eval.py accept as settings."""

import pytest

from rwkv7_jax.runs.settings import Settings, read_settings


def test_an_empty_mapping_gives_the_defaults():
    assert read_settings({}) == Settings()


def test_nested_values_arrive_and_integers_pass_as_floats():
    settings = read_settings({"steps": 3, "optimizer": {"learning_rate": 1, "clip": None}})
    assert settings.steps == 3
    assert settings.optimizer.learning_rate == 1.0
    assert settings.optimizer.clip is None


def test_a_list_of_prompts_becomes_a_tuple():
    assert read_settings({"sample": {"prompts": ["a", "b"]}}).sample.prompts == ("a", "b")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"stepz": 3}, r"`config.stepz` is no setting; the nearest is `config.steps`"),
        (
            {"optimizer": {"learnig_rate": 1.0}},
            r"`config.optimizer.learnig_rate` is no setting; the nearest is "
            r"`config.optimizer.learning_rate`",
        ),
        ({"model": {"widht": 3}}, r"nearest is `config.model.width`"),
        ({"steps": "many"}, r"`config.steps` must be int; got 'many'"),
        ({"steps": True}, r"`config.steps` must be int; got True"),
        ({"optimizer": {"clip": "no"}}, r"`config.optimizer.clip` must be float or NoneType"),
        ({"data": 3}, r"`config.data` must be a group of settings; got 3"),
        ({"steps": 0}, r"`config.steps` must be at least 1; got 0"),
        ({"tuning": {"leaves": "emb"}}, r"`config.tuning.leaves` must be wkv or all"),
        (
            {"data": {"batch_size": 8}, "optimizer": {"accumulate": 3}},
            r"must be a multiple of `config.optimizer.accumulate`; got 8 and 3",
        ),
    ],
)
def test_a_bad_setting_is_one_sentence_that_names_it(values, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        read_settings(values)
    assert "\n" not in str(caught.value)
