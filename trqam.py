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
import hashlib
import importlib.metadata
import itertools
import json
import math
import multiprocessing as mp
import os
import re
import signal
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Literal

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display

import gymnasium
import imageio
import numpy as np
import ogbench
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

# ======================================================================================= settings

MANIPULATION = ["cube-single", "cube-double", "cube-triple", "cube-quadruple", "scene"]
MANIPULATION += ["puzzle-3x3", "puzzle-4x4", "puzzle-4x5", "puzzle-4x6"]
MAZES = [f"{body}maze-{m}" for body in ("ant", "humanoid") for m in ("medium", "large", "giant")]
MAZES += [f"pointmaze-{m}" for m in ("medium", "large", "giant", "teleport")]
MAZES += ["antmaze-teleport", "antsoccer-arena", "antsoccer-medium"]
KINDS = "play|noisy|navigate|stitch|explore"
SCALES = dict(  # paper: the published sizes and steps; laptop: what 2 cores finish in 40 minutes
    paper=dict(critics=10, flow_steps=10, batch=256, lr=3e-4, pretrain_lr=3e-4, tau=0.005)
    | dict(pretrain_decay=False, pretrain_steps=300_000, offline_steps=1_000_000)
    | dict(eval_interval=50_000, eval_episodes=50, log_interval=1_000, save_interval=10_000)
    | dict(transitions=1_000_000),  # kl_budget and the rest: per domain, in `resolve`
    laptop=dict(critics=10, flow_steps=5, batch=128, lr=6e-4, pretrain_lr=1e-3, tau=0.01)
    | dict(pretrain_decay=True, pretrain_steps=30_000, offline_steps=8_000, width=256)
    | dict(eval_interval=2_000, eval_episodes=10, log_interval=250, save_interval=500)
    | dict(transitions=300_000, kl_budget=0.5),
)


@dataclass(frozen=True)
class Config:
    # What is left at None comes from the domain and the scale, and is printed at the start.
    env: str = "cube-single"  # OGBench domain, or full id (cube-single-play-singletask-task2-v0)
    task: int | None = None  # single task 1-5; None: OGBench's default of the domain
    scale: Literal["auto", "paper", "laptop"] = "auto"  # auto: paper on CUDA, else laptop
    seed: int = 0  # of the networks, the training and the evaluation episodes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: CUDA if there is one, else CPU
    run_dir: str | None = None  # folder of the run; None: runs/<env>-task<k>/seed<n>
    resume: bool = False  # go on from the run's checkpoint, if there is one
    eval_only: bool = False  # only evaluate the run's checkpoint on --final-episodes episodes
    video: bool = False  # in the end, render three episodes to video.gif in the run's folder
    benchmark: bool = False  # only measure the seconds per update

    # ogbench: the official dataset, downloaded if need be; scripted: collected here with OGBench's
    # oracles (cube, scene, puzzle); auto: the official one, scripted if its host can't be reached
    data: Literal["auto", "ogbench", "scripted"] = "auto"
    dataset_dir: str = "~/.ogbench/data"  # folder of the official datasets
    cache_dir: str = "~/.cache/trqam"  # folder of the datasets collected here
    transitions: int | None = None  # size of a collected dataset (in episodes of 1000)
    data_seed: int = 0  # seed of the collection; the number of processes does not matter
    workers: int | None = None  # processes that collect; None: one per core

    width: int | None = None  # hidden width of all networks
    layers: int = 4  # hidden layers of all networks
    critics: int | None = None  # ensemble size E
    flow_layer_norm: bool | None = None  # LayerNorm in the flows; the critics always have it
    chunk: int | None = None  # actions per chunk H, executed open loop
    flow_steps: int | None = None  # Euler steps K of the flow and of the SDE
    gamma: float | None = None  # discount γ per environment step
    rho: float | None = None  # pessimism ρ: targets are mean − ρ std over the critics
    tau: float | None = None  # Polyak rate of the target critic and of the base flow

    # ε_KL, nats per action of the chunk: how far the policy may go from the data. The paper tunes
    # it per domain (mostly 0.5-1.5); its table was not available to us, so mostly 1.0 here
    kl_budget: float | None = None
    fixed_lambda: float | None = None  # fix λ, no dual descent: QAM at inverse temperature 1/λ
    frozen_base: bool = False  # keep the base flow as pretrained; else its cloning goes on

    batch: int | None = None  # chunks per update
    lr: float | None = None  # Adam's learning rate, offline and online
    pretrain_lr: float | None = None  # Adam's learning rate in pretraining
    pretrain_decay: bool | None = None  # cosine decay of it, to 0
    pretrain_steps: int | None = None  # updates of behaviour cloning
    offline_steps: int | None = None  # TRQAM updates on the dataset
    online_steps: int = 0  # environment steps with one TRQAM update each (paper: 500000)
    online_start: int = 5_000  # online steps before the updates go on
    eval_interval: int | None = None  # updates between evaluations
    eval_episodes: int | None = None  # episodes of such an evaluation
    final_episodes: int = 50  # episodes at the end of each phase, on seeds of their own
    log_interval: int | None = None  # updates per row of train.csv, which holds their averages
    save_interval: int | None = None  # updates between checkpoints


