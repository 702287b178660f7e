"""GGUF files of llama.cpp: the tensors, sizes and vocabulary of its `rwkv7` architecture.

Needs the package `gguf` (extra `gguf`), so `tensor_files.gguf_files` imports this module lazily.
Tensors are written as float32, float16 or bfloat16. Quantised tensors are dequantised to float32
when read. The format cannot hold start states.
Source: ggml-org/llama.cpp conversion/rwkv.py (names, orientation) and src/models/rwkv7.cpp
(required tensors and keys). The package `gguf` parses and writes the container.
"""

import re
from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path
from typing import cast

import gguf
import ml_dtypes
import numpy as np

from rwkv7_jax.atomic_write import atomic_write
from rwkv7_jax.checkpoints import tensor_names
from rwkv7_jax.checkpoints.gguf_vocabulary import (
    add_vocabulary,
    metadata,
    read_vocabulary,
    writable_entries,
)
from rwkv7_jax.checkpoints.integrity.digests import digest_of_arrays
from rwkv7_jax.checkpoints.layouts.names import split_lerps
from rwkv7_jax.checkpoints.layouts.orientation import transposed
from rwkv7_jax.checkpoints.tensor_files import TensorFile
from rwkv7_jax.checkpoints.tensor_names import LERPS, NameTable, Tensor
from rwkv7_jax.checkpoints.unused_value_residual import drop_unused_value_residual
from rwkv7_jax.checks import first_line
from rwkv7_jax.model.config import RWKV7Config
from rwkv7_jax.text.tokenizer import Tokenizer

_ARCHITECTURE = "rwkv7"

# llama.cpp's CPU kernel processes this many channels at a time and skips a remainder of the head.
_HEAD_SIZE_STEP = 32

# A constant in llama.cpp.
_GROUP_NORM_EPS = 64e-5

# llama.cpp's converter writes this value for every RWKV model, which has no maximum length.
_CONTEXT_LENGTH = 1 << 20

_TYPES = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}

_FILE_TYPES = {
    np.dtype(np.float32): gguf.LlamaFileType.ALL_F32,
    np.dtype(np.float16): gguf.LlamaFileType.MOSTLY_F16,
    np.dtype(ml_dtypes.bfloat16): gguf.LlamaFileType.MOSTLY_BF16,
}

# Our own metadata key: official names of the tensors that were widened from `dtype` to float32.
_WIDENED_KEY = "rwkv7_jax.widened.{dtype}"

# Our own metadata key: the digest of the stored tensors, `norm_eps` and the head size.
_DIGEST_KEY = "rwkv7_jax.digest"

_OUTSIDE = {
    "emb.weight": "token_embd.weight",
    "blocks.0.ln0.weight": "token_embd_norm.weight",
    "blocks.0.ln0.bias": "token_embd_norm.bias",
    "ln_out.weight": "output_norm.weight",
    "ln_out.bias": "output_norm.bias",
    "head.weight": "output.weight",
}

# All six lerps of time mix are fused into one tensor [6, 1, 1, D], in the order of `LERPS`.
_FUSED_LERPS = f"att.x_{LERPS}"

_INSIDE = {
    _FUSED_LERPS: "time_mix_lerp_fused.weight",
    "ln1.weight": "attn_norm.weight",
    "ln1.bias": "attn_norm.bias",
    "ln2.weight": "attn_norm_2.weight",
    "ln2.bias": "attn_norm_2.bias",
    "att.ln_x.weight": "time_mix_ln.weight",
    "att.ln_x.bias": "time_mix_ln.bias",
    "att.w0": "time_mix_w0.weight",
    "att.w1": "time_mix_w1.weight",
    "att.w2": "time_mix_w2.weight",
    "att.a0": "time_mix_a0.weight",
    "att.a1": "time_mix_a1.weight",
    "att.a2": "time_mix_a2.weight",
    "att.v0": "time_mix_v0.weight",
    "att.v1": "time_mix_v1.weight",
    "att.v2": "time_mix_v2.weight",
    "att.g1": "time_mix_g1.weight",
    "att.g2": "time_mix_g2.weight",
    "att.k_k": "time_mix_k_k.weight",
    "att.k_a": "time_mix_k_a.weight",
    "att.r_k": "time_mix_r_k.weight",
    "att.receptance.weight": "time_mix_receptance.weight",
    "att.key.weight": "time_mix_key.weight",
    "att.value.weight": "time_mix_value.weight",
    "att.output.weight": "time_mix_output.weight",
    "ffn.x_k": "channel_mix_lerp_k.weight",
    "ffn.key.weight": "channel_mix_key.weight",
    "ffn.value.weight": "channel_mix_value.weight",
}

