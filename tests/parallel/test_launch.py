"""What a launcher says of this process: read in one place, and refused in one sentence where no
launcher says it.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from rcm.core.errors import ConfigError
from rcm.evaluation.vbench_sampling import Share, group_of_video
from rcm.parallel import launch
from rcm.parallel.agree import sentence
from rcm.parallel.launch import Launch, is_first, launched_world, this_launch
from rcm.parallel.mesh import process_group
from tests.hygiene.source import ROOT, files, name
from tests.support.dist import run_until_death

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
WRONG = {
    "no number": ({"RANK": "x", "WORLD_SIZE": "2"}, "environment variable RANK='x' must be a whole number"),
    "negative": ({"RANK": "-1", "WORLD_SIZE": "2"}, "environment variable RANK='-1' must be a whole number"),
    "fraction": ({"RANK": "0", "WORLD_SIZE": "2.0"}, "environment variable WORLD_SIZE='2.0' must be a whole number"),
    "world of nobody": ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0 must be at least 1"),
    "beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be at least 0 and below WORLD_SIZE=2"),
    "rank alone": ({"RANK": "0"}, "RANK is set in the environment, WORLD_SIZE is not"),
    "world alone": ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set in the environment, RANK is not"),
    "place": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "gpu0"}, "environment variable LOCAL_RANK='gpu0' must be a whole number"),
    "beyond numbers": ({"RANK": "0", "WORLD_SIZE": "9" * 20}, f"environment variable WORLD_SIZE='{'9' * 20}' must be a whole number"),
    "machine of nobody": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0 must be from 1 to WORLD_SIZE=2"),
    "beyond the launch": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3 must be from 1 to WORLD_SIZE=2"),
    "beyond the machine": (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"},
        "LOCAL_RANK=2 must be at least 0 and below 2, the ranks of its machine",
    ),
}


@pytest.fixture
def environ(monkeypatch: pytest.MonkeyPatch):
    """Sets the launcher's variables to exactly these."""

    def given(**values: str) -> None:
        for key in NAMES:
            monkeypatch.delenv(key, raising=False)
        for key, value in values.items():
            monkeypatch.setenv(key, value)

    return given


def test_what_launchers_say(environ) -> None:
    environ()
    assert this_launch() == Launch() == Launch(0, 1, 0, False)
    environ(RANK="3", WORLD_SIZE="8", LOCAL_RANK="1")
    assert this_launch() == Launch(3, 8, 1, True) and launched_world() == 8 and not is_first()
    environ(RANK="0", WORLD_SIZE="1")
    assert this_launch() == Launch(0, 1, 0, True) and is_first()
    environ(RANK="", WORLD_SIZE="")  # as some shells leave a variable that they took back
    assert this_launch() == Launch()


@pytest.mark.parametrize("case", WRONG)
def test_what_no_launcher_says_is_refused(environ, case: str) -> None:
    values, told = WRONG[case]
    environ(**values)
    with pytest.raises(ConfigError, match=re.escape(told) + "; start several ranks with torchrun$") as found:
        this_launch()
    if case != "world alone":  # a dry run is composed for it
        with pytest.raises(ConfigError, match=re.escape(told)), process_group("cpu"):
            pass
    said = sentence(found.value)  # does not stumble over the same value
    assert told in said and said.startswith("error") and "\n" not in said
    assert is_first() == (values.get("RANK") not in ("2",)), "somebody must say it"


