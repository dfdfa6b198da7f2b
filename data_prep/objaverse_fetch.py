"""One object, asked for until it is there: exponential waits with jitter between the tries."""

from __future__ import annotations

import threading
from pathlib import Path
from random import uniform
from typing import Any, NamedTuple

from data_prep.objaverse_check import BrokenAnswerError, GoneError
from data_prep.objaverse_hub import Hub, NotCachedError, explain, stated_wait
from equifeat.errors import DownloadError

_LONGEST_WAIT = 60.0
_MOST_WAITS = 20  # for one object, when the hub asks for fewer requests


class FetchOptions(NamedTuple):
    """How to download.

    Attributes:
        workers: Downloads at the same time.
        tries: How often an object is asked for in one run.
        first_wait: Seconds before the second try; doubled for each further one, times 0.5 to 1.5
            at random, so that the workers do not all come back at once.
        retry_failed: Try again what an earlier run found to be hopeless.
        licences: Record licence and author.
    """

    workers: int = 8
    tries: int = 6
    first_wait: float = 1.0
    retry_failed: bool = False
    licences: bool = False


class Outcome(NamedTuple):
    """What became of one object.

    Attributes:
        uid: The object.
        path: Of its file in the repo and below --out.
        tries: How often it was asked for.
        info: Size and hash when it is there.
        why: A few words when it is not.
        again: Whether a later run should try it again.
        silent: Whether it failed because the hub did not answer.
    """

    uid: str
    path: str
    tries: int
    info: dict[str, Any]
    why: str = ""
    again: bool = False
    silent: bool = False


def fetch_object(
    job: tuple[str, str], hub: Hub, out: Path, options: FetchOptions, stop: threading.Event
) -> Outcome:
    """Ask for an object until it is there, or hopeless, or the tries are used up.

    Args:
        job: Its uid and path.
        hub: Where it is.
        out: Receives the file at its path.
        options: Tries and waits.
        stop: Ends the waiting.

    Returns:
        What became of it.

    Raises:
        DownloadError: The whole run must stop.
    """
    uid, path = job
    wait, tried, politeness = options.first_wait, 0, _MOST_WAITS
    while True:
        tried += 1
        try:
            info = hub.fetch(path, out / path, out / ".download" / uid)
            return Outcome(uid, path, tried, info)
        except DownloadError:
            raise
        except GoneError as error:
            return Outcome(uid, path, tried, {}, str(error))
        except NotCachedError as error:
            return Outcome(uid, path, tried, {}, str(error), again=True)
        except Exception as error:  # whatever a network can do; none of it ends the run
            why, silent = explain(error), not isinstance(error, BrokenAnswerError)
            asked = stated_wait(error)
        if asked is not None and politeness:
            politeness, tried = politeness - 1, tried - 1  # the hub lives: this was no try
            delay = asked + uniform(0, 1)
        else:
            delay, wait = wait * uniform(0.5, 1.5), min(2 * wait, _LONGEST_WAIT)
        if tried >= options.tries or stop.wait(delay):
            return Outcome(uid, path, tried, {}, why, again=True, silent=silent)
