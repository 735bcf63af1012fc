"""penstock.linux.tracepoint: the kernel's description of a record."""

from __future__ import annotations

import pytest

from penstock.errors import UnsupportedError
from penstock.linux.tracefs import READ
from penstock.linux.tracepoint import parse_format

FORMAT = """\
name: mm_filemap_get_pages
ID: 599
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long i_ino;\toffset:8;\tsize:8;\tsigned:0;
\tfield:char comm[16];\toffset:16;\tsize:16;\tsigned:0;

print fmt: "dev=%d:%d", ((unsigned int) ((REC->s_dev) >> 20))
"""


class TestFormat:
    def test_fields_lie_where_the_file_says(self) -> None:
        layout = parse_format(FORMAT)
        assert (layout.name, layout.identifier) == (READ, 599)
        places = {name: (field.offset_bytes, field.size_bytes) for name, field in layout.fields.items()}
        assert places == {
            "common_type": (0, 2),
            "common_flags": (2, 1),
            "common_pid": (4, 4),
            "i_ino": (8, 8),
            "comm": (16, 16),
        }

    @pytest.mark.parametrize("missing", ["name:", "ID:"])
    def test_what_is_no_format(self, missing: str) -> None:
        with pytest.raises(UnsupportedError, match="format file"):
            parse_format("\n".join(line for line in FORMAT.splitlines() if not line.startswith(missing)))
