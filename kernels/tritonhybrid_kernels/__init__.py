"""Fused inference kernels for transformer layers: Triton on CUDA, torch elsewhere.

The package imports nothing by itself; take an operation from its own module
(``from tritonhybrid_kernels.linear import linear``) or the whole set from
:func:`tritonhybrid_kernels.ops.select_ops`.
"""
