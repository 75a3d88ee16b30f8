"""The files in ``cluster/`` are what the programs that read them accept, and keep what they promise.

No cloud and no Kubernetes are asked. Each check is shown broken copies too, which it must refuse.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "cluster"
KUBERAY_SCHEMA = json.loads((Path(__file__).parent / "kuberay_schema.json").read_text())
RAY_UP = ["aws.yaml", "gcp.yaml"]
KUBERAY = ["kuberay-cluster.yaml", "kuberay-job.yaml"]
DROP = object()
REFUSALS = (AssertionError, ValueError, RuntimeError, jsonschema.ValidationError)

Document = dict[str, Any]


def text_of(name: str) -> str:
    return (CLUSTER / name).read_text()


def edited(document: Any, path: str, value: Any) -> Any:
    """A copy of a document with another value at ``a.b.0.c``, or without it."""
    document = copy.deepcopy(document)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place = document
    for part in parents:
        place = place[part]
    if value is DROP:
        del place[last]
    else:
        place[last] = value
    return document


# ------------------------------------------------------------------------------------------------ ray up


def check_ray_up(config: Document) -> None:
    """What Ray checks before it talks to a cloud, and what we promise."""
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(copy.deepcopy(config)))

    types = config["available_node_types"]
    workers = {name: spec for name, spec in types.items() if name != config["head_node_type"]}
    head = types[config["head_node_type"]]
    assert head["max_workers"] == 0
    assert head["resources"] == {"CPU": 0}
    assert set(workers) == {"gpu_worker", "data_worker"}
    for name, spec in workers.items():
        assert 0 <= spec["min_workers"] <= spec["max_workers"] <= config["max_workers"], name
    assert 0 < config["idle_timeout_minutes"] <= 60

    options = config["docker"]["run_options"]
    assert "--env=RAY_AUTH_MODE=token" in options
    assert "--env=RAY_TRAIN_ENABLE_STATE_TRACKING=1" in options
    assert "--env=RAY_JOB_STOP_WAIT_TIME_S=120" in options
    assert config["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert config["docker"]["image"].endswith(f":{ray.__version__}")
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])
    cloud = config["provider"]["type"]
    assert any(f"spot-notice {cloud} " in command for command in config["worker_start_ray_commands"])

    check_cloud = {"aws": check_aws_machine, "gcp": check_gcp_machine}[cloud]
    for name, spec in types.items():
        check_cloud(spec["node_config"], spot=name in workers)


def check_aws_machine(machine: Document, spot: bool) -> None:
    """What EC2's RunInstances takes, by the description that boto3 itself checks requests with."""
    import botocore.session
    from botocore.validate import ParamValidator

    request = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = ParamValidator().validate({**machine, "MinCount": 1, "MaxCount": 1}, request)
    assert not report.has_errors(), report.generate_report()
    assert machine.get("SecurityGroupIds"), "Ray would make a group that lets the whole world try SSH"
    assert machine.get("MetadataOptions", {}).get("HttpTokens") == "required"
    assert set(machine["IamInstanceProfile"]) == {"Name"}
    assert (machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot") is spot


def check_gcp_machine(machine: Document, spot: bool) -> None:
    """The fields of Compute Engine's instances.insert that we use, and no others."""
    assert set(machine) <= {"machineType", "networkInterfaces", "disks", "serviceAccounts", "scheduling"}
    assert machine.get("networkInterfaces"), "Ray would take the network that is open to the world"
    assert all("subnetwork" in interface for interface in machine["networkInterfaces"])
    for disk in machine["disks"]:
        assert set(disk) == {"boot", "autoDelete", "type", "initializeParams"}
        assert set(disk["initializeParams"]) == {"sourceImage", "diskSizeGb"}
    scheduling = machine.get("scheduling", {})
    assert isinstance(scheduling, dict), "Ray's own default is a list here, which the API does not describe"
    assert set(scheduling) <= {
        "provisioningModel", "instanceTerminationAction", "onHostMaintenance", "automaticRestart",
    }  # fmt: skip
    assert (scheduling.get("provisioningModel") == "SPOT") is spot
    if spot:
        assert scheduling["instanceTerminationAction"] == "DELETE"
        assert scheduling["onHostMaintenance"] == "TERMINATE"
        assert scheduling["automaticRestart"] is False


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_takes_the_file(name: str) -> None:
    check_ray_up(yaml.safe_load(text_of(name)))


@pytest.mark.parametrize("name", RAY_UP)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dockers", {}),
        ("cluster_name", DROP),
        ("provider/type", DROP),
        ("max_workers", 4),
        ("idle_timeout_minutes", -1),
        ("head_node_type", "nobody"),
        ("available_node_types/head/resources", {"CPU": 4}),
        ("available_node_types/gpu_worker/min_workers", 17),
        ("available_node_types/gpu_worker/node_config", DROP),
        ("available_node_types/gpu_worker/accelerators", 1),
        ("available_node_types/data_worker", DROP),
        ("docker/run_options/1", "--env=RAY_AUTH_MODE=disabled"),
        ("docker/run_options/2", DROP),
        ("docker/image", "registry/detr_ray:2.59.0"),
        ("file_mounts", {}),
        ("head_start_ray_commands/1", "ray start --head --dashboard-host=0.0.0.0"),
        ("worker_start_ray_commands", ["ray start --address=$RAY_HEAD_IP:6379"]),
    ],
)
def test_a_broken_ray_up_file_is_refused(name: str, path: str, value: Any) -> None:
    with pytest.raises(REFUSALS):
        check_ray_up(edited(yaml.safe_load(text_of(name)), path, value))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("aws.yaml", "data_worker/node_config/SecurityGroupIds", DROP),
        ("aws.yaml", "gpu_worker/node_config/SecurityGroup", ["sg-1"]),
        ("aws.yaml", "gpu_worker/node_config/InstanceMarketOptions/SpotOptions/MaxBid", "1"),
        ("aws.yaml", "data_worker/node_config/InstanceMarketOptions", DROP),
        ("aws.yaml", "head/node_config/InstanceMarketOptions", {"MarketType": "spot"}),
        ("aws.yaml", "head/node_config/MetadataOptions", DROP),
        ("gcp.yaml", "gpu_worker/node_config/networkInterfaces", DROP),
        ("gcp.yaml", "gpu_worker/node_config/machine", "g2"),
        ("gcp.yaml", "data_worker/node_config/scheduling/instanceTerminationAction", "STOP"),
        ("gcp.yaml", "data_worker/node_config/scheduling", [{"preemptible": True}]),
    ],
)
def test_a_broken_machine_is_refused(name: str, path: str, value: Any) -> None:
    with pytest.raises(REFUSALS):
        check_ray_up(edited(yaml.safe_load(text_of(name)), f"available_node_types/{path}", value))


