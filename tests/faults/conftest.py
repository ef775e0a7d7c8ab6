"""Note the class and the outcome of every case, for the counts at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.case import Broken, Fault, count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """The verdict travels with the report, so that it is counted across worker processes."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    if not isinstance(case, Fault):
        return (yield)
    request = item._request
    try:
        result = yield
    except Broken as broken:
        count(request, case.kind, broken.verdict)
        raise
    except pytest.skip.Exception:
        raise
    except BaseException:
        count(request, case.kind, "unclear")
        raise
    count(request, case.kind)
    return result
