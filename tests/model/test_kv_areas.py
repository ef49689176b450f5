"""What a transport moves as a block is what the model's layers read and write as one."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch

from engine.kv_shape import parts
from kv_transfer.layout import KvLayout
from tests.model.test_recurrent import BLOCK, FAMILIES, loaded, saved
from tests.support import coordinates as c


def test_an_element_of_a_pool_is_where_the_layout_says_within_its_block(tmp_path: Path) -> None:
    runner = loaded(saved(tmp_path, "Lfm2", FAMILIES["Lfm2"]))
    layout, memory = KvLayout("", BLOCK, runner.facts.groups), runner.memory()
    assert [group.rule.state for group in layout.groups] == [False, True]
    assert memory.num_blocks == len(memory.generations) == sum(runner.num_blocks)
    first = 0
    for number, (area, group, pool) in enumerate(zip(memory.areas, layout.groups, parts(runner.kv), strict=True)):
        assert (area.num_blocks, area.block_bytes) == (len(pool), group.block_bytes(BLOCK))
        assert memory.bytes_of([first, first + area.num_blocks - 1]) == 2 * area.block_bytes
        for place in (0, 3, area.num_blocks - 1):
            assert memory.area_of(first + place) == number
            if group.rule.state:
                codes = np.arange(group.width, dtype=np.uint32) % 251
                for i in range(group.width):
                    pool[place, i] = int(codes[i])
                expected = codes.astype(np.uint8)
            else:
                codes = c.block_of(layout, number, place)
                elements = pool.view(torch.int32)
                for at in np.ndindex(*codes.shape):  # one by one, as a kernel counts
                    elements[(place, *at)] = int(codes[at].view(np.int32))
                expected = c.packed(codes, 4, 0)
            moved = ctypes.string_at(area.base_address + place * area.block_bytes, area.block_bytes)
            assert moved == expected.tobytes()
            assert bytes(memory.read_block(first + place)) == moved
        first += area.num_blocks
