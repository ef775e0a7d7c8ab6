"""Torch pickles that would run code, lie about their bytes, or hold no plain tensors; and the
readers they are given to.
"""

from __future__ import annotations

import collections
import functools
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from rcm.configs.build_data import _stored_embedding
from rcm.data.latents import LatentShards
from rcm.data.tar_index import ShardError
from rcm.nets.wan.config import preset
from rcm.pipelines.image_condition import read_image
from rcm.storage.pickle_file import read_tensor
from rcm.storage.weight_files import open_container
from scripts.checkpoint import main as checkpoint_main
from tests.faults.case import Bomb, Fault, canary, each
from tests.faults.hostile import Call, Storage, archive, exploding, instructions, old_format, pickled, tensor
from tests.support.shard_files import tensor_bytes, write_members

RUNS = "not executed|needs Python objects|which plain values do not need|cannot be read"


def opened(write):
    """Reads what `write(folder / "x.pt")` wrote, and every tensor in it."""

    def call(folder: Path) -> None:
        file = open_container(write(folder))
        for key in file:
            file[key]

    return call


def at(name: str, value):
    return lambda folder: archive(folder / "x.pt", value(folder) if callable(value) else value)


def saved(value, **options):
    def write(folder: Path) -> Path:
        torch.save(value(folder) if callable(value) else value, folder / "x.pt", **options)
        return folder / "x.pt"

    return write


def protocol(number: int):
    """A bomb as another protocol writes it: from 4 on, names come from the stack."""
    return lambda folder: archive(folder / "x.pt", pickle.dumps({"a": exploding(folder)}, protocol=number))


def twice(folder: Path) -> Path:
    path = archive(folder / "x.pt", {"a": tensor()})
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as file:
        file.writestr("archive/data/0", bytes(16))
    return path


def replaced(path: Path, old: bytes, new: bytes) -> Path:
    """A file with other bytes in one place."""
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    return path


def expanded(size: tuple, stride: tuple) -> object:
    return {"a": tensor(size=size, stride=stride)}


EXECUTION = {
    "value": saved(lambda folder: {"a": exploding(folder)}),
    "value, replaced by a tensor": saved(lambda folder: {"a": exploding(folder, torch.ones(2))}),
    "root": saved(exploding),
    "key": saved(lambda folder: {exploding(folder, "a"): torch.ones(2)}),
    "deep inside": saved(lambda folder: {"a": [({"b": (exploding(folder),)},)]}),
    "old format": saved(lambda folder: {"a": exploding(folder)}, _use_new_zipfile_serialization=False),
    **{f"old format, pickle {i}": lambda folder, i=i: old_format(folder / "x.pt", {}, bomb=exploding(folder), place=i) for i in range(5)},
    **{f"protocol {n}": protocol(n) for n in (0, 1, 3, 4, 5)},
    "plain pickle": lambda folder: (folder / "x.pt").write_bytes(pickle.dumps(exploding(folder))) and folder / "x.pt",
    "INST": lambda folder: instructions(folder / "x.pt", f"(S'touch {canary(folder)}'\nios\nsystem\n."),
    "OBJ": lambda folder: instructions(folder / "x.pt", f"(cos\nsystem\nS'touch {canary(folder)}'\no."),
    "EXT1": lambda folder: instructions(folder / "x.pt", "\x82\x01."),
    "os.system": lambda folder: archive(folder / "x.pt", {"a": Call("os.system", (f"touch {canary(folder)}",))}),
    "builtins.eval": lambda folder: archive(folder / "x.pt", {"a": Call("builtins.eval", (f"open({str(canary(folder))!r}, 'w')",))}),
    "builtins.getattr": at("x", {"a": Call("builtins.getattr", ("x", "y"))}),
    "torch.load": at("x", {"a": Call("torch.load", ("/etc/hostname",))}),
    "codecs.encode": at("x", {"a": Call("_codecs.encode", ("x", "latin1"))}),
    "bytearray of a terabyte": at("x", {"a": Call("builtins.bytearray", (1 << 40,))}),
    "numpy scalar": at("x", {"a": Call("numpy.core.multiarray.scalar", ())}),
    "call of a call": lambda folder: instructions(folder / "x.pt", "ctorch\nSize\n)R)R."),
    "state for a name": lambda folder: instructions(folder / "x.pt", "ctorch\nSize\n}b."),
    "persistent id that runs": lambda folder: archive(folder / "x.pt", {"a": tensor(Storage(kind="os.system"))}),
    "dotted name": lambda folder: instructions(folder / "x.pt", "ctorch\nSize.__class__\n)R."),
}

DOUBLED = functools.reduce(lambda inner, _: (inner, inner), range(60), 1)
"""A few hundred bytes in a pickle; 2^60 in its hash and its text."""

