"""The common jobs of users, next to alternative programs, on one core of a CPU.

    pip install -e '.[oracle,gguf]' rwkv-ops==0.11.3 keras
    python -m benchmarks.peers --check --json benchmarks/results/cpu-peers.json

Times are CPU times of this process, with one thread per program. The programs of a row alternate,
each after an unmeasured warm-up call, and medians are compared. Their results must agree first.
Memory is the peak of a separate process, runtimes included. A row whose peer is not installed has
no number; the file lists it. `--check` exits with 1 if a target is missed. Models are random.
"""

import argparse
import importlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("RWKV_V7_ON", "1")
os.environ.setdefault("RWKV_CUDA_ON", "0")
os.environ.setdefault("RWKV_JIT_ON", "0")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rwkv7_jax as rwkv
from benchmarks import record
from benchmarks.products import products_alone
from benchmarks.timing import median_processor_seconds
from pallas_kernels import wkv7, wkv7_reference
from pallas_kernels.cases import Case, make_inputs
from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.generation.generate import Generation
from rwkv7_jax.generation.prefill import prefill_state
from rwkv7_jax.tuning.read_statistics import state_statistics

MIB = 2**20
# The largest ratio, or number, that a row may have.
BARS = {
    "decode, batch 1 / rwkv": 0.75,
    "decode, batch 1 / llama.cpp": 1.3,
    "decode, a token of batch 8 / of batch 1": 0.4,
    "prefill 512 / rwkv": 0.6,
    "prefill 512 / llama.cpp": 0.6,
    "state tuning, V 65,536 / torch with fla's chunks": 0.5,
    "its peak memory / torch with fla's chunks": 0.25,
    "the head's temporaries, V 65,536, B4 T512, MiB": 128.0,
    "op forward, B1 T4096 H12 / rwkv-ops": 1.1,
    "op forward, B1 T4096 H12 / the definition": 1.03,
    "DBP step, M 256 / Adam step of the same state": 1.6,
    "converting a .pth to .safetensors, peak / file": 1.5,
    "rwkv7 --help, seconds": 0.3,
}
DECODED = 48
SMALL = rwkv.RWKV7Config(vocab_size=65536, num_layers=6, width=384)

Rows = dict[str, dict[str, Any]]


def compare(seconds: dict[str, float], rows: dict[str, tuple[str, str]]) -> Rows:
    """Makes rows of our seconds, the peer's seconds and the ratio.

    Args:
        seconds: of each run.
        rows: names of rows, each with our run and the peer's.
    """
    found = {}
    for row, (ours, peer) in rows.items():
        found[row] = {
            "ours": seconds[ours],
            "peer": seconds[peer],
            "value": seconds[ours] / seconds[peer],
        }
    return found


def random_params(config: rwkv.RWKV7Config) -> Any:
    """Draws float32 weights; norms are near the identity, so that logits are ordinary."""
    random = np.random.default_rng(0)
    model = rwkv.RWKV7(config)
    tokens = jnp.zeros((1, 1), jnp.int32)

    def make():
        return model.init(jax.random.key(0), tokens, rwkv.init_state(config))["params"]

    def draw(path, leaf):
        numbers = 0.03 * random.standard_normal(leaf.shape, np.float32)
        names = [part.key for part in path]
        is_scale = names[-1] == "weight" and names[-2].startswith("ln")
        return jnp.asarray(numbers + is_scale)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(make))


def check_same(ours: Any, theirs: Any, bar: float, what: str) -> None:
    """Raises unless two programs computed the same.

    Raises:
        RuntimeError: they did not: their times say nothing.
    """
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    if not error <= bar:
        raise RuntimeError(f"peers: {what}: the programs differ by {error:.2g}.")


def official_program(path: Path) -> Any:
    """Loads the `rwkv` package's model of a .pth file."""
    from rwkv.model import RWKV

    return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")


