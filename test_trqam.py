"""Tests of trqam.py: golden numbers, equations, settings, networks; data, runs, resume, errors.

The theory is in test_theory.py. Runs are forked, so they are at work at once; their environment is
cube-single with episodes cut after 20 steps, their data are random. Nothing here touches the
network. `pytest -q test_trqam.py`
"""

from __future__ import annotations  # `compile` takes it over

import ast
import builtins
import contextlib
import copy
import csv
import dis
import hashlib
import http.server
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import MagicMock, PropertyMock

import gymnasium
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis.strategies import booleans, floats, integers, lists, none, sampled_from
from torch.fx.experimental import _config as fx_config
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import trqam

torch.set_num_threads(1)
settings.register_profile("trqam", derandomize=True, deadline=None, database=None)
settings.load_profile("trqam")

# Where autograd has seen a GPU, no process that trains can be forked: these tests don't see it
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a look without starting CUDA
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
SEES_THE_GPU = dict(os.environ)
os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Every test starts in an empty folder, where no run is."""
    monkeypatch.chdir(tmp_path)


# ================================================================================ golden numbers
# Three consecutive updates of a tiny agent in float64, computed with the authors' published code
# (commit 02599ce). Every input comes from one formula, `wave`; nothing else is random.

GOLDEN = """
matching_loss  sum     54.91136944433246   52.65884647741666  52.024172553231416
adj_max        sum     2.361424466048883   11.99335707145111   5.365373287769574
adj_mean       sum    0.3202880686404252  0.8012770869844084  0.3453505287139127
flow_loss      sum    2.0151501966286243   2.584983009941795  0.4783592190717729
path_kl        sum    1.2288984360733517   0.894984937933437  0.9179972797140844
critic_loss    sum     7.013804645283311  17.462941889069572   4.306948289991458
q_mean         sum    0.2767926792528065  0.7216761855600567 0.11318928000405266
kl_ema         sum                   0.1  0.1794984937933437  0.2533483723854178
dual           sum                 0.996  0.9927949849379334  0.9903284686617876
base           norm     5.47823025590607    5.47761484219633   5.477124139038693
base           sum    0.8349919415868304  0.8321878628346149  0.8302588672801898
target_base    norm   5.4656073316688625   5.455664701239775   5.445852235011833
target_base    sum   -0.4549278721776865 -0.4484782731088635 -0.4420749424291461
policy         norm    5.497291129198578    5.49671116743414   5.496125985361547
policy         sum    -1.424231220982803 -1.4293574559955449 -1.4342896460571666
critic         norm   11.180824513466126  11.180384643001785  11.180009184958275
critic         sum    47.041748335846286   47.03903771648772  47.035102110825235
target_critic  norm   11.184600600665863  11.172138520300592  11.159846996114384
target_critic  sum      46.7589403708127   46.76035441063788   46.76174782716713
"""
NETS = ["base", "target_base", "policy", "critic", "target_critic"]
SMALL = trqam.Config(
    device="cpu",
    width=8,
    layers=2,
    critics=3,
    flow_steps=4,
    chunk=2,
    batch=6,
    gamma=0.9,
    kl_budget=0.5,
)


def wave(tag, scale, *shape):
    """scale · sin(1.3 n + 0.7 tag + 0.2 √n) for n = 0, 1, … in row-major order."""
    n = torch.arange(math.prod(shape)).double()
    return scale * torch.sin(1.3 * n + 0.7 * tag + 0.2 * n.sqrt()).view(shape)


def golden_inputs(cfg, s):
    """Batch and random numbers of update s, for observations of size 3 and actions of size 2."""
    B = cfg.batch
    D = 2 * cfg.chunk
    batch = {
        "obs": wave(2000 + s, 1, B, 3),
        "actions": wave(3000 + s, 0.9, B, D),
        "next_obs": wave(4000 + s, 1, B, 3),
        "rewards": wave(5000 + s, 1, B) - 1,
        "masks": (torch.arange(B) % 3 > 0).double(),
    }
    normal = [wave(1000 * s + i, 1.4, B, D) for i in range(5 + cfg.flow_steps)]
    noise = {
        "x_next": normal[1],
        "x_flow": normal[2],
        "t_flow": 0.5 + wave(1000 * s + 3, 0.45, B, 1),
        "x_sde": normal[4],
        "sde": torch.stack(normal[5:]),
    }
    return batch, noise


def layers_of(net):
    """Weight, bias, and scale and offset of the LayerNorm that follows, or None, of each layer."""
    return itertools.zip_longest(net.weights, net.biases, net.scales, net.offsets)


def fill(agent):
    """Make all parameters waves."""
    for T, name in enumerate(NETS, start=1):
        for i, layer in enumerate(layers_of(getattr(agent, name))):
            for j, p in enumerate(filter(torch.is_tensor, layer)):
                scale = 0.1 if j > 0 else math.sqrt(3 / p.shape[-2])
                p.data.copy_(wave(100 * T + 10 * i + j, scale, *p.shape) + (j == 2))


def golden_agent(fine_tuning=True, **changes):
    """An agent whose parameters are waves."""
    agent = trqam.Agent(replace(SMALL, **changes), 3, 2).double()
    if fine_tuning:
        agent.start_fine_tuning()
    fill(agent)
    return agent


def vector_of(net):
    return parameters_to_vector(net.parameters()).detach()


def updated(agent, update, *inputs):
    """Metrics of an update of an agent or an oracle, ℓ and all parameters after it."""
    metrics = getattr(agent, update)(*inputs)
    vectors = {name: vector_of(getattr(agent, name)) for name in NETS}
    return metrics | vectors | {"dual": agent.dual}


# ======================================================================================== oracle
# The equations in plain matrix algebra and autograd; of trqam.py it takes the parameters only.
# Adam and the clip are torch's: the golden numbers hold both agent and oracle to the authors'.


def network(net, *inputs):
    """Layers x W + b, between them tanh-GELU and, in a network that has its scales, LayerNorm."""
    x = torch.cat(inputs, -1)
    for i, (weight, bias, scale, offset) in enumerate(layers_of(net)):
        x = x @ weight + bias
        if i + 1 < len(net.weights):
            x = F.gelu(x, approximate="tanh")
        if scale is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale + offset
    return x


def velocity(net, obs, x, t):
    return network(net, obs, x, t + 0 * x[:, :1])


def euler(net, obs, x, K):
    """K steps of dx = v dt, clipped."""
    for k in range(K):
        x = x + velocity(net, obs, x, k / K) / K
    return x.detach().clamp(-1, 1)


def squared_norm(x):
    """mean_B Σ_k ‖x_k‖²"""
    return x.square().sum((0, 2)).mean()


class Oracle:
    """The updates of an agent by the equations."""

    adam = None

    def __init__(self, agent):
        self.cfg = agent.cfg
        for name in [*NETS, "dual", "kl_ema"]:
            setattr(self, name, copy.deepcopy(getattr(agent, name)))

    def critic_terms(self, obs, actions, next_obs, rewards, masks, x_next, **_):
        cfg = self.cfg
        next_chunk = euler(self.policy, next_obs, x_next, cfg.flow_steps)
        q_next = network(self.target_critic, next_obs, next_chunk).squeeze(-1)
        pessimistic = q_next.mean(0) - cfg.rho * q_next.std(0, correction=0)
        y = rewards + cfg.gamma**cfg.chunk * masks * pessimistic
        q = network(self.critic, obs, actions).squeeze(-1)
        return {"q_mean": q.mean(), "critic_loss": (q - y).square().mean()}

    def flow_loss(self, obs, actions, x_flow, t_flow, **_):
        x_t = (1 - t_flow) * x_flow + t_flow * actions
        error = velocity(self.base, obs, x_t, t_flow) - (actions - x_flow)
        return error.square().mean()

    def matching_terms(self, obs, x_sde, sde, **_):
        """The adjoints are the gradients by X_k where each step has the slope of the base step."""
        K = len(sde)
        k = torch.arange(K).double().view(K, 1, 1)
        g = torch.sqrt(2 * (K + 1 - k) / (k + 1))
        v_base = partial(velocity, self.target_base, obs)
        path = [x_sde.clone().requires_grad_()]
        gaps = []
        for k in range(K):
            x = path[k]
            later = (k + 1) / K
            v_fine = velocity(self.policy, obs, x, k / K)
            v_slow = v_base(x, k / K)
            gaps.append(v_fine - v_slow)
            step = x + (2 * v_fine - x / later) / K + g[k] * sde[k] / math.sqrt(K)
            if later == 1:
                step = x + v_slow / K
            base_step = x + (2 * v_base(x, later) - x / later) / K
            path.append(step.detach() + base_step - base_step.detach())
        q = network(self.target_critic, obs, path[-1].clamp(-1, 1)).mean(0)
        *adjoint, terminal = torch.autograd.grad(-q.sum(), path)
        size = terminal.abs()
        fixed = self.cfg.fixed_lambda
        lam = 3 * self.dual if fixed is None else fixed + 0 * self.dual
        sigma = g / lam.sqrt()
        u = 2 * torch.stack(gaps) / sigma
        target = sigma * torch.stack(adjoint)
        kl_of = 1 / (2 * K * lam * self.cfg.chunk)
        return {
            "lam": lam,
            "matching_loss": squared_norm(u + target),
            "path_kl": squared_norm(u).detach() * kl_of,
            "target_kl": squared_norm(target) * kl_of,
            "adj_mean": size.mean(),
            "adj_max": size.max(),
        }

    def descend(self, loss, lr, *names):
        """Adam by the gradient of these networks, clipped to norm 1 all together."""
        learning = [p for name in names for p in getattr(self, name).parameters()]
        self.adam = self.adam or torch.optim.Adam(learning, lr)
        self.adam.zero_grad()
        loss.backward(inputs=learning)
        norm = clip_grad_norm_(learning, 1)
        self.adam.step()
        return norm

    def pretrain_update(self, batch, noise, lr):
        loss = self.flow_loss(**batch, **noise)
        return {"flow_loss": loss, "grad_norm": self.descend(loss, lr, "base")}

    def update(self, batch, noise):
        cfg = self.cfg
        terms = self.critic_terms(**batch, **noise) | self.matching_terms(**batch, **noise)
        terms["flow_loss"] = self.flow_loss(**batch, **noise)
        loss = terms["critic_loss"] + terms["matching_loss"] + terms["flow_loss"]
        moving = ["critic"] if cfg.frozen_base else ["critic", "base"]
        for name in moving:
            slow = getattr(self, f"target_{name}")
            mixed = vector_of(slow).lerp(vector_of(getattr(self, name)), cfg.tau)
            vector_to_parameters(mixed, slow.parameters())
        terms["grad_norm"] = self.descend(loss, cfg.lr, "policy", *moving)
        self.kl_ema = 0.9 * self.kl_ema + 0.1 * terms["path_kl"].clamp(max=2 * cfg.kl_budget)
        if cfg.fixed_lambda is None:
            self.dual = (self.dual + 0.01 * (self.kl_ema - cfg.kl_budget)).clamp(0.01, 100)
        return terms | {"kl_ema": self.kl_ema}


def test_golden_numbers():
    """Three updates of agent and of oracle give the published implementation's numbers."""
    for agent in (golden_agent(), Oracle(golden_agent())):
        for s in (1, 2, 3):
            got = updated(agent, "update", *golden_inputs(SMALL, s))
            for row in GOLDEN.strip().splitlines():
                name, reduction, *values = row.split()
                value = getattr(got[name], reduction)().item()
                assert value == pytest.approx(float(values[s - 1]), rel=1e-8), row


