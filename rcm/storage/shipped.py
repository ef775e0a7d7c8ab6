"""Files that come with the package: prompts, Wan's negative prompt, a small checkpoint."""

from __future__ import annotations

from pathlib import Path

from rcm.core.errors import ConfigError

TOY_CHECKPOINT = "toy/sf_dmd_c1-1.safetensors"
"""The final stage on the toy world; the commands that made it stand in the README beside
it.
"""
TOY_PROMPTS = "prompts/toy.txt"


def asset(name: str) -> Path:
    """The shipped file or folder `name`: in an installed wheel under `rcm/_assets`, in a source
    tree under `assets` beside the package.

    Raises `ConfigError` where it is missing, which an incomplete installation is.
    """
    package = Path(__file__).resolve().parents[1]
    places = [folder / name for folder in (package / "_assets", package.parent / "assets")]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise ConfigError(
            f"the shipped file {name} is neither at {places[0]} nor at {places[1]}; reinstall rcm"
        )
    return found


def toy_checkpoint() -> Path:
    """Path of the shipped checkpoint."""
    return asset(TOY_CHECKPOINT)
