"""flash-linear-attention on CPU, in its own process: Triton's interpreter must be chosen first.

`python tests/support/fla_process.py FOLDER IN.npz OUT.npz`: the HF folder's logits and last states
for the tokens `ids`, and the gradients of its loss with L2Wrap for `batch`, by the folder's names.
"""

import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.simplefilter("ignore")

import numpy as np
import torch
from triton.runtime import autotuner


class _OneConfig(autotuner.Autotuner):
    """Autotuner that takes the first tile: in an interpreter, timing means nothing."""

    def prune_configs(self, *arguments, **options):
        """Keeps the first configuration that is allowed."""
        return super().prune_configs(*arguments, **options)[:1]

    def do_bench(self, *arguments, **options):
        """Measures nothing."""
        return [0.0]


autotuner.Autotuner = _OneConfig

import fla.layers.rwkv7 as layer
from fla.models.rwkv7 import RWKV7Config, RWKV7ForCausalLM
from fla.modules.l2warp import l2_warp
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from safetensors.torch import load_file


def _recurrence(*, r, w, k, v, a, b, initial_state, output_final_state, **_):
    """Runs their definition in PyTorch: the chunk kernel does not run in the interpreter."""
    r, w, k, v, a, b = (x.transpose(1, 2) for x in (r, w, k, v, a, b))
    # The definition divides by the root of the head size, RWKV-7 does not.
    r = r * r.shape[-1] ** 0.5
    y, end = dplr_recurrence(r, k, v, a, b, w, initial_state, output_final_state)
    return y.transpose(1, 2), end


layer.chunk_rwkv7 = _recurrence


def main(folder: str, inputs: str, outputs: str) -> None:
    """Runs both passes and writes their results."""
    config = RWKV7Config.from_pretrained(folder, fuse_cross_entropy=False)
    model = RWKV7ForCausalLM(config)
    model.load_state_dict(load_file(f"{folder}/model.safetensors"))
    arrays = np.load(inputs)
    results = {}

    with torch.no_grad():
        model.eval()
        out = model(torch.tensor(arrays["ids"]).long(), use_cache=True)
        results["logits"] = out.logits.numpy()
        for i in range(config.num_hidden_layers):
            results[f"state.{i}"] = out.past_key_values[i]["recurrent_state"].numpy()

    model.train()
    batch = torch.tensor(arrays["batch"]).long()
    logits = model(batch[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch[:, 1:].flatten()
    )
    l2_warp(loss, logits, float(arrays["l2wrap"])).backward()
    results["loss"] = loss.detach().numpy()
    for name, parameter in model.named_parameters():
        results[f"grad.{name}"] = parameter.grad.numpy()
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
