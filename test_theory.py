"""The theory of TRQAM, proven on the functions of `trqam.py` by property tests.

    pytest test_theory.py                                    deterministic, about two minutes
    HYPOTHESIS_PROFILE=thorough pytest test_theory.py --hypothesis-seed=1    random, 10× the cases
    HYPOTHESIS_PROFILE=quick pytest -x test_theory.py        few cases, for mutation testing

Every test opens with its statement. "Exact" statements hold to rounding for any number of steps K;
"limit" statements hold as h = 1/K → 0, and are tested by the measured order of convergence together
with the Richardson limit, never by a loose tolerance at one K. The oracles are written out here and
share nothing with `trqam.py`: the schedule is g_k² = 2(K + 1 − k)/(k + 1), laws of linear chains
come from moment recursions, laws of one-dimensional chains from their densities on a grid.

Linear chains need no sampling: points ±√n e_i of R^n have the mean 0 and covariance I of N(0, I_n),
so over these 2n "noises" the average of anything quadratic is its exact expectation (`cubature`).

Monte Carlo tests compare a mean with its expectation by a two-sided z-test at level α = 1e-9; the
whole file makes a false alarm with probability below 1e-6, even in the thorough profile (asserted
at the end). Each z-test also asserts, before it looks at the mean, that an error of the stated
resolution δ is seen with probability 1 − β = 0.999: (z_α + z_β)·SE ≤ δ. If not it fails as
inconclusive. Next to each stands a negative control: wrong formulas and wrong samplers, too large
and too small, that the very same z-test must reject.
"""

import dataclasses
import math
import os
from functools import partial
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, note, settings
from hypothesis import strategies as st

import trqam

# ------------------------------------------------------------------ profiles, device, statistics

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
PROFILES = {"quick": 0.2, "default": 1, "thorough": 10}  # multiples of the number of cases
if PROFILE not in PROFILES:
    raise ValueError(f"HYPOTHESIS_PROFILE: expected one of {list(PROFILES)}, got {PROFILE!r}")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F64 = {"dtype": torch.float64, "device": DEVICE}
torch.set_num_threads(1)  # such small matrices are slower on several
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

ALPHA, BETA = 1e-9, 1e-3  # false alarm and miss, per z-test
Z_ALPHA, Z_BETA = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(1 - BETA)
PATHS, DELTA = (2**20, 0.02) if DEVICE.type == "cuda" else (2**17, 0.05)  # N and resolution
Z_TESTS = {"allowed": 0, "made": 0}


def forall(n, /, monte_carlo=0, **strategies):
    """Hypothesis with n cases in the default profile.

    `monte_carlo`: z-tests of a case, those of all parametrisations together.
    """
    n = max(1, round(n * PROFILES[PROFILE]))
    Z_TESTS["allowed"] += n * monte_carlo
    shrink = [] if monte_carlo or n < 4 * PROFILES[PROFILE] else [Phase.shrink]  # the cheap ones
    profile = settings(
        max_examples=n,
        derandomize=PROFILE != "thorough",
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate, *shrink],
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: profile(given(**strategies)(test))


def z_score(sample, expected, resolution):
    """z of mean(sample) against `expected`; fails unless an error of `resolution` would be seen."""
    se = sample.std().item() / math.sqrt(len(sample))
    assert (Z_ALPHA + Z_BETA) * se <= resolution, f"inconclusive: SE {se:.2g} for {resolution:.2g}"
    return (sample.mean().item() - expected) / se


def accept(sample, expected, resolution):
    Z_TESTS["made"] += 1
    z = z_score(sample, expected, resolution)
    assert abs(z) <= Z_ALPHA, f"mean {sample.mean():.5g}, expected {expected:.5g}, z = {z:.1f}"


def reject(sample, expected, resolution, sign):
    """The same test must reject, on the side of `sign` (0: either)."""
    z = z_score(sample, expected, resolution)
    assert (sign * z if sign else abs(z)) > Z_ALPHA, f"wrong formula not rejected: z = {z:.1f}"


def close(a, b, tol=1e-9):
    """Equal to rounding: |a − b| ≤ tol (1 + |b|) everywhere."""
    a, b = torch.as_tensor(a, **F64), torch.as_tensor(b, **F64)
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    error = ((a - b).abs() / (1 + b.abs())).max().item()
    assert error <= tol, f"relative error {error:.2g} > {tol:.0e}"


def converges(f, limit, steps, order=1, slack=0.1):
    """f(K) → limit with f(K) − limit ≈ C h^order, seen on three K's, each twice the one before.

    The measured order is within `slack`, and Richardson's extrapolation, which removes the term
    C h^order, comes at least 1/slack times closer to the limit than the last value.
    """
    assert len(steps) == 3 and steps[1] == 2 * steps[0] and steps[2] == 2 * steps[1]
    a, b, c = (float(f(K)) for K in steps)
    orders = [math.log2(abs((p - limit) / (q - limit))) for p, q in ((a, b), (b, c))]
    assert all(abs(p - order) < slack for p in orders), f"measured orders {orders}"
    richardson = c + (c - b) / (2**order - 1)
    assert abs(richardson - limit) < slack * abs(c - limit), (richardson, limit, c)


# Ranges whose simplest values still inform: λ = 1, one dimension, one step, no control hide bugs.
seeds = st.integers(0, 2**32 - 1)
lams = st.floats(0.2, 0.7) | st.floats(1.5, 5)
dims, steps = st.integers(2, 4), st.integers(4, 16)
budgets = st.floats(1, 4)
kinds = st.sampled_from(["mlp", "gaussian"])
chains = pytest.mark.parametrize("exact", [True, False], ids=["exact", "training"])


# ------------------------------------------------------------------ velocity fields


class Draw:
    """Random numbers of one case, from its seed."""

    def __init__(self, seed):
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, **F64)

    def uniform(self, low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=self.generator, **F64)


def mlp_field(draw, D, width=8, gain=1.5):
    """Random two-layer tanh network (x, t) -> R^D; bounded, so that no chain can explode."""
    w_x, w_t, w_h = draw.normal(D, width), draw.normal(width), draw.normal(width, width)
    w_o, b = draw.normal(width, D), draw.normal(2, width)

    def v(x, t):
        y = torch.tanh(x @ w_x * (gain / math.sqrt(D)) + t * w_t + b[0])
        return torch.tanh(y @ w_h * (gain / math.sqrt(width)) + b[1]) @ w_o / math.sqrt(width)

    return v


def gaussian_velocity(mean, cov):
    """Marginal velocity of the flow to N(m, S): m + (tS − (1−t)I)(t²S + (1−t)²I)⁻¹(x − tm)."""
    s2, U = torch.linalg.eigh(cov)

    def v(x, t):
        gain = (t * s2 - (1 - t)) / (t**2 * s2 + (1 - t) ** 2)
        return mean + ((x - t * mean) @ U * gain) @ U.T

    return v


def random_gaussian(draw, D, low=0.25, high=0.7):
    """Mean, and covariance with standard deviations in [low, high] along random axes."""
    U = torch.linalg.qr(draw.normal(D, D))[0]
    return 0.5 * draw.normal(D), U @ torch.diag(draw.uniform(low, high, D) ** 2) @ U.T


def affine_field(draw, D):
    """Time-dependent affine gap (c + M x)(½ + t) that pushes away from the origin."""
    c, M = draw.normal(D), 0.5 * torch.eye(D, **F64) + 0.3 * draw.normal(D, D)
    return lambda x, t: (c + x @ M.T) * (0.5 + t)


def random_fields(kind, draw, D):
    """Base velocity and direction of the gap; "push": outward, so that the state matters."""
    if kind == "mlp":
        return mlp_field(draw, D), mlp_field(draw, D)
    base = gaussian_velocity(*random_gaussian(draw, D))
    return base, (affine_field(draw, D) if kind == "gaussian" else lambda x, t: x * (0.5 + t))


def add(v, d, scale=1.0):
    return lambda x, t: v(x, t) + scale * d(x, t)


# ------------------------------------------------------------------ oracles


def times(K):
    return torch.arange(K, **F64).view(K, 1, 1) / K


def g_squared(K):
    """g_k² = 2 (1 − t_k + h)/(t_k + h) = 2 (K + 1 − k)/(k + 1)."""
    return torch.tensor([2 * (K + 1 - k) / (k + 1) for k in range(K)], **F64).view(K, 1, 1)


def step_mean(v, path):
    """E[X_{k+1} | X_k] = X_k + h (2v − X_k/(t_k + h)) = X_k + 2v/K − X_k/(k + 1)."""
    K, x = len(path) - 1, path[:-1]
    return x + 2 * v(x, times(K)) / K - x / torch.arange(1, K + 1, **F64).view(K, 1, 1)


def log_ratio(v_fine, v_base, path):
    """log of the ratio of the two Gaussian transition densities of each step, (K, B)."""
    scale = (g_squared(len(path) - 1) / (len(path) - 1)).sqrt()
    fine, base = (torch.distributions.Normal(step_mean(v, path), scale) for v in (v_fine, v_base))
    return (fine.log_prob(path[1:]) - base.log_prob(path[1:])).sum(-1)


def girsanov(gap):
    """Terms (2h/g_k²) ‖Δv_k‖² of the KL, (K, B)."""
    return (2 / len(gap) * gap**2 / g_squared(len(gap))).sum(-1)


def affine_map(v, t, D):
    """Matrix A and offset b of an affine field v(x, t) = A x + b."""
    t = torch.full((1, 1), t, **F64)
    b = v(torch.zeros(1, D, **F64), t)
    return (v(torch.eye(D, **F64), t) - b).T, b[0]


def moments(v_fine, v_base, K, D, exact=True, start=1.0):
    """Means (K + 1, D) and covariances (K + 1, D, D) of a linear chain, by recursion."""
    eye = torch.eye(D, **F64)
    means, covs = [torch.zeros(D, **F64)], [start * eye]
    for k, g2 in enumerate(g_squared(K).flatten()):
        noisy = exact or k < K - 1
        A, b = affine_map(v_fine if noisy else v_base, k / K, D)
        F = (1 - 1 / (k + 1)) * eye + 2 * A / K if noisy else eye + A / K
        means.append(F @ means[-1] + (2 if noisy else 1) * b / K)
        covs.append(F @ covs[-1] @ F.T + noisy * g2 / K * eye)
    return torch.stack(means), torch.stack(covs)


def end_given_start(v_base, K, D):
    """E[X_K] and Cov(X_K | X_0) of the linear base chain, by recursion from Cov = 0."""
    means, covs = moments(v_base, v_base, K, D, start=0.0)
    return means[K], covs[K]


