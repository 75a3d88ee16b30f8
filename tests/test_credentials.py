"""Passwords, keys and signatures in addresses: refused where they would be kept, nowhere to be found elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from ports import free_port
from tiny import TINY

from detr_ray import check, evaluate, train
from detr_ray.config import ConfigError, load_config
from detr_ray.config.schema import all_keys
from detr_ray.config.sections import Config
from detr_ray.credentials import credentials_in, without_credentials
from detr_ray.tracking import Timing

CANARY = "canary7"
DATA = "data.generate={num_train: 16, num_val: 4, image_size: [48, 72], max_objects: 2, min_object_size: 12}"
KEYS = [
    *(key for key in TINY if not key.startswith("tracking=")),
    "tracking.report=false",
    DATA,
    "run.name=odd",
    "train.max_steps=2",
]

SECRET = [
    f"http://me:{CANARY}@127.0.0.1:5000",
    f"HTTPS://{CANARY}@host/x.pth",
    f"https://bucket.s3.amazonaws.com/x.pth?X-Amz-Expires=9&X-Amz-Signature={CANARY}",
    f"https://account.blob.core.windows.net/x?sv=2024-01-01&se=2026&sig={CANARY}",
    f"https://storage.googleapis.com/b/x?GoogleAccessId=a@b&Signature={CANARY}",
    f"https://host/x?{CANARY}{CANARY}{CANARY}=1&download_token={CANARY}",
    f"https://host/x?rlkey={CANARY}&dl=1",
    f"https://host/x#access_token={CANARY}",
    f"https://host/x?v={CANARY}{CANARY}{CANARY}",
    f"s3://AKIA:{CANARY}@bucket/x",
    f"s3://AKIA:can/{CANARY}@bucket/x",
    f"s3://{CANARY}@bucket/x",
    f"http://me:can/{CANARY}@host/x",
    f"s3://bucket/x?access_key=AKIA&secret_key={CANARY}",
    f"s3://bucket/x?endpoint_override=me:{CANARY}@host:9000",
    f"gs://me:{CANARY}@bucket/x",
    f"abfs://container@account.dfs.core.windows.net/x?sas_token={CANARY}",
    f"abfs://container:{CANARY}@account.dfs.core.windows.net/x",
    f"hdfs://me%3A{CANARY}@host/x",
    f"postgresql+psycopg2://mlflow:{CANARY}@db:5432/mlflow",
    f"postgresql://db/mlflow?user=mlflow&password={CANARY}",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{CANARY}",
]
PLAIN = [
    "runs", "/data/a@b:c/d", "http://127.0.0.1:5000", "https://mlflow.example/path", "https://host/x.pth?download=true",
    "https://host/x.pth?v=2#section", "s3://bucket/x/a@b/c:d?region=eu-west-1&endpoint_override=host:9000&scheme=http",
    "gs://bucket/x", "abfs://container@account.dfs.core.windows.net/x", "hdfs://me@host:9000/x?replication=3",
    "sqlite:////x/mlflow.db?timeout=9", "postgresql://mlflow@db/mlflow?sslmode=require", "databricks://profile",
    "models:/detr@champion",
]  # fmt: skip


@pytest.mark.parametrize("address", SECRET)
def test_addresses_with_secrets_are_known_and_shown_without(address: str) -> None:
    assert credentials_in(address)
    assert CANARY not in without_credentials(f"GET {address} failed")


@pytest.mark.parametrize("address", PLAIN)
def test_other_addresses_are_left_alone(address: str) -> None:
    assert credentials_in(address) is None
    assert without_credentials(address) == address


def text_keys() -> list[str]:
    """Keys that take any text. Names have a form of their own, and lists are no addresses."""
    named = ("run.name", "tune.name", "tracking.model_name")
    texts = [key for key in all_keys() if not key.is_section and "text" in key.kind and "list of" not in key.kind]
    return [key.path for key in texts if key.path not in named]


def test_every_key_with_text_refuses_secrets_and_does_not_repeat_them() -> None:
    keys = text_keys()
    assert {"tracking.uri", "run.storage", "data.root", "data.train.images", "data.val.shards", "model.init_from",
            "model.backbone_weights", "eval.checkpoint"} <= set(keys)  # fmt: skip
    for key in keys:
        for address in SECRET[:3] if key != "tracking.uri" else SECRET:
            # A split needs its other half to be whole.
            half = {"annotations": "images", "images": "annotations"}.get(key.rpartition(".")[2])
            other = [f"{key.rpartition('.')[0]}.{half}=x"] if half else []
            with pytest.raises(ConfigError) as refused:
                load_config(None, [f"{key}={address}", *other])
            assert refused.value.errors[0].startswith(f"{key}: the address holds credentials"), refused.value.errors
            assert CANARY not in str(refused.value)


def test_a_configuration_that_was_built_by_hand_is_refused_too() -> None:
    config = Config.model_validate({"tracking": {"uri": SECRET[0]}, "data": {"root": "x"}})
    with pytest.raises(ConfigError, match=r"tracking\.uri: the address holds credentials"):
        config.check_training()


@pytest.mark.parametrize("command", [train, check, evaluate], ids=lambda module: module.__name__)
def test_commands_refuse_before_anything_is_written(
    command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.yaml").write_text(f"eval: {{checkpoint: '{SECRET[2]}'}}\n")
    keys = [*KEYS, "data.root=data", f"tracking.uri={SECRET[0]}", "--config", "more.yaml"]
    for extra in ([], ["--print-config"], [SECRET[0]], [f"run.seed={SECRET[0]}"], [f"data.rot={SECRET[0]}"]):
        assert command.main([*keys, *extra]) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and CANARY not in captured.out + captured.err, captured
    assert [path.name for path in tmp_path.iterdir()] == ["more.yaml"]


@pytest.mark.timeout(180)
def test_a_password_of_the_environment_is_used_and_written_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = free_port()
    keys = [*KEYS, f"data.root={tmp_path}/data", f"run.storage={tmp_path}/runs"]
    for address in (f"http://me:{CANARY}@127.0.0.1:{port}/", f"http://127.0.0.1:{port}/?token={CANARY}"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setattr("detr_ray.tracking.mlflow_tracker.Timing", lambda: Timing(finish=1.0))
        assert train.main(keys) == 0
        shown = capsys.readouterr()
        assert f"http://127.0.0.1:{port}/ does not answer" in shown.out
        assert CANARY not in shown.out + shown.err + caplog.text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "model.pt", "events.jsonl"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
