"""One thread that owns the model and runs everybody's requests together; the event loop talks to it by messages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Literal

from nanochat_model.batching import Batcher, Event, Request
from nanochat_model.device import tune_process

_log = logging.getLogger(__name__)
Sink = Callable[[Event | Exception], None]  # called in the worker's thread


class QueueFull(Exception):
    """As many requests are under way and waiting as are allowed."""


class WorkerStopped(Exception):
    """The server is shutting down."""


class Ticket:
    """One accepted request."""

    def __init__(self, worker: Worker, request: Request, sink: Sink) -> None:
        self._worker, self.request, self.sink = worker, request, sink
        self.batch_id: int | None = None  # set by the worker's thread
        self.cancelled = False

    def cancel(self) -> None:
        """Give its row back at the next step; harmless when it has ended."""
        self.cancelled = True
        self._worker._inbox.put(("cancel", self))


class Worker:
    """`make_batcher` is called in the worker's thread, and again after a step has failed (what the cache holds is unknown then)."""

    def __init__(self, make_batcher: Callable[[], Batcher], *, max_queue: int, num_threads: int = 0) -> None:
        self._make_batcher, self._num_threads = make_batcher, num_threads
        self._inbox: SimpleQueue[tuple[Literal["submit", "cancel"], Ticket] | None] = SimpleQueue()
        self._open: dict[int, Ticket] = {}  # by the batcher's id; of the worker's thread
        self._lock = threading.Lock()
        self._num_open = 0
        self._stopping = False
        self._batcher = make_batcher()
        self._max_open = self._batcher.max_rows + max_queue
        self.num_tokens = self.num_requests = self.num_failures = 0
        self.started_at = time.time()
        self._thread = threading.Thread(target=self._run, name="nanoladder-worker", daemon=True)

    def start(self) -> Worker:
        self._thread.start()
        return self

    def submit(self, request: Request, sink: Sink) -> Ticket:
        """Queue a request. Its events go to `sink`, the last with a finish reason; an exception in their place means that it
        failed. Raises QueueFull or WorkerStopped."""
        with self._lock:
            if self._stopping:
                raise WorkerStopped
            if self._num_open >= self._max_open:
                raise QueueFull
            self._num_open += 1
            self.num_requests += 1
            ticket = Ticket(self, request, sink)
            self._inbox.put(("submit", ticket))  # under the lock: nothing comes after the message that ends the thread
        return ticket

    def stop(self, timeout: float = 30.0) -> None:
        """End all requests and the thread."""
        with self._lock:
            self._stopping = True
            self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._stopping

    @property
    def max_rows(self) -> int:
        return self._batcher.max_rows

    def status(self) -> dict[str, int | float]:
        running = self._batcher.num_running
        return {
            "running": running,
            "waiting": max(0, self._num_open - running),
            "max_rows": self._batcher.max_rows,
            "max_queue": self._max_open - self._batcher.max_rows,
            "requests": self.num_requests,
            "tokens": self.num_tokens,
            "failures": self.num_failures,
            "uptime_seconds": round(time.time() - self.started_at, 1),
        }

    def _run(self) -> None:
        tune_process(self._num_threads)
        try:
            self._work()
        except Exception:  # no batcher could be made afresh
            _log.exception("the worker ends; requests are refused from here on")
        with self._lock:
            self._stopping = True
        self._end_all(WorkerStopped("the server is shutting down"))

    def _work(self) -> None:
        while not self._stopping:
            self._take_messages()
            if self._stopping:
                return
            try:
                events = self._batcher.step()
            except Exception as e:  # out of memory, a broken kernel: whoever was in the batch is told, the next ones start afresh
                _log.exception("a step of the batch failed; its requests are ended")
                self.num_failures += 1
                self._end_all(e)
                self._batcher = self._make_batcher()
                continue
            for event in events:
                self._deliver(event)

    def _take_messages(self) -> None:
        """Everything in the inbox; where there is nothing else to do, wait for it."""
        block = not self._batcher.busy
        while True:
            try:
                message = self._inbox.get(block=block)
            except Empty:
                return
            block = False
            if message is None:
                return
            kind, ticket = message
            if kind == "submit":
                self._enter(ticket)
            elif ticket.batch_id is not None and self._open.get(ticket.batch_id) is ticket:
                self._batcher.cancel(ticket.batch_id)

    def _enter(self, ticket: Ticket) -> None:
        if ticket.cancelled:  # before it was let in
            self._close_one()
            ticket.sink(Event(0, None, "cancelled"))
            return
        try:
            ticket.batch_id = self._batcher.submit(ticket.request)
        except ValueError as e:
            self._close_one()
            ticket.sink(e)
            return
        self._open[ticket.batch_id] = ticket

    def _deliver(self, event: Event) -> None:
        ticket = self._open[event.request_id]
        self.num_tokens += event.token is not None
        if event.finish:
            del self._open[event.request_id]
            self._close_one()
        ticket.sink(event)

    def _end_all(self, error: Exception) -> None:
        tickets, self._open = list(self._open.values()), {}
        while self._stopping and not self._inbox.empty():
            message = self._inbox.get()
            if message is not None and message[0] == "submit":
                tickets.append(message[1])
        for ticket in tickets:
            self._close_one()
            ticket.sink(error)

    def _close_one(self) -> None:
        with self._lock:
            self._num_open -= 1
