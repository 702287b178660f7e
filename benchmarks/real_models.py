"""Any checkpoint: agreement with the `rwkv` package, the loss in 8 bits, and tuning methods.

    python -m benchmarks.real_models model.pth --data poems.jsonl --retention general.jsonl

The start state, an upscaled state and LoRA of the size of the start state are tuned at every rate
of a list, at equal steps and batches. The table shows the best rate next to the rate that the
search of `train.py` finds in a tenth of a run, and that of a search in two rounds. Metrics are bits
per byte on held-out data and on data that must not be forgotten. `--data digits` is for BlinkDL's
model that reverses numbers: it learns to copy them and must not forget reversing. Its metrics are
nats and the fraction of correct digits. Cells are cached, so an interrupted run resumes.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import math
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

import rwkv7_jax as rwkv
from benchmarks import record, text_table
from benchmarks.paper_table import Cells
from benchmarks.rate_search import (
    END,
    Subject,
    copy_rows,
    halved,
    searched,
    tuned_at_all_rates,
)
from benchmarks.rates import at_edge, lowest_loss_rate
from rwkv7_jax.checkpoints import model_tokenizer
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.data.loading import batch_at, token_stream, windows
from rwkv7_jax.evaluation.scoring import (
    frequency_nats,
    score_answers,
    target_bytes,
)

KINDS = {
    "start state": (0.1, 0.3, 1.0, 3.0),
    "LoRA": (0.003, 0.01, 0.03, 0.1),
    "upscaled, whitened": (0.03, 0.1, 0.3, 1.0),
}
DIGITS = "digits"
LENGTH = 64
WINDOWS = 48
MEASURED = 10**6  # seed of held-out rows of digits


class Data(NamedTuple):
    """What a model is tuned on and measured by.

    Attributes:
        batch: from a step and a seed to its rows.
        calibration: tokens that features are fitted to.
        measure: from weights, a start state and a number of windows to the losses, by name.
        guess: from a number of windows to the loss on new data of guessing by frequency.
    """

    batch: Callable[[int, int], Batch]
    calibration: Any
    measure: Callable[[Any, rwkv.RWKV7State, int], dict[str, float]]
    guess: Callable[[int], float]


def reversed_rows(batch: Batch) -> Batch:
    """Turns rows that copy a number into rows that reverse it."""
    tokens = np.array(batch.tokens)
    for row, counted in zip(tokens, np.asarray(batch.mask), strict=True):
        count = int(counted.sum()) - 1
        row[count + 1 : 2 * count + 1] = row[:count][::-1]
    assert (tokens[:, -1] == END).all()
    return batch.replace(tokens=tokens)


def digits(model: rwkv.RWKV7, rows: int) -> Data:
    """Makes the task of copying numbers, for the model that reverses them."""
    held_out = copy_rows(MEASURED, WINDOWS)
    backwards = reversed_rows(held_out)

    def measure(params, state, count: int) -> dict[str, float]:
        first = slice(0, count)
        answers = functools.partial(score_answers, model, params, state, rows=count)
        new = answers(held_out.select_rows(first))
        old = answers(backwards.select_rows(first))
        return {
            "new": new.nats,
            "old": old.nats,
            "new_accuracy": new.accuracy,
            "old_accuracy": old.accuracy,
        }

    return Data(
        batch=lambda step, seed: copy_rows(1000 * seed + step, rows),
        calibration=copy_rows(MEASURED + 1, WINDOWS).inputs,
        measure=measure,
        guess=lambda count: frequency_nats(held_out.select_rows(slice(0, count))),
    )


def texts(
    model: rwkv.RWKV7, tokenizer: rwkv.Tokenizer, data: str, retention: str, rows: int
) -> Data:
    """Makes the task of predicting text.

    Args:
        model: the shell.
        tokenizer: of its vocabulary.
        data: the text to learn; a tenth is held out.
        retention: what must not be forgotten; its held-out twentieth is read.
        rows: of a batch.
    """
    train = token_stream(data, tokenizer, split="train", held_out=0.1)
    held_out = {}
    for name, path, share in (("new", data, 0.1), ("old", retention, 0.05)):
        stream = token_stream(path, tokenizer, split="held_out", held_out=share)
        held_out[name] = functools.partial(windows, stream, 4 * LENGTH)

    def batch(step: int, seed: int) -> Batch:
        return batch_at(train, step, batch_size=rows, length=LENGTH, seed=seed)

    def measure(params, state, count: int) -> dict[str, float]:
        bits = {}
        for name, read in held_out.items():
            found = rwkv.score(model, params, state, read(count), tokenizer)
            bits[name] = found.bits_per_byte
        return bits

    def guess(count: int) -> float:
        read = held_out["new"](count)
        bits = frequency_nats(read) * np.sum(np.asarray(read.mask)) / math.log(2)
        return float(bits / np.sum(target_bytes(read, tokenizer)))

    calibration = windows(train, LENGTH, WINDOWS).inputs
    return Data(batch, calibration, measure, guess)


def package_logits(
    params, config: rwkv.RWKV7Config, ids: np.ndarray
) -> np.ndarray | None:
    """Computes the logits of the `rwkv` package; None where it is not installed."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    with (
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        try:
            from rwkv.model import RWKV  # pyright: ignore[reportMissingImports]
        except ImportError:
            return None
        # As a file of ours, so that checkpoints of any layout can be compared.
        rwkv.save_model(f"{folder}/model.pth", params, config)
        model = RWKV(model=f"{folder}/model", strategy="cpu fp32")
        logits, _ = model.forward(ids.tolist(), None, full_output=True)
    return logits.numpy()


