"""The page that takes files from a browser: a folder, DICOM files or archives, to be sent to targets.

With scripts, files come in pieces, and one that broke off goes on where it was. Without, they come in one form.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from protocols.files import filesystem as fs
from talaria.front.access import Role, needs
from talaria.front.api.errors import AWAY, WRONG, answer_to, said
from talaria.front.pages.incoming import FormOfFiles
from talaria.front.pages.sending import PRIORITIES, planned
from talaria.front.pages.site import Site, shown, size, who
from talaria.front.pages.texts import text
from transfer import uploads
from transfer.errors import Busy, Misconfigured, Permanent, Rejected
from transfer.uploads import BrowserUpload

PATH = "/talaria/upload"
EACH = ("", "folder")
MANIFEST_BYTES = 32 << 20  # names and sizes of a hundred thousand files
PIECE = 1 << 20  # bytes that are written at once
ASKED = ("exclude", "priority", "each")
Answer = Callable[[Any, Request], Awaitable[Response]]


def answered(endpoint: Answer) -> Answer:
    """Let an endpoint that a script calls say errors as JSON."""

    @functools.wraps(endpoint)
    async def safe(self: Any, request: Request) -> Response:
        try:
            return await endpoint(self, request)
        except Rejected as exc:  # by us, of what was uploaded: to try again won't help
            return said(WRONG, str(exc))
        except Busy as exc:
            return said(AWAY, str(exc))
        except Exception as exc:
            return said(*answer_to(exc))

    return safe


class UploadPages:
    """The form, and what its script calls."""

    def __init__(self, site: Site) -> None:
        self.site, self.home = site, site.reach.home

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        one = "/talaria/uploads/{id}"
        return [
            Route(PATH, self.empty, methods=["GET"]),
            Route(PATH, self.whole, methods=["POST"]),
            Route("/talaria/uploads", self.begin, methods=["POST"]),
            Route(one, self.state, methods=["GET"]),
            Route(f"{one}/send", self.send, methods=["POST"]),
            Route(f"{one}/plan", self.plan, methods=["GET"]),
            Route(f"{one}/plan", self.send_planned, methods=["POST"]),
            Route(f"{one}/{{number}}", self.piece, methods=["POST"]),
        ]

    @needs(Role.OPERATOR)
    @shown
    async def empty(self, request: Request) -> Response:
        """Show the form."""
        return await self._form(request)

    async def _form(
        self, request: Request, problem: str = "", status: int = 200, chosen: list[str] | None = None
    ) -> Response:
        office = await self.site.office(request)
        targets = [row for row in await self.site.rows(office) if row["enabled"] and row["direction"] != "query"]
        return self.site.page(
            request,
            "upload.html",
            status=status,
            here_only=not office.embedded,
            targets=[(row["name"], row["type"], row["leads_to"], row["name"] in (chosen or [])) for row in targets],
            priorities=PRIORITIES,
            each=[(one, text(f"upload.each.{one}")) for one in EACH],
            limit=size(uploads.limit()),
            problem=problem,
        )

    @needs(Role.OPERATOR, bounds_body=True)
    @shown
    async def whole(self, request: Request) -> Response:
        """Take all files in one form, and send them."""
        office = await self.site.office(request)
        await asyncio.to_thread(uploads.tidy, self.home, 0.0)
        upload = await asyncio.to_thread(uploads.begin, self.home, who(request).name, [], {})
        form = None
        with upload.held():
            try:
                form = FormOfFiles(request.headers.get("content-type", ""), upload.content)
                await _written(request, form.write)
                form.close()
                asked = _asked({name: values[-1] for name, values in form.fields.items()}, form.fields.get("to", []))
                if not form.files:
                    raise Misconfigured(text("upload.nothing"))  # noqa: TRY301 - as any other thing that is wrong
                upload.files, upload.asked = form.files, asked
                if form.fields.get("do") == ["plan"]:
                    await asyncio.to_thread(upload.save)
                    await self._made(office, upload)
                    leads = f"/talaria/uploads/{upload.id}/plan"
                else:
                    leads = await self._sent(office, upload)
            except Exception as exc:
                if form is not None:
                    form.close()
                if not upload.sending:
                    await asyncio.to_thread(shutil.rmtree, upload.folder, ignore_errors=True)
                status, words = answer_to(exc)
                return await self._form(request, words, status, form.fields.get("to") if form else None)
        return RedirectResponse(leads, 303)

    @needs(Role.OPERATOR, bounds_body=True)
    @answered
    async def begin(self, request: Request) -> Response:
        """Announce an upload: its files with their sizes, and where they go."""
        body = bytearray()

        def keep(piece: bytes) -> None:
            body.extend(piece)
            if len(body) > MANIFEST_BYTES:
                raise ValueError(text("error.long_form", count=MANIFEST_BYTES))

        await _written(request, keep)
        try:
            sent = json.loads(body)
            files = [(str(path), int(count)) for path, count in sent["files"]]
            asked = _asked({name: str(sent.get(name, "")) for name in ASKED}, [str(one) for one in sent["to"]])
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise ValueError(text("error.no_form")) from exc
        if not files:
            raise Misconfigured(text("upload.nothing"))
        await self._checked(request, asked)
        await asyncio.to_thread(uploads.tidy, self.home, 0.0)
        upload = await asyncio.to_thread(uploads.begin, self.home, who(request).name, files, asked)
        return JSONResponse({"id": upload.id}, 201)

    async def _checked(self, request: Request, asked: dict[str, Any]) -> None:
        """Raise before anything is uploaded that could not be sent."""
        from tasks.dispatch.hours import check_hours
        from tasks.targets import check_destination, check_origin, load
        from transfer.plan import Origin

        office = await self.site.office(request)
        if not office.embedded:
            raise Misconfigured(text("upload.elsewhere"))
        if not asked["to"]:
            raise Misconfigured(text("send.no_target"))
        for target in await load(office.client, asked["to"], secrets=False):
            check_destination(target)
            check_origin(target, Origin())  # nobody is asked for it
            check_hours(target, asked["priority"])

    @needs(Role.OPERATOR)
    @answered
    async def state(self, request: Request) -> Response:
        """Return how many bytes of each file are there."""
        upload = await asyncio.to_thread(self._upload, request)
        have = await asyncio.to_thread(upload.sizes)
        return JSONResponse({"have": have, "whole": upload.unpacked, "run": upload.run})

    @needs(Role.OPERATOR)
    @answered
    async def piece(self, request: Request) -> Response:
        """Append to a file, from where it is."""
        upload = await asyncio.to_thread(self._upload, request)
        number, offset = request.path_params["number"], request.headers.get("upload-offset", "")
        if not number.isdecimal() or not offset.isdecimal() or upload.run:
            raise Misconfigured(text("error.no_form"))
        file = await asyncio.to_thread(upload.append, int(number), int(offset))
        try:
            await _written(request, file.write)
        finally:
            await asyncio.to_thread(file.close)
        return JSONResponse({"offset": file.offset})

    @needs(Role.OPERATOR)
    @answered
    async def send(self, request: Request) -> Response:
        """Send an upload that is whole; once, however often it is asked for."""
        return JSONResponse({"location": await self._once(request)})

    @needs(Role.OPERATOR)
    @shown
    async def plan(self, request: Request) -> Response:
        """Show what would be sent of an upload that is whole, and what is left out and why."""
        from talaria.service.dispatches import plan_dispatch

        office, upload = await self.site.office(request), await asyncio.to_thread(self._upload, request)
        if upload.run:
            return RedirectResponse(f"/talaria/dispatches/{upload.run}", 303)
        with upload.held():
            paths = await self._made(office, upload)
            asked = {name: upload.asked[name] for name in ("exclude", "each")}
            plan = await plan_dispatch(office, paths, upload.asked["to"], **asked)
        return self.site.page(request, "upload_plan.html", id=upload.id, **planned(plan))

    @needs(Role.OPERATOR)
    @shown
    async def send_planned(self, request: Request) -> Response:
        """Send an upload whose plan was shown; once, however often it is asked for."""
        return RedirectResponse(await self._once(request), 303)

    async def _once(self, request: Request) -> str:
        office, upload = await self.site.office(request), await asyncio.to_thread(self._upload, request)
        with upload.held():
            upload = await asyncio.to_thread(self._upload, request)  # as whoever held it before has left it
            return f"/talaria/dispatches/{upload.run}" if upload.run else await self._sent(office, upload)

    def _upload(self, request: Request) -> BrowserUpload:
        return uploads.find(self.home, request.path_params["id"], who(request).name)

    async def _sent(self, office: Any, upload: BrowserUpload) -> str:
        """Send an upload, which nobody else works on; return where its dispatch is shown."""
        from talaria.service.dispatches import create_dispatch

        paths = await self._made(office, upload)
        asked = {name: value for name, value in upload.asked.items() if name != "to"}
        upload.sending = True
        await asyncio.to_thread(upload.save)
        try:
            done = await create_dispatch(office, paths, upload.asked["to"], key=upload.id, **asked)
        except (Permanent, ValueError):  # else a run may have been made, which needs the files
            upload.sending = False
            await asyncio.to_thread(upload.save)
            raise
        upload.run = done["flow_run_id"]
        await asyncio.to_thread(upload.save)
        return f"/talaria/dispatches/{upload.run}"

    async def _made(self, office: Any, upload: BrowserUpload) -> list[str]:
        """Unpack an upload that is whole, which nobody else works on; return the paths that are to be sent."""
        if not office.embedded:
            raise Misconfigured(text("upload.elsewhere"))
        if count := await asyncio.to_thread(upload.missing):
            raise Misconfigured(text("upload.missing", count=count))
        if not upload.asked["to"]:
            raise Misconfigured(text("send.no_target"))
        await asyncio.to_thread(_unpack, upload)
        return [str(await asyncio.to_thread(upload.top) if upload.asked["each"] else upload.content)]


def _unpack(upload: BrowserUpload) -> None:
    """Unpack the archives of an upload, and flush it to disk: a file that a power cut emptied would be no image."""
    upload.unpack()
    try:
        if not fs.flush_all(upload.folder, lambda: None):
            os.sync()
    except OSError as exc:
        raise uploads.trouble(exc) from exc


def _asked(sent: dict[str, str], to: list[str]) -> dict[str, Any]:
    """Return what is to be done with an upload."""
    priority, each = sent.get("priority", ""), sent.get("each", "")
    return {
        "to": [one for one in to if one],
        "exclude": sent.get("exclude", "").strip(),
        "priority": priority if priority in PRIORITIES else "normal",
        "each": each if each in EACH else "",
    }


async def _written(request: Request, write: Callable[[bytes], None]) -> None:
    """Hand the body of a request on, in pieces, in a thread: a disk may be slow.

    Raises:
        ValueError: it broke off.
    """
    waiting = bytearray()
    try:
        async for piece in request.stream():
            waiting += piece
            if len(waiting) >= PIECE:
                await asyncio.to_thread(write, bytes(waiting))
                waiting.clear()
    except ClientDisconnect as exc:
        await asyncio.to_thread(write, bytes(waiting))  # what has come need not come again
        raise ValueError(text("upload.broken")) from exc
    await asyncio.to_thread(write, bytes(waiting))
