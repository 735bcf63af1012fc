"""A policy of one's own: the shard that is being read and the one after it, and nothing that is behind.

cd examples
penstock run --policy my_policy:NextShard -- python serve.py --model /models/llama-3b
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence

from penstock.pagecache.base import Access, Context, Evict, ModelFile, Policy, Prefetch


class NextShard(Policy):
    """For readers that go through a sharded checkpoint file by file."""

    def start(self, context: Context) -> None:
        """What is known before the program reads: the files of ``--model``, of the command, or of a template."""
        self.shards = sorted(context.files, key=lambda shard: shard.name)
        self.current: ModelFile | None = None
        self.finished: list[ModelFile] = []

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        """At the start the first shard; later the rest of the one just opened, and then the next."""
        if access is None:
            return [Prefetch(shard, 0, shard.size_bytes) for shard in self.shards[:1]]
        if access.file == self.current:
            return ()  # leaves all that was asked for as it is
        if access.file not in self.shards:
            insort(self.shards, access.file, key=lambda shard: shard.name)
        if self.current is not None:
            self.finished.append(self.current)
        self.current = access.file
        following = self.shards[self.shards.index(access.file) + 1 :][:1]
        return [
            Prefetch(access.file, access.start, access.file.size_bytes, access.worker),
            *(Prefetch(shard, 0, shard.size_bytes, access.worker) for shard in following),
        ]

    def evict(self, access: Access | None) -> Sequence[Evict]:
        """Asked while memory is short: the shards that are done, and of the present one what is half-way behind."""
        done = [Evict(shard, 0, shard.size_bytes) for shard in self.finished]
        self.finished.clear()
        if access is not None and access.file == self.current and access.start > access.file.size_bytes // 2:
            done.append(Evict(access.file, 0, access.file.size_bytes // 2))
        return done
