"""Checkpoints of adapters: read on their base as one network, written alone and merged, refused
where anything disagrees.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rcm
from rcm.core.dtypes import Precision
from rcm.core.errors import CheckpointError, ConfigError
from rcm.nets.condition import Condition
from rcm.nets.layout import TokenLayout
from rcm.nets.lora import AdaptedNet
from rcm.pipelines.adapted_weights import LoRA, MergedWeights
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.wan_files import load_wan, network_weights
from rcm.pipelines.weight_files import open_weights
from rcm.pipelines.weight_report import inspect_weights
from rcm.storage.safetensors_file import read_header
from rcm.train.describe import Description
from rcm.train.export import export
from scripts.checkpoint import main
from tests.support.adapted_checkpoint import ALPHA, RANK, write_adapted
from tests.support.tiny_checkpoint import LATENT_SHAPE, PROMPT, world_net, write_checkpoint

LAYOUTS = {"wan": "adapters.safetensors", "diffusers": "diffusers.safetensors", "peft": "peft"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, adapters on it, and everything that is made of them."""
    found = tmp_path_factory.mktemp("adapted")
    write_checkpoint(found / "base")
    write_adapted(found / "job", found / "base")
    assert main(["convert", str(found / "job"), str(found / "merged.safetensors"), "--weights", "reg"]) == 0
    for layout, name in LAYOUTS.items():
        assert main(["convert", str(found / "job"), str(found / name), "--weights", "reg", "--adapters", layout]) == 0
    export(found / "job", found / "exported.pt", weights="reg", dtype=torch.float32)
    return found


def inputs() -> tuple[Any, ...]:
    channels, frames, height, width = LATENT_SHAPE
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, channels, frames, height, width, generator=generator)
    text = torch.randn(1, 8, 24, generator=generator)
    return x, torch.full((1, 1), 0.6, dtype=torch.float64), Condition(text), TokenLayout.bidirectional(frames, grid=(2, 2))


def test_what_is_read_is_what_trained(folder: Path, tmp_path: Path) -> None:
    role = write_adapted(tmp_path / "job", folder / "base")
    x, t, cond, layout = inputs()
    with torch.no_grad():
        truth = role(x, (1000 * t).float(), cond, layout)
        other = AdaptedNet(role.net, "fake_score")(x, (1000 * t).float(), cond, layout)
    for weights, expected in (("reg", truth), ("fake_score", other)):
        found = load_wan(tmp_path / "job", weights=weights, precision=Precision.preset("fp32")).velocity(x, t, cond, layout)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    averaged = open_checkpoint(tmp_path / "job").denoiser.velocity(x, t, cond, layout)
    assert (averaged - truth).abs().max() > 1e-3, "the average is another network"


@pytest.mark.parametrize("name", ["job", *LAYOUTS.values(), "exported.pt"])
def test_every_form_streams_what_the_merged_network_streams(folder: Path, name: str, warned: list[str]) -> None:
    truth = rcm.load(folder / "merged.safetensors", device="cpu").generate(PROMPT)[0]
    found = rcm.load(folder / name, weights="reg", device="cpu").generate(PROMPT)[0]
    assert torch.equal(found, truth)
    report = inspect_weights(folder / name)
    assert report.ok and f"rank {RANK}, alpha {ALPHA:g}" in report.family and str(folder / "base") in report.description
    assert report.uses[0].startswith("stream it: rcm stream --ckpt")
    assert not any("nothing here reads" in line for line in warned)


@pytest.mark.parametrize("name", ["job", *LAYOUTS.values(), "exported.pt"])
def test_adapters_alone_are_merged_as_any_published_ones(folder: Path, name: str) -> None:
    precision = Precision.preset("fp32")
    merged = load_wan(folder / "merged.safetensors", precision=precision).net.state_dict()
    if name == "job":  # of a run's copies the averaged one is published
        merged = load_wan(folder / "job", precision=precision).net.state_dict()
    found = load_wan(folder / "base", precision=precision, loras=[LoRA(folder / name)]).net.state_dict()
    assert all(torch.equal(found[key], merged[key]) for key in merged)


def test_adapters_of_a_shallower_network_are_not_merged_in_part(folder: Path) -> None:
    deeper = dict(network_weights(open_weights(folder / "base")))
    blocks = [name for name in deeper if name.startswith("blocks.1.")]
    deeper |= {name.replace("blocks.1.", "blocks.2."): deeper[name] for name in blocks}
    base = SimpleNamespace(headers=deeper, sources=())
    for name in LAYOUTS.values():
        with pytest.raises(CheckpointError, match=r"10 factors that its description names are missing, blocks\.2\.cross_attn"):
            MergedWeights(base, LoRA(folder / name))


