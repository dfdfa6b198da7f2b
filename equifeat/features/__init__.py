"""Features of whole folders and videos: the command `equifeat features`, and reading them back."""

from equifeat.features.reader import read as read
