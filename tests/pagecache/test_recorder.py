"""penstock.pagecache.recorder: who is which worker, and what each has read."""

from __future__ import annotations

from datetime import datetime

from penstock.pagecache.base import ModelFile, Range
from penstock.pagecache.recorder import Recorder
from penstock.pagecache.template import FileIdentity
from penstock.units import MiB

A = ModelFile("a.safetensors", "/m/a.safetensors", 512 * MiB, 1, 1)
B = ModelFile("b.safetensors", "/m/b.safetensors", 512 * MiB, 1, 2)


def name_of(file: ModelFile) -> str:
    return f"print of {file.name}"


class TestNumbers:
    def test_by_the_order_of_the_first_reads(self) -> None:
        recorder = Recorder()
        assert [recorder.record(pid, A, 0, MiB) for pid in (70, 50, 70, 60)] == [0, 1, 0, 2]
        assert recorder.pids == {70: 0, 50: 1, 60: 2}

    def test_by_what_it_reads_first_where_there_is_a_template(self) -> None:
        groups = [
            (Range(A.name, 0, 256 * MiB), Range(B.name, 0, 256 * MiB)),
            (Range(A.name, 256 * MiB, 512 * MiB), Range(B.name, 256 * MiB, 512 * MiB)),
        ]
        recorder = Recorder(groups)
        assert recorder.record(70, A, 300 * MiB, 301 * MiB) == 1
        assert recorder.record(50, A, MiB, 2 * MiB) == 0
        assert recorder.record(60, A, 0, MiB) == 2  # more workers than were recorded

    def test_the_nearest_beginning_counts(self) -> None:
        groups = [(Range(B.name, 0, MiB), Range(A.name, 0, 512 * MiB)), (Range(A.name, 0, 512 * MiB),)]
        recorder = Recorder(groups)
        assert recorder.record(1, A, 0, MiB) == 1
        assert recorder.record(2, A, 0, MiB) == 0

    def test_one_that_reads_what_no_group_has(self) -> None:
        recorder = Recorder([(Range(A.name, 0, MiB),), (Range(B.name, 0, MiB),)])
        assert recorder.record(1, ModelFile("other", "/other", MiB, 1, 3), 0, MiB) == 0
        assert recorder.record(2, B, 0, MiB) == 1

    def test_a_launchers_rank_is_the_number(self) -> None:
        ranks = {70: 1, 50: 0, 60: None, 80: 1, 90: 5}
        recorder = Recorder(rank_of=ranks.get)
        assert [recorder.record(pid, A, 0, MiB) for pid in (70, 50, 60)] == [1, 0, 2]
        assert recorder.record(80, A, 0, MiB) == 3  # that rank is taken: another launcher's
        assert recorder.record(90, A, 0, MiB) == 5

    def test_a_rank_that_the_template_does_not_have(self) -> None:
        recorder = Recorder([(Range(A.name, 0, MiB),)], rank_of={70: 5}.get)
        assert recorder.record(70, A, 0, MiB) == 0


class TestTemplate:
    def test_nothing_read_is_no_template(self) -> None:
        assert Recorder().template("serve", ["/m"], name_of) is None

    def test_each_workers_reads_in_its_order(self) -> None:
        recorder = Recorder()
        for pid, file, start in [(1, B, 0), (2, A, 0), (1, B, 1), (2, A, 300), (1, A, 64), (2, A, 301)]:
            recorder.record(pid, file, start * MiB, (start + 1) * MiB)
        template = recorder.template("serve", ["/m"], name_of)
        assert template is not None
        assert (template.service, template.root_hints) == ("serve", ("/m",))
        assert template.groups == (
            (Range(B.name, 0, 2 * MiB), Range(A.name, 64 * MiB, 65 * MiB)),
            (Range(A.name, 0, MiB), Range(A.name, 300 * MiB, 302 * MiB)),
        )
        assert set(template.files) == {
            FileIdentity(A.name, 512 * MiB, "print of a.safetensors"),
            FileIdentity(B.name, 512 * MiB, "print of b.safetensors"),
        }
        assert datetime.fromisoformat(template.recorded_at).utcoffset() is not None

    def test_groups_are_numbered_as_the_workers(self) -> None:
        recorder = Recorder(rank_of={70: 1, 50: 0}.get)
        recorder.record(70, B, 0, MiB)
        recorder.record(50, A, 0, MiB)
        template = recorder.template("serve", ["/m"], name_of)
        assert template is not None
        assert [group[0].name for group in template.groups] == [A.name, B.name]

    def test_only_files_that_were_read_are_fingerprinted(self) -> None:
        asked = []

        def fingerprint(file: ModelFile) -> str:
            asked.append(file.name)
            return ""

        recorder = Recorder([(Range(A.name, 0, MiB),)])
        recorder.record(1, B, 0, MiB)
        recorder.template("serve", ["/m"], fingerprint)
        assert asked == [B.name]

    def test_it_can_be_asked_for_again(self) -> None:
        """Once reading has stopped for a while, and at the end."""
        recorder = Recorder()
        recorder.record(1, A, 0, MiB)
        first = recorder.template("serve", ["/m"], name_of)
        recorder.record(1, A, 300 * MiB, 301 * MiB)
        second = recorder.template("serve", ["/m"], name_of)
        assert first is not None
        assert second is not None
        assert first.groups == ((Range(A.name, 0, MiB),),)
        assert second.groups == ((Range(A.name, 0, MiB), Range(A.name, 300 * MiB, 301 * MiB)),)
