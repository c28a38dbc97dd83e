"""Triton kernels for NVIDIA GPUs. Modules here and in `reference` never import one another."""
