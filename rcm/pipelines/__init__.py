"""From prompts and files to videos, and back to files."""

from rcm.pipelines.adapted_weights import LoRA
from rcm.pipelines.wan_files import load_wan, random_wan
from rcm.pipelines.weight_files import open_weights
from rcm.pipelines.weight_report import WeightsReport, inspect_weights
from rcm.pipelines.weight_writer import save_network

__all__ = [
    "LoRA",
    "WeightsReport",
    "inspect_weights",
    "load_wan",
    "open_weights",
    "random_wan",
    "save_network",
]
