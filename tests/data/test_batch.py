import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.data.batch import Batch

TOKENS = np.arange(12, dtype=np.int32).reshape(3, 4)
MASK = np.ones((3, 3), np.float32)
BATCH = Batch(tokens=TOKENS, mask=MASK)


def test_fields_are_read_like_dict_items():
    assert BATCH["tokens"] is TOKENS
    assert list(BATCH) == list(BATCH.keys()) == ["tokens", "mask"]
    assert dict(BATCH).keys() == {"tokens", "mask"}
    assert "mask" in BATCH


def test_an_absent_field_is_not_a_key():
    assert BATCH.anchor is None
    assert "anchor" not in BATCH
    assert BATCH.get("anchor") is None
    with pytest.raises(KeyError, match="anchor"):
        BATCH["anchor"]


def test_inputs_and_targets_are_views_and_not_fields():
    assert isinstance(BATCH.inputs, np.ndarray)
    np.testing.assert_array_equal(BATCH.inputs, TOKENS[:, :-1])
    np.testing.assert_array_equal(BATCH.targets, TOKENS[:, 1:])
    assert "inputs" not in BATCH
    with pytest.raises(ValueError, match="no field 'targets'"):
        Batch.of({"tokens": TOKENS, "targets": TOKENS[:, 1:]})


def test_a_mapping_becomes_a_batch_and_a_batch_is_kept():
    converted = Batch.of({"tokens": TOKENS, "mask": MASK})
    assert converted.tokens is TOKENS
    assert converted.mask is MASK
    assert Batch.of(BATCH) is BATCH


def test_an_unknown_key_suggests_the_nearest_field():
    with pytest.raises(
        ValueError, match=r"score: `batch` .* field 'maks'; the nearest is 'mask'"
    ):
        with prefix_errors("score"):
            Batch.of({"tokens": TOKENS, "maks": MASK})


@pytest.mark.parametrize("batch", [{"mask": MASK}, {}], ids=["mask alone", "empty"])
def test_tokens_are_required(batch):
    with pytest.raises(ValueError, match=r"Batch.of: `batch` must hold 'tokens'"):
        Batch.of(batch)


def test_a_field_that_the_caller_needs_is_required():
    with pytest.raises(
        ValueError, match=r"score: `batch` must hold 'mask'; it has tokens\."
    ):
        with prefix_errors("score"):
            Batch.of(Batch(tokens=TOKENS), "mask")


def test_a_value_that_is_not_a_mapping_is_rejected():
    with pytest.raises(
        TypeError, match=r"`batch` must be a Batch or a mapping; got ndarray"
    ):
        Batch.of(TOKENS)


def test_replace_returns_a_copy():
    changed = BATCH | {"mask": 2 * MASK}
    assert changed.tokens is TOKENS
    assert changed.mask.max() == 2
    assert BATCH.mask.max() == 1
    with pytest.raises(ValueError, match="nearest is 'anchor'"):
        BATCH | {"anchr": TOKENS}
    with pytest.raises(AttributeError, match=r"frozen|assign"):
        BATCH.mask = MASK


def test_a_batch_passes_through_jit_vmap_and_eval_shape():
    @jax.jit
    def doubled(batch):
        return batch.replace(mask=2 * batch.mask)

    out = doubled(BATCH)
    assert isinstance(out, Batch)
    assert out.anchor is None
    np.testing.assert_array_equal(out.mask, 2 * MASK)
    sums = jax.vmap(lambda row: jnp.sum(row.tokens))(BATCH)
    np.testing.assert_array_equal(sums, TOKENS.sum(1))
    assert jax.eval_shape(doubled, BATCH).tokens.shape == (3, 4)


def test_rows_are_selected_from_every_field():
    part = BATCH.select_rows(slice(1, 3))
    np.testing.assert_array_equal(part.tokens, TOKENS[1:3])
    assert part.mask.shape == (2, 3)


def test_a_field_of_none_is_absent():
    converted = Batch.of({"tokens": TOKENS, "mask": MASK, "segments": None})
    assert "segments" not in converted
    assert "mask" not in converted | {"mask": None}
    with pytest.raises(ValueError, match=r"must hold 'mask'; it has tokens\."):
        Batch.of({"tokens": TOKENS, "mask": None}, "mask")
    with pytest.raises(ValueError, match="no field 'maks'; the nearest is 'mask'"):
        Batch.of({"tokens": TOKENS, "maks": None})
