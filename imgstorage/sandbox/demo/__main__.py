"""``python -m imgstorage.sandbox.demo [IMAGE] [--size SIZE] [--keep]``: see ``--help``.

Whatever happens, an error or a signal, everything is taken down and the exit status tells: 0 all as promised,
1 something was not, 2 usage, 130 interrupted.
"""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from imgstorage.core.errors import EXIT_FAILED, EXIT_OK, ImgStorageError
from imgstorage.core.mapping import Mode
from imgstorage.core.names import parse_size
from imgstorage.sandbox.demo import image as images
from imgstorage.sandbox.demo.arguments import parser
from imgstorage.sandbox.demo.show import Show
from imgstorage.sandbox.demo.stage import Stage
from imgstorage.sandbox.demo.story import COPY_S, LEAST_COPY_BYTES_S, Story, summary

EXIT_INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: list[str]) -> int:
    """Run it; returns the exit status."""
    options = parser().parse_args(argv)
    show = Show()
    for number in SIGNALS:
        signal.signal(number, _interrupted)
    stage: Stage | None = None
    status = EXIT_FAILED
    try:
        size_bytes = parse_size(options.size)
        stage = Stage(show)
        _tell(show, stage, options.image, size_bytes, keep=options.keep)
        status = EXIT_OK
    except KeyboardInterrupt:
        show.error("interrupted")
        status = EXIT_INTERRUPTED
    except ImgStorageError as error:
        _fail(show, stage, error)
    except Exception as error:
        _fail(show, stage, ImgStorageError("internal", f"{type(error).__name__}: {error}"))
    finally:
        for number in SIGNALS:  # taking down takes seconds: it is not to be stopped half-way
            signal.signal(number, signal.SIG_IGN)
        if stage is not None and not (options.keep and status == EXIT_OK):
            show.remark("taking everything down")
            problems = stage.take_down()
            for problem in problems:
                show.error(f"error: {problem}")
            if problems and status == EXIT_OK:
                status = EXIT_FAILED
    if status == EXIT_OK and not options.keep:
        show.remark("done; nothing is left")
    return status


def _tell(show: Show, stage: Stage, source: Path | None, size_bytes: int, *, keep: bool) -> None:
    show.heading("A system on this machine: a broker, a frontend, a NAS and two VM containers")
    stage.prepare()
    scratch = stage.folder / "scratch"
    scratch.mkdir()
    with show.progress("preparing the disk image"):
        if source is None:
            image = images.made(size_bytes, stage.images, scratch)
        else:
            image = images.taken(source, stage.images, scratch)
    speed = max(LEAST_COPY_BYTES_S, int(image.data_bytes / COPY_S))
    stage.slow_down(speed)
    show.remark(f"disk image: {image}; copies to the container are slowed down to {speed / 1e6:.0f} MB/s")
    stage.up()
    story = Story(show, stage, image)
    story.bring_in()
    chapters = [story.chapter(Mode.SYNC), story.chapter(Mode.DIRECT)]
    story.remove()
    show.heading("Summary")
    show.output("\n".join(summary(chapters, image)))
    if keep:
        shutil.rmtree(scratch)
        show.heading("It goes on running; to use it:")
        show.output(f"source {stage.layout.environment_file}")
        show.output(f"imgstorage sandbox down dir={stage.sandbox} && rm -r {stage.folder}   # to end it")


def _fail(show: Show, stage: Stage | None, error: ImgStorageError) -> None:
    if stage is not None:
        show.output(stage.complaints())
    show.error(f"error: {error}")
    if error.hint:
        show.error(f"try: {error.hint}")


def _interrupted(number: int, _frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
