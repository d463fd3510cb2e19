"""Spherical k-means finds groups that are there, and the same ones each time."""

import torch

from sparserve.calibration.clusters import spherical_kmeans


def points(groups: list[int], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(20)[torch.tensor(groups)]
    noisy = directions + 0.1 * torch.rand(len(groups), 20, generator=generator)
    return torch.nn.functional.normalize(noisy, dim=1)


def test_groups_that_are_there_are_found_and_numbered_by_first_appearance():
    groups = [0, 1, 1, 2, 0, 2, 1, 0, 0]
    assert spherical_kmeans(points(groups, 0), 3).tolist() == groups


def test_there_are_no_more_groups_than_points():
    assert spherical_kmeans(points([0, 1], 0), 5).tolist() == [0, 1]


def test_one_group_holds_all():
    assert spherical_kmeans(points([0, 1, 2], 0), 1).tolist() == [0, 0, 0]
