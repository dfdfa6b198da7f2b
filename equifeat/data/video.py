"""Video files as the data layer reads them; `equifeat.video_files` does it."""

from __future__ import annotations

from equifeat.video_files import VIDEO_SUFFIXES as VIDEO_SUFFIXES
from equifeat.video_files import Frame as Frame
from equifeat.video_files import VideoFrames as VideoFrames
