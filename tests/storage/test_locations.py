"""Places are opened in one way: addresses, credentials kept out of them, errors that pass and errors that stay."""

from __future__ import annotations

import errno
import os
import pickle
import time
from pathlib import Path

import pytest
from s3_server import FAULTS, S3Server

from detr_ray import locations
from detr_ray.addresses import (
    LocationError,
    check_address,
    is_object_store,
    is_remote,
    join,
    local_path,
    name_of,
    parent,
    resolve,
    with_suffix,
)
from detr_ray.config import ConfigError
from detr_ray.locations import (
    delete_file,
    delete_folder,
    download,
    file_info,
    list_files,
    list_names,
    make_folder,
    open_location,
    read_buffer,
    read_bytes,
    upload,
    write_bytes,
)
from detr_ray.retries import AccessDenied, NoSuchObject, Patience, StorageError, patiently, reason_of

HASTY = Patience(attempts=3, first_pause_s=0.01)

# Addresses


def test_addresses_keep_their_options_at_the_end():
    assert join("s3://b/x", "a", "c.json") == "s3://b/x/a/c.json"
    assert join("s3://b/x/?region=eu-west-1", "a") == "s3://b/x/a?region=eu-west-1"
    assert parent("s3://b/x/a?region=eu-west-1") == "s3://b/x?region=eu-west-1"
    assert resolve("s3://b/x/?region=r") == "s3://b/x?region=r"
    assert join("/data", "a", "b") == "/data/a/b" and parent("/data/a") == "/data"
    assert resolve("file:///data/x") == "/data/x" and resolve("~/x") == str(Path.home() / "x")
    assert local_path("runs") == Path.cwd() / "runs" and local_path("s3://b/x") is None
    assert [is_remote(place) for place in ("s3://b/x", "hdfs://h/x", "file:///x", "x")] == [True, True, False, False]
    assert [is_object_store(place) for place in ("s3://b/x", "gs://b/x", "hdfs://h/x")] == [True, True, False]


def test_paths_are_taken_as_they_are_and_names_are_escaped_in_addresses():
    for name in ("a b", "100%25", "a?b", "a#b", "ä", "x:y"):
        assert join("/data", name) == f"/data/{name}" and resolve(f"/data/{name}") == f"/data/{name}"
        for root in ("s3://b/x", "s3://b/x?region=r"):
            assert name_of(join(root, name)) == name and parent(join(root, name)) == root
        assert local_path(Path("/data", name).as_uri()) == Path("/data", name)
    assert join("s3://b/x?region=r", "a?b%c#d") == "s3://b/x/a%3Fb%25c%23d?region=r"
    assert local_path("./~x") == Path.cwd() / "~x" and local_path("~nobody-of-that-name") is not None


@pytest.mark.parametrize("address", ["file:///x?mode=fast", "file:///x#1", "file://host/x"])
def test_addresses_of_files_that_mean_something_else_are_refused(address):
    for use in (local_path, resolve, open_location, check_address):
        with pytest.raises(LocationError, match=address.replace("?", r"\?")):
            use(address)


def test_options_stay_behind_the_names_of_drafts():
    assert with_suffix("s3://b/x?region=r", ".tmp") == "s3://b/x.tmp?region=r"
    assert with_suffix("/a?b", ".tmp") == "/a?b.tmp"


