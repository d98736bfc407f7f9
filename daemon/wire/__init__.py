"""The clients that the daemon and the flows both need: Kafka, Prefect, the reference store."""
