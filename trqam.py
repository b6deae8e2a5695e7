"""TRQAM: Trust Region Q-Adjoint Matching (arXiv 2605.27079), in one file.

Fine-tunes a pretrained flow-matching policy with an off-policy critic, by memoryless stochastic
optimal control and adjoint matching, while one scalar λ inside the diffusion, moved by projected
dual descent, holds the path-space KL to the pretrained policy at a budget.

    python trqam.py --env cube-single                      collect data, pretrain, fine-tune
    python trqam.py --env cube-single --resume             go on where it stopped, exactly
    python trqam.py --env cube-single --eval-only --video  evaluate it and look at it

    obs             s            (B, S)     observation
    x_0, x_t, x_1   x_0 x_τ x_1  (B, D)     noise, path point, action chunk (D = H·A, in [-1, 1])
    t, h            τ, h = 1/K   (…, 1)     flow time (0 noise, 1 action) and step
    v_base          v_base       (B, D)     velocity of the pretrained flow (its Polyak average)
    v_fine, gap     v_ft, Δv     (K, B, D)  velocity of the fine-tuned flow, v_ft − v_base
    g, sigma        g = √λ σ     (K, 1, 1)  memoryless diffusion, control gain
    u, adjoint      u, ã         (K, B, D)  control 2 Δv/σ, lean adjoint
    lam, dual       λ = 3 ℓ      ()         trust-region parameter, raw multiplier
    kl_budget       ε_KL         ()         nats per action of the chunk

B batch, S state, A action, H chunk, K flow steps, E critics. Where the paper is silent or differs
we follow the authors' published code, and say so. For the paper read `networks` to `agent`.
"""

from __future__ import annotations

import copy
import ctypes.util
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

if sys.platform == "linux" and ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display

import gymnasium
import imageio
import numpy as np
import ogbench
import torch
import torch.nn.functional as F
import tyro
from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan
from torch import Tensor, nn
from tqdm import tqdm

# ======================================================================================= settings
DOMAINS = re.findall(r"^(?!visual-)(.+)-singletask-v0$", "\n".join(gymnasium.registry), re.M)
MAZES = [domain for domain in DOMAINS if re.search("maze|soccer", domain)]
KINDS = "play|noisy|navigate|stitch|explore"
LAPTOP: dict[str, Any] = dict(width=256, flow_steps=5, batch=128, lr=6e-4, tau=0.01, kl_budget=0.5)
LAPTOP |= dict(pretrain_lr=1e-3, pretrain_decay=True, pretrain_steps=30_000, offline_steps=8_000)
LAPTOP |= dict(eval_interval=2_000, eval_episodes=10, log_interval=250, save_interval=500)
LAPTOP |= dict(transitions=300_000)  # what 2 cores finish in 40 minutes
MAY_CHANGE = ["resume", "eval_only", "video", "benchmark", "run_dir", "dataset_dir", "cache_dir"]
MAY_CHANGE += ["workers"]  # on --resume, as they say where and how to run, not what
RANGES: dict[Any, tuple] = {int: (1, 10**9), float: (0, 1)}  # by type, or by name:
RANGES |= dict(task=(0, 5), flow_steps=(2, 1000), rho=(0, 100), kl_budget=(1e-6, 1e6))
RANGES |= dict(fixed_lambda=(0, 1e6), transitions=(1000, 10**9))
FROM_0 = ("seed", "data_seed", "offline_steps", "online_steps", "online_start")
RANGES |= dict.fromkeys(FROM_0, (0, 10**9)) | dict.fromkeys(("lr", "pretrain_lr", "tau"), (1e-9, 1))


@dataclass(frozen=True)
class Config:  # the defaults are the paper's; `parse` adapts them to the domain and the scale
    env: str = "cube-single"  # OGBench domain, or full id (cube-single-play-singletask-task2-v0)
    task: int = 0  # single task 1-5; 0: OGBench's default of the domain
    scale: Literal["auto", "paper", "laptop"] = "auto"  # auto: paper on CUDA, else laptop
    seed: int = 0  # of the networks, the training and the evaluation episodes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else CPU
    run_dir: str = ""  # folder of the run; empty: runs/<env>-task<k>/seed<n>
    resume: bool = False  # go on from the run's checkpoint, if there is one
    eval_only: bool = False  # only evaluate the run's checkpoint on --final-episodes episodes
    video: bool = False  # in the end, render three episodes to video.gif in the run's folder
    benchmark: bool = False  # only measure the seconds per update
    data: Literal["auto", "ogbench", "scripted"] = "auto"  # scripted: collected here; auto: either
    dataset_dir: str = "~/.ogbench/data"  # folder of the official datasets, downloaded if need be
    cache_dir: str = "~/.cache/trqam"  # folder of the datasets collected here
    transitions: int = 1_000_000  # of a scripted set (cube, scene, puzzle), in episodes of 1000
    data_seed: int = 0  # seed of the collection; the number of processes does not matter
    workers: int = os.cpu_count() or 1  # processes that collect

    width: int = 512  # hidden width of all networks
    layers: int = 4  # hidden layers of all networks
    critics: int = 10  # ensemble size E
    flow_layer_norm: bool = False  # LayerNorm in the flows; the critics always have it
    chunk: int = 5  # actions per chunk H, executed open loop
    flow_steps: int = 10  # Euler steps K of the flow and of the SDE
    gamma: float = 0.995  # discount γ per environment step
    rho: float = 0.5  # pessimism ρ: targets are mean − ρ std over the critics
    tau: float = 0.005  # Polyak rate of the target critic and of the base flow
    # ε_KL, nats per action of the chunk: how far the policy may go from the data. The paper tunes
    # it per domain (mostly 0.5-1.5); its table was not available to us, so mostly 1.0 here
    kl_budget: float = 1.0
    fixed_lambda: float = 0.0  # if not 0: fix λ, no dual descent (QAM, inverse temperature 1/λ)
    frozen_base: bool = False  # keep the base flow as pretrained; else its cloning goes on

    batch: int = 256  # chunks per update
    lr: float = 3e-4  # Adam's learning rate, offline and online
    pretrain_lr: float = 3e-4  # Adam's learning rate in pretraining
    pretrain_decay: bool = False  # cosine decay of it, to 0
    pretrain_steps: int = 300_000  # updates of behaviour cloning
    offline_steps: int = 1_000_000  # TRQAM updates on the dataset
    online_steps: int = 0  # environment steps with one TRQAM update each (paper: 500000)
    online_start: int = 5_000  # online steps before the updates go on
    eval_interval: int = 50_000  # updates between evaluations, after pretraining
    eval_episodes: int = 50  # episodes of such an evaluation
    final_episodes: int = 50  # episodes at the end of each phase, on seeds of their own
    log_interval: int = 1_000  # updates per row of train.csv, which holds their averages
    save_interval: int = 10_000  # updates between checkpoints


