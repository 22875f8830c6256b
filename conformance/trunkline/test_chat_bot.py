"""An agent of the published client that knows nothing of conversations is a chat bot."""

import json
import threading

from scitrera_aether_client import AgentClient
from test_bucket import ask, bucket, server, token  # noqa: F401


def test_what_it_answers_to_a_message_is_said(server):  # noqa: F811
    bot = AgentClient("w", "i", "s")

    def answer(message):
        _, user, window = message.source_topic.split("::")
        bot.send_message_to_user_session(user, window, b"You said: " + message.payload)

    bot.on_message = answer
    bot.connect(server["grpc"])
    base, bearer = f"http://{server['http']}/api/v2", f"Bearer {token('ann')}"
    convo = json.loads(ask(f"{base}/sessions", b"", authorization=bearer))["convo_id"]
    stream = f"{base}/agent_convos/{convo}/events"
    said, seen = threading.Event(), []

    def watch():
        import urllib.request

        request = urllib.request.Request(stream, headers={"authorization": bearer})
        with urllib.request.urlopen(request, timeout=30) as events:
            for line in events:
                if line.startswith(b"event: "):
                    seen.append(line[7:].strip().decode())
                if seen[-1:] == ["ready"]:
                    said.set()
                if seen[-1:] == ["turn_done"]:
                    return

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert said.wait(30)
    body = json.dumps({"text": "hello"}).encode()
    ask(f"{base}/agent_convos/{convo}/stream_message", body, authorization=bearer)
    watcher.join(30)
    assert seen == ["ready", "message", "message", "turn_done"]
    messages = json.loads(ask(f"{base}/agent_convos/{convo}", authorization=bearer))["messages"]
    assert [(each["from"], each["content"]) for each in messages] == [
        ("appuser", "hello"),
        ("ai_agent", "You said: hello"),
    ]
    bot.close()
