"""Models as other programs write them: other names, prefixes, shapes, shards and containers."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from rwkv7_jax.checkpoints.param_tree import official_tensors
from rwkv7_jax.checkpoints.pth import write_pth
from rwkv7_jax.checkpoints.tensor_names import file_shape, hf_shape, to_hf

Arrays = dict[str, np.ndarray]

LOW_RANK = re.compile(r"\.att\.[wavg][12]$")


def official(params, config) -> Arrays:
    """The flat dict of an official file, without block 0's unused tensors."""
    arrays = {}
    for name, array in official_tensors(params, config):
        arrays[name] = array.reshape(file_shape(name, array.shape))
    return arrays


def renamed(arrays: Arrays, rename: Callable[[str], str]) -> Arrays:
    """The same arrays under other names."""
    return {rename(name): array for name, array in arrays.items()}


def prefixed(arrays: Arrays, prefix: str) -> Arrays:
    """A prefix before each name."""
    return renamed(arrays, lambda name: prefix + name)


def of_base_model(arrays: Arrays, prefix: str) -> Arrays:
    """A prefix before each name but the head's, as transformers saves a base model with a head."""
    return renamed(
        arrays, lambda name: name if name.startswith("head") else prefix + name
    )


def transposed(arrays: Arrays) -> Arrays:
    """The low-rank matrices the other way round, as web-rwkv has them."""
    turned = {}
    for name, array in arrays.items():
        turned[name] = array.T if LOW_RANK.search(name) else array
    return turned


def as_layers(arrays: Arrays) -> Arrays:
    """The low-rank matrices as layers: [out, in], and the vector as a bias."""
    layers = {}
    for name, array in transposed(arrays).items():
        if LOW_RANK.search(name):
            name = f"{name}.weight"
        elif re.search(r"\.att\.[wav]0$", name):
            name = f"{name[:-1]}2.bias"
            array = array.reshape(-1)
        layers[name] = array
    return layers


def in_old_transformers_names(arrays: Arrays) -> Arrays:
    """The names of RWKV-4 in transformers, with which converters of RWKV-7 exist."""

    def rename(name: str) -> str:
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        name = name.replace(".ln0.", ".pre_ln.").replace(
            "emb.weight", "embeddings.weight"
        )
        return name

    return of_base_model(renamed(arrays, rename), "rwkv7.")


def in_fla_names(arrays: Arrays) -> Arrays:
    """The names, orientation and shapes of flash-linear-attention."""
    fla = {}
    for name, array in transposed(arrays).items():
        shape = tuple(size for size in array.shape if size > 1)
        fla[to_hf(name)] = array.reshape(hf_shape(name, shape))
    return fla


def with_packed_lerps(arrays: Arrays, stem: str, packed: str) -> Arrays:
    """One tensor [6, 1, D] in each block in the place of the six lerps.

    Args:
        arrays: by name.
        stem: of the lerps' names after the block's number.
        packed: the name of the new tensor.
    """
    rest = {}
    blocks: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        match = re.fullmatch(rf"(.*\d+\.{re.escape(stem)})([rwkvag])", name)
        if match:
            blocks.setdefault(match[1], {})[match[2]] = array.reshape(1, -1)
        else:
            rest[name] = array
    for start, lerps in blocks.items():
        name = start.removesuffix(stem) + packed
        rest[name] = np.stack([lerps[letter] for letter in "rwkvag"])
    return rest


def write_torch(path: Path, arrays: Arrays) -> None:
    """A zip archive of PyTorch's, whatever the path ends in."""
    write_pth(path, arrays.items())


def write_plain_safetensors(path: Path, arrays: Arrays) -> None:
    """Safetensors with no metadata of ours."""
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    save_file(contiguous, path, metadata={"format": "pt"})


def write_folder(
    folder: Path,
    arrays: Arrays,
    *,
    config: dict | None,
    write: Callable[[Path, Arrays], None] = write_plain_safetensors,
    stem: str = "model",
    suffix: str = ".safetensors",
    shards: int = 1,
    index: bool = True,
) -> None:
    """A folder in the manner of Hugging Face.

    Args:
        folder: made here.
        arrays: by name.
        config: config.json; None for none.
        write: of one file.
        stem: of the files' names.
        suffix: of the files' names.
        shards: number of files.
        index: write a table of which tensor is in which shard.
    """
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write(folder / f"{stem}{suffix}", arrays)
        return
    weight_map = {}
    names = list(arrays)
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}{suffix}"
        part = {name: arrays[name] for name in names[number::shards]}
        write(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    if index:
        table = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(table))


def write_rwkv_cpp(path: Path, arrays: Arrays, *, half: bool = False) -> None:
    """A file of rwkv.cpp; with `half`, tensors of more than one axis are float16.

    Source: RWKV/rwkv.cpp@4358e70 docs/FILE_FORMAT.md.
    """
    arrays = with_packed_lerps(transposed(arrays), "att.x_", "att.x_rwkvag")
    vocabulary, width = arrays["emb.weight"].shape
    layers = len({name.split(".")[1] for name in arrays if name.startswith("blocks")})
    header = (0x67676D66, 101, vocabulary, width, layers, int(half))
    content = struct.pack("<6i", *header)
    for name, array in arrays.items():
        is_half = half and array.ndim > 1
        data = np.ascontiguousarray(array, np.float16 if is_half else np.float32)
        encoded = name.encode()
        content += struct.pack("<3i", data.ndim, len(encoded), int(is_half))
        content += struct.pack(f"<{data.ndim}i", *data.shape[::-1])
        content += encoded + data.tobytes()
    path.write_bytes(content)
