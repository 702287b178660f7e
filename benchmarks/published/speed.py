"""Tables of recall by bytes of state, and of speed."""

import statistics

from benchmarks.published.markdown import Table, read, short
from benchmarks.recall import CONTEXTS

PAGE = "docs/results.md"

RECALL = {
    "attention": "attention",
    "window-8": "window of 8",
    "window-16": "window of 16",
    "window-32": "window of 32",
    "based-4": "BASED d 4",
    "based-8": "BASED d 8",
    "based-12": "BASED d 12",
    "based-16": "BASED d 16",
    "hybrid-8-16": "BASED d 8, then a window of 16",
    "rwkv-8-L1": "RWKV-7, one layer, heads of 8",
    "rwkv-16-L1": "RWKV-7, one layer, heads of 16",
    "rwkv-32-L1": "RWKV-7, one layer, heads of 32",
    "rwkv-8-L2": "RWKV-7, two layers, heads of 8",
    "rwkv-16-L2": "RWKV-7, two layers, heads of 16",
    "rwkv-32-L2": "RWKV-7, two layers, heads of 32",
    "delta-8-24": "upscaled, delta, from scratch: heads of 8, 24 features",
    "decay-8-24": "upscaled, decay, from scratch: heads of 8, 24 features",
    "delta-16-48": "upscaled, delta, from scratch: heads of 16, 48 features",
    "decay-16-48": "upscaled, decay, from scratch: heads of 16, 48 features",
    "tuned-delta-16-64": "memory with writes (delta), tuned on the frozen model with one layer and "
    "heads of 16",
    "tuned-static-16-64": "static memory, tuned on the same",
}


def recall() -> list[list[str]]:
    """Makes the rows of recall: means, and each seed in brackets."""
    found = read("cpu-recall")
    rows = []
    for name, label in RECALL.items():
        row = found["table"][name]
        accuracies = [
            f"{short(statistics.mean(seeds))} ({', '.join(map(short, seeds))})"
            for seeds in row["tests"].values()
        ]
        speeds = found["decode"].get(name, {})
        rows.append(
            [
                label,
                f"{row['parameters']:,}",
                f"{row['matrix_bytes']:,} / {row['state_bytes']:,}",
                f"{row['rate']:g}",
                f"{len(row['seeds'])}",
                *accuracies,
                f"{row['cpu_s']:.0f}",
                " / ".join(f"{speeds[str(n)]:,.0f}" for n in CONTEXTS if speeds),
            ]
        )
    return rows


def op_peers() -> list[list[str]]:
    """Makes the rows of the op next to other implementations."""
    (first, *others) = read("cpu-wkv-peers")["results"]["train-1k"]
    labels = {
        "scan": 'ours (`"scan"`)',
        "definition": "JAX's own gradient of the definition",
        "ejkernel xla": "ejkernel",
        "rwkv-ops native": "rwkv-ops",
        "torch loop": "a PyTorch loop",
    }
    rows = [['ours (the default; `"chunked"` here)', "", f"{first['temp MiB']:.0f}"]]
    for row in others:
        label = labels.get(row["implementation"])
        if label is None:
            continue
        memory = row["temp MiB"]
        rows.append(
            [
                label,
                f"{row['ours / this']:.2f}",
                "" if memory is None else f"{memory:.0f}",
            ]
        )
    return rows


def other_measurements() -> list[list[str]]:
    """Makes the rows of loading, decoding, serving, reading data and tuning many states."""
    loaded = {
        row["what"]: row["peak_to_file"] for row in read("cpu-load-checkpoint")["rows"]
    }
    context = read("cpu-decode")["longest_to_shortest_context"]
    return [
        [
            "peak memory for loading a 0.9 GB `.pth`, mapped pages included, relative to the file: "
            "ours / torch with mmap",
            f"{loaded['load_model']:.1f} / {loaded['torch.load, mapped, cloned']:.1f}",
            "`python -m benchmarks.load_checkpoint`",
        ],
        [
            "decoding speed after 4,096 tokens of context relative to 64",
            f"{context:.2f}",
            "`python -m benchmarks.decode`",
        ],
        *_serving(),
        *_data(),
        *_many_states(),
    ]


def _serving() -> list[list[str]]:
    served = read("cpu-serving")["rows"]
    ratios = {
        name: row["rate_over_generate"]
        for name, row in served.items()
        if name != "generate"
    }
    return [
        [
            "serving 32 requests of the 0.1B model from four start states with 1 / 8 / 32 slots: "
            "tokens per second relative to sequential `generate` calls",
            f"{ratios['1']:.2f} / {ratios['8']:.1f} / {ratios['32']:.1f}",
            "`python -m benchmarks.serving`",
        ],
        [
            "the same, one request at a time with 8 slots",
            f"{ratios['8, one request at a time']:.2f}",
            "",
        ],
        [
            "the same: answers equal to those of `generate`",
            served["32"]["answers_equal_to_generate"],
            "",
        ],
    ]


