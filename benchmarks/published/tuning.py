"""Tables of what tuning and training reach."""

import statistics
from typing import Any

from benchmarks.published.markdown import Table, rate, read, short

PAGE = "docs/results.md"

STYLES = ("charmaps", "topics-capitals", "c-headers")


def quickstart() -> list[list[str]]:
    """Makes the rows of the README's first block."""
    found = read("cpu-quickstart")["rows"]
    labels = {
        "new text": "the new kind of text",
        "own text": "the model's own kind of text",
    }
    columns = (
        "frozen model",
        "start state",
        "start state, 80 steps",
        "upscaled state",
    )
    return [
        [label, *(f"{found[text][column]['bits_per_byte']:.2f}" for column in columns)]
        for text, label in labels.items()
    ]


def text() -> list[list[str]]:
    """Makes the rows of the table of text: means over seeds, a number for each style."""
    found = read("cpu-text-table")
    labels = {
        "start state": "start state",
        "upscaled, raw": "upscaled, raw features",
        "upscaled, whitened": "upscaled, whitened",
        "upscaled, raw, DBP": "upscaled, DBP",
        "LoRA": "LoRA",
        "all weights": "all weights",
    }
    rows = []
    for kind, label in labels.items():
        sweep = found["sweeps"][kind]
        gains = []
        own = []
        for style in STYLES:
            runs = found[kind][style]
            bits = statistics.mean(run["bits_per_byte"] for run in runs)
            before = found["base"][style][0]["bits_per_byte"]
            gains.append(f"{100 * (bits / before - 1):.0f}")
            own.append(f"{statistics.mean(run['own_text'] for run in runs):.2f}")
        rows.append(
            [
                label,
                f"{sweep['numbers']:,}",
                ", ".join(map(rate, sweep["by_rate"])),
                rate(sweep["rate"]),
                f"{', '.join(gains)} %",
                ", ".join(own),
            ]
        )
    return rows


def maths() -> list[list[str]]:
    """Makes the rows of grade-school maths, for the small base model of code."""
    return _maths("cpu-gsm8k-bits")


def maths_in_english() -> list[list[str]]:
    """Makes the rows of grade-school maths, for a base model of English."""
    return _maths("cpu-gsm8k-bits-english")


def _maths(record: str) -> list[list[str]]:
    found = read(record)["rows_of_the_table"]
    labels = {
        "base": "base",
        "base after a prompt of all training rows": "base after a prompt of all rows that tuning "
        "reads (equal information)",
        "start state": "start state",
        "LoRA as the start state": "LoRA of equal size",
        "upscaled, raw, DBP": "upscaled state, raw features, DBP",
        "LoRA as the upscaled state": "LoRA of equal size",
        "all weights": "all weights",
    }
    rows = []
    for name, label in labels.items():
        row = found[name]
        bits = row["bits_per_byte"]
        search = row.get("search")
        tuned = f"{row['numbers']:,}" if search else ""
        chosen = rate(search["rate"]) if search else ""
        if search and search["edge"]:
            chosen += f" (the {search['edge']} tried)"
        change = (
            f"{short(bits['difference'], 3)} +- {short(bits['difference_error'], 3)}"
        )
        rows.append(
            [
                label,
                tuned,
                chosen,
                ", ".join(f"{one:.3f}" for one in bits["by_seed"]),
                "" if name == "base" else change,
                f"{row['own_text']:.2f}",
            ]
        )
    return rows


def facts() -> list[list[str]]:
    """Makes the rows of the toy tasks: means over seeds."""
    found = read("cpu-paper-table")["table"]
    labels = {
        "facts-256": "256 random facts in 150 steps",
        "novel": "a sequence reversed and advanced",
        "modulus-9": "sums mod 9",
        "product-7": "products mod 7",
    }
    columns = (
        "small, as it is",
        "standard state",
        "upscaled, raw features",
        "upscaled, whitened",
        "upscaled, DBP",
        "test time, rewards",
    )
    rows = []
    for task, label in labels.items():
        row = [label]
        for column in columns:
            values = found[column][task]
            is_measured = None not in values
            row.append(short(statistics.mean(values)) if is_measured else "no rewards")
        rows.append(row)
    return rows


