"""The bytes of a step that two gloo ranks really send, beside those that benchmarks/rank_traffic.py computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.rank_traffic import step_traffic

ROOT = Path(__file__).parent.parent
SIZE = {"d_in": 16, "d_sae": 8192, "k": 4, "batch_size": 64}
# In a network of their own: what its loopback has sent is what the ranks have sent.
COUNT = """
ip link set lo up
for steps in 4 24; do
    for rank in 0 1; do
        RANK=$rank LOCAL_RANK=$rank {python} -m sae_granary.train run {flags} --steps $steps --name r$steps >&2 &
    done
    wait -n && wait -n || exit 1
    sed -n 's/^ *lo: *\\([0-9]*\\).*/\\1/p' /proc/net/dev
done
"""


@pytest.mark.slow
def test_two_ranks_send_what_is_computed(make_cache, tmp_path: Path) -> None:
    if os.geteuid() or subprocess.run(["unshare", "-n", "true"], check=False, capture_output=True).returncode:
        pytest.skip("needs root: it counts bytes in a network namespace of its own")
    flags = f"--cache {make_cache()} --type topk --k {SIZE['k']} --d-sae {SIZE['d_sae']} -b {SIZE['batch_size']} -q "
    flags += f"--device cpu --runs-dir {tmp_path} --eval-rows 64 --dead-after-tokens 1000000 --save-every 0"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    env |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "lo"}
    script = COUNT.format(python=sys.executable, flags=flags)
    done = subprocess.run(["unshare", "-n", "bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    few, both = map(int, done.stdout.split())
    measured = ((both - few) - few) / 20  # of a step, by both ranks
    computed = 2 * step_traffic(**SIZE, n=2).sent
    assert computed <= measured < 1.1 * computed