def llama_program(path: Path) -> Callable[..., Any]:
    """Makes `run(ids, tokens, probabilities=0)` of llama.cpp and a .gguf file."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    choices = xllamacpp.CommonParams()
    choices.model.path = str(path)
    choices.n_ctx = 1024
    choices.n_parallel = 1
    choices.warmup = False
    choices.verbosity = 0
    choices.cpuparams.n_threads = 1
    choices.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(choices)

    def run(ids, tokens: int, *, probabilities: int = 0):
        question = {"prompt": [int(number) for number in ids], "n_predict": tokens}
        question |= {"temperature": 0, "cache_prompt": False, "ignore_eos": True}
        if probabilities:
            question |= {"n_probs": probabilities, "post_sampling_probs": False}
        return server.handle_completions(question)

    return run


def generate_greedily(model: rwkv.RWKV7, params: Any, read: Generation) -> None:
    """Goes on after prompts that were read, by `DECODED` tokens a row."""
    out = rwkv.generate(
        model,
        params,
        [[]] * len(read.tokens),
        read.state,
        logits=read.logits,
        tokens=DECODED,
        temperature=0,
        stop_ids=(),
    )
    jax.block_until_ready(out.logits)


def decode_rows(folder: Path, rounds: int) -> Rows:
    """Compares reading and generating with the 0.1B model in float32."""
    config = rwkv.RWKV7Config.preset("0.1b")
    model = rwkv.RWKV7(config)
    drawn = random_params(config)
    rwkv.save_model(folder / "m.pth", drawn, config)
    rwkv.save_model(folder / "m.gguf", drawn, config)
    # Read from the file, as users and the peers do: the loader's memory is in large pages.
    params, _ = rwkv.load_model(folder / "m.pth")
    official = official_program(folder / "m.pth")
    llama = llama_program(folder / "m.gguf")
    ids = np.random.default_rng(1).integers(1, 60000, 512)
    numbers = [int(number) for number in ids]
    one, eight = (
        rwkv.generate(model, params, [ids[:8]] * rows, tokens=0) for rows in (1, 8)
    )
    logits, memory = official.forward(numbers[:8], None)
    check_same(one.logits[0], logits.numpy(), 1e-3, "logits of rwkv")
    check_llama(llama, ids[:8], one.logits[0])

    def official_decode():
        token = int(logits.argmax())
        state = [part.clone() for part in memory]
        for _ in range(DECODED):
            after, state = official.forward([token], state)
            token = int(after.argmax())

    seconds = median_processor_seconds(
        {
            "ours": lambda: generate_greedily(model, params, one),
            "rwkv": official_decode,
            # The prompt's one token is read in the same way as those that follow.
            "llama.cpp": lambda: llama(ids[:1], DECODED),
            "batch 8": lambda: generate_greedily(model, params, eight),
            "prefill": lambda: jax.block_until_ready(
                prefill_state(model, params, ids, chunk=512)
            ),
            "rwkv prefill": lambda: official.forward(numbers, None),
            "llama.cpp prefill": lambda: llama(ids, 1),
        },
        rounds,
        warm=True,
    )
    seconds["a token of 8"] = seconds["batch 8"] / 8
    return compare(
        seconds,
        {
            "decode, batch 1 / rwkv": ("ours", "rwkv"),
            "decode, batch 1 / llama.cpp": ("ours", "llama.cpp"),
            "decode, a token of batch 8 / of batch 1": ("a token of 8", "ours"),
            "prefill 512 / rwkv": ("prefill", "rwkv prefill"),
            "prefill 512 / llama.cpp": ("prefill", "llama.cpp prefill"),
        },
    )


def check_llama(llama: Callable[..., Any], ids: np.ndarray, logits: Any) -> None:
    """Raises unless llama.cpp gives its likeliest ids the probabilities that we do."""
    answer = llama(ids, 1, probabilities=20)
    likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    places = np.array([entry["id"] for entry in likeliest])
    theirs = [entry["logprob"] for entry in likeliest]
    check_same(jax.nn.log_softmax(logits)[places], theirs, 1e-3, "llama.cpp")


def tuning_batch(config: rwkv.RWKV7Config) -> dict[str, Any]:
    """Draws 4 rows of 512 tokens."""
    draws = np.random.default_rng(2).integers(0, config.vocab_size, (4, 513))
    return {"tokens": draws.astype(np.int32), "mask": np.ones((4, 512), np.float32)}


class OurStep:
    """A compiled step of state tuning, and the state that it is at."""

    def __init__(self, config, params, state, *, dbp: bool = False):
        """Makes the step; `dbp` decorrelates what the tuned memories read."""
        model = rwkv.RWKV7(config)
        leaves = ("wkv",) if state.upscaled is None else ("memory",)
        adam = optax.adam(1e-3)
        mask = rwkv_mask(leaves)
        tx = optax.masked(rwkv.decorrelate(adam) if dbp else adam, mask)
        measured = state_statistics(model, params, leaves=leaves) if dbp else None
        loss = rwkv.state_loss(model, params, leaves=leaves)
        self._step = rwkv.make_train_step(loss, tx, statistics=measured)
        self._train = rwkv.TrainState.create(jax.tree.map(jnp.copy, state), tx)
        self._batch = tuning_batch(config)

    def __call__(self) -> float:
        """Makes one step; returns the loss before it."""
        self._train, metrics = self._step(self._train, self._batch)
        return float(metrics["loss_nats"])


def rwkv_mask(leaves: tuple[str, ...]) -> Callable:
    """Makes the mask of the leaves that are tuned."""
    from rwkv7_jax.tuning.state_tuning import trainable_mask

    return lambda state: trainable_mask(state, leaves)


def torch_step(config, params) -> Callable[[], float]:
    """Makes the same step in PyTorch."""
    from benchmarks.peers_torch import tuning_step

    named = {name: np.asarray(x) for name, x in official_tensors(params, config)}
    return tuning_step(named, tuning_batch(config)["tokens"])


def tuning_rows(rounds: int) -> Rows:
    """Compares a step of state tuning at a large vocabulary."""
    params = random_params(SMALL)
    ours = OurStep(SMALL, params, rwkv.init_state(SMALL))
    theirs = torch_step(SMALL, params)
    for _ in range(2):
        check_same(ours(), theirs(), 1e-4, "losses of state tuning")
    programs = {
        "ours": ours,
        "torch": theirs,
        "products": products_alone(SMALL, params, tuning_batch(SMALL)["mask"].size),
    }
    seconds = median_processor_seconds(programs, rounds, warm=True)
    name = "state tuning, V 65,536 / torch with fla's chunks"
    rows = compare(seconds, {name: ("ours", "torch")})
    rows[name]["products_alone"] = seconds["products"]
    peaks = {what: alone(what) for what in ("our-step", "torch-step")}
    rows["its peak memory / torch with fla's chunks"] = {
        "ours": peaks["our-step"] / MIB,
        "peer": peaks["torch-step"] / MIB,
        "value": peaks["our-step"] / peaks["torch-step"],
    }
    rows["the head's temporaries, V 65,536, B4 T512, MiB"] = {
        "value": (temporaries(65536) - temporaries(256)) / MIB
    }
    return rows


def temporaries(vocab_size: int) -> int:
    """Returns the compiler's bytes of temporaries of the gradient of a state's loss."""
    config = rwkv.RWKV7Config(vocab_size=vocab_size, num_layers=1, width=384)
    params = jax.tree.map(jnp.zeros_like, random_params(config))

    def loss(params, state, batch):
        return rwkv.state_loss(rwkv.RWKV7(config), params)(state, batch)[0]

    gradient = jax.jit(jax.grad(loss, argnums=1))
    batch = {name: jnp.asarray(x) for name, x in tuning_batch(config).items()}
    compiled = gradient.lower(params, rwkv.init_state(config), batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def op_rows(rounds: int) -> Rows:
    """Compares the op's forward pass over a long row."""
    case = Case(batch=1, tokens=4096, heads=12)
    inputs, state = make_inputs(case, "float32")
    runs = {
        "ours": jax.jit(lambda inputs, state: wkv7(**inputs._asdict(), state=state)),
        "definition": jax.jit(wkv7_reference),
    }
    rows = {"op forward, B1 T4096 H12 / the definition": ("ours", "definition")}
    try:
        from benchmarks.wkv_peers import rwkv_ops_op

        runs["rwkv-ops"] = jax.jit(rwkv_ops_op())
        rows["op forward, B1 T4096 H12 / rwkv-ops"] = ("ours", "rwkv-ops")
    except ImportError:
        pass
    expected = runs["ours"](inputs, state)[0]
    for name, run in runs.items():
        check_same(run(inputs, state)[0], expected, 1e-4, name)
    calls = {}
    for name, run in runs.items():
        calls[name] = lambda run=run: jax.block_until_ready(run(inputs, state))
    return compare(median_processor_seconds(calls, 3 * rounds, warm=True), rows)


