"""Programmatic dependent launch: a decode step's kernel starts while the one before it drains.

A kernel compiled with PDL asks L2 for weights, waits for its predecessor, and only then reads what
a predecessor wrote and writes anything at all. The wait is for the whole of the predecessor, so it
may be given up nowhere: a program that ended before it would let the next kernel overtake the last
but one. The next kernel may come as soon as every program here has waited, one ahead and no more.

Unverified: no GPU has run it. It compiles for sm_90 (tests/audit); launch.DEPENDENT_LAUNCH is off.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def await_predecessor():
    """Wait until all that earlier kernels wrote can be read, then let the next kernel start."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch_rows(
    w_ptr,  # [N, K]
    rows,  # [BLOCK_N] int64, in range
    stride_wn,
    depth,
    LINES: tl.constexpr,
):
    """Ask L2 for the first LINES lines of 128 bytes of rows of a weight: no kernel writes one."""
    line_elements: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    offs = tl.minimum(tl.arange(0, LINES) * line_elements, depth - 1)
    addresses = (w_ptr + rows[:, None] * stride_wn + offs[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0",
        "=r,l",
        [addresses],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
