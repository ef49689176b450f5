"""What a worker says of the experts of its model."""

from __future__ import annotations

from worker.metrics import expert_readers


class Load:
    def routed(self) -> int:
        return 480

    def imbalance(self, now: float) -> float:
        return 1.5

    def by_group(self) -> dict[str, int]:
        return {"0": 300, "1": 180}


def test_numbers_for_a_mixture_and_none_for_other_models() -> None:
    assert {name: list(read()) for name, read in expert_readers(Load()).items()} == {
        "diptych.experts.tokens": [(480, {})],
        "diptych.experts.imbalance": [(1.5, {})],
        "diptych.experts.group.tokens": [(300, {"group": "0"}), (180, {"group": "1"})],
    }
    assert [list(read()) for read in expert_readers(None).values()] == [[], [], []]