def compared(logits: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Compares logits with others: the largest and the root mean square difference, and sizes."""
    off = np.asarray(logits, np.float64) - expected
    return {
        "largest_difference": float(np.abs(off).max()),
        "relative_rms": float(np.sqrt(np.mean(off**2) / np.mean(expected**2))),
        "largest_logit": float(np.abs(expected).max()),
        "same_choice": float(np.mean(logits.argmax(-1) == expected.argmax(-1))),
    }


def check(model, forms: dict[str, Any], data: Data) -> dict[str, Any]:
    """Measures the untuned model, and compares its logits: the package's, and those of 8 bits."""
    ids = np.asarray(data.batch(0, 0).tokens)[0, :-1]
    zero = rwkv.init_state(model.config)
    forward = jax.jit(lambda tree: model.apply({"params": tree}, ids[None], zero)[0][0])
    floats = np.asarray(forward(forms["float32"]))
    report: dict[str, Any] = {
        "untuned": data.measure(forms["float32"], zero, WINDOWS),
        "untuned, int8": data.measure(forms["int8"], zero, WINDOWS),
        "int8 logits": compared(np.asarray(forward(forms["int8"])), floats),
    }
    expected = package_logits(forms["float32"], model.config, ids)
    if expected is not None:
        report["rwkv package"] = compared(floats, expected)
    return report


def start_of(kind: str, model, params, data: Data, seed: int) -> Any:
    """Makes the start of tuning: a state, or low-rank changes of as many numbers as a state has."""
    config = model.config
    if kind == "start state":
        return rwkv.init_state(config)
    if kind == "LoRA":
        return text_table.low_rank_changes(params, max(config.head_size // 8, 1), seed)
    prepare, widths, _ = text_table.UPSCALED[kind]
    return rwkv.upscale(
        model, params, data.calibration, prepare=prepare, widths=widths, seed=seed
    )


def loss_of(kind: str, model, params) -> Any:
    """Makes the loss of a tuning method."""
    if kind != "LoRA":
        return rwkv.state_loss(model, params, leaves=text_table.leaves_of(kind))
    loss_of_weights = rwkv.pretrain_loss(model, l2wrap=0.0)

    def loss(params, changes, rows):
        return loss_of_weights(text_table.with_low_rank(params, changes), rows)

    return jax.tree_util.Partial(loss, params)


def measured(
    kind: str, model, params, data: Data, trained: Any, count: int = WINDOWS
) -> dict[str, float]:
    """Measures a tuned state, or tuned weights."""
    if kind != "LoRA":
        return data.measure(params, trained, count)
    weights = text_table.with_low_rank(params, trained)
    return data.measure(weights, rwkv.init_state(model.config), count)


def subject_of(kind: str, model, params, data: Data) -> Subject:
    """Makes a tuning method for the search of a rate."""

    def measure(trained: Any, count: int) -> float:
        return measured(kind, model, params, data, trained, count)["new"]

    return Subject(
        config=model.config,
        rates=KINDS[kind],
        loss=loss_of(kind, model, params),
        statistics=None,
        optimizer=functools.partial(text_table.optimizer_of, kind),
        start=functools.partial(start_of, kind, model, params, data),
        batch=data.batch,
        measure=measure,
        guess=data.guess,
    )


def tuned(
    kind: str, model, params, data: Data, *, steps: int, rows: int, seed: int
) -> dict[str, Any]:
    """Tunes at every rate and measures each, and searches for a rate as a run does."""
    subject = subject_of(kind, model, params, data)
    by_rate = {}
    for rate, trained in tuned_at_all_rates(subject, seed, steps):
        by_rate[str(rate)] = measured(kind, model, params, data, trained)
    best = lowest_loss_rate({rate: one["new"] for rate, one in by_rate.items()})
    search = searched(subject, seed, steps=steps, rows=rows)
    rounds = halved(subject, seed, steps=steps, rows=rows)

    def excess(rate: float | None) -> float | None:
        # A rate that was found and is not one of the sweep's has no loss here.
        found = by_rate.get(str(rate), {}).get("new")
        return found and found / by_rate[best]["new"] - 1

    return {
        "best_rate": float(best),
        "at_edge": at_edge(best, subject.rates),
        "found_rate": search["rate"],
        "excess_of_found": excess(search["rate"]),
        "search": search,
        "halved": rounds | {"excess": excess(rounds["rate"])},
        "by_rate": by_rate,
    }


def main() -> None:
    """Prints a line for each tuning method and seed; with `--json`, writes all numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a checkpoint of any layout")
    parser.add_argument("--data", required=True, help=f"text to learn, or {DIGITS}")
    parser.add_argument(
        "--retention", default="stdlib", help="text that must not be forgotten"
    )
    parser.add_argument("--vocabulary", help="as for the command rwkv7")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument(
        "--cells", default="runs/real-models", help="folder of the results' cache"
    )
    options = parser.parse_args()
    record.require_rows_kept(options.json, "tuned", options.kinds)
    params, config = rwkv.load_model(options.model, dtype="float32")
    rounded, _ = rwkv.load_model(options.model, dtype="float32", weights="int8")
    # Of rows this short, compiling is most of the time, and the scan compiles fastest.
    model = rwkv.RWKV7(dataclasses.replace(config, implementation="scan"))
    data = data_of(model, options)
    cells = Cells(Path(options.cells))
    cell = functools.partial(cell_name, options)
    forms = {"float32": params, "int8": rounded}
    checked = cells.get(cell("untuned"), lambda: check(model, forms, data))["found"]
    for name, numbers in checked.items():
        print(f"{name:<24}{numbers}", flush=True)
    run = functools.partial(
        tuned,
        model=model,
        params=params,
        data=data,
        steps=options.steps,
        rows=options.rows,
    )
    runs: dict[str, list] = {}
    for kind in options.kinds:
        runs[kind] = []
        for seed in range(options.seeds):
            make = functools.partial(run, kind, seed=seed)
            numbers = cells.get(cell(kind, seed), make)["found"]
            runs[kind].append(numbers)
            print(f"{kind:<20} seed {seed} {describe(numbers)}", flush=True)
    # Once: the cells keep what is known, and half a table must not replace a whole one.
    write(options, checked, runs)


def data_of(model: rwkv.RWKV7, options: argparse.Namespace) -> Data:
    """Reads the data that the options name."""
    if options.data == DIGITS:
        return digits(model, options.rows)
    tokenizer = model_tokenizer(
        options.model,
        model.config.vocab_size,
        options.vocabulary,
        argument="`--vocabulary`",
    )
    return texts(model, tokenizer, options.data, options.retention, options.rows)


def describe(numbers: dict[str, Any]) -> str:
    """Formats the rates of one tuning method, and the result at its best rate."""
    best = numbers["best_rate"]
    edge = " (edge)" if numbers["at_edge"] else ""
    return (
        f"rate {best}{edge} found {numbers['found_rate']} "
        f"{numbers['by_rate'][str(best)]}"
    )


def cell_name(options: argparse.Namespace, *parts: Any) -> str:
    """Names a cell of the cache after what its result depends on besides the code."""
    on = (options.model, options.data, options.retention, options.vocabulary)
    return " | ".join(map(str, (*on, options.steps, options.rows, *parts)))


def write(
    options: argparse.Namespace, checked: dict[str, Any], runs: dict[str, list]
) -> None:
    """Writes the numbers that are known, where a file is asked for."""
    if not options.json:
        return
    record.write(
        options.json,
        "benchmarks.real_models",
        packages=("jax", "optax", "rwkv"),
        model=Path(options.model).name,
        steps=options.steps,
        rows=options.rows,
        untuned=checked,
        tuned=runs,
    )


if __name__ == "__main__":
    main()
