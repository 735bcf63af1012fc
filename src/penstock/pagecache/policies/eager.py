"""Everything at the first access: what a program that knows its files would ask of the kernel."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.pagecache.base import Access, Context, Policy, Prefetch


class Eager(Policy):
    """At the first access to any file, prefetch all known files in the order of their names.

    A file that nobody had named yet is prefetched whole when it is first read. With less memory than model it
    thrashes, as the paper's EagerLoad does.
    """

    # What was asked for stays asked for: the loader must not hold back for memory, or this would be another policy.
    ignores_memory = True

    def start(self, context: Context) -> None:
        self._known = sorted(context.files, key=lambda file: file.name)
        self._asked: set[object] = set()

    def prefetch(self, access: Access | None) -> Sequence[Prefetch]:
        if access is None or access.file in self._asked:
            return ()
        wanted = [
            access.file,
            *(file for file in self._known if file not in self._asked and file != access.file),
        ]
        wanted.sort(key=lambda file: file.name)
        self._asked.update(wanted)
        return [Prefetch(file, 0, file.size_bytes) for file in self._known if file in self._asked] + [
            Prefetch(file, 0, file.size_bytes) for file in wanted if file not in self._known
        ]
