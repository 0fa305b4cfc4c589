"""What the hub is measured beside: the same forwarding by a bare asyncio server, and nothing else.

    python benchmarks/bare.py       # says on which two ports it listens: WebSocket and HTTP

No rights, no database, no log. WebSocket (the `websockets` library's own server): `/agent/<n>`
sends the output of session n, `/watch/<n>` is sent it. HTTP: `POST /events` is sent to everybody
who reads `GET /events` as SSE.
"""

import asyncio
import json
from asyncio import Queue, StreamReader, StreamWriter
from collections import defaultdict, deque
from contextlib import suppress

from websockets.asyncio.server import ServerConnection, serve

HOST = "127.0.0.1"
RING = 500  # messages kept of a session, as many bytes as the hub keeps
QUEUE = 1000  # that wait for a reader; the oldest go first
MESSAGE_MOST = 32 * 1024 * 1024

rings: dict[str, deque] = defaultdict(lambda: deque(maxlen=RING))
offsets: dict[str, int] = defaultdict(int)
watchers: dict[str, set[Queue]] = defaultdict(set)
infos: dict[str, dict] = {}
readers: set[Queue] = set()


def put(queue: Queue, message) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(message)


async def connected(connection: ServerConnection) -> None:
    _, kind, session = connection.request.path.split("/")
    if kind == "agent":
        await from_agent(connection, session)
    else:
        await to_watcher(connection, session)


async def from_agent(connection: ServerConnection, session: str) -> None:
    async for text in connection:
        frame = json.loads(text)
        if frame["type"] == "session_output":
            forward(session, frame["data"])
        elif frame["type"] == "heartbeat":
            infos[session] = frame["system_info"]
        elif frame["type"] == "ping":
            await connection.send(json.dumps({"type": "pong", "n": frame["n"]}))


def forward(session: str, data: str) -> None:
    message = {"type": "output", "data": data, "offset": offsets[session]}
    text = json.dumps(message, separators=(",", ":"))
    offsets[session] += len(data) * 3 // 4 - data.endswith("=") - data.endswith("==")
    rings[session].append(text)
    for queue in watchers[session]:
        put(queue, text)


async def to_watcher(connection: ServerConnection, session: str) -> None:
    queue: Queue = Queue(QUEUE)
    watchers[session].add(queue)
    try:
        while True:
            await connection.send(await queue.get())
    finally:
        watchers[session].discard(queue)


async def http(reader: StreamReader, writer: StreamWriter) -> None:
    with suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            if head.startswith("GET"):
                return await to_reader(writer)
            length = head.lower().partition("content-length:")[2].split()[0]
            publish(json.loads(await reader.readexactly(int(length))))
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")


def publish(event: dict) -> None:
    chunk = f"data: {json.dumps(event)}\n\n".encode()
    for queue in readers:
        put(queue, chunk)


async def to_reader(writer: StreamWriter) -> None:
    queue: Queue = Queue(QUEUE)
    readers.add(queue)
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n: hello\n\n")
    try:
        while True:
            writer.write(await queue.get())
            await writer.drain()
    finally:
        readers.discard(queue)


async def main() -> None:
    options = {"compression": None, "max_size": MESSAGE_MOST, "backlog": 1024}
    sockets = await serve(connected, HOST, 0, **options)
    streams = await asyncio.start_server(http, HOST, 0, backlog=1024)
    ports = (server.sockets[0].getsockname()[1] for server in (sockets, streams))
    print("listening on", *ports, flush=True)
    await asyncio.gather(sockets.serve_forever(), streams.serve_forever())


if __name__ == "__main__":
    asyncio.run(main())
