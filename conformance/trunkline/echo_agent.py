"""An agent as its author would write it: who it is and how it gets in come from its environment.

Answers every message; `die` and a path makes it fail, once: what a process that died had not acknowledged comes again.
"""
import os
import sys
import time

from scitrera_aether_client import AgentClient

env = os.environ
agent = AgentClient(env["AETHER_WORKSPACE"], env["AETHER_IMPLEMENTATION"], env["AETHER_SPECIFIER"],
                    credentials={"token": env["AETHER_AUTH_TOKEN"]}, auto_reconnect=False)
done = []


def on_message(message):
    if message.payload.startswith(b"die "):
        try:
            os.close(os.open(message.payload[4:], os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        print("dying", flush=True)
        os._exit(3)
    if message.payload == b"bye":
        done.append(True)
    answer = b"%d heard " % os.getpid() + message.payload
    agent._send_message(message.source_topic, answer)


agent.on_message = on_message
agent.connect(env["AETHER_GATEWAY"])
print("connected as", env["AETHER_SPECIFIER"], flush=True)
while not done:
    time.sleep(0.02)
time.sleep(0.2)
agent.close()
sys.exit(0)
