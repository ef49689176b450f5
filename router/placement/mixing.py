"""What schemes of weights computed an answer, where several may (router.mixed_quantization).

An answer of one scheme is that of an engine of this scheme, as everywhere. One that several computed is no engine's: it
says so. KV is another matter. It follows from its tokens and from the weights that computed it, whoever chose the
tokens: what a worker computes itself is its own, also behind tokens of another scheme. Only KV that is handed over
between schemes is mixed, and what goes on from there. Its blocks have names of their own, so that nobody finds them who
does not mix.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from router.placement.cluster import WorkerInfo

_PLAIN = "none"  # as engine.quantization says it
_UNKNOWN = "unknown"


@dataclass(slots=True)
class Mixing:
    """Of one request; told of every leg in the order of their starts. `schemes`: that computed it, from the first on.
    `kv`: what stands where it decodes is mixed. `layout`: there.
    """

    schemes: tuple[str, ...] = ()
    kv: bool = False
    layout: str = ""
    _handoffs: dict[str, bool] = field(default_factory=dict)  # whether what they bring is mixed

    @property
    def mixed(self) -> tuple[str, ...]:
        """The schemes, where they are several; else the answer is that of one engine."""
        return self.schemes if len(self.schemes) > 1 else ()

    def starts(
        self,
        worker: WorkerInfo,
        source: WorkerInfo | None,
        *,
        serves: str,
        pulls: str,
        num_emitted: int,
        resumed: bool,
        beside: bool,
    ) -> bool:
        """A leg. `serves`, `pulls`: handoff ids, or empty; `source`: of one that pulls. `beside`: it goes on from what
        stands there, or serves a reader that does. Returns whether its KV will be mixed.
        """
        if not num_emitted and not pulls and not beside:
            self.schemes = ()  # from scratch
        if resumed and not self.schemes:
            self.schemes = (_UNKNOWN,)  # what computed its first tokens, before it came here
        scheme = worker.weights or _PLAIN
        if scheme not in self.schemes:
            self.schemes += (scheme,)
        if serves:
            self._handoffs[serves] = False
            return False
        if pulls:
            # A migration's source decodes it now: what it brings is what stands there.
            brings = self._handoffs.setdefault(pulls, self.kv)
            self.kv = brings or source is None or source.layout_fingerprint != worker.layout_fingerprint
        else:
            self.kv = beside and self.kv
        self.layout = worker.layout_fingerprint
        return self.kv

    def copy(self) -> Mixing:
        """For another answer that goes on from the same KV."""
        return replace(self, _handoffs={})
