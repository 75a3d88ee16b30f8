"""The check of what a training needs beside data: its plan, storage, first weights, tracking."""

from __future__ import annotations

import http.server
import threading
from pathlib import Path

import pytest
import torch
from check_outcome import SMALL
from coco_folder import sound_folder
from ports import free_port

from detr_ray.config import load_config
from detr_ray.engine.preflight import training
from detr_ray.engine.preflight.memory import check_memory
from detr_ray.engine.preflight.storage import checkpoint_bytes
from detr_ray.engine.preflight.writing import within
from detr_ray.engine.training_step.optimizer import build_optimizer
from detr_ray.model import build_model

# The training plan


def test_steps_and_shapes_are_those_of_training(check, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "check_memory", check_memory)
    root = sound_folder(tmp_path / "set", num_train=13)
    messages = check(root, "train.epochs=4000", "data.augment.scales=[96]", "eval.batch_size=3").messages(
        "ok", "training"
    )
    assert messages[0].startswith("steps: 3 an epoch, 12000 in all, of 4 images each")
    assert "largest training image 96x128 (height x width)" in messages[1]
    assert "forward pass 2 x 96x128 (2 workers); in validation 3 x 48x64" in messages[1]
    assert "a step of the largest batch takes about" in messages[2]
    one_by_one = check(root, "train.num_workers=null", "train.micro_batch_size=3").messages("ok", "training")
    assert "forward pass 2 x 48x64 (one worker" in one_by_one[1]
    padded = check(root, "data.pad_multiple=50", "eval.batch_size=3").messages("ok", "training")
    assert "largest training image 48x64 " in padded[1]
    assert "forward pass 2 x 50x100 (2 workers); in validation 3 x 48x64" in padded[1]


