"""What lies between an engine and its control service, and what may answer in its place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures

import grpc


class Proxy:
    """A TCP proxy on a port of its own that can be slow, or swallow everything without closing a connection."""

    def __init__(self, target: str) -> None:
        self._target = target
        self.delay_seconds = 0.0
        self.is_hole = False
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        """Listen; returns the address."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return "127.0.0.1:{1}".format(*self._server.sockets[0].getsockname())

    async def stop(self) -> None:
        """Close, with every connection."""
        self._server.close()
        for writer in self._writers:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for writer in self._writers), return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        self._writers |= {writer, far_writer}
        await asyncio.gather(self._pass_on(reader, far_writer), self._pass_on(far_reader, writer))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                await asyncio.sleep(self.delay_seconds)
                if not self.is_hole:
                    writer.write(data)
                    await writer.drain()
        writer.close()


@contextlib.contextmanager
def babbling(port: int) -> Iterator[list[int]]:
    """Answer every connection with random bytes that are no HTTP/2; yields a list that grows with each."""
    connections: list[int] = []

    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        with contextlib.suppress(OSError):
            writer.write(os.urandom(4096))
            await writer.drain()
            await reader.read(1024)
            writer.close()

    async def stop(server: asyncio.Server) -> None:
        server.close()
        await server.wait_closed()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(babble, "127.0.0.1", port), loop).result(10)
    try:
        yield connections
    finally:
        asyncio.run_coroutine_threadsafe(stop(server), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


class _Impostor(grpc.GenericRpcHandler):
    def __init__(self, messages: Sequence[bytes], code: grpc.StatusCode, calls: list[int]) -> None:
        self._messages, self._code, self._calls = messages, code, calls

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def follow(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            self._calls.append(1)
            for message in self._messages:
                yield message
                next(requests, None)
            if self._code is not grpc.StatusCode.OK:
                context.abort(self._code, "no")

        return grpc.stream_stream_rpc_method_handler(follow)


@contextlib.contextmanager
def impersonating(port: int, messages: Sequence[bytes], code: grpc.StatusCode = grpc.StatusCode.OK) -> Iterator[list[int]]:
    """Answer every call with these messages, each but the first after one of the caller's, then end; yields a list that grows with each."""
    calls: list[int] = []
    server = grpc.server(futures.ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0), ("grpc.max_send_message_length", -1)])
    server.add_generic_rpc_handlers((_Impostor(messages, code, calls),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield calls
    finally:
        server.stop(0).wait()