MAY_CHANGE = ("resume", "eval_only", "video", "benchmark", "device", "run_dir", "dataset_dir")
MAY_CHANGE += ("cache_dir", "workers")  # on --resume: they say where and how to run, not what
RANGES = dict(task=(1, 5), flow_steps=(2, 1000), transitions=(1000, 10**9), rho=(0, 100))
RANGES |= dict.fromkeys(("kl_budget", "fixed_lambda"), (1e-6, 1e6))
RANGES |= dict.fromkeys(("seed", "data_seed", "online_start"), (0, 2**62))
RANGES |= dict.fromkeys(("offline_steps", "online_steps"), (0, 2**62))


class Failure(Exception):
    """A text for the user, and the exit code: 2 for a wrong call, 1 for a failed run."""


def expect(ok: bool, expected: str, got: object, todo: str = "", code: int = 1) -> None:
    """Raise Failure with what was expected, what came and what to do, unless `ok`."""
    if not ok:
        raise Failure(f"expected {expected}, got {got}" + (f"; {todo}" if todo else ""), code)


def resolve(cfg: Config) -> Config:
    """Fill what is left at None: explicit flag > laptop scale > domain > paper. Raises Failure."""
    given = {k: v for k, v in asdict(cfg).items() if v is not None}
    for k, v in given.items():
        if isinstance(v, (int, float)) and not isinstance(v, bool):
            low, high = RANGES.get(k, (1, 10**9) if isinstance(v, int) else (0, 1))
            expect(low <= v <= high, f"--{k.replace('_', '-')} in [{low}, {high}]", v, code=2)
    full = re.fullmatch(rf"(.+)-({KINDS})-singletask(?:-task([1-5]))?-v0", cfg.env)
    domain = full[1] if full else cfg.env
    known = f"--env to be one of {', '.join(MANIPULATION + MAZES)}, or a full OGBench id of one"
    expect(domain in MANIPULATION or domain in MAZES, known, repr(cfg.env), code=2)
    kind = full[2] if full else "play" if domain in MANIPULATION else "navigate"
    default = 2 if domain in MANIPULATION else 1
    default = 4 if domain in ("puzzle-3x3", "puzzle-4x4") or "soccer" in domain else default
    task = int((full and full[3]) or cfg.task or default)
    expect(cfg.task in (None, task), f"--task {task}, as in --env", cfg.task, code=2)
    there = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    device = ("cuda" if there["cuda"] else "cpu") if cfg.device == "auto" else cfg.device
    expect(there[device], f"a {device} device", "none", "use --device cpu or another torch", 2)
    scale = ("paper" if device == "cuda" else "laptop") if cfg.scale == "auto" else cfg.scale
    wide = domain in ("antmaze-giant", "puzzle-4x4", "cube-triple", "cube-quadruple")
    humanoid, tight = "humanoid" in domain, domain in ("humanoidmaze-medium", "cube-triple")
    published = dict(width=1024 if wide else 512, flow_layer_norm=wide)
    published |= dict(chunk=5 if domain in MANIPULATION else 1, kl_budget=0.5 if tight else 1.0)
    published |= dict(gamma=0.999 if humanoid else 0.995, rho=0.0 if humanoid else 0.5)
    env, name = f"{domain}-{kind}-singletask-task{task}-v0", f"{domain}-{kind}" if full else domain
    run_dir = cfg.run_dir or f"runs/{name}-task{task}/seed{cfg.seed}"
    fixed = dict(env=env, task=task, device=device, scale=scale, run_dir=run_dir)
    return Config(**SCALES["paper"] | published | SCALES[scale] | given | fixed)


# ======================================================================================= networks


