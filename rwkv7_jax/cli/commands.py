"""The top-level parser of `rwkv7`, its main function and the small commands."""

import argparse
import contextlib
import importlib.util
import os
import sys
import warnings
from pathlib import Path

import jax
import numpy as np

import pallas_kernels
from rwkv7_jax.array_types import Params
from rwkv7_jax.checkpoints import (
    check_model_target,
    has_merged_state,
    kept_vocabulary,
    load_model,
    load_state,
    model_hash,
    official_tensors,
    save_model,
    save_state,
    sidecar,
    verify,
)
from rwkv7_jax.cli.arguments import path, target_path
from rwkv7_jax.cli.chat import add_chat_command
from rwkv7_jax.cli.data import add_data_command
from rwkv7_jax.cli.errors import reason
from rwkv7_jax.cli.generate import add_generate_command
from rwkv7_jax.cli.inputs import add_vocabulary_option
from rwkv7_jax.cli.observe import add_observe_command
from rwkv7_jax.cli.output import discard_output, name_output
from rwkv7_jax.cli.serve import add_serve_command
from rwkv7_jax.cli.state import add_state_command
from rwkv7_jax.cli.summary import COMMANDS, add_commands, top_parser
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.model.int8_weights import quantize
from rwkv7_jax.reports.html_report import write_report
from rwkv7_jax.reports.system_info import lines, system, version
from rwkv7_jax.runs.compilation_cache import enable_compilation_cache, user_folder
from rwkv7_jax.runs.devices import check_devices, start_devices, use_cpu
from rwkv7_jax.runs.exit_codes import (
    Stopped,
    exit_code,
)
from rwkv7_jax.runs.monitoring.progress_bar import byte_progress
from rwkv7_jax.runs.process import (
    StopSignals,
    escape_unencodable,
    ignore_abandoned_reads,
    open_closed_streams,
    shown_on,
    warn_in_one_line,
)
from rwkv7_jax.runs.waiting import report_wait
from rwkv7_jax.text.tokenizer import Tokenizer
from rwkv7_jax.text.vocabularies import load_vocabulary
from rwkv7_jax.training.costs import parameter_count, tree_bytes

# A run directory has at least one of these files.
_FILES_OF_RUNS = ("metrics.jsonl", "settings.json", "events.jsonl")

# User errors besides those with an exit code in every program.
_USER_ERRORS = (OverflowError, NotImplementedError)

_VOCABULARY = "convert: `--vocabulary`"

# Formats that hold only weights.
_WITHOUT_VOCABULARY = ("pth", "safetensors", "st")


def _convert(options: argparse.Namespace) -> str:
    """Reads a checkpoint and writes it in another format."""
    # Reading the source may take minutes, so check everything else first.
    _, kind = check_model_target(options.target, format=options.format)
    if options.vocabulary is not None:
        load_vocabulary(options.vocabulary, argument=_VOCABULARY)
    with byte_progress("reading") as progress:
        params, config = load_model(
            options.source,
            dtype=options.dtype,
            allow_nan=options.allow_nan,
            # The target's new digests would hide damage in the source.
            verify=True,
            progress=progress,
        )
    # Read the state before writing: source and target may be the same file.
    state = None
    state_path = _state_place(Path(options.target))
    if has_merged_state(options.source):
        state = load_state(options.source, config=config)
        _refuse_replacing(state_path, options.source)
    tokenizer = _vocabulary_of(options, kind, config)
    with byte_progress("writing") as progress:
        save_model(
            options.target,
            params,
            config,
            format=options.format,
            tokenizer=tokenizer,
            allow_nan=options.allow_nan,
            progress=progress,
        )
    lines = [f"{options.target}: {_sizes(config)}"]
    if options.vocabulary is not None and kind in _WITHOUT_VOCABULARY:
        lines.append(
            f"note: {options.target} holds no vocabulary, unlike folders and .gguf files: pass "
            f"`--vocabulary {options.vocabulary}` to programs that read it"
        )
    if state is not None:
        info = {"base_model": model_hash(params, config)}
        save_state(state_path, state, config=config, info=info)
        lines.append(f"{state_path}: the tuned state in {options.source}")
    return "\n".join(lines)


