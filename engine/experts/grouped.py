"""Experts in torch: rows sorted by expert, one product for each expert that was chosen."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from engine.experts.parts import ExpertsModule


class TorchExperts:
    """On CUDA the host waits once a layer, for the counts."""

    name = "torch, one product an expert"

    def __init__(self, experts: ExpertsModule) -> None:
        self._experts = experts
        self.load = torch.zeros(experts.count, dtype=torch.int64, device=experts.up.device)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        e, choices = self._experts, chosen.shape[1]
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=e.count)[: e.count]  # what is no expert's number comes last
        self.load += counts
        given = x[order // choices]
        second = x.new_zeros(len(flat), x.shape[1])
        up, down, up_bias, down_bias = e.up, e.down, e.up_bias, e.down_bias
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if not count:
                continue
            end = start + count
            first = linear(given[start:end], e.rows(up, expert), None if up_bias is None else up_bias[expert])
            bias = None if down_bias is None else down_bias[expert]
            second[order[start:end]] = linear(e.gate(first), e.rows(down, expert), bias)
            start = end
        weighted = e.normed(second) * weights.flatten()[:, None]
        return weighted.view(len(x), choices, -1).sum(1).to(x.dtype)


class GroupedMm:
    """On CUDA: transformers' own grouped products, which wait for nothing and can be recorded. Not yet run on a GPU."""

    name = "grouped_mm"

    def __init__(self, experts: ExpertsModule) -> None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        self._module, self._forward = experts.module, grouped_mm_experts_forward
        self._counts = torch.zeros(experts.count + 1, dtype=torch.int64, device=experts.up.device)
        self.load = self._counts[: experts.count]  # the last is of rows that are sent nowhere
        self._ones = torch.ones(1, dtype=torch.int64, device=experts.up.device)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        flat = chosen.flatten()
        self._counts.scatter_add_(0, flat, self._ones.expand_as(flat))
        return self._forward(self._module, x, chosen, weights)