def affine_kl(v_base, d, scale, K, D, steps=None, under=1.0):
    """Σ_k (2h/g_k²) E‖Δv_k‖², Δv = scale·d affine, on the chain of v_base + under·scale·d."""
    means, covs = moments(add(v_base, d, under * scale), v_base, K, D)
    total = 0.0
    for k, g2 in enumerate(g_squared(K).flatten()[:steps]):
        M, c = affine_map(d, k / K, D)
        norm = (M @ means[k] + c).square().sum() + (M @ covs[k] @ M.T).trace()
        total += 2 / (K * g2) * scale**2 * norm
    return total.item()


def gaussian_kl(mean_p, cov_p, mean_q, cov_q):
    """KL(N_p ‖ N_q)."""
    inverse, shift = torch.linalg.inv(cov_q), mean_q - mean_p
    trace = (inverse @ cov_p).trace() - len(mean_p) + shift @ inverse @ shift
    return 0.5 * (trace + torch.logdet(cov_q) - torch.logdet(cov_p)).item()


def cubature(K, D):
    """Equally weighted x_0 (B, D) and noise (K, B, D), mean 0 and covariance I, B = 2(K + 1)D."""
    n = (K + 1) * D
    points = math.sqrt(n) * torch.cat([torch.eye(n, **F64), -torch.eye(n, **F64)])
    points = points.view(2 * n, K + 1, D).transpose(0, 1)
    return points[0], points[1:]


def law(x):
    """Mean and covariance of x (B, D) over equally weighted points."""
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x)


def scale_for(kl, v_base, d, K, D, draw, counted, rounds=4):
    """Scale of the gap d that makes the KL of `counted` steps about `kl` (a pilot, 1024 paths)."""
    x_0, noise, scale = draw.normal(1024, D), draw.normal(K, 1024, D), 0.5
    for _ in range(rounds):
        v = add(v_base, d, scale)
        path = trqam.simulate_sde(v, v_base, x_0, noise, exact=True)
        now = girsanov(scale * d(path[:-1], times(K)))[:counted].sum(0).mean().item()
        scale *= min(2.0, max(0.5, math.sqrt(kl / now)))
    return scale


# ------------------------------------------------------------------ flow matching and acting


@forall(20, seed=seeds, D=dims, t=st.floats(0.05, 0.95))
def test_flow_matching_loss_value(seed, D, t):
    """loss = mean_{B,D} (v((1−t)x_0 + t x_1, t) − (x_1 − x_0))²: exact."""
    draw = Draw(seed)
    v, x_0, x_1, B = mlp_field(draw, D), draw.normal(5, D), draw.normal(5, D), 5
    ts = t * draw.uniform(0.5, 1, B, 1)
    total = 0.0
    for i in range(B):
        out = v(x_0[i] + ts[i] * (x_1[i] - x_0[i]), ts[i])
        total += sum((out[j] - x_1[i, j] + x_0[i, j]).item() ** 2 for j in range(D))
    close(trqam.flow_matching_loss(v, x_0, x_1, ts), total / (B * D))


@forall(20, seed=seeds, D=dims, t=st.floats(0.05, 0.95), size=st.floats(0.1, 2))
def test_flow_matching_minimiser_is_the_marginal_velocity(seed, D, t, size):
    """argmin_v loss = E[X_1 − X_0 | X_t] and loss(v) = loss(v*) + E‖v − v*‖²/D: exact.

    For X_1 ~ N(m, S) the minimum is the mean of s²/((1−t)² + t²s²) over the eigenvalues s² of S.
    """
    draw = Draw(seed)
    mean, cov = random_gaussian(draw, D)
    x_0, z = cubature(1, D)
    x_1 = mean + z[0] @ torch.linalg.cholesky(cov).T
    ts, best = torch.full((len(x_0), 1), t, **F64), gaussian_velocity(mean, cov)
    s2 = torch.linalg.eigvalsh(cov)
    minimum = (s2 / ((1 - t) ** 2 + t**2 * s2)).mean()
    close(trqam.flow_matching_loss(best, x_0, x_1, ts), minimum)
    d = affine_field(draw, D)
    excess = size**2 * d((1 - t) * x_0 + t * x_1, ts).square().mean()
    close(trqam.flow_matching_loss(add(best, d, size), x_0, x_1, ts), minimum + excess)


@forall(20, seed=seeds, D=dims, K=steps, size=st.floats(1, 3))
def test_sample_flow_is_euler_then_clip(seed, D, K, size):
    """x_{k+1} = x_k + h v(x_k, kh), action = clip(x_K, −1, 1): exact."""
    draw = Draw(seed)
    v, x = mlp_field(draw, D), size * draw.normal(32, D)
    action = trqam.sample_flow(v, x, K)
    for k in range(K):
        x = x + v(x, torch.full((1, 1), k / K, **F64)) / K
    assert (x.abs() > 1).any()  # or the clip would not be tested
    close(action, torch.minimum(torch.maximum(x, -torch.ones_like(x)), torch.ones_like(x)))


@forall(4, seed=seeds, s=st.floats(0.3, 0.7), m=st.floats(-0.5, 0.5))
def test_sample_flow_transports_noise_to_data(seed, s, m):
    """The marginal velocity's flow maps N(0, 1) to N(m, s²), x_0 ↦ m + s x_0: limit, order 1."""
    assume(abs(m) > 0.05)
    v = gaussian_velocity(torch.full((1,), m, **F64), torch.full((1, 1), s**2, **F64))
    x_0 = torch.tensor([[0.0], [0.1]], **F64)
    sampled = {K: trqam.sample_flow(v, x_0, K).flatten() for K in (256, 512, 1024)}
    converges(lambda K: 10 * (sampled[K][1] - sampled[K][0]), s, (256, 512, 1024))
    close(sampled[256][0], m)  # the mean is carried without error


@forall(20, seed=seeds, rho=st.floats(0.1, 2), discount=st.floats(0.2, 0.99), E=st.integers(2, 10))
def test_td_target(seed, rho, discount, E):
    """y = r + γ^H m (mean_E Q' − ρ std_E Q'), std the population's; m = 0 → y = r: exact."""
    draw = Draw(seed)
    rewards, q = draw.normal(6), draw.normal(E, 6)
    masks = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], **F64)
    y = trqam.td_target(rewards, masks, q, discount, rho)
    for i in range(6):
        column = [q[e, i].item() for e in range(E)]
        mean = math.fsum(column) / E
        std = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / E)
        bootstrap = discount * (mean - rho * std) if masks[i] else 0.0
        close(y[i], rewards[i].item() + bootstrap)


@forall(20, seed=seeds, D=dims, E=st.integers(2, 5))
def test_q_gradient_is_zero_outside_the_box(seed, D, E):
    """∇_x mean_E Q(clip(x, −1, 1)): ∂_i = 0 where |x_i| > 1, else ∂_i mean_E Q at the clip: exact.

    Here Q_e(x) = ½ xᵀA_e x + b_e·x, whose gradient is A_e x + b_e.
    """
    draw = Draw(seed)
    A, b, x = draw.normal(E, D, D), draw.normal(E, D), 1.5 * draw.normal(16, D)
    A = A + A.mT
    inside = (x > -1) & (x < 1)
    assert inside.any() and (~inside).any()
    clipped = torch.where(inside, x, x.sign())
    expected = inside * torch.stack([clipped @ A[e] + b[e] for e in range(E)]).mean(0)

    def q(y):
        return 0.5 * torch.einsum("bi,eij,bj->eb", y, A, y) + b @ y.T

    close(trqam.q_gradient(q, x), expected)


# ------------------------------------------------------------------ Section 4: the memoryless chain


@forall(10, K=st.integers(2, 64))
def test_schedule_is_the_shifted_memoryless_one(K):
    """t_k = k/K, g_k² = 2(1 − t_k + h)/(t_k + h) = 2(K + 1 − k)/(k + 1): exact."""
    t, g = trqam.schedule(K, torch.zeros(1, **F64))
    assert t.shape == g.shape == (K, 1, 1) and t.dtype == g.dtype == torch.float64
    close(t, times(K), 1e-14)
    close(g**2, g_squared(K), 1e-13)


