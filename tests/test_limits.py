"""A container's limits, read from folders laid out as Linux lays them out."""

from types import SimpleNamespace

import pytest

from qlora_edu import limits

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 32 GiB free and 8 cores; returns a function that writes its control groups."""
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: SimpleNamespace(available=32 * GIB))
    monkeypatch.setattr(limits.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "MEMBERSHIP", tmp_path / "membership")

    def lay_out(membership, **files):
        limits.MEMBERSHIP.write_text(membership)
        for name, content in files.items():
            path = limits.CGROUPS / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return lay_out


def test_without_control_groups_the_machine_is_the_limit(machine):
    assert limits.memory_available() == 32 * GIB
    assert limits.cpus() == 8


def test_a_container_of_the_second_layout(machine):
    machine(
        "0::/\n",
        memory_dot_max=f"{4 * GIB}\n",
        memory_dot_current=f"{3 * GIB}\n",
        memory_dot_stat=f"anon 5\ninactive_file {GIB}\n",
        cpu_dot_max="150000 100000\n",
    )
    assert limits.memory_available() == 2 * GIB  # 4 granted, 3 used, of which 1 can be reclaimed
    assert limits.cpus() == 1.5


def test_the_tightest_of_all_parents_counts(machine):
    machine(
        "0::/slice/session\n",
        slice__session__memory_dot_max="max\n",
        slice__memory_dot_max=f"{6 * GIB}\n",
        slice__memory_dot_current=f"{GIB}\n",
        slice__session__cpu_dot_max="max 100000\n",
        slice__cpu_dot_max="400000 100000\n",
    )
    assert limits.memory_available() == 5 * GIB
    assert limits.cpus() == 4


def test_a_container_of_the_first_layout(machine):
    machine(
        "4:memory:/box\n3:cpu,cpuacct:/box\n",
        memory__box__memory_dot_limit_in_bytes=f"{2 * GIB}\n",
        memory__box__memory_dot_usage_in_bytes=f"{2 * GIB}\n",
        memory__box__memory_dot_stat=f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
        cpu__cpu_dot_cfs_quota_us="200000\n",
        cpu__cpu_dot_cfs_period_us="100000\n",
    )
    assert limits.memory_available() == GIB // 2
    assert limits.cpus() == 2


def test_unlimited_means_the_machine(machine):
    machine(
        "4:memory:/\n1:cpu:/\n0::/\n",
        memory__memory_dot_limit_in_bytes=f"{UNLIMITED_V1}\n",
        memory__memory_dot_usage_in_bytes="1000\n",
        cpu__cpu_dot_cfs_quota_us="-1\n",
        cpu__cpu_dot_cfs_period_us="100000\n",
        memory_dot_max="max\n",
        cpu_dot_max="max 100000\n",
    )
    assert limits.memory_available() == 32 * GIB
    assert limits.cpus() == 8


def test_more_used_than_granted_is_nothing_available(machine):
    machine("0::/\n", memory_dot_max="100\n", memory_dot_current="200\n")
    assert limits.memory_available() == 0


def test_a_group_that_lies_outside_what_the_container_sees(machine):
    machine("0::/../../outside\n", memory_dot_max=f"{GIB}\n", memory_dot_current="0\n")
    assert limits.memory_available() == GIB
