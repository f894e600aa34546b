"""How far latent weights are from the levels that they round to, free of their scale."""

from __future__ import annotations

from torch import Tensor

from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.quantizers import arranged


def quantization_distance(layer: BitLayer) -> Tensor:
    """Sum over the weights of `((w - a l) / a)^2`, differentiable towards the latent weight.

    `l` are the levels and `a = <w, l> / <l, l>` the step that fits them best (least squares), both
    held fixed: weights on a grid have distance 0 whatever its step, and the gradient pulls each
    weight to its own level. Not the applied step `1 / s`: weights pulled to `l * mean |w|` lower
    the mean that they are pulled to, and drain away.

    Args:
        layer: with levels.

    Returns:
        0-d, fp32. What shares a step and has no level but 0 adds nothing.
    """
    scheme = layer.scheme
    levels, _ = layer.levels()
    weight = arranged_graph(layer.weight, layer)
    level = levels.view(weight.shape).to(weight.dtype)
    dims = None if scheme.granularity == "tensor" else -1
    keep = dims is not None
    fixed = weight.detach()
    product = (fixed * level).sum(dims, keepdim=keep)
    power = (level * level).sum(dims, keepdim=keep)
    step = product / power.clamp(min=1.0)
    usable = step > 0
    relative = (weight - step * level) / step.where(usable, step.new_ones(()))
    return (relative.square() * usable).sum()


def arranged_graph(weight: Tensor, layer: BitLayer) -> Tensor:
    """The latent weight in fp32, arranged as its scheme says, in the graph."""
    return arranged(weight, layer.scheme).float()
