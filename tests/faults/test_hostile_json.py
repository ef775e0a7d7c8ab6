"""Safetensors headers, indices, pointers, config.json and descriptions that are damaged, contradict
themselves or name other places.
"""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rcm.nets.wan.convert import from_wan
from rcm.nets.wan.published_config import published_settings
from rcm.pipelines.from_checkpoint import open_checkpoint
from rcm.pipelines.wan_files import config_of, network_weights, require_fit
from rcm.pipelines.weight_files import open_weights
from rcm.storage.weight_files import open_container
from rcm.train.describe import Description
from rcm.train.description_rules import CODEC, EXTRA, FIELDS, NETWORK, RECIPE, SAMPLER, TEXT
from rcm.train.export import export
from scripts.checkpoint import main as checkpoint_main
from tests.faults.case import Fault, each, kept_folder
from tests.faults.hostile import safetensors
from tests.support.tiny_checkpoint import MANY_STEP, STUDENT, describe_world, world_net, write_checkpoint
from tests.support.weight_folders import small_config, small_state, write_shards

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def entry(**changes: Any) -> dict:
    return {"a": {**A, **changes}, "b": B}


HEADERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "no header": (b"", {}),
    "length of 2^64 - 1": (b"{}", {"length": 2**64 - 1}),
    "length of 100 MB and more": (b"{}", {"length": 100_000_001}),
    "length beyond the file": (b"{}", {"length": 60}),
    "length within the header": ({"a": A, "b": B}, {"length": 5}),
    "not UTF-8": (b'{"\xff": 1}', {}),
    "not JSON": (b"{", {}),
    "null": (b"null", {}),
    "list": (b"[]", {}),
    "number": (b"3", {}),
    "key twice": (b'{"a": %b, "a": %b}' % (json.dumps(A).encode(), json.dumps(B).encode()), {}),
    "nested beyond end": (b'{"a":' * 100_000, {}),
    "entry of null": ({"a": None, "b": B}, {}),
    "entry of a list": ({"a": [1], "b": B}, {}),
    "entry without a dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}, "b": B}, {}),
    "dtype of nothing": (entry(dtype="F7"), {}),
    "dtype of a number": (entry(dtype=3), {}),
    "shape of null": (entry(shape=None), {}),
    "shape of words": (entry(shape=["2"]), {}),
    "shape of fractions": (entry(shape=[2.0]), {}),
    "shape of flags": (entry(shape=[True, 2]), {}),
    "negative shape": (entry(shape=[-2]), {}),
    "two negative sizes": (entry(shape=[-1, -2]), {}),
    "shape that overflows": (entry(shape=[2**40, 2**40]), {}),
    "shape of 2^70": (entry(shape=[2**70]), {}),
    "shape of nothing times much": (entry(shape=[0, 2**62, 2**62]), {}),
    "NaN in a shape": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', {}),
    "one offset": (entry(data_offsets=[0]), {}),
    "three offsets": (entry(data_offsets=[0, 8, 16]), {}),
    "offsets of words": (entry(data_offsets=["0", "8"]), {}),
    "negative offset": (entry(data_offsets=[-8, 0]), {}),
    "offsets reversed": (entry(data_offsets=[8, 0]), {}),
    "overlap": (entry(data_offsets=[4, 12]), {}),
    "the same place": (entry(data_offsets=[8, 16]), {}),
    "hole": ({"a": A, "b": {**B, "data_offsets": [12, 20]}}, {"data": bytes(20)}),
    "hole at the beginning": ({"a": {**A, "data_offsets": [4, 12]}}, {"data": bytes(12)}),
    "offset of 2^64": (entry(data_offsets=[2**64, 2**64 + 8]), {}),
    "bytes missing": ({"a": A, "b": B}, {"data": bytes(12)}),
    "bytes left": ({"a": A, "b": B}, {"data": bytes(24)}),
    "metadata of a number": ({"a": A, "b": B, "__metadata__": 3}, {}),
    "metadata of numbers": ({"a": A, "b": B, "__metadata__": {"x": 3}}, {}),
    "metadata of objects": ({"a": A, "b": B, "__metadata__": {"rcm": {"stage": "x"}}}, {}),
}


