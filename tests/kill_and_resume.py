# SPDX-License-Identifier: MIT
"""A run that is killed again and again: `python tests/kill_and_resume.py FOLDER KILLS SEED`.

Each life is a process of its own that resumes from the folder and is killed without warning
(SIGKILL) at a random moment of its first seven steps, in a step, in a save or between. The last
one runs to the end. On stdout: for each life the newest state's and the log's last step, before it
and after.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

from dsv2_ref.config import TINY
from dsv2_ref.model import DeepSeekV2
from dsv2_ref.training.pretrain import Trainer, tqdm, train
from dsv2_ref.training.recipe import Recipe
from dsv2_ref.training.run_folder import RunFolder

SAVE_EVERY = 3
CONFIG = TINY.with_(vocab=61, d=24, n_layers=2, dense_width=40, n_routed=8, expert_width=12,
                    n_h=2, d_h=6, d_r=4, d_v=6, d_c=10, d_cq=14)


def live(folder: Path, steps: int) -> list[dict]:
    """One life: from the newest state, if there is one, to the end."""
    torch.manual_seed(0)
    tokens = (np.cumsum(np.random.default_rng(0).integers(1, 4, 3000)) % 61).astype(np.uint16)
    recipe = Recipe(steps=steps, batch=2, sequence=17, precision="fp32")
    trainer = Trainer(DeepSeekV2(CONFIG), recipe, tokens)
    run = RunFolder(folder)
    if run.states:
        trainer.restore(*run.newest(lambda told: os.write(2, f"{told}\n".encode())))
    return train(trainer, folder, SAVE_EVERY, progress=False)


def last_steps(folder: Path) -> dict[str, int]:
    states = sorted(folder.glob("state-*"), reverse=True)
    saved = int(states[0].stem.split("-")[1]) if states else 0
    log = folder / "log.jsonl"
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    whole = [line for line in lines if line.endswith("}")]
    return {"saved": saved, "logged": json.loads(whole[-1])["step"] if whole else 0}


def main(folder: Path, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    # a lock between processes, tqdm's own, would die locked in a forked process that is killed
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    steps, draw = 7 * kills + 12, random.Random(seed)
    folder.mkdir()
    live(folder / "first", 3)                            # what is slow the first time
    began = time.perf_counter()
    live(folder / "usual", 12)
    usual = (time.perf_counter() - began) / 12           # seconds a step, saving included
    lives = []
    while len(lives) < kills:
        before = last_steps(folder / "run")
        child = os.fork()
        if child == 0:
            live(folder / "run", steps)
            os._exit(0)
        goal = before["saved"] + draw.randrange(7)
        while draw.random() > 0.02 and last_steps(folder / "run")["logged"] < goal:
            time.sleep(usual / 20)
        time.sleep(draw.random() * usual)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        after = last_steps(folder / "run")
        lives.append({"before": before, "after": after, "killed": os.WIFSIGNALED(status)})
    live(folder / "run", steps)
    print(json.dumps({"steps": steps, "lives": lives}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
