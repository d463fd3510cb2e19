"""What is said of the machine."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest

from sparse_kernels.device import Device
from sparse_kernels.native import NativeLibraryError, usable_cpus
from sparserve.bench import machine
from sparserve.bench.machine import CpuWatch, _busy_seconds, check_threads
from sparserve.errors import ConfigError

GPU = Device("cuda", 0, "NVIDIA H200", 1 << 37, 1 << 37, 90, 132, 13000, coded=True)


def test_a_process_beside_us_is_seen():
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)  # its start
        watch = CpuWatch()
        time.sleep(0.5)
        assert watch.others() > 0.2
    finally:
        spinning.kill()
        spinning.wait()


def test_our_own_work_is_not_others(monkeypatch):
    seconds = iter([(10.0, 100.0, 7.0), (14.0, 107.0, 12.0)])
    monkeypatch.setattr(CpuWatch, "_now", staticmethod(lambda: next(seconds)))
    assert CpuWatch().others() == 0.5


def test_busy_time_is_all_but_idle_and_waiting_for_disks():
    stat = "cpu  100 20 30 9999 8888 4 5 41 77 66\ncpu0 1 2 3 4 5 6 7 8 9 10\n"
    assert _busy_seconds(stat) == pytest.approx(2.0)  # 200 ticks of 10 ms


def test_more_threads_than_cpus_are_refused():
    check_threads(0)
    check_threads(usable_cpus())
    with pytest.raises(ConfigError, match=f"--threads {usable_cpus() + 1} is more than"):
        check_threads(usable_cpus() + 1)


def test_the_machine_is_its_cpus_and_gpus(monkeypatch):
    def lacking():
        raise NativeLibraryError("there is none")

    monkeypatch.setattr(machine, "devices", lacking)
    without = machine.describe_machine()
    assert without.endswith(", Linux")
    monkeypatch.setattr(machine, "devices", lambda: [GPU, replace(GPU, index=1)])
    assert machine.describe_machine() == without.replace(
        ", Linux", ", NVIDIA H200, NVIDIA H200, Linux"
    )
