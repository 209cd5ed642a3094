"""What another aggregation rule and another transport take: here both come from outside the package."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedllm.config import DeploymentConfig
from fedllm.errors import ConfigError
from fedllm.protocol.messages import ENVELOPE_KEY, ENVELOPE_RECORD
from fedllm.values import parse
from server.aggregate import AGGREGATION, AggregationRule
from server.grid import OneRunGrid
from tests.server.test_rounds import (  # noqa: F401  # one is a fixture
    NAMES,
    START,
    Draft,
    FakeSite,
    Federation,
    Vector,
    make_plan,
    task_identity,
)


def _middle(updates: Mapping[str, Vector], weights: Mapping[str, float]) -> Vector:
    """The median in each coordinate, whoever weighs what."""
    del weights
    return np.median(np.stack(list(updates.values())), axis=0).astype(np.float32)


@pytest.fixture
def middle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that fedllm does not have."""
    monkeypatch.setitem(AGGREGATION, "middle", AggregationRule(_middle))


@pytest.mark.usefixtures("middle")
def test_a_rule_from_outside_runs_a_federation(tmp_path: Path) -> None:
    def poison(reply: Draft) -> Draft:
        return Draft(**{**vars(reply), "payload": np.full(len(START), 1e4, np.float32).tobytes()})

    federation = Federation(tmp_path / "run", make_plan(rounds=2), aggregation="middle")
    federation.sites["jeju"].spoil = poison
    expected = START
    for number in (1, 2):
        honest = [site.delta(number, expected) for name, site in federation.sites.items() if name != "jeju"]
        expected = expected + np.maximum(*honest)  # of three, one beyond all others: the middle is the larger of two
    np.testing.assert_allclose(federation.run().adapter, expected, rtol=1e-6)


@pytest.mark.usefixtures("middle")
def test_what_does_not_fit_a_rule_is_refused_before_any_site_is_asked(tmp_path: Path) -> None:
    adam = {"name": "adam", "learning_rate": 0.1, "noise_corrected": True}
    plan = make_plan(server=adam, mode="local", noise_multiplier=1.0)
    with pytest.raises(ConfigError, match=r"noise_corrected=true.*aggregation=middle"):
        Federation(tmp_path / "corrected", plan, aggregation="middle").coordinator()
    with pytest.raises(ConfigError, match=r"federation\.aggregation=centre: no such rule\. Choose one of mean, middle"):
        Federation(tmp_path / "unknown", make_plan(), aggregation="centre").coordinator()


def test_where_only_a_sum_is_seen_no_other_rule_can_be_asked_for() -> None:
    values = {
        "name": "run", "model": {"source": "none"}, "data": {"text": "text"}, "adapter": {}, "training": {}, "site": {},
        "privacy": {"mode": "distributed", "units_per_site": 10}, "federation": {"aggregation": "middle"},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"federation\.aggregation=middle.*only the sum is seen"):
        parse(DeploymentConfig, values)


class Direct(OneRunGrid):
    """A transport that fedllm does not have: a call."""

    def __init__(self, sites: Mapping[str, FakeSite]) -> None:
        super().__init__()
        self._sites = dict(enumerate(sites.values(), start=1))

    def get_node_ids(self) -> list[int]:
        """Return all sites: nobody is away."""
        return list(self._sites)

    def _send(self, message: Message) -> bool:
        asked = message.content.config_records[ENVELOPE_RECORD][ENVELOPE_KEY]
        assert isinstance(asked, bytes)
        answer = RecordDict(
            {ENVELOPE_RECORD: ConfigRecord({ENVELOPE_KEY: self._sites[message.metadata.dst_node_id](asked)})}
        )
        self._replied(message, Message(answer, reply_to=message))
        return True


def test_a_transport_from_outside_runs_a_federation(tmp_path: Path) -> None:
    usual, direct = Federation(tmp_path / "usual", make_plan()), Federation(tmp_path / "direct", make_plan())
    direct.grid = Direct(direct.sites)  # type: ignore[assignment]
    done = direct.run()
    assert done.records[-1].answered == sorted(NAMES)
    assert done.adapter.tobytes() == usual.run().adapter.tobytes()
