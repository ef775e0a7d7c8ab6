"""Weights on disk: containers of tensors that are opened whole, checked, and read one tensor at a
time.
"""
