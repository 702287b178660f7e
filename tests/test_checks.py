"""Argument checks name the argument; the public function adds its own name, once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rwkv7_jax import checks


def message_of(error, call, *arguments):
    with pytest.raises(error) as raised:
        call(*arguments)
    return str(raised.value)


@pytest.mark.parametrize("error", [TypeError, ValueError, ImportError])
def test_the_message_begins_with_the_public_function_and_keeps_the_type(error):
    with pytest.raises(error) as raised, checks.prefix_errors("generate"):
        raise error("`tokens` must be integers; got float32.")
    assert type(raised.value) is error
    assert str(raised.value) == "generate: `tokens` must be integers; got float32."


def test_the_outermost_function_is_named():
    with (
        pytest.raises(ValueError) as raised,
        checks.prefix_errors("rollouts"),
        checks.prefix_errors("make_options"),
    ):
        checks.check_count(-1, 0, "`top_k`")
    assert str(raised.value) == "rollouts: `top_k` must be at least 0; got -1."


def test_a_failed_block_does_not_affect_the_next():
    for function in ("first", "second"):
        with pytest.raises(
            TypeError, match=f"^{function}: `reward` must be a function"
        ):
            with checks.prefix_errors(function):
                checks.check_function(3, "`reward`")
    assert message_of(TypeError, checks.check_function, 3, "`reward`").startswith(
        "`reward`"
    )


def test_the_traceback_still_ends_at_the_check():
    with pytest.raises(ValueError) as raised, checks.prefix_errors("generate"):
        checks.check_count(0, 1, "`length`")
    assert raised.traceback[-1].name == "check_count"


def test_other_errors_are_unchanged():
    for error in (NotImplementedError("here"), KeyError("name")):
        with pytest.raises(type(error)) as raised, checks.prefix_errors("generate"):
            raise error
        assert raised.value is error and raised.value.args in (("here",), ("name",))
    with pytest.raises(UnicodeDecodeError) as raised, checks.prefix_errors("generate"):
        b"\xff".decode()
    assert str(raised.value).startswith("'utf-8' codec")


@pytest.mark.parametrize(
    ("check", "arguments", "error", "message"),
    [
        (
            checks.check_function,
            (1, "`reward`"),
            TypeError,
            "`reward` must be a function; got int.",
        ),
        (
            checks.check_number,
            ("a", 0, 1, "`p`"),
            TypeError,
            "`p` must be a number; got str.",
        ),
        (
            checks.check_number,
            (float("nan"), 0, 1, "`p`"),
            ValueError,
            "`p` must be from 0 to 1; got nan.",
        ),
        (
            checks.check_count,
            (1.5, 1, "`n`"),
            TypeError,
            "`n` must be an integer; got float.",
        ),
        (
            checks.check_count,
            (0, 1, "`n`"),
            ValueError,
            "`n` must be at least 1; got 0.",
        ),
        (
            checks.check_ids,
            ([0.5], 4, "`ids`"),
            TypeError,
            "`ids` must hold integers; got float64.",
        ),
        (
            checks.check_ids,
            ([1, 9], 4, "`ids`"),
            ValueError,
            "`ids` must hold ids at least 0 and below 4; got 9 at position 1.",
        ),
        (
            checks.check_tokens,
            (np.array([[1, 2], [3, 4]]), 4),
            ValueError,
            "`tokens` must be at least 0 and below 4; got 4 at position (1, 1).",
        ),
        (
            checks.check_lengths,
            (np.array([2, 9]), (2, 5)),
            ValueError,
            "`lengths` must lie between 0 and 5; got 9 in row 1.",
        ),
        (
            checks.check_lengths,
            (np.array([2]), (2, 5)),
            ValueError,
            "`lengths` must have one number for each of 2 rows; got shape (1,).",
        ),
        (
            checks.check_prompts,
            ([], 4),
            ValueError,
            "`prompts` must hold a prompt; got 0.",
        ),
        (
            checks.check_prompts,
            ([[1], []], 4),
            ValueError,
            "`prompts` row 1 must hold an id ([0] begins a text); got 0.",
        ),
        (checks.typed_key, (3,), TypeError, "`key` must be a random key; got int."),
    ],
)
def test_a_message_begins_with_the_argument(
    check, arguments, error, message, unchecked
):
    assert message_of(error, check, *arguments) == message


def test_traced_values_are_checked_by_dtype_alone(unchecked):
    @jax.jit
    def compiled(tokens):
        checks.check_tokens(tokens, 4)
        return tokens

    assert compiled(jnp.array([[9]])).shape == (1, 1)
    with pytest.raises(TypeError, match="`tokens` must be integers; got float32"):
        compiled(jnp.ones((1, 1)))


def test_checked_values_are_returned_as_builtin_types():
    assert checks.check_ids([], 4, "`ids`").dtype == np.int32
    assert checks.check_count(np.int64(3), 1, "`n`") == 3
    assert checks.check_prompts(np.array([[1, 2]]), 4) == [[1, 2]]
    raw = jax.random.key_data(jax.random.key(1))
    assert checks.typed_key(raw) == jax.random.key(1)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n it is cut.\nand pages\n"), "it is cut"),
        (ValueError(), "ValueError"),
        (MemoryError(" \n"), "MemoryError"),
        (ValueError("a\x1b[2Jb"), "a?[2Jb"),
        (ValueError(300 * "x"), 200 * "x"),
    ],
)
def test_the_first_line_of_any_error_is_one_short_line(error, line):
    assert checks.first_line(error) == line


def test_without_a_limit_the_first_line_is_complete():
    assert checks.first_line(ValueError(300 * "x"), limit=None) == 300 * "x"


def test_an_object_of_a_reloaded_class_is_rejected():
    first = type("State", (), {})
    again = type("State", (), {})
    message = message_of(TypeError, checks.check_instance, first(), again, "`state`")
    assert message == (
        "`state` must be a State; got one from a module that was reloaded since; restart Python."
    )
