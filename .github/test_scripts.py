"""Tests of the scripts in this folder; `python -m pytest -q` runs them with all others."""

import csv
import json
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_map

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
import from_authors

import trqam


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def script(name, *args, code=0):
    """What a script prints."""
    argv = [sys.executable, FOLDER / f"{name}.py", *args]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# ================================================================================== the authors'
class Evil:
    """Pickled, it would make a file."""

    def __reduce__(self):
        return open, ("owned", "w")


class EvilType:
    """A dtype of objects that says it has none: NumPy would take bytes of the file for pointers."""

    def __reduce__(self):
        make, arguments, state = np.dtype([("agent", "O")]).__reduce__()
        return make, arguments, (*state[:-1], 16)


class EvilScalar:
    def __reduce__(self):
        make, _ = np.float32(1).__reduce__()
        return make, (EvilType(), b"pointers")


EVIL = [Evil(), {"agent": Evil()}, EvilScalar(), {"agent": {}}, np.load, []]


@pytest.mark.parametrize("content", EVIL)
def test_pickles_that_are_no_flow_are_refused(content):
    """They run nothing."""
    Path("flow.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(OSError, match=r"expected a flow of TRQAM's authors, got flow\.pkl"):
        from_authors.read("flow.pkl")
    assert not Path("owned").exists()


def authors_flow(norm):
    """Layers of a flow as the authors' pretraining writes them, two hidden ones of 8."""
    rng = np.random.default_rng(0)
    layers = {}
    for i, (n_in, n_out) in enumerate([(54, 8), (8, 8), (8, 25)]):
        kernel = 0.3 * rng.normal(size=(n_out, n_in)).T.astype(np.float32)  # in Fortran's order
        layers[f"Dense_{i}"] = {"kernel": kernel, "bias": kernel[0]}
        if norm and i < 2:
            layers[f"LayerNorm_{i}"] = {"scale": 1 + kernel[1], "bias": kernel[2]}
    return layers


@pytest.mark.parametrize("norm, protocol", [(False, 5), (True, 4)])
@pytest.mark.parametrize("nested", [False, True])
def test_flow_of_the_authors_acts_as_by_hand(norm, protocol, nested, capsys):
    """Its pickle gives a checkpoint with its sizes and, without jax, the velocity."""
    layers = authors_flow(norm)
    params = {"modules_actor_slow": {"mlp": layers} if nested else layers}
    tree = {"agent": {"network": {"params": params}}}
    Path("params.pkl").write_bytes(pickle.dumps(tree, protocol))
    from_authors.main("params.pkl", "flow.pt")
    sizes = {"width": 8, "layers": 2, "flow_layer_norm": norm}
    assert capsys.readouterr().out == f"flow.pt: {sizes}\n"
    cfg = trqam.parse(["--scale=laptop", "--device=cpu", "--pretrained=flow.pt"])
    assert vars(cfg).items() >= (sizes | {"pretrain_steps": 0}).items()
    agent = trqam.Agent(cfg, 28, 5)
    trqam.start_from(agent, "flow.pt")
    inputs = torch.linspace(-2, 2, 6 * 54).view(6, 54).split((28, 25, 1), -1)
    x = torch.cat(inputs, -1)
    arrays = tree_map(torch.from_numpy, layers)
    for i in range(3):
        x = x @ arrays[f"Dense_{i}"]["kernel"] + arrays[f"Dense_{i}"]["bias"]
        if i < 2:
            x = F.gelu(x, approximate="tanh")
        if norm and i < 2:
            x = F.layer_norm(x, (8,), eps=1e-6)
            x = x * arrays[f"LayerNorm_{i}"]["scale"] + arrays[f"LayerNorm_{i}"]["bias"]
    assert_close(agent.base(*inputs), x)
    wider = trqam.Agent(replace(cfg, width=9), 28, 5)
    with pytest.raises(ValueError, match=r"(?s)run's sizes in flow.pt.*\[54, 8\].*\[54, 9\]"):
        trqam.start_from(wider, "flow.pt")
    assert torch.equal(trqam.load_agent("flow.pt").policy(*inputs), agent.base(*inputs))


@pytest.fixture
def from_authors_ends(monkeypatch):
    """How the script ends; in this process, which has imported what it needs."""

    def ends(*args):
        monkeypatch.setattr(signal, "signal", MagicMock())
        monkeypatch.setattr(sys, "argv", ["from_authors.py", *args])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(FOLDER / "from_authors.py"), run_name="__main__")
        return end.value.code

    return ends


def test_flow_of_the_authors_is_fine_tuned(from_authors_ends, capsys):
    """By one command, whose flags are those of trqam.py."""
    params = {"modules_actor_slow": authors_flow(False)}
    Path("params.pkl").write_bytes(pickle.dumps({"agent": {"network": {"params": params}}}))
    sizes = {"observations": 28, "actions": 5, "qpos": 21, "qvel": 20}
    arrays = {name: np.zeros((1001, n), np.float32) for name, n in sizes.items()}
    for name in ("cube-single-play-v0", "cube-single-play-v0-val"):
        np.savez(name, **arrays, terminals=np.arange(1001) == 1000)
    flags = "--env cube-single --scale laptop --device cpu --dataset-dir . --offline-steps 2"
    flags += " --no-compile --critics 2 --eval-episodes 1 --final-episodes 1 --run-dir run"
    assert from_authors_ends("params.pkl", "flow.pt", *flags.split()) == 0
    assert re.search(r"(?m)^offline +2/2 ", capsys.readouterr().out)
    base = trqam.load_agent("flow.pt").base
    before, after = (x.parameters() for x in (base, trqam.load_agent("run/checkpoint.pt").base))
    distance = max((x - y).abs().max() for x, y in zip(before, after, strict=True))
    assert 0 < distance < 0.01