def header(value: Any, options: dict[str, Any]) -> Callable[[Path], None]:
    return lambda folder: open_container(safetensors(folder / "x.safetensors", value, **{"data": bytes(16), **options})) and None


def published(change: Callable[[dict], Any], *, what: str = "config.json") -> Callable[[Path], None]:
    """A diffusers folder in which one JSON file is changed, opened as a network."""

    def call(folder: Path) -> None:
        settings = published_settings(small_config(), form="diffusers")
        path = write_shards(folder / "net", from_wan(_small(), form="diffusers"), settings=settings)
        file = path / what
        value = json.loads(file.read_text())
        changed = change(value)
        content = value if changed is None else changed
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        network = network_weights(open_weights(path))
        require_fit(network, config_of(network))

    return call


@functools.cache
def _small() -> dict:
    return small_state()


INDEX = "diffusion_pytorch_model.safetensors.index.json"


def shard(name: Any) -> Callable[[dict], None]:
    return lambda index: index["weight_map"].update(dict.fromkeys(list(index["weight_map"])[:1], name))


INDICES: dict[str, tuple[Callable[[dict], Any], str]] = {
    "no weight_map": (lambda index: {}, "no weight_map"),
    "weight_map of a list": (lambda index: {"weight_map": [1]}, "no weight_map"),
    "shard above": (shard("../x.safetensors"), "no file of weights in its folder"),
    "shard from the root": (shard("/etc/x.safetensors"), "no file of weights in its folder"),
    "shard below": (shard("a/x.safetensors"), "no file of weights in its folder"),
    "shard of another system": (shard("..\\x.safetensors"), "no file of weights in its folder"),
    "shard of null": (shard(None), "no file of weights in its folder"),
    "shard of a list": (shard(["x"]), "no file of weights in its folder"),
    "shard that is the folder": (shard("."), "no file of weights in its folder"),
    "shard that is no weights": (shard("config.json"), "no file of weights in its folder"),
    "shard of a name too long": (shard("ü" * 200 + ".safetensors"), "no file of weights in its folder"),
    "shard of half a character": (shard("\ud800.safetensors"), r"index\.json names 4 shards, of which 1 .*the index is damaged"),
    "list": (lambda index: [], "not an object of settings"),
    "null": (lambda index: b"null", "not an object"),
    "not UTF-8": (lambda index: b'{"\xff": 1}', "cannot be read"),
    "NaN": (lambda index: b'{"weight_map": NaN}', "NaN is no JSON number"),
    "infinite number": (lambda index: b'{"weight_map": 1e999}', "no finite number"),
    "key twice": (lambda index: b'{"weight_map": 1, "weight_map": {}}', "'weight_map' is given twice"),
    "nested beyond end": (lambda index: b"[" * 100_000, "nested too deeply"),
    "digits beyond end": (lambda index: b"9" * 100_000, "cannot be read"),
}


def setting(**values: Any) -> Callable[[dict], None]:
    return lambda config: config.update(values)


CONFIGS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "list": (lambda config: [], "not an object of settings"),
    "heads of words": (setting(num_attention_heads="1"), "states num_attention_heads '1', expected a whole number"),
    "heads of nothing": (setting(num_attention_heads=0), "states num_attention_heads '0'"),
    "heads of null": (setting(num_attention_heads=None), "states num_attention_heads"),
    "heads of a list": (setting(num_attention_heads=[1]), "states num_attention_heads"),
    "heads that do not divide": (setting(num_attention_heads=3), "do not divide the width 128"),
    "heads of 10^30": (setting(num_attention_heads=10**30), "states num_attention_heads"),
    "layers of 10^9": (setting(num_layers=10**9), "states num_layers"),
    "another number of layers": (setting(num_layers=7), "contradicts the tensors beside it: num_layers 7"),
    "layers of a flag": (setting(num_layers=True), "states num_layers"),
    "another width": (setting(attention_head_dim=64), "contradicts the tensors|dim"),
    "another patch": (setting(patch_size=[2, 2, 2]), r"states patch_size \[2, 2, 2\]; this architecture has \[1, 2, 2\]"),
    "no norm of keys": (setting(qk_norm=None), "states qk_norm None; this architecture has True or"),
    "another norm of keys": (setting(qk_norm="rms_norm"), "states qk_norm rms_norm"),
    "windows": (setting(window_size=[4, 4]), "states window_size"),
    "quantised": (setting(quantization_config={"bits": 4}), "states quantization_config"),
    "another class": (setting(_class_name="WanVACETransformer3DModel"), "states _class_name WanVACETransformer3DModel"),
    "eps of words": (setting(eps="x"), "states eps"),
    "negative eps": (setting(eps=-1e-6), "states eps"),
    "eps of null": (setting(eps=None), "states eps"),
}


