"""Decoding: bytes to a record, or the reason why they are none."""

from collections.abc import Collection, Mapping

from monitors.careful_reader import CODES, CarefulReader, FieldMapping
from monitors.quick_reader import compile_reader
from monitors.records import Decoder, InvalidRecord, LabelRecord, PredictionRecord, RawRecord
from monitors.settings import FieldSettings, LimitSettings
from monitors.sources import mapping_problems

__all__ = ["CODES", "FieldMapping", "JsonDecoder", "TopicDecoder", "make_decoder"]


class JsonDecoder:
    """
    Typed JSON, mapped as the settings say; `labels` reads label records.

    A mapping that cannot work is a ValueError here, before any record was read.

    >>> from monitors.records import Partition
    >>> decoder = JsonDecoder(FieldSettings(id="@key"), {"fraud"}, LimitSettings(), labels=True)
    >>> value = b'{"model": "fraud", "label": true, "event_time": "2026-01-31T12:00:00Z"}'
    >>> decoder.decode(RawRecord(Partition("labels", 0), 7, 1_800_000_000_000, b"a1", value)).id
    'a1'
    """

    def __init__(
        self,
        fields: FieldSettings,
        models: Collection[str],
        limits: LimitSettings,
        labels: bool = False,
    ) -> None:
        if problems := mapping_problems(fields, labels):
            raise ValueError("; ".join(f"fields.{field}: {problem}" for field, problem in problems))
        self._careful = CarefulReader(fields, models, limits, labels)
        self._quick = compile_reader(self._careful, models, labels)
        self._labels = labels

    def decode(self, raw: RawRecord) -> PredictionRecord | LabelRecord:
        """The record. Raises `InvalidRecord` with one of `CODES`, and nothing else."""
        record = self._quick.read(raw) if self._quick else None
        return record if record is not None else self.decode_carefully(raw)

    def decode_carefully(self, raw: RawRecord) -> PredictionRecord | LabelRecord:
        """The same without the quick way; what it is tested against."""
        values = self._careful.read(raw)
        if self._labels:
            model, record_id, label, time = values
            return LabelRecord(model, record_id, label, time, raw.partition, raw.offset)
        model, version, record_id, time, features, prediction, probability, label, segment = values
        served = (model, version, record_id, time, features, prediction, raw.partition, raw.offset)
        return PredictionRecord(*served, probability, label, segment)

    def explain(self, raw: RawRecord) -> list[FieldMapping]:
        """How each field of a record was mapped, or why the record would be a dead letter."""
        return self._careful.explain(raw)


class TopicDecoder:
    """One decoder for many topics, each of which may have a mapping of its own."""

    def __init__(self, decoders: Mapping[str, Decoder]) -> None:
        self._decoders = dict(decoders)

    def decode(self, raw: RawRecord) -> PredictionRecord | LabelRecord:
        """The record, read the way its topic is."""
        decoder = self._decoders.get(raw.partition.topic)
        if decoder is None:
            raise InvalidRecord("invalid_field", "the topic is not one of the configured ones")
        return decoder.decode(raw)


def make_decoder(
    fields: Mapping[str, FieldSettings], labels_topic: str, models: Collection[str], limits: LimitSettings
) -> TopicDecoder:
    """A decoder for every topic that has a mapping; `labels_topic` is read as labels."""
    return TopicDecoder(
        {
            topic: JsonDecoder(mapping, models, limits, labels=topic == labels_topic)
            for topic, mapping in fields.items()
        }
    )
