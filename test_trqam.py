"""Tests of trqam.py as a program: golden numbers, data, networks, runs, resume, errors, README.

The theory is in test_theory.py. Nothing here touches the network. `pytest -q test_trqam.py`
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import imageio
import numpy as np
import ogbench
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trqam

TRQAM = [sys.executable, os.path.abspath(trqam.__file__)]
torch.set_num_threads(1)
settings.register_profile("trqam", derandomize=True, deadline=None, database=None)
settings.load_profile("trqam")


def flags(**fields) -> list[str]:
    """Settings as command-line flags."""
    switch = {k: v for k, v in fields.items() if isinstance(v, bool)}
    names = {k: "--" + "no-" * (switch.get(k) is False) + k.replace("_", "-") for k in fields}
    return [
        x for k, v in fields.items() for x in ((names[k],) if k in switch else (names[k], str(v)))
    ]


def configure(**fields) -> trqam.Config:
    return trqam.parse(flags(**fields))


# ================================================================================ golden numbers
# Three consecutive updates of a tiny agent in float64, computed with the authors' published code
# (commit 02599ce). Every input comes from one formula, `wave`; nothing else is random.

GOLDEN = """
matching_loss     54.91136944433246    52.65884647741666    52.024172553231416
adj_max           2.361424466048883    11.99335707145111    5.365373287769574
adj_mean          0.3202880686404252   0.8012770869844084   0.3453505287139127
flow_loss         2.0151501966286243   2.584983009941795    0.4783592190717729
path_kl           1.2288984360733517   0.894984937933437    0.9179972797140844
critic_loss       7.013804645283311    17.462941889069572   4.306948289991458
q_mean            0.2767926792528065   0.7216761855600567   0.11318928000405266
lam               2.988                2.9783849548138      2.970985405985363
kl_ema            0.1                  0.1794984937933437   0.2533483723854178
dual              0.996                0.9927949849379334   0.9903284686617876
flow/l2           5.47823025590607     5.47761484219633     5.477124139038693
flow/sum          0.8349919415868304   0.8321878628346149   0.8302588672801898
base/l2           5.4656073316688625   5.455664701239775    5.445852235011833
base/sum          -0.4549278721776865  -0.4484782731088635  -0.4420749424291461
policy/l2         5.497291129198578    5.49671116743414     5.496125985361547
policy/sum        -1.424231220982803   -1.4293574559955449  -1.4342896460571666
critic/l2         11.180824513466126   11.180384643001785   11.180009184958275
critic/sum        47.041748335846286   47.03903771648772    47.035102110825235
target_critic/l2  11.184600600665863   11.172138520300592   11.159846996114384
target_critic/sum 46.7589403708127     46.76035441063788    46.76174782716713
"""


def wave(shape: tuple[int, ...], tag: int, scale: float = 1.0) -> torch.Tensor:
    """scale · sin(1.3 n + 0.7 tag + 0.2 √n) for n = 0, 1, … in row-major order."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(1.3 * n + 0.7 * tag + 0.2 * n.sqrt())).reshape(shape)


def golden_agent(**changes) -> trqam.Agent:
    sizes = dict(width=8, layers=2, critics=3, flow_steps=4, chunk=2, batch=6)
    settings = dict(gamma=0.9, rho=0.5, kl_budget=0.5, scale="paper", device="cpu")
    agent = trqam.Agent(configure(**sizes | settings | changes), 3, 2).double()
    agent.start_from_flow()
    with torch.no_grad():
        nets = (agent.flow, agent.base, agent.policy, agent.critic, agent.target_critic)
        for T, net in enumerate(nets, start=1):
            for i, (weight, bias) in enumerate(zip(net.weights, net.biases, strict=True)):
                weight.copy_(wave(weight.shape, 100 * T + 10 * i, math.sqrt(3 / weight.shape[-2])))
                bias.copy_(wave(bias.shape, 100 * T + 10 * i + 1, 0.1))
            for i, (scale, offset) in enumerate(zip(net.scales, net.offsets, strict=True)):
                scale.copy_(1 + wave(scale.shape, 100 * T + 10 * i + 2, 0.1))
                offset.copy_(wave(offset.shape, 100 * T + 10 * i + 3, 0.1))
    return agent


def golden_inputs(s: int) -> tuple[dict, dict]:
    """Batch and random numbers of update s = 1, 2, 3."""
    B, S, H, A, K = 6, 3, 2, 2, 4
    D = H * A
    batch = dict(obs=wave((B, S), 2000 + s), actions=wave((B, H, A), 3000 + s, 0.9).flatten(1))
    batch |= dict(next_obs=wave((B, S), 4000 + s), rewards=wave((B,), 5000 + s) - 1)
    batch["masks"] = torch.tensor([0.0, 1, 1, 0, 1, 1], dtype=torch.float64)
    normal = [wave((B, D), 1000 * s + i, 1.4) for i in range(1, 5 + K)]
    noise = dict(x_next=normal[0], x_flow=normal[1], x_sde=normal[3], sde=torch.stack(normal[4:]))
    noise["t_flow"] = 0.5 + 0.5 * wave((B, 1), 1000 * s + 3, 0.9)
    return batch, noise


def test_golden_numbers():
    """Three updates reproduce the published implementation to 1e-8, every number of them."""
    agent = golden_agent()
    expected = {k: map(float, v) for k, *v in map(str.split, GOLDEN.strip().splitlines())}
    expected = {k: list(v) for k, v in expected.items()}
    assert len(expected) == 20
    for s in (1, 2, 3):
        got = {k: float(v) for k, v in agent.update(*golden_inputs(s)).items()}
        got["dual"] = float(agent.dual)
        for name in ("flow", "base", "policy", "critic", "target_critic"):
            flat = torch.cat([p.detach().flatten() for p in getattr(agent, name).parameters()])
            got |= {f"{name}/l2": float(flat.norm()), f"{name}/sum": float(flat.sum())}
        for k, values in expected.items():
            assert got[k] == pytest.approx(values[s - 1], rel=1e-8, abs=0), (s, k)


# ===================================================================================== settings


