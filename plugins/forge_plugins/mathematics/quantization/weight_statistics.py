"""What can be said of quantized weights: error, sparsity, flips, levels, latent distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.quantizers import arranged

BINS = 15
"""Most bars of a histogram of levels; finer grids put neighbouring levels together."""
_MOMENTS = 8  # places before the histogram in a vector of sums


def bars(qmax: int) -> list[int]:
    """The level in the middle of each bar of the histogram.

    Args:
        qmax: highest level of the grid (2 * qmax + 1 levels).
    """
    width = -(-(2 * qmax + 1) // BINS)
    return list(range(-qmax + width // 2, qmax + 1, width))


def weight_sums(layer: BitLayer, before: Tensor | None) -> Tensor:
    """Sums over a layer's weights, on its device, without a read to the host.

    Args:
        layer: with levels.
        before: its levels before the last update, or None.

    Returns:
        Count, zero levels, levels that differ from `before` (NaN without), squared error of the
        quantized weight, sums of the 1st to 4th powers of the latent weight, then the histogram.
        Vectors of several layers may be added up.
    """
    with torch.no_grad():
        levels, scale = layer.levels()
        exact = torch.float32 if levels.device.type == "mps" else torch.float64
        latent = arranged(layer.weight.detach(), layer.scheme).reshape(levels.shape).to(exact)
        error = (levels / scale - latent).square().sum()
        flips = levels.new_full((), float("nan"), dtype=exact)
        if before is not None:
            flips = (levels != before).sum().to(exact)
        square = latent * latent
        qmax = layer.scheme.qmax
        width = -(-(2 * qmax + 1) // BINS)
        places = (levels.to(torch.int16) + qmax).div_(width, rounding_mode="floor")
        counts = [(places == index).sum().to(exact) for index in range(len(bars(qmax)))]
        moments = [
            latent.new_full((), float(latent.numel())),
            (levels == 0).sum().to(exact),
            flips,
            error,
            latent.sum(),
            square.sum(),
            (square * latent).sum(),
            (square * square).sum(),
        ]
        return torch.stack([*moments, *counts])


def weight_metrics(sums: Tensor, qmax: int) -> dict[str, Tensor]:
    """Metrics by name (0-d) from a vector of sums.

    Args:
        sums: from `weight_sums`, of one layer or added up.
        qmax: highest level of the grid.

    Returns:
        `weight_sparsity` (share of zero levels), `weight_flips` (share of levels that the
        last update changed, NaN when unknown), `quantization_error` (distance to the latent
        weight as a share of its norm), `latent_mean`, `latent_std`, `latent_kurtosis`
        (3 for a Gaussian), and
        `level_<l>`: the share of each level, or of the levels round l.
    """
    count, zeros, flips, error, first, second, third, fourth = sums[:_MOMENTS].unbind()
    mean, square = first / count, second / count
    variance = (square - mean * mean).clamp(min=0)
    central = fourth / count - 4 * mean * third / count + 6 * mean * mean * square - 3 * mean**4
    metrics = {
        "weight_sparsity": zeros / count,
        "weight_flips": flips / count,
        "quantization_error": (error / second).sqrt(),
        "latent_mean": mean,
        "latent_std": variance.sqrt(),
        "latent_kurtosis": central / (variance * variance),
    }
    shares = sums[_MOMENTS:] / count
    metrics |= {f"level_{level}": shares[index] for index, level in enumerate(bars(qmax))}
    return metrics
