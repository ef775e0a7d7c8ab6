"""The public names of every module are frozen: a removal or a rename must be a decision.

After a deliberate change: `RCM_UPDATE_GOLDEN=1 python -m pytest
tests/hygiene/test_public_names.py`, and read the diff.
"""

from __future__ import annotations

import ast
import json
import os

import pytest

from tests.hygiene.source import ROOT, files, name, tree

GOLDEN = ROOT / "tests" / "hygiene" / "public_names.json"


def public_names() -> dict[str, list[str]]:
    found = {}
    for path in files("rcm"):
        names = []
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.append(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names += [t.id for t in targets if isinstance(t, ast.Name)]
        public = sorted(n for n in names if not n.startswith("_"))
        if public:
            found[name(path)] = public
    return found


def test_public_names_are_the_recorded_ones() -> None:
    now = public_names()
    if os.environ.get("RCM_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(now, indent=1) + "\n")
        pytest.skip("golden file rewritten: read its diff")
    recorded = json.loads(GOLDEN.read_text())
    gone = {f"{module}: {n}" for module, names in recorded.items() for n in names if n not in now.get(module, ())}
    new = {f"{module}: {n}" for module, names in now.items() for n in names if n not in recorded.get(module, ())}
    assert not gone, f"public names disappeared: {sorted(gone)}"
    assert not new, f"public names appeared (RCM_UPDATE_GOLDEN=1 records them): {sorted(new)}"
