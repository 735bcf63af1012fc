"""penstock.linux.scheduling: giving way, and never without a way back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from penstock.linux.scheduling import GiveWay


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE, to come back")
def test_there_and_back() -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    way = GiveWay()
    try:
        assert os.sched_getscheduler(0) == os.SCHED_IDLE
    finally:
        way.end()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
    assert os.getpriority(os.PRIO_PROCESS, 0) == nice
    way.end()
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs CAP_SYS_NICE, to come back")
def test_who_has_been_given_a_rank_keeps_it() -> None:
    code = (
        "import os\n"
        "from penstock.linux.scheduling import GiveWay\n"
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))\n"
        "way = GiveWay()\n"
        "assert os.sched_getscheduler(0) == os.SCHED_BATCH\n"
        "way.end()\n"
        "assert os.sched_getscheduler(0) == os.SCHED_BATCH\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_ordinary_user_could_not_come_back(as_ordinary_user: list[str]) -> None:
    code = (
        "import os\n"
        "from penstock.linux.scheduling import GiveWay\n"
        "GiveWay()\n"
        "print(os.sched_getscheduler(0) == os.SCHED_OTHER, os.getpriority(os.PRIO_PROCESS, 0))\n"
    )
    done = subprocess.run([*as_ordinary_user, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True 0\n"
