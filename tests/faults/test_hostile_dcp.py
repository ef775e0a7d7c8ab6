"""DCP folders whose metadata or pieces would run code or contradict each other, given to every
command and call that reads one.
"""

from __future__ import annotations

import functools
import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as LAYOUTS
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex, TensorProperties

from rcm.core.dtypes import Precision
from rcm.inference.stream import main as stream_main
from rcm.nets.wan.model import WanDiT
from rcm.parallel.init import load_dcp
from rcm.parallel.mesh import ParallelDims
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.wan_files import load_wan
from rcm.pipelines.weight_files import open_weights
from rcm.storage.dcp_folder import DcpFolder
from rcm.storage.dcp_metadata import NAMES
from rcm.train.checkpoint import Checkpointer
from rcm.train.optim import AdamWConfig, LambdaLinear
from rcm.train.state import TrainState
from scripts.build_ode_pairs import main as pairs_main
from scripts.checkpoint import main as checkpoint_main
from scripts.dcp_to_pth import main as export_main
from tests.faults.case import Bomb, Fault, canary, each, kept_folder
from tests.faults.hostile import dcp_folder, exploding
from tests.support.tiny_checkpoint import STUDENT, TEACHER, describe_world, world_net, write_checkpoint

RUNS = r"\.metadata is refused: it needs Python objects other than tensors \(tests\.faults\.case\._explode\), which are not executed"


@functools.cache
def _job(teacher: bool) -> Path:
    folder = kept_folder() / "job"
    write_checkpoint(folder, TEACHER if teacher else STUDENT)
    return folder


def job(folder: Path, *, part: str = "model", teacher: bool = False, harmless: bool = False) -> Path:
    """A whole job folder; the metadata of one part runs code and then becomes what it was."""
    path = folder / "job"
    shutil.copytree(_job(teacher), path)
    where = path / "checkpoints" / "iter_000000007" / part
    if not harmless:
        metadata = dcp.FileSystemReader(str(where)).read_metadata()
        (where / ".metadata").write_bytes(pickle.dumps(exploding(folder, metadata)))
    return path


def model(folder: Path, **options) -> Path:
    return job(folder, **options) / "checkpoints" / "iter_000000007" / "model"


def resumed(path: Path) -> None:
    net = world_net()
    state = TrainState.create({"student": net}, optim={"student": AdamWConfig(lr=1e-3)}, schedule=LambdaLinear(warm_up_steps=1), ema=None)
    Checkpointer(path, dims=ParallelDims(), description=describe_world(net, STUDENT)).load(state)


def sampled(folder: Path, path: Path) -> list:
    return ["--ckpt", path, "--prompt", "a red circle moving left", "--save_path", folder / "x.mp4"]


def pairs(folder: Path) -> list:
    (folder / "prompts.txt").write_text("a red circle moving left\n")
    return ["--teacher", job(folder, teacher=True), "--out", folder / "pairs", "--num", "1", "--prompts", folder / "prompts.txt"]


READERS = [
    Fault("inspect", kind="DCP that runs code", refusal=RUNS, main=checkpoint_main, argv=lambda f: ["inspect", model(f)]),
    Fault("inspect job", kind="DCP that runs code", refusal=RUNS, main=checkpoint_main, argv=lambda f: ["inspect", job(f)]),
    Fault("convert", kind="DCP that runs code", refusal=RUNS, main=checkpoint_main, argv=lambda f: ["convert", job(f), f / "x.pt"]),
    Fault("dcp_to_pth", kind="DCP that runs code", refusal=RUNS, main=export_main,
          argv=lambda f: ["--dcp_checkpoint_dir", model(f), "--save_path", f / "x.pt"]),
    Fault("stream", kind="DCP that runs code", refusal=RUNS, main=stream_main, argv=lambda f: sampled(f, job(f))),
    Fault("build_ode_pairs", kind="DCP that runs code", refusal=RUNS, main=pairs_main, argv=pairs),
    Fault("open_checkpoint", kind="DCP that runs code", refusal=RUNS, call=lambda f: open_checkpoint(job(f))),
    Fault("load_wan", kind="DCP that runs code", refusal=RUNS, call=lambda f: load_wan(job(f), precision=Precision.preset("fp32"))),
    Fault("load_dcp", kind="DCP that runs code", refusal=RUNS, call=lambda f: load_dcp(torch.nn.Linear(2, 2), model(f))),
    *(
        Fault(f"resume: {part}", kind="DCP that runs code", refusal=RUNS, call=lambda f, part=part: resumed(job(f, part=part)))
        for part in ("model", "trainer", "scheduler", "optim_net")
    ),
]  # fmt: skip

