"""Labels and category ids: both spaces, there and back, and what is said when a data set does not fit."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from detr_ray.data.errors import DataError
from detr_ray.data.label_map import LabelMap

CATEGORIES = [(7, "circle"), (3, "square"), (200, "star")]


def test_contiguous_labels_follow_the_order_of_ids():
    label_map = LabelMap.contiguous(CATEGORIES)
    assert label_map.num_classes == 3
    assert label_map.names == ("square", "circle", "star")
    assert label_map.category_ids == (3, 7, 200)
    np.testing.assert_array_equal(label_map.labels_of(np.array([[200, 3], [7, 7]])), [[2, 0], [1, 1]])
    np.testing.assert_array_equal(label_map.category_ids_of(np.array([2, 0, 1])), [200, 3, 7])
    assert label_map.labels_of(np.array([7])).tolist() == [1]


def test_coco91_has_the_label_as_the_category_id():
    label_map = LabelMap.coco91()
    assert label_map.num_classes == 91
    assert len(label_map.categories) == 80
    used = np.array([category_id for category_id, _ in label_map.categories])
    np.testing.assert_array_equal(label_map.labels_of(used), used)
    np.testing.assert_array_equal(label_map.category_ids_of(used), used)
    assert label_map.names[18] == "dog"
    assert label_map.category_ids_of(np.array([0, 12, 1])).tolist() == [-1, -1, 1]


def test_names_are_those_of_the_real_file(coco128):
    real = json.loads((coco128 / "annotations/instances_train2017.json").read_text())["categories"]
    assert dict(LabelMap.coco91().categories) == {category["id"]: category["name"] for category in real}


@pytest.mark.parametrize("label_map", [LabelMap.contiguous(CATEGORIES), LabelMap.coco91()])
def test_survives_json_and_pickle(label_map):
    label_map.labels_of(np.array([3]))  # fills what is cached
    assert LabelMap.from_dict(json.loads(json.dumps(label_map.to_dict()))) == label_map
    assert pickle.loads(pickle.dumps(label_map)).labels_of(np.array([3])) == label_map.labels_of(np.array([3]))


def test_empty_arrays_stay_empty():
    label_map = LabelMap.contiguous(CATEGORIES)
    assert label_map.labels_of(np.zeros(0, np.int64)).shape == (0,)
    assert label_map.category_ids_of(np.zeros(0, np.int64)).shape == (0,)


def test_unknown_category_ids_are_named():
    with pytest.raises(DataError, match="category ids 4, 201 are not in the label map"):
        LabelMap.contiguous(CATEGORIES).labels_of(np.array([3, 201, 4, 201]))


def test_spaces_by_name():
    some = [(1, "person"), (90, "toothbrush")]
    assert LabelMap.for_space("contiguous", some, "a.json").num_classes == 2
    assert LabelMap.for_space("coco91", some, "a.json") == LabelMap.coco91()
    with pytest.raises(DataError, match=r"a\.json: .*12 'street sign' is not known.*label_space=contiguous"):
        LabelMap.for_space("coco91", [*some, (12, "street sign")], "a.json")
    with pytest.raises(DataError, match="1 is 'cell' here and 'person' there"):
        LabelMap.for_space("coco91", [(1, "cell")], "a.json")
    with pytest.raises(DataError, match="unknown label space 'coco80'"):
        LabelMap.for_space("coco80", some, "a.json")


def test_validation_set_must_be_covered():
    label_map = LabelMap.contiguous(CATEGORIES)
    label_map.check_covers([(200, "star")], "val.json")
    with pytest.raises(DataError, match=r"val\.json: .*8 'moon' is not known"):
        label_map.check_covers([(3, "square"), (8, "moon")], "val.json")
    with pytest.raises(DataError, match=r"val\.json: .*3 is 'circle' here and 'square' there"):
        label_map.check_covers([(3, "circle")], "val.json")


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        (("a",), (1, 2), "1 names for 2 category ids"),
        (("a", "b"), (1, 1), "used twice"),
        ((None,), (None,), "without any category"),
    ],
)
def test_contradictory_maps_are_refused(names, ids, message):
    with pytest.raises(DataError, match=message):
        LabelMap(names, ids)