SIZES = ["width", "layers", "critics", "chunk", "flow_steps", "batch"]


@settings(max_examples=60)
@given(
    **dict.fromkeys(SIZES, integers(2, 4)),
    gamma=floats(0.5, 1),
    rho=floats(0, 2),
    tau=floats(0.01, 0.5),
    lr=floats(1e-4, 1e-2),
    kl_budget=floats(0.05, 3),
    flow_layer_norm=booleans(),
    frozen_base=booleans(),
    fixed_lambda=none() | floats(0.2, 5),
    dual=sampled_from([1, 0.01, 100]),
    kl_ema=sampled_from([0, 8]),
)
def test_updates_are_those_of_the_equations(dual, kl_ema, **changes):
    """One of pretraining; two after it, from its flow, λ within its bracket or at an end of it."""
    agent = golden_agent(fine_tuning=False, **changes)
    inputs = golden_inputs(agent.cfg, 1)
    expected = updated(Oracle(agent), "pretrain_update", *inputs, 1e-3)
    assert_close(updated(agent, "pretrain_update", *inputs, 1e-3), expected, rtol=1e-8, atol=1e-10)
    agent.start_fine_tuning()
    for net in (agent.target_base, agent.policy):
        assert torch.equal(vector_of(net), vector_of(agent.base))
    fill(agent)
    agent.dual.fill_(dual)
    agent.kl_ema.fill_(kl_ema)
    oracle = Oracle(agent)
    for _ in range(2):
        expected = updated(oracle, "update", *inputs)
        assert_close(updated(agent, "update", *inputs), expected, rtol=1e-8, atol=1e-10)


def test_compiled_updates_are_the_eager_ones():
    """To 1e-5 over 50 of them, and traced once; a call passes over `pull_back` K + 1 times."""
    torch._dynamo.reset()
    eager = golden_agent().float()
    agent = golden_agent(compile=True).float()
    update = trqam.fast_update(agent)
    frames = torch._dynamo.utils.counters["frames"]
    for s in range(50):
        inputs = tree_map(torch.Tensor.float, golden_inputs(SMALL, s))
        assert_close(update(*inputs), eager.update(*inputs), rtol=1e-5, atol=1e-5)
        if s == 2:
            traced = frames["total"]
    assert traced > 0 and frames["total"] - traced <= 47 * (SMALL.flow_steps + 1)
    assert_close(agent.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_updates_stay_eager(monkeypatch, capsys):
    """And one line says why; so they do, without a line, where it is not set."""
    monkeypatch.setattr(torch, "compile", MagicMock(side_effect=RuntimeError("no g++\nand so on")))
    agent = golden_agent(compile=True)
    assert trqam.fast_update(agent) == agent.update
    reason = "for want of a compiler or torch 2.8: RuntimeError('no g++\\nand so on')"
    assert capsys.readouterr().out == f"not compiled, {reason}\n"
    other = golden_agent()
    assert trqam.fast_update(other) == other.update
    assert capsys.readouterr().out == ""


# ======================================================================================== device


def test_updates_write_in_place():
    """As a CUDA graph of them does, whatever they change has to stay where it is."""
    agent = golden_agent()

    def places():
        state = (agent.state_dict(), agent.optimizer.state_dict()["state"])
        return [x.data_ptr() for x in tree_leaves(state)]

    agent.update(*golden_inputs(SMALL, 1))  # makes Adam's moments
    before = places()
    agent.update(*golden_inputs(SMALL, 2))
    assert places() == before


def test_updates_are_compiled_as_set_and_captured_on_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.CUDAGraph", MagicMock)
    monkeypatch.setattr(trqam, "compile_update", lambda agent: "compiled")
    for device, asked in itertools.product(("cpu", "cuda:1", "mps"), (True, False)):
        agent = MagicMock(cfg=replace(SMALL, compile=asked), update="as it is")
        agent.dual = MagicMock(is_cuda=device == "cuda:1", device=torch.device(device))
        update = trqam.fast_update(agent)
        assert isinstance(update, trqam.CapturedUpdate) == (device == "cuda:1")
        inner = getattr(update, "update", update)
        assert inner == ("compiled" if asked and device != "mps" else "as it is")


def test_captured_updates_take_new_batches(monkeypatch):
    """With a stand-in for the CUDA graph: it updates again where a GPU replays its kernels."""
    plain = golden_agent()
    agent = golden_agent()

    class Graph:
        def replay(self):
            for name, value in agent.update(*update.inputs).items():
                update.metrics[name].copy_(value)

    @contextlib.contextmanager
    def recording(graph):
        before = copy.deepcopy((agent.state_dict(), agent.optimizer.state_dict()))
        yield
        for part, state in zip((agent, agent.optimizer), before, strict=True):
            part.load_state_dict(state)  # nothing has run yet

    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.cuda.graph", recording)
    monkeypatch.setattr("torch.cuda.device", lambda _: contextlib.nullcontext())
    update = trqam.CapturedUpdate(agent.update)
    for s in range(6):
        expected = plain.update(*golden_inputs(SMALL, s))
        assert_close(update(*golden_inputs(SMALL, s)), expected, rtol=0, atol=0)


@GPU
def test_theory_holds_on_the_gpu():
    """So do captured updates, which are there."""
    argv = [sys.executable, "-m", "pytest", "-q", SCRIPT.with_name("test_theory.py")]
    subprocess.run(argv, env=SEES_THE_GPU, check=True)


@GPU
def test_runs_on_the_gpu():
    """Through all phases, the end compiled, on the CPU in between; Adam's moments move along."""
    flags = f"{TINY} --offline-steps 10".replace("--device cpu", "--device cuda")
    back = f"--resume --offline-steps 20 {ONLINE} --device cuda --compile"
    for text in (flags, "--resume --offline-steps 15 --device cpu", back):
        argv = [sys.executable, SCRIPT, *text.split()]
        env = SEES_THE_GPU | {"HOME": os.environ["HOME"]}
        out = subprocess.run(argv, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert "will be compiled" in out
    assert checkpoint_of(RUN)["progress"]["step"] == 100


# On torch's `meta` device there are no numbers: what reads one on the host raises.


class Dispatched(TorchDispatchMode):
    """Counts the operations of torch that are no views, and refuses those that mix devices."""

    launched = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, result)))
        assert len({x.device for x in tensors}) < 2
        self.launched += not operation.is_view
        return result


class MetaGenerator(torch.Generator):
    device = torch.device("meta")


