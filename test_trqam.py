"""Tests of trqam.py: golden numbers, equations, settings, networks; data, runs, resume, errors.

The theory is in test_theory.py. Runs are forked, so they are at work at once, and several go on
side by side; their environment is cube-single with episodes cut after 20 steps, their data are
random. Nothing here touches the network. `pytest -q test_trqam.py`
"""

from __future__ import annotations

import ast
import builtins
import copy
import csv
import dis
import gc
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
import traceback
import weakref
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import MagicMock

import gymnasium
import imageio
import numpy as np
import ogbench
import pytest
import torch
import torch.fx.experimental._config as fx_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import booleans, floats, integers, none, sampled_from
from torch.autograd import grad
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from torch.optim import Adam
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import trqam

torch.set_num_threads(1)
settings.register_profile("trqam", derandomize=True, deadline=None, database=None)
settings.load_profile("trqam")


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
lam_after      sum                 2.988     2.9783849548138   2.970985405985363
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
    return zip_longest(net.weights, net.biases, net.scales, net.offsets)


def fill(agent):
    """Make all parameters waves."""
    for T, name in enumerate(NETS, start=1):
        for i, layer in enumerate(layers_of(getattr(agent, name))):
            for j, p in enumerate(filter(torch.is_tensor, layer)):
                scale = 0.1 if j > 0 else math.sqrt(3 / p.shape[-2])
                p.data = wave(100 * T + 10 * i + j, scale, *p.shape) + (j == 2)


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
    """Metrics of an update of an agent or an oracle, ℓ, λ and all parameters after it."""
    metrics = getattr(agent, update)(*inputs)
    vectors = {name: vector_of(getattr(agent, name)) for name in NETS}
    return metrics | vectors | {"dual": agent.dual, "lam_after": agent.lam}


# ======================================================================================== oracle
# The equations in plain matrix algebra and autograd; of trqam.py it takes the parameters only.
# Adam and the clip are torch's: the golden numbers hold both agent and oracle to the authors'.


def network(net, *inputs):
    """Layers x W + b, between them tanh-GELU and, in a network that has its scales, LayerNorm."""
    x = torch.cat(inputs, -1)
    for i, (weight, bias, scale, offset) in enumerate(layers_of(net)):
        x = x @ weight + bias
        if i + 1 < len(net.weights):
            x = x / 2 * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3)))  # √(2/π)
        if scale is not None:
            variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
            x = (x - mean) / torch.sqrt(variance + 1e-6) * scale + offset
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

    @property
    def lam(self):
        fixed = self.cfg.fixed_lambda
        return 3 * self.dual if fixed is None else fixed + 0 * self.dual

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
        *adjoint, terminal = grad(-q.sum(), path)
        size = terminal.abs()
        sigma = g / self.lam.sqrt()
        u = 2 * torch.stack(gaps) / sigma
        target = sigma * torch.stack(adjoint)
        kl_of = 1 / (2 * K * self.lam * self.cfg.chunk)
        return {
            "lam": self.lam,
            "matching_loss": squared_norm(u + target),
            "path_kl": squared_norm(u).detach() * kl_of,
            "target_kl": squared_norm(target) * kl_of,
            "adj_mean": size.mean(),
            "adj_max": size.max(),
        }

    def descend(self, loss, lr, *names):
        """Adam by the gradient of these networks, clipped to norm 1 all together."""
        learning = [p for name in names for p in getattr(self, name).parameters()]
        self.adam = self.adam or Adam(learning, lr)
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
            moved = self.dual + 0.01 * (self.kl_ema - cfg.kl_budget)
            self.dual = moved.clamp(0.01, 100)
        return terms | {"kl_ema": self.kl_ema}


def test_golden_numbers():
    """Three updates of agent and of oracle give the published implementation's numbers."""
    for agent in (golden_agent(), Oracle(golden_agent())):
        for s in (1, 2, 3):
            got = updated(agent, "update", *golden_inputs(SMALL, s))
            for row in GOLDEN.strip().splitlines():
                name, reduction, *values = row.split()
                value = getattr(got[name], reduction)().item()
                assert value == pytest.approx(float(values[s - 1]), rel=1e-8, abs=0), row


SIZES = ["width", "layers", "critics", "chunk", "flow_steps", "batch"]
SETTINGS = {
    **dict.fromkeys(SIZES, integers(2, 4)),
    "gamma": floats(0.5, 1),
    "rho": floats(0, 2),
    "tau": floats(0.01, 0.5),
    "lr": floats(1e-4, 1e-2),
    "kl_budget": floats(0.05, 3),
    "flow_layer_norm": booleans(),
    "frozen_base": booleans(),
    "fixed_lambda": none() | floats(0.2, 5),
}


@settings(max_examples=60)
@given(
    **SETTINGS,
    dual=sampled_from([1, 0.01, 100]),
    kl_ema=sampled_from([0, 8]),
)
def test_updates_are_those_of_the_equations(dual, kl_ema, **changes):
    """One of pretraining and two after it, λ within its bracket or at an end of it."""
    agent = golden_agent(fine_tuning=False, **changes)
    inputs = golden_inputs(agent.cfg, 1)
    expected = updated(Oracle(agent), "pretrain_update", *inputs, 1e-3)
    assert_close(updated(agent, "pretrain_update", *inputs, 1e-3), expected, rtol=1e-8, atol=1e-10)
    agent.start_fine_tuning()
    fill(agent)
    agent.dual.fill_(dual)
    agent.kl_ema.fill_(kl_ema)
    oracle = Oracle(agent)
    for _ in range(2):
        expected = updated(oracle, "update", *inputs)
        assert_close(updated(agent, "update", *inputs), expected, rtol=1e-8, atol=1e-10)


