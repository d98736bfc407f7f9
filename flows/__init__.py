"""The reaction: extract, train, evaluate, promote, announce; in a Prefect worker."""