class Failure(Exception):
    """args: a text for the user and the exit code, 2 for a wrong call, 1 for a failed run."""


def expect(ok: bool, expected: str, got: object, todo: str = "", code: int = 1) -> None:
    """Raise Failure with what was expected, what came and what to do, unless `ok`."""
    if not ok:
        raise Failure(f"expected {expected}, got {got}" + (f"; {todo}" if todo else ""), code)


def parse(args: list[str]) -> Config:
    """Settings: explicit flag > laptop scale > domain > paper. Raises Failure, SystemExit."""
    cfg = tyro.cli(Config, args=[arg for arg in args if arg not in ("-h", "--help")])
    match = re.fullmatch(f"(.+?)(?:-({KINDS})-singletask(?:-task([1-5]))?-v0)?", cfg.env)
    known = f"--env to be one of {', '.join(DOMAINS)}, or a full id of one, as --help shows"
    domain, kind, task = match.groups() if match else ("", "", "")
    expect(domain in DOMAINS, known, repr(cfg.env), code=2)
    default = 4 if domain in ("puzzle-3x3", "puzzle-4x4") or "soccer" in domain else 2
    task = int(task or cfg.task or (1 if "maze" in domain else default))
    expect(cfg.task in (0, task), f"--task {task}, as in --env", cfg.task, code=2)
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    device = ("cuda" if there["cuda"] else "cpu") if cfg.device == "auto" else cfg.device
    expect(there[device], f"a {device} device", "none", "use --device cpu or another torch", 2)
    scale = ("paper" if device == "cuda" else "laptop") if cfg.scale == "auto" else cfg.scale
    wide = domain in ("antmaze-giant", "puzzle-4x4", "cube-triple", "cube-quadruple")
    preset: dict[str, Any] = dict(width=1024 if wide else 512, flow_layer_norm=wide)
    preset |= dict(chunk=1) if domain in MAZES else {}
    preset |= dict(gamma=0.999, rho=0.0) if "humanoid" in domain else {}
    preset |= dict(kl_budget=0.5) if domain in ("humanoidmaze-medium", "cube-triple") else {}
    preset |= LAPTOP if scale == "laptop" else {}
    about = __doc__.split("\n    obs ")[0]
    cfg = tyro.cli(Config, args=args, default=Config(**preset), description=about)
    for k, v in asdict(cfg).items():
        low, high = RANGES.get(k) or RANGES.get(type(v), (v, v))
        expect(low <= v <= high, f"--{k.replace('_', '-')} in [{low}, {high}]", v, code=2)
    run_dir = cfg.run_dir or f"runs/{cfg.env.split('-singletask')[0]}-task{task}/seed{cfg.seed}"
    env = f"{domain}-{kind or ('navigate' if domain in MAZES else 'play')}-singletask-task{task}-v0"
    return replace(cfg, env=env, task=task, device=device, scale=scale, run_dir=run_dir)


# ======================================================================================= networks
class MLP(nn.Module):
    """MLP with tanh-GELU, or an ensemble of E of them evaluated as one.

    Weights ([E,] in, out) start Xavier-uniform, biases at zero; `layer_norm`: a LayerNorm with
    ε = 1e-6 after each activation.
    """

    def __init__(self, sizes: list[int], layer_norm: bool, gen: torch.Generator, ensemble: int = 0):
        super().__init__()
        lead, row = ((ensemble,), (ensemble, 1)) if ensemble else ((), ())
        raw = [2 * torch.rand(*lead, i, o, generator=gen) - 1 for i, o in itertools.pairwise(sizes)]
        self.weights = nn.ParameterList(w * math.sqrt(6 / sum(w.shape[-2:])) for w in raw)
        self.biases = nn.ParameterList(torch.zeros(*row, n) for n in sizes[1:])
        normed = sizes[1:-1] if layer_norm else []
        self.scales = nn.ParameterList(torch.ones(*row, n) for n in normed)
        self.offsets = nn.ParameterList(torch.zeros(*row, n) for n in normed)

    def forward(self, *inputs: Tensor) -> Tensor:
        """(..., B or 1, in) each -> ([E,] ..., B, out)."""
        lead = torch.broadcast_shapes(*(x.shape[:-1] for x in inputs))
        x = torch.cat([x.expand(*lead, -1) for x in inputs], -1)
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.gelu(x, approximate="tanh") if i > 0 else x
            if i > 0 and len(self.scales):
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
                x = torch.addcmul(self.offsets[i - 1], x, self.scales[i - 1])
            x = F.linear(x, w.T, b) if w.ndim < 3 else torch.baddbmm(b, x.expand(len(w), -1, -1), w)
        return x


# ================================================================================ mathematics
# Pure functions: tensors and a velocity v(x, t) in, tensors out. v maps x (..., B, D) and t, which
# broadcasts to (..., B, 1), to (..., B, D); what it is conditioned on is the caller's business.

Velocity = Callable[[Tensor, Tensor], Tensor]
BRACKET = (0.01, 100.0)  # of the raw multiplier ℓ