LIES = {
    "storage larger than its bytes": ({"a": tensor(Storage(count=1 << 40), size=(1 << 40,))}, "should have"),
    "storage smaller than its bytes": ({"a": tensor(Storage(count=2), size=(2,))}, "should have"),
    "negative storage": ({"a": tensor(Storage(count=-4))}, "should have|cannot be read"),
    "storage of no whole number": ({"a": tensor(Storage(count=4.0))}, "no storage"),
    "storage that is a flag": ({"a": tensor(Storage(count=True))}, "no storage"),
    "no storage of that key": ({"a": tensor(Storage(key="7"))}, "should have"),
    "no storage but a word": ({"a": tensor("x")}, "tensor that is none"),
    "another persistent id": ({"a": tensor(Storage(word="module"))}, "no storage"),
    "offset": ({"a": tensor(offset=1)}, "beyond the 4 elements"),
    "negative offset": ({"a": tensor(offset=-1)}, "impossible shape"),
    "strides": ({"a": tensor(size=(2, 2), stride=(4, 1))}, "beyond the 4 elements"),
    "negative strides": ({"a": tensor(stride=(-1,))}, "impossible shape"),
    "size": ({"a": tensor(size=(5,))}, "beyond the 4 elements"),
    "negative size": ({"a": tensor(size=(-4,))}, "impossible shape"),
    "one number as a terabyte": (expanded((1 << 40,), (0,)), "beyond the 4 elements"),
    "sizes that overflow": (expanded((1 << 61, 8), (0, 0)), "beyond the 4 elements"),
    "size of 2^70": (expanded((1 << 70,), (0,)), "impossible shape"),
    "ranks that differ": ({"a": tensor(size=(2, 2), stride=(1,))}, "impossible shape"),
    "size of words": ({"a": tensor(size=("4",))}, "impossible shape"),
    "tensor without arguments": ({"a": Call("torch._utils._rebuild_tensor_v2", ())}, "cannot be read"),
    "parameter of nothing": ({"a": Call("torch._utils._rebuild_parameter", (3, False, {}))}, "tensor that is none"),
    "subclass": ({"a": Call("torch._tensor._rebuild_from_type_v2", (1, 2, 3, 4))}, "tensor that is none"),
    "sparse": ({"a": Call("torch._utils._rebuild_sparse_tensor", ())}, "a sparse tensor; save dense"),
    "quantised": ({"a": Call("torch._utils._rebuild_qtensor", ())}, "a quantised tensor"),
    "meta": ({"a": Call("torch._utils._rebuild_meta_tensor_no_storage", ())}, "a meta tensor"),
    "DTensor": ({"a": Call("torch.distributed.tensor.DTensor", ())}, "a sharded tensor"),
    "list": ([1, 2], "holds a list, not a state dict"),
    "number": (3, "holds a int"),
    "one tensor": (tensor(), "holds a tensor"),
    "two names that join to one": ({"a.b": tensor(), "a": {"b": tensor()}}, "two entries are called 'a.b'"),
    "keys that read alike": ({0: tensor(), "0": tensor()}, "two entries of one name"),
    "nested beyond end": (functools.reduce(lambda inner, _: {"a": inner}, range(40), {"a": tensor()}), "nested in more than"),
    "one dict many times over": (functools.reduce(lambda inner, _: {"a": inner, "b": inner}, range(30), {"a": 1}), "more than 1,000,000"),
}