def test_settings_come_from_domain_and_scale():
    """Explicit flag > laptop scale > domain > paper; SPEC of the paper's table per domain."""
    paper = configure(env="cube-triple", scale="paper", device="cpu")
    assert (paper.width, paper.flow_layer_norm, paper.chunk, paper.kl_budget) == (
        1024,
        True,
        5,
        0.5,
    )
    assert (paper.critics, paper.flow_steps, paper.batch, paper.lr, paper.tau) == (
        10, 10, 256, 3e-4, 0.005)  # fmt: skip
    assert (paper.pretrain_steps, paper.offline_steps) == (300_000, 1_000_000)
    assert (paper.gamma, paper.rho) == (0.995, 0.5)
    maze = configure(env="humanoidmaze-medium", scale="paper", device="cpu")
    assert (maze.chunk, maze.gamma, maze.rho, maze.kl_budget, maze.width) == (1, 0.999, 0, 0.5, 512)
    giant = configure(env="antmaze-giant", scale="paper", device="cpu")
    assert (giant.width, giant.flow_layer_norm, giant.kl_budget) == (1024, True, 1.0)
    laptop = configure(env="cube-triple", scale="laptop", width=64, device="cpu")
    assert (laptop.width, laptop.critics) == (64, 10)
    got = (laptop.flow_steps, laptop.batch, laptop.lr, laptop.pretrain_lr, laptop.tau)
    assert got == (5, 128, 6e-4, 1e-3, 0.01) and laptop.kl_budget == 0.5
    assert (laptop.pretrain_steps, laptop.offline_steps) == (30_000, 8_000)
    assert laptop.run_dir == "runs/cube-triple-task2/seed0"


def test_all_domains_of_the_paper_are_known():
    assert len(trqam.DOMAINS) == len(set(trqam.DOMAINS)) >= 24
    paper = {"antmaze-large", "antmaze-giant", "humanoidmaze-medium", "humanoidmaze-large", "scene"}
    paper |= {"puzzle-3x3", "puzzle-4x4", "cube-double", "cube-triple", "cube-quadruple"}
    assert paper | {"cube-single"} <= set(trqam.DOMAINS)
    assert {d for d in trqam.DOMAINS if "maze" in d or "soccer" in d} == set(trqam.MAZES)


@pytest.mark.parametrize("domain", trqam.DOMAINS)
def test_every_domain_names_an_environment_of_ogbench(domain):
    """The short names, and the default tasks, are OGBench's."""
    for task in range(1, 6):
        cfg = configure(env=domain, task=task, device="cpu")
        assert cfg.env.endswith(f"-singletask-task{task}-v0")
        gym_id = re.sub(rf"-({trqam.KINDS})-singletask", "-singletask", cfg.env)
        assert gym_id in gymnasium.registry
    full = configure(env=cfg.env, device="cpu")
    assert (full.env, full.task) == (cfg.env, 5)


def test_default_tasks_are_those_of_ogbench():
    for domain in ("cube-single", "scene", "puzzle-4x4", "puzzle-4x5", "antsoccer-arena"):
        cfg = configure(env=domain, device="cpu")
        env = gymnasium.make(re.sub(rf"-({trqam.KINDS})-singletask.*", "-singletask-v0", cfg.env))
        env.reset()
        assert env.unwrapped._reward_task_id == cfg.task, domain


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(env="cube-singel"), "one of .*cube-single, cube-double"),
        (dict(env="visual-cube-single-play-singletask-v0"), "one of"),
        (dict(task=6), r"--task in \[0, 5\], got 6"),
        (dict(env="cube-single-play-singletask-task2-v0", task=3), "as in --env, got 3"),
        (dict(gamma=1.5), r"--gamma in \[0, 1\], got 1.5"),
        (dict(kl_budget=0.0), "--kl-budget"),
        (dict(kl_budget=math.nan), "--kl-budget"),
        (dict(batch=0), "--batch"),
        (dict(flow_steps=1), "--flow-steps"),
        (dict(device="mps"), "a mps device, got none"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(trqam.Failure, match=message) as error:
        configure(**wrong)
    assert error.value.args[1] == 2


def test_help_documents_every_flag():
    """--help gives every flag a text before its default."""
    text = subprocess.run([*TRQAM, "--help"], capture_output=True, text=True, check=True).stdout
    text = re.sub(r"[│╭╮╰╯─]", " ", text)
    entries = dict(re.findall(r"^ *--([a-z-]+)(.*?)(?=^ *--|\Z)", text, re.M | re.S))
    for field in dataclasses.fields(trqam.Config):
        entry = entries[field.name.replace("_", "-")].split("(default")[0]
        assert re.search(r"[a-z]+ .*[a-z]+", entry.split("}")[-1]), (field.name, entry)


# =================================================================================== networks, data


def test_ensemble_is_its_members():
    """The batched ensemble computes what E separate MLPs compute."""
    generator = torch.Generator().manual_seed(0)
    many = trqam.MLP([5, 7, 7, 2], True, generator, 3)
    x = torch.randn(4, 5, generator=generator)
    out = many(x)
    assert out.shape == (3, 4, 2)
    for e in range(3):
        one = trqam.MLP([5, 7, 7, 2], True, generator)
        for name in ("weights", "biases", "scales", "offsets"):
            for a, b in zip(getattr(one, name), getattr(many, name), strict=True):
                a.data = b.data[e].reshape(a.shape)
        torch.testing.assert_close(one(x), out[e])
    assert not torch.allclose(out[0], out[1])


TOY = configure(device="cpu")


def toy_data(lengths, S=3, A=2, seed=0):
    rng = np.random.default_rng(seed)
    N = sum(lengths)
    data = dict(observations=rng.normal(size=(N, S)), next_observations=rng.normal(size=(N, S)))
    data |= dict(actions=rng.uniform(-1, 1, (N, A)), rewards=rng.normal(size=N))
    data |= dict(masks=(rng.random(N) > 0.2) * 1.0, terminals=np.zeros(N))
    data["terminals"][np.cumsum(lengths) - 1] = 1
    return {k: v.astype(np.float32) for k, v in data.items()}


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 5))
def test_chunks_never_cross_an_episode_end(lengths, H):
    """A buffer draws from every window of H steps inside an episode, and from no other."""
    ends, cfg = np.cumsum(lengths), dataclasses.replace(TOY, chunk=H)
    inside = zip(ends, lengths, strict=True)
    expected = [i for e, n in inside for i in range(e - n, e) if i + H <= e]
    if expected:
        assert trqam.ReplayBuffer(toy_data(lengths), cfg).starts.tolist() == expected
    else:
        with pytest.raises(trqam.Failure, match=f"a chunk of {H} actions"):
            trqam.ReplayBuffer(toy_data(lengths), cfg)


