"""`rwkv7 state info | mix | scale | doctor`: argument parsing and printing alone."""

import argparse
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from rwkv7_jax.data.batch import Batch

_OWN_FIELDS = frozenset(
    "format axes layers heads value_size key_size dynamics kind features base_model".split()
)

_TEXT = "a file, a folder, a built-in text, or task:NAME"


def add_state_command(subparsers) -> None:
    """The parsers of `state` and its commands, added to those of `rwkv7`."""
    parser = subparsers.add_parser("state", help="look at, mix, scale and examine start states")
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="sizes, norms, ranks and capacity of a state")
    info.add_argument("state", help=".pth, .safetensors or .st")
    info.add_argument("--model", help="checkpoint that the state shall fit")
    info.set_defaults(run=_info)

    mixed = commands.add_parser(
        "mix",
        help="the weighted sum of states of one model",
        usage="%(prog)s [-h] STATE [STATE ...] --weights W,W,... OUT",
    )
    mixed.add_argument("files", nargs="*", metavar="STATE", help="states, and last the result")
    # A positional list cannot go on behind an option, so the option takes what follows it.
    mixed.add_argument("--weights", nargs="+", required=True, metavar="W", help="0.5,0.5")
    mixed.set_defaults(run=_mix)

    scale = commands.add_parser("scale", help="a state times alpha; 0 is the base model")
    scale.add_argument("state", help=".pth, .safetensors or .st")
    scale.add_argument("--alpha", type=float, required=True, help="between base 0 and tuned 1")
    scale.add_argument("target", help="where the result goes")
    scale.set_defaults(run=_scale)
    _add_doctor(commands)


def _add_doctor(commands) -> None:
    doctor = commands.add_parser("doctor", help="what a state does, what it costs, and advice")
    add = doctor.add_argument
    add("state", help=".pth, .safetensors or .st")
    add("--model", required=True, help="checkpoint: .pth, .safetensors or a folder")
    add("--data", required=True, help=f"what it was tuned for: {_TEXT}")
    add("--generic", help=f"what shall stay as it was: {_TEXT}")
    add("--length", type=int, default=256, help="tokens of a window (%(default)s)")
    add("--windows", type=int, default=16, help="windows of each text (%(default)s)")
    add("--held-out", type=float, default=0.0, help="read held-out documents: the run's share")
    add("--seed", type=int, default=0, help="the run's, which chooses a task's facts")
    add("--picture", help="a PNG of fading, loss by position and spectra")
    doctor.set_defaults(run=_doctor, compiles=True)


