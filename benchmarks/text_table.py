"""Real text: the gain of each method that tunes the small base model on an unseen style.

    python -m benchmarks.text_table --json benchmarks/results/cpu-text-table.json \
        --pictures benchmarks/results

Rows are the base, the base after a prompt, a start state, upscaled states (raw features, whitened,
raw with DBP), LoRA on the four projections with the size of an upscaled state, and all weights, at
equal steps and batches, on three styles and three seeds. Columns are held-out bits per byte, by
position, and on the base's own text. A sweep with the first seed selects the learning rate of each
tuned row, the best on the mean of the styles; the program reports a rate at the edge of the sweep.
Every cell is cached as soon as it is complete, so an interrupted run resumes; `--cached` makes the
table from the available cells.
"""

import argparse
import functools
import math
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.lab import ASSETS, rate_at
from benchmarks.paper_table import Cells, rounded
from benchmarks.rates import at_edge
from rwkv7_jax.data.loading import batch_at, token_stream, windows
from rwkv7_jax.data.token_streams import TokenStream
from rwkv7_jax.evaluation.scoring import Score, score
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.reports import plots as pictures
from rwkv7_jax.training.costs import tree_size
from rwkv7_jax.tuning.read_statistics import state_statistics
from rwkv7_jax.tuning.state_tuning import state_loss, trainable_mask

STYLES = ("charmaps", "topics-capitals", "c-headers")
OWN = "stdlib"
STEPS = 80
ROWS = 4
LENGTH = 256
# LoRA has as many numbers as an upscaled state: 65,536.
RANK = 16
PROJECTIONS = ("receptance", "key", "value", "output")


# Features of the upscaled states: how they are prepared, their widths, and whether DBP is on.
_WIDTHS = (1.0, 4.0, 16.0)
UPSCALED = {
    "upscaled, raw": ("none", (1.0,), False),
    "upscaled, whitened": ("whiten", _WIDTHS, False),
    "upscaled, raw, DBP": ("none", (1.0,), True),
}

# Learning rates of the sweep.
RATES = {
    "start state": (0.3, 1.0, 3.0, 10.0),
    **dict.fromkeys(UPSCALED, (0.1, 0.3, 1.0)),
    "LoRA": (0.01, 0.03, 0.1),
    "all weights": (6e-4, 2e-3, 6e-3, 2e-2),
}


@functools.cache
def base():
    """Loads the shipped model of a million parameters, float32."""
    params, config = rwkv.load_model(ASSETS / "tiny.pth", dtype="float32")
    return rwkv.RWKV7(config), params


@functools.cache
def stream(style: str, split: str) -> TokenStream:
    """Reads a text's ids; a tenth is held out, of the base's own text what it never saw."""
    share = 0.05 if style == OWN else 0.1
    return token_stream(
        style,
        rwkv.Tokenizer.bytes(),
        split=split,
        held_out=share,
    )


def start(kind: str, style: str, seed: int):
    """Makes the trainables before tuning."""
    model, params = base()
    if kind == "start state":
        return rwkv.init_state(model.config)
    if kind in UPSCALED:
        prepare, widths, _ = UPSCALED[kind]
        text = windows(stream(style, "train"), LENGTH, 48).inputs
        return rwkv.upscale(
            model,
            params,
            text,
            prepare=prepare,
            widths=widths,
            seed=seed,
        )
    if kind == "all weights":
        return params
    return low_rank_changes(params, RANK, seed)


def low_rank_changes(params, rank: int, seed: int):
    """Makes low-rank changes of the four projections of each layer, which add nothing yet."""
    keys = iter(jax.random.split(jax.random.key(seed), 16))

    def low_rank(weight):
        shape = weight.shape
        down = jax.random.normal(next(keys), (*shape[:-2], rank, shape[-1]))
        return {
            "down": down / math.sqrt(shape[-1]),
            "up": jnp.zeros((*shape[:-1], rank)),
        }

    return {
        part: {
            name: low_rank(params[part]["att"][name]["weight"]) for name in PROJECTIONS
        }
        for part in ("layer_0", "layers")
        if part in params
    }


