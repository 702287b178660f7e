"""Writes golden logits: the results of the official inference package.

    PYTHONPATH=.:tests/support python tests/golden/make_golden.py

Needs the oracle extra. It runs two random checkpoints, which are in tests/golden, and the shipped
assets/tiny.pth on real text. test_golden_logits.py compares with the files alone.
"""

import contextlib
import dataclasses
import io
import os
import warnings
from pathlib import Path

import numpy as np
import trained_scale_models as calm_models

from rwkv7_jax.checkpoints.model_files import save_model

GOLDEN = Path(__file__).parent
TEXT = b"def area(radius):\n    return math.pi * radius ** 2\n"


def small(head_size: int, width: int):
    """Returns the sizes of a checkpoint of some hundred kilobytes."""
    config = calm_models.config(head_size, width=width, ffn_width=96, gate_rank=16)
    return dataclasses.replace(config, decay_rank=8, icl_rank=8, value_rank=8)


def checkpoints() -> dict[str, tuple[Path, list[int]]]:
    """Writes the random checkpoints; returns all files, and the tokens that each of them reads."""
    # The byte vocabulary: 0 ends a document, byte b has the id b + 1.
    text = [0]
    for byte in TEXT:
        text.append(byte + 1)
    files = {"tiny": (GOLDEN.parents[1] / "assets" / "tiny.pth", text)}
    for name, head_size, width in (("heads-of-64", 64, 64), ("heads-of-128", 128, 128)):
        config = small(head_size, width)
        path = GOLDEN / f"{name}.pth"
        save_model(path, calm_models.calm(config, dtype="bfloat16"), config)
        tokens = np.asarray(calm_models.ids(config, 1, 33)[0]).tolist()
        files[name] = (path, tokens)
    return files


def main() -> None:
    """Runs the package on each checkpoint."""
    os.environ |= {"RWKV_V7_ON": "1", "RWKV_CUDA_ON": "0", "RWKV_JIT_ON": "0"}
    warnings.simplefilter("ignore")
    GOLDEN.mkdir(exist_ok=True)
    for name, (path, tokens) in checkpoints().items():
        with contextlib.redirect_stdout(io.StringIO()):
            from rwkv.model import RWKV

            model = RWKV(model=str(path.with_suffix("")), strategy="cpu fp32")
        logits, state = model.forward(tokens, None, full_output=True)
        wkv = np.stack([part.numpy() for part in state[1::3]])
        np.savez_compressed(
            GOLDEN / f"{name}.npz", tokens=tokens, logits=logits.numpy(), wkv=wkv
        )
        print(
            f"{name}: {len(tokens)} tokens, logits of deviation {float(logits.std()):.2f}"
        )


if __name__ == "__main__":
    main()