def test_published_keys(folder: Path) -> None:
    """Names that ComfyUI and trainers of Wan, diffusers, and PEFT read."""
    leads = {
        "wan": ("diffusion_model.blocks.1.cross_attn.o.", {"alpha", "lora_A.weight", "lora_B.weight"}),
        "diffusers": ("transformer.blocks.1.attn2.to_out.0.", {"lora_A.weight", "lora_B.weight"}),
        "peft": ("base_model.model.blocks.1.cross_attn.o.", {"lora_A.weight", "lora_B.weight"}),
    }
    for layout, (lead, parts) in leads.items():
        path = folder / LAYOUTS[layout]
        entries, metadata = read_header(path / "adapter_model.safetensors" if layout == "peft" else path)
        assert {key.removeprefix(lead) for key in entries if key.startswith(lead)} == parts
        assert len(entries) == 2 * 10 * len(parts)
        if layout == "diffusers":
            said = json.loads(metadata["lora_adapter_metadata"])
            assert (said["transformer.r"], said["transformer.lora_alpha"]) == (RANK, ALPHA)
            assert "attn2.to_out.0" in said["transformer.target_modules"]
    said = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert "cross_attn.o" in said["target_modules"] and said["base_model_name_or_path"] == str(folder / "base")


def test_narrow_factors_have_the_strength_of_wide_ones(folder: Path, tmp_path: Path) -> None:
    """alpha is no weight: no dtype that was asked for rounds it."""
    target = tmp_path / "narrow.safetensors"
    assert main(["convert", str(folder / "job"), str(target), "--weights", "reg", "--adapters", "wan", "--dtype", "bf16"]) == 0
    dtypes = {key.endswith(".alpha"): value.dtype for key, value in load_file(target).items()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    wide, narrow = (network_weights(open_weights(path), weights="reg") for path in (folder / "job", target))
    assert narrow.strength == wide.strength == ALPHA / RANK
    (first,) = {
        MergedWeights(network_weights(open_weights(folder / "base")), LoRA(target)).strengths[name] for name in list(wide.pairs)[:1]
    }
    assert first == pytest.approx(ALPHA / RANK, rel=1e-7)


def test_a_merged_file_is_a_network_by_itself(folder: Path) -> None:
    found = Description.read(folder / "merged.safetensors.json")
    assert "adapters" not in found.extra and found.extra["weights"] == "live"
    assert [entry["alpha"] for entry in found.extra["loras"]] == [ALPHA]
    assert inspect_weights(folder / "merged.safetensors").copies[0].tensors == len(world_net().state_dict())


def test_what_is_part_of_a_network_is_not_merged_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever container, names, dtype or strength it comes in, and whether the network is a merged
    file, adapters on their base, or merged in the same call; unless that is said to be meant.
    """
    shutil.copy(folder / LAYOUTS["diffusers"], tmp_path / "renamed.safetensors")
    words = [str(folder / "job"), str(tmp_path / "narrow.safetensors"), "--weights", "reg", "--adapters", "wan", "--dtype", "bf16"]
    assert main(["convert", *words]) == 0
    updates = {name: LoRA(tmp_path / f"{name}.safetensors", scale=0.5) for name in ("renamed", "narrow")} | {"peft": LoRA(folder / "peft")}
    twice = MergedWeights(network_weights(open_weights(folder / "base")), LoRA(folder / LAYOUTS["wan"]))
    bases = [twice, *(network_weights(open_weights(folder / name), weights="reg") for name in ("merged.safetensors", "job"))]
    for lora in updates.values():
        for base in bases:
            with pytest.raises(CheckpointError, match=r"its factors are those of .+, which is part of the network already"):
                MergedWeights(base, lora)
    write_adapted(tmp_path / "other", folder / "base", seed=6)
    other, target = f"{tmp_path / 'other'}:0.5", tmp_path / "y.safetensors"
    assert main(["convert", str(folder / "merged.safetensors"), str(target), "--lora", other]) == 0
    capsys.readouterr()
    again = ["convert", str(target), str(tmp_path / "z.pt"), "--lora", f"{updates['renamed'].path}:-1"]
    assert main(again) == 1
    said = capsys.readouterr().err
    assert f"are those of {folder / 'job'}" in said and said.rstrip().endswith("--lora FILE:SCALE --merge_again")
    assert main([*again, "--merge_again"]) == 0
    entries = Description.read(tmp_path / "z.pt.json").extra["loras"]
    assert [entry["scale"] for entry in entries] == [1.0, 0.5, -1.0] and entries[0]["digest"] == entries[2]["digest"]
    found, plain = open_weights(tmp_path / "z.pt"), network_weights(open_weights(folder / "base"))
    only = MergedWeights(plain, LoRA(tmp_path / "other", scale=0.5))
    for name in only.pairs:
        torch.testing.assert_close(found[f"net.{name}"], only[name], rtol=0, atol=1e-6)


def test_adapters_that_are_sampled_otherwise_are_told(folder: Path, tmp_path: Path, warned: list[str]) -> None:
    """A merged file has the sampling of its base; the advice gives it that of the adapters."""
    shutil.copy(folder / LAYOUTS["wan"], tmp_path / "x.safetensors")
    said = Description.read(folder / f"{LAYOUTS['wan']}.json")
    recipe = {**said.extra["recipe"], "kind": "ode"}
    Description.write(replace(said, extra={**said.extra, "recipe": recipe}), tmp_path / "x.safetensors.json")
    for name in (folder / LAYOUTS["wan"], tmp_path / "x.safetensors"):
        assert main(["convert", str(folder / "base"), str(tmp_path / "y.pt"), "--lora", str(name), "--overwrite"]) == 0
    (told,) = warned
    advice = f"convert {tmp_path / 'x.safetensors'} {tmp_path / 'y.pt'} --base {folder / 'base'}"
    assert told.endswith(f"to keep the sampling of the adapters: rcm checkpoint {advice}")
    assert main([*advice.split(), "--overwrite"]) == 0
    assert Description.read(tmp_path / "y.pt.json").extra["recipe"] == recipe


def test_adapters_on_adapters(folder: Path, tmp_path: Path) -> None:
    """A run may start from adapters; eight such steps are followed, a circle is not."""
    write_adapted(tmp_path / "second", folder / "exported.pt", seed=6)
    below = network_weights(open_weights(folder / "exported.pt"))
    network = network_weights(open_weights(tmp_path / "second"), weights="reg")
    assert not torch.equal(network["blocks.0.ffn.0.weight"], below["blocks.0.ffn.0.weight"])
    assert torch.equal(network["head.head.weight"], below["head.head.weight"])
    described(tmp_path / "second", lambda said: said["bases"]["student"].update(path=str(tmp_path / "second")))
    with pytest.raises(CheckpointError, match="more than 8 adapters on adapters; merge one of them first"):
        network_weights(open_weights(tmp_path / "second"))


def described(job: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a checkpoint says of its adapters."""
    path = job / "checkpoints" / (job / "checkpoints/latest_checkpoint.txt").read_text().strip() / "rcm.json"
    values = json.loads(path.read_text())
    change(values["extra"]["adapters"])
    path.write_text(json.dumps(values))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "rank": (lambda a: a.update(rank=3), r"factors of blocks.0.\S+ have rank 2, its description says 3"),
    "rank of no layer": (lambda a: a.update(rank=33), r"adapters.rank is 33, the smallest layer that they adapt has 32"),
    "a layer too few": (lambda a: a["layers"].remove("ffn.0"), r"blocks.0.ffn.0.weight is adapted, and its description names"),
    "unknown layer": (lambda a: a.update(layers=["norm1"]), r"extra.adapters.layers is .*expected a list whose entries are each one of"),
    "no alpha": (lambda a: a.pop("alpha"), r"extra.adapters needs rank, alpha, layers, bases.*it lacks alpha"),
    "strength": (lambda a: a.update(alpha=0), r"extra.adapters.alpha is 0, expected a number above 0"),
    "unknown field": (lambda a: a.update(dora=True), r"extra.adapters.dora is not known to this version"),
    "digest of another form": (lambda a: a["bases"]["student"].update(digest="x"), r"student.digest is 'x', expected 32 hexadecimal"),
    "no student": (lambda a: a["bases"].pop("student"), r"the student's among them"),
    "another base": (lambda a: a["bases"]["student"].update(digest="0" * 32), r"for the weights 0{12} of .*base has [0-9a-f]{12} now"),
    "another dtype": (lambda a: a["bases"]["student"].update(dtype="bfloat16"), r"adapters for the weights .* has [0-9a-f]{12} now"),
    "a base that is gone": (
        lambda a: a["bases"]["student"].update(path="/nowhere/base"),
        r"on the weights of /nowhere/base, and there is no /nowhere/base here; make one network of both: "
        r"rcm checkpoint convert .+ TARGET --base PATH",
    ),
    "a random base": (lambda a: a["bases"]["student"].update(path=None), r"adapters on a random start, which was never saved"),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_mismatch_is_one_sentence(folder: Path, tmp_path: Path, case: str) -> None:
    change, told = WRONG[case]
    shutil.copytree(folder / "job", tmp_path / "job")
    described(tmp_path / "job", change)
    with pytest.raises(CheckpointError, match=told) as error:
        rcm.load(tmp_path / "job", weights="reg", device="cpu")
    assert "\n" not in str(error.value) and str(tmp_path / "job") in str(error.value)


def test_missing_factors_are_counted(folder: Path, tmp_path: Path) -> None:
    """A file that says of more layers than it has that they are adapted."""
    source, target = folder / LAYOUTS["wan"], tmp_path / "less.safetensors"
    kept = {key: value for key, value in load_file(source).items() if ".0.self_attn.q." not in key}
    save_file(kept, target)
    shutil.copy(f"{source}.json", f"{target}.json")
    told = r"less.safetensors \(adapters on .*\): 1 factors .* missing, blocks.0.self_attn.q.weight"
    with pytest.raises(CheckpointError, match=told):
        network_weights(open_weights(target))


def test_copies_that_are_not_there_and_files_that_are_something_else(folder: Path, tmp_path: Path) -> None:
    write_adapted(tmp_path / "student", folder / "base", names=("student",))
    with pytest.raises(CheckpointError, match=r"holds no fake_score adapters \(it has ema, live\); choose other weights"):
        network_weights(open_weights(tmp_path / "student"), weights="fake_score")
    with pytest.raises(ConfigError, match="is a network by itself, no adapters that need"):
        network_weights(open_weights(folder / "merged.safetensors"), base=folder / "base")
    shutil.copy(folder / "merged.safetensors", tmp_path / "full.safetensors")
    shutil.copy(f"{folder}/{LAYOUTS['wan']}.json", tmp_path / "full.safetensors.json")
    with pytest.raises(CheckpointError, match=r"full.safetensors \(adapters on .+base\): .* is no factor of a low-rank update"):
        network_weights(open_weights(tmp_path / "full.safetensors"))


def test_two_strengths_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "peft", tmp_path / "peft")
    config = tmp_path / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace(f'"lora_alpha": {ALPHA}', '"lora_alpha": 8'))
    told = f"its description says alpha {ALPHA:g}, its settings say 8; say which with --lora_alpha"
    with pytest.raises(CheckpointError, match=told):
        rcm.load(tmp_path / "peft", device="cpu")
    with pytest.raises(CheckpointError, match=told):
        load_wan(folder / "base", precision=Precision.preset("fp32"), loras=[LoRA(tmp_path / "peft")])


