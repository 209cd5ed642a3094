"""`fedllm serve`: answers of a released model, and the tokens of those who may ask.

An entry point: it may import anything, and imports late so that --help is quick.
"""

import math
import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperGroup

from fedllm.cli.enrolment import SERVING, absolute, keep_private
from fedllm.cli.release import DestArgument, TrustOption
from fedllm.cli.runs import write_units
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from fedllm.release.serve import Access

_EXTRA = ("fastapi", "uvicorn", "openai")
_QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


class _Serve(TyperGroup):
    """`fedllm serve DEST` is `fedllm serve run DEST`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put the command in that was left out."""
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


serve_app = typer.Typer(
    cls=_Serve,
    help="Serve a release at a site, by an API in OpenAI's form, over TLS: fedllm serve DEST --trust KEYS ...\n\n"
    "fedllm serve DEST is short for fedllm serve run DEST, whose --help has all options.",
    no_args_is_help=True,
    callback=keep_private,
)
token_app = typer.Typer(help="Who may ask: bearer tokens, each with a name.", no_args_is_help=True)
serve_app.add_typer(token_app, name="token")

_Home = Annotated[
    Path, typer.Option("--home", envvar="FEDLLM_HOME", help="Folder of the tokens, and of notes for fedllm doctor.",
                       show_default="~/.fedllm/serve")
]  # fmt: skip
_Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0: every network.")]
_Port = Annotated[int, typer.Option("--port", help="Port to listen on; 0: any free one.", min=0, max=65535)]
_Name = Annotated[str, typer.Argument(help="Whose token, such as desk-3.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.add_typer(serve_app, name="serve")


@serve_app.command("run")
def run(
    dest: DestArgument,
    trust: TrustOption,
    host: _Host = "127.0.0.1",
    port: _Port = 8443,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="The server's certificate, PEM.", show_default=False)
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key, PEM.", show_default=False)] = None,
    office: Annotated[
        Path | None, typer.Option("--office", help="A site's folder, whose grant has a certificate to serve with.",
                                  show_default=False)
    ] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="PEM: demand client certificates of this authority.",
                                  show_default=False)
    ] = None,
    plaintext: Annotated[bool, typer.Option("--plaintext", help="No TLS; on loopback only.")] = False,
    max_epsilon: Annotated[
        float | None, typer.Option("--max-epsilon", help="Refuse a model that promises less; inf: also one that is "
                                   "NOT PRIVATE.", show_default="any that is finite")
    ] = None,
    allow_unverified: Annotated[
        bool, typer.Option("--allow-unverified", help="Serve a model, too, whose audit could not verify its epsilon.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Most tokens of prompt and answer together.", min=2,
                                 show_default="what the model takes, at most 4096")
    ] = None,
    max_body: Annotated[int, typer.Option("--max-body", help="Most bytes of a request.", min=1024)] = 262_144,
    concurrency: Annotated[
        int, typer.Option("--concurrency", help="Answers at once; eight times as many may wait.", min=1, max=1024)
    ] = 32,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds of a request, with waiting.", min=1)] = 120.0,
    home: _Home = SERVING,
) -> None:  # fmt: skip
    """Serve a release until the process is stopped. First, its manifest and every file are verified.

    Questions and answers are written nowhere. The log, on standard output, has one line for each request: time, status,
    route, whose token, numbers of tokens, milliseconds.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing here. Install what serving needs: pip install 'fedllm[serve]'")
    from fedllm.audit.trust import Trust
    from fedllm.release.manifest import verify_release

    if not math.isfinite(timeout):
        raise ConfigError(f"--timeout={timeout}: expected seconds, 1 or more")
    place = absolute(home)
    certificate, key = _certificate(tls_cert, tls_key, office, plaintext)
    manifest = verify_release(dest, Trust.read(trust))
    os.environ.update(_QUIET)
    typer.echo(f"loading {manifest.name} from {dest}")
    from fedllm.release import serve
    from fedllm.release.loading import load_release
    from fedllm.release.tokens import TOKENS

    serve.check_epsilon(manifest, max_epsilon, allow_unverified)
    access = serve.Access(host, port, place / TOKENS, certificate, key, client_ca)
    serve.check_access(access)
    release = load_release(dest.absolute(), manifest)
    room = serve.positions(release)
    if max_tokens is not None and max_tokens > room:
        raise ConfigError(f"--max-tokens={max_tokens}: the model takes at most {room}")
    limits = serve.Limits(max_tokens or room, max_body, concurrency, timeout)

    def ready(url: str) -> None:
        _note(place, dest.absolute(), trust.absolute(), url, access)
        privacy = manifest.privacy
        unsure = ", which its audit could not verify" if privacy.private and privacy.verdict != "within" else ""
        typer.echo(f"serving {manifest.name} ({privacy.said}{unsure}) at {url}")

    serve.run(release, access, limits, ready)
    typer.echo("stopped")


def _certificate(
    cert: Path | None, key: Path | None, office: Path | None, plaintext: bool
) -> tuple[Path | None, Path | None]:
    """Return the files of the certificate to serve with; raises ConfigError unless there is one way."""
    ways = [cert is not None or key is not None, office is not None, plaintext]
    if sum(ways) != 1:
        raise ConfigError(
            "the line is encrypted by a certificate: give --tls-cert and --tls-key, or --office FOLDER with the one of "
            "the grant; or --plaintext, on loopback only. One of them."
        )
    if office is None:
        return cert, key
    from client.office import Office

    found = Office.open(absolute(office))
    _ = found.coordinators  # without a grant there is no certificate: its error says how to get one
    return found.in_use.serving_file.with_suffix(".pem"), found.in_use.serving_file


def _note(home: Path, dest: Path, trust: Path, url: str, access: "Access") -> None:
    """Write down for `fedllm doctor` what is served, and where."""
    from fedllm.files import write_secret
    from fedllm.release.doctor import SERVING as FILE
    from fedllm.release.doctor import Serving

    served = Serving(
        release=str(dest), trust=str(trust), url=url, pid=os.getpid(),
        certificate=None if access.certificate is None else str(access.certificate.absolute()),
        key=None if access.key is None else str(access.key.absolute()),
    )  # fmt: skip
    write_secret(home / FILE, served.model_dump_json(indent=1).encode() + b"\n")


@serve_app.command("units")
def units(
    dest: DestArgument,
    trust: TrustOption,
    tls_cert: Annotated[Path, typer.Option("--tls-cert", help="The server's certificate, PEM.", show_default=False)],
    tls_key: Annotated[Path, typer.Option("--tls-key", help="Its key, PEM.", show_default=False)],
    folder: Annotated[Path, typer.Option("--to", help="Folder to write them to.")] = Path("fedllm-units"),
    user: Annotated[str, typer.Option("--user", help="System user that serves, and nothing else.")] = "fedllm-serve",
    place: Annotated[Path, typer.Option("--place", help="That user's folder, for its tokens.")] = Path(
        "/var/lib/fedllm-serve"
    ),
    host: _Host = "0.0.0.0",  # noqa: S104  # a service is for others; TLS and tokens protect it
    port: _Port = 8443,
    hide: Annotated[
        list[Path] | None, typer.Option("--hide", help="A folder that the service must not see: records, a site's.",
                                        show_default=False)
    ] = None,
) -> None:  # fmt: skip
    """Write a systemd unit and a compose file for serving, by a user that sees neither records nor a site's keys."""
    from fedllm.ops import service_files

    service_files.check_account(user, None)
    reads = tuple(path.expanduser().absolute() for path in (dest, trust, tls_cert, tls_key))
    named = dict(zip(("--trust", "--tls-cert", "--tls-key"), reads[1:], strict=True))
    options = [word for name, path in named.items() for word in (name, str(path))]
    outside = tuple(path for path in reads if not path.is_relative_to(place))
    unit = service_files.ServiceSpec(
        "fedllm-serve", "Answers of a released model", ("serve", "run", str(reads[0]), *options, "--home", str(place),
        "--host", host, "--port", str(port)), user, (place,), outside,
        hidden=tuple(path.expanduser().absolute() for path in hide or ()),
        devices=Path("/dev/nvidiactl").exists(), forgets=True,
    )  # fmt: skip
    write_units(folder, [unit], [], service_files.compose([unit], {unit.name: port}), extra="serve")
    typer.echo(f"before: install -d -o {user} -m 700 {place}")
    typer.echo(f"and: sudo -u {user} fedllm serve token add NAME --home {place}")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@token_app.command("add")
def token_add(name: _Name, home: _Home = SERVING) -> None:
    """Make a token and print it once; only its digest is kept."""
    from fedllm.release.tokens import TOKENS, add_token

    typer.echo(add_token(absolute(home) / TOKENS, name))


@token_app.command("list")
def token_list(home: _Home = SERVING) -> None:
    """List the tokens that are valid, by name, and since when."""
    from fedllm.release.tokens import TOKENS, read_tokens

    tokens = read_tokens(absolute(home) / TOKENS)
    for name, token in sorted(tokens.items()):
        typer.echo(f"{name}  since {token.made:%Y-%m-%d %H:%M} UTC")
    if not tokens:
        typer.echo("nobody has a token: fedllm serve token add NAME")


@token_app.command("revoke")
def token_revoke(name: _Name, home: _Home = SERVING) -> None:
    """Refuse a token from now on; a running server notices within a second."""
    from fedllm.release.tokens import TOKENS, revoke_token

    revoke_token(absolute(home) / TOKENS, name)
    typer.echo(f"the token of {name} is refused from now on")
