"""Names in Prefect: safe for any model, and no two models share one."""

import re

from hypothesis import given
from hypothesis import strategies as st

from daemon.wire.names import block_name, champion_variable, deployment_name, variable_slug

models = st.text(min_size=1, max_size=300) | st.from_regex(r"[a-z0-9_-]{1,40}", fullmatch=True)


def test_a_plain_name_stays_as_it_is() -> None:
    assert variable_slug("fraud_v2-eu") == "fraud_v2-eu"
    assert deployment_name("Fraud v2") == "Fraud v2"


def test_names_that_differ_only_in_what_prefect_forbids_stay_apart() -> None:
    names = ["Fraud", "fraud", "fraud!", "fraud?", "fr\u0430ud", "fraud__1baabd4791ec1e2c"]
    assert len({variable_slug(name) for name in names}) == len(names)
    assert len({block_name(name) for name in names}) == len(names)


@given(models)
def test_any_model_has_a_name_that_prefect_takes(model: str) -> None:
    assert re.fullmatch(r"[a-z0-9_-]{1,255}", champion_variable(model))
    assert re.fullmatch(r"[a-z0-9-]{1,255}", block_name(model))
    assert not set("/%&<>") & set(deployment_name(model))


@given(models, models)
def test_two_models_never_share_a_slug(one: str, other: str) -> None:
    assert (variable_slug(one) == variable_slug(other)) == (one == other)


@given(models)
def test_the_slug_of_a_slug_is_another_models(model: str) -> None:
    slug = variable_slug(model)
    assert slug == model or variable_slug(slug) != slug
