"""What a process tells about itself: metrics, traces, logs. One list of metrics, `catalog.py`, and all else from it."""
