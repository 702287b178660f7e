"""Grade-school maths: the gain of each tuning method on reference answers of GSM8K.

    python -m benchmarks.gsm8k_bits --train train.jsonl --test test.jsonl \
        --json benchmarks/results/cpu-gsm8k-bits.json

The files are those of github.com/openai/grade-school-math; they are read in place. Rows are the
base, the base after a prompt of all training rows, a start state, an upscaled state with DBP, LoRA
of the size of each of the two, and all weights. The same search selects each method's rate, on
training questions reserved for it. Columns are bits per byte of reference answers; how many
generated answers end in "#### number", how many of their annotations <<sum=result>> are correct,
how many answers are correct; and bits per byte of the base's own text. All rows answer the same
questions, so differences from the base are paired. Cells are cached.

For the base of English of configs/pretrain_english.py:

    rwkv7 convert runs/english/model.pth runs/english-base --vocabulary runs/english.txt
    python -m benchmarks.gsm8k_bits --train train.jsonl --test test.jsonl \
        --model runs/english-base --retention runs/debian.jsonl \
        --json benchmarks/results/cpu-gsm8k-bits-english.json

A larger base needs a GPU. Parallel programs share the compilation cache:

    for row in base prompt start upscaled small-lora lora weights; do
        JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false python -m benchmarks.gsm8k_bits \
            ... --implementation chunked --only $row --cells cells/$row &
    done; wait
    python -m benchmarks.gsm8k_bits ... --gather cells/*

Each program computes a row. The last command makes the table from the available cells.
"""

import argparse
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record, text_table
from benchmarks.gsm8k import Subject, judged
from benchmarks.lab import ASSETS
from benchmarks.paper_table import Cells
from benchmarks.rate_search import schedule
from rwkv7_jax.data.batch import Batch
from rwkv7_jax.evaluation.task_scores import QuestionScores
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.training.costs import tree_size
from rwkv7_jax.training.stacked_step import (
    create_stack,
    make_stacked_step,
    params_of,
    stack_params,
)
from rwkv7_jax.tuning.rate_search import LEAST_STEPS, find_rate
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import trainable_mask

START = "start state"
UPSCALED = "upscaled, raw, DBP"
SMALL_LORA = "LoRA as the start state"
LORA = "LoRA as the upscaled state"
WEIGHTS = "all weights"
METHODS = (START, UPSCALED, SMALL_LORA, LORA, WEIGHTS)
# Names of the rows on the command line.
ROWS = {
    "base": "base",
    "prompt": "base after a prompt of all training rows",
    "start": START,
    "upscaled": UPSCALED,
    "small-lora": SMALL_LORA,
    "lora": LORA,
    "weights": WEIGHTS,
}
PROMPT = ROWS["prompt"]
# The same for every method. States want large rates and weights small ones.
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# Questions that the features of an upscaled state are fitted to.
SHOWN = 48


class Method(NamedTuple):
    """A tuning method.

    Attributes:
        start: from a seed to what is tuned.
        loss: of it and a batch.
        tx: an optimizer whose learning rate is 1 at its highest, from a number of steps.
        use: from what was tuned to weights and a start state.
        size: the numbers that are tuned.
        statistics: for DBP; None without it.
    """

    start: Callable[[int], Any]
    loss: Any
    tx: Callable[[int], optax.GradientTransformation]
    use: Callable[[Any], tuple[Any, Any]]
    size: int
    statistics: Any = None


def state_method(kind: str, subject: Subject) -> Method:
    """Makes the method that tunes a start state, or an upscaled one."""
    model = subject.model
    params = subject.params
    leaves = text_table.leaves_of(kind)

    def start(seed: int) -> Any:
        if kind == START:
            return rwkv.init_state(subject.config)
        prepare, widths, _ = text_table.UPSCALED[kind]
        shown = subject.batch(subject.training[:SHOWN]).inputs
        return rwkv.upscale(
            model, params, shown, prepare=prepare, widths=widths, seed=seed
        )

    first = start(0)
    mask = jax.tree.leaves(trainable_mask(first, leaves))
    pairs = zip(jax.tree.leaves(first), mask, strict=True)
    statistics = None
    if text_table.is_online(kind):
        statistics = state_statistics(model, params, leaves=leaves, rows=4)
    return Method(
        start,
        rwkv.state_loss(model, params, leaves=leaves),
        lambda steps: text_table.optimizer_of(kind, schedule(steps)),
        lambda tuned: (params, tuned),
        sum(leaf.size for leaf, is_tuned in pairs if is_tuned),
        statistics,
    )


