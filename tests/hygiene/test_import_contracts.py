"""Imports only go down, and parts that are meant to stand alone do."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.hygiene.source import ROOT

HEAVY = ("hydra", "omegaconf", "wandb", "webdataset", "transformers", "diffusers", "imageio", "safetensors", "loguru")
ALONE = (
    "rcm.kernels.masks",
    "rcm.kernels.flash_jvp.api",
    "rcm.losses.scm",
    "rcm.losses.dcm",
    "rcm.losses.dmd",
    "rcm.diffusion.interpolant",
)


def test_import_linter_contracts_hold() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    assert "0 broken" in result.stdout


def test_masks_losses_and_attention_import_alone() -> None:
    """In a fresh interpreter they bring in torch and nothing of the training stack."""
    code = f"import json, sys; [__import__(m) for m in {ALONE!r}]; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = json.loads(result.stdout)
    assert set(ALONE) <= set(loaded)
    assert not [m for m in HEAVY if m in loaded]
    assert not [m for m in loaded if m.startswith(("rcm.configs", "rcm.nets", "rcm.train", "rcm.data"))]


def test_registries_do_nothing_when_imported() -> None:
    """Importing the registry leaves Hydra's store as it was; only the call fills it."""
    code = (
        "from hydra.core.config_store import ConfigStore; import rcm.configs.registry_distill as r; "
        "before = set(ConfigStore.instance().repo); r.register(); print(json.dumps([sorted(before), sorted(ConfigStore.instance().repo)]))"
    )
    result = subprocess.run([sys.executable, "-c", "import json; " + code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = json.loads(result.stdout)
    assert "experiment" not in before
    assert "experiment" in after
