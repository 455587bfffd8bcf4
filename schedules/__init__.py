"""What the tuner may choose: one space for each kernel on each kind of device."""

from .registry import definition_hash, get_space
from .space import Config, Space

__all__ = ["Config", "Space", "definition_hash", "get_space"]
