"""Settings that an evaluation or a step would reject are rejected when a mode is created."""

import pytest
from smallest_runs import MODES, mode_settings, save_base_model

from rwkv7_jax.runs.modes.registry import make_mode


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the path of a model of one layer."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_base_model(path)
    return path


@pytest.mark.parametrize("mode", MODES)
def test_an_unknown_measure_is_rejected_with_a_list_of_the_known_ones(
    base, tmp_path, mode
):
    with pytest.raises(ValueError) as caught:
        made = mode_settings(mode, base, evaluation__measure="held_out_nats")
        make_mode(made, tmp_path)
    message = str(caught.value)
    assert message.startswith("`config.evaluation.measure` must be one of ")
    first = message.removeprefix("`config.evaluation.measure` must be one of ")
    name = first.split(",")[0].split(";")[0]
    make_mode(mode_settings(mode, base, evaluation__measure=name), tmp_path)


def test_a_measure_may_be_a_retention_metric(base, tmp_path):
    changes = {"evaluation__retention": "task:facts-8"}
    changes["evaluation__measure"] = "facts-8_accuracy"
    make_mode(mode_settings("state", base, **changes), tmp_path)


def test_an_unknown_measure_of_several_states_is_rejected(base, tmp_path):
    changes = {"data__path": "", "tuning__states": {"one": "task:mapping"}}
    settings = mode_settings("state", base, evaluation__measure="x", **changes)
    with pytest.raises(ValueError, match=r"states.one`: `config.evaluation.measure`"):
        make_mode(settings, tmp_path)


@pytest.mark.parametrize(
    ("mode", "work"),
    [
        ("upscaled_state", "state_tuning.upscale"),
        ("distil", "test_time.collect_traces"),
        ("context", "test_time.read_prompt"),
    ],
)
@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("evaluation.measure", "x"),
        ("evaluation.retention", "none.txt"),
        ("tuning.layer_rates", (1.0, 0.5)),
    ],
)
def test_a_bad_setting_is_named_before_work_that_takes_long(
    base, tmp_path, monkeypatch, mode, work, change, value
):
    def fail(*_, **__):
        pytest.fail(f"{work} runs before the checks")

    monkeypatch.setattr(f"rwkv7_jax.runs.modes.{work}", fail)
    settings = mode_settings(mode, base, **{change: value})
    with pytest.raises((ValueError, FileNotFoundError)):
        make_mode(settings, tmp_path)


@pytest.mark.parametrize("mode", ["pretrain", "grpo"])
def test_a_sample_prompt_without_tokens_is_rejected(base, tmp_path, mode):
    settings = mode_settings(mode, base, sample__prompts=("a", ""))
    with pytest.raises(ValueError, match=r"^config.sample.prompts: .* got ''"):
        make_mode(settings, tmp_path)


@pytest.mark.parametrize(
    ("changes", "setting", "length"),
    [
        ({"observer__least": 9, "observer__most": 8}, "data", 24),
        ({"observer__most": 25}, "data", 24),
        ({"observer__most": 20, "evaluation__length": 16}, "evaluation", 16),
    ],
)
def test_positions_outside_the_rows_are_rejected_by_setting(
    base, tmp_path, changes, setting, length
):
    sentence = rf"`config.observer.most` .* `config.{setting}.length`, {length}; got"
    with pytest.raises(ValueError, match=sentence):
        make_mode(mode_settings("observer", base, **changes), tmp_path)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            {},
            r"`config.observer.model.width` must be set to .* head size 16: half .* 16",
        ),
        ({"width": 20}, r"^config.observer.model: RWKV7Config: .* got 20 and 16"),
    ],
)
def test_an_observer_whose_heads_do_not_fit_is_rejected_by_setting(
    base, tmp_path, model, sentence
):
    settings = mode_settings("observer", base, observer__model=model)
    with pytest.raises(ValueError, match=sentence):
        make_mode(settings, tmp_path)


def test_an_observer_without_a_dtype_has_the_teachers(base, tmp_path):
    model = {"head_size": 8, "dtype": "auto"}
    made = make_mode(mode_settings("observer", base, observer__model=model), tmp_path)
    assert made._observer.model.config.dtype == made.model.config.dtype


def test_gradient_accumulation_must_divide_the_sampled_rows(base):
    # 2 prompts of 4 completions, whatever `data.batch_size` is.
    changes = {"data__batch_size": 3, "optimizer__accumulate": 4}
    assert mode_settings("grpo", base, **changes).optimizer.accumulate == 4
    with pytest.raises(
        ValueError, match=r"`config.test_time.prompts` x .* got 8 and 3"
    ):
        mode_settings("grpo", base, data__batch_size=3, optimizer__accumulate=3)