CONTAINERS = {
    "compressed (a zip bomb)": (lambda f: archive(f / "x.pt", {"a": tensor()}, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a bomb of a gigabyte beside it": (
        lambda f: archive(f / "x.pt", {"a": tensor()}, more={"z": bytes(1 << 26)}, compression=zipfile.ZIP_DEFLATED),
        "is compressed",
    ),
    "entry twice": (twice, "occurs twice"),
    "no data.pkl": (lambda f: archive(f / "x.pt", {}, drop="data.pkl"), "no data.pkl"),
    "big-endian": (lambda f: archive(f / "x.pt", {"a": tensor()}, more={"byteorder": b"big"}), "not little-endian"),
    "pickle cut": (lambda f: archive(f / "x.pt", pickled({"a": tensor()})[:-9]), "cannot be read"),
    "forged memo, which takes no memory": (lambda f: instructions(f / "x.pt", "}r\xff\xff\xff\x7f."), None),
    "empty pickle": (lambda f: archive(f / "x.pt", b""), "cannot be read"),
    "stack that runs dry": (lambda f: instructions(f / "x.pt", "ttt."), "cannot be read"),
    "string longer than the file": (lambda f: instructions(f / "x.pt", "X\xff\xff\xff\x7fabc."), "ends inside a value of 2147483647 bytes"),
    "frame longer than memory": (lambda f: instructions(f / "x.pt", "\x95" + 7 * "\xff" + "\x00."), "ends inside a value of"),
    "conjugated view": (saved({"a": torch.ones(2, dtype=torch.complex64).conj()}), r"conjugated or negated view; save x\.resolve"),
    "negated view": (saved({"a": torch.ones(2, dtype=torch.complex64).conj().imag}), "conjugated or negated view"),
    "old format, big-endian": (lambda f: replaced(old_format(f / "x.pt", {}), b"\x88s.", b"\x89s."), "not little-endian"),
    "old format, another version": (lambda f: replaced(old_format(f / "x.pt", {}), b"M\xe9\x03", b"M\xe8\x03"), "another version"),
    "a key of tuples in tuples": (
        lambda f: archive(f / "x.pt", b"\x80\x02}" + pickled(DOUBLED)[2:-1] + b"K\x01s."),
        "a key of nested tuples",
    ),
    "the same in an ordered dict": (
        lambda f: archive(f / "x.pt", {"a": Call("collections.OrderedDict", ([(DOUBLED, 1)],))}),
        "a key of nested tuples",
    ),
    "the same as a storage's key": (lambda f: archive(f / "x.pt", {"a": tensor(Storage(key=DOUBLED))}), "no storage"),
    "the same as a shape": (lambda f: archive(f / "x.pt", {"a": tensor(size=DOUBLED)}), "impossible shape"),
    "the same as an old storage's key": (lambda f: old_format(f / "x.pt", {}, bomb=[DOUBLED], place=4), "key is no word"),
    "a pipe": (lambda f: os.mkfifo(f / "x.pt") or f / "x.pt", "no file but a folder, a pipe"),
    "a flipped letter of a name": (
        lambda f: replaced(archive(f / "x.pt", {"name": tensor()}), b"name", b"nbme"),
        "data.pkl are not those of its checksum",
    ),
    "a flipped number": (
        lambda f: replaced(archive(f / "x.pt", {"a": tensor()}), bytes(16), bytes(15) + b"x"),
        "storage 0 are not those of its checksum",
    ),
    "old format, storage of a terabyte": (
        lambda f: old_format(f / "x.pt", {"a": 1}) and (f / "x.pt").write_bytes((f / "x.pt").read_bytes() + bytes(8)) and f / "x.pt",
        "bytes after its last storage",
    ),
    "a zip of pictures": (lambda f: zipfile.ZipFile(f / "x.pt", "w").writestr("a.png", b"x") or f / "x.pt", "no data.pkl"),
}


def fetched(content):
    """A shard with `content` in place of a latent."""

    def call(folder: Path) -> None:
        latent, embed = content(folder) if callable(content) else content, tensor_bytes(torch.ones(5, 6))
        members = {"latent.pt": latent, "embed.pt": embed, "prompt.txt": b"x"}
        write_members(folder / "shard-000000.tar", ((f"000000000.{name}", data) for name, data in members.items()))
        try:
            LatentShards(str(folder / "*.tar")).fetch([0])
        except ShardError as error:
            raise OSError(str(error)) from error

    return call


def negative(value):
    def call(folder: Path) -> None:
        torch.save(value(folder) if callable(value) else value, folder / "n.pt")
        _stored_embedding(str(folder / "n.pt"), preset("tiny"))

    return call


def picture(content: bytes):
    def call(folder: Path) -> None:
        (folder / "x.png").write_bytes(content)
        try:
            read_image(folder / "x.png")
        except RuntimeError as error:
            raise OSError(str(error)) from error

    return call


NAN = float("nan")
META, SPARSE = torch.empty(4, device="meta"), torch.eye(3).to_sparse()
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(%pipe%id) (w) file\nshowpage\n"

CASES = [
    *(Fault(name, kind="pickles that run code", refusal=RUNS, call=opened(write)) for name, write in EXECUTION.items()),
    *(Fault(name, kind="pickles that lie", refusal=words, call=opened(at("x", value))) for name, (value, words) in LIES.items()),
    *(Fault(name, kind="damaged archives", refusal=words, call=opened(write)) for name, (write, words) in CONTAINERS.items()),
    *(
        Fault(f"inspect: {name}", kind="pickles that run code", refusal="cannot be read", main=checkpoint_main,
              argv=lambda folder, write=EXECUTION[name]: ["inspect", write(folder)])
        for name in ("value", "old format", "os.system")
    ),
    Fault("latent: runs", kind="stored tensors", refusal="000000000.latent.pt cannot be read.*not executed",
          call=fetched(lambda folder: tensor_bytes(Bomb(canary(folder), torch.ones(4, 3, 2, 2))))),
    Fault("latent: sparse", kind="stored tensors", refusal="latent.pt cannot be read.*sparse", call=fetched(tensor_bytes(SPARSE))),
    Fault("latent: meta", kind="stored tensors", refusal="latent.pt cannot be read.*no values", call=fetched(tensor_bytes(META))),
    Fault("latent: dict", kind="stored tensors", refusal="latent.pt holds a dict", call=fetched(tensor_bytes({"a": torch.ones(2)}))),
    Fault("latent: whole numbers", kind="stored tensors", refusal="latent.pt holds a tensor of torch.int64",
          call=fetched(tensor_bytes(torch.ones(4, 3, 2, 2, dtype=torch.int64)))),
    Fault("latent: NaN", kind="stored tensors", refusal="latent.pt holds NaN",
          call=fetched(tensor_bytes(torch.full((4, 3, 2, 2), NAN)))),
    Fault("latent: one number as many", kind="stored tensors", refusal="latent.pt cannot be read.*beyond the 1 elements",
          call=fetched(tensor_bytes(torch.ones(()).expand(4, 3, 2, 2)))),
    Fault("latent: nothing", kind="stored tensors", refusal="latent.pt cannot be read", call=fetched(b"")),
    Fault("negative: runs", kind="stored tensors", refusal="neg_embed_path=.*not executed", call=negative(exploding)),
    Fault("negative: dict", kind="stored tensors", refusal="neg_embed_path=.*holds a dict", call=negative({"a": torch.ones(2)})),
    Fault("negative: sparse", kind="stored tensors", refusal="neg_embed_path=.*sparse", call=negative(SPARSE)),
    Fault("negative: meta", kind="stored tensors", refusal="neg_embed_path=.*no values", call=negative(META)),
    Fault("negative: rank", kind="stored tensors", refusal=r"\[L, E\]", call=negative(torch.ones(4))),
    Fault("negative: batch", kind="stored tensors", refusal=r"\[L, E\]", call=negative(torch.ones(2, 4, 32))),
    Fault("negative: empty", kind="stored tensors", refusal=r"\[L, E\]", call=negative(torch.ones(0, 32))),
    Fault("negative: whole numbers", kind="stored tensors", refusal="int64", call=negative(torch.ones(4, 32, dtype=torch.int64))),
    Fault("negative: width", kind="stored tensors", refusal="width 32", call=negative(torch.ones(4, 31))),
    Fault("negative: length", kind="stored tensors", refusal="at most 16 tokens", call=negative(torch.ones(17, 32))),
    Fault("negative: infinite", kind="stored tensors", refusal="NaN or infinite", call=negative(torch.full((4, 32), torch.inf))),
    Fault("negative: fits", kind="stored tensors", refusal=None, call=negative(torch.ones(1, 4, 32, dtype=torch.bfloat16))),
    Fault("picture: PostScript", kind="images", refusal="cannot decode", call=picture(EPS)),
    Fault("picture: nothing", kind="images", refusal="cannot decode", call=picture(b"")),
    Fault("picture: begins as one", kind="images", refusal="cannot decode", call=picture(b"\x89PNG\r\n\x1a\n" + bytes(64))),
]  # fmt: skip


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


def test_the_bomb_works(tmp_path: Path) -> None:
    """Or the cases above would prove nothing."""
    for name in ("value", "root", "deep inside"):
        assert not canary(tmp_path).exists()
        torch.load(EXECUTION[name](tmp_path), weights_only=False)
        canary(tmp_path).rmdir()


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    """Views, ties, parameters with attributes, ordered dicts, empty and scalar tensors, every
    dtype, both formats: bit by bit.
    """
    base = torch.arange(12.0)
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.note = "x"
    plain = {
        "view": base.view(3, 4).t(), "slice": base[2:5], "tied": base, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
        "parameter": parameter, "bool": torch.tensor([True, False]), "complex": torch.tensor([1 + 2j]),
        "u16": torch.tensor([7], dtype=torch.uint16), "fp8": torch.tensor([1.5]).to(torch.float8_e4m3fn), "half": base.bfloat16(),
    }  # fmt: skip
    nested = {"model": collections.OrderedDict(plain), "step": 3, "note": None}
    for new in (True, False):
        torch.save(nested, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
        file = open_container(tmp_path / "x.pt")
        assert set(file) == {f"model.{key}" for key in plain} and set(file.others) == {"step", "note"}
        for key, value in plain.items():
            got = file[f"model.{key}"]
            assert got.dtype == value.dtype and got.shape == value.shape and got.stride() == value.stride()
            assert torch.equal(got.reshape(-1).view(torch.uint8), value.detach().reshape(-1).view(torch.uint8))
    torch.save(base, tmp_path / "one.pt")
    assert torch.equal(read_tensor(tmp_path / "one.pt", name="one"), base)
    assert torch.equal(read_tensor((tmp_path / "one.pt").read_bytes(), name="one"), base)