APART = [
    Fault(f"{module}, a process of its own", kind="DCP that runs code", refusal=RUNS, module=module, argv=argv, deadline=120, slow=True)
    for module, argv in {
        "scripts.checkpoint": lambda f: ["inspect", job(f)],
        "scripts.dcp_to_pth": lambda f: ["--dcp_checkpoint_dir", job(f), "--save_path", f / "x.safetensors"],
        "rcm.inference.stream": lambda f: sampled(f, job(f)),
        "scripts.build_ode_pairs": pairs,
    }.items()
]


def read(change=None, after=None, state=None):
    """Opens and reads a whole folder whose metadata `change` altered and whose files `after`
    did.
    """

    def call(folder: Path) -> None:
        path = dcp_folder(folder, change and (lambda metadata: change(metadata, folder)), state)
        if after is not None:
            after(path, folder)
        file = open_weights(path)
        for key in file:
            file[key]
        DcpFolder(path).load_into({key: torch.empty_like(header, device="cpu") for key, header in file.headers.items()})

    return call


def entry(key: str = "net.a", **fields):
    def change(metadata, folder):
        for name, value in fields.items():
            setattr(metadata.state_dict_metadata[key], name, value)

    return change


def chunks(*boxes):
    return entry(chunks=[ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes])


def place(**fields):
    def change(metadata, folder):
        for index, stored in metadata.storage_data.items():
            if index.fqn == "net.a":
                for name, value in fields.items():
                    setattr(stored, name, value)

    return change


def dtype(value):
    return entry(properties=TensorProperties(value))


def put(key: str, value):
    def change(metadata, folder):
        metadata.state_dict_metadata[key] = value(folder) if callable(value) else value

    return change


def bytes_entry(metadata, folder):
    """An entry that torch would unpickle without asking, at the place of a tensor."""
    metadata.state_dict_metadata["net.a"] = BytesStorageMetadata()


def moved(metadata, folder):
    (index,) = [index for index in metadata.storage_data if index.fqn == "net.a"]
    metadata.storage_data[MetadataIndex("net.a", torch.Size([1, 0]))] = metadata.storage_data.pop(index)


def doubled(metadata, folder):
    (stored,) = [stored for index, stored in metadata.storage_data.items() if index.fqn == "net.a"]
    metadata.storage_data[MetadataIndex("net.b", torch.Size([0]))] = replace(stored)


def pieces(write):
    def after(path: Path, folder: Path) -> None:
        (file,) = path.glob("*.distcp")
        content = file.read_bytes()
        data = write(folder, content)
        file.write_bytes(data + bytes(max(0, len(content) - len(data))))

    return after


def rank_local(path: Path, folder: Path) -> None:
    """torch falls back to this file where the other cannot be read."""
    (path / "__0.metadata").write_bytes(pickle.dumps(exploding(folder)))
    (path / ".metadata").write_bytes(b"x")


def linked(path: Path, folder: Path) -> None:
    (path / ".metadata").unlink()
    (path / ".metadata").mkdir()


