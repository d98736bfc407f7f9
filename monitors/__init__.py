"""The decisions: records, windows, drift, policy, episodes. No clock, no network, no disk in here."""