def _load_pair(state: str, model: str):
    """A checkpoint, a state whose sizes fit it, and the checkpoint's hash; a warning if another
    is in the state's sidecar.
    """
    from rwkv7_jax.checkpoints.model_files import load_model, model_hash
    from rwkv7_jax.checkpoints.state_files import load_state

    params, config = load_model(model)
    own = model_hash(params, config)
    return params, config, load_state(state, config=config, base_model=own), own


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, two spaces apart, set to the right."""
    rows = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def _heads(columns: dict[str, np.ndarray]) -> str:
    """A row for each layer and head of arrays [L H]."""
    layers, heads = next(iter(columns.values())).shape
    rows = [
        [str(layer), str(head), *(f"{x[layer, head]:.3g}" for x in columns.values())]
        for layer, head in itertools.product(range(layers), range(heads))
    ]
    return _table(["layer", "head", *columns], rows)


def _info(options: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.state_files import load_state, read_sidecar

    if options.model:
        *_, state, own = _load_pair(options.state, options.model)
    else:
        state = load_state(options.state)
    card = read_sidecar(options.state)
    print(f"{options.state}: {_sizes(state)}, {_dtypes(options.state)}")
    if state.upscaled is not None:
        upscaled = state.upscaled
        kind, width = upscaled.features.kind, upscaled.memory.shape[-1]
        print(f"upscaled memory: {upscaled.dynamics}, {width} {kind} features a head")
    base = card.get("base_model", "not named in the sidecar")
    fits = ""
    if options.model:
        fits = f"; {options.model} is {'it' if base == own else f'another, {own}'}"
        fits = fits if "base_model" in card else "; the sizes fit"
    print(f"base model: {base}{fits}")
    for name, value in card.items():
        if name not in _OWN_FIELDS:
            print(f"{name}: {value}")
    print(_capacity(state))
    print(_heads(_norms(state)))


def _sizes(state) -> str:
    layers, _, heads, values, keys = state.wkv.shape
    shifts = any(np.any(leaf) for leaf in (state.att_shift, state.ffn_shift))
    return (
        f"{layers} layers, {heads} heads of {values} x {keys}, "
        f"{'with' if shifts else 'without'} shift states"
    )


def _dtypes(path: str) -> str:
    from rwkv7_jax.checkpoints.tensor_files import read_tensors

    named = read_tensors(Path(path))
    found = {str(t.dtype) for name, t in named.items() if name.endswith("time_state")}
    return " and ".join(sorted(found))


def _capacity(state) -> str:
    from rwkv7_jax.tuning.state_arithmetic import capacity

    found = capacity(state)
    fewest, most = found.facts
    return (
        f"trained numbers: {found.trained:,} (WKV {found.wkv:,}, upscaled {found.memory:,})\n"
        f"capacity: about {fewest:,} to {most:,} facts of 5 bits (toy tasks, 300 to 1000 steps)"
    )


def _norms(state) -> dict[str, np.ndarray]:
    from rwkv7_jax.evaluation.state_diagnosis import ranks

    memories = {"": state.wkv}
    if state.upscaled is not None:
        memories["upscaled "] = state.upscaled.memory
    columns = {}
    for name, held in memories.items():
        one = np.asarray(held[:, 0], np.float64)
        columns[f"{name}norm"] = np.sqrt(np.square(one).sum((-2, -1)))
        columns[f"{name}max"] = np.abs(one).max((-2, -1))
        columns[f"{name}rank"] = ranks(held)
    return columns


def _base_of(paths: Sequence[str]) -> dict[str, str]:
    """The sidecars' base model, if they agree on one."""
    from rwkv7_jax.checkpoints.state_files import read_sidecar

    named = {path: read_sidecar(path).get("base_model") for path in paths}
    bases = {base: path for path, base in named.items() if base is not None}
    if len(bases) > 1:
        (one, first), (two, second) = list(bases.items())[:2]
        raise ValueError(
            f"state mix: states must be of one base model; `{first}` was tuned for {one}, "
            f"`{second}` for {two}."
        )
    return {"base_model": next(iter(bases))} if bases else {}


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"state mix: `--weights` must be numbers with commas between them; got {text!r}."
        ) from None


