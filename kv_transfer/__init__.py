"""What a KV block is outside one process: its name, layout, lease, fence, and how its bytes move.

    source (has the KV)                               reader (wants it)
    ------------------                                -----------------
    1. open(handoff)           <-- follow ---------   begin(handoff)
    2. announce blocks + gens  --- BlocksAnnounced->  pin own blocks, submit a pull
       (pinned under a lease)  <== one-sided read ==  data, then generations: equal -> arrived
    3. finish: first token     --- FinalAnnounced ->  all arrived -> adopt
    4. unpin                   <-- release --------   (or: renew ... cancel ... expiry)

Everything in this package except `service.py`, `clients.py`, `wire.py` and `nixl_*.py` is plain Python
without sockets, threads or clocks.
"""
