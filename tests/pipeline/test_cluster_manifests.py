"""What cluster/ says: valid for Kubernetes, pinned, without secrets, and of one piece."""

import re

import kubernetes_validate
import pytest
import yaml
from mlflow.server.security_utils import get_allowed_hosts_from_env, is_allowed_host_header

from dynamic_transformers.settings import PROJECT_ROOT
from pipelines.images import default_tag

CLUSTER = PROJECT_ROOT / "cluster"
MANIFESTS = (CLUSTER / "mlflow.yaml").read_text()
DOCUMENTS = list(yaml.safe_load_all(MANIFESTS))
WORKLOADS = [document for document in DOCUMENTS if document["kind"] in ("Deployment", "StatefulSet")]
COMPOSE = (CLUSTER / "mlflow-compose.yaml").read_text()
SERVICES = yaml.safe_load(COMPOSE)["services"]
EXAMPLE = (CLUSTER / "mlflow.env.example").read_text()
CLUSTER_DOCS = (PROJECT_ROOT / "docs" / "cluster.md").read_text()
(IMAGE_USER,) = re.findall(r"^USER (\S+)$", (PROJECT_ROOT / "images" / "Dockerfile").read_text(), re.M)
SECRET = re.compile("PASSWORD|SECRET|ACCESS_KEY")


def named(document):
    return f"{document['kind']}/{document['metadata']['name']}"


def pod(workload):
    return workload["spec"]["template"]["spec"]


def environment(workload):
    return {entry["name"]: entry for entry in pod(workload)["containers"][0]["env"]}


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_kubernetes_takes_it(document):
    kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_a_registry_that_asks_who_pulls_needs_one_comment_less():
    server = next(yaml.safe_load_all(MANIFESTS.replace("#imagePullSecrets", "imagePullSecrets")))
    kubernetes_validate.validate(server, kubernetes_validate.latest_version(), strict=True)
    (reference,) = pod(server)["imagePullSecrets"]
    assert f"kubectl create secret generic {reference['name']} --namespace mlflow" in MANIFESTS


