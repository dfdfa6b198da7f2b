"""Frames of video files with their times. The only importer of PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equifeat.errors import ImageError, import_extra

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)
"""What a file must end in to be taken for a video."""

_MAX_PIXELS = 200_000_000
# Containers that hold their own frames. FFmpeg also reads playlists, which name other files.
_FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,ogg,asf,h264,hevc,m4v,mjpeg,ivf,av1,obu,mxf"
_EARLY = 1e-6  # times are rounded to the container's clock


class Frame(NamedTuple):
    """One frame of a video.

    Attributes:
        time_s: Seconds since the video's first frame.
        image: (H, W, 3) uint8 RGB.
    """

    time_s: float
    image: NDArray[np.uint8]


class VideoFrames:
    """The frames of a video file, upright, each at its own time; may be iterated again and again.

    Frames are decoded one after the other, so that a long video takes little memory. Times are
    those of the file, also where frames are unevenly spaced.

    Args:
        path: The file.
        start: First time in seconds; the decoder jumps to the key frame before it.
        stop: Time in seconds before which the last frame lies.
        step: Take every step-th frame only.
        fps: Take the first frame of every 1/fps seconds only; frames are never repeated.

    Raises:
        ImageError: There is no such file, it is no video, damaged at its start or too large, or
            the options contradict each other.
        MissingExtraError: PyAV is not installed.
    """

    def __init__(
        self,
        path: str | Path,
        start: float | None = None,
        stop: float | None = None,
        *,
        step: int | None = None,
        fps: float | None = None,
    ) -> None:
        self.path = Path(path)
        self.start, self.stop = 0.0 if start is None else start, stop
        self.step, self.fps = step, fps
        self._check_options()
        self._av = import_extra("av", "video", "reading video files")
        if not self.path.is_file():
            raise ImageError(f"{self.path}: no such video file; check the path")
        with self._opened() as (container, stream):
            first = next(container.decode(stream), None)
            if first is None:
                raise ImageError(f"{self.path}: a video without frames; check the file")
            self._first_pts: int | None = first.pts
            self.size_hw: tuple[int, int] = self._upright(first).shape[:2]
            """Height and width of the upright frames."""
            rate = stream.average_rate or stream.guessed_rate
            self.average_fps: float | None = float(rate) if rate else None
            """Mean frames a second of the whole file, if the file tells."""
            clock = stream.duration and float(stream.duration * stream.time_base)
            whole = container.duration and container.duration / self._av.time_base
            self.duration_s: float | None = clock or whole or None
            """Length of the whole file in seconds, if the file tells."""

    def __iter__(self) -> Iterator[Frame]:
        taken, next_due = 0, self.start
        for time_s, frame in self._decoded(self.start):
            if self.stop is not None and time_s >= self.stop - _EARLY:
                return
            if time_s < next_due - _EARLY:
                continue
            taken += 1
            if self.step is not None and (taken - 1) % self.step:
                continue
            if self.fps is not None:
                passed = math.floor((time_s - self.start + _EARLY) * self.fps) + 1
                next_due = self.start + passed / self.fps
            with self._named_errors(time_s):
                image = self._upright(frame)
            yield Frame(time_s, image)

    def at(self, time_s: float) -> Frame:
        """Return the frame that is on the screen at a time, whatever start, step and fps are.

        Args:
            time_s: Seconds since the first frame.

        Returns:
            The last frame that begins at this time or before; the first one for times before it.
        """
        shown: tuple[float, Any] | None = None
        for begins, frame in self._decoded(time_s):
            if shown is not None and begins > time_s + _EARLY:
                break
            shown = (begins, frame)
        assert shown is not None  # the first frame was decoded before
        with self._named_errors(shown[0]):
            return Frame(shown[0], self._upright(shown[1]))

    def _check_options(self) -> None:
        if self.step is not None and self.fps is not None:
            raise ImageError("step and fps both choose frames of a video: give one of them")
        if self.step is not None and self.step < 1:
            raise ImageError(f"step must be 1 or more frames, not {self.step}")
        if self.fps is not None and not self.fps > 0:
            raise ImageError(f"fps must be above 0 frames a second, not {self.fps:g}")
        if not self.start >= 0:
            raise ImageError(f"start must be 0 s or later, not {self.start:g}")
        if self.stop is not None and not self.stop > self.start:
            raise ImageError(f"stop={self.stop:g} s must lie after start={self.start:g} s")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """Open the file and its first video stream."""
        options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
        with (
            self._named_errors(),
            self._av.open(
                f"file:{self.path}", options=options, metadata_errors="replace"
            ) as container,
        ):
            if not container.streams.video:
                raise ImageError(f"{self.path}: a file without video; give a video file")
            stream = container.streams.video[0]
            self._check_size(stream.width, stream.height)
            stream.codec_context.options = {"max_pixels": str(_MAX_PIXELS)}
            stream.thread_type = "AUTO"
            yield container, stream

    def _decoded(self, from_s: float) -> Iterator[tuple[float, Any]]:
        """Give frames and times from a key frame at or before a time on."""
        if from_s > 0 and self._first_pts is not None:
            late = True  # until a frame at or before the time shows that the jump went well
            for time_s, frame in self._run(from_s):
                if late and time_s > from_s + _EARLY:
                    break
                late = False
                yield time_s, frame
            if not late:
                return
        yield from self._run(0.0)

    def _run(self, from_s: float) -> Iterator[tuple[float, Any]]:
        with self._opened() as (container, stream):
            if from_s > 0:
                first = self._first_pts or 0
                try:
                    container.seek(first + int(from_s / stream.time_base), stream=stream)
                except self._av.FFmpegError:
                    return
            time_s = 0.0
            frames = container.decode(stream)
            for index in range(2**62):
                with self._named_errors(time_s):
                    frame = next(frames, None)
                if frame is None:
                    return
                if frame.pts is None or self._first_pts is None:  # bare streams have no clock
                    time_s = index / (self.average_fps or 25.0)
                else:
                    time_s = float((frame.pts - self._first_pts) * frame.time_base)
                yield time_s, frame

    def _upright(self, frame: Any) -> NDArray[np.uint8]:
        """Convert to RGB and obey the display matrix: x' = a x + c y, y' = b x + d y."""
        self._check_size(frame.width, frame.height)
        image: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
        for data in frame.side_data:
            if data.type.name == "DISPLAYMATRIX":
                a, b, _, c, d = np.frombuffer(bytes(data), "<i4")[:5].tolist()
                if abs(b) + abs(c) > abs(a) + abs(d):
                    image, a, d = image.transpose(1, 0, 2), c, b
                image = image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
        return np.ascontiguousarray(image)

    def _check_size(self, width: int, height: int) -> None:
        if width * height > _MAX_PIXELS:
            raise ImageError(
                f"{self.path}: frames of {width}x{height} px are more than {_MAX_PIXELS} pixels; "
                "make them smaller first"
            )

    @contextmanager
    def _named_errors(self, after_s: float | None = None) -> Iterator[None]:
        """Turn FFmpeg's errors into one sentence with the file's name."""
        try:
            yield
        except (self._av.FFmpegError, ValueError) as error:
            where = "" if after_s is None else f" after {after_s:.3f} s"
            reason = getattr(error, "strerror", None) or str(error)
            raise ImageError(
                f"{self.path}: not a video that FFmpeg can read, or damaged{where} ({reason}); "
                "write it anew, for instance as MP4"
            ) from error