def test_replay_batches_are_chunks():
    """obs, D = H·A actions, Σ γ^i r_i, min of the masks, and the observation after the chunk."""
    lengths, H, gamma = [4, 7, 3], 3, 0.9
    data = toy_data(lengths)
    cfg = configure(chunk=H, gamma=gamma, device="cpu")
    buffer = trqam.ReplayBuffer(data, cfg)
    later = toy_data([5], seed=1)
    buffer.add(later)
    data = {k: np.concatenate([data[k], later[k]]) for k in data}
    batch = buffer.sample(500, torch.Generator().manual_seed(0))
    seen = set()
    for b in range(500):
        i = int(np.flatnonzero((data["observations"] == batch["obs"][b].numpy()).all(1))[0])
        seen.add(i)
        window = slice(i, i + H)
        assert data["terminals"][i : i + H - 1].sum() == 0
        np.testing.assert_allclose(batch["actions"][b], data["actions"][window].ravel(), atol=2e-5)
        reward = sum(gamma**j * r for j, r in enumerate(data["rewards"][window]))
        np.testing.assert_allclose(batch["rewards"][b], reward, rtol=1e-5)
        assert batch["masks"][b] == data["masks"][window].min()
        np.testing.assert_array_equal(batch["next_obs"][b], data["next_observations"][i + H - 1])
    ones = trqam.ReplayBuffer(data | dict(actions=np.ones((19, 2), np.float32)), cfg)
    batch = ones.sample(9, torch.Generator().manual_seed(0))
    assert batch["actions"].max() == np.float32(1 - 1e-5)
    assert seen == {0, 1, *range(4, 9), 11, *range(14, 17)}


# ======================================================================= runs, on a toy dataset

TINY = dict(width=16, layers=2, critics=2, flow_steps=3, batch=8, pretrain_steps=20)
TINY |= dict(offline_steps=20, log_interval=5, save_interval=7, eval_interval=300)
TINY |= dict(eval_episodes=1, final_episodes=1, scale="laptop", device="cpu", data="ogbench")
ONLINE = dict(online_steps=420, online_start=210)


@pytest.fixture(scope="session")
def dataset_dir(tmp_path_factory):
    """A folder with a small random dataset in OGBench's layout for cube-single."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder)
    return folder


def write_dataset(folder, episodes=3, length=51, **changes):
    N = episodes * length
    for seed, name in enumerate(("cube-single-play-v0.npz", "cube-single-play-v0-val.npz")):
        arrays = random_arrays(np.random.default_rng(seed), N)
        arrays["terminals"] = np.arange(N) % length == length - 1
        arrays |= changes
        np.savez(folder / name, **{k: v for k, v in arrays.items() if v is not None})


def random_arrays(rng, N):
    arrays = dict(observations=rng.normal(size=(N, 28)), actions=rng.uniform(-1, 1, (N, 5)))
    arrays |= dict(qpos=rng.normal(size=(N, 21)), qvel=rng.normal(size=(N, 20)))
    arrays["qpos"][10:14, 14:17] = (0.5, 0.0, 0.02)  # task 2 solved
    return {k: v.astype(np.float32) for k, v in arrays.items()}


def command(run_dir, dataset_dir, *switches, **changes):
    fields = TINY | dict(run_dir=run_dir, dataset_dir=dataset_dir) | changes
    return [*TRQAM, *flags(**fields), *switches]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def fork(argv, prepare=lambda: None, screen=os.devnull) -> int:
    """trqam.py in a forked process (no imports, so soon at work), its output in a file; the pid."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            with open(screen, "wb") as file:
                os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = argv[1:]
            prepare()
            code = trqam.main()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    return pid


def wait(pid) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def together(*jobs):
    """Advance generators by turns; each yields while it waits for a process of its own."""
    alive, deadline = list(jobs), time.monotonic() + 300
    while alive:
        assert time.monotonic() < deadline
        alive = [job for job in alive if next(job, "over") != "over"]
        time.sleep(0.002)


def ended(pid):
    """Wait for a process in `together`; its exit code."""
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        yield
    return os.waitstatus_to_exitcode(done[1])


def logged(run_dir, rows):
    """Wait in `together` until train.csv has more than so many rows."""
    log = run_dir / "train.csv"
    while not log.exists() or log.read_text().count("\n") <= rows:
        yield


