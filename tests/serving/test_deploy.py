"""What is deployed agrees with the project: files, options, users, metrics. Nothing is built or run."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

import support.serve_packages  # noqa: F401 - skips where they are missing
from vstar_engine.commands.main import build_parser
from vstar_engine.serving.telemetry import metrics

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SERVE = build_parser()[1]["serve"]
OPTIONS = {f"VSTAR_{action.dest.upper()}" for action in SERVE._actions if action.option_strings}
# read by the server itself, not options
OTHERS = {"VSTAR_API_KEYS"}


def instructions():
    """Returns the Dockerfile's instructions, continued lines joined."""
    joined = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def compose(name="compose.yaml"):
    return yaml.safe_load((DEPLOY / name).read_text())


def kubernetes():
    return {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())}


def check_serve(words):
    """Raises ValueError where `vstar-engine serve` would not take the words."""
    assert words[0] == "serve"
    SERVE.parse_args(words[1:])


def test_the_image_holds_what_the_package_is_built_from():
    copied = [words.split()[:-1] for name, words in instructions() if name == "COPY" and not words.startswith("--from")]
    files = [file for group in copied for file in group]
    assert {"pyproject.toml", "csrc", "kernels", "export", "bench", "vstar_engine"} <= set(files)
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for file in files:
        assert (ROOT / file).exists(), file
        assert f"!{file}" in allowed, file


def test_the_image_does_not_run_as_root_and_says_how_it_is():
    last = [i for i, (name, _) in enumerate(instructions()) if name == "FROM"][-1]
    final = dict(instructions()[last:])
    assert final["USER"] == "10001:10001"
    assert "/livez" in final["HEALTHCHECK"]
    words = json.loads(final["ENTRYPOINT"]) + json.loads(final["CMD"])
    assert words[0] == "vstar-engine"
    check_serve(words[1:])
    variants = {words.split()[-1] for name, words in instructions() if name == "FROM"}
    assert {"run-cpu", "run-cuda"} <= variants


def test_variables_are_options_of_serve():
    named = set()
    for path in [DEPLOY / "Dockerfile", *DEPLOY.glob("*.yaml")]:
        named |= set(re.findall(r"\b(VSTAR_[A-Z_]+)(?:=|:\s|, value)", path.read_text()))
    assert {"VSTAR_DATA", "VSTAR_DATABASE", "VSTAR_HOST", "VSTAR_DEVICE"} <= named
    assert named <= OPTIONS | OTHERS


@pytest.mark.parametrize("name", ["compose.yaml", "compose.cuda.yaml"])
def test_compose_runs_a_server_that_it_may(name):
    server = compose(name)["services"]["server"]
    check_serve(server["command"])
    if name == "compose.yaml":
        assert server["cap_drop"] == ["ALL"]
        assert server["read_only"] is True
        assert all(port.startswith("127.0.0.1:") for port in server["ports"])


def test_what_is_compiled_at_run_time_can_be_loaded():
    """Docker mounts a tmpfs noexec unless told otherwise, and a shared library cannot be mapped from there."""
    mounts = dict(mount.partition(":")[::2] for mount in compose()["services"]["server"]["tmpfs"])
    assert set(mounts) == {"/tmp", "/home/vstar"}
    for folder, options in mounts.items():
        assert "exec" in options.split(","), folder


def test_compose_names_only_what_it_has():
    content = compose()
    for name, service in content["services"].items():
        assert set(service.get("depends_on", ())) <= set(content["services"]), name
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in content["volumes"], name
        for config in service.get("configs", ()):
            assert config["source"] in content["configs"], name
    for config in content["configs"].values():
        assert "file" not in config or (DEPLOY / config["file"]).is_file()
    assert compose("prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"] == ["server:8000"]


