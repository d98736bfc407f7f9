"""Every query in docker/ asks for a metric, a label and a value that the daemon really has."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from daemon.config import load

DOCKER = Path(__file__).parents[2] / "docker"
DASHBOARD = DOCKER / "grafana-dashboard.json"
ALERTS = DOCKER / "prometheus-alerts.yml"
SCRAPES = DOCKER / "prometheus.yml"

# What Prometheus itself adds to whatever it reads.
PROMETHEUS_METRICS = {"up"}
PROMETHEUS_LABELS = {"job", "instance"}
WORDS = {"and", "or", "unless", "bool", "offset", "inf", "nan"}
GROUPINGS = {"by", "without", "on", "ignoring", "group_left", "group_right"}

TOKENS = re.compile(
    r"""
    (?P<text>"(?:[^"\\]|\\.)*")
  | (?P<range>\[[^\]]*\])
  | (?P<variable>\$\w+)
  | (?P<number>\d[\w.]*)
  | (?P<name>[a-zA-Z_:][\w:]*)
  | (?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){},])
  | (?P<space>\s+)
    """,
    re.VERBOSE,
)


class Query(NamedTuple):
    """What a PromQL expression names: metrics, (label, operator, value) matchers, labels it groups by."""

    metrics: set[str]
    matchers: set[tuple[str, str, str]]
    grouped: set[str]


def parse(expression: str) -> Query:
    """
    Read an expression as far as names go. Raises `ValueError` for what is no PromQL token.

    A name is a function or an aggregation before `(`, a label in braces or behind a grouping word,
    and a metric anywhere else.
    """
    tokens = list(_tokens(expression))
    found = Query(set(), set(), set())
    at = 0
    while at < len(tokens):
        kind, text = tokens[at]
        following = tokens[at + 1][1] if at + 1 < len(tokens) else ""
        if text == "{":
            end = tokens.index(("sign", "}"), at)
            _read_matchers(tokens[at + 1 : end], found)
            at = end
        elif kind == "name" and text in GROUPINGS and following == "(":
            end = tokens.index(("sign", ")"), at)
            found.grouped.update(word for what, word in tokens[at:end] if what == "name" and word != text)
            at = end
        elif kind == "name" and text not in WORDS and following not in {"(", *GROUPINGS}:
            found.metrics.add(text)
        at += 1
    return found


def _tokens(expression: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(expression):
        match = TOKENS.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at : at + 20]!r} in {expression!r}")
        at = match.end()
        if match.lastgroup != "space":
            yield str(match.lastgroup), match.group()


def _read_matchers(tokens: list[tuple[str, str]], found: Query) -> None:
    for label, operator, value in zip(tokens[0::4], tokens[1::4], tokens[2::4], strict=True):
        assert label[0] == "name" and operator[1] in {"=", "!=", "=~", "!~"} and value[0] == "text"
        found.matchers.add((label[1], operator[1], value[1][1:-1]))


class Exposed(NamedTuple):
    """What the daemon serves: the values of each label of each sample, by sample name."""

    labels: dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def exposed(experienced: Any) -> Exposed:
    labels: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(experienced.get("/metrics")[2]):
        for sample in family.samples:
            known = labels.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                known.setdefault(label, set()).add(value)
    return Exposed(labels)


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    found = json.loads(DASHBOARD.read_text())["panels"]
    return [panel for panel in found if panel["type"] != "row"]


def asked() -> dict[str, str]:
    """Every expression, by where it stands."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alerts()}
    for panel in panels():
        for target in panel["targets"]:
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    return found


def legends() -> dict[str, tuple[str, set[str]]]:
    """Each expression with the labels that its legend or its sentences show."""
    found = {}
    for rule in alerts():
        shown = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        found[f"alert {rule['alert']}"] = rule["expr"], set(shown)
    for panel in panels():
        for target in panel["targets"]:
            shown = re.findall(r"{{(\w+)}}", target["legendFormat"])
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"], set(shown)
    return found


