"""`python -m scripts.checkpoint`: inspect and convert end to end, and every wrong call in one
line.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rcm.core.dtypes import Precision
from rcm.pipelines import load_wan, open_weights
from rcm.train.export import describe
from scripts import dcp_to_pth
from scripts.checkpoint import main, size_in_bytes
from tests.support.adapted_checkpoint import write_adapted
from tests.support.tiny_checkpoint import write_checkpoint
from tests.support.weight_folders import FAMILIES, small_config, small_state

FP32 = Precision.preset("fp32")


def run(*words: object) -> int:
    return main([str(word) for word in words])


def same_as(path: Path, state: dict) -> bool:
    found = load_wan(path, precision=FP32, expect=small_config()).net.state_dict()
    return all(torch.equal(found[key], value) for key, value in state.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_turns_into_ours_and_into_diffusers_and_back(tmp_path, family):
    """Bit by bit: the family, a diffusers folder, this package's file."""
    state = small_state()
    (tmp_path / "in").mkdir()
    source = FAMILIES[family](tmp_path / "in", state)
    assert run("convert", source, tmp_path / "out", "--to", "diffusers", "--max_shard_size", "200KB") == 0
    assert run("convert", tmp_path / "out", tmp_path / "back.safetensors") == 0
    written = load_file(tmp_path / "back.safetensors")
    assert written.keys() == {f"net.{key}" for key in state} and all(
        torch.equal(written[f"net.{key}"], value) for key, value in state.items()
    )


def test_descriptions_say_what_was_taken(tmp_path, capsys):
    source = FAMILIES["rcm job"](tmp_path, small_state())
    assert run("convert", source, tmp_path / "critic.pth", "--weights", "fake_score", "--dtype", "bf16") == 0
    assert "fake_score weights, 69 tensors, as rcm" in capsys.readouterr().out
    told = describe(tmp_path / "critic.pth")
    assert told.stage == "imported" and told.extra["weights"] == "fake_score" and told.extra["converted_from"].endswith("model")
    assert told.network["num_heads"] == 1 and told.parent.endswith("model")
    state = {key: (value + 2).bfloat16() for key, value in small_state().items()}
    assert same_as(tmp_path / "critic.pth", {key: value.float() for key, value in state.items()})
    assert run("convert", tmp_path / "critic.pth", tmp_path / "again.safetensors", "--weights", "fake_score") == 0
    assert describe(tmp_path / "again.safetensors").extra["weights"] == "fake_score"


def test_loras_are_merged_and_recorded(tmp_path):
    draw = torch.Generator().manual_seed(0)
    name = "blocks.0.self_attn.v"
    down, up = torch.randn(2, 128, generator=draw), torch.randn(128, 2, generator=draw)
    torch.save({f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}, tmp_path / "lora:x.pt")
    source = FAMILIES["original Wan shards"](tmp_path, small_state())
    for words, strength, entry in (
        (("--lora", tmp_path / "lora:x.pt"), 1.0, {"scale": 1.0, "alpha": None}),
        (("--lora", f"{tmp_path / 'lora:x.pt'}:0.25", "--lora_alpha", "8"), 1.0, {"scale": 0.25, "alpha": 8.0}),
    ):
        assert run("convert", source, tmp_path / "out.safetensors", *words, "--overwrite") == 0
        got = open_weights(tmp_path / "out.safetensors")[f"net.{name}.weight"]
        expected = small_state()[f"{name}.weight"].double() + strength * up.double() @ down.double()
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)
        (told,) = describe(tmp_path / "out.safetensors").extra["loras"]
        assert len(told.pop("digest")) == 32 and told == {"path": str(tmp_path / "lora:x.pt"), **entry}


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_a_merge_keeps_the_dtype_of_the_base(tmp_path, name):
    """Summed in float32, rounded once, not left in another dtype than its neighbours."""
    base = {key: value.bfloat16() for key, value in small_state().items()}
    torch.save(base, tmp_path / "base.pt")
    down, up = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 128), (128, 2)))
    lead = "blocks.0.self_attn.v"
    torch.save({f"{lead}.lora_A.weight": down, f"{lead}.lora_B.weight": up}, tmp_path / "lora.pt")
    assert run("convert", tmp_path / "base.pt", tmp_path / name, "--lora", tmp_path / "lora.pt") == 0
    file = open_weights(tmp_path / name)
    assert {value.dtype for value in file.headers.values()} == {torch.bfloat16}
    assert torch.equal(file[f"net.{lead}.weight"], (base[f"{lead}.weight"].float() + up @ down).bfloat16())


def test_inspect_prints_text_and_json(tmp_path, capsys):
    first, second = (FAMILIES[name](tmp_path, small_state()) for name in ("rcm .pth", "diffusers pipeline"))
    assert run("inspect", first, second) == 0
    printed = capsys.readouterr().out
    assert "rcm (also this package's exports)" in printed and "\n  diffusers\n" in printed and "69 tensors" in printed
    assert run("inspect", first, "--json") == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["copies"][0]["tensors"] == 69
    cut = {key: value for key, value in small_state().items() if key != "head.modulation"}
    torch.save(cut, tmp_path / "cut.pt")
    assert run("inspect", tmp_path / "cut.pt") == 1
    assert "1 missing: head.modulation" in capsys.readouterr().out