@forall(6, seed=seeds, D=dims, j=st.sampled_from([1, 2, 3, 5, 6, 7]))
def test_memoryless_diffusion_of_the_score(seed, D, j):
    """2v − x/t = v + ½ g² ∇log p_t with g² = 2(1−t)/t: the schedule for which the SDE has the
    marginals p_t of the flow. Identity of the fields exact; g_k² of the code: limit, order 1
    (and exact at t = ½).
    """
    draw, t = Draw(seed), j / 8
    mean, cov = random_gaussian(draw, D)
    x, tt = draw.normal(8, D), torch.full((8, 1), t, **F64)
    v = gaussian_velocity(mean, cov)(x, tt)
    marginal = t**2 * cov + (1 - t) ** 2 * torch.eye(D, **F64)
    score = -(x - t * mean) @ torch.linalg.inv(marginal)
    close(2 * v - x / t, v + (1 - t) / t * score)

    def code(K):
        return trqam.schedule(K, x)[1][j * K // 8] ** 2

    converges(code, 2 * (1 - t) / t, (256, 512, 1024))


@chains
@forall(12, seed=seeds, D=dims, K=steps, kind=kinds)
def test_simulated_chain_inverts_to_its_noise(exact, seed, D, K, kind):
    """ε_k = (X_{k+1} − X_k − h(2 v_ft(X_k, t_k) − X_k/(t_k + h)))/(√h g_k), each step: exact.

    The training chain ends with X_K = X_{K−1} + h v_base(X_{K−1}, t_{K−1}) instead. (T2)
    """
    draw = Draw(seed)
    v_base, d = random_fields(kind, draw, D)
    v_fine, x_0, noise = add(v_base, d), draw.normal(7, D), draw.normal(K, 7, D)
    path = trqam.simulate_sde(v_fine, v_base, x_0, noise, exact=exact)
    assert path.shape == (K + 1, 7, D) and torch.equal(path[0], x_0)
    innovations = (path[1:] - step_mean(v_fine, path)) / (g_squared(K) / K).sqrt()
    n = K if exact else K - 1
    close(innovations[:n], noise[:n])
    if not exact:
        close(path[K], path[K - 1] + v_base(path[K - 1], times(K)[-1]) / K)
        assert torch.equal(path, trqam.simulate_sde(v_fine, v_base, x_0, noise))  # the default


@chains
@forall(8, seed=seeds, D=dims, K=steps)
def test_linear_chain_has_the_moments_of_its_recursion(exact, seed, D, K):
    """E[X_{k+1}] = F_k E[X_k] + f_k, Cov[X_{k+1}] = F_k Cov[X_k] F_kᵀ + h g_k² I: exact."""
    draw = Draw(seed)
    v_base, d = random_fields("gaussian", draw, D)
    v_fine = add(v_base, d, 0.5)
    path = trqam.simulate_sde(v_fine, v_base, *cubature(K, D), exact=exact)
    means, covs = moments(v_fine, v_base, K, D, exact)
    for k in range(K + 1):
        mean, cov = law(path[k])
        close(mean, means[k])
        close(cov, covs[k])


@chains
@forall(4, s=st.floats(0.3, 0.9), m=st.floats(0.2, 1))
def test_memoryless_conditional_law(exact, s, m):
    """X_t | X_1 ~ N(t X_1, (1−t)²) and X_1 ~ N(m, s²): limit, order 1; Cov(X_0, X_K) = O(h²)."""
    v = gaussian_velocity(torch.full((1,), m, **F64), torch.full((1, 1), s**2, **F64))
    covs, means, Ks = {}, {}, (256, 512, 1024)
    for K in Ks:
        path = trqam.simulate_sde(v, v, *cubature(K, 1), exact=exact)
        means[K], covs[K] = law(path[[0, K // 4, K // 2, 3 * K // 4, K]].squeeze(-1).T)
    converges(lambda K: covs[K][4, 4], s**2, Ks)
    for j, t in ((1, 0.25), (2, 0.5), (3, 0.75)):
        converges(lambda K, j=j: covs[K][j, 4] / covs[K][4, 4], t, Ks)
        given_x_1 = lambda K, j=j: covs[K][j, j] - covs[K][j, 4] ** 2 / covs[K][4, 4]  # noqa: E731
        converges(given_x_1, (1 - t) ** 2, Ks)
    forgotten = [covs[K][0, 4].abs().item() for K in Ks]
    for a, b in pairwise(forgotten):
        assert 3.6 < a / b < 4.4, forgotten


def test_sde_and_ode_variances_converge_to_each_other():
    """Var X_K → s² along the SDE (0.665 at K = 8, 0.506 at K = 256) and the ODE, s² = ½: limit."""
    v = gaussian_velocity(torch.zeros(1, **F64), torch.full((1, 1), 0.5, **F64))

    def sde(K):
        return law(trqam.simulate_sde(v, v, *cubature(K, 1), exact=True)[-1])[1].item()

    def ode(K):
        return (10 * trqam.sample_flow(v, torch.full((1, 1), 0.1, **F64), K).item()) ** 2

    assert abs(sde(8) - 0.665) < 5e-4 and abs(sde(256) - 0.506) < 5e-4
    converges(sde, 0.5, (256, 512, 1024))
    converges(ode, 0.5, (256, 512, 1024))
    assert ode(8) < 0.5 < sde(8)  # at the K of practice they differ, on both sides of the limit


# ------------------------------------------------------------------ Theorem 1: the path-space KL
# Per path: A = Σ (2h/g²)‖Δv‖², M = Σ a·ε with a = 2√h Δv/g, L = log dP^u/dP^base from the
# transition densities. Then L = A + M, E[L] = KL = E[A], Var M = 2 KL, for any h.


@chains
@forall(16, seed=seeds, D=dims, K=steps, lam=lams, kind=kinds)
def test_theorem1_pathwise_identity(exact, seed, D, K, lam, kind):
    """L = A + M on every path, A = Σ(2h/g²)‖Δv‖² = Σ(h/2λ)‖u‖², u = 2Δv/σ, σ = g/√λ: exact. (T1)

    The training estimate counts a last step that its chain does not make noisily: its A is that of
    the exact chain with the same noise, (2h/g_{K−1}²)‖Δv_{K−1}‖² more than its own log-ratio has.
    """
    draw = Draw(seed)
    v_base, d = random_fields(kind, draw, D)
    v_fine, x_0, noise = add(v_base, d, 0.7), draw.normal(9, D), draw.normal(K, 9, D)
    path = trqam.simulate_sde(v_fine, v_base, x_0, noise, exact=exact)
    gap = trqam.velocity_gap(v_fine, v_base, path)
    n = K if exact else K - 1  # noisy steps
    L = log_ratio(v_fine, v_base, path)[:n].sum(0)
    M = (2 * gap * noise / (K * g_squared(K)).sqrt())[:n].sum((0, 2))
    last = girsanov(gap)[n:].sum(0)
    for A in (trqam.path_kl(gap), trqam.path_kl_from_control(trqam.control(gap, lam), lam)):
        assert A.shape == (9,)
        close(L, A - last + M)
    if not exact:
        assert (last > 0).all()
        whole = trqam.simulate_sde(v_fine, v_base, x_0, noise, exact=True)
        close(trqam.path_kl(gap), trqam.path_kl(trqam.velocity_gap(v_fine, v_base, whole)))


@forall(8, seed=seeds, D=dims, K=steps, lam=lams)
def test_control_is_the_drift_it_adds(seed, D, K, lam):
    """σu = 2(v_ft − v_base), the drift it adds; λ as a tensor gives the same: exact."""
    draw = Draw(seed)
    gap = draw.normal(K, 3, D)
    sigma = (g_squared(K) / lam).sqrt()
    close(sigma * trqam.control(gap, lam), 2 * gap)
    close(trqam.control(gap, torch.tensor(lam, **F64)), trqam.control(gap, lam))


@forall(8, seed=seeds, D=dims, K=steps, kind=kinds)
def test_velocity_gap_is_taken_at_the_start_of_each_step(seed, D, K, kind):
    """Δv_k = (v_ft − v_base)(X_k, t_k), k = 0 … K−1, on any path: exact."""
    draw = Draw(seed)
    (v_base, d), path = random_fields(kind, draw, D), draw.normal(K + 1, 4, D)
    gap = trqam.velocity_gap(add(v_base, d), v_base, path)
    for k in range(K):
        close(gap[k], d(path[k], torch.full((4, 1), k / K, **F64)))


@forall(8, seed=seeds, D=dims, K=steps, under=st.sampled_from([0.0, 1.0]))
def test_theorem1_linear_gaussian_kl(seed, D, K, under):
    """E_{P^u} Σ(2h/g²)‖Δv‖² = Σ(2h/g²)(‖Mμ_k + c‖² + tr MΣ_kMᵀ), μ, Σ the law of X_k: exact.

    Also under the base law, where the average is another number. No sampling: see `cubature`.
    """
    draw = Draw(seed)
    v_base, d = random_fields("gaussian", draw, D)
    v_fine, x_0, noise = add(v_base, d, 0.5), *cubature(K, D)
    for exact in (True, False):  # the training estimate is that of the exact chain
        v = v_fine if under else v_base
        path = trqam.simulate_sde(v, v_base, x_0, noise, exact=exact)
        estimate = trqam.path_kl(trqam.velocity_gap(v_fine, v_base, path)).mean()
        close(estimate, affine_kl(v_base, d, 0.5, K, D, under=under))


def theorem1_problem(seed, D, K, kl, kind, exact=True):
    """Fields with a path KL of about `kl`, and PATHS paths under P^u."""
    draw = Draw(seed)
    v_base, d = random_fields(kind, draw, D)
    scale = scale_for(kl, v_base, d, K, D, draw, K if exact else K - 1)
    v_fine = add(v_base, d, scale)
    x_0, noise = draw.normal(PATHS, D), draw.normal(K, PATHS, D)
    path = trqam.simulate_sde(v_fine, v_base, x_0, noise, exact=exact)
    return v_fine, v_base, d, scale, path, (x_0, noise)


@chains
@forall(2, monte_carlo=2, seed=seeds, D=dims, K=st.integers(4, 10), lam=lams, kl=st.floats(1.2, 4))
def test_theorem1_monte_carlo(exact, seed, D, K, lam, kl):
    """E_{P^u}[log dP^u/dP^base] = KL = E_{P^u}[Σ (h/2λ)‖u‖²], random networks: exact. (T3)

    Each side counts the noisy steps of its chain.
    """
    v_fine, v_base, _, _, path, _ = theorem1_problem(seed, D, K, kl, "mlp", exact)
    n = K if exact else K - 1
    L = log_ratio(v_fine, v_base, path)[:n].sum(0)
    u = trqam.control(trqam.velocity_gap(v_fine, v_base, path), lam)
    u[n:] = 0
    A = trqam.path_kl_from_control(u, lam)
    accept(L - A, 0.0, DELTA * A.mean().item())


@chains
@forall(3, monte_carlo=2, seed=seeds, D=dims, K=st.integers(4, 10), kl=st.floats(1.5, 4))
def test_theorem1_monte_carlo_against_moments(exact, seed, D, K, kl):
    """E_{P^u}[log dP^u/dP^base] = Σ(2h/g²)(‖Mμ_k + c‖² + tr MΣ_kMᵀ), affine control: exact. (T3b)

    Both sides independent: densities of sampled paths, and a recursion that samples nothing.
    """
    v_fine, v_base, d, scale, path, _ = theorem1_problem(seed, D, K, kl, "gaussian", exact)
    n = K if exact else K - 1
    L = log_ratio(v_fine, v_base, path)[:n].sum(0)
    expected = affine_kl(v_base, d, scale, K, D, steps=n)
    # the control grows along the path, so L spreads wider than √(2KL); resolution to match
    accept(L, expected, 2 * DELTA * expected)
    for factor, sign in ((0.75, 1), (1.25, -1)):
        reject(L, factor * expected, 2 * DELTA * expected, sign)


@forall(
    3, monte_carlo=1, seed=seeds, D=dims, K=st.integers(4, 10), kl=st.floats(0.15, 0.25), kind=kinds
)
def test_theorem1_likelihood_ratio_is_normalised(seed, D, K, kl, kind):
    """E_{P^u}[e^{−L}] = 1, L = A + M: drift and quadratic variation together, exact. (T4)"""
    v_fine, v_base, _, _, path, (_, noise) = theorem1_problem(seed, D, K, kl, kind)
    gap = trqam.velocity_gap(v_fine, v_base, path)
    M = (2 * gap * noise / (K * g_squared(K)).sqrt()).sum((0, 2))
    weight = torch.exp(-trqam.path_kl(gap) - M)
    accept(weight, 1.0, 2 * DELTA)


@forall(3, monte_carlo=2, seed=seeds, D=dims, K=st.integers(6, 10), kl=st.floats(2, 4))
def test_theorem1_needs_the_controlled_measure(seed, D, K, kl):
    """E_{P^u}[A] = KL; E_{P^base}[A] is another number, which the test rejects as the KL. (T5)"""
    v_fine, v_base, d, scale, path, noise = theorem1_problem(seed, D, K, kl, "push")
    right, wrong = (affine_kl(v_base, d, scale, K, D, under=w) for w in (1.0, 0.0))
    assert abs(right - wrong) > 2 * DELTA * right, "inconclusive: control hardly depends on state"
    under = trqam.path_kl(trqam.velocity_gap(v_fine, v_base, path))
    path = trqam.simulate_sde(v_base, v_base, *noise, exact=True)
    base = trqam.path_kl(trqam.velocity_gap(v_fine, v_base, path))
    accept(under, right, DELTA * right)
    accept(base, wrong, DELTA * right)
    reject(base, right, DELTA * right, math.copysign(1, wrong - right))
    reject(under, wrong, DELTA * right, math.copysign(1, right - wrong))


@forall(1, monte_carlo=1, seed=seeds)
def test_theorem1_monte_carlo_rejects_wrong_formulas(seed):
    """Negative control of T3: E[L] is none of the usual mistakes, seen on the stated side."""
    K, D, h, t = 10, 3, 0.1, times(10)
    v_fine, v_base, _, _, path, noise = theorem1_problem(seed, D, K, 1.5, "mlp")
    gap = trqam.velocity_gap(v_fine, v_base, path)
    L, A = log_ratio(v_fine, v_base, path).sum(0), trqam.path_kl(gap)
    resolution = DELTA * A.mean().item()

    def with_g2(g2):
        return (2 * h * gap**2 / g2).sum((0, 2))

    mistakes = (
        (2 * A, -1),  # a factor 2, a factor ½
        (A / 2, 1),
        *((lam * A, math.copysign(1, 1 - lam)) for lam in (0.3, 3.0)),  # λ of (h/2λ)‖u‖² forgotten
        *((lam**0.5 * A, math.copysign(1, 1 - lam)) for lam in (0.3, 3.0)),  # or its root
        (A / D, 1),  # mean over dimensions
        (with_g2(2 * (1 - t) / (t + h)), -1),  # numerator 1 − t
        (with_g2(2 * (1 - t + h / 2) / (t + h / 2)), 0),  # half a step off
        (with_g2(g_squared(K).sqrt()), 0),  # g for g²
        (girsanov(gap)[:-1].sum(0), 1),  # last step dropped
    )
    effects = [abs((A - wrong).mean().item()) for wrong, _ in mistakes]
    # a wrong weighting of the steps can happen to give nearly the right sum: another problem then
    assume(min(effects) > 1.5 * resolution)
    accept(L - A, 0.0, resolution)
    for (wrong, sign), effect in zip(mistakes, effects, strict=True):
        reject(L - wrong, 0.0, effect, sign)
    base = trqam.simulate_sde(v_base, v_base, *noise, exact=True)  # wrong measure
    A = trqam.path_kl(trqam.velocity_gap(v_fine, v_base, base))
    reject(log_ratio(v_fine, v_base, base).sum(0) - A, 0.0, 3 * resolution, -1)


@forall(1, monte_carlo=1, seed=seeds)
def test_theorem1_likelihood_ratio_rejects_wrong_samplers(seed):
    """Negative control of T4: E[e^{−A−M}] ≠ 1 if A, M or the sampler is off by a fifth."""
    K, D = 6, 3
    v_fine, v_base, d, scale, path, (x_0, noise) = theorem1_problem(seed, D, K, 0.25, "mlp")

    def terms(path):
        gap = scale * d(path[:-1], times(K))
        innovation = path[1:] - step_mean(v_fine, path)
        return girsanov(gap).sum(0), (2 * innovation * gap / g_squared(K)).sum((0, 2))

    A, M = terms(path)
    accept(torch.exp(-A - M), 1.0, 2 * DELTA)
    for a, m, sign in ((2, 1, -1), (0.5, 1, 1), (1, 1.2, 1), (1, 0.8, -1), (-1, 1, 1)):
        reject(torch.exp(-a * A - m * M), 1.0, 5 * DELTA, sign)
    for size, sign in ((1.2, 1), (0.8, -1)):  # √h or g off in the sampler
        A, M = terms(trqam.simulate_sde(v_fine, v_base, x_0, size * noise, exact=True))
        reject(torch.exp(-A - M), 1.0, 5 * DELTA, sign)
    A, M = terms(trqam.simulate_sde(v_base, v_base, x_0, noise, exact=True))  # no control
    reject(torch.exp(-A - M), 1.0, 8 * DELTA, 1)


@forall(8, seed=seeds, D=dims, K=steps, lam=lams)
def test_float32_agrees_with_float64(seed, D, K, lam):
    """Same noise, cast: path, KL and loss agree to K·2⁻²⁰ relative in single precision."""
    draw, cast = Draw(seed), partial(torch.Tensor.to, dtype=torch.float32)
    x_0, noise, w, c = draw.normal(5, D), draw.normal(K, 5, D), draw.normal(D, D), draw.normal(D)

    def run(cast):
        W, C = cast(w), cast(c)
        v_base, v_fine = lambda x, t: torch.tanh(x @ W + t), lambda x, t: torch.tanh(x @ W + C + t)
        path = trqam.simulate_sde(v_fine, v_base, cast(x_0), cast(noise))
        gap = trqam.velocity_gap(v_fine, v_base, path)
        adjoint = trqam.lean_adjoint(v_base, path, cast(x_0))[:-1]
        loss = trqam.adjoint_matching_loss(gap, adjoint, lam)
        return path, adjoint, trqam.path_kl(gap), trqam.tilt_kl(adjoint, lam), loss

    for low, high in zip(run(cast), run(lambda x: x), strict=True):
        assert low.dtype == torch.float32
        close(low, high, K * 2**-20)


# ------------------------------------------------------------------ the lean adjoint


def base_jacobian(v_base, x, t, pole, K):
    """∂_x [x + h (2 v_base(x, t) − x/pole)] at x (D,)."""
    t = torch.full((1,), t, **F64)
    return torch.func.jacrev(lambda y: y + (2 * v_base(y, t) - y / pole) / K)(x)


@chains
@forall(6, seed=seeds, D=dims, K=st.integers(4, 8), kind=kinds)
def test_lean_adjoint_is_a_product_of_jacobians(exact, seed, D, K, kind):
    """ã_k = J_kᵀ J_{k+1}ᵀ … J_{K−1}ᵀ ã_K on any path, J = I + h ∂_x[2 v_base − X/(t+h)]: exact.

    v_base is asked at t_k + h in training (authors' code), at t_k if `exact`; the pole is the same.
    """
    draw = Draw(seed)
    v_base, _ = random_fields(kind, draw, D)
    path, terminal = draw.normal(K + 1, 2, D), draw.normal(2, D)
    adjoint = trqam.lean_adjoint(v_base, path, terminal, exact=exact)
    assert adjoint.shape == path.shape and torch.equal(adjoint[K], terminal)
    for b in range(2):
        product = torch.eye(D, **F64)
        for k in reversed(range(K)):
            t = k / K if exact else (k + 1) / K
            product = product @ base_jacobian(v_base, path[k, b], t, (k + 1) / K, K)
            close(adjoint[k, b], product.T @ terminal[b])
    if not exact:
        assert torch.equal(adjoint, trqam.lean_adjoint(v_base, path, terminal))  # the default


def cost_and_gradient(draw, D):
    """Nonlinear cost J(x) (B, D) -> (B,) and its gradient."""
    a, w = draw.normal(D), draw.normal(D)
    return (
        lambda x: torch.sin(x @ a) + 0.5 * x.square() @ w,
        lambda x: torch.cos(x @ a)[:, None] * a + x * w,
    )


@forall(6, seed=seeds, D=dims, K=steps)
def test_lean_adjoint_is_autograd_through_the_rollout(seed, D, K):
    """ã_k = dJ(X_K)/dX_k through the base chain with its noise frozen, matched times: exact."""
    draw = Draw(seed)
    v_base = mlp_field(draw, D)
    (cost, gradient), noise = cost_and_gradient(draw, D), draw.normal(K, 3, D)
    path = trqam.simulate_sde(v_base, v_base, draw.normal(3, D), noise, exact=True)
    adjoint = trqam.lean_adjoint(v_base, path, gradient(path[K]), exact=True)
    nodes = [path[0].clone().requires_grad_()]
    for k in range(K):  # a second chain, differentiable
        x, t = nodes[-1], torch.full((3, 1), k / K, **F64)
        drift = 2 * v_base(x, t) / K - x / (k + 1)
        nodes.append(x + drift + (g_squared(K)[k] / K).sqrt() * noise[k])
    close(nodes[K].detach(), path[K])
    close(adjoint, torch.stack(torch.autograd.grad(cost(nodes[K]).sum(), nodes)))


@forall(6, seed=seeds, D=dims, K=steps)
def test_lean_adjoint_by_finite_differences(seed, D, K):
    """dJ(X_K)/dX_0 = ã_0, dJ(X_K)/dε_k = √h g_k ã_{k+1}: central differences of the simulator.

    The error of a difference of width e is O(e²) + O(2⁻⁵²/e): 1e-9 at e = 1e-5.
    """
    draw, e = Draw(seed), 1e-5
    v_base = mlp_field(draw, D)
    cost, gradient = cost_and_gradient(draw, D)
    x_0, noise = draw.normal(1, D), draw.normal(K, 1, D)
    path = trqam.simulate_sde(v_base, v_base, x_0, noise, exact=True)
    adjoint = trqam.lean_adjoint(v_base, path, gradient(path[K]), exact=True)[:, 0]
    n = (K + 1) * D  # every coordinate of x_0 and of the noise, both ways, as one batch
    bumps = e * torch.cat([torch.eye(n, **F64), -torch.eye(n, **F64)])
    bumps = bumps.view(2 * n, K + 1, D).transpose(0, 1)
    ends = trqam.simulate_sde(v_base, v_base, x_0 + bumps[0], noise + bumps[1:], exact=True)[K]
    slopes = ((cost(ends[:n]) - cost(ends[n:])) / (2 * e)).view(K + 1, D)
    expected = torch.cat([adjoint[:1], (g_squared(K)[:, 0] / K).sqrt() * adjoint[1:]])
    close(slopes, expected, 1e-7)


# ------------------------------------------------------------------ adjoint matching


@forall(10, seed=seeds, D=dims, K=steps, lam=lams)
def test_matching_loss_value_gradient_and_minimiser(seed, D, K, lam):
    """L = mean_B Σ_k ‖2Δv/σ + σã‖², ∂L/∂Δv = (8λ/g²)(Δv + g²ã/(2λ))/B, 0 at −g²ã/(2λ): exact."""
    draw, B = Draw(seed), 3
    gap, adjoint, g2 = draw.normal(K, B, D), draw.normal(K, B, D), g_squared(K)
    sigma = (g2 / lam).sqrt()
    value = (2 * gap / sigma + sigma * adjoint).square().sum() / B
    gap.requires_grad_()
    loss = trqam.adjoint_matching_loss(gap, adjoint, lam)
    close(loss.detach(), value)
    (gradient,) = torch.autograd.grad(loss, gap)
    close(gradient, 8 * lam / g2 * (gap.detach() + g2 * adjoint / (2 * lam)) / B)
    best = -g2 * adjoint / (2 * lam)
    close(trqam.adjoint_matching_loss(best, adjoint, lam), 0.0)
    close(trqam.path_kl(best), trqam.tilt_kl(adjoint, lam))  # the closed form is the KL there
    close(trqam.tilt_kl(adjoint, lam), (g2 * adjoint**2).sum((0, 2)) / (2 * lam**2 * K))


@forall(10, seed=seeds, D=dims, K=steps, lam=lams)
def test_random_adjoints_regress_to_their_mean(seed, D, K, lam):
    """argmin_u E‖u + σã‖² = −σE[ã]; E KL(λ) of ã = KL of that u + Σ h g² Var(ã)/(2λ²): exact."""
    draw, B = Draw(seed), 7
    adjoint, g2 = draw.normal(K, B, D), g_squared(K)
    mean, var = adjoint.mean(1, keepdim=True), adjoint.var(1, correction=0).sum(-1)
    u = trqam.control(-g2 * mean / (2 * lam), lam)
    close(u, -(g2 / lam).sqrt() * mean)
    spread = (g2[:, 0, 0] * var).sum() / (2 * lam**2 * K)
    kl = trqam.path_kl_from_control(u, lam).mean()
    close(trqam.tilt_kl(adjoint, lam).mean(), kl + spread)
    gap = (-g2 * mean / (2 * lam)).expand(K, B, D)
    minimum = trqam.adjoint_matching_loss(gap, adjoint, lam)
    close(minimum, (g2[:, 0, 0] * var).sum() / lam)
    bump = 0.1 * draw.normal(K, 1, D)
    assert trqam.adjoint_matching_loss(gap + bump, adjoint, lam) > minimum


@forall(10, seed=seeds, D=dims, K=steps, lam=lams, c=st.floats(2, 9), shift=st.floats(1, 9))
def test_scale_and_shift_symmetries(seed, D, K, lam, c, shift):
    """(Q, λ) → (cQ + b, cλ): loss → c·loss, same optimal Δv, KL(λ) and path KL: exact."""
    draw = Draw(seed)
    v_base, v_fine, (q, _) = mlp_field(draw, D), mlp_field(draw, D), cost_and_gradient(draw, D)
    path = trqam.simulate_sde(v_fine, v_base, draw.normal(4, D), draw.normal(K, 4, D))
    gap = trqam.velocity_gap(v_fine, v_base, path)

    def run(a, b, lam):
        terminal = -trqam.q_gradient(lambda x: a * q(x)[None] + b, path[K])
        adjoint = trqam.lean_adjoint(v_base, path, terminal)[:-1]
        return trqam.adjoint_matching_loss(gap, adjoint, lam), trqam.tilt_kl(adjoint, lam)

    (loss, kl), (scaled_loss, scaled_kl) = run(1.0, 0.0, lam), run(c, shift, c * lam)
    close(scaled_loss, c * loss)
    close(scaled_kl, kl)
    u = trqam.control(gap, c * lam)  # u depends on λ, its KL does not
    close(u, math.sqrt(c) * trqam.control(gap, lam))
    close(trqam.path_kl_from_control(u, c * lam), trqam.path_kl(gap))


@forall(3, seed=seeds, D=dims, K=steps, lam=lams)
def test_no_gradient_reaches_base_or_critic(seed, D, K, lam):
    """∂L/∂θ_base = ∂L/∂θ_critic = 0 (not even a graph), ∂L/∂θ_ft ≠ 0: exact."""
    draw = Draw(seed)
    w = [draw.normal(D, D).requires_grad_() for _ in range(3)]
    v_base, v_fine = (lambda x, t, w=w_: torch.tanh(x @ w + t) for w_ in w[:2])
    path = trqam.simulate_sde(v_fine, v_base, draw.normal(4, D), draw.normal(K, 4, D))
    terminal = -trqam.q_gradient(lambda x: torch.sin(x @ w[2]).sum(-1)[None], path[K])
    adjoint = trqam.lean_adjoint(v_base, path, terminal)
    assert not (path.requires_grad or terminal.requires_grad or adjoint.requires_grad)
    assert not trqam.sample_flow(v_fine, path[0], K).requires_grad
    gap = trqam.velocity_gap(v_fine, v_base, path)
    trqam.adjoint_matching_loss(gap, adjoint[:-1], lam).backward()
    assert w[0].grad is None and w[2].grad is None and w[1].grad.abs().sum() > 0


# ------------------------------------------------------------------ the closed form KL(λ)


def linear_problem(seed, D, K):
    """Gaussian base, Q = w·x, and its adjoint, which no path changes: (K + 1, 1, D)."""
    draw = Draw(seed)
    mean, cov = random_gaussian(draw, D)
    v_base, w = gaussian_velocity(mean, cov), draw.normal(D)
    path = torch.zeros(K + 1, 1, D, **F64)
    return v_base, w, cov, trqam.lean_adjoint(v_base, path, -w[None], exact=True)


def tilted_velocity(v_base, adjoint, lam):
    """v_ft = v_base − g_k² ã_{k+1}/(2λ): the control u_k = −σ_k ã_{k+1} at t = t_k."""
    K = len(adjoint) - 1
    shift = -g_squared(K) * adjoint[1:] / (2 * lam)
    return lambda x, t: (
        v_base(x, t) + shift[(t * K).round().long().flatten()].view(*t.shape[:-1], -1)
    )


@forall(10, seed=seeds, D=dims, K=steps, lam=lams)
def test_linear_critic_fixed_point_is_the_exact_tilt(seed, D, K, lam):
    """u_k = −σ_k ã_{k+1}: KL = wᵀSw/(2λ²), X_K | X_0 ~ N(m_0 + Sw/λ, S), loss 0: exact.

    S = Cov(X_K | X_0). That is the law of the base chain tilted by e^{w·x/λ}, for every X_0.
    """
    v_base, w, _, adjoint = linear_problem(seed, D, K)
    v_fine = tilted_velocity(v_base, adjoint, lam)
    x_0, noise = cubature(K, D)
    x_0 = Draw(seed + 1).normal(1, D).expand(len(x_0), D)  # one X_0 for every noise
    noise = noise * math.sqrt(K / (K + 1))  # covariance I over the noise alone
    noise = noise[:, noise.abs().sum((0, 2)) > 0]
    x_0 = x_0[: noise.shape[1]]
    base = trqam.simulate_sde(v_base, v_base, x_0, noise, exact=True)
    path = trqam.simulate_sde(v_fine, v_base, x_0, noise, exact=True)
    (m_0, S), (mean, cov) = law(base[K]), law(path[K])
    kl = w @ S @ w / (2 * lam**2)
    close(cov, S)
    close(mean, m_0 + S @ w / lam)
    gap = trqam.velocity_gap(v_fine, v_base, path)
    close(trqam.path_kl(gap), kl.expand(len(x_0)))
    close(trqam.tilt_kl(adjoint[1:], lam), kl[None])
    close(trqam.adjoint_matching_loss(gap, adjoint[1:].expand_as(gap), lam), 0.0)
    close(gaussian_kl(mean, cov, m_0, S), kl)  # KL of the end alone: nothing is lost on the way


@forall(10, seed=seeds, D=dims, K=steps, lam=lams, size=st.floats(0.1, 1))
def test_linear_critic_optimum_beats_every_affine_control(seed, D, K, lam, size):
    """KL(P^u) − E_u[Q]/λ ≥ −log E_base[e^{Q/λ} | X_0], equality at u = −σã_{k+1}: exact.

    For a control changed by δ the excess is KL(P^{u+δ} ‖ P^u) > 0: strictly convex.
    """
    v_base, w, _, adjoint = linear_problem(seed, D, K)
    best = tilted_velocity(v_base, adjoint, lam)
    delta = affine_field(Draw(seed + 1), D)
    x_0, noise = cubature(K, D)

    def objective(v):
        path = trqam.simulate_sde(v, v_base, x_0, noise, exact=True)
        kl = trqam.path_kl(trqam.velocity_gap(v, v_base, path)).mean()
        other = trqam.path_kl(trqam.velocity_gap(v, best, path)).mean()
        return kl - (path[K] @ w).mean() / lam, other

    mean, S = end_given_start(v_base, K, D)
    free_energy = -mean @ w / lam - w @ S @ w / (2 * lam**2)  # averaged over X_0
    close(objective(best)[0], free_energy)
    value, excess = objective(add(best, delta, size))
    close(value, free_energy + excess)
    assert excess > 1e-4


@forall(4, seed=seeds, D=dims, lam=lams)
def test_closed_form_kl_in_the_limit(seed, D, lam):
    """KL(λ) → cᵀSc/(2λ²) (s²‖c‖²/(2λ²) if S = s²I): limit, order 1.

    For the matched adjoint in both pairings, ã_{k+1} and ã_k, and for the training one with ã_k.

    Hence λ* → s‖c‖/√(2ε), or s‖c‖/√(2Hε) if ε is per action of a chunk of H.
    """
    draw = Draw(seed)
    mean, cov = random_gaussian(draw, D, 0.35, 0.7)
    v_base, c = gaussian_velocity(mean, cov), draw.normal(D)
    limit, Ks = (c @ cov @ c / (2 * lam**2)).item(), (256, 512, 1024)
    H, eps = 5, 0.7
    lam_star = (c @ cov @ c).sqrt().item() / math.sqrt(2 * H * eps)
    matched, training = (
        {
            K: trqam.lean_adjoint(v_base, torch.zeros(K + 1, 1, D, **F64), -c[None], exact=exact)
            for K in Ks
        }
        for exact in (True, False)
    )
    converges(lambda K: trqam.tilt_kl(matched[K][1:], lam), limit, Ks)
    converges(lambda K: trqam.tilt_kl(matched[K][:-1], lam), limit, Ks)
    converges(lambda K: trqam.tilt_kl(training[K][:-1], lam), limit, Ks)
    converges(lambda K: trqam.tilt_kl(training[K][:-1], lam_star) / H, eps, Ks)


def test_published_discretisation_at_ten_steps():
    """s = 0.3, ‖c‖²/λ² = 3.44, K = 10: limit 0.155; 0.267 in training, matched 0.231 and 0.104."""
    v = gaussian_velocity(torch.zeros(1, **F64), torch.full((1, 1), 0.09, **F64))
    path, c = torch.zeros(11, 1, 1, **F64), -torch.full((1, 1), math.sqrt(3.444), **F64)
    matched = trqam.lean_adjoint(v, path, c, exact=True)
    training = trqam.lean_adjoint(v, path, c)
    assert round(0.09 * 3.444 / 2, 3) == 0.155
    assert round(trqam.tilt_kl(training[:-1], 1.0).item(), 3) == 0.267
    assert round(trqam.tilt_kl(matched[1:], 1.0).item(), 3) == 0.231
    assert round(trqam.tilt_kl(matched[:-1], 1.0).item(), 3) == 0.104


# ------------------------------------------------------------------ one-dimensional mixtures
# The chain of X_{k+1} | X_k ~ N(step_mean, h g_k²) is followed as a density on a grid. The grid of
# X_k is finer than 0.8 √h g_k, at which sums over it are exact to e^{−2π²/0.8²} ≈ 4e-14.

WEIGHTS, MEANS, STDS = (torch.tensor(x, **F64) for x in ([0.4, 0.6], [-0.9, 0.8], [0.7, 0.6]))
NODES, NODE_WEIGHTS = (torch.tensor(x, **F64) for x in np.polynomial.hermite_e.hermegauss(20))


class Mixture:
    """Σ_i w_i N(m_i, s_i²) in one dimension, tilted by e^{Q/λ}: densities and velocities."""

    def __init__(self, weights=WEIGHTS, means=MEANS, stds=STDS):
        self.weights, self.means, self.stds = weights, means, stds

    def density(self, x, tilt=None):
        """Density on the grid x (N,), times e^{tilt(x)} and normalised again if there is a tilt."""
        scaled = (x[:, None] - self.means) / self.stds
        p = (torch.exp(-0.5 * scaled**2) * self.weights / self.stds).sum(-1) / math.sqrt(
            2 * math.pi
        )
        p = p if tilt is None else p * torch.exp(tilt(x))
        return p if tilt is None else p / (p.sum() * (x[1] - x[0]))

    def velocity(self, x, t, tilt=None):
        """E[X_1 − X_0 | X_t = x] = (E[X_1 | X_t = x] − x)/(1 − t); the tilt by Gauss–Hermite."""
        var = t**2 * self.stds**2 + (1 - t) ** 2
        log_r = self.weights.log() - 0.5 * var.log() - 0.5 * (x - t * self.means) ** 2 / var
        mean = self.means + t * self.stds**2 / var * (x - t * self.means)
        if tilt is None:
            return ((log_r.softmax(-1) * mean).sum(-1, keepdim=True) - x) / (1 - t)
        y = mean[..., None] + ((1 - t) * self.stds / var.sqrt())[..., None] * NODES
        r = log_r.softmax(-1)[..., None] * NODE_WEIGHTS * torch.exp(tilt(y))
        return ((r * y).sum((-1, -2)) / r.sum((-1, -2)))[..., None].sub(x) / (1 - t)


def uniform_grid(width):
    return torch.arange(-8.0, 8.0, min(0.05, width), **F64)


def chain_densities(v, K):
    """Grids and densities of X_0 … X_K, every step noisy: a list of K + 1 pairs (N_k,)."""
    stds = (g_squared(K).flatten() / K).sqrt().tolist()
    grids = [uniform_grid(0.8 * std) for std in stds] + [uniform_grid(0.01)]
    densities = [torch.exp(-0.5 * grids[0] ** 2) / math.sqrt(2 * math.pi)]
    for k, (x, y, std) in enumerate(zip(grids, grids[1:], stds, strict=False)):
        mean = x + 2 * v(x[:, None], torch.full((1, 1), k / K, **F64))[:, 0] / K - x / (k + 1)
        kernel = torch.exp(-0.5 * ((y - mean[:, None]) / std) ** 2) / (std * math.sqrt(2 * math.pi))
        densities.append((densities[-1] * (x[1] - x[0])) @ kernel)
    return list(zip(grids, densities, strict=True))


def total_variation(p, q, x):
    return (0.5 * (p - q).abs().sum() * (x[1] - x[0])).item()


def wavy(lam):
    """A nonlinear Q over λ."""
    return lambda x: (torch.sin(2 * x) + 0.3 * x) / lam


def test_mixture_chain_converges_to_the_data_law():
    """TV(law of X_K, π_base) → 0 along the SDE, for a base that is not Gaussian: limit, order 1."""
    base, error = Mixture(), []
    for K in (64, 128, 256):
        x, p = chain_densities(base.velocity, K)[K]
        close(p.sum() * (x[1] - x[0]), 1.0, 1e-7)  # no mass lost off the grid
        error.append(total_variation(p, base.density(x), x))
    assert all(0.8 < math.log2(a / b) < 1.1 for a, b in pairwise(error)), error


@forall(2, lam=st.floats(1.5, 3))
def test_path_kl_of_the_tilting_control_is_the_kl_of_the_tilt(lam):
    """KL(P* ‖ P^base) → KL(π* ‖ π_base), π* ∝ π_base e^{Q/λ}, mixture, nonlinear Q: limit, order 1.

    P* has the marginal velocity of π*: for a memoryless chain tilting the end tilts the path, and
    the path costs no more than its end.
    """
    base, tilt = Mixture(), wavy(lam)
    v_fine = partial(base.velocity, tilt=tilt)
    x = uniform_grid(0.01)
    p, q = base.density(x, tilt), base.density(x)
    limit = ((p * (p / q).log()).sum() * (x[1] - x[0])).item()

    def discrete(K):
        total = 0.0
        for k, (x, p) in enumerate(chain_densities(v_fine, K)[:K]):
            t, gap = torch.full((1, 1), k / K, **F64), torch.zeros(K, len(x), 1, **F64)
            gap[k] = v_fine(x[:, None], t) - base.velocity(x[:, None], t)
            total += (p @ trqam.path_kl(gap) * (x[1] - x[0])).item()
        return total

    converges(discrete, limit, (64, 128, 256), slack=0.15)


@forall(10, lam=lams)
def test_kl_of_the_tilt_and_its_derivative(lam):
    """KL(λ) = E_{π*}[Q]/λ − log E_base[e^{Q/λ}], dKL/dλ = −Var_{π*}(Q)/λ³: exact (quadrature).

    `tilt_kl` has the same law: KL(λ) = KL(1)/λ² and dKL/dλ = −2KL/λ for linear Q, Gaussian base,
    where Var_{π*}(Q) = s²‖c‖² for every λ.
    """
    x, base = uniform_grid(0.02), Mixture()
    dx, q = x[1] - x[0], wavy(1.0)(x)
    lam = torch.tensor(lam, **F64, requires_grad=True)
    p_base = base.density(x) / (base.density(x).sum() * dx)
    weights = p_base * torch.exp(q / lam) * dx
    kl = (weights * q).sum() / weights.sum() / lam - weights.sum().log()
    p = (weights / weights.sum()).detach()
    close(kl.detach(), (p * (p / (p_base * dx)).log()).sum())
    variance = (p * q**2).sum() - (p * q).sum() ** 2
    close(torch.autograd.grad(kl, lam)[0], -variance / lam.detach() ** 3)
    adjoint = torch.linspace(-2, 1, 8, **F64).view(8, 1, 1)
    kl = trqam.tilt_kl(adjoint, lam)
    close(kl.detach(), trqam.tilt_kl(adjoint, 1.0) / lam.detach() ** 2)
    close(torch.autograd.grad(kl.sum(), lam)[0], -2 * kl[0].detach() / lam.detach())


@forall(1, seed=seeds)
def test_adjoint_matching_trained_on_a_mixture_reaches_the_tilt(seed):
    """Trained v_ft: TV(law of X_K, π*) ≤ 0.14, TV(π_base, π*) > 0.4; π* ∝ π_base e^{Q/λ}: limit.

    0.087 of it is the discretisation at K = 24, which the marginal velocity of π* has as well; the
    training may add no more than 0.05 (measured over 12 seeds: 0.002 to 0.025).
    """
    K, B, lam, updates = 24, 512, 0.2, 300
    base, draw = Mixture(means=torch.tensor([-0.5, 0.4], **F64), stds=STDS / 1.5), Draw(seed)

    def q(y):  # two critics, whose mean counts
        return torch.stack([torch.sin(4 * y), 2 * torch.sin(4 * y) - y]).squeeze(-1) / 4

    def tilt(y):
        return q(y.clamp(-1, 1)).mean(0) / lam

    layers = [torch.nn.Linear(*n).to(**F64) for n in ((3, 32), (32, 32), (32, 1))]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(draw.normal(*layer.weight.shape) / layer.in_features**0.5)
            layer.bias.zero_()
        layers[-1].weight.zero_()  # start from the base

    def v_fine(x, t):
        y = torch.cat([2 * x, 4 * t.expand_as(x) - 2, x.square()], -1)
        for layer in layers[:-1]:
            y = torch.tanh(layer(y))
        return base.velocity(x, t) + layers[-1](y)

    adam = torch.optim.Adam([p for layer in layers for p in layer.parameters()], lr=1e-2)
    anneal = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: 1 - n / updates)
    for _ in range(updates):
        x_0, noise = draw.normal(B, 1), draw.normal(K, B, 1)
        path = trqam.simulate_sde(v_fine, base.velocity, x_0, noise, exact=True)
        terminal = -trqam.q_gradient(q, path[K])
        adjoint = trqam.lean_adjoint(base.velocity, path, terminal, exact=True)[1:]
        gap = trqam.velocity_gap(v_fine, base.velocity, path)
        adam.zero_grad()
        trqam.adjoint_matching_loss(gap, adjoint, lam).backward()
        adam.step()
        anneal.step()
    x, trained = chain_densities(torch.no_grad()(v_fine), K)[K]
    _, marginal = chain_densities(partial(base.velocity, tilt=tilt), K)[K]
    tilted = base.density(x, tilt)
    assert total_variation(base.density(x), tilted, x) > 0.4
    distance, floor = (total_variation(p, tilted, x) for p in (trained, marginal))
    note(f"TV to the tilt: trained {distance:.4f}, its marginal velocity {floor:.4f}")
    assert distance <= min(0.14, floor + 0.05), (distance, floor)


# ------------------------------------------------------------------ Eq. 9: projected dual descent


def scalar(x):
    return torch.tensor(x, **F64)


kls, levels = st.floats(0, 50), st.floats(0.1, 5)
rates, ema_rates = st.floats(0.001, 0.3), st.floats(0.05, 1)


@forall(50, kl=kls | st.just(math.inf), ema=kls, dual=st.floats(0.001, 500), eps=levels)
def test_dual_step_value_and_defaults(kl, ema, dual, eps):
    """D' = 0.9 D + 0.1 min(KL, 2ε), ℓ' = clip(ℓ + 0.01 (D' − ε), 0.01, 100): exact."""
    new_ema, new_dual = trqam.dual_step(scalar(kl), scalar(ema), scalar(dual), eps)
    D = 0.9 * ema + 0.1 * min(kl, 2 * eps)
    close(new_ema, D)
    close(new_dual, max(0.01, min(100.0, dual + 0.01 * (D - eps))))


@forall(50, kl=kls, dual=st.floats(0.5, 2), eps=levels, lr=rates, r=ema_rates, seed=seeds)
def test_dual_stays_in_its_bracket_and_takes_bounded_steps(kl, dual, eps, lr, r, seed):
    """ℓ_min ≤ ℓ' ≤ ℓ_max, and |ℓ' − ℓ| ≤ η max(ε, (c − 1)ε) with c = 2: exact, any KLs."""
    bounds, ema, dual = (0.5, 2.0), scalar(0.0), scalar(dual)
    draw, low, high = Draw(seed), math.inf, -math.inf
    for kl_i in [scalar(kl), *(10 * draw.uniform(0, eps, 20))]:
        before = dual
        ema, dual = trqam.dual_step(kl_i, ema, dual, eps, lr, r, bounds)
        assert bounds[0] <= dual <= bounds[1] and 0 <= ema <= 2 * eps
        assert (dual - before).abs() <= lr * eps * (1 + 1e-12)
    for kl_i in (0.0, math.inf):  # both steps are attained
        ema, dual = trqam.dual_step(scalar(kl_i), scalar(0.0), scalar(1.0), eps, 0.01, 1.0, bounds)
        low, high = min(low, dual.item() - 1), max(high, dual.item() - 1)
    close((low, high), (-0.01 * eps, 0.01 * eps))


@forall(50, a=st.floats(-3, 5), b=st.floats(-3, 5), eps=levels)
def test_dual_projection_is_idempotent_and_nonexpansive(a, b, eps):
    """P = clip(·, ℓ_min, ℓ_max): P(P(a)) = P(a), |P(a) − P(b)| ≤ |a − b|, P(a) nearest: exact."""

    def P(dual):  # the dual step at D = KL = ε, where there is no drift
        eps_t = scalar(eps)
        return trqam.dual_step(eps_t, eps_t, scalar(dual), eps, 0.1, 0.5, (0.5, 2.0))[1].item()

    close(P(P(a)), P(a))
    assert abs(P(a) - P(b)) <= abs(a - b) + 1e-12
    close(abs(a - P(a)), max(0.5 - a, 0.0, a - 2.0))


@forall(20, seed=seeds, eps=levels, r=ema_rates, n=st.integers(5, 40))
def test_dual_ema_closed_form(seed, eps, r, n):
    """D_n = (1 − r)^n D_0 + r Σ_i (1 − r)^{n−i} min(KL_i, 2ε): exact."""
    draw = Draw(seed)
    kl, ema, dual = draw.uniform(0, 4, n), scalar(0.3), scalar(1.0)
    for kl_i in kl:
        ema, dual = trqam.dual_step(kl_i, ema, dual, eps, rate=r)
    weights = [r * (1 - r) ** (n - 1 - i) for i in range(n)]
    clipped = [min(x, 2 * eps) for x in kl.tolist()]
    D = math.fsum(w * x for w, x in zip(weights, clipped, strict=True))
    close(ema, (1 - r) ** n * 0.3 + D)


@forall(20, a=st.floats(0.3, 3), p=st.floats(0.5, 1), eps=st.floats(0.3, 3), r=ema_rates)
def test_dual_descent_converges_to_the_inverse(a, p, eps, r):
    """Frozen decreasing D(ℓ) = a ℓ^{−p}: ℓ_n → clip(D⁻¹(ε), ℓ_min, ℓ_max): limit n → ∞.

    With η a tenth of what is stable at the steepest point of the bracket [½, 2], the slowest mode
    decays by at least 1 − 0.1/16 a step: e^{−15} in 2,500.
    """
    bounds = (0.5, 2.0)
    assume(all(abs(a * bound**-p / eps - 1) > 0.3 for bound in bounds))  # or the drift vanishes
    lr, ema, dual = 0.1 / (p * a * bounds[0] ** (-p - 1)), scalar(0.0), scalar(1.0)
    for _ in range(2500):
        ema, dual = trqam.dual_step(a * dual**-p, ema, dual, eps, lr, r, bounds)
    close(dual, min(max((a / eps) ** (1 / p), bounds[0]), bounds[1]), 1e-5)


@pytest.mark.parametrize("side", [0.98, 1.02], ids=["below", "above"])
@forall(12, r=st.sampled_from([1.0, 0.1]) | ema_rates, eps=levels, lr=st.floats(0.005, 0.1))
def test_dual_stability_threshold(side, r, eps, lr):
    """Locally stable iff η |D'(ℓ*)| < 2(2 − r)/r: 2 at r = 1, 38 at r = 0.1; both sides, by 2 %.

    The loop linearised at ℓ* is z² − (2 − r − rη|D'|) z + (1 − r): its largest |z| crosses 1 there.
    The trajectories of the code are the powers of that matrix: exact.
    """
    threshold = {1.0: 2.0, 0.1: 38.0}.get(r, 2 * (2 - r) / r)
    slope = side * threshold / lr
    matrix = np.array([[1 - r, -r * slope], [lr * (1 - r), 1 - lr * r * slope]])
    radius = max(abs(np.linalg.eigvals(matrix)))
    assert (radius < 1) == (side < 1)
    ema, dual, state, sizes = scalar(eps), scalar(1.0), np.array([0.0, 1e-4 * eps / slope]), []
    dual = dual + state[1]  # so small that neither clip is met
    for _ in range(math.ceil(5 / abs(math.log(radius)))):
        ema, dual = trqam.dual_step(eps - slope * (dual - 1), ema, dual, eps, lr, r)
        state = matrix @ state
        sizes.append(abs(dual.item() - 1))
        assert abs(dual.item() - 1 - state[1]) < 1e-3 * (sizes[-1] + sizes[0])
    assert sizes[-1] < 0.1 * max(sizes) if side < 1 else sizes[-1] > 10 * sizes[0], sizes[-1]


@forall(6, seed=seeds, D=dims, K=steps, eps=st.floats(0.5, 2), H=dims, star=st.floats(1.5, 6))
def test_dual_descent_end_to_end_holds_the_budget(seed, D, K, eps, H, star):
    """simulate → KL/H → dual step → λ = 3ℓ → λ* = √(wᵀSw/(2Hε)), KL/H = ε: limit n → ∞.

    The policy answers each λ with its optimal control. λ* is exact for the discrete chain; in
    continuous time it is s‖c‖/√(2Hε), see `test_closed_form_kl_in_the_limit`. Near λ* the error
    decays by 2ηε/ℓ* ≥ 0.05 a step: e^{−20} in 400.
    """
    v_base, w, _, adjoint = linear_problem(seed, D, K)
    size = star / (w @ end_given_start(v_base, K, D)[1] @ w / (2 * H * eps)).sqrt()
    lam, kl, _ = settle(v_base, size * adjoint, eps, H)
    close(lam, star, 1e-6)
    close(kl, eps, 1e-6)


def settle(v_base, adjoint, eps, H=1, lr=0.1, updates=400):
    """Run the loop from ℓ = 1: λ and the KL per action at its end, and all KLs on the way."""
    K, D = len(adjoint) - 1, adjoint.shape[-1]
    draw, ema, dual, kls = Draw(0), scalar(0.0), scalar(1.0), []
    for _ in range(updates):
        lam = 3 * dual
        kls.append(optimal_kl(v_base, adjoint, lam, draw.normal(4, D), draw.normal(K, 4, D)) / H)
        ema, dual = trqam.dual_step(kls[-1], ema, dual, eps, lr)
    return lam, kls[-1], torch.stack(kls)


def optimal_kl(v_base, adjoint, lam, x_0, noise):
    """Path KL of the optimal control at λ on simulated paths, as training estimates it."""
    v_fine = tilted_velocity(v_base, adjoint, lam)
    path = trqam.simulate_sde(v_fine, v_base, x_0, noise)
    return trqam.path_kl(trqam.velocity_gap(v_fine, v_base, path)).mean()


@forall(2, seed=seeds, D=dims, K=steps)
def test_dual_descent_absorbs_the_scale_of_the_critic(seed, D, K):
    """∇Q → c ∇Q, c = 1, 3, 10, 30. λ fixed: KL → c² KL, exact. Dual descent: KL → ε, λ → cλ*.

    The paper's reason to exist. With D clipped at 2ε, ℓ climbs by at most ηε an update: a critic
    30 times steeper is over budget for about (30 − 1)ℓ*/(ηε) of them (reported as a note).
    """
    v_base, _, _, adjoint = linear_problem(seed, D, K)
    draw, eps, lr = Draw(seed), 1.0, 0.3
    x_0, noise = draw.normal(4, D), draw.normal(K, 4, D)
    unit = optimal_kl(v_base, adjoint, 1.0, x_0, noise)
    adjoint = adjoint * 2.4 / unit.sqrt()  # λ* = √(KL at λ = 1) = 2.4 at c = 1, 72 at c = 30
    fixed = optimal_kl(v_base, adjoint, 3.0, x_0, noise)
    close(fixed, (2.4 / 3) ** 2)
    for c in (1.0, 3.0, 10.0, 30.0):
        close(optimal_kl(v_base, c * adjoint, 3.0, x_0, noise), c**2 * fixed)
        lam, kl, kls = settle(v_base, c * adjoint, eps, lr=lr, updates=600)
        over = (kls > 1.05 * eps).sum().item()
        note(f"scale {c}: {over} updates over budget, KL at worst {kls.max():.0f}")
        close(lam, 2.4 * c, 1e-3)
        close(kl, eps, 1e-3)


# ------------------------------------------------------------------ Proposition 1 and Lemma 1


@chains
@forall(10, seed=seeds, D=dims, K=steps, size=st.floats(0.2, 1))
def test_proposition1_terminal_kl_is_below_path_kl(exact, seed, D, K, size):
    """KL(law of X_K under P^u ‖ under P^base) ≤ KL(P^u ‖ P^base), affine controls: exact."""
    draw = Draw(seed)
    v_base, d = random_fields("gaussian", draw, D)
    v_fine, noise = add(v_base, d, size), cubature(K, D)
    fine, base = (trqam.simulate_sde(v, v_base, *noise, exact=exact) for v in (v_fine, v_base))
    gap = trqam.velocity_gap(v_fine, v_base, fine)
    gap[K if exact else K - 1 :] = 0  # the noise-free last step costs nothing
    path, terminal = trqam.path_kl(gap).mean().item(), gaussian_kl(*law(fine[K]), *law(base[K]))
    assert 0 < terminal <= path * (1 + 1e-9)
    if exact:  # the tilting control of a linear Q wastes nothing but what it gives X_0 away for
        close(path, affine_kl(v_base, d, size, K, D))


@forall(4, seed=seeds, K=st.integers(8, 16), size=st.floats(0.5, 2))
def test_proposition1_for_nonlinear_controls(seed, K, size):
    """KL(law of X_k under P^u ‖ under P^base) ≤ Σ_{j<k} (2h/g_j²) E‖Δv_j‖² for every k: exact.

    Control sin(3x + network), mixture base, one dimension: the laws are densities on a grid.
    """
    net, v_base = mlp_field(Draw(seed), 1), Mixture().velocity

    def d(x, t):
        return torch.sin(3 * x + net(x, t))

    fine, base = (chain_densities(v, K) for v in (add(v_base, d, size), v_base))
    path = 0.0
    for k in range(K):
        (x, p), (y, after), before = fine[k], fine[k + 1], base[k + 1][1]
        gap = torch.zeros(K, len(x), 1, **F64)
        gap[k] = size * d(x[:, None], torch.full((1, 1), k / K, **F64))
        path += (p @ trqam.path_kl(gap) * (x[1] - x[0])).item()
        close(after.sum() * (y[1] - y[0]), 1.0, 1e-5)  # hardly any mass lost off the grid
        end = (torch.special.xlogy(after, after / before).sum() * (y[1] - y[0])).item()
        assert 0 < end < path
    assert path > 0.05


def test_proposition1_the_ode_can_exceed_the_budget_of_the_sde():
    """K = 10, s = 0.3, Δv = 1: path KL 1.42, terminal KL of the SDE 1.28, of the ODE 2.87.

    The bound is on the SDE. The policy acts with the ODE, which shares its law only as h → 0 and
    for a v_ft that is the marginal velocity of its own flow.
    """
    K, e = 10, 0.01  # maps are linear: small inputs keep them clear of the clip of `sample_flow`
    v = gaussian_velocity(torch.zeros(1, **F64), torch.full((1, 1), 0.09, **F64))
    sde = [
        trqam.simulate_sde(f, v, *cubature(K, 1), exact=True) for f in (lambda x, t: v(x, t) + 1, v)
    ]
    path = trqam.path_kl(trqam.velocity_gap(lambda x, t: v(x, t) + 1, v, sde[0])).mean().item()
    terminal = gaussian_kl(*law(sde[0][K]), *law(sde[1][K]))
    zero, one = torch.zeros(1, 1, **F64), torch.full((1, 1), e, **F64)
    std = trqam.sample_flow(v, one, K).item() / e
    shift = trqam.sample_flow(lambda x, t: v(x, t) + e, zero, K).item() / e
    ode = shift**2 / (2 * std**2)
    assert (round(path, 2), round(terminal, 2), round(ode, 2)) == (1.42, 1.28, 2.87)
    assert terminal < path < ode


def tilted(p, q):
    """p e^q / Σ p e^q."""
    w = p * torch.exp(q - q.max())
    return w / w.sum()


def kl_bound(delta):
    """δ coth δ − 1 + log(sinh δ/δ), the sharp form of Lemma 1."""
    return delta / math.tanh(delta) - 1 + math.log(math.sinh(delta) / delta)


@forall(40, seed=seeds, n=st.integers(2, 6), beta=st.floats(0.2, 5), error=st.floats(0.05, 2))
def test_lemma1_bounds(seed, n, beta, error):
    """δ = β sup|Q − Q̂|: TV ≤ tanh(δ/2) ≤ ½(e^{2δ} − 1), KL ≤ sharp form ≤ min(δ²/2, 2δ): exact."""
    draw = Draw(seed)
    p, q = tilted(torch.ones(n, **F64), 2 * draw.normal(n)), draw.normal(n)
    wrong = q + error * draw.uniform(-1, 1, n).sign()
    delta = beta * (q - wrong).abs().max().item()
    a, b = tilted(p, beta * q), tilted(p, beta * wrong)
    tv, kl = 0.5 * (a - b).abs().sum().item(), (a * (a / b).log()).sum().item()
    assert tv <= math.tanh(delta / 2) + 1e-12 and kl <= kl_bound(delta) + 1e-12
    assert math.tanh(delta / 2) <= 0.5 * math.expm1(2 * delta)
    assert kl_bound(delta) <= min(delta**2 / 2, 2 * delta)


@forall(40, delta=st.floats(0.05, 8))
def test_lemma1_is_attained_by_two_point_laws(delta):
    """TV at p₊ = 1/(1 + e^δ), KL at p₊ = (sinh δ/δ − e^{−δ})/(2 sinh δ), tilt ±δ: equality, exact.

    No other p₊ does better, and the factor ½ of δ²/2 and the 2 of 2δ cannot be improved.
    """
    tilt = torch.tensor([delta, -delta], **F64)

    def distances(p):
        base = torch.tensor([p, 1 - p], **F64)
        a = tilted(base, tilt)
        return 0.5 * (a - base).abs().sum().item(), (base * (base / a).log()).sum().item()

    s = math.sinh(delta)
    close(distances(1 / (1 + math.exp(delta)))[0], math.tanh(delta / 2))
    close(distances((s / delta - math.exp(-delta)) / (2 * s))[1], kl_bound(delta))
    for p in np.linspace(0.001, 0.999, 50):
        tv, kl = distances(p)
        assert tv <= math.tanh(delta / 2) + 1e-12 and kl <= kl_bound(delta) + 1e-12
    assert kl_bound(1e-2) > 0.499 * 1e-4 * 0.99 and kl_bound(300.0) > 1.97 * 300


# ------------------------------------------------------------------ the random numbers


def is_white(check, z, resolution):
    """E[z] = 0 and E[z zᵀ] = I, of rows z (2N, n), by three means of independent pairs (z, z′).

    E[z·z′] = ‖E z‖², E‖z‖² = tr C, E[(z·z′)²] = tr C² with C = E[z zᵀ]; and tr C = tr C² = n for
    no other symmetric C than I, as then Σ (eigenvalue − 1)² = 0.
    """
    n, inner = z.shape[1], (z[::2] * z[1::2]).sum(-1)
    check(inner, 0.0, resolution)
    check(z.square().sum(-1), n, resolution)
    check(inner**2, n, resolution)


@forall(3, monte_carlo=4, seed=seeds, K=st.integers(4, 6), H=st.integers(2, 3))
def test_noise_of_an_update_is_white(seed, K, H):
    """x_next, x_flow, x_0 and all ε_k are N(0, I), t ~ U(0, 1), all independent: Monte Carlo.

    T2 with a generator; noise used twice, in time or as the start, is rejected.
    """
    sizes = dict(width=4, layers=1, critics=1, flow_steps=K, chunk=H, device=DEVICE.type)
    agent = trqam.Agent(dataclasses.replace(trqam.Config(), **sizes), 3, 2)
    noise = agent.draw_noise(PATHS // 2, torch.Generator(DEVICE).manual_seed(seed))
    noise = {k: v.to(torch.float64) for k, v in noise.items()}
    assert noise["sde"].shape == (K, PATHS // 2, agent.D)
    assert ((noise["t_flow"] >= 0) & (noise["t_flow"] < 1)).all()

    def columns(x_next, x_flow, t_flow, x_sde, sde):
        t = math.sqrt(12) * (t_flow - 0.5)  # mean 0, variance 1
        return torch.cat([x_next, x_flow, x_sde, *sde, t], -1)

    is_white(accept, columns(**noise), agent.D)
    accept(noise["sde"][..., 0].pow(4).mean(0), 3.0, 0.3)  # Gaussian, not just of variance 1
    again = noise["sde"][[0, 0, *range(2, K)]]
    for wrong in (dict(sde=again), dict(x_sde=noise["sde"][0]), dict(x_flow=noise["x_next"])):
        z = columns(**noise | wrong)
        inner = (z[::2] * z[1::2]).sum(-1)
        reject(inner**2, z.shape[1], agent.D, 1)


# ------------------------------------------------------------------ the design


def test_false_alarm_and_power_budget():
    """α Σ z-tests ≤ 1e-6 in every profile; an error of δ is seen with 1 − β: N·KL = 2(z_α+z_β)²/δ².

    The second is asserted by each z-test with the SE it finds; here for the Gaussian SE √(2KL/N).
    """
    assert 0 <= Z_TESTS["made"] <= Z_TESTS["allowed"]
    thorough = Z_TESTS["allowed"] * PROFILES["thorough"] / PROFILES[PROFILE]
    assert ALPHA * thorough <= 1e-6
    assert 2 * (Z_ALPHA + Z_BETA) ** 2 / DELTA**2 <= PATHS
    assert abs(2 * NormalDist().cdf(-Z_ALPHA) / ALPHA - 1) < 1e-3
    sample = torch.tensor([-1.0, 1.0], **F64).repeat(50)  # mean 0, SE 0.1
    accept(sample, 0.6, 1.0)  # within z_α = 6.1 standard errors
    for wrong in (0.65, -0.65):  # outside, on both sides
        with pytest.raises(AssertionError, match="expected"):
            accept(sample, wrong, 1.0)
    with pytest.raises(AssertionError, match="inconclusive"):
        accept(sample, 0.0, 0.5)
    with pytest.raises(AssertionError, match="not rejected"):
        reject(sample, 0.6, 1.0, 0)