def test_the_parser_finds_what_a_query_names() -> None:
    query = parse(
        'sum by (le, model) (rate(a_total{x="1", y=~"b|c"}[5m])) > 2.5 and on (z) b == 1 or absent(up)'
    )
    assert query.metrics == {"a_total", "b", "up"}
    assert query.matchers == {("x", "=", "1"), ("y", "=~", "b|c")}
    assert query.grouped == {"le", "model", "z"}
    with pytest.raises(ValueError, match="§"):
        parse("a § b")


@pytest.mark.parametrize("where", asked())
def test_every_query_asks_for_what_there_is(where: str, exposed: Exposed) -> None:
    query = parse(asked()[where])
    ours = query.metrics - PROMETHEUS_METRICS
    assert query.metrics, "it asks for nothing"
    assert ours <= exposed.labels.keys()
    there: dict[str, set[str]] = {}
    for metric in ours:
        for label, values in exposed.labels[metric].items():
            there.setdefault(label, set()).update(values)
    assert query.grouped <= there.keys() | PROMETHEUS_LABELS
    for label, operator, value in query.matchers:
        if value.startswith("$") or label in PROMETHEUS_LABELS:
            continue
        wanted = value.split("|") if "~" in operator else [value]
        assert set(wanted) <= there[label], f"no {label} is ever {value}"


@pytest.mark.parametrize("where", legends())
def test_what_is_shown_of_a_result_is_in_it(where: str, exposed: Exposed) -> None:
    """An aggregation keeps the labels it groups by, and no others."""
    expression, shown = legends()[where]
    query = parse(expression)
    kept = re.match(r"\s*(?:\w+\()?\s*(?:sum|max|min)\s+by\s+\(([^)]*)\)", expression)
    there = PROMETHEUS_LABELS.union(*(exposed.labels.get(metric, {}) for metric in query.metrics))
    assert shown <= ({name.strip() for name in kept[1].split(",")} if kept else there)


def test_no_metric_of_ours_is_looked_at_by_nobody(exposed: Exposed) -> None:
    looked_at = set().union(*(parse(expression).metrics for expression in asked().values()))
    ours = {name for name in exposed.labels if name.startswith("retrain_daemon_")}
    histogram = {name for name in ours if name.endswith(("_sum", "_count"))}
    assert ours - histogram - looked_at == set()


def test_a_counter_is_only_asked_how_fast_it_grows() -> None:
    for where, expression in asked().items():
        for name in parse(expression).metrics:
            if name.endswith(("_total", "_bucket")):
                assert re.search(rf"(rate|increase)\({name}", expression), where


def test_alerts_have_names_of_their_own_and_say_what_to_do() -> None:
    rules = alerts()
    assert len({rule["alert"] for rule in rules}) == len(rules) > 15
    for rule in rules:
        assert rule["labels"]["severity"] in {"page", "ticket"}, rule["alert"]
        assert rule["annotations"].keys() == {"summary", "description"}, rule["alert"]


def test_panels_are_where_they_do_not_cover_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    places = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in places}) == len(places)
    for panel in places:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells


def test_the_variable_of_the_dashboard_is_a_label_that_there_is(exposed: Exposed) -> None:
    (model,) = [
        one for one in json.loads(DASHBOARD.read_text())["templating"]["list"] if one["type"] == "query"
    ]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", model["definition"])
    assert found is not None and found[2] in exposed.labels[found[1]]


def test_prometheus_is_told_where_the_daemon_listens_and_which_rules_there_are() -> None:
    told = yaml.safe_load(SCRAPES.read_text())
    assert [DOCKER / name for name in told["rule_files"]] == [ALERTS]
    (job,) = told["scrape_configs"]
    port = load(DOCKER / "retrain-daemon.toml", {}).http.port
    assert job["static_configs"] == [{"targets": [f"daemon:{port}"]}]
    assert f'job="{job["job_name"]}"' in ALERTS.read_text()
    assert set(re.findall(r'job=\\?"([^"\\]+)', ALERTS.read_text() + DASHBOARD.read_text())) == {
        job["job_name"]
    }


def test_prometheus_itself_takes_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool (Debian's package prometheus)")
    found = subprocess.run(
        [promtool, "check", "rules", str(ALERTS)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
