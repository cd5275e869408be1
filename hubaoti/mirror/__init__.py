"""The local store: verified artifacts, unpacked once, under their digests."""

from hubaoti.mirror.artifact import Artifact
from hubaoti.mirror.rows import BUILT_HERE, PullOrigin, Row
from hubaoti.mirror.store import Mirror

__all__ = ["BUILT_HERE", "Artifact", "Mirror", "PullOrigin", "Row"]
