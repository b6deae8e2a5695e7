"""TRQAM: Trust Region Q-Adjoint Matching (arXiv 2605.27079), in one file.

Fine-tunes a pretrained flow-matching policy with an off-policy critic, by memoryless stochastic
optimal control and adjoint matching, while one scalar λ inside the diffusion, moved by projected
dual descent, holds the path-space KL to the pretrained policy at a budget.

    python trqam.py --env cube-single                      get data, pretrain, fine-tune, evaluate
    python trqam.py --env cube-single --resume             go on where it stopped, exactly
    python trqam.py --env cube-single --eval-only          evaluate it again

    obs             s            (B, S)     observation
    x_0, x_t, x_1   x_0 x_τ x_1  (B, D)     noise, path point, action chunk (D = H·A, in [-1, 1])
    t               τ            (…, 1)     flow time (0 noise, 1 action), its step h = 1/K
    v_base(x, t)    v_base       (B, D)     velocity of the pretrained flow (its Polyak average)
    v_fine(x, t)    v_ft         (B, D)     velocity of the fine-tuned flow
    path, adjoint   X_k, ã_k     (K+1, …)   the SDE's path, the lean adjoint along it
    gap             Δv_k         (K, B, D)  v_ft − v_base along the path
    g, sigma, u     g = √λ σ, u  (K, …)     memoryless diffusion, control gain, control 2 Δv/σ
    lam, dual       λ = 3 ℓ      ()         trust-region parameter, raw multiplier
    kl_budget       ε_KL         ()         nats per action of the chunk

B batch, S state, A action, H chunk, K flow steps, E critics. Where the paper is silent or differs
we follow the authors' published code, and say so. From here to `imports of the program` nothing
but math and torch is needed: copy it into your project. For the paper read on through `agent`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "ogbench>=1.2",
#     "tyro>=1.0",
#     "gymnasium>=1.0",
#     "numpy>=1.26",
#     "tqdm>=4.66",
#     "filelock>=3.13",
# ]
# ///

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# ================================================================================ mathematics
# Pure functions: tensors and a velocity v(x, t) in, tensors out. v maps x ([K,] B, …) and t, which
# broadcasts to x, to the shape of x; what it is conditioned on is the caller's business. "…" is the
# shape of a chunk: D = H·A in this file, (H, A) in many others. Shapes are checked (ValueError).

Velocity = Callable[[Tensor, Tensor], Tensor]
Box = tuple[float, float] | None  # bounds of actions, or none
BRACKET = (0.01, 100.0)  # of the raw multiplier ℓ


def check_shape(name: str, x: Tensor, *expected: int) -> None:
    """Raise ValueError where a tensor has another shape."""
    if x.shape != expected:
        raise ValueError(f"expected {name} of shape {expected}, got {tuple(x.shape)}")


def velocity(name: str, v: Velocity, x: Tensor, t: Tensor) -> Tensor:
    """v(x, t), which has to have the shape of x."""
    out = v(x, t)
    check_shape(f"{name}(x, t)", out, *x.shape)
    return out


def pull_back(name: str, f: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor) -> Tensor:
    """(∂f/∂x)ᵀ weight at x. Raises ValueError where f does not depend on x, instead of a zero."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        out = f(x)
    if out.requires_grad:
        (gradient,) = torch.autograd.grad(out, x, weight, allow_unused=True)
        if gradient is not None:
            return gradient
    raise ValueError(f"expected a gradient of {name} to x, got none; see detach, no_grad in it")


def clip(x: Tensor, box: Box) -> Tensor:
    return x if box is None else x.clamp(*box)


