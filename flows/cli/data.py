"""Commands for data sets: import what others have published, see what there is, check it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from flows.console import FAILED, choose_by_name, console, fail, failures, prepare_settings, work_here, wrong_use

if TYPE_CHECKING:
    from proxyrob.shards import FoundSet, ShardManifest
    from proxyrob.storage import DataPlace

app = typer.Typer(name="data", no_args_is_help=True, help="See and check sets of synthetic images.")

AtOption = Annotated[
    str | None, typer.Option("--at", help="Another place: s3://bucket/prefix or a folder. Default: `PROXYROB_DATA`.")
]
SetArgument = Annotated[
    str, typer.Argument(metavar="SET", help="A set as `data ls` names it, or the beginning of a name's end.")
]


def import_set(
    path: Annotated[Path, typer.Argument(help="A .bin, .npz, .npy or .parquet file, a pattern of such, or a folder.")],
    name: Annotated[str, typer.Option(help="What to call the set: small letters, digits and dashes.")],
    labels: Annotated[Path | None, typer.Option(help="Labels (.npy) of images that have none of their own.")] = None,
    shape: Annotated[str | None, typer.Option(metavar="HxWxC", help="Size of the images, e.g. 32x32x3.")] = None,
    classes: Annotated[int | None, typer.Option(min=1, help="Number of classes, where the file does not name them.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Published hash of the file, checked before anything is written.")] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Images in a shard.")] = 10_000,
) -> None:
    """Import a published sample set into shards: the paper's .bin, .npz of EDM-based work, parquet, folders of images.

    Reads once, in flat memory. An import that was interrupted goes on: give the same command again.
    """
    with wrong_use():
        image_shape = None if shape is None else _parse_shape(shape)
        _require_name(name)
    settings = prepare_settings()
    from proxyrob.proxy import import_samples

    place = settings.sets.below(name)
    report = work_here(
        import_samples,
        "import",
        path=path.absolute(),
        place=place,
        labels=None if labels is None else labels.absolute(),
        image_shape=image_shape,
        num_classes=classes,
        sha256=sha256,
        shard_size=shard_size,
    )
    size = _size(report.image_shape)
    console.print(
        f"[green]✔[/] {report.num_images:,} images of {size} in {report.num_shards} shards at {place.uri}", soft_wrap=True
    )
    if report.class_counts:
        counts = report.class_counts
        console.print(f"  labels: {len(counts)} classes, {min(counts):,} to {max(counts):,} images each")
    else:
        console.print("  no labels: train with `--set proxy.labels=labelers`")
    if report.constant_images:
        console.print(f"  [yellow]{report.constant_images:,} images are of one single colour[/]")
    console.print(f"\n[bold]proxyrob run PRESET --set proxy.kind=published --set proxy.name={name}[/]", soft_wrap=True)


@app.command("ls")
def list_sets(at: AtOption = None) -> None:
    """List the sets of a place: imported ones below `sets/`, samples of our own proxies below `samples/`."""
    place = _place(at)
    from proxyrob.shards import find_sets

    with failures():
        sets = find_sets(place)
    if not sets:
        console.print(f"no sets of images at {place.uri}; `proxyrob import` brings one, `proxyrob run` samples one")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("set", "images", "size", "shards", "bytes", "labels"):
        table.add_column(heading, justify="left" if heading in ("set", "labels") else "right", no_wrap=heading == "set")
    for found in sets:
        manifest = found.manifest
        images = "unfinished" if manifest is None else f"{manifest.num_images:,}"
        size = "" if manifest is None else _size(manifest.image_shape)
        table.add_row(
            escape(found.name),
            images,
            size,
            f"{found.num_shards:,}",
            _bytes(found.size_bytes),
            ", ".join(label[:8] for label in found.labels),
        )
    console.print(table)
    console.print(f"[dim]{place.uri}[/]", soft_wrap=True)


@app.command("show")
def show_set(
    name: SetArgument,
    at: AtOption = None,
    sheet: Annotated[Path | None, typer.Option(help="Where to draw a contact sheet (PNG). Default: below the home.")] = None,
) -> None:
    """Show a set: where it comes from, images of each class, what a filter dropped and why, and a contact sheet."""
    settings = prepare_settings()
    place, found = _find_set(name, at)
    assert found.manifest is not None
    manifest = found.manifest
    from proxyrob.figures import draw_set
    from proxyrob.label import suspicious_shards
    from proxyrob.shards import count_reasons, read_side_index

    console.print(f"[bold]{escape(found.name)}[/]  {place.uri}", soft_wrap=True)
    console.print(f"  {manifest.num_images:,} images of {_size(manifest.image_shape)} in {len(manifest.shards):,} shards")
    console.print(f"  {_made_by(manifest)}, seed {manifest.seed}: {_settings(manifest.sampler)}", soft_wrap=True)
    with failures():
        for labels in found.labels:
            index = read_side_index(place.below(f"labels/{labels}"), manifest)
            dropped = sum(index.dropped_per_class)
            console.print(f"\n[bold]labels/{labels}[/]  {_settings(index.labeler)}", soft_wrap=True)
            table = Table(box=None, padding=(0, 2), header_style="bold")
            for heading in ("class", "kept", "dropped"):
                table.add_column(heading, justify="left" if heading == "class" else "right")
            for label, kept, lost in zip(index.class_names, index.kept_per_class, index.dropped_per_class, strict=True):
                table.add_row(escape(label), f"{kept:,}", f"{lost:,}")
            console.print(table)
            console.print(f"  dropped: {dropped:,} of {index.num_images:,} ({100 * dropped / index.num_images:.2f} %)")
            for (kept, reason), count in count_reasons(place.below(f"labels/{labels}"), index).items():  # pyright: ignore[reportGeneralTypeIssues]  (the index has two levels)
                console.print(f"    {'kept' if kept else 'dropped'}: {reason}: {count:,}")
            if odd := suspicious_shards(index):
                console.print(f"  [yellow]classes far off their share in {len(odd)} shard(s): {', '.join(odd[:5])}[/]")
        target = sheet or settings.home / "sheets" / f"{found.name.replace('/', '-')}.png"
        labels_at = place.below(f"labels/{found.labels[0]}") if found.labels else None
        draw_set(target.absolute(), place, labels_at)
    console.print(f"\n[green]✔[/] contact sheet: {target.absolute()}", soft_wrap=True)


@app.command("verify")
def check_set(
    name: SetArgument,
    at: AtOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="PRESET", help="Also look for near-duplicates of the test images of this preset.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Delete what is damaged, so that the next run or import makes only that again.")
    ] = False,
) -> None:
    """Read every file of a set and check its hash; exit code 1 when something is wrong."""
    place, found = _find_set(name, at)
    from proxyrob.shards import verify_set

    report = work_here(verify_set, "verify", place=place, labels=found.labels)
    for finding in report.findings:
        console.print(f"[red]{finding.state}[/]  {finding.key}  expected sha256 {finding.expected_sha256}", soft_wrap=True)
        if repair and finding.state == "damaged":
            place.open().delete(finding.key)
    faults = len(report.findings)
    if not faults:
        console.print(f"[green]✔[/] {report.num_files:,} files, {_bytes(report.size_bytes)}: every hash is as recorded")
    copies = _count_copies(place, against) if against and not faults else 0
    if faults:
        remedy = "the damaged files are deleted: run or import again" if repair else "`--repair` deletes what is damaged"
        fail(f"{faults} of {report.num_files} files are not whole; {remedy}", FAILED)
    if copies:
        fail(f"{copies:,} images are near-duplicates of test images of {against}; training leaves them out", FAILED)


def _count_copies(place: "DataPlace", preset: str) -> int:
    settings = prepare_settings()
    from flows.plan import pin_config, source_stage
    from proxyrob.config import load_config
    from proxyrob.device import resolve_device
    from proxyrob.label import find_leaks
    from proxyrob.source import prepare_source

    with wrong_use():
        config = load_config(preset)
    with failures():
        source = source_stage(config := pin_config(config, settings), settings.store)
    given: dict[str, Any] = {"config": config.source, "seed": config.seed, "downloads": settings.downloads}
    work_here(prepare_source, "source", stage=source, **given)
    device = str(resolve_device(settings.device))
    report = work_here(find_leaks, "near-duplicates", source=source, images=place, device=device)
    for image, row in report.pairs[:10]:
        console.print(f"  image {image} is test image {row} of {preset}, or nearly")
    sign = "[yellow]✘[/]" if report.num_copies else "[green]✔[/]"
    console.print(
        f"{sign} {report.num_copies:,} of {report.num_images:,} images differ "
        f"from a test image of {preset} by less than {255 * report.max_rms:.0f} of 255 levels (root mean square)"
    )
    return report.num_copies


def _place(at: str | None) -> "DataPlace":
    settings = prepare_settings()
    return settings.place if at is None else settings.replace_data(at).place


def _find_set(name: str, at: str | None) -> "tuple[DataPlace, FoundSet]":
    """A set by its name, or by the beginning of the last part of its name where that is clear."""
    place = _place(at)
    from proxyrob.shards import at as inside
    from proxyrob.shards import find_sets

    with failures():
        sets = find_sets(place)
    with wrong_use():
        chosen = choose_by_name(name, {found.name: found for found in sets}, "set", f"at {place.uri}")
        if chosen.manifest is None:
            raise ValueError(f"the set {chosen.name!r} is unfinished; give the command that makes it again")
    return inside(place, chosen.name), chosen


def _parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"--shape: expected height x width x channels such as 32x32x3, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _require_name(name: str) -> None:
    from pydantic import ValidationError

    from proxyrob.config import PublishedProxy
    from proxyrob.config.load import explain

    try:
        PublishedProxy(name=name)
    except ValidationError as error:
        raise ValueError(f"--name: {explain(error)}") from error


def _made_by(manifest: "ShardManifest") -> str:
    """The generator: a digest, shortened, or a published file."""
    kind = manifest.sampler.get("kind", "generator")
    return escape(manifest.generator if kind == "imported" else f"{kind} proxy {manifest.generator[:12]}")


def _settings(settings: dict[str, Any]) -> str:
    """``key=value``, digests shortened."""
    parts = []
    for key, value in settings.items():
        shown = [str(part)[:12] for part in value] if isinstance(value, list) else [str(value)[:40]]
        parts.append(f"{key}={'/'.join(shown)}")
    return escape(", ".join(parts))


def _size(shape: tuple[int, int, int]) -> str:
    return "×".join(str(side) for side in shape)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
