"""`generate --ray` on a cluster of two machines that are processes here, one of which dies in the middle."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="a cluster needs the 'ray' extra")

# In a process of its own: Ray keeps threads and settings of the whole interpreter.
SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
from click.testing import CliRunner
from piflow_edge.cli import main
from ray.cluster_utils import Cluster

folder = Path(sys.argv[1])
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
node = cluster.add_node(num_cpus=1)
killed = []

def find_workers():
    # Actors that run `ShardWorker`, by what Ray calls their processes.
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                title = (entry / "cmdline").read_bytes().decode(errors="replace")
                if "ShardWorker" in title and title.startswith("ray::") and is_ours(entry):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found

def is_ours(entry):
    return f"PIFLOW_TEST_TOKEN={os.environ['PIFLOW_TEST_TOKEN']}".encode() in (entry / "environ").read_bytes()

def kill_one():
    while not killed:
        workers = find_workers() if list(folder.glob("*.tar")) else []
        if len(workers) == 2:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(len(list(folder.glob("*.tar"))))
        time.sleep(0.02)

threading.Thread(target=kill_one, daemon=True).start()
asked = ["generate", "digits", "--labels", "all", "--count", "600", "--shard-size", "50", "--out", str(folder)]
done = CliRunner().invoke(main, [*asked, "--ray", cluster.address, "--engine", "ort-cpu", "--threads", "1", "--json"])
cluster.shutdown()
print(json.dumps({"code": done.exit_code, "killed_at": killed, "output": done.output, "error": repr(done.exception)}))
"""


def test_a_killed_worker_loses_nothing_and_makes_nothing_twice(tmp_path):
    folder = tmp_path / "images"
    settings = os.environ | {"PIFLOW_TEST_TOKEN": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, env=settings, timeout=600
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["code"] == 0, answer
    assert answer["killed_at"] and 0 < answer["killed_at"][0] < 120, answer  # in the middle of 120 shards
    alone = tmp_path / "alone"
    asked = ["digits", "--labels", "all", "--count", "600", "--shard-size", "50", "--out", str(alone)]
    subprocess.run(
        [sys.executable, "-m", "piflow_edge.cli", "generate", *asked, "--threads", "1"], check=True
    )
    files, expected = ({path.name: path.read_bytes() for path in each.iterdir()} for each in (folder, alone))
    assert files == expected
