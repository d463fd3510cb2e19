"""`sparserve serve`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys

from sparserve import logs
from sparserve.cli.options import with_settings
from sparserve.cli.output import err, progress_bars
from sparserve.config import ServerSettings

log = logging.getLogger(__name__)


@with_settings(ServerSettings)
def serve(settings: ServerSettings) -> None:
    """Serve a model over gRPC until SIGTERM or Ctrl-C, then finish what is in flight.

    Exits with status 1 where the GPU fails.
    """
    from sparserve.api.addresses import check_addresses
    from sparserve.api.security.guard import check_security, exposure
    from sparserve.api.server import Server, addresses
    from sparserve.engine.factory import build_engine

    logs.configure(settings.log_level, settings.log_format)
    # Before the minutes that a large model takes to load.
    check_addresses(addresses(settings))
    check_security(settings)
    if warning := exposure(settings):
        log.warning("%s", warning)
    # Process 1 of a container ignores what it does not handle, and a large model takes minutes to load.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with progress_bars() as bars:
        built = build_engine(
            settings, on_tensor=bars.on_tensor, on_layer=bars.on_layer, on_download=bars.on_download
        )

    async def run() -> None:
        server = Server(built.engine, built.model_name, settings)
        await server.start()
        told = (
            f"serving {built.model_name} on {settings.host}:{server.port} (gRPC), "
            f"metrics on http://{settings.metrics_host or settings.host}:{server.metrics_port}/metrics"
        )
        if settings.adapter_names:
            told += f", {settings.adapters} on {settings.adapters_host}:{server.adapters_port}"
        if settings.log_format == "json":
            log.info(told)
        else:
            err.print(told, markup=False, soft_wrap=True)
        await server.run_until_signalled()
        if server.lost_device or not server.ended:
            # A step that never ends holds the interpreter's exit up as well; so may a lost GPU's driver.
            os._exit(1)

    asyncio.run(run())