def call(run_dir, dataset_dir, *switches, code=0, **changes):
    """A run, in a fork if there are such; returns its screen."""
    argv, screen = command(run_dir, dataset_dir, *switches, **changes), f"{run_dir}.screen"
    if hasattr(os, "fork"):
        got, text = wait(fork(argv, screen=screen)), Path(screen).read_text()
    else:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
        got, text = done.returncode, done.stdout + done.stderr
    assert got == code, text
    return text


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def contents(run_dir):
    """All of a run that must be the same to the bit: weights, optimiser, state, CSVs."""
    saved = trqam.load_checkpoint(run_dir / "checkpoint.pt")
    assert saved["state"].pop("seconds") > 0
    for row in saved["state"]["train"]:
        row.pop("seconds")
    csvs = [(run_dir / f"{name}.csv").read_text().splitlines() for name in ("train", "eval")]
    assert csvs[0][0].endswith(",seconds") or "seconds" in csvs[0][0].split(",")
    column = csvs[0][0].split(",").index("seconds")
    train = [",".join(x for i, x in enumerate(r.split(",")) if i != column) for r in csvs[0]]
    for k in ("run_dir", "resume"):
        saved["config"].pop(k)
    return saved, train, csvs[1]


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            assert_same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b or (a != a and b != b)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, dataset_dir):
    """An uninterrupted run with an online phase, and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, call(folder, dataset_dir, "--resume", **ONLINE)


def test_run_end_to_end(finished, dataset_dir):
    """All phases run, are evaluated and logged, and the summary is printed."""
    folder, screen = finished
    train = read_csv(folder / "train.csv")
    assert [int(r["step"]) for r in train] == list(range(5, 461, 5))
    assert {r["phase"] for r in train} == {"pretrain", "offline", "online"}
    row = train[7]  # the last offline one
    assert all(math.isfinite(float(row[k])) for k in row if k not in ("phase",))
    assert train[0]["lam"] == "" and float(row["lam"]) < 3
    evals = read_csv(folder / "eval.csv")
    assert [int(r["step"]) for r in evals if r["final"] == "1"] == [20, 40, 460]
    assert [int(r["step"]) for r in evals if r["final"] == "0"] == [320]
    config = json.loads((folder / "config.json").read_text())
    assert config["data_used"]["source"] == "ogbench" and config["data_used"]["transitions"] == 150
    assert config["data_used"]["solved"] == 4
    assert config["versions"]["torch"] == torch.__version__
    for text in ("pretrained policy", "TRQAM offline", "TRQAM online", " in all", "± "):
        assert text in screen
    assert not list(folder.glob("*.tmp"))
    saved = trqam.load_checkpoint(folder / "checkpoint.pt")
    assert saved["state"]["episodes"] == 2 and len(saved["online"]["rewards"]) == 400
    # no update between the steps 40 and 250; held-out loss on the held-out data
    assert [int(r["step"]) for r in train if not r["flow_loss"]] == list(range(45, 251, 5))
    agent = trqam.Agent.load(folder / "checkpoint.pt")
    held_out = trqam.load_data(configure(**TINY, dataset_dir=dataset_dir))[2]
    fixed = torch.Generator().manual_seed(0)
    batch = trqam.ReplayBuffer(held_out, agent.cfg).sample(8192, fixed)
    noise, v = agent.draw_noise(8192, fixed), functools.partial(agent.flow, batch["obs"])
    loss = trqam.flow_matching_loss(v, noise["x_flow"], batch["actions"], noise["t_flow"])
    assert float(train[-1]["held_out_loss"]) == pytest.approx(loss.item(), rel=1e-5)


@needs_fork
def test_same_seed_same_numbers(finished, dataset_dir, tmp_path):
    """Two runs agree to the bit; another seed does not."""

    def run(name, **changes):
        assert (yield from ended(fork(command(tmp_path / name, dataset_dir, **changes)))) == 0

    together(run("b", **ONLINE), run("c", seed=1))
    assert_same(contents(finished[0]), contents(tmp_path / "b"))
    assert (tmp_path / "c" / "train.csv").read_text().split("\n")[1] != (
        finished[0] / "train.csv").read_text().split("\n")[1]  # fmt: skip


def die_in_write(nth):
    """SIGKILL when half of the nth checkpoint is written."""
    count, save = iter(range(1, 10**6)), torch.save

    def half(content, file):
        if next(count) < nth:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


@needs_fork
def test_resume_is_exact_after_sigkill_in_every_phase(finished, dataset_dir, tmp_path):
    """Killed at 14 moments and resumed, a run ends, to the bit, as one never interrupted.

    Two runs side by side: 9 kills when so many rows are logged (1-4 pretraining, 5-8 offline),
    5 half-way in writing a checkpoint.
    """
    rng = np.random.default_rng(0)

    def run(folder, *points):
        argv = command(folder, dataset_dir, "--resume", **ONLINE)
        for point in points:
            if isinstance(point, str):
                pid = fork(argv, functools.partial(die_in_write, int(point[-1])))
            else:
                pid = fork(argv)
                yield from logged(folder, point)
                time.sleep(rng.uniform(0, 0.05))
                os.kill(pid, signal.SIGKILL)
            assert (yield from ended(pid)) == -signal.SIGKILL, point
        assert (yield from ended(fork(argv))) == 0
        assert_same(contents(finished[0]), contents(folder))
        steps = [int(row["step"]) for row in read_csv(folder / "train.csv")]
        assert steps == list(range(5, 461, 5))  # no row twice, none missing
        assert not list(folder.glob("*.tmp"))

    one = run(tmp_path / "one", 1, "write 1", 5, "write 3", 9, 50, "write 1")
    together(one, run(tmp_path / "two", 3, "write 2", 7, "write 2", 30, 70, 90))


@needs_fork
def test_interrupt_saves_and_resume_is_exact(finished, dataset_dir, tmp_path):
    """SIGTERM and Ctrl-C save, say how to go on, and exit with 143 and 130."""

    def run(number, code):
        folder, screen = tmp_path / str(code), tmp_path / f"{code}.screen"
        argv = command(folder, dataset_dir, "--resume", **ONLINE)
        for rows in (2, 6, 40):
            pid = fork(argv, screen=screen)
            yield from logged(folder, rows)
            os.kill(pid, number)
            assert (yield from ended(pid)) == code and "--resume" in screen.read_text()
            saved = trqam.load_checkpoint(folder / "checkpoint.pt")["state"]
            assert saved["step"] >= 5 * rows  # online: at the end of the episode
        assert (yield from ended(fork(argv))) == 0
        assert_same(contents(finished[0]), contents(folder))

    together(run(signal.SIGTERM, 143), run(signal.SIGINT, 130))


# ===================================================================================== the README

README = Path(trqam.__file__).with_name("README.md").read_text()


def snippet(marker):
    return next(s for s in re.findall(r"```python\n(.*?)```", README, re.S) if marker in s)


def test_readme_acts_with_a_trained_policy(finished):
    """The README's three lines load a checkpoint and act; the same seed, the same chunk."""
    code = snippet("Agent.load").replace("runs/cube-single-task2/seed0", str(finished[0]))
    names = dict(obs=np.zeros(28))
    exec(code, names)
    assert names["actions"].shape == (5, 5) and np.abs(names["actions"]).max() <= 1
    same = [names["agent"].act(np.zeros(28), torch.Generator().manual_seed(1)) for _ in range(2)]
    np.testing.assert_array_equal(*same)


