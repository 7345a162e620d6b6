"""Sums of squared or absolute per-sample gradients, layer by layer, by a formula where there is one.

For a linear layer with one row a sample the gradient of sample n is the outer product g_n a_n, so the sum of its
squares over n is (g * g)^T (a * a): one matrix product; absolute values split the same way. Layers that use a weight
several times a sample (tokens, pixels) first need the sample's own sum. Every rule takes a layer, its input `a`, the
gradient `g` at its output, `size` (`torch.square` or `torch.abs`) and `sums`, and adds to sums["weight"], sums["bias"],
... those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.models.heads import CosineHead

Sums = Mapping[str, Tensor]
Size = Callable[..., Tensor]
Rule = Callable[[Any, Tensor, Tensor, Size, Sums], None]

# Values that a layer's per-sample gradients may take at a time.
CHUNK = 2**19


def linear(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    if a.ndim == 2:
        sizes = size(g)
        if "weight" in sums:
            sums["weight"].addmm_(sizes.T, size(a))
        if "bias" in sums:
            sums["bias"] += sizes.sum(0)
        return
    a, g = a.flatten(1, -2), g.flatten(1, -2)
    if "weight" in sums:
        for part, count in _chunks(len(a), sums["weight"].numel()):
            each = torch.bmm(g.narrow(0, part, count).mT, a.narrow(0, part, count))
            sums["weight"] += size(each, out=each).sum(0)
    if "bias" in sums:
        sums["bias"] += size(g.sum(1)).sum(0)


def convolution(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    if "bias" in sums:
        sums["bias"] += size(g.flatten(2).sum(2)).sum(0)
    if "weight" not in sums:
        return
    if isinstance(layer, nn.Conv1d):  # an image of height one
        a, g = a.unsqueeze(2), g.unsqueeze(2)
    ones = (1,) * (2 - len(layer.kernel_size))
    kernel, stride, dilation = (ones + tuple(v) for v in (layer.kernel_size, layer.stride, layer.dilation))
    padding = layer._reversed_padding_repeated_twice
    if any(padding):
        a = F.pad(a, padding, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    # Channels last: copying the patches out of the image then moves whole runs of memory.
    a, g = a.permute(0, 2, 3, 1).contiguous(), g.permute(0, 2, 3, 1)
    samples, pixels, groups = len(g), g[0, ..., 0].numel(), layer.groups
    outputs, inputs = layer.out_channels // groups, layer.in_channels // groups
    width = kernel[0] * kernel[1] * inputs
    weight = torch.zeros(groups, outputs, width, dtype=g.dtype, device=g.device)
    for start, count in _chunks(samples, groups * width * max(outputs, pixels)):
        piece = a.narrow(0, start, count)
        by_sample, by_row, by_column, by_channel = piece.stride()
        patches = piece.as_strided(
            (count, groups, *g.shape[1:3], *kernel, inputs),
            (
                by_sample,
                inputs * by_channel,
                by_row * stride[0],
                by_column * stride[1],
                by_row * dilation[0],
                by_column * dilation[1],
                by_channel,
            ),
        )
        gradient = g.narrow(0, start, count).reshape(count, pixels, groups, outputs).permute(0, 2, 3, 1)
        each = torch.bmm(
            gradient.reshape(count * groups, outputs, pixels), patches.reshape(count * groups, pixels, width)
        )
        weight += size(each, out=each).view(count, *weight.shape).sum(0)
    sums["weight"] += weight.view(groups * outputs, *layer.kernel_size, inputs).movedim(-1, 1)


def batch_norm(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    # Sums of g (a - mean) / deviation over the pixels, without writing the normalised input out.
    plain, weighted = g, g * a
    if a.ndim > 2:
        plain, weighted = g.flatten(2).sum(2), weighted.flatten(2).sum(2)
    _affine((weighted - plain * layer.running_mean) * torch.rsqrt(layer.running_var + layer.eps), plain, size, sums)


def layer_norm(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    weighted = F.layer_norm(a, layer.normalized_shape, eps=layer.eps) * g
    shared = tuple(range(1, a.ndim - len(layer.normalized_shape)))
    _affine(weighted.sum(shared) if shared else weighted, g.sum(shared) if shared else g, size, sums)


def group_norm(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    weighted = F.group_norm(a, layer.num_groups, eps=layer.eps) * g
    shared = tuple(range(2, a.ndim))
    _affine(weighted.sum(shared) if shared else weighted, g.sum(shared) if shared else g, size, sums)


def _affine(weight: Tensor, bias: Tensor, size: Size, sums: Sums) -> None:
    """Add the sizes of per-sample gradients [n, ...] of a factor and an offset."""
    for name, gradient in (("weight", weight), ("bias", bias)):
        if name in sums:
            sums[name] += size(gradient).sum(0)


def embedding(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    rows = layer.num_embeddings
    sample = torch.arange(len(a), device=a.device).view(-1, *(1,) * (a.ndim - 1))
    used, place = (sample * rows + a).flatten().unique(return_inverse=True)
    each = g.new_zeros(len(used), layer.embedding_dim).index_add_(0, place, g.reshape(-1, layer.embedding_dim))
    weight = g.new_zeros(rows, layer.embedding_dim).index_add_(0, used % rows, size(each, out=each))
    if layer.padding_idx is not None:
        weight[layer.padding_idx] = 0
    sums["weight"] += weight


def cosine(layer: Any, a: Tensor, g: Tensor, size: Size, sums: Sums) -> None:
    """The gradient of row c is scale g_c / |w_c| (x - cos_c w), with x and w of length one."""
    x, w = F.normalize(a, dim=-1), F.normalize(layer.weight, dim=1)
    cos = x @ w.T
    length = layer.weight.norm(dim=1, keepdim=True)
    if "scale" in sums:
        sums["scale"] += size((g * cos).sum(1)).sum(0, keepdim=True)
    if "weight" not in sums:
        return
    if size is not torch.square:
        for start, count in _chunks(len(g), w.numel()):
            part = slice(start, start + count)
            each = g[part, :, None] * (x[part, None, :] - cos[part, :, None] * w)
            sums["weight"] += size(each, out=each).sum(0) * (layer.scale.abs() / length)
        return
    squared = g * g
    expanded = squared.T @ (x * x) - 2 * w * ((squared * cos).T @ x) + w * w * (squared * cos * cos).sum(0)[:, None]
    sums["weight"] += expanded.clamp_min_(0) * (layer.scale / length) ** 2


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    nn.Embedding: embedding,
    CosineHead: cosine,
}


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module in evaluation mode, or None if no formula is known for it."""
    known = (k for k in _RULES if isinstance(module, k) and type(module).forward is k.forward)
    kind = next(known, None)
    if kind is None or _is_special(module):
        return None
    return _RULES[kind]


def _is_special(module: nn.Module) -> bool:
    """Whether a module of a known kind computes something else than its rule."""
    if not {name for name, p in module._parameters.items() if p is not None} <= {"weight", "bias", "scale"}:
        return True  # weight norm and its like
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.running_mean is None  # normalised by the batch, so samples depend on each other
    if isinstance(module, nn.Embedding):
        return bool(module.max_norm or module.scale_grad_by_freq or module.sparse)
    return False


def _chunks(count: int, each: int) -> Iterator[tuple[int, int]]:
    size = max(1, CHUNK // max(each, 1))
    for start in range(0, count, size):
        yield start, min(size, count - start)