def test_transforms_that_do_not_end_before_the_training_are_named(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    transforms = "data.augment.transforms=[mosaic: {until_epoch: 9}, mixup: {until_epoch: 8}, grayscale, detr]"
    (said,) = (m for m in check(root, transforms, "train.epochs=9").messages("warning", "training") if "mosaic" in m)
    assert "mosaic (until_epoch: 9) would be on until the end: train.epochs is 9" in said and "mixup" not in said
    assert not any(
        "until_epoch" in m for m in check(root, transforms, "train.epochs=10").messages("warning", "training")
    )
    twice = "data.augment.transforms=[photometric: {until_epoch: 400}, photometric: {until_epoch: 5}, detr]"
    messages = check(root, twice, "train.epochs=9").messages("warning", "training")
    assert any("photometric (until_epoch: 400) would be on until the end" in m for m in messages)


def test_what_an_epoch_takes_is_counted(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    outcome = check(root, "data.balance={repeat_threshold: 1, background: 0}")
    message = next(line for line in outcome.messages("ok", "training") if "data.balance" in line)
    assert "samples of 12 images (data.balance); 0.0% of them have no box" in message
    assert not any("data.balance" in line for line in check(root).messages("ok", "training"))
    weights = check(root, "data.balance={class_weights: {dgo: 3}}").only("error", "training")
    assert "data.balance.class_weights: there is no class 'dgo'; did you mean 'dog'?" in weights


def test_what_an_epoch_takes_of_each_source_is_counted(check, tmp_path):
    first, second = (sound_folder(tmp_path / name, num_train=count) for name, count in (("a", 12), ("b", 4)))
    val = f"data.val={{annotations: {first}/annotations/instances_val2017.json, images: {first}/val2017}}"
    outcome = check(None, f"data.sources=[{{root: {first}}}, {{root: {second}, weight: 3}}]", val)
    (found,) = (f for f in outcome.report["findings"] if "2 data sets (data.sources)" in f["message"])
    assert [name.rpartition(".json: ")[2] for name in found["names"]] == [
        "12 images: 12 samples (50%)", "4 images: 12 samples (50%)",
    ]  # fmt: skip
    assert not any("data.sources" in line for line in check(first).messages("ok", "training"))


def test_names_of_parameters_are_those_of_the_model(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=12)
    outcome = check(root, "optim.freeze=[backbon.*]", "optim.lr_factors={nothing: 2}")
    faults = "\n".join(outcome.messages("error", "training"))
    assert "fits 'backbon.*'; nearest: backbone" in faults and "has a name with nothing" in faults


def test_too_few_images_for_a_step_is_an_error(check, tmp_path):
    root = sound_folder(tmp_path / "set", num_train=5)
    outcome = check(root, "train.global_batch_size=6")
    assert outcome.code == 1
    assert "set train.global_batch_size to 5 or less" in outcome.only("error", "training")
    assert "1 of 5 images are left out of each epoch" in check(root).only("warning", "training")


def test_training_that_cannot_lead_anywhere_is_a_warning(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    assert "sees 120 images (12, 10 times each)" in check(root, "train.epochs=10").only("warning", "training")
    assert "sees 1200 images" in check(root, "train.max_steps=300").only("warning", "training")
    large = check(root, "data.augment.scales=[256]", "data.augment.max_size=512", "train.epochs=3000")
    enlarged, short = large.messages("warning", "training")
    assert "enlarges its images 5.3 times" in enlarged
    assert "detr usually needs about 1000000" in short
    other = check(root, "train.epochs=10", "model.architecture=dino", "model.num_feature_levels=2")
    assert "dino usually needs about 4000 before" in other.only("warning", "training")


def test_validating_on_the_training_set_and_not_at_all_are_warnings(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    train = [
        f"data.train.annotations={root}/annotations/instances_train2017.json",
        f"data.train.images={root}/train2017",
    ]
    same = [item.replace("data.train.", "data.val.") for item in train]
    assert "the same data" in check(None, *train, *same).only("warning", "data")
    assert "no validation data is given" in check(None, *train).only("warning", "data")


# Storage


@pytest.mark.parametrize("place", ["file/below", "file"])
def test_storage_that_cannot_be_written_is_an_error(check, tmp_path, place):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "file").write_text("")
    outcome = check(root, f"run.storage={tmp_path}/{place}", "tracking.enabled=false")
    assert outcome.code == 1
    assert f"run.storage: {tmp_path}/{place} cannot be used" in outcome.only("error", "storage")
    assert (tmp_path / "file").read_text() == ""


def test_storage_may_be_an_address(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    outcome = check(root, f"run.storage=file://{tmp_path}/runs/deep", "tracking.enabled=false")
    assert outcome.code == 0
    assert not (tmp_path / "runs").exists()
    outcome = check(root, "run.storage=nowhere://bucket/runs", "tracking.enabled=false")
    assert "nowhere://bucket/runs cannot be used" in outcome.only("error", "storage")


def test_a_disk_too_small_for_the_checkpoints_is_an_error(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    assert "GB free" in check(root, "train.keep_last=10000000").only("error", "storage")
    assert "GB free" in check(root).messages("ok", "storage")[1]


def test_the_size_of_a_checkpoint_is_estimated_from_the_model(tmp_path):
    config = load_config(None, [*SMALL, "optim.ema_decay=0.9"])
    model = build_model(config.model, 3)
    optimizer = build_optimizer(model, {"lr": 1e-4, "lr_backbone": 1e-4}, weight_decay=0)
    torch.stack([value.sum() for value in model.parameters() if value.requires_grad]).sum().backward()
    optimizer.step()
    copies = {name: value.clone() for name, value in model.state_dict().items()}
    torch.save({"model": model.state_dict(), "ema": copies}, tmp_path / "model.pt")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model_file, optimizer_file = ((tmp_path / name).stat().st_size for name in ("model.pt", "optimizer.pt"))
    whole, model_alone = checkpoint_bytes(config, 3)
    assert model_alone == pytest.approx(model_file, rel=0.05)
    assert whole == pytest.approx(model_file + optimizer_file, rel=0.05)


def test_work_that_does_not_end_is_not_waited_for():
    never = threading.Event()
    with pytest.raises(TimeoutError, match="no answer within"):
        within(0.05, lambda: never.wait() and None)
    never.set()
    with pytest.raises(OSError, match="disk on fire"):
        within(5, lambda: (_ for _ in ()).throw(OSError("disk on fire")))


# Weights


def save_weights(path: Path, names: list[str], *overrides: str) -> None:
    config = load_config(None, [*SMALL, *overrides])
    model = build_model(config.model, len(names))
    content = {"format": "detr_ray", "model": model.state_dict(), "config": config.model_dump(mode="json")}
    torch.save({**content, "label_map": {"names": names, "category_ids": list(range(len(names)))}}, path)


def test_first_weights_are_compared_with_model_and_classes(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    weights = tmp_path / "weights.pth"
    save_weights(weights, ["dog", "horse", "cow"])
    outcome = check(root, f"model.init_from={weights}", "train.epochs=1")
    assert outcome.code == 0
    assert outcome.messages("warning") == [], "weights to start from need no long training"
    (finding,) = [finding for finding in outcome.report["findings"] if finding["area"] == "weights"]
    assert "2 rebuilt, 0 missing" in finding["message"]
    assert "1 of 2 classes copied by name; fresh: cat" in finding["names"][0]
    outcome = check(root, f"model.init_from={weights}", "model.hidden_dim=64")
    assert "does not fit" in outcome.only("error", "weights")


def test_weights_that_cannot_be_read_are_errors(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    (tmp_path / "text.pth").write_text("not weights")
    for key in ("model.init_from", "model.backbone_weights"):
        assert "there is no file" in check(root, f"{key}={tmp_path}/none.pth").only("error", "weights")
        assert "damaged or no torch file" in check(root, f"{key}={tmp_path}/text.pth").only("error", "weights")
    assert check(root, f"model.init_from={tmp_path}/text.pth/below").code == 1


def test_backbone_weights_from_a_file(check, tmp_path):
    root = sound_folder(tmp_path / "set")
    body = build_model(load_config(None, SMALL).model, 2).body.state_dict()
    torch.save(body, tmp_path / "resnet18.pth")
    assert "fits resnet18" in check(root, f"model.backbone_weights={tmp_path}/resnet18.pth").only("ok", "weights")
    outcome = check(root, f"model.backbone_weights={tmp_path}/resnet18.pth", "model.backbone=resnet34")
    assert "is no resnet34" in outcome.only("error", "weights")


def test_weights_on_a_server_are_asked_for_and_not_fetched(check, tmp_path, monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        methods: list[str] = []

        def do_HEAD(self):
            self.methods.append("HEAD")
            found = self.path == "/there.pth"
            self.send_response(200 if found else 405 if self.path == "/no-head.pth" else 404)
            if found:
                self.send_header("Content-Length", "158000000")
            self.end_headers()

        def do_GET(self):
            self.methods.append("GET")

        def log_message(self, *arguments):
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    root = sound_folder(tmp_path / "set")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        space = "data.label_space=contiguous"
        there = check(root, f"model.init_from={address}/there.pth", space)
        assert "is fetched when training starts (158 MB)" in there.only("ok", "weights")
        gone = check(root, f"model.init_from={address}/gone.pth", space)
        assert "the server answers 404" in gone.only("error", "weights")
        unknown = check(root, f"model.init_from={address}/no-head.pth", space)
        assert (unknown.code, len(unknown.messages("warning", "weights"))) == (0, 1)
        server.shutdown()
    assert set(Handler.methods) == {"HEAD"}
    dead = check(root, f"model.init_from=http://127.0.0.1:{free_port()}/a.pth", space)
    assert "cannot be fetched" in dead.only("error", "weights")
    kept = tmp_path / "hub" / "checkpoints" / "kept.pth"
    kept.parent.mkdir(parents=True)
    save_weights(kept, ["cat", "dog"])
    fetched = check(root, "model.init_from=http://127.0.0.1:1/kept.pth", space)
    assert f"{kept} can be read" in fetched.only("ok", "weights")


# Tracking


def test_a_dead_tracking_server_is_an_error(check, tmp_path, monkeypatch):
    root = sound_folder(tmp_path / "set")
    dead = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead)
    outcome = check(root)
    assert outcome.code == 1
    assert f"{dead} does not answer" in outcome.only("error", "tracking")
    assert check(root, "tracking.enabled=false").code == 0
