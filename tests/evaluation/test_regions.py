"""Boxes on the grid, against pictures of pixels."""

import pytest
import torch

from betaclip.evaluation.regions import coverage, on_grid, region_features

GRIDS = [(3, 5), (4, 4), (1, 6)]


def random_boxes(count: int, grid: tuple[int, int]) -> torch.Tensor:
    """Corners in order, on 16ths of a patch."""
    height, width = grid
    corners = torch.randint(0, 16, (count, 2, 2)) * torch.tensor([width, height]) / 16
    low, high = corners.amin(1), corners.amax(1) + 1 / 16
    return torch.cat((low, high), 1)


@pytest.mark.parametrize("grid", GRIDS)
def test_coverage_counts_pixels(grid):
    """Each patch has 16 x 16 pixels, and each pixel is inside or outside a box."""
    height, width = grid
    boxes = random_boxes(20, grid)
    y, x = ((torch.arange(n * 16) + 0.5) / 16 for n in grid)
    for box, covered in zip(boxes, coverage(boxes, grid), strict=True):
        inside = ((y > box[1]) & (y < box[3]))[:, None] & ((x > box[0]) & (x < box[2]))
        truth = inside.double().reshape(height, 16, width, 16).mean((1, 3)).flatten()
        torch.testing.assert_close(covered.double(), truth)


def test_coverage_of_closed_forms():
    grid = (2, 3)
    boxes = torch.tensor([[0, 0, 3, 2], [1, 0, 2, 1], [-5, -5, 9, 9], [0.5, 0.25, 1.5, 0.75], [3, 2, 4, 3]])
    truth = torch.tensor(
        [[1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0.25, 0.25, 0, 0, 0, 0], [0] * 6]
    )
    torch.testing.assert_close(coverage(boxes, grid), truth.float())


def test_on_grid():
    boxes = on_grid([(10, 20, 30, 40), (0, 0, 7, 5)], [(100, 50), (7, 5)], (4, 8))
    torch.testing.assert_close(boxes, torch.tensor([[0.8, 1.6, 2.4, 3.2], [0, 0, 8, 4]]))
    assert on_grid([], [], (4, 8)).shape == (0, 4)


@pytest.mark.parametrize("grid", GRIDS)
def test_region_features_of_whole_patches(grid):
    """A box of one patch has its feature; a box of all patches, sampled once per patch, has their mean."""
    height, width = grid
    patches = torch.randn(2, height * width, 6)
    for image in range(2):
        boxes = torch.tensor([[x, y, x + 1, y + 1] for y in range(height) for x in range(width)]).float()
        features = region_features(patches, grid, boxes, torch.full((len(boxes),), image))
        torch.testing.assert_close(features, patches[image])
    whole = region_features(patches, grid, torch.tensor([[0.0, 0, width, height]]), torch.tensor([1]))
    torch.testing.assert_close(whole[0], patches[1].mean(0))


def test_region_features_of_a_plane():
    """Bilinear sampling of features that are linear in the position gives the value at the box's centre."""
    grid = (6, 9)
    y, x = torch.meshgrid(torch.arange(6) + 0.5, torch.arange(9) + 0.5, indexing="ij")
    patches = torch.stack((x, y), -1).flatten(0, 1)[None]
    boxes = torch.tensor([[1.2, 0.9, 3.4, 2.2], [2.5, 1.5, 7.75, 5.25], [4.0, 3.0, 4.5, 3.5]])
    centres = torch.stack((boxes[:, ::2].mean(1), boxes[:, 1::2].mean(1)), 1)
    torch.testing.assert_close(region_features(patches, grid, boxes, torch.zeros(3, dtype=torch.int64)), centres)
