"""Files of conversations in a bucket of an S3-compatible service, which is moto's server."""

import base64
import hashlib
import hmac
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest

KEY, SECRET = "app_t", "0123456789abcdef0123456789abcdef"
AGENT = "00000000-0000-4000-8000-00000000000a"
POLICY = (
    "{ max_files_per_message = 3, max_files_per_convo = 9, max_file_size_bytes = 20000000,"
    ' allowed_mime_types = ["text/plain"] }'
)


def token(user):
    def part(value):
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

    now = int(time.time())
    claims = {
        "iss": KEY,
        "aud": "valet-sdk",
        "company_api_key": KEY,
        "agent_uuid": AGENT,
        "source_key": user,
        "iat": now,
        "exp": now + 900,
    }
    said = part({"alg": "HS256", "typ": "JWT"}) + b"." + part(claims)
    signature = hmac.new(SECRET.encode(), said, hashlib.sha256).digest()
    return (said + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def ask(url, data=None, method=None, **headers):
    request = urllib.request.Request(url, data, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


@pytest.fixture
def bucket():
    """The address of a service with a bucket in it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    service = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 60
    while True:
        try:
            ask(f"{url}/files", method="PUT")
            break
        except OSError:
            assert service.poll() is None and time.monotonic() < until, "moto's server does not start"
            time.sleep(0.1)
    yield url
    service.kill()
    service.wait()


@pytest.fixture
def server(tmp_path, bucket):
    """The addresses of a server that keeps files there."""
    agent = f'{{ id = "{AGENT}", identity = "ag::w::i::s", name = "Ada", attachments = {POLICY} }}'
    settings = {
        "APPS": f'[{{ name = "t", key = "{KEY}", secret = "{SECRET}", agents = [{agent}] }}]',
        "FILES__NAME": "files",
        "FILES__ENDPOINT": bucket,
        "FILES__ACCESS_KEY": "key",
        "FILES__SECRET_KEY": "secret",
        "FILES__PREFIX": "chats",
    }
    environment = {**os.environ, **{f"TRUNKLINE__{name}": value for name, value in settings.items()}}
    command = [os.environ["TRUNKLINE_BIN"], "serve", "--dev", "--data-dir", str(tmp_path)]
    for listener in ("--grpc", "--http", "--ops"):
        command += [listener, "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    words = dict(word.split("=") for word in process.stdout.readline().split()[1:])
    yield words
    process.kill()
    process.wait()


def multipart(files):
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\ncontent-disposition: form-data; name="files[]"; filename="{name}"\r\n'
        f"content-type: text/plain\r\n\r\n".encode() + content + b"\r\n"
        for name, content in files.items()
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def test_files_are_kept_in_a_bucket_and_erased_from_it(server, bucket):
    base, bearer = f"http://{server['http']}/api/v2", f"Bearer {token('ann')}"
    convo = json.loads(ask(f"{base}/sessions", b"", authorization=bearer))["convo_id"]
    # More than one part of an upload, and less.
    files = {"big.txt": b"hello " * 2_000_000, "small.txt": b"hi\n"}
    body, kind = multipart(files)
    draft = json.loads(ask(f"{base}/agent_convos/{convo}/upload_file", body, authorization=bearer, content_type=kind))
    said = json.dumps({"text": "look", **draft}).encode()
    ask(f"{base}/agent_convos/{convo}/stream_message", said, authorization=bearer)
    (message,) = json.loads(ask(f"{base}/agent_convos/{convo}", authorization=bearer))["messages"]
    assert {each["filename"]: ask(each["url"]) for each in message["files"]} == files
    assert ask(f"{bucket}/files?list-type=2").count(b"<Key>chats/conversations/") == 2
    erase = [os.environ["TRUNKLINE_BIN"], "app", "erase", "t", "ann", "--server", f"http://{server['grpc']}"]
    subprocess.run(erase, check=True, stdout=subprocess.DEVNULL)
    assert ask(f"{bucket}/files?list-type=2").count(b"<Key>") == 0