@functools.cache
def _files() -> dict[str, Path]:
    folder = kept_folder()
    found = {}
    for name, recipe in (("causal", STUDENT), ("whole", MANY_STEP)):
        write_checkpoint(folder / name, recipe)
        found[name] = export(folder / name, folder / f"{name}.safetensors", dtype=torch.float32)
    return found


def described(change: Callable[[dict], Any], *, inside: bool = False, base: str = "causal") -> Callable[[Path], None]:
    """An exported file whose description is changed, beside it or `inside` its metadata, opened for
    sampling.
    """

    def call(folder: Path) -> None:
        source = _files()[base]
        values = json.loads(Path(f"{source}.json").read_text())
        changed = change(values)
        content = values if changed is None else changed
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        if inside:
            save_file(load_file(source), folder / "x.safetensors", metadata={"rcm": text.decode("utf-8", "replace")})
        else:
            shutil.copy(source, folder / "x.safetensors")
            (folder / "x.safetensors.json").write_bytes(text)
        open_checkpoint(folder / "x.safetensors")

    return call


def at(path: str, value: Any) -> Callable[[dict], None]:
    def change(values: dict) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            values = values[parent]
        values[last] = copy.deepcopy(value)

    return change


WHOLE = [None, "64", 1.5, True, [1], {}, 0, -1, 10**9, 10**30]
NUMBER = [None, "1", True, [1], -1, 10**400]
WRONG: dict[str, list[Any]] = {
    "stage": [None, 3, [], "x" * 1000, "a\nb", "\x1b[31m"],
    "network": [None, [], "x", 3],
    **{f"network.{key}": WHOLE for key in ("dim", "num_layers", "num_heads")},
    **{f"network.{key}": [None, "1", 10**9] for key in ("ffn_dim", "text_len", "max_frames", "max_rows", "freq_dim", "out_dim")},
    "network.patch": [None, 3, "122", [1, 2], [1, 2, 0], [1, 2, 10**9], [1, 2, 2, 2], [1, 2.0, 2]],
    "network.eps": [None, "x", 0, -1, 2],
    "network.image_branch": [None, 0, "yes"],
    "pattern": [3, [], "c0-3", "c3-3x", "c99999-1", "x"],
    "iteration": [None, -1, 1.5, "3", 10**30],
    "versions": [None, [], "x", {"rcm": 3}],
    "sigma_max": ["80", 0, -1, 10**30],
    "experiment": [3, ["x"]],
    "extra": [None, [], "x", 3],
    "extra.recipe": [[], "x", 3, {}],
    "extra.recipe.kind": [None, "best", 3],
    "extra.recipe.pattern": [None, 3, "c1-0"],
    "extra.recipe.mids": [None, 3, [], [3], [[2.0]], [["x"]], [[0.5, 0.9]]],
    "extra.recipe.ode_steps": [None, 0, -1, 10**9, 2.5, "3"],
    "extra.recipe.sigma_max": NUMBER,
    "extra.recipe.noisy_context": [None, 1, "no"],
    "extra.recipe.shift": [0, *NUMBER],
    "extra.recipe.guidance": NUMBER,
    "extra.codec": [[], "toy", 3, {}],
    "extra.codec.name": [None, 3, "x" * 200],
    "extra.codec.temporal_stride": [None, 0, 10**9, "2"],
    "extra.codec.gain": [None, 0, "x"],
    "extra.text": [[], "toy", {}],
    "extra.text.text_len": [None, 0, 10**9, "8"],
    "extra.text.words": [None, "abc", [3]],
    "extra.latent_shape": [3, "x", [24, 6], [24, 6, 4, 0], [24, 6, 4, 10**9], [24, 6, 4.0, 4], [24, 16384, 16384, 16384]],
    "extra.fps": [None, 0, -8, "8", 10**9, True],
    "extra.precision": [[], "fp32", {"compute": 3}, {"compute": "float8"}, {"compute": "nn"}],
    "extra.weights": [None, 3, "best"],
}
"""Field -> what it may not be. Each with a sentence that names the field."""

