"""Clients of the published SDK, as they are, come back by themselves after what may happen to a server or to a wire, and miss nothing.

The listening sockets outlive the server, as under systemd. Whether a message was durable is known from `trunkline send`.
"""
import asyncio
import os
import re
import select
import signal
import socket
import subprocess
import threading
import time
import uuid

import pytest
from scitrera_aether_client import (AgentClient, ServiceClient, TaskClient, UserClient, WorkflowEngineClient)
from scitrera_aether_client.client_async import (AsyncAgentClient, AsyncServiceClient, AsyncTaskClient, AsyncUserClient,
                                                 AsyncWorkflowEngineClient)

TRUNKLINE = os.environ["TRUNKLINE_BIN"]

# The first attempt comes at once, the second after 2 s and a quarter of that.
BACKOFF = 10
WAIT = 30
# How often a wire breaks: 12 are more than 100 tries, which is what the promise is measured by.
BREAKS = int(os.environ.get("BREAKS", 3))
# Where the sockets are for a server that inherits them.
FIRST = 100


def until(condition, what, wait=WAIT):
    end = time.monotonic() + wait
    while not condition():
        assert time.monotonic() < end, f"waited {wait} s for {what()}"
        time.sleep(0.02)


class Server:
    """Trunkline on sockets that stay open when it ends."""

    def __init__(self, data):
        self.data = data
        self.sockets = []
        for number in range(FIRST, FIRST + 3):
            with socket.create_server(("127.0.0.1", 0)) as listening:
                os.dup2(listening.fileno(), number)
                self.sockets.append(listening.getsockname())
        self.grpc = "%s:%d" % self.sockets[0]
        self.log = open(data / "log", "a")
        self.start()

    def start(self):
        env = {**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "grpc:http:ops", "LISTEN_FDS_FIRST_FD": str(FIRST)}
        self.process = subprocess.Popen([TRUNKLINE, "serve", "--dev", "--data-dir", str(self.data / "store")],
                                        stdout=subprocess.PIPE, stderr=self.log, text=True, env=env,
                                        pass_fds=range(FIRST, FIRST + 3))
        self.ready()

    def ready(self):
        assert select.select([self.process.stdout], [], [], WAIT)[0], "the server is not ready"
        line = self.process.stdout.readline()
        assert re.match(rf"ready grpc={self.grpc} ", line), line

    def kill(self):
        self.process.kill()
        self.process.wait()
        # Time for clients to come while no process accepts.
        time.sleep(0.3)
        self.start()

    def restart(self):
        self.process.terminate()
        assert self.process.wait(WAIT) == 0
        time.sleep(0.3)
        self.start()

    def upgrade(self):
        self.process.send_signal(signal.SIGUSR2)
        self.ready()

    def close(self):
        self.process.terminate()
        code = self.process.wait(WAIT)
        for number in range(FIRST, FIRST + 3):
            os.close(number)
        self.log.close()
        assert code == 0


def hang_up(end):
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        # The other end was first.
        pass


class Wire:
    """A relay between clients and the server, of which each direction can be broken: it discards what comes, and neither end notices."""

    def __init__(self, server):
        self.server = server
        self.lock = threading.Lock()
        self.broken = set()
        self.pairs = []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.address = "%s:%d" % self.listening.getsockname()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                client, _ = self.listening.accept()
                server = socket.create_connection(self.server)
            except OSError:
                return
            with self.lock:
                self.pairs.append((client, server))
                broken = self.broken
            for source, sink, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self.relay, args=(source, sink, direction, broken), daemon=True).start()

    @staticmethod
    def relay(source, sink, direction, broken):
        try:
            while data := source.recv(65536):
                if direction not in broken:
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            hang_up(end)

    def cut(self):
        """Ends the connections that there are; new ones are whole."""
        with self.lock:
            gone, self.pairs = self.pairs, []
            # Those that are gone stay broken: nothing of them arrives any more.
            self.broken = set()
        for pair in gone:
            for end in pair:
                hang_up(end)

    def close(self):
        hang_up(self.listening)
        self.cut()


class Receiver:
    """A client and the numbers that it has heard."""

    def __init__(self, client, topic, kind="chat"):
        self.client, self.topic, self.kind = client, topic, kind
        self.name = f"{type(client).__name__} ({topic})"
        self.heard = []
        client.on_message = lambda message: self.heard.append(int(message.payload))


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.close()


@pytest.fixture
def wire(server):
    wire = Wire(server.sockets[0])
    yield wire
    wire.close()