def schedule(K: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Times t_k = k/K and memoryless diffusion g_k = √λ σ_k for k = 0 … K−1, each (K, 1, 1).

        g_k² = 2 (1 − t_k + h)/(t_k + h),  h = 1/K

    The continuous one is g² = 2(1 − t)/t; the shift by h keeps it finite (authors' code).
    """
    t = torch.arange(K, device=like.device, dtype=like.dtype).view(K, 1, 1) / K
    return t, (2 * (1 - t + 1 / K) / (t + 1 / K)).sqrt()


def flow_matching_loss(v: Velocity, x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """mean (v(x_t, t) − (x_1 − x_0))² at x_t = (1 − t) x_0 + t x_1; x (B, D), t (B, 1)."""
    x_t = (1 - t) * x_0 + t * x_1
    return (v(x_t, t) - (x_1 - x_0)).square().mean()


@torch.no_grad()
def sample_flow(v: Velocity, x_0: Tensor, K: int) -> Tensor:
    """The acting policy: K Euler steps of dx = v dt from the noise x_0 (B, D), clipped to ±1."""
    x = x_0
    for t in schedule(K, x_0)[0]:
        x = x + v(x, t) / K
    return x.clamp(-1, 1)


def td_target(rewards: Tensor, masks: Tensor, q_next: Tensor, gamma_H: float, rho: float) -> Tensor:
    """y = Σ_i γ^i r_i + γ^H m (mean_E Q' − ρ std_E Q'), with the population std; (B,).

    rewards (B,) are the sums over the chunk, masks (B,) 0 where the task was solved in it,
    q_next (E, B) the target critic after it, gamma_H γ^H.
    """
    return rewards + gamma_H * masks * (q_next.mean(0) - rho * q_next.std(0, correction=0))


@torch.no_grad()
def simulate_sde(
    v_fine: Velocity, v_base: Velocity, x_0: Tensor, noise: Tensor, exact: bool = False
) -> Tensor:
    """Euler–Maruyama path of the controlled memoryless SDE (Eq. 2), by the given noise.

        X_{k+1} = X_k + h (2 v_ft(X_k, t_k) − X_k/(t_k + h)) + √h g_k ε_k

    The drift is b + σu, b = 2 v_base − X/τ and σu = 2 (v_ft − v_base). The last step of the
    training chain is the noise-free X_K = X_{K−1} + h v_base (authors' code). With `exact` every
    step is controlled and noisy: for that chain Theorem 1 has no discretisation error.
    x_0 (B, D), noise (K, B, D) standard normal -> X_0 … X_K (K + 1, B, D), without gradient.
    """
    K, h = len(noise), 1 / len(noise)
    t, g = schedule(K, x_0)
    path = [x_0]
    for k in range(K if exact else K - 1):
        x = path[-1]
        drift = 2 * v_fine(x, t[k]) - x / (t[k] + h)
        path.append(x + h * drift + math.sqrt(h) * g[k] * noise[k])
    if not exact:
        path.append(path[-1] + h * v_base(path[-1], t[-1]))
    return torch.stack(path)


@torch.no_grad()
def q_gradient(q: Callable[[Tensor], Tensor], x_1: Tensor) -> Tensor:
    """∇_x mean_E Q(clip(x, −1, 1)), none outside the box; q maps (B, D) to (E, B); (B, D)."""
    return torch.func.grad(lambda x: q(x.clamp(-1, 1)).mean(0).sum())(x_1)


@torch.no_grad()
def lean_adjoint(v_base: Velocity, path: Tensor, terminal: Tensor, exact: bool = False) -> Tensor:
    """Lean adjoint: the terminal cost's gradient, carried back through the base drift alone.

        ã_k = ã_{k+1} + h (∂_x [2 v_base(X_k, t_k + h) − X_k/(t_k + h)])ᵀ ã_{k+1}

    v_base is asked at t_k + h (authors' code); with `exact` at t_k, the time of the step, which
    makes ã the derivative of the base chain. path (K + 1, B, D), terminal ã_K = −∇Q (B, D)
    -> ã_0 … ã_K (K + 1, B, D), without gradient.
    """
    K = len(path) - 1
    t, _ = schedule(K, path)
    adjoint = [terminal]
    for k in reversed(range(K)):
        end = t[k] + 1 / K
        time = t[k] if exact else end
        pull_back = torch.func.vjp(lambda x, s=time, e=end: 2 * v_base(x, s) - x / e, path[k])[1]
        (pulled,) = pull_back(adjoint[-1])
        adjoint.append(adjoint[-1] + pulled / K)
    return torch.stack(adjoint[::-1])


def velocity_gap(v_fine: Velocity, v_base: Velocity, path: Tensor) -> Tensor:
    """Δv_k = (v_ft − v_base)(X_k, t_k), k < K; path (K + 1, B, D) -> (K, B, D); ∇ to v_ft only."""
    x, (t, _) = path[:-1], schedule(len(path) - 1, path)
    with torch.no_grad():
        base = v_base(x, t)
    return v_fine(x, t) - base


def control(gap: Tensor, lam: Tensor | float) -> Tensor:
    """u_k = 2 Δv_k/σ_k, σ_k = g_k/√λ; gap (K, B, D) -> (K, B, D)."""
    return 2 * gap / (schedule(len(gap), gap)[1] / lam**0.5)


def adjoint_matching_loss(gap: Tensor, adjoint: Tensor, lam: Tensor | float) -> Tensor:
    """Adjoint matching (Eq. 5): mean_B Σ_k ‖u_k + σ_k ã_k‖², u_k = 2 Δv_k/σ_k, σ_k = g_k/√λ.

    gap, adjoint (K, B, D). Training pairs u_k with ã_k, lean_adjoint(…)[:-1] (authors' code);
    at the exact optimum of the discrete problem it pairs with ã_{k+1}, lean_adjoint(…)[1:].
    """
    sigma = schedule(len(gap), gap)[1] / lam**0.5
    return (control(gap, lam) + sigma * adjoint).square().sum((0, 2)).mean()


def path_kl(gap: Tensor) -> Tensor:
    """KL(P^u ‖ P^base) by Girsanov (Theorem 1, Eq. 8): Σ_k (2h/g_k²) ‖Δv_k‖²; λ cancels.

    gap (K, B, D) along paths of P^u -> nats (B,); their mean estimates the KL.
    """
    g = schedule(len(gap), gap)[1]
    return (2 / len(gap) * gap.square() / g.square()).sum((0, 2))


def path_kl_from_control(u: Tensor, lam: Tensor | float) -> Tensor:
    """The same KL in terms of the control: Σ_k (h/2λ) ‖u_k‖²; u (K, B, D) -> nats (B,)."""
    return u.square().sum((0, 2)) / (2 * lam * len(u))


def tilt_kl(adjoint: Tensor, lam: Tensor | float) -> Tensor:
    """Closed form in λ along the matching target u = −σã: KL(λ) = (1/2λ²) Σ_k h g_k² ‖ã_k‖².

    adjoint (K, B, D), paired as in `adjoint_matching_loss` -> nats (B,).
    """
    g = schedule(len(adjoint), adjoint)[1]
    return (g * adjoint).square().sum((0, 2)) / (2 * lam**2 * len(adjoint))


def dual_step(
    kl: Tensor, kl_ema: Tensor, dual: Tensor, kl_budget: float, lr=0.01, rate=0.1, bounds=BRACKET
) -> tuple[Tensor, Tensor]:
    """Projected dual descent (Eq. 9) on the raw multiplier ℓ, λ = 3 ℓ; scalars -> (D, ℓ).

        D ← (1 − r) D + r min(KL, 2ε)        ℓ ← clip(ℓ + η (D − ε), ℓ_min, ℓ_max)

    KL over the budget raises λ (back to the base), under it lowers λ.
    """
    kl_ema = (1 - rate) * kl_ema + rate * kl.clamp(max=2 * kl_budget)
    return kl_ema, (dual + lr * (kl_ema - kl_budget)).clamp(*bounds)


# ========================================================================================== agent
class Agent(nn.Module):
    """Flows, critics and trust region, and one update of them all.

    `flow` is the base flow in training and `base`, v_base, its Polyak copy; `policy` is v_ft;
    `target_critic` the Polyak copy of `critic`. λ, the KL average and metrics stay on the device.
    """

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int):
        super().__init__()
        self.cfg, self.dims, self.D = cfg, (obs_dim, action_dim), cfg.chunk * action_dim
        gen = torch.Generator().manual_seed(cfg.seed)  # on the CPU: one start for every device
        n_in, hidden = obs_dim + self.D, [cfg.width] * cfg.layers
        self.flow = MLP([n_in + 1, *hidden, self.D], cfg.flow_layer_norm, gen)  # v(s, x_t, t)
        self.critic = MLP([n_in, *hidden, 1], True, gen, cfg.critics)  # Q(s, chunk)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.dual: Tensor = nn.Buffer(torch.ones(()))  # ℓ
        self.kl_ema: Tensor = nn.Buffer(torch.zeros(()))  # D
        self.to(cfg.device).start_from_flow()

    @property
    def lam(self) -> Tensor:
        """λ = 3 ℓ (authors' code), or the fixed one (QAM)."""
        fixed = self.cfg.fixed_lambda
        return torch.full_like(self.dual, fixed) if fixed else 3 * self.dual

    def draw_noise(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All random numbers of one update, so that the update itself is deterministic."""
        draw = partial(torch.randn, generator=generator, device=generator.device)
        noise = dict(x_next=draw(B, self.D), x_flow=draw(B, self.D))
        noise["t_flow"] = torch.rand(B, 1, generator=generator, device=generator.device)
        return noise | dict(x_sde=draw(B, self.D), sde=draw(self.cfg.flow_steps, B, self.D))

    def pretrain_update(self, batch: dict, noise: dict, lr: float) -> dict[str, Tensor]:
        """One step of behaviour cloning of the base flow; returns metrics, on the device."""
        self.optimizer.param_groups[0]["lr"] = lr
        v = partial(self.flow, batch["obs"])
        loss = flow_matching_loss(v, noise["x_flow"], batch["actions"], noise["t_flow"])
        return self._descend(loss, dict(flow_loss=loss))

    def start_from_flow(self) -> None:
        """v_base and v_ft start from the pretrained flow, with a fresh Adam for the three nets."""
        self.base = copy.deepcopy(self.flow).requires_grad_(False)
        self.policy = copy.deepcopy(self.flow)
        self.optimizer = torch.optim.Adam(self.parameters(), self.cfg.lr)  # not of copies

    def update(self, batch: dict, noise: dict) -> dict[str, Tensor]:
        """One TRQAM update by `draw_noise`'s numbers; returns metrics, on the device.

        batch: obs, next_obs (B, S), actions (B, D), rewards (discounted sums) and masks (B,).
        """
        cfg, obs, next_obs, lam = self.cfg, batch["obs"], batch["next_obs"], self.lam
        v_flow, v_base, v_fine = (partial(net, obs) for net in (self.flow, self.base, self.policy))
        # critic: the target takes the next chunk from v_ft
        next_chunk = sample_flow(partial(self.policy, next_obs), noise["x_next"], cfg.flow_steps)
        q_next = self.target_critic(next_obs, next_chunk).squeeze(-1)
        y = td_target(batch["rewards"], batch["masks"], q_next, cfg.gamma**cfg.chunk, cfg.rho)
        q = self.critic(obs, batch["actions"]).squeeze(-1)
        critic_loss = (q - y).square().mean()
        # base flow: behaviour cloning goes on
        flow_loss = flow_matching_loss(v_flow, noise["x_flow"], batch["actions"], noise["t_flow"])
        # fine-tuned flow: simulate, carry the adjoint back, match
        path = simulate_sde(v_fine, v_base, noise["x_sde"], noise["sde"])
        terminal = -q_gradient(lambda x: self.target_critic(obs, x).squeeze(-1), path[-1])
        adjoint = lean_adjoint(v_base, path, terminal)[:-1]
        gap = velocity_gap(v_fine, v_base, path)
        matching_loss = adjoint_matching_loss(gap, adjoint, lam)
        # trust region: KL per action of the chunk, dual descent
        kl = path_kl(gap.detach()).mean() / cfg.chunk
        self.kl_ema, dual = dual_step(kl, self.kl_ema, self.dual, cfg.kl_budget)
        self.dual = self.dual if cfg.fixed_lambda else dual
        metrics = dict(q_mean=q.mean(), critic_loss=critic_loss, flow_loss=flow_loss)
        metrics |= dict(matching_loss=matching_loss, path_kl=kl, kl_ema=self.kl_ema, lam=self.lam)
        metrics |= dict(target_kl=tilt_kl(adjoint, lam).mean() / cfg.chunk)
        metrics |= dict(adj_mean=terminal.abs().mean(), adj_max=terminal.abs().max())
        # Polyak copies, by the parameters from before Adam (authors' code); one step for all nets
        loss, copies = critic_loss + matching_loss, [(self.target_critic, self.critic)]
        if not cfg.frozen_base:
            loss, copies = loss + flow_loss, [*copies, (self.base, self.flow)]
        with torch.no_grad():
            for slow, fast in copies:
                torch._foreach_lerp_(tuple(slow.parameters()), tuple(fast.parameters()), cfg.tau)
        return self._descend(loss, metrics)

    def _descend(self, loss: Tensor, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """A step of Adam on the gradient clipped to norm 1; returns the metrics and that norm."""
        self.optimizer.zero_grad()
        loss.backward()
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(self.parameters(), 1.0)
        self.optimizer.step()
        return {k: v.detach() for k, v in metrics.items()}

    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Action chunk (H, A) in ±1 for an observation (S,), by the ODE of v_ft from CPU noise."""
        x_0 = torch.randn(1, self.D, generator=generator).to(self.dual.device)
        v = partial(self.policy, torch.as_tensor(obs).to(x_0).view(1, self.dims[0]))
        return sample_flow(v, x_0, self.cfg.flow_steps).view(-1, self.dims[1]).cpu().numpy()

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Agent:
        """The agent of a run's checkpoint.pt. Raises Failure if there is none or it is damaged."""
        saved = load_checkpoint(Path(path))
        agent = cls(Config(**saved["config"] | dict(device=device)), *saved["dims"])
        agent.load_state_dict(saved["agent"])
        if saved["state"]["step"] < agent.cfg.pretrain_steps:  # it acts by the flow as far as it is
            agent.start_from_flow()
        return agent


# =========================================================================================== data
STACK = {"cube-single": (0, 0), "cube-double": (0, 0.25), "cube-triple": (0.05, 0.35)}
STACK |= {"cube-quadruple": (0.1, 0.5), "cube-octuple": (0, 0.35)}  # of an episode's p_stack


def seed_of(*key: int) -> int:
    """An independent 32-bit seed for every key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@cache
def collector(domain: str) -> tuple[Any, dict]:
    """Environment and oracles of a collecting process, which leaves signals to its parent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent: Any = multiprocessing.parent_process()  # with which it ends
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    warnings.filterwarnings("ignore")
    env = gymnasium.make(f"{domain}-v0", mode="data_collection").unwrapped
    plan: dict[str, Any] = dict(env=env, noise=0.1, noise_smoothing=0.5)
    button = button_plan.ButtonPlanOracle(gripper_always_closed="puzzle" in domain, **plan)
    cube, drawer = cube_plan.CubePlanOracle(**plan), drawer_plan.DrawerPlanOracle(**plan)
    window = window_plan.WindowPlanOracle(**plan)
    return env, dict(button=button, cube=cube, drawer=drawer, window=window)


def collect_episode(domain: str, key: tuple[int, ...], attempt: int = 0) -> dict[str, np.ndarray]:
    """A scripted 'play' episode of 1001 steps in OGBench's layout, deterministic in the key."""
    (env, oracles), seed = collector(domain), seed_of(*key, attempt)
    np.random.seed(seed)  # the oracles draw from numpy's global generator
    p_stack = np.random.uniform(*STACK.get(domain, (0.5, 0.5)))
    rows: list[dict] = []
    obs, info = env.reset(seed=seed)
    while len(rows) < 1001:
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(obs, info)
        while len(rows) < 1001 and not oracle.done:
            action = np.clip(oracle.select_action(obs, info), -1, 1).astype(np.float32)
            row = dict(observations=np.float32(obs), actions=action, terminals=len(rows) == 1000)
            obs, *_, info = env.step(action)
            # prev_: the state before the step, which is the one on which OGBench computes rewards
            rows.append(row | {k[5:]: v for k, v in info.items() if k.startswith("prev_")})
        obs, info = env.set_new_target(p_stack=p_stack)
    data = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    cube, (low, high) = data["qpos"][:, 14:17], env._workspace_bounds
    if domain == "scene" and not np.all((low - 0.2 < cube) & (cube < high + 0.2)):
        return collect_episode(domain, key, attempt + 1)  # the cube left the workspace
    return data


def collect(cfg: Config, domain: str) -> Path:
    """Collect a dataset and a held-out one (5 %) in parallel, written atomically; or reuse it."""
    n, folder = math.ceil(cfg.transitions / 1000), Path(cfg.cache_dir).expanduser()
    path = folder / f"{domain}-play-scripted-v1-seed{cfg.data_seed}-{n}k.npz"
    say(f"{'reusing' if path.exists() else 'collecting'} {path}")
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    keys = [(cfg.data_seed, j, i) for j, m in ((0, n), (1, math.ceil(n / 20))) for i in range(m)]
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn")) as pool:
        episodes, parts = pool.map(partial(collect_episode, domain), keys), []
        for episode in tqdm(episodes, f"collecting {path.stem}", len(keys), unit="k steps"):
            parts.append(episode)
            if SIGNALS:
                pool.shutdown(cancel_futures=True)
                raise KeyboardInterrupt
    for name, part in ((f"{path.stem}-val", parts[n:]), (path.stem, parts[:n])):
        data: dict[str, Any] = {k: np.concatenate([p[k] for p in part]) for k in part[0]}
        atomic_write(folder / f"{name}.npz", partial(np.savez, **data))
    return path


def load_data(cfg: Config) -> tuple[gymnasium.Env, dict, dict, dict]:
    """Environment, data, held-out data, facts about them. Raises Failure: none, or damaged."""
    name, scripted = re.sub(r"-singletask-task\d", "", cfg.env), cfg.data == "scripted"
    domain, folder = re.split(rf"-({KINDS})-", name)[0], Path(cfg.dataset_dir).expanduser()
    path, can = folder / f"{name}.npz", name == f"{domain}-play-v0" and domain not in MAZES
    wanted = f"put {name}.npz and {name}-val.npz into {folder} (--dataset-dir)"
    if not scripted and not (path.exists() and Path(folder, f"{name}-val.npz").exists()):
        url = urllib.request.Request(f"{ogbench.utils.DATASET_URL}/{name}.npz", method="HEAD")
        say(f"{path} is not there; trying {url.full_url}")
        socket.setdefaulttimeout(10)  # of a connection that falls silent
        try:  # in a thread, as looking up a name knows no time-out
            ThreadPool(1).apply_async(urllib.request.urlopen, [url]).get(10).close()
            ogbench.download_datasets([name], str(folder))
        except Exception as error:  # urllib, http and the thread raise many kinds
            scripted = True
            expect(can and cfg.data == "auto", f"the dataset {name}.npz", repr(error), wanted)
            say(f"{error!r}; going on with data of OGBench's scripted oracles")
    if scripted:
        expect(can, "a cube, scene or puzzle 'play' set for --data scripted", name, wanted, 2)
        path = collect(cfg, domain)
    try:
        env, *sets = ogbench.make_env_and_datasets(cfg.env, dataset_path=str(path))
    except Exception as error:  # numpy and zipfile raise many kinds
        expect(False, "a dataset", f"a damaged {path} ({error!r})", "delete it and start again")
    digest, shapes = hashlib.sha256(), dict(actions=env.action_space.shape)
    shapes |= dict.fromkeys(("observations", "next_observations"), env.observation_space.shape)
    for data, k in itertools.product(sets, ReplayBuffer.KEYS):
        shape = (len(data["rewards"]), *shapes.get(k, ()))
        expect(data[k].shape == shape, f"{k} of shape {shape} in {path}", data[k].shape)
        limit, worst = 1 if k == "actions" else math.inf, float(np.abs(data[k]).max(initial=0))
        expect(worst < limit + 1e-5, f"finite {k} in [-{limit}, {limit}] in {path}", worst)
        digest.update(data[k].tobytes())
    about = dict(source="scripted" if scripted else "ogbench", path=str(path))
    sizes = dict(transitions=len(sets[0]["rewards"]), solved=int((sets[0]["masks"] == 0).sum()))
    return env, *sets, about | sizes | dict(sha256=digest.hexdigest())


class ReplayBuffer:
    """Transitions, and the chunks they form, on the device: the dataset, then online episodes."""

    KEYS = ("observations", "next_observations", "actions", "rewards", "masks", "terminals")

    def __init__(self, data: dict, cfg: Config):
        self.offsets = torch.arange(cfg.chunk, device=cfg.device)
        self.discounts = cfg.gamma**self.offsets
        self.arrays = {k: self.discounts.new_empty(0, *data[k].shape[1:]) for k in self.KEYS}
        self.add(data)
        expect(len(self.starts) > 0, f"a chunk of {cfg.chunk} actions in the data", "none")

    def add(self, data: dict) -> None:
        """Append whole episodes of transitions: KEYS, (N, …) each."""
        for k, v in self.arrays.items():
            self.arrays[k] = torch.cat([v, torch.as_tensor(data[k]).to(v)])
        H, over = len(self.offsets), F.pad(self.arrays["terminals"].cumsum(0), (1, 0))
        whole = over[H - 1 : -1] == over[:-H]  # no episode ended before the last of H steps
        self.starts = whole.nonzero().squeeze(-1)

    def sample(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """B chunks: obs, next_obs (B, S), actions (B, D), rewards Σ γ^i r_i and masks (B,)."""
        pick = torch.randint(len(self.starts), (B, 1), generator=generator, device=generator.device)
        i = self.starts[pick] + self.offsets
        obs, next_obs, actions, rewards, masks, _ = self.arrays.values()
        batch = dict(obs=obs[i[:, 0]], next_obs=next_obs[i[:, -1]], masks=masks[i].amin(1))
        batch["actions"] = actions[i].flatten(1).clamp(-1 + 1e-5, 1 - 1e-5)
        return batch | dict(rewards=(rewards[i] * self.discounts).sum(1))


# ===================================================================================== evaluation
PERIODIC, FINAL, ONLINE = 1, 2, 3  # streams of episode seeds
make_env = partial(ogbench.make_env_and_datasets, env_only=True)


def play(agent: Agent, env: gymnasium.Env, *key: int) -> Iterator[tuple]:
    """Play an episode, chunks open loop, its start and the policy's noise seeded by the key.

    Yields a row of `ReplayBuffer.KEYS` (mask: 0 where solved) and the environment's info.
    """
    seed, done = seed_of(agent.cfg.seed, *key), False
    np.random.seed(seed)
    generator, (obs, _) = torch.Generator().manual_seed(seed), env.reset(seed=seed)
    if physics := getattr(env.unwrapped, "_data", None):  # OGBench's reset takes unseeded steps,
        physics.ctrl[:] = physics.qacc_warmstart[:] = 0  # of which this would be left over
    while not done:
        for action in agent.act(obs, generator):
            next_obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            yield (obs, next_obs, action, float(reward), 1.0 - terminated, done), info
            obs = next_obs
            if done:
                break


def evaluate(agent: Agent, env: gymnasium.Env, episodes: int, stream: int) -> dict:
    """Success at the end of seeded episodes with its standard error, mean return and length."""
    results = []
    for i in range(episodes):
        if SIGNALS:
            raise KeyboardInterrupt
        steps, infos = zip(*play(agent, env, stream, i), strict=True)
        results.append((float(infos[-1]["success"]), sum(step[3] for step in steps), len(steps)))
    mean, std = np.mean(results, 0).tolist(), np.std(results, 0, ddof=min(episodes - 1, 1))
    row = dict(success=mean[0], stderr=float(std[0]) / math.sqrt(episodes), episodes=episodes)
    return row | dict(mean_return=mean[1], mean_length=mean[2])


def render_video(agent: Agent, path: Path) -> None:
    """Three evaluation episodes as a GIF. Raises Failure where OpenGL is missing."""
    env = make_env(agent.cfg.env, render_mode="rgb_array", width=240, height=240)
    env.reset()
    try:
        env.render()
    except Exception as error:  # mujoco raises what its OpenGL backend does
        expect(False, "OpenGL", repr(error), "install EGL (libegl1), or OSMesa: MUJOCO_GL=osmesa")
    steps = (itertools.islice(play(agent, env, FINAL, i), 0, None, 2) for i in range(3))
    frames: list[Any] = [env.render() for _ in itertools.chain(*steps)]
    imageio.mimsave(path, frames, duration=100, loop=0)
    say(f"video: {path}")


def benchmark(cfg: Config, repeats: int = 9) -> list[float]:
    """Median seconds of a pretraining and of a TRQAM update, on zeros of the right sizes."""
    env, gen = make_env(cfg.env), torch.Generator(cfg.device).manual_seed(0)
    dims, times = (env.observation_space.shape[0], env.action_space.shape[0]), []
    agent, zeros = Agent(cfg, *dims), partial(torch.zeros, cfg.batch, device=cfg.device)
    batch = dict(obs=zeros(dims[0]), next_obs=zeros(dims[0]), actions=zeros(agent.D))
    batch |= dict(rewards=zeros(), masks=zeros())
    updates: list[Callable] = [partial(agent.pretrain_update, lr=0.0), agent.update]
    for update in updates * (repeats + 2):
        start = time.perf_counter()
        update(batch, agent.draw_noise(cfg.batch, gen))["grad_norm"].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return [float(np.median(times[first::2])) for first in (4, 5)]  # two of each warmed up


# ======================================================================================= training
FORMAT = 3  # of checkpoint.pt
SIGNALS: list[int] = []  # Ctrl-C and SIGTERM, looked at where the state is whole
PHASES = dict(pretrain="pretrained policy", offline="TRQAM offline", online="TRQAM online")
BAR = "{desc:8s} {n:>7d}/{total} {rate_fmt:>10s}, {remaining} left"
SHOWN = dict(flow_loss="flow {:.3f}", held_out_loss="(held out {:.4f})", q_mean="Q {:7.2f}")
SHOWN |= dict(critic_loss="critic {:7.3f}", matching_loss="match {:7.1f}", path_kl="kl {:.2f}")
SHOWN |= dict(kl_budget="of {:.2f}", lam="λ {:.3f}", success="success {:6.1%}")
SHOWN |= dict(stderr="± {:.1%} standard error", episodes="({} episodes)")
say = tqdm.write if sys.stderr.isatty() else partial(print, flush=True)  # a line above the bar


def show(row: dict) -> str:
    return "  ".join(text.format(row[k]) for k, text in SHOWN.items() if k in row)


def atomic_write(path: Path, write: Callable) -> None:
    """Call write(file), so that `path` is the old file or the new one, whoever else writes it."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running code from it. Raises Failure."""
    expect(path.exists(), "a checkpoint", f"no file {path}", "train first")
    another = "train again, in another --run-dir"
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        expect(False, "a checkpoint", f"a damaged or unsafe {path} ({repr(error)[:200]})", another)
    version = saved.get("format") if isinstance(saved, dict) else None
    expect(version == FORMAT, f"checkpoint format {FORMAT}", f"{version} in {path}", another)
    return saved


def train(cfg: Config) -> None:
    """All phases in one loop; a step is an update, online an environment step and an update."""
    folder, checkpoint = Path(cfg.run_dir), Path(cfg.run_dir, "checkpoint.pt")
    there, todo = checkpoint.exists(), "--resume it, or take another --run-dir"
    expect(cfg.resume or not there, "a new run", f"one in {folder}", todo, 2)
    saved = load_checkpoint(checkpoint) if there else {}
    old = {k: v for k, v in saved.get("config", {}).items() if k not in MAY_CHANGE}
    new = "; ".join(f"{k} {v} -> {getattr(cfg, k)}" for k, v in old.items() if getattr(cfg, k) != v)
    expect(not new, f"the flags in {folder / 'config.json'}, or another --run-dir", new, code=2)
    # the state beside agent, data and generator; sums: of metrics since the last row of train.csv
    state: Any = dict(step=0, episodes=0, seconds=0, updates=0, sums={}, train=[], eval=[])
    state |= saved.get("state", {})
    begin = time.time() - state["seconds"]

    def record(table: str, row: dict | None = None) -> None:
        """Add a row to train.csv or eval.csv, whose columns are all that any row has."""
        state[table] += [dict(step=state["step"], phase=phase) | row] if row else []
        keys = list(dict.fromkeys(k for r in state[table] for k in r))
        rows = np.array([keys, *([r.get(k, "") for k in keys] for r in state[table])], object)
        atomic_write(folder / f"{table}.csv", partial(np.savetxt, X=rows, fmt="%s", delimiter=","))

    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    record("train")  # where the folder is not writable, this fails now and not after an hour
    env, data, held_out, about = load_data(replace(cfg, data=saved.get("source", cfg.data)))
    say("data: " + ", ".join(f"{k} {v}" for k, v in about.items() if k != "sha256"))
    buffer, offline_size = ReplayBuffer(data, cfg), len(data["rewards"])
    agent = Agent(cfg, data["observations"].shape[1], data["actions"].shape[1])
    fixed = torch.Generator(cfg.device).manual_seed(0)  # held-out batch and noise never change
    held_out = ReplayBuffer(held_out, cfg).sample(8192, fixed) | agent.draw_noise(8192, fixed)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)  # of batches and updates
    if saved:
        expect(saved["data"] == about["sha256"], "the run's data", f"other ones: {about['path']}")
        agent.load_state_dict(saved["agent"])
        agent.optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        buffer.add(saved["online"])
        say(f"resuming at step {state['step']}")
    names = ("torch", "ogbench", "mujoco", "gymnasium", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    gpu = torch.cuda.get_device_name() if cfg.device == "cuda" else None
    info = asdict(cfg) | dict(versions=versions, data_used=about, python=sys.version, gpu=gpu)
    info |= dict(command=sys.argv, threads=torch.get_num_threads())
    atomic_write(folder / "config.json", lambda f: f.write(json.dumps(info, indent=1).encode()))

    def save() -> None:
        """Write the checkpoint, unless a parameter is not finite."""
        bad = [k for k, x in agent.state_dict().items() if not x.isfinite().all()]
        where = f"finite parameters at step {state['step']}"
        expect(not bad, where, f"NaN or infinity in {bad}", f"{checkpoint} is from before")
        state["seconds"] = time.time() - begin
        content = dict(format=FORMAT, config=asdict(cfg), dims=agent.dims, data=about["sha256"])
        content |= dict(agent=agent.state_dict(), optimizer=agent.optimizer.state_dict())
        content |= dict(generator=generator.get_state(), state=state, source=about["source"])
        content |= dict(online={k: v[offline_size:].clone() for k, v in buffer.arrays.items()})
        atomic_write(checkpoint, partial(torch.save, content))

    def log() -> None:
        """Add a row of averages to train.csv; stop if one is not finite."""
        row = {k: float(v) / state["updates"] for k, v in state["sums"].items()}
        where = f"finite means over the {state['updates']} updates before step {state['step']}"
        expect(all(map(math.isfinite, row.values())), where, row, f"{checkpoint} is from before")
        with torch.no_grad():
            x_0, x_1, t = (held_out[k] for k in ("x_flow", "actions", "t_flow"))
            loss = flow_matching_loss(partial(agent.flow, held_out["obs"]), x_0, x_1, t)
        row |= dict(kl_budget=cfg.kl_budget) if "path_kl" in row else {}
        record("train", row | dict(held_out_loss=loss.item(), seconds=time.time() - begin))
        say(f"{bar}  {show(state['train'][-1])}")
        state.update(updates=0, sums={})

    lengths = (cfg.pretrain_steps, cfg.offline_steps, cfg.online_steps)
    ends = dict(zip(PHASES, itertools.accumulate(lengths), strict=True))
    evaluations = {*range(ends["pretrain"], ends["online"], cfg.eval_interval), *ends.values()}
    online_env, episode = make_env(cfg.env) if cfg.online_steps else env, None
    transitions, next_save = [], 0  # of the online episode, within which no checkpoint is taken
    wait = 1 if sys.stderr.isatty() else 1e9  # seconds; no bar in a log file, its numbers as lines
    for phase, end in ends.items():
        bar = tqdm(total=end, desc=phase, initial=state["step"], bar_format=BAR, delay=wait)
        for step in range(state["step"], end + 1):
            if step > state["step"]:  # at first there is only the state to save and to evaluate
                if phase == "online":
                    episode = episode or play(agent, online_env, ONLINE, state["episodes"])
                    transitions.append(next(episode)[0])
                    if transitions[-1][-1]:  # done: the episode enters the buffer
                        columns = map(np.stack, zip(*transitions, strict=True))
                        buffer.add(dict(zip(buffer.KEYS, columns, strict=True)))
                        state["episodes"], episode, transitions = state["episodes"] + 1, None, []
                if phase != "online" or step > ends["offline"] + cfg.online_start:
                    batch = buffer.sample(cfg.batch, generator)
                    noise = agent.draw_noise(cfg.batch, generator)
                    if phase == "pretrain":
                        angle = math.pi * (step - 1) / end if cfg.pretrain_decay else 0
                        lr = cfg.pretrain_lr * (1 + math.cos(angle)) / 2
                        metrics = agent.pretrain_update(batch, noise, lr)
                    else:
                        metrics = agent.update(batch, noise)
                    state["sums"] = {k: v + state["sums"].get(k, 0) for k, v in metrics.items()}
                    state["updates"] += 1
                state["step"] = step
                bar.update()
                if step == ends["pretrain"]:
                    agent.start_from_flow()
                if step % cfg.log_interval == 0 or step == end:
                    log()
            if not transitions and (step >= next_save or step in evaluations or SIGNALS):
                save()
                next_save = step + cfg.save_interval
                if SIGNALS:
                    raise KeyboardInterrupt
            if step in evaluations and step not in (row["step"] for row in state["eval"]):
                final = step == end
                n, stream = (cfg.final_episodes, FINAL) if final else (cfg.eval_episodes, PERIODIC)
                record("eval", dict(final=int(final)) | evaluate(agent, env, n, stream))
                say(f"evaluation at step {step}: {show(state['eval'][-1])}")
        bar.close()
    save()
    say(f"{folder}: {show(state['train'][-1])}, {tqdm.format_interval(state['seconds'])} in all")
    for row in filter(lambda row: row["final"], state["eval"]):
        say(f"  {PHASES[row['phase']]:18s} {show(row)}")


def main() -> int:
    """The command line. Exit codes: 0 done, 1 failed, 2 a wrong call, 130 and 143 interrupted."""
    warnings.filterwarnings("ignore", module="gymnasium|glfw")
    if sys.platform == "linux":  # keep freed memory: to return it and get it back costs a CPU 15 %
        for threshold, size in ((-1, 2**30), (-3, 2**25)):  # of glibc, for trimming and mmap
            getattr(ctypes.CDLL(None), "mallopt", max)(threshold, size)
    for number in (signal.SIGINT, signal.SIGTERM):  # a second one ends the process at once
        signal.signal(number, lambda n, _: os._exit(128 + n) if SIGNALS else SIGNALS.append(n))
    try:
        cfg = parse(sys.argv[1:])
        checkpoint = Path(cfg.run_dir, "checkpoint.pt")
        agent = Agent.load(checkpoint, cfg.device) if cfg.eval_only else None
        run = agent.cfg if agent else cfg
        say(f"{run.env}, seed {run.seed}, on {run.device}, scale {run.scale}")
        say(" ".join(f"{k}={v}" for k, v in asdict(run).items() if k not in MAY_CHANGE))
        if cfg.benchmark:
            say("{:.4f} s per pretraining, {:.4f} s per TRQAM update".format(*benchmark(cfg)))
        elif agent:
            say(show(evaluate(agent, make_env(run.env), cfg.final_episodes, FINAL)))
        else:
            if not checkpoint.exists():
                scale = "laptop" if cfg.scale == "paper" else "paper"
                other = parse([*sys.argv[1:], "--scale", scale])
                seconds = np.dot(benchmark(other, 1), (other.pretrain_steps, other.offline_steps))
                say(f"--scale {scale} would train for about {seconds / 3600:.1f} hours here")
            train(cfg)
        if cfg.video:
            render_video(Agent.load(checkpoint, cfg.device), checkpoint.with_name("video.gif"))
    except (KeyboardInterrupt, BrokenExecutor) as error:  # a signal ends a process that starts
        text = "interrupted; a run goes on with --resume" if SIGNALS else f"error: {error}"
        print(f"trqam.py: {text}", file=sys.stderr)
        return 128 + SIGNALS[0] if SIGNALS else 1
    except (Failure, OSError) as error:
        text, code = error.args if isinstance(error, Failure) else (error, 1)
        print(f"trqam.py: error: {text}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