def test_wrong_calls_write_nothing(tmp_path, capsys):
    source = FAMILIES["rcm .pth"](tmp_path, small_state())
    (tmp_path / "cut.pth").write_bytes(source.read_bytes()[:-1000])
    (tmp_path / "there.pth").write_bytes(b"mine")
    before = sorted(tmp_path.iterdir())
    for words, code, sentence in (
        (("inspect", tmp_path / "nowhere.pth"), 1, "nowhere.pth does not exist"),
        (("convert", tmp_path / "cut.pth", tmp_path / "x.pth"), 1, "cut.pth cannot be read"),
        (("convert", source, tmp_path / "x.bin"), 2, "cannot tell what"),
        (("convert", source, tmp_path / "there.pth"), 2, "exists; pass --overwrite"),
        (("convert", source, "~/new"), 2, "would be in a folder called ~; write /"),
        (("convert", source, tmp_path / "x.pth", "--expect", "1.3B"), 1, "but 1.3B of 30 layers"),
        (("convert", source, tmp_path / "x.pth", "--weights", "fake_score"), 1, "no net_fake_score.* weights"),
        (("convert", source, tmp_path / "x.pth", "--lora", f"{source}:much"), 2, "'much' is no number"),
        (("convert", source, tmp_path / "x.pth", "--lora", f"{source}:nan"), 2, "'nan' is no number"),
        (("convert", source, tmp_path / "x.pth", "--lora", source), 1, "is no factor of a low-rank update"),
        (("convert", source, tmp_path / "x.pth", "--lora", ""), 1, "path of the weights is empty"),
        (("convert", source, tmp_path / "x.safetensors", "--to", "self_forcing"), 2, "which only .pt and .pth hold"),
    ):
        assert run(*words) == code
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("checkpoint ")]
        assert sentence in line
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "there.pth").read_bytes() == b"mine"
    for words, told in (
        (("convert", source, tmp_path / "x", "--max_shard_size", "big"), "'big' is no size"),
        (("convert", source, tmp_path / "x", "--max_shard_size", "infGB"), "'infGB' is no size"),
        (("convert", "", tmp_path / "x"), "argument source: '' is no path"),  # and not this folder
        (("convert", source, ""), "argument target: '' is no path"),
        (("inspect", source, " "), "argument path: '' is no path"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*words)
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_what_is_read_is_not_replaced(tmp_path, capsys, monkeypatch):
    """Under any name: a link of either kind, a relative path, its folder, a part of it, the base of
    adapters, a file that is merged; and by whoever writes and reads files.
    """
    source, folder = FAMILIES["rcm .pth"](tmp_path, small_state()), tmp_path / "in"
    assert run("convert", source, folder, "--max_shard_size", "200KB") == 0
    (tmp_path / "soft.pth").symlink_to(source)
    (tmp_path / "hard.pth").hardlink_to(source)
    (tmp_path / "linked").symlink_to(folder)
    (tmp_path / "whole").mkdir()
    shutil.copy(source, tmp_path / "whole" / "diffusion_pytorch_model.pth")
    base, job = tmp_path / "base", tmp_path / "job"
    write_checkpoint(base)
    write_adapted(job, base)
    assert run("convert", job, tmp_path / "lora", "--adapters", "peft") == 0
    lora = tmp_path / "lora" / "adapter_model.safetensors"
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for words in (
        (source, source),
        (source, source.name),
        (source, "soft.pth"),
        ("soft.pth", source),
        (source, "hard.pth"),
        (folder, folder),
        ("linked", "in"),
        (folder, min(folder.glob("*-00001-*"))),
        (tmp_path / "whole" / "diffusion_pytorch_model.pth", "whole"),
        (job, base),
        (job, job, "--base", base, "--adapters", "peft"),
        (tmp_path / "lora", "lora", "--adapters", "peft"),
        (base, lora, "--lora", "lora"),
    ):
        for more in ([], ["--overwrite"]):
            assert run("convert", *words, *more) == 2, words
            assert "and would be replaced; choose another target" in capsys.readouterr().err, words
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run("convert", source, folder / "other.safetensors") == 0, "nothing is there yet"
    assert run("convert", folder, folder / "other.safetensors", "--overwrite") == 0, "no part of what is read"


def test_dcp_to_pth_takes_checkpoints_of_rcm(tmp_path):
    """The averaged weights, renamed, in bfloat16; no description, as that trainer writes none."""
    job = FAMILIES["rcm job"](tmp_path, small_state())
    words = ["--dcp_checkpoint_dir", str(job / "checkpoints" / "iter_000000200" / "model"), "--save_path", str(tmp_path / "rCM.pt")]
    assert dcp_to_pth.main(words) == 0
    written = torch.load(tmp_path / "rCM.pt", weights_only=True)
    assert written.keys() == {f"net.{key}" for key in small_state()}
    assert all(torch.equal(written[f"net.{key}"], value.bfloat16()) for key, value in small_state().items())
    assert same_as(tmp_path / "rCM.pt", {key: value.bfloat16().float() for key, value in small_state().items()})


def test_sizes():
    assert [size_in_bytes(word) for word in ("5GB", "1.5mb", "700", "2KB")] == [5 * 10**9, 1_500_000, 700, 2000]


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        run("convert", "--help")
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert "--max_shard_size" in told and "self_forcing" in told and "TARGET" in told