def dbp_rows(rounds: int) -> Rows:
    """Compares steps of an upscaled state by DBP and by plain Adam."""
    config = rwkv.RWKV7Config(vocab_size=256, num_layers=6, width=384)
    params = random_params(config)
    model = rwkv.RWKV7(config)
    text = tuning_batch(config)["tokens"][:, :-1]
    state = rwkv.upscale(model, params, text, size=256)
    steps = {
        "dbp": OurStep(config, params, state, dbp=True),
        "adam": OurStep(config, params, state),
    }
    name = "DBP step, M 256 / Adam step of the same state"
    seconds = median_processor_seconds(steps, rounds, warm=True)
    return compare(seconds, {name: ("dbp", "adam")})


def child(*command: str) -> tuple[float, str]:
    """Runs a program; returns its processor seconds and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, done.stdout


def alone(what: str, *arguments: str) -> int:
    """Runs one of `ALONE` in a separate process; returns its peak in bytes."""
    command = (sys.executable, "-m", "benchmarks.peers", "--alone", what, *arguments)
    return int(child(*command)[1].split()[-1])


def _tune_ours() -> None:
    step = OurStep(SMALL, random_params(SMALL), rwkv.init_state(SMALL))
    step()
    step()


def _tune_torch() -> None:
    step = torch_step(SMALL, random_params(SMALL))
    step()
    step()


def _convert(source: str, target: str) -> None:
    from rwkv7_jax.cli.commands import main as run

    if run(["convert", source, target]):
        raise RuntimeError("peers: converting failed.")


ALONE = {"our-step": _tune_ours, "torch-step": _tune_torch, "convert": _convert}


def file_rows(folder: Path) -> Rows:
    """Measures the peak of a conversion; `decode_rows` has left the model's file."""
    source = folder / "m.pth"
    peak = alone("convert", str(source), str(folder / "m.safetensors"))
    size = source.stat().st_size
    return {
        "converting a .pth to .safetensors, peak / file": {
            "ours": peak / MIB,
            "peer": size / MIB,
            "value": peak / size,
        }
    }