KIND = "DCP that contradicts itself"
RECORDS = {
    "not a pickle": (None, lambda path, folder: (path / ".metadata").write_bytes(b"<html>"), "cannot be read"),
    "empty": (None, lambda path, folder: (path / ".metadata").write_bytes(b""), "cannot be read"),
    "cut": (None, lambda path, folder: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:-40]), "cannot be read"),
    "a folder": (None, linked, "not a DCP checkpoint|is not a folder with one network"),
    "more after its end": (None, lambda path, folder: (path / ".metadata").open("ab").write(b"x"), "bytes after its end"),
    "a dict": (lambda metadata, folder: {"a": 1}, None, "holds a dict where a Metadata belongs"),
    "None": (lambda metadata, folder: [None], None, "holds a list where a Metadata belongs"),
    "no entries": (lambda metadata, folder: setattr(metadata, "state_dict_metadata", None), None, "lists no entries"),
    "no places": (lambda metadata, folder: setattr(metadata, "storage_data", None), None, "lists no entries or no places"),
    "places of nothing": (lambda metadata, folder: metadata.storage_data.clear(), None, "has no place"),
    "planner that runs": (lambda metadata, folder: setattr(metadata, "planner_data", exploding(folder)), None, RUNS),
    "storage meta that runs": (lambda metadata, folder: setattr(metadata, "storage_meta", exploding(folder)), None, RUNS),
    "key that runs": (lambda metadata, folder: metadata.state_dict_metadata.update({exploding(folder): None}), None, RUNS),
    "entry that runs": (put("net.a", exploding), None, RUNS),
    "chunks that run": (lambda metadata, folder: entry(chunks=exploding(folder))(metadata, folder), None, RUNS),
    "path that runs": (lambda metadata, folder: place(relative_path=exploding(folder))(metadata, folder), None, RUNS),
    "rank's own metadata that runs": (None, rank_local, "cannot be read"),
    "entry of None": (put("net.a", None), None, "no record of a tensor"),
    "entry of another kind": (put("net.a", MetadataIndex("x")), None, "where a TensorStorageMetadata belongs"),
    "key of no text": (lambda metadata, folder: metadata.state_dict_metadata.update({3: BytesStorageMetadata()}), None, "no record"),
    "place of nothing": (lambda metadata, folder: metadata.storage_data.update({MetadataIndex("z"): 1}), None, "no entry or has two"),
    "place of None": (lambda metadata, folder: metadata.storage_data.update(dict.fromkeys(metadata.storage_data)), None, "_StorageInfo"),
    "size of None": (entry(size=None), None, "impossible size"),
    "size of words": (entry(size="ab"), None, "impossible size"),
    "negative size": (entry(size=torch.Size([-2, 3])), None, "impossible size"),
    "size of 2^63 - 1": (entry(size=torch.Size([2**63 - 1, 3])), None, "impossible size"),
    "larger than its pieces": (entry(size=torch.Size([4, 3])), None, "do not fill its shape"),
    "sizes whose product overflows": (entry(size=torch.Size([2**40, 2**40])), None, "do not fill its shape"),
    "no pieces": (chunks(), None, "do not fill its shape"),
    "pieces of None": (entry(chunks=None), None, "has no pieces"),
    "piece too short": (chunks(((0, 0), (1, 3))), None, "do not fill its shape"),
    "pieces that overlap": (chunks(((0, 0), (2, 2)), ((0, 1), (1, 2))), None, "do not fill its shape"),
    "pieces twice": (chunks(((0, 0), (1, 3)), ((0, 0), (1, 3))), None, "do not fill its shape"),
    "piece outside": (chunks(((1, 0), (2, 3))), None, "do not fill its shape"),
    "piece of another rank": (chunks(((0,), (6,))), None, "do not fill its shape"),
    "piece without a place": (chunks(((0, 0), (1, 3)), ((1, 0), (1, 3))), None, "has no place"),
    "place of another piece": (moved, None, "has no place"),
    "two pieces in one place": (doubled, None, "two pieces at byte|fewer bytes"),
    "dtype of the pieces": (dtype(torch.float64), None, "fewer bytes|states"),
    "dtype of the same size": (dtype(torch.int32), None, r"\.metadata states .* torch\.int32"),
    "dtype nobody keeps": (dtype(torch.quint8), None, "refused|no known dtype"),
    "sparse layout": (entry(properties=TensorProperties(torch.float32, layout=torch.sparse_coo)), None, "no dense tensor|refused"),
    "properties of None": (entry(properties=None), None, "has no properties"),
    "properties of another kind": (entry(properties=LAYOUTS.TORCH_CHANNELS_LAST), None, "has no properties"),
    "path above": (place(relative_path="../x"), None, "no name in the folder"),
    "path from the root": (place(relative_path="/etc/hostname"), None, "no name in the folder"),
    "path below": (place(relative_path="a/b"), None, "no name in the folder"),
    "path of another system": (place(relative_path="..\\x"), None, "no name in the folder"),
    "path of a record": (place(relative_path=Path("/etc/hostname")), None, "no name in the folder"),
    "path with NUL": (place(relative_path="a\0b"), None, "no name in the folder"),
    "path that is the folder": (place(relative_path="."), None, "no name in the folder"),
    "path of a number": (place(relative_path=3), None, "no name in the folder"),
    "file that is not there": (place(relative_path="__9_0.distcp"), None, "lacks __9_0"),
    "negative byte": (place(offset=-8), None, "is impossible"),
    "byte beyond the file": (place(offset=1 << 40), None, "is truncated"),
    "byte of 2^70": (place(offset=1 << 70), None, "is impossible|cannot be read"),
    "byte that is a flag": (place(offset=True), None, "is impossible"),
    "length of a terabyte": (place(length=1 << 40), None, "is truncated|two pieces"),
    "length of nothing": (place(length=0), None, "fewer bytes"),
    "negative length": (place(length=-1), None, "is impossible"),
    "compressed": (place(transform_descriptors=["stream.zstd/1"]), None, "stored transformed"),
    "piece that runs": (None, pieces(lambda folder, old: pickle.dumps(exploding(folder))), "the piece of net"),
    "piece of torch's that runs": (None, pieces(lambda folder, old: _saved(Bomb(canary(folder)))), "the piece of net"),
    "piece of noise": (None, pieces(lambda folder, old: bytes(len(old))), "the piece of net"),
    "piece of another shape": (None, pieces(lambda folder, old: _saved(torch.ones(3, 2)) + old[-1:]), "the piece of net"),
}