def test_readme_lifts_the_mathematics():
    """The README's ten lines run with a foreign flow policy, and pull it towards higher Q."""
    torch.manual_seed(0)
    B, D, K, H = 64, 4, 5, 2
    net = torch.nn.Sequential(torch.nn.Linear(D + 1, 32), torch.nn.Tanh(), torch.nn.Linear(32, D))
    frozen = copy.deepcopy(net).requires_grad_(False)

    def velocity(module):
        return lambda x, t: module(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))

    names = dict(torch=torch, B=B, D=D, K=K, H=H, v_fine=velocity(net), v_base=velocity(frozen))
    names |= dict(
        dual=torch.ones(()), kl_ema=torch.zeros(()), q=lambda x: -(x - 0.5).square().sum(-1)[None]
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    x_0 = torch.randn(512, D)
    before = trqam.sample_flow(names["v_base"], x_0, K)
    for _ in range(150):
        optimizer.zero_grad()
        exec(snippet("simulate_sde"), names)
        optimizer.step()
    after = trqam.sample_flow(names["v_fine"], x_0, K)
    assert names["q"](after).mean() > names["q"](before).mean() + 0.1
    assert all(p.grad is None for p in frozen.parameters())
    assert names["dual"] < 1 and names["kl_ema"] > 0


def test_file_runs_alone(tmp_path, dataset_dir):
    """Copied alone into an empty folder, the file trains."""
    shutil.copy(trqam.__file__, tmp_path / "trqam.py")
    argv = [sys.executable, "trqam.py", *command(tmp_path / "run", dataset_dir)[2:]]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "TRQAM offline" in done.stdout, done.stderr


# ============================================================================ options of the agent


def test_fixed_lambda_turns_the_dual_descent_off():
    agent = golden_agent(fixed_lambda=0.7)
    for s in (1, 2, 3):
        metrics = agent.update(*golden_inputs(s))
    assert float(metrics["lam"]) == float(agent.lam) == pytest.approx(0.7)
    assert float(agent.dual) == 1 and float(agent.kl_ema) > 0  # D goes on as a measurement


def test_frozen_base_stays_and_the_rest_learns():
    """With --frozen-base neither the flow nor its copy moves; without it both do."""
    for frozen in (True, False):
        agent = golden_agent(frozen_base=frozen)
        before = copy.deepcopy(agent.state_dict())
        agent.update(*golden_inputs(1))
        moved = {k.split(".")[0] for k, v in agent.state_dict().items() if not v.equal(before[k])}
        expected = {"policy", "critic", "target_critic", "dual", "kl_ema"}
        assert moved == expected | (set() if frozen else {"flow", "base"})


def test_pretraining_trains_the_flow_alone_and_is_handed_over():
    agent = golden_agent()
    before = copy.deepcopy(agent.state_dict())
    agent.pretrain_update(*golden_inputs(1), lr=1e-3)
    moved = {k.split(".")[0] for k, v in agent.state_dict().items() if not v.equal(before[k])}
    assert moved == {"flow"} and agent.optimizer.state
    agent.start_from_flow()
    for net in (agent.base, agent.policy):
        assert_same(net.state_dict(), agent.flow.state_dict())
    assert not agent.optimizer.state and agent.optimizer.param_groups[0]["lr"] == agent.cfg.lr


def test_learning_rate_of_pretraining(dataset_dir, tmp_path, monkeypatch):
    """Cosine to 0 with --pretrain-decay, constant without; --offline-steps 0 only pretrains."""
    rates, update = [], trqam.Agent.pretrain_update

    def spy(agent, batch, noise, lr):
        rates.append(lr)
        return update(agent, batch, noise, lr)

    monkeypatch.setattr(trqam.Agent, "pretrain_update", spy)
    for decay in (True, False):
        fields = dict(pretrain_steps=4, offline_steps=0, pretrain_lr=0.5, pretrain_decay=decay)
        fields |= dict(run_dir=tmp_path / str(decay), dataset_dir=dataset_dir)
        trqam.train(configure(**TINY | fields))
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(cosine + [0.5] * 4)


def test_update_never_reads_the_device():
    """On the meta device there is nothing to read: .item() or a branch on a tensor would raise."""
    agent = golden_agent().float().to("meta")
    agent.start_from_flow()
    batch, noise = ({k: v.float().to("meta") for k, v in d.items()} for d in golden_inputs(1))
    agent.optimizer.step = lambda: None  # Adam keeps its step count on the CPU, by design
    metrics = agent.update(batch, noise)
    assert all(v.is_meta for v in metrics.values())


# ================================================================================= data, collected


def collect(folder, workers):
    cfg = configure(transitions=1000, workers=workers, cache_dir=folder, device="cpu")
    return trqam.collect(cfg, "cube-single"), cfg


def test_collected_data_do_not_depend_on_the_number_of_processes(tmp_path):
    """Same files for 1 and 2 processes; OGBench reads and relabels them; the second use reuses."""
    with ThreadPoolExecutor() as pool:
        job = pool.submit(collect, tmp_path / "two", 2)
        (one, cfg), (two, _) = collect(tmp_path / "one", 1), job.result()
    for name in (one.name, one.stem + "-val.npz"):
        a, b = np.load(one.with_name(name)), np.load(two.with_name(name))
        assert set(a) == {"observations", "actions", "terminals", "qpos", "qvel"}
        assert_same({k: torch.tensor(a[k]) for k in a}, {k: torch.tensor(b[k]) for k in b})
    assert a["terminals"].sum() == 1 and len(np.load(one)["terminals"]) == 1001
    assert not list(tmp_path.rglob("*.tmp"))
    stamp = one.stat().st_mtime_ns
    assert collect(tmp_path / "one", 1)[0].stat().st_mtime_ns == stamp
    scripted = dataclasses.replace(cfg, data="scripted", cache_dir=str(tmp_path / "one"))
    _, train, _, about = trqam.load_data(scripted)
    assert about["source"] == "scripted" and about["transitions"] == 1000
    assert train["rewards"].shape == (1000,) and set(np.unique(train["rewards"])) <= {-1.0, 0.0}
    # the stored state is the one before the step: replaying the actions reproduces it
    env = gymnasium.make("cube-single-v0", mode="data_collection", terminate_at_goal=False)
    env.reset(seed=trqam.seed_of(0, 0, 0, 0))
    data = np.load(one)
    for i in range(20):
        obs, *_, info = env.step(data["actions"][i])
        np.testing.assert_array_equal(info["prev_qpos"], data["qpos"][i])
        np.testing.assert_array_equal(np.float32(obs), data["observations"][i + 1])


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_killed_collection_leaves_nothing(tmp_path, dataset_dir):
    """SIGKILL to the parent, SIGTERM to all as a cluster sends it, also to a worker that is still
    starting: no file is taken for a dataset, and no process is left."""

    def run(number, code, send, seconds):
        folder, screen = tmp_path / f"{code}{seconds}", tmp_path / f"{code}{seconds}.screen"
        changes = dict(data="scripted", cache_dir=folder / "cache", transitions=3000, workers=1)
        pid = fork(command(folder / "run", dataset_dir, **changes), os.setsid, screen)
        while not screen.exists() or "collecting" not in screen.read_text():
            yield
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            yield
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert children
        send(pid, number)
        assert (yield from ended(pid)) == code
        while any(Path(f"/proc/{child}").exists() for child in children):
            yield
        assert not list(folder.rglob("*.npz"))

    terminated = [run(signal.SIGTERM, 143, os.killpg, seconds) for seconds in (1, 8)]
    together(run(signal.SIGKILL, -9, os.kill, 5), *terminated)


def test_unreachable_host_is_found_out_in_time(dataset_dir, tmp_path, monkeypatch, capsys):
    """A refused connection is told at once, a silent host in 10 s; then data are collected."""
    collected = dataset_dir / "cube-single-play-v0.npz"
    monkeypatch.setattr(trqam, "collect", lambda cfg, domain: collected)
    cfg = configure(dataset_dir=tmp_path, device="cpu")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hosts = (("127.0.0.1:9", 8, "refused"), (f"127.0.0.1:{silent.getsockname()[1]}", 20, ""))
        for host, seconds, reason in hosts:
            monkeypatch.setattr(ogbench.utils, "DATASET_URL", f"http://{host}")
            start = time.monotonic()
            assert trqam.load_data(cfg)[3]["source"] == "scripted"
            assert time.monotonic() - start < seconds
            screen = capsys.readouterr().out
            assert f"trying http://{host}/cube-single-play-v0.npz" in screen
            assert reason in screen and "going on with data of OGBench's scripted oracles" in screen


def test_no_data_to_be_had(tmp_path, monkeypatch):
    """Mazes can't be collected: the error names the files, the folder and the flag."""
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
    for env, data in (("antmaze-large", "auto"), ("cube-single", "ogbench")):
        cfg = configure(env=env, data=data, dataset_dir=tmp_path, device="cpu")
        with pytest.raises(trqam.Failure, match=rf"put {env}.*-val\.npz into .*--dataset-dir"):
            trqam.load_data(cfg)
    cfg = configure(env="antmaze-large", data="scripted", device="cpu")
    with pytest.raises(trqam.Failure, match="cube, scene or puzzle") as error:
        trqam.load_data(cfg)
    assert error.value.args[1] == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(observations=np.zeros((153, 27), np.float32)), r"observations of shape \(150, 28\)"),
        (dict(actions=np.full((153, 5), np.nan, np.float32)), "finite actions"),
        (dict(actions=np.full((153, 5), 1.5, np.float32)), r"actions in \[-1, 1\]"),
        (dict(qpos=None), "a damaged"),
        ("truncated", "a damaged"),
    ],
)
def test_damaged_datasets_are_refused(tmp_path, changes, message):
    write_dataset(tmp_path, **({} if changes == "truncated" else changes))
    if changes == "truncated":
        file = tmp_path / "cube-single-play-v0.npz"
        file.write_bytes(file.read_bytes()[:5000])
    cfg = configure(data="ogbench", dataset_dir=str(tmp_path), device="cpu")
    with pytest.raises(trqam.Failure, match=message):
        trqam.load_data(cfg)


