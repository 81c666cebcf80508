"""Memory that runs out: really, on the CPU (petabytes are asked for). For a GPU's allocator stands its error.
And the pages that tensors lie in."""

import logging
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_in_ranks

from dino.runtime.memory import (
    OutOfMemory,
    is_out_of_memory,
    oom_advice,
    oom_advice_on_all_ranks,
    skip_when_out_of_memory,
    smaller_batch_overrides,
)
from dino.runtime.processes import place

ASKS = [
    lambda: torch.empty(10**15),
    lambda: np.empty(10**15),
    lambda: bytearray(10**15),
]
FROM_CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.1 GiB is free."
)


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
AN_EIGHTH_OF_A_GB = """
import dino, torch
x = torch.ones(2**25)
print(open("/proc/self/smaps_rollup").read())
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(),
    reason="the kernel gives large pages to all, or none",
)
@pytest.mark.parametrize("said, least, most", [(None, 30_000, 140_000), ("0", 0, 10_000)])
def test_large_tensors_lie_in_large_pages_unless_the_user_says_otherwise(said, least, most):
    env = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    env |= {"THP_MEM_ALLOC_ENABLE": said} if said else {}
    command = [sys.executable, "-c", AN_EIGHTH_OF_A_GB]
    memory = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert least <= int(re.search(r"AnonHugePages:\s+(\d+)", memory).group(1)) <= most  # kB


def raise_it(error):
    raise error


@pytest.mark.parametrize(
    "ask",
    [
        *ASKS,
        lambda: raise_it(torch.OutOfMemoryError(FROM_CUDA)),
        lambda: raise_it(
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")
        ),
    ],
    ids=["torch", "numpy", "python", "cuda's allocator", "cuda"],
)
def test_whoever_runs_out_of_memory_is_told_what_takes_less(ask):
    with (
        pytest.raises(OutOfMemory, match=r"^out of memory \(.*\) at batch 4; take 2\.$") as told,
        oom_advice("at batch 4; take 2."),
    ):
        ask()
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 320


def test_the_size_that_was_asked_for_is_said():
    with pytest.raises(OutOfMemory, match="you tried to allocate 4000000000000000 bytes"), oom_advice(""):
        torch.empty(10**15)
    with (
        pytest.raises(OutOfMemory, match="Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB"),
        oom_advice(""),
    ):
        raise torch.OutOfMemoryError(FROM_CUDA)


def test_other_errors_are_left_as_they_are():
    with pytest.raises(RuntimeError, match="^shapes differ$"), oom_advice(""):
        raise RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        skip_when_out_of_memory(lambda: raise_it(RuntimeError("shapes differ")), None)
    assert not is_out_of_memory(pickle.PicklingError("DefaultCPUAllocator: not of torch"))


def test_what_cannot_be_measured_for_want_of_memory_is_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "dino"):
        assert skip_when_out_of_memory(lambda: {"knn": 0.5}, {}) == {"knn": 0.5}
        assert skip_when_out_of_memory(lambda: {"knn": torch.empty(10**15).sum().item()}, {}) == {}
    (record,) = caplog.records
    assert "not measured: " in record.getMessage()
    assert "training goes on" in record.getMessage()


@pytest.mark.parametrize(
    ("batch", "passes", "derived", "said"),
    [
        (64, 1, False, "1/2 take less: training.batch_size=32 training.gradient_accumulation_steps=2"),
        (64, 4, False, "1/2 take less: training.batch_size=32 training.gradient_accumulation_steps=8"),
        (9, 2, False, "1/3 take less: training.batch_size=3 training.gradient_accumulation_steps=6"),
        (7, 1, False, "1/7 take less: training.batch_size=1 training.gradient_accumulation_steps=7"),
        (2, 1, False, "1/2 take less: training.batch_size=1 training.gradient_accumulation_steps=2"),
        (64, 8, True, "1/2 take less: training.batch_size=32"),
    ],
)
def test_the_settings_that_take_less_keep_the_effective_batch(batch, passes, derived, said):
    assert smaller_batch_overrides(batch, passes, derived).endswith(said)


def test_a_batch_of_one_cannot_be_halved():
    assert "smaller backbone" in smaller_batch_overrides(1, 8, False)


def on_one_of_two():
    try:
        with oom_advice_on_all_ranks("in k-NN."):
            if place().rank:
                torch.empty(10**15)
    except OutOfMemory as error:
        return str(error)


@pytest.mark.slow
def test_what_is_too_much_for_one_process_is_not_waited_for_by_the_others():
    first, second = run_in_ranks(2, on_one_of_two)
    assert first == "another process is out of memory in k-NN."
    assert "you tried to allocate" in second
