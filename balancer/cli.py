"""The command groundserve: parsing only; balancer/operate does what it says."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from balancer.errors import ConfigError
from balancer.inherited import nobody_looks, settle
from balancer.operate.commands import accounts, boot, change, events, manifests, models, show, sky_flags, variables
from balancer.operate.commands.admin_port import AdminPort
from balancer.operate.commands.begin import Source
from balancer.operate.engines.addresses import AddressFlags
from balancer.operate.engines.choose import AUTO, ENGINES
from balancer.spec.secret_names import is_secret

# Why a write fails that was allowed: a full disk or quota, a file too large, a terminal that is gone.
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: failed, with one line that says what is wrong and what to do; 2: wrong usage.

    `status` has two more, for services that do not fare well (commands/show.py).
    """
    settle()
    try:
        try:
            return _main(arguments)
        finally:
            sys.stdout.flush()  # here it can be told that this fails
    except BrokenPipeError:
        # The reader of our output has seen enough. Without this, Python would complain when it flushes at exit.
        nobody_looks(sys.stdout)
        return 0
    except OSError as failure:
        if failure.errno not in _UNWRITABLE:
            raise
        nobody_looks(sys.stdout)
        print(f"groundserve: {failure.filename or 'its output'}: {failure.strerror}", file=sys.stderr)
        return 1


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    if wrong := _wrong_usage(options):
        options.end_with_usage(wrong)
    try:
        return _run(options)
    except ConfigError as failure:
        print(f"groundserve: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _wrong_usage(options: argparse.Namespace) -> str:
    """What cannot be said together, beyond what argparse knows; empty if all is well."""
    match options.command:
        case "down":
            if bool(options.names) == options.all:
                return "give the NAMEs of services, or --all"
            if options.replica_id is not None and len(options.names) != 1:
                return "--replica-id wants the NAME of one service"
            if options.balancer and (len(options.names) != 1 or options.replica_id is not None):
                return "--balancer wants the NAME of one service and nothing else"
        case "update" if bool(options.service) == options.abort:
            return "give a SERVICE.yaml, or --abort"
        case "check" if options.service_name and len(options.service) > 1:
            return "-n names one service, and there are several files"
        case "up":
            if options.join and any([options.listen, options.admin, options.api_keys, options.open]):
                return "--join takes the endpoint of another service as it is"
            if options.service_name and len(options.service) > 1:
                return "--service-name is for one service; give each file a `name:`"
    return ""


def _run(options: argparse.Namespace) -> int:
    match options.command:
        case "up":
            flags = AddressFlags(
                options.listen,
                options.admin,
                options.open,
                options.api_keys,
                options.admin_key,
                options.join,
                tuple(filter(None, options.balancers.split(","))),
            )
            sources = _sources(options)
            if len(sources) > 1:
                return change.up_together(sources, flags, options.on, is_detached=options.detach)
            return change.up(sources[0], flags, options.on, is_detached=options.detach)
        case "manifests":
            return manifests.manifests(
                _source(options),
                api_keys=options.api_keys,
                is_open=options.open,
                version=options.kubernetes,
                with_secrets=not options.no_secrets,
            )
        case "enable":
            return boot.enable(options.name, is_users=options.user, secret_files=options.secret_file)
        case "disable":
            return boot.disable(options.name, is_users=options.user)
        case "check":
            return change.check(_sources(options), options.on)
        case "status":
            if options.admin_key:
                return show.admin_keys(options.names)
            how = show.Display(options.endpoint, options.json, options.verbose, options.watch)
            return show.status(options.names, how)
        case "scale":
            return change.scale(options.name, options.replicas)
        case "update":
            if options.abort:
                return change.abort(options.name)
            return change.update(options.name, _source(options), options.mode)
        case "keys":
            ports = AdminPort.all_of(options.service_name, options.admin_key)
            match options.action:
                case "add":
                    return accounts.add(ports, options.name, _wish(options))
                case "change":
                    return accounts.change(ports, options.name, _wish(options))
                case "rotate":
                    return accounts.rotate(ports, options.name)
                case "revoke":
                    return accounts.revoke(ports, options.name)
                case _:
                    return accounts.show_keys(ports, options.json)
        case "usage":
            ports = AdminPort.all_of(options.service_name, options.admin_key)
            return accounts.usage(ports, options.by, options.since, options.form)
        case "rollback":
            return change.rollback(options.name, options.version, options.mode)
        case "restart":
            return change.restart(options.name, options.replica_id)
        case "pull":
            return models.keep("pull", [f"--revision={options.revision}", "--", *options.models])
        case "models":
            if options.action == "remove":
                return models.remove(options.models, is_forced=options.force)
            return models.keep("list", [])
        case "export":
            return models.keep("export", ["--", *options.models, options.file])
        case "import":
            return models.keep("import", ["--", options.file])
        case "events":
            return events.events(options.names, options.follow, options.since, options.json)
        case "logs":
            return show.logs(options.name, options.ids, options.of, options.follow, options.tail)
        case _:
            return change.down(options.names, options.replica_id, options.balancer)


def _wish(options: argparse.Namespace) -> accounts.Wish:
    return accounts.Wish(**{name: getattr(options, name) for name in accounts.Wish.__dataclass_fields__})


def _sources(options: argparse.Namespace) -> list[Source]:
    """The files that were given. What they have in common is read once: it may be a pipe."""
    first = _source(options)
    return [replace(first, path=path) for path in options.service]


def _source(options: argparse.Namespace) -> Source:
    envs: dict[str, str] = {}
    for path in options.env_file:
        envs |= variables.of_file("--env-file", path)
    envs |= dict(variables.pair(text, "--env") for text in options.env)
    secrets = {name: envs.pop(name) for name in list(envs) if is_secret(name)}
    for path in options.secret_file:
        secrets |= variables.of_file("--secret-file", path)
    secrets |= dict(variables.pair(text, "--secret") for text in options.secret)
    return Source(options.service, getattr(options, "service_name", None), envs, secrets)


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        try:
            version = metadata.version("groundserve")
        except metadata.PackageNotFoundError:
            version = "of a checkout that is not installed"
        print(f"groundserve {version}")
        parser.exit()


class _Command(argparse.ArgumentParser):
    """The parser of one command, which takes flags before, after and between its arguments, as `sky` does."""

    takes_any_order = True

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        # What follows a "--" is no flag, whatever it looks like; argparse forgets that between its steps.
        if not self.takes_any_order or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        # argparse asks for each of its steps here again, as it comes to parse the flags and the arguments.
        self.takes_any_order = False
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self.takes_any_order = True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="groundserve",
        description="SkyServe for hardware you own: replicas of a model on this machine, behind one endpoint.",
        epilog="GROUNDSERVE_ADMIN: the admin port that `status`, `keys` and `usage` ask when nothing is up here "
        "(http://127.0.0.1:30002).",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show which version is installed, and exit")
    subcommands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Command)

    def command(name: str, text: str) -> _Command:
        parser = subcommands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
        )
        sky_flags.accept(parser, name)
        parser.set_defaults(end_with_usage=parser.error)
        return parser

    up = command("up", "start a service and stay in the foreground as its controller")
    _add_source(
        up, "a SkyServe service file; or the name of a service that is meant to run, to resume it", several=True
    )
    _add_name(up)
    up.add_argument("--join", metavar="NAME", type=_given, help="share the endpoint of this service, which is up")
    up.add_argument(
        "-d", "--detach", action="store_true", help="return once it is up, and keep running in the background"
    )
    _add_on(up)
    up.add_argument("--listen", metavar="HOST:PORT", help="the endpoint (default: 127.0.0.1, 30001 or the next free)")
    up.add_argument("--admin", metavar="HOST:PORT", help="the admin port (default: the port after the endpoint's)")
    up.add_argument("--api-keys", metavar="FILE", help="a file of client API keys, one per line")
    up.add_argument(
        "--admin-key",
        metavar="FILE",
        default=os.environ.get("BALANCER_ADMIN_KEY") or None,
        help="a file with the key for changes, keys and usage on the admin port (default: a generated key)",
    )
    up.add_argument(
        "--balancers",
        default="",
        metavar="HOST:PORT,...",
        help="admin ports of balancers that run already; --listen is the one address in front of them",
    )
    up.add_argument("--open", action="store_true", help="beyond loopback: let everyone use it without a key")
    up.add_argument("-y", "--yes", action="store_true", help="accepted as by sky serve; nothing is ever asked")

    status = command("status", "show services and their replicas")
    status.epilog = (
        "Exit status, for the service that fares worst: 0, as many replicas are ready as it should have; 3, it serves "
        "with fewer; 4, it does not serve, or that cannot be found out. With --endpoint: 0."
    )
    status.add_argument("names", nargs="*", metavar="NAME", help="which services; * and ? match (default: all)")
    status.add_argument("--endpoint", action="store_true", help="print only the service's endpoint")
    status.add_argument("--admin-key", action="store_true", help="print the path of the file with its admin key")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--watch", action="store_true", help="refresh every second")
    status.add_argument("-v", "--verbose", action="store_true", help="more columns")

    scale = command("scale", "change how many replicas a service has")
    scale.add_argument("name", metavar="NAME", type=_given)
    scale.add_argument("replicas", metavar="N", type=_count, help="the new number of replicas")

    update = command(
        "update", "update a running service from a file, and roll back if the new version does not become ready"
    )
    update.add_argument("name", metavar="NAME", type=_given)
    _add_source(update, is_optional=True)
    _add_mode(update)
    update.add_argument("--abort", action="store_true", help="go back from the update that is under way instead")
    update.add_argument("-y", "--yes", action="store_true", help="accepted as by sky serve; nothing is ever asked")

    rollback = command("rollback", "update a running service to the file of an earlier version")
    rollback.add_argument("name", metavar="NAME", type=_given)
    rollback.add_argument(
        "version", metavar="VERSION", type=_count, nargs="?", help="default: the one that served before"
    )
    _add_mode(rollback)

    restart = command("restart", "replace the replicas of a service by new ones, one after the other")
    restart.add_argument("name", metavar="NAME", type=_given)
    restart.add_argument("--replica-id", type=_count, metavar="N", help="only this replica")

    logs = command("logs", "show what the replicas of a service print")
    logs.add_argument("name", metavar="NAME", type=_given)
    logs.add_argument("ids", nargs="*", type=_count, metavar="ID", help="which replicas (default: all)")
    for flags, of in ((("--balancer", "--load-balancer"), "balancer"), (("--controller",), "controller")):
        logs.add_argument(
            *flags, dest="of", action="store_const", const=of, default="replicas", help=f"the {of}'s log instead"
        )
    logs.add_argument("-f", "--follow", action=argparse.BooleanOptionalAction, help="keep printing new lines")
    logs.add_argument("--tail", type=_count, metavar="N", help="print only the last N lines")

    told = command("events", "show what happened to services, with times")
    told.add_argument("names", nargs="*", metavar="NAME", help="which services; * and ? match (default: all)")
    told.add_argument("-f", "--follow", action=argparse.BooleanOptionalAction, help="keep printing new events")
    told.add_argument(
        "--since",
        type=events.start,
        default=0.0,
        metavar="WHEN",
        help="only what happened since: an age as 90s, 10m, 2h, 7d or 4w, or a time as 2026-03-01T14:30",
    )
    told.add_argument("--json", action="store_true", help="print JSON, an event a line")

    down = command("down", "take services down")
    down.add_argument("names", nargs="*", metavar="NAME", help="which services; * and ? match")
    down.add_argument("-a", "--all", action="store_true", help="all services")
    down.add_argument("--replica-id", type=_count, metavar="N", help="replace this one replica instead")
    down.add_argument("--balancer", action="store_true", help="replace the balancer instead, by the installed version")
    down.add_argument(
        "-p", "--purge", action="store_true", help="accepted as by sky serve; failed services go down without it"
    )
    down.add_argument("-y", "--yes", action="store_true", help="accepted as by sky serve; nothing is ever asked")

    _add_keys(command("keys", "give, list, change and revoke API keys"))

    usage = command("usage", "show what was used: requests and tokens, by key, model and time")
    usage.add_argument(
        "--by", default="key,model,day", metavar="WHAT", help="key, model, day, hour (default: %(default)s)"
    )
    usage.add_argument(
        "--since",
        default="30d",
        metavar="WHEN",
        help="an age as 24h, 30d or 4w, or a date or time (UTC, as the days are) (default: %(default)s)",
    )
    for form in ("json", "csv"):
        usage.add_argument(f"--{form}", dest="form", action="store_const", const=form, help=f"print {form.upper()}")
    usage.set_defaults(form="table")
    _add_where(usage)

    pull = command("pull", "fetch models to this machine, verified, or go on with what broke off")
    pull.add_argument("models", nargs="+", metavar="MODEL", help="a preset or a Hugging Face id")
    pull.add_argument("--revision", default="main", metavar="R", help="branch, tag or commit (default: main)")

    _add_models(command("models", "show the models on this machine, or remove some"))

    export = command("export", "write models into one file, for a machine without a network")
    export.add_argument("models", nargs="+", metavar="MODEL", help="a preset or a Hugging Face id, pulled before")
    export.add_argument("file", metavar="FILE.tar")

    take_in = command("import", "take in the models of such a file")
    take_in.add_argument("file", metavar="FILE.tar")

    for word, text in (
        ("enable", "bring a service up at boot, and again whenever it ends, by a systemd unit"),
        ("disable", "leave a service down at boot"),
    ):
        booted = command(word, text)
        booted.add_argument("name", metavar="NAME", type=_given, help="a service that is up, or meant to run here")
        booted.add_argument("--user", action="store_true", help="by your own systemd, not the machine's")
        if word == "enable":
            booted.add_argument(
                "--secret-file", action="append", default=[], type=Path, metavar="FILE", help="its secrets, K=V lines"
            )

    made = command("manifests", "print a service as YAML for Kubernetes, controller included, and start nothing")
    _add_source(made)
    _add_name(made)
    made.add_argument("--api-keys", metavar="FILE", help="a file of client API keys, one per line")
    made.add_argument("--open", action="store_true", help="let everyone who reaches the endpoint use it without a key")
    made.add_argument(
        "--kubernetes", default="1.37", metavar="VERSION", help="the cluster's, from 1.20 on (default: %(default)s)"
    )
    made.add_argument("--no-secrets", action="store_true", help="leave the Secrets out; docs/kubernetes.md names them")

    check = command(
        "check", "say what a service file would do here, or how several would share a GPU, and start nothing"
    )
    _add_source(check, several=True)
    _add_name(check)
    _add_on(check)
    return parser