# ============================================================================== runs, other flags


def test_wrong_calls_exit_with_2(finished, dataset_dir, tmp_path):
    """Unknown environment; a folder that holds a run; a resume with other settings."""
    assert "cube-double" in call(tmp_path, dataset_dir, code=2, env="cube-sinlge")
    assert "--resume" in call(finished[0], dataset_dir, code=2)
    screen = call(finished[0], dataset_dir, "--resume", code=2, batch=9, **ONLINE)
    assert "batch 8 -> 9" in screen


def test_eval_only_repeats_the_final_evaluation(finished, dataset_dir):
    screen = call(finished[0], dataset_dir, "--eval-only", final_episodes=2)
    assert re.search(r"success +0\.0%  ± 0\.0% standard error  \(2 episodes\)", screen)


def test_episodes_do_not_depend_on_what_was_played_before(finished):
    """When an episode starts, MuJoCo's data are the same in a new and in a used environment.

    OGBench's own reset does not do that: it takes steps with an action space that nobody seeds.
    """
    agent, fields = trqam.Agent.load(finished[0] / "checkpoint.pt"), ("qpos", "qvel", "act")
    fields += ("ctrl", "qacc_warmstart", "xfrc_applied", "qfrc_applied", "mocap_pos", "time")

    class Started(Exception):
        pass

    def start(used):
        env = trqam.make_env(agent.cfg.env)
        if used:
            list(itertools.islice(trqam.play(agent, env, 1), 30))
        env.action_space.seed(int(used)), env.unwrapped.action_space.seed(int(used))
        data = env.unwrapped._data
        env.reset(seed=3)
        plain = {k: np.copy(getattr(data, k)) for k in fields}
        env.action_space.seed(int(used)), env.unwrapped.action_space.seed(int(used))

        def step(action):
            raise Started

        env.step = step
        with pytest.raises(Started):
            next(trqam.play(agent, env, 2))
        return plain, {k: np.copy(getattr(data, k)) for k in fields}

    (new_plain, new), (used_plain, used) = start(False), start(True)
    for k in fields:
        np.testing.assert_array_equal(new[k], used[k], err_msg=k)
    assert any((new_plain[k] != used_plain[k]).any() for k in ("ctrl", "qacc_warmstart"))


