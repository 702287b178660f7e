"""`rwkv7 state info | convert | mix | scale`: inspects and combines start state files."""

import argparse
from pathlib import Path

import numpy as np

from rwkv7_jax.checkpoints import (
    common_base_model,
    load_logits,
    load_state,
    read_sidecar,
    save_state,
)
from rwkv7_jax.checkpoints.state_sidecar import MEANING
from rwkv7_jax.checkpoints.state_tensors import open_state_tensors
from rwkv7_jax.checks import prefix_errors
from rwkv7_jax.cli.arguments import (
    STATE_SUFFIXES,
    number,
    path,
    state_target,
)
from rwkv7_jax.cli.inputs import read_model
from rwkv7_jax.cli.state_doctor import add_doctor_command
from rwkv7_jax.cli.summary import COMMANDS
from rwkv7_jax.cli.tables import format_heads
from rwkv7_jax.evaluation.head_statistics import head_statistics
from rwkv7_jax.local_paths import split_list
from rwkv7_jax.model.state import RWKV7State
from rwkv7_jax.tuning.state_arithmetic import (
    Capacity,
    capacity,
    scaled,
    weighted_sum,
)

# Fields of a sidecar that `info` prints in other lines.
_DESCRIBED_FIELDS = frozenset({*MEANING, "base_model"})

_STATE_HELP = ".pth, .safetensors, .st or .state, or a model with a merged state"


def add_state_command(subparsers) -> None:
    """Adds the parsers of `state` and its commands to those of `rwkv7`."""
    parser = subparsers.add_parser("state", help=COMMANDS["state"])
    commands = parser.add_subparsers(required=True, metavar="command")

    info = commands.add_parser("info", help="sizes, norms and capacity of a state")
    info.add_argument("state", type=path, help=_STATE_HELP)
    info.add_argument("--model", type=path, help="checkpoint that the state must fit")
    info.set_defaults(run=_info)

    convert = commands.add_parser(
        "convert", help="write a state in another format, for or from other tools"
    )
    convert.add_argument("state", type=path, help=_STATE_HELP)
    convert.add_argument(
        "target",
        type=state_target,
        help=f"format by suffix: {', '.join(STATE_SUFFIXES)}",
    )
    convert.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of the WKV tensors (float32; float16 for .state)",
    )
    convert.set_defaults(run=_convert)

    mix = commands.add_parser(
        "mix",
        help="write the weighted sum of states of one model",
        usage="%(prog)s [-h] STATE [STATE ...] --weights W,W,... OUT",
    )
    mix.add_argument(
        "files",
        nargs="*",
        metavar="STATE",
        type=path,
        help="states, then the output file",
    )
    # argparse cannot continue a positional list after an option, so `--weights` takes the rest.
    mix.add_argument(
        "--weights",
        nargs="+",
        required=True,
        metavar="W",
        help="comma-separated weights, such as 0.5,0.5",
    )
    mix.set_defaults(run=_mix)

    scale = commands.add_parser("scale", help="write a state times alpha")
    scale.add_argument("state", type=path, help=_STATE_HELP)
    scale.add_argument(
        "--alpha",
        type=number(),
        required=True,
        help="factor: 0 gives the base model, 1 the tuned one",
    )
    scale.add_argument("target", type=state_target, help="output file")
    scale.set_defaults(run=_scale)
    add_doctor_command(commands)


def _info(options: argparse.Namespace) -> str:
    """Describes a state file, its sidecar and its tensors."""
    model = read_model(options.model) if options.model else None
    if model is None:
        state = load_state(options.state)
    else:
        # Any base model: the output says whether it is the right one.
        state = model.load_state(options.state, any_base=True)
    table = read_sidecar(options.state)
    lines = [f"{options.state}: {_sizes(state)}, {_dtypes(options.state)}"]
    if state.upscaled is not None:
        upscaled = state.upscaled
        kind = upscaled.features.kind
        size = upscaled.memory.shape[-1]
        lines.append(
            f"upscaled memory: {upscaled.dynamics}, {size} {kind} features per head"
        )
    # Files of other tools have no sidecar.
    base = table.get("base_model")
    line = f"base model: {base or 'not named in the sidecar'}"
    if model is not None:
        line += f"; {_fit(options.model, model.hash, base)}"
    lines.append(line)
    # Fields that a run or a user added, such as a score, alpha or the origin of the state.
    for name, value in table.items():
        if name not in _DESCRIBED_FIELDS:
            lines.append(f"{name}: {value}")
    lines.append(_capacity(state))
    lines.append(format_heads(head_statistics(state)))
    return "\n".join(lines)


def _fit(model: str, model_hash: str, base: str | None) -> str:
    """Describes whether a checkpoint of the right sizes is the state's base model."""
    if base is None:
        return f"the sizes fit {model}"
    if base == model_hash:
        return f"{model} matches"
    return f"{model} does not match, {model_hash}"


