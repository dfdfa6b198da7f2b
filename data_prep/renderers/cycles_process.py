"""A helper process that answers one request after the other, and every way it can fail."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
from typing import Any

from numpy.typing import NDArray

from data_prep.renderers.cycles_protocol import read_message, write_message
from equifeat.errors import RenderError

Array = NDArray[Any]

_LAST_WORDS = 400


class WorkerProcess:
    """Starts a command that speaks `data_prep.renderers.cycles_protocol`.

    What it writes to standard error is kept for the error message. It is killed when it does not
    answer in time, and it can be used no more after any failure but an answer that says no.

    Args:
        command: The command; the process id of this process is appended.
        name: What error messages call it.
    """

    def __init__(self, command: list[str], name: str) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("a+b")  # noqa: SIM115 closed by close()
        self.owner = os.getpid()
        # nothing of this interpreter's settings may reach another one
        env = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        try:
            self._process = subprocess.Popen(
                [*command, str(self.owner)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=env,
                # Ctrl-C is for the parent, which then closes the pipe
                start_new_session=True,
            )
        except OSError as error:
            self._errors.close()
            raise RenderError(
                f"{name}: {command[0]} cannot be started ({error.strerror})"
            ) from error

    @property
    def alive(self) -> bool:
        """Whether it can take a request."""
        return not self._errors.closed and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(
        self, request: dict[str, Any], arrays: dict[str, Array], seconds: float
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """Send a request and wait for its answer.

        Args:
            request: JSON values.
            arrays: Named arrays.
            seconds: Time limit; the process is killed when it is over.

        Returns:
            The answer and its arrays.

        Raises:
            RenderError: It refused, crashed, hung, or answered nonsense.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._errors.truncate(0)
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            write_message(self._process.stdin, request, arrays)
            answer, out = read_message(self._process.stdout)
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            timer.cancel()
            reason = self._reason(error, late.is_set(), seconds)
            self.close()
            raise RenderError(f"{self._name}: {reason}") from error
        except BaseException:
            # Ctrl-C between request and answer: the next answer would be the wrong one
            timer.cancel()
            self.close()
            raise
        timer.cancel()
        if not answer.get("ok"):
            raise RenderError(f"{self._name}: {answer.get('error', 'refused without a reason')}")
        return answer, out

    def _reason(self, error: Exception, late: bool, seconds: float) -> str:
        if late:
            return f"no answer within {seconds:g} s, so its process was ended"
        if isinstance(error, (ValueError, KeyError, TypeError)):
            return f"its answer makes no sense ({error})"
        try:
            code = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        self._errors.seek(0)
        words = self._errors.read()[-4000:].decode(errors="replace").strip().splitlines()
        last = f": {words[-1][-_LAST_WORDS:]}" if words else ""
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"its process ended {how}{last}"

    def close(self) -> None:
        """End the process and free what it holds."""
        if self._errors.closed:
            return
        if self.owner == os.getpid() and self._process.poll() is None:
            self._process.kill()
        self._process.wait(10.0) if self.owner == os.getpid() else None
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:  # what was still to be written has no reader
                    continue
        self._errors.close()
