"""Tables of the search for a learning rate, and of models that others trained."""

import math
import statistics
from typing import Any

from benchmarks.published.markdown import Table, rate, read, short

PAGE = "docs/results.md"


def _excess(seed: dict[str, Any], chosen: float) -> str:
    """Formats how far the loss at a rate is above the best of a sweep, in percent."""
    loss = seed["sweep"].get(f"{float(chosen)}", math.nan)
    percent = 100 * (loss / min(seed["sweep"].values()) - 1)
    return "-" if math.isnan(percent) else f"{percent:.1f}"


def searches() -> list[list[str]]:
    """Makes the rows of the searches for a rate against sweeps at full length."""
    found = read("cpu-rate-search")["results"]
    labels = {
        "start state | charmaps": "start state, charmaps",
        "start state | topics-capitals": "start state, capitals",
        "start state | c-headers": "start state, C headers",
        "start state | copying": "start state of the genuine model that reverses numbers, copying "
        "them",
        "upscaled, whitened | charmaps": "upscaled state, charmaps",
        "LoRA | charmaps": "LoRA of 66 thousand parameters, charmaps",
        "all weights | charmaps": "all weights, charmaps",
    }
    rows = []
    for name, label in labels.items():
        seeds = found[name]["seeds"]
        run = found[name]["run_processor_seconds"]
        costs = [100 * one["search"]["processor_seconds"] / run for one in seeds]
        low, high = f"{min(costs):.0f}", f"{max(costs):.0f}"
        halved = [one["halved"]["rate"] for one in seeds]
        rows.append(
            [
                label,
                ", ".join(rate(one["search"]["rate"]) for one in seeds),
                ", ".join(rate(one["best_rate"]) for one in seeds),
                ", ".join(_excess(one, one["search"]["rate"]) for one in seeds) + " %",
                f"{low} %" if low == high else f"{low} to {high} %",
                ", ".join(map(rate, halved))
                + ": "
                + ", ".join(
                    _excess(one, two) for one, two in zip(seeds, halved, strict=True)
                )
                + " %",
            ]
        )
    return rows


def rules() -> list[list[str]]:
    """Makes the rows of the rules of choice: each rule's rate in the sweep of the same seed."""
    found = read("cpu-rate-search")["results"]
    subjects = {
        "start state, charmaps": found["start state | charmaps"]["seeds"],
        "start state, capitals": found["start state | topics-capitals"]["seeds"],
        "start state, C headers": found["start state | c-headers"]["seeds"],
        "upscaled state, charmaps": found["upscaled, whitened | charmaps"]["seeds"],
        "LoRA, charmaps": found["LoRA | charmaps"]["seeds"],
        "all weights, charmaps": found["all weights | charmaps"]["seeds"],
        "start state, copying, 160 x 8": found["start state | copying"]["seeds"],
    }
    copied = read("cpu-real-reversing")["tuned"]
    for kind, label in {
        "start state": "start state",
        "upscaled, whitened": "upscaled state",
        "LoRA": "LoRA",
    }.items():
        subjects[f"{label}, copying, 150 x 32"] = [*map(_with_sweep, copied[kind])]
    seven = read("cpu-real-tiny7v0")["tuned"]["LoRA"]
    subjects["LoRA, tiny 7v0"] = [*map(_with_sweep, seven)]
    rows = []
    for label, seeds in subjects.items():
        sweeps = [seed["sweep"] for seed in seeds]
        single = min(sweeps[0], key=lambda rate: sum(sweep[rate] for sweep in sweeps))
        choices = [[*_rule_choices(seed["search"]), float(single)] for seed in seeds]
        rows.append(
            [
                label,
                *(
                    ", ".join(
                        _excess(seed, rate)
                        for seed, rate in zip(seeds, chosen, strict=True)
                    )
                    for chosen in zip(*choices, strict=True)
                ),
            ]
        )
    return rows


def _with_sweep(run: dict[str, Any]) -> dict[str, Any]:
    """Adds the sweep's losses by rate to a run of a real model."""
    return run | {"sweep": {rate: one["new"] for rate, one in run["by_rate"].items()}}


def _rule_choices(search: dict[str, Any]) -> list[float]:
    """Returns what the rules choose: the lowest loss, the next larger, the smallest, and now."""
    losses = {float(rate): loss for rate, loss in search["losses"].items()}
    lowest = min(losses, key=lambda rate: losses[rate])
    following = min((rate for rate in losses if rate > lowest), default=lowest)
    larger = following if following in search["near"] else lowest
    return [lowest, larger, min(search["near"]), search["rate"]]


