"""Low-rank updates: every setting that changes their strength is read as meant, or refused. Which
copy of a file is taken.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rcm.core.errors import CheckpointError
from rcm.nets.wan.convert import from_wan
from rcm.pipelines.adapted_weights import LoRA, MergedWeights
from rcm.pipelines.wan_files import network_weights
from rcm.pipelines.weight_files import open_weights
from scripts.checkpoint import main as checkpoint_main
from tests.faults.case import Fault, each, kept_folder
from tests.support.weight_folders import own, prefixed, small_state

Q, K, FFN = "blocks.0.self_attn.q", "blocks.1.self_attn.k", "blocks.0.ffn.0"
RANK = 4


@functools.cache
def _base() -> tuple[Path, dict[str, Tensor]]:
    state = small_state()
    path = kept_folder() / "base.safetensors"
    save_file(own(from_wan(state, form="wan")), path)
    return path, state


def factors(*, lead: str = "base_model.model.", rank: int = RANK, **more: Tensor) -> dict[str, Tensor]:
    generator, out = torch.Generator().manual_seed(1), {}
    for name in (Q, K, FFN):
        rows, columns = _base()[1][f"{name}.weight"].shape
        out[f"{lead}{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        out[f"{lead}{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return out | {f"{lead}{name}": value for name, value in more.items()}


def adapter(
    folder: Path,
    config: dict[str, Any] | bytes | None = None,
    *,
    metadata: dict[str, str] | None = None,
    entries: dict[str, Any] | None = None,
    name: str = "adapter_model.safetensors",
) -> Path:
    """A PEFT folder, or a file with metadata, or a pickle with other entries."""
    if config is not None:
        (folder / "adapter_config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    path = folder / name
    if path.suffix == ".pt":
        torch.save({"generator_lora": factors(), **(entries or {})}, path)
    else:
        save_file({**factors(), **(entries or {})}, path, metadata=metadata)
    return path


def retyped(folder: Path, change: Callable[[Tensor], Tensor] | None) -> Path:
    """A file of factors, each changed; None: without any."""
    path = folder / "x.safetensors"
    save_file({key: change(value).contiguous() for key, value in factors().items()} if change else {}, path)
    return path


def merged(path: Path, **options: Any) -> MergedWeights:
    return MergedWeights(network_weights(open_weights(_base()[0])), LoRA(path, **options))


PEFT = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "bias": "none", "target_modules": ["q", "k"], "lora_dropout": 0.1}
DIFFUSERS = {f"transformer.{key}": value for key, value in PEFT.items()}
ROOT = math.sqrt(RANK)

# settings -> strength of (Q, K, FFN)
STRENGTHS: dict[str, tuple[Callable[[Path], Path], dict[str, Any], tuple[float, float, float]]] = {
    "nothing said": (lambda f: adapter(f), {}, (1, 1, 1)),
    "alpha / r": (lambda f: adapter(f, PEFT), {}, (2, 2, 2)),
    "alpha / sqrt(r)": (lambda f: adapter(f, {**PEFT, "use_rslora": True}), {}, (8 / ROOT,) * 3),
    "given alpha, stabilised": (lambda f: adapter(f, {**PEFT, "use_rslora": True}), {"alpha": 3.0}, (3 / ROOT,) * 3),
    "scale": (lambda f: adapter(f, PEFT), {"scale": 0.5}, (1, 1, 1)),
    "alpha per layer": (lambda f: adapter(f, {**PEFT, "alpha_pattern": {"self_attn.q": 2, "blocks.1.self_attn.k": 6}}), {}, (0.5, 1.5, 2)),
    "anchored": (lambda f: adapter(f, {**PEFT, "alpha_pattern": {"^blocks.0.self_attn.q": 2, "^q": 5}}), {}, (0.5, 2, 2)),
    "rank per layer": (lambda f: adapter(f, {**PEFT, "r": 9, "rank_pattern": {"q": 4, "k": 4, "ffn.0": 4}}), {}, (2, 2, 2)),
    "settings beside another name": (lambda f: adapter(f, PEFT, name="best.safetensors"), {}, (2, 2, 2)),
    "kohya": (lambda f: adapter(f, metadata={"ss_network_alpha": "16.0", "ss_network_dim": "4"}), {}, (4, 4, 4)),
    "alpha in the metadata": (lambda f: adapter(f, metadata={"lora_alpha": "2"}), {}, (0.5, 0.5, 0.5)),
    "stabilised in the metadata": (lambda f: adapter(f, metadata={"lora_alpha": "2", "use_rslora": "True"}), {}, (2 / ROOT,) * 3),
    "diffusers": (lambda f: adapter(f, metadata={"lora_adapter_metadata": json.dumps(DIFFUSERS)}), {}, (2, 2, 2)),
    "entries before settings": (
        lambda f: adapter(f, metadata={"ss_network_alpha": "16"}, entries={f"base_model.model.{Q}.alpha": torch.tensor(2.0)}),
        {},
        (0.5, 4, 4),
    ),
    "pickle with alpha, alpha given": (lambda f: adapter(f, entries={"lora_alpha": 32}, name="x.pt"), {"alpha": 8.0}, (2, 2, 2)),
}

REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "DoRA": (lambda f: adapter(f, {**PEFT, "use_dora": True}), "use_dora=True, which changes the update"),
    "transposed": (lambda f: adapter(f, {**PEFT, "fan_in_fan_out": True}), "fan_in_fan_out=True"),
    "bias": (lambda f: adapter(f, {**PEFT, "bias": "all"}), "bias=all"),
    "bias of the factors": (lambda f: adapter(f, {**PEFT, "lora_bias": True}), "lora_bias=True"),
    "PiSSA": (lambda f: adapter(f, {**PEFT, "init_lora_weights": "pissa_niter_4"}), "init_lora_weights=pissa_niter_4"),
    "OLoRA": (lambda f: adapter(f, {**PEFT, "init_lora_weights": "olora"}), "init_lora_weights=olora"),
    "another kind": (lambda f: adapter(f, {**PEFT, "peft_type": "LOHA"}), "peft_type=LOHA"),
    "whole modules": (lambda f: adapter(f, {**PEFT, "modules_to_save": ["head"]}), "modules_to_save"),
    "layers repeated": (lambda f: adapter(f, {**PEFT, "layer_replication": [[0, 2]]}), "layer_replication"),
    "a setting of tomorrow": (lambda f: adapter(f, {**PEFT, "use_tomorrow": True}), "use_tomorrow=True"),
    "pattern of expressions": (lambda f: adapter(f, {**PEFT, "alpha_pattern": {"(a+)+$": 2}}), "alpha_pattern has names that are"),
    "pattern of a list": (lambda f: adapter(f, {**PEFT, "rank_pattern": [1]}), "rank_pattern"),
    "alpha of words": (lambda f: adapter(f, {**PEFT, "lora_alpha": "much"}), "lora_alpha=much, expected a finite number"),
    "alpha of a list": (lambda f: adapter(f, {**PEFT, "lora_alpha": [8]}), "lora_alpha=.8., expected a finite number"),
    "alpha of 10^400": (lambda f: adapter(f, {**PEFT, "lora_alpha": 10**400}), "expected a finite number"),
    "infinite alpha": (lambda f: adapter(f, metadata={"ss_network_alpha": "inf"}), "expected a finite number"),
    "NaN in an entry": (lambda f: adapter(f, entries={f"base_model.model.{Q}.alpha": torch.tensor(math.nan)}), "alpha is nan"),
    "complex alpha": (
        lambda f: adapter(f, entries={f"generator_lora.base_model.model.{Q}.alpha": torch.tensor(1j)}, name="x.pt"),
        "expected one number",
    ),
    "factors of integers": (
        lambda f: retyped(f, lambda x: x.to(torch.int8)),
        r"x.safetensors holds weights that are not .*lora_B.weight \(int8\)",
    ),
    "factors of eight bits": (
        lambda f: retyped(f, lambda x: x.to(torch.float8_e4m3fn)),
        r"holds weights that are not .* \(float8_e4m3fn\)",
    ),
    "factors of no rank": (lambda f: retyped(f, lambda x: x[:0] if len(x) == RANK else x[:, :0]), r"do not fit: down \(0, 128\)"),
    "no factors": (lambda f: retyped(f, None), "no factor of a low-rank update, so nothing would be merged"),
    "alpha of two numbers": (lambda f: adapter(f, entries={f"base_model.model.{Q}.alpha": torch.ones(2)}), "expected one number"),
    "another rank": (lambda f: adapter(f, {**PEFT, "r": 8}), "state rank 8 for .*, the factors have 4"),
    "another rank in the metadata": (lambda f: adapter(f, metadata={"ss_network_dim": "16"}), "state rank 16"),
    "another rank of one layer": (lambda f: adapter(f, {**PEFT, "rank_pattern": {"q": 8}}), "state rank 8 for blocks.0.self_attn.q"),
    "rank of nothing": (lambda f: adapter(f, {**PEFT, "r": 0}), "r=0, expected a whole number"),
    "flag of words": (lambda f: adapter(f, {**PEFT, "use_rslora": "perhaps"}), "use_rslora=perhaps, expected true or false"),
    "stabilised without alpha": (lambda f: adapter(f, {"r": RANK, "use_rslora": True}), "rank-stabilised .* and no alpha"),
    "two alphas": (lambda f: adapter(f, PEFT, metadata={"ss_network_alpha": "16"}), "state 2 alphas, 8 and 16"),
    "two alphas in the metadata": (lambda f: adapter(f, metadata={"ss_network_alpha": "16", "alpha": "4"}), "contradicts itself"),
    "LyCORIS": (lambda f: adapter(f, metadata={"ss_network_module": "lycoris.kohya"}), "metadata says lycoris"),
    "LoHa": (lambda f: adapter(f, metadata={"ss_network_args": '{"algo": "loha"}'}), "metadata says loha"),
    "settings of a list": (lambda f: adapter(f, b"[]"), "not an object of settings"),
    "settings open": (lambda f: adapter(f, b"{"), "adapter_config.json cannot be read"),
    "settings with NaN": (lambda f: adapter(f, b'{"lora_alpha": NaN}'), "NaN is no JSON number"),
    "diffusers' of a list": (lambda f: adapter(f, metadata={"lora_adapter_metadata": "[]"}), "no object of settings"),
    "diffusers' open": (lambda f: adapter(f, metadata={"lora_adapter_metadata": "{"}), "no object of settings"),
    "a pickle's own alpha": (lambda f: adapter(f, entries={"lora_alpha": 32}, name="x.pt"), "states lora_alpha as plain .*--lora_alpha"),
    "a pickle's own settings": (lambda f: adapter(f, entries={"lora": {"rank": 4}}, name="x.pt"), "states lora.rank as plain values"),
    "magnitudes": (lambda f: adapter(f, entries={f"{Q}.lora_magnitude_vector": torch.ones(2)}), "is no factor of a low-rank update"),
}


def copies(*prefixes: str) -> Callable[[Path], str]:
    """A file with one network per prefix; which is taken."""

    def call(folder: Path) -> str:
        state = {}
        for i, prefix in enumerate(prefixes):
            state |= prefixed({key: value + i for key, value in _base()[1].items()}, prefix)
        torch.save(state, folder / "x.pt")
        return network_weights(open_weights(folder / "x.pt")).prefix

    return call


def one_nan(folder: Path) -> Tensor:
    """The weight of an adapter with one NaN."""
    key = f"base_model.model.{Q}.lora_B.weight"
    factor = factors()[key]
    factor[-1, -1] = math.nan
    return merged(adapter(folder, entries={key: factor}))[f"{Q}.weight"]


CASES = [
    *(Fault(name, kind="adapter settings", refusal=w, call=lambda f, make=make: merged(make(f))) for name, (make, w) in REFUSED.items()),
    Fault("convert", kind="adapter settings", refusal="use_dora=True", main=checkpoint_main,
          argv=lambda f: ["convert", _base()[0], f / "y.pt", "--lora", adapter(f, {**PEFT, "use_dora": True})]),
    Fault("inspect", kind="adapter settings", refusal="use_dora=True", main=checkpoint_main,
          argv=lambda f: ["inspect", adapter(f, {**PEFT, "use_dora": True})]),
    Fault("a factor that is NaN", kind="adapter factors", refusal=r"\.q\.lora_B\.weight is NaN or infinite", call=one_nan),
    Fault("two networks, one of no known name", kind="copies in a file", refusal=r"no averaged .* one of model\.\*, teacher\.\*",
          call=copies("model.", "teacher.")),
    Fault("two averages", kind="copies in a file", refusal="several networks could be the ema", call=copies("model_ema.", "ema.")),
]  # fmt: skip


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


@pytest.mark.parametrize("name", STRENGTHS)
def test_strength(name: str, tmp_path: Path) -> None:
    """W + strength * B A in float64, from settings as their trainers write them."""
    write, options, strengths = STRENGTHS[name]
    weights, parts = merged(write(tmp_path), **options), factors()
    for target, strength in zip((Q, K, FFN), strengths, strict=True):
        down, up = (parts[f"base_model.model.{target}.lora_{side}.weight"].double() for side in "AB")
        expected = _base()[1][f"{target}.weight"].double() + strength * up @ down
        torch.testing.assert_close(weights[f"{target}.weight"].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prefixes", "taken"),
    [
        (("model.", "ema_model."), "ema_model."),
        (("ema_model.", "model."), "ema_model."),
        (("model.", "model_ema."), "model_ema."),
        (("net.", "ema.module."), "ema.module."),
        (("generator.model.", "critic.model."), "generator.model."),
        (("net.", "averaged_net."), "averaged_net."),
        (("net.", "net_fake_score.", "net_ema."), "net_ema."),
    ],
)
def test_the_average_is_taken_whatever_it_is_called(prefixes: tuple[str, ...], taken: str, tmp_path: Path) -> None:
    assert copies(*prefixes)(tmp_path) == taken


def test_names_of_live_weights_are_no_averages(tmp_path: Path) -> None:
    """ "schema", "cinema" and the like end in the same letters."""
    with pytest.raises(CheckpointError, match=r"it holds no net_ema\.\*"):
        copies("schema.", "cinema.")(tmp_path)