@pytest.mark.parametrize("name", ["a b", "100%25.jpg", "a?b.jpg", "a#b.jpg", "ä.jpg"])
def test_files_of_odd_names_in_a_bucket(s3: S3Server, tmp_path: Path, name: str):
    folder = f"s3://{s3.new_bucket()}/set"
    write_bytes(join(folder, name), b"content")
    (file,) = list_files(folder)
    assert file.name == name and read_bytes(join(folder, file.name)) == b"content"
    download(join(folder, name), tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"content"


@pytest.mark.parametrize(
    "address",
    [
        "s3://AKIAKEY:hidden@bucket/x",
        "s3://AKIAKEY:hid/den@bucket/x?region=eu-west-1",
        "s3://AKIAKEY@bucket/x",
        "gs://someone:hidden@bucket/x",
        "abfs://account:hidden@container/x",
        "abfs://container@account.dfs.core.windows.net/x?sig=hidden",
        "s3://bucket/x?secret_key=hidden",
        "s3://bucket/x?endpoint_override=AKIAKEY:hidden@host:9000",
    ],
)
def test_addresses_with_credentials_are_refused_and_not_repeated(address):
    with pytest.raises(LocationError, match="holds credentials") as refused:
        open_location(address)
    assert not any(secret in str(refused.value) for secret in ("hid", "AKIA"))
    assert isinstance(refused.value, ConfigError)


def test_unusable_addresses_are_errors():
    with pytest.raises(LocationError, match="no file system for this address"):
        open_location("nowhere://bucket/x")
    with pytest.raises(LocationError, match="unknown option 'pace'"):
        open_location("s3://bucket/x?pace=slow")
    with pytest.raises(LocationError, match="names no bucket"):
        open_location("s3:///x")


def test_the_server_is_named_by_the_environment_or_the_address(s3: S3Server, monkeypatch):
    bucket = s3.new_bucket()
    s3.put(f"{bucket}/x", b"content")
    assert read_bytes(f"s3://{bucket}/x") == b"content"
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)
    assert read_bytes(f"s3://{bucket}/x") == b"content"
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_REGION")
    options = f"?endpoint_override={s3.endpoint.removeprefix('http://')}&scheme=http"
    started = time.monotonic()
    assert read_bytes(f"s3://{bucket}/x{options}") == b"content"
    assert time.monotonic() - started < 5, "nobody else is asked for the region"
    assert open_location(f"s3://{bucket}/x{options}&region=eu-west-3")[0].region == "eu-west-3"


def test_a_client_is_kept_and_never_travels(s3: S3Server):
    assert open_location("s3://b/x")[0] is open_location("s3://b/other/y")[0]
    assert pickle.loads(pickle.dumps(NoSuchObject(errno.ENOENT, "no such object", "s3://b/x"))).filename == "s3://b/x"


# Errors that stay


def test_what_is_not_there_is_named_at_once(s3: S3Server, tmp_path):
    bucket = s3.new_bucket()
    with pytest.raises(FileNotFoundError) as missing:
        read_bytes(f"s3://{bucket}/folder/x.jpg")
    assert str(missing.value) == f"s3://{bucket}/folder/x.jpg: no such object"
    assert s3.counts() == {"HEAD": 1}
    with pytest.raises(FileNotFoundError, match="s3://not-made/x: no such bucket"):
        write_bytes("s3://not-made/x", b"")
    with pytest.raises(FileNotFoundError, match="x: no such file"):
        read_bytes(str(tmp_path / "x"))


def test_what_is_not_allowed_is_named_at_once(s3: S3Server):
    bucket = s3.new_bucket()
    s3.put(f"{bucket}/x", b"content")
    s3.set_faults(read_only=bucket)
    assert read_bytes(f"s3://{bucket}/x") == b"content"
    s3.forget()
    with pytest.raises(PermissionError, match=rf"s3://{bucket}/x: access denied .*credentials") as denied:
        write_bytes(f"s3://{bucket}/x", b"new")
    assert isinstance(denied.value, AccessDenied) and s3.counts() == {"PUT": 1}
    s3.set_faults(forbidden=bucket)
    with pytest.raises(PermissionError, match=f"s3://{bucket}/x: access denied"):
        read_bytes(f"s3://{bucket}/x")


# Errors that pass


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_that_pass_are_waited_out(s3: S3Server, fault):
    bucket = s3.new_bucket()
    # More than the client's own attempts: the whole operation is begun again.
    s3.set_faults(first=locations.S3_ATTEMPTS + 1, kinds=[fault])
    write_bytes(f"s3://{bucket}/x", b"content" * 1000)
    s3.set_faults(first=locations.S3_ATTEMPTS + 1, kinds=[fault])
    assert read_bytes(f"s3://{bucket}/x") == b"content" * 1000


def test_listing_and_deleting_are_waited_out(s3: S3Server):
    bucket = s3.new_bucket()
    s3.put(f"{bucket}/x", b"")
    s3.set_faults(0.5, seed=6, kinds=["reset", "truncated"])
    assert [file.name for file in list_files(f"s3://{bucket}")] == ["x"]
    delete_file(f"s3://{bucket}/x")
    s3.set_faults()
    assert s3.keys(bucket) == []


