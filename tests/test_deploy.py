"""The cluster configurations: valid for Ray's launcher, sound for KubeRay, shell that parses, versions that agree."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT

from ecotone.experiments.jobs import HOME_RUNS, PACKAGES

LAUNCHED = ("ray_cluster.yaml", "deploy/on-premise.yaml")
EVERYTHING = (*LAUNCHED, "deploy/kuberay.yaml", "deploy/Dockerfile", "deploy/drain_on_interruption.py")
COMMANDS = ("initialization_commands", "setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
# In quotes the shell leaves a tilde as it is.
QUOTED_HOME = re.compile(r"""["'][^"' ]*~/""")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def config(name: str) -> dict[str, Any]:
    loaded = yaml.safe_load(read(name))
    assert isinstance(loaded, dict)
    return loaded


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", read("constraints.txt"), re.MULTILINE)
    assert found is not None
    return found[1]


def commands(name: str) -> Iterator[str]:
    for key in COMMANDS:
        yield from config(name).get(key, [])


# -- Ray's launcher -------------------------------------------------------------------------------------------


def validated(record: dict[str, Any]) -> dict[str, Any]:
    util = pytest.importorskip("ray.autoscaler._private.util", reason="a private module of Ray that may move")
    prepared = util.prepare_config(record)
    util.validate_config(prepared)
    assert isinstance(prepared, dict)
    return prepared


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_takes_it_and_refuses_a_mistyped_key(name: str) -> None:
    prepared = validated(config(name))
    types = prepared["available_node_types"]
    assert prepared["head_node_type"] in types
    with pytest.raises(pytest.importorskip("jsonschema").ValidationError, match="file_muonts"):
        validated({**config(name), "file_muonts": {}})


def test_on_aws_the_head_scores_nothing_and_spot_workers_come_and_go() -> None:
    prepared = validated(config("ray_cluster.yaml"))
    types = prepared["available_node_types"]
    head, worker = types.pop(prepared["head_node_type"]), types.popitem()[1]
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (worker["min_workers"], worker["max_workers"]) == (0, prepared["max_workers"])
    assert prepared["provider"]["cache_stopped_nodes"] is False
    assert any("drain_on_interruption.py" in line for line in prepared["worker_start_ray_commands"])


def test_on_aws_each_machine_has_its_image() -> None:
    """As the autoscaler on the head asks for it; it fails on a configuration that ``ray up`` takes."""
    module = pytest.importorskip("ray.autoscaler.v2.instance_manager.config", reason="private, and may move")
    prepared = validated(config("ray_cluster.yaml"))
    found = module.AutoscalingConfig(prepared, skip_content_hash=True)
    images = {kind: found.get_docker_config(kind)["image"] for kind in prepared["available_node_types"]}
    image = f"rayproject/ray:{pinned('ray')}-py311"
    assert images == {"head": image, "gpu_spot": f"{image}-gpu"}


def test_on_aws_runs_on_the_head_outlive_its_container() -> None:
    module = pytest.importorskip("ray.autoscaler._private.docker", reason="a private module of Ray that may move")
    record = config("ray_cluster.yaml")
    docker, user = record["docker"], record["auth"]["ssh_user"]
    options = [*docker["run_options"], *docker["head_run_options"]]
    started = module.docker_start_cmds(user, docker["image"], {}, "name", options, "cluster", "/home/ray", "docker")
    words = shlex.split(started)
    host, inside = words[words.index("--volume") + 1].split(":")
    assert inside == HOME_RUNS.replace("~", "/home/ray")
    assert host.startswith(f"/home/{user}/")
    variable, _, key = words[words.index("--env") + 1].partition("=")
    assert (variable, str(Path(key).parent)) == ("ECOTONE_KEY_FILE", inside)
    assert record["initialization_commands"] == [f"mkdir -p {host}"]


def test_on_premise_ray_is_started_for_a_list_of_machines(tmp_path: Path) -> None:
    """With the first autoscaler, though ``ray up`` asks for the second, and for Pythons that differ in the patch."""
    util = pytest.importorskip("ray.autoscaler._private.util", reason="a private module of Ray that may move")
    program = tmp_path / "ecotone-venv" / "bin" / "ray"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\necho "$RAY_enable_autoscaler_v2 $RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL $@"\n')
    program.chmod(0o755)
    told = []
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (line,) = [line for line in config("deploy/on-premise.yaml")[key] if "ray start" in line]
        (whole,) = util.with_envs([line], {"RAY_enable_autoscaler_v2": "1", "RAY_HEAD_IP": "10.0.0.1"})
        environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        ended = subprocess.run(["bash", "-c", whole], check=True, capture_output=True, text=True, env=environment)
        told.append(ended.stdout)
    assert told[0].startswith("0 minor start --head ")
    assert told[1].startswith("1 minor start --address=10.0.0.1:6379 ")
    workers = config("deploy/on-premise.yaml")["provider"]["worker_ips"]
    assert config("deploy/on-premise.yaml")["min_workers"] == config("deploy/on-premise.yaml")["max_workers"]
    assert config("deploy/on-premise.yaml")["min_workers"] == len(workers)


def test_on_premise_rays_own_commands_find_it(tmp_path: Path) -> None:
    """`ray down` runs `ray stop` in a login shell, with nothing before it."""
    (line,) = [line for line in config("deploy/on-premise.yaml")["setup_commands"] if ".bashrc" in line]
    program = tmp_path / "ecotone-venv" / "bin" / "ray"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho found\n")
    program.chmod(0o755)
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    for _ in range(2):
        subprocess.run(["bash", "-c", line], check=True, env=environment)
    assert (tmp_path / ".bashrc").read_text().count("\n") == 1
    asked = ["bash", "-c", "source ~/.bashrc; ray stop"]
    assert subprocess.run(asked, check=True, capture_output=True, text=True, env=environment).stdout == "found\n"


@pytest.mark.parametrize("name", LAUNCHED)
def test_each_command_is_shell_and_every_ray_asks_for_the_token(name: str) -> None:
    starts = [line for line in commands(name) if "ray start" in line]
    assert len(starts) == 2
    for line in commands(name):
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)
        assert not QUOTED_HOME.search(line), line
    for line in starts:
        assert "RAY_AUTH_MODE=token ray start" in line
        assert "--metrics-export-port=8080" in line
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert '--address="$RAY_HEAD_IP:6379"' in starts[1]


