"""The global search: many starts, then Newton from each, then a second round around the best.

With a small Huber delta the objective is nearly a sum of absolute values and has many local minima, so one start is not enough.
Starts: a grid over (alpha, beta) with the three linear terms in closed form (variable projection with the signs constrained),
the same grid with fixed shares of the loss, the faces where a term vanishes, and random moves from the best minima found.
Everything is done in centred logs with fixed numbers, so units change nothing.
"""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import least_squares

from analysis.allocation.newton import Box, minimize
from analysis.allocation.objective import NUM_PARAMETERS, Evaluator, Problem, log_surface, values
from analysis.blas import single_blas_thread

EXPONENT_GRID = (0.05, 0.1, 0.17, 0.25, 0.35, 0.5, 0.7, 1.0, 1.6, 3.0, 8.0, 25.0)
SHARE_GRID = ((0.2, 0.2, 0.6), (0.05, 0.3, 0.65), (0.3, 0.05, 0.65), (0.45, 0.45, 0.1))
SEARCH_POINTS = 1500  # the search sees at most so many points of a large table; the final fit sees all
MAX_EXPONENT = 50.0  # far above any loss curve: at this slope a term is a step between two neighbouring sizes
FLOOR_E = -30.0  # E below exp(-30) of the mean loss is zero to double precision
SHARE_OF_ZERO = 1e-4  # where the closed form gives a term zero, the search starts it at this share
SCOUT_ITERATIONS = 60  # a start that needs more is carried on only if it is among the survivors
NUM_SURVIVORS, NUM_MOVES, NUM_ROUNDS = 8, 6, 3


def parameter_box(problem: Problem) -> Box:
    """Bounds wide enough that only a vanishing or senseless term touches them."""
    reach_x, reach_y = float(np.abs(problem.x).max()), float(np.abs(problem.y).max())
    max_alpha, max_beta = (min(MAX_EXPONENT, 300.0 / max(reach, 1e-6)) for reach in (reach_x, reach_y))
    lower = np.array([FLOOR_E - max_alpha * reach_x, FLOOR_E - max_beta * reach_y, FLOOR_E, 0.0, 0.0])
    return Box(lower=lower, upper=np.array([20.0, 20.0, 5.0, max_alpha, max_beta]))


def projected_starts(problem: Problem, weights: np.ndarray) -> np.ndarray:
    """(K, 5): for each (alpha, beta) of the grid the non-negative linear terms that minimise the relative squared error.

    Three unknowns have seven supports; each is solved in closed form and the best feasible one is kept.
    """
    exponents = np.array(list(itertools.product(EXPONENT_GRID, EXPONENT_GRID)))
    loss = np.exp(problem.z)
    root = np.sqrt(weights) / loss
    num = exponents.shape[0]
    basis = np.stack(
        [
            np.exp(-exponents[:, :1] * problem.x) * root,
            np.exp(-exponents[:, 1:] * problem.y) * root,
            np.broadcast_to(root, (num, root.size)),
        ],
        axis=1,
    )
    target = loss * root
    gram, moment = basis @ basis.transpose(0, 2, 1), basis @ target
    best, best_error = np.zeros((num, 3)), np.full(num, np.inf)
    for size in (3, 2, 1):
        for support in itertools.combinations(range(3), size):
            index = list(support)
            sub = gram[:, index][:, :, index]
            ridge = 1e-12 * np.trace(sub, axis1=1, axis2=2)[:, None, None] * np.eye(size)
            terms = np.linalg.solve(sub + ridge, moment[:, index][:, :, None])[:, :, 0]
            error = -(terms * moment[:, index]).sum(axis=1)
            take = (terms > 0).all(axis=1) & (error < best_error)
            best[take] = 0.0
            best[np.ix_(take, index)] = terms[take]
            best_error = np.where(take, error, best_error)
    return np.column_stack([np.log(np.maximum(best, SHARE_OF_ZERO)), exponents])


def share_starts() -> np.ndarray:
    """(K, 5): fixed shares of the mean loss for the three terms on some exponents of the grid."""
    coarse = EXPONENT_GRID[1:10:2]
    return np.array([[*np.log(shares), i, j] for shares in SHARE_GRID for i in coarse for j in coarse])


