"""Attention structure and kernels (layer 2): block masks and exact-tangent attention."""