def copying() -> list[list[str]]:
    """Makes the rows of the reversing model, tuned to copy: means and ranges of the seeds."""
    found = read("cpu-real-reversing")
    before = found["untuned"]["untuned"]
    rows = [
        [
            "untuned",
            f"{before['new']:.1f}",
            short(before["new_accuracy"]),
            f"{before['old_accuracy']:.2f}",
        ]
    ]
    labels = {
        "start state": "start state, 2,048 parameters",
        "LoRA": "LoRA of equal size",
        "upscaled, whitened": "upscaled state, whitened",
    }
    for kind, label in labels.items():
        best = [one["by_rate"][f"{one['best_rate']}"] for one in found["tuned"][kind]]
        row = [label]
        for column in ("new", "new_accuracy", "old_accuracy"):
            values = [one[column] for one in best]
            row.append(
                f"{short(statistics.mean(values))} ({short(min(values))} to {short(max(values))})"
            )
        rows.append(row)
    return rows


def hardly_trained() -> list[list[str]]:
    """Makes the rows of tiny 7v0, tuned on charmaps at the best rate."""
    found = read("cpu-real-tiny7v0")
    before = found["untuned"]["untuned"]
    rows = [["untuned", "", f"{before['new']:.2f}", f"{before['old']:.2f}"]]
    labels = {
        "start state": "start state, 49,152 parameters",
        "LoRA": "LoRA of equal size",
        "upscaled, whitened": "upscaled state, whitened",
    }
    for kind, label in labels.items():
        (run,) = found["tuned"][kind]
        best = run["by_rate"][f"{run['best_rate']}"]
        excess = 100 * run["excess_of_found"]
        digits = 2 if excess < 0.05 else 1
        rows.append(
            [
                label,
                f"{rate(run['best_rate'])} / {rate(run['found_rate'])} "
                f"({excess:.{digits}f} % above the best)",
                f"{best['new']:.2f}",
                f"{best['old']:.2f}",
            ]
        )
    return rows


def real_models() -> list[list[str]]:
    """Makes the rows of checkpoints next to the package rwkv and to their own 8-bit forms."""
    labels = {
        "cpu-real-reversing": "BlinkDL's model that reverses numbers, official layout",
        "cpu-real-tiny7v0": "rwkv.cpp's tiny 7v0 (`--vocabulary bytes256`)",
        "cpu-real-shipped": "`assets/tiny.pth` (`--kinds`)",
    }
    rows = []
    for name, label in labels.items():
        found = read(name)["untuned"]
        package = found["rwkv package"]
        small = found["int8 logits"]
        # Of numbers instead of text, the losses are in nats per digit: another table has them.
        is_text = "new_accuracy" not in found["untuned"]
        bits = [f"{found[form]['new']:.4f}" for form in ("untuned", "untuned, int8")]
        rows.append(
            [
                label,
                f"{_exponent(package['largest_difference'])} of {package['largest_logit']:.2g} / "
                f"{_exponent(package['relative_rms'])} / {_choices(package)}",
                f"{small['largest_difference']:.2g} / {short(small['relative_rms'], 4)} / "
                f"{_choices(small)}",
                " / ".join(bits) if is_text else "",
            ]
        )
    return rows


def _exponent(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")


def _choices(logits: dict[str, float]) -> str:
    share = logits["same_choice"]
    return "all" if share == 1 else short(share, 3)


TABLES = (
    Table(
        PAGE,
        "| tuned | found | best of the sweep | held-out loss above the best | CPU time of "
        "the search relative to the run | found in two rounds, loss above the best |",
        searches,
    ),
    Table(
        PAGE,
        "| tuned | lowest loss | next larger | smallest | now: smallest if worse than "
        "guessing, else next larger | best single rate |",
        rules,
    ),
    Table(
        PAGE,
        "| | nats per digit (2.30 by guessing) | copied digits right | reversed digits "
        "right |",
        copying,
    ),
    Table(
        PAGE,
        "| | rate: best / found by the search | bits per byte of charmaps | of the "
        "standard library |",
        hardly_trained,
    ),
    Table(
        PAGE,
        "| model | ours and `rwkv` | float32 and int8 | bits per byte of charmaps, float32 "
        "/ int8 |",
        real_models,
    ),
)
