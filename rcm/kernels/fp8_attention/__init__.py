"""Softmax attention in FP8 for inference on Hopper: codes of keys and values that are made once,
kernels, a reference.
"""
