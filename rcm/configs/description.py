"""What the checkpoints of a run say of themselves, and whether a sampler could go by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rcm.configs.build_data import latent_shape
from rcm.configs.build_method import sampling_recipe
from rcm.configs.network import wan_config
from rcm.configs.pieces import described_pieces
from rcm.configs.schema_causal import CausalConfig
from rcm.configs.schema_rcm import RCMConfig
from rcm.core.errors import CheckpointError, ConfigError
from rcm.train.describe import Description

if TYPE_CHECKING:
    from rcm.configs.compose import Run


def description(
    run: Run,
    *,
    data_hash: str | None = None,
    words: Sequence[str] = (),
    adapters: Mapping[str, Any] | None = None,
) -> Description:
    """What checkpoints of this run say of themselves: enough to sample from the path alone.

    `words`: of the captions, for a toy text; `adapters`: from `NetBuilder.adapters`.
    """
    model = run.config.model.config
    recipe, schedule, noisy = sampling_recipe(model), None, None
    if recipe is not None and recipe.kind != "ode":
        schedule = [list(entry) for entry in recipe.mids]
    if recipe is not None and recipe.noisy_context:
        noisy = {"start_chunk": recipe.noisy_context_start_chunk}
    codec, text = described_pieces(model, words=words)
    described = Description(
        stage=model.stage.lower(),
        network=wan_config(model.net).to_dict(),
        network_name=model.net.preset,
        pattern=None if model.pattern is None else model.pattern.name,
        schedule=schedule,
        noisy_context=noisy,
        sigma_max=model.sigma_max,
        parent=model.student_ckpt or None,
        data_hash=data_hash,
        experiment=run.experiment or None,
        extra={
            "recipe": None if recipe is None else recipe.to_dict(),
            "sampler": _bidirectional_sampler(model) if recipe is None else None,
            "codec": codec,
            "text": text,
            "latent_shape": list(latent_shape(model)),
            "fps": 8 if model.text_encoder_class == "toy" else 16,
            "precision": {"compute": model.precision, "time": model.time_precision},
            **({} if adapters is None else {"adapters": adapters}),
        },
    )
    try:  # now, before there is work that nobody could open
        return Description.from_json(described.to_json(), source="what its checkpoints would say")
    except CheckpointError as error:
        raise ConfigError(f"this run cannot be described: {error}") from error


def _bidirectional_sampler(model: CausalConfig | RCMConfig) -> dict[str, Any]:
    if isinstance(model, RCMConfig):
        return {"kind": "rcm_few_step", "sigma_max": model.sigma_max, "guidance": 1.0, "steps": 4}
    return {
        "kind": "ode",
        "shift": model.sample_timestep_shift,
        "sigma_max": model.sigma_max,
        "guidance": model.bidirectional_guidance,
        "steps": 50,
    }
