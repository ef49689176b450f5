"""What prefill and decode workers share: the step loop, the router's stream, registration, reports, drain.

    asyncio loop (gRPC)                     engine thread (all decisions)            transport thread (NIXL)
    -------------------                     -----------------------------            -----------------------
    Connect stream --- commands ---------->  inbox                                    pulls
    Attach streams --- announcements ----->    |  core.handle ... core.tick      <--- outcomes
                                               |  plan = core.schedule
                                               |  result = runner.execute(plan)
    one message per stream per step <------  outbox: core.commit -> core.take_outbox

The cores (`worker/core.py`, `prefill_worker/core.py`, `decode_worker/core.py`) are plain Python: messages and `now` in,
an outbox out. Threads, sockets and clocks are in `loop.py`, `service.py` and `server.py`.
"""
