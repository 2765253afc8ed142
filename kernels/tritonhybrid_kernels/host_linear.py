"""``x W^T + b`` in torch, by the matrix product that is fastest on this CPU for so many rows.

Torch calls MKL, which is not everywhere the fastest product that torch has. Measured at sizes from
512 x 512 to 49152 x 576, weights read from memory:

- AMD with AVX-512 (EPYC, two cores), fp32: MKL keeps to AVX2 and multiplies one row on one thread,
  16 GB/s where oneDNN reads 40; with more rows, too, oneDNN takes half of MKL's time or less.
  MKL's W x^T is faster still from 2 to 5 rows, where W is no wider than high (else at 2 only).
- Intel (Xeon, two cores), fp32: oneDNN takes half the time from 13 to 48 rows, and for a
  vocabulary's width from 4 on.
- bf16, where torch calls oneDNN: on Intel W x^T is up to a quarter faster at 13 to 16 rows.

Everywhere else ``functional.linear`` is best. The choice is a rule, not a timing: the same operands
give the same bits in every run, and a busy start can't slow down a week.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

_ONEDNN_ROWS: Final = range(13, 49)
_ONEDNN_ROWS_WIDE: Final = range(4, 33)
_WIDE: Final = 8192
_SWAPPED_ROWS: Final = range(13, 17)
_SWAPPED_ROWS_AMD: Final = range(2, 6)
_SWAPPED_ROWS_AMD_DEEP: Final = range(2, 3)
# Below so many elements a weight stays in a near cache and the call costs more than the product.
_SMALL_WEIGHT: Final = 1 << 16

# What torch.compile emits for a linear layer on x86; not every build of torch has it.
_HAS_ONEDNN: Final = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def host_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``functional.linear`` on [T, K] rows, row-major result [T, N]."""
    if x.device.type != "cpu" or not x.is_contiguous() or not weight.is_contiguous():
        return functional.linear(x, weight, bias)
    num_rows = x.shape[0]
    num_columns, depth = weight.shape
    if x.dtype != torch.float32:
        if num_rows in _SWAPPED_ROWS and not _is_wide_amd():
            return _swapped(x, weight, bias)
    elif not _HAS_ONEDNN:
        pass
    elif not _is_wide_amd():
        if num_rows in (_ONEDNN_ROWS_WIDE if num_columns >= _WIDE else _ONEDNN_ROWS):
            return _onednn(x, weight, bias)
    elif num_columns * depth >= _SMALL_WEIGHT and num_rows > 0:
        if num_rows in (_SWAPPED_ROWS_AMD_DEEP if depth > num_columns else _SWAPPED_ROWS_AMD):
            return _swapped(x, weight, bias)
        return _onednn(x, weight, bias)
    return functional.linear(x, weight, bias)


@cache
def _is_wide_amd() -> bool:
    """Whether the CPU is an AMD one with AVX-512, which oneDNN uses and MKL does not."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text().partition("\n\n")[0]


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _swapped(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x^T, put back in rows."""
    if bias is None:
        return torch.mm(weight, x.t()).t().contiguous()
    return torch.addmm(bias.unsqueeze(1), weight, x.t()).t().contiguous()