_NAMES = NameTable(_OUTSIDE, _INSIDE, block="blk")

_LERP = re.compile(r"^blocks\.(\d+)\.att\.x_([rwkvag])$")

# llama.cpp keeps these matrices in float32, as it does all vectors.
_FLOAT32_MATRICES = re.compile(r"\.att\.w[12]$")

# llama.cpp requires a value residual in block 0, with the rank of `a`, but never reads it.
_COPIED_IN_BLOCK_0 = re.compile(r"^blocks\.0\.att\.a([012])$")

_UNREAD = re.compile(r"^blk\.0\.time_mix_v[012]\.weight$")


class _CheckedReader(gguf.GGUFReader):
    """Reader that raises on a truncated file instead of returning short arrays."""

    def _get(self, offset, dtype, count=1, override_order=None):
        array = super()._get(offset, dtype, count, override_order)
        if len(array) != int(count):
            raise ValueError("it ends too early")
        return array


def _open(path: Path) -> gguf.GGUFReader:
    """Opens an RWKV-7 GGUF file and checks its header; reads no tensor."""
    try:
        reader = _CheckedReader(path)
    # The errors that the package raises for malformed headers.
    except (
        ValueError,
        LookupError,
        TypeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(
            f"`{path}` is not a GGUF file, or a damaged one: {first_line(error)}."
        ) from None
    if reader.byte_order == "S":
        raise ValueError(
            f"`{path}` is a GGUF file of the other byte order (big-endian)."
        )
    architecture = metadata(reader, gguf.Keys.General.ARCHITECTURE)
    if architecture != _ARCHITECTURE:
        raise ValueError(
            f"`{path}` is a GGUF file of {architecture!r}, not of {_ARCHITECTURE!r}."
        )
    if metadata(reader, gguf.Keys.General.TYPE) == gguf.GGUFType.ADAPTER:
        raise ValueError(
            f"`{path}` is an adapter such as LoRA, not a model: merge it into its model first, "
            "with `llama-export-lora`."
        )
    parts = metadata(reader, gguf.Keys.Split.LLM_KV_SPLIT_COUNT)
    if parts is not None and parts > 1:
        raise ValueError(
            f"`{path}` is one of {parts} parts of a GGUF file; "
            "join them with `llama-gguf-split --merge`."
        )
    return reader


def _refuse_unreadable(reader: gguf.GGUFReader, path: Path) -> None:
    """Raises if a tensor is of a type whose numbers the package cannot compute."""
    checked = set(_TYPES)
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind in checked:
            continue
        try:
            # One row of one tensor of each type is enough to tell.
            gguf.dequantize(tensor.data[:1], kind)
        except NotImplementedError:
            raise ValueError(
                f"`{path}` holds {tensor.name} as {kind.name}; floats and the "
                "quantised types of the package gguf can be read."
            ) from None
        checked.add(kind)


def _number(reader: gguf.GGUFReader, key: str, path: Path) -> float:
    """Reads a positive number from the metadata.

    Raises:
        ValueError: the key is missing, or its value is not a positive number.
    """
    name = key.format(arch=_ARCHITECTURE)
    value = metadata(reader, name)
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"`{path}` must have a positive number {name}; got {value!r}.")
    return float(value)


def has_gguf_digest(path: Path) -> bool:
    """Returns whether a GGUF file holds a digest of its content."""
    return metadata(_open(path), _DIGEST_KEY) is not None


def read_gguf(path: Path, *, verify: bool = False) -> TensorFile:
    """Opens a GGUF file's tensors by official name and reads the layer norm epsilon.

    The head size comes from the metadata, because no tensor shape determines it.

    Args:
        path: path of the file.
        verify: check the tensors against the file's digest, if it has one. Reads the whole file.

    Raises:
        ValueError: not a GGUF file of RWKV-7, an unreadable tensor type, or a damaged file.
    """
    reader = _open(path)
    _refuse_unreadable(reader, path)
    norm_eps = _number(reader, gguf.Keys.Attention.LAYERNORM_EPS, path)
    head_size = int(_number(reader, gguf.Keys.WKV.HEAD_SIZE, path))
    if verify:
        arrays = [(entry.name, entry.data) for entry in reader.tensors]
        digest = _digest(arrays, norm_eps, head_size)
        if metadata(reader, _DIGEST_KEY) not in (None, digest):
            raise ValueError(
                f"`{path}` is damaged: its tensors or sizes are not those that were "
                "written (their digest differs); download or copy it again."
            )
    tensors: dict[str, Tensor] = {}
    for entry in reader.tensors:
        # Block 0 never uses its value residual; in GGUF files it is a copy of other tensors.
        if _UNREAD.match(entry.name):
            continue
        parts = split_lerps(_NAMES.to_official(entry.name), _tensor(entry))
        for name, part in parts.items():
            tensors[name] = _official_form(name, part, head_size)
    _narrow(tensors, reader, path)
    # The file stores a float32; its shortest decimal form is the value that was written.
    return TensorFile(tensors, "official", float(str(np.float32(norm_eps))))


