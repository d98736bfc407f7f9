"""The story: what each act had told, held against what happened."""

from collections.abc import Iterator, Sequence

from flows.demo.facts import Kill, Request
from flows.demo.stream import Act


def broken_promises(
    acts: Sequence[Act], requests: Sequence[Request], kills: Sequence[Kill]
) -> tuple[str, ...]:
    """
    One sentence for each thing that an act had told and that did not happen.

    >>> broken_promises([Act(1, "Calm", "", 0, 10, "silence")], [], [])
    ()
    """
    return tuple(sentence for act in acts for sentence in _broken(act, requests, kills))


def _broken(act: Act, requests: Sequence[Request], kills: Sequence[Kill]) -> Iterator[str]:
    # A request asked at the last row of an act was asked by that act's last window.
    own = [request for request in requests if act.start < request.asked_row <= act.end]
    name = f"Act {act.number} ({act.title.lower()})"
    if act.expect == "silence":
        if own:
            yield f"{name}: {len(own)} retrainings were asked for; there should have been none."
        return
    wanted = "refused" if act.expect == "refused" else "promoted"
    actions = [request.action for request in own]
    if actions != [wanted]:
        found = " and ".join(f"one {action}" for action in actions) or "none"
        yield f"{name}: one request, {wanted}, was to come; there was {found}."
    if act.expect == "killed":
        yield from _not_killed(name, own, kills)


def _not_killed(name: str, own: Sequence[Request], kills: Sequence[Kill]) -> Iterator[str]:
    killed = [request for request in own if any(kill.request == request.id for kill in kills)]
    if not killed:
        yield f"{name}: the daemon was not killed between event and confirmation; the run was too quick."
    for request in killed:
        if len(request.runs) != 1:
            yield f"{name}: {len(request.runs)} runs came of the request; it should have been one."