def _data() -> list[list[str]]:
    rates = {
        row["shape"]: row["tokens/s"] / 1e6
        for row in read("cpu-data-rate")["rows"]
        if row["what"] == "stream, shuffled"
    }
    speeds = {row["what"]: row["MB/s"] for row in read("cpu-tokenizer")["rows"]}
    trie = speeds["rwkv (trie)"]
    alone = speeds["rwkv7_jax"] / trie
    extra = speeds["rwkv7_jax (fast-world)"] / trie
    return [
        [
            "batches from a token cache, million tokens per CPU second: 16 x 4,096 / 8 x 512",
            f"{rates['16 x 4096']:.0f} / {rates['8 x 512']:.0f}",
            "`python -m benchmarks.data_rate`",
        ],
        [
            "speed of the tokenizer relative to the trie of the package rwkv, same ids: alone / "
            "with the extra `fast-world`",
            f"{alone:.2f} / {extra:.0f}",
            "`python -m benchmarks.tokenizer_speed`",
        ],
    ]


def _many_states() -> list[list[str]]:
    many = read("cpu-many-states")
    ratios = many["processor_ratios"]
    error = f"{many['largest_relative_error']:.0e}".replace("e-0", "e-")
    return [
        [
            "eight start states in one program, 4 rows of 128 tokens each: CPU time relative to "
            "one state with all rows / to eight runs",
            f"{ratios['to_one_state_of_all_rows']:.2f} / {ratios['to_runs_of_their_own']:.2f}",
            "`python -m benchmarks.many_states`",
        ],
        [
            "the same: memory of a step relative to one state with all rows",
            f"{ratios['temporaries_to_one_state_of_all_rows']:.2f}",
            "",
        ],
        [
            f"the same: largest error against separate runs after {many['steps_compared']} steps",
            error,
            "",
        ],
    ]


def _three_digits(value: float) -> str:
    """Formats a number with three significant digits, or a whole one where it has two before."""
    return f"{value:#.3g}" if value < 10 else f"{value:.0f}"


def alternatives() -> list[list[str]]:
    """Makes the rows of our CPU time over that of others."""
    found = read("cpu-peers")["rows"]
    labels = {
        "state tuning, V 65,536 / torch with fla's chunks": "state tuning, 65,536 tokens in the "
        "vocabulary / a torch loop with fla's chunks",
        "its peak memory / torch with fla's chunks": "its peak memory / that of the torch loop",
        "the head's temporaries, V 65,536, B4 T512, MiB": "the head's temporaries, 4 x 512 tokens, "
        "MiB",
    }
    rows = []
    for job, row in found.items():
        missed = "" if row["met"] else " (missed)"
        rows.append(
            [
                labels.get(job, job),
                f"{_three_digits(row['value'])}{missed}",
                f"{row['bar']:g}",
            ]
        )
    return rows


def generated_token() -> list[list[str]]:
    """Makes the rows of a generated token on a GPU, by the compiler."""
    found = read("gpu-decode-compiled")["rows"]
    rows = []
    for batch in (1, 8, 32, 256):
        cells = [
            found.get(f"{form}, batch {batch}")
            for form in ("unrolled", "kernel", "whole", "scan")
        ]
        launched = ["" if one is None else str(one["kernels"]) for one in cells]
        moved = ["" if one is None else f"{one['ratio']:.2f}" for one in cells]
        rows += [[str(batch), "launched", *launched], ["", "bytes", *moved]]
    return rows


def token_on_tpu() -> list[list[str]]:
    """Makes the rows of a generated token on a TPU, by the compiler."""
    found = read("tpu-decode")["rows"]
    rows = []
    for chip in ("v5e", "v6e"):
        for batch in (1, 8, 32, 256):
            kernel = found[f"{chip}, kernel, batch {batch}"]
            scan = found[f"{chip}, scan, batch {batch}"]
            cells = [chip, str(batch)]
            for row in (kernel, scan):
                cells += [_millions(row["cycles"]), _millions(row["of the recurrence"])]
            cells.append(_millions(kernel["least cycles"]))
            memory = [f"{row['temporary bytes'] / 2**20:.0f}" for row in (kernel, scan)]
            cells.append(" / ".join(memory))
            rows.append(cells)
    return rows


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f}"


def eight_bits_time() -> list[list[str]]:
    """Makes the rows of CPU time relative to float32 weights."""
    return [
        [
            job,
            *(f"{times[form] / times['float32']:.2f}" for form in ("bfloat16", "int8")),
        ]
        for job, times in read("cpu-int8-weights")["speed"]["seconds"].items()
    ]


TABLES = (
    Table(
        PAGE,
        "| model | weights | bytes: matrix / all | rate | seeds | 4 pairs | 8 pairs | 16 "
        "pairs | 32 pairs of 128 | CPU s | tokens per CPU second after 64 / 1,024 |",
        recall,
    ),
    Table(
        PAGE,
        "| implementation | our CPU time / its CPU time | memory besides arguments and "
        "results, MiB |",
        op_peers,
    ),
    Table(
        PAGE,
        "| | result | command |",
        other_measurements,
    ),
    Table(
        PAGE,
        "| job | value | target |",
        alternatives,
    ),
    Table(
        PAGE,
        '| batch | | default | `"pallas_gpu"` | products in one part | scan |',
        generated_token,
    ),
    Table(
        PAGE,
        '| chip | batch | default | its recurrence | `"scan"` | its recurrence | least | '
        'temporary memory, default / `"scan"`, MiB |',
        token_on_tpu,
    ),
    Table(
        PAGE,
        "| | bfloat16 | int8 |",
        eight_bits_time,
    ),
)
