"""Counts over the annotations agree with what the loader gives image by image."""

from __future__ import annotations

import numpy as np
import pytest
from coco_folder import CocoFolder, encoded

from detr_ray.data.formats import open_split
from detr_ray.data.formats.coco import read_coco_index
from detr_ray.data.index import DatasetIndex
from detr_ray.data.label_map import LabelMap
from detr_ray.data.statistics import count_boxes


def assert_counts_agree(index: DatasetIndex) -> None:
    label_map = LabelMap.contiguous(index.categories)
    counted = count_boxes(index)
    labels = [index.training_instances(i, label_map).labels for i in range(len(index))]
    assert counted.per_image.tolist() == [len(image_labels) for image_labels in labels]
    per_label = np.bincount(np.concatenate(labels), minlength=label_map.num_classes)
    assert counted.per_category == {label_map.category_ids[k]: n for k, n in enumerate(per_label.tolist())}


def test_counts_are_those_of_training(tmp_path):
    folder = CocoFolder(tmp_path, categories=[(1, "cat"), (2, "dog"), (7, "unseen")])
    folder.add("train", "a.jpg", encoded(), boxes=[(1, 0, 0, 10, 10), (2, 60, 40, 50, 50), (1, 5, 5, 0, 4)])
    folder.add("train", "b.jpg", encoded(), boxes=[])
    folder.add("train", "c.jpg", encoded(), boxes=[(2, 100, 100, 5, 5), (2, 5, -20, 10, 10), (1, -5, -5, 10, 10)])
    folder.annotations["train"][0]["iscrowd"] = 1
    folder.fill("val", 1)
    index = open_split(str(folder.write()), None, "train")
    counted = count_boxes(index)
    assert counted.per_image.tolist() == [1, 0, 1]
    assert counted.per_category == {1: 1, 2: 1, 7: 0}
    assert (counted.most, counted.num_empty_images, counted.images_above(0)) == (1, 1, 2)
    assert_counts_agree(index)


def test_counts_are_those_of_training_on_real_images(coco128):
    index = read_coco_index(f"{coco128}/annotations/instances_train2017.json", f"{coco128}/train2017")
    assert_counts_agree(index)
    assert count_boxes(index).percentile(100) == count_boxes(index).most


def test_without_annotations_all_counts_are_zero(tmp_path):
    folder = CocoFolder(tmp_path)
    folder.add("train", "a.jpg", encoded(), boxes=[])
    folder.fill("val", 1)
    counted = count_boxes(open_split(str(folder.write()), None, "train"))
    assert (counted.most, counted.percentile(99), counted.num_empty_images) == (0, 0, 1)
    assert counted.per_category == {1: 0, 2: 0}


@pytest.mark.parametrize(("share", "boxes"), [(50, 1), (99, 3), (100, 3)])
def test_percentiles_are_whole_boxes(tmp_path, share, boxes):
    folder = CocoFolder(tmp_path)
    for count in (0, 1, 1, 2, 3):
        folder.add("train", f"{len(folder.images['train'])}.jpg", encoded(), boxes=[(1, 1, 1, 9, 9)] * count)
    folder.fill("val", 1)
    assert count_boxes(open_split(str(folder.write()), None, "train")).percentile(share) == boxes
