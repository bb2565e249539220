"""A real control service on an event loop of this process."""

from __future__ import annotations

import asyncio
import threading

from sedac.control.base.settings import ControlSettings
from sedac.control.server.server import ControlServer


class RunningServer:
    """A `ControlServer` on an event loop of its own thread."""

    def __init__(self, settings: ControlSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self.server = self._run(self._make(settings))
        except BaseException:
            self._end_loop()
            raise
        self.address = f"127.0.0.1:{self.server.port}"

    async def _make(self, settings: ControlSettings) -> ControlServer:
        server = ControlServer(settings)
        try:
            await server.start()
        except BaseException:
            await server.stop()
            raise
        return server

    def _run(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def stop(self) -> None:
        self._run(self.server.stop())
        self._end_loop()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
