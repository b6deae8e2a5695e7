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

import math
import os
from functools import partial
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
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

ALPHA, BETA = 1e-9, 1e-3  # false alarm and miss, per z-test
Z_ALPHA, Z_BETA = NormalDist().inv_cdf(1 - ALPHA / 2), NormalDist().inv_cdf(1 - BETA)
PATHS, DELTA = (2**20, 0.02) if DEVICE.type == "cuda" else (2**17, 0.05)  # N and resolution
Z_TESTS = {"allowed": 0, "made": 0}


def cases(n, monte_carlo=0):
    """Hypothesis settings for n cases (default profile) of at most `monte_carlo` z-tests each."""
    n = max(1, round(n * PROFILES[PROFILE]))
    Z_TESTS["allowed"] += n * monte_carlo
    return settings(
        max_examples=n,
        derandomize=PROFILE != "thorough",
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate] + ([] if monte_carlo else [Phase.shrink]),
        suppress_health_check=list(HealthCheck),
    )


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


def mlp_field(draw, D, width=16, gain=1.5):
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
    """Base velocity and direction of the velocity gap."""
    if kind == "mlp":
        return mlp_field(draw, D), mlp_field(draw, D)
    return gaussian_velocity(*random_gaussian(draw, D)), affine_field(draw, D)


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


def moments(v_fine, v_base, K, D, exact=True):
    """Means (K + 1, D) and covariances (K + 1, D, D) of a linear chain, by recursion."""
    eye = torch.eye(D, **F64)
    means, covs = [torch.zeros(D, **F64)], [eye]
    for k, g2 in enumerate(g_squared(K).flatten()):
        noisy = exact or k < K - 1
        A, b = affine_map(v_fine if noisy else v_base, k / K, D)
        F = (1 - 1 / (k + 1)) * eye + 2 * A / K if noisy else eye + A / K
        means.append(F @ means[-1] + (2 if noisy else 1) * b / K)
        covs.append(F @ covs[-1] @ F.T + noisy * g2 / K * eye)
    return torch.stack(means), torch.stack(covs)


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


def scale_for(kl, v_base, d, K, D, draw, rounds=4):
    """Scale of the gap d for which the path KL is about `kl` (a pilot of 1024 paths)."""
    x_0, noise, scale = draw.normal(1024, D), draw.normal(K, 1024, D), 0.5
    for _ in range(rounds):
        v = add(v_base, d, scale)
        path = trqam.simulate_sde(v, v_base, x_0, noise, exact=True)
        now = girsanov(scale * d(path[:-1], times(K))).sum(0).mean().item()
        scale *= min(2.0, max(0.5, math.sqrt(kl / now)))
    return scale


# ------------------------------------------------------------------ flow matching and acting


@cases(20)
@given(seed=seeds, D=dims, t=st.floats(0.05, 0.95))
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


@cases(20)
@given(seed=seeds, D=dims, t=st.floats(0.05, 0.95), size=st.floats(0.1, 2))
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


@cases(20)
@given(seed=seeds, D=dims, K=steps, size=st.floats(1, 3))
def test_sample_flow_is_euler_then_clip(seed, D, K, size):
    """x_{k+1} = x_k + h v(x_k, kh), action = clip(x_K, −1, 1): exact."""
    draw = Draw(seed)
    v, x = mlp_field(draw, D), size * draw.normal(32, D)
    action = trqam.sample_flow(v, x, K)
    for k in range(K):
        x = x + v(x, torch.full((1, 1), k / K, **F64)) / K
    assert (x.abs() > 1).any()  # or the clip would not be tested
    close(action, torch.minimum(torch.maximum(x, -torch.ones_like(x)), torch.ones_like(x)))


@cases(4)
@given(seed=seeds, s=st.floats(0.3, 0.7), m=st.floats(-0.5, 0.5))
def test_sample_flow_transports_noise_to_data(seed, s, m):
    """The flow of the marginal velocity maps N(0, 1) to N(m, s²), x_0 ↦ m + s x_0: limit, order 1."""
    assume(abs(m) > 0.05)
    v = gaussian_velocity(torch.full((1,), m, **F64), torch.full((1, 1), s**2, **F64))
    x_0 = torch.tensor([[0.0], [0.1]], **F64)
    sampled = {K: trqam.sample_flow(v, x_0, K).flatten() for K in (256, 512, 1024)}
    converges(lambda K: 10 * (sampled[K][1] - sampled[K][0]), s, (256, 512, 1024))
    close(sampled[256][0], m)  # the mean is carried without error


@cases(20)
@given(seed=seeds, rho=st.floats(0.1, 2), discount=st.floats(0.2, 0.99), E=st.integers(2, 10))
def test_td_target(seed, rho, discount, E):
    """y = r + γ^H m (mean_E Q' − ρ std_E Q'), std² = mean Q'² − (mean Q')²; m = 0 → y = r: exact."""
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


@cases(20)
@given(seed=seeds, D=dims, E=st.integers(2, 5))
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


@cases(10)
@given(K=st.integers(2, 64))
def test_schedule_is_the_shifted_memoryless_one(K):
    """t_k = k/K, g_k² = 2(1 − t_k + h)/(t_k + h) = 2(K + 1 − k)/(k + 1): exact."""
    t, g = trqam.schedule(K, torch.zeros(1, **F64))
    assert t.shape == g.shape == (K, 1, 1) and t.dtype == g.dtype == torch.float64
    close(t, times(K), 1e-14)
    close(g**2, g_squared(K), 1e-13)


@cases(6)
@given(seed=seeds, D=dims, j=st.integers(1, 7))
def test_memoryless_diffusion_of_the_score(seed, D, j):
    """2v − x/t = v + ½ g² ∇log p_t with g² = 2(1−t)/t: the schedule for which the SDE has the
    marginals p_t of the flow. Identity of the fields exact; g_k² of the code: limit, order 1.
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
@cases(12)
@given(seed=seeds, D=dims, K=steps, kind=kinds)
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
@cases(8)
@given(seed=seeds, D=dims, K=steps)
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
@cases(4)
@given(s=st.floats(0.3, 0.9), m=st.floats(0.2, 1))
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
    for a, b in zip(forgotten, forgotten[1:], strict=False):
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
