"""Codes in two dimensions, each with a number that says how far the picture can be believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppl_gen.errors import MissingExtraError, require_positive, require_seed, require_whole
from ppl_gen.looking.asking import as_rows

__all__ = ["Embedding", "mds", "som", "tsne"]

_NEIGHBOURS = 5  # of the trustworthiness
_EPOCHS = 20  # of a self-organising map


@dataclass(frozen=True)
class Embedding:
    """Rows as points of the plane, and how much of their neighbourhoods and distances is left.

    Args:
        points: rows x 2.
        method: "tsne", "mds" or "som".
        scores: numbers by name; the functions say which.
        units: of a map, down x across x numbers of a code: what each unit stands for.

    Example:
        >>> import torch
        >>> mds(torch.eye(4))
        Embedding('mds', 4 rows, stress 0...)
    """

    points: Tensor
    method: str
    scores: dict[str, float]
    units: Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {value:.3g}" for name, value in self.scores.items())
        return f"Embedding({self.method!r}, {len(self.points)} rows, {said})"


def tsne(codes: Any, *, perplexity: float = 30.0, seed: int = 0) -> Embedding:
    r"""t-distributed stochastic neighbour embedding: close rows stay close; distances between groups mean nothing.

    .. math:: \min_y \mathrm{KL}(P \,\|\, Q), \quad
              q_{ij} = \frac{(1 + \lVert y_i - y_j \rVert^2)^{-1}}{\sum_{k \ne l} (1 + \lVert y_k - y_l \rVert^2)^{-1}}

    By scikit-learn, from the principal components.

    Args:
        codes: rows x numbers (what else a row holds is flattened).
        perplexity: effective number of neighbours of a row; lowered to a third of the rows where there are few.
        seed: of the optimiser.

    Returns:
        Points, with ``trustworthiness`` (from 0 to 1: how few rows are among the 5 nearest in the picture without being
        near before; about 0.5 for points at random) and ``kl``, the objective in nats.

    Raises:
        TypeError, ValueError: for codes that are no rows of finite numbers, are all equal, or fewer than 5.
        MissingExtraError: without scikit-learn (``ppl_gen[looking]``).

    References:
        Visualizing data using t-SNE (van der Maaten and Hinton, 2008). Neighborhood preservation in nonlinear
        projection methods (Venna and Kaski, 2001) for the trustworthiness.

    Example:
        >>> import torch
        >>> groups = torch.randn(30, 8) + 20 * torch.eye(3, 8).repeat(10, 1)
        >>> tsne(groups, perplexity=5).scores["trustworthiness"] > 0.9
        True
    """
    rows = _rows(codes)
    require_positive("perplexity", perplexity)
    seed = require_seed(seed)
    manifold = _sklearn()
    used = min(float(perplexity), (len(rows) - 1) / 3)
    made = manifold.TSNE(perplexity=used, init="pca", random_state=seed)
    points = np.asarray(made.fit_transform(rows.astype(np.float32)), dtype=np.float64)
    kept = {"trustworthiness": _trust(manifold, rows, points), "kl": float(made.kl_divergence_)}
    return Embedding(torch.from_numpy(points), "tsne", kept)


def mds(codes: Any, *, seed: int = 0) -> Embedding:
    r"""Metric multidimensional scaling: distances of the picture are as near as can be to those of the codes.

    .. math:: \min_y \sum_{i < j} (\delta_{ij} - \lVert y_i - y_j \rVert)^2, \quad
              \text{stress} = \sqrt{\frac{\sum_{i < j} (\delta_{ij} - \lVert y_i - y_j \rVert)^2}
              {\sum_{i < j} \delta_{ij}^2}}

    By majorisation (SMACOF, scikit-learn), which begins at the principal components; so the seed changes nothing but
    ties.

    Args:
        codes: rows x numbers.
        seed: of the optimiser.

    Returns:
        Points, with ``stress`` (0: all distances are kept; 0.1 is good, 0.2 poor) and ``trustworthiness`` as `tsne`
        gives it, where there are 5 rows or more.

    Raises:
        TypeError, ValueError: for codes that are no rows of finite numbers, or are all equal.
        MissingExtraError: without scikit-learn (``ppl_gen[looking]``).

    References:
        Multidimensional scaling by optimizing goodness of fit to a nonmetric hypothesis (Kruskal, 1964). Convergence of
        the majorization method for multidimensional scaling (de Leeuw, 1988).

    Example:
        >>> import torch
        >>> flat = torch.randn(20, 2) @ torch.linalg.qr(torch.randn(6, 6)).Q[:2]  # a plane in six dimensions
        >>> mds(flat).scores["stress"] < 1e-3
        True
    """
    rows = _rows(codes, least=3)
    seed = require_seed(seed)
    manifold = _sklearn()
    centred = rows - rows.mean(0)
    start = np.zeros((len(rows), 2))
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    start[:, : min(2, len(sizes))] = (left * sizes)[:, :2]
    far = _distances(rows)
    points, _ = manifold.smacof(
        far, n_components=2, init=start, n_init=1, max_iter=500, eps=1e-9, random_state=seed, normalized_stress=False
    )
    lost = np.square(far - _distances(points)).sum() / np.square(far).sum()
    kept = {"stress": float(np.sqrt(lost))}
    if len(rows) > _NEIGHBOURS:
        kept["trustworthiness"] = _trust(manifold, rows, points)
    return Embedding(torch.from_numpy(np.ascontiguousarray(points)), "mds", kept)


def som(codes: Any, *, grid: tuple[int, int] = (8, 8), epochs: int = _EPOCHS, seed: int = 0) -> Embedding:
    r"""A self-organising map: a net of units laid over the codes; each row is shown at the unit nearest to it.

    .. math:: u^*(x) = \arg\min_u \lVert x - w_u \rVert, \quad
              w_u \leftarrow w_u + \alpha_t \exp\!\left(-\frac{\lVert u - u^* \rVert^2}{2 \sigma_t^2}\right) (x - w_u)

    By MiniSom, from the plane of the principal components; the neighbourhood sigma shrinks from half of the grid to
    one unit, the rate alpha from a half to zero.

    Args:
        codes: rows x numbers, at least 2 numbers.
        grid: units down and across.
        epochs: how often each row is shown.
        seed: of the order of the rows.

    Returns:
        Points, line and column of each row's unit; ``units``, what these stand for; and in ``scores``
        ``quantisation``, the mean distance of a row from its unit in units of the codes, ``explained``, 1 less the
        share of the squared distances from the mean code that is left, and ``topographic``, the share of rows whose two
        nearest units are no neighbours (where the net is folded).

    Raises:
        TypeError, ValueError: for codes that are no rows of finite numbers, or are all equal.
        MissingExtraError: without MiniSom (``ppl_gen[looking]``).

    References:
        Self-organized formation of topologically correct feature maps (Kohonen, 1982).

    Example:
        >>> import torch
        >>> found = som(torch.rand(60, 3), grid=(4, 4))
        >>> found.points.shape, found.units.shape, sorted(found.scores)
        (torch.Size([60, 2]), torch.Size([4, 4, 3]), ['explained', 'quantisation', 'topographic'])
    """
    rows = _rows(codes, least=3)
    if rows.shape[1] < 2:
        raise ValueError("codes: a map of two dimensions needs codes of 2 numbers or more, got 1")
    down, across = _checked_grid(grid)
    require_whole("epochs", epochs)
    seed = require_seed(seed)
    try:
        from minisom import MiniSom
    except ModuleNotFoundError as error:
        raise MissingExtraError('self-organising maps are made by MiniSom: pip install "ppl_gen[looking]"') from error
    turned, back = _turned(rows)
    net = MiniSom(
        down,
        across,
        turned.shape[1],
        sigma=max(1.0, max(down, across) / 2),
        learning_rate=0.5,
        decay_function="linear_decay_to_zero",
        sigma_decay_function="linear_decay_to_one",
        random_seed=seed,
    )
    net.pca_weights_init(turned)
    net.train(turned, int(epochs) * len(turned), random_order=True)
    units = back(np.asarray(net.get_weights(), dtype=np.float64))
    far = np.linalg.norm(rows[:, None] - units.reshape(1, down * across, -1), axis=-1)
    nearest = far.argsort(1, kind="stable")[:, :2]
    lines, columns = nearest // across, nearest % across
    apart = np.maximum(np.abs(np.diff(lines)), np.abs(np.diff(columns)))[:, 0]
    around = np.square(rows - rows.mean(0)).sum()
    kept = {
        "quantisation": float(far.min(1).mean()),
        "explained": float(1 - np.square(far.min(1)).sum() / around),
        "topographic": float((apart > 1).mean()),
    }
    points = np.stack([lines[:, 0], columns[:, 0]], 1).astype(np.float64)
    return Embedding(torch.from_numpy(points), "som", kept, torch.from_numpy(units))


def _rows(codes: Any, least: int = 5) -> np.ndarray:
    rows: np.ndarray = as_rows(codes, nn.Identity(), "codes").flatten(1).double().cpu().numpy()
    if len(rows) < least:
        raise ValueError(f"codes: expected at least {least} rows, got {len(rows)}")
    if (rows == rows[:1]).all():
        raise ValueError("codes: all rows are equal, so there is nothing to show")
    return rows


def _turned(rows: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Rows in the coordinates of their principal components, the first of spread 1, and the way back.

    All distances are kept; a layer of thousands of numbers becomes no wider than there are rows.
    """
    centre = rows.mean(0)
    _, sizes, axes = np.linalg.svd(rows - centre, full_matrices=False)
    axes = axes[: max(2, int((sizes > 1e-10 * sizes[0]).sum()))]
    scale = sizes[0] / np.sqrt(len(rows))
    return (rows - centre) @ axes.T / scale, lambda units: units @ axes * scale + centre


def _distances(rows: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import pdist, squareform

    far: np.ndarray = squareform(pdist(rows))
    return far


def _trust(manifold: Any, rows: np.ndarray, points: np.ndarray) -> float:
    near = max(1, min(_NEIGHBOURS, (len(rows) - 1) // 2))
    return float(manifold.trustworthiness(rows, points, n_neighbors=near))


def _sklearn() -> Any:
    try:
        import sklearn.manifold
    except ModuleNotFoundError as error:
        raise MissingExtraError('t-SNE and MDS are made by scikit-learn: pip install "ppl_gen[looking]"') from error
    return sklearn.manifold


def _checked_grid(grid: Any) -> tuple[int, int]:
    if not isinstance(grid, Sequence) or isinstance(grid, str | bytes) or len(grid) != 2:
        raise ValueError(f"grid: expected units down and across, such as (8, 8), got {grid!r}")
    for size in grid:
        require_whole("grid", size, 2)
    return int(grid[0]), int(grid[1])