def test_every_rank_has_a_gpu_of_its_own(environ, monkeypatch: pytest.MonkeyPatch) -> None:
    environ(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2")
    assert this_launch().device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert this_launch().device("cuda") == torch.device("cuda", 2)
    assert this_launch().device("cuda:2") == Launch().device("cuda:2") == torch.device("cuda", 2)
    with pytest.raises(ConfigError, match="cuda:0 is not the GPU of LOCAL_RANK=2.*--device cuda$"):
        this_launch().device("cuda:0")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(ConfigError, match="LOCAL_RANK is not, which says which of the 3 GPUs"):
        this_launch().device("cuda")
    environ(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    told = r"LOCAL_RANK=2 has no GPU of its own: this process sees 2; start at most 2 ranks on this machine \(--nproc_per_node\)"
    with pytest.raises(ConfigError, match=told), process_group("cuda"):
        pass


def test_a_rank_that_sees_one_gpu_takes_it(environ, monkeypatch: pytest.MonkeyPatch) -> None:
    """`srun --gpus-per-task=1` shows every rank another one, each as number 0. Ranks of one
    torchrun are shown the same, and so may ranks be that nothing was chosen for.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    environ(RANK="2", WORLD_SIZE="3", LOCAL_RANK="2")
    for shown in ("2", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "2,"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert this_launch().device("cuda") == this_launch().device("cuda:0") == torch.device("cuda", 0)
    told = "LOCAL_RANK=2 has no GPU of its own: this process sees 1; .*, or set LOCAL_RANK=0 in every rank"
    for key, value in {"TORCHELASTIC_RUN_ID": "job", "CUDA_VISIBLE_DEVICES": ""}.items():
        with monkeypatch.context() as other:
            other.setenv(key, value)
            with pytest.raises(ConfigError, match=told):
                this_launch().device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert this_launch().device("cuda") == torch.device("cuda", 0)


def test_a_rank_of_its_own_in_another_launch(environ) -> None:
    """A command that a rank starts as a launch of one inherits what was said of its parent's, which
    uses its port.
    """
    with socket.socket() as parent:
        parent.bind(("127.0.0.1", 0))
        parent.listen()
        port = str(parent.getsockname()[1])
        for place in ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}, {}):
            environ(RANK="0", WORLD_SIZE="1", **place)
            with process_group("cpu"):
                assert dist.get_world_size() == 1
    for said in ({"LOCAL_WORLD_SIZE": "4"}, {}):
        environ(RANK="0", WORLD_SIZE="1", LOCAL_RANK="3", **said)
        assert this_launch() == Launch(0, 1, 3, True)


def test_two_ranks_on_one_gpu_are_told(environ, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise dist.DistBackendError("ncclInvalidUsage\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000")

    environ(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    monkeypatch.setattr(dist, "rendezvous", lambda *_: iter([(dist.HashStore(), 0, 2)]))
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(ConfigError, match="two ranks of this launch were given one GPU"), process_group("cpu"):
        pass


PLACES = {
    "no address": ({"MASTER_PORT": "29500"}, "RANK is set in the environment, MASTER_ADDR is not"),
    "unknown": (
        {"MASTER_ADDR": "no.such.host.invalid", "MASTER_PORT": "29500"},
        "variable MASTER_ADDR='no.such.host.invalid' is no address",
    ),
    "both in one": ({"MASTER_ADDR": "127.0.0.1:29500", "MASTER_PORT": "29500"}, "MASTER_ADDR='127.0.0.1:29500' is no address of a machine"),
    "no name": ({"MASTER_ADDR": "a" * 64 + ".example", "MASTER_PORT": "29500"}, "is no address of a machine"),
    "port 0": ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}, "MASTER_PORT=0 must be a port, from 1 to 65535"),
    "no port": ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "65536"}, "MASTER_PORT=65536 must be a port, from 1 to 65535"),
    "no number": ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"}, "environment variable MASTER_PORT='http' must be a whole number"),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_where_nobody_can_meet_is_told_at_once(environ, monkeypatch: pytest.MonkeyPatch, case: str, rank: str) -> None:
    values, told = PLACES[case]
    environ(RANK=rank, WORLD_SIZE="2", **values)
    monkeypatch.setattr(launch, "KNOWN_WITHIN", 0)
    with pytest.raises(ConfigError, match=re.escape(told)), process_group("cpu"):
        pass


def test_a_machine_that_comes_later_is_waited_for(environ, monkeypatch: pytest.MonkeyPatch, warned: list[str]) -> None:
    """Names of containers are known when these have started; what cannot be a name never is."""
    environ(RANK="1", WORLD_SIZE="2", MASTER_ADDR="later", MASTER_PORT="29500")
    clock, begun = iter(range(0, 1000, 7)), []

    def look_up(*place: object) -> None:
        begun.append(place)
        if len(begun) < 5:
            raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(launch.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(launch, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda seconds: None))
    assert launch.meeting_place() == ("later", 29500)
    assert len(warned) == 1 and "MASTER_ADDR=later is not known here yet (not known)" in warned[0]
    begun.clear()
    environ(RANK="1", WORLD_SIZE="2", MASTER_ADDR="later:29500", MASTER_PORT="29500")
    with pytest.raises(ConfigError, match="without a port"):
        launch.meeting_place()
    assert len(begun) == 1


def test_a_port_that_somebody_has_is_told_at_once(environ) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environ(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        told = rf"MASTER_PORT={port}: rank 0 cannot wait for the others there \(address already in use\); give another port"
        with pytest.raises(ConfigError, match=told), process_group("cpu"):
            pass


def meet(rank: int, port: int, restarts: str, video: bool) -> None:
    """Exit with the sum over two ranks that torchrun has started, and die right after; as the ranks
    of a training, or of one `video`.
    """
    said = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    said |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": restarts}
    os.environ.update({key: str(value) for key, value in said.items()})
    with group_of_video(Share.of_launch(cp_size=2), device=torch.device("cpu")) if video else process_group("cpu"):
        total = torch.ones(1)
        dist.all_reduce(total)
        os._exit(int(total))


@pytest.mark.dist
@pytest.mark.parametrize("video", [False, True], ids=["training", "video"])
def test_restarted_ranks_meet_in_the_store_of_the_dead(video: bool) -> None:
    """torchrun on several machines: every agent counts the restarts that its own ranks caused."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ThreadPoolExecutor() as pool:
        for counts in ("00", "01", "01", "12"):
            ended = [pool.submit(run_until_death, meet, rank, agent.port, count, video, timeout=60) for rank, count in enumerate(counts)]
            assert [rank.result() for rank in ended] == [2, 2], counts


@pytest.mark.parametrize("words", [["train", "experiment=toy_tf_c3-3"], ["doctor", "--quick"]])
def test_commands_end_with_the_sentence(words: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rcm", *words],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "RANK": "x", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert [line for line in run.stderr.splitlines() if "RANK='x' must be a whole number" in line]


def test_nothing_else_reads_the_launcher_s_numbers() -> None:
    reader = re.compile(r"""int\(\s*os\.environ(\.get\(|\[)\s*["'](\w*RANK|\w*WORLD_SIZE)["']""")
    readers = [name(path) for path in files("rcm", "scripts") if reader.search(path.read_text())]
    assert reader.search('int(os.environ.get("RANK", "0"))') and not readers
