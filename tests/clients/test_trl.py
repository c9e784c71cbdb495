"""TRL trains with the server as its sampler."""

import os
import re
import subprocess
import sys
from pathlib import Path

CLIENT = "trl"
_SCRIPT = Path(__file__).parents[2] / "examples" / "trl_grpo.py"
_LEAST_GAIN = 0.08  # of a reward between 0 and 1; runs gain about 0.2


def test_grpo(url: str, tmp_path: Path) -> None:
    """`GRPOTrainer(rollout_func=…)`: weights pushed in before each step, and the reward rises"""
    command = [sys.executable, str(_SCRIPT), "--base", os.environ["LORAPLEX_CLIENTS_BASE"]]
    environment = {**os.environ, "LORAPLEX_URL": url}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rewards = re.search(r"first three steps (\S+), of the last three (\S+)", done.stdout)
    assert rewards is not None, done.stdout
    first, last = map(float, rewards.groups())
    assert last > first + _LEAST_GAIN
    assert re.search(r"policy has revision 9$", done.stdout.rstrip())  # ten steps, nine pushes
