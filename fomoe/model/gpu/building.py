"""How the passes of a device come about."""

from __future__ import annotations

from dataclasses import replace

from fomoe.kernels.gpu.rehearsal import Rehearsal
from fomoe.model.gpu.decode import Desk
from fomoe.model.gpu.head import Head, HeadMail
from fomoe.model.gpu.held import Held
from fomoe.model.gpu.mail import Mail
from fomoe.model.gpu.passes import Passes


def rehearsed(desk: Desk, mail: Mail, held: Held, *, graphs: bool) -> Passes:
    """Return all passes, built twice: the first time shows what to compile side by side."""
    head = HeadMail.of(desk) if held.ends.head is not None else None
    rehearsal = Rehearsal(desk.gpu)
    build(replace(desk, gpu=rehearsal), mail, held, head, graphs=False)
    desk.gpu.prepare(rehearsal.jobs)
    return build(desk, mail, held, head, graphs=graphs)


def build(
    desk: Desk, mail: Mail, held: Held, head_mail: HeadMail | None, *, graphs: bool
) -> Passes:
    """Return the passes of a device with every program made."""
    head = None if head_mail is None else Head(desk, held.ends, head_mail)
    passes = Passes(desk, mail, held, head, graphs=graphs)
    passes.make_all()
    return passes
