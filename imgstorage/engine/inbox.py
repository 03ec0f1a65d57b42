"""Letters in: who may say what, questions that wait for answers, and answers to what cannot be done."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

from imgstorage.core.errors import IllegalEvent, ImgStorageError
from imgstorage.core.messages import ErrorAnswer, Hello, Message, Role
from imgstorage.core.post import Letter
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

Handler = Callable[[Letter, Any], Message | None]
Then = Callable[[Message | ImgStorageError], None]


class Inbox:
    """Hands each letter to the handler of its message's class, and sends what the handler returns as the answer.

    A handler must be quick: it commits what it accepts, and leaves the work to tasks.
    """

    def __init__(self, world: World, handlers: Mapping[type[Message], Handler]) -> None:
        self._post, self._tasks, self._host = world.post, world.tasks, world.host
        self._handlers = dict(handlers)

    def receive(self, letter: Letter) -> None:
        """Deal with one letter. Raises ``wrong_sender`` and ``bad_message``: the bus keeps those as dead letters."""
        message = letter.message
        if letter.role not in message.senders:
            raise ImgStorageError("wrong_sender", f"{letter.role.value} {letter.host} may not send {message.action}")
        if isinstance(message, Hello) and (message.role is not letter.role or letter.host not in ("", message.host)):
            raise ImgStorageError("wrong_sender", f"{letter.role.value} {letter.host} says hello as {message.host}")
        handler = self._handlers.get(type(message))
        if handler is None:
            raise ImgStorageError("bad_message", f"{message.action} is not for this daemon")
        try:
            answer = handler(letter, message)
        except ImgStorageError as error:
            log.info("%s from %s: %s", message.action, letter.host or letter.role.value, error)
            answer = ErrorAnswer.of(error.at(self._host))
        except IllegalEvent as error:
            log.warning("%s from %s: %s", message.action, letter.host or letter.role.value, error)
            answer = ErrorAnswer(code="conflict", message=str(error), host=self._host)
        except Exception as error:
            log.exception("%s from %s", message.action, letter.host or letter.role.value)
            answer = ErrorAnswer(code="internal", message=f"{type(error).__name__}: {error}", host=self._host)
        if answer is not None and letter.answer_to:
            self.answer(letter, answer)

    def answer(self, letter: Letter, message: Message) -> None:
        """Answer in the background: a broker that is slow must not keep the next letter waiting."""

        def send() -> None:
            try:
                self._post.answer(letter, message)
            except ImgStorageError as error:
                log.info("an answer was not sent: %s", error)

        self._tasks.run("answers", send)


class Questions:
    """Questions to other daemons whose answers come as letters. Exactly one call of ``then`` for each question."""

    def __init__(self, world: World) -> None:
        self._post, self._tasks, self._random = world.post, world.tasks, world.random
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Role, str, str, Then]] = {}

    def ask(self, role: Role, host: str, message: Message, *, timeout_s: float, key: str, then: Then) -> None:
        """Ask, and run ``then`` as a task of ``key`` with the answer, or with the error there was.

        ``unreachable`` if the daemon is away; ``timeout`` if it does not answer.
        """
        correlation = self._random.token(16)
        with self._lock:
            self._waiting[correlation] = (role, host, key, then)

        def send() -> None:
            try:
                self._post.ask(role, host, message, correlation)
            except ImgStorageError as error:
                self._finish(correlation, error)

        def too_late() -> None:
            text = f"{host} did not answer {message.action} within {float(timeout_s):g} s"
            self._finish(correlation, ImgStorageError("timeout", text, host=host))

        self._tasks.run(f"ask:{role.value}:{host}", send)
        self._tasks.run(f"late:{correlation}", too_late, timeout_s)

    def answered(self, letter: Letter) -> bool:
        """Whether the letter answers a question that still waits, asked of its sender."""
        with self._lock:
            found = self._waiting.get(letter.correlation)
        if found is None or (letter.role, letter.host) != found[:2]:
            return False
        message = letter.message
        self._finish(letter.correlation, message.error() if isinstance(message, ErrorAnswer) else message)
        return True

    def _finish(self, correlation: str, result: Message | ImgStorageError) -> None:
        with self._lock:
            found = self._waiting.pop(correlation, None)
        if found is not None:
            _role, _host, key, then = found
            self._tasks.run(key, lambda: then(result))
