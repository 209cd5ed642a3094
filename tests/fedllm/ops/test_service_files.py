"""Files for service managers: what they allow is the least, and the tools that read them take them."""

import json
import os
import pwd
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from client.office import init_office
from fedllm.cli.main import app
from fedllm.files import write_secret
from fedllm.ops import service_files
from fedllm.ops.service_files import ServiceSpec
from server.federation import init_federation

ME = pwd.getpwuid(os.geteuid()).pw_name


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def settings(unit: Path) -> dict[str, list[str]]:
    """Return the values of a unit's keys."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text("utf-8").splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture
def head(tmp_path: Path) -> Path:
    (tmp_path / "federation.yaml").write_text('name: "x 100%\\nUser=root"\nhost: head.example.com\nport: 9192\n')
    return init_federation(tmp_path / "federation.yaml", tmp_path / "the server").folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site with a relay, whose user is one that every machine has."""
    folder = init_office(tmp_path / "site", "seoul-gangnam").folder
    group = service_files.grp.getgrgid(os.getegid()).gr_name
    values = {
        "name": "seoul-gangnam", "data": {"train": "/srv/records.jsonl", "text": "{x}"}, "policy": {"epsilon": 8.0},
        "models": {"m": "/srv/models/m", "p": "pkg://simulations.demo/base"}, "socket": "/run/fedllm/link.sock",
        "socket_group": group, "resources": {"device": "cpu"},
    }  # fmt: skip
    write_secret(folder / "site.yaml", json.dumps(values).encode())
    return folder


def with_relay(site: Path, folder: Path, *more: str) -> Result:
    return run(
        "site", "units", str(folder), "--relay-user", "daemon", "--relay", "/var/lib/relay", "--home", str(site), *more
    )


def test_head_offices_unit_writes_to_its_folder_alone(head: Path, tmp_path: Path) -> None:
    done = run("server", "units", str(tmp_path / "u"), "--home", str(head))
    assert done.exit_code == 0, done.output
    unit = settings(tmp_path / "u" / "fedllm-server.service")
    assert unit["ReadWritePaths"] == [f'"{head}"']
    assert unit["User"] == [ME]
    assert unit["Description"] == ["The server of x 100%% User=root"]
    assert unit["ExecStart"][0].endswith(f'fedllm server start --home "{head}"')
    for key, value in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "UMask": "0077", "Restart": "always",
        "CapabilityBoundingSet": "", "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6",
    }.items():  # fmt: skip
        assert unit[key] == [value], key


def test_the_process_that_opens_records_has_no_network_and_the_other_no_records(site: Path, tmp_path: Path) -> None:
    done = with_relay(site, tmp_path / "u")
    assert done.exit_code == 0, done.output
    service = settings(tmp_path / "u" / "fedllm-site.service")
    assert service["PrivateNetwork"] == ["yes"]
    assert service["IPAddressDeny"] == ["any"]
    assert service["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert service["User"] == [ME]
    assert service["ReadWritePaths"] == [str(site)]
    assert service["After"] == ["network-online.target fedllm-relay.service"]
    relay = settings(tmp_path / "u" / "fedllm-relay.service")
    assert relay["User"] == ["daemon"]
    assert relay["ExecStart"][0].endswith("fedllm site relay /var/lib/relay")
    assert relay["ReadWritePaths"] == ["/var/lib/relay"]
    assert relay["RuntimeDirectory"] == ["fedllm"]
    assert relay["InaccessiblePaths"] == [f"-{site}", "-/srv/records.jsonl", "-/srv/models/m"]
    assert relay["SupplementaryGroups"] == service["SupplementaryGroups"]
    assert "PrivateNetwork" not in relay


def test_a_site_without_a_relay_has_the_network_by_itself(site: Path, tmp_path: Path) -> None:
    done = run("site", "units", str(tmp_path / "u"), "--one-user", "--home", str(site))
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "u").iterdir()) == ["fedllm-site.logrotate", "fedllm-site.service"]
    service = settings(tmp_path / "u" / "fedllm-site.service")
    assert "PrivateNetwork" not in service
    assert service["RestrictAddressFamilies"] == ["AF_UNIX AF_INET AF_INET6"]
    assert "InaccessiblePaths" not in service


def test_the_logs_of_both_are_rotated(site: Path, tmp_path: Path) -> None:
    assert with_relay(site, tmp_path / "u").exit_code == 0
    text = (tmp_path / "u" / "fedllm-site.logrotate").read_text("utf-8")
    assert f'"{site}/log/*.log"' in text
    assert '"/var/lib/relay/*.log"' in text
    assert "su daemon" in text


