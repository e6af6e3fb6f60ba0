"""Files that were made to fill the memory: a few bytes that become a great many numbers."""

from jaxrnn.checkpoint.errors import CheckpointError

# Far above what compression or sharing gains on weights.
_LARGEST_INFLATION = 100
_SMALL = 64 << 20  # this many bytes are harmless, however few are stored


def largest(size: int) -> int:
    """How many bytes of numbers may come from a file of this size."""
    return max(_SMALL, _LARGEST_INFLATION * size)


class Budget:
    """How many bytes of numbers may still come from a file."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.left: int = largest(size)

    def spend(self, count: int) -> None:
        """Count bytes before they are made.

        Raises:
            CheckpointError: there are too many by now.
        """
        self.left -= count
        if self.left < 0:
            cause = f"a bomb: its numbers would fill over {largest(self.size)} bytes, from a file of {self.size}"
            raise CheckpointError(f"{cause}\nget the file from a source that you trust")
