"""Where vectors come from: files of many kinds, as rows in one order, a block at a time."""

from diveq_core.commands.tokens.sources.opening import open_data
from diveq_core.commands.tokens.sources.source import Source

__all__ = ["Source", "open_data"]