def test_a_base_that_moved_is_named_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "job", tmp_path / "job")
    shutil.copytree(folder / "base", tmp_path / "moved")
    described(tmp_path / "job", lambda said: said["bases"]["student"].update(path="/nowhere/base"))
    target = tmp_path / "merged.safetensors"
    words = ["convert", str(tmp_path / "job"), str(target), "--weights", "reg", "--base", str(tmp_path / "moved")]
    assert main(words) == 0
    found, truth = (rcm.load(path, device="cpu").generate(PROMPT)[0] for path in (target, folder / "merged.safetensors"))
    assert torch.equal(found, truth)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["merged.safetensors", "x.safetensors", "--adapters", "wan"], "holds all weights, no adapters; leave out --adapters"),
        (["job", "x.pt", "--adapters", "wan"], "layout 'wan' are a .safetensors file"),
        (["job", "x.safetensors", "--adapters", "peft"], "layout 'peft' are a folder without suffix"),
        (["job", "x.safetensors", "--adapters", "wan", "--lora", "y"], "leave out --lora and --max_shard_size"),
        (["job", "peft", "--adapters", "peft"], "exists; pass --overwrite"),
    ],
)
def test_conversions_that_cannot_be_meant(folder: Path, capsys: pytest.CaptureFixture, words: list[str], told: str) -> None:
    source, target, *rest = words
    assert main(["convert", str(folder / source), str(folder / target), *rest]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "x.safetensors").exists() and not (folder / "x.pt").exists()
