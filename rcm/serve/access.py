"""Who may talk to the server: a token where one is set, pages of its own origin, names of this
machine.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Access:
    """`token`: must come as `?token=` or as `Authorization: Bearer`; printable, without blanks.
    `origins`: pages that may open a stream beside the server's own.

    `loopback`: the server listens on this machine only; a request under any other host name is then
    another site's name that was pointed here, and is refused.
    """

    token: str | None = None
    origins: tuple[str, ...] = ()
    loopback: bool = True

    def refusal(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """Why a request is refused, or None."""
        host = headers.get("host", "")
        if self.loopback and _name(host) not in LOOPBACK:
            return f"this server answers to {', '.join(LOOPBACK)}, not to {host[:80]!r}"
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and not _same(origin, host):
            return (
                f"pages of {origin[:80]!r} may not use this server; allow them with --allow_origin"
            )
        if self.token is None:
            return None
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            given = bearer.encode("latin-1", errors="replace")  # the bytes that came
        else:  # a plus of an address is read as a blank, which no token has
            given = query.get("token", "").replace(" ", "+").encode(errors="replace")
        if not hmac.compare_digest(given, self.token.encode()):
            return (
                "a token is needed: open the address with ?token=..., or send Authorization:"
                " Bearer ..."
            )
        return None


def _name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _same(origin: str, host: str) -> bool:
    try:
        return urlsplit(origin).netloc.lower() == host.lower() != ""
    except ValueError:
        return False