def _sizes(state: RWKV7State) -> str:
    """Describes the shape of a state."""
    layers, _, heads, values, keys = state.wkv.shape
    has_shifts = np.any(state.att_shift) or np.any(state.ffn_shift)
    shifts = "with shift states" if has_shifts else "without shift states"
    return f"{layers} layers, {heads} heads of {values} x {keys}, {shifts}"


def _dtypes(file: str) -> str:
    """Lists the dtypes in the file; a loaded state is always float32."""
    dtypes = set()
    for name, tensor in open_state_tensors(Path(file)).items():
        if name.endswith("time_state"):
            dtypes.add(str(tensor.dtype))
    return " and ".join(sorted(dtypes))


def _capacity(state: RWKV7State) -> str:
    """Describes how much a state of this size can store."""
    result = capacity(state)
    fewest, most = result.facts
    return (
        f"trained numbers: {result.trained:,} ({_trained_parts(state, result)})\n"
        f"capacity: about {fewest:,} to {most:,} facts of 5 bits (toy tasks, 300 to 1000 steps)"
    )


def _trained_parts(state: RWKV7State, result: Capacity) -> str:
    """Describes the parts of the trained numbers; a zero part was not trained."""
    if not result.memory:
        return "WKV"
    if result.trained == result.wkv + result.memory:
        return f"WKV {result.wkv:,} and upscaled {result.memory:,}"
    if np.any(state.wkv):
        return f"WKV; the upscaled memory's {result.memory:,} are zero"
    return f"upscaled; the WKV state's {result.wkv:,} are zero"


def _convert(options: argparse.Namespace) -> str:
    """Writes a state in another format, with the content of its sidecar."""
    state = load_state(options.state)
    info = read_sidecar(options.state)
    logits = load_logits(options.state)
    save_state(options.target, state, info=info, dtype=options.dtype, logits=logits)
    return f"{options.target}: {_sizes(state)}, {_dtypes(options.target)}"


def _parse_weights(text: str) -> list[float]:
    """Parses comma-separated finite numbers."""
    wrong = f"state mix: `--weights` must be comma-separated numbers; got {text!r}."
    weights = []
    for part in split_list(text.strip(), "state mix: `--weights`"):
        try:
            weights.append(float(part))
        except ValueError:
            raise ValueError(wrong) from None
    if not weights:
        raise ValueError(wrong)
    if not np.all(np.isfinite(weights)):
        raise ValueError(f"state mix: `--weights` must be finite; got {text!r}.")
    return weights


def _made_of(weight: float, file: str) -> str:
    """Describes a term of the sum, for its sidecar."""
    return f"{weight:g} x {Path(file).name}"


def _mix(options: argparse.Namespace) -> str:
    """Writes the weighted sum of states."""
    weights = _parse_weights(options.weights[0])
    # The target may come before or after `--weights`.
    files = [*options.files, *options.weights[1:]]
    if len(files) < 2:
        raise ValueError(
            "state mix: `STATE` and `OUT` must name at least one state and the output file."
        )
    *sources, target = files
    if len(weights) != len(sources):
        raise ValueError(
            f"state mix: `--weights` must have one weight for each of {len(sources)} states; "
            f"got {len(weights)}."
        )
    try:
        target = state_target(target)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"state mix: `OUT` {error}.") from None
    # A sum of states of different models has no meaning.
    with prefix_errors("state mix"):
        base = common_base_model(sources)
    states = [load_state(source) for source in sources]
    mixed = weighted_sum(states, weights)
    parts = map(_made_of, weights, sources)
    info = {"made_of": " + ".join(parts)}
    if base is not None:
        info["base_model"] = base
    save_state(target, mixed, info=info)
    line = f"{target}: {info['made_of']}"
    total = sum(weights)
    # Differences of states are useful, but a sum such as 0.9 is often a mistake.
    if np.isclose(total, 1.0, atol=1e-3):
        return line
    return (
        f"{line}\nnote: the weights sum to {total:g}, not 1, so this is not an average"
    )


def _scale(options: argparse.Namespace) -> str:
    """Writes a multiple of a state."""
    state = load_state(options.state)
    before = read_sidecar(options.state)
    alpha = before.get("alpha", 1.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise ValueError(
            f"state scale: `alpha` in the sidecar of `{options.state}` must be a finite number; "
            f"got {alpha!r}."
        )
    # Scaling a scaled state multiplies the factors.
    info = {
        "made_of": _made_of(options.alpha, options.state),
        "alpha": options.alpha * alpha,
    }
    if "base_model" in before:
        info["base_model"] = before["base_model"]
    save_state(options.target, scaled(state, options.alpha), info=info)
    return f"{options.target}: {info['made_of']}"
