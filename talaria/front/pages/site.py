"""What every page needs: templates, whoever asks, forms as they come in, and errors as pages."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from talaria.front.access import SCOPE_KEY, Identity, Role
from talaria.front.api.asking import Reach
from talaria.front.api.errors import answer_to
from talaria.front.changes import ChangeCount
from talaria.front.formdata import NoForm, body, once, urlencoded
from talaria.front.pages.rows import FRESH_S, SAVED_S, Kept, read_fetched, read_targets, read_waiting, shown_as_rows
from talaria.front.pages.texts import job_kind, option_label, text
from talaria.front.static import asset, type_icon
from talaria.service import Office
from transfer import unitlist

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from prefect.client.schemas.objects import FlowRun

    from talaria.service.attention import Attention
    from talaria.service.overview import Activity
    from tasks.checking import LastChecks

FORM_BYTES = 256 << 10  # keys and certificates as text are the longest
FILE_BYTES = 4 << 20  # a list of a hundred thousand accession numbers
FIELDS = 300
NEEDS_S = 10.0  # how old the news on the home page of sources, certificates and disks may be
WAIT_S = 1.0  # for them: a share whose server is gone takes longer
TEMPLATES = Path(__file__).parent.parent / "templates"
Page = Callable[[Any, Request], Awaitable[Response]]


@functools.cache
def templates() -> Environment:
    """Return the templates; what they show is escaped, and a name that they don't get is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # takes a moment, at the first page only

    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    found.globals |= {
        "t": text,
        "asset": asset,
        "type_icon": type_icon,
        "job_kind": job_kind,
        "option_label": option_label,
        "off_peak_hours": off_peak_hours,
        "what": what,
    }
    found.filters |= {"moment": moment, "size": size, "path": functools.partial(quote, safe=""), "options": options}
    return found


def options(names: Iterable[str], chosen: str = "") -> Markup:
    """Return the options of a select; of five hundred names a template's loop would be half of a page's time."""
    from markupsafe import Markup, escape

    words = ((escape(name), " selected" if name == chosen else "") for name in names)
    return Markup("".join(f"<option{mark}>{name}</option>" for name, mark in words))  # noqa: S704 - each is escaped


def what(paths: list[str], between: str) -> str | Markup:
    """Return what a dispatch sends: its paths; of what a source dispatched, which a list of ours names, the source."""
    from markupsafe import Markup

    name = unitlist.source_named(Path(paths[0])) if len(paths) == 1 else ""
    if not name:
        return between.join(paths)
    return Markup('{} <a href="/talaria/sources/{}">{}</a>').format(
        text("target.used_source"), quote(name, safe=""), name
    )


def off_peak_hours() -> str:
    """Return the off-peak hours, with their time zone."""
    from tasks.dispatch.hours import off_peak_words

    return off_peak_words()


def render(template: str, status: int = 200, /, **values: Any) -> HTMLResponse:
    """Return a page, or a part of one, that is made of a template."""
    return HTMLResponse(templates().get_template(template).render(**values), status)


def moment(value: str | None, exact: bool = False) -> str:
    """Return a time in UTC as people read it, perhaps with seconds; the page's script shows it in the reader's zone."""
    form = "%d %b %Y %H:%M:%S UTC" if exact else "%d %b %Y %H:%M UTC"
    return datetime.fromisoformat(value).astimezone(UTC).strftime(form) if value else ""


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    number, units = float(count), ["B", "kB", "MB", "GB"]
    while number >= 1000 and len(units) > 1:
        number, units = number / 1000, units[1:]
    return f"{number:,.3g} {units[0]}" if number < 1000 else f"{number:,.0f} {units[0]}"


