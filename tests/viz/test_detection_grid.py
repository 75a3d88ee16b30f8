"""The picture shows each image, its annotations and its detections."""

from __future__ import annotations

import numpy as np

from detr_ray.viz import DrawnBoxes, detection_grid


def test_boxes_are_drawn_where_they_are() -> None:
    image = np.zeros((64, 128, 3), np.uint8)
    truth = DrawnBoxes(np.array([[10.0, 10.0, 20.0, 20.0]]), ["cat"])
    found = DrawnBoxes(np.array([[60.0, 5.0, 30.0, 40.0]]), ["dog"], np.array([0.9]))
    picture = np.asarray(detection_grid([image], [truth], [found]))
    assert picture.shape == (272, 272, 3)
    # The image is scaled by 2 and centred: 64 empty rows above it, 8 pixels around the grid.
    assert picture[8 + 64 + 20, 8 + 40].tolist() == [255, 255, 255], "upper side of the annotation"
    detected = picture[8 + 64 + 50, 8 + 120]
    assert detected.max() == 255 and detected.min() < 255, "left side of the detection, in colour"
    assert picture[8 + 64 + 40, 8 + 10].tolist() == [0, 0, 0], "the image itself"


def test_images_of_any_number_size_and_without_boxes() -> None:
    none = DrawnBoxes(np.zeros((0, 4)), [])
    images = [np.full((height, 40, 3), 90, np.uint8) for height in (10, 40, 160, 20, 80)]
    picture = detection_grid(images, [none] * 5, [none] * 5)
    assert picture.size == (4 * 264 + 8, 2 * 264 + 8)


def test_boxes_outside_the_image_are_clipped() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    outside = DrawnBoxes(np.array([[-5.0, -5.0, 100.0, 100.0], [30.0, 30.0, 5.0, 5.0]]), ["a", "b"], np.ones(2))
    assert detection_grid([image], [outside], [outside]).size == (272, 272)


def test_texts_of_boxes_at_one_place_do_not_cover_each_other() -> None:
    image = np.zeros((128, 128, 3), np.uint8)
    none = DrawnBoxes(np.zeros((0, 4)), [])
    boxes = np.array([[30.0, 40.0, 60.0, 40.0]])
    one, other = DrawnBoxes(boxes, ["cat"]), DrawnBoxes(boxes, ["otter"])
    both = DrawnBoxes(np.repeat(boxes, 2, axis=0), ["cat", "otter"])
    alone = [np.asarray(detection_grid([image], [none], [found])) for found in (one, other)]
    picture = np.asarray(detection_grid([image], [none], [both]))
    for cell in alone:
        colours, counts = np.unique(cell.reshape(-1, 3), axis=0, return_counts=True)
        is_bright = colours.max(1) == 255
        colour = colours[is_bright][counts[is_bright].argmax()]
        assert (picture == colour).all(-1).sum() > 100, "pixels behind the text; the outline may be the other box's"
