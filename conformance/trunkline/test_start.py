"""An agent is started by its first message, end to end and with credentials: by the published client's orchestrator
class, and by `trunkline orchestrate`. The agent has nothing but the token that it was started with.
"""
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
import uuid

import pytest
from scitrera_aether_client import AdminClient, AgentClient, OrchestratorClient
from scitrera_aether_client.orchestrator.multiprocess import MultiprocessOrchestrator

TRUNKLINE = os.environ["TRUNKLINE_BIN"]
AGENT = pathlib.Path(__file__).with_name("echo_agent.py")
WAIT = 15


def until(condition, what):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server that lets nobody in without a credential: its address and an administrator's key."""
    data = tmp_path_factory.mktemp("data")
    log = open(data / "log", "w+")
    free = ["--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--ops", "127.0.0.1:0"]
    process = subprocess.Popen([TRUNKLINE, "serve", *free, "--data-dir", str(data / "store")],
                               stdout=subprocess.PIPE, stderr=log, text=True,
                               env={**os.environ, "TRUNKLINE__TASKS__GRACE_SECONDS": "1"})
    key = process.stdout.readline().split()[1]
    grpc = re.search(r"grpc=(\S+)", process.stdout.readline()).group(1)
    yield grpc, {"x-api-key": key}
    process.terminate()
    assert process.wait(WAIT) == 0


class Sender:
    def __init__(self, server):
        grpc, key = server
        self.answers = []
        self.client = AgentClient("ws", "sender", uuid.uuid4().hex, credentials=key, auto_reconnect=False)
        self.client.on_message = lambda message: self.answers.append(message.payload)
        self.client.connect(grpc)

    def ask(self, implementation, specifier, payload):
        before = len(self.answers)
        self.client.send_message_to_agent("ws", implementation, specifier, payload)
        until(lambda: len(self.answers) > before, f"the answer of {specifier} to {payload}")
        return self.answers[-1].split(b" ", 1)


@pytest.fixture
def sender(server):
    sender = Sender(server)
    yield sender
    sender.client.close()


def register(server, profile):
    grpc, key = server
    client = OrchestratorClient(f"reg{uuid.uuid4().hex[:8]}", ["none"], credentials=key, auto_reconnect=False)
    client.connect(grpc)
    implementation = f"bot-{uuid.uuid4().hex[:8]}"
    AdminClient(client).register_agent(implementation, orchestrator_profile=profile,
                                       launch_params={"profile": profile, "greeting": "hello"})
    client.close()
    return implementation


def test_the_published_orchestrator_starts_an_agent(server, sender):
    grpc, key = server
    profile = f"profile-{uuid.uuid4().hex[:8]}"
    implementation = register(server, profile)

    class Orchestrator(MultiprocessOrchestrator):
        def get_implementation(self):
            return "published"

        def get_supported_profiles(self):
            return [profile]

        def handle_assignment(self, assignment):
            self.spawn_subprocess(task_id=assignment.task_id, script_path=AGENT, workspace=assignment.workspace,
                                  implementation=assignment.target_implementation, specifier=assignment.specifier,
                                  auth_token=assignment.launch_params["auth_token"])

    orchestrator = Orchestrator(gateway=grpc)
    # The class has no parameter for them.
    orchestrator.client.init.credentials.update(key)
    thread = threading.Thread(target=orchestrator.run, daemon=True)
    thread.start()
    try:
        first, answer = sender.ask(implementation, "alice", b"anybody home?")
        assert answer == b"heard anybody home?"
        again, _ = sender.ask(implementation, "alice", b"still there?")
        assert again == first, "one process"
        assert orchestrator.process_count == 1
    finally:
        orchestrator.request_shutdown()
        thread.join(WAIT)


def test_local_processes_are_started_restarted_and_ended(server, sender, tmp_path):
    grpc, key = server
    profile = f"profile-{uuid.uuid4().hex[:8]}"
    implementation = register(server, profile)
    logs = tmp_path / "logs"
    orchestrator = subprocess.Popen(
        [TRUNKLINE, "orchestrate", "--profile", profile, "--log-dir", str(logs), "--open-files", "256",
         "--server", f"http://{grpc}", "--", sys.executable, str(AGENT)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "TRUNKLINE_API_KEY": key["x-api-key"]})
    try:
        assert orchestrator.stdout.readline().startswith("ready as orc::local::")
        first, answer = sender.ask(implementation, "bob", b"anybody home?")
        assert answer == b"heard anybody home?"
        assert re.search(r"Max open files\s+256\b", pathlib.Path(f"/proc/{int(first)}/limits").read_text())
        # It comes back after it failed, and finds what it was sent meanwhile.
        sender.client.send_message_to_agent("ws", implementation, "bob", b"die %s" % bytes(tmp_path / "died"))
        # What the transport of a dying process took counts as delivered; so not before it is dead.
        until(lambda: not pathlib.Path(f"/proc/{int(first)}").exists(), "its death")
        second, answer = sender.ask(implementation, "bob", b"again")
        assert second != first and answer == b"heard again"
        log = (logs / f"ws.{implementation}.bob.log").read_text()
        assert log.count("connected as bob") == 2 and "dying" in log
        # It ended well: the next message starts another one.
        third, _ = sender.ask(implementation, "bob", b"bye")
        assert third == second
        until(lambda: not pathlib.Path(f"/proc/{int(third)}").exists(), "its end")
        fourth, answer = sender.ask(implementation, "bob", b"a new one")
        assert fourth != third and answer == b"heard a new one"
    finally:
        orchestrator.terminate()
        assert orchestrator.wait(WAIT) == 0
    until(lambda: not pathlib.Path(f"/proc/{int(fourth)}").exists(), "the end of its processes")
