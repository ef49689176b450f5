"""Which RDMA ports a process may use: trees of files as kernels show them."""

from __future__ import annotations

from pathlib import Path

import pytest

from kv_transfer.rdma import NoRdma, RdmaPort, ucx_variables, usable_ports

V1, V2 = "IB/RoCE v1", "RoCE v2"
LINK = "fe80:0000:0000:0000:0e42:a1ff:fe00:0001"
IPV4 = "0000:0000:0000:0000:0000:ffff:0a00:0001"
IPV6 = "fd00:0000:0000:0000:0000:0000:0000:0001"
EMPTY = "0000:0000:0000:0000:0000:0000:0000:0000"


def device(root: Path, name: str, ports: list[tuple[str, str, list[tuple[str, str]]]], given: bool = True) -> None:
    for number, (state, layer, gids) in enumerate(ports, start=1):
        port = root / f"sys/class/infiniband/{name}/ports/{number}"
        (port / "gid_attrs/types").mkdir(parents=True)
        (port / "gids").mkdir()
        (port / "state").write_text(state + "\n")
        (port / "link_layer").write_text(layer + "\n")
        for index, (gid, kind) in enumerate(gids):
            (port / f"gids/{index}").write_text(gid + "\n")
            (port / f"gid_attrs/types/{index}").write_text(kind + "\n")
    verbs = root / f"sys/class/infiniband_verbs/uverbs{name[-1]}"
    verbs.mkdir(parents=True)
    (verbs / "ibdev").write_text(name + "\n")
    if given:
        (root / "dev/infiniband").mkdir(parents=True, exist_ok=True)
        (root / f"dev/infiniband/{verbs.name}").touch()


ROCE = [(LINK, V1), (LINK, V2), (IPV4, V1), (IPV4, V2)]


def test_active_ports_of_devices_that_were_given(tmp_path: Path) -> None:
    device(tmp_path, "mlx5_0", [("4: ACTIVE", "Ethernet", ROCE)])
    device(tmp_path, "mlx5_1", [("1: DOWN", "Ethernet", ROCE), ("4: ACTIVE", "InfiniBand", [(LINK, V1)])])
    device(tmp_path, "mlx5_2", [("4: ACTIVE", "Ethernet", ROCE)], given=False)
    found = usable_ports(tmp_path)
    assert found == [RdmaPort("mlx5_0", 1, 3), RdmaPort("mlx5_1", 2, None)]
    assert ucx_variables(found) == {"UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:2", "UCX_IB_GID_INDEX": "3"}


@pytest.mark.parametrize(
    ("gids", "index"),
    [
        (ROCE, 3),
        ([(LINK, V2), (IPV6, V2), (IPV4, V2)], 2),
        ([(LINK, V2), (IPV6, V2)], 1),
        ([(LINK, V1), (LINK, V2), (EMPTY, V2)], 1),
    ],
)
def test_the_address_of_roce(tmp_path: Path, gids: list[tuple[str, str]], index: int) -> None:
    device(tmp_path, "mlx5_0", [("4: ACTIVE", "Ethernet", gids)])
    assert usable_ports(tmp_path) == [RdmaPort("mlx5_0", 1, index)]


def test_where_ports_differ_ucx_chooses_the_address(tmp_path: Path) -> None:
    device(tmp_path, "mlx5_0", [("4: ACTIVE", "Ethernet", ROCE)])
    device(tmp_path, "mlx5_1", [("4: ACTIVE", "Ethernet", ROCE[2:])])
    assert ucx_variables(usable_ports(tmp_path)) == {"UCX_NET_DEVICES": "mlx5_0:1,mlx5_1:1"}


def test_why_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(NoRdma, match="request the resource"):
        usable_ports(tmp_path)
    device(tmp_path, "mlx5_0", [("4: ACTIVE", "Ethernet", ROCE)], given=False)
    with pytest.raises(NoRdma, match="may be opened"):
        usable_ports(tmp_path)
    device(tmp_path, "mlx5_1", [("1: DOWN", "Ethernet", ROCE)])
    with pytest.raises(NoRdma, match="active port"):
        usable_ports(tmp_path)
