"""Owns the request: admission, placement, life cycle, streams, text.

service.py     gRPC in: a call or a session -> Dispatcher.submit
admission.py   bad input becomes a clear error before any work
policy.py      decide(): local or split, where, and why (pure)
lifecycle.py   one state machine per request (pure): tokens in order, exactly once, whatever happens
cluster.py     who is there, how loaded, what is promised (pure)
clients.py     one stream per worker
"""
