"""Lines of every command on which a flag would do nothing: one sentence names it and the other."""

from __future__ import annotations

import pytest

from rcm.front.cli import main

PAIRS = {
    "plan --smallest --as-is experiment=toy_tf_c3-3": "--as-is has no effect with --smallest",
    "plan --as-is experiment=toy_tf_c3-3 gpus=1 global_batch=4": "global_batch=4 has no effect with --as-is",
    "plan --smallest experiment=toy_tf_c3-3 memory_gib=3": "memory_gib=3 has no effect with --smallest",
    "serve --format png --quality 3": "--quality has no effect with --format png",
    "data build --source toy --input x --out y": "--input has no effect with --source toy",
    "data build --turns 2 --source teacher --prompts p --out y": "--turns has no effect with --source teacher",
    "data build --source videos --text-cache x --input y --out z": "--text-cache has no effect without --codec",
    "data build --source videos --codec wan_vae --text-len 3 --input y --out z": "--text-len has no effect with --codec wan_vae",
    "data view a.tar --sheet b.png --codec toy --vae_path x": "--vae_path has no effect with --codec toy",
    "checkpoint convert a b --adapters peft --to wan": "--to has no effect with --adapters",
    "checkpoint convert a b.pth --lora_alpha 3": "--lora_alpha has no effect without --lora",
    "bench memory --case x": "--case has no effect without key=value",
    "bench memory --predict --json x.json": "--json has no effect with --predict",
    "bench kv-codec --tiny --heads 3": "--heads has no effect with --tiny",
    "bench vae --cold --frames 9": "--frames has no effect with --cold",
    "bench stream --parts c33 --chunks 9": "--chunks has no effect with --parts c33",
    "bench data --shards 9": "--shards has no effect without --index",
    "bench data --index 100 --shards 10 --cold": "--cold has no effect with --index 100",
    "bench checkpoint --gpus 2": "--gpus has no effect without --of",
    "bench scale --list --gpu h200": "--gpu has no effect with --list",
    "bench scale --report --json a.json --rows x": "--rows has no effect with --report",
    "bench scale --gpu h200": "--gpu has no effect without --plan-only",
    "bench train-step --only forward --lora 8": "--lora has no effect with --only forward",
    "bench compare a --ignore_conditions": "--ignore_conditions has no effect with DIR a",
    "bench compare a b --pixels_only --device cpu": "--device has no effect with --pixels_only",
    "bench drift a=b.mp4 --no-features --device cpu": "--device has no effect without --features",
    "vbench env --check --minimal": "--minimal has no effect with --check",
    "vbench sample --dit_path x --size 32x48 --aspect_ratio 1:1": "--aspect_ratio has no effect with --size",
    "vbench score --explain a b --partial": "--partial has no effect with --explain",
    "vbench score --result_dir a --device cpu": "--device has no effect without --videos_path",
    "vbench score --videos_path a --vision_reward_model b": "--vision_reward_model has no effect without --vision_reward",
    "vbench score --videos_path a --suite long --ngpus 2": "--ngpus has no effect with --suite long",
}


UNUSABLE = {
    "bench kv-codec --tiny --channels 0": "--channels 0 must be at least 1",
    "bench vae --height -3": "--height -3 must be at least 1",
    "bench policies --minutes nan": "--minutes nan must be a finite number",
    "bench scale --limit nan": "--limit nan must be a finite number",
    "bench scale --budget -1": "--budget -1 must be positive, at least 1",
    "bench train-step --lora -3": "--lora -3 must be at least 0",
    "bench serve --clients 1": "--clients 1 must be at least 2",
    "checkpoint convert a b --lora x --lora_alpha inf": "--lora_alpha inf must be a finite number",
    "demo --scale nan": "--scale nan must be a finite number",
    "demo --videos 7": "--videos 7 must be at least 8",
    "vbench score --videos_path a --ngpus 0": "--ngpus 0 must be at least 1",
    "bench kv-codec --tiny --only nope": "--only nope is part of no name; choose from bf16, fp8",
    "bench drift a.mp4 --device nope": "--device nope cannot be used",
    "bench compare a --max_videos -1": "--max_videos -1 must be at least 1",
    "plan experiment=toy_tf_c3-3 gpus=1 gpus=2": "gpus= is given twice",
    "plan gpus=1": "nothing chosen; give experiment=NAME",
    "plan experiment=toy_tf_c3-3 --config .": "--config=.: no name of a module",
    "plan experiment=toy_tf_c3-3 --json=": "argument --json: '' is no path",
    "data build --out=": "argument --out: '' is no path",
    "doctor --compile ٤٨٠x832": "argument --compile: '٤٨٠x832' is not HxW",
}


@pytest.mark.parametrize("line", [*PAIRS, *UNUSABLE])
def test_one_sentence_refuses_before_anything_is_written(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(line.split())
    except SystemExit as ended:
        status = ended.code
    told = capsys.readouterr().err
    assert status == 2 and told.startswith(f"error: {(PAIRS | UNUSABLE)[line]}") and told.count("\n") == 1, told
    assert ("leave" in told or line not in PAIRS) and not list(tmp_path.iterdir())


TOLD = {
    "sample rcm --size 32x48 --resolution 480p": "--resolution has no effect with --size",
    "sample rcm --low_memory --offload none": "--offload has no effect with --low_memory",
    "sample diffusion --guidance_scale 1 --negative_prompt x": "--negative_prompt has no effect with --guidance_scale 1",
    "sample causal --prompt a --prompt_file b": "--prompt has no effect with --prompt_file",
    "sample causal-long --prompt a --scene_file b": "--prompt has no effect with --scene_file",
    "sample causal-quant --tiny_decoder a.pth --vae_tile 64": "--vae_tile has no effect with --tiny_decoder",
    "sample causal --tiny_decoder a.pth --vae_path b.pth": "--vae_path has no effect with --tiny_decoder",
}
"""Published commands have always let these through."""


@pytest.mark.parametrize("line", TOLD)
def test_a_flag_that_was_always_let_through_is_told(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2  # there is no network
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"warning: {TOLD[line]}") and "leave" in first and second.startswith("error: ")
