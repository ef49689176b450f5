"""Where the ranks' parts of a model come together: three places, and nothing else in it knows of ranks.

    Summed       behind a linear layer whose input is split: the ranks' answers are added
    JoinedHead   the vocabulary is split: the ranks' logits are put side by side
    of_experts   each rank computes its experts for the rows that chose them, and the answers are added

No row is ever dropped: an expert takes as many as chose it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import linear

from engine.attention.interface import AttentionRefused
from engine.experts.choose import Alone
from engine.experts.load import ExpertLoad
from engine.ranks.cuts import Cuts, ExpertsCut
from engine.ranks.place import Place, share


class Ranks(Protocol):
    """What the processes of a worker do together. All call the same, in the same order."""

    place: Place

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The same on every rank, to the last bit: parts are added in the order of ranks."""
        ...

    def join(self, part: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """Parts side by side in the last dimension, rank i's of sizes[i]."""
        ...


class Summed(nn.Module):
    """The bias is added once, behind the sum. The layer keeps its name, by which others know it."""

    def __init__(self, name: str, layer: nn.Linear, ranks: Ranks) -> None:
        super().__init__()
        self.bias = layer.bias
        layer.register_parameter("bias", None)
        self._name, self._ranks = name, ranks
        self.add_module(name, layer)

    @property
    def weight(self) -> nn.Parameter:
        return self._modules[self._name].weight  # type: ignore[union-attr, return-value]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self._ranks.sum(self._modules[self._name](x))  # type: ignore[misc]
        return out if self.bias is None else out + self.bias


class JoinedHead(nn.Module):
    """`lm_head` with this rank's tokens of the vocabulary: a part that was read, or rows of the embedding."""

    def __init__(self, layer: nn.Linear, vocabulary: int, ranks: Ranks) -> None:
        super().__init__()
        place = ranks.place
        shares = [Place(rank, place.degree).columns(vocabulary) for rank in range(place.degree)]
        self._sizes = [end - start for start, end in shares]
        self._ranks = ranks
        self._rows = slice(None) if layer.weight.shape[0] != vocabulary else slice(*shares[place.rank])
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias[self._rows]
        return self._ranks.join(linear(x, self.weight[self._rows], bias), self._sizes)


class ExpertsHere:
    """Of a module of experts: who of the chosen is here. `load` counts all rows, by the model's own numbers, on the
    leader: each rank sees all choices.
    """

    def __init__(self, cut: ExpertsCut, ranks: Ranks, device: torch.device) -> None:
        self._cut, self._ranks = cut, ranks
        self.leaves_out = False  # what computes the experts knows a number that is none of theirs
        self.load = torch.zeros(cut.count, dtype=torch.int64, device=device)

    def before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        given = [*args, *kwargs.values()]  # in the order of the module's own parameters
        if len(given) != 3 or given[1].is_floating_point():
            raise AttentionRefused("a router that hands its experts something else than rows, choices and weights")
        x, chosen, weights = given
        if self._ranks.place.leads:
            self.load += torch.bincount(chosen.flatten(), minlength=self._cut.count)[: self._cut.count]
        here = (chosen >= self._cut.first) & (chosen < self._cut.end)
        nowhere = self._cut.end - self._cut.first if self.leaves_out else 0
        chosen = torch.where(here, chosen - self._cut.first, nowhere)
        weights = torch.where(here, weights, torch.zeros_like(weights))
        return (x, chosen, weights), {}

    def after(self, _: Any, __: Any, answer: torch.Tensor) -> torch.Tensor:
        return self._ranks.sum(answer)


def join_ranks(model: Any, cuts: Cuts, ranks: Ranks) -> list[ExpertsHere]:
    """Once the weights are there. Returns what counts the rows of experts, by layer."""
    for path in cuts.summed:
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, Summed(name, model.get_submodule(path), ranks))
    head = getattr(model, "lm_head", None)
    vocabulary = model.config.get_text_config().vocab_size
    if type(head) is nn.Linear and vocabulary >= ranks.place.degree:
        model.lm_head = JoinedHead(head, vocabulary, ranks)
    counted: list[ExpertsHere] = []
    for path, cut in cuts.experts.items():
        module: Any = model.get_submodule(path)
        bias = getattr(module, "down_proj_bias", None)
        if bias is not None and ranks.place.part_of_expert:  # one of those that have a part of the expert adds it
            bias.data.zero_()
        here = ExpertsHere(cut, ranks, module.down_proj.device)
        module.register_forward_pre_hook(here.before, with_kwargs=True)
        module.register_forward_hook(here.after)
        module.diptych_experts_here = here
        counted.append(here)
    return counted


def load_of_all(model: Any, grouped: ExpertLoad | None, place: Place) -> ExpertLoad | None:
    """Of all experts, wherever they are. From here on what computes them is ours, and knows whom to leave out."""
    here = [m for m in model.modules() if hasattr(m, "diptych_experts_here")]
    if grouped is None or not here:
        return grouped
    for module in here:
        counted: ExpertsHere = module.diptych_experts_here
        counted.leaves_out = getattr(module, "diptych_experts", None) is not None and not isinstance(
            module.diptych_experts, Alone
        )
        counted.load.zero_()
    groups = place.expert_groups
    loads = [m.diptych_experts_here.load for m in here]
    ends = [[share(len(load), groups, group)[1] for group in range(groups - 1)] for load in loads if groups > 1]
    return ExpertLoad(loads, grouped.names, ends)