def test_compiled_updates_are_those_of_the_equations():
    """To 1e-5 over 10 of pretraining, each with its own rate, and 50 after it; one state_dict."""
    agent, eager = (golden_agent(fine_tuning=False) for _ in range(2))
    trqam.compile_updates(agent)
    assert "update" in vars(agent) and "pretrain_update" in vars(agent)
    for s in range(60):
        if s == 10:
            agent.start_fine_tuning()
            eager.start_fine_tuning()
        update, rate = ("pretrain_update", [1e-3 / (1 + s)]) if s < 10 else ("update", [])
        inputs = golden_inputs(SMALL, s)
        expected = updated(eager, update, *inputs, *rate)
        assert_close(updated(agent, update, *inputs, *rate), expected, rtol=1e-5, atol=1e-5)
    assert_close(agent.state_dict(), eager.state_dict(), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_updates_stay_eager(monkeypatch, capsys):
    """And one line says why."""
    monkeypatch.setattr(torch, "compile", MagicMock(side_effect=RuntimeError("no g++\nand so on")))
    agent = golden_agent()
    trqam.compile_updates(agent)
    assert capsys.readouterr().out == "not compiled: no g++\n"
    assert "update" not in vars(agent)


# ======================================================================================== device
# On torch's `meta` device there are no numbers: what reads one on the host raises.


class Dispatched(TorchDispatchMode):
    """Notes the operations of torch, and refuses those that mix devices."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **kwargs or {})
        tensors = filter(torch.is_tensor, tree_leaves((args, kwargs, result)))
        assert len({x.device for x in tensors}) < 2
        self.operations.append(operation)
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
    seen = Dispatched()
    seen.operations = []
    with seen:
        inputs = (buffer.sample(8, generator), agent.draw_noise(8, generator))
        agent.pretrain_update(*inputs, 1e-3)
        agent.start_fine_tuning()
        agent.update(*inputs)
        seen.operations.clear()
        agent.update(*inputs)
    computing = [operation for operation in seen.operations if not operation.is_view]
    assert len(seen.operations) < 2200 and len(computing) < 1400


# ====================================================================================== settings
PAPER = """
                   chunk width flow_layer_norm gamma rho kl_budget
antmaze-large          1   512           False 0.995 0.5       1.0
antmaze-giant          1  1024            True 0.995 0.5       1.0
humanoidmaze-medium    1   512           False 0.999 0.0       0.5
humanoidmaze-large     1   512           False 0.999 0.0       1.0
scene                  5   512           False 0.995 0.5       1.0
puzzle-3x3             5   512           False 0.995 0.5       1.0
puzzle-4x4             5  1024            True 0.995 0.5       1.0
cube-double            5   512           False 0.995 0.5       1.0
cube-triple            5  1024            True 0.995 0.5       0.5
cube-quadruple         5  1024            True 0.995 0.5       1.0
cube-single            5   512           False 0.995 0.5       1.0
cube-octuple           5   512           False 0.995 0.5       1.0
puzzle-4x6             5   512           False 0.995 0.5       1.0
antsoccer-arena        1   512           False 0.995 0.5       1.0
pointmaze-medium       1   512           False 0.995 0.5       1.0
humanoidmaze-giant     1   512           False 0.999 0.0       1.0
"""  # the last six are not of the paper
COLUMNS, *ROWS = map(str.split, PAPER.splitlines()[1:])
PAPERS_FLAGS = """
--chunk 5 --width 512 --no-flow-layer-norm --gamma 0.995 --rho 0.5 --kl-budget 1 --critics 10
--layers 4 --flow-steps 10 --batch 256 --lr 3e-4 --tau 0.005 --pretrain-lr 3e-4 --no-pretrain-decay
--pretrain-steps 300000 --offline-steps 1000000 --online-steps 0 --online-start 5000
--eval-interval 50000 --eval-episodes 50 --final-episodes 50 --log-interval 1000
--transitions 1000000 --task None --fixed-lambda None --no-frozen-base
"""


def configure(flags):
    return trqam.parse(flags.split())


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_a_domain_has_the_settings_of_the_papers_table(row):
    """At the paper's scale; at the laptop's, here by the full id, those of LAPTOP beat them."""
    cfg = configure(f"--env {row[0]} --scale paper --device cpu")
    assert [str(getattr(cfg, name)) for name in COLUMNS] == row[1:]
    laptop = configure(f"--env {cfg.env} --scale laptop --device cpu")
    assert laptop == replace(cfg, scale="laptop", **trqam.LAPTOP)


@pytest.mark.parametrize("domain", ["humanoidmaze-medium", "cube-triple"])
def test_an_explicit_flag_beats_scale_and_domain(domain):
    """Even one that gives the paper's usual setting, which is the default."""
    for scale in ("paper", "laptop"):
        cfg = configure(f"--env {domain} --scale {scale} --device cpu {PAPERS_FLAGS}")
        assert cfg == trqam.Config(cfg.env, scale=scale, device="cpu", run_dir=cfg.run_dir)


@pytest.mark.parametrize("cuda", [True, False])
def test_device_and_scale_are_by_what_there_is(monkeypatch, cuda):
    """CUDA and the paper's scale where there is CUDA, else CPU and the laptop's; or as asked."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.empty", lambda *_, **__: None)  # as if the device were there
    cfg = configure("")
    assert f"{cfg.device} {cfg.width}" == ("cuda 512" if cuda else "cpu 256")
    assert configure("--device cpu").width == 256
    assert configure("--scale paper").width == 512


@pytest.mark.parametrize("domain", trqam.DOMAINS)
def test_a_domain_names_environments_of_ogbench(domain):
    """For no task and for each."""
    for task, suffix in enumerate(["", "-task1", "-task2", "-task3", "-task4", "-task5"]):
        cfg = trqam.resolve(trqam.Config(domain, task))
        name = re.sub("-(play|navigate)-", "-", cfg.env)
        assert name == f"{domain}-singletask{suffix}-v0"
        assert name in gymnasium.registry


def test_without_a_task_it_is_ogbenchs_default():
    defaults = {"cube-single": 2, "puzzle-4x4": 4, "antmaze-large": 1}
    for domain, task in defaults.items():
        env = trqam.make_env(configure(f"--env {domain}").env)
        env.reset()
        assert env.unwrapped._reward_task_id == task


RANGES = """
--task           1     5          0        6
--gamma          0     1          -1e-09   1.000000001  nan
--rho            0     100        -1e-09   100.0000001  nan
--flow-steps     2     1000       1        1001
--kl-budget      1e-06 1e6        9.99e-07 1000001.0    nan
--fixed-lambda   1e-06 1e6        9.99e-07 1000001.0    nan
--width          1     1000000000 0        1000000001
--layers         1     1000000000 0        1000000001
--critics        1     1000000000 0        1000000001
--chunk          1     1000000000 0        1000000001
--batch          1     1000000000 0        1000000001
--transitions    1     1000000000 0        1000000001
--seed           0     1000000000 -1       1000000001
--data-seed      0     1000000000 -1       1000000001
--offline-steps  0     1000000000 -1       1000000001
--online-steps   0     1000000000 -1       1000000001
--workers        1     1000000000 0        1000000001
--pretrain-steps 1     1000000000 0        1000000001
--eval-interval  1     1000000000 0        1000000001
--eval-episodes  1     1000000000 0        1000000001
--final-episodes 1     1000000000 0        1000000001
--log-interval   1     1000000000 0        1000000001
--offline-steps  0     1000000000 -1       1000000001
--online-steps   0     1000000000 -1       1000000001
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


WRONG = """
ValueError | one of .*cube-single, cube-double | --env cube-singel
ValueError | one of .*cube-single | --env visual-cube-single-play-singletask-v0
ValueError | --task of .*, got 3; give one | --env cube-single-play-singletask-task2-v0 --task 3
ValueError | --task of .*, got 3; give one | --env cube-single-play-singletask-v0 --task 3
ValueError | a device that is there, got abacus | --device abacus
ValueError | a device that is there, got cuda; use --device cpu | --device cuda
FileExistsError | a new run, got one in .*--resume it | --run-dir .
SystemExit | 2 | --scale huge
SystemExit | 2 | --batch 1.5
SystemExit | 2 | --nonsense
"""


@pytest.mark.parametrize("row", WRONG.strip().splitlines())
def test_wrong_calls_are_refused(monkeypatch, tmp_path, row):
    error, message, flags = row.split(" | ")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(getattr(builtins, error), match=message):
        configure(flags)


def test_help_documents_every_flag(monkeypatch, capsys):
    """By a text and the default, which is None for --task, --run-dir and --fixed-lambda."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit, match="0"):
        configure("--help")
    shown = re.sub(r"[│\n]", " ", capsys.readouterr().out)
    names = re.findall(r" {2}--([a-z-]+)(?:, --no-\S+)?(?: \S+)? {2,}\w.*? \(default: ", shown)
    assert [name.replace("-", "_") for name in names] == list(trqam.Config.__annotations__)
    assert shown.count("(default: None)") == 3


# ============================================================================ networks and agent


def test_networks_have_the_sizes_of_the_settings():
    """And LayerNorm after each hidden layer of the critics, in the flows where it is asked for."""
    for norm in (False, True):
        cfg = replace(SMALL, layers=1, width=9, chunk=4, flow_layer_norm=norm)
        agent = trqam.Agent(cfg, 5, 2)
        assert [p.shape for p in agent.base.weights] == [(14, 9), (9, 8)]
        assert [p.shape for p in agent.critic.weights] == [(3, 13, 9), (3, 9, 1)]
        assert len(agent.base.scales) == norm
        assert len(agent.critic.scales) == 1


def test_initial_weights_are_xavier_uniform():
    """They fill ±√(6/(n_in + n_out)) evenly, no two rows or members alike; biases are 0."""
    levels = torch.linspace(0, 1, 9)
    agent = trqam.Agent(replace(SMALL, width=256, flow_layer_norm=True), 20, 2)
    for name, p in agent.named_parameters():
        if "weights" in name:
            filled = p.flatten() / math.sqrt(6 / sum(p.shape[-2:]))
            assert 0.98 < filled.abs().max() <= 1
            assert_close(filled.quantile(levels), 2 * levels - 1, rtol=0, atol=0.1)
            assert len(p.unique(dim=0)) == len(p)
        else:
            assert (p == float("scales" in name)).all()


def test_the_seed_decides_the_networks():
    """Same seed, same start; other seed, only biases and scales the same."""
    agents = [trqam.Agent(replace(SMALL, seed=seed), 3, 2) for seed in (0, 0, 1)]
    first, same, other = map(vector_of, agents)
    assert torch.equal(first, same)
    assert first[first == other].unique().tolist() == [0, 1]


@pytest.mark.parametrize("frozen", [False, True])
def test_fine_tuning_starts_from_the_pretrained_flow(frozen):
    """v_base and v_ft are copies of it, the KL is 0; Adam has what learns and no more."""
    agent = golden_agent(fine_tuning=False, frozen_base=frozen)
    inputs = golden_inputs(SMALL, 1)
    agent.pretrain_update(*inputs, lr=0.1)
    agent.start_fine_tuning()
    assert torch.equal(vector_of(agent.target_base), vector_of(agent.base))
    learning = {*agent.critic.parameters(), *agent.policy.parameters()}
    if not frozen:
        learning.update(agent.base.parameters())
    assert set(agent.optimizer.param_groups[0]["params"]) == learning
    assert agent.update(*inputs)["path_kl"] == 0


def test_acting_is_the_flow_from_seeded_noise():
    """K Euler steps of v_ft from the generator's normals, clipped, as H actions of one chunk."""
    agent = golden_agent(flow_steps=7).float()
    generator = torch.Generator().manual_seed(2)
    x_1 = euler(agent.policy, torch.ones(1, 3), torch.randn(1, 4, generator=generator), 7)
    chunk = agent.act(np.ones(3), generator.manual_seed(2))
    assert_close(torch.tensor(chunk), x_1.view(2, 2))
    assert x_1.abs().max() == 1
    with pytest.raises(RuntimeError):
        agent.act(np.ones((2, 3)))


def test_noise_is_the_generators():
    """Normals, and uniform flow times, all independent, by the generator's state alone."""
    columns = []
    for seed in (5, 5, 6):
        noise = golden_agent().draw_noise(9999, torch.Generator().manual_seed(seed))
        noise["t_flow"] = (noise["t_flow"] - 0.5) * math.sqrt(12)
        columns.append(torch.cat([x.movedim(-2, 0).flatten(1) for x in noise.values()], 1))
    assert torch.equal(columns[0], columns[1])
    both = torch.cat(columns[1:], 1)
    assert_close(both.T @ both / 9999, torch.eye(58), rtol=0, atol=0.06)


CRITICS = {
    "huge": lambda x: 1 + x,
    "steps": lambda x: x.sign() + x.relu(),
    "nan": lambda x: torch.where(x.abs() < 0.3, torch.nan, x),
    "root": lambda x: x.abs().sqrt(),  # infinite slope at 0
}


@settings(max_examples=30)
@given(sampled_from(sorted(CRITICS)), floats(-3, 300))
def test_adversarial_critics(kind, exponent):
    """Whatever the target critic: λ in its bracket and all finite, or metrics that tell."""
    agent = golden_agent()
    agent.target_critic.forward = lambda obs, x: (
        10**exponent * CRITICS[kind](x.sum(-1, keepdim=True)).expand(3, -1, -1)
    )
    for _ in range(3):
        metrics = agent.update(*golden_inputs(SMALL, 1))
        if not all(value.isfinite() for value in metrics.values()):
            assert exponent > 60 or kind in ("nan", "root")
            break
        assert 0.0299999 <= agent.lam <= 300 and 0 <= agent.kl_ema <= 1
        assert all(x.isfinite().all() for x in agent.state_dict().values())


# ======================================================================================== copying
SOURCE = inspect.getsource(trqam)
FUNCTIONS = """
schedule flow_matching_loss sample_flow td_target simulate_sde q_gradient lean_adjoint velocity_gap
control adjoint_matching_loss path_kl path_kl_from_control closed_form_kl dual_step
"""


def test_the_mathematics_is_copied_alone():
    """Its text runs by itself, and imports math, torch and collections.abc only."""
    text = re.search(r"(?ms)^from __future__.*?(?=^# =+ imports of the program$)", SOURCE)[0]
    imports = set(re.findall(r"(?m)^\s*(?:from|import) (\S+)", text))
    assert imports == {"__future__", "math", "torch", "collections.abc"}
    namespace = {}
    exec(text, namespace)
    assert set(FUNCTIONS.split()) <= namespace.keys()


def names_in(code):
    """The names that code, and the code inside it, asks the module for; annotations are none."""
    names = {
        x.argval for x in dis.get_instructions(code) if x.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return names.union(*(names_in(x) for x in code.co_consts if inspect.iscode(x)))


def test_nothing_is_used_above_its_definition():
    """A class or function asks for names that stand above it, or for its own."""
    above = {*dir(builtins), "__annotations__"}
    for statement in ast.parse(SOURCE).body:
        code = compile(ast.Module([statement], []), "trqam.py", "exec")
        above.update(x.argval for x in dis.get_instructions(code) if x.opname == "STORE_NAME")
        assert names_in(code) <= above, f"line {statement.lineno}: {names_in(code) - above}"


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
        patch.setattr(ogbench.utils, "DATASET_URL", "http://127.0.0.1:9")
        yield


def write_dataset(folder, name="cube-single-play-v0", **changes):
    """Three random episodes of 51 states, four of which solve task 2, and as many held out."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed, end in enumerate((".npz", "-val.npz")):
        rng = np.random.default_rng(seed)
        arrays = {
            "observations": rng.normal(size=(153, 28)),
            "actions": rng.uniform(-1, 1, (153, 5)),
            "qpos": rng.normal(size=(153, 21)),
            "terminals": np.arange(153) % 51 == 50,
        }
        arrays["qpos"][10:14, 14:17] = (0.5, 0, 0.02)
        np.savez(f"{folder}/{name}{end}", **arrays | changes)


def tiny(text="") -> trqam.Config:
    return trqam.parse(f"{TINY} {text}".split())


def fork(args, screen, prepare):
    """trqam.py in a forked process, its output piped into a file; the process id."""
    if not hasattr(os, "fork"):
        pytest.skip("this system can't fork")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            sys.stdout = sys.stderr = open(screen, "w")  # noqa: SIM115
            sys.argv = [str(SCRIPT), *args]
            prepare()
            code = trqam.main()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid


def running(args, code=0, screen="screen", prepare=lambda: None):
    """A run, for `together`; it has to end with the code and to leave no process."""
    pid = fork(args, screen, prepare)
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        yield
    assert os.waitstatus_to_exitcode(done[1]) == code, Path(screen).read_text()
    with suppress(ProcessLookupError):
        while True:
            os.killpg(pid, 0)
            yield


def together(*jobs):
    """Advance generators by turns."""
    alive = list(jobs)
    deadline = time.monotonic() + 300
    while alive:
        assert time.monotonic() < deadline
        alive = [job for job in alive if next(job, "over") != "over"]
        time.sleep(0.002)


def call(text="", code=0, prepare=lambda: None) -> str:
    """A run that has to end with the code; its screen."""
    together(running(f"{TINY} {text}".split(), code, "screen", prepare))
    return Path("screen").read_text()


def strike(moment, action, *args):
    """Let the nth call of a function begin with an action."""
    name, nth = moment.split()
    owner = next(x for x in (trqam.Agent, trqam, torch, Connection) if hasattr(x, name))
    function = getattr(owner, name)
    calls = itertools.count(1)

    def struck(*own_args, **options):
        if next(calls) == int(nth):
            action(*args)
        return function(*own_args, **options)

    setattr(owner, name, struck)


def read_csv(path) -> list[dict]:
    return list(csv.DictReader(path.read_text().splitlines()))


def plain(x):
    """Tensors as lists, so that == compares all to the bit and pytest shows what differs."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [plain(v) for v in x]
    return x.tolist() if isinstance(x, torch.Tensor) else x


def contents(run_dir) -> dict:
    """All of a run that is the same to the bit in a run like it: all but times and places."""
    saved = trqam.load_checkpoint(run_dir / "checkpoint.pt")
    saved["train.csv"] = read_csv(run_dir / "train.csv")
    saved["eval.csv"] = read_csv(run_dir / "eval.csv")
    progress = saved["progress"]
    for row in [progress, *progress["train"], *saved["train.csv"]]:
        assert float(row.pop("seconds")) > 0
    for name in ("run_dir", "dataset_dir", "resume", "save_minutes"):
        saved["config"].pop(name)
    return plain(saved)


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run of all phases, with its screen."""
    folder = tmp_path_factory.mktemp("finished")
    args = f"{TINY} {ONLINE} --run-dir {folder}".split()
    together(running(args, 0, folder / "screen"))
    return folder


# ======================================================================================= replay


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 5))
def test_batches_are_the_chunks_within_episodes(lengths, H):
    """Every window of H steps in an episode, no other; Σ γ^i r_i, the smallest mask, the box."""
    assume(max(lengths) >= H)
    ends = np.cumsum(lengths)
    n = np.arange(ends[-1])
    data = {
        "observations": n[:, None],
        "next_observations": n[:, None] + 1,
        "actions": np.stack([n, -n], 1) / 40,
        "rewards": n,
        "masks": n % 7 > 0,
        "terminals": np.isin(n + 1, ends),
    }
    buffer = trqam.ReplayBuffer(data, replace(SMALL, chunk=H))
    buffer.add(data)
    batch = buffer.sample(3000, torch.Generator().manual_seed(0))
    window = batch["obs"].int().numpy() + np.arange(H)
    episode = np.searchsorted(ends, n, side="right")
    inside = [i for i in n[: len(n) - H + 1] if episode[i] == episode[i + H - 1]]
    assert set(window[:, 0]) == set(inside)
    expected = {
        "next_obs": window[:, -1:] + 1,
        "actions": np.stack([window, -window], 2).reshape(3000, -1) / 40,
        "rewards": window @ 0.9 ** np.arange(H),
        "masks": (window % 7).all(1),
    }
    expected["actions"] = expected["actions"].clip(-0.99999, 0.99999)
    for name, values in expected.items():
        np.testing.assert_allclose(batch[name], values, rtol=1e-6, err_msg=name)


def test_online_episodes_are_copied_into_the_room_for_them():
    """The data stay where they are; what is drawn is what a buffer of all at once would draw."""
    cfg = replace(SMALL, online_steps=15)
    rng = np.random.default_rng(0)

    def episodes(*lengths):
        ends = np.concatenate([np.arange(n) == n - 1 for n in lengths] or [np.zeros(0)])
        return {name: rng.normal(size=(len(ends), 2)) for name in trqam.ReplayBuffer.KEYS[:3]} | {
            "rewards": rng.normal(size=len(ends)),
            "masks": 1 - ends,
            "terminals": 1.0 * ends,
        }

    parts = [episodes(6, 1, 4), episodes(), episodes(5, 1), episodes(9)]
    buffer = trqam.ReplayBuffer(parts[0], cfg)
    places = {name: array.data_ptr() for name, array in buffer.arrays.items()}
    for part in parts[1:]:
        buffer.add(part)
    assert places == {name: array.data_ptr() for name, array in buffer.arrays.items()}
    whole = {name: np.concatenate([part[name] for part in parts]) for name in buffer.KEYS}
    other = trqam.ReplayBuffer(whole, replace(cfg, online_steps=0))
    drawn = [b.sample(99, torch.Generator().manual_seed(0)) for b in (buffer, other)]
    assert_close(*drawn, rtol=0, atol=0)
    buffer.add(parts[0])  # more than there is room for
    assert len(buffer.arrays["rewards"]) == 37


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
        return np.full(28, self.n), -self.n, solved, over and not solved, info


@pytest.mark.parametrize("i", range(6))
def test_play_yields_what_happens(i):
    """Chunks open loop; only a solved episode has mask 0: one that is cut is not over."""
    agent = trqam.Agent(SMALL, 28, 5)
    env = Corridor()
    steps = [step for step, _ in trqam.play(agent, env, trqam.PERIODIC, i)]
    noise = torch.Generator().manual_seed(env.seed)
    chunks = [agent.act(np.full(28, n), noise) for n in (0, 2, 4, 6)]
    actions = [step["actions"] for step in steps]
    np.testing.assert_array_equal(actions, np.concatenate(chunks)[:7])
    for n, step in enumerate(steps):
        over = n == 6
        assert (step["observations"][0], step["next_observations"][0]) == (n, n + 1)
        assert (step["rewards"], step["terminals"]) == (-n - 1, over)
        assert step["masks"] == 1 - over * (env.seed % 2)


def test_evaluation_averages_the_episodes():
    """Success at the end ± standard error, mean return and length."""
    row = trqam.evaluate(trqam.Agent(SMALL, 28, 5), Corridor(), 10, trqam.FINAL)
    p = np.mean([trqam.seed_of(trqam.FINAL, 0, i) % 2 for i in range(10)])
    assert 0 < p < 1
    assert (row["success"], row["stderr"]) == pytest.approx((p, math.sqrt(p * (1 - p) / 9)))
    assert (row["mean_return"], row["mean_length"], row["episodes"]) == (-28, 7, 10)


class Mirror(Corridor):
    """Rewards are the actions, starts are numpy's luck."""

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs * self.luck, float(action.sum()), *rest


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
@pytest.mark.parametrize("workers", [2, 3, 9])
def test_evaluation_does_not_depend_on_the_number_of_workers(workers):
    """To the bit, also where torch computes by several threads."""
    torch.set_num_threads(2)
    try:
        alone, apart = (
            trqam.evaluate(trqam.Agent(replace(SMALL, workers=n), 28, 5), Mirror(), 7, trqam.FINAL)
            for n in (1, workers)
        )
    finally:
        torch.set_num_threads(1)
    assert alone == apart


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_stopped_evaluation_leaves_nothing():
    """The run, all its processes or its workers are killed while an episode lasts: one line."""

    def run(name, code, line, *action):
        def prepare():
            strike("play_out 2", time.sleep, 1000)  # the second one of each worker
            strike("recv 3", *action)

        args = f"{TINY} --workers 2 --final-episodes 4 --run-dir {name}".split()
        yield from running(args, code, f"{name}.screen", prepare)
        assert line in Path(f"{name}.screen").read_text().splitlines()[-1]
        assert "Traceback" not in Path(f"{name}.screen").read_text()

    together(
        run("kill", -9, "pretrain", signal.raise_signal, signal.SIGKILL),
        run("term", 143, "stopped; the last", signal.raise_signal, signal.SIGTERM),
        run("int", 130, "stopped; the last", os.killpg, 0, signal.SIGINT),
        run("workers", 1, "exit code -9 of its process", kill_workers),
    )


def test_every_episode_has_seeds_of_its_own():
    """Of environment, numpy and noise: by --seed, stream and number, whatever came before."""

    def start(seed, stream, i):
        agent = trqam.Agent(replace(SMALL, seed=seed), 28, 5)
        env = Corridor()
        step, _ = next(trqam.play(agent, env, stream, i))
        return env.seed, env.luck, tuple(step["actions"])

    streams = (trqam.PERIODIC, trqam.FINAL, trqam.ONLINE)
    keys = list(itertools.product((0, 1), streams, range(5)))
    starts = [start(*key) for key in keys]
    for column in zip(*starts, strict=True):
        assert len(set(column)) == len(keys)
    assert [start(*key) for key in reversed(keys)] == starts[::-1]


def test_seeds_are_injective():
    """Keys that differ, if only by a 0 at the end, have different seeds."""
    keys = [key for n in (1, 2, 3, 4) for key in itertools.product((0, 1, 50), repeat=n)]
    assert len({trqam.seed_of(*key) for key in keys}) == len(keys)


def test_episodes_do_not_depend_on_what_was_played_before():
    """A used environment plays an episode as a new one, which OGBench's reset does not give."""
    agent = trqam.Agent(SMALL, 28, 5)
    env = gymnasium.make("cube-single-singletask-task1-v0", max_episode_steps=20)
    episodes = [list(trqam.play(agent, env, trqam.FINAL, 0)) for _ in range(3)]
    ends = {tuple(steps[-1][0]["next_observations"]) for steps in episodes}
    assert len(ends) == 1


@pytest.fixture
def played(monkeypatch):
    """Environments and keys of the episodes played; each is seven steps of nothing, at once."""
    keys = []
    step = dict.fromkeys(("observations", "next_observations"), np.zeros(28))
    step.update(actions=np.zeros(5), rewards=-1.0, masks=1.0)

    def play(agent, env, stream, i):
        keys.append((env.spec.id, stream, i))
        for n in range(7):
            yield step | {"terminals": n == 6}, {"success": 0.0}

    monkeypatch.setattr(trqam, "play", play)
    return keys


def test_which_episodes_are_played(played):
    """Ends of phases: final ones, between: periodic ones; online each once; all in the task."""
    text = "--pretrain-steps 4 --offline-steps 4 --online-steps 20 --online-start 5"
    cfg = tiny(f"{text} --task 1 --eval-interval 3 --eval-episodes 2 --final-episodes 3")
    trqam.train(cfg)
    env = "cube-single-singletask-task1-v0"
    expected = {(env, trqam.FINAL, i): 3 for i in range(3)}
    expected.update({(env, trqam.PERIODIC, i): 7 for i in range(2)})
    expected.update({(env, trqam.ONLINE, i): 1 for i in range(3)})
    assert Counter(played) == expected
    rows = read_csv(cfg.checkpoint.with_name("eval.csv"))
    finals = [row["step"] for row in rows if row["final"] == "1"]
    assert finals == ["4", "8", "28"] and len(rows) == 10


@pytest.mark.parametrize("flag, solved", [("--task 1", 0), ("--task 2", 4), ("", 4)])
def test_rewards_are_those_of_the_task(flag, solved):
    """Four states of the data solve task 2, which is OGBench's default; none solves task 1."""
    _, *buffers, facts = trqam.load_data(tiny(f"--chunk 1 {flag}"))
    assert facts["solved"] == solved
    for buffer in buffers:
        batch = buffer.sample(3000, torch.Generator().manual_seed(0))
        assert set(batch["rewards"].tolist()) == ({-1, 0} if solved else {-1})


# ========================================================================================= data


@pytest.mark.parametrize("domain", ["cube-single", "puzzle-3x3"])
def test_oracles_are_set_as_the_authors_did(domain, monkeypatch):
    """Noise 0.1, smoothing 0.5; on puzzles the gripper stays closed."""
    seen = MagicMock()
    monkeypatch.setattr(trqam, "collect_episode", seen)
    monkeypatch.setattr(signal, "signal", MagicMock())
    trqam.collect_share(domain, ["key"], MagicMock())
    env, oracles, *rest = seen.call_args.args
    assert rest == [domain, "key"] and env._mode == "data_collection"
    for oracle in oracles.values():
        assert (oracle._noise, oracle._noise_smoothing) == (0.1, 0.5)
    assert oracles["button"]._gripper_always_closed == (domain == "puzzle-3x3")


STACKING = "cube-single 0 0,cube-double 0 0.25,cube-triple 0.05 0.35,cube-quadruple 0.1 0.5"
STACKING += ",scene 0.5 0.5,puzzle-3x3 0.5 0.5"


@pytest.mark.parametrize("row", STACKING.split(","))
def test_episodes_are_collected_as_the_authors_did(row):
    """Each state is the one before the step; a scene that loses its cube is done again."""
    domain, low, high = row.split()

    def step(n):
        qpos = np.full(21, 0.3)
        qpos[0] = n
        qpos[16] -= n == 500
        return np.full(3, n + 1), 0, 0, 0, {"privileged/target_task": "x", "prev_qpos": qpos}

    env = MagicMock(_workspace_bounds=np.array([[0.25, -0.35, 0.02], [0.6, 0.35, 0.35]]))
    env.reset.return_value = step(-1)[::4]
    env.set_new_target.return_value = step(-1)[::4]
    env.step.side_effect = map(step, itertools.count())
    oracle = MagicMock(done=False)
    oracle.select_action.return_value = np.full(5, 1.5)
    episode = trqam.collect_episode(env, {"x": oracle}, domain, (0, 0, 7))
    seeds = [how["seed"] for _, how in env.reset.call_args_list]
    assert len(set(seeds)) == 1 + (domain == "scene")
    states = np.arange(1001) + 1001 * (domain == "scene")
    np.testing.assert_array_equal(episode["qpos"][:, 0], states)
    np.testing.assert_array_equal(episode["observations"][1:, 0], states[1:])
    assert (episode["actions"] == 1).all() and episode["terminals"].nonzero()[0] == [1000]
    p_stack = np.random.RandomState(seeds[-1]).uniform(float(low), float(high))
    assert env.set_new_target.call_args.kwargs["p_stack"] == pytest.approx(p_stack)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """Two runs that start at once on one empty folder; data collected by two workers, beside."""
    folder = tmp_path_factory.mktemp("shared")
    text = f"{TINY} --data scripted --transitions 1000 --offline-steps 0 --dataset-dir {folder}"
    runs = [f"{folder}/a", f"{folder}/b"]
    together(*(running([*text.split(), "--run-dir", run], 0, f"{run}.screen") for run in runs))
    cfg = replace(tiny(f"--run-dir {folder}/none"), transitions=1000, workers=2)
    trqam.collect(cfg, folder / "two.npz")
    return folder


def test_two_runs_on_one_empty_folder(shared):
    """One collects; the other says that it waits, and takes the same data; both train the same."""
    screens = (shared / "a.screen").read_text() + (shared / "b.screen").read_text()
    assert screens.count("collecting") == screens.count("waiting for another process") == 1
    assert contents(shared / "a") == contents(shared / "b")
    assert len(list(shared.glob("cube*"))) == 2


def test_collected_data(shared):
    """The same by one and by two workers; held-out episodes are others; states and obs agree."""
    first_actions = set()
    for end in (".npz", "-val.npz"):
        one = np.load(shared / f"cube-single-play-scripted-seed0-1k{end}")
        two = np.load(shared / f"two{end}")
        assert set(one) == {"observations", "actions", "terminals", "qpos", "qvel"}
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])
        np.testing.assert_allclose(one["observations"][:, :6], one["qpos"][:, :6], atol=1e-6)
        first_actions.add(tuple(one["actions"][0]))
    assert len(first_actions) == 2


