"""A soak of vLLM's OpenAI-compatible server with the TQ4 cache: random requests for some minutes, sane and otherwise.

    python benchmarks/vllm_soak.py --minutes 8              # writes results/vllm-soak.json

Prompts with shared beginnings, streams that the client drops, prompts that are too long, bodies that are no requests. Every
status must be the expected one; at the end no block of the cache is in use, and the first prompts get the answers they got at
first. The server has ``exact_prefill`` off, so that a prompt's answer does not depend on what happened to be cached.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from common import RESULTS, environment, write_results

MODEL = Path(__file__).parents[1] / "src/turboquant_vllm/demo/model"
VOCABULARY, MAX_LEN = 4096, 512
OPTIONS = json.dumps({"turboquant": {"exact_prefill": False}})
GIVEN = (
    "--attention-backend",
    "CUSTOM",
    "--additional-config",
    OPTIONS,
    "--max-model-len",
    str(MAX_LEN),
    "--served-model-name",
    "m",
)


class Client:
    """Requests to one server, counted by kind; anything unexpected is kept in ``failures``."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []

    def call(self, method: str, path: str, body: str | None = None, *, read: int | None = None) -> tuple[int, bytes]:
        """Status and body of one request; with ``read`` only so many bytes are read before the connection is dropped."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read() if read is None else response.read(read)
        finally:
            connection.close()

    def complete(self, prompt: list[int], tokens: int, **more: Any) -> tuple[int, bytes]:
        body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, **more}
        read = 60 if more.get("stream") else None
        return self.call("POST", "/v1/completions", json.dumps(body), read=read)

    def answer(self, prompt: list[int]) -> str:
        status, body = self.complete(prompt, 24)
        if status != 200:
            raise RuntimeError(f"expected status 200, got {status}: {body[:300]!r}")
        return json.loads(body)["choices"][0]["text"]

    def expect(self, kind: str, expected: int, got: tuple[int, bytes]) -> None:
        self.counts[kind] += 1
        if got[0] != expected:
            self.failures.append(f"{kind}: expected status {expected}, got {got[0]}: {got[1][:200]!r}")

    def metric(self, name: str) -> float:
        found = re.findall(rf"^{re.escape(name)}(?:{{.*?}})? (\S+)$", self.call("GET", "/metrics")[1].decode(), re.MULTILINE)
        if not found:
            raise RuntimeError(f"expected a metric {name}, got none")
        return sum(map(float, found))

    def work(self, stop: float, seed: int, shared: list[list[int]]) -> None:
        """Random requests until ``stop``, with beginnings of the ``shared`` prompts, which other clients have, too."""
        dice = random.Random(seed)
        while time.monotonic() < stop:
            prompt = dice.choice(shared)[: dice.randrange(0, 300)] + dice.choices(
                range(10, VOCABULARY), k=dice.randrange(1, 60)
            )
            kind = dice.choices(("plain", "dropped", "too long", "no request"), (12, 4, 2, 2))[0]
            try:
                if kind == "plain":
                    self.expect(kind, 200, self.complete(prompt, dice.randrange(1, 60)))
                elif kind == "dropped":
                    self.expect(kind, 200, self.complete(prompt, 100, stream=True))
                elif kind == "too long":
                    self.expect(kind, 400, self.complete(prompt + [11] * MAX_LEN, 10))
                else:
                    body, status = dice.choice(
                        [("{", 400), ('{"model": "m", "prompt": {}}', 400), ('{"model": "x", "prompt": "a"}', 404)]
                    )
                    self.expect(kind, status, self.call("POST", "/v1/completions", body))
            except Exception as error:
                self.failures.append(f"{kind}: {type(error).__name__}: {error}")


def wait_until(reached: Any, seconds: float) -> bool:
    """Whether ``reached()`` becomes true within so many seconds."""
    stop = time.monotonic() + seconds
    while time.monotonic() < stop:
        try:
            if reached():
                return True
        except OSError:
            pass
        time.sleep(0.5)
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--log", type=Path, default=Path("/tmp/vllm-soak.log"))
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm-soak.json")
    parser.add_argument("server", nargs="*", help="further arguments of the server, after --")
    options = parser.parse_args()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL), "--port", str(options.port)]
    client = Client(options.port)
    with options.log.open("w") as log:
        server = subprocess.Popen([*command, *GIVEN, *options.server], stdout=log, stderr=log)
    try:
        if not wait_until(lambda: server.poll() is not None or client.call("GET", "/health")[0] == 200, 600) or server.poll():
            sys.exit(f"the server did not start:\n{options.log.read_text()[-3000:]}")
        dice = random.Random(0)
        fixed = [dice.choices(range(10, VOCABULARY), k=count) for count in (3, 40, 150, 400)]
        before = [client.answer(prompt) for prompt in fixed]
        stop = time.monotonic() + 60 * options.minutes
        shared = [dice.choices(range(10, VOCABULARY), k=300) for _ in range(4)]
        threads = [threading.Thread(target=client.work, args=(stop, seed, shared)) for seed in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        idle = wait_until(lambda: client.metric("vllm:num_requests_running") == 0, 60)
        usage = client.metric("vllm:kv_cache_usage_perc")
        after = [client.answer(prompt) for prompt in fixed]
        row = {
            "id": "soak", "minutes": options.minutes, "clients": options.clients, "requests": dict(client.counts),
            "failures": len(client.failures), "idle_at_the_end": idle, "cache_in_use_at_the_end": usage,
            "same_answers": before == after, "prefix_hits": client.metric("vllm:prefix_cache_hits_total"),
            "preemptions": client.metric("vllm:num_preemptions_total"), "server_alive": server.poll() is None,
            "server": options.server,
        }  # fmt: skip
    finally:
        server.terminate()
        server.wait(60)
    print("\n".join(client.failures[:20]))
    print(json.dumps(row))
    import vllm

    write_results(options.out, environment(vllm=vllm.__version__), [row])
    good = not client.failures and idle and usage == 0 and row["same_answers"] and row["server_alive"]
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
