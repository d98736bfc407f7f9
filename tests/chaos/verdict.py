"""The verdict: what the killed play came to, held against the undisturbed one."""

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable
from typing import Any

import msgspec
from scene import MODELS
from world import World

from daemon.ledger import Ledger
from daemon.verify import Verification, verify
from daemon.wire.kafka_log import KafkaLog
from daemon.wire.names import CLAIM_PREFIX
from daemon.wire.prefect import PrefectApi
from daemon.wire.references import ReferenceStore
from flows.registry import open_registry
from monitors.decoding import make_decoder
from monitors.events import Kind

UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
# These tell of how long something took, and not of what was decided.
OF_TIME = (str(Kind.RETRAIN_UNCONFIRMED), str(Kind.PROMOTION_UNSERVED))


def decisions(world: World) -> list[str]:
    """
    All that was decided, in the ledger's order, without what no two plays have in common.

    Each model for itself: between models the order is that of what a poll happened to bring.
    """
    ledger, told = world.ledger, []
    events = [event for event in ledger.events() if event["kind"] not in OF_TIME]
    for model in MODELS:
        told += [_text("window", judged) for judged in ledger.evidence(model)]
        rows = [(row["key"], row["score"], row["labelled"], row["report"]) for row in ledger.windows(model)]
        told += [_text("performance", row) for row in rows]
        told += [_text("episode", episode["state"]) for episode in ledger.episodes(model)]
        for request in ledger.requests(model):
            told.append(_text("request", [request.attempt, request.payload, request.outcome]))
        for event in events:
            if event["model"] == model:
                told.append(_text("event", json.loads(event["body"])["payload"], event["kind"]))
    told.append(_text("events", len(events)))
    told.append(_text("counters", ledger.counters()))
    names: dict[str, str] = {}
    prefix = f"{world.folder.name}-"
    return [UUID.sub(lambda found: _name(names, found[0]), one).replace(prefix, "") for one in told]


def _text(what: str, value: Any, more: str = "") -> str:
    return f"{what} {more} {msgspec.json.encode(value).decode()}"


def _name(names: dict[str, str], found: str) -> str:
    """Ids follow from the topics' names; here they are what was met first, second and so on."""
    return names.setdefault(found, f"id-{len(names)}")


def runs(world: World) -> dict[str, int]:
    """How many runs acted on the requests, and how many requests had none or more than one."""
    requests = world.ledger.requests()
    with PrefectApi(world.server.url) as api:
        claims = list(api.variables(CLAIM_PREFIX).values())
    acted = Counter(claim["request"] for claim in claims if claim.get("outcome"))
    effects: Counter[str] = Counter()
    for model in MODELS:
        registry = open_registry(world.config.flow_settings(model))
        moves = Counter(record.move.request for record in registry.audit())
        effects.update({request: count for request, count in moves.items() if count > 1})
    return {
        "requests": len(requests),
        "acting_runs": sum(acted[request.id] for request in requests),
        "missing_runs": sum(not acted[request.id] for request in requests),
        "duplicate_runs": sum(acted[request.id] > 1 or request.id in effects for request in requests),
    }


def verifications(world: World, ledger: Ledger) -> list[Verification]:
    """`verify` of every episode there is."""
    config = world.config
    decoder = make_decoder(config.mappings, config.kafka.labels_topic, list(MODELS), config.limits)
    store = ReferenceStore(config.registry.references_url)
    names = [episode["id"] for model in MODELS for episode in ledger.episodes(model)]
    log = KafkaLog(config.kafka)
    return [verify(ledger, list(MODELS), one, log, decoder, store, config.kafka.group) for one in names]


def altered_byte_is_found(world: World) -> bool:
    """Whether `verify` names the one window of which one byte of evidence was altered."""
    world.patience.begin("verifying every episode, with a byte of evidence altered")
    forged = world.folder / "forged.db"
    with sqlite3.connect(world.folder / "ledger.db") as source, sqlite3.connect(forged) as copy:
        source.backup(copy)
        query = "SELECT id, model, key, evidence FROM windows WHERE verdict = 'drifted' LIMIT 1"
        number, model, key, evidence = copy.execute(query).fetchone()
        at = evidence.index('"score":0.') + len('"score":0.')
        other = str((int(evidence[at]) + 1) % 10)
        changed = (evidence[:at] + other + evidence[at + 1 :], number)
        copy.execute("UPDATE windows SET evidence = ? WHERE id = ?", changed)
    ledger = Ledger(f"sqlite:///{forged}")
    try:
        found = verifications(world, ledger)
    finally:
        ledger.close()
    told = {(one.model, window.key) for one in found for window in one.windows if window.differences}
    return told == {(model, key)} and sum(not one.equal for one in found) == 1


def judged_windows(world: World) -> Counter[tuple[str, str, int]]:
    """How often each window is in the ledger."""
    rows: Iterable[dict[str, Any]] = (row for model in MODELS for row in world.ledger.windows(model))
    return Counter((row["model"], row["version"], row["key"]) for row in rows)
