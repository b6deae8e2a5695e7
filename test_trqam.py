"""Tests of trqam.py as a program: golden numbers, data, networks, runs, resume, errors, README.

The theory is in test_theory.py. Nothing here touches the network. `pytest -q test_trqam.py`
"""

from __future__ import annotations

import math

import pytest
import torch

import trqam

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
    agent = trqam.Agent(trqam.resolve(trqam.Config(**sizes | settings | changes)), 3, 2).double()
    agent.reset_optimizer()
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