class Site:
    """The pages' way to the operations behind them.

    Args:
        reach: how operations reach Prefect and the state directory.
    """

    def __init__(self, reach: Reach) -> None:
        self.reach = reach
        # Where Prefect runs elsewhere, targets and runs are changed without us.
        self._targets = Kept(read_targets, reach.changes, SAVED_S if reach.embedded else FRESH_S)
        self._rows = Kept(self._read_rows, reach.changes)
        self._checks: LastChecks | None = None
        ages = reach.run_changes if reach.embedded else None
        self._waiting, self.fetched = Kept(read_waiting, ChangeCount(), ages=ages), ChangeCount()
        self._fetched = Kept(read_fetched, self.fetched)
        self._needs = Kept(self._read_needs, reach.changes, NEEDS_S)

    async def office(self, request: Request) -> Office:
        """Return the office of whoever asks."""
        return await self.reach.office(request, who(request))

    async def rows(self, office: Office) -> list[dict[str, Any]]:
        """Return all targets as lists show them."""
        return await self._rows.get(office)

    async def _read_rows(self, office: Office) -> list[dict[str, Any]]:
        if self._checks is None:
            from tasks.checking import LastChecks

            self._checks = LastChecks()
        return await shown_as_rows(office, await self._targets.get(office), self._checks)

    async def needs(self, office: Office) -> list[Attention]:
        """Return what needs somebody besides targets and dispatches, as it was some seconds ago."""
        return await self._needs.soon(office, WAIT_S) or []

    async def _read_needs(self, office: Office) -> list[Attention]:
        from talaria.service import attention

        return await attention.needed(office, await self._targets.get(office), self.reach.certificate)

    async def waiting(self, office: Office) -> list[FlowRun]:
        """Return dispatches that have not ended, the newest first."""
        return await self._waiting.get(office)

    async def retrievals(self, office: Office) -> list[dict[str, Any]]:
        """Return the newest retrievals."""
        return await self._fetched.get(office)

    async def activity(self, office: Office) -> dict[str, Activity]:
        """Return what each target had to do in the last day, by its name."""
        from talaria.service import overview

        return await overview.activity(office, await self._waiting.get(office))

    def changed(self) -> None:
        """Let targets be read anew: something about them has changed that is not saved with them."""
        self.reach.changes.note()

    def page(self, request: Request, template: str, /, *, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a whole page, in the frame that all have.

        Args:
            template: its file; `values` are what it shows.
        """
        asker = who(request)
        frame = {
            "user": asker.name,
            "role": asker.role.label,
            "may_operate": asker.role >= Role.OPERATOR,
            "may_admin": asker.role >= Role.ADMIN,
            "here": request.url.path,
            "address": request.url.path + (f"?{request.url.query}" if request.url.query else ""),
            "session": asker.how == "session",
        }
        return render(template, status, **frame, **values)


def who(request: Request) -> Identity:
    """Return whoever asks, as the gate has found."""
    found: Identity = request.scope[SCOPE_KEY]
    return found


async def fields(request: Request, several: tuple[str, ...] = (), most: int = FIELDS) -> dict[str, str]:
    """Return the fields of a form that was sent.

    Args:
        several: fields that may be there several times: their values, a line each.
        most: values that it may have in all.

    Raises:
        ValueError: it is not a form, or too long.
    """
    with _in_words(FORM_BYTES):
        return _joined(await urlencoded(request, FORM_BYTES, most, several))


async def with_file(request: Request, name: str, several: tuple[str, ...] = ()) -> tuple[dict[str, str], bytes]:
    """Return the fields of a form that may bring a small file, and the content of that.

    Args:
        name: of the file's field.
        several: as of `fields`.

    Raises:
        ValueError: it is not a form, or too long.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await fields(request, several), b""
    from starlette.datastructures import UploadFile
    from starlette.formparsers import MultiPartException, MultiPartParser

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield sent
        yield b""

    with _in_words(FILE_BYTES):
        sent = await body(request, FILE_BYTES)
    try:
        parser = MultiPartParser(request.headers, pieces(), max_files=1, max_fields=FIELDS, max_part_size=FILE_BYTES)
        form = await parser.parse()
    except (MultiPartException, KeyError) as exc:
        raise ValueError(text("error.no_form")) from exc
    found: dict[str, list[str]] = {}
    content = b""
    for key, value in form.multi_items():
        if isinstance(value, UploadFile):
            content = await value.read() if key == name else content
        else:
            found.setdefault(key, []).append(value)
    await form.close()
    with _in_words(FILE_BYTES):
        return _joined(once(found, several)), content


@contextmanager
def _in_words(most: int) -> Iterator[None]:
    """Say what is wrong about a form."""
    try:
        yield
    except NoForm as exc:
        raise ValueError(text("error.long_form", count=most) if exc.long else text("error.no_form")) from exc


def _joined(found: Mapping[str, list[str]]) -> dict[str, str]:
    return {key: "\n".join(values).replace("\r\n", "\n") for key, values in found.items()}


def saved_as(name: str, kind: str, content: str) -> Response:
    """Return a file that a browser saves.

    Args:
        kind: its media type.
    """
    return Response(content, media_type=kind, headers={"content-disposition": f'attachment; filename="{quote(name)}"'})


def is_part(request: Request) -> bool:
    """Return True if a page's script asks for a part of a page."""
    return request.headers.get("hx-request") == "true"


def shown(page: Page) -> Page:
    """Let a page show errors in words, in the frame of all pages."""

    @functools.wraps(page)
    async def answered(self: Any, request: Request) -> Response:
        try:
            return await page(self, request)
        except Exception as exc:
            status, words = answer_to(exc)
            site: Site = self.site
            return site.page(request, "error.html", status=status, words=words)

    return answered


def kind_of(request: Request) -> str:
    """Return the type that an address names beside the name; "" where the name is enough."""
    return request.query_params.get("type", "")


def said_of(request: Request, texts: str, words: Container[str]) -> str:
    """Return what a page says of what was just done, which its address names by one of some words; "" for nothing."""
    word = request.query_params.get("said", "")
    return text(f"{texts}.{word}") if word in words else ""


def ref_of(request: Request) -> str:
    """Return what names that of which a page is: its name, with its type before it where several have that name."""
    kind, name = kind_of(request), request.path_params["name"]
    return f"{kind}/{name}" if kind else str(name)
