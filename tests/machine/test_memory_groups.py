"""Control groups: page cache is free, and the group's own limit, those above it, version 1 and memory.high count."""

import pytest

from vstar_engine.machine.memory_groups import free_bytes

GIB = 2**30
V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"
STAT = f"anon {GIB}\nfile {6 * GIB}\ninactive_file {4 * GIB}\nactive_file {2 * GIB}\n"
TOTAL = f"inactive_file 0\ntotal_inactive_file {GIB}\nhierarchical_memory_limit {3 * GIB}\n"


def group(folder, limit, used, **more):
    return {f"{folder}memory.max": limit, f"{folder}memory.current": used, **{f"{folder}{k}": v for k, v in more.items()}}


def old(folder, limit, used):
    return {f"{folder}memory.limit_in_bytes": limit, f"{folder}memory.usage_in_bytes": used}


JOB, NONE, SOFT = "proc/self/cgroup", 9223372036854771712, "memory.soft_limit_in_bytes"
CASES = {
    "no groups": ({}, None),
    "no limit": ({JOB: "0::/", **group(V2, "max", GIB)}, None),
    "page cache": ({JOB: "0::/", **group(V2, 8 * GIB, 7 * GIB), f"{V2}memory.stat": STAT}, 5 * GIB),
    "its own group": ({JOB: "0::/job_7\n", **group(f"{V2}job_7/", 2 * GIB, GIB)}, GIB),
    "a group above": ({JOB: "0::/a/b/c\n", **group(f"{V2}a/", 2 * GIB, GIB), **group(f"{V2}a/b/c/", "max", GIB)}, GIB),
    "the tightest": ({JOB: "0::/a/b\n", **group(f"{V2}a/", 4 * GIB, GIB), **group(f"{V2}a/b/", 2 * GIB, GIB)}, GIB),
    "a container's": ({JOB: "0::/docker/abc\n", **group(V2, 2 * GIB, GIB)}, GIB),
    "a soft limit": ({JOB: "0::/\n", **group(V2, "max", GIB), f"{V2}memory.high": 3 * GIB}, 2 * GIB),
    "over": ({JOB: "0::/\n", **group(V2, GIB, GIB + 4096)}, 0),
    "version 1": ({JOB: "4:memory:/job_7\n", **old(f"{V1}job_7/", 2 * GIB, GIB)}, GIB),
    "version 1 in a container": ({JOB: "4:cpu,memory:/docker/abc\n", **old(V1, 2 * GIB, GIB)}, GIB),
    "version 1, limited above": ({JOB: "4:memory:/a\n", **old(f"{V1}a/", NONE, 2 * GIB), f"{V1}a/memory.stat": TOTAL}, 2 * GIB),
    "version 1, a reservation": ({JOB: "4:memory:/a\n", **old(f"{V1}a/", 4 * GIB, 2 * GIB), f"{V1}a/{SOFT}": GIB}, 2 * GIB),
    "odd files": ({JOB: "nothing\n", **group(V2, "soon", "x")}, None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_groups_leave(case, tmp_path):
    files, free = CASES[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    assert free_bytes(tmp_path) == free