def _vocabulary_of(
    options: argparse.Namespace, kind: str, config: RWKV7Config
) -> Tokenizer | None:
    """Returns the vocabulary of `--vocabulary` or of the source; None if there is none.

    The source's vocabulary is not read for a target format that holds none, so a source with a
    broken vocabulary can still be converted.
    """
    if options.vocabulary is not None:
        return load_vocabulary(
            options.vocabulary, config.vocab_size, argument=_VOCABULARY
        )
    if kind in _WITHOUT_VOCABULARY:
        return None
    return kept_vocabulary(options.source, config.vocab_size)


def _state_place(target: Path) -> Path:
    """Returns the file for a state that was merged into the model at `target`."""
    if target.suffix in (".pth", ".safetensors", ".st"):
        return target.with_name(f"{target.stem}.state{target.suffix}")
    return target.with_name(f"{target.name}.state.pth")


def _refuse_replacing(state_path: Path, source: str) -> None:
    """Raises if the file for the merged state exists already.

    Raises:
        ValueError: the file or its sidecar exists.
    """
    for file in (state_path, sidecar(state_path)):
        if file.exists():
            raise ValueError(
                f"convert: `{file}` must not exist, because the tuned state in `{source}` is "
                "written there; move it away, or name another target."
            )


def _memory(params: Params) -> str:
    """Describes the memory of a model's weights, unchanged and with int8 matrices."""
    in_int8 = jax.eval_shape(quantize, params)
    sizes = []
    for tree in (params, in_int8):
        sizes.append(f"{tree_bytes(tree) / 2**20:,.1f} MiB")
    return f"{sizes[0]} of weights, {sizes[1]} with int8 matrices"


def _sizes(config: RWKV7Config) -> str:
    """Describes the main sizes of a model."""
    return (
        f"{parameter_count(config):,} parameters, {config.num_layers} layers, width "
        f"{config.width}, {config.num_heads} heads of {config.head_size}, vocabulary "
        f"{config.vocab_size}"
    )


def _tensor_row(name: str, array: np.ndarray) -> str:
    """Formats a tensor's shape, dtype, root mean square and largest magnitude."""
    values = np.asarray(array, np.float32)
    # The mean of an empty tensor would be NaN, with a warning.
    rms = float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0
    largest = float(np.abs(values).max(initial=0.0))
    return f"{name:<38}{array.shape!s:>18}  {array.dtype!s:<10}{rms:>12.4g}{largest:>12.4g}"


def _inspect(options: argparse.Namespace) -> str:
    """Makes a table of the tensors in a file, or verifies the file's digests."""
    if options.verify:
        compared = verify(options.path)
        if not compared:
            return f"{options.path} is readable, but has no digests to verify"
        return "\n".join(compared)
    head = f"{'tensor':<38}{'shape':>18}  {'dtype':<10}{'rms':>12}{'max':>12}"
    rows = _state_rows if options.state else _model_rows
    return "\n".join([head, *rows(options.path)])


def _state_rows(file: str) -> list[str]:
    """Makes one row per head."""
    state = load_state(file)
    rows = []
    for layer, heads in enumerate(np.asarray(state.wkv[:, 0])):
        for head, matrix in enumerate(heads):
            rows.append(_tensor_row(f"layer {layer} head {head}", matrix))
    return rows