def test_patience_ends_and_says_how(s3: S3Server):
    bucket = s3.new_bucket()
    s3.set_faults(1.0, kinds=["slow_down"])
    with pytest.raises(StorageError) as failed:
        list_files(f"s3://{bucket}/x", Patience(attempts=2, first_pause_s=0.01))
    assert str(failed.value).startswith(f"s3://{bucket}/x: gave up after 2 attempts in ")
    assert "SLOW_DOWN" in str(failed.value) and "Request ID" not in str(failed.value)
    assert s3.counts() == {"LIST": 2 * locations.S3_ATTEMPTS}


def test_a_server_that_says_nothing_is_given_up(s3: S3Server, monkeypatch):
    monkeypatch.setattr(locations, "SILENCE_TIMEOUT_S", 1.0)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")  # so that the client is a new one
    bucket = s3.new_bucket()
    s3.set_faults(silent=bucket)
    with pytest.raises(StorageError, match="gave up after 1 attempt in"):
        read_bytes(f"s3://{bucket}/x", Patience(attempts=1))


def test_time_ends_patience_too():
    clock = time.monotonic()

    def fail() -> None:
        raise OSError("busy")

    with pytest.raises(StorageError, match=r"nowhere: gave up after \d attempts .* busy"):
        patiently("nowhere", fail, remote=True, patience=Patience(1000, 0.05, 0.05, give_up_after_s=0.2))
    assert time.monotonic() - clock < 2


@pytest.mark.parametrize(("number", "attempts"), [(errno.ESTALE, 3), (errno.ENOSPC, 1), (errno.EFBIG, 1)])
def test_a_network_disk_recovers_and_a_full_one_does_not(number, attempts):
    tried = []

    def fail() -> None:
        tried.append(1)
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError, match=os.strerror(number)):
        patiently("/disk/x", fail, remote=False, patience=HASTY)
    assert len(tried) == attempts


# Files


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path, s3: S3Server) -> str:
    """An empty folder of each kind."""
    return str(tmp_path / "deep" / "folder") if request.param == "local" else f"s3://{s3.new_bucket()}/deep/folder"


def test_files_are_written_read_listed_and_deleted(place, tmp_path):
    assert list_files(place) == [] and list_names(place) == []
    write_bytes(join(place, "a.json"), b"old")
    write_bytes(join(place, "a.json"), b"newer")
    make_folder(join(place, "below"))
    (tmp_path / "source").write_bytes(b"x" * 10_000)
    upload(tmp_path / "source", join(place, "below", "b c%.bin"))
    assert read_bytes(join(place, "a.json")) == b"newer"
    assert read_buffer(join(place, "a.json"), 5).to_pybytes() == b"newer"
    assert [(file.name, file.num_bytes) for file in list_files(place)] == [("a.json", 5), ("below/b c%.bin", 10_000)]
    assert list_names(place) == ["a.json", "below"]
    assert file_info(join(place, "a.json")).size == 5
    with pytest.raises(OSError, match="5 of 6 bytes came"):
        read_buffer(join(place, "a.json"), 6, HASTY)
    delete_file(join(place, "a.json"))
    delete_file(join(place, "a.json"))
    assert [file.name for file in list_files(place)] == ["below/b c%.bin"]
    delete_folder(place)
    delete_folder(place)
    assert list_files(place) == []


def test_a_small_object_is_one_request(s3: S3Server):
    bucket = s3.new_bucket()
    s3.forget()
    write_bytes(f"s3://{bucket}/a/b/run.json", b"{}")
    assert s3.counts() == {"PUT": 1}
    assert s3.keys(bucket) == [f"{bucket}/a/b/run.json"]


def test_large_objects_are_read_in_parts(s3: S3Server, monkeypatch):
    monkeypatch.setattr(locations, "_PART_BYTES", 1000)
    bucket, content = s3.new_bucket(), os.urandom(4500)
    s3.put(f"{bucket}/x", content)
    s3.forget()
    s3.set_faults(0.3, seed=3)
    assert read_buffer(f"s3://{bucket}/x", 4500).to_pybytes() == content
    ranges = {request.range for request in s3.requests() if request.kind == "GET"}
    assert ranges == {(0, 999), (1000, 1999), (2000, 2999), (3000, 3999), (4000, 4499)}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, a disk without room")
def test_a_full_disk_is_called_so():
    with pytest.raises(OSError) as error, open_location("/dev/full")[0].open_output_stream("/dev/full") as file:
        file.write(b"0" * 100_000)
    assert reason_of(error.value) == "No space left on device"
