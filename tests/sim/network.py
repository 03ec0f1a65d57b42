"""The message bus of a simulated cluster: loses, repeats, delays and so reorders; knows who is connected.

A message to a daemon that is not connected is refused at once, as the broker does; a host whose link is cut gets
``broker_unreachable``. Every message goes through its real bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from imgstorage.core.errors import ImgStorageError
from imgstorage.core.messages import Hello, Message, OperationChanged, Role, decode, encode
from imgstorage.core.names import HostName
from imgstorage.core.post import Letter
from tests.sim.clockwork import Clockwork, Process

OPERATOR = "operator"
FRONTEND = "frontend"


@dataclass
class Weather:
    """How bad the network is now: probabilities, and the longest delay in seconds."""

    lost: float = 0.0
    repeated: float = 0.0
    delay_s: float = 0.002


@dataclass
class Station:
    """Who receives under an address."""

    process: Process
    receive: Callable[[Letter], None]
    role: Role


@dataclass
class Network:
    clockwork: Clockwork
    weather: Weather = field(default_factory=Weather)
    stations: dict[str, Station] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)
    lost: int = 0

    def connected(self, address: str) -> bool:
        station = self.stations.get(address)
        return station is not None and station.process.alive and address not in self.cut

    def send(self, source: str, to: str, letter: Letter, mandatory: bool) -> None:
        """Raises ``broker_unreachable`` if the sender's link is cut, ``unreachable`` if nobody is there."""
        if source in self.cut:
            raise ImgStorageError("broker_unreachable", "the connection to the message broker is not open")
        if not self.connected(to):
            if mandatory:
                raise ImgStorageError("unreachable", "its daemon is not connected", host=to)
            return
        dice, weather = self.clockwork.dice, self.weather
        body = encode(letter.message)
        copies = 2 if dice.random() < weather.repeated else 1
        for _ in range(copies):
            if dice.random() < weather.lost:
                self.lost += 1
                continue
            station = self.stations[to]
            letter = Letter(message=decode(body), role=letter.role, host=letter.host, answer_to=letter.answer_to,
                            correlation=letter.correlation)  # fmt: skip
            delay = dice.random() ** 3 * weather.delay_s
            self.clockwork.run(station.process, f"letter:{dice.random()}", self._delivery(station, letter), delay)

    def _delivery(self, station: Station, letter: Letter) -> Callable[[], None]:
        def deliver() -> None:
            try:
                station.receive(letter)
            except ImgStorageError as error:  # the bus keeps it as a dead letter
                self.refused.append(f"{station.process.name}: {letter.message.action}: {error}")

        return deliver


class SimPost:
    """Implements :class:`imgstorage.core.post.Post` for one process."""

    def __init__(self, network: Network, process: Process, role: Role, address: str) -> None:
        self._network, self._process, self._role, self._address = network, process, role, address

    def _send(self, to: str, message: Message, *, mandatory: bool, answer: bool = False, correlation: str = "") -> None:
        self._network.clockwork.point(self._process)
        host = "" if self._role is Role.FRONTEND else self._address
        letter = Letter(message=message, role=self._role, host=host, answer_to=self._address if answer else "",
                        correlation=correlation)  # fmt: skip
        self._network.send(self._address, to, letter, mandatory)
        self._network.clockwork.point(self._process)

    def ask(self, role: Role, host: str, message: Message, correlation: str) -> None:
        self._send(host, message, mandatory=True, answer=True, correlation=correlation)

    def command(self, container: HostName, message: Message) -> None:
        self._send(container, message, mandatory=True)

    def report(self, nas: HostName, message: Message) -> None:
        self._send(nas, message, mandatory=True)

    def answer(self, letter: Letter, message: Message) -> None:
        self._send(letter.answer_to, message, mandatory=False, correlation=letter.correlation)

    def announce(self, message: Message) -> None:
        if isinstance(message, Hello):
            hearers = [name for name, one in self._network.stations.items() if one.role in (Role.NAS, Role.FRONTEND)]
        elif isinstance(message, OperationChanged):
            hearers = [FRONTEND] if self._role is Role.NAS else [OPERATOR]
        else:
            raise ImgStorageError("internal", f"{message.action} is no news")
        for name in hearers:
            if name != self._address:
                self._send(name, message, mandatory=False)
