"""Wan2.1 and Wan2.2: configuration, block, network, and conversion of public weights."""

from rcm.nets.wan.config import PRESETS, WanConfig, preset
from rcm.nets.wan.model import WanDiT

__all__ = ["PRESETS", "WanConfig", "WanDiT", "preset"]
