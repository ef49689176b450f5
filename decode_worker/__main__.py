"""`python -m decode_worker --config FILE`."""

from elastic_worker.server import serve
from worker.main import run

run("decode", serve)
