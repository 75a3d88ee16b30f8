"""The picture shows each image, its annotations and its detections."""

from __future__ import annotations

import numpy as np

from detr_ray.viz import DrawnBoxes, detection_grid


def test_boxes_are_drawn_where_they_are() -> None:
    image = np.zeros((50, 100, 3), np.uint8)
    truth = DrawnBoxes(np.array([[10.0, 10.0, 20.0, 20.0]]), ["cat"])
    found = DrawnBoxes(np.array([[60.0, 5.0, 30.0, 40.0]]), ["dog"], np.array([0.9]))
    picture = np.asarray(detection_grid([image], [truth], [found], cell_px=200))
    assert picture.shape == (216, 216, 3)
    # The image is scaled by 2 and centred: 50 empty rows above it, 8 pixels around the grid.
    assert picture[8 + 50 + 20, 8 + 40].tolist() == [255, 255, 255], "upper side of the annotation"
    detected = picture[8 + 50 + 50, 8 + 120]
    assert detected.max() == 255 and detected.min() < 255, "left side of the detection, in colour"
    assert picture[8 + 50 + 40, 8 + 10].tolist() == [0, 0, 0], "the image itself"


def test_images_of_any_number_size_and_without_boxes() -> None:
    none = DrawnBoxes(np.zeros((0, 4)), [])
    images = [np.full((height, 40, 3), 90, np.uint8) for height in (10, 40, 160)]
    picture = detection_grid(images, [none] * 3, [none] * 3, columns=2, cell_px=64)
    assert picture.size == (2 * 72 + 8, 2 * 72 + 8)


def test_boxes_outside_the_image_are_clipped() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    outside = DrawnBoxes(np.array([[-5.0, -5.0, 100.0, 100.0], [30.0, 30.0, 5.0, 5.0]]), ["a", "b"], np.ones(2))
    assert detection_grid([image], [outside], [outside], cell_px=40).size == (56, 56)
