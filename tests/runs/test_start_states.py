"""What tuning starts from, and which settings of tuning count at test time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smallest_runs import mode_settings, save_base_model

from rwkv7_jax.checkpoints.state_files import save_state
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.model.state import init_state
from rwkv7_jax.runs.modes.registry import make_mode


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns the path of a model of one layer."""
    path = tmp_path_factory.mktemp("base") / "base.pth"
    save_base_model(path)
    return path


def made(mode, base, folder, **changes):
    """Makes a mode and sets it up."""
    mode = make_mode(mode_settings(mode, base, **changes), folder)
    return mode


@pytest.mark.parametrize("mode", ["state", "grpo", "context"])
def test_a_run_starts_from_the_state_of_a_file(base, tmp_path, mode):
    config = made("state", base, tmp_path).model.config
    state = jax.tree.map(lambda x: jnp.full_like(x, 0.25), init_state(config))
    save_state(tmp_path / "poet.safetensors", state, config=config)
    start = str(tmp_path / "poet.safetensors")
    changes = {"start": start}
    if mode == "context":
        (tmp_path / "prompt.txt").write_text("a prompt")
        changes["test_time.context"] = str(tmp_path / "prompt.txt")
    found = made(mode, base, tmp_path, **changes).make_params()
    np.testing.assert_array_equal(found.wkv, state.wkv)
    assert found.wkv.dtype == jnp.float32


def test_a_run_starts_from_what_a_model_has_read(base, tmp_path):
    (tmp_path / "prompt.txt").write_text("the sea")
    mode = made("grpo", base, tmp_path, start=str(tmp_path / "prompt.txt"))
    ids = np.asarray(mode.tokenizer.encode("the sea"))
    expected = prefill_state(mode.model, mode.frozen, ids)
    np.testing.assert_allclose(mode.make_params().wkv, expected.wkv, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "changes", "sentence"),
    [
        (
            "grpo",
            {"tuning.anchor": 1.0, "tuning.anchor_path": "task:mapping"},
            "anchor",
        ),
        ("grpo", {"tuning.decorrelate": "dbp"}, "decorrelate"),
        ("distil", {"upscaling.size": 64}, "upscaling"),
        ("expert", {"decorrelation.rate": 0.5}, "decorrelation"),
        ("context", {"tuning.decorrelate": "whiten"}, "decorrelate"),
        ("pretrain", {"start": "state.pth"}, "start"),
        ("observer", {"start": "state.pth"}, "start"),
    ],
)
def test_a_setting_without_effect_is_refused(base, tmp_path, mode, changes, sentence):
    with pytest.raises(ValueError, match=f"`config.*{sentence}` must be left out"):
        made(mode, base, tmp_path, **changes)


def test_the_token_shifts_are_tuned_at_test_time_where_that_is_asked_for(
    base, tmp_path
):
    only = made("grpo", base, tmp_path)
    all_leaves = made("grpo", base, tmp_path, **{"tuning.leaves": "all"})
    params = all_leaves.make_params()
    assert all_leaves.trained_count(params) == sum(
        x.size for x in jax.tree.leaves(params)
    )
    assert only.trained_count(params) == params.wkv.size
