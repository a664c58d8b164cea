"""examples/serve.py under load on loopback: nothing is lost, every request gets exactly one answer.

The model waits at a gate that a test opens, so that what overload does is the same in every run.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_vits import variant_quantized
from torch import Tensor

import vitq_kernels as vitq
from tests.numerics import integers
from vitq_kernels.images import eval_transform

aiohttp = pytest.importorskip("aiohttp", reason="aiohttp is not installed")
from aiohttp import web  # noqa: E402

from examples import serve  # noqa: E402

SERVER = Path(__file__).parents[1] / "examples" / "serve.py"
TIMEOUT_S = 60


@cache
def requests(count: int = 60) -> list[bytes]:
    """PNG files of 32x32 pixels in four colours, all different."""
    files = []
    for seed in range(count):
        colours = integers(0, 1, (2, 2, 3), seed) * 200 + integers(0, 55, (2, 2, 3), seed + count)
        pixels = colours.repeat_interleave(16, 0).repeat_interleave(16, 1).to(torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(file, "png")
        files.append(file.getvalue())
    return files


@cache
def expected(count: int = 60) -> list[dict[str, Any]]:
    """What the model says to each of ``requests``, one by one and without a server."""
    model = variant_quantized("class-token")
    transform = eval_transform(model)
    answers = []
    for file in requests(count):
        probabilities = model(transform(Image.open(io.BytesIO(file)))[None])[0].softmax(-1)
        best = int(probabilities.argmax())
        answers.append({"class": best, "probability": pytest.approx(float(probabilities[best]), rel=1e-5)})
    return answers


class Gated:
    """The captured model behind a gate; counts its batches."""

    def __init__(self, sizes: tuple[int, ...] = (1, 4)) -> None:
        model = variant_quantized("class-token")
        self.fast, self.transform = vitq.capture(model, sizes), eval_transform(model)
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[int] = []
        self.fail = False

    def __call__(self, images: Tensor) -> Tensor:
        assert self.gate.wait(TIMEOUT_S)
        self.batches.append(len(images))
        if self.fail:
            raise RuntimeError("planted")
        return self.fast(images).softmax(-1)


class Running:
    """A server and a client on loopback."""

    def __init__(self, runner: web.AppRunner, client: aiohttp.ClientSession, model: Gated) -> None:
        self.runner, self.client, self.model = runner, client, model
        self.url = "http://{}:{}".format(*runner.addresses[0])
        self.batcher = runner.app[serve.BATCHER]

    async def post(self, body: bytes) -> tuple[int, dict[str, Any], str | None]:
        """Status, JSON and Retry-After."""
        async with self.client.post(f"{self.url}/predict", data=body) as response:
            return response.status, await response.json(), response.headers.get("Retry-After")

    def send(self, bodies: list[bytes]) -> list[asyncio.Task[tuple[int, dict[str, Any], str | None]]]:
        return [asyncio.create_task(self.post(body)) for body in bodies]

    async def until_taken(self, count: int) -> None:
        while self.batcher.taken != count:
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def running(model: Gated, largest: int = 4, places: int = 8, wait_s: float = 0.0) -> AsyncIterator[Running]:
    runner = web.AppRunner(serve.make_app(model, model.transform, largest, places, wait_s), shutdown_timeout=TIMEOUT_S)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            yield Running(runner, client, model)
    finally:
        model.gate.set()
        await runner.cleanup()


def play(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, TIMEOUT_S))


def test_the_answers_tell_the_requests_apart() -> None:
    assert len({answer["class"] for answer in expected()}) >= 2
    assert len({answer["probability"].expected for answer in expected()}) >= 50


def test_overload_is_told_and_what_was_accepted_is_answered() -> None:
    """60 requests at once to 8 places, and the model stands still: 8 are accepted, 52 told at once."""

    async def scenario() -> None:
        async with running(Gated()) as server:
            server.model.gate.clear()
            tasks = server.send(requests())
            done: set[Any] = set()
            waiting = set(tasks)
            while len(done) < 52:
                finished, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                done |= finished
            assert server.batcher.taken == 8
            for status, body, retry_after in [task.result() for task in done]:
                assert (status, retry_after) == (503, "1")
                assert body == {"error": "overloaded: 8 requests are waiting, the most there may be; try again"}
            server.model.gate.set()
            answers = await asyncio.gather(*tasks)
            assert Counter(status for status, _, _ in answers) == {200: 8, 503: 52}
            for (status, body, _), right in zip(answers, expected(), strict=True):
                assert status == 503 or body == right
            assert sum(server.model.batches) == 8
            assert server.batcher.taken == 0

    play(scenario())


def test_a_client_that_comes_back_gets_every_answer() -> None:
    """Nobody waits at the gate here: all that is open is sent at once, and what was refused again."""

    async def scenario() -> None:
        async with running(Gated(), places=6) as server:
            answers: dict[int, dict[str, Any]] = {}
            while left := [index for index in range(60) if index not in answers]:
                results = await asyncio.gather(*server.send([requests()[index] for index in left]))
                accepted = {i: body for i, (status, body, _) in zip(left, results, strict=True) if status == 200}
                assert {status for status, _, _ in results} <= {200, 503}
                assert len(accepted) >= min(6, len(left))
                answers |= accepted
            assert [answers[index] for index in range(60)] == expected()
            assert sum(server.model.batches) == 60  # no image ran twice
            assert max(server.model.batches) <= 4

    play(scenario())


def test_a_batch_waits_for_company_until_it_is_full() -> None:
    async def scenario() -> None:
        async with running(Gated(), wait_s=10 * TIMEOUT_S) as server:
            answers = await asyncio.gather(*server.send(requests()[:8]))
            assert [body for _, body, _ in answers] == expected()[:8]
            assert server.model.batches == [4, 4]

    play(scenario())


def test_a_batch_that_nobody_joins_runs_after_its_wait() -> None:
    async def scenario() -> None:
        async with running(Gated(), wait_s=0.01) as server:
            for body, right in zip(requests()[:3], expected(), strict=False):
                assert await server.post(body) == (200, right, None)
            assert server.model.batches == [1, 1, 1]

    play(scenario())


def test_a_shutdown_finishes_what_was_accepted() -> None:
    async def scenario() -> None:
        async with running(Gated()) as server:
            server.model.gate.clear()
            tasks = server.send(requests()[:6])
            await server.until_taken(6)
            stopping = asyncio.create_task(server.runner.cleanup())
            while server.runner.sites:
                await asyncio.sleep(0)
            with pytest.raises(aiohttp.ClientConnectionError):  # the door is closed
                await server.post(requests()[0])
            assert not stopping.done()
            server.model.gate.set()
            answers = await asyncio.gather(*tasks)
            assert answers == [(200, right, None) for right in expected()[:6]]
            await stopping
            assert "batches" not in {thread.name for thread in threading.enumerate()}

    play(scenario())


def test_a_batch_still_in_company_of_none_is_run_when_the_batcher_closes() -> None:
    async def scenario() -> None:
        model = Gated()
        batcher = serve.Batcher(model, 4, 4, 10 * TIMEOUT_S)
        waiting = asyncio.create_task(batcher.run(torch.zeros(3, 32, 32)))
        await asyncio.sleep(0)
        await asyncio.to_thread(batcher.close)
        assert (await waiting).shape == (10,)

    play(scenario())


def damaged() -> Iterator[tuple[str, bytes, str]]:
    """Name, body, and why it is refused."""
    png = requests()[0]
    jpeg = io.BytesIO()
    Image.open(io.BytesIO(png)).save(jpeg, "jpeg")
    eps = io.BytesIO()
    Image.open(io.BytesIO(png)).save(eps, "eps")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "png")
    yield "empty", b"", "no known format"
    yield "text", b"<html>not an image</html>", "no known format"
    yield "cut png", png[: len(png) // 2], ""
    yield "cut jpeg", jpeg.getvalue()[:400], ""
    yield "header alone", png[:33], ""
    yield "eps", eps.getvalue(), "no known format"  # PIL would start Ghostscript
    yield "bomb", bomb.getvalue(), "decompression bomb"  # 50 kB that claim 400 million pixels


def test_what_does_not_decode_is_refused_and_leaves_its_place() -> None:
    async def scenario() -> None:
        async with running(Gated(), places=1) as server:
            for name, body, why in damaged():
                status, answer, _ = await server.post(body)
                assert status == 400, name
                assert answer["error"].startswith("image in the request's body does not decode: "), name
                assert why in answer["error"], name
                assert "0x" not in answer["error"], name
            assert server.model.batches == []
            assert (await server.post(requests()[0]))[0] == 200

    play(scenario())


def test_a_body_that_is_too_large_and_an_unknown_path_are_refused() -> None:
    async def scenario() -> None:
        async with running(Gated()) as server:
            async with server.client.post(f"{server.url}/predict", data=bytes(serve.MAX_BODY_BYTES + 1)) as response:
                assert response.status == 413
            async with server.client.get(f"{server.url}/predict") as response:
                assert response.status == 405
            async with server.client.get(f"{server.url}/health") as response:
                assert await response.json() == {"taken": 0, "places": 8, "largest_batch": 4}

    play(scenario())


def test_a_batch_that_fails_is_answered_and_the_next_one_runs() -> None:
    async def scenario() -> None:
        async with running(Gated(), wait_s=10 * TIMEOUT_S) as server:
            server.model.fail = True
            answers = await asyncio.gather(*server.send(requests()[:4]))
            assert {status for status, _, _ in answers} == {500}
            assert {body["error"] for _, body, _ in answers} == {"the model failed: planted"}
            server.model.fail = False
            answers = await asyncio.gather(*server.send(requests()[:4]))
            assert [body for _, body, _ in answers] == expected()[:4]
            assert server.batcher.taken == 0

    play(scenario())


def test_a_client_that_leaves_frees_its_place_and_harms_nobody() -> None:
    async def scenario() -> None:
        async with running(Gated(), places=4) as server:
            server.model.gate.clear()
            tasks = server.send(requests()[:4])
            await server.until_taken(4)
            tasks[0].cancel()
            tasks[2].cancel()
            server.model.gate.set()
            answers = await asyncio.gather(tasks[1], tasks[3])
            assert [body for _, body, _ in answers] == [expected()[1], expected()[3]]
            await server.until_taken(0)
            assert await server.post(requests()[5]) == (200, expected()[5], None)

    play(scenario())


def test_a_request_cancelled_in_the_queue_is_not_run() -> None:
    async def scenario() -> None:
        model = Gated()
        model.gate.clear()
        batcher = serve.Batcher(model, 1, 4, 0.0)
        image = torch.zeros(3, 32, 32)
        first, second, third = (asyncio.create_task(batcher.run(image)) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.sleep(0)
        model.gate.set()
        await asyncio.gather(first, third)
        assert model.batches == [1, 1]
        batcher.close()

    play(scenario())


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port: int = opened.getsockname()[1]
        return port


def test_the_script_serves_a_checkpoint_until_it_is_told_to_end(tmp_path: Path) -> None:
    vitq.save(variant_quantized("class-token"), tmp_path / "vit.safetensors")
    port = free_port()
    command = [
        sys.executable,
        str(SERVER),
        str(tmp_path / "vit.safetensors"),
        "--device",
        "cpu",
        "--batch-sizes",
        "1,8",
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(vitq.__file__).parents[1])}
    with subprocess.Popen(
        [*command, "--port", str(port)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line + process.stderr.read()

        async def scenario() -> None:
            async with aiohttp.ClientSession() as client:

                async def post(body: bytes) -> dict[str, Any]:
                    async with client.post(f"http://127.0.0.1:{port}/predict", data=body) as response:
                        answer: dict[str, Any] = await response.json()
                        return answer

                assert await asyncio.gather(*map(post, requests()[:20])) == expected()[:20]

        play(scenario())
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
