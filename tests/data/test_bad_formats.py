"""What bad files of each format give: an error with file, line and what to do, or a count.

Run alone: ``pytest tests/data/test_bad_formats.py``. COCO's are in ``test_index.py`` and ``test_annotation_values.py``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from coco_folder import encoded
from format_sets import put
from PIL import Image

from detr_ray.config import DataConfig
from detr_ray.data.errors import DataError
from detr_ray.data.formats import Reading, open_split, open_undivided
from detr_ray.data.index import DatasetIndex
from detr_ray.engine.opened_data import ConfiguredData

YAML = "train: images\nval: images\nnames: [cat, dog]\n"


def read(root: Path, split: str = "train", skip: bool = False) -> DatasetIndex:
    return open_split(str(root), None, split, reading=Reading(skip_unreadable=skip))


# YOLO

YOLO_ROWS = {
    "0 0.5 0.5 0.2": "labels/a.txt, line 1: 4 values: a row is: class x y width height",
    "\n0 0.5 0.5 0.2 0.2 0.9": "labels/a.txt, line 2: 6 values: .*if the last value is a confidence, take it out",
    "0,0.5,0.5,0.2,0.2": "labels/a.txt, line 1: 1 values: .*with blanks between",
    "0 0,5 0.5 0.2 0.2": r"labels/a.txt, line 1: '0,5' has a decimal comma: write decimal points \(0\.5\)",
    "0 0.5 x 0.2 0.2": "labels/a.txt, line 1: 'x' is not a number",
    "0 0.5 1_0 0.2 0.2": "labels/a.txt, line 1: '1_0' is not a number",
    "cat 0.5 0.5 0.2 0.2": "labels/a.txt, line 1: 'cat' is not a number",
    "0 .5 .5 .2 .2\r\n2 .5 .5 .2 .2": r"a.txt, line 2: class number 2, but .*data.yaml lists 2 classes \(0 to 1\)",
    "-1 0.5 0.5 0.2 0.2": "labels/a.txt, line 1: class number -1",
    "0.5 0.5 0.5 0.2 0.2": "line 1: the class number '0.5' is not a whole number",
    "0 30 20 10 10": "1 of 1 boxes have numbers above 2: they look like pixels.*divide x and width by",
    b"0 0.5 0.5 0.2 0.2\n\xff": r"labels/a.txt, line 2: not UTF-8 text \(byte 0xff\): convert the file",
}


@pytest.mark.parametrize("row", YOLO_ROWS)
def test_yolo_rows_that_are_refused(tmp_path, row):
    root = put(tmp_path, {"data.yaml": YAML, "images/a.jpg": encoded(), "labels/a.txt": row})
    with pytest.raises(DataError, match=YOLO_ROWS[row]):
        read(root)


def test_yolo_rows_that_are_taken_and_counted(tmp_path):
    rows = [
        "0 0.5 0.5 0.25 0.25", "0 0.5 0.5 0.25 0.25", "1.0 0.5 0.5 0.25 0.25", "", "0 nan 0.5 0.2 0.2",
        "0 0.5 0.5 0 0.2", "0 1.5 0.5 0.2 0.2", "1 0.05 0.5 0.25 0.25", "1 0.1 0.1 nan 0.1 0.2 0.2",
    ]  # fmt: skip
    files = {
        "data.yaml": YAML, "images/a.jpg": encoded(), "labels/a.txt": "\r\n".join(rows), "images/b.png": encoded("PNG"),
        "labels/b.txt": b"\xef\xbb\xbf", "images/c.jpg": encoded(), "labels/gone.txt": "0 0.5 0.5 0.2 0.2",
    }  # fmt: skip
    index = read(put(tmp_path, files))
    assert index.problems == {
        "boxes_not_finite": 2, "boxes_clipped": 1, "boxes_outside": 1, "boxes_without_area": 1, "rows_repeated": 1,
        "labels_without_image": 1, "images_without_labels": 1, "images_without_boxes": 2,
    }  # fmt: skip
    assert index.boxes_xywh_px[0].tolist() == [24, 18, 16, 12] and index.category_ids[:2].tolist() == [0, 1]


YOLO_FILES = {
    "names: [cat": "data.yaml, line 1: not YAML",
    "- cat": "data.yaml: not a data.yaml: no keys",
    "train: images": r"data.yaml: no 'names': list the classes there, names: \[cat, dog\]",
    "names: {1: cat, 2: dog}\ntrain: images": "the classes in 'names' are numbered 1, 2: number them 0, 1, 2",
    "names: cat\ntrain: images": "data.yaml: 'names' is neither a list",
    "names: [cat, '']\ntrain: images": "data.yaml: class 1 has no name",
    "names: []\ntrain: images": "data.yaml: lists no classes",
    "names: [cat]\nnc: 2\ntrain: images": "data.yaml: nc is 2, but 'names' lists 1: correct one",
    "names: [cat]\ntrain: pictures": "train is 'pictures', and there is no .*/pictures: paths are relative to",
    "names: [cat]\ntrain: /etc": "data.yaml: train is '/etc', and there is no",
    "names: [cat]\ntrain: images\nvalid: ../held/out": r"no .*/held/out: .* take the line valid out and .*data\.split",
    "names: [cat]\ntrain: {a: b}": "data.yaml: train is neither a folder nor a list of folders",
    "names: [cat]\ntrain: labels": r"data.yaml \(train\): no images in .*labels",
    "names: [cat]\ntrain: bare": r"\(train\): none of 1 images has a label file \(for the first: .*bare/a.txt\)",
    "names: [cat]\ntrain: twice": "a.txt: belongs to two images, twice/a.jpg and twice/a.png: rename or remove",
    "names: [cat]\ntrain: list.txt": r"list.txt: lists 1 of 2 images that are not there \(nowhere.jpg\)",
}


@pytest.mark.parametrize("content", YOLO_FILES)
def test_data_files_that_are_refused(tmp_path, content):
    files = {
        "data.yaml": content, "images/a.jpg": encoded(), "labels/a.txt": "", "bare/a.jpg": encoded(),
        "twice/a.jpg": encoded(), "twice/a.png": encoded("PNG"), "twice/a.txt": "",
        "list.txt": "images/a.jpg\nnowhere.jpg",
    }  # fmt: skip
    with pytest.raises(DataError, match=YOLO_FILES[content]):
        read(put(tmp_path / "set", files))


def test_a_data_file_that_grows_when_it_is_shown_is_refused_at_once(tmp_path):
    """Lists of lists of one list, as text would have ten to the power of thirty entries."""
    lists = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 31)]
    content = "\n".join(["l0: &l0 x", *lists, "names: [cat]", "nc: *l30", "train: [*l30]"])
    with pytest.raises(DataError, match=r"data\.yaml: train is neither a folder nor a list of folders"):
        read(put(tmp_path, {"data.yaml": content}))


def test_class_names_stay_text(tmp_path):
    """What YAML would make truth values, numbers and null of."""
    names = "[yes, no, on, 1, 1.50, null, 'a: b', ~, 2024-01-01]"
    root = put(tmp_path, {"data.yaml": f"train: images\nnames: {names}", "images/a.jpg": encoded(), "labels/a.txt": ""})
    found = [name for _, name in read(root).categories]
    assert found == ["yes", "no", "on", "1", "1.50", "null", "a: b", "~", "2024-01-01"]


# Pascal VOC


def voc(objects: str = "", size: str = "<width>64</width><height>48</height>", name: str = "a.jpg") -> str:
    return f"<annotation>\n<filename>{name}</filename><size>{size}</size>\n{objects}</annotation>"


def voc_object(box: str = "<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>", name: str = "cat") -> str:
    return f"<object><name>{name}</name>\n<bndbox>{box}</bndbox></object>"


ENTITY = '<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/hostname">]>\n'
VOC_FILES = {
    "": "a.xml: the file is empty",
    "<annotation><object></annotation>": "a.xml, line 1: not XML: mismatched tag. Was the file copied completely",
    "\n<svg></svg>": "a.xml, line 2: not an annotation of Pascal VOC: it begins with <svg>, not <annotation>",
    ENTITY + voc("&x;"): "a.xml, line 2: declares a document type, which could name other files: take <!DOCTYPE",
    voc("&nothing;"): "a.xml, line 3: not XML: undefined entity",
    voc("<object><name>cat</name></object>"): "a.xml, line 3: the object 'cat' has no <bndbox>: add it",
    voc(voc_object(name=" ")): "a.xml, line 3: the object has no <name>: give it one",
    voc(voc_object("<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax>")): "a.xml, line 4: the box of 'cat' has no <ymax>",
    voc(voc_object("<xmin>1</xmin><ymin>2</ymin><xmax>9,5</xmax><ymax>9</ymax>")): (
        "a.xml, line 4: '9,5' has a decimal comma: write decimal points"
    ),
    voc(
        voc_object("<xmin>one</xmin><ymin>2</ymin><xmax>9</xmax><ymax>9</ymax>")
    ): "a.xml, line 4: 'one' is not a number",
    voc(size="<width>w</width><height>3</height>"): "a.xml, line 2: 'w' is not a number",
    "<annotations>\n</annotations>": r"<annotations>, not <annotation>, and is CVAT's own XML: export as COCO 1\.0",
    "<a>" * 200: "a.xml, line 1: elements are nested too deeply",
    b'<?xml version="1.0" encoding="zip"?><annotation/>': "a.xml, line 1: not text in the encoding that it declares",
    b'<?xml version="1.0" encoding="punycode"?><annotation/>': "a.xml, line 1: not text in the encoding that it",
    b'<?xml version="1.0" encoding="unicode_escape"?><a>\\ud800</a>': "line 1: not text in the encoding .* surrogates",
    b"<annotation>\n\xff</annotation>": "a.xml, line 2: not UTF-8 text",
}


@pytest.mark.parametrize("content", VOC_FILES)
def test_xml_files_that_are_refused(tmp_path, content):
    for split in ("train", "val"):
        put(tmp_path, {f"{split}/b.jpg": encoded(), f"{split}/b.xml": voc(voc_object(), name="b.jpg")})
    root = put(tmp_path, {"train/a.jpg": encoded(), "train/a.xml": content})
    with pytest.raises(DataError, match=VOC_FILES[content]):
        read(root)


def test_xml_in_other_encodings_is_read(tmp_path):
    text = voc(voc_object(name="Tür"))
    for number, (encoding, head) in enumerate(
        [("utf-16", ""), ("utf-8-sig", ""), ("gbk", "gbk"), ("latin-1", "ISO-8859-1")]
    ):
        declared = f'<?xml version="1.0" encoding="{head}"?>' if head else ""
        content = (declared + text.replace("ü", "ü" if encoding != "gbk" else "点")).encode(encoding)
        root = put(tmp_path / str(number), {"train/a.jpg": encoded(), "train/a.xml": content, "val/a.xml": voc()})
        assert read(root).categories == ((0, "T点r" if encoding == "gbk" else "Tür"),)


def test_xml_that_is_taken_and_counted(tmp_path):
    boxes = [(4, 4, 9, 9), (4, 4, 9, 9), (9, 9, 4, 4), (100, 4, 120, 9), (60, 4, 90, 9), ("nan", 1, 2, 3)]
    objects = "".join(
        voc_object("".join(f"<{tag}>{v}</{tag}>" for tag, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)))
        for box in boxes
    )
    files = {
        "train/a.jpg": encoded(), "train/a.xml": voc(objects), "train/b.jpg": encoded(),
        "train/c.xml": voc(name="c.jpg"), "val/a.xml": voc(),
    }  # fmt: skip
    index = read(put(tmp_path, files))
    assert index.problems == {
        "boxes_not_finite": 1, "boxes_clipped": 1, "boxes_outside": 1, "boxes_without_area": 1, "rows_repeated": 1,
        "images_not_annotated": 1, "images_without_boxes": 1,
    }  # fmt: skip
    assert index.file_names.to_pylist() == ["a.jpg", "c.jpg"], "an image that is missing is found when it is read"


def test_a_learnable_box_stays_beside_a_crowd_of_the_same_place(tmp_path):
    crowd = voc_object().replace("<bndbox>", "<difficult>1</difficult><bndbox>")
    files = {"train/a.jpg": encoded(), "train/a.xml": voc(crowd + voc_object() + crowd), "val/a.xml": voc()}
    index = read(put(tmp_path, files))
    assert index.is_crowd.tolist() == [True, False] and index.problems["rows_repeated"] == 1


SIDES_OF_NO_IMAGE = ("3000000000", "1e12", "inf", "nan", "0", "-5")


def test_sizes_that_no_image_has_are_read_from_the_header(tmp_path):
    header, row = "path,x1,y1,x2,y2,class,width,height\n", "{},1,2,9,9,cat,{},48\n"
    names = {f"{number}.jpg": side for number, side in enumerate(SIDES_OF_NO_IMAGE)}
    sizes = {name: f"<width>{side}</width><height>48</height>" for name, side in names.items()}
    voc_files = {f"train/{name[0]}.xml": voc(voc_object(), sizes[name], name) for name in names}
    table = header + "".join(row.format(name, side) for name, side in names.items())
    images = {f"train/{name}": encoded(size=(48, 64)) for name in names}
    for form, files in {"voc": voc_files | {"val/a.xml": voc()}, "csv": {"train.csv": table, "val.csv": table}}.items():
        index = read(put(tmp_path / form, images | files))
        assert index.widths.tolist() == [64] * len(names) and not index.problems


def test_lists_that_do_not_fit_are_refused_or_counted(tmp_path):
    files = {"Annotations/a.xml": voc(voc_object()), "JPEGImages/a.jpg": encoded(), "ImageSets/Main/val.txt": "a 1"}
    root = put(tmp_path, files | {"ImageSets/Main/train.txt": "a\ngone\n"})
    assert read(root).problems["images_not_annotated"] == 1
    put(root, {"ImageSets/Main/train.txt": "gone\n"})
    with pytest.raises(DataError, match=r"train\.txt: none of the 1 images that it lists has an XML file in "):
        read(root)


# CSV

LONG = "x" * (1 << 17) + "x,0"  # a cell of more than the csv module takes
CSV_ROWS = {
    "": r"train\.csv: the table is empty",
    "a.jpg,1,2,9": r"line 1: neither a header with path, x1, .* nor a row of these 6 cells, but 4 cells",
    "a.jpg;1,5;2,5;9,5;9,5;cat": r"line 1: '1,5' has a decimal comma",
    "filename,x,y,width,height,class\na.jpg,1,2,9,9,cat": r"line 1: a header of other columns \(filename, x, y, width",
    'image_id,width,bbox\na,64,"[1, 2, 9, 9]"': r"line 1: a header of other columns .*, without x1, y1, x2, y2, class",
    ",image,xmin,ymin,xmax,ymax\n0,a.jpg,1,2,9,9": r"line 1: a header of other columns .*, without class: the",
    "a.jpg,1,2,9,9,cat\na.jpg,1,2,9,cat": r"train\.csv, line 2: 5 cells, the first row has 6",
    "a.jpg,1,2,9,9,cat\n\na.jpg,1,5,2,9,9,cat": r"line 3: 7 cells, the first row has 6: were numbers",
    "a.jpg;1,5;2;9;9;cat": r"train\.csv, line 1: '1,5' has a decimal comma: write decimal points \(1\.5\)",
    "path,x1,y1,x2,y2,class\na.jpg,1,2,x,9,cat": r"train\.csv, line 2: 'x' is not a number",
    "a.jpg,1,2,9,9,": r"train\.csv, line 1: no class: fill in the row, or leave box and class empty",
    "a.jpg,1,2,,9,cat": r"train\.csv, line 1: no x2: fill in the row",
    ",1,2,9,9,cat": r"train\.csv, line 1: no path of an image",
    "gone.jpg,1,2,9,9,cat": r"the size of 1 of 1 images cannot be read \(.*gone\.jpg: no such file\)\. Replace",
    "../../secret.jpg,1,2,9,9,cat": r"the size of 1 of 1 images cannot be read",
    'a.jpg,1,2,9,9,"cat\n': r"train\.csv, line 1: not CSV: unexpected end of data",
    b"a.jpg,1,2,9,9,T\xfcr": r"train\.csv, line 1: not UTF-8 text",
    "\n\na.jpg,1,2,9": r"train\.csv, line 3: neither a header with .*, but 4 cells",
    "a.jpg,,,,,": r"no row of train\.csv, val\.csv has a class",
}


@pytest.mark.parametrize("content", CSV_ROWS)
def test_tables_that_are_refused(tmp_path, content):
    root = put(tmp_path / "set", {"images/a.jpg": encoded(), "train.csv": content, "val.csv": "a.jpg,,,,,"})
    put(tmp_path, {"secret.jpg": encoded()})
    with pytest.raises(DataError, match=CSV_ROWS[content]):
        open_split(str(root), None, "train", data_format="csv")


def test_classes_that_are_not_listed_are_refused(tmp_path):
    files = {"images/a.jpg": encoded(), "train.csv": "a.jpg,1,2,9,9,cat\na.jpg,1,2,9,9,cow", "val.csv": "a.jpg,,,,,"}
    root = put(tmp_path, files | {"classes.txt": "cat\ndog"})
    with pytest.raises(DataError, match=r"train\.csv, line 2: class 'cow' is not in .*classes\.txt: add it there"):
        read(root)
    (root / "classes.txt").unlink()
    for content, message in {
        "cat": "line 1: 1 cells: a row is name, number", "cat,0\ndog,0": "line 2: class number 0 is there twice",
        "cat,0\ndog,x": "line 2: 'x' is not a number of a class", "cat,²": "line 1: '²' is not a number of a class",
        "\ncat,0\ndog,²": "line 3: '²' is not a number", "cat,99999999999999999999": "line 1: '9+' is not .* 18 digits",
        f"cat,0\ndog,{'1' * 5000}": "line 2: '1+.* is not a number", LONG: "line 1: not CSV: field larger than",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=rf"classes\.csv, {message}"):
            read(put(root, {"classes.csv": content}))
    assert read(put(root, {"classes.csv": "\nname,id\ncow,7\ncat,3"})).categories == ((3, "cat"), (7, "cow"))
    most = 10**18 - 1
    assert read(put(root, {"classes.csv": f"cow,{most}\ncat,3"})).categories == ((3, "cat"), (most, "cow"))


def test_tables_that_are_taken_and_counted(tmp_path):
    boxes = ["4,4,9,9", "4,4,9,9", "9,9,4,4", "100,4,120,9", "60,4,90,9", "nan,1,2,3"]
    rows = [
        "\ufeffPath,X1,Y1,X2,Y2,Label",
        *(f"./a.jpg,{box}, cat " for box in boxes),
        "b.jpg,,,,,",
        "",
        "gone.jpg,1,1,2,2,cat",
    ]
    files = {
        "images/a.jpg": encoded(),
        "images/b.jpg": encoded(),
        "train.csv": "\r\n".join(rows),
        "val.csv": "a.jpg,,,,,",
    }
    root = put(tmp_path, files)
    with pytest.raises(DataError, match=r"of 3 images cannot be read .*data\.on_bad_image=skip leaves them out"):
        read(root)
    index = read(root, skip=True)
    assert index.problems == {
        "boxes_not_finite": 1, "boxes_clipped": 1, "boxes_outside": 1, "boxes_without_area": 1, "rows_repeated": 1,
        "images_without_size": 1, "images_without_boxes": 1,
    }  # fmt: skip
    assert index.file_names.to_pylist() == ["a.jpg", "b.jpg"] and index.categories == ((0, "cat"),)


@pytest.mark.parametrize(
    ("start", "encoding"), [("\n\n", "utf-8"), (" \r\n\r\n", "utf-8-sig"), ("\r\t\r", "utf-8"), ("\n", "utf-16")]
)
def test_blank_lines_before_a_table_do_not_matter(tmp_path, start, encoding):
    images = {"images/a.jpg": encoded()}
    for form, text in {
        "csv": "a.jpg,1,2,9,9,cat\n", "csv_header": "path;x1;y1;x2;y2;class\na.jpg;1;2;9;9;cat\n",
        "open_images": HEADER + "a,cat,0.1,0.5,0.1,0.5,0\n",
    }.items():  # fmt: skip
        root = put(tmp_path / form, images | {"labels.csv": (start + text).encode(encoding)})
        index = open_undivided(str(root), None)
        assert index.file_names.to_pylist() == ["a.jpg"] and index.categories == ((0, "cat"),)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (
            {"labels.csv": ",1,2,9,9,cat"},
            r"labels\.csv is no table of boxes: such a table begins with .*, or with a row of these 6 cells",
        ),
        ({"a.csv": "a.jpg,1,2,9,9,cat", "b.csv": "a.jpg,1,2,9,9,cat"}, r"a\.csv, b\.csv may each be the table of all"),
        ({"labels.csv": LONG}, r"labels\.csv, line 1: not CSV: field larger than field limit"),
    ],
)
def test_tables_that_are_not_taken_for_a_set_are_named(tmp_path, tables, said):
    with pytest.raises(DataError, match=said):
        open_undivided(str(put(tmp_path, tables | {"a.jpg": encoded()})), None)


# Open Images

HEADER = "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n"
CLASSES = "/m/1,cat\n/m/2,dog\n"
OPEN_IMAGES_ROWS = {
    "a,/m/1,0.1,0.5,0.1\n": r"train-annotations-bbox\.csv, line 2: 5 cells, the header has 7: complete the row",
    "a,/m/1,0.1,x,0.1,0.5,0\n": r"bbox\.csv, line 2: 'x' is not a number",
    'a,/m/1,"0,1",0.2,0.1,0.5,0\n': r"bbox\.csv, line 2: '0,1' has a decimal comma: write decimal points \(0\.1\)",
    "a,/m/1,0.1,,0.1,0.5,0\n": r"bbox\.csv, line 2: no XMax: fill in the row, or leave box and class empty",
    ",/m/1,0.1,0.5,0.1,0.5,0\n": r"bbox\.csv, line 2: no ImageID: fill it in",
    "\na,/m/3,0.1,0.5,0.1,0.5,0\n": r"bbox\.csv, line 3: class '/m/3' is not in .*boxable\.csv: add it there",
    "a,/m/1,10,50,10,40,0\n": r"bbox\.csv: 1 of 1 boxes have numbers above 2: they look like pixels.* divide XMin",
    "gone,/m/1,0.1,0.5,0.1,0.5,0\n": r"none of the 1 images of the table is in .*/train: .* ImageID \(gone\.jpg\)",
    "twice,/m/1,0.1,0.5,0.1,0.5,0\n": r"line 2: the image 'twice' may be twice\.jpg, twice\.png: rename or remove one",
    'a,/m/1,0.1,0.5,0.1,0.5,"0\n': r"bbox\.csv, line 2: not CSV: unexpected end of data",
    "bad,/m/1,0.1,0.5,0.1,0.5,0\n": r"the size of 1 of 1 images cannot be read \(.*bad\.jpg: .*\)\. Replace",
}  # fmt: skip


def open_images(root: Path, rows: str) -> Path:
    images = {"train/a.jpg": encoded(), "train/b.png": encoded("PNG"), "train/twice.jpg": encoded()}
    tables = {"train-annotations-bbox.csv": HEADER + rows, "class-descriptions-boxable.csv": CLASSES}
    return put(root, images | tables | {"train/twice.png": encoded("PNG"), "train/bad.jpg": b"\xff\xd8\xff\xe0"})


@pytest.mark.parametrize("rows", OPEN_IMAGES_ROWS)
def test_tables_of_open_images_that_are_refused(tmp_path, rows):
    with pytest.raises(DataError, match=OPEN_IMAGES_ROWS[rows]):
        read(open_images(tmp_path, rows))


def test_classes_of_open_images_that_are_refused_or_missing(tmp_path):
    root = open_images(tmp_path, "a,/m/2,0.1,0.5,0.1,0.5,0\nb,/m/1,0.1,0.5,0.1,0.5,0\n")
    assert read(root).categories == ((0, "cat"), (1, "dog"))
    for content, message in {
        "/m/1,cat\n/m/1,dog": r"boxable\.csv, line 2: class '/m/1' is there twice", "/m/1": "line 1: 1 cells: a row is",
        "/m/1,cat\n/m/2, ": "class 1 has no name", "": "lists no classes", f"\n{LONG}": "line 2: not CSV: field larger",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=message):
            read(put(root, {"class-descriptions-boxable.csv": content}))
    put(root, {"class-descriptions-boxable.csv": "\r\nLabelName,DisplayName\n" + CLASSES})
    assert read(root).categories == ((0, "cat"), (1, "dog"))
    (root / "class-descriptions-boxable.csv").unlink()
    assert read(root).categories == ((0, "/m/1"), (1, "/m/2"))


def test_tables_of_open_images_that_are_taken_and_counted(tmp_path):
    boxes = [
        "0.1,0.5,0.1,0.5", "0.1,0.5,0.1,0.5", "0.5,0.1,0.5,0.1", "1.2,1.4,0.1,0.2", "0.8,1.1,0.1,0.2", "nan,1,0,1",
    ]  # fmt: skip
    rows = [*(f"a,/m/1,{box},0" for box in boxes), "b,/m/2,0,1,0,1,1", "gone,/m/1,0,1,0,1,0", "gone,/m/2,0,1,0,1,0"]
    root = open_images(tmp_path, "\r\n".join(rows))
    index = read(root)
    assert index.problems == {
        "boxes_not_finite": 1, "boxes_clipped": 1, "boxes_outside": 1, "boxes_without_area": 1, "rows_repeated": 1,
        "labels_without_image": 1, "images_not_annotated": 2,
    }  # fmt: skip
    assert index.file_names.to_pylist() == ["a.jpg", "b.png"]
    assert index.is_crowd.tolist() == [False] * 4 + [True], "a group of objects is not learnt as one"


def test_one_table_of_open_images_is_a_set_that_is_not_divided(tmp_path):
    row = "{},/m/1,0.1,0.5,0.1,0.5,0\n"
    tables = {"boxes.csv": HEADER + row.format("a"), "test-annotations-bbox.csv": HEADER + row.format("b")}
    root = put(tmp_path, tables | {"images/a.jpg": encoded(), "images/b.png": encoded("PNG")})
    index = open_undivided(str(root), None)
    assert index.file_names.to_pylist() == ["a.jpg"] and index.problems == {"images_not_annotated": 1}
    assert index.categories == ((0, "/m/1"),)


# All


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train.csv", "a table"), ("data.yaml", "YOLO's data file"), ("a.XML", "one of VOC's files"),
        ("list.txt", "a text file"), ("Annotations", "a folder"),
    ],
)  # fmt: skip
def test_annotations_of_other_formats_are_refused_with_what_to_set(tmp_path, name, kind):
    path = tmp_path / "set" / name
    path.mkdir(parents=True) if name == "Annotations" else put(path.parent, {name: ""})
    for split in ("train", "val"):
        data = DataConfig(**{split: {"annotations": str(path), "images": str(tmp_path)}})
        with pytest.raises(DataError, match=rf"set/{name}: .*, and this is {kind}\..* data\.root={path.parent},"):
            ConfiguredData(data).open(split)
    remote = DataConfig(train={"annotations": "s3://bucket/a.csv?region=x", "images": "s3://bucket"})
    with pytest.raises(DataError, match=r"a\.csv\?region=x: .*this is a table"):
        ConfiguredData(remote).open("train")


def test_odd_characters_do_not_reach_the_terminal(tmp_path):
    root = put(
        tmp_path, {"data.yaml": YAML, "images/a\x1b[31m.jpg": encoded(), "labels/a\x1b[31m.txt": "0 \x1b[2J 1 1 1"}
    )
    with pytest.raises(DataError) as error:
        read(root)
    assert "\x1b" not in str(error.value)


def test_reading_sizes_decodes_nothing(tmp_path, monkeypatch):
    root = put(tmp_path, {"data.yaml": YAML, "images/a.png": encoded("PNG"), "labels/a.txt": "0 0.5 0.5 0.2 0.2"})

    def refuse(*arguments, **more):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", refuse)
    assert re.match("[0-9a-f]{64}", read(root).fingerprint)
