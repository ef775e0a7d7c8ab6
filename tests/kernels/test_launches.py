"""Triton launches go to the device of their tensors: Triton itself takes the current one, whatever
the tensors are on.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import rcm.kernels

FOLDER = Path(rcm.kernels.__file__).parent


def launches_outside_of_a_device(source: str) -> list[int]:
    """Lines of `kernel[grid](...)`, or of `rcm.kernels.precompile.launch`, that stand in no `with`
    statement that names a device.
    """
    found: list[int] = []
    launchers = ("precompile.launch", "launch") if "from rcm.kernels.precompile import launch\n" in source else ("precompile.launch",)

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.With):
            guarded = guarded or any("device" in ast.unparse(item.context_expr) for item in node.items)
        if isinstance(node, ast.Call) and not guarded and (isinstance(node.func, ast.Subscript) or ast.unparse(node.func) in launchers):
            found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse(source), False)
    return found


def test_the_rule_sees_a_bare_launch():
    assert launches_outside_of_a_device("with torch.no_grad():\n    kernel[grid](x)\n") == [2]
    assert launches_outside_of_a_device("with torch.cuda.device(x.device):\n    kernel[grid](x)\n") == []
    assert launches_outside_of_a_device("from rcm.kernels.precompile import launch\nlaunch(kernel, grid, x)\n") == [2]
    assert launches_outside_of_a_device("precompile.launch(kernel, grid, x)\n") == [1]


@pytest.mark.parametrize("path", sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")))
def test_every_launch_makes_the_device_of_its_tensors_current(path):
    lines = launches_outside_of_a_device((FOLDER / path).read_text())
    # the first two are entered through triton_jvp, the third by those whose launches are looked at
    # here: they hold the device
    entered_with_it = ("flash_jvp/launch.py", "flash_jvp/launch_hopper.py", "precompile.py")
    assert path in entered_with_it or not lines, f"{path}: lines {lines}"