class Corridor(gymnasium.Env):
    """Seven steps; the observation counts them, and the seed says whether the end is a success."""

    def reset(self, seed=None):
        self.n, self.solved = 0, bool(seed % 2)
        return np.full(3, 0.0), {}

    def step(self, action):
        self.n += 1
        over = self.n == 7
        info = dict(success=float(over and self.solved))
        return np.full(3, float(self.n)), -self.n, over and self.solved, over, info


def test_episodes_are_played_by_the_fine_tuned_policy():
    """`act` is K Euler steps of v_ft; `play` yields what happened, chunks executed open loop."""
    agent = golden_agent().float()
    obs, noise = np.ones(3), torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    v = functools.partial(agent.policy, torch.ones(1, 3))
    chunk = trqam.sample_flow(v, noise, 4).view(2, 2).numpy()
    np.testing.assert_array_equal(agent.act(obs, torch.Generator().manual_seed(1)), chunk)
    with pytest.raises(RuntimeError):  # one observation at a time
        agent.act(np.ones((3, 3)))
    seed, episode = trqam.seed_of(0, 2, 5), list(trqam.play(agent, Corridor(), 2, 5))
    generator = torch.Generator().manual_seed(seed)
    for i, ((obs, next_obs, action, reward, mask, done), _) in enumerate(episode):
        chunk = agent.act(np.full(3, float(i)), generator) if i % 2 == 0 else chunk
        np.testing.assert_array_equal(action, chunk[i % 2])
        assert (obs[0], next_obs[0], reward, done) == (i, i + 1, -i - 1, i == 6)
        assert mask == (0 if i == 6 and seed % 2 else 1)
    assert len(episode) == 7 and len({trqam.PERIODIC, trqam.FINAL, trqam.ONLINE}) == 3


def test_evaluation_averages_the_episodes():
    """Success at the end ± standard error, mean return and length, of seeded episodes."""
    row = trqam.evaluate(golden_agent().float(), Corridor(), 10, 2)
    won = [float(trqam.seed_of(0, 2, i) % 2) for i in range(10)]
    assert 0 < sum(won) < 10 and row["success"] == pytest.approx(np.mean(won))
    assert row["stderr"] == pytest.approx(np.std(won, ddof=1) / math.sqrt(10))
    assert (row["mean_return"], row["mean_length"], row["episodes"]) == (-28, 7, 10)


def test_video_shows_the_episodes_as_played(tmp_path, monkeypatch):
    """A GIF of every second step of three episodes: of the evaluation's, in their order."""

    class Lamp(Corridor):  # as bright as the step is late, and red in an episode that succeeds
        def render(self):
            grey = np.full((16, 16, 3), 30 * self.n, np.uint8)
            grey[..., 0] += 20 * self.solved
            return grey

        def reset(self, seed=0):
            return super().reset(seed)

    asked = {}
    monkeypatch.setattr(trqam, "make_env", lambda name, **kw: asked.update(kw) or Lamp())
    trqam.render_video(golden_agent().float(), tmp_path / "video.gif")
    frames = imageio.mimread(tmp_path / "video.gif")
    won = [trqam.seed_of(0, trqam.FINAL, i) % 2 for i in range(3)]
    seen = [(round(float(f[..., 1].mean())), round(float(f[..., 0].mean()))) for f in frames]
    assert seen == [(30 * n, 30 * n + 20 * w) for w in won for n in (1, 3, 5, 7)]
    assert asked["render_mode"] == "rgb_array" and len(set(won)) == 2


def test_benchmark_measures():
    fields = TINY | dict(width=64)
    assert all(0 < seconds < 10 for seconds in trqam.benchmark(configure(**fields), 1))


def test_video_without_opengl_says_what_is_missing(finished, dataset_dir):
    """Where rendering is impossible, --video says so and exits with 1."""
    argv = command(finished[0], dataset_dir, "--eval-only", "--video", final_episodes=1)
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(argv, env=environment | dict(MUJOCO_GL="glfw"), capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 1 and "OpenGL" in done.stderr and "MUJOCO_GL" in done.stderr


def test_checkpoints_run_no_code(tmp_path):
    """A crafted, a damaged and a foreign checkpoint are refused; nothing in them is run."""

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    path = tmp_path / "checkpoint.pt"
    for content in (Evil(), dict(format=99), [1, 2]):
        torch.save(content, path)
        with pytest.raises(trqam.Failure, match="checkpoint"):
            trqam.Agent.load(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(trqam.Failure, match="damaged or unsafe"):
        trqam.Agent.load(path)
    assert not (tmp_path / "owned").exists()


# ============================================================================== what it survives

NUMBERS = [f for f in dataclasses.fields(trqam.Config) if f.type in ("int", "float")]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_every_number_has_its_range(field):
    """A flag takes the ends of its range, and refuses what is outside."""
    low, high = trqam.RANGES.get(field.name, (1, 10**9) if field.type == "int" else (0, 1))
    beyond = 1 if field.type == "int" else 1e-7
    kind = int if field.type == "int" else float
    for end, outside in ((low, low - beyond), (high, high + 2 * beyond)):
        taken = getattr(configure(device="cpu", **{field.name: kind(end)}), field.name)
        assert taken == end or (field.name, end, taken) == ("task", 0, 2)  # 0: the default task
        with pytest.raises(trqam.Failure, match=f"--{field.name.replace('_', '-')} in ") as error:
            configure(device="cpu", **{field.name: kind(outside)})
        assert error.value.args[1] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_asked_for_and_absent():
    with pytest.raises(trqam.Failure, match="expected a cuda device, got none; use --device cpu"):
        configure(device="cuda")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "half", dict(format=0)], ids=str)
def test_resume_refuses_a_damaged_checkpoint(finished, dataset_dir, tmp_path, content):
    """Damaged, cut or of another version: told before anything is done, and left as it is."""
    path, whole = tmp_path / "checkpoint.pt", (finished[0] / "checkpoint.pt").read_bytes()
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    before = path.read_bytes()
    cfg = configure(**TINY, **ONLINE, resume=True, run_dir=tmp_path, dataset_dir=dataset_dir)
    with pytest.raises(trqam.Failure, match=r"expected (a checkpoint, got a damaged|.* format 3)"):
        trqam.train(cfg)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == [path.name]


