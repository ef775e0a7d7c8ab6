"""Causal-rCM: distillation of video diffusion models into streaming few-step generators."""

__version__ = "0.1.0"
