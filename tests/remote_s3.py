"""Push and pull against a real S3 server (moto's, which the test starts), through a proxy that injects faults.

Run by `make remote` in an environment of its own: s3fs and moto do not resolve with the main one's constraints.
"""

import http.client
import os
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import s3fs
from cache_kit import harvest
from cache_kit import run_cache as run
from fork_kit import free_port

from sae_granary.cache.errors import CacheError, CorruptCacheError
from sae_granary.cache.read.verify import verify
from sae_granary.cache.remote import fetch, store
from sae_granary.cache.remote.pull import plan_pull, pull
from sae_granary.cache.remote.push import plan_push, push

KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing-secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Proxy(BaseHTTPRequestHandler):
    """Passes requests on to the server; `faults` names what may happen to a reply, `share` how often."""

    protocol_version = "HTTP/1.1"
    target, faults, share, random, count, lock = 0, (), 0.0, random.Random(0), 0, threading.Lock()

    def log_message(self, *args):
        pass

    def _pass_on(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        with Proxy.lock:
            fault = Proxy.random.choice(Proxy.faults) if Proxy.faults and Proxy.random.random() < Proxy.share else None
            Proxy.count += fault is not None
        if fault == "500":
            return self._reply(500, {}, b"<Error><Code>InternalError</Code></Error>")
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        server = http.client.HTTPConnection("127.0.0.1", Proxy.target, timeout=60)
        headers = {
            k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "connection", "expect")
        }
        headers["Content-Length"] = str(len(body))
        server.request(self.command, self.path, body, headers)
        reply = server.getresponse()
        data = reply.read()
        kept = {
            k: v
            for k, v in reply.getheaders()
            if k.lower() not in ("transfer-encoding", "connection", "content-length")
        }
        server.close()
        is_block = self.command == "GET" and reply.status in (200, 206) and "list-type" not in self.path and data
        if fault == "slow":
            time.sleep(0.3)
        if fault == "truncated" and is_block:
            kept["X-Real-Length"] = str(len(data))
            return self._reply(reply.status, kept, data[: len(data) // 2], length=len(data))
        if fault == "wrong" and is_block:
            data = bytes([data[0] ^ 1]) + data[1:]
            kept = {k: v for k, v in kept.items() if "checksum" not in k.lower()}
        return self._reply(reply.status, kept, data, length=reply.getheader("Content-Length"))

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass_on

    def _chunks(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return b""
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _reply(self, status, headers, data, length=None):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        if length is not None and self.command != "HEAD" and int(length) != len(data):
            self.close_connection = True


@pytest.fixture(scope="module")
def server():
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def bucket(server, monkeypatch):
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    Proxy.target, Proxy.faults, Proxy.share, Proxy.random, Proxy.count = server, (), 0.0, random.Random(0), 0
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(store, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 4096)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server}")
    name = f"granary-{random.SystemRandom().randrange(10**9)}"
    client.create_bucket(Bucket=name)
    yield f"s3://{name}/cache", client, name
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = tmp_path_factory.mktemp("s3") / "c"
    harvest(path)
    return path


def files(path):
    return {f.relative_to(path).as_posix(): f.read_bytes() for f in Path(path).rglob("*") if f.is_file()}


def test_the_commands_there_and_back(tmp_path, cache, bucket):
    url, _, _ = bucket
    run("push", cache, url, "--verify")
    assert "nothing to do" in run("push", cache, url).stdout
    run("pull", url, tmp_path / "back")
    assert files(tmp_path / "back") == files(cache)
    run("pull", url, tmp_path / "part", "--hook", "layer_3", "--rows", 70)
    assert verify(tmp_path / "part").ok


@pytest.mark.parametrize("fault", ["500", "drop", "slow", "truncated"])
def test_faults_are_repaired(tmp_path, cache, bucket, fault):
    url, _, _ = bucket
    Proxy.faults, Proxy.share = (fault,), 0.15
    push(plan_push(cache, url))
    pull(plan_pull(url, tmp_path / "back"))
    assert Proxy.count > 5
    assert files(tmp_path / "back") == files(cache)


def test_wrong_bytes_never_arrive(tmp_path, cache, bucket):
    url, _, _ = bucket
    push(plan_push(cache, url))
    plan = plan_pull(url, tmp_path / "back")
    Proxy.faults, Proxy.share = ("wrong",), 0.03
    try:
        pull(plan)
    except CorruptCacheError:
        assert not (tmp_path / "back/manifest.json").exists()
        Proxy.faults = ()
        pull(plan_pull(url, tmp_path / "back"))
    assert Proxy.count > 0
    assert files(tmp_path / "back") == files(cache)


def test_a_pull_that_is_cut_off_continues(tmp_path, cache, bucket):
    url, _, _ = bucket
    push(plan_push(cache, url))
    total = 0

    def stop(n_bytes):
        nonlocal total
        total += n_bytes
        if total > 20_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(plan_pull(url, tmp_path / "back"), progress=stop)
    plan = plan_pull(url, tmp_path / "back")
    assert 0 < len(plan.missing) < len(plan.parcel.files)
    pull(plan)
    assert files(tmp_path / "back") == files(cache)


def test_remotes_that_are_half_pushed_other_or_without_rights(tmp_path, cache, bucket):
    url, client, name = bucket
    push(plan_push(cache, url))
    client.delete_object(Bucket=name, Key="cache/manifest.json")
    with pytest.raises(CacheError, match="not a cache to pull"):
        plan_pull(url, tmp_path / "back")
    assert "not a cache" in run("push", cache, url, code=2).stderr
    error = run("push", cache, "s3://no-such-bucket-of-granary/c", "--yes", code=2).stderr
    assert error.count("\n") == 1


def test_public_buckets_need_yes(cache, bucket):
    url, client, name = bucket
    client.put_bucket_acl(Bucket=name, ACL="public-read")
    assert "can be read by everyone: add --yes" in run("push", cache, url).stdout
    assert store.Store(url).listing() == {}
    run("push", cache, url, "--yes")
    assert "testing-secret" not in str([entry["Key"] for entry in client.list_objects_v2(Bucket=name)["Contents"]])
    assert all(os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in data for data in files(cache).values())


@pytest.mark.parametrize("shards", [None, 2])
def test_training_from_the_server_equals_training_from_the_cache(tmp_path, bucket, monkeypatch, shards):
    import numpy as np
    from safetensors.numpy import load_file

    from sae_granary import CacheWriter, train_sae

    url, _, _ = bucket
    monkeypatch.setenv("GRANARY_REMOTE_DIR", str(tmp_path / "copies"))
    with CacheWriter(tmp_path / "c", d_in=8, rows_per_shard=512) as writer:
        writer.add(np.random.default_rng(0).normal(size=(2000, 8)).astype(np.float32))
    push(plan_push(tmp_path / "c", url))
    Proxy.faults, Proxy.share = ("500", "drop", "truncated"), 0.1
    weights = []
    for place in (str(tmp_path / "c"), url):
        result = train_sae(
            cache=place, type="topk", k=2, d_sae=32, steps=70, batch_size=64, device="cpu",
            shuffle_shards=shards, pool_rows=300, runs_dir=str(tmp_path / "runs" / str(len(weights))),
        )  # fmt: skip
        weights.append(load_file(result.folder / "sae_weights.safetensors"))
    assert Proxy.count > 0
    assert all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
