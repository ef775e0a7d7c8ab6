"""What the documents name exists: files, definitions, links, modules, experiments, config keys;
their table of published rows is true.

After a deliberate change of a published row: `RCM_UPDATE_GOLDEN=1 python -m pytest
tests/hygiene/test_docs.py`, and read the diff.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from rcm.configs import registry_distill
from rcm.configs.compose import Run, compose_run, groups, options
from rcm.configs.convert import known_paths
from rcm.configs.schema import TrainConfig
from rcm.configs.schema_causal import CausalConfig
from rcm.diffusion.time_sampling import TimeLawConfig
from tests.hygiene.source import ROOT, name, tree

TOP = ("rcm", "configs", "scripts", "docs", "tests", ".ci")
METHOD = ROOT / "Causal_rCM.md"
TABLE = re.compile(r"(<!-- published rows -->\n).*?(<!-- end of published rows -->)", re.DOTALL)
Checker = Callable[[str], str | None]


def documents() -> list[Path]:
    """The documents a reader is sent to."""
    return [ROOT / "README.md", METHOD, *sorted((ROOT / "docs").rglob("*.md"))]


def broken(pattern: str, check: Checker) -> list[str]:
    """Every match of `pattern` (its first group) in the documents that `check` objects to, with its
    place.
    """
    found = []
    for path in documents():
        for match in re.finditer(pattern, path.read_text()):
            if problem := check(match[1]):
                line = path.read_text().count("\n", 0, match.start()) + 1
                found.append(f"{name(path)}:{line} {match[1]}: {problem}")
    return found


@cache
def defined(path: Path) -> frozenset[str]:
    """Names defined at module level, and methods as Class.method."""
    names = set()
    for node in tree(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def path_problem(text: str) -> str | None:
    """A repository path, perhaps a glob, perhaps followed by :definition."""
    path, _, definition = text.partition(":")
    matches = list(ROOT.glob(path.rstrip("/")))
    if not matches:
        return "no such file"
    if definition and definition not in defined(matches[0]):
        return f"{path} defines no {definition}"
    return None


def test_paths_and_definitions_exist() -> None:
    assert not broken(rf"`((?:{'|'.join(map(re.escape, TOP))})/[\w./*\-]*(?::[\w.]+)?)`", path_problem)
    assert path_problem("rcm/losses/scm.py:rf_tangent") is None
    assert path_problem("rcm/losses/scm.py:rf_tangents") and path_problem("rcm/losses/none.py"), "the check must be able to fail"


def test_relative_links_resolve() -> None:
    broken_links = []
    for path in documents():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                broken_links.append(f"{name(path)}: {target}")
    assert not broken_links


def test_modules_that_are_run_exist() -> None:
    assert not broken(r"(?:python|torchrun[^\n`]*?) -m ([\w.]+)", lambda m: None if importlib.util.find_spec(m) else "no such module")


def test_experiments_and_keys_are_known() -> None:
    registry_distill.register()
    known, choices = known_paths(TrainConfig), groups()
    declared = re.findall(r'\bRow\("(\w+)"\)', (ROOT / "docs" / "extending.md").read_text())
    own_rows = [f"{row}_{pattern}" for row in declared for pattern in options("pattern")]

    def experiment_problem(text: str) -> str | None:
        return None if text == "NAME" or text in (*options("experiment"), *own_rows) else "no such experiment"

    def key_problem(text: str) -> str | None:
        return None if text in known or text in choices else "no such config key"

    def option_problem(text: str) -> str | None:
        group, _, option = text.partition("=")
        return None if group not in choices or group == "experiment" or option in ("NAME", *options(group)) else "no such option"

    assert not broken(r"\bexperiment=([\w.\-]+)", experiment_problem)
    roots = "model|model_parallel|trainer|optimizer|scheduler|checkpoint|dataloader_train|job"
    assert not broken(rf"(?<![\w/.])((?:{roots})\.(?!\w+\()[a-zA-Z_][\w.]*\w)\b(?!\.(?:py|yaml))", key_problem)
    assert not broken(r"(?<![\w.])((?:data|net|pattern|precision|mesh|method)=[\w.\-]+)", option_problem)
    assert experiment_problem("toy_tf_c3-2") and key_problem("trainer.max_iters") and option_problem("precision=fp8")


def _number(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _law(law: TimeLawConfig) -> str:
    return f"LogNormal({law.p_mean:g}, {law.p_std:g})" if law.law == "lognormal" else f"UniformShift({law.shift:g})"


@cache
def _composed(row: str) -> Run:
    suffix = "_c3-3" if row.startswith("causal") else ""
    return compose_run([f"experiment={row}{suffix}"], environ={}, world_size=None, require_inputs=False)


def _cells(row: str) -> Iterator[str]:
    """Columns of one published row, from its composed config."""
    config = _composed(row).config
    model, causal = config.model.config, isinstance(config.model.config, CausalConfig)
    kind = model.training_type if causal else model.cm_type + " + DMD"
    scored = model.net_fake_score is not None
    others = {
        "causal": getattr(model, "net_causal_teacher", None),
        "bidir.": getattr(model, "net_bidirectional_teacher", None),
        "teacher": getattr(model, "net_teacher", None),
        "fake": model.net_fake_score,
    }
    times = {"tf_dcm": "grid 48, shift 3", "tf_kd": "stored", "df_kd": "stored", "sf_dmd": ""}.get(kind, _law(model.p_G))
    if kind == "tf_dscm":
        times = "grid 48, shift 3; " + times
    if kind == "tf_dcm" or kind == "tf_dscm":
        assert (model.dcm_total_steps, model.sample_timestep_shift) == (48, 3)
    optimizer, fake = config.optimizer, model.optimizer_fake_score
    assert not scored or (fake.betas, fake.weight_decay) == (optimizer.betas, optimizer.weight_decay)
    steps = list(getattr(model, "sf_simulation_steps_per_chunk", ())) or (model.max_simulation_steps_fake if scored else "")
    yield f"`{row.removeprefix('causal_')}`"
    yield kind
    yield ", ".join(f"{role} {net.preset}" for role, net in others.items() if net is not None) or "-"
    yield _number(optimizer.lr) + (f" / {_number(fake.lr)}" if scored else "")
    yield f"{optimizer.betas[0]:g}, {optimizer.betas[1]:g}"
    yield "; ".join(text for text in (times, f"p_D {_law(model.p_D)}" if scored else "") if text)
    yield str(model.tangent_warmup) if "scm" in kind else "-"
    yield str(model.student_update_freq) if scored else "-"
    yield str(steps or "-")
    yield f"{model.fsdp_shard_size} / {config.model_parallel.context_parallel_size}"
    yield model.net.sac_config.mode
    yield f"{config.checkpoint.save_iter} / {config.trainer.sampling.every_n}, {config.trainer.sampling.ema_every_n}"


def published() -> list[str]:
    """Names of the rows that a paper has."""
    return [row.name for row in registry_distill.ROWS if not row.name.startswith("toy_") and not row.name.endswith("_lora")]


def published_table() -> str:
    """The Markdown table of published rows."""
    head = (
        "row (causal rows without `causal_`)",
        "objective",
        "other networks",
        "lr student / fake",
        "betas",
        "training times",
        "tangent warm-up",
        "1 student in",
        "rollout steps",
        "shard / cp",
        "recompute",
        "save / sample, EMA sample",
    )
    rows = [tuple(_cells(name)) for name in published()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows)) + "\n"


def test_table_of_published_rows_is_that_of_the_configs() -> None:
    registry_distill.register()
    text, table = METHOD.read_text(), published_table()
    if os.environ.get("RCM_UPDATE_GOLDEN"):
        METHOD.write_text(TABLE.sub(lambda m: m[1] + table + m[2], text))
        pytest.skip("table rewritten: read its diff")
    match = TABLE.search(text)
    assert match, f"{name(METHOD)} has lost the markers of its table"
    assert match[0] == match[1] + table + match[2], "the table differs from the configs (RCM_UPDATE_GOLDEN=1 rewrites it)"


@pytest.mark.parametrize("row", published())
def test_the_command_in_a_rows_header_gives_all_that_the_run_needs(row: str) -> None:
    registry_distill.register()
    text = (ROOT / "configs" / "experiment" / f"{row}.yaml").read_text()
    if "as in sf_dmd)" in text:
        text += (ROOT / "configs" / "experiment" / "causal_wan2pt1_1pt3B_res480p_t2v_sf_dmd.yaml").read_text()
    needed = [sentence.split()[0] for sentence in _composed(row).missing]
    assert "dataloader_train.tar_path_pattern" in needed
    assert not [key for key in needed if f"{key}=" not in text.partition("Command: ")[2]]
