"""What a client may ask for, how long, and how much of it waits for a slow reader."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    sessions          open at once; `clients`: sockets at once.
    message_bytes     of one message to the server; `prompt_chars` of a prompt; `steps` per chunk;
                      `window` in blocks.
    rate, burst       messages per second of one client over time, and at once; whoever goes on for
                      `strikes` refused ones is closed.
    idle_s            a stream that nobody watches is closed after that long; `session_s`: any
                      private stream.
    queue_frames      that wait for one client; older ones are dropped. `send_s`: a client that
                      takes nothing for that long is closed (one that reads slowly may take what its
                      kernel holds in lumps, many seconds apart).
    lead_frames       pictures that wait for the playback clock; another chunk is made when there
                      are not more.
    """

    sessions: int = 4
    clients: int = 100
    message_bytes: int = 8192
    prompt_chars: int = 1000
    steps: int = 64
    window: int = 64
    rate: float = 20.0
    burst: int = 40
    strikes: int = 100
    idle_s: float = 60.0
    session_s: float = 3600.0
    queue_frames: int = 8
    send_s: float = 30.0
    lead_frames: int = 1


class Bucket:
    """A rate with bursts: `take(now)` says whether one more is allowed."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate, self._burst, self._left = rate, burst, float(burst)
        self._at: float | None = None

    def take(self, now: float) -> bool:
        """Use one of what has gathered until `now` (seconds of any clock that does not go back)."""
        if self._at is not None:
            self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True