@pytest.fixture
def loop():
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(WAIT)


@pytest.fixture
def receivers(loop):
    """Nobody is connected yet. There is one workflow engine at a time."""
    made = []

    def make(engine):
        def name():
            return uuid.uuid4().hex[:8]

        for agent, task, user, service in ((AgentClient, TaskClient, UserClient, ServiceClient),
                                           (AsyncAgentClient, AsyncTaskClient, AsyncUserClient, AsyncServiceClient)):
            one, two, three, four = name(), name(), name(), name()
            made.append(Receiver(agent("ws", "impl", one), f"ag::ws::impl::{one}"))
            made.append(Receiver(task("ws", "impl", two), f"tu::ws::impl::{two}"))
            made.append(Receiver(user(three, "window"), f"us::{three}::window"))
            made.append(Receiver(service("impl", four), f"sv::impl::{four}"))
        made.append(Receiver(engine(), "event::ws", "event"))
        return made

    yield make
    for receiver in made:
        closing = receiver.client.close()
        if closing is not None:
            asyncio.run_coroutine_threadsafe(closing, loop).result(WAIT)


def connect(receiver, address, loop):
    connecting = receiver.client.connect(address)
    if connecting is not None:
        asyncio.run_coroutine_threadsafe(connecting, loop).result(WAIT)


class Sender:
    """Sends numbers to all, each until it is durable."""

    def __init__(self, server, receivers):
        self.server, self.receivers = server, receivers
        self.count = 0
        # Sends whose fate is not known, and that were tried again.
        self.retries = 0

    def send(self):
        for receiver in self.receivers:
            command = [TRUNKLINE, "send", "--server", f"http://{self.server.grpc}", "--type", receiver.kind,
                       "--as", "ag::ws::impl::sender", receiver.topic, str(self.count)]

            def is_durable():
                sent = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=self.server.log).returncode == 0
                self.retries += not sent
                return sent

            until(is_durable, lambda: f"number {self.count} for {receiver.topic} to be durable")
        self.count += 1

    def during(self, what):
        """Goes on sending until something has been done."""
        failed = []

        def run():
            try:
                what()
            except BaseException as error:
                failed.append(error)

        doing = threading.Thread(target=run)
        doing.start()
        while doing.is_alive():
            self.send()
        if failed:
            raise failed[0]

    def all_heard(self, wait):
        wanted = set(range(self.count))
        missing = lambda: {one.name: sorted(wanted - set(one.heard)) for one in self.receivers if wanted - set(one.heard)}
        until(lambda: not missing(), missing, wait)


def begin(server, receivers, address, loop):
    """All are connected, and have heard a number."""
    sender = Sender(server, receivers)
    for receiver in receivers:
        connect(receiver, address, loop)
    sender.send()
    sender.all_heard(WAIT)
    return sender


@pytest.mark.parametrize("engine", [WorkflowEngineClient, AsyncWorkflowEngineClient])
@pytest.mark.parametrize("fault", ["kill", "restart", "upgrade"])
def test_they_come_back_after_the_server_does(server, receivers, loop, fault, engine):
    receivers = receivers(engine)
    sender = begin(server, receivers, server.grpc, loop)
    for _ in range(3):
        sender.during(getattr(server, fault))
        sender.send()
        sender.all_heard(BACKOFF)
    for receiver in receivers:
        doubles = len(receiver.heard) - sender.count
        # What was under way when the process was killed, and no more.
        assert doubles <= (6 if fault == "kill" else 0) + sender.retries, f"{receiver.name} heard {sorted(receiver.heard)}"


@pytest.mark.parametrize("engine", [WorkflowEngineClient, AsyncWorkflowEngineClient])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_they_miss_nothing_of_a_wire_that_broke_in_one_direction(server, wire, receivers, loop, direction, engine):
    receivers = receivers(engine)
    sender = begin(server, receivers, wire.address, loop)
    for _ in range(BREAKS):
        wire.broken.add(direction)
        sender.during(lambda: time.sleep(1))
        # At once, so that what was just sent is still under way.
        sender.send()
        wire.cut()
        sender.send()
        sender.all_heard(BACKOFF)
        # Until the server knows it, too.
        time.sleep(0.3)
    for receiver in receivers:
        doubles = len(receiver.heard) - sender.count
        # What was heard and could not be answered for comes again.
        assert doubles <= (sender.count if direction == "up" else 0) + sender.retries, f"{receiver.name} heard {sorted(receiver.heard)}"