def _mix(options: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.state_files import load_state, save_state
    from rwkv7_jax.tuning.state_arithmetic import weighted_sum

    weights = _weights(options.weights[0])
    *sources, target = [*options.files, *options.weights[1:]] or [""]
    if not sources:
        raise ValueError("state mix: needs at least one state, and a file for the result.")
    base = _base_of(sources)
    mixed = weighted_sum([load_state(path) for path in sources], weights)
    parts = [f"{w:g} x {Path(p).name}" for w, p in zip(weights, sources, strict=True)]
    save_state(target, mixed, info={**base, "made_of": " + ".join(parts)})
    print(f"{target}: {' + '.join(parts)}")


def _scale(options: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.state_files import load_state, read_sidecar, save_state
    from rwkv7_jax.tuning.state_arithmetic import scaled

    if not np.isfinite(options.alpha):
        raise ValueError(f"state scale: `--alpha` must be finite; got {options.alpha}.")
    state, before = load_state(options.state), read_sidecar(options.state)
    made = f"{options.alpha:g} x {Path(options.state).name}"
    info = {**_base_of([options.state]), "made_of": made}
    info["alpha"] = options.alpha * before.get("alpha", 1.0)
    save_state(options.target, scaled(state, options.alpha), info=info)
    print(f"{options.target}: {made}")


def _batch(options: argparse.Namespace, path: str, tokenizer) -> Batch:
    """Windows of a text, or rows of a task."""
    from rwkv7_jax.data.loading import token_stream, windows
    from rwkv7_jax.data.synthetic_tasks import task_batch

    if path.startswith("task:"):
        sizes = {"batch_size": options.windows, "length": options.length}
        name = path.removeprefix("task:")
        return task_batch(name, 0, seed=options.seed, held_out=True, **sizes)
    share = options.held_out
    split = {"split": "held_out", "held_out": share} if share else {"split": "all"}
    return windows(token_stream(path, tokenizer, **split), options.length, options.windows)


def _doctor(options: argparse.Namespace) -> None:
    from rwkv7_jax.evaluation.state_diagnosis import diagnose
    from rwkv7_jax.model.rwkv7 import RWKV7
    from rwkv7_jax.reports import plots as pictures
    from rwkv7_jax.text.tokenizer import Tokenizer

    for name in ("length", "windows"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"state doctor: `--{name}` must be at least 1; got {getattr(options, name)}."
            )
    if options.picture and not pictures.available():
        raise ValueError("state doctor: `--picture` needs matplotlib (the extra `plot`).")
    params, config, state, _ = _load_pair(options.state, options.model)
    tokenizer = Tokenizer.for_vocabulary(config.vocab_size)
    batch = _batch(options, options.data, tokenizer)
    generic = _batch(options, options.generic, tokenizer) if options.generic else None
    found = diagnose(RWKV7(config), params, state, batch, generic=generic)
    _print_diagnosis(options, found)
    if options.picture:
        pictures.diagnosis(options.picture, found)
        print(f"wrote {options.picture}")


def _print_diagnosis(options: argparse.Namespace, found) -> None:
    rows = [found.own, *([found.generic] if found.generic else [])]
    texts = [options.data, options.generic]
    numbers = ("base_nats", "tuned_nats", "base_accuracy", "tuned_accuracy", "divergence")
    head = ["text", "base nats", "tuned nats", "base right", "tuned right", "KL", "tokens"]
    cells = [
        [name, *(f"{getattr(row, n):.4f}" for n in numbers), f"{row.tokens:,}"]
        for name, row in zip(texts, rows, strict=False)
    ]
    print(_table(head, cells))
    for name, memory in found.memories.items():
        columns = {"norm": memory.norms, "rank": memory.rank, "read rank": memory.read_rank}
        if memory.typical is not None:
            columns["typical norm"] = memory.typical
        what = "WKV state" if name == "wkv" else f"upscaled memory ({memory.dynamics})"
        print(f"\n{what}, {memory.channels} channels a head\n{_heads(columns)}")
    print(f"\n{_positions(found)}\n")
    print("\n".join(f"- {line}" for line in found.advice) or "Nothing to advise.")


def _positions(found) -> str:
    """Losses, and what is still read of each memory, over ranges of positions that double."""
    length = len(found.counts)
    borders = [0, *(2**i for i in range(length.bit_length()) if 2**i < length), length]
    head = ["position", "base nats", "tuned nats", *(f"{n} read" for n in found.memories)]
    rows = []
    for first, behind in itertools.pairwise(borders):
        part = slice(first, behind)
        count = found.counts[part]
        losses = (np.nan_to_num(x[part]) @ count for x in (found.base_nats, found.tuned_nats))
        scored = [f"{x / count.sum():.4f}" if count.any() else "-" for x in losses]
        left = [f"{memory.fading[part].mean():.1%}" for memory in found.memories.values()]
        name = str(first) if behind == first + 1 else f"{first}-{behind - 1}"
        rows.append([name, *scored, *left])
    lines = [_table(head, rows)]
    for name, memory in found.memories.items():
        where = "nowhere" if memory.faded is None else f"at position {memory.faded}"
        lines.append(f"{name}: below 10 % of the first read {where}")
    return "\n".join(lines)
