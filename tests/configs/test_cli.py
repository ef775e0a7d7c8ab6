"""Launching: forms of the command line, registries, dry runs, the table, exit codes."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from rcm.configs import cli, listing, registry_distill
from rcm.configs.compose import compose_run
from rcm.configs.registry_distill import Row
from rcm.core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TF = "experiment=toy_tf_c3-3"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list:
    """Stands in for the builder: collects the runs it is given."""
    runs: list = []
    monkeypatch.setitem(sys.modules, "rcm.configs.build", types.SimpleNamespace(run=runs.append))
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return runs


@pytest.mark.parametrize(
    "argv",
    [
        ["--config=rcm/configs/registry_distill.py", "--", TF, "trainer.max_iter=3"],
        ["--config", "rcm/configs/registry_distill.py", TF, "trainer.max_iter=3"],
        ["--config=rcm.configs.registry_distill", TF, "trainer.max_iter=3"],
        [TF, "trainer.max_iter=3"],
        ["--", TF, "trainer.max_iter=3"],
    ],
)
def test_forms_of_the_command(launched: list, argv: list[str]) -> None:
    assert cli.main(argv) == 0
    assert launched[0].config.trainer.max_iter == 3
    assert launched[0].experiment == "toy_tf_c3-3"
    assert launched[0].registry == "rcm.configs.registry_distill"


def test_registry_path_works_from_any_folder(launched: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--config=rcm/configs/registry_distill.py", "--", TF]) == 0


def test_own_registry_adds_rows(launched: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(
        textwrap.dedent("""
        from rcm.configs import registry_distill as base

        def register():
            base.register()
            body = {"defaults": ["toy_tf", "_self_"], "trainer": {"max_iter": 7}}
            base.add_row(base.Row("my_tf"), body=body)
        """)
    )
    stored = ConfigStore.instance().repo["experiment"]
    monkeypatch.setitem(ConfigStore.instance().repo, "experiment", dict(stored))
    assert cli.main([f"--config={mine}", "--", "experiment=my_tf_c1-4"]) == 0
    assert launched[0].config.trainer.max_iter == 7
    assert launched[0].config.model.config.chunk_t == 4
    assert launched[0].registry == str(mine)


def test_a_typo_in_a_row_is_found_when_it_is_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra merges rows without looking at their keys; the schema does."""
    registry_distill.register()
    monkeypatch.setitem(ConfigStore.instance().repo, "experiment", dict(ConfigStore.instance().repo["experiment"]))
    registry_distill.add_row(Row("typo", causal=False), body={"defaults": ["toy_bidirectional", "_self_"], "trainer": {"max_itr": 3}})
    with pytest.raises(ConfigError, match=r"unknown key 'trainer.max_itr'; did you mean trainer.max_iter"):
        compose_run(["experiment=typo"], environ={}, require_inputs=False)


def test_missing_configs_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rcm.__file__", str(tmp_path / "rcm" / "__init__.py"))
    with pytest.raises(ConfigError, match=r"no train.yaml in .*_configs nor in .*configs; reinstall rcm"):
        registry_distill.config_dir()


ROW = "from rcm.configs import registry_distill as r\ndef register():\n    r.register()\n    r.add_row(r.Row(%s"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("", "must define a function register"),
        (None, "mine.py: no such file"),
        ("import a_package_that_is_not_there", "mine.py: line 1: ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("def register(:", r"mine.py: SyntaxError: invalid syntax \(mine.py, line 1\)"),
        ("def register():\n    raise RuntimeError('boom')", "mine.py: line 2: RuntimeError: boom"),
        (ROW % "'toy_tf'), body={})", "toy_tf is an experiment of the package; choose another name"),
        (ROW % "'mine'), body={'defaults': ['toy_tff', '_self_']})", "does not compose: In 'experiment/mine': Could not load .*toy_tff"),
    ],
)
def test_bad_registries_are_one_sentence(tmp_path: Path, capsys, monkeypatch, source: str | None, told: str) -> None:
    store, file = ConfigStore.instance(), tmp_path / "mine.py"
    monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))  # other tests list what is in it
    if source is not None:
        file.write_text(source)
    assert cli.main([f"--config={file}", "--dryrun", "experiment=mine_c3-3"]) == 2
    said = capsys.readouterr().err
    assert re.search(told, said) and said.startswith("error: ") and said.count("\n") == 1, said


