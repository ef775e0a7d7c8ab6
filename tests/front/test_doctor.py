"""`rcm doctor` on one rank and on two; the page of questions and the launch recipes hold what they
name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rcm.front import doctor
from rcm.front.commands import COMMANDS
from rcm.nets.attention_dense import Reference
from rcm.nets.attention_packages import Flash3
from tests.hygiene.source import ROOT
from tests.support.dist import run_ranks

LAUNCH = ROOT / "examples" / "launch"


def test_this_machine_is_examined(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    target = tmp_path / "found.json"
    assert doctor.main(["--quick", "--json", str(target)]) == 0
    said, found = capsys.readouterr().out, json.loads(target.read_text())
    assert {entry["name"] for entry in found} >= {"python", "torch", "cores", "memory", "disk", "gpu"}
    assert all(f"{entry['name']}" in said and entry["found"] in said for entry in found)
    assert all(entry["advice"] for entry in found if entry["state"] != "ok")


def test_a_fault_is_told_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert doctor.main(["--quick"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"fault +no-such-pack\w*-?\w* +not installed\n +-> pip install no-such-package", said)
    assert "1 faults" in said


def test_a_section_that_breaks_is_a_fault_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A driver that torch cannot ask, a disk that the system cannot."""

    def usage(path: str) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(doctor.shutil, "disk_usage", usage)
    assert doctor.main(["--quick"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"fault +machine +broke off: OSError: .*Stale file handle", said)
    assert "\ncard\n" in said and "1 faults" in said


def test_back_ends_are_named_with_what_is_missing() -> None:
    [finding] = [f for f in doctor.kernels(torch.device("cpu")) if f.name == "attention"]
    usable, missing = finding.found.split("; not here: ")
    assert "reference" in usable.split(", ") and "flash3 (build FlashAttention-3" in missing


def test_a_package_that_cannot_be_called_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads; so does one of another torch."""

    class Broken(Flash3):
        def __init__(self) -> None:
            pass

        def problem(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
            return f"attention backend 'flash3' fails at its first call, {q.requires_grad}"

    zeros = torch.zeros
    monkeypatch.setattr(doctor, "_kernels_on_card", lambda _: iter(()))
    monkeypatch.setattr(doctor.torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    monkeypatch.setattr(doctor, "BACKENDS", {"flash3": Broken, "reference": Reference})
    warning, usable = doctor.kernels(torch.device("cuda"))
    assert (warning.state, warning.name) == ("warning", "flash3") and warning.found.endswith("first call, True")
    assert usable.found == "reference; not here: none"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("RCM_ATTENTION_BACKEND", "fals3", "unknown attention backend 'fals3' from environment variable"),
        ("RCM_ATTENTION_BACKEND", "flash3", "flash3"),
        ("RCM_ATTENTION_WITHOUT", "fals3", "RCM_ATTENTION_WITHOUT names fals3, which auto never chooses"),
    ],
)
def test_an_environment_that_nothing_starts_in_is_a_fault(name: str, value: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    told = [f for f in doctor.kernels(torch.device("cpu")) if f.state != "ok"]
    assert [(f.state, f.name) for f in told] == [("fault", "auto")] and found in told[0].found


def test_variables_are_told_and_secrets_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RCM_TOKEN", "TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "IMAGINAIRE_OUTPUT_ROOT"):
        monkeypatch.setenv(name, "s3cret" if name == "RCM_TOKEN" else "x")
    [told] = [f.found for f in doctor.machine() if f.name == "environment"]
    assert "s3cret" not in told and "RCM_TOKEN=(set)" in told
    assert all(f"{name}=x" in told for name in ("TRITON_INTERPRET", "NVIDIA_TF32_OVERRIDE", "IMAGINAIRE_OUTPUT_ROOT"))


def test_an_interface_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nope")
    assert doctor.main(["--quick"]) == 2
    said = capsys.readouterr().err
    assert "GLOO_SOCKET_IFNAME=nope names no network interface" in said and "Traceback" not in said


def _two_ranks() -> None:
    rank = dist.get_rank()
    facts = doctor._facts(torch.device("cpu"))
    told = list(doctor.agreement(facts))
    assert [(f.name, f.state) for f in told] == [("ranks", "ok")] and "2 on 1 machine" in told[0].found
    differ = list(doctor.agreement(facts | {"torch": f"2.{rank}"}))
    assert [(f.name, f.state) for f in differ] == [("ranks", "ok"), ("torch", "fault")]
    assert "2.0 on rank 0" in differ[1].found and "2.1 on rank 1" in differ[1].found
    shared = list(doctor.agreement(facts | {"card": 0}))
    assert shared[-1].state == "fault" and "share a card" in shared[-1].found
    timed = {f.name: f for f in doctor.links(torch.device("cpu"))}
    assert set(timed) == {"all-gather", "all-reduce", "latency"} and dist.get_world_size() == 2


@pytest.mark.dist
def test_ranks_are_compared_and_their_links_timed(tmp_path: Path) -> None:
    run_ranks(2, _two_ranks, tmp_path=tmp_path)


def test_questions_are_counted_and_name_what_exists() -> None:
    page = (ROOT / "docs" / "questions.md").read_text()
    assert [int(n) for n in re.findall(r"^\*\*(\d+)\. ", page, re.MULTILINE)] == list(range(1, 30))
    words = set(re.findall(r"`rcm ([a-z]+)", page)) | set(re.findall(r"-m rcm ([a-z]+)", page))
    assert words and words <= set(COMMANDS)


@pytest.mark.parametrize("name", ["slurm.sbatch", "machines.sh"])
def test_launch_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)


def test_a_launch_script_asks_for_what_it_needs() -> None:
    told = subprocess.run(["bash", str(LAUNCH / "machines.sh")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"}, check=False)
    assert told.returncode != 0 and "number of machines" in told.stderr


@pytest.mark.parametrize(
    ("first", "own", "place"),
    [
        ("127.0.0.1", "", "--local_addr=127.0.0.1 --rdzv_conf=is_host=1"),
        ("10.0.0.1", "10.0.0.1", "--local_addr=10.0.0.1 --rdzv_conf=is_host=1"),
        ("10.0.0.1", "10.0.0.2", "--local_addr=10.0.0.2 --rdzv_conf=is_host=0"),
        ("node-1", "10.0.0.1", ""),
    ],
)
def test_a_machine_knows_its_own_address(first: str, own: str, place: str, tmp_path: Path) -> None:
    """Where /etc/hosts leads the host name to loopback, torchrun does not: nobody kept the list."""
    for name, line in ({"torchrun": 'echo "$@"'} | ({"python3": f"echo {own}"} if own else {})).items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FIRST": first, "MACHINES": "2"}
    told = subprocess.run(
        ["bash", str(LAUNCH / "machines.sh"), "experiment=x", "a=b c"], capture_output=True, text=True, env=env, check=True
    ).stdout
    words = "--nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_id=rcm"
    assert told.split() == f"{words} --rdzv_endpoint={first}:29500 {place} -m rcm train experiment=x a=b c".split()


def test_a_step_of_slurm_has_the_cores_of_its_task(tmp_path: Path) -> None:
    for name, line in {"scontrol": "printf 'n1\\nn2\\n'", "srun": 'echo "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "EXPERIMENT": "x", "SLURM_JOB_NODELIST": "n[1-2]"}
    env |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "64"}
    told = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), "k=v"], capture_output=True, text=True, env=env, check=True
    ).stdout.splitlines()
    assert all(line.startswith("--kill-on-bad-exit=1 --cpus-per-task=64 torchrun --nnodes=2 ") and "=n1:29500 " in line for line in told)
    assert [line.partition(" -m ")[2] for line in told] == ["rcm doctor --quick", "rcm train experiment=x k=v"]


def test_the_job_of_kubernetes_is_whole() -> None:
    yaml = pytest.importorskip("yaml")
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    template = job["spec"]["template"]["spec"]
    [container] = template["containers"]
    assert container["command"][0] == "torchrun" and template["subdomain"] == service["metadata"]["name"]
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in template["volumes"]}
    [experiment] = [word.split("=")[1] for word in container["command"] if word.startswith("experiment=")]
    family = experiment.rsplit("_c3-3", 1)[0].removeprefix("causal_wan2pt1_1pt3B_res480p_t2v_")
    assert any(family in path.read_text() for path in (ROOT / "configs" / "experiment").glob("*.yaml"))
