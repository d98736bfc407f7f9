"""The demo: every real part of the loop on one machine, around a stream that drifts."""
