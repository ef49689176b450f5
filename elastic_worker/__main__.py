"""`python -m elastic_worker --config FILE`: a worker without a role, until it is given one."""

from elastic_worker.server import serve
from worker.main import run

run("standby", serve)
