"""Monitoring and manifests: every measurement exists, every expression parses, every resource is known."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from kubernetes_validate import validate

from qwen_vl_serve.proxy import PREFIX, ProxySettings, program

DEPLOY = Path(__file__).parents[1] / "deploy"
MONITORING = DEPLOY / "monitoring"
KUBERNETES = DEPLOY / "kubernetes"
DASHBOARD = json.loads((MONITORING / "grafana/dashboard.json").read_text())


def promtool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [program("promtool", "prometheus"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def expressions() -> dict[str, str]:
    """Where -> PromQL, of the dashboard and the alerts; Grafana's variables filled in."""
    found = {}
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    fill = {"$__rate_interval": "1m", "$instance": ".*", "$model": ".*"}
    return {
        where: re.sub(r"\$\w+", lambda match: fill[match[0]], expression)
        for where, expression in found.items()
    }


def metrics(expression: str) -> set[str]:
    """The names that an expression reads, as the server's /metrics writes them."""
    return set(re.findall(r"\b(?:vllm:\w+|http_\w+|process_\w+)", expression))


# ---- Prometheus and Grafana


def test_prometheus_takes_the_configuration_and_the_alerts():
    done = promtool("check", "config", MONITORING / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 rules found" in done.stdout


def test_every_expression_is_promql(tmp_path):
    rules = [{"record": f"test:{n}", "expr": expr} for n, expr in enumerate(expressions().values())]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "test", "rules": rules}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_ring_when_they_should(tmp_path):
    """A server that is gone, requests that wait, an old value that is fine."""
    series = [
        {"series": 'up{job="vllm", instance="a:8000"}', "values": "1 0x30"},
        {"series": 'vllm:num_requests_waiting{job="vllm", instance="b:8000"}', "values": "3x60"},
        {"series": 'vllm:num_requests_waiting{job="vllm", instance="c:8000"}', "values": "3 0 3 0x60"},
    ]
    checks = [("ServerDown", "2m", []), ("ServerDown", "5m", ["a:8000"]), ("RequestsWait", "25m", ["b:8000"])]
    text = {"a:8000": "a:8000 has not answered for two minutes"}
    waits = "{}: requests have waited all the time for ten minutes; another replica is needed"
    tests = []
    for alert, time, instances in checks:
        labels = [{"job": "vllm", "instance": instance} for instance in instances]
        expected = [
            {
                "exp_labels": label,
                "exp_annotations": {"summary": text.get(label["instance"], waits.format(label["instance"]))},
            }
            for label in labels
        ]
        tests.append({"eval_time": time, "alertname": alert, "exp_alerts": expected})
    path = tmp_path / "alerts_test.yml"
    document = {
        "rule_files": [str(MONITORING / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": tests}],
    }
    path.write_text(yaml.safe_dump(document))
    done = promtool("test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_says_what_an_operator_asks():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    used = set().union(*map(metrics, expressions().values()))
    assert used >= {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:prefix_cache_hits_total",
        "vllm:mm_cache_hits_total",
        "vllm:request_success_total",
        "http_requests_total",
    }
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            assert "$instance" in target["expr"], panel["title"]


def test_compose_and_grafana_agree_on_names():
    """The dashboard reads the data source by its uid; compose mounts what the provisioning names."""
    (source,) = yaml.safe_load((MONITORING / "grafana/datasource.yaml").read_text())["datasources"]
    (provider,) = yaml.safe_load((MONITORING / "grafana/dashboards.yaml").read_text())["providers"]
    uids = {panel["datasource"]["uid"] for panel in DASHBOARD["panels"] if "datasource" in panel}
    uids |= {variable["datasource"]["uid"] for variable in DASHBOARD["templating"]["list"]}
    assert uids == {source["uid"]}
    compose = yaml.safe_load((DEPLOY.parents[1] / "docker/compose.yaml").read_text())
    mounts = [volume.split(":")[1] for volume in compose["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/dashboard.json" in mounts
    assert source["url"] == "http://prometheus:9090" and "prometheus" in compose["services"]
    scrape = yaml.safe_load((MONITORING / "prometheus.yml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["vllm:8000"] and "vllm" in compose["services"]


# ---- Kubernetes

MANIFESTS = ["vllm.yaml", "nginx.yaml", "ray-job.yaml"]


def resources(name: str) -> list[dict]:
    return list(yaml.safe_load_all((KUBERNETES / name).read_text()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_resource(name):
    """Against the schema of the last version and, for those who wait, one a year older; strictly."""
    for resource in resources(name):
        if resource["apiVersion"] != "ray.io/v1":  # KubeRay's own kind, in no schema at hand
            validate(resource, "1.37", strict=True)
            validate(resource, "1.33", strict=True)


def pods() -> list[tuple[str, dict]]:
    found = []
    for name in MANIFESTS:
        for resource in resources(name):
            if resource["kind"] == "Deployment":
                found.append((name, resource["spec"]["template"]))
            elif resource["kind"] == "RayJob":
                cluster = resource["spec"]["rayClusterSpec"]
                groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
                found += [(name, group["template"]) for group in groups]
    return found


def test_pods_run_without_rights():
    assert len(pods()) == 4
    for name, pod in pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True and spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any(spec.get(key) for key in ["hostNetwork", "hostPID", "hostIPC"])
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context.get("readOnlyRootFilesystem") is True or name == "ray-job.yaml"
            assert container["resources"]["limits"]["memory"]
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert not any("hostPath" in volume for volume in spec["volumes"])


def test_services_and_policies_select_the_pods_that_are_there():
    labels = [pod["metadata"]["labels"] for _, pod in pods()]

    def selects(selector: dict) -> bool:
        wanted = {key: value for key, value in selector.items() if not key.startswith("ray.io/")}
        return any(wanted.items() <= each.items() for each in labels)

    for name in MANIFESTS:
        for resource in resources(name):
            if resource["kind"] == "Service":
                assert selects(resource["spec"]["selector"])
            if resource["kind"] == "NetworkPolicy":
                assert selects(resource["spec"]["podSelector"]["matchLabels"])
    (policy,) = [each for each in resources("vllm.yaml") if each["kind"] == "NetworkPolicy"]
    assert policy["spec"]["egress"] == [] and "Egress" in policy["spec"]["policyTypes"]
    # Only nginx is offered outside the cluster.
    services = [each for name in MANIFESTS for each in resources(name) if each["kind"] == "Service"]
    assert {each["metadata"]["name"] for each in services if "type" in each["spec"]} == {"qwenvl"}


def environment(name: str) -> dict[str, str]:
    ((_, pod),) = [each for each in pods() if each[0] == name]
    (container,) = pod["spec"]["containers"]
    return {each["name"]: each.get("value", "") for each in container["env"]}


def test_nginx_in_the_cluster_is_told_all_that_the_template_asks():
    given = environment("nginx.yaml")
    settings = {name: value for name, value in given.items() if name.startswith(PREFIX)}
    values = {name.removeprefix(PREFIX).lower(): value for name, value in settings.items()}
    assert values.pop("server_authorization") == "Bearer $(SERVER_KEY)"  # the cluster fills it in
    assert set(ProxySettings(**values).environment()) == set(settings)
    # The cluster replaces $(NAME) only by what stands before it.
    assert list(given).index("SERVER_KEY") < list(given).index("QWENVL_SERVER_AUTHORIZATION")
    services = {r["metadata"]["name"] for r in resources("vllm.yaml") if r["kind"] == "Service"}
    assert re.fullmatch(r"server ([\w-]+):8000;", values["servers"])[1] in services


def test_a_pod_counts_as_started_when_it_has_answered_a_picture():
    """The probe's program runs as it stands there, against nobody: it says that nothing answers."""
    ((_, pod),) = [each for each in pods() if each[0] == "vllm.yaml"]
    (container,) = pod["spec"]["containers"]
    probe = container["startupProbe"]
    *command, text = probe["exec"]["command"]
    seconds = int(re.search(r"\b(\d+)\)", text)[1])
    assert command == ["python3", "-c"] and seconds < probe["timeoutSeconds"]
    text = text.replace("127.0.0.1:8000", "127.0.0.1:9").replace(f"{seconds})", "1)")
    with pytest.raises(Exception, match="no answer within 1 seconds") as caught:
        exec(compile(text.replace('os.environ["VLLM_API_KEY"]', '"key"'), "probe", "exec"), {})
    assert type(caught.value).__name__ == "NotReady"


def test_the_production_stack_gets_what_qwenvl_serve_would_add(capsys):
    """The chart writes the command itself: the flags and variables that matter are repeated in its values."""
    from qwen_vl_serve.launch import prepare

    values = yaml.safe_load((KUBERNETES / "production-stack-values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    nano = Path(__file__).parents[2] / "models/qwen3-vl-nano"
    server, _ = prepare([str(nano), "--dry-run"])
    own = {each["name"]: each["value"] for each in model["env"]}
    media = json.loads(server.plan.environment["QWENVL_MEDIA"]) | {"checkpoint": "/checkpoint"}
    assert json.loads(own.pop("QWENVL_MEDIA")) == media
    for name in ["VLLM_MEDIA_CONNECTOR", "VLLM_MEDIA_URL_ALLOW_REDIRECTS"]:
        assert own[name] == server.plan.environment[name]
    arguments = list(server.plan.arguments)
    extra = model["vllmConfig"]["extraArgs"]
    for flag in ["--mm-processor-kwargs", "--limit-mm-per-prompt"]:
        wanted = json.loads(arguments[arguments.index(flag) + 1])
        assert json.loads(extra[extra.index(flag) + 1]) == wanted
    assert values["routerSpec"]["sessionKey"] == "x-user-id"
    template = (DEPLOY / "nginx/default.conf.template").read_text()
    assert re.search(r"proxy_set_header X-User-Id\s+\$qwenvl_client;", template)
