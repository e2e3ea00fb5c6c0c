"""Commands of production on one host: start the stack, look at it, end it, apply the deployments."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.console import FAILED, WRONG_USE, console, fail, failures, prepare_settings, wrong_use

if TYPE_CHECKING:
    from flows.stack.state import State

PATIENCE_S = 180.0
GIVE_UP_RESTARTS = 3
LOG_LINES = 15

PoolOption = Annotated[
    list[str] | None, typer.Option("--pool", help="A work pool to serve. May be repeated. Default: cpu and gpu.")
]
CONDITIONS = {
    "ready": "[green]✔[/]",
    "done": "[green]✔[/]",
    "starting": "[yellow]…[/]",
    "waiting": "[dim]…[/]",
    "down": "[red]✘[/]",
}


def up(
    prefect_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of Prefect on 127.0.0.1; 0: any.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of MLflow on 127.0.0.1; 0: any.")] = 5000,
    pool: PoolOption = None,
    foreground: Annotated[bool, typer.Option(help="Stay, and end the stack when this command ends.")] = False,
) -> None:
    """Start Prefect, MLflow, workers and deployments on this host, as one stack that `proxyrob down` ends.

    All of it listens on loopback alone and keeps its data below PROXYROB_HOME. A supervisor starts again what dies.
    """
    settings = prepare_settings()
    from flows.stack.services import POOLS
    from flows.stack.state import end_parts, forget_state, free_port, is_free, read_state

    pools = tuple(pool or POOLS)
    with wrong_use():
        for name in pools:
            if name not in POOLS:
                raise ValueError(f"expected a pool out of {', '.join(POOLS)}, got {name!r}")
        state = read_state(settings)
    if state is not None and state.supervisor.find() is not None:
        console.print("a stack is running already")
        _print_use(state)
        return
    if state is not None:
        console.print("an earlier stack was not ended in order: ending what is left of it")
        end_parts(state)
        forget_state(settings)
    ports = []
    for name, port, option in (("Prefect", prefect_port, "prefect-port"), ("MLflow", mlflow_port, "mlflow-port")):
        if port and not is_free(port):
            from flows.stack.processes import find_listener

            holder = find_listener(port) or "another program"
            fail(
                f"port {port} of 127.0.0.1, for {name}, is taken by {holder}; end that, or give another: --{option} 0",
                WRONG_USE,
            )
        ports.append(port or free_port())
    if foreground:
        from flows.stack.supervisor import supervise

        threading.Thread(target=_await, args=(settings, None), daemon=True).start()
        with failures():
            supervise(ports[0], ports[1], pools)
        return
    settings.stack.joinpath("logs").mkdir(parents=True, exist_ok=True)
    with (settings.stack / "logs" / "supervisor.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "flows.stack.supervisor", *map(str, ports), *pools],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=settings.stack,
            start_new_session=True,
        )
    if not _await(settings, child):
        raise typer.Exit(FAILED)


def status() -> None:
    """Show the processes of the stack: condition, process number, for how long, restarts."""
    settings = prepare_settings()
    from flows.stack.state import age_of, log_of, read_state

    with wrong_use():
        state = read_state(settings)
    if state is None:
        console.print(
            f"no stack is running below {settings.home.absolute()}; start one with [bold]proxyrob up[/]", soft_wrap=True
        )
        raise typer.Exit(FAILED)
    supervisor = state.supervisor.find()
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("", "process", "condition", "number", "since", "restarts", "log"):
        table.add_column(heading, overflow="fold")
    row = ("ready", str(state.supervisor.pid)) if supervisor else ("down", "")
    table.add_row(CONDITIONS[row[0]], "supervisor", *row, age_of(state.started_at), "", "logs/supervisor.log")
    for part in state.parts:
        running = part.process is not None and part.process.find() is not None
        condition = part.condition if running or part.condition in {"done", "waiting", "down"} else "down"
        shown = f"{condition} ({part.fault})" if part.fault and condition != "ready" else condition
        number = str(part.process.pid) if running and part.process else ""
        log = log_of(settings, part.name).relative_to(settings.stack)
        table.add_row(CONDITIONS[condition], part.name, shown, number, age_of(part.since), str(part.restarts or ""), str(log))
    console.print(table)
    _print_use(state)
    console.print(f"[dim]{settings.stack}[/]", soft_wrap=True)
    if supervisor is None:
        console.print(
            "[red]the supervisor has died[/]: what runs goes on, and nothing is started again; proxyrob down, proxyrob up"
        )
    if not state.is_up:
        raise typer.Exit(FAILED)


def down() -> None:
    """End the stack: workers first (a training writes a checkpoint), then the servers, then whatever is left."""
    settings = prepare_settings()
    from flows.stack.processes import wait_until_ended
    from flows.stack.state import RUNS_END_S, SERVERS_END_S, WORKERS_END_S, end_parts, forget_state, read_state

    with wrong_use():
        state = read_state(settings)
    if state is None:
        console.print("no stack is running")
        return
    started = time.monotonic()
    supervisor = state.supervisor.find()
    with console.status("ending workers and servers …"):
        if supervisor is not None:
            supervisor.terminate()
            if not wait_until_ended(supervisor, RUNS_END_S + WORKERS_END_S + SERVERS_END_S + 20):
                supervisor.kill()
        left = end_parts(read_state(settings) or state)
        forget_state(settings)
    console.print(f"[green]✔[/] the stack has ended, in {time.monotonic() - started:.0f} s")
    if left:
        console.print(f"{left} processes did not end when asked, and were killed")


def doctor() -> None:
    """Look for what is wrong (processes, ports, servers, workers, slots, versions, disk, S3) and say what to do about each."""
    settings = prepare_settings()
    from flows.stack.doctor import examine

    marks = {"fine": "[green]✔[/]", "note": "[yellow]·[/]", "problem": "[red]✘[/]"}
    problems = 0
    with failures():
        for found in examine(settings):
            console.print(f"{marks[found.outcome]} {found.subject}: {escape(found.finding)}", highlight=False, soft_wrap=True)
            if found.remedy:
                console.print(f"    → {escape(found.remedy)}", highlight=False, soft_wrap=True)
            problems += found.outcome == "problem"
    if problems:
        console.print(f"\n{problems} problem{'s' if problems > 1 else ''}")
        raise typer.Exit(FAILED)


def serve(
    service: Annotated[str, typer.Argument(help="`prefect`, `mlflow` or `worker`.")],
    pool: Annotated[str | None, typer.Option(help="The work pool of a worker.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Flow runs that a worker has at once. Default: the pool's.")] = None,
) -> None:
    """Become one server or worker, with the settings that production needs: for containers and for systemd.

    Addresses, databases and stores come from the variables that Prefect and MLflow read.
    """
    settings = prepare_settings()
    from flows.stack.services import describe_service

    with wrong_use():
        command = describe_service(service, settings, pool=pool, limit=limit)
    settings.stack.mkdir(parents=True, exist_ok=True)
    os.execve(command.arguments[0], command.arguments, command.environment)


def deploy(
    file: Annotated[Path | None, typer.Option(help="Another file than deployments/prefect.yaml.")] = None,
    schedules: Annotated[
        bool | None,
        typer.Option("--schedules/--no-schedules", help="Switch all schedules on or off. Without it they stay as they are."),
    ] = None,
) -> None:
    """Tell the Prefect server at PREFECT_API_URL of our work pools, deployments, schedules, automations and whom to notify.

    May be given again at any time: it changes what differs from the file, and leaves alone what others made.
    """
    settings = prepare_settings()
    if not os.environ.get("PREFECT_API_URL"):
        fail("PREFECT_API_URL is not set: start a stack with 'proxyrob up' and export what it prints", WRONG_USE)
    with wrong_use():
        notify_url = settings.webhook
    import asyncio

    from flows.stack.deployments import apply_deployments, default_file, read_deployments

    with failures():
        read = read_deployments(file or default_file())
        applied = asyncio.run(apply_deployments(read, schedules=schedules, notify_url=notify_url))
    for kind, names in (("work pool", applied.pools), ("deployment", applied.deployments), ("automation", applied.automations)):
        for name in names:
            console.print(f"[green]✔[/] {kind:<10}  {name}", highlight=False, soft_wrap=True)
    for name, on in applied.schedules.items():
        console.print(f"[green]✔[/] schedule    {name}: {'on' if on else 'off'}", highlight=False, soft_wrap=True)
    if not any(applied.schedules.values()):
        console.print("[dim]Schedules are off: switch one on in Prefect's pages, or all with --schedules[/]")


def _await(settings: Any, child: "subprocess.Popen[bytes] | None") -> bool:
    """Show what is waited for until all is ready; whether it became so."""
    from flows.stack.state import log_of, read_state

    started, told, name = time.monotonic(), set(), "supervisor"
    with console.status("starting …") as shown:
        while True:
            state = read_state(settings)
            for part in state.parts if state else ():
                if part.condition in {"ready", "done"} and part.name not in told:
                    told.add(part.name)
                    console.print(
                        f"[green]✔[/] {part.name:<12} {part.condition:<6}{part.ready_after_s or 0:6.1f} s", highlight=False
                    )
            if state is not None and state.is_up:
                break
            waited = time.monotonic() - started
            open_parts = [part for part in state.parts if part.name not in told] if state else []
            shown.update(
                f"waiting {waited:.0f} s for "
                + (", ".join(f"{part.name} ({part.condition})" for part in open_parts) or "the supervisor")
            )
            failing = next((part for part in open_parts if part.restarts >= GIVE_UP_RESTARTS), None)
            dead = child is not None and child.poll() is not None
            if dead or failing is not None or waited > PATIENCE_S:
                name = failing.name if failing else "supervisor" if dead or not open_parts else open_parts[0].name
                break
            time.sleep(0.3)
    if state is not None and state.is_up:
        console.print(f"the stack is up, after {time.monotonic() - started:.0f} s")
        _print_use(state)
        return True
    log = log_of(settings, name)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]) if log.is_file() else ""
    console.print(f"[red]✘[/] {name} is not ready after {time.monotonic() - started:.0f} s. The end of {log}:", soft_wrap=True)
    console.print(escape(tail), highlight=False, soft_wrap=True)
    console.print("What has started goes on: [bold]proxyrob status[/], [bold]proxyrob doctor[/], [bold]proxyrob down[/]")
    return False


def _print_use(state: "State") -> None:
    console.print(f"\nPrefect  {state.prefect_url}\nMLflow   {state.mlflow_url}\n\nTo use it from a shell:", highlight=False)
    for name, value in state.exports.items():
        console.print(f"  export {name}={value}", highlight=False, soft_wrap=True)
    from flows.stack.services import without_server_secrets

    needed = [name for name in without_server_secrets(os.environ) if name not in os.environ]
    if needed:
        console.print(f"and {', '.join(sorted(needed))}: the servers ask who you are", highlight=False, soft_wrap=True)