def test_kubernetes_runs_a_gateway_that_it_may():
    found = kubernetes()
    assert set(found) == {"RayCluster", "StatefulSet", "Service"}
    container = found["StatefulSet"]["spec"]["template"]["spec"]["containers"][0]
    begun, gateway = container["args"][0].split("&& exec ")
    assert begun.startswith("ray start --address=vstar-engine-head-svc:6379")
    check_serve(shlex.split(gateway)[1:])
    groups = [found["RayCluster"]["spec"]["headGroupSpec"], *found["RayCluster"]["spec"]["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups] + [found["StatefulSet"]["spec"]["template"]["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        names = {variable["name"]: variable for variable in pod["containers"][0]["env"]}
        assert names["RAY_AUTH_MODE"]["value"] == "token"
        assert "valueFrom" in names["RAY_AUTH_TOKEN"]
        mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
    selected = found["Service"]["spec"]["selector"]
    assert selected.items() <= found["StatefulSet"]["spec"]["template"]["metadata"]["labels"].items()


def test_nodes_of_the_cluster_are_probed_by_what_the_image_has():
    """KubeRay's own probes ask for a server that plain `ray` does not start, or call wget, which slim images lack."""
    cluster = kubernetes()["RayCluster"]["spec"]
    head, *workers = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    ports = [6379, *(int(group["rayStartParams"]["node-manager-port"]) for group in workers)]
    for group, port in zip((head, *workers), ports, strict=True):
        (container,) = group["template"]["spec"]["containers"]
        for probe in ("readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"] == {"port": port}


def test_prometheus_finds_the_gateway_and_has_a_key_for_it():
    """An annotation on the pod would have it asked without a key, and refused."""
    monitor, found = compose("podmonitor.yaml"), kubernetes()
    template = found["StatefulSet"]["spec"]["template"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    assert "annotations" not in template["metadata"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    (container,) = template["spec"]["containers"]
    assert endpoint["port"] in {port["name"] for port in container["ports"]}
    secret = endpoint["authorization"]["credentials"]
    made = (DEPLOY / "kuberay.yaml").read_text()
    assert f"secret generic {secret['name']} " in made
    assert f"--from-literal={secret['key']}=$metrics" in made
    assert 'keys="$(openssl rand -hex 24),metrics $metrics"' in made


@pytest.mark.slow
def test_kubernetes_takes_its_objects():
    """Kubernetes's own schema, strictly; the cluster of Ray is KubeRay's, so its pods are checked."""
    reason = "needs kubernetes-validate (100 MB of schemas): pip install kubernetes-validate"
    checker = pytest.importorskip("kubernetes_validate", reason=reason)
    found = kubernetes()
    cluster = found.pop("RayCluster")["spec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **group["template"]} for group in groups]
    for item in [*found.values(), *pods]:
        checker.validate(item, checker.latest_version(), strict=True)


def exposed():
    """Returns the names of every series that the server may show."""
    names = set()
    for family in metrics.Metrics().registry.collect():
        names |= {family.name, f"{family.name}_total", f"{family.name}_bucket", f"{family.name}_sum", f"{family.name}_count"}
    for name, (kind, _) in metrics.WATCHED.items():
        names.add(f"{name}_total" if kind is metrics.COUNTER else name)
    return names


def test_every_metric_of_the_dashboard_exists_and_every_metric_is_on_it():
    board = json.loads((DEPLOY / "grafana" / "vstar-engine.json").read_text())
    said = " ".join(target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))
    used = set(re.findall(r"\b(?:vstar|process)_\w+", said))
    assert used <= exposed()
    shown = {re.sub(r"_(?:total|bucket|sum|count)$", "", name) for name in used if name.startswith("vstar")}
    counted = {family.name for family in metrics.Metrics().registry.collect() if family.name.startswith("vstar")}
    assert shown == counted | set(metrics.WATCHED)


def test_panels_of_the_dashboard_do_not_overlap():
    board = json.loads((DEPLOY / "grafana" / "vstar-engine.json").read_text())
    taken = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
