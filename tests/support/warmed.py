"""Imported last by the fork server (`tests.support.dist`): what every process does once, done
before it forks. Hydra's first composition takes half a second, and the collector walks over all
that was imported unless it is frozen.
"""

from __future__ import annotations

import gc

import torch

from rcm.configs import registry_distill
from rcm.configs.compose import compose_run

torch.set_num_threads(1)
registry_distill.register()
compose_run(["experiment=toy_tf_c3-3"], world_size=None, environ={}, require_inputs=False)
gc.collect()
gc.freeze()