def with_low_rank(params, adapters):
    """Adds low-rank changes to the weights."""
    changed = dict(params)
    for part, by_name in adapters.items():
        att = dict(params[part]["att"])
        for name, factors in by_name.items():
            change = jnp.matmul(factors["up"], factors["down"])
            att[name] = {"weight": att[name]["weight"] + change}
        changed[part] = params[part] | {"att": att}
    return changed


def loss_of(kind: str):
    """Makes the loss of a row's trainables and a batch."""
    model, params = base()
    whole = rwkv.pretrain_loss(model, l2wrap=0.0)
    if kind == "all weights":
        return whole
    if kind == "LoRA":
        return jax.tree_util.Partial(
            lambda params, adapters, rows: whole(with_low_rank(params, adapters), rows),
            params,
        )
    return state_loss(model, params, leaves=leaves_of(kind))


def leaves_of(kind: str) -> tuple[str, ...]:
    """Names the tuned arrays of a state."""
    return ("memory",) if kind in UPSCALED else ("wkv",)


def is_online(kind: str) -> bool:
    """Tells whether a row is tuned by DBP."""
    return kind in UPSCALED and UPSCALED[kind][2]


def optimizer_of(kind: str, learning_rate) -> optax.GradientTransformation:
    """Makes the optimizer of a row."""
    adam = optax.adam(learning_rate, b2=0.99)
    if kind in ("LoRA", "all weights"):
        return adam
    adam = rwkv.decorrelate(adam) if is_online(kind) else adam

    def mask(state):
        return trainable_mask(state, leaves_of(kind))

    return optax.masked(adam, mask)


def statistics_of(kind: str):
    """Makes the statistics of a row that is tuned by DBP; None for others."""
    if not is_online(kind):
        return None
    return state_statistics(*base(), leaves=leaves_of(kind), rows=4)


@functools.cache
def program(kind: str):
    """Makes the optimizer, with a settable rate, and the compiled step."""
    build = functools.partial(optimizer_of, kind)
    tx = optax.inject_hyperparams(build)(learning_rate=1.0)
    step = rwkv.make_train_step(loss_of(kind), tx, statistics=statistics_of(kind))
    return tx, step


def tuned(
    kind: str,
    style: str,
    seed: int,
    rate: float,
) -> dict[str, Any]:
    """Tunes once; returns the curve, the scores and the seconds."""
    tx, step = program(kind)
    train = rwkv.TrainState.create(start(kind, style, seed), tx)
    losses = []
    began = time.monotonic()
    for number in range(STEPS):
        rows = batch_at(
            stream(style, "train"),
            number,
            batch_size=ROWS,
            length=LENGTH,
            seed=seed,
        )
        now = np.float32(rate * rate_at(number, STEPS, 10))
        train.opt_state.hyperparams["learning_rate"] = jnp.asarray(now)
        train, metrics = step(train, rows)
        losses.append(metrics["loss_nats"])
    curve = [float(loss) / math.log(2) for loss in losses]
    seconds = time.monotonic() - began
    return scores(kind, style, train.params) | {
        "curve": curve,
        "tuning_seconds": seconds,
    }


def scores(kind: str, style: str, trained) -> dict[str, Any]:
    """Scores held-out bits per byte of the style, by position, and of the base's own text."""
    new = held_out_score(kind, style, trained)
    own = held_out_score(kind, OWN, trained)
    return {
        "bits_per_byte": new.bits_per_byte,
        "standard_error": new.standard_error,
        "by_position": new.by_position,
        "own_text": own.bits_per_byte,
    }


