"""The streaming command line: from a checkpoint's path to an mp4 file, or one sentence and exit
status 2.
"""

from __future__ import annotations

import errno
import json
import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from PIL import Image

from rcm.core.errors import ConfigError
from rcm.inference.causal_film import _timelines
from rcm.inference.stream import main, read_prompts
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.video_io import probe, read_mp4, write_mp4
from tests.support.tiny_checkpoint import CODEC, FEW_STEP, MANY_STEP, PROMPT, STUDENT, TEACHER, describe_world, world_net, write_checkpoint


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("jobs")
    for name, recipe in (("student", STUDENT), ("teacher", TEACHER), ("many", MANY_STEP), ("few", FEW_STEP)):
        write_checkpoint(folder / name, recipe)
    return {name: folder / name for name in ("student", "teacher", "many", "few")}


def stream(job: Path, out: Path, *flags: str, prompt: str | None = PROMPT) -> int:
    given = ["--prompt", prompt] if prompt is not None else []
    return main(["--ckpt", str(job), "--save_path", str(out), "--device", "cpu", *given, *flags])


def report_of(job: Path, tmp_path: Path, *flags: str) -> dict:
    assert stream(job, tmp_path / "a.mp4", "--report", str(tmp_path / "a.json"), *flags) == 0
    return json.loads((tmp_path / "a.json").read_text())


def test_end_to_end(jobs, tmp_path, capsys):
    out = tmp_path / "new" / "out.mp4"
    flags = ("--prompt", "a blue square moving up", "--upscale", "8", "--seed", "3", "--weights", "reg")
    assert stream(jobs["student"], out, "--report", str(tmp_path / "r.json"), *flags) == 0
    info = probe(out)
    assert (info.width, info.height, info.num_frames, info.fps) == (2 * 64, 64, 11, 8.0)
    video, _ = open_checkpoint(jobs["student"], weights="reg").generate([PROMPT, "a blue square moving up"], seed=3)
    expected = torch.cat(list(video.clamp(-1, 1)), dim=-1)
    got = read_mp4(out)[:, :, 4::8, 4::8]
    assert (got.mean(dim=0) - expected.mean(dim=0)).abs().mean() < 0.05, "grey values survive yuv420p"
    said = capsys.readouterr().out
    assert [line.split(":")[0] for line in said.splitlines()[1:3]] == ["chunk 0", "chunk 1"]
    assert "steps per chunk 3 2" in said
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["prompts"] == [PROMPT, "a blue square moving up"]
    assert (record["num_frames"], len(record["chunk_seconds"]), record["checkpoint"]["iteration"]) == (11, 2, 7)
    assert record["recipe"]["mids"] == [[15 / 16, 5 / 6], [5 / 6]]
    assert record["timing"] is None


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_module_starts_as_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rcm-stream", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("rcm.inference.stream", run_name="__main__")
    assert end.value.code == 0
    assert "--steps_per_chunk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "mids"),
    [
        (("--steps_per_chunk", "3", "2"), [[15 / 16, 5 / 6], [5 / 6]]),
        (("--steps_per_chunk", "2", "1"), [[15 / 16], []]),
        (("--steps_per_chunk", "4"), [[15 / 16, 5 / 6, 5 / 8]]),
        (("--num_steps", "1"), [[]]),
        (("--steps_per_chunk", "2", "1", "--mid_t_schedules", "1/2;"), [[0.5], []]),
        (("--mid_t_schedules", "0.9 0.7;0.6", "--steps_per_chunk", "3", "2"), [[0.9, 0.7], [0.6]]),
    ],
)
def test_step_flags(jobs, tmp_path, flags, mids):
    assert report_of(jobs["student"], tmp_path, *flags)["recipe"]["mids"] == mids


def test_other_sampling_flags(jobs, tmp_path):
    student = report_of(jobs["student"], tmp_path, "--sigma_max", "80", "--num_frames", "17", "--fps", "12")
    assert (student["recipe"]["sigma_max"], student["num_frames"], probe(tmp_path / "a.mp4").fps) == (80.0, 17, 12.0)
    noisy = ("--context_from_last_step", "--context_from_last_step_start_chunk", "1", "--ignore_recipe")
    student = report_of(jobs["student"], tmp_path, *noisy)
    assert (student["recipe"]["noisy_context"], student["recipe"]["noisy_context_start_chunk"]) == (True, 1)
    teacher = report_of(jobs["teacher"], tmp_path, "--num_steps", "3", "--guidance_scale", "1", "--timestep_shift", "2")
    assert (teacher["recipe"]["ode_steps"], teacher["recipe"]["guidance"], teacher["recipe"]["shift"]) == (3, 1.0, 2.0)
    unguided = (tmp_path / "a.mp4").read_bytes()
    report_of(jobs["teacher"], tmp_path, "--num_steps", "3", "--guidance_scale", "4", "--timestep_shift", "2")
    assert (tmp_path / "a.mp4").read_bytes() != unguided
    few = report_of(jobs["few"], tmp_path, "--num_steps", "3")
    assert (few["recipe"]["steps"], len(few["chunk_seconds"]), few["num_frames"]) == (3, 1, 11)