def _saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


CASES = [
    *READERS,
    *APART,
    *(Fault(name, kind=KIND, refusal=words, call=read(change, after)) for name, (change, after, words) in RECORDS.items()),
    Fault("a sound folder", kind=KIND, refusal=None, call=read()),
    Fault("entries that are no tensors are not opened", kind=KIND, refusal=None, call=read(bytes_entry)),
    Fault("a sound job", kind="DCP that runs code", refusal=None, call=lambda f: open_checkpoint(job(f, harmless=True))),
]


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_the_bomb_works(tmp_path: Path) -> None:
    """torch's own reader runs it and returns sound metadata; so this package must not ask it."""
    where = model(tmp_path)
    assert dcp.FileSystemReader(str(where)).read_metadata().state_dict_metadata and canary(tmp_path).exists()


def test_names_are_torchs_records_only() -> None:
    """A metadata file may name what torch writes there: records, sizes, layouts, paths, dtypes."""
    records = {name for name in NAMES if name.startswith("torch.distributed.checkpoint.")}
    assert {name.rpartition(".")[2] for name in records} == {
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "MetadataIndex"),
        *("StorageMeta", "_MEM_FORMAT_ENCODING", "_StorageInfo"),
    }
    plain = {"torch.Size", "torch.serialization._get_layout", "collections.OrderedDict"}
    rest = {name for name in NAMES - records - plain if not name.startswith("pathlib.")}
    assert all(isinstance(getattr(torch, name.removeprefix("torch.")), torch.dtype) for name in rest)


def test_pieces_in_any_cut_are_put_together(tmp_path: Path) -> None:
    """A grid of pieces as two-dimensional sharding writes it, against the whole."""
    whole = torch.arange(30.0).reshape(5, 6)
    cuts = [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (3, 4)), ((2, 4), (3, 2))]
    state = {f"p{i}": whole[o[0] : o[0] + s[0], o[1] : o[1] + s[1]].clone() for i, (o, s) in enumerate(cuts)}

    def change(metadata):
        stored = {index.fqn: place for index, place in metadata.storage_data.items()}
        metadata.storage_data = {MetadataIndex("a", torch.Size(o)): stored[f"p{i}"] for i, (o, _) in enumerate(cuts)}
        one = metadata.state_dict_metadata["p0"]
        one.size, one.chunks = whole.shape, [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in cuts]
        metadata.state_dict_metadata = {"a": one}

    folder = DcpFolder(dcp_folder(tmp_path, change, state))
    assert torch.equal(folder["a"], whole)
    part = {"a": torch.zeros(5, 6, dtype=torch.float64)}
    folder.load_into(part)
    assert torch.equal(part["a"], whole.double())


@pytest.mark.parametrize("net", [world_net])
def test_what_training_writes_is_read(net, tmp_path: Path) -> None:
    other = WanDiT(net().config, attention="sdpa")
    load_dcp(other, model(tmp_path, harmless=True))
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), net().state_dict().values(), strict=True))