def test_training_stays_on_the_device():
    """Buffer, noise and updates read nothing back and mix no devices, by few operations."""
    cfg = trqam.Config(device="meta", width=16)
    KEYS = trqam.ReplayBuffer.KEYS
    data = dict.fromkeys(KEYS[:3], np.zeros((20, 2))) | dict.fromkeys(KEYS[3:], np.zeros(20))
    with fx_config.patch(meta_nonzero_assume_all_nonzero=True):  # else `nonzero` has no shape
        buffer = trqam.ReplayBuffer(data, cfg)
    agent = trqam.Agent(cfg, 2, 2)
    generator = MetaGenerator()
    with Dispatched() as seen:
        inputs = (buffer.sample(8, generator), agent.draw_noise(8, generator))
        agent.pretrain_update(*inputs, 1e-3)
        agent.start_fine_tuning()
        agent.update(*inputs)
        before = seen.launched
        agent.update(*inputs)
    assert seen.launched - before < 1400


# ====================================================================================== settings
PAPER = """
env chunk width flow_layer_norm gamma rho kl_budget
antmaze-large       antmaze-large-navigate-singletask-v0       1  512 False 0.995 0.5 1.0
antmaze-giant       antmaze-giant-navigate-singletask-v0       1 1024 True  0.995 0.5 1.0
humanoidmaze-medium humanoidmaze-medium-navigate-singletask-v0 1  512 False 0.999 0.0 0.5
humanoidmaze-large  humanoidmaze-large-navigate-singletask-v0  1  512 False 0.999 0.0 1.0
scene               scene-play-singletask-v0                   5  512 False 0.995 0.5 1.0
puzzle-3x3          puzzle-3x3-play-singletask-v0              5  512 False 0.995 0.5 1.0
puzzle-4x4          puzzle-4x4-play-singletask-v0              5 1024 True  0.995 0.5 1.0
cube-double         cube-double-play-singletask-v0             5  512 False 0.995 0.5 1.0
cube-triple         cube-triple-play-singletask-v0             5 1024 True  0.995 0.5 0.5
cube-quadruple      cube-quadruple-play-singletask-v0          5 1024 True  0.995 0.5 1.0
cube-single         cube-single-play-singletask-v0             5  512 False 0.995 0.5 1.0
cube-octuple        cube-octuple-play-singletask-v0            5  512 False 0.995 0.5 1.0
puzzle-4x6          puzzle-4x6-play-singletask-v0              5  512 False 0.995 0.5 1.0
antsoccer-arena     antsoccer-arena-navigate-singletask-v0     1  512 False 0.995 0.5 1.0
pointmaze-medium    pointmaze-medium-navigate-singletask-v0    1  512 False 0.995 0.5 1.0
humanoidmaze-giant  humanoidmaze-giant-navigate-singletask-v0  1  512 False 0.999 0.0 1.0
"""  # the last six are not of the paper; no -task in an id: OGBench's default
COLUMNS, *ROWS = map(str.split, PAPER.splitlines()[1:])
PAPERS_FLAGS = """
--chunk 5 --width 512 --no-flow-layer-norm --gamma 0.995 --rho 0.5 --kl-budget 1 --critics 10
--layers 4 --flow-steps 10 --batch 256 --lr 3e-4 --tau 0.005 --pretrain-lr 3e-4 --no-pretrain-decay
--pretrain-steps 300000 --offline-steps 1000000 --online-steps 0 --online-start 5000
--eval-interval 50000 --eval-episodes 50 --final-episodes 50 --log-interval 1000
--transitions 1000000 --task None --fixed-lambda None --no-frozen-base --save-minutes 5 --seed 0
--data-seed 0 --data auto --dataset-dir ~/.ogbench/data --critic-start 0 --no-compile
"""
LAPTOPS_FLAGS = """
--width 256 --flow-steps 5 --batch 128 --lr 6e-4 --tau 0.01 --kl-budget 0.5 --pretrain-lr 1e-3
--pretrain-decay --pretrain-steps 30000 --offline-steps 10000 --eval-interval 2000
--eval-episodes 10 --log-interval 250 --transitions 300000 --compile
"""
LAPTOPS_FLAGS_OF = {
    "cube-single": "--gamma 0.99 --critics 5 --pretrain-steps 60000 --offline-steps 8000",
    "cube-double": "--critic-start -387",
    "scene": "--critic-start -635 --critics 5 --pretrain-steps 60000",
    "puzzle-3x3": "--critic-start -898",
}


def configure(flags):
    return trqam.parse(flags.split())


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_domain_has_the_settings_of_the_papers_table(row):
    """At the paper's scale; at the laptop's, here by the full id, its own beat them, a flag all."""
    cfg = configure(f"--env {row[0]} --scale paper --device cpu")
    assert [str(getattr(cfg, name)) for name in COLUMNS] == row[1:]
    assert configure(f"--env {row[0]} --task 3").env == cfg.env.replace("-v0", "-task3-v0")
    laptop = configure(f"--env {cfg.env} --scale laptop --device cpu")
    own = LAPTOPS_FLAGS_OF.get(row[0], "")
    flags = configure(f"--env {row[0]} --scale paper --device cpu {LAPTOPS_FLAGS} {own}")
    assert laptop == replace(flags, scale="laptop")
    for scale in ("paper", "laptop"):
        flags = configure(f"--env {row[0]} --scale {scale} --device cpu {PAPERS_FLAGS}")
        assert flags == trqam.Config(cfg.env, scale=scale, device="cpu", run_dir=cfg.run_dir)


@pytest.mark.parametrize("cuda", [True, False])
def test_device_and_scale_are_by_what_there_is(monkeypatch, cuda):
    """CUDA and the paper's scale where there is CUDA, else CPU and the laptop's; or as asked.

    Only the laptop's scale on a CPU is compiled.
    """
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)  # as if the device were there
    cfg = configure("")
    assert f"{cfg.device} {cfg.width}" == ("cuda 512" if cuda else "cpu 256")
    assert configure("--device cpu").width == 256
    assert cfg.compile == configure("--scale laptop").compile == (not cuda)
    assert configure("--scale laptop --device cpu").compile
    assert not configure("--scale paper --device cpu").compile


RANGES = """
--task           1     5          0        6
--gamma          0     1          -1e-09   1.000000001  nan
--rho            0     1000000000 -1e-09   1000000001   nan
--flow-steps     2     1000       1        1001
--kl-budget      1e-06 1e6        9.99e-07 1000001.0    nan
--critic-start   -1e9  1e9        -1000000001.0 1000000001.0 nan
--fixed-lambda   1e-06 1e6        9.99e-07 1000001.0    nan
--width          1     1000000000 0        1000000001
--layers         1     1000000000 0        1000000001
--critics        1     1000000000 0        1000000001
--chunk          1     1000000000 0        1000000001
--batch          1     1000000000 0        1000000001
--transitions    1     1000000000 0        1000000001
--workers        1     1000000000 0        1000000001
--pretrain-steps 0     1000000000 -1       1000000001
--eval-interval  1     1000000000 0        1000000001
--eval-episodes  1     1000000000 0        1000000001
--final-episodes 1     1000000000 0        1000000001
--log-interval   1     1000000000 0        1000000001
--seed           0     1000000000 -1       1000000001
--data-seed      0     1000000000 -1       1000000001
--offline-steps  0     1000000000 -1       1000000001
--online-steps   0     1000000000 -1       1000000001
--online-start   0     1000000000 -1       1000000001
--tau            0     1          -1e-09   1.000000001  nan
--lr             0     1000000000 -1e-09   1000000001   nan
--pretrain-lr    0     1000000000 -1e-09   1000000001   nan
--save-minutes   0     1000000000 -1e-09   1000000001   nan
"""


@pytest.mark.parametrize("row", RANGES.strip().splitlines())
def test_a_number_has_its_range(row):
    """Both ends are taken; what is beyond either, and NaN, is refused."""
    flag, low, high, *refused = row.split()
    configure(f"{flag} {low}")
    configure(f"{flag} {high}")
    for value in refused:
        with pytest.raises(ValueError, match=rf"{flag} in \[.*\], got {value}"):
            configure(f"{flag} {value}")


# ============================================================================ networks and agent


def test_networks_begin_as_the_settings_say():
    """LayerNorm in the flow, Q of the critics; weights fill ±√(6/(n_in + n_out)) evenly, by the
    seed, none alike."""
    cfg = replace(SMALL, width=1024, layers=1, chunk=4, flow_layer_norm=True, critic_start=-3)
    agent = trqam.Agent(cfg, 20, 2)
    other = dict(trqam.Agent(replace(cfg, seed=1), 20, 2).named_parameters())
    assert len(agent.base.scales) == 1
    for name, p in agent.named_parameters():
        if "weights" in name:
            filled = p / math.sqrt(6 / sum(p.shape[-2:]))
            levels = torch.linspace(0, 1, 9)
            assert_close(filled.quantile(levels), 2 * levels - 1, rtol=0, atol=0.06)
            assert len(p.unique(dim=0)) == len(p)
            assert not (p == other[name]).any()
        elif name.endswith("critic.biases.1"):
            assert (p == -3).all()
        else:
            assert (p == float("scales" in name)).all()