def read_gguf_vocabulary(path: Path, vocab_size: int) -> Tokenizer | None:
    """Reads the vocabulary of a GGUF file; returns None if it has none.

    Args:
        path: path of the file.
        vocab_size: vocabulary size of the model.

    Raises:
        ValueError: the vocabulary is not of RWKV's kind, or the file is damaged.
    """
    return read_vocabulary(_open(path), path, vocab_size)


def _digest(
    arrays: Iterable[tuple[str, np.ndarray]], norm_eps: float, head_size: int
) -> str:
    """Computes the digest of a file's arrays, `norm_eps` and head size."""
    description = {"norm_eps": str(np.float32(norm_eps)), "head_size": head_size}
    return digest_of_arrays(arrays, description)


def _tensor(stored: gguf.ReaderTensor) -> Tensor:
    """Wraps a stored tensor; its data is read on demand."""
    kind = stored.tensor_type
    # GGUF lists the axes in reverse order.
    shape = tuple(reversed([int(size) for size in stored.shape]))
    if kind in _TYPES:
        dtype = _TYPES[kind]
        return Tensor(shape, dtype, lambda: stored.data.view(dtype).reshape(shape))
    return Tensor(
        shape,
        np.dtype(np.float32),
        lambda: gguf.dequantize(stored.data, kind).reshape(shape),
    )


def _official_form(name: str, tensor: Tensor, head_size: int) -> Tensor:
    """Converts a tensor to its official orientation and shape."""
    if tensor_names.LOW_RANK.search(name):
        return transposed(tensor)
    if name.endswith(".att.r_k") and len(tensor.shape) == 1:
        heads, rest = divmod(tensor.shape[0], head_size)
        if not rest:
            shape = (heads, head_size)
            return Tensor(shape, tensor.dtype, lambda: tensor.read().reshape(shape))
    return tensor


def _narrow(tensors: dict[str, Tensor], reader: gguf.GGUFReader, path: Path) -> None:
    """Restores the original dtype of tensors that were widened for llama.cpp."""
    for dtype in _FILE_TYPES:
        key = _WIDENED_KEY.format(dtype=dtype)
        for name in metadata(reader, key) or ():
            if name in tensors and tensors[name].dtype == np.float32:
                tensors[name] = _narrowed(tensors[name], dtype, name, path)


