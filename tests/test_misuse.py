"""Misuse of the public functions: one sentence that names the function and the argument.

Nothing here compiles: whatever is wrong is refused before. The rows lie in `misuse/`, by subject.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import misuse_evaluation
import misuse_files
import misuse_generation
import misuse_models
import misuse_observer
import misuse_test_time
import misuse_training
import numpy as np
import pytest
from misuse_values import (
    ADAM,
    BAD_BATCHES,
    MODEL,
    PARAMS,
    REMOTE,
    STATE,
    THREE,
    PublicFunction,
)

import rwkv7_jax as rwkv

LOSS = rwkv.pretrain_loss(MODEL)

FUNCTIONS: dict[str, PublicFunction] = {}
for table in (
    misuse_models,
    misuse_generation,
    misuse_training,
    misuse_files,
    misuse_evaluation,
    misuse_observer,
    misuse_test_time,
):
    FUNCTIONS |= table.FUNCTIONS

ROWS = []
for function, case in FUNCTIONS.items():
    for argument, kinds in case.wrong.items():
        for error, values in kinds.items():
            ROWS.extend((function, argument, error, value) for value in values)


def name_of_row(value: Any) -> str | None:
    """Names rows by function, argument and error; values have no short names."""
    return (
        value
        if isinstance(value, str) and len(value) < 30
        else getattr(value, "__name__", "")
    )


@pytest.mark.parametrize(
    ("function", "argument", "error", "value"), ROWS, ids=name_of_row
)
def test_a_misuse_is_one_sentence_that_names_function_and_argument(
    unchecked, function, argument, error, value
):
    case = FUNCTIONS[function]
    with pytest.raises(error) as caught:
        case.call(**(case.right | {argument: value}))
    message = str(caught.value)
    # A method of a function's result, or one of its arguments, may have rows of its own.
    assert message.startswith(f"{function.partition(' of ')[0]}: ")
    # A field of the argument counts: `batch.mask`, `states[1]`.
    assert f"`{argument}" in message
    assert "\n" not in message


def test_the_table_holds_every_public_name_and_enough_rows():
    assert len(ROWS) >= 200
    covered = {function.split(" of ")[0].partition(".")[0] for function in FUNCTIONS}
    modules_and_results = {"data", "RWKV7State"}
    assert set(rwkv.__all__) - covered == modules_and_results
    # Every function in the table takes what is right, where that needs no compiling.
    for function in (
        "init_state",
        "repeat",
        "select",
        "stack",
        "build_optimizer",
        "packed",
    ):
        case = FUNCTIONS[function]
        assert case.call(**case.right) is not None


@pytest.mark.parametrize("batch", BAD_BATCHES)
def test_a_step_refuses_a_batch_before_it_compiles(unchecked, batch):
    train = rwkv.TrainState.create(PARAMS, ADAM)
    step = rwkv.make_train_step(LOSS, ADAM)
    evaluate = rwkv.make_eval_step(LOSS)
    for call in (lambda: step(train, batch), lambda: evaluate(PARAMS, batch)):
        with pytest.raises(ValueError, match=r"^\w+: `batch"):
            call()


@pytest.mark.parametrize("load", [rwkv.load_model, rwkv.load_state])
@pytest.mark.parametrize("path", REMOTE)
def test_a_remote_path_is_named_with_its_download_command(load, path):
    with pytest.raises(
        ValueError, match=r"ownload it first.* `(curl|hf|gcloud|aws) "
    ) as caught:
        load(path)
    assert path in str(caught.value)


def test_values_of_common_types_pass():
    for alpha in itertools.chain(
        (0, 1.0), (np.float32(0.5), jnp.float32(2), np.array(1.0))
    ):
        assert rwkv.scaled(STATE, alpha).batch == 1
    for rows in (
        0,
        np.int64(1),
        [0, 2],
        (1,),
        range(2),
        np.array([True, False, True]),
        slice(2),
    ):
        assert rwkv.select(THREE, rows).batch >= 1
