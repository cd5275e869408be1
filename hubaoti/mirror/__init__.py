"""The local store: verified artifacts, unpacked once, under their digests."""

from hubaoti.mirror.index import BUILT_HERE, Origin, Row
from hubaoti.mirror.store import Artifact, Mirror

__all__ = ["BUILT_HERE", "Artifact", "Mirror", "Origin", "Row"]