CONTRADICTIONS: dict[str, tuple[Callable[[dict], Any], str]] = {
    "channels": (at("extra.latent_shape", [12, 6, 4, 4]), "contradicts itself: network.out_dim is 24"),
    "frames and pattern": (at("extra.latent_shape", [24, 7, 4, 4]), "contradicts itself: extra.latent_shape and extra.recipe.pattern"),
    "two patterns": (at("pattern", "c1-1"), "contradicts itself: pattern is c1-1"),
    "recipe and sampler": (at("extra.sampler", {"kind": "ode", "sigma_max": 80.0, "steps": 2}), "both a recipe and a sampler"),
    "width of the text": (at("extra.text.text_dim", 25), "contradicts itself: network.text_dim is 24, extra.text.text_dim is 25"),
    "heads": (at("network.num_heads", 3), "describes no possible network"),
    "layers of the tensors": (at("network.num_layers", 900), "900 layers are described"),
    "one layer more": (at("network.num_layers", 3), r"missing .* key\(s\): blocks\.2\."),
    "width of the tensors": (at("network.ffn_dim", 49), "does not fit this network"),
    "neither recipe nor sampler": (at("extra.recipe", None), "neither a recipe nor a sampler"),
    "unknown field": (at("color", 1), "color is not known to this version"),
    "unknown size": (at("network.depth", 1), "network.depth is not known to this version"),
    "unknown part of the recipe": (at("extra.recipe.speed", 1), "extra.recipe.speed is not known"),
    "unknown part of the codec": (at("extra.codec.colour", 1), "describes a codec that this version does not know"),
    "no stage": (lambda values: values.pop("stage") and None, "lacks the field 'stage'"),
    "no network": (lambda values: values.pop("network") and None, "lacks the field 'network'"),
    "no width": (lambda values: values["network"].pop("dim") and None, "describes no possible network"),
    "no pattern in the recipe": (lambda values: values["extra"]["recipe"].pop("pattern") and None, "lacks kind or pattern"),
    "many values": (at("schedule", [[0.5] * 1000] * 200), "more than 100000 values"),
    "long text": (at("noisy_context", "x" * (1 << 21)), "more than 100000 values or 1048576 characters"),
}
TEXTS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "cannot be read"),
    "null": (b"null", "is not a checkpoint description"),
    "list": (b"[]", "is not a checkpoint description"),
    "number": (b"3", "is not a checkpoint description"),
    "open": (b"{", "cannot be read"),
    "not UTF-8": (b'{"format": 1, "stage": "\xff"}', "cannot be read|lacks the field"),
    "key twice": (b'{"format": 1, "format": 1}', "'format' is given twice"),
    "NaN": (b'{"format": 1, "sigma_max": NaN}', "NaN is no JSON number"),
    "Infinity": (b'{"format": 1, "sigma_max": -Infinity}', "-Infinity is no JSON number"),
    "1e999": (b'{"format": 1, "sigma_max": 1e999}', "1e999 is no finite number"),
    "nested beyond end": (b'{"a":' * 50_000, "nested too deeply"),
    "digits beyond end": (b'{"format": ' + b"9" * 10_000 + b"}", "cannot be read"),
    "no format": (b"{}", "no object with a format number"),
    "format of tomorrow": (b'{"format": 2}', "has description format 2, this version of rcm reads 1"),
    "format of words": (b'{"format": "1"}', "has description format 1"),
    "format of null": (b'{"format": null}', "has description format None"),
    "format of a flag": (b'{"format": true}', "has description format True"),
    "only a format": (b'{"format": 1}', "lacks the field 'stage'"),
}
SAMPLERS: dict[str, list[Any]] = {
    "extra.sampler": [None, [], "x", {}, {"kind": "ode"}],
    "extra.sampler.kind": [None, "few_step"],
    "extra.sampler.steps": [None, 0, 10**9, 1.5],
    "extra.sampler.sigma_max": NUMBER,
    "extra.sampler.solver": [3, "heun", "consistency"],
}


