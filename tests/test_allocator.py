"""Freed memory is kept: a buffer that is taken again costs no page faults."""

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import torch
from olmo_train.run import allocator

def faults():  # of ten rounds of taking and freeing 64 MB, after some in which the heap finds its size
    for round in range(40):
        if round == 30:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
told = allocator.keep_freed_memory()
print(json.dumps([told, before, faults()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc on Linux")
def test_a_buffer_that_is_taken_again_costs_no_page_faults():
    told, before, after = json.loads(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True).stdout)
    assert told
    assert before > 10 * 2**26 // 4096 / 2, "the plain allocator maps such a buffer anew each time"
    assert after < 100


def test_other_systems_are_left_alone(monkeypatch):
    from olmo_train.run import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed_memory()
