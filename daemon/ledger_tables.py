"""The ledger's tables, as `daemon.migrations` makes them. A change here is a migration there."""

import sqlalchemy as sa

metadata = sa.MetaData()
meta = sa.Table(
    "meta", metadata, sa.Column("key", sa.String(64), primary_key=True), sa.Column("value", sa.Text)
)
owners = sa.Table(
    "owners",
    metadata,
    sa.Column("scope", sa.String(255), primary_key=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("member", sa.String(255), nullable=False),
    sa.Column("since", sa.String(40), nullable=False),
)
positions = sa.Table(
    "positions",
    metadata,
    sa.Column("topic", sa.String(255), primary_key=True),
    sa.Column("partition", sa.Integer, primary_key=True),
    sa.Column("next_offset", sa.BigInteger, nullable=False),
    sa.Column("stream_time", sa.String(40)),
    # What Kafka calls the log that the offset is of: a topic made anew is another.
    sa.Column("log", sa.String(64), nullable=False, server_default=""),
)
# The partition in which a model was met: where models are kept apart by key, all of it is in that index.
homes = sa.Table(
    "homes",
    metadata,
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("topic", sa.String(255), nullable=False),
    sa.Column("partition", sa.Integer, nullable=False),
)
models = sa.Table(
    "models",
    metadata,
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("state", sa.LargeBinary, nullable=False),
    sa.Column("early_end", sa.BigInteger, nullable=False),
)
versions = sa.Table(
    "versions",
    metadata,
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("version", sa.String(255), primary_key=True),
    sa.Column("state", sa.LargeBinary, nullable=False),
    sa.Column("first_seen", sa.String(40), nullable=False),
)
# Rows of open windows, rows a reference is learned from, predictions that wait for labels.
chunks = sa.Table(
    "chunks",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("version", sa.String(255), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("key", sa.BigInteger, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Index("chunks_of", "model", "version", "kind", "key"),
)
windows = sa.Table(
    "windows",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("version", sa.String(255), nullable=False),
    sa.Column("key", sa.BigInteger, nullable=False),
    sa.Column("start", sa.String(40), nullable=False),
    sa.Column("end", sa.String(40), nullable=False),
    sa.Column("verdict", sa.String(16), nullable=False),
    sa.Column("drift_share", sa.Float, nullable=False),
    sa.Column("evidence", sa.Text, nullable=False),
    sa.Column("grounds", sa.Text, nullable=False, default=""),
    sa.Column("report", sa.Text, nullable=False, default=""),
    sa.Column("metric", sa.String(32)),
    sa.Column("score", sa.Float),
    sa.Column("labelled", sa.Integer),
    # 1 where the window counts for the budget; of windows written before this was kept nobody knows.
    sa.Column("counted", sa.Integer),
    # What the labels said, in full: the loss, and that of each segment.
    sa.Column("performance", sa.Text),
    sa.Column("judged_at", sa.String(40), nullable=False),
    sa.UniqueConstraint("model", "version", "key"),
)
# What moved each model's state, in order: windows, their second judgements, outcomes, champions.
steps = sa.Table(
    "steps",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("settings", sa.String(64), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("taken_at", sa.String(40), nullable=False),
    sa.Index("steps_of", "model"),
)
# What windows were judged by, under its digest: settings change, and evidence must still be recomputed.
settings = sa.Table(
    "settings",
    metadata,
    sa.Column("digest", sa.String(64), primary_key=True),
    sa.Column("body", sa.Text, nullable=False),
)
episodes = sa.Table(
    "episodes",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("version", sa.String(255), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("stage", sa.String(16), nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("opened_at", sa.String(40), nullable=False),
    sa.Column("ended_at", sa.String(40)),
)
requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.String(36), primary_key=True),
    sa.Column("episode", sa.String(36), nullable=False),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("asked_at", sa.String(40), nullable=False),
    sa.Column("posted_at", sa.String(40)),
    sa.Column("posts", sa.Integer, nullable=False, default=0),
    sa.Column("run", sa.String(64)),
    sa.Column("created_by", sa.String(16)),
    sa.Column("outcome", sa.Text),
    sa.Column("ended_at", sa.String(40)),
    sa.Column("served", sa.String(16)),
    # What keeps us from asking again, as the watcher last saw it.
    sa.Column("held", sa.Text),
)
outbox = sa.Table(
    "outbox",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(36), nullable=False, unique=True),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("model", sa.String(255), nullable=False),
    sa.Column("request", sa.String(36), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("posted_at", sa.String(40)),
    sa.Column("failures", sa.Integer, nullable=False, default=0),
    sa.Column("refusal", sa.Text),
    sa.Index("outbox_waiting", "posted_at"),
)
# Dead letters that were sent back to their topic, by where they were first read.
redrives = sa.Table(
    "redrives",
    metadata,
    sa.Column("letter", sa.String(500), primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("at", sa.String(40), nullable=False),
)
silences = sa.Table(
    "silences",
    metadata,
    sa.Column("model", sa.String(255), primary_key=True),
    sa.Column("until", sa.String(40), nullable=False),
)
counters = sa.Table(
    "counters",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.BigInteger, nullable=False),
)
