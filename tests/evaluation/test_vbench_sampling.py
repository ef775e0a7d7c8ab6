"""Sampling of a suite: names, shares, seeds, refusals; a run killed and resumed, on one rank or on
two, makes the same files.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rcm.core.errors import ConfigError, NonFinite
from rcm.evaluation import vbench_manifest
from rcm.evaluation.vbench_manifest import RunFolder, beside, read_manifest
from rcm.evaluation.vbench_prompts import T2V_FILE, SuiteItem, by_dimension, placed_extensions, read_rows, read_suite, with_extended
from rcm.evaluation.vbench_sampling import ClipRequest, Share, SuiteRun, sample_suite
from rcm.pipelines.video_io import VideoError, probe, read_mp4
from scripts.vbench_sample import ASSETS, main
from tests.support.processes import begin
from tests.support.tiny_checkpoint import write_checkpoint

COUNTS = {
    "human_action": 100,
    "temporal_style": 100,
    "aesthetic_quality": 93,
    "imaging_quality": 93,
    "overall_consistency": 93,
    "appearance_style": 90,
    "scene": 86,
    "background_consistency": 86,
    "color": 85,
    "spatial_relationship": 84,
    "multiple_objects": 82,
    "object_class": 79,
    "temporal_flickering": 75,
    "motion_smoothness": 72,
    "dynamic_degree": 72,
    "subject_consistency": 72,
}
FLAGS = ["--no_augmented_prompt", "--num_samples", "1", "--device", "cpu"]


class Noise:
    """A sampler of noise, the function of text and seed that it should be."""

    fps = 16.0

    def __init__(self, **settings: object) -> None:
        self.settings = {"sampler": "noise", **settings}
        self.asked: list[ClipRequest] = []
        self.prepared: list[str] = []

    def prepare(self, texts: list[str]) -> None:
        self.prepared = texts

    def sample(self, request: ClipRequest) -> torch.Tensor:
        self.asked.append(request)
        generator = torch.Generator().manual_seed(request.seed)
        return torch.rand(3, 2, 16, 16, generator=generator) * 2 - 1


def items(count: int = 3) -> list[SuiteItem]:
    return [SuiteItem(f"prompt {i}", ("scene",), extended=f"a long text for {i}") for i in range(count)]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_public_list_is_the_benchmarks() -> None:
    suite = read_suite(ASSETS / T2V_FILE)
    assert (len(read_rows(ASSETS / T2V_FILE)), len(suite)) == (946, 944)
    assert {name: len(members) for name, members in by_dimension(suite).items()} == COUNTS
    names = {item.video_name(i) for item in suite for i in range(5)}
    assert len(names) == 4720 and max(len(name.encode()) for name in names) == 216
    assert "A 3D model of a 1800s victorian house.-0.mp4" in names, "the whole prompt with its last dot"
    assert sum(bool(item.auxiliary_info) for item in suite) == 506
    ukiyo = next(item for item in suite if "Hokusai" in item.prompt and "overall_consistency" in item.dimensions)
    assert "appearance_style" in ukiyo.dimensions, "prompts of two suites are one item of both"


def test_extended_prompts_by_line_and_by_name(tmp_path: Path) -> None:
    listed = ASSETS / T2V_FILE
    rows, suite = read_rows(listed), read_suite(listed)
    lines = tmp_path / "all_augmented.txt"
    # no newline at the end, as published
    lines.write_text("\n".join(f"extended {i}" for i in range(946)))
    found = with_extended(suite, lines, rows=rows)
    twice = next(i for i, item in enumerate(suite) if rows.count(item.prompt) == 2)
    assert found[0].text == "extended 0" and found[0].video_name(0).startswith(suite[0].prompt)
    assert found[twice].text == f"extended {945 - rows[::-1].index(suite[twice].prompt)}", "the later text of a prompt listed twice"
    lines.write_text("one line")
    with pytest.raises(ConfigError, match=r"has 1 lines, the prompt list has 946"):
        with_extended(suite, lines, rows=rows)
    named = tmp_path / "prompts_augmented.json"
    named.write_text(json.dumps([{"prompt": suite[0].prompt, "dimensions": ["scene"], "augmented_prompt": "more"}]))
    assert with_extended(suite[:1], named, rows=rows)[0].text == "more"
    with pytest.raises(ConfigError, match=r"no extended prompt for 1 of 2 prompts, the first is"):
        with_extended(suite[:2], named, rows=rows)
    with pytest.raises(ConfigError, match=r"holds all_augmented.txt, prompts_augmented.json; name one"):
        placed_extensions(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "not JSON"),
        ("[]", "lists no prompt"),
        ('[{"dimension": ["scene"]}]', "entry 0 has no text"),
        ('[{"prompt": "a", "dimension": [1]}]', "dimension is a list of words"),
        ('[{"prompt": "a", "augmented_prompt": " "}]', "empty augmented_prompt"),
        ('[{"prompt": "a/b"}, {"prompt": "a-b"}]', "the same file 'a-b-0.mp4'"),
        ('[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' is given twice"),
        ('[{"prompt": "a", "image_name": 5}]', "image_name, image_type are strings"),
        ('[{"prompt": "a", "augmented_prompt": "\\ud83d"}]', "half a character"),
        (json.dumps([{"prompt": "x" * 260}]), "a file name of 266 bytes"),
    ],
)
def test_bad_lists_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_suite(tmp_path / "list.json")


def test_samples_seeds_and_records(tmp_path: Path) -> None:
    sampler, run = Noise(), SuiteRun(items(), tmp_path / "v", num_samples=2, seed=7)
    assert sample_suite(run, sampler)
    assert sampler.asked == [ClipRequest(item.text, 7 + i) for item in run.items for i in range(2)]
    assert sorted(p.name for p in run.folder.iterdir()) == sorted(f"prompt {k}-{i}.mp4" for k in range(3) for i in range(2))
    first, other = (read_mp4(run.folder / f"prompt {k}-1.mp4") for k in (0, 2))
    assert torch.equal(first, other), "the noise is the same over prompts"
    assert probe(run.folder / "prompt 0-0.mp4").fps == 16
    manifest = read_manifest(run.folder)
    record = manifest["videos"]["prompt 1-1.mp4"]
    assert (record["seed"], record["text"], record["frames"]) == (8, "a long text for 1", 2)
    assert record["sha256"] == hashes(run.folder)["prompt 1-1.mp4"]
    assert manifest["runs"][0]["versions"]["torch"] == torch.__version__ and "commit" in manifest["runs"][0]
    rows = json.loads((tmp_path / "v_run" / "vbench_eval_info.json").read_text())
    files = [str(run.folder / f"prompt 0-{i}.mp4") for i in (0, 1)]
    assert rows[0] == {"prompt_en": "prompt 0", "dimension": ["scene"], "video_list": files}
    again = Noise()
    assert sample_suite(run, again) and not again.asked and not again.prepared, "existing files are skipped"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sampler": {"shift": 5.0}}, r"shift=3.0, now it is 5.0"),
        ({"seed": 1}, r"seed=0, now it is 1"),
        ({"text": True}, r"made from another prompt text"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    run = SuiteRun(items(), tmp_path / "v", num_samples=1)
    sample_suite(run, Noise(shift=3.0, steps=4))
    before = hashes(run.folder)
    changed = replace(run, seed=change.get("seed", 0))
    if "text" in change:
        changed = replace(run, items=[replace(item, extended="another") for item in run.items])
    with pytest.raises(ConfigError, match=told):
        sample_suite(changed, Noise(**{"shift": 3.0, "steps": 4, **change.get("sampler", {})}))
    assert hashes(run.folder) == before
    assert sample_suite(replace(run, num_samples=2), Noise(shift=3.0, steps=4)), "more samples of the same settings may be added"


def test_unknown_and_damaged_files_are_refused(tmp_path: Path) -> None:
    run = SuiteRun(items(), tmp_path / "v", num_samples=1)
    run.folder.mkdir()
    (run.folder / "foreign.mp4").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"videos but no record"):
        sample_suite(run, Noise())
    (run.folder / "foreign.mp4").unlink()
    sample_suite(run, Noise())
    path = run.folder / "prompt 1-0.mp4"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(VideoError, match=r"has 100 bytes, \d+ were written"):
        sample_suite(run, Noise())


def test_ranks_come_in_any_order_and_one_folder_has_one_run(tmp_path: Path) -> None:
    run = SuiteRun(items(), tmp_path / "v", num_samples=1)
    assert not sample_suite(run, Noise(), share=Share(1, 2))
    held = RunFolder(run.folder)
    held.begin({"sampler": "noise", "seed": 0, "fps": 16.0, "crf": 12}, run={})
    with pytest.raises(ConfigError, match=r"is being sampled by another process at this moment \(it holds .*videos_rank0.jsonl"):
        sample_suite(run, Noise(), share=Share(0, 2))
    held.close()
    assert sample_suite(run, Noise(), share=Share(0, 2)), "rank 0 may come after videos of another rank"
    manifest = read_manifest(run.folder)
    assert len(manifest["videos"]) == 3 and [entry.get("ranks") for entry in manifest["runs"]] == [None, 2]


def test_what_a_run_left_unfinished_is_known(tmp_path: Path) -> None:
    """Records count before the suite is complete; a file without one must play; a first frame is
    part of what a video was made from.
    """
    images = tmp_path / "images"
    images.mkdir()
    listed = [replace(item, image_name=f"{i}.jpg") for i, item in enumerate(items())]
    for item in listed:
        (images / item.image_name).write_bytes(b"one")
    run = SuiteRun(listed, tmp_path / "v", num_samples=1, image_dir=images)
    assert not sample_suite(run, Noise(), share=Share(0, 2))
    assert list(read_manifest(run.folder)["videos"]) == ["prompt 0-0.mp4", "prompt 2-0.mp4"]
    (run.folder / "prompt 1-0.mp4").write_bytes(b"")
    assert sample_suite(run, Noise()) and probe(run.folder / "prompt 1-0.mp4").num_frames == 2, "made again"
    (images / "2.jpg").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"prompt 2-0.mp4 was made from another first frame"):
        sample_suite(run, Noise())


def test_the_commit_is_never_that_of_a_project_around_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(vbench_manifest, "__file__", str(tmp_path / "site" / "rcm" / "evaluation" / "x.py"))
    assert vbench_manifest.code_commit() is None


def test_a_video_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Noise, "sample", lambda self, request: torch.full((3, 2, 16, 16), float("nan")))
    with pytest.raises(NonFinite, match=r"prompt 0-0.mp4 \(seed 7\): video holds NaN"):
        sample_suite(SuiteRun(items(), tmp_path / "v", num_samples=1, seed=7), Noise())


def test_a_video_made_again_by_another_rank_has_its_last_record(tmp_path: Path) -> None:
    run = SuiteRun(items(2), tmp_path / "v", num_samples=1)
    assert [sample_suite(run, Noise(), share=Share(rank, 2)) for rank in (0, 1)] == [False, True]
    (run.folder / "prompt 1-0.mp4").unlink()
    log = tmp_path / "v_run" / "videos_rank1.jsonl"
    log.write_text(log.read_text().replace('"bytes": ', '"bytes": 1'))  # as another machine writes it
    assert sample_suite(run, Noise()) and sample_suite(run, Noise())
    assert read_manifest(run.folder)["videos"]["prompt 1-0.mp4"]["bytes"] == (run.folder / "prompt 1-0.mp4").stat().st_size


def test_records_lie_beside_the_folder_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v" / "inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "v" / "inner")
    assert [beside(Path(name)) for name in ("..", "../../v/", ".")] == [
        tmp_path / "v_run",
        Path("../../v_run"),
        tmp_path / "v" / "inner_run",
    ]
    with pytest.raises(ConfigError, match="nothing can lie beside /"):
        beside(Path("/"))
    run = SuiteRun(items(1), Path("."), num_samples=1)
    assert sample_suite(run, Noise()) and (tmp_path / "v" / "inner_run" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("[]", "has format None"),
        ('{"format": 2}', "has format 2"),
        ('{"format": 1, "runs": []}', "no settings and no videos"),
        ('{"format": 1, "runs": [], "settings": {}, "videos": {"a.mp4": {"seed": 1}}}', "it has a video that is none .*missing"),
        ('{"format": 1, "runs": [], "settings": {}, "videos": {"a.mp4": null}}', "it has a video that is none"),
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=told):
        read_manifest(tmp_path)


def test_a_cut_record_is_no_record(tmp_path: Path) -> None:
    run = SuiteRun(items(), tmp_path / "v", num_samples=1)
    sample_suite(run, Noise())
    log = tmp_path / "v_run" / "videos_rank0.jsonl"
    odd = '{"file": "prompt 0-0.mp4", "sample": 0, "seed": 0, "text": 3, "bytes": "9", "sha256": "", "recorded": "late"}'
    log.write_text(log.read_text()[:-30] + '"}\n{}\n[1]\n' + odd)
    sample_suite(run, Noise())
    assert set(read_manifest(run.folder)["videos"]) == {f"prompt {i}-0.mp4" for i in range(3)}
    again = RunFolder(run.folder)
    again.begin({"sampler": "noise", "seed": 0, "fps": 16.0, "crf": 12}, run={})
    assert again.has("prompt 2-0.mp4", text="a long text for 2", seed=0, sample=0)


@pytest.mark.parametrize(("world", "cp"), [(1, 1), (3, 1), (6, 2)])
def test_shares_cover_the_suite_once(monkeypatch: pytest.MonkeyPatch, world: int, cp: int) -> None:
    taken: list[str] = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        share = Share.of_launch(cp_size=cp)
        taken += [item.prompt for item in share.of(items(8))] if share.cp_rank == 0 else []
    assert sorted(taken) == [item.prompt for item in items(8)]
    with pytest.raises(ConfigError, match=r"--cp_size 4 must divide"):
        Share.of_launch(cp_size=4)


def command(out: Path, checkpoint: Path, *more: str) -> list[str]:
    where = ["--dit_path", str(checkpoint), "--output_dir", str(out)]
    return [sys.executable, "-m", "scripts.vbench_sample", *where, *FLAGS, "--max_prompts", "20", *more]


def start(words: list[str], *, rank: int = 0, world: int = 1) -> subprocess.Popen:
    environment = {"RANK": str(rank), "WORLD_SIZE": str(world)}
    return begin(words, environment=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_killed_and_resumed_on_one_rank_and_on_two(tmp_path: Path) -> None:
    """A 20-prompt slice with a tiny Wan: whole in one go; killed in the middle and resumed by two
    ranks; the same bytes.
    """
    job = tmp_path / "job"
    write_checkpoint(job)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(command(whole, job)).wait(300) == 0
    victim = start(command(broken, job))
    deadline = time.monotonic() + 120
    while len(list(broken.glob("*.mp4"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    left = hashes(broken)
    assert 6 <= len(left) < 20, "killed in the middle"
    assert not [name for name in left if name.startswith(".") or "partial" in name], "only whole videos under their names"
    ranks = [start(command(broken, job), rank=rank, world=2) for rank in (0, 1)]
    assert [process.wait(300) for process in ranks] == [0, 0]
    assert hashes(broken) == hashes(whole) and len(hashes(whole)) == 20
    assert left.items() <= hashes(whole).items()
    videos = [read_manifest(folder)["videos"] for folder in (whole, broken)]
    assert [{k: v["sha256"] for k, v in held.items()} for held in videos] == [hashes(whole)] * 2
    refused = start([*command(broken, job), "--seed", "1"])
    assert refused.wait(300) == 2 and "seed=0, now it is 1" in refused.stderr.read()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "no file of extended prompts"),
        (["--no_augmented_prompt", "--augmented_prompts", "x"], "contradict each other"),
        (["--no_augmented_prompt", "--suite", "i2v"], "place it there, name one with --prompt_json FILE"),
        (["--no_augmented_prompt", "--image_dir", "x"], "--image_dir belong to --suite i2v"),
        (["--no_augmented_prompt", "--dimension", "colour"], "--dimension colour is not in"),
        (["--no_augmented_prompt", "--max_prompts", "0"], "--max_prompts 0 must be at least 1"),
        (["--no_augmented_prompt", "--chunk_t", "3"], "--chunk_t would have no effect"),
        (["--no_augmented_prompt", "--arch", "bidirectional"], "is causal"),
        (["--no_augmented_prompt", "--num_samples", "0"], "--num_samples 0 must be at least 1"),
        (
            ["--no_augmented_prompt", "--output_dir", str(Path(__file__) / "x")],
            "test_vbench_sampling.py is no folder; choose another folder",
        ),
        (["--no_augmented_prompt", "--output_dir", "~/videos"], "--output_dir ~/videos would be in a folder called ~; write /"),
    ],
)
def test_flags_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], told: str) -> None:
    write_checkpoint(tmp_path / "job")
    assert main(["--dit_path", str(tmp_path / "job"), "--device", "cpu", "--output_dir", str(tmp_path / "o"), *flags]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()