def _narrowed(wide: Tensor, dtype: np.dtype, name: str, path: Path) -> Tensor:
    """Converts a float32 tensor to a narrower dtype, which must represent every value exactly."""

    def narrow(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            narrowed = array.astype(dtype)
        if not np.array_equal(narrowed.astype(np.float32), array, equal_nan=True):
            raise ValueError(
                f"`{path}` has values in {name} that {dtype} cannot hold, "
                "although its metadata names that as the original dtype."
            )
        return narrowed

    return Tensor(
        wide.shape,
        dtype,
        lambda: narrow(wide.read()),
        lambda index: narrow(wide.part(index)),
    )


def save_gguf(
    path: Path,
    config: RWKV7Config,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes a GGUF file atomically.

    Vectors and the decay matrices are widened to float32, which llama.cpp requires. The metadata
    records their original dtypes, so that the round-trip through `read_gguf` is bit-exact.

    Args:
        path: path of the file.
        config: the config of the model.
        tensors: `official_tensors` of the parameter tree. All of them are in memory at once.
        tokenizer: the vocabulary; None selects the built-in one of the model's size.

    Raises:
        ValueError: an epsilon, head size or dtype that llama.cpp does not support, or a
            vocabulary that does not fit the model.
    """
    _check_config(config)
    entries = writable_entries(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(None, _ARCHITECTURE)
    _add_sizes(writer, config)
    add_vocabulary(writer, entries, config.vocab_size)
    _add_tensors(writer, tensors)
    arrays = [
        (name, cast(np.ndarray, info.tensor))
        for name, info in writer.tensors[0].items()
    ]
    writer.add_string(_DIGEST_KEY, _digest(arrays, config.norm_eps, config.head_size))
    with atomic_write(path) as file:
        # Given a path, the package would open and truncate the existing file itself.
        writer.fout = [cast(BufferedWriter, file)]
        writer.state = gguf.gguf_writer.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _check_config(config: RWKV7Config) -> None:
    """Raises unless llama.cpp computes the same function as the model."""
    if not np.isclose(config.group_norm_eps, _GROUP_NORM_EPS):
        raise ValueError(
            f"`config.group_norm_eps` of a .gguf file must be {_GROUP_NORM_EPS}, "
            f"llama.cpp's constant; got {config.group_norm_eps}."
        )
    if config.head_size % _HEAD_SIZE_STEP:
        raise ValueError(
            f"`config.head_size` of a .gguf file must be a multiple of "
            f"{_HEAD_SIZE_STEP}, because llama.cpp computes wrong results otherwise; "
            f"got {config.head_size}."
        )


def _add_sizes(writer: gguf.GGUFWriter, config: RWKV7Config) -> None:
    """Adds the metadata from which llama.cpp builds its graph."""
    writer.add_context_length(_CONTEXT_LENGTH)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.num_layers)
    writer.add_layer_norm_eps(config.norm_eps)
    writer.add_wkv_head_size(config.head_size)
    writer.add_decay_lora_rank(config.decay_rank)
    writer.add_iclr_lora_rank(config.icl_rank)
    writer.add_value_residual_mix_lora_rank(config.value_rank)
    writer.add_gate_lora_rank(config.gate_rank)
    writer.add_feed_forward_length(config.ffn_width)
    # Required but never read.
    writer.add_head_count(0)


def _add_tensors(
    writer: gguf.GGUFWriter, tensors: Iterable[tuple[str, np.ndarray]]
) -> None:
    """Adds the tensors under llama.cpp's names and records the dtypes of widened ones."""
    widened: dict[np.dtype, list[str]] = {}
    lerps: dict[str, np.ndarray] = {}
    for name, array in drop_unused_value_residual(tensors):
        if array.dtype not in _FILE_TYPES:
            raise ValueError(
                "`params` of a .gguf file must be float32, float16 or bfloat16; "
                f"got {array.dtype} in {name}."
            )
        if name == "emb.weight":
            writer.add_file_type(_FILE_TYPES[array.dtype])
        if array.dtype != np.float32 and _is_float32_in_gguf(name, array):
            widened.setdefault(array.dtype, []).append(name)
            array = array.astype(np.float32)
        lerp = _LERP.match(name)
        if lerp is None:
            _add_tensor(writer, name, array)
            continue
        lerps[lerp[2]] = array
        if len(lerps) == len(LERPS):
            rows = np.stack([lerps[letter] for letter in LERPS])
            fused = _NAMES.from_official(f"blocks.{lerp[1]}.{_FUSED_LERPS}")
            writer.add_tensor(fused, rows[:, None, None])
            lerps = {}
    for dtype, names in widened.items():
        writer.add_array(_WIDENED_KEY.format(dtype=dtype), names)


def _is_float32_in_gguf(name: str, array: np.ndarray) -> bool:
    """Returns whether llama.cpp requires a tensor in float32, regardless of the matrices' dtype."""
    is_flattened = name.endswith(".att.r_k")
    return array.ndim == 1 or is_flattened or bool(_FLOAT32_MATRICES.search(name))


def _add_tensor(writer: gguf.GGUFWriter, name: str, array: np.ndarray) -> None:
    """Adds one tensor under llama.cpp's name, in its shape and orientation."""
    if name.endswith(".att.r_k"):
        array = array.reshape(-1)
    elif name.endswith(".ffn.x_k"):
        array = array[None, None]
    elif tensor_names.LOW_RANK.search(name):
        array = array.swapaxes(0, 1)
    array = np.ascontiguousarray(array)
    raw_dtype = None
    if array.dtype == ml_dtypes.bfloat16:
        # The package treats bfloat16 as a quantised type, whose arrays are bytes.
        raw_dtype = gguf.GGMLQuantizationType.BF16
        array = array.view(np.uint8)
    writer.add_tensor(_NAMES.from_official(name), array, raw_dtype=raw_dtype)
    copied = _COPIED_IN_BLOCK_0.match(name)
    if copied:
        name = f"blocks.0.att.v{copied[1]}"
        writer.add_tensor(_NAMES.from_official(name), array, raw_dtype=raw_dtype)
