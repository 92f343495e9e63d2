"""The thread that brings a run's record to MLflow. Nothing of it stands in the way of the training loop."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from dynamic_transformers.settings import TrackingSettings
from dynamic_transformers.tracking.delivery import Delivery
from dynamic_transformers.tracking.record import RecordFile
from dynamic_transformers.tracking.store import (
    explained,
    load_mlflow,
    local_database,
    notice_absence,
    open_store,
    tracking_uri,
)

logger = logging.getLogger("dynamic_transformers")

PATIENCE = 4  # seconds without an answer after which nobody waits for the store any more
OPENING = 60  # seconds that the import of MLflow and a new database may take, on a busy machine
PAUSES = (2, 5, 15, 60)  # seconds between attempts while a store is away
RETRY_WITHIN = 1  # seconds in which an attempt has to fail for another one at the end of a run
LOCKED = 10  # attempts, 0.2 seconds apart, while another run writes to the same SQLite file


class Sender:
    """Sends what a record holds, in a thread of its own, again and again while the store is away."""

    def __init__(self, file: RecordFile, settings: TrackingSettings, output_dir: str | Path):
        self.file, self.settings, self.output_dir = file, settings, output_dir
        self._delivery: Delivery | None = None
        self._thread: threading.Thread | None = None
        self._state = threading.Condition()  # of what follows
        self._asked = self._done = 0  # numbers of attempts
        self._arrived = True  # whether the last attempt has sent everything
        self._failures = 0  # attempts in a row
        self._hurry = self._stopped = False
        self._deadline = 0.0  # of the next answer, by time.monotonic
        self._told = ""

    def wake(self) -> int:
        """There is something to send; number of the attempt that sends it."""
        with self._state:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
                self._thread.start()
            self._asked += 1
            self._state.notify_all()
            return self._asked

    def flush(self) -> bool:
        """Wait for an attempt to send everything, as long as the store answers; whether all has arrived."""
        number = self.wake()
        with self._state:
            self._hurry = True
            self._state.notify_all()
            start, failures = time.monotonic(), self._failures
            self._deadline = max(self._deadline, start + PATIENCE)
            while self._done < number:
                now = time.monotonic()
                if self._failures > failures and now - start > RETRY_WITHIN:
                    break  # an attempt that had begun before has failed; another one would take as long
                left = self._deadline - now
                if left <= 0:
                    logger.warning("MLflow: no answer for %d seconds; %s", PATIENCE, self._later())
                    return False
                self._state.wait(left)
            self._hurry = False
            return self._done >= number and self._arrived

    def stop(self) -> None:
        """Let the thread end after its present attempt."""
        with self._state:
            self._stopped = True
            self._state.notify_all()

    def _run(self) -> None:
        while True:
            with self._state:
                if self._arrived:
                    self._state.wait_for(lambda: self._stopped or self._asked > self._done)
                else:
                    pause = PAUSES[min(self._failures, len(PAUSES)) - 1]
                    self._state.wait_for(lambda: self._stopped or self._hurry, pause)
                if self._stopped:
                    return
                number, self._hurry = self._asked, False
            arrived = self._attempt()
            with self._state:
                if arrived and self._failures and not self._stopped:
                    logger.info("MLflow: answers, and has everything")
                self._failures = 0 if arrived else self._failures + 1
                self._done, self._arrived = number, arrived
                self._state.notify_all()

    def _attempt(self) -> bool:
        for attempt in range(1, LOCKED + 1):
            try:
                self._send()
                self._told = ""
                return True
            except Exception as error:
                self._delivery = None
                if attempt == LOCKED or "database is locked" not in str(error):
                    self._tell(error)
                    return False
                time.sleep(0.2)
        raise AssertionError

    def _send(self) -> None:
        if self._delivery is None:
            self._answered()
            notice_absence(self._uri())
            self._answered(OPENING)
            load_mlflow(self._uri())
            if local_database(self._uri()) is None:
                self._answered()
            client = open_store(self._uri())
            self._answered()
            self._delivery = Delivery(client, self.file, self.settings, self.output_dir, self._answered)
        self._answered()
        self._delivery.send()

    def _answered(self, patience: float = PATIENCE) -> None:
        """The store has answered; its next answer may take `patience` seconds."""
        with self._state:
            self._deadline = time.monotonic() + patience
            self._state.notify_all()

    def _tell(self, error: Exception) -> None:
        """Warn, once for each kind of trouble."""
        line, waiting_helps = explained(error, self._uri())
        kind = line.partition(" (")[0]
        if kind != self._told and not self._stopped:
            end = (
                self._later() if waiting_helps else f"until then nothing is sent; afterwards, {self._later()}"
            )
            logger.warning("MLflow: %s; %s", line, end)
        self._told = kind

    def _later(self) -> str:
        return f"`dynamic-transformers sync {self.file.path.parent}` sends what is missing"

    def _uri(self) -> str:
        return tracking_uri(self.settings, self.output_dir)