def help_rows() -> Rows:
    """Measures the help of the command."""
    command = (sys.executable, "-m", "rwkv7_jax.cli", "--help")
    seconds = statistics.median(child(*command)[0] for _ in range(5))
    return {"rwkv7 --help, seconds": {"value": seconds}}


def measure(rounds: int, keep: Callable[[Rows], None]) -> Rows:
    """Measures all rows; `keep` gets those so far after each part, should a later one not end."""
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in (
            lambda: decode_rows(folder, rounds),
            lambda: file_rows(folder),
            help_rows,
            lambda: op_rows(rounds),
            lambda: dbp_rows(rounds),
            lambda: tuning_rows(rounds),
        ):
            found = part()
            for row, numbers in found.items():
                numbers["bar"] = BARS[row]
                numbers["met"] = numbers["value"] <= BARS[row]
                sides = [
                    f"{numbers[s]:10.3f}" for s in ("ours", "peer") if s in numbers
                ]
                mark = "" if numbers["met"] else "  MISSED"
                value = f"{numbers['value']:8.3f} of {BARS[row]:g}"
                print(f"{row:<52}{value}{''.join(sides)}{mark}", flush=True)
            rows |= found
            keep(rows)
    return rows


def main() -> None:
    """Prints the table; `--check` exits with 1 if a target is missed.

    Raises:
        SystemExit: a target is missed.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="file to write")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 if a target is missed"
    )
    parser.add_argument("--alone", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.alone:
        ALONE[args.alone[0]](*args.alone[1:])
        with open("/proc/self/status") as status:
            peak = next(line for line in status if line.startswith("VmHWM"))
        print(int(peak.split()[1]) * 1024)
        return

    def keep(rows: Rows) -> None:
        if not args.json:
            return
        record.write(
            args.json,
            "benchmarks.peers",
            packages=(
                *("jax", "torch", "rwkv", "xllamacpp"),
                *("flash-linear-attention", "rwkv-ops"),
            ),
            load_average=os.getloadavg()[0],
            not_measured=sorted(set(BARS) - set(rows)),
            rows=rows,
        )

    rows = measure(args.rounds, keep)
    missed = [row for row, numbers in rows.items() if not numbers["met"]]
    if args.check and missed:
        raise SystemExit(f"peers: missed: {'; '.join(missed)}.")


if __name__ == "__main__":
    main()
