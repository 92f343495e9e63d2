"""Who asks which server: addresses, tokens, certificates."""

import json
import socket
import subprocess

import pytest
from fake_kfp import Handler, fake_kfp, serving, state
from submissions import TOKEN, command


def test_the_token_comes_from_a_file_which_may_change(guarded, run, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    monkeypatch.setenv("KFP_TOKEN", "of-no-use-here")

    def renew():
        guarded.token = f"new-{TOKEN}"
        file.write_text(guarded.token)

    guarded.on_poll = renew
    guarded.states = [state("RUNNING"), state("SUCCEEDED")]
    code, _, errors = run(guarded.url, "--token-file", file, "--wait")
    assert code == 0, errors


def test_the_token_of_a_service_account_is_used_in_a_cluster(guarded, run, tmp_path, monkeypatch):
    file = tmp_path / "token"
    file.write_text(TOKEN)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    assert run(guarded.url)[0] == 0
    monkeypatch.setenv("KFP_TOKEN", "another")
    assert run(guarded.url)[0] == 2


def test_credentials_that_kfp_keeps_are_used(guarded, run, tmp_path):
    guarded.multi_user = True
    context = tmp_path / ".config/kfp/context.json"
    context.parent.mkdir(parents=True)
    header = {"client_authentication_header_name": "Authorization"}
    header |= {"client_authentication_header_value": f"Bearer {TOKEN}"}
    context.write_text(json.dumps({"namespace": "team", **header}))
    assert run(guarded.url)[0] == 0
    assert guarded.pipelines[0]["namespace"] == guarded.experiments[0]["namespace"] == "team"


def test_a_wrong_or_missing_token_is_told_without_showing_it(guarded, package):
    guarded.token = "the-right-one"
    for environment in ({"KFP_TOKEN": TOKEN}, {}):
        result = command("--host", guarded.url, "--package", package, **environment)
        assert result.returncode == 2 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"error: {guarded.url} answered 401: Request header error")
        assert line.endswith("; give a token that is valid there, by --token-file or KFP_TOKEN")
    assert not guarded.experiments


@pytest.mark.parametrize("text", ["", f"{TOKEN}\n{TOKEN}", f"{TOKEN} x", f"{TOKEN}é"])
def test_a_file_that_holds_no_token_is_refused(text, fake, refused, tmp_path):
    file = tmp_path / "token"
    file.write_text(text)
    line = refused(fake.url, "--token-file", file)
    assert line == f"{file}: must hold one token, and nothing else\n"
    assert not fake.requests


def test_a_token_file_that_is_not_there_is_refused(fake, refused):
    assert refused(fake.url, "--token-file", "/nowhere/token").startswith(
        "--token-file /nowhere/token: No such"
    )


def test_nothing_listens(package):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{free.getsockname()[1]}"
        result = command("--host", host, "--package", package, KFP_TOKEN=TOKEN)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: nothing answers at {host} (") and "Connection refused" in line


class Page(Handler):
    """What another service answers."""

    status = 200

    def do_GET(self):  # noqa: N802
        self.send_text(self.status, "text/html", "<html><body>Please log in</body></html>")


@pytest.mark.parametrize(
    ("status", "end"),
    [
        (
            200,
            "is no Kubeflow Pipelines server: its health page is not JSON; "
            "if it is one to log in, give a token",
        ),
        (404, "is no Kubeflow Pipelines server: it has no health page"),
        (502, "answered 502: Bad Gateway"),
    ],
)
def test_another_service_answers(status, end, refused, monkeypatch):
    monkeypatch.setattr(Page, "status", status)
    with serving(Page) as server:
        assert refused(server.url) == f"{server.url} {end}\n"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("certificate")
    key, pem = folder / "key.pem", folder / "certificate.pem"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=fake -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        ["openssl", *request.split(), "-keyout", key, "-out", pem], check=True, capture_output=True
    )
    pem.write_text(key.read_text() + pem.read_text())
    return pem


def test_a_certificate_must_be_trusted(certificate, run, refused, monkeypatch):
    with fake_kfp(certificate=certificate) as fake:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert run(fake.url)[0] == 0
        monkeypatch.delenv("SSL_CERT_FILE")
        line = refused(fake.url)
    assert line.startswith(f"{fake.url}: no secure connection (self-signed certificate")
    assert "SSL_CERT_FILE" in line


def test_https_to_a_server_without_it(fake, refused):
    host = fake.url.replace("http:", "https:")
    assert refused(host).startswith(f"{host}: no secure connection")


def test_no_host(package):
    result = command("--package", package)
    assert result.returncode == 2
    assert result.stderr == "error: no server: give --host https://... or set KFP_HOST\n"


@pytest.mark.parametrize(
    "host", ["kubeflow.example", f"https://me:{TOKEN}@kubeflow.example", "ftp://x", "http://"]
)
def test_a_host_that_is_none(host, refused):
    assert refused(host).startswith("--host: must be like https://host")
