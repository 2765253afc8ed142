"""``x W^T + b`` in torch, by the matrix product that is fastest on this CPU for so many rows.

Which one that is differs by a factor of four between CPUs: where MKL falls back to AVX2 or to one
thread, oneDNN, W x^T or a product split over the threads stream the weights at the memory's speed;
elsewhere MKL, which torch calls, is best. So the routes are timed once a process for each dtype,
class of row counts and class of widths, when the first such call asks, and the choice is kept.
Torch's own route is left only for one that is a fifth faster, so that noise does not decide.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

Route = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# Numbers of rows that share a route: up to each of these, and all beyond.
_ROW_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64)
# W x^T is worth timing up to this many of those classes (16 rows).
_SWAPPED_BOUNDS: Final = 5
# Rows a route is timed with beyond the last bound.
_MANY_ROWS: Final = 128
# Below so many elements a weight is in the nearest cache and the call costs more than the product.
_SMALL_WEIGHT: Final = 1 << 16
# Weights of at least so many rows (a vocabulary's) share routes, and so do all others.
_WIDE: Final = 8192
# Rows of the weights that the routes of others are timed on.
_NARROW: Final = 2048
# A decode step reads its weights from memory; so must a timing, past the last cache.
_FAR_BYTES: Final = 64 << 20
# From so many rows on the product takes longer than the reading.
_COMPUTE_ROWS: Final = 32
_NEAR_BYTES: Final = 8 << 20
_ROUNDS: Final = 3
# What a route must save to be taken instead of torch's own.
_GAIN: Final = 1.2

# What torch.compile emits for a linear layer on x86; not every build of torch has it.
_HAS_ONEDNN: Final = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


# A fact of the machine, like the capability of a GPU; a race fills in an entry twice.
_routes: dict[tuple[torch.dtype, bool, int, int], Route] = {}


def host_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``functional.linear`` on [T, K] rows, row-major result [T, N]."""
    num_rows = x.shape[0]
    num_columns, depth = weight.shape
    if (
        num_columns * depth < _SMALL_WEIGHT
        or num_rows == 0
        or x.device.type != "cpu"
        or not x.is_contiguous()
        or not weight.is_contiguous()
    ):
        return functional.linear(x, weight, bias)
    bound = bisect_left(_ROW_BOUNDS, num_rows)
    key = (x.dtype, num_columns >= _WIDE, bound, torch.get_num_threads())
    route = _routes.get(key)
    if route is None:
        route = _routes[key] = _fastest(x, weight, bound)
    return route(x, weight, bias)


def routes_in_use() -> dict[str, int]:
    """How many shapes and row counts each route serves in this process, by the route's name."""
    return dict(Counter(route.__name__.strip("_") for route in _routes.values()))


def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight, bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _swapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x^T, put back in rows."""
    if bias is None:
        return torch.mm(weight, x.t()).t().contiguous()
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t().contiguous()


def _split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """One row's product with a share of W's rows for each thread, which MKL does not always do."""
    num_columns, depth = weight.shape
    parts = torch.get_num_threads()
    if num_columns % parts:
        return _onednn(x, weight, bias) if _HAS_ONEDNN else _torch(x, weight, bias)
    shares = weight.view(parts, num_columns // parts, depth)
    row = x.view(1, depth, 1).expand(parts, -1, -1)
    if bias is None:
        return torch.bmm(shares, row).view(1, num_columns)
    return torch.baddbmm(bias.view(parts, -1, 1), shares, row).view(1, num_columns)


def _candidates(dtype: torch.dtype, bound: int) -> list[Route]:
    """Routes worth timing, torch's own first."""
    routes: list[Route] = [_torch]
    if dtype == torch.float32 and _HAS_ONEDNN:
        routes.append(_onednn)
    if bound == 0 and dtype == torch.float32 and torch.get_num_threads() > 1:
        routes.append(_split)
    if 0 < bound < _SWAPPED_BOUNDS:
        routes.append(_swapped)
    return routes


def _fastest(x: Tensor, weight: Tensor, bound: int) -> Route:
    """Time the candidates in turn on rows and weights like those of the call."""
    depth = weight.shape[1]
    num_rows = _ROW_BOUNDS[bound] if bound < len(_ROW_BOUNDS) else _MANY_ROWS
    sample = x[:1].expand(num_rows, depth).contiguous()
    weights = _timed_weights(weight, _FAR_BYTES if num_rows < _COMPUTE_ROWS else _NEAR_BYTES)
    routes = _candidates(x.dtype, bound)
    best = [float("inf")] * len(routes)
    for _ in range(_ROUNDS):
        for index, route in enumerate(routes):
            start = time.perf_counter()
            for each in weights:
                route(sample, each, None)
            best[index] = min(best[index], time.perf_counter() - start)
    fastest = min(range(len(routes)), key=best.__getitem__)
    return routes[fastest] if best[fastest] * _GAIN < best[0] else routes[0]


def _timed_weights(weight: Tensor, num_bytes: int) -> list[Tensor]:
    """As many weights of the width's class as fill so much memory, made of this one's values."""
    columns = _WIDE if weight.shape[0] >= _WIDE else _NARROW
    count = max(1, num_bytes // (columns * weight.shape[1] * weight.element_size()))
    copies = weight.new_empty(count, columns, weight.shape[1])
    for start in range(0, columns, weight.shape[0]):
        part = copies[:, start : start + weight.shape[0]]
        part.copy_(weight[: part.shape[1]].expand_as(part))
    return list(copies)
