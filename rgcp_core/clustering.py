"""Which faces of an archive are the same person's, and which of them make a good album."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rgcp_core.errors import UserError

SAME_PERSON = 0.948
"""Mean cosine (dlib) between two groups of faces from which they count as one person.

One pair in a thousand of different people exceeds it among the 377 faces of `faces128-val` (70,876 pairs); 1 in 100
exceeds 0.924, near `load_identity`'s threshold for one pair, and too low here: an archive has many more pairs of two
people than of one. Measured on other faces: the 59 of 9 people in `people128` among n strangers of `faces128-train`
(these at 128 px). Purity is the share of the largest person in the people's clusters, recall the share of the 173
pairs of one person that are together:

| people at, strangers    | purity, recall at 0.925 | 0.940        | 0.948        | 0.955        | HDBSCAN, leaves |
|-------------------------|-------------------------|--------------|--------------|--------------|-----------------|
| 128 px, n = 0           | 0.93, 1.00              | 1.00, 1.00   | 1.00, 1.00   | 1.00, 0.94   | 1.00, 1.00      |
| 128 px, n = 800         | 0.91, 1.00              | 1.00, 1.00   | 1.00, 1.00   | 1.00, 0.94   | 0.82, 1.00      |
| 64 px, n = 800          | 0.94, 1.00              | 1.00, 1.00   | 1.00, 1.00   | 1.00, 0.97   | 0.84, 1.00      |
| 32 px enlarged, n = 800 | 0.92, 1.00              | 1.00, 1.00   | 1.00, 1.00   | 1.00, 0.78   | 0.83, 1.00      |
| 16 px enlarged, n = 800 | 0.97, 1.00              | 1.00, 0.81   | 1.00, 0.62   | 1.00, 0.46   | 0.94, 0.77      |
| clusters of 3 strangers and more, n = 800 | 44    | 20           | 10           | 7            | 14              |

The strangers that it takes for one person are mostly small children, whom dlib's network tells apart badly.
"""
MAX_FACES = 20_000
"""Their distances take 8 bytes a pair: 1.6 GB. 10,000 faces took 40 s on a busy CPU."""
ALBUM_SIZE = 20
"""Photos in the paper's personal albums."""


def cluster_faces(embeddings: NDArray[np.floating], min_similarity: float = SAME_PERSON) -> NDArray[np.int64]:
    """Group faces by person: agglomerative clustering with average linkage over cosine similarities.

    Average linkage because single linkage chains strangers together through one blurred face, and because the mean
    is what a face is later matched with a person by (`rgcp_core.people.match`).

    Args:
        embeddings: (N,D); their length does not matter.
        min_similarity: two groups become one while their mean cosine is at least this, in [-1,1].

    Returns:
        (N,) the cluster of each face, 0 the largest; among equally large ones, in the order of their first faces.

    Raises:
        UserError: more than `MAX_FACES`, or embeddings that are no (N,D).
    """
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise UserError(f"Expected finite embeddings (N,D), got shape {embeddings.shape}.")
    count = len(embeddings)
    if count > MAX_FACES:
        raise UserError(
            f"{count:,} faces are too many to be compared with each other; at most {MAX_FACES:,} are possible. "
            "Take the archive in parts."
        )
    if count < 2:
        return np.zeros(count, np.int64)
    from sklearn.cluster import AgglomerativeClustering  # slow to import

    model = AgglomerativeClustering(
        n_clusters=None, metric="cosine", linkage="average", distance_threshold=1 - min_similarity
    )
    labels = model.fit_predict(embeddings.astype(np.float64))
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[inverse].astype(np.int64)


def similarity_to_centre(embeddings: NDArray[np.floating], labels: NDArray[np.integer]) -> NDArray[np.float64]:
    """Cosine (N,) of each face (N,D) with the mean direction of its cluster; 1 for a face that is alone."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    result = np.ones(len(unit))
    for label in np.unique(labels):
        members = labels == label
        centre = unit[members].mean(axis=0)
        result[members] = unit[members] @ (centre / np.linalg.norm(centre))
    return result


def sharp_and_varied(looks: NDArray[np.floating], sharpness: Sequence[float], count: int = ALBUM_SIZE) -> list[int]:
    """Choose at most `count` faces that are sharp and differ, the sharpest first.

    The blurrier half is left out as far as there are enough others. Of the rest, the sharpest comes first, and then
    again and again the one that differs most from all chosen so far (farthest-first traversal: Gonzalez 1985), so that
    pose, light and age are as different as the archive has them.

    Args:
        looks: (N,...) small pictures of the faces, all of one shape.
        sharpness: (N,), higher is sharper; any unit.
        count: how many at most.
    """
    number = len(looks)
    if number == 0 or count < 1:
        return []
    by_sharpness = np.argsort(-np.asarray(sharpness, np.float64), kind="stable")
    candidates = by_sharpness[: max(count, number // 2)]
    points = np.asarray(looks, np.float64).reshape(number, -1)[candidates]
    chosen = [0]
    distance = np.linalg.norm(points - points[0], axis=1)
    while len(chosen) < min(count, len(candidates)):
        distance[chosen] = -1
        farthest = int(distance.argmax())
        chosen.append(farthest)
        distance = np.minimum(distance, np.linalg.norm(points - points[farthest], axis=1))
    return [int(candidates[i]) for i in chosen]