def test_timing_runs_come_first(jobs, tmp_path, capsys):
    record = report_of(jobs["student"], tmp_path, "--warmup_iters", "1", "--num_runs", "2")
    timing = record["timing"]
    assert (timing["num_runs"], len(timing["runs"]), timing["num_frames"], timing["peak_memory_gib"]) == (2, 2, 11, None)
    assert timing["fps"] == pytest.approx(11 / (sum(timing["runs"]) / 2))
    assert "timing over 2 runs after 1" in capsys.readouterr().out


def test_first_frames_of_a_clip_are_continued(jobs, tmp_path):
    clip = tmp_path / "clip.mp4"
    write_mp4(clip, torch.rand(3, 7, 4, 4, generator=torch.Generator().manual_seed(1)), fps=8, scale=8)
    out = tmp_path / "a.mp4"
    assert stream(jobs["student"], out, "--first_frames", str(clip), "--upscale", "4") == 0
    kept = torch.nn.functional.avg_pool2d(read_mp4(out), 4)[:, :5]
    given = torch.nn.functional.avg_pool2d(read_mp4(clip), 4)[:, :5]
    assert (kept - given).abs().mean() < 0.1
    image = tmp_path / "i.png"
    Image.new("RGB", (40, 40), (200, 30, 30)).save(image)
    assert stream(jobs["teacher"], out, "--first_frames", str(image)) == 0
    assert read_mp4(out)[0, 0].mean() > 0.3


def test_prompts_come_from_a_file_and_empty_ones_need_a_name(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle moving left\n a blue square moving up \n")
    assert read_prompts(["one"], str(file), allow_empty=False) == ["one", "a red circle moving left", "a blue square moving up"]
    assert read_prompts([""], None, allow_empty=True) == [""]


@pytest.mark.parametrize(
    ("job", "flags", "sentence"),
    [
        ("student", ("--num_frames", "12"), "num_frames=12 does not fit latent blocks of 3, then 3 frames"),
        ("many", ("--num_frames", "12"), "12 frames do not fold with temporal_stride=2"),
        ("student", ("--mid_t_schedules", "1/2"), "--mid_t_schedules needs --steps_per_chunk"),
        ("student", ("--mid_t_schedules", "1/2;1/3", "--steps_per_chunk", "2"), "2 mid-time schedules for 1 entries"),
        ("student", ("--mid_t_schedules", "1/2", "--steps_per_chunk", "4"), "Need 3 mid_t values for 4 steps"),
        ("student", ("--mid_t_schedules", "1/2,half", "--steps_per_chunk", "3"), "cannot read times"),
        ("student", ("--mid_t_schedules", "1/2,3/4", "--steps_per_chunk", "3"), "must decrease strictly"),
        ("student", ("--steps_per_chunk", "2", "--num_steps", "2"), "give one of them"),
        ("student", ("--timestep_shift", "3"), "belongs to many-step sampling"),
        ("student", ("--context_from_last_step",), "--ignore_recipe"),
        ("student", ("--context_from_last_step_start_chunk", "1"), "no effect with clean context"),
        ("teacher", ("--steps_per_chunk", "2"), "kind: the checkpoint was trained for 'ode'"),
        ("many", ("--steps_per_chunk", "2"), "bidirectional"),
        ("few", ("--num_steps", "9"), "not in 1..4"),
        ("few", ("--timestep_shift", "3"), "belongs to many-step sampling"),
        ("student", ("--first_latents", "1"), "give --first_frames FILE"),
        ("student", ("--first_frames", "gone.mp4"), "no video file at gone.mp4"),
        ("student", ("--prompt_file", "gone.txt"), "gone.txt"),
        ("student", ("--prompt", " "), "--prompt number 2 is empty"),
        ("student", ("--prompt", "one two three four five six seven eight nine"), "does not fit text_len=8"),
        ("student", ("--save_path", "a.avi"), "a.avi must end in .mp4"),
        ("student", ("--report", "a.txt"), "a.txt must end in .json"),
    ],
)
def test_user_errors_are_one_sentence_and_exit_with_2(jobs, tmp_path, capsys, job, flags, sentence):
    out = tmp_path / "out.mp4"
    assert stream(jobs.get(job, tmp_path / job), out, *flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["prompts.csv", "prompts.JSONL"])
@pytest.mark.parametrize(
    "read",
    [lambda file: read_prompts(None, file, allow_empty=False), lambda file: _timelines(Namespace(scene_file=None, prompt_file=file))],
)
def test_lines_of_a_table_are_no_prompts(name, read, tmp_path):
    (tmp_path / name).write_text("a red square\n")
    with pytest.raises(ConfigError, match=f"{name} would be read line by line; write a text with a prompt per line$"):
        read(str(tmp_path / name))


def test_no_prompt_and_empty_prompt(jobs, tmp_path, capsys):
    assert stream(jobs["student"], tmp_path / "a.mp4", prompt=None) == 2
    assert "no prompt; give --prompt" in capsys.readouterr().err
    assert stream(jobs["student"], tmp_path / "a.mp4", prompt="") == 2
    assert "--allow_empty_prompt" in capsys.readouterr().err
    assert stream(jobs["student"], tmp_path / "a.mp4", "--allow_empty_prompt", prompt="") == 0


def test_first_frames_off_a_block_boundary(jobs, tmp_path, capsys):
    clip = write_mp4(tmp_path / "clip.mp4", torch.zeros(3, 9, 8, 8), fps=8)
    for job, flags, sentence in (
        ("student", ("--first_latents", "2"), "2 given latent frames do not end on a block"),
        ("student", ("--first_latents", "9"), "has 9 frame(s), 17 are needed"),
        ("student", ("--first_latents", "0"), "at least 1"),
        ("many", (), "needs a causal checkpoint"),
    ):
        assert stream(jobs[job], tmp_path / "a.mp4", "--first_frames", str(clip), *flags) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "a.mp4").exists()
    described, prompts = tmp_path / "a.pt.json", tmp_path / "p.txt"
    (tmp_path / "link.mp4").symlink_to(clip), described.write_text("{}"), prompts.write_text("a red square")
    (tmp_path / "p.json").symlink_to(prompts), (tmp_path / "hard.json").hardlink_to(prompts)
    before = clip.read_bytes()
    for target, *flags in (
        ("link.mp4", "--first_frames", clip),
        ("b.mp4", "--report", described, "--ckpt", tmp_path / "a.pt"),
        ("b.mp4", "--report", tmp_path / "p.json", "--prompt_file", prompts),
        ("b.mp4", "--report", tmp_path / "hard.json", "--prompt_file", prompts),
    ):
        assert stream(jobs["student"], tmp_path / target, *map(str, flags)) == 2
        name = "first_frames" if target == "link.mp4" else flags[2].removeprefix("--")
        assert f" is a file that --{name} reads" in capsys.readouterr().err
    assert clip.read_bytes() == before and described.read_text() == "{}" and prompts.read_text() == "a red square"


