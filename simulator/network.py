"""KV over NICs. Each worker has a queue to send and a queue to receive; a transfer takes its turn in both.

    P sends:     |--- a ---|      |--- b ---|            b is due at D2 only when c has gone
    D2 receives:      |--- c -----|--- b ---|

First come, first served, at the slower of the two ends. A transfer whose bytes become ready piece by piece (chunks of
a prompt) can overlap with the computation, but it cannot end before its last piece was ready and has moved.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Nic:
    """Of one worker. `*_free_s` is when its queue will be empty."""

    bytes_per_s: float
    send_free_s: float = 0.0
    receive_free_s: float = 0.0
    sent_bytes: float = 0.0
    received_bytes: float = 0.0

    def queued_send_bytes(self, now_s: float) -> float:
        return max(0.0, self.send_free_s - now_s) * self.bytes_per_s


def move(
    source: Nic, sink: Nic, num_bytes: float, first_ready_s: float, last_ready_s: float, last_bytes: float
) -> float:
    """Queue a transfer; returns when it will have arrived.

    Its first piece is ready at `first_ready_s`, its last one, of `last_bytes`, at `last_ready_s`.
    """
    rate = min(source.bytes_per_s, sink.bytes_per_s)
    start = max(first_ready_s, source.send_free_s, sink.receive_free_s)
    end = max(start + num_bytes / rate, last_ready_s + last_bytes / rate)
    source.send_free_s = sink.receive_free_s = end
    source.sent_bytes += num_bytes
    sink.received_bytes += num_bytes
    return end