def low_rank_method(size: int, subject: Subject) -> Method:
    """Makes the method that tunes low-rank changes of at most so many numbers, rank 1 at least."""
    params = subject.params
    each = tree_size(text_table.low_rank_changes(params, 1, 0))
    rank = max(size // each, 1)
    zero = rwkv.init_state(subject.config)
    whole = rwkv.pretrain_loss(subject.model, l2wrap=0.0)

    def loss(params, changes, rows):
        return whole(text_table.with_low_rank(params, changes), rows)

    return Method(
        lambda seed: text_table.low_rank_changes(params, rank, seed),
        jax.tree_util.Partial(loss, params),
        lambda steps: text_table.optimizer_of("LoRA", schedule(steps)),
        lambda tuned: (text_table.with_low_rank(params, tuned), zero),
        rank * each,
    )


def method(kind: str, subject: Subject) -> Method:
    """Makes a method by the name of its row."""
    if kind in (START, UPSCALED):
        return state_method(kind, subject)
    if kind in (SMALL_LORA, LORA):
        like = START if kind == SMALL_LORA else UPSCALED
        return low_rank_method(state_method(like, subject).size, subject)
    zero = rwkv.init_state(subject.config)
    return Method(
        lambda seed: subject.params,
        rwkv.pretrain_loss(subject.model, l2wrap=0.0),
        lambda steps: text_table.optimizer_of(WEIGHTS, schedule(steps)),
        lambda tuned: (tuned, zero),
        tree_size(subject.params),
    )


def searched(tuned: Method, subject: Subject) -> dict[str, Any]:
    """Finds a method's rate: all on a quarter of the rows, judged on reserved questions."""
    steps = max(subject.steps // 4, LEAST_STEPS)
    rows = max(subject.rows // 4, 1)

    def batches() -> Iterator[Batch]:
        for step in itertools.count():
            yield subject.batch(subject.training_rows(step, 0)[:rows])

    choice = find_rate(
        tuned.loss,
        tuned.tx(steps),
        tuned.start(0),
        batches(),
        lambda found: subject.judge(*tuned.use(found)),
        steps=steps,
        rates=RATES,
        statistics=tuned.statistics,
    )
    return {
        "numbers": tuned.size,
        "rate": choice.rate,
        "edge": choice.edge,
        "untuned": choice.base,
        "losses": {str(rate): loss for rate, loss in choice.losses.items()},
    }


def tuned_rows(
    one: Method, subject: Subject, rate: float, seeds: int
) -> list[dict[str, Any]]:
    """Tunes with every seed, all of them as one stack, and measures each."""
    tx = one.tx(subject.steps)
    step = make_stacked_step(
        one.loss, tx, np.full(seeds, rate), statistics=one.statistics
    )
    starts = [one.start(seed) for seed in range(seeds)]
    train = create_stack(stack_params(starts), tx)
    for number in range(subject.steps):
        questions = []
        for seed in range(seeds):
            questions += subject.training_rows(number, seed)
        train, _ = step(train, subject.batch(questions))
    found = []
    for seed in range(seeds):
        found.append(subject.measure(*one.use(params_of(train.params, seed))))
    return found


def prompted(subject: Subject, seed: int) -> dict[str, Any]:
    """Measures the base after it has read all rows that tuning with this seed reads."""
    ids: list[int] = []
    for step in range(subject.steps):
        for one in subject.training_rows(step, seed):
            ids += [*one.prompt, *one.completion]
    state = prefill_state(subject.model, subject.params, np.asarray(ids))
    return subject.measure(subject.params, state) | {"prompt_ids": len(ids)}


def column(rows: Sequence[dict[str, Any]], name: str) -> list[QuestionScores]:
    """Returns one column of a row's seeds, question by question."""
    scores = []
    for row in rows:
        totals = np.asarray(row["bits" if name == "bits_per_byte" else name], float)
        weights = np.ones(len(totals))
        if name == "bits_per_byte":
            weights = np.asarray(row["bytes"], float)
        questions = tuple(str(number) for number in range(len(totals)))
        scores.append(QuestionScores(totals, weights, questions))
    return scores


def summary(
    rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns a row's columns: means over seeds, their range, and paired differences."""
    found: dict[str, Any] = {}
    for name in ("bits_per_byte", "well_formed", "right"):
        scores = column(rows, name)
        (first,) = column(base, name)
        values = [one.value for one in scores]
        # The mean of the seeds, so that the error is that of the questions.
        totals = np.mean([one.totals for one in scores], axis=0)
        mean = dataclasses.replace(scores[0], totals=totals)
        difference, error = mean.difference(first)
        found[name] = {
            "value": float(np.mean(values)),
            "by_seed": values,
            "difference": difference,
            "difference_error": error,
        }
    written = sum(row["annotations"] for row in rows)
    held = sum(row["annotations_that_hold"] for row in rows)
    found["annotations"] = {"written": written, "hold": held}
    found["own_text"] = float(np.mean([row["own_text"] for row in rows]))
    return found


def line(name: str, found: dict[str, Any]) -> str:
    """Formats a row."""
    bits = found["bits_per_byte"]
    spread = ", ".join(f"{value:.3f}" for value in bits["by_seed"])
    notes = found["annotations"]
    return (
        f"{name:42}{bits['value']:7.3f} ({spread})  {bits['difference']:+.3f} "
        f"+-{bits['difference_error']:.3f}  #### {found['well_formed']['value']:.2f}  "
        f"<<>> {notes['hold']}/{notes['written']}  right {found['right']['value']:.3f}  "
        f"own text {found['own_text']:.3f}"
    )


class Table:
    """The rows of the table, each of cells that are cached under the names of what they hold."""

    def __init__(self, subject: Subject, cells: Cells, label: str, seeds: int):
        """Computes nothing yet.

        Args:
            subject: what is tuned and measured.
            cells: their cache.
            label: of the files and sizes that all cells depend on.
            seeds: of every method.
        """
        self.subject = subject
        self.cells = cells
        self._label = label
        self._seeds = seeds

    def _cell(self, name: str, make: Callable[[], Any]) -> Any:
        return self.cells.get(f"{name} | {self._label}", make)

    def _is_cached(self, name: str) -> bool:
        return f"{name} | {self._label}" in self.cells.results

    def has_prompts(self) -> bool:
        """Tells whether the base after each of the prompts is cached."""
        return all(self._is_cached(f"{PROMPT} | {seed}") for seed in range(self._seeds))

    def has(self, kind: str) -> bool:
        """Tells whether a method's search is cached, and its runs at the rate found."""
        search = f"{kind} | search"
        if not self._is_cached(search):
            return False
        rate = self.cells.results[f"{search} | {self._label}"]["found"]["rate"]
        return rate is None or self._is_cached(f"{kind} | {rate} | {self._seeds}")

    def base(self) -> list[dict[str, Any]]:
        """Measures the base."""
        zero = rwkv.init_state(self.subject.config)
        make = functools.partial(self.subject.measure, self.subject.params, zero)
        return [self._cell("base", make)["found"]]

    def prompts(self) -> list[dict[str, Any]]:
        """Measures the base after prompts, one a seed."""
        found = []
        for seed in range(self._seeds):
            make = functools.partial(prompted, self.subject, seed)
            found.append(self._cell(f"{PROMPT} | {seed}", make)["found"])
        return found

    def tuned(self, kind: str) -> tuple[dict[str, Any], Any]:
        """Finds a method's rate and tunes; returns what is known of it, and its runs.

        The runs are None where no rate is better than the base.
        """
        subject = self.subject
        # Of cells that are cached it is never made.
        made = functools.cache(lambda: method(kind, subject))
        search = self._cell(f"{kind} | search", lambda: searched(made(), subject))
        rate = search["found"]["rate"]
        known = {"numbers": search["found"]["numbers"], "search": search["found"]}
        if rate is None:
            return known, None
        runs = self._cell(
            f"{kind} | {rate} | {self._seeds}",
            lambda: tuned_rows(made(), subject, rate, self._seeds),
        )
        seconds = {"search": search["seconds"], "runs": runs["seconds"]}
        return known | {"seconds": seconds}, runs["found"]

    def report(self, kinds: Sequence[str], *, with_prompts: bool) -> dict[str, Any]:
        """Computes and prints the rows of the base, of its prompts and of methods."""
        base = self.base()
        report = {"base": summary(base, base)}
        print(line("base", report["base"]), flush=True)
        if with_prompts:
            prompts = self.prompts()
            size = prompts[0]["prompt_ids"]
            report[PROMPT] = summary(prompts, base) | {"prompt_ids": size}
            print(line(PROMPT, report[PROMPT]), flush=True)
        references = judged([one.answer for one in self.subject.measured])
        report["reference answers"] = {
            "well_formed": float(np.mean(references["well_formed"])),
            "annotations": references["annotations"],
            "annotations_that_hold": references["annotations_that_hold"],
        }
        print(f"{'reference answers':42}{report['reference answers']}", flush=True)
        for kind in kinds:
            known, runs = self.tuned(kind)
            report[kind] = known
            if runs is None:
                print(f"{kind:42} no rate of the list is better than the base")
                continue
            report[kind] = known | summary(runs, base)
            found = known["search"]
            edge = f" (the {found['edge']} tried)" if found["edge"] else ""
            name = f"{kind}, {known['numbers']:,} at {found['rate']:g}{edge}"
            print(line(name, report[kind]), flush=True)
        return report


def compute(row: str, table: Table) -> None:
    """Computes the cells of a single row."""
    if row == "base":
        table.base()
    elif row == "prompt":
        table.prompts()
    else:
        table.tuned(ROWS[row])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--train", required=True, help="train.jsonl of GSM8K, or a file in its format")
    add("--test", required=True, help="test.jsonl")
    add("--model", default=str(ASSETS / "tiny.pth"), help="a checkpoint of any layout")
    add("--retention", default="stdlib", help="text like the base's training text")
    add("--steps", type=int, default=80)
    add("--rows", type=int, default=4, help="questions per step")
    add("--length", type=int, default=384, help="most ids of a question")
    add("--questions", type=int, default=64, help="test questions to use")
    add("--tokens", type=int, default=192, help="most ids of an answer")
    add("--seeds", type=int, default=3)
    add("--kinds", nargs="+", default=METHODS, choices=METHODS)
    add("--json", help="file for the numbers")
    add("--cells", default="runs/gsm8k-bits", help="folder of the results' cache")
    add(
        "--implementation",
        default="scan",
        help="implementation of the WKV op; auto for the best",
    )
    add("--only", choices=ROWS, help="compute only this row's cells, without a table")
    add(
        "--gather",
        nargs="+",
        help="folders of cells; the table shows the available cells",
    )
    return parser.parse_args()


def main() -> None:
    """Runs the table, prints it, and writes JSON where asked."""
    options = parse_arguments()
    sizes = {}
    for name in ("steps", "rows", "length", "questions", "tokens"):
        sizes[name] = getattr(options, name)
    # "scan" compiles in a fraction of the time, which is much of what rows this short take.
    auto = options.implementation == "auto"
    subject = Subject(
        options.model,
        options.train,
        options.test,
        retention=options.retention,
        implementation=None if auto else options.implementation,
        **sizes,
    )
    sizes["questions"] = len(subject.measured)
    label = f"{options.model} | {options.train} | {options.test} | {sizes}"
    table = Table(subject, Cells(Path(options.cells)), label, options.seeds)
    if options.only:
        compute(options.only, table)
        return
    kinds = options.kinds
    with_prompts = True
    if options.gather:
        for folder in options.gather:
            table.cells.results.update(Cells(Path(folder)).results)
        kinds = [kind for kind in kinds if table.has(kind)]
        with_prompts = table.has_prompts()
    report = table.report(kinds, with_prompts=with_prompts)
    record.require_rows_kept(options.json, "rows_of_the_table", report)
    if options.json:
        record.write(
            options.json,
            "benchmarks.gsm8k_bits",
            packages=("jax", "optax"),
            **sizes,
            seeds=options.seeds,
            rates=RATES,
            implementation=options.implementation,
            share_of_training_questions_that_fit=subject.training_share,
            share_of_test_questions_that_fit=subject.test_share,
            rows_of_the_table=report,
        )


if __name__ == "__main__":
    main()