class MLP(nn.Module):
    """MLP with tanh-GELU, or an ensemble of E of them evaluated as one.

    Weights ([E,] in, out) start Xavier-uniform, biases at zero; `layer_norm`: a LayerNorm with
    ε = 1e-6 after each activation. Inputs are concatenated: (..., in) -> ([E,] ..., out).
    """

    def __init__(self, sizes, layer_norm: bool, ensemble: int = 0, generator=None):
        super().__init__()
        lead, row = ((ensemble,), (ensemble, 1)) if ensemble else ((), ())
        uniform = partial(torch.rand, generator=generator)
        pairs = list(itertools.pairwise(sizes))
        weights = [(2 * uniform(*lead, i, o) - 1) * math.sqrt(6 / (i + o)) for i, o in pairs]
        self.weights = nn.ParameterList(weights)
        self.biases = nn.ParameterList(torch.zeros(*row, o) for _, o in pairs)
        normed = sizes[1:-1] if layer_norm else []
        self.scales = nn.ParameterList(torch.ones(*row, n) for n in normed)
        self.offsets = nn.ParameterList(torch.zeros(*row, n) for n in normed)

    def forward(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i > 0:
                x = F.gelu(x, approximate="tanh")
            if i > 0 and len(self.scales):
                x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
                x = torch.addcmul(self.offsets[i - 1], x, self.scales[i - 1])
            if weight.ndim == 2:
                x = F.linear(x, weight.mT, bias)
            else:
                x = torch.baddbmm(bias, x.expand(len(weight), -1, -1), weight)
        return x


class FlowPolicy(MLP):
    """Velocity v(s, x_t, t) of a flow over action chunks."""

    def forward(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """obs (B, S), x (..., B, D), t broadcastable to (..., B, 1) -> velocity (..., B, D)."""
        return super().forward(obs.expand(*x.shape[:-1], -1), x, t.expand(*x.shape[:-1], 1))


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
    for k in range(K):
        x = path[-1]
        if k < K - 1 or exact:
            drift = 2 * v_fine(x, t[k]) - x / (t[k] + h)
            path.append(x + h * drift + math.sqrt(h) * g[k] * noise[k])
        else:
            path.append(x + h * v_base(x, t[k]))
    return torch.stack(path)


@torch.no_grad()
def q_gradient(q: Callable[[Tensor], Tensor], x_1: Tensor) -> Tensor:
    """∇_x mean_E Q(clip(x, −1, 1)), none outside the box; q maps (B, D) to (E, B); (B, D)."""
    values, vjp = torch.func.vjp(lambda x: q(x.clamp(-1, 1)).mean(0), x_1)
    (gradient,) = vjp(torch.ones_like(values))
    return gradient


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
        _, vjp = torch.func.vjp(lambda x, s=time, e=end: 2 * v_base(x, s) - x / e, path[k])
        (pulled_back,) = vjp(adjoint[-1])
        adjoint.append(adjoint[-1] + pulled_back / K)
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

LAMBDA_SCALE = 3.0  # λ = 3 ℓ (authors' code)


class Agent(nn.Module):
    """Base flow, fine-tuned flow, critics and trust region, and one update of them all.

    `flow` is the base flow in training and `base`, v_base, its Polyak copy; `policy` is v_ft;
    `target_critic` the Polyak copy of `critic`. λ, the KL average and metrics stay on the device.
    """

    def __init__(self, cfg: Config, obs_dim: int, action_dim: int):
        super().__init__()
        self.cfg, self.action_dim, self.D = cfg, action_dim, cfg.chunk * action_dim
        gen = torch.Generator().manual_seed(cfg.seed)  # on the CPU: one start for every device
        n_in, hidden = obs_dim + self.D, [cfg.width] * cfg.layers
        self.flow = FlowPolicy([n_in + 1, *hidden, self.D], cfg.flow_layer_norm, generator=gen)
        self.critic = MLP([n_in, *hidden, 1], True, cfg.critics, gen)
        self.base = copy.deepcopy(self.flow).requires_grad_(False)
        self.policy = copy.deepcopy(self.flow)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("dual", torch.ones(()))  # ℓ
        self.register_buffer("kl_ema", torch.zeros(()))  # D
        self.to(cfg.device)
        self.reset_optimizer()

    def reset_optimizer(self) -> None:
        """One Adam over the three trained nets; it starts afresh after pretraining."""
        self.trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=self.cfg.lr)

    @property
    def lam(self) -> Tensor:
        """λ = 3 ℓ, or the fixed one (QAM)."""
        fixed = self.cfg.fixed_lambda
        return LAMBDA_SCALE * self.dual if fixed is None else torch.full_like(self.dual, fixed)

    def draw_noise(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All random numbers of one update, so that the update itself is deterministic."""
        draw = partial(torch.randn, generator=generator, device=generator.device)
        noise = dict(x_next=draw(B, self.D), x_flow=draw(B, self.D))
        noise["t_flow"] = torch.rand(B, 1, generator=generator, device=generator.device)
        return noise | dict(x_sde=draw(B, self.D), sde=draw(self.cfg.flow_steps, B, self.D))

    def pretrain_update(self, batch: dict, noise: dict, lr: float) -> dict[str, Tensor]:
        """One step of behaviour cloning of the base flow; returns metrics, on the device."""
        v, self.optimizer.param_groups[0]["lr"] = partial(self.flow, batch["obs"]), lr
        loss = flow_matching_loss(v, noise["x_flow"], batch["actions"], noise["t_flow"])
        return dict(flow_loss=loss.detach(), grad_norm=self._descend(loss, []))

    def finish_pretraining(self) -> None:
        """The Polyak copy of the base flow and v_ft start from the pretrained flow."""
        self.base.load_state_dict(self.flow.state_dict())
        self.policy.load_state_dict(self.flow.state_dict())
        self.reset_optimizer()

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

        # one step for all three nets, and the Polyak copies
        copies, loss = [(self.target_critic, self.critic)], critic_loss + matching_loss
        if not cfg.frozen_base:
            copies, loss = [*copies, (self.base, self.flow)], loss + flow_loss
        grad_norm = self._descend(loss, copies)

        # trust region: KL per action of the chunk, dual descent
        kl = path_kl(gap.detach()).mean() / cfg.chunk
        if cfg.fixed_lambda is None:
            self.kl_ema, self.dual = dual_step(kl, self.kl_ema, self.dual, cfg.kl_budget)
        losses = dict(critic_loss=critic_loss, flow_loss=flow_loss, matching_loss=matching_loss)
        metrics = {k: v.detach() for k, v in losses.items()} | dict(q_mean=q.detach().mean())
        metrics |= dict(path_kl=kl, target_kl=tilt_kl(adjoint, lam).mean() / cfg.chunk)
        metrics |= dict(adj_mean=terminal.abs().mean(), adj_max=terminal.abs().max())
        return metrics | dict(grad_norm=grad_norm, lam=self.lam, kl_ema=self.kl_ema)

    def _descend(self, loss: Tensor, copies: list[tuple[nn.Module, nn.Module]]) -> Tensor:
        """Clip at norm 1; Polyak, with the parameters from before Adam (authors' code); Adam."""
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.trained, 1.0)
        with torch.no_grad():
            for slow, fast in copies:
                pair = list(slow.parameters()), list(fast.parameters())
                torch._foreach_lerp_(*pair, self.cfg.tau)
        self.optimizer.step()
        return grad_norm

    def act(self, obs: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Action chunk (H, A) in [-1, 1] for an observation (S,), by the ODE of v_ft.

        Its noise comes from `generator`, a CPU one, or from torch's global generator.
        """
        x_0 = torch.randn(1, self.D, generator=generator).to(self.dual.device)
        v = partial(self.policy, torch.as_tensor(obs).to(x_0)[None])
        return sample_flow(v, x_0, self.cfg.flow_steps).view(-1, self.action_dim).cpu().numpy()

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> Agent:
        """The agent of a run's checkpoint.pt. Raises Failure if there is none or it is damaged."""
        saved = load_checkpoint(Path(path))
        agent = cls(replace(Config(**saved["config"]), device=device), *saved["dims"])
        agent.load_state_dict(saved["agent"])
        return agent


# =========================================================================================== data

STACK = {"cube-single": (0, 0), "cube-double": (0, 0.25), "cube-triple": (0.05, 0.35)}
STACK |= {"cube-quadruple": (0.1, 0.5)}  # OGBench's range of an episode's chance to stack a cube


def seed_of(*key: int) -> int:
    """An independent 32-bit seed for every key."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@cache
def oracle_env(domain: str) -> tuple[gymnasium.Env, dict]:
    """OGBench's data-collection environment and its scripted oracle for each kind of object."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    options = dict(mode="data_collection", terminate_at_goal=False, max_episode_steps=1001)
    env = gymnasium.make(f"{domain}-v0", **options)
    plan, shut = dict(env=env, noise=0.1, noise_smoothing=0.5), "puzzle" in domain
    button = button_plan.ButtonPlanOracle(gripper_always_closed=shut, **plan)
    cube, drawer = cube_plan.CubePlanOracle(**plan), drawer_plan.DrawerPlanOracle(**plan)
    window = window_plan.WindowPlanOracle(**plan)
    return env, dict(cube=cube, button=button, drawer=drawer, window=window)


def collect_episode(domain: str, *key: int) -> dict[str, np.ndarray]:
    """A scripted 'play' episode of 1001 steps in OGBench's layout, deterministic in the key.

    Of each step the state before it is kept: that is the one on which OGBench computes rewards.
    """
    env, oracles = oracle_env(domain)
    for attempt in itertools.count():
        seed = seed_of(*key, attempt)
        np.random.seed(seed)  # the oracles draw from numpy's global generator
        p_stack = np.random.uniform(*STACK.get(domain, (0.5, 0.5)))
        rows, done, oracle = [], False, None
        obs, info = env.reset(seed=seed)
        while not done:
            if oracle is None or oracle.done:
                if oracle:
                    obs, info = env.unwrapped.set_new_target(p_stack=p_stack)
                oracle = oracles[info["privileged/target_task"]]
                oracle.reset(obs, info)
            row = dict(observations=np.float32(obs))
            row["actions"] = np.clip(oracle.select_action(obs, info), -1, 1).astype(np.float32)
            obs, _, terminated, truncated, info = env.step(row["actions"])
            done = row["terminals"] = terminated or truncated
            before = ("prev_qpos", "prev_qvel", "prev_button_states")
            rows.append(row | {k[5:]: info[k] for k in before if k in info})
        data = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
        cube, (low, high) = data["qpos"][:, 14:17], env.unwrapped._workspace_bounds
        if domain != "scene" or np.all((low - 0.2 < cube) & (cube < high + 0.2)):
            return data  # a scene whose cube left the workspace is played again


def start_worker() -> None:
    """Collectors leave Ctrl-C to their parent and end when it does, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def collect(cfg: Config, domain: str) -> Path:
    """Collect a dataset and a held-out one (5 %) in parallel, each written atomically; or reuse."""
    episodes, folder = math.ceil(cfg.transitions / 1000), Path(cfg.cache_dir).expanduser()
    path = folder / f"{domain}-play-scripted-v1-seed{cfg.data_seed}-{episodes}k.npz"
    folder.mkdir(parents=True, exist_ok=True)
    say(f"{'reusing' if path.exists() else 'collecting'} {path}")
    held_out = path.with_name(f"{path.stem}-val.npz")
    for split, n, file in ((1, math.ceil(episodes / 20), held_out), (0, episodes, path)):
        if path.exists():  # it is written last
            break
        context, processes = mp.get_context("spawn"), cfg.workers or os.cpu_count()
        with ProcessPoolExecutor(processes, context, start_worker) as pool:
            submit = partial(pool.submit, collect_episode, domain, cfg.data_seed, split)
            jobs, parts = [submit(i) for i in range(n)], []
            try:
                for job in tqdm(jobs, f"collecting {file.stem}", unit="k steps", mininterval=1):
                    check_signals()
                    parts.append(job.result())
            finally:
                pool.shutdown(cancel_futures=True)
        merged = {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}
        write_atomically(file, lambda f, merged=merged: np.savez(f, **merged))
    return path


def unreachable(url: str, seconds: float = 10) -> str:
    """What keeps this file from being downloaded, known within so many seconds; '' if nothing."""
    request, pool = urllib.request.Request(url, method="HEAD"), ThreadPoolExecutor(1)
    try:  # in a thread, as looking up a name knows no time-out
        pool.submit(urllib.request.urlopen, request, timeout=seconds).result(seconds).close()
        return ""
    except (OSError, ValueError, TimeoutError) as error:
        return str(error) or f"no answer within {seconds:g} s"
    finally:
        pool.shutdown(wait=False)


def load_data(cfg: Config) -> tuple[gymnasium.Env, dict, dict, dict]:
    """Environment, data and held-out data with OGBench's rewards, and which data they are.

    Raises Failure where there are no data to be had, or they are damaged.
    """
    name, scripted = re.sub(r"-singletask-task\d", "", cfg.env), cfg.data == "scripted"
    domain, folder = re.split(rf"-({KINDS})-", name)[0], Path(cfg.dataset_dir).expanduser()
    path, held_out = folder / f"{name}.npz", folder / f"{name}-val.npz"
    wanted = f"put {path.name} and {held_out.name} into {folder} (--dataset-dir)"
    can = domain in MANIPULATION and name == f"{domain}-play-v0"
    if not scripted and not (path.exists() and held_out.exists()):
        url = f"{ogbench.utils.DATASET_URL}/{name}.npz"
        say(f"{path} is not there; trying {url}")
        if problem := unreachable(url):
            expect(can and cfg.data == "auto", f"the dataset {name}.npz", problem, wanted)
            say(f"{problem}; going on with data of OGBench's scripted oracles (--data scripted)")
            scripted = True
        else:
            ogbench.download_datasets([name], str(folder))
    if scripted:
        expect(can, "a cube, scene or puzzle 'play' set for --data scripted", name, wanted, 2)
        path = collect(cfg, domain)
    try:
        env, *sets = ogbench.make_env_and_datasets(cfg.env, dataset_path=str(path))
    except Exception as error:  # numpy and zipfile raise many kinds
        text = f"expected a dataset, got a damaged {path} ({error}); delete it and start again"
        raise Failure(text, 1) from error
    digest, shapes = hashlib.sha256(), dict(rewards=(), masks=(), terminals=())
    shapes |= dict.fromkeys(("observations", "next_observations"), env.observation_space.shape)
    for data in sets:
        for k, shape in (shapes | dict(actions=env.action_space.shape)).items():
            full = (len(data["rewards"]), *shape)
            expect(data[k].shape == full, f"{k} of shape {full} in {path}", data[k].shape)
            expect(bool(np.isfinite(data[k]).all()), f"finite {k} in {path}", "NaN or infinity")
            digest.update(np.ascontiguousarray(data[k]))
        worst, chunks = np.abs(data["actions"]).max(initial=0), f"a chunk of {cfg.chunk} actions"
        expect(worst <= 1 + 1e-5, f"actions in [-1, 1] in {path}", worst)
        expect(len(chunk_starts(data["terminals"], cfg.chunk)) > 0, f"{chunks} in {path}", "none")
    about = dict(source="scripted" if scripted else "ogbench", path=str(path))
    about |= dict(transitions=len(sets[0]["rewards"]), solved=int((sets[0]["masks"] == 0).sum()))
    return env, *sets, about | dict(sha256=digest.hexdigest())


def chunk_starts(terminals: np.ndarray, H: int) -> np.ndarray:
    """Indices from which H transitions stay within one episode."""
    ends = np.concatenate([[0], np.cumsum(terminals > 0)])  # episode ends before each index
    starts = np.arange(max(len(terminals) - H + 1, 0))
    return starts[ends[starts + H - 1] == ends[starts]]


class ReplayBuffer:
    """Transitions, and the chunks they form, on the device: the dataset, then online episodes."""

    KEYS = ("observations", "next_observations", "actions", "rewards", "masks", "terminals")

    def __init__(self, data: dict, cfg: Config):
        self.offsets = torch.arange(cfg.chunk, device=cfg.device)
        self.discounts = cfg.gamma**self.offsets
        empty = partial(torch.empty, 0, device=cfg.device)
        self.arrays, self.starts = {k: empty(*data[k].shape[1:]) for k in self.KEYS}, empty().long()
        self.add(data)
        self.first = len(self.arrays["rewards"])

    def add(self, data: dict) -> None:
        """Append whole episodes of transitions: KEYS, (N, …) each."""
        starts = chunk_starts(np.asarray(data["terminals"]), len(self.offsets))
        starts = torch.from_numpy(starts).to(self.starts) + len(self.arrays["rewards"])
        self.starts = torch.cat([self.starts, starts])
        for k, array in self.arrays.items():
            new = torch.as_tensor(np.asarray(data[k])).to(array)
            new = new.clamp(-1 + 1e-5, 1 - 1e-5) if k == "actions" else new
            self.arrays[k] = torch.cat([array, new])

    def sample(self, B: int, generator: torch.Generator) -> dict[str, Tensor]:
        """B chunks: obs, next_obs (B, S), actions (B, D), rewards Σ γ^i r_i and masks (B,)."""
        pick = torch.randint(len(self.starts), (B,), generator=generator, device=generator.device)
        steps = self.starts[pick][:, None] + self.offsets
        obs, next_obs, actions, rewards, masks, _ = self.arrays.values()
        batch = dict(obs=obs[steps[:, 0]], next_obs=next_obs[steps[:, -1]])
        batch |= dict(actions=actions[steps].flatten(1), masks=masks[steps].amin(1))
        return batch | dict(rewards=(rewards[steps] * self.discounts).sum(1))

    def online(self) -> dict[str, Tensor]:
        """What came after the dataset."""
        return {k: v[self.first :].clone() for k, v in self.arrays.items()}


# ===================================================================================== evaluation

PERIODIC, FINAL, ONLINE = 1, 2, 3  # streams of episode seeds


def make_env(cfg: Config, **options) -> gymnasium.Env:
    """The single-task environment; its id is the dataset's without the kind of data."""
    return gymnasium.make(re.sub(rf"-({KINDS})-singletask", "-singletask", cfg.env), **options)


def play(agent: Agent, env: gymnasium.Env, *key: int) -> Iterator[tuple]:
    """Play an episode, chunks open loop, start and policy noise seeded by the key.

    Yields (obs, next_obs, action, reward, mask, done), mask 0 where it was solved, and the info.
    """
    seed = seed_of(agent.cfg.seed, *key)
    np.random.seed(seed)
    generator, (obs, _), done = torch.Generator().manual_seed(seed), env.reset(seed=seed), False
    while not done:
        for action in agent.act(obs, generator):
            next_obs, reward, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            yield (obs, next_obs, action, float(reward), 1.0 - terminated, done), info
            obs = next_obs
            if done:
                break


def evaluate(agent: Agent, env: gymnasium.Env, episodes: int, stream: int, frames=None) -> dict:
    """Success at the end of seeded episodes with its standard error, mean return and length."""
    results = []
    for i in range(episodes):
        rewards = []
        for (*_, reward, _, _), info in play(agent, env, stream, i):  # noqa: B007
            check_signals()
            rewards.append(reward)
            if frames is not None and len(rewards) % 2:
                frames.append(env.render())
        results.append((float(info["success"]), sum(rewards), len(rewards)))
    mean, std = np.mean(results, 0).tolist(), np.std(results, 0, ddof=min(episodes - 1, 1))
    row = dict(success=mean[0], stderr=float(std[0]) / math.sqrt(episodes), episodes=episodes)
    return row | dict(mean_return=mean[1], mean_length=mean[2])


def percent(r: dict) -> str:
    spread = f"{r['stderr']:.1%} (standard error, {r['episodes']} episodes)"
    return f"success {r['success']:6.1%} ± {spread}"


def render_video(agent: Agent, path: Path) -> None:
    """Three evaluation episodes as a GIF. Raises Failure where OpenGL is missing."""
    frames: list = []
    try:
        env = make_env(agent.cfg, render_mode="rgb_array", width=240, height=240)
        evaluate(agent, env, 3, FINAL, frames)
    except Exception as error:  # mujoco raises what its OpenGL backend does
        todo = "install EGL (libegl1), or OSMesa and set MUJOCO_GL=osmesa"
        raise Failure(f"expected OpenGL for --video, got {error!r}; {todo}", 1) from error
    imageio.mimsave(path, frames, duration=100, loop=0)
    say(f"video: {path}")


def benchmark(cfg: Config, repeats: int = 9) -> list[float]:
    """Median seconds of a pretraining and of a TRQAM update, on zeros of the right sizes."""
    env, gen = make_env(cfg), torch.Generator(cfg.device).manual_seed(0)
    dims = env.observation_space.shape[0], env.action_space.shape[0]
    agent, zeros = Agent(cfg, *dims), partial(torch.zeros, cfg.batch, device=cfg.device)
    batch = dict(obs=zeros(dims[0]), next_obs=zeros(dims[0]), actions=zeros(agent.D))
    batch |= dict(rewards=zeros(), masks=zeros())
    times: list[list[float]] = [[], []]
    for i in range(2 * (repeats + 2)):
        update = partial(agent.pretrain_update, lr=0.0) if i % 2 == 0 else agent.update
        start = time.perf_counter()
        update(batch, agent.draw_noise(cfg.batch, gen))["grad_norm"].item()  # waits for the device
        times[i % 2].append(time.perf_counter() - start)
    return [float(np.median(t[2:])) for t in times]  # two of each warmed up


# ==================================================================================== bookkeeping

FORMAT = 1  # of checkpoint.pt
say = tqdm.write  # a line on the screen, above the progress bar
SIGNALS: list[int] = []  # Ctrl-C and SIGTERM, looked at where the state is whole


def on_signal(number: int, _frame) -> None:
    """Remember the signal; a second one ends the process at once."""
    if SIGNALS:
        os._exit(128 + number)
    SIGNALS.append(number)


def check_signals() -> None:
    if SIGNALS:
        raise KeyboardInterrupt


def write_atomically(path: Path, write: Callable) -> None:
    """Whenever the process dies, `path` is the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_csv(path: Path, rows: list[dict]) -> None:
    keys = list(dict.fromkeys(k for row in rows for k in row))
    lines = [",".join(keys)] + [",".join(str(row.get(k, "")) for k in keys) for row in rows]
    write_atomically(path, lambda f: f.write(("\n".join(lines) + "\n").encode()))


def load_checkpoint(path: Path) -> dict:
    """Read a checkpoint without running code from it. Raises Failure."""
    expect(path.exists(), "a checkpoint", f"no file {path}", "train first")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged and for unsafe files
        text = f"expected a checkpoint, got a damaged or unsafe {path}"
        raise Failure(f"{text} ({str(error).splitlines()[0]})", 1) from error
    version = saved.get("format") if isinstance(saved, dict) else None
    expect(version == FORMAT, f"checkpoint format {FORMAT}", f"{version} in {path}", "retrain")
    return saved


# ======================================================================================= training


class Run:
    """A run in its folder: the loop over the phases, its state, checkpoints and logs."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder, saved, begin = cfg, Path(cfg.run_dir), None, time.monotonic()
        self.checkpoint, device = self.folder / "checkpoint.pt", cfg.device
        if self.checkpoint.exists():
            todo = "go on with --resume, or use another --run-dir"
            expect(cfg.resume, "a new folder", f"a run in {self.folder}", todo, 2)
            saved = load_checkpoint(self.checkpoint)
            old = {k: v for k, v in saved["config"].items() if k not in MAY_CHANGE}
            new = [f"{k} {v} -> {getattr(cfg, k)}" for k, v in old.items() if getattr(cfg, k) != v]
            expect(not new, "the run's settings", "; ".join(new), "use another --run-dir", 2)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write_config({})  # an unwritable folder fails now, not after an hour
        self.env, train, held_out, data = load_data(cfg)
        say("data: " + ", ".join(f"{k} {v}" for k, v in data.items()))
        self.buffer = ReplayBuffer(train, cfg)
        self.dims = train["observations"].shape[1], train["actions"].shape[1]
        self.agent = Agent(cfg, *self.dims)
        fixed = torch.Generator(device).manual_seed(0)  # held-out batch and noise never change
        self.held_out = ReplayBuffer(held_out, cfg).sample(8192, fixed)
        self.held_out |= self.agent.draw_noise(8192, fixed)
        self.generator = torch.Generator(device).manual_seed(cfg.seed)  # of batches and updates
        # the state beside agent, buffer and generator: sums are of metrics since the last row
        self.state = dict(step=0, seconds=0.0, episodes=0, updates=0, sums={}, train=[], eval=[])
        if saved:
            same = saved["data"] == data["sha256"]
            expect(same, "the run's data", f"other data in {data['path']}")
            self.state = saved["state"]
            self.state["sums"] = {k: v.to(device) for k, v in self.state["sums"].items()}
            self.agent.load_state_dict(saved["agent"])
            self.agent.optimizer.load_state_dict(saved["optimizer"])
            self.generator.set_state(saved["generator"])
            if len(saved["online"]["rewards"]):
                self.buffer.add(saved["online"])
            say(f"resuming at step {self.state['step']}")
        names = ("torch", "ogbench", "mujoco", "gymnasium", "numpy")
        about = dict(versions={k: importlib.metadata.version(k) for k in names}, data_used=data)
        about |= dict(python=sys.version, device_name=device_name(device), command=sys.argv)
        self.write_config(about)
        self.sha256, self.begin = data["sha256"], begin - self.state["seconds"]
        self.save()

    def write_config(self, about: dict) -> None:
        text = json.dumps(asdict(self.cfg) | about, indent=1)
        write_atomically(self.folder / "config.json", lambda f: f.write(text.encode()))

    def save(self) -> None:
        """Write the checkpoint, unless a parameter is not finite."""
        finite = all(bool(x.isfinite().all()) for x in self.agent.state_dict().values())
        self.state["seconds"], what = time.monotonic() - self.begin, "NaN or infinity"
        expect(finite, f"finite parameters at step {self.state['step']}", what, "checkpoint kept")
        content = dict(format=FORMAT, config=asdict(self.cfg), dims=self.dims, data=self.sha256)
        content |= dict(agent=self.agent.state_dict(), optimizer=self.agent.optimizer.state_dict())
        content |= dict(state=self.state, generator=self.generator.get_state())
        content |= dict(online=self.buffer.online())
        write_atomically(self.checkpoint, partial(torch.save, content))

    def train(self) -> None:
        """All phases in one loop; a step is an update, online an environment step and an update."""
        cfg, state, agent, phase, bar, due = self.cfg, self.state, self.agent, "", None, False
        ends = itertools.accumulate((cfg.pretrain_steps, cfg.offline_steps, cfg.online_steps))
        ends = dict(zip(("pretrain", "offline", "online"), ends, strict=True))
        evaluations = range(ends["pretrain"], ends["online"], cfg.eval_interval)
        online_env, episode, transitions = make_env(cfg) if cfg.online_steps else None, None, []
        while True:
            step = state["step"]
            done = any(row["step"] == step for row in state["eval"])
            if not done and (step in ends.values() or step in evaluations):
                self.evaluate(next(k for k in ends if step <= ends[k]), step in ends.values())
            if step == ends["online"]:
                break
            if phase != (phase := next(k for k in ends if step < ends[k])):
                bar = tqdm(total=ends[phase], desc=phase, initial=step, disable=None)
                self.mark = time.monotonic(), step
            if SIGNALS and not transitions:  # else the last online episode's checkpoint stands
                self.save()
            check_signals()
            if phase == "online":
                episode = episode or play(agent, online_env, ONLINE, state["episodes"])
                transitions.append(next(episode)[0])
                if transitions[-1][-1]:  # done: the episode enters the buffer
                    columns = zip(*transitions, strict=True)
                    arrays = zip(self.buffer.KEYS, map(np.stack, columns), strict=True)
                    self.buffer.add(dict(arrays))
                    state["episodes"], episode, transitions = state["episodes"] + 1, None, []
            if phase != "online" or step >= ends["offline"] + cfg.online_start:
                batch = self.buffer.sample(cfg.batch, self.generator)
                noise = agent.draw_noise(cfg.batch, self.generator)
                if phase == "pretrain":
                    decay = (1 + math.cos(math.pi * step / cfg.pretrain_steps)) / 2
                    lr = cfg.pretrain_lr * (decay if cfg.pretrain_decay else 1)
                    metrics = agent.pretrain_update(batch, noise, lr)
                else:
                    metrics = agent.update(batch, noise)
                state["sums"] = {k: v + state["sums"].get(k, 0) for k, v in metrics.items()}
                state["updates"] += 1
            state["step"] = step = step + 1
            bar.update()
            if step == ends["pretrain"]:
                agent.finish_pretraining()
            if step % cfg.log_interval == 0 or step in ends.values():
                self.log(phase, ends[phase])
            due |= step % cfg.save_interval == 0 or step in ends.values() or step in evaluations
            if due and not transitions:
                self.save()
                due = False
        self.save()
        lam, kl, spent = float(agent.lam), float(agent.kl_ema), clock(state["seconds"])
        trust = f"λ {lam:.3f}, KL/budget {kl:.2f}/{cfg.kl_budget:.2f}"
        say(f"\n{cfg.env}, seed {cfg.seed}, scale {cfg.scale}: {trust}, wall-clock {spent}")
        names = dict(pretrain="pretrained policy", offline="TRQAM offline", online="TRQAM online")
        for row in filter(lambda row: row["final"], state["eval"]):
            say(f"  {names[row['phase']]:18s} {percent(row)}")

    def log(self, phase: str, end: int) -> None:
        """Read the averages since the last row; stop if one is not finite; write and say them."""
        cfg, state, now, step = self.cfg, self.state, time.monotonic(), self.state["step"]
        row = {k: float(v) / state["updates"] for k, v in state["sums"].items()}
        where = f"finite means over the {state['updates']} updates before step {step}"
        finite = all(map(math.isfinite, row.values()))
        expect(finite, where, row, f"{self.checkpoint} is from before")
        with torch.no_grad():
            x_0, x_1, t = (self.held_out[k] for k in ("x_flow", "actions", "t_flow"))
            loss = flow_matching_loss(partial(self.agent.flow, self.held_out["obs"]), x_0, x_1, t)
        row |= dict(held_out_loss=loss.item(), seconds=now - self.begin)
        state["train"].append(dict(step=step, phase=phase) | row)
        write_csv(self.folder / "train.csv", state["train"])
        rate = (step - self.mark[1]) / (now - self.mark[0])
        text = f"{phase:8s} {step:>7d}/{end}  {rate:5.1f}/s  {clock((end - step) / rate)} left"
        if "flow_loss" in row:
            text += f"  flow {row['flow_loss']:.3f} (held out {row['held_out_loss']:.4f})"
        if "lam" in row:
            text += f"  Q {row['q_mean']:7.2f}  critic {row['critic_loss']:7.3f}  match "
            text += f"{row['matching_loss']:7.1f}  kl {row['path_kl']:.2f}/{cfg.kl_budget:.2f}"
            text += f"  λ {row['lam']:.3f}"
        say(text)
        self.mark, state["updates"], state["sums"] = (now, step), 0, {}

    def evaluate(self, phase: str, last: bool) -> None:
        """Periodic evaluation; at a phase's end the final one, on episodes of its own."""
        cfg, rows, step = self.cfg, self.state["train"], self.state["step"]
        plan = (cfg.final_episodes, FINAL) if last else (cfg.eval_episodes, PERIODIC)
        row = dict(step=step, phase=phase, final=int(last)) | evaluate(self.agent, self.env, *plan)
        self.state["eval"].append(row)
        write_csv(self.folder / "eval.csv", self.state["eval"])
        say(f"evaluation at step {step}, after {phase}{' (final)' if last else ''}: {percent(row)}")
        if phase == "pretrain":
            old, new = (rows[i]["held_out_loss"] for i in (-len(rows) // 5 - 1, -1))
            say(f"held-out flow-matching loss {new:.4f}, {new / old - 1:+.2%} over the last fifth")


def clock(seconds: float) -> str:
    return f"{int(seconds / 3600)}:{int(seconds / 60) % 60:02d}:{int(seconds) % 60:02d}"


def device_name(device: str) -> str:
    threads = f"{device}, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name() if device == "cuda" else threads


def run(given: Config) -> None:
    """Do what the command line asks for."""
    cfg = resolve(given)
    folder, where = Path(cfg.run_dir), f"{cfg.env}, seed {cfg.seed}, on {device_name(cfg.device)}"
    if cfg.benchmark:
        sizes = f"width {cfg.width}, {cfg.critics} critics, K {cfg.flow_steps}, batch {cfg.batch}"
        times = "pretraining {:.4f}, TRQAM {:.4f} seconds per update".format(*benchmark(cfg))
        return say(f"{where}, {sizes}: {times}")
    if not cfg.eval_only:
        say(f"{where}, scale {cfg.scale} -> {folder}")
        if given.scale == "auto" and not cfg.resume:
            other = resolve(replace(given, scale="laptop" if cfg.scale == "paper" else "paper"))
            seconds = np.dot(benchmark(other, 3), (other.pretrain_steps, other.offline_steps))
            say(f"--scale {other.scale} would train for about {seconds / 3600:.1f} hours here")
        say(
            "settings: "
            + " ".join(f"{k}={v}" for k, v in asdict(cfg).items() if k not in MAY_CHANGE)
        )
        Run(cfg).train()
    agent = Agent.load(folder / "checkpoint.pt", cfg.device)
    if cfg.eval_only:
        say(f"{folder}: {percent(evaluate(agent, make_env(agent.cfg), cfg.final_episodes, FINAL))}")
    if cfg.video:
        render_video(agent, folder / "video.gif")


def main() -> int:
    """The command line. Exit codes: 0 done, 1 failed, 2 a wrong call, 130 and 143 interrupted."""
    warnings.filterwarnings("ignore", module="gymnasium|glfw")
    sys.stdout.reconfigure(line_buffering=True)  # a log file is written line by line
    given = tyro.cli(Config, description=__doc__)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        run(given)
    except KeyboardInterrupt:
        print("trqam.py: interrupted; go on with --resume", file=sys.stderr)
        return 128 + SIGNALS[0]
    except (Failure, OSError) as error:
        text, code = error.args if isinstance(error, Failure) else (error, 1)
        print(f"trqam.py: error: {text}", file=sys.stderr)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