def schedule(K: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Times t_k = k/K and memoryless diffusion g_k = √λ σ_k for k = 0 … K−1, each (K, 1, …, 1).

        g_k² = 2 (1 − t_k + h)/(t_k + h),  h = 1/K

    The continuous one is g² = 2(1 − t)/t; the shift by h keeps it finite (authors' code). Both
    broadcast over x (B, …). Functions of a path take K from its length, so give them whole ones.
    """
    if K < 2:
        raise ValueError(f"expected K >= 2 flow steps, got {K}")
    h = 1 / K
    t = torch.arange(K, device=x.device, dtype=x.dtype).view(K, *[1] * x.ndim) / K
    g = (2 * (1 - t + h) / (t + h)).sqrt()
    return t, g


def flow_matching_loss(v: Velocity, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """mean (v(x_t, t) − (x_1 − x_0))² at x_t = (1 − t) x_0 + t x_1; x (B, …), t (B, 1, …)."""
    check_shape("x_0", x_0, *x_1.shape)
    check_shape("t", t, len(x_1), *[1] * (x_1.ndim - 1))
    x_t = (1 - t) * x_0 + t * x_1
    return (velocity("v", v, x_t, t) - (x_1 - x_0)).square().mean()


@torch.no_grad()
def sample_flow(v: Velocity, x_0: Tensor, K: int, box: Box = (-1, 1)) -> Tensor:
    """The acting policy: K Euler steps of dx = v dt from the noise x_0 (B, …), then the clip."""
    times, _ = schedule(K, x_0)
    x = x_0
    for t in times:
        x = x + velocity("v", v, x, t) / K
    return clip(x, box)


def td_target(rewards: Tensor, masks: Tensor, q_next: Tensor, gamma_H: float, rho: float) -> Tensor:
    """y = Σ_i γ^i r_i + γ^H m (mean_E Q' − ρ std_E Q'), with the population std; (B,).

    rewards (B,) are the discounted sums over the chunk, masks (B,) 0 where the task was solved in
    it, q_next (E, B) the target critic after it, gamma_H γ^H.
    """
    pessimistic = q_next.mean(0) - rho * q_next.std(0, correction=0)
    return rewards + gamma_H * masks * pessimistic


@torch.no_grad()
def simulate_sde(
    v_fine: Velocity, v_base: Velocity, x_0: Tensor, noise: Tensor, exact: bool = False
) -> Tensor:
    """Euler–Maruyama path of the controlled memoryless SDE (Eq. 2), by the given noise.

        X_{k+1} = X_k + h (2 v_ft(X_k, t_k) − X_k/(t_k + h)) + √h g_k ε_k

    The drift is b + σu, b = 2 v_base − X/τ and σu = 2 (v_ft − v_base). The last step of the
    training chain is the noise-free X_K = X_{K−1} + h v_base (authors' code). With `exact` every
    step is controlled and noisy: for that chain Theorem 1 has no discretisation error.
    x_0 (B, …), noise (K, B, …) standard normal, of which the training chain leaves the last unused
    -> X_0 … X_K (K + 1, B, …), without gradient.
    """
    K = len(noise)
    check_shape("noise", noise, K, *x_0.shape)
    h = 1 / K
    t, g = schedule(K, x_0)
    controlled_steps = K if exact else K - 1
    path = [x_0]
    for k in range(controlled_steps):
        x = path[-1]
        drift = 2 * velocity("v_fine", v_fine, x, t[k]) - x / (t[k] + h)
        path.append(x + h * drift + math.sqrt(h) * g[k] * noise[k])
    if not exact:
        path.append(path[-1] + h * velocity("v_base", v_base, path[-1], t[-1]))
    return torch.stack(path)


def q_gradient(q: Callable[[Tensor], Tensor], x_1: Tensor, box: Box = (-1, 1)) -> Tensor:
    """∇_x mean_E Q(clip(x)), 0 for what is outside the box; q maps (B, …) to (E, B); (B, …)."""

    def mean_q(x: Tensor) -> Tensor:
        values = q(clip(x, box))
        check_shape("each critic's q(x)", values[0], len(x))
        return values.mean(0)

    return pull_back("q", mean_q, x_1, x_1.new_ones(len(x_1)))


def lean_adjoint(v_base: Velocity, path: Tensor, terminal: Tensor, exact: bool = False) -> Tensor:
    """Lean adjoint: the terminal cost's gradient, carried back through the base drift alone.

        ã_k = ã_{k+1} + h (∂_x [2 v_base(X_k, t_k + h) − X_k/(t_k + h)])ᵀ ã_{k+1}

    v_base is asked at t_k + h (authors' code); with `exact` at t_k, the time of the step, which
    makes ã the derivative of the base chain. path (K + 1, B, …), terminal ã_K = −∇Q (B, …)
    -> ã_0 … ã_K (K + 1, B, …), without gradient.
    """
    K = len(path) - 1
    check_shape("terminal", terminal, *path[0].shape)
    t, _ = schedule(K, terminal)
    adjoint = [terminal]
    for k in reversed(range(K)):
        pole = t[k] + 1 / K
        t_base = t[k] if exact else pole

        def v(x: Tensor, t: Tensor = t_base) -> Tensor:
            return velocity("v_base", v_base, x, t)

        pulled_back = pull_back("v_base", v, path[k], adjoint[-1])
        drift_gradient = 2 * pulled_back - adjoint[-1] / pole
        adjoint.append(adjoint[-1] + drift_gradient / K)
    return torch.stack(adjoint[::-1])


def velocity_gap(v_fine: Velocity, v_base: Velocity, path: Tensor) -> Tensor:
    """Δv_k = (v_ft − v_base)(X_k, t_k), k < K; path (K + 1, B, …) -> (K, B, …); ∇ to v_ft only."""
    x = path[:-1]
    t, _ = schedule(len(x), x[0])
    with torch.no_grad():
        base = velocity("v_base", v_base, x, t)
    return velocity("v_fine", v_fine, x, t) - base


def squared_norm(x: Tensor) -> Tensor:
    """Σ_k ‖x_k‖² over all but the batch; x (K, B, …) -> (B,)."""
    return x.square().flatten(2).sum((0, 2))


def adjoint_matching_loss(gap: Tensor, adjoint: Tensor, lam: Tensor | float) -> Tensor:
    """Adjoint matching (Eq. 5): mean_B Σ_k ‖u_k + σ_k ã_k‖², u_k = 2 Δv_k/σ_k, σ_k = g_k/√λ.

    gap, adjoint (K, B, …). Training pairs u_k with ã_k, lean_adjoint(…)[:-1] (authors' code);
    at the exact optimum of the discrete problem it pairs with ã_{k+1}, lean_adjoint(…)[1:].
    """
    check_shape("adjoint", adjoint, *gap.shape)
    _, g = schedule(len(gap), gap[0])
    sigma = g / lam**0.5
    u = 2 * gap / sigma
    return squared_norm(u + sigma * adjoint).mean()


def path_kl(gap: Tensor) -> Tensor:
    """KL(P^u ‖ P^base) by Girsanov (Theorem 1, Eq. 8): Σ_k (h/2λ) ‖u_k‖² = Σ_k (2h/g_k²) ‖Δv_k‖².

    λ cancels. gap (K, B, …) along paths of P^u -> nats (B,); their mean estimates the KL.
    """
    K = len(gap)
    _, g = schedule(K, gap[0])
    return 2 / K * squared_norm(gap / g)


def closed_form_kl(adjoint: Tensor, lam: Tensor | float) -> Tensor:
    """The KL as a closed form in λ, along the target u = −σã: KL(λ) = (1/2λ²) Σ_k h g_k² ‖ã_k‖².

    adjoint (K, B, …), paired as in `adjoint_matching_loss` -> nats (B,).
    """
    K = len(adjoint)
    _, g = schedule(K, adjoint[0])
    return squared_norm(g * adjoint) / (2 * lam**2 * K)


def dual_step(
    kl: Tensor,
    kl_ema: Tensor,
    dual: Tensor,
    kl_budget: float,
    lr: float = 0.01,
    rate: float = 0.1,
    bounds: tuple[float, float] = BRACKET,
) -> tuple[Tensor, Tensor]:
    """Projected dual descent (Eq. 9) on the raw multiplier ℓ, λ = 3 ℓ; scalars.

        kl_ema ← (1 − r) kl_ema + r min(KL, 2ε)
        ℓ      ← clip(ℓ + η (kl_ema − ε), ℓ_min, ℓ_max)

    KL over the budget raises λ (back to the base), under it lowers λ. -> kl_ema, ℓ
    """
    kl_ema = (1 - rate) * kl_ema + rate * kl.clamp(max=2 * kl_budget)
    dual = (dual + lr * (kl_ema - kl_budget)).clamp(*bounds)
    return kl_ema, dual


# =============================================================================== your own flow
def adapt(
    net: Callable[..., Tensor],
    *conditions: Tensor,
    event_dims: int,
    reverse: bool = False,
    stepwise: bool = False,
) -> Velocity:
    """v(x, t) of a network net(x (N, …), t (N,), *conditions (N, …)), N = B, or K·B, k outermost.

    A chunk has `event_dims` dimensions: 2 for (H, A), 1 for (D,). Conditions (B, …), such as
    observations, are repeated for each of the K steps. `reverse`: the network has its noise at
    t = 1 and predicts noise − action. `stepwise`: it is asked for one step at a time, to save
    memory, or where it holds a prefix for B rows itself.
    """

    def v(x: Tensor, t: Tensor) -> Tensor:
        if stepwise and x.ndim == event_dims + 2:
            return torch.stack([v(x[k], t[k]) for k in range(len(x))])
        for c in conditions:
            check_shape("a condition", c, x.shape[-1 - event_dims], *c.shape[1:])
        rows = x.flatten(0, -1 - event_dims)  # N = K·B, or B
        times = t.expand_as(x).reshape(len(rows), -1)[:, 0]
        repeated = [torch.cat([c] * (len(rows) // len(c))) for c in conditions]
        out = -net(rows, 1 - times, *repeated) if reverse else net(rows, times, *repeated)
        check_shape("net(x, t, …)", out, *rows.shape)
        return out.view(x.shape).to(x.dtype)

    return v


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to 1 % + 0.01, which half precision keeps."""
    return torch.allclose(a, b, 1e-2, 1e-2)


@torch.no_grad()
def first_aid(
    v_fine: Velocity,
    v_base: Velocity,
    learning: Iterable[Tensor],
    x_0: Tensor,
    x_1: Tensor,
    t: Tensor,
    box: Box = (-1, 1),
) -> float:
    """To be called once before fine-tuning: finds what would go wrong without an error.

    learning: the parameters that the optimizer moves. x_0, x_1 (B, …): noise, and chunks of your
    data, of different observations; t (B, 1, …) in (0, 1). Raises ValueError. Returns the
    flow-matching loss of v_base: if it is not near that of the pretraining, then the direction of
    time, the sign or the scale of actions differs.
    """
    if not torch.equal(x_1, clip(x_1, box)):
        raise ValueError(f"expected actions in {box}, got some outside: normalise, or give `box`")
    loss = flow_matching_loss(v_base, x_0, x_1, t).item()
    x = torch.stack([x_0, x_1])  # K = 2
    times, _ = schedule(2, x_0)
    for name, v in {"v_base": v_base, "v_fine": v_fine}.items():
        out = v(x, times)
        if not same(out, v(x, times)):
            raise ValueError(f"expected {name} to repeat itself, got dropout (use eval()) or NaN")
        if not same(out, torch.stack([v(x[k], times[k]) for k in range(2)])):
            raise ValueError(f"expected {name}(x, t)[k] to be {name}(x[k], t[k]): use `adapt`")

    before = [(p, p.clone()) for p in learning]
    base = v_base(x, times)
    fine = v_fine(x, times)
    try:
        for p, _ in before:
            p.add_(1)
        base_stays = same(base, v_base(x, times))
        fine_stays = same(fine, v_fine(x, times))
    finally:
        for p, weight in before:
            p.copy_(weight)
    if not base_stays:
        raise ValueError("expected v_base to stay where v_fine moves: deepcopy the network")
    if fine_stays:
        raise ValueError("expected v_fine to move with `learning`: are they its parameters?")
    return loss


# ======================================================================== imports of the program
import copy
import csv
import ctypes
import gc
import hashlib
import http.client
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.error
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

with suppress(ImportError):
    import triton  # noqa: F401  (it crashes if MuJoCo has loaded Mesa's LLVM before)

import gymnasium
import numpy as np
import ogbench
import torch.nn.functional as F
import tyro
from filelock import FileLock, Timeout
from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
from torch import nn
from tqdm import tqdm


# ======================================================================================= networks
class MLP(nn.Module):
    """MLP with tanh-GELU, or an ensemble of E of them evaluated as one.

    Weights ([E,] in, out) start Xavier-uniform, biases at zero; `layer_norm`: a LayerNorm with
    ε = 1e-6 after each activation.
    """

    def __init__(self, sizes: list[int], layer_norm: bool, gen: torch.Generator, *ensemble: int):
        super().__init__()
        rows = [*ensemble, 1] if ensemble else []  # of a bias, for a batch of any size
        normed = sizes[1:-1] if layer_norm else []
        self.weights = nn.ParameterList()
        for n_in, n_out in itertools.pairwise(sizes):
            uniform = 2 * torch.rand(*ensemble, n_in, n_out, generator=gen) - 1
            self.weights.append(uniform * math.sqrt(6 / (n_in + n_out)))
        self.biases = nn.ParameterList(torch.zeros(*rows, n) for n in sizes[1:])
        self.scales = nn.ParameterList(torch.ones(*rows, n) for n in normed)
        self.offsets = nn.ParameterList(torch.zeros(*rows, n) for n in normed)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(…, B or 1, in) each -> (…, B, out); an ensemble takes (B, in) -> (E, B, out)."""
        lead = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        x = torch.cat([x.expand(*lead, -1) for x in inputs], -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = F.gelu(x, approximate="tanh")
            if i > 0 and self.scales:
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
                x = torch.addcmul(self.offsets[i - 1], x, self.scales[i - 1])
            if weight.ndim == 2:
                x = F.linear(x, weight.T, bias)
            else:
                x = torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)
        return x


# ========================================================================================== agent
class Agent(nn.Module):
    """Flows, critics and trust region, and one update of them all.

    `base` learns by cloning and its Polyak copy `target_base` is v_base; `policy` is v_ft;
    `target_critic` is the Polyak copy of `critic`. λ, the KL average and all metrics are tensors
    on the device; no update reads them back. `cfg` is the `Config` of the next section.
    """

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int):
        super().__init__()
        self.cfg = cfg
        self.dims = (obs_dim, action_dim)
        self.D = cfg.chunk * action_dim
        gen = torch.Generator().manual_seed(cfg.seed)  # on the CPU: one start on every device
        hidden = [cfg.width] * cfg.layers
        self.base = MLP([obs_dim + self.D + 1, *hidden, self.D], cfg.flow_layer_norm, gen)
        self.critic = MLP([obs_dim + self.D, *hidden, 1], True, gen, cfg.critics)
        nn.init.constant_(self.critic.biases[-1], cfg.critic_start)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.dual: Tensor = nn.Buffer(torch.ones(()))  # ℓ
        self.kl_ema: Tensor = nn.Buffer(torch.zeros(()))
        self.to(cfg.device)
        self.start_fine_tuning()  # makes target_base and policy, still untrained
        self.learn(self.base)

    def learn(self, *networks: nn.Module) -> None:
        """From here on these networks learn, and no others, with a fresh Adam."""
        self.learning = [p for network in networks for p in network.parameters()]
        on_gpu = self.dual.is_cuda
        self.optimizer = torch.optim.Adam(self.learning, self.cfg.lr, capturable=on_gpu)

    def start_fine_tuning(self) -> None:
        """v_base and v_ft start from the pretrained flow."""
        self.target_base = copy.deepcopy(self.base).requires_grad_(False)
        self.policy = copy.deepcopy(self.base)
        if self.cfg.frozen_base:
            self.learn(self.critic, self.policy)
        else:
            self.learn(self.base, self.critic, self.policy)

    def draw_noise(self, B: int, generator: torch.Generator) -> dict:
        """All random numbers of one update, so that the update itself is deterministic."""
        normal = partial(torch.randn, generator=generator, device=generator.device)
        return {
            "x_next": normal(B, self.D),
            "x_flow": normal(B, self.D),
            "t_flow": torch.rand(B, 1, generator=generator, device=generator.device),
            "x_sde": normal(B, self.D),
            "sde": normal(self.cfg.flow_steps, B, self.D),
        }

    def cloning_loss(self, batch: dict, noise: dict) -> Tensor:
        """Behaviour cloning of the base flow, by flow matching."""
        v = partial(self.base, batch["obs"])
        return flow_matching_loss(v, noise["x_flow"], batch["actions"], noise["t_flow"])

    def pretrain_update(self, batch: dict, noise: dict, lr: float) -> dict:
        """One step of behaviour cloning; returns metrics, on the device."""
        flow_loss = self.cloning_loss(batch, noise)
        grad_norm = self.descend(flow_loss, lr)
        return {"flow_loss": flow_loss.detach(), "grad_norm": grad_norm}

    def update(self, batch: dict, noise: dict) -> dict:
        """One TRQAM update by `draw_noise`'s numbers; returns metrics, on the device.

        batch: obs, next_obs (B, S), actions (B, D), rewards (discounted sums) and masks (B,).
        """
        cfg = self.cfg
        obs = batch["obs"]
        next_obs = batch["next_obs"]
        v_base = partial(self.target_base, obs)
        v_fine = partial(self.policy, obs)
        lam = 3 * self.dual  # authors' code
        if cfg.fixed_lambda is not None:
            lam = torch.full_like(lam, cfg.fixed_lambda)  # QAM

        # critic: the target takes the next chunk from v_ft
        next_chunk = sample_flow(partial(self.policy, next_obs), noise["x_next"], cfg.flow_steps)
        q_next = self.target_critic(next_obs, next_chunk).squeeze(-1)
        y = td_target(batch["rewards"], batch["masks"], q_next, cfg.gamma**cfg.chunk, cfg.rho)
        q = self.critic(obs, batch["actions"]).squeeze(-1)
        critic_loss = (q - y).square().mean()

        # base flow: cloning goes on
        flow_loss = self.cloning_loss(batch, noise)

        # fine-tuned flow: simulate, carry the adjoint back, match
        path = simulate_sde(v_fine, v_base, noise["x_sde"], noise["sde"])
        terminal = -q_gradient(lambda x: self.target_critic(obs, x).squeeze(-1), path[-1])
        adjoint = lean_adjoint(v_base, path, terminal)[:-1]
        gap = velocity_gap(v_fine, v_base, path)
        matching_loss = adjoint_matching_loss(gap, adjoint, lam)

        # trust region: KL per action of the chunk, dual descent
        kl = path_kl(gap.detach()).mean() / cfg.chunk
        kl_ema, dual = dual_step(kl, self.kl_ema, self.dual, cfg.kl_budget)
        self.kl_ema.copy_(kl_ema)  # in place, as all that an update changes: see CapturedUpdate
        if cfg.fixed_lambda is None:
            self.dual.copy_(dual)

        # Polyak copies, by the parameters from before Adam (authors' code); one step for all nets
        loss = critic_loss + matching_loss
        self.polyak(self.target_critic, self.critic)
        if not cfg.frozen_base:
            loss = loss + flow_loss
            self.polyak(self.target_base, self.base)
        grad_norm = self.descend(loss, cfg.lr)
        return {
            "q_mean": q.detach().mean(),
            "critic_loss": critic_loss.detach(),
            "flow_loss": flow_loss.detach(),
            "matching_loss": matching_loss.detach(),
            "path_kl": kl,
            "kl_ema": kl_ema,
            "lam": lam,
            "target_kl": closed_form_kl(adjoint, lam).mean() / cfg.chunk,
            "adj_mean": terminal.abs().mean(),
            "adj_max": terminal.abs().max(),
            "grad_norm": grad_norm,
        }

    @torch.no_grad()
    def polyak(self, slow: nn.Module, fast: nn.Module) -> None:
        """slow ← (1 − τ) slow + τ fast, all parameters at once."""
        slow_parameters = tuple(slow.parameters())
        torch._foreach_lerp_(slow_parameters, tuple(fast.parameters()), self.cfg.tau)

    def descend(self, loss: Tensor, lr: float) -> Tensor:
        """One step of Adam by the gradient clipped to norm 1; returns the norm before the clip."""
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        return grad_norm

    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Action chunk (H, A) in ±1 for an observation (S,), by the ODE of v_ft from CPU noise."""
        x_0 = torch.randn(1, self.D, generator=generator).to(self.dual.device)
        v = partial(self.policy, torch.as_tensor(obs).to(x_0)[None])
        chunk = sample_flow(v, x_0, self.cfg.flow_steps)
        return chunk.view(self.cfg.chunk, -1).cpu().numpy()


class CapturedUpdate:
    """An update on a GPU as one CUDA graph, instead of some 1,000 kernels one by one.

    The fourth call is recorded: its agent, networks, Adam and settings are those of all later ones,
    and its tensors are overwritten by theirs, which have the same shapes.
    """

    def __init__(self, update: Callable):
        self.update = update  # `Agent.update`, or compiled
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, batch: dict, noise: dict) -> dict:
        """Like `Agent.update`; the next call overwrites the metrics."""
        self.calls += 1
        if self.calls <= 3:  # a capture wants everything to have run before
            return self.update(batch, noise)
        if self.calls == 4:
            gc.collect()  # of nodes of autograd which compiling left: they break a capture
            self.inputs = (batch, noise)
            with torch.cuda.device(batch["obs"].device), torch.cuda.graph(self.graph):
                self.metrics = self.update(batch, noise)
        for own, new in zip(self.inputs, (batch, noise), strict=True):
            for name, x in own.items():
                x.copy_(new[name])
        self.graph.replay()
        return self.metrics


# ======================================================================================= settings
# OGBench's domains, by the single tasks that it registers
DOMAINS = re.findall(r"^(?!visual-)(.+)-singletask-v0$", "\n".join(gymnasium.registry), re.M)
MAZES = [domain for domain in DOMAINS if re.search("maze|soccer", domain)]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Config:  # the defaults are the paper's; `presets` adapts them to domain and scale
    # run ------------------------------------------------------------------------------

    env: str = "cube-single"  # OGBench domain, or full id (cube-single-play-singletask-task2-v0)
    task: int | None = None  # single task 1-5; none: OGBench's default of the domain
    scale: Literal["auto", "paper", "laptop"] = "auto"  # auto: paper on CUDA, else laptop
    seed: int = 0  # of the networks, the training and the evaluation episodes
    device: str = "auto"  # cpu, cuda, mps; auto: CUDA if there is one, else CPU
    run_dir: str | None = None  # folder of the run; none: runs/<env>/seed<n>
    resume: bool = False  # go on from the run's checkpoint, if there is one, by its settings
    eval_only: bool = False  # only evaluate the run's checkpoint on --final-episodes episodes
    compile: bool = False  # TRQAM's update: by a C++ compiler, with CUDA by Triton

    # data -----------------------------------------------------------------------------

    data: Literal["auto", "ogbench", "scripted"] = "auto"  # scripted: collected here; auto: either
    # folder of datasets, downloaded or collected if need be; a set in parts is put there by hand,
    # as <name>-000.npz, <name>-000-val.npz and so on: one is trained on while the next is read
    dataset_dir: str = "~/.ogbench/data"
    dataset_url: str | None = None  # where <name>.npz is on the web; none: OGBench, then mirrors
    transitions: int = 1_000_000  # of a scripted set (cube, scene, puzzle), in episodes of 1000
    data_seed: int = 0  # seed of the collection; the number of workers does not matter
    workers: int = min(CORES, 8)  # processes that collect, 0.8 GB each, and on Linux evaluate

    # networks -------------------------------------------------------------------------

    width: int = 512  # hidden width of all networks; with --pretrained the flow's
    layers: int = 4  # hidden layers of all networks; with --pretrained the flow's
    flow_layer_norm: bool = False  # in the flows as in the critics; with --pretrained the flow's

    # critic ---------------------------------------------------------------------------

    critics: int = 10  # ensemble size E
    gamma: float = 0.995  # discount γ per environment step
    rho: float = 0.5  # pessimism ρ: targets are mean − ρ std over the critics
    critic_start: float = 0.0  # Q of untrained critics: the bias of their last layer
    tau: float = 0.005  # Polyak rate of the target critic and of v_base

    # flow and trust region ------------------------------------------------------------

    chunk: int = 5  # actions per chunk H, executed open loop
    flow_steps: int = 10  # Euler steps K of the flow and of the SDE
    # ε_KL, nats per action of the chunk: how far the policy may go from the data. The paper tunes
    # it per domain (mostly 0.5-1.5); its table was not available to us, so mostly 1.0 here
    kl_budget: float = 1.0
    fixed_lambda: float | None = None  # fix λ, no dual descent (QAM, inverse temperature 1/λ)
    frozen_base: bool = False  # keep the base flow as pretrained; else its cloning goes on

    # training -------------------------------------------------------------------------

    batch: int = 256  # chunks per update
    lr: float = 3e-4  # Adam's learning rate, offline and online
    pretrain_lr: float = 3e-4  # Adam's learning rate in pretraining
    pretrain_decay: bool = False  # cosine decay of it, to 0
    pretrain_steps: int = 300_000  # updates of behaviour cloning; with --pretrained 0
    pretrained: str | None = None  # start from the base flow of a run's checkpoint.pt
    offline_steps: int = 1_000_000  # TRQAM updates on the dataset
    online_steps: int = 0  # environment steps with one TRQAM update each (paper: 500000)
    online_start: int = 5_000  # online steps before the updates go on

    # evaluation and files -------------------------------------------------------------

    eval_interval: int = 50_000  # steps between evaluations, after pretraining
    eval_episodes: int = 50  # episodes of such an evaluation
    final_episodes: int = 50  # episodes at the end of each phase, on seeds of their own
    log_interval: int = 1_000  # updates per row of train.csv, which holds their averages
    save_minutes: float = 5.0  # minutes between checkpoints; online after the end of an episode

    @property
    def checkpoint(self) -> Path:
        """The file in `run_dir` from which a run goes on."""
        return Path(self.run_dir or "", "checkpoint.pt")


# The paper's settings, but for most ε_KL. The wide networks are for sets of 10M transitions, those
# of cube-quadruple for 100M, which come in parts (--dataset-dir)
PAPER = """
domain              chunk width flow_layer_norm gamma rho kl_budget
antmaze-large           1   512           false 0.995 0.5       1.0
antmaze-giant           1  1024            true 0.995 0.5       1.0
humanoidmaze-medium     1   512           false 0.999 0.0       0.5
humanoidmaze-large      1   512           false 0.999 0.0       1.0
scene                   5   512           false 0.995 0.5       1.0
puzzle-3x3              5   512           false 0.995 0.5       1.0
puzzle-4x4              5  1024            true 0.995 0.5       1.0
cube-double             5   512           false 0.995 0.5       1.0
cube-triple             5  1024            true 0.995 0.5       0.5
cube-quadruple          5  1024            true 0.995 0.5       1.0
"""
LAPTOP = {  # for two cores and less than an hour, data included
    "width": 256,
    "flow_steps": 5,
    "batch": 128,
    "lr": 6e-4,
    "tau": 0.01,
    "kl_budget": 0.5,
    "pretrain_lr": 1e-3,
    "pretrain_decay": True,
    "pretrain_steps": 30_000,
    "offline_steps": 10_000,
    "eval_interval": 2_000,
    "eval_episodes": 10,
    "log_interval": 250,
    "transitions": 300_000,
}
LAPTOP_OF = {  # critic_start: mean reward / (1 − γ)
    "cube-single": {"gamma": 0.99, "critics": 5, "pretrain_steps": 60_000, "offline_steps": 8_000},
    "cube-double": {"critic_start": -387.0},
    "scene": {"critic_start": -635.0, "critics": 5, "pretrain_steps": 60_000},
    "puzzle-3x3": {"critic_start": -898.0},
}


# the numbers that `check` takes, where not all from 0 to 10⁹
SIZES = ["width", "layers", "critics", "chunk", "batch", "transitions", "workers"]
SIZES += ["eval_interval", "eval_episodes", "final_episodes", "log_interval"]
LIMITS = {
    "task": (1, 5),
    "gamma": (0, 1),
    "tau": (0, 1),
    "flow_steps": (2, 1000),
    "critic_start": (-1e9, 1e9),
    "kl_budget": (1e-6, 1e6),
    "fixed_lambda": (1e-6, 1e6),
    **dict.fromkeys(SIZES, (1, 10**9)),
}


def domain_of(env: str) -> str:
    """cube-single of cube-single-play-singletask-task2-v0."""
    return env.split("-singletask")[0].rpartition("-")[0]


def presets(domain: str, scale: str) -> dict:
    """Settings of a domain at a scale; a domain that is not in the paper takes a similar one's."""
    header, *rows = map(str.split, PAPER.strip().splitlines())
    table = {name: [json.loads(x) for x in values] for name, *values in rows}
    like = "antmaze-large" if domain in MAZES else "cube-double"
    if "humanoid" in domain:
        like = "humanoidmaze-large"
    settings = dict(zip(header[1:], table.get(domain, table[like]), strict=True))
    if scale == "laptop":
        return settings | LAPTOP | LAPTOP_OF.get(domain, {})
    return settings


def resolve(cfg: Config) -> Config:
    """The settings with full id, device, scale and folder spelled out. Raises ValueError."""
    env = cfg.env
    if env in DOMAINS:
        kind = "navigate" if env in MAZES else "play"
        task = f"-task{cfg.task}" if cfg.task else ""  # without: OGBench's default
        env = f"{env}-{kind}-singletask{task}-v0"
    if domain_of(env) not in DOMAINS:
        known = f"one of {', '.join(DOMAINS)}, or a full id of one, as --help shows"
        raise ValueError(f"expected --env to be {known}, got {env}")
    if cfg.task and f"-task{cfg.task}-" not in env:
        raise ValueError(f"expected the --task of {env}, got {cfg.task}; give one of the two")
    device = cfg.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        advice = "use --device cpu or another build of torch"
        raise ValueError(f"expected a device that is there, got {device}; {advice}") from error
    scale = cfg.scale
    if scale == "auto":
        scale = "paper" if device.startswith("cuda") else "laptop"
    name = env.replace("-singletask", "").removesuffix("-v0")
    run_dir = cfg.run_dir or f"runs/{name}/seed{cfg.seed}"
    return replace(cfg, env=env, device=device, scale=scale, run_dir=run_dir)


def check(cfg: Config) -> None:
    """Raise ValueError where a number would train nonsense."""
    for name, value in asdict(cfg).items():
        low, high = LIMITS.get(name, (0, 10**9))
        if isinstance(value, (int, float)) and not low <= value <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"expected --{flag} in [{low}, {high}], got {value}; see --help")


# =========================================================================================== data
COLLECTED, PERIODIC, FINAL, ONLINE = range(4)  # streams of episode seeds
PART_STEPS = 1000  # of training by each part of a dataset in turn
STACK = {  # range of the probability that an episode of a cube domain stacks
    "cube-single": (0, 0),
    "cube-double": (0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
    "cube-octuple": (0, 0.35),
}


HOSTS = [  # OGBench's, and mirrors: one its maintainer names, one of TRQAM's authors
    ogbench.utils.DATASET_URL,
    "https://huggingface.co/datasets/zhouzypaul/ogbench_datasets/resolve/main",
    "https://huggingface.co/datasets/yonghoon96/ogbench-mirror/resolve/main",
]
SHA256 = {  # of the sets whose sums are on record
    "cube-single-play-v0": "80f3b6fd27f4f9d9e9eb6f0d07d6951559012f45b1e15ea4046ef8ecd8d3684e",
    "cube-single-play-v0-val": "96d07401bdebdc3f0ea6d56ed1333863e0962f441483adc2c43b83105046eb00",
    "cube-double-play-v0": "a73d1a33d029cedb8bc170ef94791ec585fa2d9450096f4f2a02b8cfbcf608c9",
    "cube-double-play-v0-val": "b1fcdf4bd40750351a58d0d491d6be198366ce898f0c6a2e4cb5db331966013e",
}


def seed_of(stream: int, *key: int) -> int:
    """An independent 32-bit seed for every stream and key, of any length."""
    entropy = (stream, len(key), *key)  # numpy's own padding takes (0, 1) for (0, 1, 0)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def say(text: str) -> None:
    """A line on the screen, above the bar, and at once where it is piped."""
    write = tqdm.write if sys.stderr.isatty() else print
    write(text)
    sys.stdout.flush()


def progress_bar(text: str, total: int, done: int = 0) -> tqdm:
    """A bar on a terminal; in a file the lines of `train` carry its numbers."""
    layout = "{desc:8s} {n:>7d}/{total} {rate_fmt:>10s}, {remaining} left"
    delay = 1 if sys.stderr.isatty() else math.inf
    return tqdm(total=total, desc=text, initial=done, bar_format=layout, delay=delay)


def alone(lock_file: Path, wait: bool) -> Any:
    """A lock, taken until the end of a `with`: one process at a time goes on. Raises OSError."""
    lock = FileLock(lock_file)  # makes the folder
    try:
        return lock.acquire(blocking=False)
    except Timeout as error:
        if not wait:
            text = f"expected no other process in {lock_file.parent}, got one"
            raise FileExistsError(text) from error
        say(f"waiting for another process at work in {lock_file.parent}")
        return lock.acquire()


def work(function: Callable, jobs: Sequence, pipe: Any) -> None:
    """A worker process. It ends with its parent, or where nobody reads its results any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    try:
        for job in jobs:
            pipe.send(function(job))
    except BrokenPipeError:
        pass
    except OSError as error:
        sys.exit(str(error))


def by_workers(function: Callable, jobs: Sequence, n: int) -> Iterator:
    """function(job) of each job, in turn, by n processes. Raises ChildProcessError.

    Forked, as on Linux, they have the function as it is; else it is pickled.
    """
    method = "fork" if sys.platform == "linux" else "spawn"
    context: Any = multiprocessing.get_context(method)
    workers = []
    for k in range(n):
        pipe, far_end = context.Pipe(duplex=False)
        worker = context.Process(target=work, args=(function, jobs[k::n], far_end), daemon=True)
        worker.start()
        far_end.close()
        workers.append((worker, pipe))
    for i in range(len(jobs)):
        worker, pipe = workers[i % n]
        try:
            yield pipe.recv()
        except (EOFError, OSError) as error:
            worker.join()
            raise ChildProcessError(
                f"expected a result, got exit code {worker.exitcode} of its process; it says why "
                "above, or was killed: if for memory, take fewer --workers"
            ) from error


@cache
def oracles_of(domain: str) -> tuple:
    """OGBench's environment for the collection and its oracles, by what they move."""
    env = gymnasium.make(f"{domain}-v0", mode="data_collection").unwrapped
    plan: dict = {"env": env, "noise": 0.1, "noise_smoothing": 0.5}
    closed = "puzzle" in domain
    return env, {
        "button": button_plan.ButtonPlanOracle(gripper_always_closed=closed, **plan),
        "cube": cube_plan.CubePlanOracle(**plan),
        "drawer": drawer_plan.DrawerPlanOracle(**plan),
        "window": window_plan.WindowPlanOracle(**plan),
    }


def collect_episode(domain: str, key: tuple, attempt: int = 0) -> dict:
    """A scripted "play" episode of 1001 states in OGBench's layout, as its authors made theirs."""
    env, oracles = oracles_of(domain)
    seed = seed_of(COLLECTED, *key, attempt)
    np.random.seed(seed)  # the oracles draw from numpy's global generator
    p_stack = np.random.uniform(*STACK.get(domain, (0.5, 0.5)))
    rows: list = []
    obs, info = env.reset(seed=seed)
    while len(rows) < 1001:
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        while len(rows) < 1001 and not oracle.done:
            action = np.clip(oracle.select_action(obs, info), -1, 1).astype(np.float32)
            row = {"observations": np.float32(obs), "actions": action}
            obs, *_, info = env.step(action)
            for name, value in info.items():
                if name.startswith("prev_"):  # the state before the step, which rewards are of
                    row[name.removeprefix("prev_")] = value
            rows.append(row | {"terminals": len(rows) == 1000})
        obs, info = env.set_new_target(p_stack=p_stack)
    episode = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    low, high = env._workspace_bounds
    cube = episode["qpos"][:, 14:17]  # its position
    if domain == "scene" and not np.all((low - 0.2 < cube) & (cube < high + 0.2)):
        return collect_episode(domain, key, attempt + 1)  # the cube was lost
    return episode


def collect(cfg: Config, path: Path) -> None:
    """Collect a dataset and a held-out one (5 %) with OGBench's scripted oracles."""
    say(f"collecting {path.name} by {cfg.workers} workers")
    n = math.ceil(cfg.transitions / 1000)
    # of an episode: seed, 0 for the data and 1 for those held out, number
    keys = [(cfg.data_seed, i // n, i % n) for i in range(n + math.ceil(n / 20))]
    episodes = []
    bar = progress_bar("collect", len(keys))
    function = partial(collect_episode, domain_of(cfg.env))
    for episode in by_workers(function, keys, cfg.workers):
        episodes.append(episode)
        bar.update()
        if bar.n % 50 == 0:
            say(str(bar))
    bar.close()
    held_out_path = path.with_name(f"{path.stem}-val.npz")
    for file, part in ((path, episodes[:n]), (held_out_path, episodes[n:])):
        arrays: dict = {k: np.concatenate([episode[k] for episode in part]) for k in part[0]}
        np.savez(file, **arrays)


def download(name: str, folder: Path, hosts: list) -> None:
    """Bring a set into an empty folder, from the first host that has the whole of it.

    Raises ConnectionError if no host can be reached, OSError if one can and sends something else.
    """
    socket.setdefaulttimeout(10)  # seconds, of a host that falls silent
    failures = []
    kind: type[OSError] = ConnectionError
    for host in hosts:
        ogbench.utils.DATASET_URL = host
        try:
            ogbench.download_datasets([name], str(folder))
            for file in folder.iterdir():
                digest = hashlib.sha256(file.read_bytes()).hexdigest()
                if not zipfile.is_zipfile(file) or digest != SHA256.get(file.stem, digest):
                    raise OSError(f"expected the whole of {file.name}, got a part or another file")
            return
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{error!r} of {host}")
            if isinstance(error, urllib.error.HTTPError) or any(folder.iterdir()):
                kind = OSError
        shutil.rmtree(folder)
        folder.mkdir()
    advice = f"put {name}.npz and {name}-val.npz into {folder.parent} (--dataset-dir)"
    raise kind(f"expected dataset {name}, got {'; '.join(failures)}; {advice}")


def prepare_data(cfg: Config) -> list[Path]:
    """The dataset's file, downloaded or collected where it is not there yet, or all its parts.

    An unfinished file is never taken for a dataset: files are made in a folder apart. Raises
    ValueError where such data can't be collected, OSError where they can't be had.
    """
    domain = domain_of(cfg.env)
    folder = Path(cfg.dataset_dir).expanduser()
    name = re.sub(r"-singletask(-task\d)?", "", cfg.env)
    official = folder / f"{name}.npz"
    thousands = math.ceil(cfg.transitions / 1000)
    scripted = folder / f"{domain}-play-scripted-seed{cfg.data_seed}-{thousands}k.npz"
    collectable = name == f"{domain}-play-v0" and domain not in MAZES
    if cfg.data == "scripted" and not collectable:
        raise ValueError(f"expected a cube, scene or puzzle play set, got {name}; see --data")

    path = scripted if cfg.data == "scripted" else official
    parts = sorted(folder.glob(f"{path.stem}-[0-9][0-9][0-9].npz"))
    if parts or path.exists():
        return parts or [path]
    with alone(folder / "data.lock", wait=True):
        unfinished = folder / "trqam-unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        if path == official and not path.exists():  # another process may have brought it
            try:
                download(name, unfinished, [cfg.dataset_url] if cfg.dataset_url else HOSTS)
            except ConnectionError as error:
                if cfg.data == "ogbench" or not collectable:
                    raise
                say(f"{error}; going on with data of OGBench's scripted oracles")
                path = scripted
        if path == scripted and not path.exists():
            collect(cfg, unfinished / path.name)
        for file in sorted(unfinished.iterdir()):  # -val first: the other says that both are there
            file.replace(folder / file.name)
        unfinished.rmdir()
    return [path]


def make_env(env: str, **options: Any) -> gymnasium.Env:
    """The environment of a full id. Raises ValueError."""
    try:
        return ogbench.make_env_and_datasets(env, env_only=True, **options)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # gymnasium and mujoco raise many kinds
        raise ValueError(f"expected an --env that OGBench can build, got {env}: {error}") from error


def check_data(data: dict, env: gymnasium.Env, path: Path) -> None:
    """Raise OSError unless observations are finite, actions in ±1, both of the right shapes."""
    observations = data["observations"]
    actions = data["actions"]
    shapes = env.observation_space.shape, env.action_space.shape
    got = observations.shape[1:], actions.shape[1:]
    largest = np.abs(observations).max().item(), np.abs(actions).max().item()
    if got != shapes or not np.isfinite(largest[0]) or not largest[1] < 1 + 1e-5:
        expected = f"finite observations and actions in [-1, 1] of shapes {shapes}"
        raise OSError(f"expected {expected} in {path} and -val.npz, got {got}, at most {largest}")


def read_set(env_id: str, env: gymnasium.Env, path: Path) -> tuple:
    """Transitions of a file and of its held-out one, with the task's rewards. Raises OSError."""
    try:
        sets = ogbench.make_env_and_datasets(
            env_id, dataset_path=str(path), dataset_only=True, cur_env=env
        )
    except (OSError, MemoryError):
        raise
    except Exception as error:  # numpy and zipfile raise many kinds
        text = f"expected a dataset, got a damaged {path} or its -val.npz ({error!r}); delete it"
        raise OSError(text) from error
    for data in sets:
        check_data(data, env, path)
    return sets


env_of_reader = cache(make_env)  # one for all parts: of mazes each leaves a file open


def read_part(env_id: str, paths: list, turn: int) -> dict:
    """The transitions of a dataset's part whose turn it is."""
    data, _ = read_set(env_id, env_of_reader(env_id), paths[turn % len(paths)])
    return data


class ReplayBuffer:
    """Transitions, and the chunks they form, on the device: the dataset, then online episodes.

    Of a dataset in parts it holds one at a time; `part_of` gives that of a turn.
    """

    KEYS = ("observations", "next_observations", "actions", "rewards", "masks", "terminals")

    def __init__(self, data: dict, cfg: Config, part_of: Callable | None = None):
        self.part_of = part_of
        self.turn = -1
        self.offsets = torch.arange(cfg.chunk, device=cfg.device)
        self.discounts = cfg.gamma**self.offsets
        room = len(data["rewards"]) + cfg.online_steps
        self.arrays = {}
        for name in self.KEYS:
            shape = data[name].shape[1:]
            reserved = torch.empty(room, *shape, device=cfg.device)
            self.arrays[name] = reserved.resize_(0, *shape)  # its memory stays
        self.offline = 0  # from here on transitions are online ones
        self.hold(data)
        if len(self.starts) == 0:
            raise ValueError(f"expected a chunk of {cfg.chunk} actions in the data, got none")

    def online(self) -> dict:
        """A copy of the online transitions."""
        return {name: array[self.offline :].clone() for name, array in self.arrays.items()}

    def hold(self, data: dict) -> None:
        """Take these for the dataset's transitions; the online ones stay."""
        online = self.online()
        for array in self.arrays.values():
            array.resize_(0, *array.shape[1:])  # its memory stays
        self.starts = self.offsets[:0]  # none
        self.add(data)
        self.offline = len(data["rewards"])
        self.add(online)

    def turn_to(self, turn: int) -> None:
        """Hold the part of this turn, while a process, started by the first, reads the next."""
        if self.part_of and turn != self.turn:
            if self.turn == -1:
                self.parts = by_workers(self.part_of, range(turn, 10**9), 1)
            self.hold(next(self.parts))
            self.turn = turn

    def add(self, data: dict) -> None:
        """Append whole episodes of transitions: KEYS, (N, …) each."""
        first = len(self.arrays["rewards"])
        for name, array in self.arrays.items():
            new = torch.as_tensor(data[name])
            array.resize_(first + len(new), *new.shape[1:])  # no copy as long as there is room
            array[first:] = new
        H = len(self.offsets)
        ended = F.pad(self.arrays["terminals"][first:].cumsum(0), (1, 0))  # episodes, before step s
        whole = ended[H - 1 : -1] == ended[:-H]  # as many before s + H − 1: a chunk may begin at s
        self.starts = torch.cat([self.starts, first + whole.nonzero().squeeze(-1)])

    def sample(self, B: int, generator: torch.Generator) -> dict:
        """B chunks: obs, next_obs (B, S), actions (B, D), rewards Σ γ^i r_i and masks (B,)."""
        pick = torch.randint(len(self.starts), (B, 1), generator=generator, device=generator.device)
        steps = self.starts[pick] + self.offsets  # (B, H)
        actions = self.arrays["actions"][steps].flatten(1)
        rewards = self.arrays["rewards"][steps] * self.discounts
        return {
            "obs": self.arrays["observations"][steps[:, 0]],
            "next_obs": self.arrays["next_observations"][steps[:, -1]],
            "actions": actions.clamp(-1 + 1e-5, 1 - 1e-5),  # authors' code
            "rewards": rewards.sum(1),
            "masks": self.arrays["masks"][steps].amin(1),
        }


def load_data(cfg: Config) -> tuple:
    """Environment, buffers of the data and of the held-out data, and facts about them.

    Raises OSError where they can't be had or are damaged, ValueError where none fit the settings.
    """
    env = make_env(cfg.env)
    paths = prepare_data(cfg)
    data, held_out = read_set(cfg.env, env, paths[0])
    digest = hashlib.sha256()
    for array in [*data.values(), *held_out.values()]:
        digest.update(array)
    for path in paths[1:]:
        digest.update(f"{path.name} {path.stat().st_size}".encode())
    facts = {
        "source": "scripted" if "-play-scripted-" in paths[0].name else "ogbench",
        "path": str(paths[0]),
        "transitions": len(data["rewards"]),
        "solved": int((data["masks"] == 0).sum()),
        "sha256": digest.hexdigest(),
        "parts": len(paths),
    }
    held_out_buffer = ReplayBuffer(held_out, replace(cfg, online_steps=0))
    part_of = partial(read_part, cfg.env, paths) if len(paths) > 1 else None
    return env, ReplayBuffer(data, cfg, part_of), held_out_buffer, facts


# ===================================================================================== evaluation
def play(agent: Agent, env: gymnasium.Env, stream: int, i: int) -> Iterator:
    """Play episode i of a stream, chunks open loop, its start and the policy's noise seeded by it.

    Yields each transition, by the keys of a dataset (mask: 0 where solved), and its info.
    """
    seed = seed_of(stream, agent.cfg.seed, i)
    generator = torch.Generator().manual_seed(seed)
    np.random.seed(seed)
    obs, _ = env.reset(seed=seed)
    physics = getattr(env.unwrapped, "_data", None)
    if physics:  # OGBench's reset takes steps with unseeded actions: clear what they leave
        physics.qacc_warmstart[:] = 0
    while True:
        for action in agent.act(obs, generator):
            next_obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            transition = {
                "observations": obs,
                "next_observations": next_obs,
                "actions": action,
                "rewards": float(reward),
                "masks": 1.0 - terminated,
                "terminals": done,
            }
            yield transition, info
            if done:
                return
            obs = next_obs


def play_out(agent: Agent, env: gymnasium.Env, stream: int, i: int) -> tuple:
    """Play an episode: success at its end, return and length."""
    steps = list(play(agent, env, stream, i))
    _, info = steps[-1]
    returned = sum(transition["rewards"] for transition, _ in steps)
    return float(info["success"]), returned, len(steps)


def evaluate(agent: Agent, env: gymnasium.Env, episodes: int, stream: int) -> dict:
    """Success at the end of seeded episodes with its standard error, mean return and length.

    On Linux worker processes play, on the CPU, and an episode does not depend on their number; else
    this process plays, on the agent's device. Raises ChildProcessError.
    """
    if sys.platform == "linux":
        function = partial(play_out, copy.deepcopy(agent).to("cpu"), env, stream)
        results = list(by_workers(function, range(episodes), agent.cfg.workers))
    else:
        results = [play_out(agent, env, stream, i) for i in range(episodes)]
    success, mean_return, mean_length = np.mean(results, 0).tolist()
    variance = success * (1 - success) / max(episodes - 1, 1)
    return {
        "success": success,
        "stderr": math.sqrt(variance),
        "episodes": episodes,
        "mean_return": mean_return,
        "mean_length": mean_length,
    }


# ======================================================================================= training
FORMAT = 4  # of checkpoint.pt
FLOW_LINE = "flow {flow_loss:.3f} (held out {held_out_loss:.4f})"
TRQAM_LINE = FLOW_LINE + (
    "  Q {q_mean:7.2f}  critic {critic_loss:7.3f}  match {matching_loss:7.1f}"
    "  kl {path_kl:.2f} of {kl_budget:.2f}  λ {lam:.3f}"
)
LINES = {"pretrain": FLOW_LINE, "offline": TRQAM_LINE, "online": TRQAM_LINE}
EVAL_LINE = "success {success:6.1%} ± {stderr:.1%} standard error  ({episodes} episodes)"


@dataclass
class Progress:
    """What a run remembers beside its agent, generator and buffer."""

    step: int = 0  # updates and online steps done, in all phases
    episodes: int = 0  # finished online episodes
    seconds: float = 0.0  # spent
    updates: int = 0  # since the last row of train.csv
    sums: dict = field(default_factory=dict)  # of their metrics
    train: list = field(default_factory=list)  # rows of train.csv
    eval: list = field(default_factory=list)  # rows of eval.csv

    def add(self, metrics: dict) -> None:
        """Count an update and its metrics."""
        self.updates += 1
        for name, value in metrics.items():
            self.sums[name] = value + self.sums.get(name, 0)  # a graph overwrites its metrics

    def average(self) -> dict:
        """Means since the last row. Raises FloatingPointError if one is not finite."""
        means = {name: float(total) / self.updates for name, total in self.sums.items()}
        if not all(map(math.isfinite, means.values())):
            where = f"finite means over the {self.updates} updates before step {self.step}"
            raise FloatingPointError(
                f"expected {where}, got {means}; the last checkpoint is from before"
            )
        self.updates = 0
        self.sums = {}
        return means


@contextmanager
def replacing(path: Path, mode: str = "w") -> Iterator[Any]:
    """A file that takes the name `path` when it is whole; until then the old one stays."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_csv(path: Path, rows: list) -> None:
    """All rows so far, with every column that one of them has."""
    columns = dict.fromkeys(name for row in rows for name in row)
    with replacing(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_config(path: Path, cfg: Config, facts: dict) -> None:
    """config.json: settings, data, versions and machine."""
    names = ("torch", "ogbench", "mujoco", "gymnasium", "numpy")
    info = asdict(cfg) | {
        "data_used": facts,
        "versions": {name: importlib.metadata.version(name) for name in names},
        "torch_build": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": sys.argv,
    }
    with replacing(path) as file:
        json.dump(info, file, indent=1)


def save_checkpoint(path, agent, generator, buffer, progress, facts) -> None:
    """Write all that `restore` needs. Raises FloatingPointError if a parameter is not finite."""
    bad = [name for name, x in agent.state_dict().items() if not x.isfinite().all()]
    if bad:
        where = f"finite parameters at step {progress.step}"
        raise FloatingPointError(
            f"expected {where}, got NaN or infinity in {bad}; {path} is from before"
        )
    content = {
        "format": FORMAT,
        "config": asdict(agent.cfg),
        "dims": agent.dims,
        "data": facts["sha256"],
        "agent": agent.state_dict(),
        "optimizer": agent.optimizer.state_dict(),
        "generator": generator.get_state(),
        "online": buffer.online(),
        "progress": vars(progress),
    }
    with replacing(path, "wb") as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running code from it. Raises OSError."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved["format"] != FORMAT:
            raise ValueError(f"format {saved['format']}")
        Config(**saved["config"])
        if not (saved["dims"] and {"data", "agent", "progress"} <= saved.keys()):
            raise ValueError("parts are missing")
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        expected = f"a checkpoint of format {FORMAT}"
        raise OSError(
            f"expected {expected}, got a damaged, unsafe or old one ({repr(error)[:200]}); "
            f"if so, delete {path}, or train in another --run-dir"
        ) from error
    return saved


def restore(path, agent, generator, buffer, facts) -> Progress:
    """The mirror image of `save_checkpoint`. Raises ValueError if the data are other ones."""
    saved = load_checkpoint(path)
    if saved["data"] != facts["sha256"]:
        raise ValueError(f"expected the run's data, got other ones: {facts['path']}")
    if saved["progress"]["step"] >= agent.cfg.pretrain_steps:
        agent.start_fine_tuning()
    agent.load_state_dict(saved["agent"])
    moments = {"state": saved["optimizer"]["state"]}
    agent.optimizer.load_state_dict(agent.optimizer.state_dict() | moments)
    if saved["config"]["device"] == agent.cfg.device:  # another device has its own random numbers
        generator.set_state(saved["generator"])
    buffer.add(saved["online"])
    return Progress(**saved["progress"])


def load_agent(path: str | Path, device: str = "cpu") -> Agent:
    """The agent of a run's checkpoint.pt. Raises OSError if there is none or it is damaged."""
    saved = load_checkpoint(Path(path))
    cfg = replace(Config(**saved["config"]), device=device)
    agent = Agent(cfg, *saved["dims"])
    agent.load_state_dict(saved["agent"])
    if saved["progress"]["step"] < cfg.pretrain_steps:
        agent.start_fine_tuning()  # so that it acts by the partly trained flow
    return agent


def flow_sizes(path: str) -> dict:
    """Sizes of a run's flow, in the words of `Config`.

    Raises OSError, and ValueError if its pretraining has not ended.
    """
    saved = load_checkpoint(Path(path))
    config = saved["config"]
    if saved["progress"]["step"] < config["pretrain_steps"]:
        raise ValueError(f"expected a flow whose pretraining has ended, got {path}")
    return {name: config[name] for name in ("width", "layers", "flow_layer_norm")}


def start_from(agent: Agent, path: str) -> None:
    """Take a run's cloned flow as `base`. Raises OSError, and ValueError if it has other sizes."""
    try:
        agent.base.load_state_dict(load_agent(path).base.state_dict())
    except RuntimeError as error:
        raise ValueError(f"expected a flow of the run's sizes in {path}, got {error}") from error


def learning_rate(cfg: Config, step: int) -> float:
    """Of the pretraining update after `step` others."""
    if not cfg.pretrain_decay:
        return cfg.pretrain_lr
    return cfg.pretrain_lr * (1 + math.cos(math.pi * step / cfg.pretrain_steps)) / 2


def phase_of(step: int, ends: dict) -> str:
    """The phase that contains the step; a phase ends with its last step."""
    return next(phase for phase, end in ends.items() if step <= end)


def explore(agent: Agent, buffer: ReplayBuffer, progress: Progress) -> Iterator[bool]:
    """A step in the environment at a time; yields whether it was the last of its episode.

    Only then the episode enters the buffer.
    """
    env = make_env(agent.cfg.env)
    while True:
        transitions = []
        for transition, _ in play(agent, env, ONLINE, progress.episodes):
            transitions.append(transition)
            if transition["terminals"]:
                buffer.add({name: np.stack([t[name] for t in transitions]) for name in buffer.KEYS})
                progress.episodes += 1
            yield transition["terminals"]


def compile_update(agent: Agent) -> Callable:
    """`Agent.update` through torch.compile, or as it is, with a line that says why."""
    global pull_back
    options: dict = {"cpp.use_decompose_tanh": True}  # GELU's tanh by exp: 1e-7 off, and faster
    try:
        torch.compile(F.gelu, options=options)(agent.dual)
    except Exception as error:  # torch raises many kinds
        say(f"not compiled, for want of a compiler or torch 2.8: {error!r:.200}")
        return agent.update
    say("TRQAM's first update will be compiled, which takes a minute")
    # a traced Adam is 3e-5 off
    Agent.descend = torch.compiler.disable(Agent.descend)  # type: ignore[method-assign]
    pull_back = torch.compiler.disable(pull_back, recursive=False)  # else traced anew on torch 2.15
    return torch.compile(agent.update, options=options)


def fast_update(agent: Agent) -> Callable:
    """`Agent.update`, compiled where it is set, and on a GPU as a CUDA graph."""
    update = agent.update
    if agent.cfg.compile and agent.dual.device.type in ("cpu", "cuda"):
        update = compile_update(agent)
    return CapturedUpdate(update) if agent.dual.is_cuda else update


def train(cfg: Config) -> None:
    """Pretraining, offline and online fine-tuning in one loop, a step at a time.

    A step is an update; online it is an environment step and an update. Raises OSError,
    FloatingPointError, and ValueError if the data are not the checkpoint's.
    """
    # the state: new, or from a checkpoint
    run_dir = cfg.checkpoint.parent
    run_dir.mkdir(parents=True, exist_ok=True)
    env, buffer, held_out_buffer, facts = load_data(cfg)
    say("data: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    cfg = replace(cfg, data=facts["source"], resume=False)  # as the checkpoint shall tell them
    agent = Agent(cfg, *env.observation_space.shape, *env.action_space.shape)
    fixed = torch.Generator(cfg.device).manual_seed(0)
    held_out = (held_out_buffer.sample(8192, fixed), agent.draw_noise(8192, fixed))  # one for all
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)  # of batches and updates
    progress = Progress()
    if cfg.checkpoint.exists():
        progress = restore(cfg.checkpoint, agent, generator, buffer, facts)
        say(f"resuming at step {progress.step}")
    elif cfg.pretrained:
        start_from(agent, cfg.pretrained)
    write_config(run_dir / "config.json", cfg, facts)

    # the plan: which step ends a phase, and when to evaluate
    lengths = [cfg.pretrain_steps, cfg.offline_steps, cfg.online_steps]
    ends = dict(zip(LINES, itertools.accumulate(lengths), strict=True))
    evaluations = {*range(ends["pretrain"], ends["online"], cfg.eval_interval), *ends.values()}
    update = fast_update(agent)
    online = explore(agent, buffer, progress)
    whole = True  # no online episode is under way, which a checkpoint would lose
    save_time = 0.0  # from when on a checkpoint is due: now
    began = time.time() - progress.seconds
    bar = progress_bar("", 0)
    while True:
        # evaluate, save, stop
        step = progress.step
        if step == ends["pretrain"]:
            agent.start_fine_tuning()
        if step in evaluations and step not in [row["step"] for row in progress.eval]:
            final = step in ends.values()
            episodes = cfg.final_episodes if final else cfg.eval_episodes
            result = evaluate(agent, env, episodes, FINAL if final else PERIODIC)
            row = {"step": step, "phase": phase_of(step, ends), "final": int(final), **result}
            progress.eval.append(row)
            write_csv(run_dir / "eval.csv", progress.eval)
            say(f"evaluation at step {step}: {EVAL_LINE.format(**row)}")
            save_time = 0.0
        if (whole or step == ends["online"]) and time.time() >= save_time:
            progress.seconds = time.time() - began
            save_checkpoint(cfg.checkpoint, agent, generator, buffer, progress, facts)
            save_time = time.time() + 60 * cfg.save_minutes
        if step >= ends["online"]:
            break

        # else one step: in the environment if online, one update, a row of averages when due
        progress.step = step = step + 1
        phase = phase_of(step, ends)
        if bar.desc != phase:
            bar.close()
            bar = progress_bar(phase, ends[phase], step - 1)
        if phase == "online":
            whole = next(online)
        buffer.turn_to((step - 1) // PART_STEPS)
        if phase != "online" or step > ends["offline"] + cfg.online_start:
            batch = buffer.sample(cfg.batch, generator)
            noise = agent.draw_noise(cfg.batch, generator)
            if phase == "pretrain":
                progress.add(agent.pretrain_update(batch, noise, learning_rate(cfg, step - 1)))
            else:
                progress.add(update(batch, noise))
        bar.update()
        if progress.updates and (step % cfg.log_interval == 0 or step in ends.values()):
            row = {"step": step, "phase": phase, **progress.average(), "kl_budget": cfg.kl_budget}
            with torch.no_grad():
                row["held_out_loss"] = agent.cloning_loss(*held_out).item()
            row["seconds"] = time.time() - began
            progress.train.append(row)
            write_csv(run_dir / "train.csv", progress.train)
            say(f"{bar}  {LINES[phase].format(**row)}")
    bar.close()
    say(f"{run_dir}: {tqdm.format_interval(progress.seconds)} in all")
    for row in progress.eval:
        if row["final"]:
            say(f"  {row['phase']:8s} to step {row['step']}: {EVAL_LINE.format(**row)}")


# =================================================================================== command line
# what a run that goes on can't change
FIXED = ["env", "scale", "seed", "data", "transitions", "data_seed", "pretrain_steps", "pretrained"]
FIXED += ["width", "layers", "flow_layer_norm", "critics", "critic_start", "chunk"]
FIXED += ["frozen_base", "fixed_lambda"]  # a run is of one method


def report_changes(saved: dict, cfg: Config) -> None:
    """Say what the flags change in a run that goes on. Raises ValueError where it can't take it."""
    fixed = list(FIXED)
    if saved["progress"]["step"] > cfg.pretrain_steps + saved["config"]["offline_steps"]:
        fixed.append("offline_steps")  # that phase is over
    for name, old in asdict(Config(**saved["config"])).items():
        new = getattr(cfg, name)
        if new == old or name in ("run_dir", "resume", "eval_only"):
            continue
        shorter = name in ("offline_steps", "online_steps") and new < old
        if name in fixed or shorter:
            advice = "leave it out, or take another --run-dir"
            raise ValueError(f"expected the run's own {name} {old}, got {new}; {advice}")
        say(f"{name} {old} -> {new}")


def parse(args: list[str]) -> Config:
    """Settings: flag > sizes of --pretrained > laptop > paper, domain first; or flag > checkpoint.

    Raises ValueError, FileExistsError, OSError; SystemExit where tyro finds the call wrong.
    """
    no_help = [arg for arg in args if arg not in ("-h", "--help")]
    cfg = resolve(tyro.cli(Config, args=no_help))  # only for what the defaults depend on
    saved = None
    if cfg.eval_only or (cfg.resume and cfg.checkpoint.exists()):
        saved = load_checkpoint(cfg.checkpoint)
        default = Config(**saved["config"] | {"run_dir": cfg.run_dir})
    else:
        default = Config(**presets(domain_of(cfg.env), cfg.scale))
        if cfg.scale == "laptop" and cfg.device.startswith("cpu"):
            default = replace(default, compile=True)  # on a GPU it pays from 90k such updates on
        if cfg.pretrained:
            default = replace(default, pretrain_steps=0, **flow_sizes(cfg.pretrained))
    about = __doc__.split("\n    obs ")[0]
    cfg = resolve(tyro.cli(Config, args=args, default=default, description=about))
    check(cfg)
    if saved:
        report_changes(saved, cfg)
    elif cfg.checkpoint.exists():
        advice = "--resume it, or take another --run-dir"
        raise FileExistsError(f"expected a new run, got one in {cfg.run_dir}; {advice}")
    elif cfg.resume:
        say(f"no checkpoint in {cfg.run_dir} yet: a new run")
    return cfg


def stop(checkpoint: Path, number: int, frame: object) -> None:
    """Ctrl-C and SIGTERM: end at once. What came after the last checkpoint is done again."""
    text = "there is no checkpoint yet"
    if checkpoint.exists():
        step = load_checkpoint(checkpoint)["progress"]["step"]
        words = [sys.executable, sys.argv[0], "--resume", "--run-dir", str(checkpoint.parent)]
        text = f"the last checkpoint is of step {step}; to go on: {shlex.join(words)}"
    print(f"trqam.py: stopped; {text}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def keep_freed_memory() -> None:
    """glibc returns freed memory to the system, and gets it back page by page at the next update.

    To keep it shortens an update on a CPU, at laptop size by 8 to 20 %. Others have no such call.
    """
    M_TRIM_THRESHOLD = -1
    M_MMAP_THRESHOLD = -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)


def main() -> int:
    """The command line. Exit codes: 0 done, 1 failed, 2 a wrong call, 130 and 143 stopped."""
    warnings.filterwarnings("ignore", module="gymnasium|glfw")
    keep_freed_memory()
    try:
        cfg = parse(sys.argv[1:])
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, partial(stop, cfg.checkpoint))
        say(" ".join(f"{name}={value}" for name, value in asdict(cfg).items()))
        if cfg.eval_only:
            agent = load_agent(cfg.checkpoint, cfg.device)
            agent.cfg = cfg
            row = evaluate(agent, make_env(cfg.env), cfg.final_episodes, FINAL)
            say(EVAL_LINE.format(**row))
        else:
            with alone(cfg.checkpoint.with_name("run.lock"), wait=False):
                train(cfg)
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        print(f"trqam.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (ValueError, FileExistsError)) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
