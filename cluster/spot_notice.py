#!/usr/bin/env python3
"""Waits for the cloud's notice that this spot machine will end, and makes Ray drain the node.

Ray's autoscaler does not query such notices. A drained node gets no new tasks, and Ray Train is informed, so that
training writes a checkpoint before the machine ends. The worker start commands of aws.yaml and gcp.yaml run it.

    python cluster/spot_notice.py aws --address HEAD:6379

Needs only Ray. Token and authentication mode come from the environment, as for all Ray commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime

AWS_METADATA = "http://169.254.169.254"
GCP_METADATA = "http://metadata.google.internal"
GCP_NOTICE_S = 30.0
# Draining takes seconds, so Ray gets an earlier deadline.
MARGIN_S = 5.0
# A head that does not answer is asked again.
ANSWER_WITHIN_S = 20.0


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str | None:
    """The answer of a metadata server; None for status 404."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


def seconds_left_on_aws(metadata: str) -> float | None:
    """Seconds until AWS ends or stops this spot machine; None without a notice."""
    token = _get(f"{metadata}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, "PUT") or ""
    notice = _get(f"{metadata}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    if notice is None:
        return None
    end = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return (end - datetime.now(UTC)).total_seconds()


def seconds_left_on_gcp(metadata: str) -> float | None:
    """Seconds until Google Cloud ends this spot machine; None without a notice. The notice does not contain a time."""
    answer = _get(f"{metadata}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if answer is not None and answer.strip() == "TRUE" else None


CLOUDS = {"aws": (seconds_left_on_aws, AWS_METADATA), "gcp": (seconds_left_on_gcp, GCP_METADATA)}


def drain(address: str, node_id: str | None, seconds: float) -> bool:
    """Announces to Ray that a node ends in ``seconds``; returns whether Ray accepted it in time."""
    command = [
        "ray", "drain-node", "--address", address,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the cloud takes this spot machine away",
        "--deadline-remaining-seconds", str(max(1, int(seconds - MARGIN_S))),
    ]  # fmt: skip
    if node_id is not None:
        command += ["--node-id", node_id]
    environment = {**os.environ, "RAY_ADDRESS": address}
    try:
        return subprocess.run(command, env=environment, timeout=ANSWER_WITHIN_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def say(line: str) -> None:
    """Prints a line with the time."""
    sys.stdout.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {line}\n")
    sys.stdout.flush()


def main() -> int:
    """Polls until there is a notice and Ray has accepted it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--address", required=True, help="HOST:PORT of the head")
    parser.add_argument("--node-id", help="the node to drain; the one of this machine without it")
    parser.add_argument("--every", type=float, default=2.0, metavar="S", help="seconds between two looks")
    parser.add_argument("--metadata", metavar="URL", help="the metadata server, if not the cloud's own")
    arguments = parser.parse_args()
    seconds_left, metadata = CLOUDS[arguments.cloud]
    metadata = arguments.metadata or metadata
    say(f"looking for a notice at {metadata} every {arguments.every:g} s")
    was_out_of_reach = False
    while True:
        try:
            seconds = seconds_left(metadata)
            was_out_of_reach = False
        except (OSError, ValueError, KeyError) as error:
            seconds = None
            if not was_out_of_reach:
                say(f"no answer that makes sense from {metadata}, trying again: {error}")
            was_out_of_reach = True
        if seconds is not None:
            say(f"this machine goes in {seconds:.0f} s: draining the node")
            if drain(arguments.address, arguments.node_id, seconds):
                say("the node drains")
                return 0
            say("Ray did not take note, trying again")
        time.sleep(arguments.every)


if __name__ == "__main__":
    sys.exit(main())