@pytest.mark.parametrize("workload", WORKLOADS, ids=named)
def test_pods_have_no_more_rights_than_they_need(workload):
    spec = pod(workload)
    assert spec["automountServiceAccountToken"] is False
    # With a link to the service `mlflow`, MLFLOW_PORT would be tcp://...
    assert spec["enableServiceLinks"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
        assert container["resources"]["requests"].keys() == {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        # A read-only root needs a volume for all that is written.
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        claims = workload["spec"].get("volumeClaimTemplates", [])
        assert mounted == {volume["name"] for volume in spec["volumes"]} | {
            claim["metadata"]["name"] for claim in claims
        }


def test_every_image_has_a_version():
    (ours,) = yaml.safe_load((CLUSTER / "kustomization.yaml").read_text())["images"]
    images = [container["image"] for workload in WORKLOADS for container in pod(workload)["containers"]]
    assert ours["name"] in [image.rpartition(":")[0] for image in images]
    assert ours["newTag"] == default_tag("COMMIT")  # a person fills in what `make build-images` printed
    images += [service["image"] for service in SERVICES.values() if "${" not in service["image"]]
    images.append(f"{ours['newName']}:{ours['newTag']}")
    assert len(images) == 4
    for image in images:
        assert re.search(r"[^:]:\d+[-.\w]*$", image), image


def test_no_secret_is_written_down():
    assert "Secret" not in {document["kind"] for document in DOCUMENTS}
    for workload in WORKLOADS:
        for name, entry in environment(workload).items():
            assert not SECRET.search(name) or "secretKeyRef" in entry.get("valueFrom", ())
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            assert not SECRET.search(name) or re.fullmatch(r"\$\{\w+:\?[^}]*\}", value)
    given = dict(re.findall(r"^(\w+)=(.*)$", EXAMPLE, re.M))
    # Empty, so that nothing starts with a password that everybody knows.
    assert given.pop("PGPASSWORD") == given.pop("AWS_SECRET_ACCESS_KEY") == ""
    # Nor with an image that a person has not chosen: MinIO publishes none any more.
    assert given["MINIO_IMAGE"] == ""
    assert set(re.findall(r"\$\{(\w+):\?", COMPOSE)) == {"PGPASSWORD", "AWS_SECRET_ACCESS_KEY", *given}


def test_git_ignores_the_passwords():
    assert "/cluster/mlflow.env" in (PROJECT_ROOT / ".gitignore").read_text().splitlines()


def test_the_server_has_the_same_environment_on_a_cluster_as_on_a_lab_machine():
    server, database = WORKLOADS
    (secret,) = pod(server)["containers"][0]["envFrom"]
    documented = set(re.findall(r"^#   (\w+)=", MANIFESTS, re.M))
    names = (environment(server).keys() | documented) - {"NAMESPACE"}
    assert names == SERVICES["mlflow"]["environment"].keys()
    password = environment(database)["POSTGRES_PASSWORD"]["valueFrom"]["secretKeyRef"]
    assert password["name"] == secret["secretRef"]["name"] and password["key"] in documented
    for name, there in {"PGUSER": "POSTGRES_USER", "PGDATABASE": "POSTGRES_DB"}.items():
        assert environment(server)[name]["value"] == environment(database)[there]["value"]


def test_services_and_the_network_policy_find_their_pods():
    labels = {named(workload): workload["spec"]["template"]["metadata"]["labels"] for workload in WORKLOADS}
    server, database = WORKLOADS
    services = {
        document["metadata"]["name"]: document["spec"]
        for document in DOCUMENTS
        if document["kind"] == "Service"
    }
    assert services.keys() == {"mlflow", environment(server)["PGHOST"]["value"]}
    for workload, (name, service) in zip(WORKLOADS, services.items(), strict=True):
        assert service["selector"] == labels[named(workload)], name
        ports = {port["name"]: port["containerPort"] for port in pod(workload)["containers"][0]["ports"]}
        assert [(port["port"], ports[port["targetPort"]]) for port in service["ports"]] == [
            (port, port) for port in ports.values()
        ]
    assert database["spec"]["serviceName"] == database["metadata"]["name"] in services
    (policy,) = [document["spec"] for document in DOCUMENTS if document["kind"] == "NetworkPolicy"]
    assert policy["podSelector"]["matchLabels"] == labels[named(database)]
    ((peer,),) = [rule["from"] for rule in policy["ingress"]]
    assert peer["podSelector"]["matchLabels"] == labels[named(server)]


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("mlflow:5000", True),
        ("mlflow.research:5000", True),
        ("mlflow.research.svc:5000", True),
        ("mlflow.research.svc.cluster.local:5000", True),
        ("127.0.0.1:5001", True),
        ("mlflow.other:5000", False),
        ("mlflow.evil.example:5000", False),
    ],
)
def test_the_server_knows_its_names_on_the_cluster(host, allowed, monkeypatch):
    name = "MLFLOW_SERVER_ALLOWED_HOSTS"
    value = environment(WORKLOADS[0])[name]["value"].replace("$(NAMESPACE)", "research")
    monkeypatch.setenv(name, value)
    assert is_allowed_host_header(get_allowed_hosts_from_env(), host) is allowed


def test_on_a_lab_machine_only_the_server_is_reached_and_from_there_alone():
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["${MLFLOW_ADDRESS:-127.0.0.1}:5000:5000"]}


def test_on_a_lab_machine_what_is_waited_for_tells_its_health_and_what_is_kept_has_a_volume():
    waited = [
        name
        for service in SERVICES.values()
        for name, wait in service.get("depends_on", {}).items()
        if wait["condition"] == "service_healthy"
    ]
    assert sorted(waited) == ["minio", "postgres"]
    assert all("healthcheck" in SERVICES[name] for name in (*waited, "mlflow"))
    kept = {SERVICES[name]["volumes"][0].partition(":")[0] for name in waited}
    assert kept == yaml.safe_load(COMPOSE)["volumes"].keys()


def test_the_claim_of_the_docs_is_the_one_that_the_example_names():
    (text,) = re.findall(r"^```yaml\n(apiVersion.*?)^```", CLUSTER_DOCS, re.M | re.S)
    claim = yaml.safe_load(text)
    kubernetes_validate.validate(claim, kubernetes_validate.latest_version(), strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert f"#volume_claim: {claim['metadata']['name']}\n" in (CLUSTER / "example.yaml").read_text()
    # Whom the volume must let write.
    assert f"`{IMAGE_USER}`" in CLUSTER_DOCS and f"chown {IMAGE_USER} " in CLUSTER_DOCS


def test_nobody_is_told_to_put_a_secret_on_a_command_line():
    for text in (CLUSTER_DOCS, MANIFESTS, COMPOSE, (PROJECT_ROOT / "README.md").read_text()):
        assert not re.search("--from-literal|--docker-password", text)