def test_noise_is_the_generators():
    """Normals, and uniform flow times, all independent."""
    noise = golden_agent().draw_noise(9999, torch.Generator().manual_seed(5))
    noise["t_flow"] = (noise["t_flow"] - 0.5) * math.sqrt(12)
    columns = torch.cat([x.movedim(-2, 0).flatten(1) for x in noise.values()], 1)
    assert_close(columns.T @ columns / 9999, torch.eye(29), rtol=0, atol=0.06)


CRITICS = [
    lambda x: 1 + x,
    lambda x: x.sign() + x.relu(),
    lambda x: torch.where(x.abs() < 0.3, torch.nan, x),
    lambda x: x.abs().sqrt(),  # infinite slope at 0
]


@settings(max_examples=30)
@given(sampled_from(CRITICS), floats(-3, 300))
def test_adversarial_critics(critic, exponent):
    """Whatever the target critic: λ in its bracket and all finite, or metrics that tell."""
    agent = golden_agent()
    agent.target_critic.forward = lambda obs, x: (
        10**exponent * critic(x.sum(-1, keepdim=True)).expand(3, -1, -1)
    )
    for _ in range(3):
        metrics = agent.update(*golden_inputs(SMALL, 1))
        if not all(value.isfinite() for value in metrics.values()):
            assert exponent > 60 or critic in CRITICS[2:]
            break
        assert 0.0299999 <= 3 * agent.dual <= 300 and 0 <= agent.kl_ema <= 1
        assert all(x.isfinite().all() for x in agent.state_dict().values())


SCRIPT = Path(trqam.__file__).resolve()
RUN = Path("runs/cube-single-play/seed0")  # the folder of a run that is given none
TINY = "--scale laptop --device cpu --width 16 --layers 2 --critics 2 --flow-steps 3 --batch 8"
TINY += " --pretrain-steps 20 --offline-steps 20 --log-interval 5 --eval-interval 33"
TINY += " --eval-episodes 1 --final-episodes 2 --save-minutes 0 --workers 1 --no-compile"
ONLINE = "--online-steps 60 --online-start 25"


# ==================================================================================== machinery


@pytest.fixture(scope="session", autouse=True)
def laboratory(tmp_path_factory):
    """A home with data, no host that has any, and two environments, which are made once."""
    make = gymnasium.make
    name = "cube-single-singletask-v0"
    made = itertools.cycle([make(name, max_episode_steps=20) for _ in range(2)])

    def make_or_take(asked, **options):
        return next(made) if asked == name else make(asked, **options)

    home = tmp_path_factory.mktemp("home")
    write_dataset(home / ".ogbench/data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(gymnasium, "make", make_or_take)
        patch.setattr(trqam, "HOSTS", ["http://127.0.0.1:9"])
        patch.setattr(trqam, "SHA256", {})
        yield


def write_dataset(folder, name="cube-single-play-v0", episodes=3, **changes):
    """Random episodes of 51 states, four of which solve task 2, and as many held out."""
    n = 51 * episodes
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed, end in enumerate((".npz", "-val.npz")):
        rng = np.random.default_rng(seed)
        arrays = {
            "observations": rng.normal(size=(n, 28)),
            "actions": rng.uniform(-1, 1, (n, 5)),
            "qpos": rng.normal(size=(n, 21)),
            "terminals": np.arange(n) % 51 == 50,
        }
        arrays["qpos"][10:14, 14:17] = (0.5, 0, 0.02)
        np.savez(f"{folder}/{name}{end}", **arrays | changes)


def tiny(text=""):
    return configure(f"{TINY} {text}")


def child(flags, screen, prepare):
    """trqam.py, its output piped into a file."""
    torch.set_num_threads(1)  # a forked process waits for ever for the threads of its parent
    os.setsid()
    sys.stdout = sys.stderr = open(screen, "w")  # noqa: SIM115
    os.dup2(sys.stderr.fileno(), 2)  # of spawned processes
    sys.argv = shlex.split(f"{SCRIPT} {TINY} {flags}")
    prepare()
    sys.exit(trqam.main())


def start(flags, screen="screen", prepare=lambda: None):
    """Start a run."""
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=child, args=(flags, screen, prepare))
    process.start()
    return process


def finish(process, code=0, screen="screen"):
    """The screen of a run, which has to end with the code and to leave no process."""
    process.join(300)
    text = Path(screen).read_text()
    assert process.exitcode == code, text
    with pytest.raises(ProcessLookupError):
        for _ in range(3000):
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    return text


def call(flags="", code=0, prepare=lambda: None):
    """The screen of a run."""
    return finish(start(flags, prepare=prepare), code)


def strike(moment, action):
    """Let the nth call of a function begin with an action."""
    name, nth = moment.split()
    owner = next(x for x in (trqam.Agent, trqam, torch, Connection, np) if hasattr(x, name))
    function = getattr(owner, name)
    calls = itertools.count(1)

    def struck(*args, **options):
        if next(calls) == int(nth):
            action()
        return function(*args, **options)

    setattr(owner, name, struck)


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def checkpoint_of(run_dir):
    return trqam.load_checkpoint(Path(run_dir, "checkpoint.pt"))


def contents(run_dir):
    """All of a run that is the same to the bit in a run like it: all but times and places."""
    saved = checkpoint_of(run_dir)
    for row in [saved["progress"], *saved["progress"]["train"]]:
        assert row.pop("seconds") > 0
    for name in ("run_dir", "dataset_dir", "resume", "save_minutes"):
        saved["config"].pop(name)
    return json.loads(json.dumps(saved, default=torch.Tensor.tolist))


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run of all phases, with its screen, beside other data."""
    folder = tmp_path_factory.mktemp("finished")
    write_dataset(folder / "other", qpos=np.zeros((153, 21)))
    screen = folder / "screen"
    finish(start(f"{ONLINE} --run-dir {folder}", screen), 0, screen)
    return folder


# ======================================================================================= replay


@given(lists(integers(1, 9), max_size=9), integers(1, 5))
def test_batches_are_the_chunks_within_episodes(lengths, H):
    """Every window of H steps in an episode, no other; Σ γ^i r_i, the smallest mask, the box.

    Online episodes come behind the dataset, which stays where it is as long as there is room.
    """
    lengths = [H, *lengths]
    total = sum(lengths)
    n = torch.arange(total)
    terminals = torch.isin(n + 1, torch.tensor(lengths).cumsum(0))
    data = {
        "observations": n[:, None],
        "next_observations": n[:, None] + 1,
        "actions": torch.stack([n, -n], 1) / 40,
        "rewards": n,
        "masks": n % 7 > 0,
        "terminals": terminals,
    }
    cfg = replace(SMALL, chunk=H, online_steps=total - H)
    buffer = trqam.ReplayBuffer({name: array[:H] for name, array in data.items()}, cfg)
    episodes = {name: array[H:] for name, array in data.items()}
    places = [array.data_ptr() for array in buffer.arrays.values()]
    buffer.add(episodes)
    assert places == [array.data_ptr() for array in buffer.arrays.values()]
    buffer.add(episodes)  # more than there is room for
    batch = buffer.sample(3000, torch.Generator().manual_seed(0))
    steps = batch["obs"].long() + torch.arange(H)
    starts = {i for i in range(total - H + 1) if not terminals[i : i + H - 1].any()}
    assert set(steps[:, 0].tolist()) == starts
    expected = {
        "obs": steps[:, :1],
        "next_obs": steps[:, -1:] + 1,
        "actions": data["actions"][steps].clamp(-0.99999, 0.99999).flatten(1),
        "rewards": (steps * 0.9 ** torch.arange(H)).sum(1),
        "masks": data["masks"][steps].all(1),
    }
    assert_close(batch, expected, rtol=1e-6, atol=0, check_dtype=False)


# ============================================================================= play and evaluate


class Corridor(gymnasium.Env):
    """Seven steps, which are counted; an odd seed solves them, by an even one they are cut."""

    def reset(self, seed=None, options=None):
        self.seed = seed
        self.luck = np.random.random()
        self.n = 0
        return np.zeros(28), {}

    def step(self, action):
        self.n += 1
        over = self.n == 7
        solved = over and self.seed % 2 == 1
        info = {"success": float(solved or self.n == 3)}
        reward = self.luck * action.sum()
        return np.full(28, self.n), reward, solved, over and not solved, info


@pytest.mark.parametrize("i", range(6))
def test_play_yields_what_happens(i):
    """Chunks of the flow, open loop, from noise of the episode's seed; mask 0 where solved.

    An episode that is cut goes on.
    """
    agent = trqam.Agent(replace(SMALL, seed=5), 28, 5)
    fill(agent)
    agent.float()
    seed = trqam.seed_of(trqam.ONLINE, 5, i)
    noise = torch.Generator().manual_seed(seed)
    luck = np.random.RandomState(seed).random_sample()
    env = Corridor()
    for n, (step, _) in enumerate(trqam.play(agent, env, trqam.ONLINE, i)):
        if n % 2 == 0:
            x_0 = torch.randn(1, 10, generator=noise)
            obs = torch.full((1, 28), float(n))
            chunk = euler(agent.policy, obs, x_0, 4).view(2, 5)
        action = step.pop("actions")
        assert_close(torch.tensor(action), chunk[n % 2])
        solved = n == 6 and seed % 2 == 1
        expected = [n, n + 1, luck * action.sum(), not solved, n == 6]
        assert [np.max(x) for x in step.values()] == expected
    assert (env.seed, env.n) == (seed, 7)


@pytest.mark.parametrize("workers", [1, 2, 3, 9])
def test_evaluation_averages_the_episodes(workers):
    """Success at the end ± standard error, mean return and length, by any number of workers."""
    agent = trqam.Agent(replace(SMALL, workers=workers), 28, 5)
    steps = [step for i in range(7) for step, _ in trqam.play(agent, Corridor(), trqam.FINAL, i)]
    p = np.mean([trqam.seed_of(trqam.FINAL, 0, i) % 2 for i in range(7)])
    assert trqam.evaluate(agent, Corridor(), 7, trqam.FINAL) == pytest.approx(
        {
            "success": p,
            "stderr": math.sqrt(p * (1 - p) / 6),
            "episodes": 7,
            "mean_return": sum(step["rewards"] for step in steps) / 7,
            "mean_length": 7,
        }
    )


@pytest.mark.skipif(sys.platform != "linux", reason="there workers are not forked")
def test_evaluation_takes_a_thread_a_worker(monkeypatch):
    """By one worker, too: with more threads its products, and so its episodes, are others."""
    agent = trqam.Agent(replace(SMALL, workers=1), 28, 5)
    monkeypatch.setattr(trqam, "play_out", lambda *_: (1.0, 0.0, torch.get_num_threads()))
    torch.set_num_threads(2)
    result = trqam.evaluate(agent, Corridor(), 3, trqam.FINAL)
    torch.set_num_threads(1)
    assert result["mean_length"] == 1


def test_evaluation_forks_on_linux_alone(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(trqam, "by_workers", None)
    agent = trqam.Agent(replace(SMALL, workers=2), 28, 5)
    assert trqam.evaluate(agent, Corridor(), 7, trqam.FINAL)["mean_length"] == 7


def test_every_episode_has_a_seed_of_its_own():
    """By stream, --seed and number."""
    keys = itertools.product(range(4), range(3), range(50))
    assert len({trqam.seed_of(*key) for key in keys}) == 600


def test_episodes_do_not_depend_on_what_was_played_before():
    """A used environment plays an episode as a new one, which OGBench's reset does not give."""
    agent = trqam.Agent(SMALL, 28, 5)
    env = gymnasium.make("cube-single-singletask-task1-v0", max_episode_steps=20)
    ends = set()
    for _ in range(3):
        *_, (last, _) = trqam.play(agent, env, trqam.FINAL, 0)
        ends.add(tuple(last["next_observations"]))
    assert len(ends) == 1


