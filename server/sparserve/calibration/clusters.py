"""Groups of prompts that use the same neurons."""

from __future__ import annotations

import torch

ITERATIONS = 50


def spherical_kmeans(points: torch.Tensor, count: int) -> torch.Tensor:
    """points [n, width] of length 1 -> the group of each, int64 [n], numbered by first appearance.

    Spherical k-means (Dhillon and Modha 2001), begun with the first point and each time the one farthest
    from those taken: nothing is drawn, so equal points make equal groups.
    """
    taken = [0]
    while len(taken) < min(count, len(points)):
        nearest = (points @ points[taken].T).max(dim=1).values
        taken.append(int(nearest.argmin()))
    centroids = points[taken]
    groups = (points @ centroids.T).argmax(dim=1)
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centroids).index_add_(0, groups, points)
        # A group that lost all its points keeps its place.
        centroids = torch.nn.functional.normalize(
            torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, centroids), dim=1
        )
        moved = (points @ centroids.T).argmax(dim=1)
        if torch.equal(moved, groups):
            break
        groups = moved
    seen: dict[int, int] = {}
    return torch.tensor([seen.setdefault(int(group), len(seen)) for group in groups])
