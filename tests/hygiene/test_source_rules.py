"""House rules that a reader would otherwise have to check by eye. Each test names the places that
break it.
"""

from __future__ import annotations

import ast
import tomllib

from tests.hygiene.source import ROOT, calls, files, name, tree

MAX_LINES = 400


def test_no_file_is_longer_than_400_lines() -> None:
    long = {name(p): n for p in files("rcm", "scripts", "tests") if (n := p.read_text().count("\n")) > MAX_LINES}
    assert not long


def test_no_folder_or_module_is_called_utils() -> None:
    assert not [n for n in map(name, files("rcm", "scripts", "tests")) if "util" in n or "helpers" in n]


def test_modules_start_with_a_docstring_and_future_annotations() -> None:
    broken = []
    for path in files("rcm", "scripts"):
        module = tree(path)
        future = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in module.body)
        if not ast.get_docstring(module) or (path.name != "__init__.py" and not future):
            broken.append(name(path))
    assert not broken


def test_networks_do_not_cut_gradients_or_synchronise() -> None:
    """`.detach()` and `.data` drop tangents without a word, `.item()` waits for the device; the
    cache's append is the one exception.
    """
    broken = []
    for path in files("rcm/nets"):
        banned = {"item", "cpu", "cuda"} if path.name == "kv_view.py" else {"detach", "item", "cpu", "cuda"}
        broken += [f"{name(path)}:{line} .{called}()" for line, called in calls(path) if called in banned]
        broken += [f"{name(path)}:{n.lineno} .data" for n in ast.walk(tree(path)) if isinstance(n, ast.Attribute) and n.attr == "data"]
    assert not broken


def test_networks_take_no_open_keywords() -> None:
    """A misspelt keyword of a forward must raise."""
    broken = []
    for path in files("rcm/nets"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
                broken.append(f"{name(path)}:{node.lineno} {node.name}(**{node.args.kwarg.arg})")
    assert not broken


def test_duals_are_made_in_two_places() -> None:
    """core/dual.py opens the level; code with tangents of its own repacks through its `pack`."""
    found = {name(p) for p in files("rcm") for _, called in calls(p) if called == "make_dual"}
    assert found == {"rcm/core/dual.py"}


def test_public_names_have_docstrings() -> None:
    """Classes and functions at module level."""
    broken = []
    for path in files("rcm"):
        for node in tree(path).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                broken.append(f"{name(path)}:{node.lineno} {node.name}")
    assert not broken


def test_no_silent_repairs() -> None:
    """Turning NaN into numbers, partial loading, swallowed exceptions: each needs a sentence on its
    line that says why.
    """
    broken = []
    for path in files("rcm", "scripts"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            bad = "nan_to_num" in line or "strict=False)" in line.replace("zip(", "") and "load" in line or line.strip() == "except:"
            if bad and "#" not in line:
                broken.append(f"{name(path)}:{number} {line.strip()}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and len(node.body) == 1 and isinstance(node.body[0], ast.Pass):
                text = "".join(path.read_text().splitlines()[node.lineno : node.body[0].lineno])
                broken += [] if "#" in text else [f"{name(path)}:{node.lineno} except: pass"]
    assert not broken


def test_no_workplace_paths_in_files() -> None:
    suffixes = {".py", ".md", ".yaml", ".toml", ".txt", ""}
    folders = ("rcm", "scripts", "configs", "docs")
    texts = [p for f in folders for p in (ROOT / f).rglob("*") if p.is_file() and p.suffix in suffixes and "__pycache__" not in p.parts]
    marks = ("/" + "work/", "/" + "root/", "/" + "home/", "/" + "mnt/")
    assert not [name(p) for p in texts if any(m in p.read_text(errors="replace") for m in marks)]


def test_test_folders_mirror_the_package() -> None:
    packages = {p.name for p in (ROOT / "rcm").iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert {"core", "nets", "kernels"} <= packages, "no packages found: the rules above would pass on nothing"
    found = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and not p.name.startswith("_")}
    assert found <= packages | {"examples", "faults", "hygiene", "integration", "support", "scripts"}


def test_files_are_read_where_nothing_in_them_runs() -> None:
    """torch.load trusts sizes and names that any library may add; torch's reader of DCP folders and
    pickle execute what they read.
    """
    banned = {"torch.load", "torch.jit.load", "dcp.load", "np.load", "pickle", "pickle.load", "pickle.loads", "yaml", "dill", "joblib"}
    banned |= {"FileSystemReader", "dcp.FileSystemReader", "cloudpickle", "marshal", "shelve", "eval", "exec"}
    ends = {word.rpartition(".")[2] for word in banned}
    homes = {"rcm/storage/inert_pickle.py": {"pickle"}, "rcm/storage/pickle_file.py": {"pickle"}, "rcm/storage/dcp_folder.py": {"dcp.load"}}
    broken = []
    for path in files("rcm", "scripts", "examples"):
        for node in ast.walk(tree(path)):
            last = getattr(node, "attr", getattr(node, "id", None))  # to write every name out takes seconds
            named = {ast.unparse(node)} if last in ends else set()
            if isinstance(node, ast.Import | ast.ImportFrom):
                named = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            broken += [f"{name(path)}:{node.lineno} {found}" for found in named & banned - homes.get(name(path), set())]
    assert not broken


def test_only_device_code_goes_without_annotations() -> None:
    """The modules that mypy does not ask for annotations are those with kernels, and all in them
    that is no kernel has some.
    """
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["overrides"]
    spared = {module for o in overrides if not o["disallow_untyped_defs"] for module in o["module"]}
    with_kernels, bare = set(), []
    for path in files("rcm"):
        functions = [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef)]
        on_host = [n for n in functions if not any(ast.unparse(d).startswith(("triton.jit", "gluon.jit")) for d in n.decorator_list)]
        if len(on_host) < len(functions):
            with_kernels.add(name(path).removesuffix(".py").replace("/", "."))
            for n in on_host:
                args = [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs]
                if n.returns is None or any(a.annotation is None for a in args if a.arg not in ("self", "cls")):
                    bare.append(f"{name(path)}:{n.lineno} {n.name}")
    assert spared == with_kernels
    assert not bare