@pytest.fixture
def played(monkeypatch):
    """Environments and keys of the episodes played; all of them in the corridor."""
    play = trqam.play
    keys = []

    def play_there(agent, env, stream, i):
        keys.append((env.spec.id, stream, i))
        return play(agent, Corridor(), stream, i)

    monkeypatch.setattr(trqam, "play", play_there)
    return keys


def test_which_episodes_are_played(played, monkeypatch, capsys):
    """Ends of phases, --eval-only: final ones; between: periodic ones; online each once; one task.

    The checkpoint is of the run's end, which cuts the last episode; --eval-only changes nothing.
    """
    monkeypatch.setattr(trqam, "by_workers", lambda function, jobs, _: map(function, jobs))
    text = "--pretrain-steps 4 --offline-steps 4 --online-steps 20 --online-start 5"
    cfg = tiny(f"{text} --task 1 --eval-interval 3 --eval-episodes 2 --final-episodes 3")
    trqam.train(cfg)
    final = capsys.readouterr().out.splitlines()[-1]
    before = files(cfg.run_dir)
    monkeypatch.setattr(signal, "signal", MagicMock())
    monkeypatch.setattr(sys, "argv", ["trqam.py", "--eval-only", "--run-dir", cfg.run_dir])
    assert trqam.main() == 0
    assert files(cfg.run_dir) == before
    assert final.endswith(capsys.readouterr().out.splitlines()[-1])
    env = "cube-single-singletask-task1-v0"
    counts = [(trqam.FINAL, 3, 4), (trqam.PERIODIC, 2, 7), (trqam.ONLINE, 3, 1)]
    expected = {(env, stream, i): times for stream, n, times in counts for i in range(n)}
    assert Counter(played) == expected
    assert checkpoint_of(cfg.run_dir)["progress"]["step"] == 28


@pytest.mark.parametrize("flag, solved", [("--task 1", 0), ("--task 2", 4), ("", 4)])
def test_rewards_are_those_of_the_task(flag, solved):
    """Four states of the data solve task 2, which is OGBench's default; none solves task 1."""
    _, *buffers, facts = trqam.load_data(tiny(flag))
    assert facts["solved"] == solved
    for buffer in buffers:
        assert buffer.arrays["rewards"].sum() == solved - 150
    assert not torch.equal(*(buffer.arrays["actions"] for buffer in buffers))


# ========================================================================================= data


@pytest.mark.parametrize("domain", ["cube-single", "puzzle-3x3"])
def test_oracles_are_set_as_the_authors_did(domain):
    """Noise 0.1, smoothing 0.5; on puzzles the gripper stays closed."""
    _, oracles = trqam.oracles_of(domain)
    for oracle in oracles.values():
        assert (oracle._noise, oracle._noise_smoothing) == (0.1, 0.5)
    assert oracles["button"]._gripper_always_closed == (domain == "puzzle-3x3")


STACKING = """
cube-single    0    0    -1
cube-double    0    0.25 -1
cube-triple    0.05 0.35 -1
cube-quadruple 0.1  0.5  -1
cube-octuple   0    0.35 -1
puzzle-3x3     0.5  0.5  -1
scene          0.5  0.5  -0.19
scene          0.5  0.5  0.56
"""


@pytest.mark.parametrize("domain, low, high, z", [*map(str.split, STACKING.strip().splitlines())])
def test_episodes_are_collected_as_the_authors_did(domain, low, high, z, monkeypatch):
    """The probability to stack; a scene is done again if its cube left the workspace for once."""
    info = {"privileged/target_task": "x"}
    env = MagicMock(_workspace_bounds=(0.02, 0.35))
    env.reset.return_value = env.set_new_target.return_value = (0, info)
    states = np.full((2002, 21), 0.3)
    states[0, 16] = z
    env.step.side_effect = [(0, 0, 0, 0, info | {"prev_qpos": qpos}) for qpos in states]
    oracle = MagicMock()
    type(oracle).done = PropertyMock(side_effect=itertools.cycle(8 * [False] + [True]))
    monkeypatch.setattr(trqam, "oracles_of", {domain: (env, {"x": oracle})}.get)
    episode = trqam.collect_episode(domain, (0, 0, 7))
    assert episode["terminals"].nonzero()[0] == [1000]  # though a plan of 8 steps is done before
    seeds = [how["seed"] for _, how in env.reset.call_args_list]
    assert len(set(seeds)) == 1 + (domain == "scene")
    p_stack = np.random.RandomState(seeds[-1]).uniform(float(low), float(high))
    assert env.set_new_target.call_args.kwargs["p_stack"] == pytest.approx(p_stack)


def test_two_runs_on_one_empty_folder():
    """One collects, the other says that it waits: both train the same, on data as they should be.

    The data depend on no number of workers, held-out episodes are others, states fit observations.
    """
    flags = "--data scripted --transitions 999 --offline-steps 0 --dataset-dir data --run-dir"
    first = start(f"{flags} a", "screen a")
    second = start(f"{flags} b", "screen b")
    trqam.collect(replace(tiny(), transitions=1000, workers=2), Path("two.npz"))
    told = finish(first, 0, "screen a") + finish(second, 0, "screen b")
    assert told.count("collecting") == told.count("waiting for another process") == 1
    assert "going on with" not in told  # no download was tried
    assert contents("a") == contents("b")
    first_actions = set()
    for end in (".npz", "-val.npz"):
        one = np.load(f"data/cube-single-play-scripted-seed0-1k{end}")
        two = np.load(f"two{end}")
        assert set(one) == {"observations", "actions", "terminals", "qpos", "qvel"}
        np.testing.assert_equal(dict(one), dict(two))
        np.testing.assert_allclose(one["observations"][:, :6], one["qpos"][:, :6], atol=1e-6)
        assert np.abs(one["actions"]).max() <= 1 and one["terminals"].nonzero()[0] == [1000]
        first_actions.add(tuple(one["actions"][0]))
    assert len(first_actions) == 2


def keyed(domain, key):
    return {"keys": np.array([key])}


