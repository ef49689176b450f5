"""AdminService: an operator's commands over gRPC. At the public port the doorman asks for an admin key; at the internal
one the caller must be a router of the cluster, or have its secret.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import grpc
from diptych.v1 import admin_pb2, admin_pb2_grpc

from router.doors.grpc.wire import migration_to_wire, scaled_from_wire
from router.errors import Code, refuse
from router.operating.adapters import TIMEOUT_S, AdapterOperator, OnWorker, Served
from router.operating.operator import Operator
from router.operating.roles import Switch
from router.placement.cluster import Role
from router.record.moved import Moved
from router.record.scaled import ScalingLog
from router.wire import ROLES, ROLES_TO_WIRE
from settings.tls import NotAMember, Wiring

_DRAIN_TIMEOUT_MS, _DRAIN_INTERVAL_MS = 300_000, 500
_LONGEST_DRAIN_MS = 86_400_000
_MOST_WORKERS = 1 << 20


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """`inside`: for the internal port."""

    def __init__(
        self,
        operator: Operator,
        adapters: AdapterOperator,
        scaling: ScalingLog,
        clock: Callable[[], float],
        inside: Wiring | None = None,
    ) -> None:
        self._operator = operator
        self._adapters = adapters
        self._scaling = scaling
        self._clock = clock
        self._inside = inside

    def _check(self, context: grpc.aio.ServicerContext) -> None:
        if self._inside is None:
            return
        try:
            self._inside.check_peer(context, "router")
        except NotAMember as error:
            raise refuse(Code.PERMISSION_DENIED, str(error)) from None

    async def SwitchRole(
        self, request: admin_pb2.SwitchRoleRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.SwitchRoleResponse:
        self._check(context)
        role = ROLES.get(request.role)
        if role is None:
            why = f"role {request.role} does not exist; use 1 (prefill), 2 (decode), 3 (standby)"
            raise refuse(Code.INVALID_ARGUMENT, why, field="role")
        switched, took_s = await self._operator.switch(request.worker_id, role, force=request.force)
        return admin_pb2.SwitchRoleResponse(switch=_switch(switched), took_ms=took_s * 1e3)

    async def DrainWorker(
        self, request: admin_pb2.DrainWorkerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[admin_pb2.DrainWorkerResponse]:
        self._check(context)
        interval_ms = request.interval_ms or _DRAIN_INTERVAL_MS
        if not 20 <= interval_ms <= 60_000:
            raise refuse(Code.INVALID_ARGUMENT, f"interval_ms is {interval_ms}; use 20..60000", field="interval_ms")
        timeout_ms = min(request.timeout_ms or _DRAIN_TIMEOUT_MS, _LONGEST_DRAIN_MS)
        progress = self._operator.drain(
            request.worker_id, force=request.force, timeout_s=timeout_ms / 1e3, interval_s=interval_ms / 1e3
        )
        async for said in progress:
            yield admin_pb2.DrainWorkerResponse(
                worker_id=said.worker_id,
                left=said.left,
                migrating=said.migrating,
                migrated=said.migrated,
                ended=said.ended,
                running_sequences=said.running,
                done=said.done,
                elapsed_ms=said.elapsed_s * 1e3,
            )

    async def Migrate(
        self, request: admin_pb2.MigrateRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.MigrateResponse:
        self._check(context)
        migration = await self._operator.migrate(request.request_id, request.target_worker)
        return admin_pb2.MigrateResponse(
            migration=migration_to_wire(Moved(request.request_id, migration), self._clock())
        )

    async def Scale(
        self, request: admin_pb2.ScaleRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.ScaleResponse:
        self._check(context)
        wanted = {
            role: getattr(request, role.value)
            for role in (Role.PREFILL, Role.DECODE)
            if request.HasField(role.value)  # type: ignore[arg-type]
        }
        if not wanted:
            raise refuse(
                Code.INVALID_ARGUMENT, "neither prefill nor decode is given; name at least one", field="prefill"
            )
        if too_many := [role.value for role, count in wanted.items() if count > _MOST_WORKERS]:
            why = f"{too_many[0]} is more than {_MOST_WORKERS}; name how many workers there should be"
            raise refuse(Code.INVALID_ARGUMENT, why, field=too_many[0])
        switches, asked = await self._operator.scale(wanted, force=request.force, dry_run=request.dry_run)
        counts = self._operator.counts()
        return admin_pb2.ScaleResponse(
            switches=[_switch(s) for s in switches],
            prefill=counts[Role.PREFILL],
            decode=counts[Role.DECODE],
            standby=counts[Role.STANDBY],
            asked=asked,
        )

    async def ListAdapters(
        self, request: admin_pb2.ListAdaptersRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.ListAdaptersResponse:
        self._check(context)
        return admin_pb2.ListAdaptersResponse(adapters=[_served(one) for one in self._adapters.listed()])

    async def LoadAdapter(
        self, request: admin_pb2.LoadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.LoadAdapterResponse:
        self._check(context)
        began = self._clock()
        timeout_s = request.timeout_ms / 1e3 if request.timeout_ms else TIMEOUT_S
        served, replaced = await self._adapters.load(
            request.name, request.directory, tuple(dict.fromkeys(request.groups)), timeout_s
        )
        return admin_pb2.LoadAdapterResponse(
            adapter=_served(served), replaced=replaced, took_ms=(self._clock() - began) * 1e3
        )

    async def UnloadAdapter(
        self, request: admin_pb2.UnloadAdapterRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.UnloadAdapterResponse:
        self._check(context)
        digest, left = await self._adapters.unload(request.name)
        return admin_pb2.UnloadAdapterResponse(digest=digest, workers=[_on_worker(one) for one in left])

    async def TellScaling(
        self, request: admin_pb2.TellScalingRequest, context: grpc.aio.ServicerContext
    ) -> admin_pb2.TellScalingResponse:
        self._check(context)
        self._scaling.take(scaled_from_wire(request.decision, self._clock()))
        return admin_pb2.TellScalingResponse()


def _switch(s: Switch) -> admin_pb2.RoleSwitch:
    return admin_pb2.RoleSwitch(worker_id=s.key.worker_id, before=ROLES_TO_WIRE[s.before], role=ROLES_TO_WIRE[s.role])


def _served(one: Served) -> admin_pb2.ServedAdapter:
    return admin_pb2.ServedAdapter(
        name=one.word.name,
        digest=one.word.digest,
        directory=one.word.directory,
        served=one.decode,
        split=one.decode and one.prefill,
        groups=one.word.groups,
        workers=[_on_worker(worker) for worker in one.workers],
    )


def _on_worker(one: OnWorker) -> admin_pb2.AdapterOnWorker:
    return admin_pb2.AdapterOnWorker(worker_id=one.worker_id, has=one.has, in_slot=one.in_slot, error=one.error)
