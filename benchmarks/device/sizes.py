"""The sizes of the steps of a run on a device, and the kernels that they try."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxtyping import Array

from benchmarks import peers_gpu
from pallas_kernels import bench, dispatch, wkv7
from pallas_kernels.cases import Case
from pallas_kernels.reference import State, WKVInputs


class Job(NamedTuple):
    """One thing to check or to measure.

    Attributes:
        labels: what it is, as the line of its result says.
        run: does it, and returns numbers by name.
    """

    labels: dict[str, Any]
    run: Callable[[], dict]


Jobs = Iterator[Job]


class Sizes(NamedTuple):
    """How large the steps are.

    Attributes:
        interpret: run kernels in Pallas's interpreter.
        laws: most cases of the laws for each kernel.
        heads_of: sizes of heads (Nk, Nv) in the laws; the first is the usual one.
        lengths: tokens in the laws.
        rows_heads: products of rows and heads in the laws, which choose the number of segments.
        repetitions: runs that must agree bit for bit.
        filled_bytes: memory that is filled with NaN and freed before one of them.
        copies: copies of a row in one large call.
        tests: files of the repository's tests, those that tell most first.
        cases: of the times, the usual one first.
        segments: numbers of segments that are forced.
        model: entries of the vocabulary, layers and width of the model.
        length: tokens of a row in training.
        batches: rows in training, the usual number first.
        remats: recomputations in training, the usual one first.
        decoded: rows in decoding.
        prompts: rows and tokens of prompts, among them those of the server's programs.
        repeats: measurements, of which the least counts.
        warm: compile the programs of a step that measures; their times do not count, since other
            processes run at the same time.
    """

    interpret: bool
    laws: int
    heads_of: tuple[tuple[int, int], ...]
    lengths: tuple[int, ...]
    rows_heads: tuple[int, ...]
    repetitions: int
    filled_bytes: int
    copies: int
    tests: tuple[str, ...]
    cases: tuple[Case, ...]
    segments: tuple[int, ...]
    model: tuple[int, int, int]
    length: int
    batches: tuple[int, ...]
    remats: tuple[str, ...]
    decoded: tuple[int, ...]
    prompts: tuple[tuple[int, int], ...]
    repeats: int
    warm: bool = False


DEVICE = Sizes(
    interpret=False,
    laws=100,
    heads_of=((64, 64), (128, 128), (256, 64), (32, 64)),
    lengths=(1, 5, 31, 32, 33, 64, 96, 1024, 4097),
    rows_heads=(1, 8, 32, 96, 128, 256),
    repetitions=50,
    filled_bytes=2**31,
    copies=256,
    tests=(
        "tests/model/test_rwkv7.py",
        "tests/kernels/test_wkv7_laws.py",
        "tests/kernels/test_one_token.py",
        "tests/generation/test_generate.py",
        "tests/kernels/test_wkv7_derivatives.py",
        "tests/model/test_unrolled.py",
        "tests/kernels/test_wkv7_packed.py",
        "tests/model/test_recurrence.py",
        "tests/kernels/test_wkv7_lengths.py",
        "tests/generation/test_sampling.py",
        "tests/model/test_upscaled_model.py",
        "tests/model/test_int8_weights.py",
    ),
    cases=(
        Case(8, 4096, 32),
        Case(8, 4096, 16),
        Case(1, 32768, 16),
        Case(8, 4096, 16, 128, 128),
        Case(64, 512, 16),
    ),
    segments=(1, 2, 4, 8, 16),
    model=(65536, 24, 1024),
    length=4096,
    batches=(8, 4, 1),
    remats=("op", "none", "block"),
    decoded=(128, 1, 512, 32),
    prompts=(
        (1, 16),
        (8, 16),
        (1, 128),
        (8, 128),
        (1, 256),
        (4, 256),
        (1, 1024),
        (1, 4096),
        (1, 16384),
    ),
    repeats=5,
)
REHEARSAL = Sizes(
    interpret=True,
    laws=2,
    heads_of=((32, 32),),
    lengths=(33,),
    rows_heads=(2,),
    repetitions=2,
    filled_bytes=2**20,
    copies=2,
    tests=("tests/model/test_config.py",),
    cases=(Case(1, 64, 1, 32, 32),),
    segments=(1, 2),
    model=(64, 2, 64),
    length=32,
    batches=(1,),
    remats=("op",),
    decoded=(1, 2),
    prompts=((2, 8),),
    repeats=1,
)


def kernels(sizes: Sizes) -> list[str]:
    """Lists the GPU kernels that run here, the usual one first."""
    if sizes.interpret:
        return ["pallas_gpu"]
    return [name for name in dispatch.GPU_TABLES if name in dispatch.available()]


def op_of(name: str | None, sizes: Sizes, **options) -> bench.Op:
    """Returns the op of one implementation."""
    is_kernel = name in dispatch.PLATFORMS

    def op(inputs: WKVInputs, state: State) -> tuple[Array, State]:
        return wkv7(
            *inputs,
            state,
            implementation=name,
            interpret=sizes.interpret and is_kernel,
            **options,
        )

    return op


def attempt(run: Callable[[], dict]) -> dict:
    """Returns what `run` returns with its result "ok", or the reason why it has none."""
    row = peers_gpu.attempt(run)
    result = row.pop("status")
    return {"result": result} | row
