"""`python -m prefill_worker --config FILE`."""

from elastic_worker.server import serve
from worker.main import run

run("prefill", serve)