def _add_keys(keys: _Command) -> None:
    keys.takes_any_order = False  # it has commands of its own
    actions = keys.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, text: str) -> argparse.ArgumentParser:
        parser = actions.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
        if name != "list":
            parser.add_argument("name", metavar="NAME", help="whose key it is")
        _add_where(parser)
        return parser

    _add_limits(action("add", "issue a key, and print it this once"))
    _add_limits(action("change", "give a key other limits; those that are not named stay, `none` takes one away"))
    action("list", "show the keys").add_argument("--json", action="store_true", help="print JSON")
    action("rotate", "give a key a new secret, and print it this once; the old one is refused from then on")
    action("revoke", "refuse a key from now on")


def _add_models(models: _Command) -> None:
    models.takes_any_order = False  # it has a command of its own
    actions = models.add_subparsers(dest="action", metavar="[ACTION]", help="without one: show them")
    text = "remove models from this machine, each with the others that it needs"
    remove = actions.add_parser("remove", help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    remove.add_argument("models", nargs="+", metavar="MODEL", help="as `groundserve models` names it, or a preset")
    remove.add_argument("--force", action="store_true", help="even if a service uses it that is meant to run here")


def _add_limits(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-in-flight", metavar="N", help="requests that it may have under way at once")
    parser.add_argument("--requests-per-minute", metavar="N", help="like 600")
    parser.add_argument("--requests-per-day", metavar="N", help="like 10k")
    parser.add_argument("--tokens-per-minute", metavar="N", help="of prompts and answers together, like 200k")
    parser.add_argument("--tokens-per-day", metavar="N", help="like 5M")
    parser.add_argument("--priority", choices=("interactive", "bulk"), help="bulk waits until no other does")
    parser.add_argument("--models", metavar="GLOBS", help="which models, like 'llava,llama*'; '*' is all")
    parser.add_argument("--expires", metavar="DATE", help="when it ends, like 2027-01-31 (UTC)")


def _add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--service-name", metavar="NAME", help="of which service (default: the only one here)")
    parser.add_argument("--admin-key", metavar="FILE", help="the admin key (default: that of the service here)")


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--service-name", metavar="NAME", help="default: the file's `name`, else its stem")


def _add_on(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on", choices=(AUTO, *ENGINES), default=AUTO, help="what runs the replicas (default: %(default)s)"
    )


def _add_mode(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mode", type=str.lower, choices=("rolling", "blue_green"), default="rolling", help="default: rolling"
    )


def _add_source(
    parser: argparse.ArgumentParser,
    text: str = "a SkyServe service file",
    *,
    several: bool = False,
    is_optional: bool = False,
) -> None:
    count = "+" if several else "?" if is_optional else None
    parser.add_argument("service", metavar="SERVICE.yaml", nargs=count, type=_given, help=text)
    parser.add_argument("--env", action="append", default=[], metavar="K=V", help="set one of the file's envs")
    parser.add_argument(
        "--env-file", action="append", default=[], type=Path, metavar="FILE", help="a file of K=V lines"
    )
    parser.add_argument("--secret", action="append", default=[], metavar="K=V", help="set one of its secrets")
    parser.add_argument(
        "--secret-file", action="append", default=[], type=Path, metavar="FILE", help="a file of K=V lines"
    )


def _given(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("is empty: a variable of the shell without a value?")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
