"""Tells a Ray cluster that AWS is about to take this spot machine back, so that Ray starts nothing new on it.

    python drain_on_interruption.py HEAD:6379            # waits for AWS's notice
    python drain_on_interruption.py HEAD:6379 --now 60   # without a notice: the machine ends in 60 seconds

It asks the machine's metadata service (version 2) every few seconds, as AWS recommends. After a notice it runs
`ray drain-node`, which marks this machine's node with the seconds that are left, and ends. It uses the standard library
only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from pathlib import Path

METADATA = "http://169.254.169.254"  # of every machine on AWS
EVERY = 5.0  # seconds between two questions
_TIMEOUT = 2.0


def notice(metadata: str = METADATA) -> datetime | None:
    """When this machine will be taken back; None when nothing is planned, or nobody answers."""
    try:
        token = _asked(f"{metadata}/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        action = _asked(f"{metadata}/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
        return datetime.strptime(json.loads(action)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except (OSError, ValueError, KeyError, TypeError):  # 404 while nothing is planned is an OSError, too
        return None


def node_id(processes: Path = Path("/proc")) -> str | None:
    """The id of this machine's Ray node, as its raylet was given it; None when none runs."""
    for file in processes.glob("[0-9]*/cmdline"):
        try:
            words = file.read_text(errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if Path(words[0]).name == "raylet":
            return next((word.partition("=")[2] for word in words if word.startswith("--node_id=")), None)
    return None


def drain(head: str, until: datetime, node: str) -> bool:
    """Have the cluster drain ``node``, which is gone at ``until``; whether it agreed."""
    left = max(0, round((until - datetime.now(timezone.utc)).total_seconds()))
    command = [
        *("ray", "drain-node", "--address", head, "--node-id", node),
        *(
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            f"The machine is taken back at {until:%H:%M:%S} UTC",
        ),
        *("--deadline-remaining-seconds", str(left)),
    ]
    return subprocess.run(command, check=False).returncode == 0


def main(head: str, metadata: str = METADATA, processes: Path = Path("/proc"), every: float = EVERY) -> None:
    """Wait for a notice, then have the node drained."""
    while True:
        until, node = notice(metadata), node_id(processes)
        if until is not None and node is not None and drain(head, until, node):
            return
        time.sleep(every)


def _asked(url: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(url, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Drain this machine's Ray node before it is taken back.")
    parser.add_argument("head", metavar="HEAD:PORT")
    parser.add_argument("--now", type=float, metavar="SECONDS", help="do not wait for a notice: it is gone after these")
    given = parser.parse_args()
    if given.now is None:
        main(given.head)
    else:
        here = node_id()
        gone = datetime.now(timezone.utc) + timedelta(seconds=given.now)
        sys.exit(0 if here is not None and drain(given.head, gone, here) else "there is no Ray node here, or no head")
