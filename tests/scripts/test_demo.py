"""The demo's frame: what it may delete, what it remembers, how it counts time, what its page holds;
stopped and continued, end to end.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from rich.console import Console

from rcm.core.errors import ConfigError
from rcm.evaluation.throughput import processor
from rcm.train.job_lock import job_lock
from scripts import demo, demo_progress, demo_threads
from scripts.demo_clips import mosaic, picks, teacher_of
from scripts.demo_page import verdict, write_page
from scripts.demo_progress import Board
from scripts.demo_record import FILE_NAME, Record
from scripts.demo_run import Demo, Stopped, checkpointed_iteration, last_iteration
from scripts.demo_stages import STAGES, branches, flat
from scripts.demo_threads import free_threads
from tests.hygiene.source import ROOT
from tests.support.processes import begin

SETTINGS = {"quick": False, "scale": 1.0, "videos": 96}


def refused(capsys, *flags: str) -> str:
    assert demo.main(list(flags)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_nothing_of_others_is_deleted_and_flags_are_checked_first(tmp_path, capsys) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    Record.open(mine, SETTINGS)
    (mine / "video").write_text("")
    for flags, words in (
        (["--out", str(theirs), "--fresh"], "holds files that no demo wrote"),
        (["--out", str(mine), "--fresh", "--scale=0"], "must be positive"),
        (["--out", f"{mine}\udcff"], "is not UTF-8; choose another name"),
        (["--out", str(mine), "--scale", "0.5"], "holds a demo with other settings (scale 1.0 there, 0.5 here); begin anew with --fresh"),
    ):
        assert words in refused(capsys, *flags)
    assert (theirs / "thesis.tex").read_text() == "years of work"
    assert (mine / "video").exists()
    opened(mine, "--fresh", "--scale", "0.5")
    assert [p.name for p in mine.iterdir()] == [FILE_NAME]


def opened(folder: Path, *flags: str) -> Record:
    args = demo._parser().parse_args(["--out", str(folder), *flags])
    return demo._open(args, demo._folder(args))


def test_a_folder_is_one_demos_and_stays_a_demos(tmp_path, capsys, monkeypatch) -> None:
    """A second demo is refused; one that is emptied stays one until the end; a link is followed
    into, and a name that is no value of a command line is refused.
    """
    mine, link = tmp_path / "mine", tmp_path / "link"
    Record.open(mine, SETTINGS)
    (mine / "runs").mkdir()
    link.symlink_to(mine)
    with job_lock(mine):
        said = refused(capsys, "--out", str(link), "--fresh")
        assert f"{link} is in use by process {os.getpid()}" in said and "choose another --out" in said
    assert (mine / "runs").is_dir()
    gone: list[str] = []
    monkeypatch.setattr(demo, "discard", lambda path: gone.append(path.name))
    opened(link, "--fresh")
    assert gone == ["runs", FILE_NAME]
    for odd in ("a,b", "${x}", "x[1]"):
        assert "cannot be a value" in refused(capsys, "--out", str(tmp_path / odd))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f"{FILE_NAME}.writing").touch()  # killed while it began
    assert opened(tmp_path / "begun").stages == {}


def test_record_is_kept_and_a_damaged_one_is_refused(tmp_path) -> None:
    record = Record.open(tmp_path / "a", SETTINGS)
    record.stage("tf_c1-1")["trained"], record.seconds = True, 12.5
    record.write()
    again = Record.open(tmp_path / "a", SETTINGS)
    assert (again.seconds, again.stages["tf_c1-1"]["trained"], again.is_scored("tf_c1-1")) == (12.5, True, False)
    for damaged in ("{", '{"settings": {}, "seconds": 1, "stages": 3}', "[]", '{"settings": {}, "seconds": "x", "stages": {}}'):
        (tmp_path / "a" / FILE_NAME).write_text(damaged)
        with pytest.raises(ConfigError, match="is not the record of a demo"):
            Record.open(tmp_path / "a", SETTINGS)


def test_time_left_follows_the_longest_way_at_the_pace_so_far(monkeypatch) -> None:
    """Two branches side by side: what the shorter one still has does not count."""
    clock = [1000.0]
    monkeypatch.setattr(demo_progress.time, "monotonic", lambda: clock[0])
    chosen = branches(quick=False)
    said = io.StringIO()
    board = Board(chosen, console=Console(file=said, width=200))
    board.resume({stage.name: 1.0 for stage in chosen[0]})
    costs = [sum(sum(stage.cost) for stage in one) for one in chosen]
    clock[0] += 100
    longest = max(chosen[1:], key=lambda one: sum(sum(stage.cost) for stage in one))
    other = next(one for one in chosen[1:] if one is not longest)
    for one in (longest, other):
        share = 50 / sum(one[0].cost)
        board.update(one[0].name, share, "iteration 1 of 2")
    assert board.left() == pytest.approx((max(costs[1:]) - 50) * 100 / 50)
    board.show()
    board.update(longest[0].name, 1.0, "done")
    board.show()
    lines = said.getvalue().splitlines()
    assert len(lines) == 1, "no second line within PLAIN_EVERY"
    assert f"{board.number(longest[0].name)}  {longest[0].name}" in lines[0]
    assert board.number(flat(chosen)[-1].name) == "stage 9 of 9"
    for term, lines in (("dumb", 1), ("xterm", 0)):  # no bars can be drawn on the first
        console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": term})
        Board(chosen, console=console).show()
        assert console.file.getvalue().count("all 0%") == lines


def test_threads_leave_busy_cores_alone(monkeypatch, tmp_path) -> None:
    """Idle cores are counted over a moment; the load average, which remembers what has ended, is
    asked only where there is no count.
    """
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (7.0, 0, 0), raising=False)
    stat, ticks = tmp_path / "stat", os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(demo_threads, "PROC_STAT", stat)
    for idle, threads in ((2.0, 2), (1.4, 1), (0.1, 1), (63.0, 2)):

        def waits(seconds: float, idle: float = idle) -> None:
            stat.write_text(f"cpu  10 0 10 {round(1000 + idle * seconds * ticks)} 30 0 0 0 0 0\n")

        waits(0)
        monkeypatch.setattr(demo_threads.time, "sleep", waits)
        assert free_threads() == threads
    stat.unlink()
    for load, threads in ((0.1, 2), (0.9, 1), (7.0, 1)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0), raising=False)
        assert free_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert free_threads() == 3


def test_branches_hold_every_stage_once_and_wait_for_what_feeds_them(tmp_path) -> None:
    """Branches that wait for each other must not lock, whichever is ahead."""
    first, *others = (list(one) for one in branches(quick=False))
    assert sorted(s.name for one in (first, *others) for s in one) == sorted(s.name for s in STAGES)
    done: set[str] = set()
    for running in ([first], others):
        while any(running):
            ready = next((one for one in running if one and done.issuperset(one[0].feeds.values())), None)
            assert ready, f"locked: {[one[0].name for one in running if one]}"
            done.add(ready.pop(0).name)
    record = Record.open(tmp_path, SETTINGS)
    made = Demo(record, Board(branches(quick=False)), scale=1.0, num_videos=8, changed=lambda: None)
    waiter = threading.Thread(target=made.wait_for, args=(["tf_c3-3"],), daemon=True)
    waiter.start()
    waiter.join(0.5)
    assert waiter.is_alive()
    record.stage("tf_c3-3")["trained"] = True
    waiter.join(10)
    assert not waiter.is_alive()
    training, asked = mock.Mock(), []
    training.send_signal = asked.append
    made._running.add(training)
    for _ in range(3):
        made.stop()
    assert asked == [signal.SIGTERM], "a second signal would end it unsaved"
    with pytest.raises(Stopped):
        made.wait_for(["tf_c1-1"])


def test_positions_are_read_from_what_a_run_writes(tmp_path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_iteration(metrics) == 0 and checkpointed_iteration(tmp_path) is None
    metrics.write_text('{"step": 10}\n{"step": 20}\n{"st')
    assert last_iteration(metrics) == 20
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000300\n")
    assert checkpointed_iteration(tmp_path) == 300
    made = Demo(Record.open(tmp_path / "demo", SETTINGS), Board(branches(True)), scale=1.0, num_videos=500, changed=lambda: None)
    made.run("x").mkdir(parents=True)
    (made.run("x") / "metrics.jsonl").write_text('{"step": 10, "loss/d": 2.0}\n{"step": 20, "lo')
    assert made.history("x") == {"d": [[10, 2.0]]} and len(made.prompts) == 500


def test_mosaic_places_videos_in_rows() -> None:
    videos = torch.arange(4.0).view(4, 1, 1, 1, 1).expand(4, 3, 2, 8, 8) / 4
    tiled = mosaic(videos, rows=2, scale=8)
    assert tiled.shape == (3, 2, 2 * 68, 2 * 68)
    assert [float(tiled[0, 0, y, x]) for y, x in ((34, 34), (34, 102), (102, 34), (102, 102))] == [0.0, 0.25, 0.5, 0.75]
    assert all(len(set(picks(num))) == 6 for num in range(8, 400))
    assert [teacher_of(name) for name in ("bidirectional", "tf_c1-1", "sf_dmd_c3-3")] == [
        None,
        ("bidirectional", "many steps"),
        ("tf_c3-3", "many steps"),
    ]


def scored(score: float, labels=("4 steps", "2 steps", "1 step")) -> dict:
    plan = {
        "scores": dict.fromkeys(("joint", "colour", "shape", "direction", "motion", "realism", "diversity"), 0.9) | {"score": score},
        "speed": {"first_chunk": 0.1, "later_chunks": 0.01, "fps": 50.0},
    }
    return {"trained": True, "train_seconds": 9.0, "score_seconds": 1.0, "plans": dict.fromkeys(labels, plan), "drift": {}, "scored": True}


def test_page_tells_what_is_done_and_what_is_not(tmp_path) -> None:
    stages = flat(branches(quick=False))
    record = Record.open(tmp_path, SETTINGS)
    record.stages = {"bidirectional": scored(90.0, ["many steps"]), "tf_c1-1": scored(95.0, ["many steps"]), "tf_dcm_c1-1": scored(94.0)}
    made = Demo(record, Board(branches(quick=False)), scale=1.0, num_videos=96, changed=lambda: None)
    page = write_page(made, stages, judged=True, status="3 of 9 stages done").read_text()
    data = json.loads((tmp_path / "report.json").read_text())
    gates = {stage["name"]: stage["passed"] for stage in data["stages"]}
    assert [gates[n] for n in ("bidirectional", "tf_c1-1", "tf_dcm_c1-1", "sf_dmd_c1-1")] == [True, True, True, None]
    assert "3 of 9 stages done" in page and "All 3 gates passed" in page
    (chart,) = [c for c in data["charts"] if c["title"].endswith("c1-1")]
    assert {line["name"]: len(line["points"]) for line in chart["lines"]} == {"bidirectional": 1, "tf": 1, "tf_dcm": 3}
    assert all(stage["expect"] and stage["about"] for stage in data["stages"])
    assert data["machine"]["processor"] == processor() not in ("", "x86_64")
    assert verdict(stages[-1], made.scores(), judged=True)[1] is None
    assert "A slow teacher is distilled" in page


def test_a_page_of_one_stage_says_nothing_of_others(tmp_path) -> None:
    """No teacher above it, none training beside it, none that it starts from."""
    chosen = branches(quick=True)
    record = Record.open(tmp_path, SETTINGS)
    record.stages = {"tf_c1-1": scored(70.0, ["many steps"])}
    made = Demo(record, Board(chosen), scale=1.0, num_videos=96, changed=lambda: None)
    page = write_page(made, flat(chosen), judged=False).read_text()
    for untrue in ("Above its teacher", "is distilled", "Begins with trained weights", "Stages were training"):
        assert untrue not in page
    assert "One stage alone" in page and "From left to right" in (tmp_path / "report.json").read_text()


@pytest.mark.slow
def test_ctrl_c_is_one_sentence_and_the_same_command_continues(tmp_path) -> None:
    """Interrupted while training: the run saves, the demo ends with 130, and the second call goes
    on from the saved iteration.
    """
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "rcm", "demo", "--quick", "--scale", "0.4", "--videos", "8", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = begin(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    metrics = out / "runs" / "tf_c1-1" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while last_iteration(metrics) < 10 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert said == "stopped at stage 1 of 1 (tf_c1-1); the same command continues there, --fresh begins anew\n"
    saved = checkpointed_iteration(out / "runs" / "tf_c1-1")
    total = round(0.4 * 1000)
    assert saved is not None and 10 <= saved < total
    before = json.loads((out / FILE_NAME).read_text())["seconds"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert f"resumed at iteration {saved}" in (out / "logs" / "tf_c1-1.log").read_text()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == total
    assert json.loads((out / FILE_NAME).read_text())["seconds"] > before
    assert "data:video/mp4" in (out / "report.html").read_text()
    assert f"next: rcm stream --ckpt {out}/runs/tf_c1-1" in done.stdout
