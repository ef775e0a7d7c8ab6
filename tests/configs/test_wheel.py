"""A built wheel is complete: configs, scripts, assets, licence, entry points; it composes, plans,
streams and demonstrates from a folder without the source tree.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rcm.configs import registry_distill
from rcm.pipelines.video_io import probe

ROOT = Path(__file__).resolve().parents[2]


def _run(*command: str, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_wheel_holds_configs_and_entry_points_and_works_alone(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    _run(*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), cwd=tmp_path)
    (wheel,) = tmp_path.glob("rcm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"rcm/_configs/{p.relative_to(ROOT / 'configs').as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) > 40
    assert configs <= names
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rcm").rglob("*.py")}
    assert sources <= names
    assert "rcm/py.typed" in names
    assert any(n.endswith("licenses/LICENSE.txt") for n in names)
    for folder, inside in (("scripts", "_scripts"), ("assets", "_assets")):
        tracked = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
        shipped = {f"rcm/{inside}/{path.removeprefix(folder + '/')}" for path in tracked if path != "assets/README.md"}
        assert shipped <= names, sorted(shipped - names)
    assert not [n for n in names if n.startswith(("tests", "scripts", "configs", "assets", "outputs", "rcm/_assets/checkpoints"))]
    scripts = next(zipfile.ZipFile(wheel).read(n).decode() for n in names if n.endswith("entry_points.txt"))
    assert "rcm-train = rcm.configs.cli:main" in scripts
    target = tmp_path / "site"
    _run(*pip, "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    listed = _run(str(target / "bin" / "rcm-experiments"), "toy_tf_c3-3", cwd=tmp_path, path=target)
    assert "toy_tf_c3-3" in listed
    assert "ok" in listed
    code = "from rcm.configs import registry_distill as r; print(r.config_dir(), len(r.experiment_names()))"
    where = _run(sys.executable, "-c", code, cwd=tmp_path, path=target).strip()
    assert where == f"{target / 'rcm' / '_configs'} {len(registry_distill.experiment_names())}"
    dry = _run(
        str(target / "bin" / "rcm-train"),
        "--config=rcm/configs/registry_distill.py",
        "--dryrun",
        "--",
        "experiment=toy_tf_c3-3",
        cwd=tmp_path,
        path=target,
    )
    assert "registry: rcm.configs.registry_distill" in dry
    command = str(target / "bin" / "rcm")
    assert "usage: rcm COMMAND" in _run(command, cwd=tmp_path, path=target)
    assert "fits" in _run(command, "plan", "experiment=toy_tf_c3-3", "gpus=1", "memory_gib=8", cwd=tmp_path, path=target)
    said = _run(command, "stream", cwd=tmp_path, path=target)
    assert f"{target}/rcm/_assets/toy" in said and "next: rcm stream --prompt" in said
    assert min(probe(tmp_path / "outputs" / "stream.mp4").height, probe(tmp_path / "outputs" / "stream.mp4").width) >= 256
    quick = ("demo", "--quick", "--scale", "0.02", "--videos", "8")
    assert "open outputs/demo_quick/report.html" in _run(command, *quick, cwd=tmp_path, path=target)
