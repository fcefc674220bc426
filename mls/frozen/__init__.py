"""What is read from a network that no longer learns: features, neighbours, probes, metrics, a run's matches."""