def test_a_registry_may_define_records(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Size:\n    width: int = 3\ndef register():\n    assert Size().width == 3\n"
    )
    assert cli.load_registry(str(file)) == str(file)


def test_another_clone_in_the_working_folder_is_not_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / cli.DEFAULT_REGISTRY
    other.parent.mkdir(parents=True)
    other.write_text("raise RuntimeError('the code of another clone')")
    monkeypatch.chdir(tmp_path)
    assert cli.load_registry(cli.DEFAULT_REGISTRY) == "rcm.configs.registry_distill"


def test_a_module_that_is_not_there_is_no_registry() -> None:
    with pytest.raises(ConfigError, match="no such module"):
        cli.load_registry("rcm.no_such")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "nothing chosen; give experiment=NAME"),
        (["--confg=x", TF], "unknown flag '--confg=x'"),
        (["--dry-run", TF], "unknown flag '--dry-run'; did you mean --dryrun? flags are"),
        (["trainer.max_iter=3"], "template"),
        ([TF, "trainer.max_itr=3"], "did you mean trainer.max_iter"),
        (
            ["experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_c3-3", "mesh=one_gpu", "model.config.fsdp_shard_size=1"],
            "student_ckpt is empty",
        ),
    ],
)
def test_refusals_exit_with_2_and_launch_nothing(launched: list, capsys: pytest.CaptureFixture, argv: list[str], message: str) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not launched


def test_world_size_comes_from_torchrun(launched: list, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main([TF, "model_parallel.context_parallel_size=2"]) == 0
    assert launched[0].mesh == (2, 1, 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert cli.main([TF, "model_parallel.context_parallel_size=2"]) == 2


def test_dryrun_prints_the_resolved_config_and_what_is_missing(launched: list, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--dryrun", "experiment=causal_wan2pt1_1pt3B_res480p_t2v_tf_dcm_c3-3"]) == 0
    out = capsys.readouterr().out
    assert "training_type: tf_dcm" in out
    assert "# still missing: model.config.causal_teacher_ckpt is empty" in out
    assert not launched


def test_table_lists_variants_with_sizes_and_needs(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--list", "1pt3B", "tf_dcm_c"]) == 0
    said = capsys.readouterr().out
    names = [line.strip() for line in said.splitlines() if line.startswith("    causal_")]
    assert [name.rsplit("_", 1)[1] for name in names] == ["c1-1", "c1-4", "c3-3"]
    about = " ".join(said.split())
    assert "net 1.3B (1,419.00 M), with causal 14B; lr 2e-06, " in about and " ranks 4/32; " in about
    assert "ok; needs causal_teacher_ckpt, neg_embed_path, student_ckpt, tar_path_pattern" in about
    assert cli.main(["--list", "1pt3B", "tf_dcm_lora"]) == 0
    assert "net 1.3B (1,419.00 M), adapters of rank 64, with causal 14B; " in " ".join(capsys.readouterr().out.split())


def test_whole_list_is_grouped_narrow_and_composes_nothing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing.compose, "compose_run", None)
    assert cli.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= listing.WIDTH
    assert [line for line in lines if line.endswith(":")] == ["toy world, two CPU cores:", "Wan:"]
    assert {line.strip() for line in lines if line.startswith("  ")} == {n for n in registry_distill.experiment_names() if "debug" not in n}
    assert cli.main(["--list", "1pt3B", "tf_sdm"]) == 2
    assert "no experiment has '1pt3B' and 'tf_sdm' in its name" in capsys.readouterr().err


def test_listing_has_its_own_entry_point(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rcm-experiments", "toy_tf_c3-3", "debug"])
    assert cli.list_main() == 0
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines() if row.startswith("    toy_")] == ["toy_tf_c3-3_debug"]


def test_a_row_that_fails_shows_in_the_table_and_the_exit_code(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("impossible")

    monkeypatch.setattr(listing.compose, "compose_run", refuse)
    assert cli.main(["--list", "toy_tf_c3-3"]) == 1
    assert "FAILS: impossible" in capsys.readouterr().out


def test_scripts_train_is_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "scripts.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--dryrun" in done.stdout
