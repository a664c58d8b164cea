"""Serves a quantized checkpoint over HTTP: ``pip install 'vitq-kernels[serve]'``, then ``python serve.py FILE``.

    curl --data-binary @cat.jpg http://127.0.0.1:8080/predict     {"class": 281, "probability": 0.93}

Requests that arrive together run together, in batches of at most the largest captured one. A bounded number of them may
wait; the next is told so at once (503 with Retry-After). SIGTERM or Ctrl-C ends the server after what it accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from aiohttp import web
from PIL import Image
from torch import Tensor

import vitq_kernels as vitq
from vitq_kernels.images import Transform, decode_image, eval_transform

LOG = logging.getLogger("serve")
MAX_BODY_BYTES = 16 << 20
Image.MAX_IMAGE_PIXELS = 32 << 20  # of what a small file may claim to decode to
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # PIL knows more, of which EPS starts another program
RETRY_AFTER_S = 1

Classify = Callable[[Tensor], Tensor]  # float32 images [b, C, H, W] to float32 probabilities [b, classes], on the CPU


class OverloadedError(Exception):
    """All places are taken."""


@dataclass
class _Waiting:
    image: Tensor  # [C, H, W]
    result: Future[Tensor] = field(default_factory=Future)  # probabilities [classes]


class Batcher:
    """Gathers images of many requests into batches, which one thread runs.

    Args:
        classify: runs a batch.
        largest: images a batch.
        places: requests that may be in the server at once, from their admission to their answer.
        wait_s: how long a batch waits for company, from its first image on.
    """

    def __init__(self, classify: Classify, largest: int, places: int, wait_s: float) -> None:
        self.places = places
        self.taken = 0
        self._classify, self._largest, self._wait_s = classify, largest, wait_s
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()  # never longer than the places taken
        self._thread = threading.Thread(target=self._work, name="batches", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Takes one of the places; only from the event loop's thread. Raises OverloadedError if there is none."""
        if self.taken >= self.places:
            raise OverloadedError
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1

    async def run(self, image: Tensor) -> Tensor:
        """Probabilities [classes] of an image [C, H, W]; raises what ``classify`` raised."""
        waiting = _Waiting(image)
        self._queue.put(waiting)
        return await asyncio.wrap_future(waiting.result)

    def close(self) -> None:
        """Returns after all that was given to ``run`` has its result."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            batch, closed = self._gather(first)
            # A request may have been cancelled while it waited; from here on it cannot be.
            batch = [waiting for waiting in batch if waiting.result.set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)
            if closed:
                return

    def _gather(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """A batch, and whether it is the last."""
        batch, until = [first], time.monotonic() + self._wait_s
        while len(batch) < self._largest:
            try:
                waiting = self._queue.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if waiting is None:
                return batch, True
            batch.append(waiting)
        return batch, False

    def _answer(self, batch: list[_Waiting]) -> None:
        try:
            results = self._classify(torch.stack([waiting.image for waiting in batch]))
            answers = list(zip(batch, results, strict=True))
        except Exception as error:  # of any kind: it is the answer to these requests, and the next batch may be fine
            LOG.exception("a batch of %d failed", len(batch))
            for waiting in batch:
                waiting.result.set_exception(error)
            return
        for waiting, result in answers:
            waiting.result.set_result(result)


BATCHER = web.AppKey("batcher", Batcher)


def make_app(classify: Classify, transform: Transform, largest: int, places: int, wait_s: float) -> web.Application:
    """The server: ``POST /predict`` with an image as body, and ``GET /health``."""

    async def predict(request: web.Request) -> web.Response:
        source, name = io.BytesIO(await request.read()), "in the request's body"
        batcher = request.app[BATCHER]
        try:
            with batcher.place():
                try:
                    image = await asyncio.to_thread(decode_image, source, transform, name, FORMATS)
                except ValueError as error:
                    return web.json_response({"error": str(error)}, status=400)
                probabilities = await batcher.run(image)
        except OverloadedError:
            text = f"overloaded: {places} requests are waiting, the most there may be; try again"
            return web.json_response({"error": text}, status=503, headers={"Retry-After": str(RETRY_AFTER_S)})
        except Exception as error:  # of the model; the server's log has it with its trace
            return web.json_response({"error": f"the model failed: {error}"}, status=500)
        best = int(probabilities.argmax())
        return web.json_response({"class": best, "probability": float(probabilities[best])})

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"taken": request.app[BATCHER].taken, "places": places, "largest_batch": largest})

    async def batches(app: web.Application) -> AsyncIterator[None]:
        app[BATCHER] = Batcher(classify, largest, places, wait_s)
        yield
        await asyncio.to_thread(app[BATCHER].close)  # aiohttp comes here when all handlers have ended

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.add_routes([web.post("/predict", predict), web.get("/health", health)])
    app.cleanup_ctx.append(batches)
    return app


def captured(checkpoint: Path, device: str, batch_sizes: tuple[int, ...]) -> tuple[Classify, Transform]:
    """A checkpoint as a function of batches, and what makes an image of a file; float16 on a GPU."""
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    model = vitq.load(checkpoint, device).to(dtype)
    fast, transform = vitq.capture(model, batch_sizes), eval_transform(model)

    def classify(images: Tensor) -> Tensor:
        return fast(images.to(device, dtype)).float().softmax(-1).cpu()

    classify(transform(Image.new("RGB", (64, 64)))[None])  # a model that takes other images is refused before it serves
    return classify, transform


def main(
    checkpoint: Annotated[Path, typer.Argument(help="file of vitq.save or vitq quantize")],
    device: Annotated[str, typer.Option(help="such as cuda, cuda:1, cpu")] = "cuda"
    if torch.cuda.is_available()
    else "cpu",
    batch_sizes: Annotated[str, typer.Option(help="to capture; the largest is the largest that runs")] = "1,4,16,64",
    places: Annotated[int, typer.Option(help="requests in the server at once", min=1)] = 256,
    wait_ms: Annotated[float, typer.Option(help="a batch waits for company", min=0)] = 2.0,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> None:
    """Serves CHECKPOINT until SIGTERM or Ctrl-C."""
    logging.basicConfig(level=logging.INFO)
    sizes = tuple(int(word) for word in batch_sizes.split(","))
    classify, transform = captured(checkpoint, device, sizes)
    web.run_app(make_app(classify, transform, max(sizes), places, wait_ms / 1e3), host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
