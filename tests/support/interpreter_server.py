"""A process that has torch and Triton's interpreter imported and forks for every program it is
asked to run: importing them costs three seconds, more than most programs take.

TRITON_INTERPRET=1 python -m tests.support.interpreter_server reads JSON lines {"module", "words",
"out", "err"} (files for what is printed) and answers each with a line: the program's exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import sys
import threading
import traceback
from typing import Any

import torch
import torch._dynamo  # torch.func asks for it
from triton.runtime import interpreter


class Patches:
    """Triton's replacement of its language by the interpreter's, once per launch. As shipped, every
    device function that a program calls looks through the language again and finds it replaced:
    half of the time of small programs.
    """

    def __init__(self) -> None:
        self.patch, self.scope, self.done = interpreter._patch_lang, None, set[tuple[str, ...]]()

    def __call__(self, fn: Any) -> Patches:
        """Launches keep what this returns and call `restore`, device functions drop it."""
        language = (interpreter.tl, interpreter.tl.core)
        used = tuple(sorted(name for name, value in fn.__globals__.items() if value in language))
        if used not in self.done:
            scope = self.patch(fn)
            self.scope = self.scope or scope
            self.done.add(used)
        return self

    def restore(self) -> None:
        self.scope.restore()
        self.scope, self.done = None, set()


def run(module: str, words: list[str], out: str, err: str) -> int:
    """`python -m module *words` in this process, printing into files; its exit status."""
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    threading.Thread(target=_end_with_the_tests, daemon=True).start()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _end_with_the_tests() -> None:
    """Nothing comes before the answer but the end of what asked."""
    select.select([sys.stdin], [], [])
    os._exit(1)


def main() -> None:
    torch.set_num_threads(1)
    if hasattr(interpreter, "_LangPatchScope"):  # triton 3.7
        interpreter._patch_lang = Patches()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{status}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
