"""`rwkv7 convert | inspect | doctor | data | generate | state | report`: arguments."""

import argparse
import importlib.util
import sys
import warnings

import numpy as np

from rwkv7_jax.cli.data import add_data_command
from rwkv7_jax.cli.generate import add_generate_command, discard_output
from rwkv7_jax.cli.state import add_state_command
from rwkv7_jax.runs.compilation_cache import enable_compilation_cache, user_folder


def _convert(options: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.model_files import load_model, save_model
    from rwkv7_jax.runs.progress_bar import ProgressBar

    bars = {}

    def show(label):
        def progress(done: int, total: int) -> None:
            bar = bars.setdefault(label, ProgressBar(total, label))
            bar.update(done, f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB")
            if done == total:
                bar.close()

        return progress

    params, config = load_model(
        options.source, dtype=options.dtype, allow_nan=options.allow_nan, progress=show("reading")
    )
    save_model(options.target, params, config, format=options.format, progress=show("writing"))
    print(f"{options.target}: {_count(params):,} parameters, {_sizes(config)}")


def _count(params) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _sizes(config) -> str:
    return (
        f"{config.num_layers} layers, width {config.width}, {config.num_heads} heads of "
        f"{config.head_size}, vocabulary {config.vocab_size}"
    )


def _row(name: str, array: np.ndarray) -> str:
    wide = np.asarray(array, np.float32)
    rms = float(np.sqrt(np.mean(np.square(wide)))) if wide.size else 0.0
    top = float(np.abs(wide).max(initial=0.0))
    return f"{name:<38}{array.shape!s:>18}  {array.dtype!s:<10}{rms:>12.4g}{top:>12.4g}"


def _inspect(options: argparse.Namespace) -> None:
    from rwkv7_jax.checkpoints.model_files import load_model
    from rwkv7_jax.checkpoints.param_tree import official_tensors
    from rwkv7_jax.checkpoints.state_files import load_state

    print(f"{'tensor':<38}{'shape':>18}  {'dtype':<10}{'rms':>12}{'max':>12}")
    if options.state:
        state = load_state(options.path)
        for layer, wkv in enumerate(np.asarray(state.wkv[:, 0])):
            for head, one in enumerate(wkv):
                print(_row(f"layer {layer} head {head}", one))
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params, config = load_model(options.path, allow_nan=True)
    for name, array in official_tensors(params, config):
        print(_row(name, array))
    print(f"{_count(params):,} parameters, {_sizes(config)}\n{config}")
    for warning in caught:
        print(f"note: {warning.message}")


def _doctor(options: argparse.Namespace) -> None:
    import pallas_kernels
    from rwkv7_jax.reports.system_info import lines, system

    print("\n".join(lines(system())))
    for name, use in (("matplotlib", "pictures"), ("torch", "oracle tests")):
        there = "yes" if importlib.util.find_spec(name) else "no"
        print(f"{name:<18}{there} ({use})")
    here = pallas_kernels.available()
    for name in pallas_kernels.IMPLEMENTATIONS:
        print(f"wkv7 {name:<13}{'runs here' if name in here else 'not on this device'}")


def _report(options: argparse.Namespace) -> None:
    from rwkv7_jax.reports.html_report import write_report

    print(write_report(options.folder))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="rwkv7", description="RWKV-7 checkpoints and states.")
    commands = top.add_subparsers(required=True, metavar="command")

    convert = commands.add_parser("convert", help="change a checkpoint's format")
    convert.add_argument("source", help=".pth, .safetensors, .st, an HF folder or an orbax folder")
    convert.add_argument("target", help="format by suffix; a folder is orbax")
    convert.add_argument("--format", choices=("hf",), help="write an HF folder")
    convert.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    convert.add_argument("--allow-nan", action="store_true", help="take NaN and Inf as they are")
    convert.set_defaults(run=_convert)

    inspect = commands.add_parser("inspect", help="sizes, dtypes and norms of a file's tensors")
    inspect.add_argument("path")
    inspect.add_argument("--state", action="store_true", help="the file is a start state")
    inspect.set_defaults(run=_inspect)

    doctor = commands.add_parser("doctor", help="versions, devices and what can run here")
    doctor.set_defaults(run=_doctor)

    report = commands.add_parser("report", help="write report.html into a run's folder")
    report.add_argument("folder")
    report.set_defaults(run=_report)
    add_data_command(commands)
    add_generate_command(commands)
    add_state_command(commands)
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; bad input ends in one line and exit code 2, a closed pipe in silence."""
    options = parser().parse_args(arguments)
    try:
        if arguments is None and getattr(options, "compiles", False):
            enable_compilation_cache(user_folder())
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
    except (ValueError, TypeError, OSError) as error:
        print(f"rwkv7: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