def experiments() -> list[list[str]]:
    """Makes the rows of the experiments on toy models: one seed each."""
    found = read("cpu-paper-table")
    stored = found["E9b capacity curve"]["stored"]
    rewards = found["E10 rewards"]
    traces = found["E11 guidance"]
    late = {
        name: shares[-1]
        for name, shares in found["E14 forgetting"]["by_eight_facts"].items()
    }
    skills = found["E13 retention"]["mean_skill"]
    observed = found["E12 observer"]["accuracy"]
    states_alone = found["E12 observer, states alone"]["accuracy"]

    return [
        [
            "facts stored in 300 steps by start states of 2 and 4 thousand parameters",
            ", ".join(str(stored[name]) for name in ("N=16", "N=32")),
        ],
        [
            "the same by upscaled states of 8, 16 and 33 thousand parameters (DBP)",
            ", ".join(str(stored[name]) for name in ("M=64", "M=128", "M=256")),
        ],
        *_conditioning(found),
        [
            "a hidden instruction followed exactly: small model / larger model",
            f"{short(rewards['small'])} / {short(rewards['large'])}",
        ],
        [
            "the small model, tuned by rewards alone / by the larger one's traces",
            f"{short(rewards['tuned'])} / {short(traces['tuned'])}",
        ],
        [
            "eight of 40 facts at the end of a row: start state / static upscaled memory "
            "(of 64 facts, tuned on 8 per row)",
            f"{short(late['standard'])} / {short(late['static'])}",
        ],
        [
            "other skills after strong tuning (mean of four): plain / anchored on general text",
            f"{short(skills['plain'])} / {short(skills['anchored'])}",
        ],
        [
            "an observer with a third of the teacher's parameters, accuracy of the teacher from: "
            "its own WKV state / a proposal / a proposal trained without answers",
            f"{short(observed['wkv'])} / {short(observed['proposed'])} / "
            f"{short(states_alone['proposed'])}",
        ],
    ]


def _conditioning(found: dict[str, Any]) -> list[list[str]]:
    """Makes the rows of 128 facts: a number for each of three seeds."""
    first = found["E8 conditioning"]
    others = found["E8b conditioning, other seeds"]

    def learnt(rule: str) -> str:
        name = "steps_to_half_a_nat"
        steps = (first[name][rule], *others[name][rule])
        shown = ", ".join("never" if one is None else str(one) for one in steps)
        accuracies = (first["accuracy"][rule], *others["accuracy"][rule])
        return f"{shown}; {', '.join(map(short, accuracies))}"

    return [
        [
            "128 facts through raw features, steps to half a nat, and accuracy after 150, three "
            "seeds: Adam, best of three rates",
            learnt("adam"),
        ],
        [
            "the same: DBP by our rule (12 damped, averaged, scaled iterations per update)",
            learnt("dbp"),
        ],
        ["our rule with one iteration per update", learnt("dbp, one iteration")],
        [
            "the rule as published (one iteration, no damping, averaging, scaling or clipping), "
            "best of three steps and three rates",
            learnt("dbp, as published"),
        ],
    ]


JOBS = {"stdlib": "text", "mixture": "toy tasks"}


def weights() -> list[list[str]]:
    """Makes the rows of training all weights: means over seeds, the least of each row bold."""
    found = read("cpu-dense-decorrelation")
    columns = ("Adam", "Adam, DBP", "Adam, DBP as published", "SGD", "SGD, DBP")
    rows = []
    for task, label in JOBS.items():
        ends = [_end(found[task][column]) for column in columns]
        rows.append(
            [label, *(f"**{x:.2f}**" if x == min(ends) else f"{x:.2f}" for x in ends)]
        )
    return rows


def _end(method: dict[str, Any]) -> float:
    return statistics.mean(seed["loss_nats"][-1] for seed in method["seeds"])


def weights_at_equal_time() -> list[list[str]]:
    """Makes the rows of Adam with as much CPU time as DBP takes."""
    found = read("cpu-dense-decorrelation")
    methods = ("Adam, DBP", "Adam, DBP as published")
    longer = [read(f"cpu-dense-adam-{steps}") for steps in (500, 280)]
    rows = []
    for task, label in JOBS.items():
        ends = []
        for method, adam in zip(methods, longer, strict=True):
            ends += [_end(found[task][method]), _end(adam[task]["Adam"])]
        rows.append([label, *(f"{end:.2f}" for end in ends)])
    return rows


TABLES = (
    Table(
        PAGE,
        "| | frozen model | start state | start state, 80 steps | upscaled state |",
        quickstart,
    ),
    Table(
        PAGE,
        "| | tuned parameters | rates | best | held-out bits per byte against the frozen "
        "model | bits per byte of the model's own text (1.24 before) |",
        text,
    ),
    Table(
        PAGE,
        "| | tuned parameters | rate | bits per byte of reference answers, each seed | "
        "against the base, same questions | own text |",
        maths,
    ),
    Table(
        PAGE,
        "| | tuned parameters | rate | bits per byte of reference answers, each seed | "
        "against the base, same questions | held-out English |",
        maths_in_english,
    ),
    Table(
        PAGE,
        "| accuracy | before | start state | upscaled, raw | upscaled, whitened | "
        "upscaled, DBP | start state, from rewards alone |",
        facts,
    ),
    Table(
        PAGE,
        "| | result |",
        experiments,
    ),
    Table(
        PAGE,
        "| nats | Adam | Adam, DBP by our rule | Adam, DBP as published | SGD | SGD, DBP "
        "by our rule |",
        weights,
    ),
    Table(
        PAGE,
        "| nats | DBP by our rule, 240 steps | Adam, 500 steps | DBP as published, 240 steps | "
        "Adam, 280 steps |",
        weights_at_equal_time,
    ),
)
