"""The frontend: the one door. It knows the hosts, fills in what a request leaves open, and passes it on.

Nothing of a volume's state lives here: the NAS that has the volume decides. What the frontend remembers of an
operation is which NAS it went to and the last it heard, so that it can be asked for by its id alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from imgstorage import __version__
from imgstorage.core.errors import ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.messages import (
    AddZvol,
    DelZvol,
    DumpZvol,
    ErrorAnswer,
    GetStatus,
    GrowZvol,
    Hello,
    HostList,
    HostRow,
    ListDev,
    ListHosts,
    ListZvols,
    MapZvol,
    Message,
    OperationAnswer,
    OperationChanged,
    PullZvol,
    Role,
    ShowOperation,
    Status,
    UnmapZvol,
)
from imgstorage.core.names import TRUTH, HostName
from imgstorage.core.operations import Operation
from imgstorage.core.post import Letter
from imgstorage.core.records import FrontendRecords
from imgstorage.engine.inbox import Handler, Inbox, Questions
from imgstorage.engine.world import World

log = logging.getLogger(__name__)

STATUS_S = 3.0
SAID_AGAIN_S = 10.0
"""A daemon that comes and goes, or that only says so, is logged no more often than this."""
ROLES = {"nas": Role.NAS, "container": Role.CONTAINER}


class Coordinator:
    """The frontend's engine."""

    def __init__(self, world: World, records: FrontendRecords, img_sync: bool) -> None:
        self._records, self._post, self._tasks = records, world.post, world.tasks
        self._img_sync, self._clock = img_sync, world.clock
        self._greeted: dict[tuple[Role, str], tuple[str, float]] = {}
        self._questions = Questions(world)
        handlers: dict[type[Message], Handler] = {
            **dict.fromkeys((UnmapZvol, PullZvol, GrowZvol, AddZvol, DelZvol, DumpZvol, ListZvols), self._to_nas),
            MapZvol: self._map,
            ListDev: self._to_container,
            ListHosts: self._list_hosts,
            ShowOperation: self._show,
            OperationChanged: self._news,
            Hello: self._hello,
        }
        self._inbox = Inbox(world, handlers)

    def receive(self, letter: Letter) -> None:
        """Deal with one letter. Raises ``wrong_sender``, ``bad_message``."""
        if letter.correlation and self._questions.answered(letter):
            return
        self._inbox.receive(letter)

    def start(self) -> None:
        """Nothing is under way here that a restart would have to go on with."""

    def connected(self) -> None:
        """The broker is back. Whoever waits asks again."""

    # -- passing on

    def _known(self, host: HostName, role: str) -> None:
        hosts = self._records.hosts()
        if hosts.get(host) != role:
            known = ", ".join(sorted(name for name, its in hosts.items() if its == role)) or "none"
            kind = "NAS" if role == "nas" else "VM container"
            raise ImgStorageError("not_found", f"there is no {kind} {host}; there is {known}",
                                  hint="imgstorage list host")  # fmt: skip

    def _map(self, letter: Letter, request: MapZvol) -> Message | None:
        self._known(request.container, "container")
        if request.mode is None:
            own = self._records.attribute(request.container, "img_sync")
            value = own if own is not None else self._records.attribute("", "img_sync")
            sync = self._img_sync if value is None else TRUTH.get(value.lower(), False)
            request = replace(request, mode=Mode.SYNC if sync else Mode.DIRECT)
        return self._to_nas(letter, request)

    def _to_nas(
        self,
        letter: Letter,
        request: MapZvol | UnmapZvol | PullZvol | GrowZvol | AddZvol | DelZvol | DumpZvol | ListZvols,
    ) -> Message | None:
        self._known(request.nas, "nas")
        self._pass_on(letter, Role.NAS, request.nas, request)
        return None

    def _to_container(self, letter: Letter, request: ListDev) -> Message | None:
        self._known(request.container, "container")
        self._pass_on(letter, Role.CONTAINER, request.container, request)
        return None

    def _pass_on(
        self, letter: Letter, role: Role, host: HostName, request: Message,
        otherwise: Callable[[ImgStorageError], Message] | None = None,
    ) -> None:  # fmt: skip
        def then(answer: Message | ImgStorageError) -> None:
            if isinstance(answer, ImgStorageError):
                answer = otherwise(answer) if otherwise else ErrorAnswer.of(_away(answer, role, host))
            if isinstance(answer, OperationAnswer):
                self._remember(answer.operation)
            self._inbox.answer(letter, answer)

        self._questions.ask(
            role, host, request, timeout_s=request.timeout - 1.0, key=f"passed:{letter.correlation}", then=then
        )

    # -- operations

    def _remember(self, operation: Operation) -> None:
        with self._records.write():
            known = self._records.operation(operation.op)
            if known is None or (operation.changed_at >= known.changed_at and not known.ended):
                self._records.save_operation(operation)

    def _news(self, letter: Letter, news: OperationChanged) -> Message | None:
        if news.operation.nas != letter.host:
            raise ImgStorageError("wrong_sender", f"{letter.host} speaks of an operation of {news.operation.nas}")
        self._remember(news.operation)

        def send() -> None:
            try:
                self._post.announce(news)
            except ImgStorageError as error:
                log.debug("news of %s not passed on: %s", news.operation.op, error)

        self._tasks.run("news", send)
        return None

    def _show(self, letter: Letter, request: ShowOperation) -> Message | None:
        known = self._records.operation(request.op)
        if known is None:
            return self._ask_every_nas(letter, request)
        if known.ended:
            return OperationAnswer(operation=known)

        def last_heard(error: ImgStorageError) -> Message:
            return OperationAnswer(operation=replace(known, note=f"{known.note} (last heard; {error})"))

        self._pass_on(letter, Role.NAS, known.nas, request, last_heard)
        return None

    def _ask_every_nas(self, letter: Letter, request: ShowOperation) -> Message | None:
        """The answer to the request that began the operation may have been lost, with the news of it."""
        hosts = [host for host, role in self._records.hosts().items() if role == "nas"]
        away: list[str] = []
        left = set(hosts)

        def unknown() -> Message:
            hint = "imgstorage list host storagemap NAS shows what is under way"
            if away:
                text = f"no operation {request.op} is known here, and {', '.join(sorted(away))} cannot be asked"
                return ErrorAnswer(code="timeout", message=text, hint=hint)
            return ErrorAnswer(code="not_found", message=f"no operation {request.op} is known", hint=hint)

        def heard(host: HostName, answer: Message | ImgStorageError) -> None:
            if not left:
                return
            left.discard(host)
            if isinstance(answer, OperationAnswer):
                left.clear()
                self._remember(answer.operation)
                self._inbox.answer(letter, answer)
                return
            if not isinstance(answer, ImgStorageError) or answer.code != "not_found":
                away.append(host)
            if not left:
                self._inbox.answer(letter, unknown())

        for host in hosts:
            self._questions.ask(
                Role.NAS, host, request, timeout_s=request.timeout - 1.0, key=f"passed:{letter.correlation}",
                then=lambda answer, host=host: heard(host, answer),  # type: ignore[misc]
            )  # fmt: skip
        return None if hosts else unknown()

    # -- hosts

    def _hello(self, letter: Letter, hello: Hello) -> Message | None:
        known, said_at = self._greeted.get((letter.role, letter.host), ("", 0.0))
        now = self._clock.now()
        if hello.life == known or now - said_at < SAID_AGAIN_S:
            return None
        self._greeted[letter.role, letter.host] = (hello.life, now)
        log.info("%s %s (version %s) is here", hello.role.value, letter.host, hello.version)
        if hello.version != __version__:
            log.warning("%s runs version %s, this is %s", letter.host, hello.version, __version__)
        return None

    def _list_hosts(self, letter: Letter, _request: ListHosts) -> Message | None:
        hosts = self._records.hosts()
        rows: dict[str, HostRow] = {}
        if not hosts:
            return HostList(rows=())

        def heard(host: HostName, role: str, answer: Message | ImgStorageError) -> None:
            row = HostRow(host=host, role=role, connected=False)
            if isinstance(answer, Status):
                row = HostRow(host=host, role=role, connected=True, version=answer.version, pools=answer.pools,
                              alarms=answer.alarms)  # fmt: skip
            rows[host] = row
            if len(rows) == len(hosts):
                self._inbox.answer(letter, HostList(rows=tuple(rows[name] for name in sorted(rows))))

        for host, role in hosts.items():
            self._questions.ask(
                ROLES[role], host, GetStatus(), timeout_s=STATUS_S, key=f"hosts:{letter.correlation}",
                then=lambda answer, host=host, role=role: heard(host, role, answer),  # type: ignore[misc]
            )  # fmt: skip
        return None


def _away(error: ImgStorageError, role: Role, host: HostName) -> ImgStorageError:
    """A refusal as it is; of a daemon that is away, what to do about it."""
    if error.code == "unreachable":
        daemon = "img-storage-nas" if role is Role.NAS else "img-storage-vm"
        hint = f"start {daemon} on {host}; imgstorage list host shows who is connected"
        return ImgStorageError("unreachable", f"{daemon} is not connected", host=host, hint=hint)
    return error