def held_out_score(
    kind: str, style: str, trained, *, length: int = 512, count: int = 48
) -> Score:
    """Scores a row's trainables on windows of held-out text of a style."""
    model, params = base()
    state = rwkv.init_state(model.config)
    if isinstance(trained, rwkv.RWKV7State):
        state = trained
    elif kind == "LoRA":
        params = with_low_rank(params, trained)
    elif kind == "all weights":
        params = trained
    text = windows(stream(style, "held_out"), length, count)
    return score(model, params, state, text, rwkv.Tokenizer.bytes())


def untuned(kind: str, style: str) -> dict[str, Any]:
    """Scores the base, as it is or after a prompt of the style."""
    model, params = base()
    state = rwkv.init_state(model.config)
    if kind == "prompt of 1,024":
        state = prefill_state(model, params, stream(style, "train")[-1024:])
    return scores(kind, style, state)


def numbers_of(kind: str) -> int:
    """Counts the numbers that a row tunes."""
    trained = start(kind, STYLES[0], 0)
    if isinstance(trained, rwkv.RWKV7State):
        upscaled = trained.upscaled
        trained = trained.wkv if upscaled is None else upscaled.memory
    return tree_size(trained)


class Runs:
    """The runs of the table, made where they are not cached.

    Attributes:
        cells: the cache.
        makes: whether missing runs are made.
    """

    def __init__(self, cells: Cells, *, makes: bool = True):
        self.cells = cells
        self.makes = makes

    def get(
        self, kind: str, style: str, seed: int = 0, rate: float | None = None
    ) -> dict[str, Any] | None:
        """Returns the scores of a run, or of a row that is not tuned; None for a missing one."""
        name = f"{kind} | {style}"
        make = functools.partial(untuned, kind, style)
        if rate is not None:
            name += f" | {seed} | {rate}"
            make = functools.partial(tuned, kind, style, seed, rate)
        if not self.makes and name not in self.cells.results:
            return None
        return self.cells.get(name, make)["found"]

    def known(
        self, kind: str, style: str, seeds: int, rate: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns the runs of all seeds that there are."""
        found = [self.get(kind, style, seed, rate) for seed in range(seeds)]
        return [one for one in found if one is not None]


def best_rate(by_rate: dict[float, dict[str, float]]) -> float:
    """Chooses the rate whose bits per byte, relative to those of the best rate, are the lowest.

    Args:
        by_rate: bits per byte by style.
    """
    styles = next(iter(by_rate.values()))
    least = {
        style: min(
            bits[style] for bits in by_rate.values() if math.isfinite(bits[style])
        )
        for style in styles
    }

    def excess(rate: float) -> float:
        ratios = [by_rate[rate][style] / least[style] for style in styles]
        return math.inf if not all(map(math.isfinite, ratios)) else sum(ratios)

    return min(by_rate, key=excess)


def sweep(runs: Runs, kind: str, styles: tuple[str, ...]) -> dict[str, Any] | None:
    """Tunes a row at its rates with the first seed, and chooses one for all styles.

    Returns:
        What was tried, and the rate; None if no rate is known on all styles.
    """
    by_rate: dict[float, dict[str, float]] = {}
    for rate in RATES[kind]:
        scored = {style: runs.get(kind, style, 0, rate) for style in styles}
        bits = {style: one["bits_per_byte"] for style, one in scored.items() if one}
        print(f"{kind:24}{rate:<8g}{rounded(bits)}", flush=True)
        if len(bits) == len(styles):
            by_rate[rate] = bits
    if not by_rate:
        return None
    rate = best_rate(by_rate)
    return {
        "rate": rate,
        "at_edge": at_edge(rate, by_rate),
        "numbers": numbers_of(kind),
        "by_rate": {f"{one:g}": bits for one, bits in by_rate.items()},
    }


def table(
    runs: Runs, kinds: list[str], seeds: int, styles: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, dict[str, list]]]:
    """Computes sweeps, and results by row and style, one for each seed; prints a line each."""
    sweeps: dict[str, Any] = {}
    found: dict[str, dict[str, list]] = {}
    for kind in ("base", "prompt of 1,024"):
        found[kind] = {style: runs.known(kind, style, 1) for style in styles}
    for kind in kinds:
        swept = sweep(runs, kind, styles)
        if swept is None:
            continue
        sweeps[kind] = swept
        found[kind] = {}
        for style in styles:
            found[kind][style] = runs.known(kind, style, seeds, swept["rate"])
    for kind, by_style in found.items():
        one = sweeps.get(kind, {"rate": 0.0, "at_edge": False, "numbers": 0})
        edge = " (edge)" if one["at_edge"] else ""
        print(
            f"{kind}: {one['numbers']:,} tuned parameters, rate {one['rate']:g}{edge}"
        )
        for style, results in by_style.items():
            print(f"    {style:18}{show(results, found['base'][style])}", flush=True)
    return sweeps, found


def show(results: list[dict[str, Any]], base_results: list[dict[str, Any]]) -> str:
    """Formats a row's results on one style: means, and half the range over seeds."""
    bits = [one["bits_per_byte"] for one in results]
    gain = np.mean(bits) / base_results[0]["bits_per_byte"] - 1
    own = np.mean([one["own_text"] for one in results])
    positions = [[x for *_, x in one["by_position"]] for one in results]
    means = [float(x) for x in np.mean(positions, axis=0)]
    spread = (max(bits) - min(bits)) / 2
    return (
        f"{np.mean(bits):7.3f} +-{spread:.3f} {gain:+7.1%}  own text {own:.3f}  "
        f"by position {rounded(means)}"
    )


def draw(folder: Path, found: dict[str, dict[str, list]]) -> None:
    """Draws the loss over the steps and by position, of each style; means over the seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    for style in next(iter(found.values())):
        curves = {}
        positions = {}
        for kind, by_style in found.items():
            runs = by_style[style]
            bits = np.mean(
                [[x for *_, x in run["by_position"]] for run in runs], axis=0
            )
            places = [place[:2] for place in runs[0]["by_position"]]
            positions[kind] = [
                (*place, x) for place, x in zip(places, bits, strict=True)
            ]
            if "curve" in runs[0]:
                curve = np.mean([run["curve"] for run in runs], axis=0)
                smooth = np.convolve(curve, np.ones(8) / 8, "valid")
                curves[kind] = [(i + 8, x) for i, x in enumerate(smooth)]
        label = "training loss (bits per byte)"
        pictures.curves(
            folder / f"text-{style}-curves.png",
            curves,
            x="step",
            y=label,
        )
        pictures.by_position(folder / f"text-{style}-positions.png", positions)


def main() -> None:
    """Runs the table, prints it, and writes files where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--styles", default=",".join(STYLES))
    parser.add_argument("--kinds", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument(
        "--cached", action="store_true", help="only show the available cells"
    )
    parser.add_argument("--json", help="file for the numbers")
    parser.add_argument("--pictures", type=record.folder, help="folder for figures")
    parser.add_argument(
        "--cells", default="runs/text-table", help="folder of the results' cache"
    )
    options = parser.parse_args()
    styles = tuple(options.styles.split(","))
    runs = Runs(Cells(Path(options.cells)), makes=not options.cached)
    for style in styles:
        if runs.get("base", style) is None:
            raise SystemExit(
                f"text_table: `{runs.cells.path}` must hold the base on {style}, the reference for "
                "all rows; it does not. Run without `--cached` to measure it."
            )
    record.require_rows_kept(options.json, "base", styles)
    record.require_rows_kept(options.json, "sweeps", options.kinds)
    sweeps, found = table(runs, options.kinds, options.seeds, styles)
    record.require_rows_kept(options.json, "sweeps", sweeps)
    if options.pictures:
        draw(options.pictures, found)
    if options.json:
        packages = ("jax", "flax", "optax", "numpy")
        record.write(
            options.json,
            "benchmarks.text_table",
            packages=packages,
            steps=STEPS,
            sweeps=sweeps,
            not_run=[kind for kind in RATES if kind not in sweeps],
            **found,
        )


if __name__ == "__main__":
    main()