def test_missing_pickle_is_told(from_authors_ends):
    assert "No such file" in from_authors_ends("none.pkl", "flow.pt")


# ======================================================================================== report
def pretend(folder, env, seed, success, **changes):
    """The files of a run, 50 episodes after four updates at KL 0.1, 0.2, 0.3 and 0.4."""
    config = {"env": f"{env}-v0", "seed": seed, "fixed_lambda": None, "kl_budget": 0.5}
    config |= {"pretrain_steps": 2, "offline_steps": 4, "online_steps": 0, "frozen_base": False}
    Path(folder).mkdir(parents=True)
    Path(folder, "config.json").write_text(json.dumps(config | changes))
    ends = [(2, 0.1, 1), (4, 0.3, 0), (6, success, 1)]
    rows = [{"step": n, "final": end, "success": p, "episodes": 50} for n, p, end in ends]
    trqam.write_csv(Path(folder, "eval.csv"), rows)
    rows = [
        {"step": 1, "path_kl": None},
        *({"step": n, "path_kl": n / 10 - 0.2} for n in (3, 4, 5, 6)),
    ]
    trqam.write_csv(Path(folder, "train.csv"), rows)


report = partial(script, "report")
REPORT = """
domain               TRQAM     (paper)  QAM         (paper)  TRQAM ε=2
scene                75 ± ?    79 ± 1   0 [0, 7]    64 ± 4   –
puzzle-3x3           90 ± 14   100 ± 0  –           15 ± 3   20 [11, 33]
mean of the paper's  82 (2 of 10)  90  0 (1 of 10)  64       20 (1 of 10)
scene TRQAM          1  0  10  50 [37, 63]  50   0.350 of 0.5
puzzle-3x3 TRQAM     4  all  10  90 ± 14    100  0.350 of 0.5
cut: not counted, damaged: ValueError('a row is cut')
half: not counted, unfinished: evaluated at step 6 of 7
scene/0/again: not counted, another scene/0/1
scene/0/2: its KL is left out, train.csv is damaged: FileNotFoundError
scene TRQAM: task 2 of seed 1 missing
scene QAM: seed 1, task 2 missing
puzzle-3x3 QAM: no finished run
puzzle-3x3 TRQAM ε=2: seed 1 missing
no finished run of the paper's antmaze-large,
"""


def test_report_of_a_folder_with_holes():
    """The paper's table by the last evaluations, Wilson's intervals, and all that is missing."""
    for task, seed, success in ((1, 0, 0.5), (1, 1, 0.7), (2, 0, 0.9)):
        pretend(f"scene/{seed}/{task}", f"scene-play-singletask-task{task}", seed, success)
    Path("scene/0/2/train.csv").unlink()
    shutil.copytree("scene/0/1", "scene/0/again")
    pretend("qam", "scene-play-singletask-task1", 0, 0.0, fixed_lambda=1.0)
    for seed, success in ((0, 1.0), (1, 0.8)):
        pretend(f"puzzle{seed}", "puzzle-3x3-play-singletask", seed, success)
    pretend("loose", "puzzle-3x3-play-singletask", 0, 0.2, kl_budget=2.0)
    pretend("half", "puzzle-3x3-play-singletask", 2, 0.2, offline_steps=5)
    pretend("cut", "puzzle-3x3-play-singletask", 3, 0.2)
    os.truncate("cut/eval.csv", 60)
    lines = re.sub(" +", " ", report(".", "--tasks", "--csv", "all.csv")).splitlines()
    for line in re.sub(" +", " ", REPORT).strip().splitlines():
        assert any(x.startswith(line) for x in lines), line
    rows = list(csv.DictReader(Path("all.csv").read_text().splitlines()))
    assert Counter(row["level"] for row in rows) == {"domain": 4, "task": 5, "run": 7}
    assert (rows[0]["success"], rows[0]["missing"]) == ("75.0", "task 2 of seed 1")


def test_report_of_nothing():
    assert "expected finished runs in ., got none" in report(".", code=1)
    assert "expected a folder, got nowhere" in report("nowhere", code=2)


# ======================================================================================== video
def test_video_is_of_the_first_final_episodes(monkeypatch):
    """Of both flows at once, a picture of every second step and of the last."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    video = pytest.importorskip("video")
    played = []

    def play(agent, env, stream, i):
        fine_tuned = agent.policy.biases[-1][0].item()
        played.append((i, fine_tuned, stream))
        yield from range(4 if fine_tuned else 7)

    agent = trqam.Agent(trqam.Config(width=8, device="cpu"), 28, 5)
    agent.policy.biases[-1].data.fill_(1)
    env = MagicMock()
    env.render.side_effect = lambda: np.full((240, 240, 3), 9 * env.render.call_count, np.uint8)
    monkeypatch.setattr(trqam, "load_agent", lambda path: agent)
    monkeypatch.setattr(trqam, "make_env", lambda *_, **__: env)
    monkeypatch.setattr(trqam, "play", play)
    video.main(".", 2)
    assert played == [(i, flow, trqam.FINAL) for i in range(2) for flow in (0, 1)]
    assert env.render.call_count == 2 * (4 + 1 + 2 + 1)
    with video.Image.open("video.gif") as gif:
        assert gif.n_frames == 2 * 5
    assert Path("video.gif").stat().st_size <= video.LIMIT