def test_containers_of_two_users_share_the_socket_and_nothing_else(site: Path, tmp_path: Path) -> None:
    assert with_relay(site, tmp_path / "u").exit_code == 0
    file = yaml.safe_load((tmp_path / "u" / "compose.yaml").read_text("utf-8"))
    service, relay = file["services"]["fedllm-site"], file["services"]["fedllm-relay"]
    daemon = pwd.getpwnam("daemon")
    assert service["network_mode"] == "none"
    assert service["depends_on"] == ["fedllm-relay"]
    assert "network_mode" not in relay
    assert "ports" not in relay
    assert set(service["volumes"]) & set(relay["volumes"]) == {"socket:/run/fedllm"}
    options = file["volumes"]["socket"]["driver_opts"]["o"]
    assert options == f"uid={daemon.pw_uid},gid={os.getegid()},mode=0710", "the relay makes the socket"
    assert f"{site}:{site}" in service["volumes"]
    assert "/srv/records.jsonl:/srv/records.jsonl:ro" in service["volumes"]
    assert relay["user"] == f"{daemon.pw_uid}:{daemon.pw_gid}"
    for each in (service, relay):
        assert each["read_only"] is True
        assert each["cap_drop"] == ["ALL"]
    text = (tmp_path / "u" / "Dockerfile").read_text("utf-8")
    assert "FROM python:3.11-slim" in text
    assert "useradd" in text


def test_head_offices_container_publishes_its_port_alone(head: Path, tmp_path: Path) -> None:
    assert run("server", "units", str(tmp_path / "u"), "--home", str(head)).exit_code == 0
    file = yaml.safe_load((tmp_path / "u" / "compose.yaml").read_text("utf-8"))
    assert file["services"]["fedllm-server"]["ports"] == ["9192:9192"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_units(head: Path, site: Path, tmp_path: Path) -> None:
    assert run("server", "units", str(tmp_path / "u"), "--home", str(head)).exit_code == 0
    assert run("site", "units", str(tmp_path / "one"), "--one-user", "--home", str(site)).exit_code == 0
    assert with_relay(site, tmp_path / "two").exit_code == 0
    tls = ("--trust", "/srv/keys", "--tls-cert", "/srv/c.pem", "--tls-key", "/srv/k.pem", "--user", "daemon")
    assert run("serve", "units", "/srv/release", *tls, "--to", str(tmp_path / "three")).exit_code == 0
    found = [str(path) for path in tmp_path.glob("*/*.service")]
    assert len(found) == 5
    for path in found:
        done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert path.rpartition("/")[2] not in done.stderr, done.stderr  # no complaint about a line of it


@pytest.mark.skipif(shutil.which("docker") is None, reason="docker is not installed")
def test_compose_takes_the_file(site: Path, tmp_path: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker has no compose here")
    assert with_relay(site, tmp_path / "u").exit_code == 0
    done = subprocess.run(
        ["docker", "compose", "-f", str(tmp_path / "u" / "compose.yaml"), "config", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_nothing_is_overwritten_and_mistakes_are_named(site: Path, tmp_path: Path) -> None:
    assert with_relay(site, tmp_path / "u").exit_code == 0
    assert "Nothing was overwritten" in str(with_relay(site, tmp_path / "u").exception)
    assert "useradd" in str(with_relay(site, tmp_path / "v", "--relay-user", "no-such-user").exception)
    assert "take another" in str(with_relay(site, tmp_path / "v", "--relay-user", ME).exception)
    values = json.loads((site / "site.yaml").read_text())
    write_secret(site / "site.yaml", json.dumps({**values, "socket_group": None}).encode())
    assert "socket_group" in str(with_relay(site, tmp_path / "v").exception)
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize(
    ("word", "quoted"), [("/a/b", "/a/b"), ("/a b", '"/a b"'), ("/100%", "/100%%"), ('/"', '"/\\""'), ("/$x", "/$$x")]
)
def test_paths_are_quoted_as_systemd_reads_them(word: str, quoted: str) -> None:
    text = service_files.service(ServiceSpec("n", "w", ("--home", word), ME, (Path("/x"),)))
    assert f"--home {quoted}\n" in text


def test_homes_and_temporary_folders_stay_reachable_where_they_are_used() -> None:
    text = service_files.service(ServiceSpec("n", "w", (), ME, (Path("/home/x"),)))
    assert "ProtectHome=read-only" in text
    text = service_files.service(ServiceSpec("n", "w", (), ME, (Path("/tmp/x"),)))
    assert "PrivateTmp=no" in text
    assert "PrivateTmp=yes" in service_files.service(ServiceSpec("n", "w", (), ME, (Path("/srv/x"),)))
    assert "PrivateDevices=no" in service_files.service(ServiceSpec("n", "w", (), ME, (Path("/srv/x"),), devices=True))
