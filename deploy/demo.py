"""`make demo`: a local cluster under Ray Serve answers two real prompts over gRPC, then stops.

The short prompt goes to decode alone; the long one is split. Exits non-zero if either does not.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from deploy.cli import fetch_embedded_model, summary_line
from deploy.clients import Answer, RequestFailed, build_request, channel_to, generate
from deploy.cluster_up import running_cluster
from deploy.config import ClusterConfig
from deploy.console import err, fail, out
from deploy.progress import Stages
from deploy.ray_cluster import ClusterStartError

_DOCS = Path(__file__).resolve().parents[1] / "docs"
_DOCUMENTS = ("design.md", "lifecycle.md")
_SHORT = "Why is the sky blue? Answer in one sentence."
# What may hold a decode worker up is twice this: more than forty tokens take on a slow machine, less than thousands do
# on a fast one.
_ITL_TARGET_MS = 60.0


def main() -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    fetch_embedded_model()
    text = "\n\n".join((_DOCS / name).read_text(encoding="utf-8") for name in _DOCUMENTS)
    long_prompt = f"{text}\n\nSummarise this document in two sentences."
    config = ClusterConfig.model_validate({"router": {"itl_target_ms": _ITL_TARGET_MS}})
    stages = Stages(err, each=lambda: signal.signal(signal.SIGTERM, stop))
    try:
        with running_cluster(config, use_ray=True, say=stages, timeout_s=300.0) as (target, _):
            stages.done()
            short = _ask(target, "a short prompt", _SHORT)
            long = _ask(
                target, f"a long prompt ({' and '.join(_DOCUMENTS)}, {len(long_prompt)} characters)", long_prompt
            )
    except ClusterStartError as error:
        stages.done()
        fail(str(error))
    except RequestFailed as error:
        fail(f"{error.code}: {error}")
    except KeyboardInterrupt:
        stages.done()
        fail("interrupted")
    finally:
        stages.done()
    if short.split or not long.split:
        fail(
            f"expected the short prompt local and the long one split, got {short.finished.route.rule} and "
            f"{long.finished.route.rule}"
        )
    out.print("\nBoth answered: the short one on decode alone, the long one split over two pools.")
    out.print('Next: `make up`, then `.venv/bin/diptych generate "..."` and `.venv/bin/diptych status`.')


def _ask(target: str, what: str, prompt: str) -> Answer:
    out.print(f"\n{what}", style="bold")
    answer = Answer()
    request = build_request(prompt, chat=True, max_tokens=64)
    with channel_to(target) as channel:
        for piece in generate(channel, request, 300.0, answer):
            sys.stdout.write(piece)
            sys.stdout.flush()
    out.print()
    out.print(summary_line(answer), style="dim", soft_wrap=True)
    return answer


if __name__ == "__main__":
    main()
