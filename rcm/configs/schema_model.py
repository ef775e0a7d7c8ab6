"""The keys of `model.config` under one name: what both families share (`schema_common`), causal
training (`schema_causal`) and bidirectional rCM (`schema_rcm`).
"""

from __future__ import annotations

from rcm.configs.schema_causal import CausalConfig, LongTuningConfig, TrainingType
from rcm.configs.schema_common import (
    PIXELS,
    SIZES,
    AttentionBackendName,
    CommonModelConfig,
    NetConfig,
    TokenizerConfig,
)
from rcm.configs.schema_rcm import RCMConfig
from rcm.diffusion.time_sampling import TimeLawConfig
from rcm.nets.wan.adapters import LoRAConfig
from rcm.parallel.checkpointing import SACConfig

__all__ = [
    "PIXELS",
    "SIZES",
    "AttentionBackendName",
    "CausalConfig",
    "CommonModelConfig",
    "LoRAConfig",
    "LongTuningConfig",
    "NetConfig",
    "RCMConfig",
    "SACConfig",
    "TimeLawConfig",
    "TokenizerConfig",
    "TrainingType",
]