def test_collected_episodes_are_all_others(monkeypatch, capsys):
    """By --data-seed, those held out too; a set begins with a smaller one's. Each 50th is told."""
    monkeypatch.setattr(trqam, "collect_episode", keyed)
    sets = []
    for seed, transitions, told in ((0, 46_000, 0), (0, 50_001, 1), (1, 50_001, 1)):
        trqam.collect(tiny(f"--transitions {transitions} --data-seed {seed}"), Path("set.npz"))
        assert capsys.readouterr().out.count(" 50/") == told
        for file in ("set.npz", "set-val.npz"):
            sets.append([*map(tuple, np.load(file)["keys"])])
    small, _, *larger = sets
    assert larger[0][:46] == small
    assert list(map(len, larger)) == [51, 3, 51, 3]
    assert len(set(itertools.chain(*larger))) == 51 + 3 + 51 + 3


def state_of_worker(_):
    return torch.get_num_threads(), warnings.filters[0][0]


@pytest.mark.skipif(sys.platform != "linux", reason="there workers are not forked")
def test_workers_take_a_thread_each_and_are_quiet():
    """Whatever the run has, which is two threads here."""
    torch.set_num_threads(2)
    states = list(trqam.by_workers(state_of_worker, [0, 1], 2))
    torch.set_num_threads(1)
    assert states == 2 * [(1, "ignore")]


def kill_workers():
    for process in multiprocessing.active_children():
        process.kill()


ENDS_OF_WORKERS = [
    (-9, "", partial(signal.raise_signal, signal.SIGKILL)),
    (143, "stopped; the", partial(signal.raise_signal, signal.SIGTERM)),
    (130, "stopped; the", partial(os.killpg, 0, signal.SIGINT)),
    (1, "exit code -9 of its process", kill_workers),
]


@pytest.mark.skipif(sys.platform != "linux", reason="there workers are not forked")
@pytest.mark.parametrize("data", ["scripted", "ogbench"])
def test_stopped_workers_leave_nothing(data):
    """The run, all its processes or its workers are killed: one line, no process, no dataset."""

    def prepare(action):
        for name in ("collect_episode", "play_out"):  # every worker plays one, at once, and hangs
            setattr(trqam, name, lambda *_: None)
            strike(f"{name} 2", partial(time.sleep, 1000))
        strike("recv 3", action)

    runs = []
    for code, _, action in ENDS_OF_WORKERS:
        write_dataset(f"data {code}")
        flags = f"--data {data} --dataset-dir 'data {code}' --run-dir 'run {code}'"
        flags += " --workers 2 --final-episodes 4"
        runs.append(start(flags, f"screen {code}", partial(prepare, action)))
    for run, (code, line, _) in zip(runs, ENDS_OF_WORKERS, strict=True):
        screen = finish(run, code, f"screen {code}")
        assert line in screen.splitlines()[-1] and "Traceback" not in screen
        assert screen.count("\ntrqam.py: ") == bool(line), screen  # no worker says it again
    assert not list(Path().rglob("*scripted*.npz"))


def test_collection_is_whole_or_not_there():
    """Killed between its two files, it has left none in the folder of data."""

    def prepare():
        trqam.collect_episode = lambda *_: {"observations": np.zeros((1001, 28))}
        strike("savez 2", partial(signal.raise_signal, signal.SIGKILL))

    call("--data scripted --dataset-dir data", -9, prepare)
    assert not list(Path("data").glob("*.npz"))


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves this folder; of `half` and `slow` in part, then nothing for a while; `moved` moved."""

    def do_GET(self):
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", self.path.replace("moved", "host"))
            self.end_headers()
        else:
            super().do_GET()

    def copyfile(self, source, target):
        in_part = re.match("/(half|slow)/.*-val", self.path)
        target.write(source.read(5000 if in_part else -1))
        if self.path.startswith("/slow"):
            time.sleep(4)


@pytest.fixture
def host(monkeypatch):
    """The URL of a host; patience with it is five times shorter."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 5))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


def test_data_are_collected_where_no_host_answers(played, monkeypatch, capsys):
    """And a run that began with them goes on with them, whatever else has come."""
    monkeypatch.setattr(trqam, "collect", lambda cfg, path: write_dataset("data", path.stem))
    trqam.train(tiny("--dataset-dir data --offline-steps 0"))
    assert "going on with data of OGBench's scripted oracles" in capsys.readouterr().out
    write_dataset("data", actions=np.zeros((153, 5)))
    trqam.train(configure("--resume --offline-steps 1"))
    assert "-scripted-" in (RUN / "config.json").read_text()


@pytest.mark.parametrize(
    "bad, text",
    [("none", "404"), ("half", "got a part"), ("slow", "timed out"), ("liar", "or another file")],
)
def test_mirrors_are_tried_in_turn(bad, text, host, monkeypatch):
    """What one has in part or wrongly, by its sum where that is known, is an error.

    Nothing is collected in its place or taken for a dataset. A mirror's is, also if it has moved.
    """
    for folder in ("host", "half", "slow"):
        write_dataset(folder)
    write_dataset("liar", actions=np.zeros((153, 5)))
    digest = hashlib.sha256(Path("host/cube-single-play-v0.npz").read_bytes()).hexdigest()
    monkeypatch.setattr(trqam, "SHA256", {"cube-single-play-v0": digest})
    with pytest.raises(OSError, match=text):
        trqam.prepare_data(tiny(f"--dataset-dir data --dataset-url {host}/{bad} --transitions 1"))
    assert not list(Path("data").glob("*.npz"))
    hosts = ["http://127.0.0.1:9", f"{host}/{bad}", f"{host}/moved"]
    monkeypatch.setattr(trqam, "HOSTS", hosts)
    trqam.prepare_data(tiny("--dataset-dir data"))
    assert files("data").items() >= files("host").items()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"observations": np.zeros((153, 27))}, r"shapes \(\(28,\), .*got \(\(27,\),"),
        ({"observations": np.full((153, 28), np.nan)}, "finite observations.*nan"),
        ({"actions": np.full((153, 5), np.nan)}, r"actions in \[-1, 1\].*nan"),
        ({"actions": np.full((153, 5), 1.5)}, r"actions in \[-1, 1\].*1\.5"),
        ({"qpos": None}, "a damaged"),
    ],
)
def test_damaged_datasets_are_refused(changes, text):
    """With the file, what was expected and what it holds."""
    write_dataset("data", **changes)
    with pytest.raises(OSError, match=rf"(?=.*data/cube-single-play-v0.npz).*{text}"):
        trqam.load_data(tiny("--dataset-dir data"))


@pytest.mark.parametrize("kind", [MemoryError, OSError])
def test_data_that_can_not_be_read_are_not_damaged(kind, monkeypatch):
    monkeypatch.setattr(np, "load", MagicMock(side_effect=kind("the reason")))
    with pytest.raises(kind, match=r"^the reason$"):
        trqam.load_data(tiny())


# ========================================================================================= runs


def test_run_end_to_end(finished):
    """All phases are trained, logged and summed up; held-out loss of held-out data."""
    rows = read_csv(finished / "train.csv")
    lines, summary = (finished / "screen").read_text().split(f"{finished}: ")
    shown = re.findall(r"(?m)^(\w+) +(\d+)/", lines)
    assert shown == [(row["phase"], row["step"]) for row in rows]
    phases = Counter(row["phase"] for row in rows)
    assert phases == {"pretrain": 4, "offline": 4, "online": 7}
    assert re.findall(r"(\w+) +to step \d+: success", summary) == list(phases)
    saved = checkpoint_of(finished)
    assert saved["online"]["terminals"].nonzero().flatten().tolist() == [19, 39, 59]
    agent = trqam.load_agent(finished / "checkpoint.pt")
    *_, held_out, _ = trqam.load_data(tiny())
    fixed = torch.Generator().manual_seed(0)
    batch = held_out.sample(8192, fixed)
    loss = agent.cloning_loss(batch, agent.draw_noise(8192, fixed))
    assert float(rows[-1]["held_out_loss"]) == pytest.approx(loss.item())


def test_rows_are_averages():
    """Each of the updates since the last one."""
    progress = trqam.Progress()
    for mean in (2.5, 3.25):
        progress.add({"x": mean - 1})
        progress.add({"x": mean + 1})
        assert progress.average() == {"x": mean}


@pytest.fixture
def updates(monkeypatch, played):
    """Learning rate, observations and noise of every update; episodes take no time."""
    seen = []

    def watch(name):
        function = getattr(trqam.Agent, name)

        def spy(agent, batch, noise, *lr):
            metrics = function(agent, batch, noise, *lr)
            rate = agent.optimizer.param_groups[0]["lr"]
            seen.append((rate, batch["obs"], *noise.values()))
            return metrics

        monkeypatch.setattr(trqam.Agent, name, spy)

    watch("pretrain_update")
    watch("update")
    return seen


def test_updates_have_rates_and_random_numbers_of_the_run(updates):
    """Cosine to 0 with --pretrain-decay, else constant; then --lr. Another --seed, like another
    update, has other batches and other noise."""
    text = "--pretrain-steps 4 --offline-steps 3 --pretrain-lr 0.5 --lr 0.25"
    trqam.train(tiny(f"{text} --pretrain-decay"))
    trqam.train(configure("--resume --offline-steps 4 --lr 0.1"))
    trqam.train(tiny(f"{text} --no-pretrain-decay --seed 1"))
    cosine = [0.25 + 0.25 * math.cos(math.pi * k / 4) for k in range(4)]
    rates = [*cosine, *[0.25] * 3, 0.1, *[0.5] * 4, *[0.25] * 3]
    got, *drawn = zip(*updates, strict=True)
    assert list(got) == pytest.approx(rates)
    for tensors in drawn:
        assert len({float(x.sum()) for x in tensors}) == len(rates)


