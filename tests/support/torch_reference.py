"""RWKV-7 and its published training rules in plain PyTorch: tensors by official name, no classes.

Written from the published sources, not from this package: a loop over tokens, one sequence per row,
gradients by autograd. Source: BlinkDL/RWKV-LM@524481d RWKV-v7/rwkv_v7_demo.py:260-372 (model),
RWKV-v7/train_temp/src/model.py:758-831 (L2Wrap, groups), src/trainer.py:18-56 (schedule).
"""

import dataclasses
import math

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Rules:
    """Published training rules, with numbers large enough to show within fifty steps."""

    first: float = 4e-3
    last: float = 4e-4
    warmup: int = 10
    steps: int = 50
    decay: float = 0.1
    clip: float = 1.0
    l2wrap: float = 1e-2
    eps: float = 1e-18
    fast: float = 2.0  # factor on the learning rate of att.w0
    decay_all: bool = False  # published: matrices alone


def _lerp(x, before, weight):
    return x + (before - x) * weight.reshape(-1)


def _shifted(x, start=None):
    """Shifts by one token; RWKV-PEFT adds `ts_state` [D] at the first."""
    shifted = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
    if start is not None:
        shifted[:, 0] += start
    return shifted


def _time_mix(p, x, v_first, heads):
    """Runs time mix on x [B T C]; `p(name)` is the block's tensor, None if there is none."""
    batch, length, width = x.shape
    before = _shifted(x, p("att.ts_state"))
    x_r, x_w, x_k, x_v, x_a, x_g = (_lerp(x, before, p(f"att.x_{c}")) for c in "rwkvag")
    r, k, v = (
        mixed @ p(f"att.{name}.weight").T
        for mixed, name in ((x_r, "receptance"), (x_k, "key"), (x_v, "value"))
    )
    z = p("att.w0").reshape(-1) + torch.tanh(x_w @ p("att.w1")) @ p("att.w2")
    d = torch.exp(-math.exp(-0.5) * torch.sigmoid(z))
    a = torch.sigmoid(p("att.a0").reshape(-1) + (x_a @ p("att.a1")) @ p("att.a2"))
    g = torch.sigmoid(x_g @ p("att.g1")) @ p("att.g2")
    if v_first is None:
        v_first = v
    else:
        gate = torch.sigmoid(
            p("att.v0").reshape(-1) + (x_v @ p("att.v1")) @ p("att.v2")
        )
        v = v + (v_first - v) * gate
    split = (batch, length, heads, -1)
    kk = F.normalize((k * p("att.k_k").reshape(-1)).view(split), dim=-1, p=2.0)
    k = k * (1 + (a - 1) * p("att.k_a").reshape(-1))
    r, d, k, v4, a = (u.view(split) for u in (r, d, k, v, a))
    state = torch.zeros(batch, heads, v4.shape[-1], k.shape[-1])
    if p("att.time_state") is not None:
        state = state + p("att.time_state")
    read = []
    for t in range(length):
        removed = state @ -kk[:, t, :, :, None]
        state = (
            state * d[:, t, :, None, :]
            + removed @ (kk[:, t] * a[:, t])[:, :, None, :]
            + v4[:, t, :, :, None] @ k[:, t, :, None, :]
        )
        read.append((state @ r[:, t, :, :, None]).reshape(batch, width))
    y = torch.stack(read, dim=1).reshape(-1, width)
    y = F.group_norm(y, heads, p("att.ln_x.weight"), p("att.ln_x.bias"), eps=64e-5)
    bonus = (r * k * p("att.r_k")).sum(-1, keepdim=True) * v4
    y = y.view(batch, length, width) + bonus.reshape(batch, length, width)
    return (y * g) @ p("att.output.weight").T, v_first


def _norm(x, p, name):
    return F.layer_norm(
        x, x.shape[-1:], p(f"{name}.weight"), p(f"{name}.bias"), eps=1e-5
    )


def logits(weights, tokens):
    """Computes logits [B T V] of ids [B T], from the start state among the weights or from zero."""
    layers = 1 + max(
        int(name.split(".")[1]) for name in weights if name.startswith("blocks.")
    )
    heads = weights["blocks.0.att.r_k"].shape[0]
    x = F.embedding(tokens, weights["emb.weight"])
    x = _norm(x, weights.__getitem__, "blocks.0.ln0")
    v_first = None
    for layer in range(layers):

        def p(name, layer=layer):
            return weights.get(f"blocks.{layer}.{name}")

        att, v_first = _time_mix(p, _norm(x, p, "ln1"), v_first, heads)
        x = x + att
        normed = _norm(x, p, "ln2")
        hidden = torch.relu(
            _lerp(normed, _shifted(normed, p("ffn.ts_state")), p("ffn.x_k"))
            @ p("ffn.key.weight").T
        )
        x = x + hidden**2 @ p("ffn.value.weight").T
    return _norm(x, weights.__getitem__, "ln_out") @ weights["head.weight"].T


class _L2Wrap(torch.autograd.Function):
    """Identity on the loss, whose gradient also pulls the largest logit of each position."""

    @staticmethod
    def forward(ctx, loss, y, factor):
        ctx.save_for_backward(y)
        ctx.factor = factor
        return loss

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        top, place = torch.max(y, -1, keepdim=True)
        pull = torch.zeros_like(y)
        pull.scatter_(-1, place, top * (ctx.factor / (y.shape[0] * y.shape[1])))
        return grad, grad * pull, None


def rate(rules, step):
    """Computes the learning rate of a step; steps count from 0."""
    ratio = rules.last / rules.first
    done = min(max((step - rules.warmup) / (rules.steps - rules.warmup), 0.0), 1.0)
    value = rules.first * (
        (0.5 + ratio / 2) + (0.5 - ratio / 2) * math.cos(math.pi * done)
    )
    return value * (0.01 + 0.99 * step / rules.warmup) if step < rules.warmup else value


def _optimizer(weights, rules):
    """Makes AdamW with three groups, chosen by official name and shape."""
    fast = []
    decayed = []
    rest = []
    for name, tensor in weights.items():
        if "att.w0" in name:
            fast.append(tensor)
        elif ".weight" in name and tensor.squeeze().dim() >= 2:
            decayed.append(tensor)
        else:
            rest.append(tensor)
    other = rules.decay if rules.decay_all else 0.0
    return torch.optim.AdamW(
        [
            {"params": fast, "factor": rules.fast, "weight_decay": other},
            {"params": decayed, "factor": 1.0, "weight_decay": rules.decay},
            {"params": rest, "factor": 1.0, "weight_decay": other},
        ],
        betas=(0.9, 0.99),
        eps=rules.eps,
    )


def training(weights, batches, rules):
    """Trains weights in place, and yields the cross entropy before each step.

    Args:
        weights: tensors by official name, which require gradients.
        batches: ids [steps, B, T + 1].
        rules: of training.
    """
    optimizer = _optimizer(weights, rules)
    for step, tokens in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = rate(rules, step) * group["factor"]
        y = logits(weights, tokens[:, :-1])
        loss = F.cross_entropy(y.reshape(-1, y.shape[-1]), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        _L2Wrap.apply(loss, y, rules.l2wrap).backward()
        torch.nn.utils.clip_grad_norm_(list(weights.values()), rules.clip)
        optimizer.step()
        yield loss.item()