def _model_rows(file: str) -> list[str]:
    """Makes one row per tensor, then lines for the config and the loader's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # NaN is a reason to inspect a checkpoint.
        params, config = load_model(file, allow_nan=True)
    rows = [_tensor_row(*tensor) for tensor in official_tensors(params, config)]
    rows.append(f"{_sizes(config)}\n{config}\n{_memory(params)}")
    # Warnings come last, where they stay visible.
    return rows + [f"note: {warning.message}" for warning in caught]


def _doctor(options: argparse.Namespace) -> str:
    """Lists versions, devices, optional packages and available kernels."""
    problem = start_devices()
    if problem is not None:
        use_cpu()
    report = list(lines(system()))
    for name, use in (("matplotlib", "pictures"), ("torch", "oracle tests")):
        # `find_spec` avoids the import, which takes seconds.
        installed = "yes" if importlib.util.find_spec(name) else "no"
        report.append(f"{name:<18}{installed} ({use})")
    available = pallas_kernels.available()
    for name in pallas_kernels.IMPLEMENTATIONS:
        place = "runs here" if name in available else "not on this device"
        report.append(f"wkv7 {name:<13}{place}")
    if problem is not None:
        report.append(f"problem: {problem}")
    return "\n".join(report)


def _report(options: argparse.Namespace) -> str:
    """Writes the report of a run and returns its path.

    Raises:
        ValueError: the folder is not a run directory; a report there would make it look like one.
    """
    folder = Path(options.folder)
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in _FILES_OF_RUNS
    ):
        raise ValueError(
            f"report: `{folder}` must be a run directory; it has none of "
            f"{', '.join(_FILES_OF_RUNS)}."
        )
    return str(write_report(options.folder))


def parser() -> argparse.ArgumentParser:
    """Builds the parser of the command line."""
    top = top_parser(f"rwkv7_jax {version('rwkv7_jax')}, jax {version('jax')}")
    commands = add_commands(top)

    convert = commands.add_parser("convert", help=COMMANDS["convert"])
    convert.add_argument(
        "source",
        type=path,
        help="model file or folder, in any supported layout",
    )
    convert.add_argument(
        "target", type=target_path, help="output; format by suffix, orbax for a folder"
    )
    convert.add_argument(
        "--format",
        choices=("hf", "transformers"),
        help="write a Hugging Face folder with fla's tensor names (hf) or the official ones",
    )
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    convert.add_argument("--allow-nan", action="store_true", help="accept NaN and Inf")
    add_vocabulary_option(
        convert, "the source's; only folders and .gguf files hold one"
    )
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help=COMMANDS["inspect"])
    inspect.add_argument("path", type=path)
    inspect.add_argument(
        "--state", action="store_true", help="the file is a start state"
    )
    inspect.add_argument(
        "--verify",
        action="store_true",
        help="verify the checksums and digests in the file",
    )
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser("doctor", help=COMMANDS["doctor"])
    # None: the command starts the devices itself, and reports if that fails.
    doctor.set_defaults(run=_doctor, computes=None)

    report = commands.add_parser("report", help=COMMANDS["report"])
    report.add_argument("folder", type=path)
    report.set_defaults(run=_report)
    add_data_command(commands)
    add_generate_command(commands)
    add_chat_command(commands)
    add_serve_command(commands)
    add_observe_command(commands)
    add_state_command(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns the exit code.

    The output of a command is printed after all its files are written, so a closed pipe loses no
    result. Bad input gives one line and exit code 2. A signal gives no message and the shell's exit
    code for it. A closed pipe gives no message and exit code 0. `exit_codes` has the other codes.

    Args:
        arguments: arguments without the program's name; None for those of the process.
    """
    open_closed_streams()
    escape_unencodable()
    if arguments is not None:
        return _run(arguments)
    ignore_abandoned_reads()
    warn_in_one_line()
    try:
        with StopSignals(None) as stop, stop.interruptible():
            return _run(sys.argv[1:], owns_process=True)
    except Stopped as error:
        # XLA threads may still compile, and would crash during interpreter shutdown.
        os._exit(error.code)


def _choose_devices(options: argparse.Namespace) -> None:
    """Prepares the accelerator for commands that compute; keeps the others off it."""
    computes = getattr(options, "computes", False)
    if computes is None:
        return
    if not computes:
        use_cpu()
        return
    check_devices()
    enable_compilation_cache(user_folder())


def _run(words: list[str], *, owns_process: bool = False) -> int:
    """Runs one command and returns the exit code.

    Args:
        words: arguments without the program's name.
        owns_process: whether JAX may be configured for the command.
    """
    try:
        options = parser().parse_args(words)
        if owns_process:
            _choose_devices(options)
        # The others print while they work.
        waits = getattr(options, "waits", True)
        with report_wait(f"rwkv7 {words[0]}") if waits else contextlib.nullcontext():
            report = options.run(options)
        with name_output():
            if report is not None:
                print(shown_on(sys.stdout, report))
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except KeyboardInterrupt:
        discard_output()
        # The shells' exit code after SIGINT.
        return 130
    except Exception as error:
        code = 2 if isinstance(error, _USER_ERRORS) else exit_code(error)
        # A bug should show its traceback.
        if code is None:
            raise
        # A closed pipe or a full disk must not change the exit code.
        with contextlib.suppress(OSError):
            print(f"rwkv7: {reason(error)}", file=sys.stderr, flush=True)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
