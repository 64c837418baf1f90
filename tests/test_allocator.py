"""A process that asks for it pays for the memory of its tensors once."""

import os
import platform
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, torch
from tamzoo.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's allocator")
def test_a_process_reuses_the_memory_of_large_tensors():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", ALLOCATE], capture_output=True, text=True, env=environment)
    before, after = map(int, done.stdout.split())
    assert before > 100 and after < before / 10, done.stderr