def kill_workers():
    for process in multiprocessing.active_children():
        process.kill()


def test_killed_collection_leaves_nothing():
    """The run, all its processes or its workers are killed: no process, no dataset is left."""

    def run(name, moment, code, text, *action):
        args = f"{TINY} --data scripted --dataset-dir {name} --run-dir {name}/run".split()
        yield from running(args, code, f"{name}.screen", partial(strike, moment, *action))
        assert text in Path(f"{name}.screen").read_text()
        assert not list(Path(name).rglob("*.npz"))

    stopped = "stopped; there is no checkpoint yet"
    together(
        run("run", "recv 2", -9, "collecting", signal.raise_signal, signal.SIGKILL),
        run("early", "recv 1", 143, stopped, os.killpg, 0, signal.SIGTERM),
        run("late", "recv 2", 143, stopped, os.killpg, 0, signal.SIGTERM),
        run("workers", "recv 2", 1, "take fewer --workers", kill_workers),
    )


class Host(http.server.SimpleHTTPRequestHandler):
    """Serves this folder; of each file a part, then nothing for a while."""

    def copyfile(self, source, target):
        whole = source.read()
        target.write(whole[: len(whole) // self.server.parts])
        time.sleep(self.server.pause)


@pytest.fixture
def host(monkeypatch):
    """A host that does not answer yet; patience with it is five times shorter."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Host)
    url = f"http://127.0.0.1:{server.server_port}/host"
    monkeypatch.setattr(ogbench.utils, "DATASET_URL", url)
    patience = socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: patience(seconds / 5))
    yield server
    patience(None)


@pytest.mark.parametrize("kind", ["silent", "absent"])
def test_data_are_collected_where_no_host_answers(kind, host, played, monkeypatch, capsys):
    """And a run that began with them goes on with them, whatever else has come."""
    if kind == "absent":
        host.server_close()
    monkeypatch.setattr(trqam, "collect", lambda cfg, path: write_dataset("data", path.stem))
    trqam.train(tiny("--dataset-dir data --offline-steps 0"))
    assert "going on with data of OGBench's scripted oracles" in capsys.readouterr().out
    write_dataset("data", actions=np.zeros((153, 5)))
    trqam.train(trqam.parse(["--resume", "--offline-steps=1"]))
    assert "-scripted-" in json.loads((RUN / "config.json").read_text())["data_used"]["path"]


@pytest.mark.parametrize(
    "folder, parts, pause, text",
    [("other", 1, 0, "404"), ("host", 2, 0, "got a part"), ("host", 2, 4, "timed out")],
)
def test_data_that_come_in_part_are_an_error(folder, parts, pause, text, host):
    """Nothing is collected in their place or taken for a dataset; the next run gets the whole."""
    write_dataset(folder)
    host.parts = parts
    host.pause = pause
    threading.Thread(target=host.serve_forever, daemon=True).start()
    cfg = tiny("--dataset-dir data")
    with pytest.raises(OSError, match=text):
        trqam.prepare_data(cfg)
    assert not list(Path("data").glob("*.npz"))
    write_dataset("host")
    host.parts = 1
    trqam.prepare_data(cfg)
    assert files("data").items() >= files("host").items()


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"observations": np.zeros((153, 27))}, r"shapes \(\(28,\), .*got \(\(27,\),"),
        ({"observations": np.full((153, 28), np.nan)}, "finite observations.*nan"),
        ({"actions": np.full((153, 5), np.nan)}, r"actions in \[-1, 1\].*nan"),
        ({"actions": np.full((153, 5), 1.5)}, r"actions in \[-1, 1\].*1\.5"),
        ({"qpos": None}, "a damaged"),
        ({}, "zip"),
    ],
)
def test_damaged_datasets_are_refused(changes, text):
    """With the file, what was expected and what it holds."""
    write_dataset("data", **changes)
    if text == "zip":
        os.truncate("data/cube-single-play-v0-val.npz", 5000)
    with pytest.raises(OSError, match=rf"(?=.*data/cube-single-play-v0.npz).*{text}"):
        trqam.load_data(tiny("--dataset-dir data"))


@pytest.mark.parametrize("kind", [MemoryError, PermissionError])
def test_data_that_can_not_be_read_are_not_damaged(kind, monkeypatch):
    monkeypatch.setattr(np, "load", MagicMock(side_effect=kind("the reason")))
    with pytest.raises(kind, match=r"^the reason$"):
        trqam.load_data(tiny())


def test_data_are_in_memory_once(monkeypatch):
    """Beside the buffers no array of the dataset lives on."""
    read = ogbench.utils.load_dataset
    arrays = []

    def spy(*args, **options):
        data = read(*args, **options)
        arrays.extend(map(weakref.ref, data.values()))
        return data

    monkeypatch.setattr(ogbench.utils, "load_dataset", spy)
    loaded = trqam.load_data(tiny())
    gc.collect()
    assert len(loaded) == 4 and len(arrays) == 10
    assert {array() for array in arrays} == {None}


# ========================================================================================= runs


def test_run_end_to_end(finished):
    """All phases are trained, evaluated, logged and summed up; held-out loss of held-out data."""
    train = read_csv(finished / "train.csv")
    assert [int(row["step"]) for row in train] == [*range(5, 41, 5), *range(70, 101, 5)]
    phases = Counter(row["phase"] for row in train)
    assert phases == {"pretrain": 4, "offline": 4, "online": 7}
    assert train[0]["lam"] == "" and 0 < float(train[4]["lam"]) <= 3
    evaluated = [row["step"] + row["phase"] for row in read_csv(finished / "eval.csv")]
    assert evaluated == ["20pretrain", "40offline", "53online", "86online", "100online"]
    summary = (finished / "screen").read_text().split(f"{finished}: ")[1]
    assert re.findall(r"(\w+) +success", summary) == list(phases)
    config = json.loads((finished / "config.json").read_text())
    assert (config["online_steps"], config["torch_build"]) == (60, torch.__version__)
    assert config["data_used"]["transitions"] == 150

    saved = trqam.load_checkpoint(finished / "checkpoint.pt")
    assert saved["config"]["data"] == "ogbench"
    assert saved["online"]["terminals"].nonzero().flatten().tolist() == [19, 39, 59]
    assert saved["online"]["masks"].all()  # the episodes were cut, not solved
    agent = trqam.load_agent(finished / "checkpoint.pt")
    *_, held_out, _ = trqam.load_data(tiny())
    fixed = torch.Generator().manual_seed(0)
    batch = held_out.sample(8192, fixed)
    loss = agent.cloning_loss(batch, agent.draw_noise(8192, fixed))
    assert float(train[-1]["held_out_loss"]) == pytest.approx(loss.item())


@pytest.fixture
def updates(monkeypatch, played):
    """Learning rate, batch and noise of every update; episodes take no time."""
    seen = []

    def watch(name):
        function = getattr(trqam.Agent, name)

        def spy(agent, *args):
            metrics = function(agent, *args)
            seen.append((agent.optimizer.param_groups[0]["lr"], *args))
            return metrics

        monkeypatch.setattr(trqam.Agent, name, spy)

    watch("pretrain_update")
    watch("update")
    return seen


@pytest.mark.parametrize("decay", [True, False])
def test_learning_rate(decay, updates):
    """Cosine to 0 over the pretraining with --pretrain-decay, else constant; then --lr."""
    cfg = tiny("--pretrain-steps 4 --offline-steps 3 --pretrain-lr 0.5 --lr 0.25")
    trqam.train(replace(cfg, pretrain_decay=decay))
    trqam.train(trqam.parse(["--resume", "--offline-steps=4", "--lr=0.1"]))
    rates = [0.25 + 0.25 * math.cos(math.pi * decay * k / 4) for k in range(4)]
    assert [lr for lr, *_ in updates] == pytest.approx([*rates, 0.25, 0.25, 0.25, 0.1])


def test_batches_and_noise_come_from_the_seed(updates):
    """Another --seed, like another update, has other batches and other noise."""
    trqam.train(tiny())
    trqam.train(tiny("--seed 1"))
    drawn = [[batch["obs"], *noise.values()] for _, batch, noise, *_ in updates]
    for tensors in zip(*drawn, strict=True):
        assert len({float(x.sum()) for x in tensors}) == 80


def test_checkpoints_come_every_few_minutes(updates, monkeypatch):
    """After --save-minutes at the latest; here an update takes a minute."""
    saved = []
    monkeypatch.setattr(trqam, "save_checkpoint", lambda *args: saved.append(args[4].step))
    monkeypatch.setattr(trqam.time, "time", lambda: 60.0 * len(updates))
    trqam.train(tiny("--save-minutes 7"))
    assert saved == [0, 7, 14, 20, 27, 34, 40]


def test_checkpoint_of_a_finished_run_is_of_its_end(played):
    """Also where the last online episode is cut by the end of the run."""
    trqam.train(tiny("--online-steps 10"))
    assert trqam.load_checkpoint(RUN / "checkpoint.pt")["progress"]["step"] == 50


KILLS = {  # by --save-minutes: of 60 there are checkpoints after evaluations only
    60: "pretrain_update 7, save 2, update 3, write_csv 3, save 2, evaluate 2, update 9,"
    " write_csv 5, save 2",
    0: "save 5, pretrain_update 13, update 12, save 1, update 30",
}


def test_resume_is_exact_after_sigkill_in_every_phase(finished):
    """Killed 14 times, also while a checkpoint is written, a run ends as if it had not been."""

    def run(minutes, moments):
        folder = Path(f"run{minutes}")
        screen = Path(f"screen{minutes}")
        args = f"{TINY} {ONLINE} --save-minutes {minutes} --run-dir {folder} --resume".split()
        for moment in moments.split(","):
            kill = partial(strike, moment, signal.raise_signal, signal.SIGKILL)
            yield from running(args, -signal.SIGKILL, screen, kill)
            assert "data: source" in screen.read_text()  # printed at once, though piped
        yield from running(args, 0, screen)
        assert contents(folder) == contents(finished)
        assert not list(folder.glob("*.tmp"))

    together(*itertools.starmap(run, KILLS.items()))


STOPS = {7: "pretrain_update 8", 19: "evaluate 1", 25: "update 6", 80: "update 32"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_runs_go_on_by_the_command_they_name(number, finished):
    """Ctrl-C and SIGTERM end at once, with one line; its command goes on, exactly."""
    args = [*f"{TINY} {ONLINE} --run-dir".split(), "a run"]
    for step, moment in STOPS.items():
        stop = partial(strike, moment, signal.raise_signal, number)
        together(running(args, 128 + number, "screen", stop))
        line = Path("screen").read_text().splitlines()[-1]
        pattern = rf"trqam.py: stopped; .* of step {step}; to go on: (.*)"
        assert re.fullmatch(pattern, line), line
        python, script, *args = shlex.split(re.fullmatch(pattern, line)[1])
        assert (python, script) == (sys.executable, str(SCRIPT))
    together(running(args))
    assert contents(Path("a run")) == contents(finished)


def test_resume_lengthens_a_run(finished):
    """Offline, then by an online phase, as if it had been as long at once; the change is told."""
    call("--offline-steps 10")
    assert "offline_steps 10 -> 20" in call("--resume")
    assert "online_steps 0 -> 60" in call(f"--resume {ONLINE}")
    run = contents(RUN)
    assert [row["step"] for row in run["eval.csv"]] == ["20", "30", "40", "53", "86", "100"]
    for name in ("agent", "optimizer", "generator", "online", "train.csv"):
        assert run[name] == contents(finished)[name]


def test_resume_takes_the_settings_of_the_run(finished, capsys):
    """A flag that is given wins, and is reported if it changes something; so for --eval-only."""
    for switch in ("--resume", "--eval-only"):
        text = f"--run-dir {finished} {switch} --kl-budget 2 --eval-interval 9 --batch 8"
        cfg = trqam.parse(text.split())
        assert (cfg.kl_budget, cfg.eval_interval, cfg.width, cfg.online_steps) == (2, 9, 16, 60)
        told = capsys.readouterr().out.splitlines()
        assert sorted(told) == ["eval_interval 33 -> 9", "kl_budget 0.5 -> 2.0"]


OTHER = "env scene,task 3,scale paper,seed 3,width 17,layers 3,critics 3,flow_layer_norm,chunk 4"
OTHER += ",frozen_base,pretrain_steps 21,data scripted,transitions 9,data_seed 1"


@pytest.mark.parametrize("name", trqam.FIXED)
def test_resume_refuses_what_can_not_change(name, finished):
    flag = re.search(rf"\b{name}\b[^,]*", OTHER)[0]
    for switch in ("resume", "eval-only"):
        with pytest.raises(ValueError, match=rf"expected the (run's own |--){name} "):
            trqam.parse(f"--run-dir {finished} --{switch} --{flag}".split())


def test_resume_refuses_other_data(finished):
    """The checkpoint knows the data of its run, which stays as it was."""
    shutil.copytree(finished, RUN)
    write_dataset("data", qpos=np.zeros((153, 21)))
    with pytest.raises(ValueError, match="expected the run's data, got other ones"):
        trqam.train(tiny(f"{ONLINE} --resume --dataset-dir data"))
    assert files(RUN) == files(finished)


class Evil:
    """Pickled, it would make a file."""

    def __reduce__(self):
        return open, ("owned", "w")


@pytest.mark.parametrize("content", [b"", b"nonsense", "half", {"format": 0}, [1, 2], Evil()])
def test_checkpoints_that_are_none_are_refused(content, finished):
    """Damaged, cut, of another version or crafted: they run nothing, and stay as they are."""
    path = RUN / "checkpoint.pt"
    shutil.copytree(finished, RUN)
    if content == "half":
        os.truncate(path, path.stat().st_size // 2)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = files(RUN)
    for use in (trqam.load_agent, trqam.load_checkpoint):
        with pytest.raises(OSError, match=f"a damaged, unsafe or old one.*delete {path}"):
            use(path)
    call("--resume", 1)
    assert files(RUN) == before and not Path("owned").exists()


def test_second_process_in_a_run_folder_is_refused():
    with trqam.alone(RUN / "run.lock", wait=False):
        assert f"expected no other process in {RUN}, got one" in call(code=2)
    assert set(files(RUN)) <= {"run.lock"}


@pytest.mark.parametrize(
    "flags, text, step",
    [
        ("--pretrain-lr 1e37 --save-minutes 60", r"means .* before step 5, .*'flow_loss': ", 0),
        ("--pretrain-lr 1e37", "parameters at step 2, got NaN or infinity in ", 1),
        ("--lr 1e37 --save-minutes 60", r"means .* before step 25, .*'critic_loss': .*'lam': ", 20),
    ],
)
def test_numbers_that_are_not_finite_stop_the_run(flags, text, step, played):
    """With step and terms; the checkpoint that stays is finite."""
    with pytest.raises(FloatingPointError, match=text):
        trqam.train(tiny(flags))
    saved = trqam.load_checkpoint(RUN / "checkpoint.pt")
    assert saved["progress"]["step"] == step
    assert all(x.isfinite().all() for x in saved["agent"].values())


def test_checkpoint_within_pretraining_acts_by_the_flow(played, monkeypatch):
    """As far as it is trained, not as it began."""
    monkeypatch.setattr(trqam, "write_csv", lambda *args: sys.exit())
    with pytest.raises(SystemExit):
        trqam.train(tiny())
    agent = trqam.load_agent(RUN / "checkpoint.pt")
    acts = []
    for network in (agent.policy, agent.base, trqam.Agent(agent.cfg, 28, 5).base):
        agent.policy = network
        acts.append(agent.act(np.ones(28), torch.Generator().manual_seed(0)).tolist())
    assert acts[0] == acts[1] != acts[2]


def test_full_disk_is_told_before_the_first_update():
    """Files can't grow beyond 20 kB."""
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    assert "error: [Errno 27]" in call(code=1, prepare=full)
    assert not {"train.csv", "checkpoint.pt"} & set(files(RUN))


# ================================================================================= command line

MISTAKES = r"""
2  --env cube-sinlge                        expected --env to be one of .*cube-double
2  --gama 0.9                               --gama
2  --batch many                             many
2  --gamma 1.5                              expected --gamma in \[0, 1\], got 1.5
2  --env scene-play-singletask-v0 --task 3  expected the --task of scene.*, got 3
2  --env humanoidmaze-teleport              expected an --env that OGBench can build, got human
2  --env antmaze-large --data scripted      expected a cube, scene or puzzle play set, got antm
1  --env antmaze-large                      refused.*put antm.*-v0.npz and .*-val.npz into /.*data
1  --data ogbench --dataset-dir .           refused.*-val.npz into \. \(--dataset-dir\)
2  --chunk 60                               expected a chunk of 60 actions
2  --run-dir {run}                          got one in {run}; --resume it
2  --run-dir {run} --resume --width 17      expected the run's own width 16, got 17
1  --eval-only                              No such file.*checkpoint.pt
1  --run-dir {run}/screen/run               Not a directory
1  --data scripted --dataset-dir {run}/screen/data  Not a directory
"""


@pytest.mark.parametrize("mistake", MISTAKES.strip().splitlines())
def test_mistaken_calls(mistake, finished):
    """Exit code and a line that says what was expected, before anything is done."""
    code, flags, text = re.split("  +", mistake.format(run=finished))
    before = files(finished)
    screen = call(flags, int(code))
    assert re.search(text, screen), screen
    assert "Traceback" not in screen and "collecting" not in screen
    assert files(finished) == before


def test_eval_only_repeats_the_final_evaluation(finished):
    """And leaves the run as it is."""
    before = files(finished)
    line = call(f"{ONLINE} --eval-only --run-dir {finished}").splitlines()[-1]
    assert (finished / "screen").read_text().splitlines()[-1].endswith(line)
    assert files(finished) == before


def test_file_runs_alone():
    """Copied into an empty folder, the file trains."""
    shutil.copy(SCRIPT, "trqam.py")
    argv = [sys.executable, "trqam.py", *TINY.split()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "offline  success" in done.stdout, done.stderr


def test_dependencies_are_those_of_the_project():
    """The header for `uv run` and pyproject.toml name the same packages."""
    tomllib = pytest.importorskip("tomllib", reason="new in Python 3.11")
    header = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.M | re.S)
    script = tomllib.loads(re.sub("^# ?", "", header[1], flags=re.M))
    project = tomllib.loads(SCRIPT.with_name("pyproject.toml").read_text())["project"]
    assert sorted(script["dependencies"]) == sorted(project["dependencies"])
    assert script["requires-python"] == project["requires-python"]


# =============================================================================== README, video


def snippet(marker):
    """The Python code of the README that has the marker in it."""
    readme = SCRIPT.with_name("README.md").read_text()
    (code,) = [s for s in re.findall(r"```python\n(.*?)```", readme, re.S) if marker in s]
    return code


def test_readme_acts_with_a_trained_policy(finished):
    """Its lines load a checkpoint and act for an observation `obs`."""
    shutil.copytree(finished, RUN)
    names = {"obs": np.zeros(28)}
    exec(snippet("load_agent"), names)
    assert names["actions"].shape == (5, 5) and np.abs(names["actions"]).max() <= 1


def test_readme_lifts_the_mathematics():
    """Its lines run with a foreign flow policy, and pull it towards higher Q."""
    nets = [trqam.MLP([5, 32, 4], False, torch.Generator().manual_seed(0)) for _ in range(2)]
    v_base, v_fine = nets

    def q(x):
        return -(x - 0.5).square().sum(-1)[None]

    names = {"B": 64, "D": 4, "K": 5, "H": 2, "q": q, "v_fine": v_fine, "v_base": v_base}
    exec(snippet("kl_ema = torch.zeros"), names)
    optimizer = torch.optim.Adam(v_fine.parameters(), 1e-2)
    code = snippet("simulate_sde")
    for _ in range(150):
        optimizer.zero_grad()
        exec(code, names)
        optimizer.step()
    x_0 = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    before, after = (q(trqam.sample_flow(v, x_0, 5)).mean() for v in nets)
    assert after > before + 0.1 and names["dual"] < 1 and names["kl_ema"] > 0
    assert all(weight.grad is None for weight in v_base.weights)


class Lamp(Corridor):
    """As bright as the step is late, a bit more in an episode that is solved."""

    def render(self):
        return np.full((16, 16, 3), 30 * self.n + self.seed % 2 * 20, np.uint8)


def test_video_shows_the_episodes_as_played(finished, monkeypatch):
    """Every second step of the first three episodes of the final evaluation."""
    make = MagicMock(return_value=Lamp())
    monkeypatch.setattr(gymnasium, "make", make)
    trqam.render_video(finished / "checkpoint.pt", Path("video.gif"))
    odd = [trqam.seed_of(trqam.FINAL, 0, i) % 2 for i in range(3)]
    expected = [30 * n + 20 * bit for bit in odd for n in range(1, 8)]
    assert [frame[0, 0, 0] for frame in imageio.mimread("video.gif")] == expected[::2]
    assert make.call_args.kwargs["render_mode"] == "rgb_array"


def test_video_without_opengl_says_so(finished):
    """Where nothing can be rendered, --video says so and exits with 1."""
    blind = partial(os.environ.update, MUJOCO_GL="glfw", DISPLAY="")
    assert "OpenGL" in call(f"{ONLINE} --eval-only --video --run-dir {finished}", 1, blind)