def tables(wrong: dict[str, list[Any]], **options: Any) -> list[Fault]:
    """One case per field and value; the refusal names the field, or the part of it that is
    missing.
    """
    found = []
    for path, values in wrong.items():
        for value in values:
            name = f"{path} = {str(value)[:30]!r} ({type(value).__name__})"
            words = rf"{path.replace('.', '[.]')}|extra[.]recipe: |contradicts|does not say|no possible|lacks|impossible|neither"
            found.append(Fault(name, kind="malformed descriptions", refusal=words, call=described(at(path, value), **options)))
    return found


def pointer(content: bytes) -> Callable[[Path], None]:
    def call(folder: Path) -> None:
        write_checkpoint(folder / "job")
        (folder / "job/checkpoints/latest_checkpoint.txt").write_bytes(content)
        open_checkpoint(folder / "job")

    return call


POINTERS = {
    "above": b"../../x",
    "root": b"/etc",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe\x00",
    "two lines": b"a\nb",
    "itself": b".",
    "long": b"x" * 9999,
}

CASES = [
    *(Fault(name, kind="safetensors", refusal=r"x\.safetensors cannot be read", call=header(*value)) for name, value in HEADERS.items()),
    Fault("inspect", kind="safetensors", refusal=r"x\.safetensors cannot be read", main=checkpoint_main,
          argv=lambda f: ["inspect", safetensors(f / "x.safetensors", b"{", length=2**63)]),
    *(Fault(f"index: {n}", kind="JSON beside weights", refusal=w, call=published(c, what=INDEX)) for n, (c, w) in INDICES.items()),
    *(Fault(f"config: {n}", kind="JSON beside weights", refusal=w, call=published(c)) for n, (c, w) in CONFIGS.items()),
    Fault("a sound folder", kind="JSON beside weights", refusal=None, call=published(lambda value: None)),
    *(Fault(f"pointer: {name}", kind="names that leave", refusal="no name in its folder", call=pointer(c)) for name, c in POINTERS.items()),
    *(Fault(f"text: {n}", kind="malformed descriptions", refusal=w, call=described(lambda v, t=t: t)) for n, (t, w) in TEXTS.items()),
    *(Fault(f"metadata: {n}", kind="malformed descriptions", refusal=w, call=described(lambda v, t=t: t, inside=True))
      for n, (t, w) in TEXTS.items()),
    *(Fault(n, kind="malformed descriptions", refusal=w, call=described(c)) for n, (c, w) in CONTRADICTIONS.items()),
    *tables(WRONG),
    *tables(SAMPLERS, base="whole"),
    *(Fault(f"as it is, {base}", kind="malformed descriptions", refusal=None, call=described(lambda v: None, base=base))
      for base in ("causal", "whole")),
    Fault("as it is, in the metadata", kind="malformed descriptions", refusal=None, call=described(lambda v: None, inside=True)),
]  # fmt: skip


@each(CASES)
def test_refused(case: Fault, tmp_path: Path) -> None:
    case.check(tmp_path)


@pytest.mark.parametrize("name", HEADERS)
def test_the_library_is_a_lower_bound(name: str, tmp_path: Path) -> None:
    """Whatever the official library refuses is refused above; it lets through fewer of these than
    this package, never more.
    """
    value, options = HEADERS[name]
    try:
        load_file(safetensors(tmp_path / "x.safetensors", value, **{"data": bytes(16), **options}))
    except (SafetensorError, ValueError, TypeError, RuntimeError):
        return
    assert name in ("key twice",), "the library reads it; so should this package, or say why here"


def test_every_field_has_a_rule_and_what_is_written_passes() -> None:
    about = describe_world(world_net(), STUDENT)
    assert set(FIELDS) == set(Description.__dataclass_fields__) and set(NETWORK) == set(about.network)
    assert set(about.extra) <= set(EXTRA) and set(about.extra["recipe"]) == set(RECIPE) - {"window", "sinks"}
    assert set(asdict(MANY_STEP)) == set(SAMPLER) and set(about.extra["codec"]) <= set(CODEC) and set(about.extra["text"]) <= set(TEXT)
    assert Description.from_json(about.to_json(), source="x").to_json() == about.to_json()
