"""Checkpoint files: what is read, what is refused, and downloads from a real server."""

from __future__ import annotations

import argparse
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from detr_ray.model import checkpoint_file
from detr_ray.model.checkpoint_file import read_checkpoint
from detr_ray.model.state_dicts import WeightsError, shorten_names

STATE = {"class_embed.bias": torch.arange(4.0), "query_embed.weight": torch.ones(2, 3)}


def save(path: Path, content: object, legacy: bool = False) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


def hashed(folder: Path, content: object) -> Path:
    """Saves under a name that spells the content's hash, as published files are called."""
    path = save(folder / "unnamed.pth", content)
    return path.rename(folder / f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")


class Server(ThreadingHTTPServer):
    """Serves a folder's files; remembers what was asked; breaks in the ways of real servers when told so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[str] = []
        self.cut_short = False
        self.silent_s = 0.0
        super().__init__(("127.0.0.1", 0), FileHandler)

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class FileHandler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        time.sleep(self.server.silent_s)
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:100] if self.server.cut_short else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def assert_is_state(checkpoint: dict) -> None:
    assert checkpoint["model"].keys() == STATE.keys()
    assert all(torch.equal(checkpoint["model"][name], value) for name, value in STATE.items())


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("content", [STATE, {"model": STATE}, {"model": STATE, "args": argparse.Namespace(lr=1e-4)}])
def test_published_and_training_files_are_read(tmp_path: Path, content: dict, legacy: bool) -> None:
    path = save(tmp_path / "detr.pth", content, legacy)
    for source in (str(path), path.as_uri()):
        checkpoint = read_checkpoint(source)
        assert_is_state(checkpoint)
        assert checkpoint["class_names"] is None


def test_our_own_files_name_their_classes(tmp_path: Path) -> None:
    label_map = {"names": ["cat", None, "dog"], "category_ids": [1, None, 3]}
    content = {"format": "detr_ray", "model": STATE, "ema": STATE, "label_map": label_map, "config": {"run": {}}}
    checkpoint = read_checkpoint(str(save(tmp_path / "ours.pt", content)))
    assert_is_state(checkpoint)
    assert checkpoint["class_names"] == ["cat", None, "dog"]
    assert checkpoint["ema"].keys() == STATE.keys()
    assert checkpoint["config"] == {"run": {}}


class RunsOnLoad:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "evil.pth", {"model": STATE, "extra": RunsOnLoad(tmp_path / "made")}, legacy)
    with pytest.raises(WeightsError, match=r"evil.pth holds Python objects .*mkdir.*save the weights alone"):
        read_checkpoint(str(path))
    assert not (tmp_path / "made").exists()


def test_other_python_objects_are_named(tmp_path: Path) -> None:
    path = save(tmp_path / "odd.pth", {"model": STATE, "best": np.float64(0.4)})
    with pytest.raises(WeightsError, match=r"odd.pth holds Python objects .*numpy.*torch.save"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_files_are_named(tmp_path: Path, legacy: bool) -> None:
    path = save(tmp_path / "cut.pth", STATE, legacy)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 60, 50):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=r"cut.pth (is damaged or no torch file|holds Python objects)"):
            read_checkpoint(str(path))


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.pt"):
        safetensors.torch.save_file(STATE, tmp_path / name, metadata={"format": "pt"})
        for source in (str(tmp_path / name), (tmp_path / name).as_uri()):
            checkpoint = read_checkpoint(source)
            assert_is_state(checkpoint)
            assert checkpoint["class_names"] is None
    assert_is_state(read_checkpoint(str(save(tmp_path / "misnamed.safetensors", STATE))))


def test_safetensors_are_known_whatever_length_their_header_has(tmp_path: Path) -> None:
    lengths = set()
    for note in range(0, 1100, 8):
        content = safetensors.torch.save(STATE, metadata={"note": "x" * note})
        lengths.add(content[:1])
        (tmp_path / "model.pt").write_bytes(content)
        assert_is_state(read_checkpoint(str(tmp_path / "model.pt")))
    assert lengths >= {b"\x80", b"P"}, "bytes that torch files begin with"


def test_broken_safetensors_are_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    whole = safetensors.torch.save(STATE)
    broken = [whole[:length] for length in range(0, len(whole), 7)]
    broken += [whole + b"more", whole.replace(b"F32", b"F99", 1), whole.replace(b"F32", b"F16", 1)]
    broken += [whole.replace(b"F32", b'F4"', 1), b"<html>not found</html>", b"\xff" * 64]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=r"cut.safetensors is damaged or no safetensors file \(\d+ bytes\)") as e:
            read_checkpoint(str(path))
        assert "\n" not in str(e.value) and len(str(e.value)) < 400 + len(str(path))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "page.pth"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=rf"page.pth is damaged or no torch file \({len(content)} bytes\)"):
        read_checkpoint(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "a list, not a dictionary"),
        ({"epoch": 3, "weight": torch.ones(2)}, "no state dict of tensors: epoch"),
        ({"model": {"weight": torch.ones(2)}, "ema": 0.9}, "no state dict under 'ema', but a float"),
        ({"model": {"weight": torch.ones(2), "step": 3}}, "no state dict of tensors: step"),
    ],
)
def test_files_without_weights_are_named(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(WeightsError, match=f"some.pth holds {message}"):
        read_checkpoint(str(save(tmp_path / "some.pth", content)))


@pytest.mark.parametrize("changes", [{"label_map": None}, {"label_map": {"names": 3}}, {"config": None}])
def test_our_own_files_must_be_whole(tmp_path: Path, changes: dict) -> None:
    label_map = {"names": ["cat"], "category_ids": [1]}
    content = {"format": "detr_ray", "model": STATE, "label_map": label_map, "config": {}} | changes
    with pytest.raises(WeightsError, match=r"ours.pt is damaged: it lacks its label map or its configuration"):
        read_checkpoint(str(save(tmp_path / "ours.pt", content)))


def test_label_maps_of_others_are_not_taken_for_ours(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(str(save(tmp_path / "a.pt", {"model": STATE, "label_map": {1: "cat"}, "config": "x"})))
    assert checkpoint["class_names"] is None and "label_map" not in checkpoint and "config" not in checkpoint


def test_absent_files_folders_and_unknown_schemes(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"there is no file .*absent.pth"):
        read_checkpoint(str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match="is a folder"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(WeightsError, match=r"cannot be read: File name too long"):
        read_checkpoint("long" * 100)
    with pytest.raises(WeightsError, match=r"nowhere://bucket/detr.pth: no file system for this address"):
        read_checkpoint("nowhere://bucket/detr.pth")


def test_download_is_checked_and_kept(server: Server) -> None:
    name = hashed(server.folder, {"model": STATE}).name
    assert_is_state(read_checkpoint(server.url(name)))
    assert_is_state(read_checkpoint(server.url(name)))
    assert server.requests == [f"/{name}"]


def test_damaged_copy_is_fetched_again(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = hashed(server.folder, STATE).name
    kept = tmp_path / "cache" / "hub" / "checkpoints" / name
    read_checkpoint(server.url(name))
    kept.write_bytes(kept.read_bytes()[:-1])
    assert_is_state(read_checkpoint(server.url(name)))
    assert server.requests == [f"/{name}"] * 2
    assert "is damaged and is fetched again" in caplog.text
    assert kept.read_bytes() == (server.folder / name).read_bytes()


def test_nowhere_to_keep_it(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(WeightsError, match="set TORCH_HOME"):
        read_checkpoint(server.url("weights-01234567.pth"))


def test_wrong_content_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    save(server.folder / "weights-0123abcd.pth", STATE)
    with pytest.raises(WeightsError, match=r"weights-0123abcd.pth is not what its name says.*not 0123abcd"):
        read_checkpoint(server.url("weights-0123abcd.pth"))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_file_urls_are_checked_as_well(tmp_path: Path) -> None:
    path = save(tmp_path / "weights-0123abcd.pth", STATE)
    with pytest.raises(WeightsError, match="not what its name says"):
        read_checkpoint(path.as_uri())
    assert_is_state(read_checkpoint(hashed(tmp_path, STATE).as_uri()))


def test_a_name_without_hash_is_fetched_each_time_with_a_warning(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    save(server.folder / "mine.pth", STATE)
    assert_is_state(read_checkpoint(server.url("mine.pth")))
    assert_is_state(read_checkpoint(server.url("mine.pth")))
    assert server.requests == ["/mine.pth"] * 2
    assert "mine.pth carries no hash" in caplog.text


def test_not_found(server: Server) -> None:
    with pytest.raises(WeightsError, match=r"gone-01234567.pth: the server answers 404"):
        read_checkpoint(server.url("gone-01234567.pth"))


def test_broken_connection(server: Server, tmp_path: Path) -> None:
    name = hashed(server.folder, STATE).name
    server.cut_short = True
    with pytest.raises(WeightsError, match=f"{name} broke off after 100 of"):
        read_checkpoint(server.url(name))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_silent_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_file, "DOWNLOAD_TIMEOUT_S", 0.1)
    server.silent_s = 0.5
    with pytest.raises(WeightsError, match=r"cannot be fetched.*timed out.*give its path"):
        read_checkpoint(server.url("weights-01234567.pth"))


def test_no_server(server: Server) -> None:
    url = server.url("weights-01234567.pth").replace(str(server.server_port), "1")
    with pytest.raises(WeightsError, match=r"cannot be fetched.*refused"):
        read_checkpoint(url)


def test_many_names_are_shortened_to_what_they_share() -> None:
    assert shorten_names(["a.b", "c"]) == "a.b, c"
    layers = [f"transformer.decoder.layers.5.norm{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")]
    assert shorten_names([*layers, "class_embed.bias"]) == "transformer.decoder.layers.5.* (6), class_embed.bias"