@pytest.mark.parametrize("name", LAUNCHED)
def test_each_option_of_ray_start_is_one(name: str) -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {option for parameter in scripts.start.params for option in parameter.opts}
    used = {word.partition("=")[0] for line in commands(name) if "ray start" in line for word in line.split()}
    assert {word for word in used if word.startswith("--")} <= known


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_checkout_and_the_token_travel_and_constraints_hold(name: str) -> None:
    mounts = config(name)["file_mounts"]
    assert mounts == {"~/.ray/auth_token": "~/.ray/auth_token", "~/ecotone": "."}
    assert ".git" in config(name)["rsync_exclude"]
    assert config(name)["rsync_filter"] == [".gitignore"]
    installs = [line for line in commands(name) if "pip install" in line]
    assert installs
    assert all("cd ~/ecotone" in line and "--constraint constraints.txt" in line for line in installs)


# -- KubeRay --------------------------------------------------------------------------------------------------


def test_kuberay_resources_are_what_the_operator_takes() -> None:
    """Its own schema is not to be had offline: kinds, names, parameters and resources by hand."""
    cluster, policy = yaml.safe_load_all(read("deploy/kuberay.yaml"))
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    assert set(spec) == {
        *("rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    }
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert set(spec["autoscalerOptions"]) == {"upscalingMode", "idleTimeoutSeconds"}

    head, (worker,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert set(head) == {"serviceType", "rayStartParams", "template"}
    assert set(worker) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert worker["minReplicas"] == worker["replicas"] == 0 < worker["maxReplicas"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert head["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {option for parameter in scripts.start.params for option in parameter.opts}
    for group, container in ((head, "ray-head"), (worker, "ray-worker")):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert {f"--{key}" for key in group["rayStartParams"]} <= known
        (only,) = group["template"]["spec"]["containers"]
        assert only["name"] == container
        assert only["resources"]["requests"] == only["resources"]["limits"]
        assert {port["containerPort"] for port in only["ports"]} >= {8080}
    gpu = worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpu == "1"
    stop = worker["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert stop[:2] == ["/bin/bash", "-c"]
    subprocess.run(["bash", "-n"], input=stop[2], text=True, check=True)
    (seconds,) = re.findall(r"drain_on_interruption\.py .* --now (\d+);", stop[2])
    assert int(seconds) < worker["template"]["spec"]["terminationGracePeriodSeconds"]

    assert policy["kind"] == "NetworkPolicy"
    own = {"matchLabels": {"ray.io/cluster": name}}
    assert policy["spec"]["podSelector"] == own
    assert policy["spec"]["ingress"] == [
        {"from": [{"podSelector": own}]},
        {"ports": [{"port": 8080, "protocol": "TCP"}]},
    ]


def test_the_image_holds_all_that_is_installed() -> None:
    file = read("deploy/Dockerfile")
    copied = {word for line in file.splitlines() if line.startswith("COPY") for word in line.split()[2:-1]}
    assert {*PACKAGES, "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert "--constraint constraints.txt" in file


# -- versions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERYTHING)
def test_versions_are_those_of_this_checkout(name: str) -> None:
    text = read(name)
    rays = re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)|ray\[default\]==([\d.]+)|rayVersion: \"([\d.]+)\"", text)
    assert {version for found in rays for version in found if version} <= {pinned("ray")}
    own = re.search(r'^version = "(.*)"$', read("pyproject.toml"), re.MULTILINE)
    assert own is not None
    assert set(re.findall(r"ecotone:(\d[\d.]*)", text)) <= {own[1]}


def test_python_of_the_images_runs_what_is_pinned() -> None:
    """The pins need 3.11, as numpy's does; images and the on-premise text say no older one."""
    assert pinned("numpy") >= "2.4"
    found = {tag for name in EVERYTHING for tag in re.findall(r"rayproject/ray:[\d.]+-py(\d+)", read(name))}
    assert found == {"311"}


# -- what the operations guide says ---------------------------------------------------------------------------


def test_the_guide_lists_each_event() -> None:
    source = "".join(file.read_text() for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    found = re.findall(r'"event": "(\w+)"|\bevent\(\s*logging\.\w+, "(\w+)"', source)
    (listed,) = re.findall(r"Events: (.*?`told`)", read("docs/operations.md"), re.DOTALL)
    assert len(found) > 10
    assert {name for names in found for name in names if name} <= set(re.findall(r"`(\w+)`", listed))


def test_the_guide_and_the_configuration_keep_the_token_of_kubernetes_alike() -> None:
    configured = [line.removeprefix("#   ") for line in read("deploy/kuberay.yaml").splitlines()]
    told = [line for line in read("docs/operations.md").splitlines() if "ecotone_token" in line]
    assert told == [line for line in configured if "ecotone_token" in line]
    assert not any("> ~/.ray/auth_token" in line for line in told)
    assert [line.split("=")[0] for line in told if line.startswith("export ")] == ["export RAY_AUTH_TOKEN_PATH"]
    for line in told:
        subprocess.run(["bash", "-n"], input=line, text=True, check=True)


# -- spot notices ---------------------------------------------------------------------------------------------


@pytest.fixture
def watcher() -> Any:
    spec = importlib.util.spec_from_file_location("drain_on_interruption", ROOT / "deploy" / "drain_on_interruption.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Metadata(BaseHTTPRequestHandler):
    """The metadata service of a spot machine; ``action`` is None while nothing is planned."""

    action: str | None = None
    questions = 0

    def do_PUT(self) -> None:
        self._answer("secret" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else None)

    def do_GET(self) -> None:
        type(self).questions += 1
        asked = self.path == "/latest/meta-data/spot/instance-action"
        allowed = self.headers["X-aws-ec2-metadata-token"] == "secret"
        self._answer(self.action if asked and allowed else None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "action", None)
    monkeypatch.setattr(Metadata, "questions", 0)
    server = HTTPServer(("127.0.0.1", 0), Metadata)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_notice_drains_the_machines_own_node_and_only_then(
    watcher: Any, metadata: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes, said = tmp_path / "proc", tmp_path / "said"
    (processes / "17").mkdir(parents=True)
    (processes / "17" / "cmdline").write_text("/opt/ray/raylet\0--node_manager_port=0\0--node_id=abc123\0")
    program = tmp_path / "bin" / "ray"
    program.parent.mkdir()
    # The first time the head does not answer.
    program.write_text(f'#!/bin/sh\necho "$@" >> {said}\ntest $(wc -l < {said}) -gt 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")

    assert watcher.notice(metadata) is None
    assert watcher.notice("http://127.0.0.1:9") is None
    thread = threading.Thread(target=watcher.main, args=("10.0.0.1:6379", metadata, processes, 0.01))
    thread.start()
    while Metadata.questions < 4:
        assert not said.exists()
    until = datetime.now(timezone.utc) + timedelta(seconds=120)
    Metadata.action = json.dumps({"action": "terminate", "time": until.strftime("%Y-%m-%dT%H:%M:%SZ")})
    thread.join(60)
    assert not thread.is_alive()
    lines = said.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(
            "drain-node --address 10.0.0.1:6379 --node-id abc123 --reason DRAIN_NODE_REASON_PREEMPTION "
        )
        assert 0 < int(line.rpartition(" ")[2]) <= 120


def test_the_node_is_told_by_its_raylet_alone(watcher: Any, tmp_path: Path) -> None:
    assert watcher.node_id(tmp_path) is None
    for pid, words in ((1, ["bash", "-c", "raylet --node_id=no"]), (2, ["/x/raylet", "--node_id=yes"])):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text("\0".join(words))
    assert watcher.node_id(tmp_path) == "yes"


def test_ray_has_the_command_that_drains() -> None:
    scripts = pytest.importorskip("ray.scripts.scripts")
    known = {option for parameter in scripts.drain_node.params for option in parameter.opts}
    assert {"--address", "--node-id", "--reason", "--reason-message", "--deadline-remaining-seconds"} <= known


def test_without_a_node_it_says_so_and_a_mistyped_option_is_refused() -> None:
    program = [sys.executable, str(ROOT / "deploy" / "drain_on_interruption.py")]
    for arguments, code, words in (
        ([], 2, "HEAD:PORT"),
        (["10.0.0.1:6379", "--nwo", "3"], 2, "--nwo"),
        (["--help"], 0, "--now"),
    ):
        ended = subprocess.run([*program, *arguments], check=False, capture_output=True, text=True)
        assert ended.returncode == code
        assert words in ended.stdout + ended.stderr