@pytest.mark.slow
def test_rays_aws_provider_makes_the_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own code from the file to running machines, on a simulated EC2: keys, networks, spot, closed groups."""
    import boto3
    from moto import mock_aws
    from ray.autoscaler._private.aws.config import bootstrap_aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    monkeypatch.setenv("HOME", str(tmp_path))  # Ray puts the key pair there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "simulated")
    with mock_aws():
        ec2, iam = boto3.client("ec2", "us-west-2"), boto3.client("iam")
        vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        ours = ec2.create_security_group(GroupName="ours", Description="closed", VpcId=vpc)["GroupId"]
        image = ec2.describe_images()["Images"][0]["ImageId"]
        for profile in ("detr-ray-head", "detr-ray-worker"):
            iam.create_instance_profile(InstanceProfileName=profile)
        text = text_of("aws.yaml").replace("sg-CHANGEME", ours).replace("ami-CHANGEME", image)
        config = AWSNodeProvider.fillout_available_node_types_resources(prepare_config(yaml.safe_load(text)))
        config = bootstrap_aws(config)
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for name, spec in config["available_node_types"].items():
            provider.create_node(spec["node_config"], {"ray-user-node-type": name}, 1)
        made = [machine for group in ec2.describe_instances()["Reservations"] for machine in group["Instances"]]
        groups = {group["GroupName"] for group in ec2.describe_security_groups()["SecurityGroups"]}

    resources = {name: spec["resources"] for name, spec in config["available_node_types"].items()}
    assert resources["head"] == {"CPU": 0}
    assert resources["gpu_worker"].items() >= {"CPU": 8, "GPU": 1, "accelerator_type:L4": 1}.items()
    assert resources["data_worker"]["CPU"] == 16
    assert "GPU" not in resources["data_worker"]
    assert [machine.get("InstanceLifecycle") for machine in made] == [None, "spot", "spot"]
    assert [group["GroupId"] for machine in made for group in machine["SecurityGroups"]] == [ours] * 3
    assert groups == {"default", "ours"}, "Ray made a group of its own, which is open to the world"


# ----------------------------------------------------------------------------------------------- KubeRay


def check_kuberay(documents: list[Document]) -> None:
    """Our short schema, and what a schema cannot say."""
    import ray

    for document in documents:
        jsonschema.validate(document, KUBERAY_SCHEMA)
    account, main = documents
    spec = main["spec"] if main["kind"] == "RayCluster" else main["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    head, groups = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert head["serviceType"] == "ClusterIP"
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert [group["groupName"] for group in groups] == ["gpu", "data"]
    for group in groups:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], group["groupName"]
        assert group["maxReplicas"] > 0
    for pods, name in [(head, "ray-head"), *((group, "ray-worker") for group in groups)]:
        pod = pods["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert container["name"] == name
        assert container["image"].endswith(f":{ray.__version__}")
        assert container["resources"]["requests"] == container["resources"]["limits"]
        environment = {item["name"]: item["value"] for item in container["env"]}
        assert 60 <= int(environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < pod["terminationGracePeriodSeconds"]
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60
        assert environment["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
        assert "RAY_AUTH_TOKEN" not in environment
    gpus = [group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu") for group in groups]
    assert gpus == ["1", None]
    if main["kind"] == "RayJob":
        assert main["spec"]["shutdownAfterJobFinishes"] is True
        assert main["spec"]["ttlSecondsAfterFinished"] > 0
        assert "run.name=" in main["spec"]["entrypoint"], "a retry would start from nothing"


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_would_take_the_file(name: str) -> None:
    check_kuberay(list(yaml.safe_load_all(text_of(name))))


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("rayVersion", "2.59.0"),
        ("rayversion", "2.60.0"),
        ("authOptions", DROP),
        ("authOptions/mode", "disabled"),
        ("enableInTreeAutoscaling", False),
        ("autoscalerOptions/idleTimeoutMinutes", 10),
        ("headGroupSpec/serviceType", "LoadBalancer"),
        ("headGroupSpec/rayStartParams/num-cpus", 0),
        ("headGroupSpec/template/spec/containers/0/name", "head"),
        ("workerGroupSpecs/0/groupName", DROP),
        ("workerGroupSpecs/0/minReplicas", 17),
        ("workerGroupSpecs/0/rayStartParams", DROP),
        ("workerGroupSpecs/0/template/spec/terminationGracePeriodSeconds", 30),
        ("workerGroupSpecs/0/template/spec/containers/0/image", "registry/detr_ray"),
        ("workerGroupSpecs/0/template/spec/containers/0/image", "registry/detr_ray:2.59.0"),
        ("workerGroupSpecs/0/template/spec/containers/0/resources/limits/nvidia.com~gpu", DROP),
        ("workerGroupSpecs/1/template/spec/volumes", [{"name": "data", "persistentVolumeClaim": {"claimName": "x"}}]),
        ("workerGroupSpecs/1/template/spec/serviceAccountName", "default"),
        ("workerGroupSpecs/1/template/spec/securityContext/runAsNonRoot", False),
    ],
)
def test_a_broken_manifest_is_refused(name: str, path: str, value: Any) -> None:
    documents = list(yaml.safe_load_all(text_of(name)))
    if "~" in path:
        documents = copy.deepcopy(documents)
        spec = documents[1]["spec"].get("rayClusterSpec", documents[1]["spec"])
        resources = spec["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
        for amounts in (resources["requests"], resources["limits"]):
            del amounts["nvidia.com/gpu"]
    else:
        inside = "1/spec/rayClusterSpec" if name == "kuberay-job.yaml" else "1/spec"
        documents = edited(documents, f"{inside}/{path}", value)
    with pytest.raises(REFUSALS):
        check_kuberay(documents)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("entrypoint", "python -m detr_ray.train --config configs/detr_r50.yaml"),
        ("shutdownAfterJobFinishes", False),
        ("backofflimit", 3),
        ("backoffLimit", "3"),
        ("submissionMode", "Whatever"),
    ],
)
def test_a_broken_job_is_refused(path: str, value: Any) -> None:
    documents = list(yaml.safe_load_all(text_of("kuberay-job.yaml")))
    with pytest.raises(REFUSALS):
        check_kuberay(edited(documents, f"1/spec/{path}", value))


def test_both_manifests_describe_the_same_cluster() -> None:
    (_, cluster), (_, job) = (list(yaml.safe_load_all(text_of(name))) for name in KUBERAY)
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


# ----------------------------------------------------------------------------------------- open to nobody


def check_closed(text: str) -> None:
    """Nothing listens to the world, and no secret lies in a file."""
    lines = [line.split("#")[0] for line in text.splitlines()]
    assert not [line for line in lines if "0.0.0.0" in line or "::/0" in line]
    assert not [line for line in lines if re.search(r"RAY_AUTH_TOKEN|AKIA[0-9A-Z]{8}|private_key|aws_secret", line)]
    assert not [line for line in lines if "RAY_AUTH_MODE" in line and "RAY_AUTH_MODE=token" not in line]


@pytest.mark.parametrize("name", [*RAY_UP, *KUBERAY, "Dockerfile"])
def test_nothing_is_open_to_the_world(name: str) -> None:
    check_closed(text_of(name))


@pytest.mark.parametrize(
    "line",
    [
        "  IpPermissions: [{IpRanges: [{CidrIp: 0.0.0.0/0}]}]",
        "  - ray start --head --dashboard-host=0.0.0.0",
        "    - --env=RAY_AUTH_MODE=disabled",
        "    - {name: RAY_AUTH_TOKEN, value: secret}",
        "  aws_secret_access_key: x",
    ],
)
def test_what_opens_a_cluster_is_refused(line: str) -> None:
    with pytest.raises(AssertionError):
        check_closed(text_of("aws.yaml") + line)