def test_an_unwritable_place_is_found_before_the_checkpoint_is_read(jobs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    for out in (tmp_path / "file" / "a.mp4", tmp_path / "folder.mp4"):
        assert stream(tmp_path / "no checkpoint", out) == 2
        said = capsys.readouterr().err
        assert str(out) in said
        assert "cannot write there" in said


def test_a_full_disk_is_found_before_the_checkpoint_is_read(tmp_path, capsys, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert stream(tmp_path / "no checkpoint", tmp_path / "a.mp4") == 2
    assert "No space left on device" in capsys.readouterr().err


def test_a_failed_stream_leaves_an_older_file_as_it_was(jobs, tmp_path, capsys, monkeypatch):
    out = tmp_path / "a.mp4"
    out.write_bytes(b"older")
    monkeypatch.setattr(type(CODEC.stream()), "decode_chunk", lambda self, x: torch.full((1, 3, 5, 8, 8), float("nan")))
    assert stream(jobs["student"], out) == 2
    assert "NaN" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    assert out.read_bytes() == b"older"


def test_ctrl_c_is_one_sentence_and_keeps_what_was_made(jobs, tmp_path, capsys, monkeypatch):
    out, made = tmp_path / "12:30.mp4", []

    def decode(self, x):
        if made:
            raise KeyboardInterrupt
        made.append(1)
        return torch.zeros(1, 3, 5, 8, 8)

    monkeypatch.setattr(type(CODEC.stream()), "decode_chunk", decode)
    assert stream(jobs["student"], out) == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "stopped" and "12:30.partial.mp4" in said[0]
    assert [p.name for p in tmp_path.iterdir()] == ["12:30.partial.mp4"]
    assert probe(tmp_path / "12:30.partial.mp4").num_frames == 5


def test_a_failed_write_says_where_the_frames_are(jobs, tmp_path, capsys, monkeypatch):
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "kept"))
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/bin/false")
    assert stream(jobs["student"], tmp_path / "a.mp4") == 2
    said = capsys.readouterr().err
    [kept] = (tmp_path / "kept").rglob("a.npy")
    assert said.count("\n") == 1 and f"frames are kept in {kept}" in said
    assert not list(tmp_path.glob("*.mp4"))


def test_damaged_checkpoints_exit_with_2(tmp_path, capsys):
    write_checkpoint(tmp_path / "cut")
    model = tmp_path / "cut" / "checkpoints" / "iter_000000007" / "model"
    shard = next(model.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:1000])
    assert stream(tmp_path / "cut", tmp_path / "a.mp4") == 2
    assert "damaged" in capsys.readouterr().err
    (model / ".metadata").write_bytes((model / ".metadata").read_bytes()[:100])
    assert stream(tmp_path / "cut", tmp_path / "a.mp4") == 2
    assert ".metadata cannot be read" in capsys.readouterr().err
    write_checkpoint(tmp_path / "later")
    described = describe_world(world_net(), STUDENT, codec={"name": "pixels"})
    described.write(tmp_path / "later" / "checkpoints" / "iter_000000007" / "rcm.json")
    assert stream(tmp_path / "later", tmp_path / "a.mp4") == 2
    assert "trained on latents of the codec 'pixels'" in capsys.readouterr().err
