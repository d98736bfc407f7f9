"""Backtest: a policy tried on a stream that has already happened, with nothing started and nothing kept."""