def face_starts(theta: np.ndarray, box: Box) -> np.ndarray:
    """(3K, 5): each start with one of its terms taken away, its share given to the next: minima at infinity lie there."""
    faces = []
    for k in range(3):
        face = theta.copy()
        face[:, k] = box.lower[k]
        heir = (k + 1) % 3
        face[:, heir] = np.logaddexp(theta[:, heir], np.minimum(theta[:, k], 1.0))
        faces.append(face)
    return np.vstack(faces)


def distinct(value: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` lowest minima whose values differ by more than 1e-9 of themselves, best first."""
    order = np.argsort(value, kind="stable")
    chosen = [order[0]]
    for i in order[1:]:
        if len(chosen) == count:
            break
        if value[i] > value[chosen[-1]] * (1 + 1e-9):
            chosen.append(i)
    return np.array(chosen)


@single_blas_thread
def search(problem: Problem, weights: np.ndarray, *, thorough: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The distinct low minima found, best first: theta (K, 5), value (K,). weights: (n,).

    `thorough=False` leaves out the random moves; for use where many tables are fitted and each start is near a known answer.
    """
    box = parameter_box(problem)
    full = problem, weights[None]
    if problem.x.size > SEARCH_POINTS:
        order = np.lexsort((problem.z, problem.y, problem.x))  # by value, so that the order of the rows does not matter
        pick = order[np.linspace(0, order.size - 1, SEARCH_POINTS).round().astype(int)]
        problem = Problem(x=problem.x[pick], y=problem.y[pick], z=problem.z[pick], delta=problem.delta)
        weights = weights[pick]
    case = weights[None]
    starts = projected_starts(problem, weights)
    if thorough:
        starts = np.vstack([starts, share_starts()])
    theta, value, _ = minimize(Evaluator(problem, case), starts, box, SCOUT_ITERATIONS, race=thorough)
    keep = distinct(value, NUM_SURVIVORS)
    theta, value = theta[keep], value[keep]
    rng = np.random.default_rng(0)
    for _ in range(NUM_ROUNDS if thorough else 1):
        moves = rng.normal(size=(theta.shape[0] * NUM_MOVES, NUM_PARAMETERS)) * np.array([0.3, 0.3, 0.1, 0.1, 0.1])
        moves *= 10 ** rng.uniform(-1.5, 0.5, size=(moves.shape[0], 1))
        new = np.vstack([theta, face_starts(theta, box), np.repeat(theta, NUM_MOVES, axis=0) + moves if thorough else theta[:0]])
        new_theta, new_value, _ = minimize(Evaluator(problem, case), new, box, race=True)
        theta, value = np.vstack([theta, new_theta]), np.concatenate([value, new_value])
        keep = distinct(value, NUM_SURVIVORS)
        theta, value = theta[keep], value[keep]
    if full[0] is not problem:
        theta, value, _ = minimize(Evaluator(*full), theta[:3], box)
        keep = distinct(value, NUM_SURVIVORS)
        theta, value = theta[keep], value[keep]
    return exact(full[0], full[1][0], theta, value, box)


def exact(problem: Problem, weights: np.ndarray, theta: np.ndarray, value: np.ndarray, box: Box) -> tuple[np.ndarray, np.ndarray]:
    """The best minimum once more where all its residuals are within delta, as those of runs without noise are.

    The objective is a sum of squares there. Its Hessian squares the condition of a narrow table, so Newton stops short of the
    truth; MINPACK works on the Jacobian itself.
    """
    root = np.sqrt(weights)
    if np.abs((log_surface(theta[:1], problem.x, problem.y)[0] - problem.z)[weights > 0]).max() > problem.delta:
        return theta, value

    def residual(t: np.ndarray) -> np.ndarray:
        return np.asarray(root * (log_surface(t[None], problem.x, problem.y)[0] - problem.z))

    def jacobian(t: np.ndarray) -> np.ndarray:
        total = log_surface(t[None], problem.x, problem.y)[0]
        p1, p2, p3 = np.exp(t[0] - t[3] * problem.x - total), np.exp(t[1] - t[4] * problem.y - total), np.exp(t[2] - total)
        return np.stack([p1, p2, p3, -p1 * problem.x, -p2 * problem.y], axis=1) * root[:, None]

    found = least_squares(residual, theta[0], jacobian, method="lm", x_scale="jac", xtol=1e-15, ftol=1e-15, gtol=1e-15)
    best = np.clip(found.x, box.lower, box.upper)
    lower = float(values(problem, weights[None], best[None])[0])
    if lower < value[0]:
        theta, value = np.vstack([best[None], theta[1:]]), np.append(lower, value[1:])
    return theta, value
