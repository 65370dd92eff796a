"""Large blocks of memory that malloc keeps."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

# Pages that are touched for the first time by a block of 64 MiB, when many were allocated and freed before it.
FAULTS = """
import resource
import torch
{prepare}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.set_num_threads(1)
counts = []
for _ in range(20):
    before = faults()
    torch.ones(2**24)
    counts.append(faults() - before)
print(sum(counts[10:]) / 10)
"""

KEEP = "from sae_granary.common.heap import keep_freed_memory; assert keep_freed_memory()"
HARVEST = """
from pathlib import Path
from sae_granary.harvest.config import HarvestConfig, TextConfig
from sae_granary.models.config import ModelConfig, WhereConfig
from sae_granary.harvest.run import harvest_activations
harvest_activations(HarvestConfig(ModelConfig("demo", device="cpu"), WhereConfig(layers=(0,)), TextConfig("demo"),
                      max_tokens=500, out=Path({out!r})), quiet=True)
"""


def page_faults(prepare: str) -> float:
    code = FAULTS.format(prepare=prepare)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
@pytest.mark.parametrize("prepare", [KEEP, HARVEST], ids=["asked", "by a harvest on a CPU"])
def test_a_freed_block_is_used_again_without_touching_new_pages(prepare: str, tmp_path: Path) -> None:
    kept = page_faults(prepare.format(out=str(tmp_path / "cache")))
    given_back = page_faults("")
    assert kept * 10 < given_back