def test_resume_refuses_other_data(finished, dataset_dir, tmp_path):
    """The checkpoint knows the data of its run."""
    shutil.copytree(finished[0], tmp_path / "run")
    write_dataset(tmp_path, episodes=4)
    cfg = configure(**TINY, **ONLINE, resume=True, run_dir=tmp_path / "run", dataset_dir=tmp_path)
    before = {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}
    with pytest.raises(trqam.Failure, match="expected the run's data, got other ones"):
        trqam.train(cfg)
    assert before == {file.name: file.read_bytes() for file in (tmp_path / "run").iterdir()}


@needs_fork
def test_unwritable_and_full_folders_are_told_at_the_start(dataset_dir, tmp_path):
    """Not a folder; no room for a checkpoint: exit code 1 before the first update."""
    (tmp_path / "file").write_text("")
    screen = tmp_path / "screen"
    assert wait(fork(command(tmp_path / "file" / "run", dataset_dir), screen=screen)) == 1
    assert "error: [Errno" in screen.read_text()

    def full():  # files can't grow beyond 20 kB, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    assert wait(fork(command(tmp_path / "run", dataset_dir), full, screen)) == 1
    assert "error: [Errno 27]" in screen.read_text()
    assert (tmp_path / "run" / "train.csv").read_text().strip() == ""
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.parametrize("changes", [dict(), dict(log_interval=100, save_interval=1)])
def test_non_finite_numbers_stop_the_run(tmp_path, changes):
    """Finite data that overflow: the run stops with step and terms; the checkpoint is finite."""
    write_dataset(tmp_path, observations=np.full((153, 28), 1e30, np.float32))
    fields = TINY | changes | dict(run_dir=tmp_path / "run", dataset_dir=tmp_path)
    message = "finite parameters at step 1," if changes else r"(?s)before step 5.*'flow_loss': nan"
    with pytest.raises(trqam.Failure, match=message):
        trqam.train(configure(**fields))
    saved = trqam.load_checkpoint(tmp_path / "run" / "checkpoint.pt")
    assert saved["state"]["step"] == 0
    assert all(x.isfinite().all() for x in saved["agent"].values())


class Adversary(torch.nn.Module):
    """A critic as bad as it gets: (B, S), (B, D) -> (3, B, 1)."""

    def __init__(self, kind, scale):
        super().__init__()
        self.kind, self.scale = kind, torch.nn.Parameter(torch.tensor(scale))

    def forward(self, obs, x):
        s = x.sum(-1, keepdim=True)
        q = dict(huge=s, steps=torch.sign(x).sum(-1, keepdim=True) + s * (s > 0), constant=0 * s)
        q["nan"] = torch.where(s.abs() < 0.3, torch.nan, s)
        q["root"] = s.abs().sqrt()  # infinite slope at 0
        return (self.scale * (1 + q[self.kind])).expand(3, -1, -1)


adversaries = st.sampled_from(["huge", "steps", "constant", "nan", "root"])


@settings(max_examples=60)
@given(adversaries, st.floats(-3, 36), st.integers(0, 2**31))
def test_adversarial_critics(kind, exponent, seed):
    """Whatever the critic: λ in its bracket and all finite, or metrics that stop the run."""
    agent = golden_agent().float()
    agent.critic, agent.target_critic = (Adversary(kind, 10.0**exponent) for _ in range(2))
    agent.target_critic.requires_grad_(False)
    agent.start_from_flow()
    generator = torch.Generator().manual_seed(seed)
    for s in (1, 2, 3):
        batch = {k: v.float() for k, v in golden_inputs(s)[0].items()}
        metrics = agent.update(batch, agent.draw_noise(6, generator))
        stopped = not all(math.isfinite(v) for v in metrics.values())
        if stopped:
            break
        assert 0.03 * (1 - 1e-6) <= float(metrics["lam"]) <= 300
        assert 0 <= float(metrics["kl_ema"]) <= 2 * agent.cfg.kl_budget
        assert all(x.isfinite().all() for x in agent.state_dict().values())
    assert not (stopped and exponent < 6 and kind in ("huge", "steps", "constant"))


def test_run_with_a_critic_that_is_nan_somewhere(dataset_dir, tmp_path, monkeypatch):
    """The run stops with the step, the terms and λ, and keeps the last finite checkpoint."""

    class Bad(trqam.Agent):
        def start_from_flow(self):
            super().start_from_flow()
            self.target_critic.forward = lambda obs, x: Adversary("nan", 1.0)(obs, x)[:2]

    monkeypatch.setattr(trqam, "Agent", Bad)
    fields = TINY | dict(run_dir=tmp_path, dataset_dir=dataset_dir, batch=64, save_interval=99)
    with pytest.raises(trqam.Failure, match=r"(?s)before step 25.*'matching_loss': nan.*'lam'"):
        trqam.train(configure(**fields))
    saved = trqam.load_checkpoint(tmp_path / "checkpoint.pt")
    assert saved["state"]["step"] == 20  # the end of pretraining
    assert all(x.isfinite().all() for x in saved["agent"].values())


@needs_fork
def test_runs_that_start_at_once_share_one_cache(dataset_dir, tmp_path):
    """Each collects, the file is the same and whole whoever is last, and so are the runs."""
    changes = dict(data="scripted", cache_dir=tmp_path / "cache", transitions=1000, workers=1)
    runs = [tmp_path / name for name in "ab"]
    argvs = [command(run, dataset_dir, "--resume", **changes) for run in runs]
    pids = [fork(argv, screen=f"{run}.log") for argv, run in zip(argvs, runs, strict=True)]
    assert [wait(pid) for pid in pids] == [0, 0], [Path(f"{run}.log").read_text() for run in runs]
    assert_same(*map(contents, runs))
    names = [file.name for file in (tmp_path / "cache").iterdir()]
    assert len(names) == 2 and all(name.endswith(".npz") for name in names)