@pytest.fixture
def parts(monkeypatch):
    """Three sets of other lengths, whose observations are 10, 11 and 12, each for five steps."""
    monkeypatch.setattr(trqam, "PART_STEPS", 5)
    for i in range(3):
        observations = np.full((51 * (i + 1), 28), 10 + i)
        write_dataset("data", f"cube-single-play-v0-00{i}", i + 1, observations=observations)


def test_parts_of_a_dataset_are_taken_in_turn(parts, updates, monkeypatch):
    """In all phases; online beside the episodes, of smaller observations. One process reads all."""
    reader = MagicMock(wraps=trqam.by_workers)
    monkeypatch.setattr(trqam, "by_workers", reader)
    text = "--dataset-dir data --pretrain-steps 5 --offline-steps 6 --batch 64"
    trqam.train(tiny(f"{text} --online-steps 20 --online-start 12"))
    seen = [set(obs.flatten().tolist()) for _, obs, *_ in updates]
    of_parts = [{x for x in values if x >= 10} for values in seen]
    assert of_parts == [{10 + step // 5 % 3} for step in [*range(11), *range(23, 31)]]
    assert min(set.union(*seen)) == 0
    functions = [call.args[0].func for call in reader.call_args_list]
    assert functions.count(trqam.read_part) == 1


def test_parts_belong_to_the_data_of_a_run(parts):
    """A run does not go on where one has another size or name, or is missing."""

    def data_sum():
        return trqam.load_data(tiny("--dataset-dir data"))[-1]["sha256"]

    sums = {data_sum(), data_sum()}
    part = Path("data/cube-single-play-v0-001.npz")
    part.write_bytes(part.read_bytes() + b"more")
    sums.add(data_sum())
    part = part.rename("data/cube-single-play-v0-003.npz")
    sums.add(data_sum())
    part.unlink()
    sums.add(data_sum())
    assert len(sums) == 4


def test_damaged_parts_are_told(parts):
    """By the process that reads ahead; the run ends with its last checkpoint."""
    os.truncate("data/cube-single-play-v0-001.npz", 5000)
    screen = call("--dataset-dir data", 1)
    assert "got a damaged data/cube-single-play-v0-001.npz" in screen
    assert "error: expected a result, got exit code 1 of its process; it says why" in screen
    assert "Traceback" not in screen
    assert checkpoint_of(RUN)["progress"]["step"] == 5


def test_checkpoints_come_every_few_minutes(updates, monkeypatch):
    """After --save-minutes at the latest; here an update takes a minute."""
    saved = []
    monkeypatch.setattr(trqam, "save_checkpoint", lambda *args: saved.append(args[4].step))
    monkeypatch.setattr(trqam.time, "time", lambda: 60.0 * len(updates))
    trqam.train(tiny("--save-minutes 7"))
    assert saved == [0, 7, 14, 20, 27, 34, 40]


STOPS = {  # with 60 --save-minutes there are checkpoints after evaluations only
    "--save-minutes 60": "KILL pretrain_update 7, INT save 2, KILL update 3, KILL write_csv 3,"
    " TERM save 2, KILL evaluate 2, INT update 9, KILL write_csv 5, KILL save 2",
    "--save-minutes 0": "KILL save 5, TERM pretrain_update 13, INT evaluate 1, KILL update 12,"
    " KILL save 1, TERM update 30",
    "--dataset-dir data": "KILL update 40",  # in turn 16: not the first part's
}


@pytest.mark.parametrize("flags", STOPS)
def test_stopped_runs_end_as_if_they_had_not_been(flags, parts):
    """In every phase, also while it saves; Ctrl-C and SIGTERM tell the command that goes on."""
    whole = start(f"{ONLINE} {flags} --run-dir whole", "screen of the whole")
    flags_now = f"{ONLINE} {flags} --resume --run-dir 'a run'"
    for stop in STOPS[flags].split(", "):
        name, moment = stop.split(maxsplit=1)
        number = signal.Signals[f"SIG{name}"]
        code = -number if name == "KILL" else 128 + number
        action = partial(signal.raise_signal, number)
        screen = call(flags_now, code, partial(strike, moment, action))
        assert "data: source" in screen  # printed at once, though piped
        if name != "KILL":
            flags_now = re.search(f"to go on: {sys.executable} {SCRIPT} (.*)", screen)[1]
    call(flags_now)
    finish(whole, 0, "screen of the whole")
    assert contents("a run") == contents("whole")
    assert not list(Path("a run").glob("*.tmp"))


def test_resume_lengthens_a_run(finished):
    """Offline, then by an online phase, as if it had been as long at once; the change is told."""
    assert "no checkpoint" in call("--resume --offline-steps 0")
    assert "offline_steps 0 -> 20" in call("--resume")
    assert "online_steps 0 -> 60" in call(f"--resume {ONLINE}")
    assert contents(RUN) == contents(finished)


def test_compiled_runs_go_on_as_if_they_had_not_ended(monkeypatch):
    """To the bit."""

    def save_and_end(*args):
        save_checkpoint(*args)
        if args[4].step == 30:
            raise KeyboardInterrupt

    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    traced_before = frames["total"]
    trqam.train(tiny("--compile --run-dir whole"))
    assert frames["total"] > traced_before
    save_checkpoint = trqam.save_checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trqam, "save_checkpoint", save_and_end)
        trqam.train(tiny("--compile"))
    trqam.train(configure("--resume"))
    assert contents(RUN) == contents("whole")


def test_resume_takes_the_settings_of_the_run(finished, capsys):
    """A flag that is given wins, and is reported if it changes something; so for --eval-only."""
    for switch in ("--resume", "--eval-only"):
        flags = "--kl-budget 2 --eval-interval 9 --batch 8"
        cfg = configure(f"--run-dir {finished} {switch} {flags}")
        assert (cfg.kl_budget, cfg.eval_interval, cfg.width, cfg.online_steps) == (2, 9, 16, 60)
        told = capsys.readouterr().out.splitlines()
        assert sorted(told) == ["eval_interval 33 -> 9", "kl_budget 0.5 -> 2.0"]


REFUSED = """
--width 17              width 16, got 17
--layers 3              layers 2, got 3
--critics 3             critics 2, got 3
--critic-start 3        critic_start 0.0, got 3.0
--chunk 4               chunk 5, got 4
--seed 3                seed 0, got 3
--scale paper           scale laptop, got paper
--env scene             env cube-.*, got scene-play-
--flow-layer-norm       flow_layer_norm False, got
--pretrained x          pretrained None, got x
--frozen-base           frozen_base False, got True
--fixed-lambda 1        fixed_lambda None, got 1.0
--pretrain-steps 9      pretrain_steps 20, got 9
--data scripted         data ogbench, got scripted
--data-seed 1           data_seed 0, got 1
--transitions 9         transitions 300000, got 9
--offline-steps 9       offline_steps 20, got 9
--offline-steps 30      offline_steps 20, got 30
--online-steps 9        online_steps 60, got 9
"""


@pytest.mark.parametrize("row", REFUSED.strip().splitlines())
def test_resume_refuses_what_a_run_can_not_take(row, finished):
    flags, text = re.split("  +", row)
    with pytest.raises(ValueError, match=f"expected the run's own {text}"):
        configure(f"--run-dir {finished} --resume {flags}")


def test_runs_go_on_on_another_device(finished):
    """Which has other random numbers."""
    path = RUN / "checkpoint.pt"
    shutil.copytree(finished, RUN)
    saved = trqam.load_checkpoint(path)
    saved["config"]["device"] = "cuda"
    saved["generator"] = saved["generator"][:16]
    torch.save(saved, path)
    assert "device cuda -> cpu" in call("--resume")


class Evil:
    """Pickled, it would make a file."""

    def __reduce__(self):
        return open, ("owned", "w")


FLOW = {"format": trqam.FORMAT, "config": {}, "dims": None, "data": "", "agent": {}, "progress": {}}
SETTINGS_OF_OTHERS = FLOW | {"dims": (28, 5), "config": {"momentum": 0.9}}
OLD = {"format": 0}
NEW = {"format": 99}


@pytest.mark.parametrize("content", [0, 20000, OLD, NEW, FLOW, SETTINGS_OF_OTHERS, [1, 2], Evil()])
def test_checkpoints_that_are_none_are_refused(content, finished):
    """Cut, of another version or crafted: they run nothing, and stay as they are."""
    path = RUN / "checkpoint.pt"
    shutil.copytree(finished, RUN)
    if isinstance(content, int):
        os.truncate(path, content)
    else:
        torch.save(content, path)
    before = files(RUN)
    with pytest.raises(OSError, match=f"a damaged, unsafe or old one.*delete {path}"):
        trqam.load_agent(path)
    call("--resume", 1)
    assert files(RUN) == before and not Path("owned").exists()


def test_pretrained_flow_replaces_pretraining():
    """Of another task's run; it is asked for once, and then learns as if it were the run's own."""
    call("--task 3 --offline-steps 0 --run-dir first")
    screen = call("--pretrain-steps 0 --pretrained first/checkpoint.pt --offline-steps 0")
    assert "evaluation at step 0: success" in screen
    first, run = (checkpoint_of(folder)["agent"] for folder in ("first", RUN))
    assert all(torch.equal(x, run[name]) for name, x in first.items() if "critic" not in name)
    shutil.rmtree("first")
    call("--resume --pretrain-steps 0 --offline-steps 20")
    run = checkpoint_of(RUN)["agent"]
    for name in ("base", "policy", "critic"):
        assert not torch.equal(run[f"{name}.weights.0"], first[f"{name}.weights.0"])


def test_second_process_in_a_run_folder_is_refused():
    with trqam.alone(RUN / "run.lock", wait=False):
        assert f"expected no other process in {RUN}, got one" in call(code=2)
    assert set(files(RUN)) <= {"run.lock"}


@pytest.mark.parametrize(
    "flags, text, step",
    [
        ("--pretrain-lr 1e9 --save-minutes 60", r"means .* before step 5, .*'flow_loss': ", 0),
        ("--pretrain-lr 1e9", "parameters at step 2, got NaN or infinity in ", 1),
        ("--lr 1e9 --save-minutes 60", r"means .* before step 25, .*'critic_loss': .*'lam': ", 20),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run(flags, text, step, played):
    """With step and terms; the checkpoint that stays is finite, and acts as far as it learnt."""
    with pytest.raises(FloatingPointError, match=text):
        trqam.train(tiny(flags))
    saved = checkpoint_of(RUN)
    assert saved["progress"]["step"] == step
    assert all(x.isfinite().all() for x in saved["agent"].values())
    agent = trqam.load_agent(RUN / "checkpoint.pt")
    assert torch.equal(vector_of(agent.policy), vector_of(agent.base))
    if step < 20:
        with pytest.raises(ValueError, match="expected a flow whose pretraining has ended"):
            trqam.flow_sizes(RUN / "checkpoint.pt")


WALK = "--scale paper --device cpu --workers 1 --width 16 --layers 2 --critics 2"
WALK += " --flow-steps 2 --batch 8 --pretrain-steps 1 --offline-steps 1 --final-episodes 1"
WALK += " --dataset-dir data --run-dir task"


@pytest.mark.parametrize("domain", [row[0] for row in ROWS[:10]])
def test_all_tasks_of_the_paper_walk(domain, monkeypatch):
    """Random data, an update of each phase and an episode of 12 steps after it, in every task."""
    cfg = configure(f"--env {domain} {WALK}")
    make = gymnasium.make
    env = make(re.sub("-(play|navigate)-", "-", cfg.env), max_episode_steps=12)
    monkeypatch.setattr(gymnasium, "make", lambda name, **_: env)
    world = env.unwrapped
    rng = np.random.default_rng(0)
    write_dataset(
        "data",
        re.sub("-singletask", "", cfg.env),
        observations=rng.normal(size=(153, *env.observation_space.shape)),
        actions=rng.uniform(-1, 1, (153, *env.action_space.shape)),
        qpos=rng.normal(size=(153, world.model.nq)),
        button_states=rng.integers(0, 2, (153, getattr(world, "_num_buttons", 0))),
    )
    for task in (1, 2, 3, 4, 5):
        cfg = configure(f"--env {domain} --task {task} {WALK}{task}")
        spec = gymnasium.spec(re.sub("-(play|navigate)-", "-", cfg.env))
        world._reward_task_id = spec.kwargs["reward_task_id"]
        trqam.train(cfg)
        assert world.cur_task_id == task
        rows = read_csv(cfg.checkpoint.with_name("eval.csv"))
        assert [(row["phase"], row["mean_length"]) for row in rows] == [
            ("pretrain", "12.0"),
            ("offline", "12.0"),
        ]


def test_full_disk_is_told_before_the_first_update():
    """Files can't grow beyond 20 kB."""
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert "error: [Errno 27]" in call(code=1, prepare=full)
    assert not {"train.csv", "checkpoint.pt"} & set(files(RUN))


# ================================================================================= command line

MISTAKES = r"""
0  --help                                   --save-minutes FLOAT(?s:.*)minutes between checkpoints
2  --env cube-sinlge                        expected --env to be one of .*cube-single, cube-double
2  --env visual-cube-single-play-singletask-v0  expected --env to be one of
2  --env scene-play-singletask-v0 --task 3  expected the --task of scene.*, got 3; give one of
2  --env cube-single-play-singletask-task2-v0 --task 3  expected the --task of cube.*, got 3; give
2  --gama 0.9                               --gama
2  --batch 1.5                              --batch
2  --scale huge                             --scale
2  --gamma 1.5                              expected --gamma in \[0, 1\], got 1.5
2  --device abacus                          expected a device that is there, got abacus
2  --device cuda:99                         a device that is there, got cuda:99; use --device cpu
2  --env humanoidmaze-teleport              expected an --env that OGBench can build, got human
2  --env antmaze-large --data scripted      expected a cube, scene or puzzle play set, got antm
2  --env antmaze-large-play-singletask-v0 --data scripted  expected a cube, scene or puzzle play
1  --env antmaze-large                      refused.*put antm.*-v0.npz and .*-val.npz into /.*data
1  --data ogbench --dataset-dir .           refused.*-val.npz into \. \(--dataset-dir\)
2  --chunk 60                               expected a chunk of 60 actions
2  --run-dir {run}                          got one in {run}; --resume it
2  --run-dir {run} --eval-only --width 17   expected the run's own width 16, got 17; leave it out
2  --run-dir {run} --resume --width 17      expected the run's own width 16, got 17; leave it
2  --run-dir {run} --resume --dataset-dir {run}/other  expected the run's data, got other ones
1  --eval-only                              No such file.*checkpoint.pt
1  --run-dir {run}/screen/run               Not a directory
1  --data scripted --dataset-dir {run}/screen/data  Not a directory
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistaken_calls(mistake, finished):
    """Exit code and a line that says what was expected, before anything is done; or --help."""
    code, flags, text = re.split("  +", mistake.format(run=finished))
    before = files(finished)
    screen = call(flags, int(code))
    assert re.search(text, screen), screen
    assert "Traceback" not in screen and "collecting" not in screen
    assert files(finished) == before


def test_file_runs_alone():
    """Copied into an empty folder, the file trains."""
    shutil.copy(SCRIPT, "trqam.py")
    subprocess.run([sys.executable, "trqam.py", *TINY.split()], check=True, timeout=300)
    assert checkpoint_of(RUN)["progress"]["step"] == 40


def test_dependencies_are_those_of_the_project():
    """The header for `uv run` and pyproject.toml name the same packages, and the same Python."""
    header = SCRIPT.read_text().split("# ///")[1]
    project = SCRIPT.with_name("pyproject.toml").read_text().split("[project")[1]
    pattern = r'"\w+>=[^"]+"|requires-python = .*'
    assert sorted(re.findall(pattern, header)) == sorted(re.findall(pattern, project))


# ====================================================================================== README


def test_readme_acts_with_a_trained_policy(finished):
    """Its lines load a checkpoint and act for an observation `obs`."""
    shutil.copytree(finished, RUN)
    readme = SCRIPT.with_name("README.md").read_text()
    names = {"trqam": trqam, "obs": np.zeros(28)}
    exec(re.search("```python\n([^`]*load_agent[^`]*)```", readme)[1], names)
    assert names["actions"].shape == (5, 5) and np.abs(names["actions"]).max() <= 1


def names_in(code):
    """The names that code, and the code inside it, asks the module for; annotations are none."""
    names = {
        x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return names.union(*(names_in(x) for x in code.co_consts if inspect.iscode(x)))


def test_the_mathematics_is_copied_alone():
    """Its text uses its own names only, and imports math, torch and collections.abc."""
    script = SCRIPT.read_text()
    text = re.search(r"(?ms)^from __future__.*?(?=^# =+ imports of the program$)", script)[0]
    imports = set(re.findall(r"(?m)^\s*(?:from|import) (\S+)", text))
    assert imports == {"__future__", "math", "torch", "collections.abc"}
    copied = {}
    exec(text, copied)
    assert names_in(compile(text, "trqam.py", "exec")) <= {*copied, *dir(builtins)}


def test_nothing_is_used_above_its_definition():
    """A class or function asks for names that stand above it, or for its own."""
    above = {*dir(builtins), "__annotations__"}
    for statement in ast.parse(SCRIPT.read_text()).body:
        code = compile(ast.Module([statement], []), "trqam.py", "exec")
        above.update(x.argval for x in dis.get_instructions(code) if x.opname == "STORE_NAME")
        assert names_in(code) <= above, f"line {statement.lineno}: {names_in(code) - above}"
