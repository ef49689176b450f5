"""Load on a cluster of real processes while faults are injected, one at a time, and what every request then saw.

    cases     requests with known answers, recorded before any fault
    Load      clients, through Generate and through Session, that keep the routers busy
    plan      a seed's faults, the same every time
    Driver    injects one, waits until the cluster is whole again, lets it run, injects the next
    judge     every answer against the undisturbed one; every other end against its deadline

A request ends as `complete` (its tokens are then the undisturbed ones), as `error` (a status with a message, in time),
or as `cancelled` (by the client). Whatever its end, what it was sent before is a prefix of the undisturbed answer.
"""
